"""The walls between the rooms of the house, read from the source: who may know what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import retro_data

PACKAGE = Path(retro_data.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text("utf-8"))


def imports(module: str) -> set[str]:
    """Top-level names of everything a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and name_of(node.func) == "importlib.import_module":
            first = node.args[0]
            if isinstance(first, ast.Constant):
                found.add(str(first.value).split(".")[0])
    return found


def name_of(node: ast.expr) -> str:
    """The dotted name of an expression, as far as it has one."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield name_of(node.func), node


def importers(*names: str) -> set[str]:
    return {module for module in MODULES if imports(module) & set(names)}


def test_the_source_is_all_there():
    assert len(MODULES) > 20
    assert {"pipeline.py", "engines/local.py"} <= set(MODULES)


# ---- who imports what ----------------------------------------------------------------------------


def test_only_the_datamodule_and_the_reference_model_know_lightning():
    assert importers("lightning", "pytorch_lightning") <= {"datamodule.py", "retro_lm.py"}
    assert "retro_lm.py" in importers("lightning")


def test_only_engines_know_processes_and_clusters():
    found = importers("subprocess", "multiprocessing", "ray", "concurrent", "threading")
    # Threads of one process: the beat of a lease, a device's turns, products of a search, a thread for
    # each device, digests.
    threads = {"artifact.py", "embedder.py", "exact.py", "exact_triton.py", "scan.py"}
    assert {m for m in found if not m.startswith("engines/")} <= threads
    assert all(m.startswith("engines/") for m in importers("subprocess", "multiprocessing", "ray"))
    assert importers("subprocess")


def test_only_the_index_knows_faiss():
    assert importers("faiss", "autofaiss") <= {"index.py", "index_factory.py"}


def test_only_the_cli_and_who_takes_its_arguments_know_hydra():
    assert importers("hydra", "omegaconf") <= {"cli.py", "data.py"}


def test_relative_imports_are_not_used():
    relative = {
        module
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ImportFrom) and node.level
    }
    assert relative == set()


HEAVY = [
    "faiss",
    "autofaiss",
    "transformers",
    "datasets",
    "lightning",
    "pytorch_lightning",
    "pyarrow",
    "torch",
]


def loaded(*modules: str) -> set[str]:
    """Which heavy packages a fresh process has loaded after importing these modules."""
    lines = [f"import {module}" for module in modules]
    lines += ["import sys", f"print(*[name for name in {HEAVY} if name in sys.modules])"]
    command = [sys.executable, "-c", "\n".join(lines)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_serving_loads_torch_alone_and_the_pipeline_nothing_heavy():
    assert loaded(*(f"retro_data.{m}" for m in ("dataset", "sampler"))) == {"torch"}
    assert loaded(*(f"retro_data.{m}" for m in ("data", "pipeline", "cli"))) == set()


def test_the_datamodule_loads_lightning_and_nothing_else_of_weight():
    lightning = [name for name in ("lightning.pytorch", "pytorch_lightning") if is_installed(name)]
    assert loaded("retro_data.datamodule") <= loaded(*lightning)  # which loads what it likes itself


def is_installed(name: str) -> bool:
    return find_spec(name.split(".")[0]) is not None


def test_the_package_itself_loads_next_to_nothing():
    code = "import retro_data, sys; print(*sorted({'numpy', 'torch'} & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert ran.stdout.split() == []


# ---- who writes what -----------------------------------------------------------------------------

ENDINGS = (".npy", ".json", ".jsonl", ".tsv", ".index")
SPELL_NAMES = {  # module -> the file names that it may spell, None: any
    "store.py": None,
    "artifact.py": None,
    "scan.py": {"keys.npy", "counts.npy", "spans.npy", "skipped.jsonl"},  # parts, not artifacts
    "chunks.py": {"documents_chunks.npy", "documents_id_sizes.npy"},  # parts
    "tokenizer.py": {  # files of a model, named by Hugging Face
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json"),
    },
    "embedder_settings.py": {"config.json"},
    "readers.py": {".jsonl", ".json"},  # extensions of a corpus' files
    "demo.py": {"*/*.json"},  # where the demo corpus' files lie
    "table_readers.py": {"dataset_info.json", "state.json", "dataset_dict.json"},  # of `datasets`
}


def spelled(module: str) -> set[str]:
    """String literals that end like the name of an artifact's file, docstrings and prose apart."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            value = node.value
            if value.endswith(ENDINGS) and " " not in value:
                found.add(value)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_only_store_and_artifact_spell_the_names_of_artifact_files(module: str):
    allowed = SPELL_NAMES.get(module, set())
    if allowed is not None:
        assert spelled(module) <= allowed


def test_only_the_command_line_prints():
    assert {m for m in MODULES for name, _ in calls(m) if name == "print"} <= {"cli.py"}


def test_files_that_can_run_code_are_never_loaded():
    """`torch.load` with weights only, `np.load` without pickle, no pickle, no eval."""
    forbidden = ("pickle.load", "pickle.loads", "eval", "exec", "joblib.load")
    for module in MODULES:
        for name, call in calls(module):
            given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
            assert name not in forbidden, module
            assert not given.get("allow_pickle"), module
            assert not given.get("trust_remote_code"), module
            if name.endswith("torch.load"):
                assert given.get("weights_only") is True, module


def test_no_module_is_named_like_one_of_the_standard_library():
    names = {part for module in MODULES for part in Path(module).with_suffix("").parts}
    assert names & set(sys.stdlib_module_names) == set()


def test_text_is_never_decoded_by_the_locale():
    """Reading and writing of text names its encoding; bytes need none."""
    for module in MODULES:
        for name, call in calls(module):
            words = {k.arg for k in call.keywords}
            if name.endswith(".read_text"):
                assert call.args or "encoding" in words, f"{module}:{call.lineno}"
            if name.endswith(".write_text"):
                assert len(call.args) > 1 or "encoding" in words, f"{module}:{call.lineno}"
            if name == "open":
                mode = call.args[1] if len(call.args) > 1 else None
                binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
                assert binary or "encoding" in words, f"{module}:{call.lineno}"


def test_every_module_says_what_it_is_and_delays_its_annotations():
    for module in MODULES:
        if (PACKAGE / module).stat().st_size:
            assert ast.get_docstring(tree(module)), module
            functions = any(isinstance(n, ast.FunctionDef) for n in ast.walk(tree(module)))
            assert "__future__" in imports(module) or not functions, module
