"""Effect of the output projection W_O on the rank of attention (paper.md, C4 and C5).

Attention writes y = sum_h z_h W_O[h]. The covariance of y is W_O^T C_z W_O, so the rank under every
counterfactual W_O follows in closed form from the covariance of z. No further pass of the model is needed;
a layer costs a few small eigen-decompositions. Rows are stacked head by head: W_O is
`[n_heads d_head d_model]`, C_z is `[n_heads*d_head, n_heads*d_head]`.

In models that normalize the attention output (Gemma 2 and 3) y is the value before that norm.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from asi_lens.activations.precision import covariance_eigenvalues, entropy_rank, few_threads
from asi_lens.base.doors import checked
from asi_lens.base.errors import OptionError, require, require_known
from asi_lens.collapse.spectra import Spectra
from asi_lens.inputs import models
from asi_lens.inputs.fingerprint import cached_number, number_key

_FORMAT = "1"

CLOSED_FORMS = (
    "z",
    "attn_out",
    "isotropic_z",
    "sum_of_heads",
    "orthogonal_heads",
    "flat_spectrum",
    "random_orthogonal",
    "gaussian",
    "rotated_input",
)
RANDOM_FORMS = ("gaussian", "rotated_input", "random_orthogonal")


@checked
def counterfactual_ranks(
    W_O: Float[Tensor, "n_heads d_head d_model"],
    z_covariance: Float[Tensor, "d_z d_z"],
    *,
    variants: tuple[str, ...] = CLOSED_FORMS,
    seed: int = 0,
) -> dict[str, float]:
    """Return the effective-rank fraction of the attention output under each variant of W_O, by variant.

    Every number is an effective rank over singular values (Roy and Vetterli 2007) divided by d_model,
    except `z`, divided by its own width d_z = n_heads * d_head:

    - `z`: the concatenated heads before W_O. `attn_out`: z W_O.
    - `isotropic_z`: W_O alone, with white noise as its input.
    - `sum_of_heads`: the sum of the ranks of the single heads' outputs z_h W_O[h], which would be the rank
      of the output if heads did not overlap. A head whose output never varies (an ablated head) counts 0.
    - `flat_spectrum`: W_O = U S V^T replaced by U V^T. `random_orthogonal`: by a random (semi-)orthogonal
      matrix. `gaussian`: by independent normal entries. `rotated_input`: by Q W_O, Q random orthogonal,
      which keeps W_O's spectrum and breaks its fit to z.
    - `orthogonal_heads`: every head keeps its own singular values and left vectors, and the heads' output
      subspaces are made mutually orthogonal. If n_heads * d_head > d_model (Gemma) the subspaces only fit
      into d_z dimensions, so `orthogonal_heads` and `sum_of_heads` may exceed 1.

    If d_z <= d_model, `flat_spectrum` and `random_orthogonal` have orthonormal rows and keep the rank of z
    exactly. `seed` fixes the random variants; their spread from draw to draw is about 0.01.
    Raises UnknownNameError for an unknown variant, OptionError for shapes that do not fit.
    """
    require_known(variants, CLOSED_FORMS, "variant")
    n_heads, d_head, d_model = W_O.shape
    d_z = n_heads * d_head
    if z_covariance.shape != (d_z, d_z):
        raise OptionError(f"z_covariance is {tuple(z_covariance.shape)}, W_O asks for ({d_z}, {d_z})")
    heads = W_O.double()
    flat = rearrange(heads, "head d_head d_model -> (head d_head) d_model")
    C = z_covariance.to(heads)  # from the cache it comes to the CPU, wherever the model is
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def rank(projection: Float[Tensor, "d_z d_out"]) -> float:
        return _rank(projection.T @ C @ projection) / d_model

    out: dict[str, float] = {}
    with few_threads(d_z):
        rank_of_z = _rank(C)
        for variant in variants:
            match variant:
                case "z":
                    out[variant] = rank_of_z / d_z
                case "attn_out":
                    out[variant] = rank(flat)
                case "isotropic_z":
                    out[variant] = _rank(flat.T @ flat) / d_model
                case "sum_of_heads":
                    out[variant] = sum(_rank_between(C_h, w @ w.T) for C_h, w in _blocks(C, heads)) / d_model
                case "orthogonal_heads":
                    out[variant] = rank(_separated(heads))
                # Orthonormal rows keep the rank of z: no matrix is needed to compute it.
                case "flat_spectrum" | "random_orthogonal" if d_z <= d_model:
                    out[variant] = rank_of_z / d_model
                case "flat_spectrum":
                    U, _, Vh = torch.linalg.svd(flat, full_matrices=False)
                    out[variant] = rank(U @ Vh)
                case "random_orthogonal":
                    out[variant] = rank(_random_orthogonal(d_z, d_model, generator).to(C.device))
                case "gaussian":
                    noise = torch.randn(d_z, d_model, generator=generator, dtype=torch.float64)
                    out[variant] = rank(noise.to(C.device))
                case "rotated_input":
                    out[variant] = rank(_random_orthogonal(d_z, d_z, generator).to(C.device) @ flat)
    return out


@dataclass(frozen=True)
class HeadOverlap:
    """Overlap of the heads' output subspaces, one number per pair of heads, all `[n_heads n_heads]`.

    `mean_cosine`, `largest_cosine`: mean and largest cosine of the principal angles between the row spaces of
    W_O[a] and W_O[b] (0 orthogonal, 1 the same). A head of rank r has a row space of r dimensions, and a pair
    as many angles as the smaller rank. `covariance_cosine`: the cosine between the covariances of the heads'
    outputs, tr(A_a A_b) / (|A_a| |A_b|), which weighs directions by use. `random_mean_cosine`: the average
    mean cosine of two random subspaces of the same sizes.

    A head that writes nothing (W_O[a] = 0, as of an ablated head) has no subspace: its pairs are NaN. A head
    whose output never varies has no direction to weigh: the `covariance_cosine` of its pairs is NaN.
    """

    mean_cosine: Float[Tensor, "n_heads n_heads"]
    largest_cosine: Float[Tensor, "n_heads n_heads"]
    covariance_cosine: Float[Tensor, "n_heads n_heads"]
    random_mean_cosine: Float[Tensor, "n_heads n_heads"]


@checked
def head_overlap(
    W_O: Float[Tensor, "n_heads d_head d_model"],
    z_covariance: Float[Tensor, "d_z d_z"],
    *,
    seed: int = 0,
) -> HeadOverlap:
    """Compute the principal angles between all pairs of heads' output subspaces (Bjorck and Golub 1973)."""
    heads = W_O.double()
    d_model = heads.shape[2]
    with few_threads(d_model):
        _, S, Vh = torch.linalg.svd(heads, full_matrices=False)
        # Directions that a head does not write are no part of its subspace: as zeros, they have no angles.
        rounding = S[:, :1] * max(heads.shape[1:]) * torch.finfo(torch.float64).eps
        written = rounding < S
        bases = Vh * written[..., None]  # [n_heads min(d_head, d_model) d_model]
        cosines = torch.linalg.svdvals(bases[:, None] @ bases[None].mT).clamp(0.0, 1.0)
        ranks = written.sum(1)
        angles = torch.minimum(ranks[:, None], ranks)
        blocks = _blocks(z_covariance.to(heads), heads)
        covariances = torch.stack([w.T @ C_h @ w for C_h, w in blocks])
        used = rearrange(covariances, "head row column -> head (row column)")
        used = used / used.norm(dim=1, keepdim=True)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        a, b = (_random_orthogonal(d_model, bases.shape[1], generator) for _ in range(2))
        # The mean of no angle is NaN.
        sizes = {tuple(sorted(pair)) for pair in itertools.product(ranks.tolist(), repeat=2)}
        chance = {(p, q): torch.linalg.svdvals(a[:, :p].T @ b[:, :q]).mean().item() for p, q in sizes}
        random = [[chance[min(p, q), max(p, q)] for q in ranks.tolist()] for p in ranks.tolist()]
    return HeadOverlap(
        cosines.sum(-1) / angles,
        cosines[..., 0].where(angles > 0, torch.nan),
        used @ used.T,
        torch.tensor(random, dtype=cosines.dtype, device=cosines.device),
    )


