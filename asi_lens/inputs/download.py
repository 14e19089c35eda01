"""Plain files from a Python package index: found with `unearth`, checked, never run or imported.

pip cannot be used: even `pip download` runs an sdist's setup.py. unearth's `download_and_unpack` cannot be
used either: it decodes archives that servers label as gzip-encoded (which changes the hash), does not
distinguish a truncated file from a wrong file, and silently skips links that point outside.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asi_lens.base.errors import FetchError
from asi_lens.base.files import sha256_of, write_whole
from asi_lens.base.offline import offline, refused

_log = logging.getLogger(__name__)

_ATTEMPTS = 3


@dataclass(frozen=True)
class PackageFile:
    """One pinned file of a package index: a wheel or an sdist."""

    dist: str
    version: str
    filename: str
    sha256: str
    size: int
    """Bytes of the file."""

    @classmethod
    def wheel(cls, dist: str, version: str, sha256: str, size: int) -> PackageFile:
        """Return a wheel of pure Python, whose file is named after the package and its version."""
        filename = f"{dist.replace('-', '_')}-{version}-py3-none-any.whl"
        return cls(dist, version, filename, sha256, size)


@dataclass(frozen=True)
class PipSettings:
    """pip's settings for finding packages, from its configuration files and PIP_* variables."""

    index_urls: tuple[str, ...]
    find_links: tuple[str, ...]
    trusted_hosts: tuple[str, ...] = ()
    cert: str | None = None
    client_cert: str | None = None
    proxy: str | None = None
    timeout: float = 15.0

    @property
    def locations(self) -> tuple[tuple[str, str], ...]:
        """Pairs ("find_links" | "index", location), in the order of the search."""
        links = tuple(("find_links", link) for link in self.find_links)
        return links + tuple(("index", url) for url in self.index_urls)


def pip_settings() -> PipSettings:
    """Return the settings of `python -m pip config list`, or without pip only the PIP_* variables."""
    values: dict[str, str] = {}
    for section, options in _pip_config().items():
        # As in `pip download`: [download] overrides [global], and the environment overrides both.
        if section in ("global", "download", ":env:"):
            values.update(options)
    no_index = values.get("no-index", "").lower() in ("1", "true", "yes", "on", "y", "t")
    index = values.get("index-url") or values.get("pypi-url") or "https://pypi.org/simple"
    urls = [] if no_index else [index, *values.get("extra-index-url", "").split()]
    return PipSettings(
        index_urls=tuple(dict.fromkeys(urls)),
        find_links=tuple(values.get("find-links", "").split()),
        trusted_hosts=tuple(values.get("trusted-host", "").split()),
        cert=values.get("cert") or None,
        client_cert=values.get("client-cert") or None,
        proxy=values.get("proxy") or None,
        timeout=float(values.get("timeout") or values.get("default-timeout") or 15),
    )


def _pip_config() -> dict[str, dict[str, str]]:
    """Return pip's settings by section, in pip's order of precedence (lowest first)."""
    found: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        _log.info("pip's configuration files are not read: pip is not installed here")
        for key, value in os.environ.items():
            if key.startswith("PIP_") and value:
                found[":env:"][key[4:].lower().replace("_", "-")] = value
        return found
    for line in asked.stdout.splitlines():
        key, equals, value = line.partition("=")
        section, dot, option = key.rpartition(".")
        if equals and dot:
            found.setdefault(section, {})[option] = str(ast.literal_eval(value))
    return found


def download(file: PackageFile, folder: Path) -> Path:
    """Download `file` into `folder` from the locations that pip would search; return its path.

    The file's name begins with its hash; a complete copy in `folder` is not downloaded again. Offline
    (`base.offline`), only locations on this machine are searched. Raises FetchError if no location has the
    file, or if the download is truncated or has another hash, and OSError naming the path if the file cannot
    be written.
    """
    target = folder / f"{file.sha256[:12]}-{file.filename}"
    if target.exists():
        if target.stat().st_size == file.size and sha256_of(target) == file.sha256:
            return target
        _log.warning("%s is not the file that was downloaded; fetching it again", target)
    settings = pip_settings()
    problems: list[str] = []
    alone = offline()
    with _client(settings) as client:
        for kind, location in settings.locations:
            if alone and "://" in location and not location.startswith("file:"):
                continue
            link = _find(client, kind, location, file, problems)
            if link is not None:
                _stream(client, link, file, target)
                return target
    if alone:
        raise refused(
            f"{file.filename} ({file.dist}=={file.version}, sha256 {file.sha256})",
            "Copy the file into a folder and name it in PIP_FIND_LINKS",
        )
    told = "\n  ".join(problems) or "no index is configured (PIP_NO_INDEX?)"
    raise FetchError(
        f"could not find {file.filename} ({file.dist}=={file.version}):\n  {told}\n"
        "Without a network, point ASI_LENS_CACHE at a cache folder that was filled elsewhere; behind a "
        "mirror, set PIP_INDEX_URL (or pip's configuration) to an index that carries this file."
    )


