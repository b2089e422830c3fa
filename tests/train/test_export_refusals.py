"""Exports that are refused with one line: the run and the output folder stay unchanged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimem.backbones.qwen2_5_omni.tiny import build_tiny
from omnimem.cli import main as omnimem
from small_runs import copy_run, lines, refused_export, start
from train.export import export_run


def test_no_adapter(tiny_path, tmp_path, capsys):
    assert "no adapter" in refused_export(capsys, tiny_path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "no adapter" in refused_export(capsys, tmp_path / "empty", tmp_path / "out")
    assert "nosuch" in refused_export(capsys, tmp_path / "nosuch", tmp_path / "out")


def test_a_run_that_has_not_finished(run, tmp_path, capsys):
    unfinished = copy_run(run, tmp_path / "run")
    for name in ("adapter_model.safetensors", "adapter_config.json", "budget_profile.json"):
        (unfinished / name).unlink()
    assert "without an adapter" in refused_export(capsys, unfinished, tmp_path / "out")


@pytest.mark.parametrize("place", [".", "..", "../..", "base", "checkpoints"])
def test_an_output_that_would_replace_the_run(run, tmp_path, capsys, place):
    copied = copy_run(run, tmp_path / "runs" / "mine")
    refused_export(capsys, copied, copied / place, "--overwrite")
    refused_export(capsys, copied, Path(os.path.relpath(copied)) / place, "--overwrite")


def test_an_output_that_would_replace_the_base_of_the_run(run, tmp_path, capsys):
    """The base of a real run is a download in another folder."""
    copied, base = copy_run(run, tmp_path / "run"), copy_run(run / "base", tmp_path / "models" / "omni")
    shutil.rmtree(copied / "base")
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    export_run(copied, tmp_path / "fine")
    assert str(base) in refused_export(capsys, copied, base, "--overwrite")


def test_an_output_that_is_not_empty(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "--overwrite" in refused_export(capsys, run, out)
    assert omnimem(["export", str(run), "--out", str(out), "--overwrite"]) == 0
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").is_file()
    (tmp_path / "file").write_text("precious")
    assert "file" in refused_export(capsys, run, tmp_path / "file", "--overwrite")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_model.safetensors", "truncated"),
        ("adapter_model.safetensors", "noise"),
        ("adapter_model.safetensors", "missing"),
        ("adapter_config.json", "truncated"),
        ("adapter_config.json", "noise"),
        ("budget_profile.json", "truncated"),
        ("budget_profile.json", "missing"),
    ],
)
def test_a_damaged_run(run, tmp_path, capsys, file, content):
    damaged = copy_run(run, tmp_path / "run")
    path = damaged / file
    whole = path.read_bytes()
    if content == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else b'{"noise": 1}' + bytes(99))
    assert str(damaged) in refused_export(capsys, damaged, tmp_path / "out")


@pytest.mark.parametrize("base", [{"hidden": 128}, {"layers": 2}, {"layers": 4}], ids=str)
def test_an_adapter_of_another_model(run, tmp_path, capsys, base):
    other = copy_run(run, tmp_path / "run")
    build_tiny(other / "base", **base)
    refused_export(capsys, other, tmp_path / "out")


@pytest.mark.long
def test_a_mismatch_is_one_line_in_a_separate_process_too(run, tmp_path):
    """There warnings of transformers and PEFT would reach the terminal."""
    other = copy_run(run, tmp_path / "run")
    build_tiny(other / "base", layers=4)
    done = start("-m", "omnimem", "export", other, "--out", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = lines(done.stderr)
    assert line.startswith("omnimem: ") and str(other) in line


def test_an_adapter_with_a_missing_or_unexpected_weight(run, tmp_path, capsys):
    for change in ("less", "more"):
        other = copy_run(run, tmp_path / change)
        weights = load_file(other / "adapter_model.safetensors")
        name = sorted(weights)[0]
        if change == "less":
            weights.pop(name)
        else:
            weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
        save_file(weights, other / "adapter_model.safetensors")
        assert "layers." in refused_export(capsys, other, tmp_path / "out")


def test_an_adapter_that_is_not_finite(run, tmp_path, capsys):
    other = copy_run(run, tmp_path / "run")
    weights = load_file(other / "adapter_model.safetensors")
    name = next(name for name in sorted(weights) if "lora_B" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, other / "adapter_model.safetensors")
    assert str(other) in refused_export(capsys, other, tmp_path / "out")
