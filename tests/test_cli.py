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
    assert table.count("finished") == 6
    assert "missing" not in table
    assert main(["verify", *overrides]) == 0
    assert capsys.readouterr().out.count("whole") == 6
    assert main(["inspect", "--split", "val", overrides[0], "--index", "1", *overrides[1:]]) == 0
    text = capsys.readouterr().out
    assert "Sequence 1 of" in text
    assert "neighbor 2" in text


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
