"""Fixtures shared by all tests; nothing here reaches the network or the user's cache."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Before anything imports huggingface_hub or transformers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One test process a core: more threads would wait for each other, those of kernels and children too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import small_plain
import tiny_models
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("asi_lens", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("asi_lens")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with tests of real models and notebooks first: they take longest, each in one process."""
    names = ("packaged", "notebooks")
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in names)}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of this session: `ASI_LENS_TEST_CACHE` if set, else a temporary folder for all workers."""
    chosen = os.environ.get("ASI_LENS_TEST_CACHE")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = Path(chosen) if chosen else base / "asi_lens_cache"
    os.environ["ASI_LENS_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tiny_folder("llama")` is the local Hugging Face folder of a tiny model, built on first use."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(architecture: str) -> Path:
        found = root / f"tiny-{architecture}"
        return found if found.exists() else tiny_models.build(architecture, found)

    return folder


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`plain_folder("vit")` is the folder of a tiny model of `small_plain.KINDS`, built on first use."""
    root = tmp_path_factory.mktemp("plain")

    def folder(kind: str) -> Path:
        found = root / f"tiny-{kind}"
        return found if found.exists() else small_plain.build(kind, found)

    return folder


@pytest.fixture(scope="session")
def plain(plain_folder: Any) -> Any:
    """`plain("whisper", "decoder")` is that model, loaded as `load_model` does, in float32 on the CPU."""
    from asi_lens.inputs.models import load_model

    known: dict[Any, Any] = {}

    def load(kind: str, part: str | None = None) -> Any:
        if (kind, part) not in known:
            known[kind, part] = load_model(plain_folder(kind), dtype="float32", device="cpu", part=part)
        return known[kind, part]

    return load


@pytest.fixture(scope="session", params=list(tiny_models.CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Every architecture of `tiny_models` in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_model(architecture: str, tiny_folder: Any) -> Any:
    """A tiny model of `architecture`, loaded as `load_model` does, in float32 on the CPU."""
    from asi_lens.inputs.models import load_model

    return load_model(tiny_folder(architecture), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny_llama(tiny_folder: Any) -> Any:
    """Llama with grouped queries: 3 layers, d_model 24, 4 heads of 6, 2 key-value heads."""
    from asi_lens.inputs.models import load_model

    return load_model(tiny_folder("llama"), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny_tokens() -> Any:
    """12 sequences of 32 random tokens of the tiny models' vocabulary, BOS first."""
    from asi_lens.inputs.corpora import Tokens

    ids = torch.randint(
        len(tiny_models.SPECIALS), tiny_models.D_VOCAB, (12, 32), generator=torch.Generator().manual_seed(0)
    )
    ids[:, 0] = tiny_models.SPECIALS.index("<bos>")
    return Tokens(ids=ids, corpus="random", tokenizer="tiny", context=32)


@pytest.fixture(scope="session")
def pairs(tiny_llama: Any, tiny_tokens: Any) -> Any:
    """What an attention layer of `tiny_llama` reads and writes on `tiny_tokens`; no test changes it."""
    from small_lorsas import LAYER

    from asi_lens.lorsa.data import harvest_pairs

    return harvest_pairs(tiny_llama, tiny_tokens, LAYER, progress=False)


@pytest.fixture
def unchecked_shapes() -> Any:
    """Shapes in annotations go unchecked, as for users: checks take most of the time of many calls.

    Tests of few calls check the same functions.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def refuse_writes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from whose call on no lock, file or folder can be made, as on a read-only disk."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    def begin() -> None:
        import filelock

        monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
        for name in ("mkstemp", "mkdtemp"):
            monkeypatch.setattr(tempfile, name, refuse)
        for name in ("mkdir", "write_text", "write_bytes", "rename", "replace", "touch"):
            monkeypatch.setattr(Path, name, refuse)

    return begin


@pytest.fixture
def launch() -> Any:
    """Starts ranks (`small_ranks.Launched`), which end with the test."""
    from small_ranks import Launched

    started: list[Launched] = []

    def begin(*files: Path, module: str = "asi_lens.sae") -> Launched:
        started.append(Launched.with_files(files, module))
        return started[-1]

    yield begin
    for one in started:
        one.close()


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, tiny_models.D_VOCAB, (2, 20), generator=generator)
