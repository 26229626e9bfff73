"""The batch is exactly what the design says, for any shape of documents; checked by arithmetic."""

from __future__ import annotations

import itertools
import mmap
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from retro_data import artifact, store
from retro_data.dataset import NO_LABEL, RetroDataset, collate, to_retro_pytorch
from retro_data.errors import RetroDataError
from retro_data.pipeline import PreparedCorpus
from retro_data.row_readers import _Rows
from retro_data.sequences import pack
from retro_data.splits import SPLITS
from retro_data.store import ChunkStore, DatabaseStores, NeighborLists, PackedSequences

VOCAB = 60_000  # every token of a fixture is another number
PAD, EOS = VOCAB, VOCAB - 1
CHUNK = 4


# ---- hand-made stores: document d of a corpus holds the tokens first, first + 1, ... -------------


def write_artifact(folder: Path, name: str, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    entries = {}
    for file, array in arrays.items():
        artifact.save_array(folder / file, array)
        entries[file] = {"dtype": array.dtype.str, "shape": list(array.shape)}
    manifest = {"arrays": entries, "fields": {"name": name}, "key": folder.name}
    artifact.write_record(folder / artifact.MANIFEST, manifest)
    return folder


def write_chunks(
    folder: Path,
    lengths: list[int],
    first_token: int = 0,
    size: int = CHUNK,
    dtype: Any = "u2",
    pad: int = PAD,
) -> ChunkStore:
    """A chunk store of documents with these numbers of tokens, counted upwards."""
    counts = [-(-n // size) for n in lengths]
    total = sum(counts)
    tokens = np.full((total, size), pad, dtype)
    chunk_lengths = np.zeros(total, np.uint8)
    row, token = 0, first_token
    for n in lengths:
        for start in range(0, n, size):
            real = min(size, n - start)
            tokens[row, :real] = np.arange(token, token + real)
            chunk_lengths[row] = real
            row, token = row + 1, token + real
    documents = len(lengths)
    arrays = {
        store.TOKENS: tokens,
        store.LENGTHS: chunk_lengths,
        store.DOCUMENT_OF_CHUNK: np.repeat(np.arange(documents, dtype=np.int32), counts),
        store.DOCUMENT_KEYS: np.arange(2 * documents, dtype=np.uint64).reshape(-1, 2),
        store.DOCUMENT_FIRST_CHUNK: np.cumsum([0, *counts], dtype=np.int64),
        store.DOCUMENT_TOKENS: np.array(lengths, np.int64),
        store.DOCUMENT_BYTES: np.array(lengths, np.int64),
        store.DOCUMENT_ID_BYTES: np.zeros(0, np.uint8),
        store.DOCUMENT_ID_OFFSETS: np.zeros(documents + 1, np.int64),
    }
    return ChunkStore(write_artifact(folder, folder.name, arrays))


def write_neighbors(folder: Path, ids: np.ndarray) -> NeighborLists:
    distances = np.zeros(ids.shape, np.float32)
    arrays = {store.NEIGHBOR_IDS: ids, store.NEIGHBOR_DISTANCES: distances}
    return NeighborLists(write_artifact(folder, folder.name, arrays))


def database_of(*stores: ChunkStore) -> DatabaseStores:
    return DatabaseStores(stores, tuple(np.cumsum([0, *map(len, stores)]).tolist()))


def corpus_of(
    chunks: ChunkStore,
    neighbors: NeighborLists | None = None,
    split: str = "train",
    sequences: PackedSequences | None = None,
) -> PreparedCorpus:
    splits = np.full(len(chunks.documents), SPLITS.index(split), np.uint8)
    return PreparedCorpus(chunks, splits, neighbors, chunks.key, sequences)


def random_ids(rng: np.random.Generator, rows: int, stored: int, database: int) -> np.ndarray:
    """Neighbor ids with holes at the end of rows, as they are stored."""
    ids = rng.integers(0, database, (rows, stored)).astype(np.int32)
    ids[np.arange(stored) >= rng.integers(0, stored + 1, rows)[:, None]] = -1
    return ids


# ---- the batch once more, slowly -----------------------------------------------------------------


def chunks_of(stores: list[ChunkStore]) -> list[tuple[list[int], int]]:
    """Real tokens and document of each chunk, all stores in order."""
    chunks, before = [], 0
    for chunk_store in stores:
        for row in range(len(chunk_store)):
            real = int(chunk_store.lengths[row])
            document = before + int(chunk_store.document_of_chunk[row])
            chunks.append((chunk_store.tokens[row, :real].tolist(), document))
        before += len(chunk_store.documents)
    return chunks


def document_rows(chunks: list[tuple[list[int], int]]) -> list[list[int]]:
    rows = range(len(chunks))
    return [list(group) for _, group in itertools.groupby(rows, lambda row: chunks[row][1])]


def slow_item(
    rows: list[int], chunks: Any, ids: Any, database: Any, n: int, k: int, unscored: int
) -> dict[str, list]:
    """One sequence of these chunk rows by the text of the design, in plain Python."""
    item: dict[str, list] = {name: [] for name in BATCH}
    for place in range(n):
        row = rows[place] if place < len(rows) else None
        tokens, document = chunks[row] if row is not None else ([], -1)
        follows = row is not None and row + 1 < len(chunks) and chunks[row + 1][1] == document
        after = chunks[row + 1][0][0] if follows else EOS
        labels = [*tokens[1:], after] if tokens else []
        if place < unscored:
            labels = []
        item["input_ids"] += tokens + [PAD] * (CHUNK - len(tokens))
        item["labels"] += labels + [NO_LABEL] * (CHUNK - len(labels))
        item["chunk_lengths"].append(len(tokens))
        item["chunk_ids"].append(-1 if row is None else row)
        item["document_ids"].append(document)
        found = [-1] * k if row is None else ids[row][:k]
        retrieved = [slow_neighbor(g, database) for g in found]
        item["neighbor_tokens"].append([tokens for tokens, _ in retrieved])
        item["neighbor_mask"].append([mask for _, mask in retrieved])
    return item


def slow_neighbor(g: int, database: Any) -> tuple[list[int], list[bool]]:
    halves = [[], []] if g < 0 else [database[g][0], []]
    if g >= 0 and g + 1 < len(database) and database[g + 1][1] == database[g][1]:
        halves[1] = database[g + 1][0]
    tokens, mask = [], []
    for half in halves:
        tokens += half + [PAD] * (CHUNK - len(half))
        mask += [True] * len(half) + [False] * (CHUNK - len(half))
    return tokens, mask


BATCH = {
    "input_ids": torch.int64,
    "labels": torch.int64,
    "chunk_lengths": torch.int64,
    "neighbor_tokens": torch.int64,
    "neighbor_mask": torch.bool,
    "chunk_ids": torch.int64,
    "document_ids": torch.int64,
}


def assert_batch(batch: dict[str, torch.Tensor], items: list[dict[str, list]]) -> None:
    assert {name: value.dtype for name, value in batch.items()} == BATCH
    for name, value in batch.items():
        assert value.tolist() == [item[name] for item in items], name


# ---- tokens, labels, neighbors -------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([None, 1, 2, "packed"]),
    st.integers(0, 2**32),
)
def test_batches_equal_the_slow_reference(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    foreign: list[int],
    n: int,
    k: int,
    stride: int | str | None,  # "packed": of training sequences that several documents share
    seed: int,
) -> None:
    """Two corpora, retrieved from both, in the other order: labels, continuations, ids, masks."""
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(seed)
    a = write_chunks(folder / "a", lengths)
    b = write_chunks(folder / "b", foreign, first_token=1000, dtype="u4")
    database = database_of(b, a)
    if len(database) == 0:
        shutil.rmtree(folder)
        return
    ids = [random_ids(rng, len(s), 3, len(database)) for s in (a, b)]
    is_packed = stride == "packed"
    tables = [
        pack(s.documents.first_chunk[:-1], np.diff(s.documents.first_chunk), n) for s in (a, b)
    ]
    packed = [
        PackedSequences(write_artifact(folder / f"p{i}", "p", {store.SEQUENCES: table}))
        for i, table in enumerate(tables)
    ]
    corpora = [
        corpus_of(a, write_neighbors(folder / "na", ids[0]), sequences=packed[0]),
        corpus_of(b, write_neighbors(folder / "nb", ids[1].astype(np.int64)), sequences=packed[1]),
    ]
    stride = min(stride, n) if isinstance(stride, int) else None
    dataset = RetroDataset(
        corpora,
        "train",
        database=database,
        seq_len=n * CHUNK,
        pad_id=PAD,
        eos_id=EOS,
        num_neighbors=k,
        eval_stride=None if stride is None else stride * CHUNK,
        mode="packed" if is_packed else "document",
        prefetch=bool(seed % 2),
    )
    chunks = chunks_of([a, b])
    windows = [
        (rows[start : start + n], unscored)
        for rows in document_rows(chunks)
        for start, unscored in slow_windows(len(rows), n, stride)
    ]
    if is_packed:
        all_rows = [row for row in tables[0]] + [np.where(r < 0, -1, r + len(a)) for r in tables[1]]
        windows = [(row[row >= 0].tolist(), 0) for row in all_rows]
    stored, retrieved = np.concatenate(ids).tolist(), chunks_of([b, a])
    items = [slow_item(rows, chunks, stored, retrieved, n, k, left) for rows, left in windows]
    assert len(dataset) == len(items)
    assert_batch(dataset.__getitems__(range(len(dataset))), items)
    shuffled = rng.permutation(len(items)).tolist()
    assert_batch(dataset.__getitems__(shuffled), [items[i] for i in shuffled])
    shutil.rmtree(folder)


def slow_windows(chunks: int, n: int, stride: int | None) -> list[tuple[int, int]]:
    """First chunk of each sequence of a document, and how many of its chunks are scored already."""
    if stride is None:
        return [(start, 0) for start in range(0, chunks, n)]
    windows, done = [(0, 0)], min(n, chunks)
    while done < chunks:
        end = min(done + stride, chunks)
        start = max(end - n, 0)
        windows.append((start, done - start))
        done = end
    return windows


@pytest.fixture
def small(tmp_path: Path) -> RetroDataset:
    """Documents of 9, 4, 1 and 21 tokens in chunks of 4: rows 0-2, 3, 4, 5-10; sequences of 2."""
    chunks = write_chunks(tmp_path / "c", [9, 4, 1, 21])
    ids = np.full((11, 4), -1, np.int32)
    ids[0] = [3, 10, 5, -1]
    ids[1] = [2, -1, -1, -1]
    lists = write_neighbors(tmp_path / "n", ids)
    return RetroDataset(
        [corpus_of(chunks, lists)],
        "train",
        database=database_of(chunks),
        seq_len=8,
        pad_id=PAD,
        eos_id=EOS,
        num_neighbors=3,
    )


def test_labels_cross_sequences_of_a_document_and_end_with_eos(small: RetroDataset) -> None:
    batch = small.__getitems__([0, 1, 2, 3])
    assert batch["input_ids"].tolist()[:2] == [[0, 1, 2, 3, 4, 5, 6, 7], [8] + [PAD] * 7]
    assert batch["labels"].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8],  # 8 is the first token of the next sequence
        [EOS] + [NO_LABEL] * 7,
        [10, 11, 12, EOS] + [NO_LABEL] * 4,  # a full last chunk
        [EOS] + [NO_LABEL] * 7,  # a document of one token
    ]
    assert batch["chunk_ids"].tolist() == [[0, 1], [2, -1], [3, -1], [4, -1]]
    assert batch["document_ids"].tolist() == [[0, 0], [0, -1], [1, -1], [2, -1]]


