"""The stages in their order: the only place that knows it.

    corpus ─► tokenizer ─► chunks ─► embeddings ─► database ─► codebook ─► index ─► neighbors
       └─► shingles ─► duplicates ────────────────┘      selection, leakage, packing ◄─┘

`steps` names every artifact a configuration leads to; `prepare` brings each to its end, `status`
looks, `check` refuses what is unfinished, `verify` reads everything back, and `open_prepared` opens
what training reads. Only the first two of these ever look at the corpus.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from retro_data import artifact, integrity, store
from retro_data.artifact import canonical_json
from retro_data.chunks import ChunkSettings, ChunkStage
from retro_data.codebook import CodebookStage
from retro_data.corpus import CorpusSettings, open_reader
from retro_data.database import DatabasePlace, DatabaseSettings, DatabaseStage, StoreOfDatabase
from retro_data.embedder_settings import EmbedderSettings
from retro_data.embeddings import EmbeddingStage
from retro_data.engines import EngineSettings, open_engine
from retro_data.errors import RetroDataError
from retro_data.index import IndexStage
from retro_data.index_settings import IndexSettings
from retro_data.leakage import LeakageStage
from retro_data.near_duplicates import DuplicateStage, SplitCorpus
from retro_data.neighbors import NeighborSettings, NeighborStage
from retro_data.packing import PackingSettings, PackingStage
from retro_data.receipts import read_plan, read_receipts
from retro_data.scan import CorpusStage, digest_files
from retro_data.selection import SelectionSettings, SelectionStage
from retro_data.sequences import whole_chunks
from retro_data.shingles import NearDuplicateSettings, ShingleStage, minhash_version
from retro_data.splits import EVALUATION, TRAINING, SplitOfCorpus, SplitSettings
from retro_data.stage import Engine, Stage, complete, stage_key
from retro_data.store import (
    ChunkStore,
    DatabaseStores,
    LeakageTable,
    NeighborLists,
    PackedSequences,
)
from retro_data.tokenizer import LmTokenizer, TokenizerSettings, TokenizerStage, TrainingCorpus

log = logging.getLogger(__name__)

Group = TypeVar("Group")


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Everything that preparation needs, one group a stage."""

    root: Path
    corpora: tuple[CorpusSettings, ...]
    tokenizer: TokenizerSettings
    chunks: ChunkSettings
    splits: SplitSettings
    embedder: EmbedderSettings
    database: DatabaseSettings
    index: IndexSettings
    neighbors: NeighborSettings
    selection: SelectionSettings | None  # None: neighbors are read as they are stored
    near_duplicates: NearDuplicateSettings | None  # None: none are looked for
    packing: PackingSettings | None  # None: no sequences are packed
    engine: EngineSettings

    @classmethod
    def create(
        cls,
        root: str | Path,
        corpus: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        tokenizer: Mapping[str, Any] | None = None,
        chunk_size: int = 64,
        chunks: Mapping[str, Any] | None = None,
        splits: Mapping[str, Any] | None = None,
        embedder: Mapping[str, Any] | None = None,
        database: Mapping[str, Any] | None = None,
        index: Mapping[str, Any] | None = None,
        neighbors: Mapping[str, Any] | None = None,
        selection: Mapping[str, Any] | None = None,
        near_duplicates: Mapping[str, Any] | None = None,
        packing: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | str | None = None,
    ) -> Settings:
        """Settings from plain mappings, as Hydra or a caller gives them.

        Args:
            root: folder of all artifacts.
            corpus: one corpus, or several; each with at least `name` and `path`.
            chunk_size: tokens of a chunk.
            selection: None where all stored neighbors are read, in the order of distance.
            near_duplicates: None where no near-duplicates are to be looked for; {} for the defaults.
            packing: None where no sequences are to be packed.

        Raises:
            RetroDataError: a setting that does not exist, or a value that cannot be.
        """
        if "chunk_size" in (chunks or {}):
            raise RetroDataError("chunks.chunk_size is not a setting: set chunk_size itself.")
        several = [corpus] if isinstance(corpus, Mapping) else list(corpus)
        settings = cls(
            root=Path(root).expanduser().absolute(),
            corpora=tuple(_group(CorpusSettings, "corpus", c) for c in several),
            tokenizer=_group(TokenizerSettings, "tokenizer", tokenizer),
            chunks=_group(ChunkSettings, "chunks", {**(chunks or {}), "chunk_size": chunk_size}),
            splits=_group(SplitSettings, "splits", splits),
            embedder=_group(EmbedderSettings, "embedder", embedder),
            database=_group(DatabaseSettings, "database", database),
            index=_group(IndexSettings, "index", index),
            neighbors=_group(NeighborSettings, "neighbors", neighbors),
            selection=_selection(selection),
            near_duplicates=None
            if near_duplicates is None
            else _group(NearDuplicateSettings, "near_duplicates", near_duplicates),
            packing=None if packing is None else _group(PackingSettings, "packing", packing),
            engine=_group(EngineSettings, "engine", EngineSettings.named(engine)),
        )
        settings._check()
        return settings

    def _check(self) -> None:
        names = [corpus.name for corpus in self.corpora]
        if not names or len(set(names)) < len(names):
            raise RetroDataError(f"corpus names {names}: expected at least one, each its own.")
        unknown = set(self.database.corpora or ()) - set(names)
        if unknown:
            raise RetroDataError(
                f"database.corpora names {sorted(unknown)}, found the corpora {names}."
            )
        if self.packing is not None:
            whole_chunks("seq_len", self.packing.seq_len, self.chunks.chunk_size)
        if self.tokenizer.name is not None:
            return
        if not any(corpus.split in TRAINING for corpus in self.corpora):
            raise RetroDataError(
                f"none of the corpora {names} holds training documents (corpus.split hash or train) "
                "to train a tokenizer on. Name one (tokenizer.name)."
            )
        if self.splits.evaluation > 0.5:
            raise RetroDataError(
                f"splits.val={self.splits.val} and splits.test={self.splits.test} leave less than "
                "half for other use, on which the tokenizer is trained. Name one (tokenizer.name), or "
                "evaluate on less."
            )

    def evaluates(self, split: str) -> bool:
        """Whether a corpus of this split may hold documents of val or test."""
        return split in EVALUATION or (split == "hash" and self.splits.evaluation > 0)

    def retrieves_training(self) -> bool:
        """Whether all training documents are in the database."""
        training = {corpus.name for corpus in self.corpora if corpus.split in TRAINING}
        chosen = self.database
        has_all = chosen.corpora is None or training <= set(chosen.corpora)
        return "train" in chosen.splits and chosen.share == 1 and has_all

    def prepared_path(self) -> Path:
        """Where the keys are kept that this configuration was prepared to."""
        groups = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("root", "corpora", "engine")
        }
        identity: dict[str, Any] = {
            name: _identity(group) for name, group in groups.items() if group is not None
        }
        identity["corpora"] = [_identity(corpus) for corpus in self.corpora]
        return store.prepared_path(self.root, artifact.artifact_key("settings", 1, identity, {}))


