"""The training loop: set up, step, evaluate, save. It reads from top to bottom.

    accelerate launch train.py recipe=quickstart

An optimizer step runs ``gradient_accumulation_steps`` batches of streams. Each batch is one forward and one backward
pass of `StreamObjective`: chunk by chunk, with the compressed cache, and with gradients through every retained token.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from data_prep.manifest import Row, rejected_answers
from omnimem.backbones import backbone_class
from omnimem.backbones.adapter import RECIPE_FILE
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json, atomic_write_text
from omnimem.recipe import Recipe, keys_without_effect, to_yaml
from train.budgets import profile_at
from train.checkpoint import (
    checkpoints,
    load_optimizer_and_rng,
    load_weights,
    remove_unfinished_files,
    save_adapter,
    save_checkpoint,
)
from train.data import load_rows
from train.deepspeed_strategy import zero_stage
from train.distributed import broadcast_value, from_main_process, new_accelerator, new_strategy
from train.dry_run import print_plan
from train.environment import environment, launch_of
from train.evaluation import Evaluation, held_out_rows
from train.finish import finish
from train.launcher import launched_processes, launched_rank
from train.learning_rate import learning_rate_ratio
from train.lock import hold_lock
from train.metrics import DuplicateMessageFilter, Metrics, TqdmLoggingHandler
from train.objective import BatchResult
from train.peak_memory import peak_gib
from train.run_directory import prepare_run_directory
from train.samples import Samples
from train.schedule import Schedule
from train.setup import (
    add_heads,
    add_lora,
    backbone_name,
    build_objective,
    build_tiny_base,
    check_recipe,
    load_base,
    selection_gradient,
    selection_method,
)
from train.stop import StopRequest

log = logging.getLogger("omnimem.train")

MAX_CONSECUTIVE_SKIPPED = 5
"""The run ends after this many consecutive steps with a loss or gradient that is not finite."""


def run(recipe: Recipe) -> None:
    """Train as a recipe says.

    Raises
    ------
    OmniMemError
        A problem in the recipe, the data or the output folder that the user has to fix.
    """
    handler = TqdmLoggingHandler()
    handler.addFilter(DuplicateMessageFilter())
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", handlers=[handler])
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    for line in keys_without_effect(recipe):
        log.warning(line)
    # The detected backbone is saved in the run's recipe, so that resuming does not detect it again.
    recipe.model.backbone = backbone = backbone_name(recipe)
    supports_audio = backbone_class(backbone).supports_audio
    skeleton, profile = check_recipe(recipe)
    if recipe.dry_run:
        if launched_rank() == 0:
            rows, _ = _load_data(recipe, supports_audio)
            print_plan(recipe, rows, skeleton, profile, launched_processes())
        return
    accelerator = new_accelerator(recipe.train.ddp_timeout)
    # Only the main process opens the clips: the others would repeat the work, and might skip different rows.
    rows, held_out = from_main_process(lambda: _load_data(recipe, supports_audio))
    with ExitStack() as stack:
        from_main_process(lambda: stack.enter_context(hold_lock(Path(recipe.output_dir))))
        stop = stack.enter_context(StopRequest())
        try:
            is_main = train(recipe, accelerator, rows, held_out, profile, stop)
            # After `train` has returned, so that its model is freed before the exported one is loaded.
            if is_main:
                finish(recipe, Path(recipe.output_dir), rows)
        except torch.OutOfMemoryError as error:
            raise OmniMemError(
                f"out of GPU memory (peak {peak_gib():.1f} GiB): lower data.chunk_seconds, memory.mean_budget or "
                "train.per_device_train_batch_size (a run cannot resume with other values); "
                "dry_run=true shows the size of each part"
            ) from error


def _load_data(recipe: Recipe, supports_audio: bool) -> tuple[list[Row], list[Row]]:
    """Rows for training and for evaluation, their clips opened."""
    rows = load_rows(recipe.data, supports_audio).rows
    if rejected := rejected_answers(rows):
        log.warning("%s: %d rejected answers are ignored: no preference objective", recipe.data.path, rejected)
    if recipe.data.path == "quickstart" and recipe.recipe != "quickstart":
        log.info("training on the clips that ship with the package; set data.path=my.jsonl to use your own")
    return rows, held_out_rows(recipe, supports_audio)


def _prepare_output(recipe: Recipe, output_dir: Path, rows: list[Row]) -> None:
    """Prepare the output folder in the main process, before any process reads it."""
    prepare_run_directory(output_dir, recipe, rows)
    remove_unfinished_files(output_dir)
    build_tiny_base(recipe, output_dir)


def train(
    recipe: Recipe,
    accelerator: Accelerator,
    rows: list[Row],
    held_out: list[Row],
    profile: BudgetProfile,
    stop: StopRequest,
) -> bool:
    """Train on checked rows until the last step, early stopping or a signal; return whether this is the main process.

    Raises
    ------
    OmniMemError
        A checkpoint does not load, or several consecutive steps have no finite loss or gradient.
    KeyboardInterrupt
        A signal asked to stop; the last step is saved.
    """
    # ---- set up -----------------------------------------------------------------------------------------
    output_dir = Path(recipe.output_dir)
    from_main_process(lambda: _prepare_output(recipe, output_dir, rows))

    # ZeRO-3 shards the layers before they are moved to the device.
    device = torch.device("cpu") if zero_stage(accelerator) == 3 else accelerator.device
    backbone = load_base(recipe, output_dir, device)
    method = selection_method(recipe)
    model = add_lora(recipe, backbone)
    add_heads(method, backbone)
    if accelerator.is_main_process:
        atomic_write_text(output_dir / RECIPE_FILE, to_yaml(recipe))
        atomic_write_json(output_dir / "environment.json", {**environment(), **launch_of(accelerator)})
    schedule = Schedule(Samples(rows, backbone), recipe.train, recipe.data.shuffle, accelerator.num_processes)
    torch.manual_seed(recipe.train.seed + accelerator.process_index)
    # Only the main process lists the checkpoints: on a shared file system others may see an older state.
    saved = broadcast_value(checkpoints(output_dir))
    done = load_weights(saved[-1], accelerator, model) if saved else 0
    strategy = new_strategy(accelerator, recipe, backbone, model)
    if saved:
        load_optimizer_and_rng(saved[-1], accelerator, strategy)
        log.info("resuming after step %d from %s", done, saved[-1])
    objective = build_objective(recipe, output_dir, accelerator, backbone, model, method, profile, strategy)
    evaluation = Evaluation(recipe, output_dir, Samples(held_out, backbone))
    metrics = Metrics(output_dir, done, schedule.steps, accelerator.is_main_process, recipe)

    # ---- step -------------------------------------------------------------------------------------------
    model.train()
    peak_rate = recipe.train.learning_rate if recipe.lora.r else recipe.train.selection_learning_rate
    skipped = 0
    steps = schedule.steps
    for step in range(done, steps):
        patience = recipe.eval.early_stopping_patience
        if patience is not None and (reason := broadcast_value(evaluation.early_stop_reason(step))):
            log.info("early stopping after step %d: %s", step, reason)
            break
        started = time.perf_counter()
        rate = learning_rate_ratio(step, steps, recipe.train)
        strategy.set_learning_rate(rate)
        gradient = selection_gradient(recipe, step / max(1, steps - 1))
        budgets = profile_at(recipe, profile, step, steps)
        totals = torch.zeros(4)  # loss, tokens, distillation loss, whether to stop
        # The loss is the mean over all answer tokens of the step, on all ranks.
        answer_tokens = schedule.answer_tokens(step)
        weight = 1 / answer_tokens
        with strategy.accumulate():
            for batch in schedule.batches(step, accelerator.process_index):
                result = objective(batch, gradient, budgets)
                result.backward(weight * strategy.loss_scale)
                loss, distillation = result.loss.item() * weight, result.distillation_loss.item() * weight
                totals[:3] += torch.tensor([loss, result.tokens, distillation])
        totals[3] = stop.requested
        summed: Any = accelerator.reduce(totals.to(accelerator.device), "sum")
        loss_value, tokens, distillation, stopping = summed.tolist()
        norm = strategy.step(apply=math.isfinite(loss_value))
        finite = math.isfinite(loss_value) and math.isfinite(norm)
        skipped = 0 if finite else skipped + 1
        if not finite:
            log.warning("step %d skipped: loss %s, gradient norm %s", step + 1, loss_value, norm)
        if skipped == MAX_CONSECUTIVE_SKIPPED:
            raise OmniMemError(
                f"{MAX_CONSECUTIVE_SKIPPED} consecutive steps without a finite loss or gradient, the last on "
                f"{[sample.row.name for sample in batch]}; lower train.learning_rate, use model.dtype=float32, or "
                "check these clips"
            )
        elapsed = time.perf_counter() - started
        record = {
            "step": step + 1,
            "epoch": round(schedule.epoch(step + 1), 4),
            "loss": _finite(loss_value),
            "distillation_loss": distillation if recipe.distill.weight > 0 else None,
            "learning_rate": rate * peak_rate,
            "gate_temperature": None if gradient is None else gradient.temperature,
            "grad_norm": _finite(norm),
            "skipped": not finite,
            "answer_tokens": answer_tokens,
            "tokens": int(tokens),
            "tokens_per_second": tokens / elapsed,
            "seconds": elapsed,
            "mean_budget": budgets.mean_budget,
            **_cache_record(result),
            "peak_gib": peak_gib(),
        }
        # ---- evaluate -----------------------------------------------------------------------------------
        if evaluation.due(step + 1, steps):
            eval_loss = evaluation.measure(objective, accelerator)
            record["eval_loss"] = _finite(eval_loss)
            weights = strategy.weights()
            if accelerator.is_main_process:
                evaluation.keep_best(step + 1, eval_loss, model, profile, weights)
            accelerator.wait_for_everyone()
            base = " (base in NF4)" if recipe.model.load_in_4bit else ""
            log.info("step %d: held-out loss %.4f nats per token%s", step + 1, eval_loss, base)
        if (step + 1) % recipe.train.logging_steps == 0 or "eval_loss" in record or step + 1 == steps:
            metrics.log(record)
        metrics.progress(record)
        # ---- save ---------------------------------------------------------------------------------------
        if (step + 1) % recipe.train.save_steps == 0 or step + 1 == steps or stopping:
            save_checkpoint(output_dir, step + 1, accelerator, model, strategy, profile, recipe.train.save_total_limit)
        if stopping and step + 1 < steps:
            metrics.close()
            log.info("stopped after step %d, which is saved: run the same command to continue", step + 1)
            raise KeyboardInterrupt
    metrics.close()
    weights = strategy.weights()
    if accelerator.is_main_process:
        save_adapter(output_dir, model, profile, weights)
        log.info("adapter and budget profile saved in %s", output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return accelerator.is_main_process


def _finite(value: float) -> float | None:
    """The value for a JSON file, which cannot hold NaN or infinity."""
    return value if math.isfinite(value) else None


def _cache_record(result: BatchResult) -> dict[str, Any]:
    """Metrics of the cache after the last batch of a step."""
    return {
        "retained": result.retained,
        "retention": result.retention,
        "gates": result.gates,
        "kv_bytes": result.kv_bytes,
    }
