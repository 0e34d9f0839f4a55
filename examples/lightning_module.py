"""Lightning with a small classifier of digits: configure_optimizers, a schedule, checkpoints, resume.

    make setup-examples
    python -m examples.lightning_module
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fishleg_fast import CategoricalLikelihood, FishLeg


def digits() -> DataLoader:
    """1,797 images of 8 × 8 pixels."""
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32)[:, None].view(-1, 1, 8, 8) / 16, torch.tensor(y))
    return DataLoader(data, batch_size=100)


class Classifier(lightning.LightningModule):
    """Two convolutions and a linear layer."""

    def __init__(self, lr: float, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
        self.likelihood = CategoricalLikelihood()
        self.lr, self.steps = lr, steps
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        loss = self.likelihood.nll(targets, self.net(inputs))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = FishLeg(self.net, likelihood=self.likelihood, lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(folder: Path, steps: int, resume: Path | None = None) -> Classifier:
    """Train for so many steps, with a checkpoint in the middle, or from that checkpoint on."""
    lightning.seed_everything(0, verbose=False)
    model = Classifier(5e-2, steps)  # a short toy run; elsewhere start at 2e-2
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, "middle", every_n_train_steps=steps // 2, save_top_k=1)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[] if resume else [saving], enable_checkpointing=resume is None,
    )  # fmt: skip
    trainer.fit(model, digits(), ckpt_path=None if resume is None else str(resume))
    return model


def main() -> None:
    """Train, and once more from the checkpoint in the middle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=72)
    steps = parser.parse_args().steps
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    with tempfile.TemporaryDirectory() as folder:
        whole = train(Path(folder), steps)
        print(f"loss: {whole.losses[0]:.3f} at first, {whole.losses[-1]:.4f} after {len(whole.losses)} steps")
        resumed = train(Path(folder), steps, Path(folder) / "middle.ckpt")
        pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
        print("resumed to the same parameters, bit for bit:", all(torch.equal(a, b) for a, b in pairs))


if __name__ == "__main__":
    main()
