"""Row checks of `omnimem data validate`: late questions, placeholders in any text, use of audio."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.manifest import Question, Row
from data_prep.validate.rows import LATE, check_rows


def checked(*questions: Question, row_audio: bool = True, **differs) -> list[dict]:
    """Findings about one row of a clip of 10 s with video and audio, changed by `differs`."""
    entry = {"path": "/a.mp4", "digest": "a", "seconds": 10.0, "has_video": True, "audio": "present", "findings": []}
    row = Row(Path("/a.mp4"), questions, row_audio, 1, "a.mp4")
    return check_rows([row], {"/a.mp4": {**entry, **differs}})["findings"]


def codes(found: list[dict]) -> list[str]:
    return [finding["code"] for finding in found]


def at(*times: float | None) -> list[Question]:
    return [Question(f"Who speaks? {number}", "Ada.", time) for number, time in enumerate(times)]


@pytest.mark.parametrize(("time", "late"), [(10.0, False), (10.09, False), (10.0 + LATE, False), (10.11, True)])
def test_a_question_may_be_a_tenth_of_a_second_late(time, late):
    """Headers and durations are rounded."""
    assert LATE == 0.1
    assert codes(checked(*at(time))) == ["time_past_end"] * late


def test_late_questions_are_counted_and_the_last_is_named():
    found = checked(*at(None, 3.0, 10.05, 12.0, 30.0, 11.0))
    assert codes(found) == ["time_past_end"]
    assert found[0]["message"] == "3 questions, the last at 30 s, are past the end of 10.0 s: asked at the end"
    assert found[0]["severity"] != "error", "such a row can be trained on"
    (one,) = checked(*at(12.5))
    assert one["message"] == "12.5 s is past the end of 10.0 s: asked at the end"


def test_an_unusable_file_is_not_reported_for_its_length():
    broken = [{"code": "truncated", "severity": "error", "message": "cut off"}]
    assert codes(checked(*at(99.0), seconds=None, findings=broken)) == ["unusable_media"]


@pytest.mark.parametrize("place", ["question", "answer", "rejected"])
def test_a_placeholder_is_found_in_any_text(place):
    texts = {"question": "Who speaks?", "answer": "Ada.", "rejected": "Bob."}
    assert checked(Question(**texts)) == []
    texts[place] += " <audio>"
    (found,) = checked(Question(**texts))
    assert found["code"] == "placeholder" and found["message"].startswith("<audio> is left in the text")


def test_the_answers_of_later_questions_are_checked():
    found = checked(Question("Who?", "Ada."), Question("Where?", "At <|vision_start|>home."))
    assert codes(found) == ["placeholder"] and "<|vision_start|>" in found[0]["message"]


@pytest.mark.parametrize(
    ("token", "differs", "lacks"),
    [
        ("<audio>", {"audio": "none"}, "audio"),
        ("<speech>", {"row_audio": False}, "audio"),
        ("<video>", {"has_video": False}, "video"),
        ("<video>", {"audio": "none"}, None),
        ("<audio>", {"has_video": False}, None),
        ("<audio>", {"audio": "silent"}, None),
    ],
)
def test_a_placeholder_without_media_has_its_own_code(token, differs, lacks):
    found = [one for one in checked(Question("Who?", f"Ada {token}."), **differs) if "placeholder" in one["code"]]
    assert codes(found) == ["placeholder_without_media" if lacks else "placeholder"]
    assert lacks is None or found[0]["message"] == f"{token} in the text, but the row has no {lacks}"
