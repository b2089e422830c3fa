"""`omnimem data validate`: every file is decoded, every problem reported, and an interrupted run resumes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from array import array
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from clips import MEDIA, RABBIT, ROOT, WEBB
from data_prep.manifest import Question, Row
from data_prep.pool import in_processes
from data_prep.validate import run, validate
from data_prep.validate.file import check_file
from data_prep.validate.journal import Journal
from data_prep.validate.rows import PLACEHOLDER, check_rows
from data_prep.validate.tracks import is_silent, is_variable
from omnimem.cli import main
from omnimem.errors import OmniMemError

SPEECH = MEDIA / "audio_speech_commentary_mono16k_7s.mp3"
VFR = MEDIA / "odd_vfr_no_audio_nasa.mp4"
ROTATED = MEDIA / "odd_rotated_no_audio_nasa.mp4"
HALF = MEDIA / "broken_truncated_half_toy_rabbit.mp4"

# Findings according to the README of the clips, and what PyAV decodes (frames; audio samples).
CLIPS = {
    "speech_apollo15_hammer_feather_47s.webm": (set(), [1422, 2276808]),
    "speech_nasa_webb_narration_multistream.mp4": (
        {"multiple_video_tracks", "multiple_audio_tracks", "other_tracks"},
        [325, 104448, 390, 208896],
    ),
    "speech_burned_in_timecode_42s.mp4": (set(), [1272, 2035712]),
    "ambient_toy_rabbit_8s.mp4": (set(), [234, 343040]),
    "silent_track_flower_timelapse_5s.webm": ({"silent_audio"}, [150, 223808]),
    "audio_speech_jfk_11s.flac": ({"no_video"}, [485100]),
    "audio_speech_commentary_mono16k_7s.mp3": ({"no_video"}, [106000]),
    "audio_music_with_cover_art_30s.mp3": ({"no_video", "cover_art"}, [1323000, 1]),
    "odd_rotated_no_audio_nasa.mp4": ({"rotated", "no_audio", "short"}, [17]),
    "odd_vfr_no_audio_nasa.mp4": ({"variable_frame_rate", "no_audio"}, [50]),
    "odd_hevc_10bit_no_audio_nasa.mp4": ({"bit_depth", "no_audio"}, [325]),
    "broken_truncated_half_toy_rabbit.mp4": ({"truncated", "decode_error"}, [113, 154624]),
    "broken_truncated_no_moov_nasa.mp4": ({"cannot_open"}, []),
}


def codes(entry) -> set[str]:
    return {finding["code"] for finding in entry["findings"]}


def message(entry, code: str) -> str:
    return next(finding["message"] for finding in entry["findings"] if finding["code"] == code)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Reports of folders go into the working folder."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def clips(tmp_path):
    """A folder with three short clips and a file that is not media."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for clip in (VFR, ROTATED, SPEECH):
        shutil.copy(clip, folder)
    (folder / "README.md").write_text("About the clips.")
    return folder


def manifest(folder: Path, *rows) -> str:
    path = folder / "set.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def spoil(clip: Path, target: Path) -> Path:
    """Copy a clip with 300 bytes of noise in its second half, at its full length."""
    content = bytearray(clip.read_bytes())
    at = len(content) * 6 // 10
    content[at : at + 300] = random.Random(1).randbytes(300)
    target.write_bytes(content)
    return target


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPS)
def test_every_clip_is_reported_as_its_readme_says(name):
    expected, counts = CLIPS[name]
    entry = check_file(MEDIA / name, fast=False)
    assert codes(entry) == expected
    assert [stream.get("samples", stream["frames"]) for stream in entry["streams"]] == counts


