"""Never computed twice, never half, and the same bytes however the work was cut or interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents, write_jsonl

from retro_data import artifact, pipeline, scan
from retro_data.engines import EngineSettings, InlineEngine, LocalEngine
from retro_data.errors import RetroDataError
from retro_data.pipeline import Settings
from retro_data.splits import SPLITS
from retro_data.stage import Block, Receipt, Stage, read_receipts

STAGES = (
    "corpus",
    "tokenizer",
    "chunks",
    "embeddings",
    "database",
    "codebook",
    "index",
    "neighbors",
    "leakage",
)
TILING = {"SPAN_BYTES": 8192, "SCAN_BYTES": 1}  # several blocks even of a small corpus


@pytest.fixture(scope="module", autouse=True)
def _several_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TILING.items():
            patch.setattr(scan, name, value)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four files, some 1,200 chunks of 16 tokens."""
    folder, documents = tmp_path_factory.mktemp("pipeline") / "corpus", make_documents(60)
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", documents[15 * i : 15 * (i + 1)])
    return folder


Arguments = dict[str, Any]


@pytest.fixture(scope="module")
def base(corpus: Path, tiny_encoder: Path) -> Arguments:
    """Settings with an index, and several blocks of every stage that can have them."""
    return {
        "corpus": {"name": "small", "path": str(corpus)},
        "tokenizer": {"vocab_size": 400},
        "chunk_size": 16,
        "chunks": {"block_bytes": 16384},
        "embedder": {"name": str(tiny_encoder), "precision": "fp32", "block_rows": 200},
        "index": {"factory": "IVF8,Flat", "shard_rows": 400},
        "neighbors": {"search": "index", "num_stored": 8, "block_rows": 300},
    }


