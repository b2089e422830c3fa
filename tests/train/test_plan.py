"""The memory plan of `dry_run=true` against what a step really holds: live tensor bytes, counted at every operation."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import train.lesson
from omnimem.recipe import load_recipe
from small_runs import RABBIT, arguments
from train.data import load_rows, tokenise
from train.objective import StreamObjective
from train.plan import WAITING, memory_plan, plan_stream
from train.setup import add_lora, build_base, check_recipe, gradient_of, load_base, selection_of, settings_of

ROWS = [{"media": RABBIT, "questions": [{"question": "What is seen?", "answer": "A toy rabbit on a table."}]}]


class Live(TorchDispatchMode):
    """Most bytes of storages alive at once, of those made inside."""

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
    """Bytes a step makes beside the weights."""
    build_base(recipe, tmp_path / "run")
    backbone = load_base(recipe, tmp_path / "run", torch.device("cpu"))
    model = add_lora(recipe, backbone)
    model.train()
    samples = [tokenise(row, backbone) for row in load_rows(recipe.data).rows]
    objective = StreamObjective(
        backbone, model, profile, selection_of(recipe), settings_of(recipe), distill=recipe.distill
    )
    encode = train.lesson._encoded

    def outside(*args):
        """Encoders and what they are given are no part of the plan."""
        with _disable_current_modes():
            return encode(*args)

    monkeypatch.setattr(train.lesson, "_encoded", outside)
    with Live() as live:
        objective(samples, gradient_of(recipe, 0.0)).backward(1.0)
    return live.peak


@pytest.mark.parametrize(
    "more",
    [("selection.gradient=none",), (), ("distill.weight=1.0",), ("memory.mean_budget=200",)],
    ids=["hard", "taught", "distilled", "larger"],
)
def test_a_step_holds_what_the_plan_says(tmp_path, monkeypatch, more):
    """Within a third: the plan knows nothing of temporary copies, and counts only the wide tensors of a layer."""
    recipe = load_recipe(
        arguments(tmp_path, "data.fps=4", "data.chunk_seconds=4", "train.offload=none", *more, rows=ROWS)
    )
    skeleton, profile = check_recipe(recipe)
    streams = [plan_stream(row, skeleton, settings_of(recipe)) for row in load_rows(recipe.data).rows]
    parts = memory_plan(recipe, skeleton, profile, selection_of(recipe), streams)
    of_a_step = sum(size for name, size in parts.items() if name not in ("weights", "adapter, gradients, optimizer"))
    found = measured(recipe, profile, tmp_path, monkeypatch)
    assert 0.75 <= of_a_step / found <= 1.33
    assert any(WAITING in name for name in parts)
