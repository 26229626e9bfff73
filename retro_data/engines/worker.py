"""A worker process: opens a stage once, then makes the blocks it is handed, until told to end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from retro_data.stage import Stage, make_block


def _die_with_parent(lifeline: int) -> None:
    """The pipe has no writer but the parent: its end means that nobody wants our work any more."""
    os.read(lifeline, 1)
    os._exit(1)


def _serve(connection: Connection, stage: Stage, folder: Path, device: str) -> None:
    with stage.open(device) as context:
        answer: Any = None
        while True:
            connection.send(("done", answer))
            block = connection.recv()
            if block is None:
                return
            answer = make_block(stage, context, block, folder, device_kind(device))


def device_kind(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def main() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends its workers
    channel, lifeline = map(int, sys.argv[1:3])
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    connection = Connection(channel)
    try:
        stage, folder, device = connection.recv()
        _serve(connection, stage, folder, device)
    except EOFError:
        return
    except BaseException as error:
        connection.send(("failed", (f"{type(error).__name__}: {error}", traceback.format_exc())))
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