NAMING_FIELDS = ("name", "revision", "split", "path", "glob")  # not keyed: digests stand for them


def _identity(group: Any) -> dict[str, Any]:
    return {
        item.name: getattr(group, item.name)
        for item in dataclasses.fields(group)
        if item.metadata["keyed"] or item.name in NAMING_FIELDS
    }


def _group(kind: type[Group], name: str, given: Any) -> Group:
    """A settings dataclass from a mapping; a setting it does not have is refused."""
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise RetroDataError(
            f"{name}={given!r}: expected a mapping of settings, e.g. {{'name': …}}."
        )
    given = dict(given or {})
    known = {item.name: item for item in dataclasses.fields(cast(Any, kind))}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise RetroDataError(
            f"unknown setting {', '.join(f'{name}.{u}' for u in unknown)}; "
            f"expected some of: {', '.join(known)}."
        )
    missing = [
        n for n, item in known.items() if item.default is dataclasses.MISSING and n not in given
    ]
    if missing:
        raise RetroDataError(f"missing setting {', '.join(f'{name}.{m}' for m in missing)}.")
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    return kind(**values)


def _selection(given: Any) -> SelectionSettings | None:
    """None where nothing is asked for: a selection of everything would be a copy."""
    settings = _group(SelectionSettings, "selection", given)
    return settings if settings.is_on else None


