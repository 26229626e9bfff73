"""Kill real `prepare` runs at random points, resume them, and compare every artifact byte for byte.

    python benchmarks/faults.py --kills 500 --seed 0           # exit code 1 where anything differs
    python benchmarks/faults.py --seed 0 --case 17             # one case of that run again

Each case starts from a copy of an undisturbed root, with an index or with exact search, of which a
random suffix of the stages is removed; it is disturbed, and resumed (killed again half of the times)
until a run ends by itself. Kinds of cases:

    call     SIGKILL at the n-th call by which a run changes its files, before or after it, or in the
             middle of what was written before a sync
    moment   SIGKILL at a random time
    local    a run with worker processes: SIGKILL of a worker, of its parent or of the whole group,
             or SIGSTOP of the parent or of the whole group, as below
    frozen   SIGSTOP past the lease; another run takes over and ends; SIGCONT must change nothing
    damage   files cut, flipped, deleted or swapped, then `prepare(verify=True)`, killed at times

A preloaded process imports everything once and forks each run, a session leader of its own; only the
worker processes of `local` start from nothing. What is chosen comes from the seed and the number of
the case; of `call`, `frozen` at a call, and `damage` it comes to the same again, of the others as far
as the clock allows. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from retro_data import artifact, receipts, store
from retro_data.errors import RetroDataError

Arguments = dict[str, Any]

PRELOADED = (
    "torch faiss tokenizers.trainers transformers.models.auto.modeling_auto "
    "transformers.models.bert.modeling_bert transformers.convert_slow_tokenizer "
    "transformers.tokenization_utils_sentencepiece retro_data.pipeline retro_data.readers "
    "retro_data.embedder retro_data.exact"
).split()
CALLS = (
    "write fsync link replace rename unlink truncate ftruncate copy_file_range open mkdir rmdir"
).split()  # of `os`, by which a run changes its files; and `open`, before what it reads
TILING = {  # several blocks even of a small corpus
    "scan": {"SPAN_BYTES": 4096, "SCAN_BYTES": 1},
    "packing": {"BLOCK_CHUNKS": 200},
}
STALE_SECONDS = 0.5  # of every run's leases: a kill may leave one that does not name its holder
HANGS = 120.0  # seconds after which a run that has not ended is a defect
VARYING = {"seconds", "wall_seconds_of_last_run", "build_seconds", "ms_per_query", "digest"}
TASKS: dict[str, tuple[str, ...]] = {  # what a run does in these functions, called by no other one
    "digests": ("digest_files",),
    "lease": ("Lease.__enter__", "Lease.__exit__"),
    "reopening": ("reopen",),
    "plan": ("_planned_blocks",),
    "removing": ("_remove_unproven", "_remove_leftovers"),
    "block": ("make_block",),
    "receipt": ("append_receipt", "open_journal"),
    "finish": (".finish",),
    "manifest": ("write_record",),
    "note": ("_note_prepared",),
}
LEFT = (artifact.TEMPORARY, artifact.LEASE)  # beginnings of names that no ended run leaves
NOTE = "note"  # what follows the last stage: the note of what was prepared
PLACES = (*store.STAGES, NOTE)


# ---- in the preloaded process --------------------------------------------------------------------


def nursery(descriptor: int) -> NoReturn:
    """Fork a run for each order received; wait for each process id received; at the end kill all."""
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    with contextlib.suppress(ImportError, AttributeError):  # half of the time to load an encoder
        mapping = importlib.import_module("transformers.conversion_mapping")
        mapping.get_checkpoint_conversion_mapping("bert")
    connection = Connection(descriptor)
    connection.send("ready")
    alive: set[int] = set()
    while True:
        try:
            order = connection.recv()
            if isinstance(order, int):
                connection.send(_wait(connection, order))
                alive.discard(order)
            else:
                process = _fork(connection, *order)
                alive.add(process)
                connection.send(process)
        except (EOFError, OSError):  # nobody is there any more
            for process in alive:
                kill_group(process)
            os._exit(0)  # taking down what was imported would cost seconds


def _wait(connection: Connection, process: int) -> int:
    """Exit code of a run, as soon as it ends."""
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if connection.poll(0.002):
            raise EOFError  # nothing is sent while we wait


def _fork(connection: Connection, function: str, log: str, arguments: Arguments) -> int:
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        connection.close()
        os.close(reading)
        os.close(writing)  # the session stands
        _run_and_exit(function, log, arguments)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return process


def _run_and_exit(function: str, log: str, arguments: Arguments) -> NoReturn:
    """Exit code 0, 1 for an error that retro_data tells of, 2 for any other."""
    code = 2
    with open(log, "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        FORKED[function](**arguments)
        code = 0
    except RetroDataError:
        code = 1
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_prepare(
    arguments: Arguments,
    *,
    workers: int = 0,
    verify: bool = False,
    trap: Arguments | None = None,
    report: str = "",
) -> None:
    """`pipeline.prepare`, in this process or with `workers` of its own, with a trap set."""
    from retro_data import pipeline, stage
    from retro_data.engines import EngineSettings, InlineEngine, LocalEngine

    for module, sizes in TILING.items():
        for name, value in sizes.items():
            setattr(importlib.import_module(f"retro_data.{module}"), name, value)
    lease = functools.partial(artifact.Lease, beat_seconds=0.1, stale_seconds=STALE_SECONDS)
    setattr(stage, "Lease", lease)  # noqa: B010
    engine = LocalEngine(EngineSettings((), workers)) if workers else InlineEngine()
    settings = pipeline.Settings.create(**arguments)
    counted = Trap(**(trap or {}))
    counted.set()
    began, starts = time.monotonic(), {}

    def reached() -> tuple[int, int, float]:
        return counted.calls, counted.syncs, time.monotonic() - began

    complete = pipeline.complete

    def timed(step: stage.Stage, *places: Any, **options: Any) -> Any:
        starts[step.name] = reached()
        return complete(step, *places, **options)

    setattr(pipeline, "complete", timed)  # noqa: B010
    pipeline.prepare(settings, engine, verify=verify)
    if report:
        end = reached()
        left = {
            name: [e - s for s, e in zip(start, end, strict=True)] for name, start in starts.items()
        }
        Path(report).write_text(json.dumps(left))


class Trap:
    """Sends this process a signal at its n-th call of CALLS; without `call`, only counts.

    Args:
        call: at which one, from 1; of those that sync a file, where `when` is "torn".
        number: of the signal.
        when: "before" the call, "after" it, or "torn": before a sync, once a share of what was
            written to the file is cut off again (of a journal: of its last line), as a kill in the
            middle of the writing leaves it.
        share: that is cut off.
    """

    def __init__(
        self,
        call: int = 0,
        number: int = signal.SIGKILL,
        when: str = "before",
        share: float = 0.0,
    ) -> None:
        self.at, self.number, self.when, self.share = call, number, when, share
        self.calls = self.syncs = 0
        self._real = {name: getattr(os, name) for name in CALLS if hasattr(os, name)}

    def set(self) -> None:
        for name, real in self._real.items():
            setattr(os, name, self._wrapped(name, real))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return real(*arguments, **options)
            self.calls += 1
            synced = name == "fsync" and stat.S_ISREG(os.fstat(arguments[0]).st_mode)
            self.syncs += synced
            torn = self.when == "torn"
            hit = self.at == (self.syncs if torn else self.calls) and (synced or not torn)
            if hit and torn:
                self._cut(arguments[0])
            if hit and self.when != "after":
                self._spring(name)
            result = real(*arguments, **options)
            if hit and self.when == "after":
                self._spring(name)
            return result

        return call

    def _cut(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        content = path.read_bytes()
        synced = content.rstrip(b"\n").rfind(b"\n") + 1 if path.name == artifact.RECEIPTS else 0
        self._real["ftruncate"](handle, synced + int((len(content) - synced) * (1 - self.share)))

    def _spring(self, name: str) -> None:
        told = {"when": self.when, "call": name, "task": task_under_way()}
        sys.stderr.write(json.dumps(told) + "\n")
        sys.stderr.flush()
        os.kill(os.getpid(), self.number)


def task_under_way() -> str:
    """Which of TASKS this process is at, as the functions tell that are being called."""
    found = "other"
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_qualname
        found = next((task for task, ends in TASKS.items() if name.endswith(ends)), found)
        frame = frame.f_back  # the outermost one tells best
    return found


def make_inputs(folder: str) -> None:
    """A corpus of four files, some 900 chunks of 16 tokens; and a 1-layer BERT of random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(300)]
    (Path(folder) / "corpus").mkdir()
    for number in range(4):
        lines = []
        for document in range(6):
            text = " ".join(rng.choices(words, k=rng.randint(1, 250)))
            lines.append(json.dumps({"id": f"{number}-{document}", "text": text}) + "\n")
        (Path(folder) / "corpus" / f"{number}.jsonl").write_text("".join(lines), "utf-8")
    names = ("pad", "unk", "cls", "sep", "mask")
    specials = {name: f"[{name.upper()}]" for name in names}
    vocabulary = [*specials.values(), *letters, *(f"##{letter}" for letter in letters)]
    ids = {token: number for number, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    encoder = str(Path(folder) / "encoder")
    tokens = {f"{name}_token": token for name, token in specials.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(encoder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(encoder)


FORKED: dict[str, Callable[..., None]] = {"prepare": run_prepare, "inputs": make_inputs}


# ---- runs, from outside --------------------------------------------------------------------------


class Runs:
    """The preloaded process, and the runs that it forked."""

    def __enter__(self) -> Runs:
        ours, theirs = Pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, __file__, "--nursery", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        self._connection = ours
        self.count = 0
        self._connection.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.wait()

    def start(self, function: str, log: Path, **arguments: Any) -> int:
        """Process id of a new run, which leads a session of its own."""
        self._connection.send((function, str(log), arguments))
        process: int = self._connection.recv()
        self.count += 1
        return process

    def wait(self, process: int) -> int:
        """Exit code of a run; of a signal, its number below zero. One that hangs is killed."""
        self._connection.send(process)
        if not self._connection.poll(HANGS):
            kill_group(process)
        code: int = self._connection.recv()
        return code


def kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def session(leader: int) -> list[int]:
    """Processes of a session that have not ended, without its leader."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == leader and state not in "ZX" and int(folder.name) != leader:
                found.append(int(folder.name))
    return sorted(found)


def state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came to hold within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


# ---- what a root holds ---------------------------------------------------------------------------


def artifacts(root: Path) -> dict[str, Path]:
    """`stage/folder` to each artifact's folder, in the order of the stages."""
    return {
        f"{name}/{folder.name}": folder
        for name in store.STAGES
        for folder in sorted((root / name).glob("*"))
        if folder.is_dir()
    }


def unfinished(root: Path, places: Sequence[str]) -> str:
    """The first of `places` that is not finished; NOTE when all stages are."""
    found = artifacts(root)
    for name in places[:-1]:
        folders = [folder for title, folder in found.items() if title.startswith(f"{name}/")]
        if not folders or not all(map(store.is_finished, folders)):
            return name
    return NOTE


@dataclass(frozen=True)
class Kept:
    """What of an artifact has been committed: whole lines of its journal, and its manifest."""

    journal: bytes
    manifest: bytes | None


def kept(root: Path) -> dict[str, Kept]:
    found = {}
    for title, folder in artifacts(root).items():
        journal, manifest = folder / artifact.RECEIPTS, folder / artifact.MANIFEST
        lines = journal.read_bytes() if journal.exists() else b""
        end = manifest.read_bytes() if manifest.exists() else None
        found[title] = Kept(lines[: lines.rfind(b"\n") + 1], end)
    return found


def lost(before: dict[str, Kept], root: Path) -> list[str]:
    """What had been committed and is no longer as it was."""
    now = kept(root)
    wrong = []
    for title, old in before.items():
        new = now.get(title, Kept(b"", None))
        if not new.journal.startswith(old.journal):
            wrong.append(f"{title}: receipts that were on disk are gone")
        if old.manifest is not None and new.manifest != old.manifest:
            wrong.append(f"{title}: its manifest was written anew")
    return wrong


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below a root."""
    paths = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def changes(before: dict[str, bytes], after: dict[str, bytes]) -> list[tuple[str, str]]:
    """(name, "removed", "made" or "changed") of every file that is not the same."""
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    words = {(True, False): "removed", (False, True): "made", (True, True): "changed"}
    return [(name, words[name in before, name in after]) for name in names]


def invariant(value: Any) -> Any:
    """Of a manifest or receipts: all but how long it took."""
    if isinstance(value, dict):
        return {name: invariant(entry) for name, entry in value.items() if name not in VARYING}
    return value


def compare(root: Path, reference: Path, *, mended: bool = False) -> list[str]:
    """How a root differs from the undisturbed one; empty if all of it is equal to the byte.

    Manifests and receipts are compared without the times in them.

    Args:
        mended: it was damaged. What only another repair would need (receipts, a plan, parts that
            were not laid as they are) may then differ or lack.
    """
    expected, found = artifacts(reference), artifacts(root)
    if expected.keys() != found.keys():
        return [f"artifacts {sorted(found)}, expected {sorted(expected)}"]
    wrong = []
    for name, what in changes(snapshot(reference), snapshot(root)):
        timed = Path(name).name in (artifact.MANIFEST, artifact.RECEIPTS) and what == "changed"
        if not timed and not (mended and _is_spare(name, expected)):
            wrong.append(f"{name} was {what}")
    for title, folder in found.items():
        if _manifest(folder) != _manifest(expected[title]):
            wrong.append(f"{title}: its manifest differs")
        if not mended and _receipts(folder) != _receipts(expected[title]):
            wrong.append(f"{title}: its receipts differ")
    return wrong


def _is_spare(name: str, expected: dict[str, Path]) -> bool:
    """Whether a file of an artifact is none that its manifest tells of, nor a leftover."""
    stage, _, rest = name.partition("/")
    folder, _, file = rest.partition("/")
    if f"{stage}/{folder}" not in expected or Path(name).name.startswith(LEFT):
        return False
    manifest = artifact.read_manifest(expected[f"{stage}/{folder}"]) or {}
    return file not in (artifact.MANIFEST, *manifest["arrays"], *manifest.get("files", {}))


def _manifest(folder: Path) -> Any:
    try:
        return invariant(artifact.read_manifest(folder))
    except RetroDataError as error:
        return str(error)


def _receipts(folder: Path) -> list[Any]:
    """Every line of the journal, in the order of the blocks."""
    whole = [invariant(asdict(r)) for r in receipts.read_receipts(folder)]
    lines = (folder / artifact.RECEIPTS).read_bytes().count(b"\n")
    return [lines, *sorted(whole, key=lambda receipt: receipt["block"])]


# ---- damage --------------------------------------------------------------------------------------


# Each returns what it did; nothing where that cannot be done to this file.


def _cut(root: Path, path: Path, rng: random.Random) -> str:
    size = path.stat().st_size
    if not size:
        return ""
    left = rng.randrange(size)
    os.truncate(path, left)
    return f"cut to {left} of {size} bytes"


def _flip(root: Path, path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return ""
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def _delete(root: Path, path: Path, rng: random.Random) -> str:
    path.unlink()
    return "deleted"


def _swap(root: Path, path: Path, rng: random.Random) -> str:
    """With another file of its folder, or of the same name elsewhere."""
    beside = [p for p in path.parent.iterdir() if p.is_file() and p != path]
    namesakes = [p for p in root.rglob(path.name) if p != path]
    groups = [found for found in (beside, namesakes) if found]
    if not groups:
        return ""
    other = rng.choice(sorted(rng.choice(groups)))
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)
    return f"swapped with {other.parent.name}/{other.name}"


HARMS = {"cut": _cut, "flip a bit": _flip, "delete": _delete, "swap": _swap}


# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One fault that hit: of what kind, while which stage was made, and at which task, if known."""

    kind: str
    stage: str
    task: str = ""


@dataclass
class Outcome:
    """What came of one case."""

    number: int
    kind: str
    runs: int = 0
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # what was done, in order
    differences: list[str] = field(default_factory=list)


class Left(NamedTuple):
    """What an undisturbed run still does from one stage on."""

    calls: int
    syncs: int  # of files, among the calls
    seconds: float


@dataclass(frozen=True)
class Reference:
    """An undisturbed root. `left`: what a run takes from each of `places` on."""

    root: Path
    arguments: Arguments
    places: tuple[str, ...]
    left: dict[str, Left]


class Bench:
    """The undisturbed roots, one with an index and one with exact search, and cases of faults."""

    def __init__(self, folder: Path, runs: Runs, seed: int) -> None:
        self.folder, self.runs, self.seed = folder, runs, seed
        self.log = folder / "undisturbed.log"
        self._must(runs.start("inputs", self.log, folder=str(folder)))
        self.references = [self._reference(search) for search in ("index", "exact")]

    def _reference(self, search: str) -> Reference:
        """Several blocks in every stage that can have them."""
        root, report = self.folder / f"reference-{search}", self.folder / f"{search}.json"
        arguments: Arguments = {
            "corpus": {"name": "small", "path": str(self.folder / "corpus")},
            "tokenizer": {"vocab_size": 300},
            "chunk_size": 16,
            "chunks": {"block_bytes": 8000},
            "embedder": {
                "name": str(self.folder / "encoder"),
                "precision": "fp32",
                "block_rows": 200,
            },
            "index": {
                "factory": "IVF4,Flat",
                "threads": 1,
                "recall_queries": 50,
                "shard_rows": 300,
            },
            "neighbors": {"search": search, "num_stored": 4, "block_rows": 200},
            "selection": {"distinct": True, "rerank": "bm25"},
            "near_duplicates": {},
            "packing": {"seq_len": 64},
        }
        whole = {"root": str(root), **arguments}
        self._must(self.runs.start("prepare", self.log, arguments=whole, report=str(report)))
        found = json.loads(report.read_text())
        left = {NOTE: Left(12, 1, 0.1), **{name: Left(*of) for name, of in found.items()}}
        places = tuple(place for place in PLACES if place in left)
        return Reference(root, arguments, places, left)

    def _must(self, process: int) -> None:
        if self.runs.wait(process) != 0:
            raise RuntimeError(f"an undisturbed run failed:\n{self.log.read_text()}")

    def case(self, number: int) -> Outcome:
        """Disturb, resume and compare; what differs keeps its root."""
        return Case(self, number).play()


def copy_root(reference: Path, root: Path, stage: str = "") -> Path:
    """A copy of a prepared root as it was before `stage` began; all of it without."""
    removed = {*PLACES[PLACES.index(stage) :], "prepared"} if stage else set()

    def ignored(folder: str, names: list[str]) -> set[str]:
        return removed & set(names) if Path(folder) == reference else set()

    shutil.rmtree(root, ignore_errors=True)
    return Path(shutil.copytree(reference, root, ignore=ignored))


CYCLE = (
    "call frozen damage local call moment call damage call frozen call moment call damage call "
    "moment call damage call frozen"
).split()
KINDS = tuple(dict.fromkeys(CYCLE))


def kind_of(number: int) -> str:
    return CYCLE[number % len(CYCLE)]


class Case:
    """One root, and what befalls it; all that is chosen comes from the seed and the number."""

    def __init__(self, bench: Bench, number: int) -> None:
        self.runs = bench.runs
        self.rng = random.Random(f"{bench.seed}/{number}")
        self.reference = self.rng.choice(bench.references)
        self.places, self.left = self.reference.places, self.reference.left
        self.kind = kind_of(number)
        self.mends = self.kind == "damage"
        self.root = bench.folder / f"case-{number}"
        self.log = self.root.with_suffix(".log")
        self.outcome = Outcome(number, self.kind)
        self.kept: dict[str, Kept] = {}

    def play(self) -> Outcome:
        began, runs = time.monotonic(), self.runs.count
        self.log.unlink(missing_ok=True)
        getattr(self, self.kind)()
        if not self.outcome.differences:
            self.differ(*compare(self.root, self.reference.root, mended=self.mends))
        if not self.outcome.differences:
            shutil.rmtree(self.root)
            self.log.unlink()
        self.outcome.seconds = time.monotonic() - began
        self.outcome.runs = self.runs.count - runs
        return self.outcome

    # -- kinds --

    def call(self) -> None:
        self.begin(self.rng.choice(self.places))
        self.kill_at_call()
        self.resume()

    def moment(self) -> None:
        stage = self.begin(self.rng.choice(self.places[:-1]))
        seconds = self.rng.uniform(0, self.left[stage].seconds)
        process = self.start()
        time.sleep(seconds)
        kill_group(process)
        if self.ended(process, "kill at a moment", -signal.SIGKILL) == -signal.SIGKILL:
            self.hit("kill at a moment")
        self.resume()

    def local(self) -> None:
        """Workers begin with seconds of imports, so that half of the faults wait for a receipt."""
        stage = self.begin(self.rng.choice(("chunks", "embeddings", "neighbors")))
        process = self.start(workers=2)
        self.wait_for(process, lambda: bool(session(process)))
        if self.rng.random() < 0.5:
            wanted = self.rng.randint(1, 2)
            self.wait_for(process, lambda: self._receipts(stage) >= wanted)
            time.sleep(self.rng.uniform(0, 0.02))
        else:
            time.sleep(self.rng.uniform(0, 3))
        signals = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
        kinds = ("kill worker", "kill parent", "kill group", "freeze parent", "freeze group")
        kind = self.rng.choice(kinds)
        word, whom = kind.split()
        workers = session(process)
        with contextlib.suppress(ProcessLookupError):
            if whom == "group":
                os.killpg(process, signals[word])
            elif whom == "parent" or workers:
                os.kill(process if whom == "parent" else self.rng.choice(workers), signals[word])
        if word == "freeze":
            self.overtake(process, kind)
        elif self.ended(process, kind, 1, -signal.SIGKILL) != 0:
            self.hit(kind)
        self.resume()  # at once: workers may be about to die
        if not until(lambda: not session(process), 20):
            self.differ(f"{kind}: its processes {session(process)} live on")
            kill_group(process)

    def frozen(self) -> None:
        self.begin(self.rng.choice(self.places[:-1]))
        if self.rng.random() < 0.5:
            self.kill_at_call()  # so that there is something to remove
        self.freeze()
        self.resume()

    def damage(self) -> None:
        self.begin()
        for _ in range(self.rng.randint(1, 3)):
            paths = sorted(path for path in self.root.rglob("*") if path.is_file())
            path = self.rng.choice(paths)
            name = path.relative_to(self.root).as_posix()
            harm = self.rng.choice(sorted(HARMS))
            done = HARMS[harm](self.root, path, self.rng)
            if done:
                self.outcome.told.append(f"{name} {done}")
                self.hit(harm, name.split("/")[0].replace("prepared", NOTE))
        if self.rng.random() < 0.2:
            self.freeze()
        self.resume()

    # -- their parts --

    def begin(self, stage: str = "") -> str:
        copy_root(self.reference.root, self.root, stage)
        self.kept = kept(self.root)
        self.outcome.told.append(f"{self.reference.root.name}, from {stage or 'the end'} on")
        return stage

    def start(self, **options: Any) -> int:
        arguments = {"root": str(self.root), **self.reference.arguments}
        return self.runs.start(
            "prepare", self.log, arguments=arguments, verify=self.mends, **options
        )

    def ended(self, process: int, what: str, *expected: int) -> int:
        """Exit code of a run once it has ended; what was committed before it must stay."""
        code = self.runs.wait(process)
        if code not in (0, *expected):
            self.differ(f"{what}: exit code {code}, {self.last_words()}")
        if not self.mends:
            self.differ(*lost(self.kept, self.root))
            self.kept = kept(self.root)
        return code

    def trap(self, number: int) -> Arguments:
        """At a call of the first stage that is to be made, mostly, or at any after it."""
        ways = ("before", "after", "torn") if number == signal.SIGKILL else ("before", "after")
        when = self.rng.choice(ways)
        left = [
            self.left[place].syncs if when == "torn" else self.left[place].calls
            for place in (*self.places, NOTE)
        ]
        if self.mends:  # how much is to do is not known: at one of few calls as often as of many
            call = int(math.exp(self.rng.uniform(0, math.log(left[0] / 2))))
        else:
            first = self.places.index(unfinished(self.root, self.places))
            own = left[first] - left[first + 1] + left[-1]  # and those before: as many as of NOTE
            call = self.rng.randint(1, own if self.rng.random() < 0.7 else left[first])
        return {"call": call, "number": int(number), "when": when, "share": self.rng.random()}

    def kill_at_call(self) -> None:
        trap = self.trap(signal.SIGKILL)
        process = self.start(trap=trap)
        if self.ended(process, f"kill at {trap}", -signal.SIGKILL) == -signal.SIGKILL:
            self.sprung("kill")

    def freeze(self) -> None:
        """A run that is stopped, at a call or at a moment, and overtaken."""
        if self.mends or self.rng.random() < 0.7:
            process = self.start(trap=self.trap(signal.SIGSTOP))
            kind = ""
        else:
            seconds = self.rng.uniform(0, self.left[unfinished(self.root, self.places)].seconds)
            process = self.start()
            time.sleep(seconds)
            os.kill(process, signal.SIGSTOP)
            kind = "freeze at a moment"
        self.overtake(process, kind)

    def overtake(self, process: int, kind: str) -> None:
        """Another run ends the work of one that is stopped, which then wakes and commits nothing.

        Args:
            kind: of the fault; empty where it came from a trap, which tells of itself.
        """
        until(lambda: state_of(process) in "TZX", HANGS)
        if state_of(process) != "T":
            self.ended(process, "a run that was not stopped in time", 1)
            return
        if kind:
            self.hit(kind)
        else:
            self.sprung("freeze")
        self.ended(self.start(), "the run that took over")
        after = snapshot(self.root)
        os.killpg(process, signal.SIGCONT)
        self.ended(process, "the run that was frozen", 1)
        for name, what in changes(after, snapshot(self.root)):
            own = Path(name).name.startswith(LEFT) and what == "removed"
            part = f"/{artifact.PARTS}/" in name and what != "changed"  # of no use to anybody now
            if not own and not part:
                self.differ(f"{name} was {what} by the run that was frozen")

    def resume(self) -> None:
        """Run to the end, killed again half of the times."""
        while not self.outcome.differences and self.rng.random() < 0.5:
            if not self.mends and store.prepared_notes(self.root):
                break  # nothing is left to do
            self.kill_at_call()
        self.ended(self.start(), "the last run")

    def sprung(self, word: str) -> None:
        told = json.loads(self.last_words())
        self.outcome.told.append(f"{word} {told['when']} os.{told['call']}")
        kind = "kill in mid-write" if told["when"] == "torn" else f"{word} {told['when']} a call"
        self.hit(kind, task=told["task"])

    def hit(self, kind: str, stage: str = "", task: str = "") -> None:
        fault = Fault(kind, stage or unfinished(self.root, self.places), task)
        self.outcome.told.append(f"{kind} in {fault.stage} {task}".strip())
        self.outcome.faults.append(fault)

    def differ(self, *lines: str) -> None:
        self.outcome.differences += lines

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word"

    def wait_for(self, process: int, condition: Callable[[], bool]) -> None:
        until(lambda: condition() or state_of(process) in "ZX", HANGS)

    def _receipts(self, stage: str) -> int:
        journals = (self.root / stage).glob(f"*/{artifact.RECEIPTS}")
        return sum(journal.read_bytes().count(b"\n") for journal in journals)


# ---- all of them ---------------------------------------------------------------------------------


@contextlib.contextmanager
def open_bench(folder: Path, seed: int) -> Iterator[Bench]:
    """Everything that cases need, in an empty folder; its processes end with the block."""
    with Runs() as runs:
        yield Bench(folder, runs, seed)


def campaign(bench: Bench, kills: int, kinds: Sequence[str] = KINDS) -> Iterator[Outcome]:
    """Cases of these kinds until so many faults have hit."""
    faults = 0
    for number in itertools.count():
        if kind_of(number) in kinds:
            outcome = bench.case(number)
            faults += len(outcome.faults)
            yield outcome
        if faults >= kills:
            return


def tell(outcome: Outcome, folder: Path) -> None:
    print(f"case {outcome.number} ({outcome.kind}): {'; '.join(outcome.told)}")
    for line in outcome.differences:
        print(f"    DIFFERS {line}")
    if outcome.differences:
        print(f"    root and log: {folder / f'case-{outcome.number}'}(.log)", flush=True)


def print_tables(outcomes: list[Outcome]) -> None:
    """What was done in cases of each kind; which faults hit which stages; which tasks were cut off."""
    line = "{:<12}{:>7}{:>8}{:>7}{:>9}{:>13}"
    print(line.format("case", "cases", "faults", "runs", "s/fault", "differences"))
    for kind in (*KINDS, "all"):
        chosen = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        faults, seconds = sum(len(o.faults) for o in chosen), sum(o.seconds for o in chosen)
        runs, differing = sum(o.runs for o in chosen), sum(bool(o.differences) for o in chosen)
        each = f"{seconds / max(1, faults):.2f}"
        print(line.format(kind, len(chosen), faults, runs, each, differing))
    hits = [fault for outcome in outcomes for fault in outcome.faults]
    counts = Counter((fault.kind, fault.stage) for fault in hits)
    row = "{:<20}" + "{:>11}" * (len(PLACES) + 1)
    print("\n" + row.format("fault while making", *PLACES, "all"))
    for kind in sorted({fault.kind for fault in hits}):
        each_stage = [counts[kind, place] for place in PLACES]
        print(row.format(kind, *each_stage, sum(each_stage)))
    tasks = Counter(fault.task for fault in hits if fault.task)
    print("\nat the task: " + ", ".join(f"{task} {tasks[task]}" for task in (*TASKS, "other")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=500, help="faults that must hit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="only these")
    parser.add_argument("--case", type=int, help="play only this case")
    parser.add_argument("--folder", type=Path, help="new folder of all roots (default: temporary)")
    parser.add_argument("--nursery", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.nursery is not None:
        nursery(options.nursery)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with open_bench(folder, options.seed) as bench:
        cases = campaign(bench, options.kills, options.kinds)
        for outcome in cases if options.case is None else [bench.case(options.case)]:
            outcomes.append(outcome)
            if outcome.differences or options.case is not None:
                tell(outcome, folder)
    print_tables(outcomes)
    if any(outcome.differences for outcome in outcomes):
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
