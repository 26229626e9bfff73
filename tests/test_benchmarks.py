"""Benchmarks run to their end on a small corpus, and what they print is what was made."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_documents, write_jsonl
from hydra import compose, initialize_config_dir

from retro_data.errors import RetroDataError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STAGES = ["corpus", "tokenizer", "chunks", "embeddings", "database", "neighbors", "leakage"]


@pytest.mark.slow
def test_pipeline_measures_every_stage(tmp_path: Path) -> None:
    documents = make_documents(60)
    corpus = write_jsonl(tmp_path / "small.jsonl", documents)
    figures, root = tmp_path / "figures.json", tmp_path / "root"
    root.mkdir()
    options = "--encoder tiny --search exact --chunk-size 16 --limit-seconds 0.01".split()
    files = ["--corpus", corpus, "--root", root, "--json", figures]
    command = [sys.executable, BENCHMARKS / "pipeline.py", *options, *files]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "RANDOM WEIGHTS" in run.stdout
    assert not any(root.iterdir())  # it leaves nothing behind

    rows = {row["stage"]: row for row in json.loads(figures.read_text())}
    assert list(rows) == STAGES
    assert rows["corpus"]["rows"] == 60
    assert rows["corpus"]["work"] == sum(len(document["text"]) for document in documents)
    assert 0 < rows["chunks"]["work"] <= 16 * rows["chunks"]["rows"]
    for name in ("embeddings", "database", "neighbors"):
        assert rows[name]["rows"] == rows["chunks"]["rows"]
    for name, row in rows.items():
        assert row["seconds"] > 0
        assert 0 < row["size"] <= row["peak_disk"]
        assert row["parent"] > 20e6  # a Python with torch
        assert (row["children"] > 5e6) == (name != "database")  # that one starts none
        limited = name in ("corpus", "chunks", "embeddings", "neighbors")
        assert (row["limit"] is not None) == limited


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--mode=document", "--cold"])
def test_the_loader_is_measured_warm_and_cold(option: str) -> None:
    shape = "--rows 2000 --rounds 1 --seq-len 512 --batch-size 4 --cold-batches 2".split()
    command = [sys.executable, BENCHMARKS / "loader.py", *shape, option]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert ("DataLoader, 2 workers" in run.stdout) == (option != "--cold")
    assert ("classic, no workers" in run.stdout) == (option == "--mode=document")
    assert ("prefetch" in run.stdout) == (option == "--cold")


@pytest.mark.slow
def test_near_duplicates_and_leakage_are_held_against_slower_ways(tmp_path: Path) -> None:
    documents = make_documents(40)
    documents += [{"id": f"{d['id']} again", "text": f"Once {d['text']}"} for d in documents[:20]]
    corpus = write_jsonl(tmp_path / "small.jsonl", documents)
    outputs = []
    for script, options in (
        ("near_duplicates.py", [corpus]),
        ("leakage.py", ["--chunks", "20", "--beside", "2"]),
    ):
        command = [sys.executable, BENCHMARKS / script, *options]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert "60 documents" in outputs[0]
    assert "in different clusters: 0" in outputs[0]
    assert "missed 0, wrongly 0" in outputs[0]
    assert "difflib" in outputs[1]


def test_pipeline_growth_is_a_row_and_a_unit_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(BENCHMARKS / "pipeline.py"))
    mebi = 2**20
    small = ("chunks", 1_000_000, 10.0, 8.0, 4.0, 1000, "tokens", None, 100 * mebi, 100 * mebi)
    large = ("chunks", 4_000_000, 80.0, 64.0, 16.0, 8000, "tokens", None, 100 * mebi, 150 * mebi)
    module["print_growth"](
        [module["Row"]("small", *small, 1, 1)], [module["Row"]("large", *large, 1, 1)]
    )
    line = capsys.readouterr().out.splitlines()[-1]
    # wall doubled a row, stayed a token; CPU stayed, blocks halved
    assert " ".join(line.split()) == "chunks 4.0x 10 s 20 s 2.00 1.00 1.00 0.50 +50 MiB 1.25x"


def test_a_known_neighbor_is_right_when_it_shares_a_verse() -> None:
    """Of four chunks one is without a verse, one is right at once, one only by its second candidate."""
    module = runpy.run_path(str(BENCHMARKS / "known_neighbors.py"))
    verses = [frozenset(v) for v in ("ab", "bc", "", "d")]
    ids = np.array([[1, 2], [3, 0], [0, 1], [2, -1]])
    assert module["share_right"](ids[:, 0], verses) == (pytest.approx(1 / 3), 3)
    assert module["share_with_a_right_one"](ids, verses) == pytest.approx(2 / 3)


def test_the_cost_model_is_what_it_says(
    tmp_path: Path,
    tiny_encoder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    model = runpy.run_path(str(BENCHMARKS / "cost_model.py"))
    rates = model["Rates"](6.4e6, 40_000, 9e14, 6e14, 1e8, 768)
    common, exact, by_index = model["stage_costs"](10**8, rates)
    assert [cost.stage for cost in common] == ["chunks", "embeddings"]
    assert common[0].cpu == pytest.approx(1000)
    assert common[1].seconds(gpus=8, cores=16) == pytest.approx(10**8 / 40_000 / 8)
    assert exact[0].gpu == pytest.approx(2e16 * 768 / 9e14)
    lists = 2**18  # 16 sqrt(10^8) is 160,000
    assert by_index[0].gpu == pytest.approx(2 * 768 * lists * (500 * lists + 10**8) / 6e14)
    assert by_index[1].cpu == pytest.approx(10**8 * 32 * 10**8 / lists / 1e8)
    assert exact[0].disk == by_index[1].disk == 10**8 * 32 * 8

    corpus = write_jsonl(tmp_path / "small.jsonl", make_documents(60))
    small = ["--device", "cpu", "--seconds", "0.3", "--search-rows", "2000", "--pairs", "943"]
    files = ["--corpus", str(corpus), "--check", str(corpus), "--encoder", str(tiny_encoder)]
    model["main"]([*files, *small])
    said = capsys.readouterr().out
    assert "pairs=943000000000000.0" in said
    assert said.count("limited by") == 3
    assert said.count("by the model") == 2


def test_controls_are_what_they_say() -> None:
    lists = runpy.run_path(str(BENCHMARKS / "worth.py"))["control_lists"]
    # Six chunks of three documents are the database; row 4 is not admitted.
    own = np.array([[0, 2], [0, 2], [2, 3], [3, 6], [3, 6], [3, 6]])
    found = np.array([[2, 3, 5], [3, 2, -1], [0, 1, 5], [0, 1, -1], [1, 2, -1], [2, 0, 1]])
    admitted = np.array([0, 1, 2, 3, 5])

    def of(control: str, seed: int = 0) -> np.ndarray:
        return lists(control, found, own, admitted, np.random.default_rng(seed))

    assert of("oracle").tolist() == [
        *([3, 2, -1], [5, -1, -1]),  # the next chunk's, without what is of this one's document
        *([0, 1, -1], [1, 2, -1], [2, 0, 1], [-1, -1, -1]),
    ]
    for control in ("random", "shuffled"):
        many = np.concatenate([of(control, seed) for seed in range(200)])
        owners = np.tile(own, (200, 1))
        real = many >= 0
        assert not (real & (many >= owners[:, :1]) & (many < owners[:, 1:])).any()
        assert (np.sort(~real, axis=1) == ~real).all()  # -1 at the end
        np.testing.assert_array_equal(of(control), of(control))
        assert (of(control) != of(control, 1)).any()
    first = np.concatenate([of("random", seed)[:1] for seed in range(500)])
    assert set(first.flatten().tolist()) - {-1} == {2, 3, 5}
    shuffled = np.concatenate([of("shuffled", seed)[3] for seed in range(99)])
    assert set(shuffled.tolist()) == {0, 1, 2, -1}


def test_differences_are_of_documents_and_seeds() -> None:
    report = runpy.run_path(str(BENCHMARKS / "worth_report.py"))
    results = object.__new__(report["Results"])
    results.documents = np.array([0, 0, 1])
    one = np.array([[[1, 2, 9], [1, 1, 4]]], float)  # a seed, (all, served), three chunks
    base = np.array([[[2, 4, 12], [2, 2, 4]], [[2, 4, 12], [2, 2, 4]]], float)
    found, low, high = results.difference(one, base)
    assert found == pytest.approx(100 * (12 / 18 - 1))
    assert (low, high) == pytest.approx((100 * (3 / 6 - 1), 100 * (9 / 12 - 1)))
    assert results.difference(one, base, 1)[0] == pytest.approx(100 * (6 / 8 - 1))
    chosen = np.array([True, False, False])
    assert results.difference(one, base, 0, chosen) == pytest.approx((-50, -50, -50))
    apart = np.concatenate([one, 2 * one])  # seeds that differ widen what two alike do not
    assert results.difference(apart, base)[1] < results.difference(1.5 * one, base)[1]
    assert results.difference(apart, apart) == pytest.approx((0, 0, 0))


def write_results(folder: Path, *trainings: tuple[str, int, float]) -> None:
    """Of two chunks of two documents: nats of each arm and seed."""
    folder.mkdir()
    leak = np.zeros(2, np.float32)
    names = np.array(["a/1", "b/1"])
    np.savez(folder / "evaluation.npz", documents=np.arange(2), names=names, r=leak, r_seen=leak)
    for arm, seed, nats in trainings:
        about = {"arm": arm, "seed": seed, "diverged": bool(np.isnan(nats)), "parameters": 1}
        about = json.dumps({**about, "flops_a_token": None})
        sizes = np.full((2, 2), 8)
        each = {"about": about, "bytes": sizes, "nats own": np.full((2, 2), nats)}
        np.savez(folder / f"{arm}-{seed}.npz", **each)


def test_a_training_that_diverged_is_told(tmp_path: Path) -> None:
    lost = float("nan")
    trainings = [
        ("none", 0, 3.0),
        ("random", 0, lost),
        ("retrieval", 0, 2.0),
        ("retrieval", 1, lost),
    ]
    write_results(tmp_path / "results", *trainings)
    tables = run_command(
        f"{sys.executable} {BENCHMARKS}/worth_report.py results --markdown", tmp_path
    )
    assert re.search(r"\| retrieval +\| 1 of 2 ", tables)
    assert re.search(r"\| random +\| 0 of 1 +\| - ", tables)
    assert "-33.33%" in tables
    assert re.search(r"\| retrieval, own +\| -33.3% +\| - ", tables)  # all in the first band
    report = runpy.run_path(str(BENCHMARKS / "worth_report.py"))
    with pytest.raises(RetroDataError, match=r"no training of random .* none, retrieval"):
        report["main"]([str(tmp_path / "results"), "--baseline", "random"])


def block_of_does_it_help(language: str) -> str:
    """The README's one block of a language in that section."""
    readme = (BENCHMARKS.parent / "README.md").read_text("utf-8")
    section = readme.split("## Does it help?\n", 1)[1].split("\n## ", 1)[0]
    (block,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return str(block)


def test_the_command_of_manuals_asks_for_what_its_table_shows() -> None:
    """That one takes hours on a CPU; here its settings are put together, and their names exist."""
    command = block_of_does_it_help("text").replace("\\\n", " ").split()
    assert command[:2] == ["python", "benchmarks/worth.py"]
    with initialize_config_dir(str(BENCHMARKS.parent / "configs"), version_base="1.3"):
        config = compose("worth", command[2:])
    assert {name: arm.seeds for name, arm in config.arms.items()} == {
        "retrieval": 5,
        "none": 5,
        "random": 3,
        "shuffled": 3,
        "none_same_parameters": 3,
        "none_same_flops": 3,
    }
    assert config.data.corpus.name == "manuals"
    assert "by_index" not in config.swaps


def experiment_commands(small: str) -> list[str]:
    """The README's, with a small corpus' own settings after theirs."""
    commands = (
        block_of_does_it_help("bash")
        .replace("python benchmarks", f"{sys.executable} {BENCHMARKS}")
        .splitlines()
    )
    options = {"chapters.py": "--share 0.2", "worth.py": small, "worth_report.py": ""}
    return [f"{c} {options[Path(c.split()[1]).name]}" for c in commands]


def run_command(command: str, folder: Path) -> str:
    run = subprocess.run(command.split(), capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@pytest.mark.slow
def test_the_experiment_trains_swaps_goes_on_and_reports(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    chapters = [
        {"id": f"{name}/{d['id']}", "text": f"{name} {d['text']}"}
        for name in ("kjv", "web")
        for d in make_documents(24, longest=200)
    ]
    write_jsonl(tmp_path / "bible.jsonl", chapters)
    swaps = ["no_neighbors", "random", "shuffled", "oracle", "without_chapters", "k1", "bm25"]
    small = (
        f"data.embedder.name={tiny_encoder} data.chunk_size=16 data.seq_len=64 data.batch_size=4 "
        "model.width=32 model.heads=2 model.layers=2 model.encoder_layers=1 precision=32-true "
        "model.cross_attention_layers=[2] epochs=1 compile=false swap_seeds=1 arms.random.seeds=0 "
        f"arms.retrieval.seeds=2 arms.retrieval.swaps=[{','.join(swaps)}] arms.none.seeds=1 "
        "arms.without_chapters.seeds=0 arms.oracle.seeds=0 arms.none_same_flops.seeds=0 "
        "arms.none_same_parameters.seeds=0"
    )
    cut_chapters, experiment, report = experiment_commands(small)
    run_command(cut_chapters, tmp_path)
    cut, results = tmp_path / "data" / "chapters", tmp_path / "outputs" / "worth" / "bible"
    parts = {
        name: [json.loads(line) for line in (cut / f"{name}.jsonl").read_text().splitlines()]
        for name in ("evaluated", "same", "rest")
    }
    evaluated = {d["id"].partition("/")[2] for d in parts["evaluated"]}
    assert sum(map(len, parts.values())) == len(chapters)
    assert {d["id"].partition("/")[2] for d in parts["same"]} <= evaluated
    assert not {d["id"].partition("/")[2] for d in parts["rest"]} & evaluated

    assert "3 trainings to run" in run_command(experiment, tmp_path)
    assert "0 trainings to run" in run_command(experiment, tmp_path)  # what is there, stays
    other = f"{experiment} model.learning_rate=1"
    refused = subprocess.run(other.split(), capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1
    assert "made with other settings (model)" in refused.stderr

    size = sum(len(d["text"].encode()) for d in parts["evaluated"])
    evaluations = {"retrieval-0": {"own", *swaps}, "retrieval-1": {"own"}, "none-0": {"own"}}
    assert {path.stem for path in results.iterdir()} == {"evaluation", *evaluations}
    for name, expected in evaluations.items():
        with np.load(results / f"{name}.npz") as found:
            nats = {n.removeprefix("nats "): found[n] for n in found.files if n.startswith("nats")}
            assert set(nats) == expected
            assert found["bytes"][0].sum() == size
            assert found["labels"][0].any()
        for one, other in itertools.combinations(nats, 2):  # no swap leaves the served alone
            apart = np.abs(nats[one][1] - nats[other][1]).max()
            assert apart > 1e-3, (name, one, other)
        sums = np.array([each.sum(1, dtype=float) for each in nats.values()])
        np.testing.assert_allclose(sums[:, 0] - sums[:, 1], sums[0, 0] - sums[0, 1], rtol=1e-4)
    tables = run_command(report, tmp_path)
    for name in (*swaps, "r_seen <= 12.5%", "kjv", "web"):
        assert f"| {name} " in tables
    for measure in ("r", "r_seen"):
        curves = (tmp_path / "outputs" / f"bible-{measure}.svg").read_text("utf-8")
        assert curves.count("<polyline") == curves.count("bits per byte") == 2
