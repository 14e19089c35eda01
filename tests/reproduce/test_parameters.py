"""Which parameters a notebook runs with, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.reproduce.parameters import (
    choose,
    merged_parameters,
    notebook_names,
    parse_given,
    profile_names,
    require_machine,
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    return runs.project(tmp_path)


def merged(
    name: str = "02_beta", model: str = "tiny", profile: str = "quick", **given: Any
) -> dict[str, Any]:
    return merged_parameters(name, model=model, profile=profile, output_folder=Path("/out"), given=given)


def test_later_layers_win(project: Path) -> None:
    assert merged("01_alpha") == {
        "model": "tiny",
        "profile": "quick",
        "output_folder": "/out",
        "seed": 1,  # the profile's common section
        "x": 1,  # the notebook's own default
    }
    assert merged()["ranks"] == [3]  # the profile's section for this notebook
    assert merged(profile="smoke")["seed"] == 0
    assert merged(seed=5, ranks=[])["seed"] == 5
    (project / "parameters" / "tiny.yaml").write_text("model: hub/tiny\nseed: 3\n")
    assert merged()["model"] == "hub/tiny"
    assert merged()["seed"] == 3  # the model's file stands over the profile's
    assert merged(model="other/model")["seed"] == 1


def test_files_are_told_in_full_and_names_stay(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("own.txt", "notebooks/beside.txt", "news-en"):
        (project / name).write_text("text")
    cell = "x = 'text'\nmany = ['text']\n"
    runs.notebook(project / "notebooks" / "03_texts.ipynb", "", parameters=runs.PARAMETERS + cell)
    monkeypatch.chdir(project)
    for given, told in (
        ("own.txt", project / "own.txt"),
        ("./own.txt", project / "own.txt"),
        ("beside.txt", project / "notebooks" / "beside.txt"),
        ("news-en", "news-en"),
        ("nobody/knows.txt", "nobody/knows.txt"),
    ):
        found = merged("03_texts", x=given, many=[given])
        assert (found["x"], found["many"]) == (str(told), [str(told)])


@pytest.mark.parametrize("key", ["model", "profile", "output_folder"])
def test_what_the_runner_sets_is_not_given(project: Path, key: str) -> None:
    with pytest.raises(OptionError, match=f"-p {key}='x' is not allowed; .* must be (given as --|left out)"):
        merged_parameters("02_beta", model="tiny", profile="quick", output_folder=Path(), given={key: "x"})


def test_a_path_is_told_to_the_notebook_in_full(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "weights").mkdir()
    monkeypatch.chdir(project)
    assert merged(model="weights")["model"] == str(project / "weights")
    assert merged(model="./weights")["model"] == str(project / "weights")


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("quick", "common: {sed: 1}", "unknown parameter of 02_beta .in quick.yaml, common. 'sed'.*'seed'"),
        ("quick", "common: {}\n02_beta: {rank: 1}", "quick.yaml, 02_beta. 'rank'.*'ranks'"),
        ("quick", "common: {}\n02_betta: {x: 1}", "unknown section of quick.yaml '02_betta'.*'02_beta'"),
        ("tiny", "model: tiny\ncontxt: 1", "tiny.yaml. 'contxt'"),
    ],
)
def test_unknown_keys_are_told_with_the_nearest(project: Path, file: str, text: str, told: str) -> None:
    (project / "parameters" / f"{file}.yaml").write_text(text)
    with pytest.raises(UnknownNameError, match=told):
        merged()


def test_unknown_names_are_told_with_the_nearest(project: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"the command line\) 'sead'; did you mean 'seed'"):
        merged(sead=1)
    with pytest.raises(UnknownNameError, match="unknown profile 'quik'; did you mean 'quick'"):
        merged(profile="quik")
    with pytest.raises(UnknownNameError, match="unknown profile 'tiny'"):
        merged(profile="tiny")
    with pytest.raises(UnknownNameError, match="unknown notebook '02_bet'; did you mean '02_beta'"):
        merged("02_bet")
    with pytest.raises(UnknownNameError, match="unknown notebook"):
        choose(["01_alpha", "03"])


def test_a_value_of_another_kind_is_refused_wherever_it_stands(project: Path) -> None:
    with pytest.raises(OptionError, match="the command line: ranks='3' is not allowed; ranks must be a list"):
        merged(ranks="3")
    (project / "parameters" / "tiny.yaml").write_text("model: tiny\nseed: 1e3\n")
    with pytest.raises(OptionError, match=r"tiny\.yaml: seed='1e3' .* whole number.*write 1_000"):
        merged()
    (project / "parameters" / "tiny.yaml").unlink()
    (project / "parameters" / "quick.yaml").write_text("common: {}\n02_beta: {ranks: [1, 2.5]}\n")
    with pytest.raises(OptionError, match=r"quick\.yaml, 02_beta: ranks=.*each item a whole number"):
        merged()
    for text in ("common: 3", "common: {}\n02_beta: [1]"):
        (project / "parameters" / "quick.yaml").write_text(text)
        with pytest.raises(DataError, match=r"quick\.yaml, \w+ must hold keys and values"):
            merged()


def test_a_notebook_needs_its_parameters_cell_with_plain_values(project: Path) -> None:
    folder = project / "notebooks"
    runs.notebook(folder / "03_bare.ipynb", "x = 1", tag=False)
    with pytest.raises(OptionError, match="03_bare has no cell tagged `parameters` that sets model, profile"):
        merged("03_bare")
    runs.notebook(folder / "03_bare.ipynb", parameters='model = "tiny"\nseed = 0\n')
    with pytest.raises(OptionError, match="that sets profile, output_folder"):
        merged("03_bare")
    runs.notebook(folder / "03_bare.ipynb", parameters=runs.PARAMETERS + "x = 2 * seed\n")
    with pytest.raises(OptionError, match="default of x is not a literal"):
        merged("03_bare")


@pytest.mark.parametrize("text", ["common: [", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_table_of_parameters_is_told(project: Path, text: str) -> None:
    (project / "parameters" / "quick.yaml").write_text(text)
    with pytest.raises(DataError, match=r"quick\.yaml"):
        merged()


def test_a_profile_may_need_a_device(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    path = project / "parameters" / "big.yaml"
    path.write_text("needs: cuda\ncommon: {}\n")
    assert merged(profile="big")["profile"] == "big"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_machine("quick")
    require_machine("no_such_profile")  # another error tells of it
    with pytest.raises(OptionError, match=r"profile 'big' needs a CUDA device.* finds none here"):
        require_machine("big")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_machine("big")
    path.write_text("needs: tpu\ncommon: {}\n")
    with pytest.raises(OptionError, match=r"needs \(in big.yaml\)='tpu' is not allowed"):
        require_machine("big")


def test_notebooks_are_chosen_by_name_or_number_as_they_were_named(project: Path) -> None:
    assert notebook_names() == ["01_alpha", "02_beta"]
    assert profile_names() == ["quick", "smoke"]
    assert choose(None) == choose([]) == ["01_alpha", "02_beta"]
    assert choose(["02", "01_alpha", "02_beta"]) == ["02_beta", "01_alpha"]


def test_groups_are_told_apart_by_number(project: Path) -> None:
    for name in ("13_last", "14_first", "20_other"):
        runs.notebook(project / "notebooks" / f"{name}.ipynb", "y = 1")
    assert choose(None) == choose(["paper"]) == ["01_alpha", "02_beta", "13_last"]
    assert choose(["beyond"]) == ["14_first", "20_other"]
    assert choose(["20", "beyond", "01"]) == ["20_other", "14_first", "01_alpha"]
    assert choose(["all"]) == notebook_names()
    with pytest.raises(UnknownNameError, match="did you mean 'beyond'"):
        choose(["beyon"])


def test_given_values_are_read_as_yaml() -> None:
    assert parse_given(["a=1", "b=[x, 2]", "c=1=2", "d=text", "e=1_000", "f=true"]) == {
        "a": 1,
        "b": ["x", 2],
        "c": "1=2",
        "d": "text",
        "e": 1000,
        "f": True,
    }
    for bad in ("a", "=1", ""):
        with pytest.raises(OptionError, match="key=value"):
            parse_given([bad])
    with pytest.raises(OptionError, match="a=\\["):
        parse_given(["a=["])
