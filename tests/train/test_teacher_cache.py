"""Cached logits of the teacher: found for the same question about the same clip, and for no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.manifest import Row
from train.samples import Sample, TokenizedQuestion
from train.teacher_cache import TeacherCache

SETTINGS = {"model": {"path": "tiny"}, "data": {"fps": 1.0}}


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


@pytest.fixture
def sample(tmp_path) -> Sample:
    """A clip with a separate audio file and two questions."""
    for name in ("clip.mp4", "talk.wav", "other.bin"):
        (tmp_path / name).write_bytes(name.encode())
    row = Row(tmp_path / "clip.mp4", (), True, 1, "clip.mp4", tmp_path / "talk.wav")
    return Sample(row, (TokenizedQuestion(ids(1, 2), ids(3, 4, 5), 2.0), TokenizedQuestion(ids(6), ids(7, 8), None)))


def saved(folder: Path, sample: Sample) -> tuple[TeacherCache, list[torch.Tensor]]:
    """Cache with the logits of both answers of a sample, saved one after the other as in training."""
    logits = [torch.randn(len(asked.answer), 11) for asked in sample.questions]
    answers = TeacherCache(folder / "teacher", SETTINGS)
    for asked, given in zip(sample.questions, logits, strict=True):
        answers.save([sample], [asked], given)
    return answers, logits


def changed(sample: Sample, **fields) -> Sample:
    """The sample with another first question."""
    return Sample(sample.row, (replace(sample.questions[0], **fields), sample.questions[1]))


def test_the_same_questions_are_found_in_another_run_and_folder(sample, tmp_path):
    _, logits = saved(tmp_path, sample)
    moved = tmp_path / "moved"
    moved.mkdir()
    row = replace(sample.row, media=moved / "a.mp4", audio_path=moved / "b.wav", line=7, name="a.mp4")
    row.media.write_bytes(sample.row.media.read_bytes())
    row.audio_path.write_bytes(sample.row.audio_path.read_bytes())
    found = TeacherCache(tmp_path / "teacher", SETTINGS).load([Sample(row, sample.questions)])
    assert found is not None
    for asked, given in zip(sample.questions, logits, strict=True):
        assert torch.equal(found[asked], given)


@pytest.mark.parametrize(
    "fields", [{"question": ids(1, 9)}, {"answer": ids(3, 4, 9)}, {"time": 2.5}, {"time": None}], ids=str
)
def test_another_question_answer_or_time_is_not_found(sample, tmp_path, fields):
    answers, _ = saved(tmp_path, sample)
    assert answers.load([sample]) is not None
    assert answers.load([changed(sample, **fields)]) is None


@pytest.mark.parametrize("what", ["media", "sound", "no sound file", "not heard"])
def test_another_clip_or_audio_file_is_not_found(sample, tmp_path, what):
    answers, _ = saved(tmp_path, sample)
    other = {
        "media": {"media": tmp_path / "other.bin"},
        "sound": {"audio_path": tmp_path / "other.bin"},
        "no sound file": {"audio_path": None},
        "not heard": {"audio": False},
    }[what]
    assert answers.load([Sample(replace(sample.row, **other), sample.questions)]) is None


@pytest.mark.parametrize("settings", [{**SETTINGS, "model": {"path": "7b"}}, {**SETTINGS, "data": {"fps": 2.0}}])
def test_another_model_or_media_setting_is_not_found(sample, tmp_path, settings):
    saved(tmp_path, sample)
    assert TeacherCache(tmp_path / "teacher", settings).load([sample]) is None


def test_a_batch_is_found_only_if_complete_and_each_stream_has_its_own_logits(sample, tmp_path):
    other = Sample(replace(sample.row, audio_path=None), (TokenizedQuestion(ids(1), ids(2, 3), 1.0),))
    answers = TeacherCache(tmp_path / "teacher", SETTINGS)
    logits = torch.randn(5, 11)
    answers.save([sample, other], [sample.questions[0], other.questions[0]], logits)
    assert answers.load([sample, other]) is None, "the second question of the first stream has no answer yet"
    answers.save([sample, other], [sample.questions[1], None], torch.zeros(2, 11))
    found = answers.load([sample, other])
    assert found is not None
    assert torch.equal(found[sample.questions[0]], logits[:3]) and torch.equal(found[other.questions[0]], logits[3:])
