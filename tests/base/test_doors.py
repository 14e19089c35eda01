"""doors.py: what fits an annotation, what it becomes, and what the error says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

import asi_lens as al
from asi_lens.base.doors import checked, fitted, kind_of
from asi_lens.base.errors import DataError, OptionError, shown

ONES = [
    np.int64(1),
    np.int8(1),
    np.uint16(1),
    torch.tensor(1),
    torch.tensor(1, dtype=torch.uint8),
    np.array(1),
]


@pytest.mark.parametrize("one", ONES)
def test_a_whole_number_of_any_library_is_an_int(one: Any) -> None:
    for hint in (int, int | None, int | str, int | float):
        found = fitted("x", one, kind_of(hint))
        assert found == 1
        assert type(found) is int
    assert fitted("x", [one, 2], kind_of(Sequence[int])) == [1, 2]
    assert fitted("x", {"a": one}, kind_of(Mapping[str, int])) == {"a": 1}
    assert fitted("x", ["z", one], kind_of(tuple[str, int])) == ("z", 1)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(3),
        torch.arange(3),
        range(3),
        (0, 1, 2),
        np.arange(3, dtype=np.uint8),
        [0, *map(np.int64, (1, 2))],
    ],
)
def test_arrays_are_lists_of_numbers(array: Any) -> None:
    found = fitted("x", array, kind_of(Sequence[int]))
    assert list(found) == [0, 1, 2]
    assert {type(one) for one in found} == {int}


@pytest.mark.parametrize(
    ("hint", "value", "told"),
    [
        (int, True, "x=True is not allowed; x must be a whole number"),
        (int, np.bool_(True), "a whole number"),
        (int, torch.tensor(True), "a whole number"),
        (int, 1.0, "x=1.0 is not allowed; x must be a whole number"),
        (int, torch.tensor([1]), r"x=Tensor of shape \(1,\) and dtype torch.int64"),
        (int, 2**63, "a whole number"),
        (float, "8e-4", "x='8e-4' is not allowed; x must be a number"),
        (float, float("nan"), "a number"),
        (float | None, True, "a number or None"),
        (bool, 1, "True or False"),
        (str, b"x", "text"),
        (Sequence[str], "attn_out", "a list, each item text"),
        (Sequence[int], {1, 2}, "a list, each item a whole number"),
        (Sequence[int], [1, True], "a list, each item a whole number"),
        (Iterable[str], {"a": 1}, "a list, each item text"),
        (tuple[str, int], "ab", r"\(text, a whole number\)"),
        (tuple[str, int], ("a", 1, 2), r"\(text, a whole number\)"),
        (Mapping[str, int], [("a", 1)], "a mapping from text to a whole number"),
        (Path | str, 3, "a path"),
        (Path | str, "a\0b", "a path"),
        (Path | str, "", "a path"),
        (torch.device | str, "gpu", "'auto', 'cpu' or 'cuda'"),
        (Literal["a", "b"], "c", "'a' or 'b'"),
        (Callable[[int], int], 3, "a function"),
        (al.Tokens, ["a"], "a Tokens"),
        (type[int], str, "a subclass of int"),
        (Float[Tensor, "n d"], [[1.0]], r"a Tensor \[n d\] of floating point numbers"),
        (int | str, [], "a whole number or text"),
    ],
)
def test_what_does_not_fit_is_told(hint: Any, value: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        fitted("x", value, kind_of(hint))


def test_arrays_of_another_shape_or_dtype_are_wrong_data() -> None:
    for value in (
        torch.zeros(3),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.complex64),
    ):
        with pytest.raises(DataError, match=r"x=Tensor of shape .* must be a Tensor \[n d\] of floating"):
            fitted("x", value, kind_of(Float[Tensor, "n d"]))
    with pytest.raises(DataError, match="of whole numbers"):
        fitted("x", torch.zeros(2), kind_of(Int[Tensor, " n"]))


def test_what_fits_stays_the_same_object() -> None:
    for hint, value in (
        (Sequence[float], [0.5, 1.0]),
        (Mapping[str, int], {"a": 1}),
        (float | int, 1),
        (Sequence[Any], [object()]),
        (tuple[str, int], ("a", 1)),
        (Any, object()),
    ):
        assert fitted("x", value, kind_of(hint)) is value
    assert type(fitted("x", 1, kind_of(float))) is float


@checked
def _function(a: int, b: str = "b", *rest: float, c: bool = True, **more: int) -> Any:
    return a, b, rest, c, more


@checked
@dataclass(frozen=True)
class _Class:
    a: int
    b: Sequence[int] = ()

    @classmethod
    def of(cls, a: int) -> _Class:
        return cls(a)

    @staticmethod
    def twice(a: int) -> int:
        return 2 * a

    def plus(self, b: int) -> int:
        return self.a + b

    @property
    def double(self) -> int:
        return 2 * self.a


def test_a_function_checks_every_argument() -> None:
    assert _function(np.int64(1), "x", 1, 2.5, c=np.bool_(False), d=3) == (
        1,
        "x",
        (1.0, 2.5),
        False,
        {"d": 3},
    )
    for args, options, told in (
        (("1",), {}, "a='1'"),
        ((1, 2), {}, "b=2"),
        ((1, "b", "c"), {}, "rest='c'"),
        ((1,), {"c": 1}, "c=1"),
        ((1,), {"d": "x"}, "d='x'"),
        ((), {"a": None}, "a=None"),
    ):
        with pytest.raises(OptionError, match=told):
            _function(*args, **options)
    for args, options in (((), {}), ((1,), {"a": 2})):
        with pytest.raises(TypeError):
            _function(*args, **options)
    assert _function.__name__ == "_function"


def test_a_class_checks_its_constructor_and_methods() -> None:
    made = _Class(np.int64(1), np.arange(2))
    assert (type(made.a), made.b, made.double, made.plus(np.int8(2)), _Class.of(3).a) == (
        int,
        [0, 1],
        2,
        3,
        3,
    )
    assert _Class.twice(np.int64(2)) == 4
    for call in (
        lambda: _Class("1"),
        lambda: _Class.of(True),
        lambda: made.plus("x"),
        lambda: _Class.twice(0.5),
    ):
        with pytest.raises(OptionError, match="a whole number"):
            call()


def test_values_are_shown_shortly() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ValueError

    assert shown(Broken()) == "an object of Broken"
    assert len(shown("x" * 9999)) == 120
    assert shown(np.zeros((2, 3))) == "ndarray of shape (2, 3) and dtype float64"
    assert shown(torch.nn.Linear(2, 2)) == "Linear(...)"


@pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
def test_layers_of_numpy_and_torch_are_layers(
    tiny_llama: Any, tiny_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were refused after a whole shard, or with a raw TypeError."""
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    stores = [
        al.harvest_store(tiny_llama, tiny_tokens, "attn_out", layer, folder=tmp_path / str(i), progress=False)
        for i, layer in enumerate((1, np.int64(1), torch.tensor(1)))
    ]
    assert len({store.fingerprint for store in stores}) == 1
    assert {type(store.metadata["layer"]) for store in stores} == {int}
    with pytest.raises(OptionError, match="layer=True"):
        al.harvest_store(tiny_llama, tiny_tokens, "attn_out", True, folder=tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()
    for layers in (np.arange(2), torch.arange(2), range(2), (np.int8(0), 1)):
        found = al.collect_spectra(tiny_llama, tiny_tokens, ["z"], layers, progress=False)
        assert list(found) == [("z", 0), ("z", 1)]
    for layers in ([True], "01", [0.0], np.array([0.0, 1.0]), 1):
        with pytest.raises(OptionError, match=r"layers=.*each item a whole number"):
            al.collect_spectra(tiny_llama, tiny_tokens, ["z"], layers, progress=False)


def test_numbers_of_numpy_reach_files_as_plain_ones() -> None:
    config = al.SAEConfig(np.int64(4), np.int32(8), torch.tensor(2), seed=np.uint8(3))
    assert {type(getattr(config, key)) for key in ("d_in", "d_sae", "k", "seed")} == {int}
    train = al.TrainConfig(lr=np.float32(0.5), batch_size=np.int64(8), aux_k=np.int64(2), clip_norm=1)
    assert (train.lr, train.aux_k, train.clip_norm) == (0.5, 2, 1.0)
    assert {type(train.lr), type(train.clip_norm)} == {float}


def test_the_package_imports_without_torch() -> None:
    code = "import sys, asi_lens, asi_lens.base.doors; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
