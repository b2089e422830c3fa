"""`dry_run=true` plans a run without weights and writes nothing."""

from __future__ import annotations

import pytest

from small_runs import (
    FLOWER,
    RABBIT,
    arguments,
    copy_run,
    main,
    metrics,
    refused,
    tree,
)


def test_a_dry_run_plans_without_weights_and_writes_nothing(tmp_path, monkeypatch, capsys, tiny_path):
    monkeypatch.setenv("COLUMNS", "200")
    model = copy_run(tiny_path, tmp_path / "model")
    (model / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path / "job", f"model.name_or_path={model}", "dry_run=true")
    before = tree(tmp_path)
    assert main(args) == 0
    assert tree(tmp_path) == before and not (tmp_path / "job" / "run").exists()
    shown = capsys.readouterr().out
    assert FLOWER in shown and RABBIT in shown
    assert "4 optimizer steps" in shown and "2.00 epochs" in shown
    assert "resident: every layer at its budget" in shown and "peak: and a chunk of" in shown
    assert "24 tokens per layer" in shown and "weights" in shown and "sum" in shown


@pytest.mark.long
def test_a_dry_run_counts_the_tokens_of_the_run(trained, tmp_path, capsys):
    assert main([*trained.args, "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    planned = {}
    for line in shown.splitlines():
        cells = [cell.strip() for cell in line.replace("┃", "│").split("│")]
        if len(cells) > 5 and cells[1].startswith(("silent", "ambient")):
            planned[cells[1][:6]] = int(cells[4]) + int(cells[5])
    streamed = {record["tokens"] for record in metrics(trained.run)}
    assert len(planned) == 2
    # The header gives the plan its duration, so the end of a stream may differ by a fraction of a second.
    assert [abs(a - b) <= 26 for a, b in zip(sorted(planned.values()), sorted(streamed), strict=True)] == [True, True]


def test_a_dry_run_of_the_offline_model_writes_nothing(tmp_path, monkeypatch):
    args = arguments(tmp_path, "dry_run=true")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert main(args) == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "override", ["data.chunk_seconds=3", "lora.target_modules=[nosuch]", "memory.profile=nosuch.json"]
)
def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path, capsys, override):
    word = "nosuch" if "nosuch" in override else "chunk_seconds"
    assert word in refused(arguments(tmp_path, override, "dry_run=true"), capsys)
