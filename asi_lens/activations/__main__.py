"""Harvests from a file: `python -m asi_lens.activations harvest.yaml`, or torchrun for several processes.

    model: smollm2-135m                # as `load_model`
    corpus: news-en                    # as `load_tokens`
    tokens: {n_tokens: 1000000, context: 256}    # its other arguments
    sites: [[attn_out, 15], [mlp_out, 15]]
    output: stores                     # a store for each in it: `stores/attn_out.15` ...
    store: {budget_gb: 20}             # optional: dtype, budget_gb, shard_tokens, drop_first, drop_massive,
                                       # batch_tokens
    model_dtype: auto                  # optional: of the forward pass
    device: cpu                        # optional: cpu or cuda
    timeout_s: 600                     # optional: how long a process waits for another that does not get on

A relative `output` is relative to the file. The same command, with as many processes, resumes a harvest that
was killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.harvest_store import harvest_stores
from asi_lens.activations.store import ActivationStore
from asi_lens.base import run_files
from asi_lens.base.doors import check_options, checked
from asi_lens.base.errors import require, require_known
from asi_lens.base.ranks import Ranks
from asi_lens.inputs.corpora import load_tokens
from asi_lens.inputs.models import load_model

_TOKENS = ("n_tokens", "context", "prepend_bos", "seed", "column", "split", "name", "offset")
_STORE = ("dtype", "budget_gb", "shard_tokens", "drop_first", "drop_massive", "batch_tokens")


@checked
@dataclass(frozen=True)
class HarvestConfig:
    """Options of a harvest file, checked. Raises OptionError or UnknownNameError."""

    model: str
    corpus: str
    tokens: Mapping[str, Any]
    sites: Sequence[Sequence[str | int]]
    output: Path
    store: Mapping[str, Any] = field(default_factory=dict)
    model_dtype: str = "auto"
    device: str = "cpu"
    timeout_s: float | int = 600

    def __post_init__(self) -> None:
        require_known(self.tokens, _TOKENS, "tokens key")
        require_known(self.store, _STORE, "store key")
        require("n_tokens" in self.tokens, "tokens", dict(self.tokens), "given with n_tokens")
        pairs = all(
            isinstance(one, list) and [type(part) for part in one] == [str, int] for one in self.sites
        )
        require(pairs and len(self.sites) > 0, "sites", self.sites, "a list of [site, layer]")
        run_files.require_machine(self.device, self.timeout_s)
        check_options(load_tokens, self.tokens)
        check_options(harvest_stores, self.store)

    @classmethod
    def read(cls, path: Path | str) -> HarvestConfig:
        """Read the configuration from a YAML file. Raises the errors of `run_files.read_yaml` too."""
        known = [f.name for f in fields(cls)]
        values = run_files.read_yaml(path, known, known[:5], ("tokens", "store"), ("output",))
        require(isinstance(values["sites"], list), "sites", values["sites"], "a list of [site, layer]")
        return cls(**values)


def run(config: HarvestConfig, ranks: Ranks, progress: bool = True) -> dict[SiteLayer, ActivationStore]:
    """Run the harvest of `config` as one of `ranks`; returns the stores by (site, layer).

    Raises the errors of `harvest_stores`, and RankError.
    """
    run_files.agree(ranks, asdict(config))
    device = run_files.device_here(config.device)
    model = ranks.together(
        "loading the model", lambda: load_model(config.model, dtype=config.model_dtype, device=device)
    )
    tokens = ranks.together("loading the corpus", lambda: load_tokens(config.corpus, model, **config.tokens))
    return harvest_stores(
        model,
        tokens,
        [(str(site), int(layer)) for site, layer in config.sites],
        folder=config.output,
        progress=progress,
        ranks=ranks,
        **config.store,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_files.command("python -m asi_lens.activations", __doc__, HarvestConfig.read, run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
