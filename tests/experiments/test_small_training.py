"""Training of a small transformer: it learns, resumes to the same bits, every change does what it says."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from tqdm.auto import tqdm

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import OptionError
from asi_lens.experiments import small_training
from asi_lens.experiments.small_training import (
    Training,
    TrainingConfig,
    Variant,
    fit,
    measured,
    next_token_loss,
    order_of,
    sized,
)
from asi_lens.experiments.small_transformer import SmallTransformer, TransformerConfig
from asi_lens.inputs.corpora import Tokens
from asi_lens.training.checkpoint import CHECKPOINT_FILE, OtherConfigurationError
from asi_lens.training.learner import DivergedError
from asi_lens.training.metrics import METRICS_FILE, read_metrics

CONFIG = TransformerConfig(vocab=30, d_model=32, n_layers=2, n_heads=4, d_mlp=40)
OPTIONS = TrainingConfig(n_tokens=1_280, batch_size=64, lr=5e-3, n_points=4)  # 20 steps of 4 sequences
BASE = Variant("baseline")
CPU = torch.device("cpu")


def text(sequences: int, seed: int = 0) -> Tokens:
    """Sequences of 16 tokens in which each token says the next one, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, (sequences, 16), generator=generator)
    for position in range(1, 16):
        follows = torch.rand(sequences, generator=generator) < 0.8
        ids[:, position] = torch.where(follows, (ids[:, position - 1] * 7 + 1) % 30, ids[:, position])
    return Tokens(ids, "made", "made:1", 16)


TRAIN, HELD_OUT = text(50), text(40, seed=9)


def training(variant: Variant = BASE, options: TrainingConfig = OPTIONS, seed: int = 0) -> Training:
    return Training(CONFIG, variant, options, n_steps=options.n_steps(16), seed=seed, device=CPU)


def trained(folder: Path, variant: Variant = BASE, options: TrainingConfig = OPTIONS) -> Training:
    folder.mkdir(parents=True, exist_ok=True)
    one = training(variant, options)
    with tqdm(disable=True) as bar:
        fit(one, TRAIN, HELD_OUT, folder, bar)
    return one


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


ALL = [
    BASE,
    Variant("gate", gate=True),
    Variant("muon", muon=True),
    Variant("orthogonal", orthogonality=1.0),
    Variant("frozen", frozen=True, weight_decay=1.0),
]


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
    monkeypatch.setattr(small_training, "CHECKPOINT_SECONDS", -1)  # after each step
    whole = trained(tmp_path / "whole")
    code = (
        "import sys, os\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import test_small_training as t\n"
        "t.small_training.CHECKPOINT_SECONDS = -1\n"
        "measured = t.small_training.measured\n"
        "def die(*args):\n"
        "    os._exit(9) if args[0].embedding.weight.grad is None and os.listdir(sys.argv[1]).count(\n"
        "        'checkpoint.safetensors') else None\n"
        "    return measured(*args)\n"
        "t.small_training.measured = die\n"
        "t.trained(t.Path(sys.argv[1]))\n"
    )
    folder = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(Path(__file__).parent)], check=False)
    assert done.returncode == 9, "in the measurement after step 5, before its row was written"
    assert [row["step"] for row in read_metrics(folder / METRICS_FILE)] == [0]
    resumed = trained(folder)
    assert all(torch.equal(tensor, resumed.state()[name]) for name, tensor in whole.state().items())
    assert without_speed(folder) == without_speed(tmp_path / "whole")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_training, "CHECKPOINT_SECONDS", -1)
    trained(tmp_path)
    with pytest.raises(OtherConfigurationError, match=r"training\.lr \(0\.005 there, 0\.001 here\)"):
        trained(tmp_path, options=replace(OPTIONS, lr=1e-3))
    with pytest.raises(OtherConfigurationError, match=r"variant\.weight_decay"):
        trained(tmp_path, Variant("baseline", weight_decay=0.0))


def test_variants_have_as_many_parameters() -> None:
    counts = {v.name: sum(w.numel() for w in training(v).model.parameters()) for v in ALL}
    assert len(set(counts.values())) == 1, counts
    assert sized(CONFIG, ALL[1]) == replace(CONFIG, gate=True, d_mlp=29)
    odd = TransformerConfig(vocab=30, d_model=48, n_layers=2, n_heads=4, d_mlp=60)
    difference = [
        sum(w.numel() for w in SmallTransformer(sized(odd, v)).parameters()) for v in (BASE, ALL[1])
    ]
    assert abs(difference[0] - difference[1]) <= 2 * 48
    with pytest.raises(OptionError, match=r"d_mlp=11 .* above 11, which the gate is paid with"):
        sized(replace(CONFIG, d_mlp=11), ALL[1])


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


