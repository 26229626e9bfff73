"""Do neighbors help a language model? Trains it in several ways and evaluates with swapped neighbors.

    python benchmarks/worth.py experiment=manuals data.corpus.path=manuals.jsonl.zst
    python benchmarks/worth_report.py outputs/worth/manuals

`configs/experiment/` says what: each *arm* is trained from several seeds, on its
corpus' neighbors or on others in their place (a *control*), and each *swap* evaluates an arm with
something else in the place of what it was trained on. One training at a time runs on each GPU. What is
in `folder` is not made again, so the command may be killed and started anew.

Written for each training are its size and speed, and for every evaluation the nats of each evaluated
chunk: the label's chunk (Borgeaud et al. 2021, section 2.6). All figures follow from these.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, cast

import hydra
import numpy as np
import torch
from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from retro_data import RetroDataError, RetroDataModule, RetroLM
from retro_data.database import DatabasePlace
from retro_data.leakage_curve import chunks_of_labels
from retro_data.neighbors import NeighborStage
from retro_data.pipeline import Prepared, steps
from retro_data.retro_lm import Attention, Layer, neighbor_slots, score_terms, token_nats
from retro_data.splits import SPLITS

log = logging.getLogger("worth")

Array = np.ndarray[Any, Any]
Config = dict[str, Any]

OWN = "own"  # the evaluation with what an arm was trained on
EVALUATION = "evaluation.npz"
CONTROL_SEED = 20211208
WIDTH = 8  # of the lists of controls


@hydra.main(version_base="1.3", config_path="../configs", config_name="worth")
def main(config: DictConfig) -> None:
    plain = cast(Config, OmegaConf.to_container(config, resolve=True))
    plain["data"]["corpus"] = plain["corpora"] or plain["data"]["corpus"]
    folder = Path(hydra.utils.to_absolute_path(plain["folder"]))
    folder.mkdir(parents=True, exist_ok=True)
    for data in _data_of_all(plain):
        _datamodule(plain, data, prepare="auto").prepare_data()
    _write_evaluation(plain, folder)
    jobs = [job for job in _jobs(plain) if not _is_there(plain, *job, folder)]
    log.info("%d trainings to run in %s", len(jobs), folder)
    _run_all(plain, jobs, folder)


# ---- what there is to do -------------------------------------------------------------------------


def _jobs(config: Config) -> list[tuple[str, int]]:
    """Arms and seeds, the first seed of every arm first."""
    arms = config["arms"]
    most = max(arm["seeds"] for arm in arms.values())
    return [(name, seed) for seed in range(most) for name, a in arms.items() if seed < a["seeds"]]


def _settings_of(config: Config, arm: str) -> Config:
    """All that the results of an arm depend on, but its seed and the version of the data's code."""
    given = config["arms"][arm]
    data = _merged(config["data"], given.get("data", {}))
    return {
        "data": {k: v for k, v in data.items() if k not in ("root", "engine", "prepare")},
        "model": _merged(config["model"], given.get("model", {})),
        "revision": RetroLM.REVISION,
        "swaps": _swaps_of(config, arm),
        **{name: config[name] for name in ("epochs", "warmup", "precision", "split")},
    }


def _is_there(config: Config, arm: str, seed: int, folder: Path) -> bool:
    path = folder / f"{_title(arm, seed)}.npz"
    if not path.exists():
        return False
    with np.load(path) as found:
        settings = json.loads(str(found["about"]))["settings"]
    other = [k for k, v in _settings_of(config, arm).items() if settings.get(k) != v]
    if other:
        raise RetroDataError(
            f"{path} was made with other settings ({', '.join(other)}): remove it, or choose "
            "another `folder`."
        )
    return True


def _title(arm: str, seed: int) -> str:
    return f"{arm}-{seed}"


def _swaps_of(config: Config, arm: str) -> dict[str, Config]:
    """Evaluations of an arm, by name: of its own data, but for what a swap replaces."""
    given = config["arms"][arm]
    if not given.get("model", {}).get("retrieval", True):
        return {OWN: {}}  # nothing to swap
    names = given.get("swaps", ["no_neighbors"])
    data = given.get("data", {})
    swaps = {OWN: {"control": given.get("control")}}
    for name in config["swaps"] if names == "all" else names:
        swaps[name] = config["swaps"][name]
    return {n: {**s, "data": _merged(data, s.get("data", {}))} for n, s in swaps.items()}


