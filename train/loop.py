"""The training loop: set up, step, save. It reads from top to bottom.

    accelerate launch train.py recipe=quickstart

One optimiser step runs `accumulation` batches of streams. Each batch is one way there through `StreamObjective`
(chunked, memory active) and one way back (gradients through every retained state; see `omnimem.tape`).
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data_prep.manifest import Row, rejected_answers
from omnimem.backbones import backbone_class
from omnimem.backbones.adapter import RECIPE_FILE
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json, atomic_write_text
from omnimem.recipe import Recipe, TrainConfig, keys_without_effect, to_yaml
from train.budgets import profile_at
from train.checkpoint import checkpoints, load_progress, load_weights, save_adapter, save_checkpoint, sweep_run
from train.data import Samples, Schedule, load_rows
from train.environment import environment, launch_of
from train.evaluation import Evaluation, held_out_rows
from train.finish import finish
from train.lock import hold_lock
from train.metrics import BarHandler, Metrics, Once, peak_gib
from train.plan import print_plan
from train.processes import from_main_process, new_accelerator, new_strategy, zero_stage
from train.rundir import prepare_run_directory
from train.setup import (
    add_lora,
    backbone_of,
    build_base,
    check_recipe,
    gradient_of,
    load_base,
    objective_of,
)
from train.stop import StopRequest

log = logging.getLogger("omnimem.train")

MAX_SKIPPED = 5
"""Steps in a row with a loss or gradient that is not finite before the run gives up."""


def run(recipe: Recipe) -> None:
    """Train as a recipe says.

    Raises
    ------
    OmniMemError
        Anything in the recipe, the data or the output folder that has to be put right first.
    """
    handler = BarHandler()
    handler.addFilter(Once())
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", handlers=[handler])
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    for line in keys_without_effect(recipe):
        log.warning(line)
    # Recorded by name, so that the run's own recipe does not depend on another look at the checkpoint.
    recipe.model.backbone = backbone = backbone_of(recipe)
    supports_audio = backbone_class(backbone).supports_audio
    skeleton, profile = check_recipe(recipe)
    if recipe.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            rows, _ = _load(recipe, supports_audio)
            print_plan(recipe, rows, skeleton, profile, processes=int(os.environ.get("WORLD_SIZE", 1)))
        return
    accelerator = new_accelerator(recipe.train.ddp_timeout)
    # The main process opens the clips: the others would only repeat it, and could leave out other rows.
    rows, held_out = from_main_process(lambda: _load(recipe, supports_audio))
    with ExitStack() as stack:
        from_main_process(lambda: stack.enter_context(hold_lock(Path(recipe.output_dir))))
        stop = stack.enter_context(StopRequest())
        try:
            main = train(recipe, accelerator, rows, held_out, profile, stop)
            # Not inside `train`, whose model would stay in memory beside the one that is exported.
            if main:
                finish(recipe, Path(recipe.output_dir), rows)
        except torch.OutOfMemoryError as error:
            raise OmniMemError(
                f"out of memory on the accelerator ({peak_gib():.1f} GiB were in use): lower data.chunk_seconds, "
                "memory.mean_budget or train.per_device_train_batch_size and begin in another output_dir; dry_run=true "
                "shows what takes "
                "how much"
            ) from error


def _load(recipe: Recipe, supports_audio: bool) -> tuple[list[Row], list[Row]]:
    """Rows of the training and of the evaluation, their clips opened."""
    rows = load_rows(recipe.data, supports_audio).rows
    if rejected := rejected_answers(rows):
        log.warning("%s: %d rejected answers are not trained on: no preference objective", recipe.data.path, rejected)
    if recipe.data.path == "quickstart" and recipe.recipe != "quickstart":
        log.info("training on the clips that ship with the package; data.path=my.jsonl takes your own")
    return rows, held_out_rows(recipe, supports_audio)


def _set_up(recipe: Recipe, output_dir: Path, rows: list[Row]) -> None:
    """Prepare the output folder in the main process, before any process reads it."""
    prepare_run_directory(output_dir, recipe, rows)
    sweep_run(output_dir)
    build_base(recipe, output_dir)


def train(
    recipe: Recipe,
    accelerator: Accelerator,
    rows: list[Row],
    held_out: list[Row],
    profile: BudgetProfile,
    stop: StopRequest,
) -> bool:
    """Train on checked rows until the schedule or a signal ends it; returns whether this is the main process."""
    # ---- set up -----------------------------------------------------------------------------------------
    output_dir = Path(recipe.output_dir)
    from_main_process(lambda: _set_up(recipe, output_dir, rows))

    # ZeRO-3 cuts the layers up before they go to the device.
    device = torch.device("cpu") if zero_stage(accelerator) == 3 else accelerator.device
    backbone = load_base(recipe, output_dir, device)
    peft_model = add_lora(recipe, backbone)
    if accelerator.is_main_process:
        atomic_write_text(output_dir / RECIPE_FILE, to_yaml(recipe))
        atomic_write_json(output_dir / "environment.json", {**environment(), **launch_of(accelerator)})
    schedule = Schedule(Samples(rows, backbone), recipe.train, recipe.data.shuffle, accelerator.num_processes)
    torch.manual_seed(recipe.train.seed + accelerator.process_index)
    # One process looks: on a shared file system others may see another moment.
    saved = _agreed(checkpoints(output_dir))
    done = load_weights(saved[-1], accelerator, peft_model) if saved else 0
    processes = new_strategy(accelerator, recipe, backbone, peft_model)
    if saved:
        load_progress(saved[-1], accelerator, processes)
        log.info("resuming after step %d from %s", done, saved[-1])
    objective = objective_of(recipe, output_dir, accelerator, backbone, peft_model, profile, processes)
    evaluation = Evaluation(recipe, output_dir, Samples(held_out, backbone))
    metrics = Metrics(output_dir, done, schedule.steps, accelerator.is_main_process, recipe)

    # ---- step -------------------------------------------------------------------------------------------
    peft_model.train()
    skipped = 0
    steps = schedule.steps
    for step in range(done, steps):
        if recipe.eval.early_stopping_patience is not None and (reason := _agreed(evaluation.exhausted(step))):
            log.info("ended after step %d: %s", step, reason)
            break
        started = time.perf_counter()
        rate = rate_at(step, steps, recipe.train)
        processes.learning_rate(rate)
        gradient = gradient_of(recipe, step / max(1, steps - 1))
        budgets = profile_at(recipe, profile, step, steps)
        totals = torch.zeros(4)
        # The mean is over all answer tokens of the step, whoever has them.
        targets = schedule.targets(step)
        weight = 1 / targets
        with processes.accumulating():
            for batch in schedule.step(step, accelerator.process_index):
                outcome = objective(batch, gradient, budgets)
                outcome.backward(weight * processes.weight)
                loss, distilled = outcome.loss.item() * weight, outcome.distilled.item() * weight
                totals[:3] += torch.tensor([loss, outcome.tokens, distilled])
        totals[3] = stop.requested
        summed: Any = accelerator.reduce(totals.to(accelerator.device), "sum")
        loss_value, tokens, distilled, stopping = summed.tolist()
        norm = processes.step(wanted=math.isfinite(loss_value))
        finite = math.isfinite(loss_value) and math.isfinite(norm)
        skipped = 0 if finite else skipped + 1
        if not finite:
            log.warning("step %d: loss %s, gradient norm %s: skipped", step + 1, loss_value, norm)
        if skipped == MAX_SKIPPED:
            raise OmniMemError(
                f"{MAX_SKIPPED} steps in a row without a finite loss or gradient, the last over "
                f"{[s.row.name for s in batch]}; lower train.learning_rate, use "
                "model.dtype=float32 or look at these clips"
            )
        elapsed = time.perf_counter() - started
        record = {
            "step": step + 1,
            "epoch": round(schedule.epoch(step + 1), 4),
            "loss": loss_value if math.isfinite(loss_value) else None,
            "distilled": distilled if recipe.distill.weight > 0 else None,
            "learning_rate": rate * recipe.train.learning_rate,
            "temperature": None if gradient is None else gradient.temperature,
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped": not finite,
            "targets": targets,
            "tokens": int(tokens),
            "tokens_per_second": tokens / elapsed,
            "seconds": elapsed,
            "mean_budget": budgets.mean_budget,
            "retained": outcome.retained,
            "retention": outcome.retention,
            "gates": outcome.gates,
            "memory_bytes": outcome.memory_bytes,
            "peak_gib": peak_gib(),
        }
        if evaluation.due(step + 1, steps):
            held_out_loss = evaluation.measure(objective, accelerator)
            record["eval_loss"] = held_out_loss if math.isfinite(held_out_loss) else None
            weights = processes.weights()
            if accelerator.is_main_process:
                evaluation.keep_best(step + 1, held_out_loss, peft_model, profile, weights)
            accelerator.wait_for_everyone()
            weights_used = " (base in NF4)" if recipe.model.load_in_4bit else ""
            log.info("step %d: held-out answers %.4f nats a token%s", step + 1, held_out_loss, weights_used)
        if (step + 1) % recipe.train.logging_steps == 0 or "eval_loss" in record or step + 1 == steps:
            metrics.log(record)
        metrics.progress(record)
        # ---- save ---------------------------------------------------------------------------------------
        if (step + 1) % recipe.train.save_steps == 0 or step + 1 == steps or stopping:
            save_checkpoint(
                output_dir, step + 1, accelerator, peft_model, processes, profile, recipe.train.save_total_limit
            )
        if stopping and step + 1 < steps:
            metrics.close()
            log.info("stopped after step %d, which is saved: the same command goes on from there", step + 1)
            raise KeyboardInterrupt
    metrics.close()
    weights = processes.weights()
    if accelerator.is_main_process:
        save_adapter(output_dir, peft_model, profile, weights)
        log.info("adapter and budget profile saved in %s", output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return accelerator.is_main_process


def _agreed(found: Any) -> Any:
    """What the main process found."""
    return broadcast_object_list([found])[0]


def rate_at(step: int, steps: int, train: TrainConfig) -> float:
    """Learning rate of a step (0-based) as a part of the peak: linear warm-up, then a cosine to ``min_lr_rate``."""
    warmup = math.ceil(train.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return train.min_lr_rate + (1 - train.min_lr_rate) * cosine