def test_muon_has_v_and_o_and_adam_the_rest() -> None:
    adam, muon = training(ALL[2]).optimizers
    own = {id(weight) for group in muon.param_groups for weight in group["params"]}
    model = training(ALL[2]).model
    assert {tuple(w.shape) for group in muon.param_groups for w in group["params"]} == {(32, 32)}
    assert len(own) == 2 * CONFIG.n_layers
    rest = {id(weight) for group in adam.param_groups for weight in group["params"]}
    assert not own & rest
    assert len(own) + len(rest) == len(list(model.parameters()))


def test_muons_first_step_is_orthogonal_and_of_adams_size() -> None:
    one = training(replace(ALL[2], weight_decay=0.0))
    W = one.model.attentions()[0].W_V.weight
    before = W.detach().clone()
    one.step(TRAIN.ids[:4])
    # lr / 2 in the first of two steps of the rise; 0.2 sqrt(32) is the size that matches AdamW.
    step = (before - W.detach()) / (OPTIONS.lr / 2 * 0.2 * 32**0.5)
    assert torch.linalg.svdvals(step)[:16].sub(1).abs().max() < 0.4, "Newton-Schulz: about one"


def test_decay_is_of_matrices_alone() -> None:
    one = training(Variant("d", weight_decay=1.0))
    groups = one.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [1.0, 0.0]
    assert {weight.ndim for weight in groups[0]["params"]} == {2}
    assert {weight.ndim for weight in groups[1]["params"]} == {1}


def test_a_torch_without_muon_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    training()
    with pytest.raises(OptionError, match=r"PyTorch=.* 2\.9 or later"):
        training(ALL[2])


def test_half_precision_is_of_training_alone(tmp_path: Path) -> None:
    options = replace(OPTIONS, compute_dtype="bfloat16")
    one = training(options=options)
    told = one.step(TRAIN.ids[:4])
    assert one.model.embedding.weight.dtype == torch.float32
    assert told["train_loss"] == pytest.approx(training().step(TRAIN.ids[:4])["train_loss"], rel=1e-2)
    assert told["train_loss"] != training().step(TRAIN.ids[:4])["train_loss"]


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    one = training()
    one.step(TRAIN.ids[:4])
    with torch.no_grad():
        one.model.norm.weight[0] = float("nan")
    before = one.model.blocks[0].W_in.weight.detach().clone()
    with pytest.raises(DivergedError, match="baseline: not finite in step 2"):
        one.step(TRAIN.ids[:4])
    assert torch.equal(one.model.blocks[0].W_in.weight, before)


def test_every_sequence_is_read_before_one_is_read_again() -> None:
    order = order_of(10, 7, 4, seed=3).flatten().tolist()
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order == order_of(10, 7, 4, seed=3).flatten().tolist()
    assert order != order_of(10, 7, 4, seed=4).flatten().tolist()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Variant("v", weight_decay=-0.1), "weight_decay=-0.1 .* at least 0"),
        (lambda: Variant("v", orthogonality=float("nan")), "orthogonality=nan .* a number"),
        (lambda: Variant("v", orthogonality=-1.0), "orthogonality=-1.0"),
        (lambda: Variant("v", orthogonality=1.0, frozen=True), "0 where W_O is frozen"),
        (lambda: Variant("v", gate="yes"), "gate='yes'"),  # type: ignore[arg-type]
        (lambda: replace(OPTIONS, lr=0.0), "lr=0.0 .* above 0"),
        (lambda: replace(OPTIONS, n_points=0), "n_points=0"),
        (lambda: replace(OPTIONS, compute_dtype="float16"), "float32 or bfloat16"),
        (lambda: replace(OPTIONS, batch_size=8).n_steps(16), "batch_size=8 .* at least context=16"),
        (lambda: replace(OPTIONS, n_tokens=63).n_steps(16), "n_tokens=63 .* at least batch_size=64"),
        (lambda: replace(OPTIONS, n_points=21).n_steps(16), "n_points=21 .* at most the steps"),
    ],
)
def test_options_out_of_range(make: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        make()
