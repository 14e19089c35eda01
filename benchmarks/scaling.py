"""Memory, traffic and time of a training step on meshes of processes (gloo).

    python benchmarks/scaling.py [--d-sae 262144] [--batch 256] [--steps 4] [--meshes 1x1 1x2 1x4 2x1 2x2]

Every mesh (data x model) runs alone, one thread a rank: peak resident memory of a rank above that of its
process before the dictionary was made, bytes that it receives in a step beside the formula of
`asi_lens.training.mesh`, and median seconds of a step. On one machine ranks share its cores, so that seconds
say nothing about clusters.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

import torch
from train_step import peak_mib, rows

from asi_lens.activations.store import ActivationStore
from asi_lens.base.ranks import joined
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.shard import part_of
from asi_lens.sae.train import Trainer
from asi_lens.training.config import TrainConfig
from asi_lens.training.mesh import Mesh, MeshConfig, RankMesh


def as_rank(args: argparse.Namespace) -> dict[str, float]:
    """What this rank of `args.mesh` measures."""
    torch.set_num_threads(1)
    store = ActivationStore.from_tensor(rows(16 * args.batch, args.d_in))
    spectrum, sample = store.spectrum, store.sample(args.batch)
    with joined() as ranks:
        shape = MeshConfig(*args.mesh)
        mesh = RankMesh(shape, ranks) if shape.size > 1 else Mesh()
        before = peak_mib(torch.device("cpu"))
        whole = SAEConfig(args.d_in, args.d_sae, args.k)
        sae = SparseAutoencoder(part_of(whole, mesh), draw=False)
        initialize(sae, "random", spectrum, None, sample, mesh=mesh)
        trainer = Trainer(
            sae, TrainConfig(batch_size=args.batch, n_tokens=args.batch * args.steps), mesh=mesh
        )
        seconds, received = [], []
        for batch in trainer.stream(store, 0):
            started, sent = time.perf_counter(), mesh.bytes_received
            trainer.step(batch)
            seconds.append(time.perf_counter() - started)
            received.append(mesh.bytes_received - sent)
        # The first step sends a few rows of the weights besides, to know the run again.
        return {
            "peak_mib": peak_mib(torch.device("cpu")) - before,
            "bytes": statistics.median(received),
            "seconds": statistics.median(seconds[1:]),
        }


def formula(args: argparse.Namespace, data: int, model: int) -> float:
    """Bytes that a rank receives in a step, by `asi_lens.training.mesh`."""
    own = args.batch / data
    along_model = (model - 1) * args.k * own
    along_model += 2 * (model - 1) / model * (args.d_in * own + args.d_in + 4)
    along_data = (data - 1) * own * (2 * args.d_in + 3 * args.k)
    return 4 * (along_model + along_data)


def main() -> None:
    """Print one line of JSON per mesh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=262_144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--meshes", nargs="+", default=["1x1", "1x2", "1x4", "2x1", "2x2"])
    parser.add_argument("--mesh", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mesh:
        print(json.dumps(as_rank(args)))
        return
    options = [
        f"--{key}={getattr(args, key.replace('-', '_'))}" for key in ("d-in", "d-sae", "k", "batch", "steps")
    ]
    for name in args.meshes:
        data, model = map(int, name.split("x"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {**os.environ, "WORLD_SIZE": str(data * model), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--mesh", str(data), str(model), *options]
        ranks = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in range(data * model)
        ]
        said = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
        most = {key: max(one[key] for one in said) for key in said[0]}
        expected = formula(args, data, model)
        print(
            json.dumps(
                {
                    "mesh": name,
                    "peak_mib_per_rank": round(most["peak_mib"]),
                    "weights_and_moments_mib": round(24 * args.d_in * args.d_sae / model / 2**20),
                    "bytes_per_step": round(most["bytes"]),
                    "bytes_by_formula": round(expected),
                    "seconds_per_step": round(most["seconds"], 3),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
