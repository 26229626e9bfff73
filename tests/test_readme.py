"""What the README promises is true: its commands run, its code runs, its names exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_documents, write_jsonl

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text("utf-8")
TINY = [  # the demo's model and corpus replaced by small ones; nothing else
    "data/corpus=jsonl",
    "data.corpus.path=wiki.jsonl",
    "data.tokenizer.vocab_size=400",
    "data.root=data/wiki",
    "data.seq_len=128",
    "data.batch_size=2",
    "data.splits.val=0.2",
    "model.width=32",
    "model.layers=3",
    "trainer.max_steps=3",
    "trainer.accelerator=cpu",
]


def section(heading: str) -> str:
    level = heading.split()[0]
    body = README.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"\n#{{1,{len(level)}}} ", body, maxsplit=1)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README assumes it: a corpus, train.py and its configuration."""
    folder = tmp_path_factory.mktemp("readme")
    write_jsonl(folder / "wiki.jsonl", make_documents(16, longest=200))
    shutil.copy(REPOSITORY / "train.py", folder)
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    return folder


def run(command: str, folder: Path, timeout: float = 240) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def test_quick_start_holds_two_commands() -> None:
    quick = section("## Quick start")
    assert len(blocks(quick, "bash")) == 2
    for heading in ("### Run it", "### Test it"):
        (block,) = blocks(section(heading), "bash")
        assert len(block.strip().splitlines()) == 1
    # These two run word for word in .ci/run.
    assert "command_under 'Run it'" in (REPOSITORY / ".ci" / "run").read_text()
    assert "command_under 'Test it'" in (REPOSITORY / ".ci" / "run").read_text()


def test_shell_commands_run(workplace: Path) -> None:
    (block,) = blocks(section("## Use it"), "bash")
    out = run(block, workplace)
    assert "finished" in out
    assert "whole" in out
    assert "neighbor 1" in out


def test_stored_neighbors_are_selected_by_one_command(workplace: Path) -> None:
    (block,) = blocks(section("## Filters and re-ranking"), "bash")
    assert "selection corpus: " in run(block, workplace)


def test_python_code_runs(workplace: Path) -> None:
    (code,) = blocks(section("## Use it"), "python")
    (workplace / "example.py").write_text(f"if __name__ == '__main__':\n{_indent(code)}")
    run("python example.py", workplace)


def test_many_processes(workplace: Path) -> None:
    """Each launch trains on two ranks and leaves one output folder."""
    (block,) = blocks(section("## Many GPUs"), "bash")
    for command in block.strip().splitlines():
        shutil.rmtree(workplace / "outputs", ignore_errors=True)
        out = run(f"{command} {' '.join(TINY)}", workplace)
        assert "MEMBER: 2/2" in out or "world_size=2" in out or "2 processes" in out, out[-3000:]
        assert len(list((workplace / "outputs").iterdir())) == 1


def test_a_multirun_prepares_once(workplace: Path) -> None:
    assert "`python train.py -m seed=1,2`" in README
    root = "data.root=data/multirun"
    out = run(f"python train.py -m seed=1,2 {' '.join(TINY)} {root} data.mode=packed", workplace)
    assert out.count(" artifacts in ") == 1
    assert "everything was prepared already" in out


def test_a_multirun_with_more_devices_is_refused(workplace: Path) -> None:
    with pytest.raises(AssertionError, match=r"torchrun, or set trainer\.devices=1"):
        run(f"python train.py -m trainer.devices=2 {' '.join(TINY)}", workplace)


def test_the_hydra_configuration_is_ours(workplace: Path) -> None:
    (block,) = blocks(section("## In your own Hydra app"), "yaml")
    conf = workplace / "conf"
    conf.mkdir(exist_ok=True)
    (conf / "config.yaml").write_text(block)
    (workplace / "app.py").write_text(
        "import hydra\n"
        "@hydra.main(version_base='1.3', config_path='conf', config_name='config')\n"
        "def main(config):\n"
        "    print('ROOT', hydra.utils.instantiate(config.data).root)\n"
        "main()\n"
    )
    assert f"ROOT {workplace / 'data' / 'wiki'}" in run("python app.py", workplace)


def test_names_in_the_readme_exist() -> None:
    groups = set(re.findall(r"`data/(\w+)`", README))
    assert groups == {p.name for p in (REPOSITORY / "configs" / "data").iterdir() if p.is_dir()}
    project = (REPOSITORY / "pyproject.toml").read_text()
    for extra in re.findall(r"^\| `(\w+)` \|", section("## Install"), re.M):
        assert re.search(rf"^{extra} = \[", project, re.M), extra
    for path in (REPOSITORY / "configs").rglob("*.yaml"):
        yaml.safe_load(path.read_text())


def test_every_promise_names_a_test_that_exists() -> None:
    table = section("## What you can rely on")
    names = re.findall(r"`(test_\w+)\.(test_\w+)`", table)
    assert len(names) > 20
    for module, name in names:
        (path,) = Path(__file__).parent.rglob(f"{module}.py")
        assert f"def {name}(" in path.read_text("utf-8"), f"{module}.{name}"
    for row in table.strip().splitlines()[2:]:
        assert "`test_" in row, row


def _indent(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())
