"""`retro-data`: prepare, look, verify and inspect from a shell, by Hydra overrides.

retro-data plan    data.root=data/wiki data.corpus.path=wiki.jsonl.zst data/embedder=minilm
retro-data prepare …same overrides…
retro-data status  …same overrides…
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from retro_data.errors import RetroDataError

if TYPE_CHECKING:
    from retro_data.data import RetroData

KEPT = "Finished blocks are kept: the same command goes on from them."
LIGHTNING_TARGETS = ("retro_data.RetroDataModule", "retro_data.datamodule.RetroDataModule")
LIGHT_TARGET = "retro_data.RetroData"  # the same without Lightning, which takes seconds to load
COMMANDS = {
    "plan": "say what preparing will cost, from a sample: chunks, bytes, memory, time",
    "prepare": "build what is missing of every artifact, and mend what is damaged",
    "status": "list every artifact: state, blocks done, size, key",
    "verify": "read every finished artifact back and hold it against its digests",
    "clean": "list what no configuration leads to any more; --yes removes it",
    "inspect": "show one sequence beside its neighbors, as text",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a refusal or damage found, 130 for Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "faiss", "autofaiss", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        signal.signal(signal.SIGTERM, _end)
        return int(globals()[f"_{options.command}"](_data(options), options))
    except RetroDataError as error:
        print(f"retro-data {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"retro-data {options.command}: interrupted. {KEPT}", file=sys.stderr)
        return 130


def _end(number: int, frame: object) -> NoReturn:
    """On SIGTERM, as of a scheduler: leave by way of every `finally`, so that no lease stays."""
    print(f"retro-data: ended by {signal.Signals(number).name}. {KEPT}", file=sys.stderr)
    raise SystemExit(128 + number)


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
    parser.add_argument(
        "--verify",
        action="store_true",
        help="prepare: read all that is there, mend what is damaged",
    )
    parser.add_argument(
        "--recompute",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="verify: make this share of the blocks again and compare, e.g. 0.01",
    )
    parser.add_argument("--yes", action="store_true", help="clean: remove what is listed")
    parser.add_argument(
        "--others", action="store_true", help="clean: also what other configurations use"
    )
    parser.add_argument("--split", default="train", help="inspect: train, val or test")
    parser.add_argument("--index", type=int, default=0, help="inspect: which sequence")
    parser.add_argument("--verbose", action="store_true")
    return parser


def _data(options: argparse.Namespace) -> RetroData:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from retro_data.data import RetroData

    place: AbstractContextManager[None]
    if options.config_dir is not None:
        folder = str(Path(options.config_dir).absolute())
        place = hydra.initialize_config_dir(folder, version_base="1.3")
    else:
        place = hydra.initialize_config_module("retro_data.configs", version_base="1.3")
    try:
        with place:
            config = hydra.compose(options.config_name, overrides=options.overrides)
            if OmegaConf.select(config, "data._target_") in LIGHTNING_TARGETS:
                config.data._target_ = LIGHT_TARGET
            data: Any = hydra.utils.instantiate(config.data)
    except (HydraException, OmegaConfBaseException) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, RetroDataError):
            cause = cause.__cause__
        raise RetroDataError(str(cause if isinstance(cause, RetroDataError) else error)) from error
    if not isinstance(data, RetroData):
        raise RetroDataError(
            f"`data` of the configuration {options.config_name!r} makes a {type(data).__name__}, "
            "expected a RetroDataModule. Set data._target_=retro_data.RetroDataModule, or begin with "
            "the defaults `- data: retro`."
        )
    return data


def _plan(data: RetroData, options: argparse.Namespace) -> int:
    from retro_data.plan import plan

    ours = logging.getLogger("retro_data")
    level = ours.level
    if not options.verbose:
        ours.setLevel(logging.WARNING)  # of the sample's own stages
    try:
        found = plan(data.settings())
    finally:
        ours.setLevel(level)
    print(
        f"{found.documents:,} documents, {_size(found.text_bytes)} of text, {found.tokens:,} tokens, "
        f"{found.chunks:,} chunks (from a sample of {_size(found.sampled_bytes)}); neighbors by "
        f"{found.search}{f': {found.factory}' if found.factory else ''}\n"
    )
    print(f"{'artifact':28} {'rows':>15} {'size':>10} {'memory':>10} {'time':>10}  time is")
    for row in found.stages:
        figures = f"{row.rows:15,} {_size(row.bytes):>10} {_size(row.memory):>10}"
        print(f"{row.title:28} {figures} {_duration(row.seconds):>10}  {row.how}")
    size, seconds = sum(r.bytes for r in found.stages), sum(r.seconds for r in found.stages)
    print(f"{'together':28} {'':15} {_size(size):>10} {'':10} {_duration(seconds):>10}")
    print(
        f"\nat the peak {_size(found.disk_peak)} on disk, {_size(found.disk_free)} free; "
        f"{_size(found.memory_free)} of memory free"
    )
    refusals = found.refusals()
    for line in refusals:
        print(line)
    return 1 if refusals else 0


def _prepare(data: RetroData, options: argparse.Namespace) -> int:
    from retro_data import pipeline

    if options.verify:
        pipeline.prepare(data.settings(), verify=True)
    else:
        data.prepare_data()
    return 0


def _status(data: RetroData, options: argparse.Namespace) -> int:
    from retro_data import pipeline

    print(f"{'artifact':28} {'state':9} {'blocks':>11} {'size':>9}  {'key':16}  folder")
    for row in pipeline.status(data.settings()):
        blocks = f"{row.blocks_done}/{'?' if row.blocks is None else row.blocks}"
        size = f"{row.bytes / 1e6:.1f} MB"
        print(f"{row.title:28} {row.state:9} {blocks:>11} {size:>9}  {row.key[:16]}  {row.folder}")
    return 0


def _verify(data: RetroData, options: argparse.Namespace) -> int:
    from retro_data import pipeline
    from retro_data.artifact import MEND

    damaged = 0
    for title, wrong in pipeline.verify(data.settings(), options.recompute).items():
        print(f"{title}: {'whole' if not wrong else ''}")
        for line in wrong:
            damaged += 1
            print(f"  {line}")
    if damaged:
        print(MEND)
    return 1 if damaged else 0


def _clean(data: RetroData, options: argparse.Namespace) -> int:
    from retro_data import clean

    found = clean.removable(data.settings(), others=options.others)
    for item in found:
        print(f"{_size(item.bytes):>10}  {item.path}  ({item.reason})")
    total = _size(sum(item.bytes for item in found))
    if options.yes:
        clean.remove(found)
        print(f"{total} freed")
    else:
        print(f"{total} would be freed: run again with --yes to remove {len(found)} items")
    return 0


def _size(count: float) -> str:
    """Bytes in powers of 1,000: 3.1 GB."""
    power = min(max(0, (len(str(round(count))) - 1) // 3), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _inspect(data: RetroData, options: argparse.Namespace) -> int:
    from retro_data.browse import show_sequence

    if hasattr(data, "setup"):  # a DataModule of one's own
        data.setup("validate")
    print(show_sequence(data, options.split, options.index))
    return 0
