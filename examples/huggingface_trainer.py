"""Hugging Face's Trainer with a small GPT-2, on Python's help texts: accumulation, checkpoints, resume.

    make setup-examples
    python -m examples.huggingface_trainer
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from examples.text import VOCABULARY, windows
from fishleg_fast.integrations.huggingface import TrainerOptimizer

PADDING = 16  # positions at the end of each window that are not trained on, as padding is not


def rows(length: int = 64) -> list[dict[str, torch.Tensor]]:
    """What a data set of transformers gives: inputs and labels, −100 where there is nothing to learn."""
    found = []
    for window in windows(length):
        labels = window.clone()
        labels[-PADDING:] = -100
        found.append({"input_ids": window, "labels": labels})
    return found


def trainer(folder: Path, steps: int) -> Trainer:
    """A Trainer of a GPT-2 of two layers, which starts from random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_layer=2, n_head=2, n_embd=64, bos_token_id=0, eos_token_id=0
    )
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        warmup_steps=3, lr_scheduler_type="cosine", save_steps=max(steps // 2, 1), logging_steps=max(steps // 4, 1),
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(
        GPT2LMHeadModel(config), args, train_dataset=rows(),
        optimizer_cls_and_kwargs=(TrainerOptimizer, {"lr": 2e-2}),
    )  # fmt: skip


def main() -> None:
    """Train, and once more from the checkpoint in the middle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(Path(folder), steps)
        whole.train()
        losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
        print("loss:", *(f"{loss:.3f}" for loss in losses))
        resumed = trainer(Path(folder), steps)
        resumed.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{max(steps // 2, 1)}"))
        pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
        print("resumed to the same parameters, bit for bit:", all(torch.equal(a, b) for a, b in pairs))


if __name__ == "__main__":
    main()
