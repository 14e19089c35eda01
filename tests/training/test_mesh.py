"""One process and meshes of several (gloo): the same losses, the same weights, and what travels between."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_ranks import Launched
from small_trainings import D_IN, D_SAE, K, make, quick, small_store

from asi_lens.base.errors import OptionError
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.shard import shard
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.train import Trainer
from asi_lens.training.mesh import Mesh, MeshConfig

STEPS, BATCH = 40, 50  # not a multiple of 4: ranks have unequal shares

CHILD = """
    import json, sys
    sys.path.insert(0, {tests!r})
    import torch
    from safetensors.torch import save_file
    from asi_lens.base.ranks import joined
    from asi_lens.sae.shard import shard
    from asi_lens.training.mesh import MeshConfig, RankMesh
    from small_trainings import make, small_store
    from training.test_mesh import begin, start
    from asi_lens.sae.train import Trainer
    torch.set_num_threads(1)
    with joined(timeout_s=60) as ranks:
        mesh = RankMesh(MeshConfig(data={data}, model={model}), ranks)
        out = {{}}
        for name, (sae, config) in start().items():
            own = shard(sae, mesh)
            # Begun by the ranks themselves, it is the same.
            fresh = shard(make(), mesh)
            begin(fresh, name, mesh)
            assert torch.equal(fresh.W_dec, own.W_dec)
            torch.testing.assert_close(fresh.W_enc, own.W_enc, rtol=1e-5, atol=1e-6)
            trainer = Trainer(own, config, mesh=mesh)
            mesh.bytes_received = 0
            # What `fit` does: each rank reads its own rows alone.
            outputs = [trainer.step(batch) for batch in trainer.stream(small_store(), 0)]
            out[name] = dict(
                loss=[one.loss for one in outputs],
                fvu=[one.fvu for one in outputs],
                dead=[one.dead_fraction for one in outputs],
                l0=[one.l0 for one in outputs],
                aux=[one.aux_loss for one in outputs],
                norm=outputs[-1].gradient_norm,
                bytes=mesh.bytes_received,
            )
            if mesh.data_rank == 0:
                weights = {{n: p.detach().contiguous().clone() for n, p in trainer.sae.named_parameters()}}
                weights["last_fired"] = trainer.ledger.last_fired
                save_file(weights, "{folder}/" + name + "." + str(mesh.model_rank) + ".safetensors")
        if ranks.rank == 0:
            open("{folder}/out.json", "w").write(json.dumps(out))
"""


CLOCKS = """
    import itertools, json, sys, time, types
    sys.path.insert(0, {tests!r})
    import torch
    from asi_lens.base.ranks import joined
    from asi_lens.sae.shard import shard
    from asi_lens.sae.train import Trainer
    from asi_lens.training import loop, sharded_checkpoint
    from asi_lens.training.mesh import MeshConfig, RankMesh
    from small_trainings import Stop, make, quick, same_bits, small_store, stop_at
    from training.test_mesh import begin
    torch.set_num_threads(1)
    with joined(timeout_s=60) as ranks:
        mesh = RankMesh(MeshConfig(data={data}, model={model}), ranks)
        # A minute a step for the last rank, nothing for the others: read at the begin, after each step, and
        # after a checkpoint.
        clock = itertools.count(0, 60) if ranks.rank == ranks.size - 1 else itertools.repeat(0)
        loop.time = types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
        written, write = [], sharded_checkpoint.write

        def note(folder, tensors, about, mesh):
            written.append(about["step"])
            write(folder, tensors, about, mesh)

        sharded_checkpoint.write = note

        def run(**options):
            sae = shard(make(), mesh)
            begin(sae, "asi-adam", mesh)
            trainer = Trainer(sae, quick(), mesh=mesh)
            try:
                return trainer, trainer.fit(small_store(), log_every=1, progress=False, **options)
            except Stop:
                return trainer, []

        whole, _ = run()
        assert written == []
        run(folder="{folder}/run", on_log=stop_at(13))
        stopped = list(written)
        resumed, history = run(folder="{folder}/run")
        # Rank 0 alone reads the rows of before.
        steps = [row["step"] for row in history][-20:]
        said = [stopped, written, steps, same_bits(whole, resumed)]
        open(f"{folder}/{{ranks.rank}}.json", "w").write(json.dumps(said))