@pytest.fixture(scope="module")
def reference(base: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root prepared without a break, in this process. Not to be written to: copy it."""
    root = tmp_path_factory.mktemp("reference") / "root"
    pipeline.prepare(Settings.create(root, **base), InlineEngine())
    return root


@pytest.fixture
def prepared(reference: Path, tmp_path: Path) -> Path:
    """A copy of the prepared root."""
    return shutil.copytree(reference, tmp_path / "root")


def changed(base: Arguments, dotted: str, value: Any) -> Arguments:
    """The arguments with one setting changed, e.g. `splits.val`."""
    group, _, name = dotted.partition(".")
    if not name:
        return {**base, group: value}
    return {**base, group: {**base.get(group, {}), name: value}}


def contents(root: Path) -> dict[str, bytes]:
    """Every array and file of the artifacts, each corpus' embeddings as one array."""
    found = {}
    for stage in STAGES:
        for folder in sorted(p for p in (root / stage).glob("*") if p.is_dir()):
            manifest = artifact.read_manifest(folder)
            assert manifest is not None, folder
            if stage == "embeddings":
                names = sorted(manifest["arrays"])
                rows = np.concatenate([artifact.open_array(folder / name) for name in names])
                found[folder.name] = rows.tobytes()
                continue
            for name in [*manifest.get("arrays", {}), *manifest.get("files", {})]:
                found[f"{stage}/{folder.name}/{name}"] = (folder / name).read_bytes()
    return found


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


class Recorder(InlineEngine):
    """Notes the stage of every block that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def run(self, stage: Stage, folder: Path, missing: Sequence[Block]) -> Iterator[Receipt]:
        for receipt in super().run(stage, folder, missing):
            self.made.append(stage.name)
            yield receipt


def stages_made(arguments: Arguments, root: Path) -> set[str]:
    recorder = Recorder()
    pipeline.prepare(Settings.create(root, **arguments), recorder)
    return set(recorder.made)


# ---- keys ----------------------------------------------------------------------------------------


def keys(arguments: Arguments, root: Path) -> dict[str, str]:
    """The key of every stage: known before anything is made, as long as `search` is not auto."""
    return {s.stage.name: s.key for s in pipeline.steps(Settings.create(root, **arguments))}


def stages_changed(base: Arguments, other: Arguments, tmp_path: Path) -> set[str]:
    before, after = keys(base, tmp_path / "a"), keys(other, tmp_path / "b")
    return {stage for stage in STAGES if before.get(stage) != after.get(stage)}


FROM_INDEX = {"index", "neighbors", "leakage"}
FROM_CODEBOOK = {"codebook", *FROM_INDEX}
FROM_EMBEDDINGS = {"embeddings", *FROM_CODEBOOK}
FROM_DATABASE = {"database", *FROM_CODEBOOK}
FROM_CHUNKS = {"chunks", *FROM_EMBEDDINGS, "database"}
FROM_TOKENIZER = {"tokenizer", *FROM_CHUNKS}
ALL = set(STAGES)

CHANGES: list[tuple[str, Any, set[str]]] = [
    ("corpus.text_field", "body", ALL),
    ("corpus.id_field", None, ALL),
    ("corpus.encoding", "latin-1", ALL),
    ("corpus.encoding_errors", "replace", ALL),
    ("corpus.on_bad_document", "raise", ALL),
    ("corpus.max_document_bytes", 1000, ALL),
    ("corpus.max_expansion", 9, ALL),
    ("corpus.name", "other", ALL),
    ("corpus.split", "train", FROM_DATABASE),
    ("corpus.glob", "*.jsonl", set()),
    ("corpus.format", "jsonl", set()),
    ("tokenizer.vocab_size", 401, FROM_TOKENIZER),
    ("tokenizer.sample_bytes", 1000, FROM_TOKENIZER),
    ("chunk_size", 32, FROM_CHUNKS),
    ("chunks.bos", False, FROM_CHUNKS),
    ("chunks.tokenizer_backend", "nanotoken", FROM_CHUNKS),
    ("chunks.block_bytes", 1, set()),
    ("splits.salt", "other", FROM_TOKENIZER),
    ("splits.val", 0.2, FROM_DATABASE),
    ("splits.test", 0.2, FROM_DATABASE),
    ("embedder.pooling", "cls", FROM_EMBEDDINGS),
    ("embedder.normalize", True, FROM_EMBEDDINGS),
    ("embedder.precision", "bf16", FROM_EMBEDDINGS),
    ("embedder.max_embed_tokens", 8, FROM_EMBEDDINGS),
    ("embedder.batch_tokens", 64, set()),
    ("embedder.block_rows", 7, set()),
    ("database.splits", ["train", "val"], FROM_DATABASE),
    ("database.corpora", ["small"], set()),  # all there is, named
    ("index.factory", "Flat", FROM_CODEBOOK),
    ("index.seed", 1, FROM_CODEBOOK),
    ("index.sample_size", 1000, FROM_CODEBOOK),
    ("index.target_recall", 0.5, FROM_INDEX),
    ("index.recall_at", 5, FROM_INDEX),
    ("index.shard_rows", 500, FROM_INDEX),
    ("index.threads", 1, set()),
    ("index.max_query_ms", 1.0, set()),
    ("neighbors.metric", "ip", FROM_CODEBOOK),
    ("neighbors.search", "exact", FROM_CODEBOOK),
    ("neighbors.num_stored", 9, {"neighbors", "leakage"}),
    ("neighbors.exact_rows", 5, set()),  # without a word where search is not auto
    ("neighbors.block_rows", 9, set()),
    ("neighbors.memory", 10**6, set()),
    ("engine.workers", 3, set()),
    ("engine.devices", [], set()),
]


@pytest.mark.parametrize(
    ("setting", "value", "expected"), CHANGES, ids=[f"{c[0]}={c[1]}" for c in CHANGES]
)
def test_a_setting_changes_what_depends_on_it_and_nothing_else(
    base: Arguments, tmp_path: Path, setting: str, value: Any, expected: set[str]
):
    assert stages_changed(base, changed(base, setting, value), tmp_path) == expected


def test_one_letter_of_the_corpus_changes_every_key(base: Arguments, corpus: Path, tmp_path: Path):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    content = (copy / "2.jsonl").read_text("utf-8")
    (copy / "2.jsonl").write_text(content.replace("a", "o", 1), "utf-8")
    assert stages_changed(base, changed(base, "corpus.path", str(copy)), tmp_path) == ALL


def test_an_equal_copy_elsewhere_changes_no_key(base: Arguments, corpus: Path, tmp_path: Path):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    assert stages_changed(base, changed(base, "corpus.path", str(copy)), tmp_path) == set()


def test_the_name_of_a_file_is_part_of_the_corpus(base: Arguments, corpus: Path, tmp_path: Path):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    (copy / "0.jsonl").rename(copy / "9.jsonl")
    assert stages_changed(base, changed(base, "corpus.path", str(copy)), tmp_path) == ALL


def test_an_encoder_is_known_by_its_bytes(base: Arguments, tiny_encoder: Path, tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    copy = shutil.copytree(tiny_encoder, tmp_path / "copy")
    other = changed(base, "embedder.name", str(copy))
    assert stages_changed(base, other, tmp_path) == set()
    config = (copy / "config.json").read_text()
    assert '"layer_norm_eps": 1e-12' in config
    (copy / "config.json").write_text(config.replace("1e-12", "1e-5"))
    assert stages_changed(base, other, tmp_path) == FROM_EMBEDDINGS
    (copy / "config.json").write_text(config)
    weights = load_file(copy / "model.safetensors")
    weights[min(weights)] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert stages_changed(base, other, tmp_path) == FROM_EMBEDDINGS


def test_a_named_tokenizer_is_known_by_its_bytes(
    base: Arguments, tiny_encoder: Path, tmp_path: Path
):
    copy = shutil.copytree(tiny_encoder, tmp_path / "copy")
    named = changed(base, "tokenizer", {"name": str(tiny_encoder)})
    again = changed(base, "tokenizer", {"name": str(copy), "vocab_size": 77})  # unused: no change
    assert stages_changed(base, named, tmp_path) == FROM_TOKENIZER
    assert stages_changed(named, again, tmp_path) == set()
    content = (copy / "tokenizer.json").read_text("utf-8")
    (copy / "tokenizer.json").write_text(content + "\n", "utf-8")
    assert stages_changed(named, again, tmp_path) == FROM_TOKENIZER


# ---- never twice ---------------------------------------------------------------------------------


def stat_of_files(root: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [root, *root.rglob("*")]}


def test_a_second_prepare_makes_nothing_and_touches_no_file(base: Arguments, prepared: Path):
    before = stat_of_files(prepared)
    assert stages_made(base, prepared) == set()
    assert stat_of_files(prepared) == before


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("splits.val", 0.2, FROM_DATABASE),
        ("neighbors.num_stored", 5, {"neighbors", "leakage"}),
        ("neighbors.search", "exact", {"neighbors", "leakage"}),
        ("embedder.normalize", True, FROM_EMBEDDINGS),
        ("embedder.batch_tokens", 64, set()),
    ],
)
def test_a_changed_setting_makes_only_what_depends_on_it(
    base: Arguments, prepared: Path, setting: str, value: Any, expected: set[str]
):
    assert stages_made(changed(base, setting, value), prepared) == expected
    assert stages_made(base, prepared) == set()  # the first configuration is still there


def test_a_moved_root_and_a_moved_corpus_are_found_again(
    base: Arguments, corpus: Path, prepared: Path, tmp_path: Path
):
    moved = prepared.rename(tmp_path / "elsewhere")
    copy = shutil.copytree(corpus, tmp_path / "copy")
    assert stages_made(changed(base, "corpus.path", str(copy)), moved) == set()


# ---- the same bytes ------------------------------------------------------------------------------


def other_tiling(base: Arguments) -> Arguments:
    other = changed(base, "chunks.block_bytes", 40_000)
    other = changed(other, "embedder.block_rows", 333)
    other = changed(other, "embedder.batch_tokens", 300)
    other = changed(other, "neighbors.memory", 2**20)
    return changed(other, "neighbors.block_rows", 111)


def test_other_tilings_and_batch_sizes_give_the_same_bytes(
    base: Arguments, reference: Path, tmp_path: Path
):
    pipeline.prepare(Settings.create(tmp_path, **other_tiling(base)), InlineEngine())
    assert differing(contents(tmp_path), contents(reference)) == []


def test_exact_neighbors_do_not_depend_on_the_tiling(
    base: Arguments, prepared: Path, reference: Path, tmp_path: Path
):
    found = []
    for rows, memory in ((300, 2**30), (77, 2**18)):
        root = shutil.copytree(reference, tmp_path / str(rows))
        arguments = changed(base, "neighbors.search", "exact")
        arguments = changed(arguments, "neighbors.block_rows", rows)
        pipeline.prepare(
            Settings.create(root, **changed(arguments, "neighbors.memory", memory)), InlineEngine()
        )
        found.append(contents(root))
    assert differing(*found) == []
    assert len(found[0]) == len(contents(reference)) + 2 + 4


# ---- killed and resumed --------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from retro_data import pipeline, scan
from retro_data.engines import InlineEngine

def run(arguments, stage_name, receipts, syncs):
    real, left = os.fsync, [0]
    def fsync(handle):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)
    os.fsync = fsync
    class Engine(InlineEngine):
        def run(self, stage, folder, missing):
            target = receipts if receipts >= 0 else len(missing)
            if stage.name == stage_name and target == 0:
                left[0] = syncs
            for number, receipt in enumerate(super().run(stage, folder, missing), 1):
                if stage.name == stage_name and number == target:
                    left[0] = syncs
                yield receipt
    pipeline.prepare(pipeline.Settings.create(**arguments), Engine())

scan.SPAN_BYTES, scan.SCAN_BYTES = map(int, sys.argv[1:3])
for case in json.loads(sys.argv[3]):
    child = os.fork()
    if child == 0:
        run(*case)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
"""

# Stage, receipts kept before the kill (-1: all), and at which sync to disk after them: 1 is that of the
# receipt itself, 2 that of the next file while it has no name yet, 3 that of its folder, and so on.
KILLS = [
    ("corpus", 2, 3),
    ("corpus", -1, 3),
    ("tokenizer", 0, 1),
    ("tokenizer", -1, 2),
    ("chunks", 0, 5),
    ("chunks", 2, 2),
    ("chunks", -1, 6),
    ("embeddings", 0, 1),
    ("embeddings", 3, 2),
    ("database", 0, 2),
    ("codebook", 0, 1),
    ("index", 0, 1),
    ("index", 1, 3),
    ("index", -1, 2),
    ("neighbors", 1, 4),
    ("neighbors", -1, 3),
    ("leakage", -1, 3),
]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def without(root: Path, stage: str) -> Path:
    """`root` as it was before `stage` began."""
    for name in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(root / name, ignore_errors=True)
    return root


@pytest.fixture(scope="module")
def killed(
    base: Arguments, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int, int], Path]:
    """Roots in which a real process was killed by SIGKILL, one for each of KILLS."""
    folder = tmp_path_factory.mktemp("killed")
    roots = {}
    for number, kill in enumerate(KILLS):
        roots[kill] = without(shutil.copytree(reference, folder / str(number)), kill[0])
    cases = [[{"root": str(roots[kill]), **base}, *kill] for kill in KILLS]
    tiling = [str(TILING["SPAN_BYTES"]), str(TILING["SCAN_BYTES"])]
    command = [sys.executable, "-c", KILLED, *tiling, json.dumps(cases)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(int(signal.SIGKILL))] * len(KILLS), ran.stderr
    return roots


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: "-".join(map(str, kill)))
def test_a_killed_stage_is_resumed_to_the_same_bytes(
    killed: dict[tuple[str, int, int], Path],
    kill: tuple[str, int, int],
    base: Arguments,
    reference: Path,
):
    root, stage = killed[kill], kill[0]
    (folder,) = (p for p in (root / stage).iterdir() if p.is_dir())
    assert artifact.read_manifest(folder) is None
    blocks = len(artifact.read_json(folder / "plan.json")["blocks"])
    kept = (folder / "receipts.jsonl").read_bytes() if read_receipts(folder) else b""
    done = len(read_receipts(folder))
    assert done in {kill[1], kill[1] + 1, blocks} - {-1}
    recorder = Recorder()
    pipeline.prepare(Settings.create(root, **base), recorder)
    assert recorder.made.count(stage) == blocks - done
    assert not set(recorder.made) & set(STAGES[: STAGES.index(stage)])
    assert (folder / "receipts.jsonl").read_bytes().startswith(kept)
    assert differing(contents(root), contents(reference)) == []
    assert not list(root.rglob(".tmp-*"))
    assert not list(root.rglob("lease.json*"))


