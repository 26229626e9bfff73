"""Near-duplicates: sets, clusters and what is left out, each against brute force."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import unicodedata
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import Made

from retro_data import near_duplicates, pipeline, store
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.near_duplicates import (
    Sets,
    bands,
    clusters,
    find_matches,
    pairs_of_band,
    rows_of_a_band,
)
from retro_data.pipeline import Settings
from retro_data.scan import keys_array
from retro_data.shingles import NearDuplicateSettings, Shingler, signatures
from retro_data.splits import LEFT_OUT_CODE, SPLITS, split_hash
from retro_data.store import PackedSequences, ShingleSets

Array = np.ndarray[Any, Any]
Small = Callable[..., dict[str, Any]]

WORDS = [f"w{i}" for i in range(400)]
NGRAM = 5


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    """As the definition says."""
    words = unicodedata.normalize("NFKC", text).lower().split()
    runs = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return runs or {(*words, "all of it")}


def in_memory(texts: list[str], ngram: int = NGRAM, num_perm: int = 128) -> ShingleSets:
    """What the stage makes of these texts, without files."""
    found: Any = object.__new__(ShingleSets)
    found.hashes, found.counts = Shingler(ngram)(texts)
    found.offsets = np.concatenate([[0], np.cumsum(found.counts)])
    found.signatures = signatures(found.hashes, found.counts, num_perm)
    each = np.split(found.hashes, found.offsets[1:-1])
    found.keys = keys_array([hashlib.blake2b(s.tobytes(), digest_size=16).digest() for s in each])
    return found  # type: ignore[no-any-return]


def families(seed: int, count: int, longest: int = 150) -> list[str]:
    """Texts of which many are others with a few words changed, cut off, or put into longer ones."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count // 4 + 1)]
    while len(texts) < count:
        words = rng.choice(texts).split()
        for _ in range(rng.choice([0, 1, 1, 2, 4])):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        kind = rng.random()
        if kind < 0.2:
            words = words[: rng.randint(1, len(words))]
        elif kind < 0.4:
            words = rng.choices(WORDS, k=20) + words + rng.choices(WORDS, k=rng.randint(0, 200))
        texts.append(" ".join(words))
    return texts


def similarities(texts: list[str], n: int = NGRAM) -> tuple[Array, Array]:
    """Jaccard of all pairs, and the share of each set (row) that each other (column) holds."""
    sets = [shingles(text, n) for text in texts]
    jaccard, held = np.eye(len(texts)), np.eye(len(texts))
    for a, b in combinations(range(len(texts)), 2):
        common = len(sets[a] & sets[b])
        jaccard[a, b] = jaccard[b, a] = common / len(sets[a] | sets[b])
        held[a, b], held[b, a] = common / len(sets[a]), common / len(sets[b])
    return jaccard, held


# ---- sets ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(
        st.lists(st.sampled_from("a A b ﬁ fi c Ⅷ viii ".split(" ")), max_size=9), max_size=6
    ),
    n=st.integers(1, 4),
)
def test_sets_are_those_of_the_definition(texts: list[list[str]], n: int) -> None:
    joined = [" \n\u3000".join(words) for words in texts]
    hashes, counts = Shingler(n)(joined)
    expected = [shingles(text, n) for text in joined]
    assert counts.tolist() == [len(s) for s in expected]
    found = np.split(hashes, np.cumsum(counts)[:-1]) if len(counts) else []
    for values, named in zip(found, expected, strict=True):
        assert (values[1:] > values[:-1]).all()
        for other, others in zip(found, expected, strict=True):
            common = len(np.intersect1d(values, other))
            assert common == len(named & others)


def test_the_hashes_are_fixed_for_all_time() -> None:
    """Others would not meet those of artifacts that exist."""
    hashes, _ = Shingler(3)(["one two three four", "One"])
    assert [f"{h:016x}" for h in hashes] == [
        "5b5358bde45a4b77",
        "8493c577cb4301c0",
        "5ac2f66285f87227",
    ]


def test_signatures_estimate_the_similarity() -> None:
    texts = families(1, 60)
    sets, (jaccard, _) = in_memory(texts), similarities(texts)
    agree = (sets.signatures[:, None] == sets.signatures[None]).mean(2)
    assert np.abs(agree - jaccard).max() < 0.2
    assert np.abs(agree - jaccard).mean() < 0.02


