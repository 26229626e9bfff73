"""Near-duplicates: sets, clusters and what is left out, each against brute force."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data import near_duplicates
from retro_data.near_duplicates import (
    Sets,
    bands,
    clusters,
    find_matches,
    pairs_of_band,
    rows_of_a_band,
)
from retro_data.scan import keys_array
from retro_data.shingles import NearDuplicateSettings, Shingler, signatures
from retro_data.store import ShingleSets

Array = np.ndarray[Any, Any]

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
