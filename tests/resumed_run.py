"""A training run of its own, of one rank or started by torchrun: writes its order, may end in a kill.

    python resumed_run.py '{"arguments": …, "folder": …, "devices": 1, "kill_at": 5, "checkpoint": …}'

Each rank writes a line for each batch: the first chunk of each of its sequences. A checkpoint is
written every second step. `kill_at`: in the step of this number the whole process group is killed.
`accelerator` is "cpu" unless given.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from retro_data import RetroDataModule


class Recorder(pl.LightningModule):
    def __init__(self, folder: Path, kill_at: int | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder, self.kill_at, self.steps = folder, kill_at, 0

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.steps == self.kill_at:
            self.trainer.strategy.barrier()  # no rank is killed before all have written
            os.killpg(os.getpgid(0), signal.SIGKILL)
        self.steps += 1
        with open(self.folder / f"order-{self.trainer.global_rank}.jsonl", "a") as lines:
            lines.write(json.dumps(batch["chunk_ids"][:, 0].tolist()) + "\n")
        return self.weight * 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def main(given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    folder = Path(given["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    saver = ModelCheckpoint(folder, "last", every_n_train_steps=2, enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator=given.get("accelerator", "cpu"),
        devices=given["devices"],
        strategy="ddp" if given["devices"] > 1 else "auto",
        max_epochs=2,
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Recorder(folder, given.get("kill_at"))
    data = RetroDataModule(**given["arguments"])
    trainer.fit(model, datamodule=data, ckpt_path=given.get("checkpoint"))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
