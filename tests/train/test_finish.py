"""After the last step: the question of a recipe about its clip, or about the first clip of the data."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest

import data_prep.decoded_clips.prepare
import data_prep.manifest
from clips import MEDIA
from omnimem.cli import main as omnimem
from small_runs import FLOWER, RABBIT, ROWS, SPEECH, arguments, lines, main, write_manifest

QUICK = ("train.max_steps=1", "train.threads=1")


def documented(module, program: str) -> list[str]:
    """Arguments of the only command of a program in a docstring."""
    (line,) = re.findall(rf"{re.escape(program)} (\S+[^`\n]+)", module.__doc__)
    return shlex.split(line)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder with other clips than the shipped ones."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(MEDIA / FLOWER, tmp_path / "mine.webm")
    return tmp_path


def test_the_example_in_the_docstring_of_manifest_plans_a_run(elsewhere, capsys):
    write_manifest(elsewhere / "my.jsonl", [{"media": "mine.webm", "question": "What is seen?", "answer": "A flower."}])
    line = documented(data_prep.manifest, "accelerate launch train.py")
    assert {"recipe=quickstart", "data.path=my.jsonl", "dry_run=true"} == set(line)
    assert main(line) == 0
    assert "mine.webm" in capsys.readouterr().out


@pytest.mark.long
def test_the_example_in_the_docstring_of_prepare_prepares_and_trains(elsewhere, capsys):
    """The question also works for a prepared clip: the decoded data are read, not the original."""
    row = {"media": "mine.webm", "question": "What is seen?", "answer": "A flower."}
    write_manifest(elsewhere / "train.jsonl", [row])
    assert omnimem(documented(data_prep.decoded_clips.prepare, "omnimem")) == 0
    (elsewhere / "mine.webm").unlink()
    assert main([*documented(data_prep.decoded_clips.prepare, "python train.py"), *QUICK]) == 0
    assert "mine.webm: What is heard?\n→ " in capsys.readouterr().out


def answered(tmp_path, capsys, *overrides: str, rows=ROWS) -> str:
    """The clip that the question is about."""
    assert main(arguments(tmp_path, *QUICK, "finish.question=What is it?", *overrides, rows=rows)) == 0
    (found,) = re.findall(r"^(.*): What is it\?\n→ ", capsys.readouterr().out, re.MULTILINE)
    return found


def test_the_question_is_about_finish_media_or_else_the_first_clip(tmp_path, capsys):
    assert answered(tmp_path / "a", capsys) == FLOWER
    assert answered(tmp_path / "b", capsys, rows=ROWS[::-1]) == RABBIT
    assert answered(tmp_path / "c", capsys, f"finish.media={SPEECH}") == SPEECH


def test_a_clip_without_a_question_is_refused(tmp_path, capsys):
    assert main(arguments(tmp_path, f"finish.media={RABBIT}")) == 2
    (line,) = lines(capsys.readouterr().err)
    assert "finish.media without finish.question" in line
