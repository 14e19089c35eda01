"""Small transformers trained from nothing in several ways: does the loss follow the rank of attention?

Every variant of a seed starts from the same draw, reads the same batches and has the same number of
parameters. Runs are cached, as those of `runs` are: finished ones are read, stopped ones continue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from asi_lens.activations.spectrum import ROWS_PER_DIMENSION
from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_known, require_whole
from asi_lens.base.files import cache_key
from asi_lens.experiments.run_folders import about_run, alone, finish, is_finished, run_folder
from asi_lens.experiments.small_fit import fit
from asi_lens.experiments.small_training import Training, TrainingConfig, Variant, sized
from asi_lens.experiments.small_transformer import TransformerConfig
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.models import resolve_device
from asi_lens.results.trained_rank_rows import TrainedRankRow
from asi_lens.training.checkpoint import held
from asi_lens.training.metrics import METRICS_FILE, read_metrics

# Raise it when a change to model, training or measurement changes the results of the same options.
FORMAT = 1
BASELINE = "baseline"
VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(BASELINE),
        Variant("gate", gate=True),
        Variant("no weight decay", weight_decay=0.0),
        Variant("weight decay 1", weight_decay=1.0),
        Variant("Muon on V, O", muon=True),
        Variant("orthogonal heads", orthogonality=1.0),
        Variant("frozen W_O", frozen=True),
    )
}
"""The baseline (AdamW, weight decay 0.1), and one change each."""


@dataclass(frozen=True)
class SmallRun:
    """A trained variant in the cache."""

    variant: Variant
    config: TransformerConfig
    """Sizes of the variant itself."""
    training: TrainingConfig
    seed: int
    corpus: str
    context: int
    folder: Path
    """Folder of the log (`metrics.csv`) and the description (`finished.json`)."""

    def rows(self) -> list[TrainedRankRow]:
        """Return a row for every measurement and layer."""
        about, config = about_run(self.folder), self.config
        points: list[dict[str, Any]] = list(read_metrics(self.folder / METRICS_FILE))
        return [
            TrainedRankRow(
                model=f"{config.n_layers} layers of width {config.d_model}",
                corpus=self.corpus,
                n_tokens=self.training.n_tokens,
                variant=self.variant.name,
                seed=self.seed,
                layer=layer,
                tokens=point["tokens"],
                validation_loss=point["validation_loss"],
                effective_rank_fraction=point[f"rank_{layer}"],
                z_effective_rank_fraction=point[f"z_rank_{layer}"],
                head_overlap=point[f"overlap_{layer}"],
                n_left_out=point[f"left_out_{layer}"],
                n_parameters=about["n_parameters"],
                n_trained=about["n_trained"],
                d_model=config.d_model,
                d_mlp=config.d_mlp,
                vocab=config.vocab,
                context=self.context,
                lr=self.training.lr,
                weight_decay=self.variant.weight_decay,
            )
            for point in points
            for layer in range(config.n_layers)
        ]


@checked
def train_variants(
    variants: Sequence[Variant | str],
    train: Tokens,
    held_out: Tokens,
    config: TransformerConfig,
    training: TrainingConfig,
    *,
    seeds: Sequence[int] = (0,),
    device: str | torch.device = "auto",
    progress: bool = True,
) -> list[SmallRun]:
    """Train each variant with each seed, one after the other; read finished runs from the cache.

    Args:
        variants: variants, or names in `VARIANTS`.
        train, held_out: tokens of one tokenizer, in sequences of the same length.
        config: sizes of the baseline.
        device: device of training; "auto" is CUDA if it is available.

    Returns runs in order of seeds, then variants. Raises UnknownNameError for an unknown variant, OptionError
    for tokens and sizes that do not fit together, CacheError for a folder that cannot be read, DivergedError.
    """
    chosen = [_find(variant) for variant in variants]
    require(len(chosen) > 0, "variants", [], "one or more")
    require(len(seeds) > 0, "seeds", [], "one or more")
    names = [variant.name for variant in chosen]
    require(len(set(names)) == len(names), "variants", names, "of different names")
    same = (train.context, train.tokenizer) == (held_out.context, held_out.tokenizer)
    require(same, "held_out", held_out.tokenizer, "tokens of the same tokenizer and context as train")
    most = max(int(tokens.ids.max()) for tokens in (train, held_out))
    require(config.vocab > most, "vocab", config.vocab, f"above {most}, the largest token")
    n_steps = training.n_steps(train.context)
    # Position 0 is not counted, and the last one predicts nothing.
    n_rows, least = len(held_out) * (held_out.context - 2), ROWS_PER_DIMENSION * config.d_model
    told = f"{ROWS_PER_DIMENSION} rows per dimension, at least {least:,}, or ranks are biased downwards"
    require(n_rows >= least, "held_out", f"{n_rows:,} rows", told)
    target = resolve_device(device)
    runs = [_run(variant, train, held_out, config, training, seed) for seed in seeds for variant in chosen]
    missing = [run for run in runs if not is_finished(run.folder, [METRICS_FILE])]
    per_run = n_steps * (training.batch_size // train.context) * train.context
    off = not (progress and missing)
    with tqdm(total=len(missing) * per_run, unit="tok", unit_scale=True, desc="train", disable=off) as bar:
        for number, run in enumerate(missing):
            with alone([run.folder]):
                # Another process may have trained it in the meantime.
                if not is_finished(run.folder, [METRICS_FILE]):
                    _train(run, train, held_out, config, n_steps, target, bar)
            bar.update((number + 1) * per_run - bar.n)
    return runs


def _find(given: Variant | str) -> Variant:
    if isinstance(given, Variant):
        return given
    require_known([given], VARIANTS, "variant")
    return VARIANTS[given]


def _run(
    variant: Variant,
    train: Tokens,
    held_out: Tokens,
    config: TransformerConfig,
    training: TrainingConfig,
    seed: int,
) -> SmallRun:
    require_whole("seed", seed, 0)
    # Variants with the same options are one run, whatever their names.
    options = {**asdict(variant), "name": None}
    texts = {"train": train.fingerprint, "held_out": held_out.fingerprint}
    key = cache_key(
        format=FORMAT, model=asdict(config), variant=options, training=asdict(training), seed=seed, **texts
    )
    folder = run_folder(["small", train.corpus, config.n_layers, config.d_model], key)
    return SmallRun(variant, sized(config, variant), training, seed, train.corpus, train.context, folder)


def _train(
    run: SmallRun,
    train: Tokens,
    held_out: Tokens,
    config: TransformerConfig,
    n_steps: int,
    device: torch.device,
    bar: tqdm,
) -> None:
    started = Training(config, run.variant, run.training, n_steps=n_steps, seed=run.seed, device=device)
    weights = list(started.model.parameters())
    about = {
        **{"format": FORMAT, "variant": asdict(run.variant), "model": asdict(run.config)},
        "n_parameters": sum(weight.numel() for weight in weights),
        "n_trained": sum(weight.numel() for weight in weights if weight.requires_grad),
    }
    with held(run.folder):
        fit(started, train, held_out, run.folder, bar)
        finish(run.folder, about)


def rows(runs: Sequence[SmallRun]) -> list[TrainedRankRow]:
    """Return a row for every run, measurement and layer."""
    return [row for run in runs for row in run.rows()]


def budget(runs: Sequence[SmallRun]) -> str:
    """Return sizes and options of runs in words."""
    first, counts = runs[0], sorted({about_run(run.folder)["n_parameters"] for run in runs})
    config, options = first.config, first.training
    told = " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1])))
    return (
        f"{config.n_layers} layers of width {config.d_model}, {config.n_heads} heads, {told} parameters, "
        f"byte-pair vocabulary of {config.vocab:,} tokens, {first.corpus}, {options.n_tokens:,} training "
        f"tokens, context {first.context}, batches of {options.batch_size:,}, lr {options.lr:g}"
    )