def test_without_eos_the_end_of_a_document_is_not_scored(small: RetroDataset) -> None:
    small.eos_id = None
    assert small[2]["labels"].tolist() == [10, 11, 12] + [NO_LABEL] * 5


def test_continuation_is_of_the_same_document_and_else_padding(small: RetroDataset) -> None:
    tokens, mask = small[0]["neighbor_tokens"][0], small[0]["neighbor_mask"][0]
    assert tokens[0].tolist() == [9, 10, 11, 12] + [PAD] * 4  # a document's only chunk
    assert tokens[1].tolist() == [34] + [PAD] * 7  # the store's last chunk
    assert tokens[2].tolist() == [14, 15, 16, 17, 18, 19, 20, 21]
    assert mask.sum(-1).tolist() == [4, 1, 8]
    assert small[0]["neighbor_tokens"][1, 0].tolist() == [8] + [PAD] * 7


def test_missing_neighbors_and_padding_chunks_are_masked(small: RetroDataset) -> None:
    batch = small.__getitems__([0, 1])
    assert (batch["neighbor_tokens"][0, 1, 1:] == PAD).all()
    assert not batch["neighbor_mask"][0, 1, 1:].any()
    assert (batch["neighbor_tokens"][1, 1] == PAD).all()
    assert not batch["neighbor_mask"][1, 1].any()


