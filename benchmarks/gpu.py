"""The kernels on a GPU, and every way of a step side by side, within minutes.

    PYTHONPATH=. python benchmarks/gpu.py --seconds 300 --out FOLDER     on a machine with a Hopper card
    PYTHONPATH=. python benchmarks/gpu.py --dry --out FOLDER             on a CPU: tiny, in the interpreter

Parts, in this order: the tests that a card runs (with pytest, pytest-xdist, hypothesis, jaxtyping and
beartype), while other processes compile what comes later; the kernels of a step one by one, beside the plain
product and a product with `torch.topk`; whole steps of the kernels, of the plain path, of dense PyTorch and
of sparsify, SAELens and dictionary_learning where they can be imported; `fit` on a store; block sizes of the
encoder. Ratios are of one run on one card, whose name stands in the results. The first way runs again at the
end.

`gpu.json` in FOLDER is written anew after every measurement. Nothing begins after `--seconds`; 30 s later the
process ends itself, whatever it does.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from ways import LR, ON_GPU, PEERS, WAYS, Task

from asi_lens.activations import ahead
from asi_lens.activations.store import ActivationStore
from asi_lens.base.files import write_text
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.triton import encode as encoding
from asi_lens.kernels.triton.decode import decode
from asi_lens.kernels.triton.picks import sort_picks
from asi_lens.kernels.triton.plan import Plan
from asi_lens.kernels.triton.select import select, settle
from asi_lens.kernels.triton.update import Adam, Moments, update
from asi_lens.results import provenance
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.train import Trainer
from asi_lens.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TESTS = [*(f"tests/kernels/triton/test_{name}.py" for name in ("encode", "select", "decode", "update"))]
TESTS += ["tests/sae/test_kernel_training.py", "tests/test_card.py"]
BLOCKS = [(128, 128, 4, 3), (128, 256, 8, 3), (128, 256, 8, 4), (64, 256, 4, 3)]
"""Rows, features, warps, stages of the encoder's blocks."""
DENSE = ("plain PyTorch, bfloat16", "SAELens", "dictionary_learning")
"""Ways with several arrays of batch x d_sae: left out where one has over 8 GiB."""

_TEST_SECONDS = 120
_COMPILES = "--compile" in sys.argv  # this process measures nothing


@dataclass(frozen=True)
class Sizes:
    """Width, features, picks, rows of a batch, and steps of a way."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int = 30

    def __str__(self) -> str:
        return f"{self.d_sae} x {self.d_in}, k {self.k}, batch {self.batch}"


SIZES = [
    Sizes(576, 16_384, 32, 4096),
    Sizes(576, 131_072, 32, 4096),
    Sizes(576, 1_048_576, 32, 4096),
    Sizes(576, 131_072, 32, 32_768),
    Sizes(576, 1_048_576, 32, 32_768),
    Sizes(576, 16_384, 32, 32_768),
]
DRY = [Sizes(32, 128, 4, 8, steps=2)]


class Results:
    """What has been measured, in a file, and the clock."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.until = path, time.monotonic() + seconds
        self.data: dict[str, Any] = {}
        watch = threading.Timer(seconds + 30, self._end)
        watch.daemon = True
        watch.start()

    def _end(self) -> None:
        print("out of time", flush=True)
        os._exit(3)

    def measure(self, part: str, name: str, run: Callable[[], Any]) -> Any:
        """Run it once if there is time; keep its result, or its error, under both names."""
        left = self.until - time.monotonic()
        found: Any = {"left out": "no time"}
        if left > 0:
            print(f"{part}: {name}, {left:.0f} s left", flush=True)
            try:
                found = run()
            except Exception:
                found = {"error": traceback.format_exc()[-3000:]}
                print(found["error"], flush=True)
        self.data.setdefault(part, {})[name] = found
        write_text(self.path, json.dumps(self.data, indent=1))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found