def counterfactual_records(
    model: nn.Module, spectra: Spectra, *, draws: int = 3, seed: int = 0, site: str = "z"
) -> list[dict[str, object]]:
    """Return `counterfactual_ranks` of every layer whose `z` is in `spectra`: rows of `03_wo_ablation.csv`.

    Random variants are drawn `draws` times, from seeds `seed`, `seed + 1` ... The ranks are cached. `site`
    "cross_z" is for a decoder's cross-attention: its variants `z` and `attn_out` are of that attention.
    """
    require(draws >= 1, "draws", draws, "at least 1")
    layers = [layer for name, layer in spectra if name == site]
    fixed = tuple(v for v in CLOSED_FORMS if v not in RANDOM_FORMS)

    def measure() -> list[dict[str, object]]:
        records: list[dict[str, object]] = []
        for layer in tqdm(layers, desc="W_O", unit="layer"):
            z, W_O = spectra[site, layer], models.output_projection(model, layer, site)
            base = {"model": spectra.model.name, "corpus": spectra.corpus, "n_tokens": z.n, "layer": layer}
            plan: list[tuple[int | None, tuple[str, ...]]] = [(None, fixed)]
            plan += [(seed + draw, RANDOM_FORMS) for draw in range(draws)]
            for drawn, variants in plan:
                ranks = counterfactual_ranks(W_O, z.covariance, variants=variants, seed=drawn or 0)
                records += [
                    {**base, "variant": variant, "seed": drawn, "effective_rank_fraction": fraction}
                    for variant, fraction in ranks.items()
                ]
        return records

    info = models.model_info(model)  # W_O is the model's of now, whenever the spectra were measured
    key = number_key(
        info.fingerprint,
        info.dtype,
        format=_FORMAT,
        z=[spectra[site, layer].fingerprint for layer in layers],
        names=[spectra.model.name, spectra.corpus],
        layers=layers,
        draws=draws,
        seed=seed,
        **({} if site == "z" else {"site": site}),
    )
    return cached_number("output_projection", key, measure)


