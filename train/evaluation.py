"""Held-out questions every so many steps, answered from the hard memory of inference; the best adapter stays.

    train.py recipe=… eval.path=held_out.jsonl eval.every=50 eval.patience=4

Measured is the cross-entropy of the reference answers in nats a token. The adapter of the best evaluation is kept in
``best/`` with its numbers, so a run that is resumed knows it; after `eval.patience` evaluations without a better one
the run ends.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from data_prep.manifest import Row
from omnimem.budget import BudgetProfile
from omnimem.files import atomic_directory, atomic_write_json, remove_directory
from train.checkpoint import save_adapter
from train.config import Recipe
from train.data import Sample, load_rows
from train.objective import StreamObjective

BEST = "best"
NUMBERS = "evaluation.json"


def held_out_rows(recipe: Recipe) -> list[Row]:
    """Rows of ``eval.path``, checked like those of the training; none without it."""
    if recipe.eval.path is None:
        return []
    return load_rows(replace(recipe.data, path=recipe.eval.path, root=recipe.eval.root)).rows


def _numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NUMBERS).read_text(encoding="utf-8"))


class Evaluation:
    """Evaluations of one run.

    Parameters
    ----------
    recipe : Recipe
        The run.
    folder : Path
        Its output folder.
    samples : list of Sample
        Held-out streams; without any, nothing is ever due.
    """

    def __init__(self, recipe: Recipe, folder: Path, samples: list[Sample]) -> None:
        self.config, self.folder, self.samples = recipe.eval, folder / BEST, samples

    def due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after `step` of so many steps."""
        return bool(self.samples) and (step % self.config.every == 0 or step == steps)

    @torch.no_grad()
    def measure(self, objective: StreamObjective, accelerator: Accelerator) -> float:
        """Nats an answer token of the held-out questions; every process takes its share and gets the same number."""
        training = objective.model.training
        objective.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        rounds = range(0, len(self.samples), accelerator.num_processes)
        for number in (first + accelerator.process_index for first in rounds):
            # All processes go through equally many streams; what is left over is not counted.
            outcome = objective([self.samples[number % len(self.samples)]])
            if number < len(self.samples):
                totals += torch.tensor([outcome.loss.item(), outcome.targets], dtype=torch.float64)
        objective.model.train(training)
        summed: Any = accelerator.reduce(totals.float().to(accelerator.device), "sum")
        loss, targets = summed.tolist()
        return loss / targets

    def keep_best(
        self, step: int, loss: float, model: PeftModel, profile: BudgetProfile, weights: dict[str, torch.Tensor]
    ) -> None:
        """Keep the adapter if none was better; only the main process calls it."""
        best = self.best()
        target = self.folder
        if best is not None and best["loss"] <= loss:
            target = self._other(step)
        elif self.folder.is_dir() and self.config.keep > 1:
            aside = self._other(_numbers(self.folder)["step"])
            if aside.is_dir():
                remove_directory(aside)
            self.folder.rename(aside)
        if target != self.folder and self.config.keep == 1:
            return
        with atomic_directory(target, overwrite=True) as folder:
            save_adapter(folder, model, profile, weights)
            atomic_write_json(folder / NUMBERS, {"step": step, "loss": loss})
        others = sorted(self.folder.parent.glob(f"{BEST}-step-*"), key=lambda folder: _numbers(folder)["loss"])
        for folder in others[self.config.keep - 1 :]:
            remove_directory(folder)

    def _other(self, step: int) -> Path:
        """Where an adapter that is not the best stays."""
        return self.folder.with_name(f"{BEST}-step-{step:08d}")

    def best(self) -> dict[str, Any] | None:
        """Step and loss of the best evaluation so far."""
        # Killed while a new best one was written, the one before may be the best there is.
        kept = [self.folder, *self.folder.parent.glob(f"{BEST}-step-*")]
        found = [_numbers(folder) for folder in kept if (folder / NUMBERS).is_file()]
        return min(found, key=lambda numbers: numbers["loss"], default=None)

    def exhausted(self, step: int) -> str | None:
        """Why the run ends after `step`: the best evaluation is `eval.patience` evaluations old."""
        best = self.best()
        patience = self.config.patience
        if best is None or patience is None or step - best["step"] < patience * self.config.every:
            return None
        return f"none of {patience} evaluations was better than {best['loss']:.4f} after step {best['step']}"
