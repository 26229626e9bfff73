"""A worker process: opens a stage, makes the blocks it is handed, closes it; then the next stage."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from retro_data.stage import Receipt, Stage, make_block


def _die_with_parent(lifeline: int) -> None:
    """The pipe has no writer but the parent: its end means that nobody wants our work any more."""
    os.read(lifeline, 1)
    os._exit(1)


def _serve(connection: Connection, stage: Stage, folder: Path, device: str) -> None:
    turn = threading.Lock()  # a message and its answer stay together
    kind = device_kind(device)
    count = stage.resources.threads_of_worker(device)
    with stage.open(device) as context:

        def work() -> None:
            receipt: Receipt | None = None
            while True:
                with turn:
                    connection.send(("done", receipt))
                    block = connection.recv()
                if block is None:
                    return
                try:
                    receipt = make_block(stage, context, block, folder, kind)
                except BaseException as error:
                    with turn:
                        _fail(connection, error, block.index)

        if count == 1:  # in the main thread, where signals arrive
            work()
        else:
            with ThreadPoolExecutor(count) as pool:
                for future in [pool.submit(work) for _ in range(count)]:
                    future.result()


def _free_memory() -> None:
    """Of the stage that was closed: a GPU's, and pages pinned for it, are wanted by others."""
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        with contextlib.suppress(AttributeError):  # not in every torch
            torch.accelerator.empty_host_cache()


def _fail(connection: Connection, error: BaseException, block: int | None) -> None:
    """Tell the parent, which needs nothing else of this process, and end whatever else goes on."""
    reason = f"{type(error).__name__}: {error}"
    connection.send(("failed", (block, reason, traceback.format_exc())))
    os._exit(1)


def device_kind(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def main() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends its workers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # held since the process began
    channel, lifeline = map(int, sys.argv[1:3])
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    connection = Connection(channel)
    try:
        while (work := connection.recv()) is not None:
            _serve(connection, *work)
            del work  # the stage, with whatever it opened
            _free_memory()
            connection.send(("closed", None))
    except EOFError:
        return
    except BaseException as error:
        _fail(connection, error, None)


if __name__ == "__main__":
    main()