def _merged(*parts: Config) -> Config:
    return cast(Config, OmegaConf.to_container(OmegaConf.merge(*parts)))


def _data_of_all(config: Config) -> list[Config]:
    """What is to be prepared: the data of every arm and swap that is used, each once."""
    found: list[Config] = [{}]
    for name, arm in config["arms"].items():
        if arm["seeds"]:
            swaps = _swaps_of(config, name).values()
            found += [swap.get("data", {}) for swap in (arm, *swaps)]
    return [data for i, data in enumerate(found) if data not in found[:i]]


def _run_all(config: Config, jobs: Sequence[tuple[str, int]], folder: Path) -> None:
    """`processes` for each GPU, or for the CPU; each takes the next training."""
    devices = [*range(max(1, torch.cuda.device_count()))] * config["processes"]
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    minutes = config["minutes"]
    until = float("inf") if minutes is None else time.time() + 60 * minutes
    with ProcessPoolExecutor(len(devices), context, _start_worker, (free,)) as pool:
        made: list[Future[str]] = [pool.submit(_run, config, *job, folder, until) for job in jobs]
        for done in as_completed(made):
            log.info("%s", done.result())


def _start_worker(free: Any) -> None:
    logging.basicConfig(level=logging.WARNING)
    device = str(free.get())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(device)] if visible else device


# ---- data ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GivenLists:
    """Lists that stand in the place of stored neighbors."""

    ids: Array


class ControlledDataModule(RetroDataModule):
    """A DataModule with other lists in the place of the neighbors that were found."""

    control: str | None = None
    _prepared: Prepared | None

    @property
    def prepared(self) -> Prepared:
        is_open = self._prepared
        prepared: Prepared = is_open or super().prepared
        if is_open is None and self.control is not None:
            prepared = self._prepared = _controlled(prepared, self.control, self._database())
        return prepared

    def _database(self) -> DatabasePlace:
        stages = [s.stage for s in steps(self.settings()) if s.stage.name == "neighbors"]
        return cast(NeighborStage, stages[0]).database


def _datamodule(
    config: Config, data: Config, control: str | None = None, seed: int = 0, prepare: str = "verify"
) -> ControlledDataModule:
    given = {k: v for k, v in _merged(config["data"], data).items() if not k.startswith("_")}
    datamodule = ControlledDataModule(**{**given, "seed": seed, "prepare": prepare})
    datamodule.control = control
    return datamodule


def _controlled(prepared: Prepared, control: str, place: DatabasePlace) -> Prepared:
    database = place.open()
    corpora = []
    for number, corpus in enumerate(prepared.corpora):
        if corpus.neighbors is not None:
            keys = corpus.chunks.documents.keys[corpus.chunks.document_of_chunk]
            own = database.rows_of_documents(keys)
            found = np.asarray(corpus.neighbors.ids[:, :WIDTH])
            rng = np.random.default_rng([CONTROL_SEED, number])
            ids = control_lists(control, found, own, np.flatnonzero(database.admitted), rng)
            if control == "oracle":  # the next chunk may be of the next document
                document = corpus.chunks.document_of_chunk
                ids[:-1][document[1:] != document[:-1]] = -1
            corpus = dataclasses.replace(corpus, neighbors=cast(Any, GivenLists(ids)))
        corpora.append(corpus)
    return dataclasses.replace(prepared, corpora=tuple(corpora))