# ---- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One artifact on the way: its stage, folder and key, and the corpus it belongs to, if one."""

    stage: Stage
    folder: Path
    key: str
    corpus: str | None

    @property
    def place(self) -> tuple[Path, str]:
        return self.folder, self.key

    @property
    def title(self) -> str:
        return f"{self.stage.name} {self.corpus}" if self.corpus else self.stage.name


def steps(settings: Settings, *, read_all: bool = False) -> Iterator[Step]:
    """Every artifact of a configuration, in order.

    The steps up to the embeddings are known as soon as the corpora are digested. Whoever wants the
    last ones must finish each step before asking for the next: whether there is an index depends on
    the number of chunks where `neighbors.search` is auto. Without that, the iteration just ends.

    Args:
        read_all: digest every file of the corpora anew, whatever their size and time say.
    """
    root, names = settings.root, [corpus.name for corpus in settings.corpora]
    if settings.near_duplicates is not None:
        minhash_version()  # a missing library is to be named before hours of work, not after

    def step(stage: Stage, corpus: str | None = None) -> Step:
        key = stage_key(stage)
        return Step(stage, store.folder_of(root, stage.name, key, corpus), key, corpus)

    scans = {}
    readers = {corpus.name: open_reader(corpus) for corpus in settings.corpora}
    for name, reader in readers.items():
        files = digest_files(reader, store.digests_path(root, name), read_all=read_all)
        scans[name] = step(CorpusStage(reader.settings, files), name)
        yield scans[name]
    splits = {corpus.name: corpus.split for corpus in settings.corpora}
    training = [
        TrainingCorpus(readers[n].settings, *scans[n].place) for n in names if splits[n] in TRAINING
    ]
    tokenizer = step(TokenizerStage(settings.tokenizer, training, settings.splits.salt))
    yield tokenizer
    chunks = {
        n: step(
            ChunkStage(settings.chunks, readers[n].settings, scans[n].place, tokenizer.place), n
        )
        for n in names
    }
    yield from chunks.values()
    embeddings = {
        n: step(EmbeddingStage(settings.embedder, n, chunks[n].place, tokenizer.folder), n)
        for n in names
    }
    yield from embeddings.values()
    chosen = [n for n in names if n in (settings.database.corpora or names)]
    duplicates = None
    if settings.near_duplicates is not None:
        told_apart = []
        for n in names:
            shingles = step(
                ShingleStage(settings.near_duplicates, readers[n].settings, scans[n].place), n
            )
            yield shingles
            told_apart.append(SplitCorpus(n, splits[n], chunks[n].place, shingles.place))
        found = step(DuplicateStage(settings.near_duplicates, settings.splits, told_apart))
        yield found
        duplicates = found.place
    stores = [StoreOfDatabase(n, splits[n], *chunks[n].place) for n in chosen]
    database = step(DatabaseStage(settings.database, settings.splits, stores, duplicates))
    yield database
    place = DatabasePlace(
        *database.place,
        chunks=tuple(chunks[n].folder for n in chosen),
        embeddings=tuple(embeddings[n].place for n in chosen),
    )
    search = settings.neighbors.search
    if search == "auto":
        if not store.is_finished(database.folder):
            return
        search = settings.neighbors.resolve(place.rows)
    index = None
    if search == "index":
        metric = settings.neighbors.metric
        codebook = step(CodebookStage(settings.index, metric, place))
        yield codebook
        index = step(IndexStage(settings.index, metric, place, codebook.place))
        yield index
    neighbors = {}
    for name in names:
        if splits[name] != "database":  # chunks that are only ever retrieved ask for nothing
            neighbors[name] = step(
                NeighborStage(
                    settings.neighbors,
                    name,
                    chunks[name].place,
                    embeddings[name].place,
                    place,
                    search,
                    index.place if index else None,
                ),
                name,
            )
            yield neighbors[name]
    selections = {}
    if settings.selection is not None:
        for name, found in neighbors.items():
            selection = SelectionStage(
                *(settings.selection, name, chunks[name].place, found.place),
                *(place, tokenizer.folder),
            )
            selections[name] = step(selection, name)
            yield selections[name]
    told = {n: SplitOfCorpus(n, splits[n], settings.splits, duplicates) for n in names}
    for name in names:
        if settings.evaluates(splits[name]):
            leakage = LeakageStage(
                told[name],
                chunks[name].place,
                neighbors[name].place,
                place.chunks,
                tokenizer.folder,
                settings.retrieves_training(),
                selections[name].place if selections else None,
            )
            yield step(leakage, name)
    for name in names:
        if settings.packing is not None and splits[name] in TRAINING:
            yield step(PackingStage(settings.packing, told[name], chunks[name].place), name)


