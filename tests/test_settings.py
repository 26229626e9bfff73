"""Which settings change the bytes of an artifact: moving a field is to be a conscious act."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from conftest import make_documents, write_jsonl

import retro_data
from retro_data import artifact, pipeline
from retro_data.chunks import ChunkSettings
from retro_data.corpus import CorpusSettings
from retro_data.database import DatabaseSettings
from retro_data.embedder_settings import EmbedderSettings
from retro_data.engines import EngineSettings, InlineEngine
from retro_data.index_settings import IndexSettings
from retro_data.neighbors import NeighborSettings
from retro_data.packing import PackingSettings
from retro_data.pipeline import Settings
from retro_data.selection import SelectionSettings
from retro_data.shingles import NearDuplicateSettings
from retro_data.splits import SplitSettings
from retro_data.tokenizer import TokenizerSettings

# Class -> fields that change bytes, fields that change none.
FIELDS: dict[type, tuple[str, str]] = {
    CorpusSettings: (
        "name format text_field id_field encoding encoding_errors on_bad_document "
        "max_document_bytes max_expansion hf_config hf_split hf_revision",
        "path glob split",
    ),
    TokenizerSettings: ("vocab_size sample_bytes", "name revision"),
    ChunkSettings: ("chunk_size bos tokenizer_backend", "block_bytes"),
    SplitSettings: ("val test database salt", ""),
    EmbedderSettings: (
        "pooling normalize precision max_embed_tokens",
        "name revision batch_tokens block_rows",
    ),
    DatabaseSettings: ("splits corpora share", ""),
    IndexSettings: (
        "planner factory max_index_memory memory_mapped target_recall recall_at recall_queries "
        "sample_size seed shard_rows",
        "max_query_ms threads",
    ),
    NeighborSettings: ("search exact_rows metric num_stored", "block_rows memory"),
    SelectionSettings: (
        "min_distance max_distance max_overlap one_per_document distinct rerank",
        "",
    ),
    NearDuplicateSettings: ("jaccard containment ngram num_perm", ""),
    PackingSettings: ("seq_len", ""),
    EngineSettings: ("", "kind devices workers address gpus cpus memory tries"),
}


def test_every_settings_class_of_the_package_is_in_the_table():
    found = set()
    for path in Path(retro_data.__file__).parent.rglob("*.py"):
        found |= {
            node.name
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.ClassDef) and node.name.endswith("Settings")
        }
    assert found - {"Settings"} == {kind.__name__ for kind in FIELDS}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_every_field_says_whether_it_changes_bytes(kind: type):
    keyed, free = (set(names.split()) for names in FIELDS[kind])
    told = {item.name: item.metadata.get("keyed") for item in dataclasses.fields(kind)}
    assert {name for name, value in told.items() if value is True} == keyed
    assert {name for name, value in told.items() if value is False} == free
    assert None not in told.values()


def test_every_group_of_settings_is_a_class_of_the_table():
    hints = get_type_hints(Settings)
    groups = [kind for name, kind in hints.items() if name not in ("root", "corpora")]
    kinds = {next(iter(get_args(kind)), kind) for kind in groups}  # a group may be left out: None
    assert kinds | {CorpusSettings} == set(FIELDS)


# Stage -> all that enters its key beside its parents.
STAGE_FIELDS = {
    "corpus": FIELDS[CorpusSettings][0] + " files",
    "tokenizer": "vocab_size sample_bytes salt",
    "chunks": "name chunk_size bos tokenizer_backend",
    "embeddings": "name pooling normalize precision max_embed_tokens files",
    "shingles": "name ngram num_perm minhash_version",
    "duplicates": "corpora splits jaccard containment",
    "database": "stores splits admitted share",
    "codebook": "metric planner factory max_index_memory memory_mapped sample_size seed",
    "index": "metric target_recall recall_at recall_queries shard_rows",
    "neighbors": "name search metric num_stored",
    "selection": "name " + FIELDS[SelectionSettings][0],
    "leakage": "name nearest split splits covers_training",
    "packing": "name seq_len split splits",
}
STAGE_PARENTS = {
    "corpus": set(),
    "tokenizer": {"corpus small"},
    "chunks": {"corpus", "tokenizer"},
    "embeddings": {"chunks"},
    "shingles": {"corpus"},
    "duplicates": {"chunks small", "shingles small"},
    "database": {"chunks small", "duplicates"},
    "codebook": {"database", "embeddings 0"},
    "index": {"codebook", "database", "embeddings 0"},
    "neighbors": {"database", "embeddings", "embeddings 0", "index"},
    "selection": {"chunks", "neighbors", "database"},
    "leakage": {"chunks", "neighbors", "selection", "duplicates"},
    "packing": {"chunks", "duplicates"},
}


@pytest.fixture
def arguments(small: Any) -> dict[str, Any]:
    return small(
        neighbors={"search": "index", "num_stored": 8},
        index={"factory": "Flat"},
        selection={"rerank": "bm25"},
        near_duplicates={},
        packing={"seq_len": 64},
    )


def test_the_key_of_each_stage_is_made_of_these_fields(arguments: dict[str, Any]):
    stages = [step.stage for step in pipeline.steps(Settings.create(**arguments))]
    assert {s.name: set(s.key_fields()) for s in stages} == {
        name: set(fields.split()) for name, fields in STAGE_FIELDS.items()
    }
    assert {s.name: set(s.parents()) for s in stages} == STAGE_PARENTS


def test_each_keyed_setting_of_an_index_keys_one_of_its_stages():
    fields = IndexSettings().training_fields(), IndexSettings().filling_fields()
    assert {*fields[0], *fields[1]} == set(FIELDS[IndexSettings][0].split())
    assert not set(fields[0]) & set(fields[1])


def test_what_is_off_is_known_to_no_key(arguments: dict[str, Any]):
    off = arguments | {"near_duplicates": None, "selection": None}
    stages = [s.stage for s in pipeline.steps(Settings.create(**off))]
    assert not {"shingles", "duplicates", "selection"} & {s.name for s in stages}
    assert not any({"duplicates", "selection"} & set(s.parents()) for s in stages)


def test_each_parent_is_the_key_of_an_earlier_stage(arguments: dict[str, Any]):
    known: set[str] = set()
    for step in pipeline.steps(Settings.create(**arguments)):
        assert set(step.stage.parents().values()) <= known
        known.add(step.key)


def test_key_fields_are_plain_json(arguments: dict[str, Any]):
    for step in pipeline.steps(Settings.create(**arguments)):
        assert artifact.canonical_json(step.stage.key_fields())


def test_auto_search_goes_by_the_number_of_rows_alone():
    auto = NeighborSettings(exact_rows=1000)
    assert [auto.resolve(rows) for rows in (1, 1000, 1001)] == ["exact", "exact", "index"]
    assert NeighborSettings(search="index").resolve(1) == "index"
    assert NeighborSettings(search="exact").resolve(10**9) == "exact"


def test_auto_search_keys_as_what_it_resolves_to(small: Any, tmp_path: Path):
    path = write_jsonl(tmp_path / "few.jsonl", make_documents(8))
    corpus = {"name": "few", "path": str(path)}

    def neighbors_key(**neighbors: Any) -> str:
        settings = Settings.create(**small(corpus=corpus, neighbors=neighbors))
        return next(s.key for s in pipeline.steps(settings) if s.stage.name == "neighbors")

    pipeline.prepare(Settings.create(**small(corpus=corpus)), InlineEngine())
    assert neighbors_key(search="auto") == neighbors_key(search="exact")
    assert neighbors_key(search="auto", exact_rows=1) == neighbors_key(search="index")


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ChunkSettings().chunk_size = 3  # type: ignore[misc]
    assert all(kind.__dataclass_params__.frozen for kind in FIELDS)  # type: ignore[attr-defined]


def test_a_list_of_a_configuration_file_is_as_good_as_a_tuple(small: Any):
    one = Settings.create(**small(database={"splits": ["train", "val"]}))
    other = Settings.create(**small(database={"splits": ("train", "val")}))
    assert one == other
    assert one.prepared_path() == other.prepared_path()
