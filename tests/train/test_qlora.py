"""QLoRA: the adapter is trained on the base in NF4 and merged into the full-precision base."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from omnimem.backbones import load_backbone
from omnimem.backbones.adapter import load_adapter
from omnimem.cli import main as omnimem
from omnimem.recipe import load_recipe
from small_runs import ROWS, adapter, arguments, main, metrics, trained_run
from train.data import load_rows
from train.memory_plan import memory_plan
from train.setup import check_recipe, selection_method, stream_settings
from train.stream_plan import plan_stream

pytest.importorskip("bitsandbytes")
QLORA = "model.load_in_4bit=true"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("qlora"), QLORA, "train.max_steps=20", "train.save_steps=10")


def test_the_base_is_quantized_and_the_rest_is_not():
    quantized = load_backbone("tiny", dtype="float32", device="cpu", load_in_4bit=True)
    kinds = {name: type(module).__name__ for name, module in quantized.model.named_modules()}
    linear = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert len(linear) == 3 * 7 and all(".language_model.layers." in name for name in linear)
    assert any(kind == "Linear" for name, kind in kinds.items() if "audio_tower" in name)
    assert kinds["lm_head"] == "Linear"


def test_the_loss_falls(run):
    losses = [record["loss"] for record in metrics(run)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_export_is_the_full_precision_base_and_the_adapter(run, tmp_path, capsys, dtype):
    """Training used the quantized base; the export says so and is checked against full-precision base + adapter."""
    out = tmp_path / "merged"
    assert omnimem(["export", str(run), "--out", str(out), "--dtype", dtype]) == 0
    assert "verified against base + adapter" in capsys.readouterr().out
    merged, base = (load_backbone(path, dtype=dtype, device="cpu") for path in (out, run / "base"))
    assert not any("4bit" in type(module).__name__ for module in merged.model.modules())
    load_adapter(base, run)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours, theirs = (one.model(input_ids=ids).logits.double() for one in (merged, base))
    assert (ours - theirs).abs().max() <= (1e-4 if dtype == "float32" else 0.3)
    card = (out / "README.md").read_text()
    assert "NF4" in card


@pytest.mark.long
def test_a_quantized_run_resumes_to_the_same_bits(run, tmp_path):
    again = trained_run(tmp_path, QLORA, "train.max_steps=20", "train.save_steps=10", out="again")
    assert all(torch.equal(value, adapter(again)[name]) for name, value in adapter(run).items())
    for name in ("adapter_model.safetensors", "checkpoints/step-00000020/state.json"):
        (again / name).unlink()
    import shutil

    shutil.rmtree(again / "checkpoints" / "step-00000020")
    assert main(arguments(tmp_path, QLORA, "train.max_steps=20", "train.save_steps=10", out="again")) == 0
    assert all(torch.equal(value, adapter(again)[name]) for name, value in adapter(run).items())


def test_evaluation_says_which_weights_it_used(tmp_path, caplog):
    held_out = f"eval.path={tmp_path / 'data.jsonl'}", f"eval.root={arguments(tmp_path)[2].split('=')[1]}"
    with caplog.at_level("INFO", "omnimem.train"):
        trained_run(tmp_path, QLORA, *held_out, "train.max_steps=1", rows=ROWS[:1])
    assert any("held-out" in message and "NF4" in message for message in caplog.messages)


def test_the_plan_counts_four_bits(tmp_path):
    parts = {}
    for load_in_4bit in (False, True):
        recipe = load_recipe(arguments(tmp_path, f"model.load_in_4bit={load_in_4bit}"))
        skeleton, profile = check_recipe(recipe)
        streams = [plan_stream(row, skeleton, stream_settings(recipe)) for row in load_rows(recipe.data).rows]
        parts[load_in_4bit] = memory_plan(recipe, skeleton, profile, selection_method(recipe), streams)["weights"]
    skeleton, _ = check_recipe(recipe)
    projections = sum(p.numel() for p in skeleton.language_model.layers.parameters() if p.ndim == 2)
    assert parts[False] - parts[True] == pytest.approx(projections * (4 - 0.516), rel=1e-3)


def test_without_the_library_it_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.setup.find_spec", lambda name: None if name == "bitsandbytes" else importlib.util)
    assert main(arguments(tmp_path, QLORA)) == 2
    assert "needs bitsandbytes" in capsys.readouterr().err