def test_messages_say_what_and_where():
    half = check_file(HALF, fast=False)
    assert "3.77 s" in message(half, "decode_error") and "3.5 s of 7.8 s" in message(half, "truncated")
    assert "without its index" in message(check_file(MEDIA / "broken_truncated_no_moov_nasa.mp4", False), "cannot_open")
    webb = check_file(WEBB, fast=False)
    assert message(webb, "multiple_video_tracks") == "2 video tracks (0, 3); 3 is used"
    assert message(webb, "multiple_audio_tracks") == "2 audio tracks (1, 4); 4 is used"
    assert "67 to 100 ms" in message(check_file(VFR, fast=False), "variable_frame_rate")
    assert "270x480" in message(check_file(ROTATED, fast=False), "rotated")


def test_fast_decodes_nothing_and_reports_headers_and_timestamps():
    for name, (expected, _) in CLIPS.items():
        missed = {"silent_audio", "decode_error"}  # only decoding tells
        found = codes(check_file(MEDIA / name, fast=True))
        assert found - {"damaged_frames"} == expected - missed, name


@pytest.mark.parametrize(
    ("clip", "code"),
    [
        (RABBIT, "damaged_frames"),  # the H.264 decoder repairs it, and only logs that it did
        (MEDIA / "speech_apollo15_hammer_feather_47s.webm", "decode_error"),
        (MEDIA / "odd_hevc_10bit_no_audio_nasa.mp4", "decode_error"),
        (MEDIA / "audio_speech_jfk_11s.flac", "damaged_audio"),
        (SPEECH, "damaged_audio"),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_damage_in_the_middle_of_a_complete_file_is_found(clip, code, tmp_path):
    entry = check_file(spoil(clip, tmp_path / clip.name), fast=False)
    assert code in codes(entry) and "truncated" not in codes(entry)
    again = check_file(clip, fast=False)  # what was logged about the other file is not held against this one
    assert code not in codes(again)


def test_damage_in_a_track_that_is_not_used_is_a_warning(tmp_path):
    content = bytearray(WEBB.read_bytes())
    import av

    with av.open(str(WEBB)) as container:
        entry = container.streams[0].index_entries[100]
    content[entry.pos : entry.pos + entry.size] = bytes(entry.size)
    (tmp_path / "webb.mp4").write_bytes(content)
    found = check_file(tmp_path / "webb.mp4", fast=False)
    assert "damaged_unused_track" in codes(found) and not codes(found) & {"decode_error", "damaged_frames"}


def test_files_that_are_not_media(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("Once upon a time. " * 100)
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(5000))
    assert codes(check_file(tmp_path / "empty.mp4", False)) == {"empty"}
    for name in ("text.mp4", "noise.mp4", "missing.mp4"):
        assert codes(check_file(tmp_path / name, False)) == {"cannot_open"}


def test_an_exception_of_a_library_is_reported_and_does_not_stop_the_run(monkeypatch):
    def fails(path):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("data_prep.validate.file.inspect", fails)
    entry = check_file(RABBIT, fast=False)
    assert "ZeroDivisionError: division by zero" in message(entry, "cannot_open")


def test_variable_frame_rates():
    milliseconds = Fraction(1, 1000)
    ntsc = array("q", [round(i * 1000 / 29.97) for i in range(300)])  # 33 and 34: the container's rounding
    assert not is_variable(ntsc, milliseconds)
    dropped = array("q", [40 * i for i in range(300) if i != 77])
    assert not is_variable(dropped, milliseconds)
    assert is_variable(array("q", [0, 67, 167, 234, 334, 401, 501]), milliseconds)
    assert not is_variable(array("q", [0]), milliseconds)


@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "i4", "u1"])
def test_silence_in_every_sample_format(dtype):
    middle = 128 if dtype == "u1" else 0
    silence = np.full((2, 1000), middle, dtype)
    assert is_silent(silence)
    audible = silence.copy()
    audible[1, 500] += np.array(0.25 if dtype[0] == "f" else 2**28 if dtype == "i4" else 3, dtype)
    assert not is_silent(audible)


# --- many files ------------------------------------------------------------------------------------------------------


def length_or_crash(path: Path) -> int:
    """A check whose process dies on one file, as with a crashing decoder."""
    if path.name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return len(path.name)


