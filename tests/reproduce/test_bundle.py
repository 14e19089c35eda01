"""Bundles: what goes in, what is told of one that is not whole, and work without a network from one alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml

from asi_lens.base.errors import CacheError, DataError, FetchError, OptionError, UnknownNameError
from asi_lens.inputs.sources import SOURCES
from asi_lens.reproduce import bundle

CELL = """
import asi_lens as al
page = al.Page("01_alpha", globals())
lens = page.load_model()
tokens = page.load_tokens(lens, n_tokens)
"""
MEDIA = {"pictures": "pictures-skimage", "speech": "speech-prompts", "sequences": "antibodies"}
# Brings up the loopback of a new network namespace, which kernels need, then runs a command.
ALONE = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    fcntl.ioctl(one, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Any) -> Callable[..., dict[str, Any]]:
    """Makes a bundle of a tiny project: a notebook that reads 64 tokens of articles with a tiny model."""
    project, cache = tmp_path / "project", tmp_path / "cache"
    monkeypatch.setenv("ASI_LENS_PROJECT", str(project))
    monkeypatch.setenv("ASI_LENS_CACHE", str(cache))
    runs.project(project)
    more = 'dtype = "float32"\ncontext = 16\nmain_corpus = "wiki-en"\nn_tokens = 64\n'
    runs.notebook(project / "notebooks" / "01_alpha.ipynb", CELL, parameters=runs.PARAMETERS + more)
    folder = SOURCES["wiki-en"].folder
    folder.mkdir(parents=True)
    articles = json.dumps([{"extract": "abcde" * 9} for _ in range(3)] + [{"extract": "e" * 400}])
    (folder / "summaries_en-us.json").write_text(articles)
    files = {"summaries_en-us.json": {"size": len(articles), "sha256": ""}}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "source": "wiki-en", "files": files}))

    def one(folder: Path, **options: Any) -> dict[str, Any]:
        given = {"model": str(tiny_folder("llama")), "notebooks": ["01"], "without": ["wheels"], **options}
        return bundle.make(folder, **given)

    return one


def test_data_that_a_model_takes_in_place_of_text(
    make: Callable[..., dict[str, Any]], tmp_path: Path, plain_folder: Any
) -> None:
    """A model of residues takes the packaged sequences; the text for a language model stays out."""
    cell = CELL.replace("load_tokens", "load_inputs")
    names = "".join(f'{kind} = "{name}"\n' for kind, name in MEDIA.items())
    more = f'{names}dtype = "float32"\ncontext = 16\nmain_corpus = "wiki-en"\nn_tokens = 64\n'
    runs.notebook(
        tmp_path / "project" / "notebooks" / "01_alpha.ipynb", cell, parameters=runs.PARAMETERS + more
    )
    folder = SOURCES["antibodies"].folder
    folder.mkdir(parents=True)
    (folder / "vh.csv").write_text("input_seq\nEVQ\n")
    files = {"vh.csv": {"size": 14, "sha256": ""}}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "source": "antibodies", "files": files}))
    manifest = make(tmp_path / "b", model=str(plain_folder("esm")), without=["wheels", "texts"])
    assert f"cache/downloads/{folder.name}/vh.csv" in manifest["files"]
    assert not [name for name in manifest["files"] if "wiki" in name]
    assert manifest["licenses"]["antibodies"] == SOURCES["antibodies"].license
    with pytest.raises(OptionError, match="packaged name"):
        make(tmp_path / "c", model=str(plain_folder("esm")), given={"sequences": "own.txt"})


def test_it_holds_what_the_notebooks_ask_for(
    make: Callable[..., dict[str, Any]], tmp_path: Path, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_text("a")
    manifest = make(tmp_path / "b", more=[tmp_path / "store"], part_mib=1)
    model = tiny_folder("llama")
    assert manifest["models"] == [str(model)]
    assert [text["source"] for text in manifest["texts"]] == ["wiki-en"]
    assert manifest["licenses"] == {"wiki-en": SOURCES["wiki-en"].license}
    kinds = {name.split("/")[1] for name in manifest["files"] if name.startswith("cache/")}
    assert kinds == {"downloads", "corpora"}
    assert f"given/{model.name}/config.json" in manifest["files"]
    assert "given/store/a" in manifest["files"]
    variables = bundle.use(tmp_path / "b", tmp_path / "there")
    assert variables["ASI_LENS_BUNDLE"] == str(tmp_path / "there" / "cache")
    assert (Path(variables["ASI_LENS_PROJECT"]) / "notebooks" / "01_alpha.ipynb").is_file()
    # There, everything is read from the bundle, and what it lacks is refused at once.
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "empty"))
    from asi_lens.inputs.corpora import load_tokens
    from asi_lens.inputs.documents import open_corpus
    from asi_lens.inputs.models import load_model

    lens = load_model(tmp_path / "there" / "given" / model.name, dtype="float32", device="cpu")
    load_tokens("wiki-en", lens, 64, context=16)
    assert {path.name for path in (tmp_path / "empty").iterdir()} <= {"verifications"}
    assert len(list(open_corpus("wiki-en").documents())) == 2
    with pytest.raises(Exception, match=r"wiki_offline-0\.0\.7.* is not on this machine"):
        list(open_corpus("wiki-fr").documents())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Any) -> Path:
    """The hub's own cache, with two snapshots of owner/tiny: links to blobs, `main` is the second."""
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--owner--tiny"
    for commit, change in (("a" * 40, "older"), ("b" * 40, "newer")):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        for path in tiny_folder("llama").iterdir():
            blob = repo / "blobs" / f"{change}-{path.name}"
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(repo.parent))
    return repo


