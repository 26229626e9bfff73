"""The GPU kernels of exact search, run by Triton's interpreter: slow, but on any machine with triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import numpy as np
from retro_data.exact import Vectors, nearest
from retro_data.exact_triton import GpuSearch

def check(rows, dim, k, metric, tile_rows):
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, dim)).astype(np.float16)
    x[rows // 2:] = x[: rows - rows // 2]
    x[rows // 3] = 0
    document = np.arange(rows) // 7
    excluded = np.stack([document * 7, np.minimum(document * 7 + 7, rows)], 1)
    admitted = rng.random(rows) < 0.7
    search = GpuSearch(Vectors([x]), metric, admitted, "cpu", tile_rows=tile_rows)
    found = search.search(x, k, excluded)
    options = dict(metric=metric, excluded=excluded, admitted=admitted)
    expected = nearest(x, Vectors([x]), k, **options)
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.distances, expected.distances)

check(90, 36, 4, "l2", 2**20)
check(270, 24, 3, "ip", 256)
check(3, 8, 20, "l2", 2**20)
"""


def test_the_kernels_have_the_results_of_the_cpu_path() -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