def overlap_records(
    model: nn.Module, spectra: Spectra, *, seed: int = 0, site: str = "z"
) -> list[dict[str, object]]:
    """Return `head_overlap` of every layer whose `z` is in `spectra`: the rows of `03_head_overlap.csv`.

    `site` "cross_z" is for a decoder's cross-attention. Pairs of a head that writes nothing, or whose output
    never varies, are left out.
    """
    records: list[dict[str, object]] = []
    for name, layer in spectra:
        if name != site:
            continue
        z = spectra[site, layer]
        overlap = head_overlap(models.output_projection(model, layer, site), z.covariance, seed=seed)
        for a, b in itertools.combinations(range(overlap.mean_cosine.shape[0]), 2):
            if overlap.covariance_cosine[a, b].isnan():
                continue
            records.append(
                {
                    "model": spectra.model.name,
                    "corpus": spectra.corpus,
                    "n_tokens": z.n,
                    "layer": layer,
                    "head_a": a,
                    "head_b": b,
                    "mean_cosine": overlap.mean_cosine[a, b].item(),
                    "largest_cosine": overlap.largest_cosine[a, b].item(),
                    "covariance_cosine": overlap.covariance_cosine[a, b].item(),
                    "random_mean_cosine": overlap.random_mean_cosine[a, b].item(),
                }
            )
    return records


def _rank(covariance: Float[Tensor, "d d"]) -> float:
    return entropy_rank(covariance_eigenvalues(covariance).sqrt())


def _rank_between(C_h: Float[Tensor, "d_head d_head"], gram: Float[Tensor, "d_head d_head"]) -> float:
    """Effective rank of w^T C_h w, given gram = w w^T, computed in the d_head dimensions of the head.

    0 for a product of zeros, which has no direction.
    """
    values, vectors = torch.linalg.eigh(C_h)
    root = vectors * values.clamp_min(0.0).sqrt()
    product = root.T @ gram @ root
    return _rank(product) if product.any() else 0.0


def _blocks(
    C: Float[Tensor, "d_z d_z"], heads: Float[Tensor, "n_heads d_head d_model"]
) -> list[tuple[Float[Tensor, "d_head d_head"], Float[Tensor, "d_head d_model"]]]:
    """Return (covariance of z_h, W_O[h]) for every head."""
    n = len(heads)
    by_heads = rearrange(C, "(head row) (other column) -> head other row column", head=n, other=n)
    return [(by_heads[h, h], w) for h, w in enumerate(heads)]


def _random_orthogonal(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Draw a Haar-distributed matrix with orthonormal columns, float64."""
    drawn = torch.empty(rows, columns, dtype=torch.float64, device=generator.device)
    return torch.nn.init.orthogonal_(drawn, generator=generator)


def _separated(heads: Float[Tensor, "n_heads d_head d_model"]) -> Float[Tensor, "d_z d_out"]:
    """Return W_O with every head's own U_h S_h, written to dimensions that no other head uses.

    The orthonormal frame of these dimensions does not change the rank, so no frame is drawn.
    """
    U, S, _ = torch.linalg.svd(heads, full_matrices=False)
    return torch.block_diag(*(U * S[:, None]))