def wait() -> None:
    """Wait for the card."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], times: int = 10) -> float:
    """Median of `times` calls after two to warm up, each with the wait for its end."""
    if _COMPILES:
        run()
        wait()
        return 0.0
    found = []
    for _ in range(times + 2):
        wait()
        start = time.perf_counter()
        run()
        wait()
        found.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(found[2:]), 4)


def machine() -> dict[str, Any]:
    """Card and versions."""
    found = {"torch": torch.__version__, "triton": importlib.import_module("triton").__version__}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "gib": round(card.total_memory / 2**30, 1)}
    return found | {"machine": provenance.machine()}


def tests_while_compiling() -> dict[str, Any]:
    """The tests that a card runs, while a process for each size compiles what will be timed."""
    pytest = ["-m", "pytest", "-v", "-n", "10", "-p", "no:cacheprovider", "-W", "default", *TESTS]
    compiling = [str(Path(__file__).resolve()), "--compile"]
    commands = {"tests": pytest} | {str(size): [*compiling, str(i)] for i, size in enumerate(SIZES)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = {
        name: subprocess.Popen([sys.executable, *rest], cwd=ROOT, **pipes) for name, rest in commands.items()
    }
    found, begun = {}, time.monotonic()
    for name, process in started.items():
        try:
            out, _ = process.communicate(timeout=max(1.0, begun + _TEST_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
        seconds = round(time.monotonic() - begun, 1)
        found[name] = {"passed": process.returncode == 0, "seconds": seconds, "end": out[-6000:]}
        print(f"{name}: {process.returncode}, {seconds} s\n{out[-600:]}", flush=True)
    return found


def rows(n: int, d: int, seed: int, device: torch.device) -> torch.Tensor:
    """Rows whose singular values fall by a factor of 30, centered, with a mean square norm of their width."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(n, d, generator=generator, device=device) * torch.logspace(0, -1.5, d, device=device)
    return (x - x.mean(0)) * (d / x.square().sum(1).mean()).sqrt()


def task_of(sizes: Sizes, device: torch.device) -> tuple[Task, torch.Tensor]:
    """Random unit rows with a tied encoder, and held-out rows."""
    x = rows(5 * sizes.batch, sizes.d_in, 0, device)
    *batches, held_out = x.split(sizes.batch)
    start = torch.randn(
        sizes.d_sae, sizes.d_in, generator=torch.Generator(device).manual_seed(1), device=device
    )
    start.div_(start.norm(dim=1, keepdim=True))
    return Task(batches, start, start, sizes.k), held_out


