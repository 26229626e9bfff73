"""The GPU kernels of exact search, run by Triton's interpreter: slow, but on any machine with triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PRELUDE = """
import numpy as np
from retro_data import all_pairs_triton, exact_triton
from retro_data.all_pairs_triton import AllPairs
from retro_data.exact import nearest
from retro_data.exact_triton import GpuSearch
from retro_data.vectors import Vectors

exact_triton.CANDIDATES_AT_ONCE = 128  # fewer turns of a loop that the interpreter takes slowly


def documents(rows, size):
    low = np.arange(rows) // size * size
    return np.stack([low, np.minimum(low + size, rows)], 1)


def same(found, expected):
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)


def gaussian(rows, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float16)
"""

CASES = {
    "documents, admission, zero rows, twins and rows longer than a sum is wide": """
for rows, dim, k, metric, tile_rows in ((90, 300, 4, "l2", 2**20), (270, 24, 3, "ip", 256)):
    x = gaussian(rows, dim)
    x[rows // 2:] = x[: rows - rows // 2]
    x[rows // 3] = 0
    own, admitted = documents(rows, 7), np.random.default_rng(1).random(rows) < 0.7
    queries = slice(20, 60)
    search = GpuSearch(Vectors([x]), metric, admitted, "cpu", tile_rows=tile_rows)
    options = dict(metric=metric, excluded=own[queries], admitted=admitted)
    same(search.search(x[queries], k, own[queries]), nearest(x[queries], Vectors([x]), k, **options))
""",
    "fewer rows than k, and one document alone": """
x = gaussian(3, 8)
for size in (1, 3):
    search = GpuSearch(Vectors([x]), "l2", None, "cpu")
    expected = nearest(x, Vectors([x]), 20, metric="l2", excluded=documents(3, size))
    same(search.search(x, 20, documents(3, size)), expected)
    same(AllPairs([search], 20, documents(3, size), 0, 3).neighbors(0, 3), expected)
""",
    "more equal rows than any list holds": """
x = gaussian(150, 20)
x[10:140] = x[10]
own = documents(150, 3)
expected = nearest(x, Vectors([x]), 3, metric="l2", excluded=own)
search = GpuSearch(Vectors([x]), "l2", None, "cpu")
some = slice(40, 52)
found = search.search(x[some], 3, own[some])
same(found, type(found)(expected.ids[some], expected.distances[some]))
""",
    "a database that is streamed": """
x, own = gaussian(300, 16), documents(300, 5)
search = GpuSearch(Vectors([x[:120], x[120:]]), "l2", None, "cpu", resident_bytes=0, tile_rows=256)
assert not search.is_resident
queries = slice(280, 300)
expected = nearest(x[queries], Vectors([x]), 4, metric="l2", excluded=own[queries])
same(search.search(x[queries], 4, own[queries]), expected)
""",
    "panels of the database's own rows, in any order and with some left out": """
rows = 600
x = gaussian(rows, 12)
x[330:450] = x[30:150]  # twins in another panel
real = np.r_[0:20, 240:270, 330:350, 500:530]
x[np.setdiff1d(np.arange(rows), real)] = 0
own, admitted = documents(rows, 6), np.ones(rows, bool)
admitted[[5, 260, 261]] = False
expected = nearest(x, Vectors([x]), 3, metric="l2", excluded=own, admitted=admitted)
search = GpuSearch(Vectors([x]), "l2", admitted, "cpu", panel_rows=256)
for asked in ([(0, 100), (100, 600)], [(300, 510), (590, 600), (0, 20)]):
    pairs = AllPairs([search], 3, own, 0, rows)
    for low, high in asked:
        found = pairs.neighbors(low, high)
        same(found, type(found)(expected.ids[low:high], expected.distances[low:high]))
""",
    "panels that several devices take": """
rows = 770
x = gaussian(rows, 12)
x[530:540] = x[10:20]  # twins in another device's panel
real = np.r_[0:20, 20:500:11, 530:540, 600:612, 765:770]  # a panel fills lists
x[np.setdiff1d(np.arange(rows), real)] = 0
own = documents(rows, 5)
expected = nearest(x, Vectors([x]), 3, metric="l2", excluded=own)
raised = []
plain = all_pairs_triton._Side.raise_floors
def counted(side, *others):
    before = side.lists.least.clone()
    plain(side, *others)
    raised.append(int((side.lists.least > before).sum()))
all_pairs_triton._Side.raise_floors = counted
pieces, jumps = [(0, 605), (605, rows)], [(520, 620), (760, rows), (0, 20)]
for count, lag, asked in ((3, 6, jumps), (2, 1, pieces)):
    searches = [GpuSearch(Vectors([x]), "l2", None, "cpu", panel_rows=256) for _ in range(count)]
    pairs = AllPairs(searches, 3, own, 0, rows)
    assert pairs.lag == 2 * count
    pairs.lag = lag  # or a short one, so that few panels learn the floors of others
    for low, high in asked:
        found = pairs.neighbors(low, high)
        same(found, type(found)(expected.ids[low:high], expected.distances[low:high]))
    assert any(raised) == (lag == 1)
""",
    "a store that is a part of the database": """
x, own = gaussian(560, 12), documents(560, 4)
x[np.setdiff1d(np.arange(560), np.r_[0:20, 250:275, 300:310, 520:545])] = 0
expected = nearest(x, Vectors([x]), 3, metric="ip", excluded=own)
pairs = AllPairs([GpuSearch(Vectors([x]), "ip", None, "cpu", panel_rows=256)], 3, own, 251, 310)
found = pairs.neighbors(251, 310)
same(found, type(found)(expected.ids[251:310], expected.distances[251:310]))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_have_the_results_of_the_cpu_path(case: str) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    script = [sys.executable, "-W", "ignore", "-c", PRELUDE + CASES[case]]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