THERE = """
import json, sys
import asi_lens as al
from huggingface_hub import constants
lens = al.load_model("owner/tiny", dtype="float32", device="cpu")
info, tokens = al.model_info(lens), al.load_tokens("wiki-en", lens, 64, context=16)
print(json.dumps([info.name, info.fingerprint, tokens.fingerprint, constants.HF_HUB_CACHE]))
"""


def test_a_model_of_the_hub_is_the_snapshot_in_the_hubs_cache(
    make: Callable[..., dict[str, Any]], tmp_path: Path, hub: Path
) -> None:
    from asi_lens.inputs.corpora import load_tokens
    from asi_lens.inputs.models import load_model, model_info

    manifest = make(tmp_path / "b", model="owner/tiny", without=["wheels", "texts"])
    assert manifest["hub"] == {"owner/tiny": "b" * 40}
    taken = {Path(name) for name in manifest["files"] if name.startswith("hub/")}
    kept = Path("hub/models--owner--tiny")
    snapshot = kept / "snapshots" / ("b" * 40)
    assert taken == {snapshot / path.name for path in (hub / "snapshots" / ("b" * 40)).iterdir()} | {
        kept / "refs" / "main"
    }
    variables = bundle.use(tmp_path / "b", tmp_path / "there")
    lens = load_model("owner/tiny", dtype="float32", device="cpu")
    tokens = load_tokens("wiki-en", lens, 64, context=16)

    # There, with nothing but the bundle, it is the same model under the same name.
    shutil.rmtree(hub.parent)
    variables |= {"ASI_LENS_CACHE": str(tmp_path / "empty"), "HF_HOME": str(tmp_path / "nothing")}
    done = without_network("-c", THERE, **variables)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == [
        "owner/tiny",
        model_info(lens).fingerprint,
        tokens.fingerprint,
        str(tmp_path / "there" / "hub"),
    ]
    # What the bundle lacks is refused at once.
    done = without_network("-c", THERE.replace("owner/tiny", "owner/other"), **variables)
    assert "FetchError: the model 'owner/other' is not on this machine" in done.stderr


def test_a_snapshot_that_is_not_whole_is_refused(
    make: Callable[..., dict[str, Any]], tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub / "snapshots" / ("b" * 40) / "model.safetensors").unlink()
    with pytest.raises(FetchError, match="cannot fetch 'owner/tiny'"):
        make(tmp_path / "b", model="owner/tiny")
    (hub / "refs" / "main").unlink()
    monkeypatch.setenv("ASI_LENS_OFFLINE", "1")
    with pytest.raises(FetchError, match="'owner/tiny' is not on this machine"):
        make(tmp_path / "b", model="owner/tiny")
    assert not (tmp_path / "b").exists()


