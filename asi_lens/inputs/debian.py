"""Pinned files of Debian's archive, fetched by `apt-get download`, which installs nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from asi_lens.base.errors import FetchError
from asi_lens.base.files import sha256_of, write_whole
from asi_lens.base.offline import offline, refused
from asi_lens.inputs.download import PackageFile


def download_deb(file: PackageFile, folder: Path) -> Path:
    """Return the path of a pinned Debian package in `folder`; the first call downloads the package.

    The file's name begins with its hash, as in `download.download`. Raises FetchError where there is no
    `apt-get`, where Debian's archive does not offer this version, or where the file has another hash.
    """
    target = folder / f"{file.sha256[:12]}-{file.filename}"
    if target.exists() and target.stat().st_size == file.size and sha256_of(target) == file.sha256:
        return target
    wanted = f"{file.filename} (Debian's {file.dist} {file.version}, sha256 {file.sha256})"
    by_hand = f"Get the file from a mirror of Debian and copy it to {target}"
    if offline():
        raise refused(wanted, by_hand)
    program = shutil.which("apt-get")
    if program is None:
        raise FetchError(f"{wanted} is fetched by apt-get, which this machine does not have. {by_hand}")
    with TemporaryDirectory() as temporary:
        ran = subprocess.run(
            [program, "download", "-q", f"{file.dist}={file.version}"],
            cwd=temporary,
            capture_output=True,
            text=True,
            check=False,
        )
        found = sorted(Path(temporary).glob("*.deb"))
        if ran.returncode or len(found) != 1:
            told = " ".join((ran.stderr or ran.stdout).split())[:400]
            raise FetchError(f"apt-get did not fetch {wanted}: {told} Run `apt-get update`, or: {by_hand}")
        digest = sha256_of(found[0])
        if digest != file.sha256:
            raise FetchError(
                f"{file.filename} from Debian's archive is not the file that was pinned:\n"
                f"  expected sha256 {file.sha256}\n  received sha256 {digest}\nNothing was kept."
            )
        with write_whole(target) as whole:
            shutil.copyfile(found[0], whole)
    return target
