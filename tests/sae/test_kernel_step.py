"""When a training is done by the kernels, and what is said where it cannot be. No kernel runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_trainings import D_IN, K, make, quick

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.kernels.triton.card import GIB, UnsupportedError
from asi_lens.sae import kernel_step
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.kernel_step import choose_kernels
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.transcoder import Transcoder
from asi_lens.training.config import TrainConfig
from asi_lens.training.mesh import Mesh, MeshConfig


class TwoRanks(Mesh):
    config = MeshConfig(model=2)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`card(free)` lets the CPU pass for a card with so many bytes free."""

    def with_free(free: int | None = None) -> None:
        monkeypatch.setattr(kernel_step, "require_card", lambda device: None)
        monkeypatch.setattr(kernel_step, "free_bytes", lambda device: free)

    return with_free


def chosen(kernels: str = "triton", sae: SparseAutoencoder | None = None, **changes: Any) -> Any:
    sparsity = changes.pop("sparsity", SparsityConfig())
    mesh, search = changes.pop("mesh", Mesh()), changes.pop("search", "exact")
    dtype = changes.pop("dtype", torch.bfloat16)
    return choose_kernels(
        make() if sae is None else sae, quick(kernels=kernels, **changes), sparsity, mesh, search, dtype
    )


def test_a_training_that_the_kernels_can_do(card: Any) -> None:
    card(GIB)
    plan, reason = chosen()
    assert (plan.d, plan.n, plan.k) == (D_IN, 128, K)
    assert reason == ""


CONFIGS = {
    "activation='relu'; the kernels train 'topk'": {"activation": "relu"},
    "activation='batchtopk'": {"activation": "batchtopk"},
    "d_in=17; the kernels take multiples of 16": {"d_in": 17},
    "k=100 with d_sae=128": {"k": 100},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_dictionaries_beyond_the_kernels_are_refused(card: Any, message: str) -> None:
    card()
    sae = SparseAutoencoder(SAEConfig(**{"d_in": D_IN, "d_sae": 128, "k": K} | CONFIGS[message]))
    with pytest.raises(OptionError, match=f"kernels='triton' is not possible: {message}"):
        chosen(sae=sae)
    # The automatic choice is then the plain path.
    assert chosen("plain", sae=sae) == (None, "kernels='plain'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aux_k": 4}, "aux_k=4; the kernels train without AuxK"),
        ({"aux_k": "auto"}, "aux_k='auto'"),
        ({"clip_norm": 1.0}, "clip_norm=1.0; the kernels do not clip"),
        ({"sparsity": SparsityConfig(prefixes=(32,))}, r"prefixes=\[32\]"),
        ({"mesh": TwoRanks()}, "2 ranks; the kernels train on one"),
        ({"search": "subspace"}, "search='subspace'; the kernels search exactly"),
        ({"dtype": torch.float32}, "compute_dtype=torch.float32; the kernels multiply in bfloat16"),
    ],
)
def test_options_beyond_the_kernels_are_refused(card: Any, changes: dict[str, Any], message: str) -> None:
    card()
    with pytest.raises(OptionError, match=f"kernels='triton' is not possible: {message}"):
        chosen(**changes)


def test_a_transcoder_takes_the_plain_path(card: Any) -> None:
    card()
    with pytest.raises(OptionError, match="a transcoder; the kernels train autoencoders"):
        chosen(sae=Transcoder(SAEConfig(D_IN, 128, K, d_out=D_IN)))


def test_too_little_memory_says_what_would_fit(card: Any) -> None:
    card(2**19)
    sae = SparseAutoencoder(SAEConfig(D_IN, 4096, K), draw=False)
    with pytest.raises(
        OptionError, match=r"d_sae=4096 and batch_size=64 need 0\.00 GiB.* d_sae=\d+ would fit"
    ):
        chosen(sae=sae)


def test_no_triton_no_card_and_what_auto_does_then(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> None:
        raise UnsupportedError("Triton is not installed")

    monkeypatch.setattr(kernel_step, "require_card", missing)
    with pytest.raises(OptionError, match="kernels='triton' is not possible: Triton is not installed"):
        chosen()
    assert chosen("auto") == (None, "the kernels run on an NVIDIA card, not on cpu")


def test_the_option_is_checked_and_left_out_where_it_is_automatic() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'triton'"):
        TrainConfig(kernels="tritton")
    # So that runs that were trained before there was the option are found.
    assert "kernels" not in TrainConfig().as_dict()
    assert TrainConfig(kernels="plain").as_dict()["kernels"] == "plain"
    assert "encoder_lr" not in TrainConfig().as_dict()
    assert TrainConfig(encoder_lr=0.25).as_dict()["encoder_lr"] == 0.25
    assert TrainConfig.from_dict(TrainConfig().as_dict()) == TrainConfig()