"""


def begin(sae: SparseAutoencoder, name: str, mesh: Mesh | None = None) -> None:
    """ASI, or random directions, as the name says."""
    store, method = small_store(), name.partition("-")[0]
    d_init = 5 if method == "asi" else None
    initialize(sae, method, store.spectrum, d_init, store.sample(500), mesh=mesh)


def start() -> dict[str, tuple[SparseAutoencoder, Any]]:
    """Dictionaries as they begin, and how they are trained."""
    out = {}
    for name, more in (
        ("random-adam", {}),
        ("asi-adam", {"clip_norm": 1.0}),
        ("random-sparse_adam", {"aux_k": 7, "dead_window": 300}),
        ("asi-sparse_adam_decay", {}),
    ):
        sae = make()
        begin(sae, name)
        options = {"batch_size": BATCH, "n_tokens": BATCH * STEPS, **more}
        options["optimizer"] = name.partition("-")[2]
        out[name] = (sae, quick(**options))
    return out


def batches() -> list[torch.Tensor]:
    return list(small_store().batches(BATCH, seed=0, n_tokens=BATCH * STEPS))


def on_ranks(data: int, model: int, folder: Path) -> dict[str, Any]:
    """The outputs of a mesh; its weights are in `folder`."""
    code = textwrap.dedent(CHILD).format(
        tests=str(Path(__file__).parents[1]), data=data, model=model, folder=folder
    )
    codes, said = Launched([["-c", code]] * (data * model)).finish(300)
    assert not any(codes), said
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize(("data", "model"), [(2, 1), (1, 2)])
def test_ranks_whose_clocks_differ_write_together_and_go_on(data: int, model: int, tmp_path: Path) -> None:
    code = textwrap.dedent(CLOCKS).format(
        tests=str(Path(__file__).parents[1]), data=data, model=model, folder=tmp_path
    )
    codes, said = Launched([["-c", code]] * 2).finish()
    assert not any(codes), said
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    stopped, written, steps, same = found[0]
    assert stopped == [5, 10]
    assert written == [*stopped, 15, 20, 25, 30]
    assert steps == list(range(11, 31))
    assert same


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Trainer, list[Any]]]:
    out = {}
    for name, (sae, config) in start().items():
        trainer = Trainer(sae, config)
        out[name] = (trainer, [trainer.step(batch) for batch in batches()])
    return out


@pytest.fixture(scope="module", params=[(2, 1), (1, 2), (2, 2)], ids=["2x1", "1x2", "2x2"])
def spread(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, int, Path, dict[str, Any]]:
    """Ranks along `data` and `model`, the folder of the weights, the outputs."""
    folder = tmp_path_factory.mktemp("mesh")
    return *request.param, folder, on_ranks(*request.param, folder)


def test_a_mesh_trains_what_one_process_does(alone: dict[str, Any], spread: Any) -> None:
    _, model, folder, found = spread
    for name, (trainer, outputs) in alone.items():
        there = found[name]
        for key, ours in (("loss", "loss"), ("fvu", "fvu"), ("aux", "aux_loss")):
            expected = [getattr(one, ours) for one in outputs]
            assert there[key] == pytest.approx(expected, rel=1e-5, abs=1e-7), (name, key)
        assert there["l0"] == pytest.approx([one.l0 for one in outputs])
        assert there["dead"] == pytest.approx([one.dead_fraction for one in outputs])
        norm = outputs[-1].gradient_norm
        assert there["norm"] == (None if norm is None else pytest.approx(norm, rel=1e-4))
        parts = [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(model)]
        for weight, parameter in trainer.sae.named_parameters():
            if weight == "b_dec":
                whole = parts[0][weight]
                assert all(torch.equal(part[weight], whole) for part in parts)
            else:
                whole = torch.cat([part[weight] for part in parts], 1 if weight == "W_enc" else 0)
            torch.testing.assert_close(whole, parameter.detach(), rtol=1e-4, atol=1e-4)
        assert torch.equal(torch.cat([part["last_fired"] for part in parts]), trainer.ledger.last_fired)
    assert any(one.aux_loss > 0 for one in alone["random-sparse_adam"][1])


def test_what_travels_is_what_the_formula_says(spread: Any) -> None:
    data, model, _, outputs = spread
    found = outputs["random-adam"]["bytes"] / STEPS
    own = BATCH / data
    along_model = (model - 1) * K * own + 2 * (model - 1) / model * (D_IN * own + D_IN + 4)
    along_data = (data - 1) / data * BATCH * (2 * D_IN + 3 * K)
    assert found == pytest.approx(4 * (along_model + along_data), rel=0.1)


def test_alone_a_mesh_does_nothing() -> None:
    mesh, tensor = Mesh(), torch.rand(3, 2)
    assert mesh.over_features(tensor) is tensor
    assert mesh.whole(tensor, 3) is tensor
    assert mesh.tokens(7) == (0, 7)
    assert mesh.features(64) == (0, 64)


def test_what_cannot_be_shared_out_is_refused() -> None:
    mesh = Mesh()
    mesh.config = MeshConfig(data=1, model=3)
    with pytest.raises(OptionError, match="a multiple of model=3"):
        shard(make(), mesh)
    with pytest.raises(OptionError, match="'topk' over several ranks"):
        shard(SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, "batchtopk")), mesh)
    for kind, prefixes in (("batchtopk", ()), ("topk", (8,))):
        sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
        with pytest.raises(OptionError, match="over several ranks"):
            Trainer(sae, quick(), SparsityConfig(prefixes=prefixes), mesh=mesh)
    for options in ({"data": 0}, {"model": -1}):
        with pytest.raises(OptionError, match="at least 1"):
            MeshConfig(**options)