def control_lists(
    control: str, found: Array, own: Array, admitted: Array, rng: np.random.Generator
) -> Array:
    """(N, K) rows in the place of those found: never of the query's own document.

    Args:
        control: "random", "shuffled" or "oracle"; `configs/experiment/base.yaml` says what they are.
        found: (N, K).
        own: (N, 2) rows [lo, hi) of each query's own document.
        admitted: rows of the database.
    """
    if control == "random":
        ids = rng.choice(admitted, (len(found), 2 * found.shape[1])).astype(found.dtype)
    elif control == "shuffled":
        ids = found[rng.permutation(len(found))]
    elif control == "oracle":
        ids = np.concatenate([found[1:], np.full_like(found[:1], -1)])
    else:
        raise RetroDataError(f"control={control!r}: expected random, shuffled or oracle.")
    keep = (ids >= 0) & ~((ids >= own[:, :1]) & (ids < own[:, 1:]))
    order = np.argsort(~keep, axis=1, kind="stable")
    kept = np.take_along_axis(np.where(keep, ids, -1), order, 1)[:, : found.shape[1]]
    return np.ascontiguousarray(kept)


def _write_evaluation(config: Config, folder: Path) -> None:
    """What is evaluated: each chunk's document, the source that its id names, and its leakage."""
    datamodule = _datamodule(config, {})
    chunks: list[Array] = []
    documents: list[Array] = []
    names: list[str] = []
    r: list[Array] = []
    r_seen: list[Array] = []
    first_document = 0
    for rows, corpus, start in _evaluated(datamodule, config["split"]):
        document = corpus.chunks.document_of_chunk[rows]
        present, place = np.unique(document, return_inverse=True)
        chunks.append(start + rows)
        documents.append(first_document + place)
        names += [corpus.chunks.documents.id(int(d)) for d in present]
        first_document += len(present)
        table = corpus.leakage
        if table is None:
            raise RetroDataError("the leakage of what is evaluated was not measured: prepare it.")
        at = np.searchsorted(table.rows, rows)
        for found, longest in ((r, table.own), (r_seen, table.seen[:, : datamodule.num_neighbors])):
            found.append(longest[at].max(1, initial=0) / np.maximum(table.real_tokens[at], 1))
    np.savez(
        folder / EVALUATION,
        chunks=np.concatenate(chunks),
        documents=np.concatenate(documents),
        names=np.array(names),
        r=np.concatenate(r).astype(np.float32),
        r_seen=np.concatenate(r_seen).astype(np.float32),
    )


def _evaluated(datamodule: RetroDataModule, split: str) -> Iterator[tuple[Array, Any, int]]:
    """Of each corpus: rows of its evaluated chunks, itself, and the first of its chunk ids."""
    start = 0
    for corpus in datamodule.prepared.corpora:
        is_evaluated = corpus.split_of_document == SPLITS.index(split)
        rows = np.flatnonzero(is_evaluated[corpus.chunks.document_of_chunk])
        if len(rows):
            yield rows, corpus, start
        start += len(corpus.chunks)


# ---- one training --------------------------------------------------------------------------------


