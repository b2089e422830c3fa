"""Checks of a recipe beyond types: the range of each key, and keys that contradict each other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

from omnimem.errors import OmniMemError, is_valid_text
from omnimem.recipe.messages import show_value
from omnimem.recipe.schema import KEY_TYPES, Recipe, value_of

LARGEST, LARGEST_SEED = 2**31 - 1, 2**32 - 1
"""Whole numbers that every library accepts; seeds are multiplied before they reach a generator."""

LONGEST_NAME = 255
"""Bytes in the name of a file or folder, on every common file system."""

TRACKERS = ("wandb", "trackio")
"""Libraries with an `init`, a `log` and a `finish`."""

AT_LEAST: dict[int, tuple[str, ...]] = {
    0: (
        "model.seed", "train.seed", "selection.seed", "data.prefetch_chunks", "selection.lambda",
        "selection.num_sink_tokens", "distill.weight", "train.learning_rate", "train.modules_to_save_learning_rate",
        "train.selection_learning_rate", "selection.head_hidden_size", "lora.r",
        "train.weight_decay", "train.detach_below_layer",
    ),
    1: (
        "data.short_side", "data.max_pixels", "data.timestamps", "selection.sketch_dim", "selection.query_stride",
        "selection.window_size", "selection.kernel_size", "gate.margin", "lora.lora_alpha",
        "train.max_steps", "train.per_device_train_batch_size",
        "train.gradient_accumulation_steps", "train.bptt_window", "train.detach_from_layer", "train.logging_steps",
        "train.save_steps", "train.save_total_limit", "train.threads", "train.ddp_timeout", "eval.eval_steps",
        "eval.early_stopping_patience", "eval.save_total_limit",
    ),
    2: ("memory.mean_budget", "memory.start_budget"),
}  # fmt: skip

AT_MOST: dict[int, tuple[str, ...]] = {1024: ("data.fps", "train.threads"), 2**16: ("lora.r",)}
"""Limits beyond which no machine has the memory or the threads."""

ABOVE_ZERO = (
    "data.fps", "data.chunk_seconds", "data.max_seconds", "memory.ratio", "memory.gib", "gate.temperature",
    "gate.temperature_end", "gate.gradient_scale", "distill.temperature", "train.num_train_epochs",
    "train.max_grad_norm",
)  # fmt: skip

FROM_ZERO_TO_ONE = (
    "memory.curriculum_ratio", "selection.ema_decay", "selection.share", "selection.recent", "train.warmup_ratio",
    "train.min_lr_rate",
)  # fmt: skip

BELOW_ONE = ("lora.lora_dropout", "train.adam_beta1", "train.adam_beta2")
"""Keys of at least 0 and below 1."""


def validate(recipe: Recipe) -> None:
    """Check ranges and combinations of keys.

    Raises
    ------
    OmniMemError
        The first key that is out of range, with its value and its range.
    """
    _check_storable(recipe)
    _check_ranges(recipe)
    _check_lists(recipe)
    _check_chunks(recipe)
    _check_combinations(recipe)


def keys_without_effect(recipe: Recipe) -> list[str]:
    """One line for each group of keys that was set although another key disables it."""
    gate = [key for key in KEY_TYPES if key.startswith("gate.")]
    evaluation = [key for key in KEY_TYPES if key.startswith("eval.") and key != "eval.path"]
    distill = [key for key in KEY_TYPES if key.startswith("distill.") and key != "distill.weight"]
    switches = (
        ("selection.gradient=none", recipe.selection.gradient == "none", gate),
        ("distill.weight=0", recipe.distill.weight == 0, distill),
        ("lora.modules_to_save=[]", not recipe.lora.modules_to_save, ["train.modules_to_save_learning_rate"]),
        (
            f"selection.method={recipe.selection.method}",
            recipe.selection.method != "learned",
            ["train.selection_learning_rate"],
        ),
        ("eval.path=null", recipe.eval.path is None, evaluation),
    )
    default, lines = Recipe(), []
    for switch, disabled, keys in switches:
        given = [key for key in keys if value_of(recipe, key) != value_of(default, key)]
        if disabled and given:
            lines.append(f"{', '.join(given)}: ignored because {switch}")
    return lines


def _require(recipe: Recipe, holds: bool, key: str, rule: str) -> None:
    if not holds:
        raise OmniMemError(f"{key} must {rule}, got {show_value(value_of(recipe, key))}")


def _check_storable(recipe: Recipe) -> None:
    """Numbers and texts must be ones that files and libraries can hold."""
    for key, hint in KEY_TYPES.items():
        value = value_of(recipe, key)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, float):
                _require(recipe, math.isfinite(entry), key, "be finite")
            elif isinstance(entry, int):
                most = LARGEST_SEED if key.endswith("seed") else LARGEST
                _require(recipe, entry <= most, key, f"be at most {most}")
            elif isinstance(entry, str):
                _require(recipe, is_valid_text(entry), key, "be valid UTF-8 text without NUL characters")
        _require(recipe, hint is not str or str(value).strip() != "", key, "not be empty")
    longest = max(len(os.fsencode(name)) for name in (*Path(recipe.output_dir).parts, ""))
    _require(recipe, longest <= LONGEST_NAME, "output_dir", f"have path components of at most {LONGEST_NAME} bytes")


def _check_ranges(recipe: Recipe) -> None:
    def check(key: str, holds: Callable[[float], bool], rule: str) -> None:
        value = value_of(recipe, key)
        _require(recipe, value is None or holds(value), key, f"be {rule}")

    for least, keys in AT_LEAST.items():
        for key in keys:
            unit = " tokens" if key.endswith("_budget") else ""
            check(key, lambda value, least=least: value >= least, f"at least {least}{unit}")
    for most, keys in AT_MOST.items():
        for key in keys:
            check(key, lambda value, most=most: value <= most, f"at most {most}")
    for key in ABOVE_ZERO:
        check(key, lambda value: value > 0, "above 0")
    for key in FROM_ZERO_TO_ONE:
        check(key, lambda value: 0 <= value <= 1, "between 0 and 1")
    for key in BELOW_ONE:
        check(key, lambda value: 0 <= value < 1, "at least 0 and below 1")
    check("data.max_seconds", lambda value: value >= 1e-6, "above 0.000001")
    layer = recipe.train.detach_below_layer
    whole_or_share = layer < 1 or layer == int(layer)
    rule = "be a whole number, or a share of the layers below 1"
    _require(recipe, whole_or_share, "train.detach_below_layer", rule)
    scale = recipe.data.time_scale
    positive = scale > 0 if isinstance(scale, float) else scale == "auto"
    _require(recipe, positive, "data.time_scale", "be auto or a number above 0")


def _check_lists(recipe: Recipe) -> None:
    span = recipe.memory.random_budget
    ordered = span is None or (len(span) == 2 and 2 <= span[0] <= span[1])
    _require(recipe, ordered, "memory.random_budget", "be two whole numbers, at least 2 and in order")
    targets = recipe.lora.target_modules
    _require(recipe, bool(targets) and all(targets), "lora.target_modules", "be a list of at least one module name")
    known = all(name in TRACKERS for name in recipe.train.report_to)
    _require(recipe, known, "train.report_to", f"be a list of: {', '.join(TRACKERS)}")


def _check_chunks(recipe: Recipe) -> None:
    frames = recipe.data.fps * recipe.data.chunk_seconds
    if math.isinf(frames) or round(frames) < 1 or not math.isclose(frames, round(frames), rel_tol=1e-9):
        raise OmniMemError(
            "data.chunk_seconds must hold a whole number of frames, got "
            f"{recipe.data.chunk_seconds:g} s at data.fps {recipe.data.fps:g} = {frames:g} frames"
        )


def _check_combinations(recipe: Recipe) -> None:
    if recipe.lora.r == 0 and recipe.selection.method != "learned":
        raise OmniMemError(
            f"lora.r=0 with selection.method={recipe.selection.method} leaves nothing to train; set "
            "selection.method=learned or lora.r above 0"
        )
    if recipe.lora.r == 0 and recipe.lora.modules_to_save:
        raise OmniMemError("lora.modules_to_save is saved with the adapter and needs lora.r above 0")
    if recipe.selection.method == "learned" and recipe.selection.gradient == "none":
        raise OmniMemError(
            "selection.method=learned trains its heads through selection.gradient: set it to straight_through or soft"
        )
    if recipe.memory.gib is not None and recipe.memory.mean_budget is not None:
        raise OmniMemError("memory.gib and memory.mean_budget both set the size of the memory; set one of them")
    if recipe.memory.random_budget is not None and recipe.memory.start_budget is not None:
        raise OmniMemError("memory.start_budget and memory.random_budget exclude each other; set one of them")
    if recipe.distill.weight > 0 and not recipe.distill.teacher_adapter and recipe.lora.modules_to_save:
        raise OmniMemError(
            "the base model cannot be the teacher while lora.modules_to_save trains its projectors; remove "
            "lora.modules_to_save or set distill.teacher_adapter=true"
        )
    if recipe.distill.cache_dir is not None and recipe.distill.teacher_adapter:
        raise OmniMemError(
            "distill.cache_dir stores the logits of the base model, but with distill.teacher_adapter=true the teacher "
            "changes; remove one of them"
        )
    if recipe.finish.media is not None and recipe.finish.question is None:
        raise OmniMemError("finish.media without finish.question: set the question about the clip, or remove both")
