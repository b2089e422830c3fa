"""A manifest is checked row by row before anything is decoded; every bad row gives its reason, with file and line."""

import json
import logging
import os
from pathlib import Path

import pytest

from clips import MEDIA, RABBIT, WEBB
from data_prep.manifest import Question, manifest_fingerprint, read_manifest
from omnimem.errors import OmniMemError

GOOD = {"media": "clip.mp4", "question": "Who?", "answer": "Ada."}


@pytest.fixture
def data(tmp_path):
    """A folder with clips, and a function that writes a manifest into it: rows are objects or lines."""
    root = tmp_path / "data"
    (root / "more").mkdir(parents=True)
    for name in ("clip.mp4", "more/other.mp4"):
        (root / name).write_bytes(b"bytes")
    (root / "empty.mp4").touch()
    (tmp_path / "secret.mp4").write_bytes(b"bytes")
    (root / "link_out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "link_in.mp4").symlink_to(root / "clip.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")

    def write(*rows):
        path = root / "set.jsonl"
        lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
        path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
        return path

    return write


def test_both_forms_are_read(data):
    path = data(
        {
            "media": "more/other.mp4",
            "questions": [
                {"question": "Who?", "answer": "Ada.", "time": None},
                {"question": "When?", "answer": "Now.", "time": 3},
            ],
            "audio": False,
        },
        "",
        {**GOOD, "time": 1.5},
    )
    manifest = read_manifest(path)
    first, second = manifest.rows
    assert first.media == (path.parent / "more" / "other.mp4").resolve() and first.media.is_absolute()
    assert first.questions == (Question("Who?", "Ada."), Question("When?", "Now.", 3.0))
    assert (first.audio, first.line, first.name) == (False, 1, "more/other.mp4")
    assert second.questions == (Question("Who?", "Ada.", 1.5),) and (second.audio, second.line) == (True, 3)
    assert manifest.problems == []


def test_windows_lines_and_a_byte_order_mark_are_read(data):
    path = data(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r")
    assert len(read_manifest(path).rows) == 1


def test_media_are_relative_to_the_data_root(data, tmp_path):
    path = data({**GOOD, "media": "secret.mp4"}, {**GOOD, "media": str(tmp_path / "data" / "clip.mp4")})
    rows = read_manifest(path, root=tmp_path).rows
    assert [row.name for row in rows] == ["secret.mp4", "data/clip.mp4"]
    with pytest.raises(OmniMemError, match=r"nowhere: not a folder; set data\.root to the folder with the media of"):
        read_manifest(path, root=tmp_path / "nowhere")


def test_a_link_inside_the_root_is_followed(data):
    row = read_manifest(data({**GOOD, "media": "link_in.mp4"}, {**GOOD, "media": "more/../clip.mp4"})).rows[0]
    assert row.media.name == "clip.mp4"


def test_audio_path_and_rejected_answer_are_read(data):
    plain, beside = read_manifest(data(GOOD, {**GOOD, "audio_path": "more/other.mp4", "rejected": "Bob."})).rows
    assert beside.audio_path == beside.media.parent / "more" / "other.mp4" and plain.audio_path is None
    assert beside.questions == (Question("Who?", "Ada.", None, "Bob."),) and beside.audio
    (row,) = read_manifest(data({**question(rejected="Bob.", time=2), "audio_path": None})).rows
    assert row.questions == (Question("Who?", "Ada.", 2.0, "Bob."),) and row.audio_path is None


def test_fingerprint_includes_audio_path_and_rejected_only_if_given(data):
    def fingerprint(row):
        return manifest_fingerprint(read_manifest(data(row)).rows)

    # The fingerprint without either key: existing runs are compared with it.
    assert fingerprint(GOOD) == "6b77f097a1db31a92b811427db671f3a563bf6f6e0bc5d4c83e28129870a39f2"
    more = [{**GOOD, "audio_path": "more/other.mp4"}, {**GOOD, "rejected": "Bob."}, {**GOOD, "rejected": "Bea."}]
    assert len({fingerprint(row) for row in [GOOD, *more]}) == 4


def question(**changes):
    return {"media": "clip.mp4", "questions": [{"question": "Who?", "answer": "Ada.", **changes}]}


BAD = [
    ('{"media": "clip.mp4",', "not valid JSON: "),
    ("[" * 100_000, "not a row: "),
    (b'{"media": "\xff"}', "not UTF-8 at byte 11"),
    ('{"media": "clip\\ud800.mp4"}', "not a row: "),
    ("[1]", "a row is an object with media and questions, got [1]"),
    ('{"media": "clip.mp4", "answer": "a", "answer": "b"}', "the same key is given twice"),
    ({**GOOD, "qestion": "x"}, 'unknown key "qestion"; did you mean question?'),
    ({**GOOD, "zzz": "x"}, 'unknown key "zzz"; rename or remove it; known keys: media, '),
    ({"question": "Who?", "answer": "Ada."}, "no media; give the path of the clip"),
    ({**GOOD, "media": 3}, "media must be a path, got 3"),
    ({**GOOD, "media": " "}, 'media must be a path, got " "'),
    ({**GOOD, "media": "a\0b"}, "media must be a path"),
    ({**GOOD, "media": "missing.mp4"}, 'media "missing.mp4" does not exist in '),
    ({**GOOD, "media": "clip.mp4/x"}, 'media "clip.mp4/x" does not exist in '),
    ({**GOOD, "media": "x" * 300}, 'media "' + "x" * 76 + "... cannot be read: File name too long"),
    ({**GOOD, "media": "loop.mp4"}, 'media "loop.mp4" cannot be read: '),
    ({**GOOD, "media": "more"}, 'media "more" is not a file'),
    ({**GOOD, "media": "empty.mp4"}, 'media "empty.mp4" is an empty file'),
    ({**GOOD, "media": "/etc/passwd"}, 'media "/etc/passwd" lies outside '),
    ({**GOOD, "media": "../secret.mp4"}, 'media "../secret.mp4" lies outside '),
    ({**GOOD, "media": "link_out.mp4"}, 'media "link_out.mp4" lies outside '),
    ({**GOOD, "audio": 1}, "audio must be true or false, got 1"),
    ({**GOOD, "audio_path": "gone.wav"}, 'audio_path "gone.wav" does not exist in '),
    ({**GOOD, "audio_path": "../secret.mp4"}, 'audio_path "../secret.mp4" lies outside '),
    ({**GOOD, "audio_path": "more/../clip.mp4"}, "audio_path is the media file itself"),
    (
        {**GOOD, "audio_path": "more/other.mp4", "audio": False},
        "both audio_path and audio=false; leave one of them out",
    ),
    ({**GOOD, "rejected": " "}, "rejected must be text that is not empty, or null; got "),
    ({**GOOD, "rejected": "Ada. "}, "rejected is the same as answer"),
    ({**question(), "rejected": "x"}, "both questions and rejected; put everything into questions"),
    ({"media": "clip.mp4"}, "no questions; give question and answer"),
    ({"media": "clip.mp4", "questions": []}, "questions must be a list of at least one question"),
    ({"media": "clip.mp4", "questions": {}}, "questions must be a list of at least one question"),
    (
        {"media": "clip.mp4", "questions": ["Who?"]},
        'a question is an object with question and answer, got "Who?"',
    ),
    ({**question(), "answer": "x"}, "both questions and answer; put everything into questions"),
    ({"media": "clip.mp4", "question": "Who?"}, "answer must be text that is not empty, got null"),
    (question(question=" "), 'question must be text that is not empty, got " "'),
    (question(answer=""), 'answer must be text that is not empty, got ""'),
    (question(answer=3), "answer must be text that is not empty, got 3"),
    (question(tme=3), 'unknown key "tme"; did you mean time?'),
    (question(time=-0.5), "time must be seconds from the start, at least 0, or null; got -0.5"),
    (question(time="3"), "time must be seconds from the start"),
    (question(time=True), "time must be seconds from the start"),
    (question(time=float("nan")), "time must be seconds from the start"),
    (question(time=float("inf")), "time must be seconds from the start"),
    (question(time=10**400), "time must be seconds from the start"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_gives_reason_and_line(data, row, reason):
    path = data(GOOD, row)
    with pytest.raises(OmniMemError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: {reason}") and "\n" not in message
    assert message.endswith("(data.on_bad_row=skip skips bad rows)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_media_without_permission(data):
    path = data(GOOD)
    (path.parent / "clip.mp4").chmod(0)
    with pytest.raises(OmniMemError, match="permission denied"):
        read_manifest(path)


def test_bad_rows_are_counted_under_error_and_logged_under_skip(data, caplog):
    path = data(*[row for row, _ in BAD[:4]], GOOD)
    with pytest.raises(OmniMemError, match=r"set\.jsonl:1: not valid JSON.*; 3 more bad rows"):
        read_manifest(path)
    with caplog.at_level(logging.WARNING, logger="omnimem.data"):
        manifest = read_manifest(path, on_bad_row="skip")
    assert [row.line for row in manifest.rows] == [5]
    assert len(manifest.problems) == 4 and len(caplog.records) == 4
    assert all(problem in caplog.text for problem in manifest.problems)


def test_a_manifest_without_a_good_row_is_refused(data, tmp_path):
    with pytest.raises(OmniMemError, match=r"has no usable row; 1 bad rows, the first: .*:1: not valid JSON"):
        read_manifest(data("{"), on_bad_row="skip")
    with pytest.raises(OmniMemError, match="has no usable row: the file is empty"):
        read_manifest(data("", "  "))
    with pytest.raises(OmniMemError, match=r"manifest .*none\.jsonl: No such file"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(OmniMemError, match=r"manifest .*: a folder without \*\.parquet"):
        read_manifest(tmp_path)


def test_fingerprint_depends_on_content_not_location(data, tmp_path):
    rows = [GOOD, {**GOOD, "media": "more/other.mp4"}]
    path = data(*rows)
    before = manifest_fingerprint(read_manifest(path).rows)
    assert len(before) == 64 and before == manifest_fingerprint(read_manifest(data("", *rows)).rows)

    (tmp_path / "data").rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert before == manifest_fingerprint(read_manifest(moved / "set.jsonl").rows)

    same = read_manifest(moved / "set.jsonl").rows
    others = {before, manifest_fingerprint(reversed(same)), manifest_fingerprint(same[:1])}
    (moved / "clip.mp4").write_bytes(b"longer bytes")
    others.add(manifest_fingerprint(same))
    assert len(others) == 4


def test_quickstart_is_the_shipped_set():
    assert read_manifest("quickstart").problems == []


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    # Every row has every column; a missing key is an empty cell.
    columns = {key: [row.get(key) for row in rows] for key in {key: None for row in rows for key in row}}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_gives_the_same_rows(tmp_path):
    """One file or shards in their order; cells without a value are keys that were not given."""
    lines = [
        {
            "media": RABBIT.name,
            "questions": [{"question": "a?", "answer": "A"}, {"question": "b?", "answer": "B", "time": 2.5}],
        },
        {"media": WEBB.name, "audio": False, "questions": [{"question": "c?", "answer": "C", "time": 1.0}]},
        {"media": RABBIT.name, "audio": True, "questions": [{"question": "d?", "answer": "D"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shards = tmp_path / "shards"
    shards.mkdir()
    parquet(shards / "part-0.parquet", lines[:2])
    parquet(shards / "part-1.parquet", lines[2:])
    expected = read_manifest(tmp_path / "rows.jsonl", MEDIA).rows
    for path in (parquet(tmp_path / "rows.parquet", lines), shards):
        assert read_manifest(path, MEDIA).rows == expected


def test_bad_rows_and_files_of_parquet_are_reported_alike(tmp_path):
    rows = [
        {"media": RABBIT.name, "question": "a?", "answer": "A"},
        {"media": "gone.mp4", "question": "a?", "answer": "A"},
    ]
    path = parquet(tmp_path / "rows.parquet", rows)
    with pytest.raises(OmniMemError, match=r"rows\.parquet:2: .*gone\.mp4"):
        read_manifest(path, MEDIA)
    found = read_manifest(path, MEDIA, "skip")
    assert len(found.rows) == 1 and "gone.mp4" in found.problems[0]
    (tmp_path / "half.parquet").write_bytes(path.read_bytes()[:100])
    with pytest.raises(OmniMemError, match="not readable as Parquet"):
        read_manifest(tmp_path / "half.parquet", MEDIA)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OmniMemError, match=r"a folder without \*\.parquet"):
        read_manifest(tmp_path / "empty", MEDIA)
