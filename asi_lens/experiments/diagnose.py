"""What to expect of a dictionary before it is trained: `python -m asi_lens.diagnose MODEL [TEXT]`.

One pass of the model measures every layer and site: rank, gamma, and how many features of a random start
would never fire, predicted from gamma (arXiv 2605.31518) and measured on the activations. From these numbers
follows an advice: whether to subtract the mean, which start to take, in how many directions it begins, and
how many features it keeps alive.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from asi_lens.activations.harvest import SiteLayer, harvest, places
from asi_lens.activations.spectrum import Spectrum, warn_if_few
from asi_lens.base.errors import AsiLensError, DataError, require, require_whole
from asi_lens.collapse.centering import dead_at_start, gamma, predicted_dead
from asi_lens.collapse.spectra import MomentsConsumer
from asi_lens.inputs.corpora import Tokens, load_tokens
from asi_lens.inputs.models import load_model, model_info
from asi_lens.results.beyond_rows import DiagnosisRow
from asi_lens.results.figure_files import save
from asi_lens.results.tables import frame, write_rows
from asi_lens.sae.initialize import AUTO_SHARE, auto_d_init

SITES = ("attn_out", "mlp_out", "resid_post")
KILLED = 0.01
"""Share of features that centering must save to be called needed."""
OUTSIDE = 0.25
"""Share of a random row's squared norm in directions without variance above which ASI is advised."""


@dataclass(frozen=True)
class Advice:
    """What to do at one site, and why."""

    center: Literal["needed", "harmless"]
    start: str
    d_init: int | None
    reason: str


@dataclass(frozen=True)
class Width:
    """A size of the dictionary, the share of the advised start that never fires at that size, and why."""

    d_sae: int
    dead: float
    reason: str


def advise(spectrum: Spectrum, raw: float, centered: float) -> Advice:
    """Return the advice for one site, given the measured shares that never fire at a random start.

    Centering is needed if it saves more than `KILLED` of the features of a random start. (The prediction from
    gamma assumes isotropic activations; at sites of low rank more features die than it says.) ASI is
    advised if a random row has more than `OUTSIDE` of its squared norm in the directions that hold the last
    1 % of the variance; `d_init` is then the automatic choice (`auto_d_init`).
    """
    needed = raw - centered > KILLED
    kills = f"gamma {gamma(spectrum):.2f}: raw inputs silence {raw:.1%} of a random start"
    kills += f", centered ones {centered:.1%}"
    center: Literal["needed", "harmless"] = "needed" if needed else "harmless"
    outside = 1 - spectrum.intrinsic_dimension(0.99) / spectrum.d
    where = f"{outside:.0%} of a random row lies where 1 % of the variance is"
    if outside <= OUTSIDE:
        return Advice(center, "random", None, f"{kills}; {where}: random rows will do")
    d_init = auto_d_init(spectrum)
    why = f"{d_init} directions hold {AUTO_SHARE:.0%} of the singular values"
    return Advice(center, "asi", d_init, f"{kills}; {where}: begin where it is; {why}")


def advise_width(
    rows: Float[Tensor, "n d"], spectrum: Spectrum, advice: Advice, d_sae: int, k: int, seed: int = 0
) -> Width:
    """Return the largest of `d_sae`, its half, its quarter ... at which the advised start keeps its features.

    It keeps them if at most `KILLED` of them never fire on `rows`, with the mean subtracted. A start in the
    active subspace is measured on the coordinates there. Where no size above twice `k` will do, the smallest
    tried is returned, and the reason says so. A feature fires on about n k / d_sae of n rows, so more rows
    allow a larger dictionary.
    """
    center: Tensor | None = spectrum.mean
    if advice.d_init is not None:
        basis = spectrum.active_subspace(advice.d_init).to(rows.device)
        rows, center = ((rows.double() - spectrum.mean.to(rows.device)) @ basis).float(), None
    size, told = d_sae, []
    while True:
        dead = dead_at_start(rows, k, size, center=center, seed=seed)
        told.append(f"{dead:.1%} of {size:,} features never fire")
        if dead <= KILLED or size // 2 <= 2 * k:
            break
        size //= 2
    ends = told[0] if len(told) == 1 else f"{told[0]}, {told[-1]}"
    will = "this size will do" if dead <= KILLED else "the smallest size tried, measure on more text"
    return Width(size, dead, f"from there on {len(rows):,} tokens {ends}: {will}")


class _Both(MomentsConsumer):
    """Moments of all rows, and the first `n` rows of every place."""

    def __init__(self, wants: Sequence[SiteLayer], n: int):
        super().__init__(wants)
        self.n_rows = n
        self.rows: dict[SiteLayer, list[Tensor]] = {where: [] for where in wants}

    def consume(self, where: SiteLayer, rows: Float[Tensor, "n d"]) -> None:
        """Add one batch of rows."""
        super().consume(where, rows)
        left = self.n_rows - sum(map(len, self.rows[where]))
        if left > 0:
            self.rows[where].append(rows[:left].clone())