# ---- preparing -----------------------------------------------------------------------------------


def prepare(settings: Settings, engine: Engine | None = None, *, verify: bool = False) -> None:
    """Build what is missing, mend what is damaged, reuse what is there, and note where it is.

    Args:
        engine: where blocks are made; as `settings.engine` says where None.
        verify: read everything that is there and hold it against its digests; otherwise only
            missing files and wrong sizes are seen.
    """
    with contextlib.ExitStack() as opened:
        engine = engine or opened.enter_context(open_engine(settings.engine))
        _prepare(settings, engine, verify)


def _prepare(settings: Settings, engine: Engine, verify: bool) -> None:
    made, found = [], []
    for step in steps(settings, read_all=verify):
        finished = store.is_finished(step.folder)
        if not finished:
            log.info("%s: preparing %s", step.title, step.folder)
        manifest = complete(step.stage, step.folder, engine, verify=verify)
        if not finished:
            seconds = manifest["wall_seconds_of_last_run"]
            log.info("%s: %s rows in %.1f s", step.title, manifest.get("rows"), seconds)
            made.append(step)
        else:
            found.append(step)
    _note_prepared(settings, [*found, *made])
    if made:
        log.info(
            "prepared %d artifacts in %s (%d were there)", len(made), settings.root, len(found)
        )
    else:
        log.info("everything was prepared already in %s: %d artifacts", settings.root, len(found))


def _note_prepared(settings: Settings, done: Sequence[Step]) -> None:
    def keys(stage: str) -> dict[str, str]:
        return {step.corpus or "": step.key for step in done if step.stage.name == stage}

    note = {name: keys(name) for name in store.STAGES}
    path = settings.prepared_path()
    artifact.remove_temporaries(path.parent)
    with contextlib.suppress(FileNotFoundError, RetroDataError):  # a damaged note is written anew
        if artifact.read_record(path) == note:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_record(path, note, replace=True)


def check(settings: Settings) -> None:
    """Refuse a configuration whose artifacts are not all there. Builds nothing, reads no corpus.

    Raises:
        RetroDataError: naming what is unfinished and the command that builds it.
    """
    note = _read_note(settings)
    for stage, keys in note.items():
        for corpus, key in keys.items():
            store.finished(store.folder_of(settings.root, stage, key, corpus or None))


def _read_note(settings: Settings) -> dict[str, dict[str, str]]:
    path = settings.prepared_path()
    if not path.exists():
        raise RetroDataError(
            f"{settings.root} holds no data prepared with these settings. Run `retro-data prepare` "
            "with the same settings first, or set prepare=auto."
        )
    return artifact.read_record(path)


# ---- opening -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedCorpus:
    """One corpus, ready to be read.

    Attributes:
        chunks: its chunk store.
        split_of_document: (D,) uint8, index into SPLITS, or LEFT_OUT_CODE.
        neighbors: those that are read, of the selection if there is one; None for a corpus that is
            only ever retrieved.
        key: of all its data.
        sequences: packed training sequences, None where none were packed.
        leakage: of its evaluation chunks, None where there are none, or it was not measured.
    """

    chunks: ChunkStore
    split_of_document: np.ndarray[Any, Any]
    neighbors: NeighborLists | None
    key: str
    sequences: PackedSequences | None = None
    leakage: LeakageTable | None = None


@dataclass(frozen=True)
class Prepared:
    """All that training reads. `key` is a fingerprint of it."""

    tokenizer: LmTokenizer
    corpora: tuple[PreparedCorpus, ...]
    database: DatabaseStores
    key: str


