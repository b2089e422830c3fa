"""Time and peak memory of a training step of the shipped recipes, compared with the plan of `dry_run=true`.

    python tests/benchmarks/recipe_step.py --recipes video_salmonn_lora,video_salmonn_qlora,release_sft --minutes 10 \\
        --out tests/benchmarks/results/recipe_step.json
    python tests/benchmarks/recipe_step.py --recipes video_salmonn_qlora --set data.max_pixels=61250
    python tests/benchmarks/recipe_step.py --shape tiny --device cpu --minutes 0.8      # smoke test

The model has the published configuration and random weights, created on the device in the recipe's dtype (NF4 layer by
layer); everything else is built as in `train.py`: adapter, budgets, selection, offload store, objective, AdamW. The
stream is a quickstart clip whose packets are repeated up to `--minutes`, with one question at the end. After one
warm-up step, two steps are measured. Memory is measured on GPUs only. Out of memory is reported as a result.

Text is tokenized with a substitute tokenizer, which needs more tokens for timestamps between frames (release_sft) than
the published one. `--set model.name_or_path=DIR` with a folder that has the published configuration and tokenizer (no
weights) avoids that.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Published sizes come from the table in omnimem.backbones.published, also on a machine with network access.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import Accelerator
from synthetic import read, repeat, with_random_weights

from data_prep.shipped import QUICKSTART_CLIP
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json
from omnimem.recipe import Recipe, TrainConfig, load_recipe
from train.budgets import profile_at
from train.data import load_rows
from train.distributed import new_accelerator, new_strategy
from train.environment import _version, environment
from train.loop import learning_rate_ratio
from train.memory_plan import device_bytes, memory_plan
from train.objective import StreamObjective
from train.parallel import ParallelStrategy
from train.samples import tokenize_row
from train.schedule import Schedule
from train.setup import (
    add_lora,
    build_objective,
    check_recipe,
    selection_gradient,
    selection_method,
    stream_settings,
)
from train.stream_plan import plan_stream

RECIPES = "video_salmonn_lora,video_salmonn_qlora,release_sft"
QUESTION = "What does the astronaut drop on the Moon, and which of the two lands first?"
ANSWER = "He drops a hammer and a feather. Without air both fall at the same rate and land at the same time."
MEASURED = 2
GIB = 2**30

# ---- a step ----------------------------------------------------------------------------------------------------------


def run_step(
    recipe: Recipe,
    number: int,
    schedule: Schedule,
    objective: StreamObjective,
    profile: BudgetProfile,
    processes: ParallelStrategy,
) -> dict[str, Any]:
    """One optimizer step, as in `train.loop.train`: number of tokens, and whether AdamW changed the weights."""
    processes.set_learning_rate(learning_rate_ratio(number, schedule.steps, recipe.train))
    gradient = selection_gradient(recipe, number / max(1, schedule.steps - 1))
    budgets = profile_at(recipe, profile, number, schedule.steps)
    weight, loss, tokens = 1 / schedule.answer_tokens(number), 0.0, 0
    with processes.accumulate():
        for batch in schedule.batches(number, 0):
            outcome = objective(batch, gradient, budgets)
            outcome.backward(weight * processes.loss_scale)
            loss += outcome.loss.item() * weight
            tokens += outcome.tokens
    norm = processes.step(apply=math.isfinite(loss))
    finite = math.isfinite(loss) and math.isfinite(norm)
    return {"tokens": tokens, "retained": outcome.retained, "loss": loss if finite else None, "finite": finite}


def plan(recipe: Recipe, overrides: list[str]) -> dict[str, Any]:
    """The row of a recipe before its run: model, overrides, and the planned memory of a step."""
    skeleton, profile = check_recipe(recipe)
    rows = load_rows(recipe.data, skeleton.supports_audio).rows
    stream = plan_stream(rows[0], skeleton, stream_settings(recipe))
    parts = memory_plan(recipe, skeleton, profile, selection_method(recipe), [stream])
    on_device = device_bytes(recipe, parts)
    return {
        "recipe": recipe.recipe,
        "overrides": overrides,
        "model": recipe.model.name_or_path,
        "dtype": recipe.model.dtype,
        "load_in_4bit": recipe.model.load_in_4bit,
        "plan": {
            **asdict(stream),
            "tokens": stream.tokens,
            "parts_bytes": parts,
            "device_bytes": on_device,
        },
    }


def measure(recipe: Recipe, accelerator: Accelerator, found: dict[str, Any]) -> None:
    """Warm up and measure; results go into `found` at once, so that they survive an out-of-memory error."""
    device = accelerator.device
    output_dir = Path(recipe.output_dir)
    skeleton, profile = check_recipe(recipe)
    found["weights_bytes"] = None
    backbone = with_random_weights(skeleton, recipe, device)
    found["weights_bytes"] = allocated(device)
    peft_model = add_lora(recipe, backbone)
    samples = [tokenize_row(row, backbone) for row in load_rows(recipe.data, backbone.supports_audio).rows]
    schedule = Schedule(samples, recipe.train, recipe.data.shuffle, processes=1)
    processes = new_strategy(accelerator, recipe, backbone, peft_model)
    objective = build_objective(recipe, output_dir, accelerator, backbone, peft_model, profile, processes)
    peft_model.train()
    found["step_seconds"] = []
    for number in range(1 + MEASURED):
        if number == 1 and device.type == "cuda":
            # Between two steps: weights, adapter and optimizer state.
            found["between_steps_bytes"] = allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        started = clock(device)
        found.update(run_step(recipe, number, schedule, objective, profile, processes))
        seconds = clock(device) - started
        if number == 0:
            found["warm_up_seconds"] = seconds
        else:
            found["step_seconds"].append(seconds)


def clock(device: torch.device) -> float:
    """Seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def allocated(device: torch.device) -> int | None:
    """Bytes of tensors currently on the GPU; None without a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def attempt(recipe: Recipe, accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Add the measured values to the row of a recipe, up to an out-of-memory error if there is one."""
    device = accelerator.device
    cuda = device.type == "cuda"
    # Modules and their hooks form reference cycles: without this the previous model is still in memory.
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    row["out_of_memory"] = None
    try:
        measure(recipe, accelerator, row)
    except torch.OutOfMemoryError as error:
        row["out_of_memory"] = str(error).splitlines()[0]
    row["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device) if cuda else None
    row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device) if cuda else None