def test_a_resume_with_another_tiling_keeps_what_is_done(
    base: Arguments, reference: Path, tmp_path: Path
):
    root = without(shutil.copytree(reference, tmp_path / "root"), "embeddings")

    class Broken(Recorder):
        def run(self, stage: Stage, folder: Path, missing: Sequence[Block]) -> Iterator[Receipt]:
            for receipt in super().run(stage, folder, missing):
                yield receipt
                if len(self.made) == 3:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.prepare(Settings.create(root, **base), Broken())
    recorder = Recorder()
    pipeline.prepare(Settings.create(root, **other_tiling(base)), recorder)
    (folder,) = (root / "embeddings").iterdir()
    blocks = artifact.read_manifest(folder)["blocks"]
    assert blocks == len(
        artifact.read_manifest(next((reference / "embeddings").iterdir()))["arrays"]
    )
    assert recorder.made.count("embeddings") == blocks - 3
    assert differing(contents(root), contents(reference)) == []


PREPARE = """
import json, sys
from retro_data import pipeline
pipeline.prepare(pipeline.Settings.create(**json.loads(sys.argv[1])))
"""


def test_worker_processes_of_any_number_killed_and_resumed_give_the_same_bytes(
    base: Arguments, reference: Path, tmp_path: Path
):
    """Two workers until the whole run is killed among the embeddings, then one to the end."""
    root = shutil.copytree(reference, tmp_path / "root")
    for stage in ("chunks", "embeddings", "neighbors"):
        shutil.rmtree(root / stage)
    arguments = {"root": str(root), **changed(base, "embedder.block_rows", 50)}
    arguments["engine"] = {"workers": 2, "devices": []}
    command = [sys.executable, "-c", PREPARE, json.dumps(arguments)]
    parent = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    try:
        while not list((root / "embeddings").glob("*/receipts.jsonl")) or not kept(root):
            assert time.monotonic() < until
            assert parent.poll() is None
            time.sleep(0.005)
    finally:
        parent.kill()
        parent.wait()
    before = kept(root)
    arguments["engine"] = {"workers": 1, "devices": []}
    pipeline.prepare(Settings.create(**arguments))
    (folder,) = (root / "embeddings").iterdir()
    blocks = artifact.read_manifest(folder)["blocks"]
    assert 0 < len(before) < blocks
    assert kept(root)[: len(before)] == before
    assert sorted(r.block for r in kept(root)) == list(range(blocks))
    assert differing(contents(root), contents(reference)) == []


