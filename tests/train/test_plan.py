"""The memory plan of `dry_run=true` against the measured peak: live tensor bytes, counted at every operation."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import train.batch_encoder
from omnimem.recipe import load_recipe
from small_runs import RABBIT, arguments
from train.data import load_rows
from train.memory_plan import EVICTED_PART, memory_plan
from train.objective import StreamObjective
from train.samples import tokenize_row
from train.setup import (
    add_lora,
    build_tiny_base,
    check_recipe,
    load_base,
    selection_gradient,
    selection_method,
    stream_settings,
)
from train.stream_plan import plan_stream

ROWS = [{"media": RABBIT, "questions": [{"question": "What is seen?", "answer": "A toy rabbit on a table."}]}]


class Live(TorchDispatchMode):
    """Peak bytes of live storages that were allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def measured(recipe, profile, tmp_path, monkeypatch) -> int:
    """Bytes that a step allocates besides the weights."""
    build_tiny_base(recipe, tmp_path / "run")
    backbone = load_base(recipe, tmp_path / "run", torch.device("cpu"))
    model = add_lora(recipe, backbone)
    model.train()
    samples = [tokenize_row(row, backbone) for row in load_rows(recipe.data).rows]
    objective = StreamObjective(
        backbone, model, profile, selection_method(recipe), stream_settings(recipe), distill=recipe.distill
    )
    encode = train.batch_encoder.encode_chunks

    def outside(*args):
        """Encoders and their inputs are not part of the plan."""
        with _disable_current_modes():
            return encode(*args)

    monkeypatch.setattr(train.batch_encoder, "encode_chunks", outside)
    with Live() as live:
        objective(samples, selection_gradient(recipe, 0.0)).backward(1.0)
    return live.peak


@pytest.mark.parametrize(
    "more",
    [("selection.gradient=none",), (), ("distill.weight=1.0",), ("memory.mean_budget=200",)],
    ids=["hard", "straight_through", "distilled", "larger"],
)
def test_a_step_takes_the_planned_memory(tmp_path, monkeypatch, more):
    """Within a third: the plan ignores temporary copies and counts only the wide tensors of a layer."""
    recipe = load_recipe(
        arguments(tmp_path, "data.fps=4", "data.chunk_seconds=4", "train.offload=none", *more, rows=ROWS)
    )
    skeleton, profile = check_recipe(recipe)
    streams = [plan_stream(row, skeleton, stream_settings(recipe)) for row in load_rows(recipe.data).rows]
    parts = memory_plan(recipe, skeleton, profile, selection_method(recipe), streams)
    of_a_step = sum(size for name, size in parts.items() if name not in ("weights", "adapter, gradients, optimizer"))
    found = measured(recipe, profile, tmp_path, monkeypatch)
    assert 0.75 <= of_a_step / found <= 1.33
    assert any(EVICTED_PART in name for name in parts)
