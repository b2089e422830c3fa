"""Runs with a selection gradient or changing budgets: the same forward pass, files and resuming."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from accelerate import Accelerator

from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.memory.offload_store import DiskStore, Store
from omnimem.recipe import load_recipe
from small_runs import ROWS, adapter, arguments, main, metrics, trained_run
from train.budgets import profile_at
from train.setup import offload_store, selection_gradient

WITH_GRADIENT, HARD = "selection.gradient=straight_through", "selection.gradient=none"


def recipe_of(tmp_path, *overrides: str):
    return load_recipe(arguments(tmp_path, *overrides))


def uniform(mean: int) -> BudgetProfile:
    visual = round(mean * 5 / 6)
    return BudgetProfile((LayerBudget(visual, mean - visual),) * 3)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_a_selection_gradient_changes_the_training_but_not_the_first_loss(tmp_path):
    hard = trained_run(tmp_path, HARD, out="hard")
    trained = trained_run(tmp_path, WITH_GRADIENT, out="trained")
    first, second = metrics(hard), metrics(trained)
    # The forward pass is that of hard selection, to the bit; what flows back is not.
    assert first[0]["loss"] == second[0]["loss"]
    assert first[0]["grad_norm"] != second[0]["grad_norm"]
    assert not same(adapter(hard), adapter(trained))
    assert [record["gate_temperature"] for record in first] == [None] * 4
    assert [record["gate_temperature"] for record in second] == [0.3] * 4


@pytest.mark.parametrize("margin", ["gate.margin=3", pytest.param("gate.margin=null", marks=pytest.mark.long)])
def test_offload_to_disk_gives_the_same_run_and_leaves_no_files(tmp_path, margin):
    options = (WITH_GRADIENT, margin, "train.max_steps=2", "train.save_steps=2")
    runs = [trained_run(tmp_path, *options, f"train.offload={place}", out=place) for place in ("none", "disk")]
    assert same(*map(adapter, runs))
    assert not list(runs[1].glob(".evicted/*/*"))


def test_the_offload_store_is_the_one_of_the_recipe(tmp_path):
    """On the CPU, device and host memory are the same, so nothing is copied (with a GPU: `test_bptt`)."""
    kinds = {"none": Store, "disk": DiskStore, "host": Store}
    for place, kind in kinds.items():
        accelerator = Accelerator(cpu=True)
        assert type(offload_store(recipe_of(tmp_path, f"train.offload={place}"), tmp_path, accelerator)) is kind


@pytest.mark.long
def test_truncation_changes_gradients_but_not_the_loss(tmp_path):
    """The loss is the same, the gradient differs; a window as long as the stream changes nothing."""
    options = ("train.max_steps=1", "model.dtype=float64")
    cuts = {
        "none": (),
        "window": ("train.bptt_window=1",),
        "long": ("train.bptt_window=99",),
        "release": ("train.detach_below_layer=2",),
    }
    first = {name: metrics(trained_run(tmp_path, *options, *cut, out=name))[0] for name, cut in cuts.items()}
    assert len({record["loss"] for record in first.values()}) == 1
    norms = {name: record["grad_norm"] for name, record in first.items()}
    assert norms["long"] == norms["none"]
    assert len({norms["none"], norms["window"], norms["release"]}) == 3


def test_a_run_with_selection_gradient_and_changing_budgets_resumes_to_the_same_bits(tmp_path):
    options = (WITH_GRADIENT, "gate.temperature=1.0", "gate.temperature_end=0.1", "memory.random_budget=[12,48]")
    whole = trained_run(tmp_path, *options, out="whole")
    args = arguments(tmp_path, *options, out="parts")
    assert main([*args, "train.max_steps=4", "train.save_steps=2"]) == 0
    # As if it had been killed after step 3: the checkpoint of step 2 is the newest.
    for folder in sorted((tmp_path / "parts" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    (tmp_path / "parts" / "adapter_model.safetensors").unlink()
    assert main([*args, "train.max_steps=4", "train.save_steps=2"]) == 0
    assert same(adapter(whole), adapter(tmp_path / "parts"))
    temperatures = [record["gate_temperature"] for record in metrics(whole)]
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[0] == 1.0 and temperatures[-1] == pytest.approx(0.1)


def test_the_cache_has_the_budget_of_the_step_and_the_profile_that_of_the_run(tmp_path):
    run = trained_run(tmp_path, "memory.start_budget=48", "memory.curriculum_ratio=0.5")
    means = [record["mean_budget"] for record in metrics(run)]
    assert means == [48, 34, 24, 24]
    for record in metrics(run):
        retained = record["retained"]
        assert retained["visual"] + retained["audio"] <= record["mean_budget"]
    assert BudgetProfile.load(run / "budget_profile.json").mean_budget == 24


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_temperatures_go_from_start_to_end(tmp_path, schedule):
    recipe = recipe_of(
        tmp_path, WITH_GRADIENT, "gate.temperature=1.0", "gate.temperature_end=0.01", f"gate.schedule={schedule}"
    )
    found = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        gradient = selection_gradient(recipe, progress)
        assert gradient is not None
        found.append(gradient.temperature)
    assert found[0] == pytest.approx(1.0) and found[-1] == pytest.approx(0.01)
    assert found == sorted(found, reverse=True)
    middle = {"linear": 0.505, "cosine": 0.505, "exponential": 0.1}[schedule]
    assert found[2] == pytest.approx(middle)


@pytest.mark.parametrize("form", ["straight_through", "soft"])
@pytest.mark.parametrize("attention", ["true", pytest.param("false", marks=pytest.mark.long)])
def test_the_selection_gradient_works_in_bfloat16(tmp_path, form, attention):
    """Scores and gates are float32 and states bfloat16, in the backward pass too."""
    options = (
        f"selection.gradient={form}",
        f"gate.through_attention={attention}",
        "selection.lambda=1.0",
        "model.dtype=bfloat16",
    )
    run = trained_run(tmp_path, *options, "train.max_steps=2")
    assert all(record["grad_norm"] > 0 and not record["skipped"] for record in metrics(run))


def test_retention_does_not_depend_on_the_batch(tmp_path):
    """A batch of the same clip twice has the same retention as the clip alone."""
    settings = ("train.max_steps=1", "data.chunk_seconds=4")
    alone, (twice,) = (
        metrics(
            trained_run(
                tmp_path / str(size), *settings, f"train.per_device_train_batch_size={size}", rows=ROWS[1:] * size
            )
        )
        for size in (1, 2)
    )
    assert twice["tokens"] == 2 * alone[0]["tokens"] and 0 < twice["retention"]["visual"] < 1
    assert twice["retention"] == pytest.approx(alone[0]["retention"])


def test_gates_and_retention_are_in_the_metrics(tmp_path):
    hard, trained = (metrics(trained_run(tmp_path, *more, out=str(len(more)))) for more in ((HARD,), ()))
    assert all(record["gates"] is None for record in hard)
    for record in trained:
        gates = record["gates"]
        # The cache must evict: gates of retained tokens are open, gates of evicted ones closed, some are between.
        assert 0.5 < gates["retained"] <= 1 and 0 <= gates["evicted"] < 0.5 and 0 < gates["undecided"] < 1
    for record in (*hard, *trained):
        assert 0 < record["retention"]["visual"] < 1 and 0 <= record["retention"]["audio"] < 1
    assert [r["retention"] for r in hard] == [r["retention"] for r in trained]


def test_random_budgets_depend_on_the_step_alone_and_are_log_uniform(tmp_path):
    recipe = recipe_of(tmp_path, "memory.random_budget=[64,1024]")
    profile = uniform(256)
    means = [profile_at(recipe, profile, step, 2000).mean_budget for step in range(2000)]
    assert means == [profile_at(recipe, profile, step, 99).mean_budget for step in range(2000)]
    assert 64 <= min(means) < 68 and 960 < max(means) <= 1024
    below = sum(mean < 256 for mean in means) / len(means)
    assert abs(below - 0.5) < 0.05, "half of the draws lie below the geometric middle"


def test_a_curriculum_lowers_the_budget_geometrically(tmp_path):
    recipe = recipe_of(tmp_path, "memory.start_budget=1024", "memory.curriculum_ratio=0.8")
    profile = uniform(256)
    means = [profile_at(recipe, profile, step, 100).mean_budget for step in range(100)]
    assert means[0] == 1024 and means[40] == 512 and means[80:] == [256] * 20
    assert all(abs(mean - 1024 * 0.25 ** (step / 80)) <= 0.5 for step, mean in enumerate(means[:80]))
    assert math.isclose(means[79], 256, rel_tol=0.02)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((WITH_GRADIENT, "selection.method=h2o"), "no gradient can reach the selection"),
        ((WITH_GRADIENT, "selection.position_ids=compact"), "no gradient can reach the selection"),
        ((WITH_GRADIENT, "gate.temperature=0"), "gate.temperature must be above 0"),
        ((WITH_GRADIENT, "gate.margin=0"), "gate.margin must be at least 1"),
        (("memory.random_budget=[48]",), "memory.random_budget must be two whole numbers"),
        (("memory.random_budget=[48,12]",), "memory.random_budget must be two whole numbers"),
        (("memory.random_budget=[12,48]", "memory.start_budget=48"), "exclude each other"),
        (("selection.gradient=soft_through",), "selection.gradient takes one of none, straight_through"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_contradicting_settings_are_one_line_before_anything_is_written(tmp_path, capsys, overrides, words):
    assert main(arguments(tmp_path, *overrides)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