def kept(root: Path) -> list[Receipt]:
    """Receipts of the embeddings."""
    (folder,) = (root / "embeddings").iterdir()
    return read_receipts(folder)


# ---- opening, looking, verifying -----------------------------------------------------------------


def test_an_unprepared_root_names_the_command(base: Arguments, tmp_path: Path):
    settings = Settings.create(tmp_path / "root", **base)
    for look in (pipeline.check, pipeline.open_prepared):
        with pytest.raises(RetroDataError, match="retro-data prepare"):
            look(settings)
    assert not (tmp_path / "root").exists()


def test_a_configuration_that_was_not_prepared_is_not_taken_for_another(
    base: Arguments, prepared: Path
):
    pipeline.check(Settings.create(prepared, **base))
    other = Settings.create(prepared, **changed(base, "neighbors.num_stored", 5))
    with pytest.raises(RetroDataError, match="retro-data prepare"):
        pipeline.check(other)


@pytest.mark.parametrize("stage", STAGES)
def test_an_artifact_that_is_gone_is_named(base: Arguments, prepared: Path, stage: str):
    (folder,) = (p for p in (prepared / stage).iterdir() if p.is_dir())
    (folder / "manifest.json").unlink()
    with pytest.raises(RetroDataError, match=f"{stage}/.*retro-data prepare"):
        pipeline.check(Settings.create(prepared, **base))