def open_prepared(settings: Settings) -> Prepared:
    """Open what was prepared, from its manifests alone.

    Raises:
        RetroDataError: it was not prepared, or is damaged.
    """
    note = _read_note(settings)

    def folder(stage: str, corpus: str = "") -> Path:
        return store.folder_of(settings.root, stage, note[stage][corpus], corpus or None)

    duplicates = None
    if settings.near_duplicates is not None:
        duplicates = folder("duplicates"), note["duplicates"][""]
    corpora = []
    for corpus in settings.corpora:
        name = corpus.name
        chunks = ChunkStore(folder("chunks", name))
        read = "neighbors" if settings.selection is None else "selection"
        listed = name in note[read]
        neighbors = NeighborLists(folder(read, name)) if listed else None
        told = SplitOfCorpus(name, corpus.split, settings.splits, duplicates)
        split = told.of(chunks.documents)
        identity = [chunks.key, note[read].get(name), corpus.split]
        sequences = None
        if settings.packing is not None and name in note["packing"]:
            sequences = PackedSequences(folder("packing", name))
            identity.append(note["packing"][name])
        measured = name in note.get("leakage", {})  # not by those who prepared before it was
        leakage = LeakageTable(folder("leakage", name)) if measured else None
        key = canonical_json(identity)
        corpora.append(PreparedCorpus(chunks, split, neighbors, key, sequences, leakage))
    chosen = settings.database.corpora or [corpus.name for corpus in settings.corpora]
    database = [folder("chunks", c.name) for c in settings.corpora if c.name in chosen]
    fields = {
        "corpora": [corpus.key for corpus in corpora],
        "splits": dataclasses.asdict(settings.splits),
    }
    return Prepared(
        LmTokenizer(folder("tokenizer")),
        tuple(corpora),
        DatabaseStores.of(database),
        artifact.artifact_key("prepared", 1, fields, {"database": note["database"][""]}),
    )


# ---- looking -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageStatus:
    """One line of `retro-data status`."""

    title: str
    key: str
    folder: Path
    state: str  # finished | partial | missing | damaged
    blocks_done: int
    blocks: int | None  # None before the plan is made
    bytes: int


def status(settings: Settings) -> list[StageStatus]:
    """What is there of each artifact that this configuration leads to."""
    return [_status_of(step) for step in steps(settings)]


def _status_of(step: Step) -> StageStatus:
    size = 0
    for path in list(step.folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # a part, while another process works here
            size += path.stat().st_size if path.is_file() else 0
    done = len(read_receipts(step.folder))
    try:
        blocks = read_plan(step.folder)
        finished = artifact.read_manifest(step.folder) is not None
        state = "finished" if finished else "missing" if blocks is None else "partial"
        if finished and integrity.damage(step.folder, read=False, key=step.key):
            state = "damaged"
    except RetroDataError:
        blocks, state = None, "damaged"
    count = None if blocks is None else len(blocks)
    return StageStatus(step.title, step.key, step.folder, state, done, count, size)


def verify(
    settings: Settings, recompute: float = 0.0, engine: Engine | None = None
) -> dict[str, list[str]]:
    """Read the corpora and every file of every finished artifact, and hold them against digests.

    Args:
        recompute: share of the blocks of each whole artifact to make again, aside, and compare.
        engine: where they are made; child processes of this machine where None.

    Returns:
        Title of each artifact to what is wrong with it: an empty list where nothing is.
    """
    if not 0 <= recompute <= 1:
        raise RetroDataError(f"recompute={recompute}: expected a share of the blocks, 0 to 1.")
    found = {}
    parents_whole = True
    with contextlib.ExitStack() as opened:
        here = settings.engine.on_this_machine()
        engine = engine or opened.enter_context(open_engine(here))
        for step in steps(settings, read_all=True):
            wrong = integrity.damage(step.folder, read=True, key=step.key)
            parents_whole &= not wrong
            if recompute and parents_whole:  # what is made from damaged parents proves nothing
                wrong = integrity.recompute(step.stage, step.folder, engine, recompute)
            found[step.title] = wrong
    return found
