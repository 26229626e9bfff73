"""One global order, the same for any number of ranks, every sample once, resumed exactly."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from retro_data.errors import RetroDataError
from retro_data.order import global_order
from retro_data.sampler import EvaluationSampler, GlobalOrderSampler

SETTINGS = settings(deadline=None, max_examples=60)
samples = st.integers(0, 300)
rank_batch = st.integers(1, 5)
ranks = st.integers(1, 5)


# ---- a function on real ranks --------------------------------------------------------------------


def on_ranks(world: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Run `function(*arguments)` in one process a rank, started as torchrun starts them.

    Returns:
        What it returned on each rank, or the text of its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    processes = []
    for rank in range(world):
        answer = folder / f"rank{rank}.pickle"
        call = (rank, world, port, answer, function, arguments)
        processes.append(context.Process(target=_on_rank, args=call))
        processes[-1].start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(world)]


def _on_rank(
    rank: int,
    world: int,
    port: int,
    answer: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except Exception:
        result = traceback.format_exc()
    answer.write_bytes(pickle.dumps(result))


# ---- the order -----------------------------------------------------------------------------------


def epoch_of(
    num_samples: int, rank_batch: int, world: int, epoch: int = 0, seed: int = 0
) -> np.ndarray:
    """Indices (batches, world, rank_batch) that the ranks get in one epoch."""
    shares = []
    for rank in range(world):
        sampler = GlobalOrderSampler(range(num_samples), rank_batch * world, world, rank, seed)
        sampler.set_epoch(epoch)
        shares.append(np.array(list(sampler), np.int64).reshape(-1, rank_batch))
    return np.stack(shares, 1)


def test_order_depends_on_seed_and_epoch_and_is_a_permutation() -> None:
    orders = [global_order(1000, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 6
    assert (global_order(1000, 1, 1) == orders[3]).all()


@SETTINGS
@given(samples, rank_batch, ranks)
def test_every_sample_is_seen_exactly_once_an_epoch(n: int, batch: int, world: int) -> None:
    given_out = epoch_of(n, batch, world)
    seen = Counter(given_out[given_out >= 0].tolist())
    batches = -(-n // (batch * world))
    assert given_out.shape == (batches, world, batch)  # all ranks step together
    assert set(seen) == set(range(n))
    if n >= batches * world:
        assert set(seen.values()) <= {1}
        fill = (given_out >= 0).sum(-1)
        assert not fill.size or fill.max() - fill.min() <= 1
    assert (given_out[:, :, 0] >= 0).all()  # no rank is given padding alone


@SETTINGS
@given(samples, st.sampled_from([(1, 4), (2, 4), (4, 4), (2, 6), (3, 6)]), st.integers(0, 3))
def test_global_batches_are_the_same_for_any_number_of_ranks(
    n: int, shape: tuple[int, int], epoch: int
) -> None:
    world, size = shape
    alone = epoch_of(n, size, 1, epoch)[:, 0]
    shared = epoch_of(n, size // world, world, epoch).reshape(-1, size)
    for a, b in zip(alone, shared, strict=True):
        real = sorted(a[a >= 0].tolist())
        if len(real) >= world:
            assert sorted(b[b >= 0].tolist()) == real


@SETTINGS
@given(samples, rank_batch, ranks, st.data())
def test_resuming_gives_exactly_the_batches_that_are_left(
    n: int, batch: int, world: int, data: st.DataObject
) -> None:
    whole = epoch_of(n, batch, world, epoch=3)
    done = data.draw(st.integers(0, len(whole)))
    for rank in range(world):
        sampler = GlobalOrderSampler(range(n), batch * world, world, rank)
        sampler.load_state_dict({"epoch": 3, "samples": done * batch * world})
        assert len(sampler) == whole[:, rank].size  # of the full epoch
        assert list(sampler) == whole[done:, rank].ravel().tolist()


def test_a_position_is_used_once_and_epochs_go_on_from_it() -> None:
    whole = {epoch: epoch_of(20, 4, 1, epoch).ravel().tolist() for epoch in range(5)}
    sampler = GlobalOrderSampler(range(20), 4)
    sampler.load_state_dict({"epoch": 2, "samples": 8})
    sampler.set_epoch(3)  # as a Trainer counts that stopped inside epoch 2 by max_steps
    assert list(sampler) == whole[2][8:]
    assert list(sampler) == whole[2]
    sampler.set_epoch(4)
    assert list(sampler) == whole[3]


def test_state_counts_what_a_loader_handed_out() -> None:
    sampler = GlobalOrderSampler(range(20), 4)
    assert sampler.state_dict() == {"epoch": 0, "samples": 0}
    next(iter(sampler))
    assert sampler.state_dict(batches=2) == {"epoch": 0, "samples": 8}
    assert sampler.state_dict(batches=5) == {"epoch": 1, "samples": 0}
    assert sampler.state_dict(batches=3, epoch_batches=3) == {"epoch": 1, "samples": 0}
    sampler.batches_read = 4
    assert sampler.state_dict() == {"epoch": 0, "samples": 16}


def test_refusals() -> None:
    with pytest.raises(RetroDataError, match=r"global_batch_size=6 .* by 4 ranks"):
        GlobalOrderSampler(range(20), 6, num_replicas=4)
    sampler = GlobalOrderSampler(range(20), 6)
    with pytest.raises(RetroDataError, match=r"position 4 .* global batch of 6"):
        sampler.load_state_dict({"epoch": 0, "samples": 4})


# ---- evaluation ----------------------------------------------------------------------------------


@SETTINGS
@given(samples, rank_batch, ranks)
def test_evaluation_sees_each_sample_once_in_order(n: int, batch: int, world: int) -> None:
    shares = [
        list(EvaluationSampler(range(n), batch * world, world, rank)) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    together = np.array(shares, np.int64).reshape(world, -1, batch).transpose(1, 0, 2).ravel()
    assert together[together >= 0].tolist() == list(range(n))
    assert set(together[together < 0].tolist()) <= {-1}


# ---- real processes ------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> int:
        return index


def read_on_rank() -> dict[str, list[list[int]]]:
    torch.distributed.init_process_group("gloo")
    place = (torch.distributed.get_world_size(), torch.distributed.get_rank())
    samplers = {
        "train": GlobalOrderSampler(Numbers(), 4, *place),
        "evaluation": EvaluationSampler(Numbers(), 4, *place),
    }
    read = {}
    for name, sampler in samplers.items():
        assert isinstance(sampler, DistributedSampler)
        loader = DataLoader(Numbers(), batch_size=2, sampler=sampler)
        read[name] = [batch.tolist() for batch in loader]
        steps = torch.tensor(len(read[name]))
        torch.distributed.all_reduce(steps)
        assert steps == 2 * len(read[name])
    torch.distributed.destroy_process_group()
    return read


def test_two_gloo_ranks_see_each_sample_exactly_once(tmp_path: Path) -> None:
    first, second = on_ranks(2, read_on_rank, tmp_path)
    alone = list(GlobalOrderSampler(Numbers(), 4))
    for name in ("train", "evaluation"):
        indices = [i for batch in first[name] + second[name] for i in batch if i >= 0]
        assert sorted(indices) == list(range(23)), name
    together = [a + b for a, b in zip(first["train"], second["train"], strict=True)]
    assert [sorted(batch) for batch in together] == [
        sorted(alone[i : i + 4]) for i in range(0, len(alone), 4)
    ]
