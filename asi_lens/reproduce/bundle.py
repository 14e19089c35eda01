"""Everything that a profile's notebooks need on a machine without a network, in one folder.

    python -m asi_lens.reproduce.bundle make FOLDER --profile quick     where there is a network
    python -m asi_lens.reproduce.bundle verify FOLDER                   after it was copied
    eval "$(python -m asi_lens.reproduce.bundle use FOLDER)"            there: unpacks, sets the variables

A bundle holds weights, texts and their tokens, the wheels of the lock, and the project. What the notebooks
ask for is found out from the notebooks. Of a model of the hub, the snapshot in the hub's own cache is taken.
`verify` and `use` need Python 3.11 alone; without a checkout they run as
`PYTHONPATH=FOLDER/project.zip python -m asi_lens.reproduce.bundle use FOLDER`.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from asi_lens import __version__
from asi_lens.base.errors import AsiLensError, DataError, OptionError, require, require_known, require_whole
from asi_lens.base.files import existing, source_digest, write_whole_folder
from asi_lens.base.paths import cached, project_root, watched
from asi_lens.reproduce import parts

PROJECT, CACHE, GIVEN, HUB, WHEELS = "project.zip", "cache", "given", "hub", "wheels"
WITHOUT = ("texts", "wheels", "torch", "project")
_PROJECT_FILES = ("pyproject.toml", "requirements.lock", "README.md", "LICENSE", "Makefile")
_PROJECT_FOLDERS = ("asi_lens", "notebooks", "parameters")


def make(
    folder: Path,
    *,
    model: str = "smollm2-135m",
    profile: str = "quick",
    notebooks: Sequence[str] | None = None,
    given: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    dequantized: bool = False,
    more: Sequence[Path] = (),
    part_mib: int = 1024,
    python: str = "3.12",
    platform: str = "linux_x86_64",
) -> dict[str, Any]:
    """Write a bundle into `folder` and return its manifest.

    Args:
        model, profile, notebooks, given: as in `reproduce`.
        without: parts to leave out, of `WITHOUT`. Without "texts" the tokens that the notebooks ask for are
            taken all the same, and no others can be made there.
        dequantized: take weights of packaged models as they are loaded, too: larger, and 30 s faster.
        more: files and folders to take along, such as a store or a run file.
        part_mib: size of a part of the stream at most, in MiB.
        python, platform: of the other machine, for wheels.

    Raises OptionError and UnknownNameError for options, DataError for what cannot be taken along, and the
    errors of loading, of pip and of writing.
    """
    require_known(without, WITHOUT, "part of a bundle")
    require_whole("part_mib", part_mib, 1)
    if folder.exists() and not (folder / parts.MANIFEST).is_file():
        raise OptionError(f"{folder} exists and is not a bundle; choose another folder")
    options = (model, profile, notebooks, given, "texts" not in without, dequantized)
    asked, taken, commits, licenses = _inputs(*options)
    for path in more:
        if not path.exists():
            raise DataError(f"no file or folder {path} to take along")
        taken |= parts.files_below(path, f"{GIVEN}/{path.resolve().name}")
    with write_whole_folder(folder) as temporary:
        if "wheels" not in without:
            taken |= _wheels(temporary / WHEELS, python, platform, without)
        about = parts.write_parts(temporary, taken, part_mib << 20)
        if (temporary / WHEELS).is_dir():
            shutil.rmtree(temporary / WHEELS)
        if "project" not in without:
            about["parts"].append(_project(temporary / PROJECT))
        manifest = {
            "version": __version__,
            "source": source_digest(),
            "profile": profile,
            "models": asked.models,
            "hub": commits,
            "texts": [vars(text) for text in asked.texts],
            "without": list(without),
            "python": python,
            "platform": platform,
            "transformers": version("transformers"),
            "licenses": licenses,
            **about,
        }
        parts.write_manifest(temporary, manifest)
    return parts.read_manifest(folder)


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a whole bundle of this version.

    Raises DataError for a folder that is not a bundle or is of another version of the project, and
    CacheError that names each part which is missing or was changed.
    """
    manifest = parts.read_manifest(folder)
    if manifest["source"] != source_digest():
        raise DataError(
            f"{folder} was made by asi_lens {manifest['version']} (source {manifest['source']}); this is "
            f"{__version__} (source {source_digest()}). Use the bundle's own project "
            f"(PYTHONPATH={folder / PROJECT}), or make the bundle anew"
        )
    parts.check_parts(folder, manifest)
    return manifest