def blocks(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The encoder's product in different blocks."""
    task, _ = task_of(sizes, device)
    x, w, b = task.batches[0].bfloat16(), task.encoder.bfloat16(), task.encoder.new_zeros(sizes.d_sae)
    first, found = Plan.of(sizes.d_in, sizes.d_sae, sizes.k), {}
    for height, width, warps, stages in BLOCKS:
        for band in (32, 8):
            plan = replace(first, rows=height, features=width, warps=warps, stages=stages, band=band)
            keys = encoding.Keys(*torch.empty(2, len(x), plan.groups, dtype=torch.int32, device=device))
            name = f"{height} x {width}, {warps} warps, {stages} stages, band {band}"
            try:
                ms = milliseconds(partial(encoding.products, x, w, b, plan, keys))
                found[name] = {"ms": ms, "tflops": round(2e-9 * len(x) * w.numel() / ms, 1)}
            except Exception as error:
                found[name] = {"error": str(error)[:300]}
    return found


def parts_of_a_step(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Milliseconds of each kernel, and of what they replace."""
    task, _ = task_of(sizes, device)
    plan, x = Plan.of(sizes.d_in, sizes.d_sae, sizes.k), task.batches[0]
    x16, low, b = x.bfloat16(), task.encoder.bfloat16(), x.new_zeros(sizes.d_sae)
    keys = encoding.Keys(*torch.empty(2, len(x), plan.groups, dtype=torch.int32, device=device))
    encoding.products(x16, low, b, plan, keys)
    code, _ = encoding.encode(x16, low, b, plan)
    unsure = torch.empty(len(x), dtype=torch.int32, device=device)
    which = select(*keys, plan, *code, unsure)
    missed = decode(code, task.decoder, x, 2 / len(x))
    encoder, decoder, bias = (
        Moments(t.clone(), torch.zeros_like(t), torch.zeros_like(t)) for t in (task.encoder, task.decoder, b)
    )
    found = {
        "encode": milliseconds(lambda: encoding.encode(x16, low, b, plan)),
        "products": milliseconds(lambda: encoding.products(x16, low, b, plan, keys)),
        "select": milliseconds(lambda: select(*keys, plan, *code, unsure)),
        "settle": milliseconds(lambda: settle(x16, low, b, *keys, plan, which, *code, unsure)),
        "decode": milliseconds(lambda: decode(code, task.decoder, x, 2 / len(x))),
    }
    adam = Adam(1, LR, 0.9, 0.999, 1e-8)
    for dense in (True, False):
        kind, picks = "dense" if dense else "sparse", sort_picks(code, sizes.d_sae, dense=dense)
        given = (picks, missed.residual, x, encoder, decoder, bias, low, adam)
        found[f"sort, {kind}"] = milliseconds(partial(sort_picks, code, sizes.d_sae, dense=dense))
        found[f"update, {kind}"] = milliseconds(partial(update, *given))
    part = low[: min(len(low), 2**31 // (2 * len(x)))]
    share = len(low) / len(part)
    found["plain product, without its top k"] = round(share * milliseconds(lambda: x16 @ part.T), 4)
    found["plain product and torch.topk"] = round(
        share * milliseconds(lambda: (x16 @ part.T).topk(sizes.k), 3), 4
    )
    plain = SparseCode(code.indices.long(), code.values)
    found["embedding_bag"] = milliseconds(
        lambda: torch.nn.functional.embedding_bag(
            plain.indices, task.decoder, per_sample_weights=plain.values, mode="sum"
        )
    )
    return found


def way(name: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """One way of training: median of its steps after the first ten, memory, and FVU after them."""
    task, held_out = task_of(sizes, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    one = (ON_GPU | WAYS)[name](task)
    found = []
    for i in range(sizes.steps):
        wait()
        start = time.perf_counter()
        one.step(i)
        wait()
        found.append(time.perf_counter() - start)
    warm = min(10, sizes.steps - 1)
    seconds = statistics.median(found[warm:])
    out: dict[str, Any] = {"ms": round(seconds * 1e3, 3), "tokens_per_s": round(sizes.batch / seconds)}
    if device.type == "cuda":
        out["gib_beside_the_start"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    if one.reconstruct is not None:
        with torch.no_grad():
            x = held_out[:4096]
            error = sum(
                (one.reconstruct(part).float() - part).square().sum().item() for part in x.split(1024)
            )
        out["fvu"] = round(error / (x - x.mean(0)).square().sum().item(), 5)
    return out


def from_a_store(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Tokens/s of `Trainer.fit` on rows in the host's memory: copied to the card first, and read ahead."""
    task, _ = task_of(sizes, device)
    store, found = ActivationStore.from_tensor(torch.cat(task.batches * 8).bfloat16().cpu()), {}
    n_tokens = 10 * sizes.steps * sizes.batch
    for name, room in (("copied first", ahead.room), ("read ahead", lambda device: 0)):
        with device:
            sae = SparseAutoencoder(SAEConfig(sizes.d_in, sizes.d_sae, sizes.k))
        trainer = Trainer(sae, TrainConfig(batch_size=sizes.batch, n_tokens=n_tokens))
        with patch.object(ahead, "room", room):
            start = time.perf_counter()
            trainer.fit(store, progress=False)
            wait()
        found[name] = round(n_tokens / (time.perf_counter() - start))
    return found


def names_for(sizes: Sizes) -> list[str]:
    """Ways of this size: ours first and last."""
    fits = 2 * sizes.batch * sizes.d_sae <= 2**33
    names = [*ON_GPU, "encoder product", "plain PyTorch, bfloat16", *PEERS]
    there = [n for n in names if n not in PEERS or importlib.util.find_spec(PEERS[n])]
    return [name for name in there if fits or name not in (*DENSE, "encoder product")]


def main() -> None:
    """Measure, and write `gpu.json`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--compile", type=int, metavar="SIZE", help="only compile what this size needs")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU here; --dry runs tiny sizes on the CPU")
    if args.dry:
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("small_triton").need_kernels()  # mends Triton's interpreter
    device = torch.device("cpu" if args.dry else "cuda")
    if args.compile is not None:
        parts_of_a_step(SIZES[args.compile], device)
        blocks(SIZES[args.compile], device)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "gpu.json", args.seconds)
    results.measure("machine", "here", machine)
    if not args.dry:
        results.measure("tests", "kernels", tests_while_compiling)
    for sizes in DRY if args.dry else SIZES:
        results.measure("parts", str(sizes), partial(parts_of_a_step, sizes, device))
    for sizes in DRY if args.dry else SIZES:
        names = names_for(sizes)
        for name in [*names, names[0]]:
            again = " again" if name in results.data.get(f"steps: {sizes}", {}) else ""
            results.measure(f"steps: {sizes}", name + again, partial(way, name, sizes, device))
    for sizes in DRY if args.dry else SIZES[:1]:
        results.measure("tokens/s of fit", str(sizes), partial(from_a_store, sizes, device))
    for sizes in DRY if args.dry else SIZES[:3]:
        results.measure("blocks", str(sizes), partial(blocks, sizes, device))
    print(json.dumps(results.data, indent=1)[-11_000:])


if __name__ == "__main__":
    main()