def test_a_real_token_equal_to_the_pad_id_stays_real(tmp_path: Path) -> None:
    """Masks come from lengths: here 14 is both, in a document of the tokens 13, 14, 15, 16, 17."""
    chunks = write_chunks(tmp_path / "c", [5, 5], first_token=8, pad=14)
    ids = np.array([[2], [2], [-1], [-1]], np.int32)
    dataset = RetroDataset(
        [corpus_of(chunks, write_neighbors(tmp_path / "n", ids))],
        "train",
        database=database_of(chunks),
        seq_len=8,
        pad_id=14,
        num_neighbors=1,
    )
    batch = dataset.__getitems__([0, 1])
    assert batch["neighbor_tokens"][0, 0, 0].tolist() == [13, 14, 15, 16, 17, 14, 14, 14]
    assert batch["neighbor_mask"][0, 0, 0].tolist() == [True] * 5 + [False] * 3
    assert batch["chunk_lengths"].tolist() == [[4, 1], [4, 1]]
    assert batch["labels"][1].tolist() == [14, 15, 16, 17] + [NO_LABEL] * 4


def test_chunks_padded_by_another_tokenizer_are_refused(tmp_path: Path) -> None:
    chunks, foreign = (write_chunks(tmp_path / n, [9], pad=p) for n, p in (("c", PAD), ("f", 7)))
    lists = write_neighbors(tmp_path / "n", np.zeros((3, 1), np.int32))
    with pytest.raises(RetroDataError, match=rf"pad_id={PAD}, but the chunks of f are padded by 7"):
        RetroDataset(
            [corpus_of(chunks, lists)],
            "train",
            database=database_of(foreign),
            seq_len=8,
            pad_id=PAD,
            num_neighbors=1,
        )