# ---- output -------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """A row as a printed line."""
    planned, peak, reserved = row["plan"]["device_bytes"], row["peak_allocated_bytes"], row["peak_reserved_bytes"]
    seconds = row.get("step_seconds", [])
    time_taken = f"{sum(seconds) / len(seconds):.1f} s per step" if len(seconds) == MEASURED else "not measured"
    if row["out_of_memory"]:
        time_taken = "OUT OF MEMORY"
    elif not row["finite"]:
        time_taken += " WITHOUT AdamW (loss or gradient is not finite)"
    memory = "peak not measured, "
    if peak is not None:
        memory = f"peak {peak / GIB:.2f} GiB ({reserved / GIB:.2f} reserved), {peak / planned:.2f} times the "
    return (
        f"{row['recipe']}: {row['plan']['chunks']} chunks, {row['plan']['tokens']:,} tokens: {time_taken}; "
        f"{memory}planned {planned / GIB:.2f} GiB"
    )


def main() -> int:
    """Measure and report; exit 1 if a recipe ran out of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=RECIPES, help="names (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the stream (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override in every recipe; repeatable"
    )
    parser.add_argument("--shape", choices=("published", "tiny"), default="published")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="write the results as JSON, after every recipe")
    args = parser.parse_args()
    accelerator = new_accelerator(TrainConfig().ddp_timeout)
    device = accelerator.device
    if device.type != args.device:
        parser.error(f"training here runs on {device.type}, not {args.device} (CUDA_VISIBLE_DEVICES= hides GPUs)")
    cuda = device.type == "cuda"
    seconds = 60 * args.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip, manifest = folder / "clip.mkv", folder / "data.jsonl"
        stream = {"media": clip.name, "question": QUESTION, "answer": ANSWER}
        manifest.write_text(json.dumps(stream) + "\n", encoding="utf-8")
        fixed = [
            f"data.path={manifest}",
            f"train.max_steps={1 + MEASURED}",
            "finish.question=null",
            "finish.media=null",
        ]
        fixed += ["model.name_or_path=tiny"] if args.shape == "tiny" else []
        repeat(QUICKSTART_CLIP, clip, seconds)
        report: dict[str, Any] = {
            **environment(),
            "bitsandbytes": _version("bitsandbytes"),
            "device_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
            "shape": args.shape,
            "minutes": args.minutes,
            "media": read(clip, seconds),
        }
        try:
            # Load all recipes before running the first, to find unknown keys early.
            recipes = [
                load_recipe([f"recipe={recipe}", f"output_dir={folder / recipe}", *fixed, *args.set, "dry_run=true"])
                for recipe in args.recipes.split(",")
            ]
            rows = [plan(recipe, args.set) for recipe in recipes]
        except OmniMemError as error:
            parser.error(str(error))
        for number, (recipe, row) in enumerate(zip(recipes, rows, strict=True)):
            attempt(recipe, accelerator, row)
            print(line(row), flush=True)
            if args.out:
                atomic_write_json(args.out, {**report, "rows": rows[: number + 1]})
    return int(any(row["out_of_memory"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
