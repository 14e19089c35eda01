"""See the low-dimensional subspace that attention writes into, and train dictionaries that start in it.

Names are imported on first use, so that `import asi_lens` stays light (torch loads with the first
name that needs it).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that holds it. One table, so that `dir(asi_lens)` and the lazy import agree.
_PUBLIC: dict[str, str] = {
    name: f"asi_lens.{module}"
    for module, names in {
        "sources": ("fetch",),
        "models": ("SITES", "ModelInfo", "load_model", "model_info"),
        "corpora": ("Tokens", "corpus_names", "load_tokens"),
        "moments": ("Moments",),
        "spectra": ("Spectrum", "effective_rank_limit"),
        "collect": ("Spectra", "collect_spectra", "rank_growth"),
        "output_projection": ("counterfactual_ranks", "head_overlap"),
        "store": ("ActivationStore", "harvest_store", "harvest_stores"),
        "split": ("Split", "harvest_split"),
        "sae.dictionary": ("SAEConfig", "SparseAutoencoder"),
        "sae.initialize": ("initialize",),
        "sae.sparsity": ("SparsityConfig",),
        "sae.train": ("TrainConfig", "Trainer"),
        "sae.evaluate": ("Evaluation", "evaluate", "evaluate_together"),
        "sae.transcoder": ("Pair", "PairedStores", "Transcoder"),
        "sae.transcoder_init": ("initialize_transcoder",),
        "sae.transcoder_evaluate": ("evaluate_transcoder",),
        "sae.lorsa": ("Lorsa", "LorsaConfig"),
        "sae.lorsa_data": ("SequencePairs", "harvest_pairs", "stored_pairs"),
        "sae.lorsa_init": ("from_attention", "initialize_lorsa"),
        "sae.lorsa_train": ("LorsaTrainer",),
        "sae.lorsa_evaluate": ("evaluate_lorsa",),
        "interventions": ("cross_entropy", "edited_cross_entropy", "truncation_sweep"),
    }.items()
    for name in names
}

# Modules reached as attributes; none may share its name with a public function above.
_MODULES = (
    "claims",
    "collect",
    "comparison",
    "comparison_table",
    "corpora",
    "correlation",
    "dictionary_figures",
    "errors",
    "figures",
    "files",
    "harvest",
    "interventions",
    "lorsa_comparison",
    "lorsa_contexts",
    "models",
    "moments",
    "output_projection",
    "paths",
    "provenance",
    "recipes",
    "reproduce",
    "results",
    "sae_figures",
    "sources",
    "spectra",
)

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"asi_lens.{name}")
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'asi_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