@pytest.fixture
def read_only(prepared: Path) -> Iterator[Path]:
    for path in [*prepared.rglob("*"), prepared]:
        path.chmod(path.stat().st_mode & ~0o222)
    yield prepared
    for path in [prepared, *prepared.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


def test_what_was_prepared_opens_read_only_and_without_its_corpus(base: Arguments, read_only: Path):
    settings = Settings.create(read_only, **base)
    before = stat_of_files(read_only)
    corpus = Path(base["corpus"]["path"])
    away = corpus.rename(corpus.with_name("away"))
    try:
        pipeline.check(settings)
        opened = pipeline.open_prepared(settings)
    finally:
        away.rename(corpus)
    (small,) = opened.corpora
    assert len(small.chunks) == len(small.neighbors.ids) == len(opened.database)
    assert len(small.split_of_document) == 60
    assert int(np.asarray(small.chunks.tokens).max()) == opened.tokenizer.pad_id
    assert stat_of_files(read_only) == before  # not even where the user may write everywhere


def test_another_corpus_of_the_same_name_is_not_taken_for_the_prepared_one(
    base: Arguments, prepared: Path
) -> None:
    other = Settings.create(prepared, **changed(base, "corpus.path", "/nowhere"))
    with pytest.raises(RetroDataError, match="retro-data prepare"):
        pipeline.open_prepared(other)


def test_a_read_only_root_is_found_finished(base: Arguments, read_only: Path):
    before = stat_of_files(read_only)
    assert stages_made(base, read_only) == set()
    assert stat_of_files(read_only) == before


def test_the_fingerprint_of_what_was_prepared_says_what_training_reads(
    base: Arguments, prepared: Path
):
    def fingerprint(**change: Any) -> str:
        arguments = base
        for name, value in change.items():
            arguments = changed(arguments, name.replace("__", "."), value)
        settings = Settings.create(prepared, **arguments)
        pipeline.prepare(settings, InlineEngine())
        return pipeline.open_prepared(settings).key

    assert fingerprint() == fingerprint(embedder__batch_tokens=64)
    assert (
        len({fingerprint(), fingerprint(splits__val=0.2), fingerprint(neighbors__num_stored=5)})
        == 3
    )


def test_status_tells_what_is_there(base: Arguments, reference: Path, tmp_path: Path):
    empty = pipeline.status(Settings.create(tmp_path / "empty", **base))
    assert [row.title.split()[0] for row in empty] == list(STAGES)
    assert {(row.state, row.blocks_done, row.blocks) for row in empty} == {("missing", 0, None)}
    assert not any(row.folder.exists() for row in empty)

    root = shutil.copytree(reference, tmp_path / "root")
    whole = pipeline.status(Settings.create(root, **base))
    assert {row.state for row in whole} == {"finished"}
    assert all(row.blocks_done == row.blocks and row.bytes > 0 for row in whole)

    class Broken(Recorder):
        def run(self, stage: Stage, folder: Path, missing: Sequence[Block]) -> Iterator[Receipt]:
            for receipt in super().run(stage, folder, missing):
                yield receipt
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.prepare(Settings.create(without(root, "embeddings"), **base), Broken())
    states = {row.title.split()[0]: row for row in pipeline.status(Settings.create(root, **base))}
    assert [states[stage].state for stage in STAGES] == ["finished"] * 3 + ["partial"] + [
        "missing"
    ] * 5
    assert states["embeddings"].blocks_done == 1
    assert (states["embeddings"].blocks or 0) > 3


def test_verify_finds_a_flipped_bit_and_names_the_file(base: Arguments, prepared: Path):
    settings = Settings.create(prepared, **base)
    assert set(map(tuple, pipeline.verify(settings).values())) == {()}
    harmed = {
        "embeddings small": next((prepared / "embeddings").glob("*/00002.npy")),
        "chunks small": next((prepared / "chunks").glob("*/tokens.npy")),
        "index": next((prepared / "index").glob("*/*.index")),
        "corpus small": next((prepared / "corpus").glob("*/files.tsv")),
    }
    for path in harmed.values():
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)
    found = {title: wrong for title, wrong in pipeline.verify(settings).items() if wrong}
    assert set(found) == set(harmed)
    for title, path in harmed.items():
        assert path.name in found[title][0]


