"""Contexts of every feature over a large store: seconds and peak memory of `al.Features`.

    python benchmarks/contexts.py [--tokens 1000000] [--d-sae 16384] [--k 32]

The store is attention output 0 of smollm2-135m on news-en, whose harvest stops after the first layer. The
dictionary is at its start in the active subspace: time depends on sizes and on k, not on what was learned.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from train_step import forget_peak, peak_mib

import asi_lens as al


def main() -> None:
    """Print one JSON object."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    args = parser.parse_args()
    model = al.load_model("smollm2-135m", device="cpu")
    tokens = al.load_tokens("news-en", model, args.tokens, context=256)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        store = al.harvest_store(model, tokens, site="attn_out", layer=0, folder=Path(folder, "store"))
        harvested = time.perf_counter() - begin
        sae = al.SparseAutoencoder(al.SAEConfig(d_in=store.d, d_sae=args.d_sae, k=args.k))
        al.initialize(sae, "asi", store.spectrum, "auto", store.sample(8_192))
        device = sae.W_dec.device
        forget_peak(device)
        before = peak_mib(device)
        begin = time.perf_counter()
        features = al.Features(sae, store, tokens, model)
        read = time.perf_counter() - begin
        begin = time.perf_counter()
        features.card(int(features.firings.counts.argmax()))
        card = time.perf_counter() - begin
        found = {
            "tokens": store.n,
            "d_sae": args.d_sae,
            "k": args.k,
            "harvest_s": round(harvested, 1),
            "features_s": round(read, 1),
            "card_s": round(card, 2),
            "peak_mib": round(peak_mib(device) - before),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