def _run(config: Config, arm: str, seed: int, folder: Path, until: float) -> str:
    title = _title(arm, seed)
    if time.time() > until:
        return f"{title}: left, for want of time"
    given = config["arms"][arm]
    began = time.monotonic()
    datamodule = _datamodule(config, given.get("data", {}), given.get("control"), seed)
    epoch = len(datamodule.dataset("train")) // datamodule.batch_size
    num_steps = round(config["epochs"] * epoch)
    seed_everything(seed)
    model = RetroLM.from_datamodule(
        datamodule,
        **config["model"] | given.get("model", {}),
        warmup_steps=round(config["warmup"] * num_steps),
        decay_steps=num_steps,
    )
    if config["compile"]:
        _compile(model)
    trainer = _trainer(config, num_steps)
    trained = time.monotonic()
    trainer.fit(model, datamodule=datamodule)
    trained = time.monotonic() - trained
    arrays = {}
    swaps = _swaps_of(config, arm)
    for name, swap in swaps.items() if seed < config["swap_seeds"] else [(OWN, swaps[OWN])]:
        scores = _score(config, model, swap)
        arrays[f"nats {name}"] = scores[:, 0].astype(np.float32)
        if name == OWN:
            arrays["labels"], arrays["bytes"] = scores[:, 1:].swapaxes(0, 1).astype(np.int32)
    tokens = num_steps * datamodule.batch_size * datamodule.seq_len
    about = {
        "arm": arm,
        "seed": seed,
        "settings": _settings_of(config, arm),
        "diverged": not all(np.isfinite(array).all() for array in arrays.values()),
        "steps": num_steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_a_token": _flops_a_token(model, datamodule),
        "tokens": tokens,
        "tokens_a_second": round(tokens / trained),
        "seconds": round(time.monotonic() - began, 1),
        "loss": float(trainer.callback_metrics["train/loss"]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    temporary = folder / f".{title}.npz"
    np.savez(temporary, about=json.dumps(about), **cast(Any, arrays))
    temporary.rename(folder / f"{title}.npz")
    nats, size = (arrays[n][0].sum(dtype=float) for n in (f"nats {OWN}", "bytes"))
    said = {name: value for name, value in about.items() if name != "settings"}
    return f"{title}: {nats / np.log(2) / size:.4f} bits per byte; {json.dumps(said)}"


def _compile(model: RetroLM) -> None:
    """The parts of layers, which all layers of all arms share; whole models take minutes each."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.compile(dynamic=False)
        elif isinstance(module, Layer):
            module.feed_forward = torch.compile(module.feed_forward, dynamic=False)  # type: ignore[method-assign]


def _trainer(config: Config, num_steps: int) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return Trainer(
        max_steps=num_steps,
        accelerator="auto",
        devices=1,
        precision=config["precision"],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


@cache
def _evaluation_data(config: str, data: str, control: str | None) -> ControlledDataModule:
    return _datamodule(json.loads(config), json.loads(data), control)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # batches of many shapes
def _score(config: Config, model: RetroLM, swap: Mapping[str, Any]) -> Array:
    """(2, 3, E) float64: (all, served) x (nats, labels, bytes) of the text of each evaluated chunk."""
    data = json.dumps(swap.get("data", {}))
    datamodule = _evaluation_data(json.dumps(config), data, swap.get("control"))
    split, device = config["split"], _device()
    found = [start + rows for rows, _, start in _evaluated(datamodule, split)]
    ids = torch.from_numpy(np.concatenate(found)).to(device)
    sums = torch.zeros(2 * 3, len(ids), device=device, dtype=torch.float64)
    loader = datamodule.test_dataloader() if split == "test" else datamodule.val_dataloader()
    model.to(device).eval()
    for batch in loader:
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        hidden = {
            "neighbor": slice(model.chunk_size, None),
            "continuation": slice(model.chunk_size),
        }
        if part := swap.get("part"):
            batch["neighbor_mask"][..., hidden[part]] = False
        labels, lengths = batch["labels"], batch["chunk_lengths"]
        with _autocast(config):
            logits = model(batch, False if swap.get("retrieval") is False else None)
        slots = neighbor_slots(lengths, batch["document_ids"], model.chunk_size)
        served = slots < labels.shape[1]
        nats = token_nats(logits, labels)
        terms = score_terms(nats, labels, served, model.bytes_per_token, model.eos_id)[:, 0]
        of_label = chunks_of_labels(batch["chunk_ids"], lengths, labels, model.eos_id)
        place = torch.searchsorted(ids, of_label)
        place = place.clamp(max=len(ids) - 1)  # where no label is: adds 0
        sums.index_add_(1, place.flatten(), terms.flatten(2).flatten(0, 1))
    return sums.view(2, 3, -1).cpu().numpy()


@torch.compiler.set_stance("force_eager")  # a compiled part would not be counted
def _flops_a_token(model: RetroLM, datamodule: RetroDataModule) -> float | None:
    """Of one training step, as torch counts them; on a CPU it would leave out attention."""
    if not torch.cuda.is_available():
        return None
    batch = {
        k: v.to(_device()) for k, v in datamodule.dataset("train").__getitems__([0, 1]).items()
    }
    model.train()
    # In float32, so under a mask: that every torch counts.
    with FlopCounterMode(display=False) as counter:
        model.training_losses(batch)[0].backward()
    model.zero_grad()
    return float(counter.get_total_flops() / batch["labels"].numel())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _autocast(config: Config) -> torch.autocast:
    is_mixed = config["precision"] == "bf16-mixed"
    return torch.autocast(_device().type, torch.bfloat16, enabled=is_mixed)


if __name__ == "__main__":
    main()