def test_verify_says_what_is_unfinished(base: Arguments, tmp_path: Path):
    found = pipeline.verify(Settings.create(tmp_path, **base))
    assert all("retro-data prepare" in wrong[0] for wrong in found.values())


# ---- several corpora -----------------------------------------------------------------------------


def test_corpora_of_their_own_splits(base: Arguments, tmp_path: Path):
    """Training text, text to evaluate on, and text that is only ever retrieved."""
    corpora = []
    for seed, split in enumerate(("train", "val", "database")):
        path = write_jsonl(tmp_path / f"{split}.jsonl", make_documents(12, seed))
        corpora.append({"name": f"of_{split}", "path": str(path), "split": split})
    arguments = changed({**base, "corpus": corpora}, "neighbors.search", "auto")
    settings = Settings.create(tmp_path / "root", **arguments)
    pipeline.prepare(settings, InlineEngine())
    titles = [row.title for row in pipeline.status(settings)]
    assert "neighbors of_train" in titles
    assert "neighbors of_val" in titles
    assert "neighbors of_database" not in titles  # it asks for nothing
    opened = pipeline.open_prepared(settings)
    train, val, database = opened.corpora
    assert database.neighbors is None
    for corpus, split in zip(opened.corpora, ("train", "val", "database"), strict=True):
        assert set(corpus.split_of_document.tolist()) == {SPLITS.index(split)}
    first = opened.database.first_rows
    for corpus in (train, val):
        ids = np.asarray(corpus.neighbors.ids)
        of_store = np.searchsorted(first, ids[ids >= 0], side="right") - 1
        assert set(of_store.tolist()) == {0, 2}  # never a chunk of the evaluation corpus
    own = np.asarray(train.neighbors.ids)
    document = train.chunks.document_of_chunk
    inside = (own >= 0) & (own < first[1])
    rows = np.broadcast_to(np.arange(len(own))[:, None], own.shape)
    assert (document[own[inside]] != document[rows[inside]]).all()