def test_tokens_alone(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    manifest = make(tmp_path / "b", without=["wheels", "texts", "project"])
    kinds = [name.split("/")[1] for name in manifest["files"] if name.startswith("cache/")]
    assert kinds == ["corpora"]
    assert not (tmp_path / "b" / "project.zip").exists()
    assert "PYTHONPATH" not in bundle.use(tmp_path / "b")


def test_tokens_of_another_transformers_are_told(
    make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, without in (("tokens", ["wheels", "texts", "project"]), ("texts", ["wheels", "project"])):
        make(tmp_path / name, without=without)
        bundle.use(tmp_path / name)  # a warning would fail the test
    monkeypatch.setattr(bundle, "version", lambda name: "5.4.0")
    bundle.use(tmp_path / "texts")
    with pytest.warns(
        UserWarning, match=r"tokens in this bundle are of transformers .*, and 5\.4\.0 is installed"
    ):
        bundle.use(tmp_path / "tokens")


def test_tokens_of_the_texts_own_tokenizer(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    cell = CELL + "own = page.small_tokenizer(260)\npage.load_tokens(own, n_tokens)\n"
    more = 'dtype = "float32"\ncontext = 16\nmain_corpus = "wiki-en"\nn_tokens = 64\n'
    notebook = tmp_path / "project" / "notebooks" / "01_alpha.ipynb"
    runs.notebook(notebook, cell, parameters=runs.PARAMETERS + more)
    manifest = make(tmp_path / "b", without=["wheels", "texts", "project"])
    kinds = [name.split("/")[1] for name in manifest["files"] if name.startswith("cache/")]
    assert sorted(set(kinds)) == ["corpora", "tokenizers"]
    assert kinds.count("corpora") == 2
    assert [text["vocab"] for text in manifest["texts"]] == [None, 260]


def test_the_commands(
    make: Callable[..., dict[str, Any]], tmp_path: Path, tiny_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "b")
    options = ["--notebooks", "01", "--without", "wheels", "--model", str(tiny_folder("llama"))]
    assert bundle.main(["make", folder, *options, "--tokens-only", "-p", "n_tokens=32"]) == 0
    assert "1 calls for text" in capsys.readouterr().out
    assert bundle.main(["verify", folder]) == 0
    assert bundle.main(["use", folder, "--into", str(tmp_path / "in to")]) == 0
    told = capsys.readouterr().out
    assert f"export ASI_LENS_BUNDLE='{tmp_path}/in to/cache'\n" in told
    (tmp_path / "b" / "part-000.tar.gz").unlink()
    assert bundle.main(["verify", folder]) == 1
    assert "CacheError: " in capsys.readouterr().err


def test_a_bundle_that_is_not_whole_or_of_another_version(
    make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "b"
    make(folder)
    assert bundle.verify(folder)["source"] == bundle.source_digest()
    with (folder / "project.zip").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CacheError, match=r"project\.zip has .* bytes, not"):
        bundle.use(folder)
    monkeypatch.setattr(bundle, "source_digest", lambda: "0123")
    with pytest.raises(DataError, match=r"was made by asi_lens .*this is .* \(source 0123\)"):
        bundle.use(folder)
    with pytest.raises(DataError, match="is not a whole bundle"):
        bundle.use(tmp_path)
    assert not (folder / "unpacked").exists()


def test_what_cannot_be_taken_along(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for options, error, told in (
        ({"model": "owner/name"}, FetchError, "cannot fetch 'owner/name' from the model hub"),
        ({"model": "tiny"}, UnknownNameError, "A model is also a hub name"),
        ({"given": {"main_corpus": "owner/name"}}, OptionError, "text='owner/name'.*at a commit"),
        ({"given": {"main_corpus": "owner/name@main"}}, OptionError, "text='owner/name@main'.*40 hex"),
        ({"more": [tmp_path / "nothing"]}, DataError, "no file or folder .*nothing"),
        ({"without": ["torches"]}, UnknownNameError, "did you mean 'torch'"),
        ({"part_mib": 0}, OptionError, "part_mib=0"),
    ):
        with pytest.raises(error, match=told):
            make(tmp_path / "b", **options)
        assert not (tmp_path / "b").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(OptionError, match="mine exists and is not a bundle"):
        make(tmp_path / "mine")


def without_network(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a namespace without a network, or where the machine forbids that, with closed proxies."""
    python = [sys.executable, "-P"]
    closed = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    ours = ("ASI_LENS", "PIP_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    unshare = ["unshare", "-rn", *python, "-c", ALONE, *python]
    tried = shutil.which("unshare") and subprocess.run([*unshare, "-c", ""], capture_output=True, check=False)
    allowed = tried and tried.returncode == 0
    return subprocess.run(
        [*(unshare if allowed else python), *command],
        env={**inherited, **closed, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.packaged
@pytest.mark.notebooks
@pytest.mark.slow
def test_a_notebook_and_a_training_run_from_a_bundle_alone(
    tmp_path: Path, tiny_llama: Any, tiny_tokens: Any
) -> None:
    from asi_lens.activations.harvest_store import harvest_store

    given = tmp_path / "given"
    harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=given / "store", progress=False)
    run = {"store": "store", "sae": {"d_sae": 64, "k": 4}, "train": {"n_tokens": 256, "batch_size": 64}}
    run["train"] |= {"dead_window": 128}
    run |= {"output": str(tmp_path / "run"), "initialize": {"sample": 64}}
    (given / "run.yaml").write_text(yaml.safe_dump(run))
    options: dict[str, Any] = {"profile": "smoke", "notebooks": ["01"], "without": ["wheels", "texts"]}
    bundle.make(tmp_path / "b", more=[given], part_mib=30, **options)

    # Unpacked by the project that it holds.
    zipped = str(tmp_path / "b" / "project.zip")
    done = without_network("-m", "asi_lens.reproduce.bundle", "use", str(tmp_path / "b"), PYTHONPATH=zipped)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("export ").partition("=") for line in done.stdout.splitlines()]
    variables = {name: value for name, _, value in lines}
    variables |= {"ASI_LENS_CACHE": str(tmp_path / "cache"), "ASI_LENS_FIGURES": str(tmp_path / "figures")}
    variables |= {"BROWSER_PATH": "no-browser"}

    done = without_network("-m", "asi_lens.reproduce", "--profile", "smoke", "--notebooks", "01", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    left = tmp_path / "figures" / "smollm2-135m" / "smoke"
    assert {"01_rank_curves.csv", "01_rank_curves.json"} <= {path.name for path in left.iterdir()}
    assert not list((tmp_path / "cache").glob("corpora/*")), "the tokens are the bundle's"

    done = without_network(
        "-m", "asi_lens.sae", str(tmp_path / "b/unpacked/given/given/run.yaml"), **variables
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "sae").is_dir()
