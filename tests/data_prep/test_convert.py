"""`omnimem data convert`: data sets of other projects become manifests; bad rows are refused with place and reason.

python -m pytest tests/data_prep/test_convert.py
"""

import json
import shutil

import datasets
import pytest

from clips import MEDIA, RABBIT, WEBB
from data_prep.convert import FORMATS, convert
from data_prep.convert.options import INSTRUCTION, answer_letter, read_options
from data_prep.convert.sample import FROM_ZERO, HISTORY, MUTED, REJECTED, SYSTEM, TRUTH, TURNS
from data_prep.convert.table import seconds
from data_prep.manifest import BadRow, Question, read_manifest
from omnimem.cli import main
from omnimem.errors import OmniMemError

VIDEO, OTHER, SOUND = RABBIT.name, WEBB.name, "audio_speech_jfk_11s.flac"


@pytest.fixture
def root(tmp_path):
    """A data root with two videos, an audio file, and files with a wrong suffix or no content."""
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    for name in (VIDEO, OTHER, SOUND):
        shutil.copy(MEDIA / name, folder / name)
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").touch()
    shutil.copy(MEDIA / VIDEO, tmp_path / "outside.mp4")
    return folder


@pytest.fixture
def run(root):
    """Write rows as a JSON array, JSON Lines, or the given text; convert; read the manifest."""

    def go(rows, name="in.json", **options):
        source = root / name
        if isinstance(rows, str):
            source.write_text(rows, encoding="utf-8")
        elif name.endswith(".jsonl"):
            source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            source.write_text(json.dumps(rows), encoding="utf-8")
        report = convert([str(source)], root / "out.jsonl", **options)
        return report, read_manifest(root / "out.jsonl").rows

    return go


