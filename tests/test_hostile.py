"""No input crashes, hangs or fills the memory; what is left out is reported, or refused by name."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd
from conftest import make_documents, write_jsonl
from hostile import CASES, GOOD, Case, line, scan, skips_of, texts_of

import retro_data
from retro_data import pipeline
from retro_data.corpus import Reader
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.scan import ScannedCorpus
from retro_data.stage import complete
from retro_data.store import ChunkStore
from retro_data.tokenizer import LmTokenizer

FIFO = "a FIFO"  # blocks whoever opens it: only for a process that can be ended
OTHERS = [name for name in CASES if name != FIFO]


def case_of(name: str, policy: str, tmp_path: Path) -> tuple[Case, Path, dict[str, Any]]:
    case = CASES[name]
    if case.unprivileged and os.geteuid() == 0:
        pytest.skip("root may read everything")
    options = {"format": case.format, "on_bad_document": policy, **case.options}
    return case, case.write(tmp_path / "corpus"), options


def check(case: Case, reader: Reader, corpus: ScannedCorpus) -> None:
    assert texts_of(reader) == case.texts
    assert corpus.manifest["rows"] == len(case.texts)
    assert corpus.text_bytes == sum(len(text.encode()) for text in case.texts.values())
    check_skips(case, skips_of(corpus))


def check_skips(case: Case, found: list[tuple[str, str]]) -> None:
    assert [file for file, _ in found] == sorted(file for file, _ in case.skips)
    for (_, reason), (_, beginning) in zip(found, sorted(case.skips), strict=True):
        assert reason.startswith(beginning)


# ---- what comes of each --------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_each_input_comes_to_what_is_expected(name: str, tmp_path: Path) -> None:
    case, path, options = case_of(name, "skip", tmp_path)
    if case.refused:
        with pytest.raises(RetroDataError, match=case.refused):
            scan(path, tmp_path, **options)
    else:
        check(case, *scan(path, tmp_path, **options))


@pytest.mark.parametrize("name", [n for n in OTHERS if CASES[n].skips or CASES[n].refused])
def test_bad_documents_end_the_run_where_that_is_asked_for(name: str, tmp_path: Path) -> None:
    """What is empty, repaired or no document at all does not: there is nothing to mend."""
    case, path, options = case_of(name, "raise", tmp_path)
    if case.bad is None and case.refused is None:
        check(case, *scan(path, tmp_path, **options))
        return
    with pytest.raises(RetroDataError, match=case.refused) as raised:
        scan(path, tmp_path, **options)
    if case.bad is not None:
        file = next(file for file, reason in case.skips if reason.startswith(case.bad))
        for part in (f"bad document in {file!r} at byte", case.bad, "on_bad_document: skip"):
            assert part in str(raised.value)


# ---- what tokens are made of it ------------------------------------------------------------------

TEXTS = {f"{name}/{key}": text for name, case in CASES.items() for key, text in case.texts.items()}
COUNTS = [2, 15, 16, 17, 31, 32, 33]  # tokens, with that of the end, around borders of chunks of 16


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> tuple[LmTokenizer, list[ChunkStore]]:
    """Chunks of the texts of all cases and of counted tokens, by a BPE trained on other texts."""
    folder = tmp_path_factory.mktemp("tokenized")
    texts = {
        "train": {document["id"]: document["text"] for document in make_documents(20)},
        "hostile": TEXTS,
        "counted": {str(count): "!" * (count - 1) for count in COUNTS},  # never merged: unseen
    }
    corpora = []
    for name, by_id in texts.items():
        path = write_jsonl(
            folder / f"{name}.jsonl", [{"id": key, "text": text} for key, text in by_id.items()]
        )
        split = "train" if name == "train" else "database"
        corpora.append({"name": name, "path": str(path), "split": split})
    settings = pipeline.Settings.create(
        folder / "root", corpora, tokenizer={"vocab_size": 400}, chunk_size=16
    )
    folders: dict[str, list[Path]] = {}
    for step in pipeline.steps(settings):
        complete(step.stage, step.folder, InlineEngine())
        folders.setdefault(step.stage.name, []).append(step.folder)
        if len(folders.get("chunks", [])) == len(corpora):
            break
    return LmTokenizer(folders["tokenizer"][0]), [ChunkStore(f) for f in folders["chunks"][1:]]


def test_hostile_texts_become_tokens_that_say_the_same(
    tokenized: tuple[LmTokenizer, list[ChunkStore]],
) -> None:
    tokenizer, (chunks, _) = tokenized
    lengths = chunks.lengths[:]
    assert lengths.min() > 0
    assert len(chunks.documents) == len(TEXTS)
    for i, (first, last) in enumerate(pairwise(chunks.documents.first_chunk[:].tolist())):
        real = np.arange(16) < lengths[first:last, None]
        assert tokenizer.decode(chunks.tokens[first:last][real]) == TEXTS[chunks.documents.id(i)]


def test_a_chunk_is_full_or_the_last_and_never_empty(
    tokenized: tuple[LmTokenizer, list[ChunkStore]],
) -> None:
    _, (_, chunks) = tokenized
    assert chunks.documents.tokens[:].tolist() == COUNTS
    expected = [n for count in COUNTS for n in [16] * ((count - 1) // 16) + [(count - 1) % 16 + 1]]
    assert chunks.lengths[:].tolist() == expected


# ---- hanging, memory and the locale: in processes of their own -----------------------------------


def child(program: str, *arguments: Any, **environment: str) -> Any:
    """What a Python program prints as JSON; its arguments are given in `sys.argv`."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SCAN = """
