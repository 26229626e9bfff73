"""`retro-data`: what a user types, and what it answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from retro_data.cli import main


@pytest.fixture(scope="module")
def overrides(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tiny_encoder: Path
) -> list[str]:
    return [
        f"data.root={tmp_path_factory.mktemp('cli')}",
        f"data.corpus.path={corpus_file}",
        f"data.embedder.name={tiny_encoder}",
        "data.embedder.precision=fp32",
        "data.tokenizer.vocab_size=400",
        "data.chunk_size=16",
        "data.seq_len=64",
        "data.neighbors.num_stored=4",
        "data.splits.val=0.2",
    ]


def test_before_preparing_the_answer_names_the_command(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *overrides]) == 1
    assert "retro-data prepare" in capsys.readouterr().err
    assert main(["verify", *overrides]) == 1
    assert main(["status", *overrides]) == 0
    assert "missing" in capsys.readouterr().out


def test_prepare_status_verify_inspect(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *overrides]) == 0
    assert main(["status", *overrides]) == 0
    table = capsys.readouterr().out
    assert table.count("finished") == 7
    assert "missing" not in table
    assert main(["verify", *overrides]) == 0
    assert capsys.readouterr().out.count("whole") == 7
    assert main(["inspect", "--split", "val", overrides[0], "--index", "1", *overrides[1:]]) == 0
    text = capsys.readouterr().out
    assert "Sequence 1 of" in text
    assert "neighbor 2" in text


def test_looking_loads_neither_lightning_nor_torch(overrides: list[str]) -> None:
    code = (
        "import sys; from retro_data.cli import main; assert main(sys.argv[1:]) == 0; "
        "print('heavy:', *sorted({'lightning', 'pytorch_lightning', 'torch'} & set(sys.modules)))"
    )
    assert main(["prepare", *overrides]) == 0
    for command in ("status", "verify", "clean"):
        line = [sys.executable, "-c", code, command, *overrides]
        ran = subprocess.run(line, capture_output=True, text=True, check=True)
        assert ran.stdout.splitlines()[-1] == "heavy:"


def test_a_datamodule_of_ones_own_is_made(
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own.py").write_text(
        "from retro_data import RetroDataModule\n"
        "class Own(RetroDataModule):\n"
        "    def settings(self):\n"
        "        print('settings of my own')\n"
        "        return super().settings()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["status", "data._target_=own.Own", *overrides]) == 0
    assert "settings of my own" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["null", "{root: data}", "{_target_: builtins.dict}"])
def test_a_configuration_that_makes_no_data_is_refused(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"data: {data}\n")
    assert main(["status", "--config-dir", str(tmp_path), "--config-name", "mine"]) == 1
    assert "expected a RetroDataModule. Set data._target_=" in capsys.readouterr().err


def test_verify_finds_a_flipped_bit(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(overrides[0].split("=")[1])
    assert main(["prepare", *overrides]) == 0
    (path,) = root.glob("chunks/*/tokens.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["verify", *overrides]) == 1
    assert str(path) in capsys.readouterr().out
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["verify", *overrides]) == 0


def test_prepare_mends_what_verify_finds(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(overrides[0].split("=")[1])
    assert main(["prepare", *overrides]) == 0
    (path,) = root.glob("neighbors/*/ids.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["verify", *overrides]) == 1
    assert "retro-data prepare --verify" in capsys.readouterr().out
    assert main(["prepare", "--verify", *overrides]) == 0
    assert path.read_bytes() == whole
    assert main(["verify", "--recompute", "0.01", *overrides]) == 0
    assert capsys.readouterr().out.count("whole") == 7
    assert main(["verify", "--recompute", "2", *overrides]) == 1
    assert "expected a share" in capsys.readouterr().err


def test_clean_shows_before_it_removes(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *overrides]) == 0
    fewer = [*overrides, "data.neighbors.num_stored=3"]
    assert main(["prepare", *fewer]) == 0
    root = Path(overrides[0].split("=")[1])
    assert len(list(root.glob("neighbors/*"))) == 2
    assert main(["clean", *overrides]) == 0
    assert "0 B would be freed" in capsys.readouterr().out
    assert main(["clean", "--others", *overrides]) == 0
    listed = capsys.readouterr().out
    assert "of another configuration" in listed
    assert len(list(root.glob("neighbors/*"))) == 2
    assert main(["clean", "--others", "--yes", *overrides]) == 0
    assert "freed" in capsys.readouterr().out
    assert len(list(root.glob("neighbors/*"))) == 1


def test_a_plan_that_will_not_do_is_refused(
    overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from retro_data import plan

    monkeypatch.setattr(plan, "_free_memory", lambda: 2**20)
    assert main(["plan", *overrides]) == 1
    table = capsys.readouterr().out
    for stage in (
        "corpus",
        "tokenizer",
        "chunks",
        "embeddings",
        "database",
        "neighbors",
        "leakage",
    ):
        assert f"\n{stage} " in table
    assert "1M are free" in table


def test_a_refusal_is_one_message_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "data.corpus.path=/nowhere", "data.root=/tmp/never"]) == 1
    error = capsys.readouterr().err
    assert "/nowhere" in error
    assert "Traceback" not in error
    assert main(["prepare", "data.corpus.path=x", "+data.index.speed=3"]) == 1
    assert "index.speed" in capsys.readouterr().err
    assert main(["prepare"]) == 1
    assert "data.corpus.path" in capsys.readouterr().err


def test_it_is_a_module_and_a_command() -> None:
    for command in (
        [sys.executable, "-m", "retro_data"],
        [Path(sys.executable).parent / "retro-data"],
    ):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert "prepare" in done.stdout