def talk(*texts, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def facts(row):
    return row.name, row.audio_path and row.audio_path.name, row.audio


# ---- video-SALMONN 2 -------------------------------------------------------------------------------------------------


def test_video_salmonn2_with_audio_without_audio_and_audio_only(run):
    report, rows = run(
        [
            {"video": VIDEO, "use_audio": True, "conversations": talk("<video>\nWhat?", "A rabbit.")},
            {"video": VIDEO, "conversations": talk("<video>\nWhat?", "A toy.")},
            {"audio": SOUND, "conversations": talk("<audio>\nWho?", "A president.")},
            {"video": [OTHER], "audio": SOUND, "conversations": talk("<image>\nBoth?", "Both.")},
        ]
    )
    assert [facts(row) for row in rows] == [
        (VIDEO, None, True), (VIDEO, None, False), (SOUND, None, True), (OTHER, SOUND, True)
    ]  # fmt: skip
    assert [row.questions for row in rows[:2]] == [
        (Question("What?", "A rabbit."),), (Question("What?", "A toy."),)
    ]  # fmt: skip
    assert report.refused == [] and report.notes == {MUTED: 1}


def test_video_salmonn2_preference_pairs_of_both_releases(run):
    new = [*talk("<video>\nWhat?", "Truth."), {"from": "chosen", "value": "Good."}, {"from": "reject", "value": "Bad."}]
    old = [
        *talk("<image>\nWhat?", "Good."),
        {"from": "reject_gpt", "value": "Bad."},
        {"from": "gt", "value": "Truth."},
    ]
    report, rows = run([{"video": VIDEO, "use_audio": True, "conversations": turns} for turns in (new, old)])
    assert [row.questions for row in rows] == [(Question("What?", "Good.", None, "Bad."),) * 2]
    assert report.notes == {TRUTH: 2, REJECTED: 2}


# ---- LLaMA-Factory and ms-swift --------------------------------------------------------------------------------------


def test_sharegpt_both_spellings_and_three_uses_of_audio(run):
    report, rows = run(
        [
            {"messages": messages("<video><audio>What?", "A."), "videos": [VIDEO], "audios": [SOUND]},
            {"messages": messages("<video><audio>What?", "A."), "videos": [VIDEO], "audios": ["more/../" + VIDEO]},
            {"conversations": talk("<video>What?", "A."), "videos": [VIDEO], "system": "Be brief."},
            {"conversations": talk("<audio>What?", "A."), "audios": [SOUND]},
        ]
    )
    assert [facts(row) for row in rows] == [
        (VIDEO, SOUND, True), (VIDEO, None, True), (VIDEO, None, False), (SOUND, None, True)
    ]  # fmt: skip
    assert report.notes == {SYSTEM: 1, MUTED: 1}


def test_sharegpt_preferences_and_alpaca(run):
    _, rows = run(
        [
            {
                "conversations": talk("<video>What?"),
                "chosen": {"from": "gpt", "value": "Good."},
                "rejected": {"from": "gpt", "value": "Bad."},
                "videos": [VIDEO],
            },
            {"instruction": "<video>Say", "input": "what.", "output": "A.", "videos": [VIDEO]},
            {"instruction": "<video>Say", "chosen": "Good.", "rejected": "Bad.", "videos": [VIDEO]},
        ]
    )
    assert rows[0].questions == (
        Question("What?", "Good.", None, "Bad."),
        Question("Say\nwhat.", "A."),
        Question("Say", "Good.", None, "Bad."),
    )


def test_each_turn_of_a_conversation_becomes_a_separate_question(run):
    turns = [{"from": "system", "value": "Be brief."}, *talk("One?", "1.", "Look at <video> now", "2.")]
    learned = messages("<video>Three?", "3.", "Four?", "4.")
    learned[1]["loss"] = False
    report, (row,) = run(
        [{"conversations": turns, "videos": [VIDEO]}, {"messages": learned, "videos": [VIDEO]}], audio="on"
    )
    assert row.audio and row.questions == (
        Question("One?", "1."), Question("Look at now", "2."), Question("Four?", "4.")
    )  # fmt: skip
    assert report.notes == {SYSTEM: 1, TURNS: 1, HISTORY: 1}


def test_swift_implied_placeholders_pairs_and_older_rows(run):
    report, rows = run(
        [
            {"messages": messages("What?", "Good."), "videos": [VIDEO], "rejected_response": "Bad."},
            {
                "messages": messages("<video>What?", "Good."),
                "videos": [{"path": VIDEO, "bytes": None}],
                "rejected_messages": messages("<video>What?", "Worse."),
            },
            {"query": "<video>And?", "response": "B.", "history": [["<audio>Before?", "C."]],
             "videos": VIDEO, "audios": [SOUND]},
            {"messages": [
                {"role": "user", "content": [{"type": "video", "video": VIDEO}, {"type": "text", "text": "List?"}]},
                {"role": "assistant", "content": "Yes."},
            ]},
        ],
        name="in.jsonl",
    )  # fmt: skip
    assert [facts(row) for row in rows] == [(VIDEO, None, False), (VIDEO, SOUND, True)]
    assert rows[0].questions == (
        Question("What?", "Good.", None, "Bad."),
        Question("What?", "Good.", None, "Worse."),
        Question("List?", "Yes."),
    )
    assert rows[1].questions == (Question("Before?", "C."), Question("And?", "B."))
    assert report.refused == []


def test_conversation_as_a_column_of_lists_and_as_pairs(run):
    """Older releases of `datasets` store a list of turns as an object of lists; older ms-swift, one by pair."""
    columns = {"from": ["human", "gpt"], "value": ["<video>What?", "A."]}
    _, (row,) = run(
        [
            {"conversations": columns, "videos": [VIDEO]},
            {"conversation": [{"human": "<video>Who?", "assistant": "B."}], "videos": [VIDEO]},
        ]
    )
    assert row.questions == (Question("What?", "A."), Question("Who?", "B."))


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_merges_the_questions_of_a_video(run):
    report, rows = run(
        "﻿Video_Path;Question;Candidates;GT;Timestamp\n"
        f'{VIDEO};What is it?;"[""a cat"", ""a rabbit""]";a rabbit;00:00:03.5\n'
        f"{OTHER};What is it?;A. mirror|B. car;b;\n"
        f'{VIDEO};"Say; what?";;A toy.;12\n',
        name="in.csv",
    )
    assert [facts(row) for row in rows] == [(VIDEO, None, True), (OTHER, None, True)]
    assert rows[0].questions == (
        Question(f"What is it?\nA. a cat\nB. a rabbit\n{INSTRUCTION}", "B", 3.5),
        Question("Say; what?", "A toy.", 12.0),
    )
    assert rows[1].questions[0].answer == "B"
    assert (report.read, report.rows, report.questions) == (3, 2, 3)


def test_tabs_options_by_column_and_answers_by_number(run):
    text = f"video\tquestion\ta0\ta1\ta2\tanswer\tuse_audio\n{VIDEO}\tWhat?\tcat\tdog\trabbit\t2\tfalse\n"
    report, (row,) = run(text, name="in.tsv")
    assert row.questions[0].answer == "C" and not row.audio and report.notes == {FROM_ZERO: 1, MUTED: 1}
    report, (row,) = run(text, name="in.tsv", answers="index1", audio="on")
    assert row.questions[0].answer == "B" and row.audio and report.notes == {}


@pytest.mark.parametrize(
    "options",
    ['["yes", "no"]', "['yes', 'no']", "A. yes|B. no", "(A) yes\n(B) no", "yes|no", ["A) yes", "B) no"],
     {"A": "yes", "B": "no"}],
)  # fmt: skip
def test_options_are_read_as_tables_write_them(options):
    assert read_options(options) == ["yes", "no"]
    assert read_options("") == [] and read_options(None) == []


@pytest.mark.parametrize(
    ("answer", "reading", "letter"),
    [("B", "auto", "B"), ("(b)", "auto", "B"), ("B. no", "auto", "B"), ("NO", "auto", "B"), (1, "auto", "B"),
     ("1.0", "index", "B"), (1, "index1", "A"), ("no", "text", "B")],
)  # fmt: skip
def test_options_and_the_letter_of_the_answer(answer, reading, letter):
    assert answer_letter(answer, ["yes", "no"], reading)[0] == letter


@pytest.mark.parametrize(
    ("answer", "options", "reading"),
    [("C", ["yes", "no"], "auto"), ("2", ["yes", "no"], "auto"), ("B. yes", ["yes", "no"], "auto"),
     ("1", ["1", "2"], "auto"), ("A", ["B", "A"], "auto"), ("no", ["yes", "no"], "letter"), (0, ["a", "b"], "index1")],
)  # fmt: skip
def test_ambiguous_answers_to_options_are_refused(answer, options, reading):
    with pytest.raises(BadRow, match="answer "):
        answer_letter(answer, options, reading)


def test_times_of_tables():
    values = ["", None, float("nan"), 3, "12.5", "01:02", "90:00", "1:00:00.5"]
    assert [seconds(value) for value in values] == [None, None, None, 3.0, 12.5, 62.0, 5400.0, 3600.5]
    for value in ("1:75", "00:01-00:05", "soon", -1, "inf", True):
        with pytest.raises(BadRow, match="time must be seconds"):
            seconds(value)


# ---- Hugging Face datasets -------------------------------------------------------------------------------------------


def test_data_sets_saved_to_disk_and_as_parquet(root):
    rows = {"video": [VIDEO, OTHER], "question": ["What?", "Who?"], "options": [["cat", "rabbit"], None],
            "answer": ["B", "Ada."], "time": [None, 2.5]}  # fmt: skip
    data = datasets.Dataset.from_dict(rows)
    data.save_to_disk(root / "saved")
    datasets.DatasetDict({"test": data}).save_to_disk(root / "splits")
    (root / "shards").mkdir()
    data.to_parquet(root / "shards" / "0.parquet")
    turns = {"video": [VIDEO], "use_audio": [True], "conversations": [talk("<video>What?", "A.")]}
    datasets.Dataset.from_dict(turns).to_parquet(root / "turns.parquet")
    expected = [
        (VIDEO, (Question(f"What?\nA. cat\nB. rabbit\n{INSTRUCTION}", "B"),)),
        (OTHER, (Question("Who?", "Ada.", 2.5),)),
    ]
    for source, split in (("saved", "train"), ("splits", "test"), ("shards", "train"), ("shards/0.parquet", "train")):
        convert([str(root / source)], root / "out.jsonl", root=root, split=split)
        found = read_manifest(root / "out.jsonl").rows
        assert [(row.name, row.questions) for row in found] == expected
    convert([str(root / "turns.parquet")], root / "out.jsonl")
    (row,) = read_manifest(root / "out.jsonl").rows
    assert row.audio and row.questions == (Question("What?", "A."),)
    with pytest.raises(OmniMemError, match="no split train; choose --split among test"):
        convert([str(root / "splits")], root / "out.jsonl")


def test_media_columns_give_paths_and_embedded_content_is_refused(root):
    texts = {"question": ["Who?"] * 2, "answer": ["A president."] * 2}
    paths = datasets.Dataset.from_dict({"audio": [str(root / SOUND)] * 2, **texts})
    paths.cast_column("audio", datasets.Audio()).save_to_disk(root / "saved")
    convert([str(root / "saved")], root / "out.jsonl")
    (row,) = read_manifest(root / "out.jsonl").rows
    assert row.name == SOUND and len(row.questions) == 2

    content = [{"bytes": b"RIFF", "path": None}, {"bytes": None, "path": str(root / VIDEO)}]
    typed = datasets.Dataset.from_dict({"video": content, **texts}).cast_column("video", datasets.Video())
    typed.save_to_disk(root / "typed")
    report = convert([str(root / "typed")], root / "out.jsonl")
    ((place, reason),) = report.refused
    assert place.endswith("typed[0]") and "embedded in the data set" in reason
    assert read_manifest(root / "out.jsonl").rows[0].name == VIDEO


# ---- bad rows --------------------------------------------------------------------------------------------------------

SALMONN = {"video": VIDEO, "conversations": talk("<video>What?", "A.")}
SHAREGPT = {"messages": messages("<video>What?", "A."), "videos": [VIDEO]}

BAD = [
    ({**SALMONN, "video": None}, "placeholder without media: 1 <video> in the text, 0 video files"),
    ({**SALMONN, "conversations": talk("<video><audio>What?", "A.")}, "placeholder without media: 1 <audio>"),
    ({**SALMONN, "conversations": talk("What?", "A.")}, "media without placeholder: 1 video files, 0 <video>"),
    ({**SALMONN, "video": [VIDEO, OTHER]}, "media without placeholder: 2 video files, 1 <video> in the text"),
    ({**SALMONN, "video": "gone.mp4"}, 'video "gone.mp4" does not exist in '),
    ({**SALMONN, "video": "empty.mp4"}, 'video "empty.mp4" is an empty file'),
    ({**SALMONN, "video": "more"}, 'video "more" is not a file'),
    ({**SALMONN, "video": "text.mp4"}, "text.mp4: "),
    ({**SALMONN, "video": SOUND}, f'video "{SOUND}" has no video track'),
    ({**SALMONN, "video": "/etc/passwd"}, 'video "/etc/passwd" lies outside '),
    ({**SALMONN, "video": "../outside.mp4"}, 'video "../outside.mp4" lies outside '),
    ({**SALMONN, "video": "https://a.b/c.mp4"}, 'video "https://a.b/c.mp4" is a URL; download it'),
    ({**SALMONN, "video": 3}, "video must be a path, got 3"),
    ({**SALMONN, "use_audio": "yes"}, 'use_audio must be true or false, got "yes"'),
    ({**SALMONN, "timestamps": [0, 3]}, "uses only [0, 3] of the video; cut the segment first"),
    ({**SALMONN, "start": 2, "end": 3}, "uses only 2 to 3 of the video; cut the segment first"),
    ({**SALMONN, "image": "a.jpg"}, "it has image; only video and audio are read"),
    ({"audio": VIDEO, "conversations": talk("<audio>What?", "A.")}, f'audio "{VIDEO}" has a video track'),
    ({**SALMONN, "conversations": talk("<video>What?", " ")}, 'empty answer to "What?"'),
    ({**SALMONN, "conversations": talk("<video>What?")}, 'question without answer: "What?"'),
    ({**SALMONN, "conversations": talk("<video>", "A.")}, "empty question"),
    ({**SALMONN, "conversations": talk("A.", "<video>What?", roles=("gpt", "human"))}, "an answer before the first"),
    ({**SALMONN, "conversations": talk("<video>What?", "A <video>.")}, "placeholder <video> in an answer"),
    ({**SALMONN, "conversations": talk("<video>W?", "A.", roles=("human", "tool"))}, 'unknown role "tool"'),
    ({**SALMONN, "conversations": talk("<video>W?", "A.", roles=("human", "history_gpt"))}, "no question with an"),
    ({**SALMONN, "conversations": []}, "a conversation is a list of turns, got []"),
    ({**SALMONN, "conversations": [*talk("<video>W?", "A."), {"from": "gpt", "value": "B."}]}, "two assistant turns"),
    (
        {**SALMONN, "conversations": [*talk("<video>W?", "A."), {"from": "reject", "value": "A."}]},
        'the rejected answer to "W?" is the same',
    ),
    ({**SHAREGPT, "videos": []}, "placeholder without media"),
    ({**SHAREGPT, "videos": [VIDEO, OTHER]}, "media without placeholder: 2 video files, 1 <video>"),
    ({"messages": messages("<video><video>?", "A."), "videos": [VIDEO, OTHER]}, "2 video files; a row is one stream"),
    ({**SHAREGPT, "audios": [SOUND]}, "media without placeholder: 1 audio files, 0 <audio>"),
    ({**SHAREGPT, "images": ["a.jpg"]}, "it has images; only video and audio are read"),
    ({"messages": messages("<image>What?", "A."), "videos": [VIDEO]}, "placeholder <image>; only video and audio"),
    ({**SHAREGPT, "videos": [["1.jpg", "2.jpg"]]}, "the video is a list of images"),
    ({**SHAREGPT, "videos": [{"bytes": "x"}]}, "the video is embedded in the data set"),
    ({**SHAREGPT, "kto_tag": False}, "kto_tag is false: the answer is marked as bad"),
    ({**SHAREGPT, "tools": "[]"}, "it has tools"),
    ({"messages": messages("What?", "A."), "videos": []}, "no video and no audio"),
    ({"rejected_response": "A.", **SHAREGPT}, 'the rejected answer to "What?" is the same as the answer'),
    ({"rejected_response": "B.", "rejected_videos": [OTHER], **SHAREGPT}, "the rejected answer is about other videos"),
    ({"messages": messages("<video>half \ud800", "A."), "videos": [VIDEO]}, "a text is not UTF-8"),
    ({"video": VIDEO, "question": "What?", "options": ["a", "b"], "answer": "c"}, 'answer "c" is none of the 2'),
    ({"video": VIDEO, "question": "What?", "options": "a", "answer": "a"}, "options must be 2 to 26 texts"),
    ({"video": VIDEO, "question": "What?", "answer": "a", "time": "soon"}, "time must be seconds, mm:ss or hh:mm:ss"),
    ({"media": VIDEO, "question": "What?", "answer": "a"}, "it is already a row of a manifest"),
    ({"clip": 1}, 'format not recognised; its keys are "clip"'),
    ({**SALMONN, "conversations": talk("<video>\ud800?", " ")}, 'empty answer to "\\ud800?"'),
    ({"video": VIDEO, "question": "What?", "answer": ["a"]}, 'the answer to "What?" must be text, got ["a"]'),
    ({"instruction": "What?", "output": "A.", "history": 3, "videos": [VIDEO]}, "a question and its answer are two"),
    ([1], "a row is an object, got [1]"),
    ({**SALMONN, "video": "\ud800.mp4"}, 'video must be a path, got "\\ud800.mp4"'),
    ({"messages": {"role": ["user"], "content": 5}, "videos": [VIDEO]}, "a conversation is a list of turns"),
    ({"video": VIDEO, "question": "What?"}, 'question without answer: "What?"'),
    ({"question": "What?", "answer": "A."}, "no video and no audio"),
]  # fmt: skip


def test_bad_rows_are_refused_and_good_rows_converted(run, root):
    report, rows = run([SALMONN, *(row for row, _ in BAD), SALMONN])
    assert [place for place, _ in report.refused] == [f"{root / 'in.json'}[{i + 1}]" for i in range(len(BAD))]
    for (_, reason), (row, expected) in zip(report.refused, BAD, strict=True):
        assert expected in reason and "\n" not in reason, (row, reason)
    assert len(rows) == 1 and len(rows[0].questions) == 2
    listed = [json.loads(line) for line in (root / "out.refused.jsonl").read_text().splitlines()]
    assert [(entry["source"], entry["reason"]) for entry in listed] == report.refused


def test_invalid_lines_are_refused(run, root):
    good = json.dumps(SHAREGPT)
    report, _ = run(f"{good}\n{{half\n\n{good}\n", name="in.jsonl")
    assert report.refused[0][0] == f"{root / 'in.jsonl'}:2" and "not valid JSON" in report.refused[0][1]
    assert (root / "out.refused.jsonl").exists()
    twice = '{"from": "gpt", "value": "A.", "value": "B."}'
    row = json.dumps(SALMONN).replace(json.dumps(SALMONN["conversations"][1]), twice)
    report, (kept,) = run(f"[{row}, {json.dumps(SALMONN)}]")
    assert report.refused == [(f"{root / 'in.json'}[0]", "the same key is given twice")] and len(kept.questions) == 1
    run([SALMONN])
    assert not (root / "out.refused.jsonl").exists()


def test_numeric_answers(run):
    rows = [{"video": VIDEO, "question": "How many?", "answer": number} for number in (1234567, 3.0, 2.25)]
    _, (row,) = run(rows)
    assert [one.answer for one in row.questions] == ["1234567", "3", "2.25"]


def test_a_bad_line_of_a_table_does_not_affect_other_lines(run, root):
    lines = ["video,question,answer", f"{VIDEO},One?,a,b", f"{VIDEO},Two?,a", f'{VIDEO},"Three"?,a', f"{VIDEO},Four?,a"]
    latin = f"{VIDEO},Wo liegt K\xf6ln?,a".encode("latin-1")
    table = "\n".join(lines).encode() + b"\n" + latin + f'\n{VIDEO},Six?,"a\n{VIDEO},Seven?,b\n'.encode()
    (root / "in.csv").write_bytes(table)
    report = convert([str(root / "in.csv")], root / "out.jsonl")
    (row,) = read_manifest(root / "out.jsonl").rows
    assert [one.question for one in row.questions] == ["Two?", "Four?"]
    expected = {2: "more cells than columns", 4: "not a row of a table", 6: "a text is not UTF-8", 7: "unexpected end"}
    for (place, reason), (line, words) in zip(report.refused, expected.items(), strict=True):
        assert place == f"{root / 'in.csv'}:{line}" and words in reason


def test_links_out_of_the_root_are_refused_also_without_opening_files(run, root):
    (root / "link.mp4").symlink_to(root.parent / "outside.mp4")
    report, rows = run([{**SALMONN, "video": name} for name in ("link.mp4", "text.mp4")], open_media=False)
    assert "lies outside" in report.refused[0][1] and [row.name for row in rows] == ["text.mp4"]
    report, (row,) = run([{**SALMONN, "video": str(root / VIDEO)}])
    assert row.name == VIDEO and report.refused == []


def test_the_audio_option_overrides_all_rows(run):
    rows = [{**SALMONN, "audio": SOUND}, {"audio": SOUND, "conversations": talk("<audio>W?", "A.")}]
    report, (row,) = run(rows, audio="off")
    assert facts(row) == (VIDEO, None, False) and "--audio off leaves nothing" in report.refused[0][1]
    _, found = run([SALMONN], audio="on")
    assert found[0].audio


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_summary_and_the_training_command(root, tmp_path, capsys):
    source = root / "in.json"
    source.write_text(json.dumps([SALMONN, {**SALMONN, "video": "gone.mp4"}]))
    assert main(["data", "convert", str(source), "--to", str(root / "out.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 rows written (1 questions, from 2 source rows), 1 refused" in lines[0]
    assert f"{MUTED}: 1" in lines
    assert "gone.mp4" in lines[1] and lines[-1].endswith(f"data.path={root / 'out.jsonl'}")
    assert main(["data", "convert", str(source), "--to", str(tmp_path / "out.jsonl"), "--root", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"data.root={root.resolve()}")
    assert read_manifest(tmp_path / "out.jsonl", root).problems == []


def test_mistakes_on_the_command_line_give_one_line(root, tmp_path, capsys):
    source, out = root / "in.json", root / "out.jsonl"

    def says(rows, *options):
        source.write_text(json.dumps(rows) if not isinstance(rows, str) else rows)
        assert main(["data", "convert", str(source), "--to", str(out), *options]) == 2
        assert not out.exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    bad = {**SALMONN, "video": "gone.mp4"}
    assert "no good row among 1" in says([bad]) and (root / "out.refused.jsonl").exists()
    assert "in.json[1]: video" in says([SALMONN, bad], "--on-bad-row", "error")
    assert "no good row among 0" in says("")
    assert "not a JSON array" in says("[1, ")
    assert "not a folder; give the folder of the media as --root" in says([SALMONN], "--root", str(tmp_path / "none"))
    assert "must name columns video, question and answer" in says("a,b\n1,2\n", "--from", "csv")
    assert "each name once" in says("video,question,answer,answer\na,b,c,d\n", "--from", "csv")
    assert "not readable as a data set" in says("[]", "--from", "huggingface")
    for arguments, reason in (
        (["gone.json", "--to", str(out)], "gone.json: no such file"),
        (["clips/gone.json", "--to", str(out)], "clips/gone.json: no such file"),
        ([str(source), "--to", str(source)], "ends in .jsonl"),
        ([str(source), str(tmp_path / "in.json"), "--to", str(out)], "are not in one folder"),
        (["owner/name", "--to", str(out)], "as --root"),
        ([str(root / "more"), "--to", str(out)], "a folder without *.parquet"),
    ):
        assert main(["data", "convert", *arguments]) == 2
        assert reason in capsys.readouterr().err
    (root / "in.jsonl").write_text(json.dumps(SHAREGPT))
    assert main(["data", "convert", str(root / "in.jsonl"), "--to", str(root / "in.jsonl")]) == 2
    assert "is the input" in capsys.readouterr().err


def test_the_help_lists_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["data", "convert", "--help"])
    assert "{" + ",".join(FORMATS) + "}" in capsys.readouterr().out
