"""Right arguments of every public function and method of `asi_lens`, all small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import plotly.graph_objects as go
import right_media
import torch
from small_trainings import D_IN
from small_world import CONTEXT, N_OV, World

import asi_lens as al
from asi_lens.lorsa.data import PairBatch
from asi_lens.results.rows import RankRow

Made = tuple[Callable[..., Any], dict[str, Any]]
QUIET = {"progress": False}


def _of(
    owner: Callable[[World], Any], method: str, **arguments: Callable[[World], Any]
) -> Callable[[World], Made]:
    """A method of what `owner` makes, and its arguments."""
    return lambda world: (
        getattr(owner(world), method),
        {key: value(world) for key, value in arguments.items()},
    )


def _is(value: Any) -> Callable[[World], Any]:
    return lambda world: value


def _at(name: str) -> Callable[[World], Any]:
    """What the world has under a name; made, if it is a method."""

    def get(world: World) -> Any:
        found = getattr(world, name)
        return found() if callable(found) and name in vars(World) else found

    return get


def _al(name: str, /, **arguments: Callable[[World], Any]) -> Callable[[World], Made]:
    """A public function or class, and its arguments."""
    return lambda world: (getattr(al, name), {key: value(world) for key, value in arguments.items()})


def _batch(world: World) -> Any:
    return PairBatch(world.pairs.inputs[:2], world.pairs.outputs[:2])


def _pair(world: World) -> Any:
    return al.Pair(world.rows[:8], world.rows[8:16])


def _ready(world: World) -> Any:
    if "ready" not in world.kept:
        lorsa = world.lorsa()
        al.initialize_lorsa(lorsa, world.model, 1, world.pairs, "random")
        world.kept["ready"] = al.LorsaTrainer(lorsa, world.train)
    return world.kept["ready"]


def _stepped(world: World) -> Any:
    trainer = _ready(world)
    trainer.step(_batch(world))
    return trainer


def _read_from(trainer: Callable[[World], Any]) -> Callable[[World], Any]:
    return lambda world: trainer(world).state().__getitem__


def _verdict(world: World) -> Any:
    from asi_lens.results.verdicts import Number, Verdict

    return Verdict("C1", "statement", "paper", (Number("n", 0.5, 0.4, 0.6),), "2 seeds", True)


def _page_with_data(world: World) -> Any:
    page = world.page
    page._model = world.model
    if "split" not in world.kept:
        sizes = {"n_tokens": 64, "n_tokens_held_out": 32, "n_tokens_loss": 32, "context": 16}
        texts, wheres = ["abcdefgh " * 60], [("attn_out", 1)]
        world.kept["split"] = al.harvest_split(world.model, texts, wheres, **sizes)
    page._data = world.kept["split"]
    return page


def _page_store(world: World) -> Any:
    return _page_with_data(world)._data.train["attn_out", 1]


def _runs(world: World) -> Any:
    if "runs" not in world.kept:
        world.kept["runs"] = _page_with_data(world).train(
            _page_store(world), ["random", "ASI"], progress=False
        )
    return world.kept["runs"]


MODEL, TOKENS, LAYER, NO = _at("model"), _at("tokens"), _is(1), _is(False)
RUN: dict[str, Callable[[World], Any]] = {"model": MODEL, "tokens": TOKENS, "progress": NO}
WHERES = _is([("attn_out", 1)])
W_O = _is(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)))
C_Z = _is(torch.eye(8))
BATCHES: dict[str, Callable[[World], Any]] = {
    "batch_size": _is(16),
    "seed": _is(0),
    "start": _is(0),
    "n_tokens": _is(64),
}
ROWS = _at("rows")
MEAN = _is(torch.zeros(D_IN))
# ruff: noqa: E501
# fmt: off


def _places(kind: str, owner: Callable[[World], Any]) -> dict[str, Callable[[World], Made]]:
    return {
        f"{kind}.place_in": _of(owner, "place_in", model=MODEL, metadata=_is({})),
        f"{kind}.place": _of(owner, "place", model=MODEL),
        f"{kind}.hooks": _of(owner, "hooks", model=MODEL, place=_is(None)),
    }


INFO = {
    "name": "m", "architecture": "a", "n_layers": 1, "d_model": 1, "n_heads": 1, "n_kv_heads": 1, "d_head": 1,
    "d_vocab": 1, "n_ctx": 1, "dtype": "float32", "weights": "w", "fingerprint": "f",
    "normalizes_attn_out": False, "causal": True,
}
_ROW = {
    "model": "m", "corpus": "c", "site": "z", "layer": 0, "d": 4, "n_tokens": 9, "effective_rank": 1.0,
    "effective_rank_fraction": 0.25, "intrinsic_dimension_99": 1, "participation_ratio": 1.0, "stable_rank": 1.0,
}
PAGE_OF, PAGE_DATA = _at("page"), _page_with_data

DOORS: dict[str, Callable[[World], Made]] = {
    "fetch": _al("fetch", name=_is("news-en")),
    "ModelInfo": _al("ModelInfo", **{key: _is(value) for key, value in INFO.items()}),
    "load_model": _al(
        "load_model", model=MODEL, dtype=_is("auto"), device=_is("auto"), revision=_is(None), trust_remote_code=NO,
        part=_is(None),
    ),
    **right_media.DOORS,
    "model_info": _al("model_info", model=MODEL, fingerprint=_is(True)),
    "verify": _al("verify", model=MODEL),
    "Tokens": _al(
        "Tokens", ids=_is(torch.ones(2, 4, dtype=torch.int64)), corpus=_is("c"), tokenizer=_is("t"),
        context=_is(4), bos=_is(True), content=_is(""),
    ),
    "Tokens.batches": _of(TOKENS, "batches", batch_size=_is(2)),
    "corpus_names": _al("corpus_names"),
    "load_tokens": _al(
        "load_tokens", source=_is(["abcdefgh " * 20]), model_or_tokenizer=MODEL, n_tokens=_is(16), context=_is(8),
        prepend_bos=_is(True), seed=_is(0), column=_is("text"), split=_is("train"), name=_is(None), offset=_is(1),
    ),
    "layer_at": _al("layer_at", model=MODEL, fraction=_is(0.5)),
    "layers_at": _al("layers_at", model=MODEL, fractions=_is([0, 0.5])),
    "places": _al("places", model=MODEL, sites=_is(["attn_out"]), layers=_is([1])),
    "Moments": _al("Moments", n=_is(1), mean=MEAN, scatter=_is(torch.eye(D_IN))),
    "Moments.zeros": _of(_is(al.Moments), "zeros", d=_is(3), device=_is("cpu")),
    "Moments.of": _of(_is(al.Moments), "of", rows=ROWS),
    "Moments.update": _of(lambda w: w.moments.clone(), "update", rows=ROWS),
    "Moments.merge": _of(lambda w: w.moments.clone(), "merge", other=_at("moments")),
    "Moments.to": _of(_at("moments"), "to", device=_is("cpu")),
    "Moments.exact": _of(_is(al.Moments), "exact", n=_is(1), mean=MEAN, scatter=_is(torch.eye(D_IN))),
    **{
        f"Moments.{name}": _of(lambda w: w.moments.clone(), name, **{key: _at(value)})
        for name, key, value in (("block", "rows", "rows"), ("without", "other", "few"))
    },
    "Moments.set_limit": _of(lambda w: w.moments.clone(), "set_limit"),
    "Pair.split": _of(_pair, "split", n=_is(2)),
    "TrainConfig.as_dict": _of(_at("train"), "as_dict"),
    "Moments.clone": _of(_at("moments"), "clone"),
    "Moments.state": _of(_at("moments"), "state"),
    "Moments.from_state": _of(_is(al.Moments), "from_state", state=lambda w: w.moments.state()),
    "Spectrum": _al(
        "Spectrum", eigenvalues=_is(torch.ones(D_IN)), mean=MEAN, n=_is(9), covariance=_is(torch.eye(D_IN)),
        name=_is("n"),
    ),
    "Spectrum.from_moments": _of(_is(al.Spectrum), "from_moments", moments=_at("moments"), name=_is("n")),
    "Spectrum.of": _of(_is(al.Spectrum), "of", rows=ROWS, name=_is("n")),
    "Spectrum.intrinsic_dimension": _of(_at("spectrum"), "intrinsic_dimension", share=_is(0.9)),
    "Spectrum.explained_variance": _of(_at("spectrum"), "explained_variance", r=_is(3)),
    "Spectrum.active_subspace": _of(_at("spectrum"), "active_subspace", d_init=_is(3)),
    "Spectrum.summary": _of(_at("spectrum"), "summary"),
    "effective_rank_limit": _al("effective_rank_limit", n=_is([10, 20]), ranks=_is([1.0, 2.0])),
    "ActivationStore": _al(
        "ActivationStore", rows=lambda w: [w.rows], moments=lambda w: lambda: w.moments, mean=MEAN,
        mean_square_norm=_is(1.0), metadata=_is({}), folder=_is(None), checksums=_is([]),
    ),
    "ActivationStore.open": _of(_is(al.ActivationStore), "open", folder=lambda w: w.harvested.folder),
    "ActivationStore.from_tensor": _of(_is(al.ActivationStore), "from_tensor", rows=ROWS, metadata=_is({"a": 1})),
    "ActivationStore.verify": _of(_at("harvested"), "verify"),
    "ActivationStore.in_order": _of(_at("store"), "in_order", batch_size=_is(100)),
    "ActivationStore.rows": _of(_at("store"), "rows", index=_is(torch.tensor([0, 2]))),
    "ActivationStore.positions": _of(_at("store"), "positions", index=_is(torch.tensor([0, 2]))),
    "ActivationStore.batches": _of(
        _at("store"), "batches", **BATCHES, dtype=_is(torch.float32), share=_is(lambda n: (0, n))
    ),
    "ActivationStore.sample": _of(_at("store"), "sample", n=_is(5), seed=_is(0)),
    "harvest_store": _al("harvest_store", **RUN, site=_is("attn_out"), layer=LAYER, **(HARVEST := {
        "folder": _is(None), "dtype": _is("float32"), "budget_gb": _is(1), "shard_tokens": _is(16),
        "drop_first": _is(True), "batch_tokens": _is(32), "ranks": _is(None),
    })),
    "harvest_stores": _al("harvest_stores", **RUN, wheres=WHERES, **HARVEST),
    "harvest_split": _al(
        "harvest_split", model=MODEL, corpus=_is(["abcdefgh " * 60]), wheres=WHERES, n_tokens=_is(64),
        n_tokens_held_out=_is(32), n_tokens_loss=_is(16), context=_is(16), budget_gb=_is(1.5),
    ),
    "Pair": _al("Pair", x=ROWS, y=ROWS),
    "PairedStores": _al("PairedStores", inputs=_at("store"), outputs=_at("store")),
    "PairedStores.batches": _of(_at("paired"), "batches", **BATCHES),
    "PairedStores.sample": _of(_at("paired"), "sample", n=_is(5), seed=_is(0)),
    "PairedStores.in_order": _of(_at("paired"), "in_order", batch_size=_is(100)),
    "Spectra": _al(
        "Spectra", spectra=_at("spectra"), model=lambda w: al.model_info(w.model), corpus=_is("c")
    ),
    "Spectra.records": _of(_at("spectra"), "records"),
    "Spectra.curve_records": _of(_at("spectra"), "curve_records", layers=_is([1])),
    "explore": _al("explore", model=MODEL, spectra=_at("spectra"), seed=_is(0)),
    "collect_spectra": _al(
        "collect_spectra", **RUN, sites=_is(["attn_out"]), layers=_is([1]), drop_first=_is(True),
        batch_tokens=_is(64),
    ),
    "rank_growth": _al(
        "rank_growth", **RUN, sites=_is(["attn_out"]), layers=_is([1]), steps=_is(2), drop_first=_is(True),
        batch_tokens=_is(64),
    ),
    "counterfactual_ranks": _al(
        "counterfactual_ranks", W_O=W_O, z_covariance=C_Z, variants=_is(("z", "gaussian")), seed=_is(0)
    ),
    "head_overlap": _al("head_overlap", W_O=W_O, z_covariance=C_Z, seed=_is(0)),
    "cross_entropy": _al("cross_entropy", **RUN, batch_tokens=_is(64)),
    "edited_cross_entropy": _al(
        "edited_cross_entropy", **RUN, site=_is("attn_out"), layer=LAYER, edits=_is({"zero": torch.zeros_like}),
        batch_tokens=_is(64),
    ),
    "truncation_sweep": _al(
        "truncation_sweep", **RUN, spectra=_at("spectra"), ranks=_is([0.5]), random_ranks=_is([0.5]),
        random_seeds=_is([0]), batch_tokens=_is(64),
    ),
    "TrainConfig": _al("TrainConfig", **{
        key: _is(one.default) for key, one in al.TrainConfig.__dataclass_fields__.items()
    }),
    "TrainConfig.from_dict": _of(_is(al.TrainConfig), "from_dict", values=_is({"lr": 1e-3})),
    "live": _al("live", every_s=_is(1.0)),
    "SAEConfig": _al(
        "SAEConfig", d_in=_is(D_IN), d_sae=_is(32), k=_is(4), activation=_is("topk"), seed=_is(0), metadata=_is({}),
        d_out=_is(None),
    ),
    "SAEConfig.from_dict": _of(
        _is(al.SAEConfig), "from_dict", values=_is({"d_in": 4, "d_sae": 8, "k": 2})
    ),
    "initialize": _al(
        "initialize", sae=_at("sae"), method=_is("asi"), spectrum=_at("spectrum"), d_init=_is(4), sample=ROWS,
        tied=_is(True), norm_search=_is(True), overshoot=_is(1.0), b_dec=_is("mean"), center=_is(True), center_encoder_bias=NO,
        initial_l0=_is(None), seed=_is(0), mesh=_is(None),
    ),
    "SparsityConfig": _al("SparsityConfig", **{
        key: _is(one.default) for key, one in al.SparsityConfig.__dataclass_fields__.items()
    }),
    "Evaluation": _al(
        "Evaluation", n_tokens=_is(1), fvu=_is(0.5), explained_variance=_is(0.5), l0=_is(3.0),
        dead_fraction=_is(0.0), losses=_is(None),
    ),
    "evaluate": _al(
        "evaluate", sae=lambda w: w.sae(d_in=24), rows=_at("harvested"), where=_is(("attn_out", 1)), **RUN,
        batch_tokens=_is(64),
    ),
    "evaluate_together": _al(
        "evaluate_together", saes=lambda w: [w.sae(d_in=24)], rows=_at("harvested"), where=_is(("attn_out", 1)),
        **RUN, batch_tokens=_is(64),
    ),
    "evaluate_transcoder": _al(
        "evaluate_transcoder", sae=_at("transcoder"), store=_at("paired"), model=_is(None), tokens=_is(None),
        batch_tokens=_is(64), progress=NO,
    ),
    "initialize_transcoder": _al(
        "initialize_transcoder", sae=_at("transcoder"), store=_at("paired"), method=_is("asi"),
        reader=_is("active"), d_init=_is(4), initial_l0=_is(None), seed=_is(0),
    ),
    "harvest_pairs": _al("harvest_pairs", **RUN, layer=LAYER, dtype=_is("float32"), batch_tokens=_is(64)),
    "stored_pairs": _al("stored_pairs", **RUN, layer=LAYER, budget_gb=_is(1)),
    "SequencePairs": _al(
        "SequencePairs", inputs=lambda w: w.pairs.inputs, outputs=lambda w: w.pairs.outputs, metadata=_is({})
    ),
    "SequencePairs.blocks": _of(_at("pairs"), "blocks", n_sequences=_is(2)),
    "SequencePairs.batches": _of(_at("pairs"), "batches", **BATCHES),
    "LorsaConfig": _al("LorsaConfig", **{
        key: (lambda w, key=key: getattr(w.lorsa_config, key)) for key in al.LorsaConfig.__dataclass_fields__
    }),
    "LorsaConfig.from_dict": _of(_is(al.LorsaConfig), "from_dict", values=lambda w: asdict(w.lorsa_config)),
    "LorsaConfig.of": _of(
        _is(al.LorsaConfig), "of", model=MODEL, layer=LAYER, n_ov=_is(N_OV), k=_is(4), context=_is(CONTEXT),
        n_qk_heads=_is(None), rectify=_is(True), seed=_is(0),
    ),
    "Lorsa": _al("Lorsa", config=_at("lorsa_config"), dtype=_is(torch.float32)),
    **{
        f"Lorsa.{name}": _of(_at("lorsa"), name, **{x: lambda w: w.pairs.inputs})
        for name, x in (
            ("normalize", "x"), ("normalize_output", "y"), ("units", "x"), ("encode", "x"), ("forward", "x")
        )
    },
    "Lorsa.decode": _of(_at("lorsa"), "decode", code=lambda w: w.lorsa().encode(w.pairs.inputs)),
    "Lorsa.decode_normalized": _of(_at("lorsa"), "decode_normalized", code=lambda w: w.lorsa().encode(w.pairs.inputs)),
    "Lorsa.scan": _of(_at("lorsa"), "scan", data=_at("pairs")),
    "Lorsa.save": _of(_at("lorsa"), "save", path=lambda w: w.root / "l.safetensors"),
    "Lorsa.load": _of(_is(al.Lorsa), "load", path=_at("saved_lorsa")),
    **_places("Lorsa", _at("lorsa")),
    "Lorsa.extra_repr": _of(_at("lorsa"), "extra_repr"),
    "from_attention": _al("from_attention", model=MODEL, layer=LAYER, context=_is(8), dtype=_is(torch.float32)),
    "initialize_lorsa": _al(
        "initialize_lorsa", lorsa=_at("lorsa"), model=MODEL, layer=LAYER, sample=_at("pairs"), method=_is("asi"),
        d_init=_is(3), seed=_is(0),
    ),
    "evaluate_lorsa": _al(
        "evaluate_lorsa", lorsa=_at("lorsa"), pairs=_at("pairs"), layer=LAYER, **RUN, batch_tokens=_is(64)
    ),
    "LorsaTrainer": _al("LorsaTrainer", lorsa=lambda w: _ready(w).lorsa, config=_at("train")),
    "LorsaTrainer.step": _of(_ready, "step", batch=_batch),
    "LorsaTrainer.prepare": _of(_ready, "prepare", store=_at("pairs")),
    "LorsaTrainer.load_state": _of(_ready, "load_state", read=_read_from(_stepped)),
    "Trainer": _al(
        "Trainer", sae=_at("sae"), config=_at("train"), sparsity=_is(al.SparsityConfig()), drift=_is(None),
        mesh=_is(None), search=_is("exact"),
    ),
    "Trainer.step": _of(_at("trainer"), "step", batch=lambda w: w.rows[:32]),
    "Trainer.prepare": _of(_at("trainer"), "prepare", store=_at("store")),
    "Trainer.load_state": _of(_at("trainer"), "load_state", read=_read_from(_at("trainer"))),
    "Features": _al(
        "Features", sae=lambda w: w.sae(d_in=24), store=_at("harvested"), **RUN, d_init=_is(4), top=_is(2),
        sampled=_is(2), seed=_is(0),
    ),
    "Features.card": _of(_at("features"), "card", feature=_is(0), n_logits=_is(2), n_similar=_is(2)),
    "Features.contexts": _of(
        _at("features"), "contexts", feature=_is(0), which=_is("top"), before=_is(2), after=_is(2)
    ),
    "Features.similar": _of(_at("features"), "similar", feature=_is(0), n=_is(2)),
    "Features.written": _of(_at("features"), "written", feature=_is(0)),
    "Features.logit_effect": _of(_at("features"), "logit_effect", feature=_is(0)),
    "Features.search": _of(_at("features"), "search", text=_is("a"), n=_is(2)),
    "Features.choice": _of(_at("features"), "choice", n=_is(2)),
    "Features.word": _of(_at("features"), "word", token=_is(5)),
    "browse": _al(
        "browse", sae=lambda w: w.sae(d_in=24), store_or_tokens=_at("harvested"), model=MODEL, tokens=TOKENS
    ),
    "Page": _al("Page", notebook=_is("03_page"), namespace=_at("namespace")),
    "Page.load_model": _of(PAGE_OF, "load_model", name=lambda w: str(w.folder)),
    "Page.load_tokens": _of(
        PAGE_OF, "load_tokens", model=MODEL, n_tokens=_is(32), corpus=_is(["abcdefgh " * 60]), after=_is(None),
        what=_is("w"),
    ),
    "Page.small_tokenizer": _of(PAGE_OF, "small_tokenizer", vocab=_is(260)),
    "Page.load_inputs": _of(PAGE_OF, "load_inputs", model=MODEL, n_rows=_is(32), after=_is(None), what=_is("w")),
    "Page.harvest": _of(PAGE_OF, "harvest", model=MODEL, wheres=WHERES),
    "Page.train_config": _of(PAGE_OF, "train_config"),
    "Page.train": _of(
        PAGE_DATA, "train", store=_page_store, methods=_is(["random"]), d_sae=_is(32), lr=_is(1e-3)
    ),
    "Page.rows": _of(PAGE_DATA, "rows", runs=_runs, held_out=_page_store, losses=NO, curves=NO, drift=NO),
    "Page.paired": _of(PAGE_DATA, "paired", runs=_runs, reference=_is("random")),
    "Page.setting": _of(PAGE_OF, "setting", model=MODEL, tokens=TOKENS),
    "Page.budget": _of(PAGE_DATA, "budget", runs=_runs, losses=NO, before=_is(""), after=_is("")),
    "Page.table": _of(PAGE_OF, "table", rows=_is([_ROW]), row=_is(RankRow), stem=_is("03_more")),
    "Page.figure": _of(PAGE_OF, "figure", figure=_is(go.Figure(layout={"title": {"text": "t", "subtitle": {"text": "s"}}})), caption=_is("c"), stem=_is("03_page")),
    "Page.judge": _of(PAGE_OF, "judge", budget=_is("b")),
    "Page.done": _of(PAGE_OF, "done"),
}
for _kind, _new in (("SparseAutoencoder", "sae"), ("Transcoder", "transcoder")):
    DOORS |= {
        _kind: _al(_kind, config=(lambda w, new=_new: getattr(w, new)().config), draw=_is(True),
                   dtype=_is(torch.float32)),
        f"{_kind}.set_normalization": _of(_at(_new), "set_normalization", mean=MEAN, scale=_is(1.0)),
        f"{_kind}.decode": _of(_at(_new), "decode", code=lambda w: w.sae().encode(w.rows[:4])),
        f"{_kind}.prepare": _of(
            _at(_new), "prepare", store=_at("store" if _new == "sae" else "paired"), first=_is(True)
        ),
        f"{_kind}.check_batch": _of(_at(_new), "check_batch", batch=ROWS if _new == "sae" else _pair),
        f"{_kind}.sides": _of(_at(_new), "sides", batch=ROWS if _new == "sae" else _pair),
        f"{_kind}.scan": _of(_at(_new), "scan", data=_at("store" if _new == "sae" else "paired")),
        f"{_kind}.folded": _of(_at(_new), "folded"),
        **_places(_kind, _at(_new)),
        f"{_kind}.extra_repr": _of(_at(_new), "extra_repr"),
        f"{_kind}.save": _of(_at(_new), "save", folder=lambda w: w.root / "saved"),
        f"{_kind}.load": _of(_is(getattr(al, _kind)), "load", folder=_at("saved")),
        **{
            f"{_kind}.{name}": _of(_at(_new), name, x=ROWS)
            for name in ("normalize", "centered", "encode", "encode_dense", "forward")
        },
    }
DOORS["Transcoder.set_output_normalization"] = _of(
    _at("transcoder"), "set_output_normalization", mean=MEAN, scale=_is(1.0)
)
DOORS["Transcoder.normalize_output"] = _of(_at("transcoder"), "normalize_output", y=ROWS)
for _kind, _owner, _data in (("Trainer", _at("trainer"), _at("store")), ("LorsaTrainer", _ready, _at("pairs"))):
    DOORS |= {
        f"{_kind}.fit": _of(
            _owner, "fit", store=_data, folder=_is(None), checkpoint_every=_is(64), log_every=_is(1),
            windows=_is([32]), loggers=_is([]), progress=NO, on_log=_is(None),
        ),
        f"{_kind}.stream": _of(_owner, "stream", store=_data, start=_is(0)),
        f"{_kind}.dead_fraction": _of(_owner, "dead_fraction", window=_is(8)),
        **{f"{_kind}.{name}": _of(_owner, name) for name in ("measure", "describe", "state")},
    }

# fmt: on


def made(name: str, world: World) -> Made:
    """Return a door and its right arguments, made anew."""
    return DOORS[name](world)
