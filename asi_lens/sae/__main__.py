"""Whole training runs from a file: `python -m asi_lens.sae run.yaml`, with torchrun over several ranks.

    store: stores/attn_out.15          # a store, or rows of other tools: .npy, .safetensors, a folder of them
    sae: {d_sae: 16384, k: 32}         # as SAEConfig; d_in is the store's
    initialize: {method: asi, d_init: auto}   # as `initialize`; `sample` is a number of rows
    train: {n_tokens: 4000000, optimizer: sparse_adam}   # as TrainConfig
    search: subspace                   # optional: exact (default) or subspace (`search`)
    mesh: {data: 1, model: 1}          # ranks along each dimension
    output: runs/asi                   # metrics.csv, checkpoints, and at the end the dictionary in `sae`
    fit: {checkpoint_every: 1000000}   # optional: checkpoint_every, log_every, windows, loggers
    device: cpu                        # optional: cpu or cuda
    timeout_s: 600                     # optional: how long a rank waits for another

A run that was stopped or killed continues when the same command runs again, also on another mesh. Relative
paths are relative to the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from asi_lens.activations.spectrum import Spectrum
from asi_lens.activations.store import ActivationStore
from asi_lens.base import run_files
from asi_lens.base.doors import check_options, checked
from asi_lens.base.errors import require, require_known, require_whole
from asi_lens.base.ranks import Ranks
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.search import SEARCHES
from asi_lens.sae.shard import part_of
from asi_lens.sae.starts import find_start
from asi_lens.sae.train import Trainer
from asi_lens.training import sharded_checkpoint
from asi_lens.training.config import TrainConfig
from asi_lens.training.mesh import Mesh, MeshConfig, RankMesh

FINISHED = "sae"
"""Name of the trained dictionary's folder in a run's `output`."""
SAMPLE_ROWS = 8192
"""Default number of rows for the norm search."""
_INITIALIZE = (
    *("method", "d_init", "sample", "tied", "norm_search", "overshoot", "b_dec", "center"),
    *("center_encoder_bias", "initial_l0", "seed"),
)
_FIT = ("checkpoint_every", "log_every", "windows", "loggers")


@checked
@dataclass(frozen=True)
class RunConfig:
    """Options of a run file, checked. Raises OptionError or UnknownNameError.

    Attributes:
        store, output: folders.
        sae, initialize, train, mesh, fit: keyword arguments of `SAEConfig`, `initialize`, `TrainConfig`,
            `MeshConfig` and `Trainer.fit`.
    """

    store: Path
    output: Path
    sae: Mapping[str, Any]
    initialize: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    search: str = "exact"
    mesh: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    timeout_s: float | int = 600

    def __post_init__(self) -> None:
        known: dict[str, Sequence[str]] = {
            "sae": [f.name for f in fields(SAEConfig) if f.name not in ("d_out", "metadata")],
            "initialize": _INITIALIZE,
            "train": [f.name for f in fields(TrainConfig)],
            "mesh": [f.name for f in fields(MeshConfig)],
            "fit": _FIT,
        }
        for section, keys in known.items():
            require_known(getattr(self, section), keys, f"{section} key")
        require("d_sae" in self.sae, "sae", dict(self.sae), "given with d_sae")
        run_files.require_machine(self.device, self.timeout_s)
        require_whole("sample", self.initialize.get("sample", SAMPLE_ROWS), 1)
        require_known([self.search], SEARCHES, "search")
        TrainConfig(**self.train)
        check_options(SAEConfig.__init__, self.sae)
        check_options(initialize, {key: one for key, one in self.initialize.items() if key != "sample"})
        check_options(Trainer.fit, self.fit)
        MeshConfig(**self.mesh)

    @classmethod
    def read(cls, path: Path | str) -> RunConfig:
        """Return the configuration in a YAML file. Raises as `run_files.read_yaml` too."""
        known = [f.name for f in fields(cls)]
        sections = ("sae", "initialize", "train", "mesh", "fit")
        needed, folders = ("store", "sae", "output"), ("store", "output")
        return cls(**run_files.read_yaml(path, known, needed, sections, folders))


def run(config: RunConfig, ranks: Ranks, progress: bool = True) -> Trainer:
    """Train a dictionary by `config`, as one of `ranks`, and write it to `output/sae`.

    Returns the trainer. Raises RankError, naming the rank, if the ranks cannot start together; else raises
    as `Trainer.fit`.
    """
    run_files.agree(ranks, asdict(config))
    store = ranks.together("opening the store", lambda: ActivationStore.open(config.store))
    ranks.require_same("stores", {"fingerprint": store.fingerprint, "rows": store.n})
    device = run_files.device_here(config.device)
    shape = MeshConfig(**config.mesh)
    mesh = Mesh() if ranks.size == shape.size == 1 else RankMesh(shape, ranks, device)

    whole = SAEConfig(**{"d_in": store.d, **config.sae}, metadata=dict(store.metadata))
    sae = SparseAutoencoder(part_of(whole, mesh), draw=False).to(device)
    options = {"method": "asi", "sample": SAMPLE_ROWS, **config.initialize}
    if find_start(options["method"]).subspace:
        options.setdefault("d_init", "auto")
    sample = store.sample(min(options.pop("sample"), store.n))
    initialize(sae, spectrum=_shared_spectrum(store, ranks, device), sample=sample, mesh=mesh, **options)
    trainer = Trainer(sae, TrainConfig(**config.train), mesh=mesh, search=config.search)
    trainer.fit(store, folder=config.output, progress=progress, **config.fit)

    def export() -> None:
        if mesh.leads:
            export_folder(config.output, config.output / FINISHED)

    ranks.together("writing the dictionary", export)
    return trainer


def _shared_spectrum(store: ActivationStore, ranks: Ranks, device: str) -> Spectrum:
    """Return the store's spectrum. With several ranks, the first rank computes it and shares it with all."""
    if ranks.size == 1:
        return store.spectrum
    d = store.d
    values = torch.zeros(d, dtype=torch.float64, device="cpu")
    directions = torch.zeros(d, d, dtype=torch.float64, device="cpu")
    if ranks.rank == 0:
        values, directions = store.spectrum.eigenvalues, store.spectrum.eigenvectors.contiguous()
    values, directions = (ranks.share(tensor.to(device)).cpu() for tensor in (values, directions))
    spectrum = Spectrum(values, store.mean, store.n, lambda: store.moments.covariance)
    spectrum.eigenvectors = directions
    return spectrum


def export_folder(run_folder: Path | str, folder: Path | str) -> None:
    """Write the dictionary of a run's newest checkpoint to `folder`, as `SparseAutoencoder.save` does.

    Weights are mapped from disk and written in pieces, so that the export needs little memory. Raises as
    `sharded_checkpoint.mapped_weights` and `save` do.
    """
    with sharded_checkpoint.mapped_weights(Path(run_folder)) as (about, weights):
        # No memory is allocated here: every tensor is replaced by a tensor of the checkpoint.
        with torch.device("meta"):
            sae = SparseAutoencoder(SAEConfig.from_dict(about["run"]["sae"]), draw=False)
        sae.W_enc = torch.nn.Parameter(weights.pop("encoder").T)
        sae.load_state_dict({**weights, "W_enc": sae.W_enc}, assign=True)
        sae.initialization = about["run"]["initialization"]
        sae.save(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_files.command("python -m asi_lens.sae", __doc__, RunConfig.read, run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