@contextmanager
def _client(settings: PipSettings) -> Iterator[Any]:
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers import PyPIClient

    verify: ssl.SSLContext | bool = True
    if settings.cert:
        try:
            folder = os.path.isdir(settings.cert)
            verify = ssl.create_default_context(
                cafile=None if folder else settings.cert, capath=settings.cert if folder else None
            )
        except OSError as error:
            raise FetchError(f"pip's cert={settings.cert!r} cannot be read: {error}") from error
    more: dict[str, Any] = {"proxy": settings.proxy} if settings.proxy else {}
    client = PyPIClient(
        trusted_hosts=settings.trusted_hosts,
        verify=verify,
        cert=settings.client_cert,
        timeout=settings.timeout,
        follow_redirects=True,  # many indexes are behind a redirect; httpx does not follow by default
        **more,
    )
    client.auth = MultiDomainBasicAuth(prompting=False, index_urls=list(settings.index_urls))
    with client:
        yield client


def _find(client: Any, kind: str, location: str, file: PackageFile, problems: list[str]) -> Any | None:
    """Return the link to exactly this file at one location, or None after adding a reason to `problems`."""
    from unearth import PackageFinder
    from unearth.link import Link
    from unearth.preparer import HTTPErrors

    shown = Link(location).redacted if "://" in location else location
    finder = PackageFinder(session=client, ignore_compatibility=True)
    finder.sources = [{"url": location, "type": kind}]
    unreachable: tuple[type[Exception], ...] = (*HTTPErrors, OSError, ValueError)
    with _collector_log() as complaints:
        try:
            packages = list(finder.find_all_packages(file.dist, allow_yanked=True))
        except unreachable as error:
            problems.append(f"{shown}: {type(error).__name__}: {error}")
            return None
    for package in packages:
        if package.link.filename == file.filename:
            return package.link
    found = f"{len(packages)} other files of" if packages else "nothing named"
    problems.append("; ".join((f"{shown}: {found} {file.dist}", *complaints)))
    return None


@contextmanager
def _collector_log() -> Iterator[list[str]]:
    """Yield a list that collects unearth's log lines, for our error's text.

    unearth only logs an index's refusal (403, 404, 500) and continues.
    """
    logger, complaints = logging.getLogger("unearth.collector"), []

    def keep(record: logging.LogRecord) -> bool:
        complaints.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        yield complaints
    finally:
        logger.removeFilter(keep)


def _stream(client: Any, link: Any, file: PackageFile, target: Path) -> None:
    from tqdm import tqdm
    from unearth.preparer import HTTPErrors

    for attempt in range(1, _ATTEMPTS + 1):
        digest, got = hashlib.sha256(), 0
        try:
            with (
                client.get_stream(link.normalized, headers={"Accept-Encoding": "identity"}) as response,
                write_whole(target) as temporary,
                tqdm(total=file.size, unit="B", unit_scale=True, desc=file.filename) as bar,
            ):
                response.raise_for_status()
                with temporary.open("wb") as out:
                    # Raw, since httpx would decompress a .tar.gz that a server labels as gzip-encoded.
                    for block in response.iter_raw():
                        digest.update(block)
                        got += len(block)
                        out.write(block)
                        bar.update(len(block))
                _check_arrived(link.redacted, file, got, digest.hexdigest())
            return
        except HTTPErrors as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if attempt == _ATTEMPTS or 400 <= status < 500:
                raise FetchError(
                    f"the download of {file.filename} from {link.redacted} broke off after {got:,} of "
                    f"{file.size:,} bytes ({type(error).__name__}: {error}); nothing was kept; run it again"
                ) from error
            _log.warning("download of %s broke off (%s); trying again", file.filename, error)
            time.sleep(attempt)


def _check_arrived(where: str, file: PackageFile, got: int, digest: str) -> None:
    if digest == file.sha256:
        return
    if got < file.size:
        raise FetchError(
            f"the download of {file.filename} from {where} was cut off: {got:,} of {file.size:,} bytes "
            "arrived; nothing was kept; run it again"
        )
    raise FetchError(
        f"{file.filename} from {where} is not the file that was pinned:\n"
        f"  expected sha256 {file.sha256}\n  received sha256 {digest}\n"
        "The index serves another file under this name; nothing was kept."
    )