import json, sys
from pathlib import Path
from hostile import scan, skips_of, texts_of
reader, corpus = scan(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
print(json.dumps([texts_of(reader), skips_of(corpus)]))
"""


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_fifo_is_not_waited_for(policy: str, tmp_path: Path) -> None:
    case, path, options = case_of(FIFO, policy, tmp_path)
    texts, skips = child(SCAN, path, tmp_path, json.dumps(options))
    assert texts == case.texts
    check_skips(case, skips)


REPLACED = """
import json, os, sys
from retro_data.corpus import CorpusSettings, open_reader
from retro_data.errors import RetroDataError
reader = open_reader(CorpusSettings(name="n", path=sys.argv[1]))
(file,) = reader.files()
os.unlink(os.path.join(sys.argv[1], file.name))
os.mkfifo(os.path.join(sys.argv[1], file.name))
try:
    print(json.dumps(list(reader.records(file.name))))
except RetroDataError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_fifo_that_takes_the_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(GOOD)
    assert f"'{name}' cannot be read" in child(REPLACED, tmp_path)


MEASURED = r"""
import json, re, sys
from pathlib import Path
from hostile import scan, skips_of

def peak():  # of this program: the counter of getrusage begins at its parent's
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

scan(Path(sys.argv[1]), Path(sys.argv[3]))  # what any scan takes
before = peak()
options = {"max_document_bytes": int(sys.argv[5]), "max_expansion": 10**6}
_, corpus = scan(Path(sys.argv[2]), Path(sys.argv[4]), **options)
print(json.dumps([peak() - before, skips_of(corpus)]))
"""


def measured(folder: Path, name: str, content: Iterator[bytes], limit: int) -> tuple[int, Any]:
    """Bytes of memory that a scan of a file takes beyond those of a small one; and its skips."""
    if not Path("/proc/self/status").exists():
        pytest.skip("Linux alone tells the peak of a process")
    small, huge = folder / "small", folder / "huge"
    for path in (small, huge):
        path.mkdir()
        (path / f"good.{name.split('.')[1]}").write_bytes(GOOD)
    with (huge / name).open("wb") as handle:
        handle.writelines(content)
    return tuple(child(MEASURED, small, huge, folder / "1", folder / "2", limit))


def packed(name: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """As the name says, without ever being whole."""
    if name.endswith(("gz", "zst")):
        is_gzip = name.endswith("gz")
        packer = zlib.compressobj(wbits=31) if is_gzip else zstd.ZstdCompressor()
        yield from (packer.compress(piece) for piece in pieces)
        yield packer.flush()
    else:
        yield from pieces


def line_of(megabytes: int) -> Iterator[bytes]:
    yield line(id="before", text="") + b'{"id": "long", "text": "'
    yield from repeat(b"a" * 2**20, megabytes)
    yield b'"}\n' + line(id="after", text="")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.gz", "a.jsonl.zst"])
def test_what_is_too_large_takes_no_memory(name: str, tmp_path: Path) -> None:
    """100 MB on one line, plain or packed to a few kB, where a document may have 1 MB."""
    growth, skips = measured(tmp_path, name, packed(name, line_of(100)), 2**20)
    assert growth < 16 * 2**20
    reasons = [reason for _, reason in skips]
    if name.startswith("a.txt"):
        assert len(reasons) == 1
    else:  # what follows is read
        assert reasons[:-1] == ["empty", "empty"]
    assert reasons[-1].startswith("too large")


def test_memory_that_is_taken_is_measured(tmp_path: Path) -> None:
    growth, skips = measured(tmp_path, "a.jsonl", line_of(100), 2**28)
    assert growth > 100 * 2**20
    assert skips == [["a.jsonl", "empty"]] * 2


LISTED = """
import json, sys
from retro_data.corpus import CorpusSettings, open_reader
found = [sys.getfilesystemencoding()]
for format in ("text", "jsonl"):
    reader = open_reader(CorpusSettings(name="n", path=sys.argv[1], format=format))
    names = [file.name for file in reader.files()]
    found += [names, [record.id for name in names for record in reader.records(name)]]
print(json.dumps(found))
"""


def latin1_locale(folder: Path) -> dict[str, str]:
    name = "en_US.ISO-8859-1"
    command = ["localedef", "-f", "ISO-8859-1", "-i", "en_US", str(folder / name)]
    if shutil.which("localedef") is None or subprocess.run(command, check=False).returncode > 1:
        pytest.skip("no Latin-1 locale can be made here")
    return {"LOCPATH": str(folder), "LC_ALL": name}


@pytest.mark.parametrize(
    ("locale", "encoding"),
    [
        ({"LC_ALL": "C.UTF-8"}, "utf-8"),
        ({"LC_ALL": "C"}, "utf-8"),  # Python's own doing, which can be turned off:
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "ascii"),
        (None, "iso8859-1"),  # here it does nothing
    ],
)
def test_names_and_ids_do_not_depend_on_the_locale(
    locale: dict[str, str] | None, encoding: str, tmp_path: Path
) -> None:
    if locale is None:
        (tmp_path / "locale").mkdir()
        locale = latin1_locale(tmp_path / "locale")
    folder = os.fsencode(tmp_path) + b"/corpus"
    os.makedirs(folder + b"/d\xc3\xa9")
    names = [b"bad\xff.txt", b"d\xc3\xa9/in.txt", b"\xc3\xbc.txt", b"\xe6\xb8\xaf.jsonl"]
    for name in names:
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(b'{"text": "a"}')
    assert child(LISTED, tmp_path / "corpus", **locale) == [
        encoding,
        ["bad\udcff.txt", "dé/in.txt", "ü.txt"],
        ["bad\\udcff.txt", "dé/in.txt", "ü.txt"],
        ["港.jsonl"],
        ["港.jsonl:0"],
    ]


# ---- code in data --------------------------------------------------------------------------------

LOADERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


def unpickling(source: str) -> list[str]:
    """The calls and imports of a program that run, or could run, code that lies in data."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if _runs_data(node)]


def _runs_data(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in LOADERS for alias in node.names)
    if isinstance(node, ast.ImportFrom):  # under a name of its own, a call could not be told
        names = {alias.name for alias in node.names}
        module = (node.module or "").split(".")[0]
        return module in LOADERS or (module in ("torch", "numpy") and "load" in names)
    if isinstance(node, ast.Dict):  # keywords that are given on
        pairs = zip(node.keys, node.values, strict=True)
        return any(
            _is_unsafe(ast.literal_eval(k), v) for k, v in pairs if isinstance(k, ast.Constant)
        )
    if not isinstance(node, ast.Call):
        return False
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    name = ast.unparse(node.func)
    return (
        any(_is_unsafe(key, value) for key, value in given.items())
        or name.endswith(("read_pickle", "load_from_checkpoint"))
        or (name == "torch.load" and not _is(given.get("weights_only"), True))
        or (name in ("np.load", "numpy.load") and len(node.args) > 2)  # allow_pickle by position
    )


def _is_unsafe(key: object, value: ast.expr) -> bool:
    if key in ("allow_pickle", "trust_remote_code"):
        return not _is(value, False)
    return key == "weights_only" and not _is(value, True)


def _is(value: ast.expr | None, constant: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


def test_nothing_unpickles() -> None:
    """No pickle is loaded, of checkpoints only the weights, and no code that comes with a model."""
    files = sorted(Path(retro_data.__file__).parent.rglob("*.py"))
    assert len(files) > 30
    found = {file.name: unpickling(file.read_text("utf-8")) for file in files}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "np.load(path, None, True)",
        "np.load(path, allow_pickle=flag)",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, **{'trust_remote_code': True})",
        "pandas.read_pickle(path)",
    ],
)
def test_what_unpickles_is_found(source: str) -> None:
    assert len(unpickling(source)) == 1


def test_what_does_not_unpickle_is_not_found() -> None:
    source = (
        "np.load(a, mmap_mode='r')\ntorch.load(a, weights_only=True)\nf(trust_remote_code=False)"
    )
    assert unpickling(source) == []
