"""A run of a small transformer learns, is measured, and resumes to the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_fits import ALL, CONFIG, HELD_OUT, OPTIONS, trained, training
from torch.nn import functional

from asi_lens.activations.spectrum import Spectrum
from asi_lens.experiments import small_fit
from asi_lens.experiments.small_fit import measured, order_of
from asi_lens.experiments.small_training import Training, Variant, next_token_loss
from asi_lens.experiments.small_transformer import SmallTransformer
from asi_lens.training.checkpoint import CHECKPOINT_FILE, OtherConfigurationError
from asi_lens.training.metrics import METRICS_FILE, read_metrics


def without_speed(folder: Path) -> list[dict[str, Any]]:
    return [{**row, "tokens_per_s": None} for row in read_metrics(folder / METRICS_FILE)]


def test_it_learns_and_measures_on_the_way(tmp_path: Path) -> None:
    one = trained(tmp_path)
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20]
    assert [row["tokens"] for row in rows] == [0, 320, 640, 960, 1280]
    losses = [row["validation_loss"] for row in rows]
    assert losses[0] == pytest.approx(torch.tensor(30.0).log().item(), abs=0.1), "equal guesses"
    assert losses[-1] < losses[0] - 0.3
    assert rows[-1]["validation_loss"] == measured(one.model, HELD_OUT, 4)["validation_loss"]
    assert not (tmp_path / CHECKPOINT_FILE).exists(), "no time to write one"


@pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
def test_what_is_measured() -> None:
    model = SmallTransformer(CONFIG, 2)
    found = measured(model, HELD_OUT, 7)
    with torch.no_grad():
        logits = model(HELD_OUT.ids[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), HELD_OUT.ids[:, 1:].flatten())
        x = model.embedding(HELD_OUT.ids[:, :-1])
        z = model.blocks[0].attention.z(model.blocks[0].norm_attention(x))[:, 1:].flatten(0, 1)
        out = z @ model.blocks[0].attention.W_O.weight.T
    assert found["validation_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert next_token_loss(model, HELD_OUT.ids).item() == pytest.approx(loss.item(), rel=1e-6)
    assert found["z_rank_0"] == pytest.approx(Spectrum.of(z.double()).effective_rank_fraction, rel=1e-4)
    assert found["rank_0"] == pytest.approx(Spectrum.of(out.double()).effective_rank_fraction, rel=1e-4)
    assert 0.3 < found["overlap_0"] < 0.6, "random heads"
    assert found["left_out_1"] == 0


def test_massive_rows_are_not_counted() -> None:
    model = SmallTransformer(CONFIG, 2)
    plain = measured(model, HELD_OUT, 4)
    hooks = []
    for attention in model.attentions()[:1]:

        def spike(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[0, 5, 3] = 1e5 * output.abs().max()
            return output

        hooks.append(attention.W_O.register_forward_hook(spike))
    found = measured(model, HELD_OUT, 4)
    assert found["left_out_0"] == 10, "one of each batch"
    assert found["rank_0"] == pytest.approx(plain["rank_0"], rel=0.02)
    assert all(hook.remove() is None for hook in hooks)


@pytest.mark.parametrize("variant", ALL, ids=lambda variant: variant.name)
def test_a_resumed_run_ends_in_the_same_bits(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole", variant)
    step, calls = Training.step, [0]

    def interrupted(self: Training, ids: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] == 12:
            signal.raise_signal(signal.SIGINT)  # waits for the end of the step
        return step(self, ids)

    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", variant)
    assert calls[0] == 12
    resumed = trained(tmp_path / "parts", variant)
    assert calls[0] == 20, "no step was done twice"
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    assert without_speed(tmp_path / "parts") == without_speed(tmp_path / "whole")


def test_a_killed_run_goes_back_to_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_fit, "CHECKPOINT_SECONDS", -1)  # after each step
    whole = trained(tmp_path / "whole")
    code = (
        "import sys, os\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import small_fits as t\n"
        "from asi_lens.experiments import small_fit\n"
        "small_fit.CHECKPOINT_SECONDS = -1\n"
        "measured = small_fit.measured\n"
        "def die(*args):\n"
        "    os._exit(9) if args[0].embedding.weight.grad is None and os.listdir(sys.argv[1]).count(\n"
        "        'checkpoint.safetensors') else None\n"
        "    return measured(*args)\n"
        "small_fit.measured = die\n"
        "t.trained(t.Path(sys.argv[1]))\n"
    )
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(Path(__file__).parents[1])], check=False
    )
    assert done.returncode == 9, "in the measurement after step 5, before its row was written"
    assert [row["step"] for row in read_metrics(folder / METRICS_FILE)] == [0]
    resumed = trained(folder)
    assert all(torch.equal(tensor, resumed.state()[name]) for name, tensor in whole.state().items())
    assert without_speed(folder) == without_speed(tmp_path / "whole")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_fit, "CHECKPOINT_SECONDS", -1)
    trained(tmp_path)
    with pytest.raises(OtherConfigurationError, match=r"training\.lr \(0\.005 there, 0\.001 here\)"):
        trained(tmp_path, options=replace(OPTIONS, lr=1e-3))
    with pytest.raises(OtherConfigurationError, match=r"variant\.weight_decay"):
        trained(tmp_path, Variant("baseline", weight_decay=0.0))


def test_a_frozen_w_o_stays_and_keeps_the_rank(tmp_path: Path) -> None:
    one = trained(tmp_path, ALL[4])
    for attention, start in zip(one.model.attentions(), training(ALL[4]).model.attentions(), strict=True):
        W_O = attention.W_O.weight
        assert torch.equal(W_O, start.W_O.weight)
        torch.testing.assert_close(W_O @ W_O.T, torch.eye(32), rtol=0, atol=1e-5)
        assert not torch.equal(attention.W_V.weight, start.W_V.weight)
    last = read_metrics(tmp_path / METRICS_FILE)[-1]
    assert last["rank_1"] == pytest.approx(last["z_rank_1"], rel=1e-3)
    assert last["overlap_1"] == pytest.approx(0, abs=1e-5)
    first, second = (a.W_O.weight for a in one.model.attentions())
    assert not torch.equal(first, second)


def test_the_penalty_turns_heads_apart(tmp_path: Path) -> None:
    plain, apart = trained(tmp_path / "plain"), trained(tmp_path / "apart", Variant("o", orthogonality=5.0))
    overlaps = [measured(one.model, HELD_OUT, 8)["overlap_0"] for one in (plain, apart)]
    assert overlaps[1] < 0.8 * overlaps[0]


def test_every_sequence_is_read_before_one_is_read_again() -> None:
    order = order_of(10, 7, 4, seed=3).flatten().tolist()
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order == order_of(10, 7, 4, seed=3).flatten().tolist()
    assert order != order_of(10, 7, 4, seed=4).flatten().tolist()