# ---- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("jaccard", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_pairs_at_the_threshold_meet_but_for_one_in_ten_thousand(jaccard: float) -> None:
    rows = rows_of_a_band(jaccard, 128)
    assert (1 - jaccard**rows) ** (128 // rows) <= 1e-4
    assert rows == 16 or (1 - jaccard ** (rows + 1)) ** (128 // (rows + 1)) > 1e-4


def test_a_band_holds_those_that_agree_in_it() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 3, (50, 6)).astype(np.uint32)
    among = np.arange(0, 50, 2)
    for start, (members, stop) in zip(range(0, 6, 2), bands(table, 2, among), strict=True):
        met = {(a, b) for p, a in enumerate(members) for b in members[p + 1 : stop[p]]}
        rows = table[:, start : start + 2]
        pairs = combinations(among.tolist(), 2)
        assert met == {(a, b) for a, b in pairs if (rows[a] == rows[b]).all()}


def test_all_pairs_of_different_labels_come_and_alike_ones_cost_little() -> None:
    members, stop = np.arange(10, 17), np.array([3, 3, 3, 7, 7, 7, 7])
    labels = np.array([0] * 10 + [0, 1, 0, 0, 0, 0, 0])
    found = {
        (int(a), int(b))
        for one, other in pairs_of_band(members, stop, labels.__getitem__)
        for a, b in zip(one, other, strict=True)
    }
    assert found == {(10, 11), (11, 12)}
    asked = 0

    def all_of_one_after_the_first_step(documents: Array) -> Array:
        nonlocal asked
        asked += len(documents)
        return np.zeros(len(documents)) if asked > 5000 else documents

    many, end = np.arange(5000), np.full(5000, 5000)
    steps = list(pairs_of_band(many, end, all_of_one_after_the_first_step))
    assert len(steps) == 1
    assert len(steps[0][0]) == 4999


# ---- clusters and matches ------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), jaccard=st.sampled_from([0.5, 0.8]))
def test_clusters_are_those_of_all_pairs(seed: int, jaccard: float) -> None:
    texts = families(seed, 50)
    among = np.random.default_rng(seed).random(50) < 0.8
    parts = [in_memory(texts[:20]), in_memory(texts[20:])]
    found = clusters(Sets(parts), among, NearDuplicateSettings(jaccard, ngram=NGRAM))
    similar = similarities(texts)[0] >= jaccard
    expected = np.arange(50)
    for _ in range(50):  # the lowest number walks to all that it can reach
        for a, b in combinations(range(50), 2):
            if similar[a, b] and among[a] and among[b]:
                expected[[a, b]] = expected[[a, b]].min()
    assert found.tolist() == expected.tolist()


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    containment=st.sampled_from([None, 0.5, 0.8, 1.0]),
    piece=st.sampled_from([100, 2**20]),
)
def test_matches_are_those_of_all_pairs(seed: int, containment: float | None, piece: int) -> None:
    texts = families(seed, 60)
    kind = np.random.default_rng(seed).integers(0, 3, 60)
    evaluated, others = kind == 0, kind == 1
    sets = Sets([in_memory(texts[:25]), in_memory(texts[25:])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "PIECE", piece)
        chosen = NearDuplicateSettings(0.8, containment, NGRAM)
        found = find_matches(sets, evaluated, others, chosen)
    jaccard, held = similarities(texts)
    jaccard[:, ~evaluated], held[~evaluated] = 0, 0
    like = (jaccard >= 0.8).any(1)
    holds = (held >= containment).any(0) if containment else np.zeros(60, bool)
    expected = np.flatnonzero(others & (like | holds))
    assert [match.document for match in found] == expected.tolist()
    for match in found:
        values = jaccard if match.measure == "jaccard" else held.T
        assert match.value == pytest.approx(values[match.document, match.evaluation])
        assert evaluated[match.evaluation]
        assert (match.measure == "jaccard") == bool(like[match.document])


# ---- the stages ----------------------------------------------------------------------------------


def changed(text: str, seed: int) -> str:
    """The text with one of its words replaced: with 13-grams a Jaccard of over 0.9 in 300 words."""
    words = text.split()
    words[random.Random(seed).randrange(len(words))] = "changed"
    return " ".join(words)


@pytest.fixture
def several(tmp_path: Path, small: Small) -> dict[str, Any]:
    """A corpus split by hash, one for training, one for validation; documents of each in others."""
    long = [" ".join(random.Random(i).choices(WORDS, k=300)) for i in range(30)]
    hashed = [
        {"id": f"{i} {copy}", "text": changed(long[i], ord(copy))}
        for i in range(20)
        for copy in "ab"
    ]
    held = [{"id": f"held {i}", "text": long[20 + i]} for i in range(6)]
    held.append({"id": "short", "text": "a  Short text"})
    train = [{"id": f"of held {i}", "text": changed(long[20 + i], 1).upper()} for i in range(3)]
    train += [
        {"id": f"holds {i}", "text": f"{long[23 + i]} {long[27]} {long[28]}"} for i in range(2)
    ]
    train += [{"id": "short", "text": "A SHORT\ttext"}, {"id": "shorter", "text": "a short"}]
    train += [{"id": f"own {d['id']}", "text": d["text"]} for d in make_documents(10)]
    contents = {"hashed": (hashed, "hash"), "train": (train, "train"), "held": (held, "val")}
    corpora = [
        {"name": n, "path": str(write_jsonl(tmp_path / f"{n}.jsonl", documents)), "split": split}
        for n, (documents, split) in contents.items()
    ]
    return small(
        corpus=corpora,
        splits={"val": 0.25, "test": 0.2},
        near_duplicates={"containment": 0.8},
        packing={"seq_len": 64},
    )


def test_what_is_like_evaluation_is_neither_trained_on_nor_retrieved(
    several: dict[str, Any],
) -> None:
    made = Made(several)
    names = [corpus.name for corpus in made.settings.corpora]
    duplicates = made.folder("duplicates")
    documents = {n: made.chunks(n).documents for n in names}
    ids = {n: [documents[n].id(d) for d in range(len(documents[n]))] for n in names}
    codes = {n: store.cleaned_splits(duplicates, n) for n in names}
    # Copies of one text fall together, where the lowest of them falls by itself.
    place = split_hash(made.chunks("hashed").documents.keys, made.settings.splits.salt)
    of = codes["hashed"].reshape(20, 2)
    assert (of == of[:, :1]).all()
    lowest = place.reshape(20, 2).min(1)
    assert [SPLITS[c] for c in of[:, 0]] == [
        "train" if p < 0.55 else "val" if p < 0.8 else "test" for p in lowest
    ]
    assert len(set(of[:, 0].tolist())) > 1
    assert not {"hashed"} & {row["corpus"] for row in report(duplicates)}
    left = [
        i for i, code in zip(ids["train"], codes["train"], strict=True) if code == LEFT_OUT_CODE
    ]
    assert left == [*(f"of held {i}" for i in range(3)), *(f"holds {i}" for i in range(2)), "short"]
    rows = {row["id"]: row for row in report(duplicates)}
    assert list(rows) == left
    for i in range(3):
        assert rows[f"of held {i}"]["evaluation_id"] == f"held {i}"
        assert 0.8 < rows[f"of held {i}"]["jaccard"] < 1
    assert rows["holds 1"]["containment"] == 1
    assert rows["short"]["jaccard"] == 1
    assert (codes["held"] == SPLITS.index("val")).all()
    # Every reader of splits follows.
    for i, name in enumerate(names):
        admitted = np.load(made.folder("database") / store.admitted_name(i))
        assert admitted.tolist() == (codes[name] == 0).tolist()
    packed = PackedSequences(made.folder("packing train")).rows
    trained = np.unique(made.chunks("train").document_of_chunk[packed[packed >= 0]])
    assert trained.tolist() == np.flatnonzero(codes["train"] == 0).tolist()
    evaluated = store.LeakageTable(made.folder("leakage held"))
    assert len(evaluated.rows) == len(made.chunks("held"))
    pipeline.prepare(made.settings, InlineEngine())
    for corpus in pipeline.open_prepared(made.settings).corpora:
        assert corpus.split_of_document.tolist() == codes[corpus.chunks.name].tolist()
    figures = made.figures("duplicates")
    assert figures["left_out"] == len(left)
    assert figures["clusters"] == 20


def report(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / store.LEFT_OUT).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"jaccard": 0.9, "containment": 0.8}, {"duplicates"}),
        ({}, {"duplicates"}),
        ({"containment": 0.8, "ngram": 5}, {"shingles", "duplicates"}),
    ],
)
def test_a_threshold_reads_tokenizes_and_embeds_nothing_again(
    several: dict[str, Any], change: dict[str, Any], expected: set[str]
) -> None:
    several["neighbors"] = {"search": "exact", "num_stored": 4}

    def keys(given: dict[str, Any]) -> dict[str, str]:
        steps = pipeline.steps(Settings.create(**{**several, "near_duplicates": given}))
        return {step.title: step.key for step in steps}

    before, after = keys({"containment": 0.8}), keys(change)
    made_again = {title.split()[0] for title in before if before[title] != after[title]}
    assert made_again == expected | {"database", "neighbors", "leakage", "packing"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"jaccard": 0}, r"jaccard=0: expected a share"),
        ({"containment": 1.5}, r"containment=1.5"),
        ({"ngram": 0}, r"ngram=0"),
        ({"threshold": 0.8}, r"near_duplicates\.threshold.*jaccard"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    given: dict[str, Any], named: str, small: Small
) -> None:
    with pytest.raises(RetroDataError, match=named):
        Settings.create(**small(near_duplicates=given))


def test_a_missing_library_is_named_before_anything_is_tokenized(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    settings = Settings.create(**small(near_duplicates={}))
    with pytest.raises(RetroDataError, match=r"retro_data\[dedup\].*near_duplicates=null"):
        pipeline.prepare(settings, InlineEngine())
    assert not (settings.root / "chunks").exists()