def use(folder: Path, into: Path | None = None) -> dict[str, str]:
    """Unpack a bundle (once) and return the environment variables with which it is used.

    `into`: folder of the unpacked files, `unpacked` in the bundle by default. Raises as `verify` and
    `parts.unpack_parts` do. Warns where the tokens of a bundle without texts may not be found.
    """
    manifest = verify(folder)
    _warn_of_another_tokenizer(manifest)
    into = (into or folder / "unpacked").absolute()
    parts.unpack_parts(folder, manifest, into)
    variables = {"ASI_LENS_BUNDLE": str(into / CACHE), "ASI_LENS_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    (into / CACHE).mkdir(exist_ok=True)
    if (into / HUB).is_dir():
        variables["HF_HUB_CACHE"] = str(into / HUB)
    if (into / WHEELS).is_dir():
        variables["PIP_FIND_LINKS"] = str(into / WHEELS)
    if (folder / PROJECT).is_file():
        project = into / "project"
        if not project.exists():
            with write_whole_folder(project) as temporary, zipfile.ZipFile(folder / PROJECT) as archive:
                archive.extractall(temporary)
        variables |= {"ASI_LENS_PROJECT": str(project), "PYTHONPATH": str(project)}
    return variables


def _warn_of_another_tokenizer(manifest: Mapping[str, Any]) -> None:
    """Tokens are found by their tokenizer, which can be another one where transformers is."""
    made = manifest["transformers"]
    try:
        here = version("transformers")
    except PackageNotFoundError:
        return
    if "texts" in manifest["without"] and here != made:
        warnings.warn(
            f"the tokens in this bundle are of transformers {made}, and {here} is installed. It may read "
            "another tokenizer from the same file (of a GGUF, say), whose tokens are not in the bundle. "
            f"Install transformers=={made}, or make the bundle with its texts",
            stacklevel=3,
        )


def _inputs(
    model: str,
    profile: str,
    notebooks: Sequence[str] | None,
    given: Mapping[str, Any] | None,
    texts: bool,
    dequantized: bool,
) -> tuple[Any, dict[str, Path], dict[str, str], dict[str, str]]:
    """Return what the notebooks ask for, its files by path in the bundle, commits of hub models by name, and
    licenses by source."""
    from asi_lens.inputs import sources
    from asi_lens.inputs.corpora import load_tokens
    from asi_lens.inputs.media import media_names
    from asi_lens.inputs.media_inputs import data_kind
    from asi_lens.inputs.models import hub_name, load_model
    from asi_lens.inputs.small_tokenizer import small_tokenizer
    from asi_lens.inputs.texts import MIXTURES
    from asi_lens.reproduce.asked import asked_by
    from asi_lens.reproduce.parameters import choose, merged_parameters

    options: dict[str, Any] = {"model": model, "profile": profile, "given": given, "output_folder": Path()}
    asked = asked_by({name: merged_parameters(name, **options) for name in choose(notebooks)})
    taken: dict[str, Path] = {}
    commits: dict[str, str] = {}
    media: set[str] = set()
    kinds = ("downloads", "corpora", "tokenizers", *(["models"] if dequantized else []))
    for text in asked.texts:
        pinned = re.search(r"@[0-9a-f]{40}$", text.source) or text.source in sources.corpus_names()
        told = "a packaged text or a data set of the hub at a commit (owner/name@<40 hex digits>)"
        require(bool(pinned), "text", text.source, told)
    with watched() as entries:
        for name in asked.models:
            path = None if name in sources.SOURCES else existing(name)
            loaded = load_model(path or name, device="cpu")
            if path is not None:
                whole = path.resolve()
                taken |= parts.files_below(whole, f"{GIVEN}/{whole.name}")
            elif name not in sources.SOURCES and (repo := hub_name(name)):
                commits[name], files = _hub_model(repo)
                taken |= files
            for text in asked.texts:
                if text.model == name and text.media and (kind := data_kind(loaded)) != "text":
                    media |= {dict(text.media)[kind]}
                elif text.model == name:
                    options = {"n_tokens": text.n_tokens, "context": text.context, "offset": text.offset}
                    load_tokens(text.source, loaded, **options)
            del loaded
        for text in asked.texts:
            if text.vocab is not None:
                options = {"n_tokens": text.n_tokens, "context": text.context, "offset": text.offset}
                load_tokens(text.source, small_tokenizer(text.trained_on, text.vocab), **options)
        names = {part for text in asked.texts for part in MIXTURES.get(text.source, [text.source])}
        for name in sorted(media):
            require(name in media_names(), "data", name, f"a packaged name ({', '.join(media_names())})")
        for name in sorted((names if texts else set()) & sources.SOURCES.keys() | media):
            sources.fetch(name)
    packaged = {*names, *media, *asked.models} & sources.SOURCES.keys()
    needed = {*media, *asked.models}
    folders = {sources.SOURCES[name].folder.name for name in packaged if texts or name in needed}
    for kind, name in entries:
        if kind in kinds and (kind != "downloads" or name in folders):
            taken |= parts.files_below(cached(kind, name), f"{CACHE}/{kind}/{name}")
    return asked, taken, commits, {name: sources.SOURCES[name].license for name in sorted(packaged)}


def _hub_model(repo: str) -> tuple[str, dict[str, Path]]:
    """Return commit and files of a model in the hub's cache, in the layout of that cache."""
    from asi_lens.inputs.hub import local_snapshot

    snapshot = local_snapshot(repo)
    root = snapshot.parents[1]
    files = parts.files_below(snapshot, f"{HUB}/{root.name}/snapshots/{snapshot.name}")
    return snapshot.name, {**files, f"{HUB}/{root.name}/refs/main": root / "refs" / "main"}


def _wheels(folder: Path, python: str, platform: str, without: Sequence[str]) -> dict[str, Path]:
    from asi_lens.reproduce.wheels import TORCH, download_wheels, needed

    folder.mkdir()
    project = project_root()
    left_out = [TORCH] if TORCH in without else []
    versions = needed(project / "requirements.lock", project, python=python, platform=platform)
    found = download_wheels(versions, folder, python=python, platform=platform, without=left_out)
    return {f"{WHEELS}/{path.name}": path for path in found}


def _project(path: Path) -> dict[str, Any]:
    """Write the project's source as a zip on which Python can run; returns its entry of the manifest."""
    root = project_root()
    chosen = {name: root / name for name in _PROJECT_FILES if (root / name).is_file()}
    for name in _PROJECT_FOLDERS:
        chosen |= parts.files_below(root / name, name)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in sorted(chosen.items()):
            archive.write(source, name)
    return parts.stamp_of(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m asi_lens.reproduce.bundle", description=__doc__, formatter_class=form
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make", help="write a bundle")
    making.add_argument(
        "--model", default="smollm2-135m", help="a packaged name, folder, .gguf file or hub name"
    )
    making.add_argument("--profile", default="quick")
    making.add_argument("--notebooks", default="", help="names, numbers or groups; paper if left out")
    making.add_argument("-p", dest="given", action="append", default=[], metavar="KEY=VALUE")
    making.add_argument("--without", default="", help=f"comma-separated, of {', '.join(WITHOUT)}")
    making.add_argument("--tokens-only", action="store_true", help="the same as --without texts")
    making.add_argument("--dequantized", action="store_true", help="also weights as they are loaded")
    making.add_argument("--with", dest="more", action="append", type=Path, default=[], metavar="PATH")
    making.add_argument("--part-mib", type=int, default=1024, help="largest part, in MiB")
    making.add_argument("--python", default="3.12", help="of the other machine, for wheels")
    making.add_argument("--platform", default="linux_x86_64", help="of the other machine, for wheels")
    using = verbs.add_parser("use", help="unpack a bundle, print the variables")
    using.add_argument("--into", type=Path, help="folder of the unpacked files")
    for verb in (making, using, verbs.add_parser("verify", help="check the parts of a bundle")):
        verb.add_argument("folder", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        _command(chosen)
    except (AsiLensError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _command(chosen: argparse.Namespace) -> None:
    if chosen.verb == "use":
        for name, value in use(chosen.folder, chosen.into).items():
            print(f"export {name}={shlex.quote(value)}")
        return
    if chosen.verb == "verify":
        manifest = verify(chosen.folder)
    else:
        from asi_lens.reproduce.parameters import parse_given

        without = [name for name in chosen.without.split(",") if name]
        manifest = make(
            chosen.folder,
            model=chosen.model,
            profile=chosen.profile,
            notebooks=[name for name in chosen.notebooks.split(",") if name],
            given=parse_given(chosen.given),
            without=[*without, *(["texts"] if chosen.tokens_only else [])],
            dequantized=chosen.dequantized,
            more=chosen.more,
            part_mib=chosen.part_mib,
            python=chosen.python,
            platform=chosen.platform,
        )
    sizes = [part["size"] / 2**20 for part in manifest["parts"]]
    print(f"{chosen.folder}: {len(manifest['files'])} files in {len(sizes)} parts, {sum(sizes):,.1f} MiB")
    for part, size in zip(manifest["parts"], sizes, strict=True):
        print(f"  {part['file']} {size:,.1f} MiB")
    print(f"  models {', '.join(manifest['models'])}; {len(manifest['texts'])} calls for text")


if __name__ == "__main__":
    raise SystemExit(main())
