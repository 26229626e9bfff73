"""Real runs, killed at random points and resumed: `benchmarks/faults.py` in the size of a test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "faults.py"
FAULTS = 25
SEED = 0

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks at processes in /proc"
)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_faults", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


faults = load()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with faults.open_bench(tmp_path_factory.mktemp("faults"), SEED) as opened:
        yield opened


def test_killed_runs_come_to_the_same_bytes(bench: Any) -> None:
    """Killed at calls and moments, as child and parent; frozen; damaged: then resumed to the end."""
    outcomes = list(faults.campaign(bench, FAULTS))
    told = [f"case {o.number}: {o.told}: {line}" for o in outcomes for line in o.differences]
    assert told == []
    hits = [fault for outcome in outcomes for fault in outcome.faults]
    assert len(hits) >= FAULTS
    assert {outcome.kind for outcome in outcomes if outcome.faults} == set(faults.KINDS)
    assert len({fault.stage for fault in hits}) >= 5
    assert len({fault.task for fault in hits if fault.task}) >= 4


def test_a_difference_is_seen(bench: Any) -> None:
    reference = bench.references[0].root
    root = faults.copy_root(reference, bench.folder / "compared")
    assert faults.compare(root, reference) == []
    (tokens,) = root.glob("chunks/*/tokens.npy")
    content = bytearray(tokens.read_bytes())
    content[-1] ^= 1
    tokens.write_bytes(content)
    (journal,) = root.glob("embeddings/*/receipts.jsonl")
    before = faults.kept(root)
    journal.write_bytes(journal.read_bytes().split(b"\n", 1)[1])
    (tokens.parent / ".tmp-left").touch()
    (manifest,) = root.glob("index/*/manifest.json")
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows": ', b'"rows": 1'))
    for mended in (False, True):
        found = " ".join(faults.compare(root, reference, mended=mended))
        assert "tokens.npy was changed" in found
        assert ".tmp-left was made" in found
        assert f"index/{manifest.parent.name}: its manifest differs" in found
        assert ("its receipts differ" in found) == (not mended)
    assert "receipts that were on disk are gone" in " ".join(faults.lost(before, root))
