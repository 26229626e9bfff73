"""Under real Trainers of both Lightnings: prepared once, every sample once, resumed exactly."""

from __future__ import annotations

import contextlib
import filecmp
import importlib
import inspect
import json
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_sampler import on_ranks

from retro_data import RetroData, pipeline
from retro_data.datamodule import POSITION, RetroDataModule
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError

pytestmark = pytest.mark.filterwarnings("ignore")

LIGHTNINGS = ("lightning.pytorch", "pytorch_lightning")
CHUNK, SEQ_LEN = 8, 32


# ---- a small corpus, prepared by the real pipeline -----------------------------------------------


def write_encoder(folder: Path) -> str:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{c}" for c in letters),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), intermediate_size=16, **sizes)
    BertModel(config).save_pretrained(folder)
    return str(folder)


def write_corpus(path: Path, documents: int = 40) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(50)]
    with path.open("w") as lines:
        for i in range(documents):
            text = " ".join(rng.choice(words, rng.integers(5, 60)))
            lines.write(json.dumps({"id": f"d{i}", "text": text}) + "\n")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of a RetroDataModule whose artifacts are there."""
    folder = tmp_path_factory.mktemp("datamodule")
    write_corpus(folder / "corpus.jsonl")
    given = {
        "root": str(folder / "root"),
        "corpus": {"name": "words", "path": str(folder / "corpus.jsonl")},
        "chunk_size": CHUNK,
        "tokenizer": {"vocab_size": 300},
        "splits": {"val": 0.15, "test": 0.15},
        "embedder": {"name": write_encoder(folder / "encoder")},
        "neighbors": {"num_stored": 4},
        "seq_len": SEQ_LEN,
        "batch_size": 8,
    }
    pipeline.prepare(RetroDataModule(**given).settings(), InlineEngine())
    return given


def test_the_data_without_the_hooks_is_the_same(arguments: dict[str, Any]) -> None:
    data, datamodule = RetroData(**arguments), RetroDataModule(**arguments)
    assert not hasattr(data, "trainer")
    assert inspect.signature(RetroData) == inspect.signature(RetroDataModule)
    assert data.settings() == datamodule.settings()
    data.prepare_data()
    for split in ("train", "val"):
        ours, theirs = (d.dataset(split).__getitems__([1, 0]) for d in (data, datamodule))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (data.vocab_size, data.eos_id) == (datamodule.vocab_size, datamodule.eos_id)


def test_what_is_prepared_again_is_opened_again(arguments: dict[str, Any], tmp_path: Path) -> None:
    """Of a corpus that has grown."""
    corpus, root = tmp_path / "corpus.jsonl", tmp_path / "root"
    write_corpus(corpus, documents=30)
    data = RetroData(
        **{**arguments, "root": root, "corpus": {"name": "words", "path": str(corpus)}},
        engine={"workers": 1},
    )
    sizes = []
    for documents in (30, 60):
        write_corpus(corpus, documents)
        data.prepare_data()
        sizes.append(len(data.dataset("train")))
    assert sizes[0] < sizes[1]


# ---- models and Trainers that remember -----------------------------------------------------------


def make_model(lightning: Any, **behaviour: Any) -> Any:
    class Recorder(lightning.LightningModule):
        """Remembers the first chunk of each sequence, which names it, of each batch."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[list[int]] = []
            self.evaluated: list[list[int]] = []

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            if len(self.seen) == behaviour.get("fail_at"):
                raise ZeroDivisionError
            self.seen.append(batch["chunk_ids"][:, 0].tolist())
            return self.weight * 1

        def _evaluate(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.evaluated.append(batch["chunk_ids"][:, 0].tolist())
            return batch["chunk_ids"]

        validation_step = test_step = predict_step = _evaluate

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if behaviour.get("estimate"):
                assert self.trainer.estimated_stepping_batches > 0
            return torch.optim.SGD(self.parameters(), 0.1)

    return Recorder()


def make_saver(lightning: Any, hook: str, count: int, path: str) -> Any:
    """A callback that saves a checkpoint the `count`-th time that `hook` is called."""

    class Saver(lightning.Callback):
        calls = 0

    def save(self: Any, trainer: Any, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls == count:
            trainer.save_checkpoint(path)

    setattr(Saver, hook, save)
    return Saver()


def make_trainer(lightning: Any, callback: Any = None, **options: Any) -> Any:
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "num_sanity_val_steps": 0}
    callbacks = [callback] if callback else []
    return lightning.Trainer(
        callbacks=callbacks, **{**dict.fromkeys(quiet, False), **defaults, **options}
    )


def fit(
    arguments: dict[str, Any],
    lightning: Any = None,
    *,
    kind: type[RetroDataModule] = RetroDataModule,
    checkpoint: str | None = None,
    callback: Any = None,
    behaviour: dict[str, Any] | None = None,
    **options: Any,
) -> list[list[int]]:
    """Train in a new process' place: new Trainer, model and DataModule. The batches it saw."""
    lightning = lightning or importlib.import_module(LIGHTNINGS[0])
    model = make_model(lightning, **(behaviour or {}))
    trainer = make_trainer(lightning, callback, **options)
    with contextlib.suppress(ZeroDivisionError):
        trainer.fit(model, datamodule=kind(**arguments), ckpt_path=checkpoint)
    return model.seen


@pytest.fixture(params=LIGHTNINGS)
def lightning(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def whole(arguments: dict[str, Any]) -> list[list[int]]:
    """Two epochs without an interruption."""
    return fit(arguments)


@pytest.fixture(scope="module")
def steps(whole: list[list[int]]) -> int:
    """Batches of an epoch."""
    assert len(whole) % 2 == 0
    assert len(whole) >= 12
    return len(whole) // 2


@pytest.fixture(scope="module")
def inside(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint after three batches of the first epoch."""
    lightning = importlib.import_module(LIGHTNINGS[0])
    path = str(tmp_path_factory.mktemp("checkpoints") / "inside.ckpt")
    fit(arguments, callback=make_saver(lightning, "on_train_batch_end", 3, path), max_epochs=1)
    return path


# ---- the way of the hooks ------------------------------------------------------------------------


def test_it_works_without_a_trainer(arguments: dict[str, Any]) -> None:
    data = RetroDataModule(**arguments)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (8, SEQ_LEN)
    assert batch["neighbor_tokens"].shape == (8, SEQ_LEN // CHUNK, 2, 2 * CHUNK)
    for name, dtype in (("labels", torch.int64), ("neighbor_mask", torch.bool)):
        assert batch[name].dtype == dtype
    assert data.pad_id == data.vocab_size == len(data.bytes_per_token)
    assert data.eos_id is not None
    assert data.eos_id < data.vocab_size
    assert data.chunk_size == CHUNK


def test_every_sequence_is_trained_on_once_an_epoch(
    arguments: dict[str, Any], whole: list[list[int]], steps: int
) -> None:
    first = RetroDataModule(**arguments).dataset("train").plan.first.tolist()
    for epoch in (whole[:steps], whole[steps:]):
        assert sorted(i for batch in epoch for i in batch if i >= 0) == sorted(first)
    assert whole[:steps] != whole[steps:]


def test_both_lightnings_fit_evaluate_predict_and_load(
    lightning: Any, arguments: dict[str, Any], whole: list[list[int]], tmp_path: Path
) -> None:
    model, data = make_model(lightning), RetroDataModule(**arguments)
    trainer = make_trainer(lightning)
    trainer.fit(model, datamodule=data)
    assert model.seen == whole
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for split, run in (
        ("val", trainer.validate),
        ("test", trainer.test),
        ("test", trainer.predict),
    ):
        model.evaluated.clear()
        run(model, datamodule=data)
        read = [i for batch in model.evaluated for i in batch if i >= 0]
        assert read == data.dataset(split).plan.first.tolist(), run
    again = RetroDataModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert dict(again.hparams) == dict(data.hparams)


def test_workers_change_nothing(arguments: dict[str, Any], whole: list[list[int]]) -> None:
    assert fit({**arguments, "num_workers": 1}) == whole


def test_under_a_trainer_preparation_uses_its_devices(
    lightning: Any, arguments: dict[str, Any]
) -> None:
    data = RetroDataModule(**arguments, engine={"workers": 1})
    assert data.settings().engine.devices is None
    make_trainer(lightning, max_epochs=0).fit(make_model(lightning), datamodule=data)
    assert data.settings().engine.devices == ()
    assert data.settings().engine.workers == 1


# ---- preparing -----------------------------------------------------------------------------------


def test_verify_builds_nothing_and_names_the_command(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    data = RetroDataModule(**{**arguments, "root": tmp_path / "new", "prepare": "verify"})
    with pytest.raises(RetroDataError, match="retro-data prepare"):
        data.prepare_data()
    with pytest.raises(RetroDataError, match="retro-data prepare"):
        _ = data.vocab_size
    assert not (tmp_path / "new").exists()
    RetroDataModule(**{**arguments, "prepare": "verify"}).prepare_data()


def test_auto_only_verifies_where_root_is_read_only(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(arguments["corpus"]["path"]).read_bytes())
    gone = {**arguments, "corpus": {"name": "words", "path": str(moved)}}
    pipeline.prepare(RetroDataModule(**gone).settings(), InlineEngine())  # same bytes: all is there
    moved.unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod does not stop root
    RetroDataModule(**gone).prepare_data()
    with pytest.raises(RetroDataError, match="moved"):
        RetroDataModule(**gone, prepare="build").prepare_data()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "best"}, "mode='best'; expected one of document, packed"),
        ({"mixture": {"wordz": 1}}, r"mixture names \['wordz'\]; the corpora are \['words'\]"),
        ({"mixture": 0.5}, "mixture=0.5: expected corpus: share"),
    ],
)
def test_a_way_of_reading_that_cannot_be_is_refused_before_preparing(
    arguments: dict[str, Any], setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(RetroDataError, match=message):
        RetroDataModule(**{**arguments, **setting})


def test_unknown_settings_are_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(RetroDataError, match=r"unknown setting neighbors.num_neighbors"):
        RetroDataModule(**{**arguments, "neighbors": {"num_neighbors": 4}})
    with pytest.raises(RetroDataError, match="prepare='yes'"):
        RetroDataModule(**arguments, prepare="yes")


def test_a_split_without_documents(lightning: Any, arguments: dict[str, Any]) -> None:
    """No validation in a fit; an error where the split is asked for."""
    trainer, model = make_trainer(lightning, max_epochs=1), make_model(lightning)
    data = RetroDataModule(**{**arguments, "splits": {"val": 0.0, "test": 0.0}})
    pipeline.prepare(data.settings(), InlineEngine())
    trainer.fit(model, datamodule=data)
    assert model.seen
    assert not model.evaluated
    for run, split in ((trainer.validate, "val"), (trainer.test, "test")):
        with pytest.raises(RetroDataError, match=f"splits.{split}"):
            run(model, datamodule=data)


# ---- arguments -----------------------------------------------------------------------------------


def test_omegaconf_arguments_are_saved_as_plain_values(
    lightning: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    from omegaconf import OmegaConf

    config = OmegaConf.create({**arguments, "database": {"splits": ["train", "database"]}})
    data = RetroDataModule(**config)  # type: ignore[arg-type]
    assert type(data.hparams["corpus"]) is dict
    assert type(data.hparams["database"]) is dict
    trainer = make_trainer(lightning, max_epochs=1)
    trainer.fit(make_model(lightning), datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["datamodule_hyper_parameters"]["corpus"] == arguments["corpus"]


def test_paths_are_as_seen_from_where_hydra_was_started(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    hydra = {"runtime": {"cwd": str(tmp_path)}, "job": {"chdir": True}}
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": hydra}))
    corpora = [
        {"name": "a", "path": "corpora/a.txt"},
        {"name": "b", "path": "s3://bucket/b"},
        {"name": "c", "path": "org/hub", "format": "huggingface"},
        {"name": "d", "path": "/data/d"},
    ]
    data = RetroDataModule(**{**arguments, "root": "root", "corpus": corpora})
    assert data.root == data.hparams["root"] == str(tmp_path / "root")
    expected = [str(tmp_path / "corpora/a.txt"), "s3://bucket/b", "org/hub", "/data/d"]
    assert [corpus["path"] for corpus in data.hparams["corpus"]] == expected


# ---- resuming ------------------------------------------------------------------------------------

ITERATION = {"max_epochs": -1, "max_steps": 12}


@pytest.mark.parametrize(
    ("hook", "count", "options"),
    [
        ("on_train_batch_end", 2, {}),
        ("on_train_batch_end", "steps", {}),
        ("on_train_batch_end", "steps + 1", {}),
        ("on_train_epoch_end", 1, {}),
        ("on_validation_end", 1, {}),
        ("on_validation_end", 1, {"val_check_interval": 2}),
        ("on_train_batch_end", 2, {"accumulate_grad_batches": 2}),
        ("on_train_batch_end", 2, {"limit_train_batches": 3}),
        ("on_train_epoch_end", 1, {"limit_train_batches": 3}),
        ("on_train_batch_end", 2, {"reload_dataloaders_every_n_epochs": 1}),
        ("on_train_batch_end", "steps + 1", {"behaviour": {"estimate": True}}),
        ("on_train_batch_end", 2, ITERATION),
        ("on_train_end", 1, ITERATION),
        ("on_exception", 1, {"behaviour": {"fail_at": 3}}),
    ],
)
def test_a_resumed_run_sees_exactly_what_is_left(
    arguments: dict[str, Any],
    steps: int,
    tmp_path: Path,
    hook: str,
    count: int | str,
    options: dict[str, Any],
) -> None:
    """Whatever saved the checkpoint, and whatever the Trainer makes of epochs."""
    lightning = importlib.import_module(LIGHTNINGS[0])
    path = str(tmp_path / "a.ckpt")
    count = {"steps": steps, "steps + 1": steps + 1}.get(count, count)  # type: ignore[call-overload]
    uninterrupted = fit(arguments, **{**options, "behaviour": None})
    first = dict(options)
    if hook == "on_train_end":  # stopped inside an epoch, to be trained for longer
        first["max_steps"] = 4
    fit(arguments, callback=make_saver(lightning, hook, count, path), **first)
    state = torch.load(path, weights_only=True)[RetroDataModule.__qualname__]
    epoch = min(steps, options.get("limit_train_batches", steps))
    done = state["epoch"] * epoch + state["samples"] // 8
    assert 0 < done < len(uninterrupted)
    second = {**options, "behaviour": {**options.get("behaviour", {}), "fail_at": None}}
    assert fit(arguments, checkpoint=path, **second) == uninterrupted[done:]


def test_both_lightnings_resume(
    lightning: Any, arguments: dict[str, Any], whole: list[list[int]], inside: str
) -> None:
    assert fit(arguments, lightning, checkpoint=inside) == whole[3:]


@pytest.mark.parametrize("estimate", [False, True])
def test_a_strategy_that_restores_late_resumes(
    lightning: Any, arguments: dict[str, Any], whole: list[list[int]], inside: str, estimate: bool
) -> None:
    """As FSDP does: the position comes after the optimizers, which may have asked for the loader."""
    package = lightning.__name__
    strategies = importlib.import_module(f"{package}.strategies")

    class Late(strategies.SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    behaviour = {"estimate": estimate}
    options = {"checkpoint": inside, "behaviour": behaviour, "strategy": Late(device="cpu")}
    assert fit(arguments, lightning, **options) == whole[3:]


def test_an_epoch_that_the_trainer_left_is_not_taken_up_again(
    arguments: dict[str, Any], whole: list[list[int]], steps: int, tmp_path: Path
) -> None:
    lightning = importlib.import_module(LIGHTNINGS[0])

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    assert fit(arguments, callback=Stop()) == whole[:1]
    assert fit(arguments, checkpoint=str(tmp_path / "a.ckpt")) == whole[steps:]


def test_a_second_fit_starts_at_the_beginning(
    lightning: Any, arguments: dict[str, Any], whole: list[list[int]], inside: str
) -> None:
    data = RetroDataModule(**arguments)
    for checkpoint, expected in ((inside, whole[3:]), (None, whole)):
        model = make_model(lightning)
        make_trainer(lightning).fit(model, datamodule=data, ckpt_path=checkpoint)
        assert model.seen == expected


class Derived(RetroDataModule):
    """A subclass, which Lightning saves and restores under another name."""


def test_the_position_passes_between_a_class_and_its_subclass(
    lightning: Any, arguments: dict[str, Any], whole: list[list[int]], inside: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "derived.ckpt")
    saver = make_saver(lightning, "on_train_batch_end", 1, path)
    assert fit(arguments, lightning, kind=Derived, checkpoint=inside, callback=saver) == whole[3:]
    assert fit(arguments, lightning, kind=Derived, checkpoint=path) == whole[4:]
    assert fit(arguments, lightning, checkpoint=path) == whole[4:]


def test_another_order_of_samples_is_refused_while_fitting_only(
    lightning: Any, arguments: dict[str, Any], inside: str
) -> None:
    other = {**arguments, "seed": 1, "seq_len": 2 * SEQ_LEN}
    with pytest.raises(RetroDataError, match=f"seq_len={SEQ_LEN}, seed=0.*seq_len=64, seed=1"):
        fit(other, lightning, checkpoint=inside)
    trainer, model, data = make_trainer(lightning), make_model(lightning), RetroDataModule(**other)
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(model, datamodule=data, ckpt_path=inside)
    assert model.evaluated


def test_packed_sequences_and_mixtures_resume(arguments: dict[str, Any], tmp_path: Path) -> None:
    """Two corpora in other shares than their sizes, in sequences that documents share."""
    write_corpus(tmp_path / "other.jsonl", documents=15)
    corpora = [arguments["corpus"], {"name": "other", "path": str(tmp_path / "other.jsonl")}]
    mixed = {
        **arguments,
        "root": str(tmp_path / "root"),
        "corpus": corpora,
        "mode": "packed",
        "mixture": {"words": 1, "other": 2},
        "batch_size": 4,
    }
    pipeline.prepare(RetroDataModule(**mixed).settings(), InlineEngine())
    whole = fit(mixed)
    lightning = importlib.import_module(LIGHTNINGS[0])
    path = str(tmp_path / "a.ckpt")
    fit(mixed, callback=make_saver(lightning, "on_train_batch_end", len(whole) // 2 + 2, path))
    state = torch.load(path, weights_only=True)["RetroDataModule"]
    assert (state["epoch"], state["samples"]) == (1, 8)
    data = RetroDataModule(**mixed)
    border = len(data.prepared.corpora[0].chunks)
    seen = [i for batch in whole[: len(whole) // 2 + 2] for i in batch if i >= 0]
    of_words = sum(i < border for i in seen)
    assert state["samples_of_corpora"] == {"words": of_words, "other": len(seen) - of_words}
    assert of_words / len(seen) == pytest.approx(1 / 3, abs=0.1)
    assert fit(mixed, checkpoint=path) == whole[len(whole) // 2 + 2 :]
    evenly = {**mixed, "mixture": {"words": 1, "other": 1}}
    with pytest.raises(RetroDataError, match=r"mixture=\{'words': 1, 'other': 2\}"):
        fit(evenly, checkpoint=path)


def test_other_data_is_refused(arguments: dict[str, Any], inside: str) -> None:
    other = {**arguments, "splits": {"val": 0.0, "test": 0.0}}
    pipeline.prepare(RetroDataModule(**other).settings(), InlineEngine())
    with pytest.raises(RetroDataError, match=r"data=.*this DataModule has data="):
        fit(other, checkpoint=inside)


def test_another_global_batch_size_is_refused_inside_an_epoch(
    arguments: dict[str, Any], steps: int, inside: str, tmp_path: Path
) -> None:
    smaller = {**arguments, "batch_size": 4}
    with pytest.raises(RetroDataError, match=r"size of 8; this run's is 4: .* global_batch_size=8"):
        fit(smaller, checkpoint=inside)
    assert fit({**smaller, "global_batch_size": 8}, checkpoint=inside)
    lightning = importlib.import_module(LIGHTNINGS[0])
    path = str(tmp_path / "end.ckpt")
    fit(arguments, callback=make_saver(lightning, "on_train_epoch_end", 1, path), max_epochs=1)
    assert len(fit(smaller, checkpoint=path)) > steps


def test_a_lost_position_is_an_error_with_both_numbers(
    arguments: dict[str, Any], inside: str, tmp_path: Path
) -> None:
    checkpoint = torch.load(inside, weights_only=True)
    assert POSITION in checkpoint.pop("RetroDataModule")
    torch.save(checkpoint, tmp_path / "lost.ckpt")
    with pytest.raises(RetroDataError, match=r"at 0 global samples .* 3 batches .* is 24"):
        fit(arguments, checkpoint=str(tmp_path / "lost.ckpt"))


def test_a_loop_of_ones_own_resumes_too(arguments: dict[str, Any]) -> None:
    def loader(data: RetroDataModule) -> Any:
        data.setup("fit")
        return data.train_dataloader()

    batches = [batch["chunk_ids"].tolist() for batch in loader(RetroDataModule(**arguments))]
    data = RetroDataModule(**arguments)
    for _, batch in zip(range(3), loader(data), strict=False):
        assert batch["chunk_ids"].tolist() in batches
    state = data.state_dict()
    assert state["samples"] == 24
    again = RetroDataModule(**arguments)
    again.setup("fit")
    again.load_state_dict(state)
    resumed = [batch["chunk_ids"].tolist() for batch in again.train_dataloader()]
    assert resumed == batches[3:]


def test_a_datamodule_can_be_pickled(arguments: dict[str, Any]) -> None:
    data = RetroDataModule(**arguments)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    again = pickle.loads(pickle.dumps(data))
    assert len(again.dataset("train")) == len(data.dataset("train"))


# ---- two real ranks ------------------------------------------------------------------------------


def on_one_rank(arguments: dict[str, Any], broken: dict[str, Any], checkpoint: str) -> Any:
    """Resume what one rank began, validating after the epoch; then do two things that must fail."""
    lightning = importlib.import_module(LIGHTNINGS[0])

    def trainer() -> Any:
        return make_trainer(lightning, strategy="ddp", devices=2, max_epochs=1)

    early = RetroDataModule(**arguments).train_dataloader()  # before there are ranks
    model = make_model(lightning)
    trainer().fit(model, datamodule=RetroDataModule(**arguments), ckpt_path=checkpoint)
    failures = []
    for data in ({"datamodule": RetroDataModule(**broken)}, {"train_dataloaders": early}):
        try:
            trainer().fit(make_model(lightning), **data)
        except RetroDataError:
            failures.append(traceback.format_exc())
    return model.seen, model.evaluated, failures


@pytest.fixture(scope="module")
def two_ranks(
    arguments: dict[str, Any], inside: str, tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    shared = {**arguments, "global_batch_size": 8}
    broken = {**arguments, "root": str(folder / "new"), "prepare": "verify"}
    answers = on_ranks(2, on_one_rank, folder, shared, broken, inside)
    assert all(isinstance(answer, tuple) for answer in answers), answers
    return answers


def test_two_ranks_go_on_where_one_stopped(
    two_ranks: list[Any], whole: list[list[int]], steps: int
) -> None:
    first, second = (seen for seen, _, _ in two_ranks)
    assert all(len(batch) == 4 for batch in first + second)
    together = [sorted(a + b) for a, b in zip(first, second, strict=True)]
    assert together == [sorted(batch) for batch in whole[3:steps]]


def test_two_ranks_evaluate_each_sample_once(
    two_ranks: list[Any], arguments: dict[str, Any]
) -> None:
    first, second = (evaluated for _, evaluated, _ in two_ranks)
    assert len(first) == len(second)
    evaluated = [i for batch in first + second for i in batch if i >= 0]
    expected = RetroDataModule(**arguments).dataset("val").plan.first.tolist()
    assert sorted(evaluated) == sorted(expected)


def test_a_failure_to_prepare_is_raised_on_all_ranks_with_its_cause(two_ranks: list[Any]) -> None:
    for _, _, failures in two_ranks:
        assert "prepare_data failed on rank 0" in failures[0]
        assert "holds no data prepared with these settings" in failures[0]


def test_a_loader_made_for_one_process_is_refused_by_two(two_ranks: list[Any]) -> None:
    for _, _, failures in two_ranks:
        assert "made for 1 process, and is read by 2" in failures[1]


# ---- killed, and resumed on other numbers of ranks and workers -----------------------------------


def start_run(folder: Path, arguments: dict[str, Any], devices: int = 1, **given: Any) -> int:
    """A training run in processes of its own; returns its exit code."""
    script = Path(__file__).with_name("resumed_run.py")
    told = {"folder": str(folder), "arguments": arguments, "devices": devices, **given}
    launch = [sys.executable]
    if devices > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    ran = subprocess.run(
        [*launch, script, json.dumps(told)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        capture_output=True,
        timeout=120,
    )
    assert given.get("kill_at") or ran.returncode == 0, ran.stderr[-3000:]
    return ran.returncode


def global_batches(folder: Path) -> list[list[int]]:
    """The samples of each step of a run, of all its ranks."""
    ranks = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("order-*.jsonl"))
    ]
    return [
        sorted(i for share in step for i in share if i >= 0) for step in zip(*ranks, strict=True)
    ]


def write_order(path: Path, batches: list[list[int]]) -> Path:
    path.write_text("".join(f"{batch}\n" for batch in batches))
    return path


@pytest.mark.slow
def test_killed_runs_resume_to_the_sample_on_other_ranks_and_workers(
    arguments: dict[str, Any], whole: list[list[int]], steps: int, tmp_path: Path
) -> None:
    """One order, in files: a run left alone, and one killed in each epoch and at the border."""
    given = {**arguments, "global_batch_size": 8}
    chain = [  # ranks, workers, and in which step of the whole the run is killed
        (1, 0, 3),
        (2, 0, steps),
        (1, 2, steps + 3),
        (2, 2, None),
    ]
    resumed: list[list[int]] = []
    checkpoint, done = None, 0
    for number, (ranks, workers, kill_at) in enumerate(chain):
        folder = tmp_path / f"part-{number}"
        code = start_run(
            folder,
            {**given, "num_workers": workers},
            ranks,
            checkpoint=checkpoint,
            kill_at=None if kill_at is None else kill_at - done,
        )
        assert (code == 0) == (kill_at is None)
        batches = global_batches(folder)
        assert done + len(batches) == (kill_at or len(whole))
        resumed[done:] = batches  # steps after the last checkpoint are made again
        checkpoint = str(folder / "last.ckpt")
        state = torch.load(checkpoint, weights_only=True)
        done = state["global_step"]
        position = state["RetroDataModule"]
        assert done == position["epoch"] * steps + position["samples"] // 8
    alone = [sorted(i for i in batch if i >= 0) for batch in whole]
    a, b = (write_order(tmp_path / f"{n}.txt", o) for n, o in (("a", alone), ("b", resumed)))
    assert filecmp.cmp(a, b, shallow=False)
