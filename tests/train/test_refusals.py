"""Runs that must not start, or that end, with one line."""

from __future__ import annotations

import json

import pytest
import torch

from small_runs import (
    HALF,
    ROWS,
    adapter,
    arguments,
    copy_run,
    lines,
    main,
    metrics,
    refused,
    trained_run,
    tree,
)
from train.checkpoint import checkpoints


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rate=0.5", ["train.learning_rate=0.01", "0.5"]),
        ("memory.mean_budget=48", ["memory.mean_budget=24", "48"]),
        ("train.seed=1", ["train.seed=0", "1"]),
        ("resume_from_checkpoint=false", ["already holds a run", "resume_from_checkpoint=true"]),
    ],
)
def test_a_run_is_not_mixed_with_another(trained, capsys, override, words):
    before = tree(trained.run)
    line = refused([*trained.args, override], capsys)
    assert str(trained.run) in line and all(word in line for word in words)
    assert tree(trained.run) == before


def test_a_run_is_not_resumed_on_other_data(trained, tmp_path, capsys):
    other = [{**ROWS[0], "questions": [{"question": "What is seen?", "answer": "A blue flower."}]}, ROWS[1]]
    before = tree(trained.run)
    args = [*trained.args, *arguments(tmp_path, rows=other)[1:2]]
    line = refused(args, capsys)
    assert "other data" in line and str(trained.run) in line
    assert tree(trained.run) == before


def test_a_checkpoint_is_not_resumed_by_another_number_of_processes(trained, tmp_path, capsys):
    run = copy_run(trained.run, tmp_path / "run")
    state = checkpoints(run)[-1] / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "processes": 2}))
    before = adapter(run)
    capsys.readouterr()
    assert main([*trained.args, f"output_dir={run}", f"train.max_steps={trained.steps + 1}"]) == 2
    line = lines(capsys.readouterr().err)[-1]
    assert line.startswith("train: ") and "saved by 2 processes, resumed by 1" in line
    assert all(torch.equal(value, before[name]) for name, value in adapter(run).items())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.target_modules=[q_proj,nosuch]", ["lora.target_modules", "nosuch", "q_proj"]),
        ("selection.method=nosuch", ["selection method", "nosuch", "omnimem"]),
        ("selection.method=uniform selection.lambda=0.5", ["uniform", "lambda"]),
        ("memory.profile=nosuch.json", ["nosuch.json"]),
        ("memory.mean_budget=0", ["memory.mean_budget", "at least 2"]),
        ("memory.mean_budget=1", ["memory.mean_budget", "at least 2"]),
        ("data.path=nosuch.jsonl", ["nosuch.jsonl"]),
        ("data.chunk_seconds=3", ["chunk_seconds", "multiple of 2"]),
        ("model.name_or_path=/nosuch/folder", ["/nosuch/folder"]),
        ("model.backbone=nosuch", ["nosuch", "qwen2_5_omni"]),
        ("output_dir=" + "x" * 300, ["output_dir must have path components of at most 255 bytes"]),
        ("output_dir=" + "x/" * 3000, ["output_dir", "File name too long"]),
        ("train.seed=1" + "0" * 26, ["train.seed must be at most"]),
        ("data.path=" + "x" * 300, ["File name too long"]),
    ],
)
def test_wrong_settings_are_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, override, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused(arguments(tmp_path, *override.split()), capsys)
    assert all(word in line for word in words), line
    run = tmp_path / "run"
    assert not run.exists() or not (run / "recipe.yaml").exists(), "a run that never began cannot be resumed"


def test_a_missing_clip_is_found_before_anything_is_written(tmp_path, capsys):
    line = refused(arguments(tmp_path, rows=[*ROWS, {"media": "gone.mp4", "question": "?", "answer": "!"}]), capsys)
    assert "gone.mp4" in line and ":3:" in line
    assert not (tmp_path / "run").exists()


def test_finish_media_is_checked_before_training(tmp_path, capsys):
    line = refused(arguments(tmp_path, "finish.question=What?", "finish.media=gone.mp4"), capsys)
    assert "gone.mp4" in line and "finish.media" in line
    assert not (tmp_path / "run").exists()


def test_a_truncated_clip_ends_the_run_with_one_line(tmp_path, capsys):
    rows = [ROWS[0], {"media": HALF, "question": "What is seen?", "answer": "A rabbit."}]
    assert main(arguments(tmp_path, "data.shuffle=false", rows=rows)) == 2
    shown = lines(capsys.readouterr().err)
    assert shown[-1].startswith("train: ") and HALF in shown[-1], shown[-1]
    assert len([line for line in shown if HALF in line]) == 1
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_truncated_clip_can_be_used_up_to_its_end(tmp_path):
    rows = [ROWS[0], {"media": HALF, "question": "What is seen?", "answer": "A rabbit."}]
    run = trained_run(tmp_path, "data.on_bad_row=skip", "data.shuffle=false", "train.max_steps=2", rows=rows)
    assert [record["skipped"] for record in metrics(run)] == [False, False]