def test_index_minus_one_is_a_row_of_padding(small: RetroDataset) -> None:
    batch = small.__getitems__([0, -1])
    assert (batch["input_ids"][1] == PAD).all()
    assert (batch["labels"][1] == NO_LABEL).all()
    assert (batch["neighbor_tokens"][1] == PAD).all()
    assert not batch["neighbor_mask"][1].any()
    assert batch["chunk_lengths"][1].tolist() == [0, 0]
    assert batch["chunk_ids"][1].tolist() == batch["document_ids"][1].tolist() == [-1, -1]
    assert torch.equal(batch["input_ids"][0], small[0]["input_ids"])


@pytest.mark.parametrize("index", [-2, 99])
def test_other_indices_are_refused(small: RetroDataset, index: int) -> None:
    with pytest.raises(IndexError):
        small.__getitems__([0, index])


def test_num_neighbors_zero_reads_none(tmp_path: Path) -> None:
    chunks = write_chunks(tmp_path / "c", [9])
    dataset = RetroDataset(
        [corpus_of(chunks)], "train", database=None, seq_len=8, pad_id=PAD, num_neighbors=0
    )
    batch = dataset.__getitems__([0, 1])
    assert {name: value.dtype for name, value in batch.items()} == BATCH
    assert batch["neighbor_tokens"].shape == batch["neighbor_mask"].shape == (2, 2, 0, 8)


