"""What stays put: overlaps of spectra, readings of another text, and matches of seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_trainings import D_IN, quick, rows

from asi_lens.activations.spectrum import Spectrum
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import OptionError
from asi_lens.collapse.spectra import Spectra
from asi_lens.experiments import stability
from asi_lens.experiments.recipes import Recipe
from asi_lens.experiments.rows import dead_feature_rows
from asi_lens.experiments.runs import train_recipes
from asi_lens.inputs.models import ModelInfo
from asi_lens.sae.matching import match_features

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
ABOUT = {"model": "m", "corpus": "news", "site": "attn_out", "layer": 3}
R = 4


def turned() -> torch.Tensor:
    """Return a rotation [D_IN D_IN] by less than a right angle in every plane that it turns."""
    skew = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.linalg.matrix_exp(0.12 * (skew - skew.T))


def store_of(x: torch.Tensor) -> ActivationStore:
    return ActivationStore.from_tensor(x.float(), ABOUT)


def spectra(by_layer: list[torch.Tensor], corpus: str) -> Spectra:
    sizes = dict.fromkeys(("n_layers", "n_heads", "n_kv_heads", "d_head", "d_vocab", "n_ctx"), 1)
    words = dict.fromkeys(("architecture", "dtype", "weights", "fingerprint"), "")
    info = ModelInfo("m", d_model=D_IN, normalizes_attn_out=False, causal=True, **sizes, **words)
    found = {("attn_out", layer): Spectrum.of(x.float()) for layer, x in enumerate(by_layer)}
    return Spectra(found, info, corpus)


def test_overlaps_compare_texts_and_layers() -> None:
    x = rows().double()
    own = spectra([x, x @ turned(), x], "news")
    other = spectra([3 * x + 1, x, x @ turned()], "code")
    found = stability.overlap_rows(own, own, [other], site="attn_out", layer=2, r=R)
    told = {(row.against, row.other, row.layer): row for row in found}
    assert set(told) == {
        *(("half", "news", n) for n in range(3)),
        *(("text", "code", n) for n in range(3)),
        *(("layer", "layer 2", n) for n in range(2)),
    }
    # Neither scale nor mean move a subspace; a rotation does.
    for same in (("half", "news", 1), ("text", "code", 0), ("layer", "layer 2", 0)):
        assert told[same].kernel == pytest.approx(1, abs=1e-5)
        assert told[same].captured == pytest.approx(told[same].captured_by_its_own, rel=1e-4)
    for moved in (("text", "code", 1), ("text", "code", 2), ("layer", "layer 2", 1)):
        assert told[moved].kernel < 0.9
        assert told[moved].captured < told[moved].captured_by_its_own
    one = told["text", "code", 1]
    assert (one.r, one.width, one.n_tokens, one.corpus) == (R, D_IN, len(x), "news")
    assert one.random_kernel == pytest.approx(R / D_IN)
    # The share of the other's variance inside, computed directly.
    basis, rest = own["attn_out", 1].active_subspace(R), x - x.mean(0)
    assert one.captured == pytest.approx(
        ((rest @ basis).square().sum() / rest.square().sum()).item(), rel=1e-4
    )


def test_readings_shift_and_turn_a_text_onto_the_dictionarys() -> None:
    x = rows().double()
    other = x @ turned() - 5
    found = stability.readings("code", store_of(other), Spectrum.of(other.float()), Spectrum.of(x.float()), R)
    assert [one.inputs for one in found] == ["as they are", "its own mean", "rotated"]
    plain, shifted, rotated = (torch.cat(list(one.store.in_order(333))).double() for one in found)
    torch.testing.assert_close(plain, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shifted, other - other.mean(0) + x.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(rotated.mean(0), x.mean(0), atol=1e-3, rtol=1e-3)
    # Distances stay, and the top directions are those of the dictionary's text.
    before, after = (torch.cdist(part[:50], part[:50]) for part in (other, rotated))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    span = (Spectrum.of(part.float()).active_subspace(R) for part in (rotated, x))
    a, b = (basis @ basis.T for basis in span)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_text_with_the_same_subspace_is_not_turned() -> None:
    x = rows()
    found = stability.readings("code", store_of(x), Spectrum.of(x), Spectrum.of(x), R)
    for one in found:
        torch.testing.assert_close(torch.cat(list(one.store.in_order(999))), x, atol=1e-4, rtol=1e-4)


def test_matches_of_seeds_at_the_start_and_after_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    store, held = store_of(rows()), store_of(rows()[:200])
    recipes = ["random", Recipe("ASI", "asi", R)]
    runs = train_recipes(store, recipes, d_sae=64, k=4, seeds=(0, 1, 2), train=quick(), progress=False)
    found = stability.match_rows(runs, store, held)
    assert [(row.method, row.seed, row.other_seed, row.tokens) for row in found] == [
        (method, *pair, tokens)
        for tokens in (0, quick().n_tokens)
        for method in ("random", "ASI")
        for pair in ((0, 1), (0, 2), (1, 2))
    ]
    by = {(row.method, row.seed, row.other_seed, row.tokens > 0): row for row in found}
    # Rows in fewer directions are more alike before anything is learned.
    assert by["ASI", 0, 1, False].matched > by["random", 0, 1, False].matched + 0.05
    # The start is the start: rows of ASI lie in the subspace, and the trained ones are those on disk.
    basis = store.spectrum.active_subspace(R).float()
    start = next(run for run in runs if run.recipe.name == "ASI").start(store)
    torch.testing.assert_close(start.W_dec @ basis @ basis.T, start.W_dec.detach(), atol=1e-5, rtol=0)
    first, second = (next(r for r in runs if r.recipe.name == "random" and r.seed == s) for s in (0, 1))
    direct = match_features(first.sae().W_dec, second.sae().W_dec)
    row = by["random", 0, 1, True]
    assert row.matched == pytest.approx(direct.cosine.mean().item())
    assert (row.gap, row.best) == pytest.approx((direct.gap, direct.best))
    assert row.alike == pytest.approx((direct.cosine >= stability.ALIKE).float().mean().item())
    fired = [(sae.encode_dense(rows()[:200]) > 0).any(0) for sae in (first.sae(), second.sae())]
    assert torch.equal(stability.fires(first.sae(), held), fired[0])
    both = fired[0] & fired[1][direct.partner]
    assert row.alive == pytest.approx(both.float().mean().item())
    assert row.matched_alive == pytest.approx(direct.cosine[both].mean().item())
    # The second time nothing is matched.
    monkeypatch.setattr(stability, "match_features", None)
    assert stability.match_rows(runs, store, held) == found


def test_rows_of_a_reading_name_text_and_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    store = store_of(rows())
    runs = train_recipes(store, ["random"], d_sae=64, k=4, train=quick(), progress=False)
    other = rows() @ turned().float()
    held = stability.readings("code", store_of(other), Spectrum.of(other), store.spectrum, R)
    told = [row for one in held for row in one.rows(dead_feature_rows(runs, one.store, curves=False))]
    assert [(row.text, row.inputs, row.split, row.corpus) for row in told] == [
        ("code", name, "held_out", "news") for name in ("as they are", "its own mean", "rotated")
    ]
    assert told[0].fvu is not None
    assert told[2].fvu is not None
    assert told[2].fvu < told[0].fvu, "the turned text, turned back"


def test_one_seed_and_other_inputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    store = store_of(rows())
    options = {"d_sae": 64, "k": 4, "train": quick(), "progress": False}
    with pytest.raises(OptionError, match=r"one seed of random.*two seeds or more"):
        stability.match_rows(train_recipes(store, ["random"], **options), store, store)
    with pytest.raises(OptionError, match="two seeds or more"):
        stability.match_rows([], store, store)
    inside = Recipe("inside", "asi", R, inside=True)
    with pytest.raises(OptionError, match="at full width"):
        train_recipes(store, [inside], **options)[0].start(store)
