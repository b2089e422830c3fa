"""`memory.gib`: the mean budget of a run from the bytes its memory may take."""

from __future__ import annotations

import pytest

from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.memory.token_bytes import resident_bytes, token_bytes_of
from omnimem.recipe import load_recipe
from small_runs import arguments, metrics, refused, trained_run
from train.setup import check_recipe, selection_method

GIB = 0.00004


def planned(folder, *overrides):
    """Profile of a run, and the bytes of its retained tokens and of one more per layer."""
    recipe = load_recipe(arguments(folder, *overrides))
    skeleton, profile = check_recipe(recipe)
    token = token_bytes_of(skeleton, selection_method(recipe), recipe.memory.kv_dtype)
    size = resident_bytes(profile, token)
    return profile, size, size + len(profile.layers) * token.total


@pytest.mark.parametrize(
    "more", [(), ("memory.kv_dtype=int4",), ("selection.redundancy=sketch",), ("model.dtype=bfloat16",)]
)
def test_the_mean_budget_is_the_largest_that_fits(tmp_path, more):
    _, size, larger = planned(tmp_path, f"memory.gib={GIB}", *more)
    assert size <= GIB * 2**30 < larger


def test_a_given_profile_is_scaled(tmp_path):
    given = tmp_path / "profile.json"
    BudgetProfile((LayerBudget(60, 20), LayerBudget(40, 10), LayerBudget(20, 30))).save(given)
    profile, size, larger = planned(tmp_path, f"memory.profile={given}", "memory.gib=0.0005")
    assert size <= 0.0005 * 2**30 < larger
    assert profile.layers[0].visual == pytest.approx(2 * profile.layers[1].visual * 3 / 4, abs=2)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("memory.gib=1e-9",), "memory.gib: a memory of 1e-09 GiB holds 0 tokens per layer"),
        (("memory.gib=1", "selection.method=full", "selection.gradient=none"), "full retains everything"),
        (("memory.gib=1", "memory.start_budget=20"), "memory.start_budget=20 is below"),
        (("memory.gib=1", "memory.random_budget=[20,30]"), "memory.random_budget=[20, 30] excludes"),
        (("memory.gib=1", "memory.mean_budget=20"), "memory.gib and memory.mean_budget both set"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, capsys, overrides, part):
    assert part in refused(arguments(tmp_path, *overrides, "dry_run=true"), capsys)


def test_a_run_logs_the_bytes_of_its_memory(tmp_path):
    run = trained_run(tmp_path, f"memory.gib={GIB}", "memory.kv_dtype=int8", "train.max_steps=1", "data.fps=4")
    (record,) = metrics(run)
    profile = BudgetProfile.load(run / "budget_profile.json")
    assert record["mean_budget"] == profile.mean_budget
    assert record["retained"]["visual"] + record["retained"]["audio"] <= profile.mean_budget
    assert record["kv_bytes"] < record["memory_bytes"]