def test_only_documents_of_the_split_are_read(tmp_path: Path) -> None:
    chunks = write_chunks(tmp_path / "c", [5, 6, 7, 8])
    corpus = corpus_of(chunks)
    corpus.split_of_document[:] = [SPLITS.index(s) for s in ("val", "train", "test", "train")]
    seen = {}
    for split in ("train", "val", "test", "database"):
        dataset = RetroDataset(
            [corpus], split, database=None, seq_len=4, pad_id=PAD, num_neighbors=0
        )
        ids = dataset.__getitems__(range(len(dataset)))["document_ids"] if len(dataset) else []
        seen[split] = {int(row) for item in ids for row in item}
    assert seen == {"train": {1, 3}, "val": {0}, "test": {2}, "database": set()}


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_neighbors": 5}, "neighbors.num_stored"),
        ({"num_neighbors": -1}, "num_neighbors"),
        ({"seq_len": 10}, "multiple of chunk_size"),
        ({"eval_stride": 6}, "eval_stride=6"),
        ({"eval_stride": 16}, "longer than seq_len"),
        ({"mode": "best"}, "mode='best'"),
        ({"mode": "packed"}, "found none for c, split train. Run `retro-data prepare`"),
        ({"split": "training"}, "split='training'"),
        ({"database": None}, "no retrieval database"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    small: RetroDataset, setting: dict[str, Any], message: str
) -> None:
    corpus = corpus_of(small.chunks.stores[0], small.neighbors[0])
    arguments = {"split": "train", "database": small.database, "seq_len": 8, "pad_id": PAD}
    with pytest.raises(RetroDataError, match=message):
        RetroDataset([corpus], **{**arguments, **setting})


def test_retrieval_without_stored_neighbors_is_refused(small: RetroDataset) -> None:
    corpus = corpus_of(small.chunks.stores[0])
    with pytest.raises(RetroDataError, match="no stored neighbors"):
        RetroDataset([corpus], "train", database=small.database, seq_len=8, pad_id=PAD)


def test_an_id_beyond_the_database_is_refused(tmp_path: Path) -> None:
    chunks = write_chunks(tmp_path / "c", [9])
    lists = write_neighbors(tmp_path / "n", np.array([[0], [3], [0]], np.int32))
    dataset = RetroDataset(
        [corpus_of(chunks, lists)],
        "train",
        database=database_of(chunks),
        seq_len=8,
        pad_id=PAD,
        num_neighbors=1,
    )
    with pytest.raises(RetroDataError, match=r"chunk 3 .* where there are 3"):
        dataset.__getitems__([0])


# ---- files, processes, loaders -------------------------------------------------------------------


