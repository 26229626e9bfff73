"""What telling near-duplicates apart takes, and what it misses, against a join of all shingles.

    python benchmarks/near_duplicates.py manuals.jsonl.zst bible.jsonl.zst

The corpora are read and hashed as the stage `shingles` does, in this process. A tenth of the documents,
drawn at random, stand for evaluation; what is found of the others is held against the exact answer: all
pairs of documents that share a shingle, counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from retro_data.corpus import CorpusSettings, open_reader
from retro_data.engines import InlineEngine
from retro_data.near_duplicates import Sets, clusters, find_matches
from retro_data.scan import CorpusStage, digest_files
from retro_data.shingles import NearDuplicateSettings, ShingleStage
from retro_data.stage import complete, stage_key
from retro_data.store import ShingleSets

Array = np.ndarray[Any, Any]

CONTAINMENT = 0.8


def hashed(path: str, root: Path, settings: NearDuplicateSettings) -> tuple[ShingleSets, float]:
    """The sets of a corpus, and the seconds that making them took."""
    name = Path(path).name.split(".")[0]
    reader = open_reader(CorpusSettings(name=name, path=path))
    scan = CorpusStage(reader.settings, digest_files(reader, root / "digests" / f"{name}.tsv"))
    place = root / f"corpus-{name}", stage_key(scan)
    complete(scan, place[0], InlineEngine())
    stage, folder = ShingleStage(settings, reader.settings, place), root / f"shingles-{name}"
    began = time.perf_counter()
    complete(stage, folder, InlineEngine())
    return ShingleSets(folder), time.perf_counter() - began


def common_shingles(sets: Sets) -> tuple[Array, Array, Array]:
    """All pairs of documents (P,), (P,) that share any shingle, and how many (P,)."""
    hashes = np.concatenate([corpus.hashes for corpus in sets.corpora])
    order = np.argsort(hashes, kind="stable")
    documents = np.repeat(np.arange(len(sets)), sets.sizes)[order]
    edges = np.flatnonzero(np.diff(hashes[order])) + 1
    counts = np.diff(np.concatenate([[0], edges, [len(order)]]))
    stop = np.repeat(np.cumsum(counts), counts)
    place, step, found = np.arange(len(order)), 1, []
    while len(place := place[place + step < stop[place]]):
        found.append(documents[place] * len(sets) + documents[place + step])
        step += 1
    pairs, common = np.unique(np.concatenate(found), return_counts=True)
    one, other = np.divmod(pairs, len(sets))
    return one, other, common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", nargs="+")
    options = parser.parse_args()
    settings = NearDuplicateSettings(containment=CONTAINMENT)
    with tempfile.TemporaryDirectory() as folder:
        made = [hashed(path, Path(folder), settings) for path in options.corpus]
        sets = Sets([corpus for corpus, _ in made])
        total, seconds = int(sets.sizes.sum()), sum(s for _, s in made)
        print(f"{len(sets):,} documents, {total:,} shingles hashed and signed in {seconds:.1f} s")
        evaluated = np.random.default_rng(0).random(len(sets)) < 0.1
        began = time.perf_counter()
        together = clusters(sets, np.ones(len(sets), bool), settings)
        found = find_matches(sets, evaluated, ~evaluated, settings)
        print(f"clusters and matches: {time.perf_counter() - began:.2f} s")
        began = time.perf_counter()
        one, other, common = common_shingles(sets)
        print(f"join of all shingles: {time.perf_counter() - began:.2f} s, {len(one):,} pairs")
        jaccard = common / (sets.sizes[one] + sets.sizes[other] - common)
        near = jaccard >= settings.jaccard
        apart = int((together[one[near]] != together[other[near]]).sum())
        print(f"near-duplicate pairs: {int(near.sum())}, of which in different clusters: {apart}")
        exact: set[int] = set()
        for source, target in ((one, other), (other, one)):
            held = near | (common >= CONTAINMENT * sets.sizes[source])
            exact |= set(target[held & evaluated[source] & ~evaluated[target]].tolist())
        ours = {match.document for match in found}
        print(f"left out: {len(ours)}, missed {len(exact - ours)}, wrongly {len(ours - exact)}")


if __name__ == "__main__":
    main()
