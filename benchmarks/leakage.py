"""How fast leakage is measured, on one core, beside the standard library's own search.

    OMP_NUM_THREADS=1 python benchmarks/leakage.py

Random tokens of a skewed vocabulary: chunks of 64, each with 10 neighbors of 128. The measure costs the
same whatever they hold; `difflib`, which finds the same lengths, costs more the more they share.
"""

from __future__ import annotations

import argparse
import time
from difflib import SequenceMatcher

import numpy as np

from retro_data.leakage import NEAREST, longest_common_substrings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=4000)
    parser.add_argument("--beside", type=int, default=20, help="chunks that difflib is given")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = options.chunks * NEAREST
    queries = (rng.zipf(1.3, (shape, 64)) % 16_384).astype(np.uint16)
    retrieved = (rng.zipf(1.3, (shape, 128)) % 16_384).astype(np.uint16)
    masks = np.ones_like(queries, bool), np.ones_like(retrieved, bool)
    began = time.perf_counter()
    found = longest_common_substrings(queries, retrieved, *masks)
    ours = options.chunks / (time.perf_counter() - began)
    pairs = min(shape, options.beside * NEAREST)
    began = time.perf_counter()
    for query, other, length in zip(
        queries[:pairs].tolist(), retrieved.tolist(), found, strict=False
    ):
        match = SequenceMatcher(None, query, other, autojunk=False).find_longest_match()
        if match.size != length:
            raise SystemExit(f"difflib finds {match.size} tokens, we {length}")
    beside = pairs / NEAREST / (time.perf_counter() - began)
    print(f"ours     {ours:10,.0f} chunks/s, each with {NEAREST} neighbors")
    print(f"difflib  {beside:10,.0f} chunks/s, the same lengths")


if __name__ == "__main__":
    main()