def test_a_database_of_another_corpus(base: Arguments, tmp_path: Path):
    corpora = []
    for seed, name in enumerate(("queries", "library")):
        path = write_jsonl(tmp_path / f"{name}.jsonl", make_documents(12, seed))
        corpora.append({"name": name, "path": str(path)})
    arguments = changed({**base, "corpus": corpora}, "database.corpora", ["library"])
    settings = Settings.create(tmp_path / "root", **changed(arguments, "neighbors.search", "exact"))
    pipeline.prepare(settings, InlineEngine())
    opened = pipeline.open_prepared(settings)
    assert [store.name for store in opened.database.stores] == ["library"]
    queries = opened.corpora[0]
    assert 0 <= queries.neighbors.ids.max() < len(opened.corpora[1].chunks)


# ---- settings that cannot be ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedder": {"poling": "cls"}}, r"embedder\.poling.*expected some of: name.*pooling"),
        ({"neighbors": {"k": 2}}, r"neighbors\.k.*num_stored"),
        ({"engine": {"cards": 2}}, r"engine\.cards.*devices, workers"),
        ({"corpus": {"name": "a"}}, r"missing setting corpus\.path"),
        ({"corpus": {"path": "a"}}, r"missing setting corpus\.name"),
        ({"corpus": []}, "expected at least one"),
        ({"corpus": [{"name": "a", "path": "a"}] * 2}, "each its own"),
        ({"database": {"corpora": ["b"]}}, r"database\.corpora names \['b'\]"),
        ({"database": {"splits": ["trian"]}}, r"database\.splits=\['trian'\]"),
        ({"splits": {"val": 0.4, "test": 0.3}}, "less than half"),
        ({"splits": {"val": 0.7, "test": 0.3}}, "leave something to train on"),
        ({"corpus": {"name": "a", "path": "a", "split": "val"}}, "holds training documents"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"neighbors": {"search": "fast"}}, "auto, exact or index"),
        ({"neighbors": {"num_stored": 0}}, "num_stored=0"),
        ({"embedder": {"pooling": "max"}}, "mean or cls"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_what_can(
    base: Arguments, tmp_path: Path, change: Arguments, message: str
):
    with pytest.raises(RetroDataError, match=message):
        Settings.create(tmp_path, **{**base, **change})


def test_most_may_be_evaluated_on_where_no_tokenizer_is_trained(
    base: Arguments, tiny_encoder: Path, tmp_path: Path
):
    arguments = {**base, "tokenizer": {"name": str(tiny_encoder)}}
    Settings.create(tmp_path, **{**arguments, "splits": {"val": 0.4, "test": 0.3}})


def test_worker_settings_reach_the_engine(base: Arguments, tmp_path: Path):
    settings = Settings.create(tmp_path, **base, engine={"workers": 3, "devices": [0]})
    assert settings.engine == EngineSettings(devices=(0,), workers=3)
    assert LocalEngine(settings.engine).settings.workers == 3


def test_verify_believes_no_time_of_change(base: Arguments, tmp_path: Path) -> None:
    """A corpus file whose bytes changed under the same size and time is another corpus."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(20))
    changes = {"root": tmp_path / "root", "corpus": {"name": "c", "path": str(corpus)}}
    settings = Settings.create(**{**base, **changes})
    pipeline.prepare(settings, InlineEngine())
    assert not any(pipeline.verify(settings).values())
    before = corpus.stat()
    corpus.write_bytes(corpus.read_bytes().replace(b"harbour", b"herbour", 1))
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert any(pipeline.verify(settings).values())
