"""Training runs: their files, and settings of a recipe that change them."""

from __future__ import annotations

import json
import math
import shlex
import sys

import pytest
import torch

from omnimem.backbones import load_backbone
from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.errors import OmniMemError
from omnimem.recipe import load_recipe
from omnimem.stream_settings import StreamSettings
from small_runs import (
    AUDIO,
    FLOWER,
    VISUAL,
    adapter,
    arguments,
    copy_run,
    lines,
    main,
    metrics,
    trained_run,
    tree,
)
from train.checkpoint import checkpoints
from train.data import load_rows
from train.loop import learning_rate_ratio
from train.setup import selection_method, stream_settings

FIELDS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "skipped", "answer_tokens", "tokens", "tokens_per_second",
    "seconds", "retained", "kv_bytes", "memory_bytes", "peak_gib",
    "mean_budget", "gate_temperature", "distillation_loss", "retention", "gates",
}  # fmt: skip


def test_loss_falls(trained):
    losses = [record["loss"] for record in metrics(trained.run)]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_a_run_leaves_all_files_to_use_and_repeat_it(trained):
    present = {path.name for path in trained.run.iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "budget_profile.json", "recipe.yaml", "metrics.jsonl",
        "environment.json", "checkpoints", "base",
    } <= present  # fmt: skip
    assert not [path for path in trained.run.rglob("*") if path.name.startswith(".")], "temporary files left behind"
    assert not [path for path in trained.run.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]

    recipe = load_recipe([*trained.args, "model.backbone=qwen2_5_omni"])  # recorded as detected
    assert load_recipe([f"recipe={trained.run / 'recipe.yaml'}"]) == recipe

    profile = BudgetProfile.load(trained.run / "budget_profile.json")
    assert [(layer.visual, layer.audio) for layer in profile.layers] == [(VISUAL, AUDIO)] * 3
    assert profile.selection == {"method": "omnimem", **selection_method(recipe).recorded()}
    assert profile.selection["variant"] == "paper"
    assert profile.stream["chunk_seconds"] == 2.0 and profile.stream["fps"] == 1.0 and profile.stream["audio"] is True
    assert profile.model == ModelFingerprint("qwen2_5_omni_text", 3, 2, 16)

    environment = json.loads((trained.run / "environment.json").read_text())
    assert all(environment["packages"][name] for name in ("torch", "transformers", "peft", "safetensors", "omnimem"))
    assert {"python", "platform", "commit", "device"} <= environment.keys()
    assert (environment["processes"], environment["distributed"], environment["backend"]) == (1, "none", None)
    assert shlex.split(environment["command"]) == sys.orig_argv


def test_metrics_have_a_line_per_step_with_every_field(trained):
    records = metrics(trained.run)
    assert [record["step"] for record in records] == list(range(1, trained.steps + 1))
    recipe = load_recipe(trained.args)
    for record in records:
        assert set(record) == FIELDS
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and record["skipped"] is False
        assert record["learning_rate"] == recipe.train.learning_rate * learning_rate_ratio(
            record["step"] - 1, trained.steps, recipe.train
        )
        assert record["epoch"] == record["step"] / 2
        assert record["tokens"] > 0 and record["tokens_per_second"] > 0 and record["seconds"] > 0
        assert 0 < record["peak_gib"] < 20
        # Both clips have more tokens of both modalities than a layer retains.
        assert (record["retained"]["visual"], record["retained"]["audio"]) == (VISUAL, AUDIO)
        stored = record["retained"]["text"] + VISUAL + AUDIO
        assert record["kv_bytes"] == 3 * stored * 2 * 2 * 16 * 4  # layers, K and V, groups, head size, float32
        beside = 64 * 4 + 38 + 4  # hidden state, metadata, attention score
        margin = record["memory_bytes"] - record["kv_bytes"] - 3 * stored * beside
        assert margin > 0 and margin % (3 * (2 * 2 * 16 * 4 + 4)) == 0  # evicted tokens: key, value, gate


def test_only_adapters_on_the_language_model_train(trained):
    after = trained.model.state_dict()
    assert after.keys() == trained.before.keys()
    changed = {name for name in after if not torch.equal(after[name], trained.before[name])}
    lora = {name for name in after if ".lora_" in name}
    # 3 layers, 4 projections, A and B; every one of them has moved.
    assert changed == lora and len(lora) == 3 * 4 * 2
    assert all(".language_model.layers." in name for name in lora)
    assert {name for name, p in trained.model.named_parameters() if p.requires_grad} == lora
    assert not [name for name in adapter(trained.run) if "audio_tower" in name or "visual" in name]
    assert len(adapter(trained.run)) == len(lora)

    on_disk = load_backbone(trained.base, dtype="float32", device="cpu").model.state_dict()
    for name, value in on_disk.items():
        inside = f"base_model.model.{name}"
        if inside not in trained.before:
            stem, last = inside.rsplit(".", 1)
            inside = f"{stem}.base_layer.{last}"
        assert torch.equal(after[inside], value), name


