"""`retro-data`: prepare, look, verify and inspect from a shell, by Hydra overrides.

retro-data prepare data.root=data/wiki data.corpus.path=wiki.jsonl.zst data/embedder=minilm
retro-data status  …same overrides…
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_data.errors import RetroDataError

if TYPE_CHECKING:
    from retro_data.datamodule import RetroDataModule

COMMANDS = {
    "prepare": "build what is missing of every artifact",
    "status": "list every artifact: state, blocks done, size, key",
    "verify": "read every finished artifact back and hold it against its digests",
    "inspect": "show one sequence beside its neighbors, as text",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a refusal or damage found."""
    options = _parser().parse_intermixed_args(arguments)
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "faiss", "autofaiss", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        datamodule = _datamodule(options)
        return int(globals()[f"_{options.command}"](datamodule, options))
    except RetroDataError as error:
        print(f"retro-data {options.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retro-data",
        description="Data for retrieval-enhanced language models.",
        epilog="Everything after the options is a Hydra override, e.g. data.corpus.path=wiki.jsonl",
    )
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in COMMANDS.items())
    parser.add_argument("command", choices=list(COMMANDS), help=meanings)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the data group")
    parser.add_argument("--config-dir", help="folder of your own configuration")
    parser.add_argument("--config-name", default="cli", help="your configuration, with a `data`")
    parser.add_argument("--split", default="train", help="inspect: train, val or test")
    parser.add_argument("--index", type=int, default=0, help="inspect: which sequence")
    parser.add_argument("--verbose", action="store_true")
    return parser


def _datamodule(options: argparse.Namespace) -> RetroDataModule:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    place: AbstractContextManager[None]
    if options.config_dir is not None:
        folder = str(Path(options.config_dir).absolute())
        place = hydra.initialize_config_dir(folder, version_base="1.3")
    else:
        place = hydra.initialize_config_module("retro_data.configs", version_base="1.3")
    try:
        with place:
            config = hydra.compose(options.config_name, overrides=options.overrides)
            datamodule: Any = hydra.utils.instantiate(config.data)
            return datamodule  # type: ignore[no-any-return]
    except (HydraException, OmegaConfBaseException) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, RetroDataError):
            cause = cause.__cause__
        raise RetroDataError(str(cause if isinstance(cause, RetroDataError) else error)) from error


def _prepare(datamodule: RetroDataModule, options: argparse.Namespace) -> int:
    datamodule.prepare_data()
    return 0


def _status(datamodule: RetroDataModule, options: argparse.Namespace) -> int:
    from retro_data import pipeline

    print(f"{'artifact':28} {'state':9} {'blocks':>11} {'size':>9}  {'key':16}  folder")
    for row in pipeline.status(datamodule.settings()):
        blocks = f"{row.blocks_done}/{'?' if row.blocks is None else row.blocks}"
        size = f"{row.bytes / 1e6:.1f} MB"
        print(f"{row.title:28} {row.state:9} {blocks:>11} {size:>9}  {row.key[:16]}  {row.folder}")
    return 0


def _verify(datamodule: RetroDataModule, options: argparse.Namespace) -> int:
    from retro_data import pipeline

    damaged = 0
    for title, wrong in pipeline.verify(datamodule.settings()).items():
        print(f"{title}: {'whole' if not wrong else ''}")
        for line in wrong:
            damaged += 1
            print(f"  {line}")
    if damaged:
        print("Remove the folders of damaged artifacts and run `retro-data prepare` again.")
    return 1 if damaged else 0


def _inspect(datamodule: RetroDataModule, options: argparse.Namespace) -> int:
    from retro_data.browse import show_sequence

    datamodule.setup("validate")
    print(show_sequence(datamodule, options.split, options.index))
    return 0
