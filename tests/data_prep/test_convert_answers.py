"""`omnimem data convert` refuses placeholders in answers, and reports that nothing trains on rejected answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clips import RABBIT
from data_prep.convert import Report, convert
from data_prep.convert.sample import REJECTED
from data_prep.manifest import read_manifest
from omnimem.cli import main

VIDEO = RABBIT.name


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pairs(question: str, good: str, bad: str) -> dict[str, dict]:
    """One question with a preferred and a rejected answer, in every format that has both."""
    turns = [("human", f"<video>{question}"), ("chosen", good), ("reject", bad)]
    return {
        "video_salmonn2": {"video": VIDEO, "conversations": [{"from": who, "value": text} for who, text in turns]},
        "sharegpt": {
            "messages": messages(f"<video>{question}", good)[:1],
            "chosen": {"role": "assistant", "content": good},
            "rejected": {"role": "assistant", "content": bad},
            "videos": [VIDEO],
        },
        "swift": {"messages": messages(f"<video>{question}", good), "videos": [VIDEO], "rejected_response": bad},
        "table": {"video": VIDEO, "question": question, "answer": good, "rejected": bad},
    }


FORMATS = list(pairs("", "", ""))


def converted(folder: Path, *rows: dict) -> Report:
    folder.mkdir(exist_ok=True)
    shutil.copy(RABBIT, folder / VIDEO)
    (folder / "in.json").write_text(json.dumps(rows))
    return convert([str(folder / "in.json")], folder / "out.jsonl", open_media=False)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("token", ["<video>", "<audio>", "<image>"])
def test_a_placeholder_in_either_answer_is_refused(tmp_path, form, token):
    """The model would learn to generate it."""
    rows = [pairs("What?", *answers)[form] for answers in ((f"A {token}.", "B."), ("A.", f"B {token}."), ("A.", "B."))]
    report = converted(tmp_path, *rows)
    said = "<video>" if form == "video_salmonn2" and token == "<image>" else token  # which writes <image> for a video
    assert [reason for _, reason in report.refused] == [f"placeholder {said} in an answer"] * 2
    assert report.questions == 1


def test_a_plain_table_row_with_a_placeholder_in_its_answer_is_refused(tmp_path):
    row = {"video": VIDEO, "question": "What?", "answer": "A."}
    report = converted(tmp_path, {**row, "answer": "<video>A."}, {**row, "question": "<video>What?"})
    assert [reason for _, reason in report.refused] == ["placeholder <video> in an answer"]
    (kept,) = read_manifest(report.out).rows[0].questions
    assert (kept.question, kept.answer) == ("What?", "A."), "in a question it stands for the media, and is taken out"


@pytest.mark.parametrize("form", FORMATS)
def test_rejected_answers_are_converted_and_reported_as_unused(tmp_path, form):
    rows = [pairs("What?", "Good.", "Bad.")[form], pairs("Who?", "Good.", "Worse.")[form]]
    report = converted(tmp_path, *rows, {"video": VIDEO, "question": "When?", "answer": "Now."})
    assert report.notes[REJECTED] == 2 and "not trained on" in REJECTED
    assert f"{REJECTED}: 2" in list(report.lines())
    rejected = [one.rejected for row in read_manifest(report.out).rows for one in row.questions]
    assert rejected == ["Bad.", "Worse.", None]


def test_the_help_says_that_nothing_trains_on_rejected_answers(capsys):
    with pytest.raises(SystemExit):
        main(["data", "convert", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Rejected answers of preference pairs are copied to the manifest, but nothing trains on them" in shown