def test_checkpoints_are_complete_adapters(trained):
    last = checkpoints(trained.run)[-1]
    assert last.name == f"step-{trained.steps:08d}"
    final, saved = adapter(trained.run), adapter(last)
    assert final.keys() == saved.keys() and all(torch.equal(final[name], saved[name]) for name in final)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run = trained_run(tmp_path, "train.max_steps=3", "train.save_steps=1", "train.save_total_limit=2")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]


# ---- settings --------------------------------------------------------------------------------------------------------


def test_a_bfloat16_model_trains_on_the_cpu(tmp_path):
    run = trained_run(tmp_path, "model.dtype=bfloat16", "train.max_steps=2", "train.per_device_train_batch_size=2")
    assert all(math.isfinite(record["loss"]) and not record["skipped"] for record in metrics(run))
    assert {value.dtype for value in adapter(run).values()} == {torch.float32}
    assert all(value.any() for name, value in adapter(run).items() if "lora_B" in name)


@pytest.mark.parametrize("method", ["full", "uniform", "random"])
def test_every_selection_method_trains(tmp_path, method):
    run = trained_run(
        tmp_path,
        f"selection.method={method}",
        "selection.gradient=none",
        "train.max_steps=1",
        "train.per_device_train_batch_size=2",
    )
    (record,) = metrics(run)
    assert math.isfinite(record["loss"])
    if method == "full":
        assert record["retained"]["visual"] > VISUAL
    else:
        assert (record["retained"]["visual"], record["retained"]["audio"]) == (VISUAL, AUDIO)
    assert BudgetProfile.load(run / "budget_profile.json").selection["method"] == method


def test_a_finished_run_has_no_more_steps(trained, tmp_path):
    run = copy_run(trained.run, tmp_path / "run")
    assert main([*trained.args, f"output_dir={run}"]) == 0
    assert tree(run)["adapter_model.safetensors"] == tree(trained.run)["adapter_model.safetensors"]
    assert tree(run)["metrics.jsonl"] == tree(trained.run)["metrics.jsonl"]


def test_settings_of_a_recipe_reach_the_reader(tmp_path):
    recipe = load_recipe(arguments(tmp_path, "data.fps=2", "data.audio=false", "data.max_seconds=4"))
    assert stream_settings(recipe) == StreamSettings(fps=2.0, chunk_seconds=2.0, audio=False, max_seconds=4.0)
    with pytest.raises(OmniMemError, match="multiple of 2"):
        stream_settings(load_recipe(arguments(tmp_path, "data.chunk_seconds=5"))).open(
            load_rows(recipe.data).rows[0].media, load_backbone("tiny", device="meta", dtype="float32")
        )


def test_a_truncated_clip_ends_the_run_or_is_skipped(tmp_path, capsys):
    rows = [
        {"media": "broken_truncated_half_toy_rabbit.mp4", "question": "What is seen?", "answer": "A rabbit."},
        {"media": FLOWER, "question": "What is seen?", "answer": "A red flower."},
    ]
    assert main(arguments(tmp_path, rows=rows)) == 2
    line = lines(capsys.readouterr().err)[-1]
    assert line.startswith("train: broken_truncated_half_toy_rabbit.mp4") and "data.on_bad_row=skip" in line
    run = trained_run(tmp_path, "data.on_bad_row=skip", "data.shuffle=false", "train.max_steps=2", rows=rows)
    first, second = metrics(run)
    assert first["loss"] == 0 and first["grad_norm"] == 0 and second["loss"] > 0


def test_out_of_memory_names_the_three_settings_to_lower(tmp_path, capsys, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("train.objective.StreamObjective.__call__", exhausted)
    assert main(arguments(tmp_path)) == 2
    error = capsys.readouterr().err
    assert all(
        key in error for key in ("data.chunk_seconds", "memory.mean_budget", "train.per_device_train_batch_size")
    )
    assert "Traceback" not in error


def test_keys_without_effect_are_logged(tmp_path, caplog):
    with caplog.at_level("WARNING", "omnimem.train"):
        trained_run(
            *(
                tmp_path,
                "selection.gradient=none",
                "gate.temperature=0.5",
                "distill.temperature=2",
                "eval.save_total_limit=2",
            ),
            "train.max_steps=1",
        )
    told = [message for message in caplog.messages if "ignored because" in message]
    assert told == [
        "gate.temperature: ignored because selection.gradient=none",
        "distill.temperature: ignored because distill.weight=0",
        "eval.save_total_limit: ignored because eval.path=null",
    ]


@pytest.mark.long
def test_keys_without_influence_on_the_result_may_change_when_a_run_resumes(tmp_path):
    trained_run(tmp_path, "train.max_steps=2", "train.save_steps=2")
    more = ("train.max_steps=4", "train.offload=disk", "data.prefetch_chunks=0", "train.ddp_timeout=600")
    assert main(arguments(tmp_path, *more)) == 0
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4]