def test_reading_never_changes_a_file(small: RetroDataset, tmp_path: Path) -> None:
    def look() -> dict[Path, tuple[int, int, bytes]]:
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        return {p: (p.stat().st_size, p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = look()
    batch = small.__getitems__(range(len(small)))
    for value in batch.values():
        value.zero_()  # a batch is its receiver's own
    assert look() == before
    chunks = small.chunks.stores[0]
    for array in (chunks.tokens, chunks.lengths, small.neighbors[0].ids):
        assert isinstance(array, np.memmap)
        assert array.mode == "r"
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_an_empty_batch_asks_for_nothing(tmp_path: Path) -> None:
    artifact.save_array(tmp_path / "a.npy", np.zeros((4, 3), np.uint32))
    rows = _Rows(artifact.open_array(tmp_path / "a.npy"), 3, prefetch=True)
    assert rows(np.zeros(0, np.int64)).shape == (0,)


def test_all_pages_of_a_batch_are_asked_for(tmp_path: Path) -> None:
    """Rows of more than a page, and of less: every byte that is read, and nothing far from it."""
    asked: list[tuple[int, int]] = []

    class Map:
        def madvise(self, advice: int, start: int = 0, size: int = 0) -> None:
            if advice == mmap.MADV_WILLNEED:
                asked.append((start, start + size))

    for row_items in (3, 700, 5000):
        artifact.save_array(tmp_path / f"{row_items}.npy", np.zeros((400, row_items), np.uint32))
        array = artifact.open_array(tmp_path / f"{row_items}.npy")
        rows = _Rows(array, 2 * row_items, prefetch=True)
        assert rows.map is array._mmap
        rows.map = Map()
        chosen = np.array([7, 398, 8, 200, 7])
        assert (rows(chosen) == rows.items[chosen]).all()
        needed = set()
        for row in chosen.tolist():
            begin = array.offset + row * 4 * row_items
            needed |= {byte // mmap.PAGESIZE for byte in range(begin, begin + 8 * row_items)}
        pages = [p for a, b in asked for p in range(a // mmap.PAGESIZE, b // mmap.PAGESIZE)]
        assert sorted(pages) == sorted(needed)
        asked.clear()


def test_a_pickled_dataset_opens_the_files_again(small: RetroDataset) -> None:
    before = small.__getitems__([0, 3])
    pickled = pickle.dumps(small)
    assert len(pickled) < 20_000
    after = pickle.loads(pickled).__getitems__([0, 3])
    assert all(torch.equal(after[name], before[name]) for name in BATCH)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_batches(small: RetroDataset, context: str) -> None:
    loader = DataLoader(
        small,
        batch_size=2,
        num_workers=1,
        collate_fn=collate,
        multiprocessing_context=context,
    )
    batches = list(loader)
    expected = list(DataLoader(small, batch_size=2, collate_fn=collate))
    assert len(batches) == len(expected) == 4
    for batch, wanted in zip(batches, expected, strict=True):
        assert type(batch) is dict
        assert list(batch) == list(wanted)
        assert all(torch.equal(batch[name], wanted[name]) for name in BATCH)


# ---- another model -------------------------------------------------------------------------------


def test_to_retro_pytorch_keeps_inputs_and_labels(small: RetroDataset) -> None:
    sequence, retrieved = to_retro_pytorch(small.__getitems__([0, 1, 2]), PAD)
    assert sequence.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [8, EOS] + [PAD] * 7,
        [9, 10, 11, 12, EOS] + [PAD] * 4,
    ]
    assert retrieved.shape == (3, 2, 3, 8)


def test_the_model_of_retro_pytorch_learns_from_our_loader(tmp_path: Path) -> None:
    pytest.importorskip("retro_pytorch")  # holds numpy below 2, with autofaiss
    from retro_pytorch import RETRO

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    chunks = write_chunks(tmp_path / "c", [40] * 12, size=8)
    ids = random_ids(rng, len(chunks), 2, len(chunks))
    dataset = RetroDataset(
        [corpus_of(chunks, write_neighbors(tmp_path / "n", ids))],
        "train",
        database=database_of(chunks),
        seq_len=32,
        pad_id=PAD,
        eos_id=EOS,
    )
    # 480 numbers fold into 12 tokens that follow each other; the tail ids are kept
    pad, eos = 13, 12
    model = RETRO(
        num_tokens=pad + 1,
        pad_id=pad,
        max_seq_len=32,
        chunk_size=8,
        enc_dim=32,
        dec_dim=32,
        enc_depth=1,
        dec_depth=2,
        dec_cross_attn_layers=(2,),
        heads=1,
        dim_head=32,
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        for batch in DataLoader(dataset, batch_size=8, collate_fn=collate):
            sequence, retrieved = (
                torch.where(x == PAD, pad, torch.where(x == EOS, eos, x % 12))
                for x in to_retro_pytorch(batch, PAD)
            )
            loss = model(sequence, retrieved, return_loss=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
