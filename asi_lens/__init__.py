"""Show the low-dimensional subspace that attention writes into, and train dictionaries that start in it.

Names are imported on first use, so that `import asi_lens` stays light (torch loads with the first
name that needs it).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "1.0.0"

# Public name -> module that defines the name. `dir(asi_lens)` and the lazy import both read this table.
_PUBLIC: dict[str, str] = {
    name: f"asi_lens.{module}"
    for module, names in {
        "inputs.sources": ("fetch",),
        "inputs.models": ("SITES", "ModelInfo", "load_model", "model_info"),
        "inputs.verify": ("Verification", "verify"),
        "inputs.corpora": ("Tokens", "corpus_names", "load_tokens"),
        "inputs.media_inputs": ("Inputs", "load_inputs"),
        "activations.harvest": ("layer_at", "layers_at", "places"),
        "activations.moments": ("Moments",),
        "activations.spectrum": ("Spectrum", "effective_rank_limit"),
        "activations.harvest_store": ("ActivationStore", "harvest_store", "harvest_stores"),
        "activations.split": ("Split", "harvest_split"),
        "activations.pairs": ("Pair", "PairedStores"),
        "collapse.spectra": ("Spectra", "collect_spectra", "rank_growth"),
        "collapse.explore": ("explore",),
        "collapse.output_projection": ("counterfactual_ranks", "head_overlap"),
        "collapse.interventions": ("cross_entropy", "edited_cross_entropy", "truncation_sweep"),
        "training.config": ("TrainConfig",),
        "training.live": ("live",),
        "sae.dictionary": ("SAEConfig", "SparseAutoencoder"),
        "sae.initialize": ("initialize",),
        "sae.sparsity": ("SparsityConfig",),
        "sae.train": ("Trainer",),
        "sae.evaluate": ("Evaluation", "evaluate", "evaluate_together", "evaluate_transcoder"),
        "sae.features": ("Features",),
        "sae.transcoder": ("Transcoder",),
        "sae.transcoder_init": ("initialize_transcoder",),
        "lorsa.browse": ("browse",),
        "lorsa.lorsa": ("Lorsa", "LorsaConfig"),
        "lorsa.data": ("SequencePairs", "harvest_pairs", "stored_pairs"),
        "lorsa.initialize": ("from_attention", "initialize_lorsa"),
        "lorsa.train": ("LorsaTrainer",),
        "lorsa.evaluate": ("evaluate_lorsa",),
        "experiments.page": ("Page",),
    }.items()
    for name in names
}

# Subpackages ("rooms") that are attributes of `asi_lens`.
_ROOMS = (
    "activations",
    "base",
    "collapse",
    "experiments",
    "figures",
    "inputs",
    "kernels",
    "lorsa",
    "reproduce",
    "results",
    "sae",
    "training",
)

# Modules that are attributes of `asi_lens` under their older names, from before the subpackages.
_MODULES = {
    "claims": "asi_lens.results.claims",
    "collect": "asi_lens.collapse.spectra",
    "comparison": "asi_lens.experiments.runs",
    "comparison_table": "asi_lens.experiments.rows",
    "corpora": "asi_lens.inputs.corpora",
    "correlation": "asi_lens.results.judging",
    "dictionary_figures": "asi_lens.figures.kinds",
    "errors": "asi_lens.base.errors",
    "files": "asi_lens.base.files",
    "foreign": "asi_lens.sae.foreign",
    "harvest": "asi_lens.activations.harvest",
    "interventions": "asi_lens.collapse.interventions",
    "lorsa_comparison": "asi_lens.experiments.lorsa_runs",
    "lorsa_contexts": "asi_lens.lorsa.contexts",
    "models": "asi_lens.inputs.models",
    "moments": "asi_lens.activations.moments",
    "output_projection": "asi_lens.collapse.output_projection",
    "paths": "asi_lens.base.paths",
    "provenance": "asi_lens.results.provenance",
    "recipes": "asi_lens.experiments.recipes",
    "sae_figures": "asi_lens.figures.dead_features",
    "sources": "asi_lens.inputs.sources",
    "spectra": "asi_lens.activations.spectrum",
    "verdicts": "asi_lens.results.verdicts",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"asi_lens.{name}")
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'asi_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS, *_MODULES})