def diagnose(
    model: nn.Module,
    tokens: Tokens,
    sites: Sequence[str] = SITES,
    layers: Sequence[int] | None = None,
    *,
    d_sae: int = 16_384,
    k: int = 32,
    n_rows: int = 4_096,
    seed: int = 0,
    progress: bool = True,
) -> list[DiagnosisRow]:
    """Return one row per (site, layer), from one pass of the model; nothing is trained.

    Args:
        d_sae, k: of the dictionary that is planned.
        n_rows: tokens on which death at a random start is measured and predicted; their rows are kept in
            memory for every place.
        seed: of the random start.

    Raises OptionError for options out of range, DataError for a text that gives fewer rows than a site is
    wide (its rank would be that of the sample).
    """
    require_whole("d_sae", d_sae, 2)
    require_whole("k", k, 1)
    require(k < d_sae, "k", k, f"below d_sae={d_sae}")
    require_whole("n_rows", n_rows, 2)
    wanted = places(model, sites, layers)
    both = _Both(wanted, n_rows)
    harvest(model, tokens, [both], left_out=both.leave_out, progress=progress)
    spectra = {where: both.spectrum(where) for where in wanted}
    for spectrum in spectra.values():
        if spectrum.n < spectrum.d:
            raise DataError(
                f"{spectrum.name}: {spectrum.n:,} rows for width {spectrum.d}, too short a text for a rank; "
                f"take at least {spectrum.d + len(tokens):,} tokens"
            )
    warn_if_few(spectra.values())
    name = model_info(model, fingerprint=False).name
    return [
        _row(name, tokens.corpus, where, spectra[where], torch.cat(both.rows[where]), d_sae, k, seed)
        for where in wanted
    ]


def _row(
    model: str,
    corpus: str,
    where: SiteLayer,
    spectrum: Spectrum,
    rows: Float[Tensor, "n d"],
    d_sae: int,
    k: int,
    seed: int,
) -> DiagnosisRow:
    raw = dead_at_start(rows, k, d_sae, seed=seed)
    centered = dead_at_start(rows, k, d_sae, center=spectrum.mean, seed=seed)
    advice, ratio = advise(spectrum, raw, centered), gamma(spectrum)
    width = advise_width(rows, spectrum, advice, d_sae, k, seed)
    return DiagnosisRow(
        model=model,
        corpus=corpus,
        n_tokens=spectrum.n + spectrum.left_out,
        site=where[0],
        layer=where[1],
        d=spectrum.d,
        n_left_out=spectrum.left_out,
        effective_rank_fraction=spectrum.effective_rank_fraction,
        intrinsic_dimension_99=spectrum.intrinsic_dimension(0.99),
        gamma=ratio,
        d_sae=d_sae,
        k=k,
        n_rows=len(rows),
        predicted=predicted_dead(ratio, k, d_sae, len(rows)),
        dead_raw=raw,
        dead_centered=centered,
        center=advice.center,
        start=advice.start,
        d_init=advice.d_init,
        d_sae_advised=width.d_sae,
        dead_advised=width.dead,
        reason=f"{advice.reason}; {width.reason}",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m asi_lens.diagnose", description=__doc__)
    parser.add_argument("model", help="a packaged name, hub name, folder or .gguf file")
    parser.add_argument("text", nargs="?", default="news-en", help="as for load_tokens (default: news-en)")
    parser.add_argument("--sites", default=",".join(SITES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--layers", default="", help="comma-separated (default: all)")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of text (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=256, help="length of a sequence (default: %(default)s)"
    )
    parser.add_argument("--features", type=int, default=16_384, help="size planned (default: %(default)s)")
    parser.add_argument("-k", type=int, default=32, help="features per token planned (default: %(default)s)")
    parser.add_argument("--output", default="", help="folder for the table and the figure (default: none)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row per place; write table and figure if asked for. Returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        model = load_model(given.model)
        tokens = load_tokens(given.text, model, n_tokens=given.tokens, context=given.context)
        layers = [int(layer) for layer in given.layers.split(",")] if given.layers else None
        found = diagnose(model, tokens, given.sites.split(","), layers, d_sae=given.features, k=given.k)
    except (AsiLensError, ValueError) as error:
        print(f"python -m asi_lens.diagnose: {error}", file=sys.stderr)
        return 1
    print(
        f"{given.features:,} features, k {given.k}. Shares of a random start that never fire on "
        f"{found[0].n_rows:,} tokens: predicted from gamma, measured on raw and on centered inputs."
    )
    print(
        f"{'site':12} {'layer':>5} {'rank':>5} {'99 %':>5} {'gamma':>6} {'predicted':>9} {'raw':>6} "
        f"{'centered':>8}  advice"
    )
    for row in found:
        begin = row.start if row.d_init is None else f"{row.start}, d_init {row.d_init}"
        print(
            f"{row.site:12} {row.layer:5} {row.effective_rank_fraction:5.2f} {row.intrinsic_dimension_99:5} "
            f"{row.gamma:6.2f} {row.predicted:9.1%} {row.dead_raw:6.1%} {row.dead_centered:8.1%}  "
            f"{begin}; {row.d_sae_advised:,} features; centering {row.center}; {row.reason}"
        )
    if given.output:
        from asi_lens.figures.beyond import diagnosis

        folder = Path(given.output)
        write_rows(folder / "diagnosis.csv", found)
        caption = (
            f"{given.features:,} features, k {given.k}, {found[0].n_tokens:,} tokens of {found[0].corpus}."
        )
        save(diagnosis(frame(found)), folder / "diagnosis", caption=caption)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
