"""Train the reference RETRO model on a corpus with its retrieved neighbors.

`python train.py` is the demo: the World Factbook, a few minutes on a CPU. Everything can be
overridden, e.g. `python train.py data/corpus=jsonl data.corpus.path=wiki.jsonl`; several GPUs:
`torchrun --nproc-per-node 8 train.py trainer.devices=8`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from retro_data import RetroDataError, RetroLM, draw_curve, format_curve, show_sequence

log = logging.getLogger("train")


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN and config.trainer.devices not in (1, "1"):
        raise RetroDataError(
            f"a multirun with trainer.devices={config.trainer.devices} would start the whole sweep "
            "again in every process. Start each run by torchrun, or set trainer.devices=1."
        )
    seed_everything(config.seed)
    datamodule = hydra.utils.instantiate(config.data)
    datamodule.prepare_data()  # here already: the model wants to know the vocabulary
    model = RetroLM.from_datamodule(
        datamodule, evaluate_without_retrieval=True, **plain(config.model)
    )
    trainer = Trainer(
        default_root_dir=HydraConfig.get().runtime.output_dir,
        **plain(config.trainer),
    )
    trainer.fit(model, datamodule, ckpt_path=config.ckpt_path)
    split = "val" if len(datamodule.dataset("val")) else "train"
    if split == "val":
        figures = trainer.validate(model, datamodule, verbose=False)[0]
        if trainer.is_global_zero:
            report(figures)
            report_leakage(model.leakage_curves, Path(trainer.default_root_dir))
    if trainer.is_global_zero:
        log.info("\n%s", show_sequence(datamodule, split))


def plain(config: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def report(figures: Mapping[str, float]) -> None:
    """Validation figures with the neighbors on and off."""
    for name in ("bits_per_byte", "bits_per_byte_served", "bits_per_token"):
        if f"val/{name}" in figures:
            on, off = figures[f"val/{name}"], figures[f"val/{name}_off"]
            log.info("val %-22s neighbors on %.4f   off %.4f", name, on, off)
    log.info("(one seed and a short training: too little to judge whether neighbors help)")


def report_leakage(curves: Mapping[str, Sequence[dict[str, float]]], folder: Path) -> None:
    """The same over the chunks of which at most so much was retrieved, with a plot of each."""
    for measure, rows in curves.items():
        log.info("\n%s", format_curve(rows, measure))
        plot = folder / f"bits_by_{measure}.svg"
        plot.write_text(draw_curve(rows, measure), "utf-8")
        log.info("drawn in %s", plot)


if __name__ == "__main__":
    main()