def slow(path: Path) -> int:
    time.sleep(60)
    return 0


def test_a_dead_worker_affects_one_file():
    paths = [Path(name) for name in ("a", "bb", "crash", "ccc", "dddd", "eeeee")]
    results = dict(in_processes(length_or_crash, paths, workers=2))
    assert results == {path: None if path.name == "crash" else len(path.name) for path in paths}


def test_a_crash_is_reported_and_the_file_checked_again_next_time(clips, monkeypatch):
    def dies(check, todo, workers):
        for path in todo:
            yield path, None if path.name == VFR.name else check(path)

    monkeypatch.setattr(run, "in_processes", lambda *args: dies(*args))
    report = validate(str(clips))
    broken = next(entry for entry in report["files"] if entry["names"] == [VFR.name])
    assert codes(broken) == {"crashed"} and report["totals"]["with_errors"] == 1
    seen = counted(monkeypatch)
    assert validate(str(clips))["totals"]["with_errors"] == 0
    assert seen == [VFR.name]


def test_two_parallel_runs_do_not_disturb_each_other(clips, tmp_path):
    """Two processes with the same report run at the same time, and both succeed."""
    report = tmp_path / "report.json"
    meet = f"""
import os, time
from pathlib import Path
from data_prep.validate import journal
genuine = journal.Journal.__init__
def opened(self, path):  # each goes on when the other has its journal open
    genuine(self, path)
    Path({str(tmp_path)!r}, f"{{os.getpid()}}.here").touch()
    while len(list(Path({str(tmp_path)!r}).glob("*.here"))) < 2:
        time.sleep(0.01)
journal.Journal.__init__ = opened
from omnimem.cli import main
raise SystemExit(main(["data", "validate", {str(clips)!r}, "--report", {str(report)!r}, "--workers", "1"]))
"""
    runs = [subprocess.Popen([sys.executable, "-c", meet], cwd=MEDIA.parents[1], stderr=subprocess.PIPE) for _ in "ab"]
    told = [run.communicate(timeout=90)[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    names = {name for entry in json.loads(report.read_text())["files"] for name in entry["names"]}
    assert names == {VFR.name, ROTATED.name, SPEECH.name}
    assert not list(tmp_path.glob("*.partial.jsonl"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    opened = Path.open

    def full(path, mode="r", *others, **options):
        return opened(Path("/dev/full") if mode == "ab" else path, mode, *others, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OmniMemError, match="no space left"), Journal(tmp_path / "report.json") as journal:
        journal.add({})


def test_interrupted_workers_end_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    results = in_processes(slow, [Path("a"), Path("b")], workers=2)
    started = time.monotonic()
    timer = subprocess.Popen([sys.executable, "-c", f"import os,time;time.sleep(2);os.kill({os.getpid()},2)"])
    with pytest.raises(KeyboardInterrupt):
        next(results)
    signal.signal(signal.SIGINT, before)
    timer.wait()
    assert time.monotonic() - started < 30


def test_folder(clips):
    (clips / "more").mkdir()
    shutil.copy(SPEECH, clips / "more" / "copy.mp3")
    shutil.copy(RABBIT, clips / "rabbit.dat")  # by what it holds, not by its name
    (clips / "nonsense.dat").write_bytes(b"no media" * 100)
    (clips / "link.mp4").symlink_to(VFR.name)
    (clips / "nowhere.mp4").symlink_to("nowhere")
    (clips / "half.mp4").write_bytes(HALF.read_bytes())
    (clips / "._half.mp4").write_bytes(b"a Mac was here")
    os.mkfifo(clips / "pipe.mp4")
    report = validate(str(clips), workers=2)
    names = {name for entry in report["files"] for name in entry["names"]}
    assert names == {VFR.name, ROTATED.name, SPEECH.name, "more/copy.mp3", "rabbit.dat", "link.mp4", "half.mp4"}
    ignored = {one["name"] for one in report["ignored"]}
    assert ignored == {"README.md", "nonsense.dat", "nowhere.mp4", "._half.mp4", "pipe.mp4"}
    groups = {frozenset(group["names"]) for group in report["duplicates"]}
    assert groups == {frozenset({SPEECH.name, "more/copy.mp3"}), frozenset({VFR.name, "link.mp4"})}
    assert report["totals"]["files"] == 6 and report["totals"]["with_errors"] == 1
    assert report["codes"]["no_audio"] == 2
    assert json.loads(Path("validated.json").read_text()) == report
    assert not Path("validated.partial.jsonl").exists()


def counted(monkeypatch) -> list[str]:
    """Check files in this process, and record which."""
    seen: list[str] = []

    def one_by_one(check, todo, workers):
        for path in todo:
            seen.append(path.name)
            yield path, check(path)

    monkeypatch.setattr(run, "in_processes", one_by_one)
    return seen


def test_only_changed_files_are_checked_again(clips, monkeypatch):
    seen = counted(monkeypatch)
    first = validate(str(clips))
    assert len(seen) == 3
    seen.clear()
    assert validate(str(clips)) == first and seen == []
    assert validate(str(clips), fast=True)["files"] == first["files"] and seen == []  # decoded in full is enough
    os.utime(clips / VFR.name, (0, 0))
    validate(str(clips))
    assert seen == [VFR.name]
    seen.clear()
    validate(str(clips), fresh=True)
    assert len(seen) == 3


@pytest.mark.parametrize("what", ["av.__version__", "av.ffmpeg_version_info", "data_prep.validate.journal.VERSION"])
def test_results_of_other_versions_are_not_used(clips, monkeypatch, what):
    """Versions of PyAV, FFmpeg and the checks; results in a report and in a journal."""
    seen = counted(monkeypatch)
    validate(str(clips))
    seen.clear()
    with monkeypatch.context() as other:
        other.setattr(what, 99 if what.endswith("VERSION") else "0.0.1")
        report = validate(str(clips))
        assert len(seen) == 3
        assert validate(str(clips)) == report and len(seen) == 3
    Path("validated.json").unlink()
    # The journal of a killed run of the other version.
    Path("validated.partial.jsonl").write_text("\n".join(json.dumps(entry) for entry in report["files"]))
    validate(str(clips))
    assert len(seen) == 6


def test_fast_results_are_not_reused_for_full_checks(clips, monkeypatch):
    seen = counted(monkeypatch)
    validate(str(clips), fast=True)
    validate(str(clips))
    assert len(seen) == 6


def test_an_interrupted_run_resumes(clips, monkeypatch, capsys):
    def breaks_off(check, todo, workers):
        yield todo[0], check(todo[0])
        yield todo[1], check(todo[1])
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "in_processes", breaks_off)
    assert main(["data", "validate", str(clips)]) == 1
    assert "2 of 3 files are checked; run the same command again to resume" in capsys.readouterr().err
    assert not Path("validated.json").exists()
    with Path("validated.partial.jsonl").open("a") as journal:
        journal.write('{"path": "/cut/off')  # as a killed process leaves it
    seen = counted(monkeypatch)
    report = validate(str(clips))
    assert len(seen) == 1 and report["totals"]["files"] == 3
    assert not Path("validated.partial.jsonl").exists()
    assert seen[0] == max(VFR.name, ROTATED.name, SPEECH.name)


def alive(process: str) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_run_resumes_and_leaves_no_worker(clips):
    for number in range(4):
        shutil.copy(MEDIA / "speech_burned_in_timecode_42s.mp4", clips / f"z{number}.mp4")
    command = [sys.executable, "-m", "omnimem", "data", "validate", str(clips), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    journal = Path("validated.partial.jsonl")
    deadline = time.monotonic() + 30
    while not (journal.exists() and journal.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children and not any(alive(child) for child in children)
    kept = len([line for line in journal.read_text().splitlines() if line.startswith("{")])
    assert 0 < kept < 7
    assert validate(str(clips))["totals"]["files"] == 7


# --- manifests -------------------------------------------------------------------------------------------------------


def test_manifest(tmp_path, clips):
    (clips / "half.mp4").write_bytes(HALF.read_bytes())
    path = manifest(
        clips,
        {"media": SPEECH.name, "question": "What is heard?", "answer": "A voice."},
        {"media": SPEECH.name, "question": "what is  heard?", "answer": "A bell."},
        {"media": VFR.name, "question": "<audio>\nWhat is seen?", "answer": "A mirror.", "time": 99},
        {"media": VFR.name, "audio": False, "question": "<video> What is seen?", "answer": "A mirror."},
        {"media": SPEECH.name, "audio": False, "question": "What is seen?", "answer": "Nothing."},
        {"media": "half.mp4", "question": "What is seen?", "answer": "A rabbit."},
        {"media": "gone.mp4", "question": "Who?", "answer": "Ada."},
        "{not json",
    )
    report = validate(path)
    rows = report["rows"]
    by_code: dict[str, list[list[int]]] = {}
    for finding in rows["findings"]:
        by_code.setdefault(finding["code"], []).append(finding["lines"])
    assert by_code == {
        "bad_row": [[], []],
        "audio_missing": [[3]],
        "placeholder_without_media": [[3]],
        "placeholder": [[4]],
        "time_past_end": [[3]],
        "nothing_to_use": [[5]],
        "unusable_media": [[6]],
        "duplicate_media": [[1, 2, 5], [3, 4]],
        "conflicting_answers": [[1, 2]],
    }
    said = [finding["message"] for finding in rows["findings"]]
    assert any("gone.mp4" in text and "set.jsonl:7" in text for text in said)
    assert (rows["count"], rows["usable"], rows["questions"]) == (8, 4, 6)
    assert rows["audio"] == {"used": 3, "silent": 0, "missing": 1, "ignored": 1, "none": 1}
    assert (clips / "set.validated.json").exists()


def row(media: str, line: int, *questions: Question, audio: bool = True, audio_path: str | None = None) -> Row:
    path = None if audio_path is None else Path(f"/{audio_path}")
    return Row(Path(f"/{media}"), questions, audio, line, media, path)


def result(path: str, **differs):
    """The result of `check_file` for a good clip of 10 s."""
    good = {"path": f"/{path}", "digest": path, "seconds": 10.0, "has_video": True, "audio": "present", "findings": []}
    return {f"/{path}": {**good, **differs}}


def test_duplicates_are_found_by_content():
    who, who_again = Question("Who?", "Ada.", 2.0), Question("Who? ", "ada.", 2.0)
    files = {**result("a.mp4"), **result("copy_of_a.mp4", digest="a.mp4"), **result("b.mp4")}
    found = check_rows([row("a.mp4", 1, who), row("copy_of_a.mp4", 2, who_again), row("b.mp4", 3, who)], files)
    assert [(one["code"], one["lines"]) for one in found["findings"]] == [
        ("duplicate_media", [1, 2]),
        ("duplicate_question", [1, 2]),
    ]
    # At another time, or without audio, the answer may differ.
    rows = [
        row("b.mp4", 1, who, Question("Who?", "Bob.", 5.0)),
        row("b.mp4", 2, Question("Who?", "?", 2.0), audio=False),
    ]
    assert [one["code"] for one in check_rows(rows, files)["findings"]] == ["duplicate_media"]


def test_row_with_separate_audio_file():
    files = {**result("a.mp4", audio="none"), **result("a.wav", has_video=False, seconds=12.0)}
    files |= result("bad.wav", findings=[{"code": "truncated", "severity": "error", "message": "cut off"}])
    found = check_rows([row("a.mp4", 1, Question("<audio> Who?", "Ada.", 11.0), audio_path="a.wav")], files)
    assert found["audio"]["used"] == 1
    assert [one["code"] for one in found["findings"]] == ["placeholder"]  # 11 s is before the end of the audio
    found = check_rows([row("a.mp4", 1, Question("Who?", "Ada."), audio_path="bad.wav")], files)
    assert [one["code"] for one in found["findings"]] == ["unusable_media"] and found["usable"] == 0


@pytest.mark.parametrize(
    "text",
    ["<video>", "<audio>", "<image>", "<|video_pad|>", "<|audio_bos|>", "<|vision_start|>", "<|AUDIO|>", "<image_1>",
     "<speech>", "<ImageHere>", "<sound>"],
)  # fmt: skip
def test_placeholders(text):
    assert PLACEHOLDER.search(f"{text}\nWhat is it?")


@pytest.mark.parametrize("text", ["Is a<b and c>d?", "the <title> tag", "video", "<videos of cats>", "audio > video"])
def test_other_words_are_not_placeholders(text):
    assert not PLACEHOLDER.search(text)


def test_parquet_shards(clips, monkeypatch):
    from datasets import Dataset

    (clips / "shards").mkdir()
    row = {"media": VFR.name, "question": "What is seen?", "answer": "A mirror."}
    Dataset.from_list([row, row]).to_parquet(str(clips / "shards" / "0.parquet"))
    report = validate(str(clips / "shards"), root=clips)
    assert report["codes"]["duplicate_question"] == 1 and report["totals"]["files"] == 1
    assert (clips / "shards.validated.json").exists()
    monkeypatch.chdir(clips / "shards")
    assert run.default_report(".") == clips.resolve() / "shards.validated.json"


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_line(clips, capsys):
    (clips / "half.mp4").write_bytes(HALF.read_bytes())
    (clips / "[red]nothing.mp4").touch()
    assert main(["data", "validate", str(clips), "--workers", "2"]) == 0
    shown = capsys.readouterr().out
    for said in ("[red]nothing.mp4", "half.mp4", "error: truncated: readable up to 3.5 s of 7.8 s", "README.md"):
        assert said in shown
    assert "5 files" in shown and "2 unusable, 2 unusual, 1 fine" in shown and "report: validated.json" in shown
    assert main(["data", "validate", str(clips), "--strict"]) == 2
    assert f"{clips}: 2 files are unusable (--strict)" in capsys.readouterr().err


def test_a_target_without_usable_files_is_an_error(tmp_path, capsys):
    assert main(["data", "validate", str(HALF), "--report", str(tmp_path / "r.json")]) == 2
    assert "is usable" in capsys.readouterr().err
    assert (tmp_path / "r.json").exists()


def test_a_file_name_that_is_not_unicode(clips):
    name = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(VFR, clips / name)
    report = validate(str(clips), workers=1)
    assert ["caf\\xe9.mp4"] in [entry["names"] for entry in report["files"]]


def test_mistakes_are_one_line(clips, tmp_path):
    (tmp_path / "notes.json").write_text('{"my": "notes"}')
    (tmp_path / "empty").mkdir()
    for arguments, words in [
        ({"target": str(tmp_path / "empty")}, "no media in this folder"),
        ({"target": str(tmp_path / "gone.jsonl")}, "gone.jsonl"),
        ({"target": str(clips), "root": str(clips)}, "--root is for manifests"),
        ({"target": str(clips), "report": tmp_path / "notes.json"}, "is not a report"),
        ({"target": str(clips), "report": tmp_path}, "--report"),
        ({"target": str(clips), "report": tmp_path / "notes.json" / "r.json"}, "--report"),
    ]:
        with pytest.raises(OmniMemError, match=words):
            validate(**arguments)
    assert json.loads((tmp_path / "notes.json").read_text()) == {"my": "notes"}
    assert not list(tmp_path.rglob("*.partial.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(clips, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(OmniMemError, match="--report"):
        validate(str(clips), report=locked / "r.json")
