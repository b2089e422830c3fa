"""`omnimem data stats`: numbers that can be computed by hand for one clip."""

from __future__ import annotations

import json

import pytest

from clips import MEDIA, RABBIT
from data_prep.decoded_clips.format import PrepareSettings
from data_prep.decoded_clips.prepare import prepare
from data_prep.manifest import read_manifest
from omnimem.cli import main
from omnimem.errors import OmniMemError
from train.data_stats import count, durations, stats
from train.memory_plan import EVICTED_PART
from train.stream_plan import StreamPlan

TIMECODE = "speech_burned_in_timecode_42s.mp4"


def manifest(folder, *rows) -> str:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps({"question": "Who?", "answer": "Ada.", **row}) + "\n" for row in rows))
    return str(path)


def test_one_clip_by_hand(tmp_path):
    found = stats(manifest(tmp_path, {"media": RABBIT.name}), MEDIA)  # quickstart: 1 frame/s, chunks of 4 s
    # 7.8 s of 320x240: 8 frames, two per temporal patch; the tiny model's frames are 112x84, 28x28 pixels per token.
    visual = 4 * (112 // 28) * (84 // 28)
    audio = 4 * 25 + round(3.8 * 25)
    assert (found["tokens"]["visual"], found["tokens"]["audio"]) == (visual, audio) == (48, 195)
    assert found["tokens"]["visual_per_hour"] == round(visual / 7.8 * 3600)
    assert found["tokens"]["audio_per_hour"] == 25 * 3600
    assert found["tokens"]["visual_to_audio"] == round(48 / 195, 3)
    assert found["chunks"] == {
        "total": 2,
        "mean_tokens": round((visual + audio) / 2, 1),
        "largest_tokens": 24 + 100,
        "most_in_a_stream": 2,
    }
    assert found["hours"] == round(7.8 / 3600, 4) and found["rows"] == {
        "used": 1, "skipped": [], "questions": 1, "rejected": 0,
    }  # fmt: skip
    assert found["durations"] == {"under 10 s": 1}


def test_memory_of_the_clip(tmp_path, tiny):
    found = stats(manifest(tmp_path, {"media": RABBIT.name}), MEDIA)
    text = tiny.config.text_config
    head = text.hidden_size // text.num_attention_heads
    position = text.num_hidden_layers * 2 * text.num_key_value_heads * head * 4  # keys and values, float32
    memory = found["memory"]
    assert memory["per_token"] == position
    assert memory["full_cache_of_longest"] == 243 * position
    assert memory["full_cache_per_hour"] == round(243 / 7.8 * 3600 * position)
    features = text.num_hidden_layers * text.hidden_size * 4  # what the selection compares
    beside = text.num_hidden_layers * (38 + 4)  # metadata, attention score
    assert memory["retained"] == 96 * (position + features + beside)
    parts = memory["training_step_parts"]
    waiting = [size for name, size in parts.items() if EVICTED_PART in name]
    assert len(waiting) == 1
    assert memory["training_step"] == sum(parts.values()) - sum(waiting)


def test_overrides_change_what_is_counted(tmp_path):
    path = manifest(tmp_path, {"media": RABBIT.name})
    base, double = stats(path, MEDIA), stats(path, MEDIA, overrides=["data.fps=2", "data.audio=false"])
    assert double["tokens"]["visual"] == 2 * base["tokens"]["visual"]
    assert double["tokens"]["audio"] == 0 and double["tokens"]["visual_to_audio"] is None
    short = stats(path, MEDIA, overrides=["data.max_seconds=4", "memory.mean_budget=200", "model.dtype=bfloat16"])
    assert short["tokens"]["total"] == 24 + 100 and short["tokens"]["streams_over_budget"] == 0
    assert 2 * short["memory"]["per_token"] == base["memory"]["per_token"]


def test_several_streams_and_skipped_rows(tmp_path):
    path = manifest(
        tmp_path,
        {"media": RABBIT.name},
        {"media": TIMECODE, "audio": False},
        {"media": "broken_truncated_no_moov_nasa.mp4"},
        {"media": "gone.mp4"},
    )
    found = stats(path, MEDIA)
    assert found["hours"] == round((7.8 + 42.4) / 3600, 4)
    assert found["tokens"]["audio_per_hour"] == round(195 / (7.8 + 42.4) * 3600)
    assert found["durations"] == {"under 10 s": 1, "10 to 30 s": 0, "30 to 60 s": 1}
    gone, broken = found["rows"]["skipped"]
    assert "gone.mp4" in gone and "set.jsonl:3: " in broken and "without its index" in broken
    with pytest.raises(OmniMemError, match="no usable row"):
        stats(manifest(tmp_path, {"media": "broken_truncated_no_moov_nasa.mp4"}), MEDIA)


def test_rows_without_a_usable_track_are_skipped(tmp_path):
    path = manifest(tmp_path, {"media": RABBIT.name}, {"media": "audio_speech_jfk_11s.flac"})
    found = stats(path, MEDIA, overrides=["data.audio=false"])
    assert found["rows"]["used"] == 1 and "no video and no audio that is read" in found["rows"]["skipped"][0]


def test_a_prepared_folder_gives_the_same(tmp_path):
    path = manifest(tmp_path, {"media": RABBIT.name})
    prepare(read_manifest(path, MEDIA), tmp_path / "prepared", PrepareSettings(), workers=1)
    clips, prepared = stats(path, MEDIA), stats(str(tmp_path / "prepared"))
    assert {**prepared, "manifest": path} == clips


def test_headers_without_a_duration_do_not_divide_by_zero():
    plan = StreamPlan("a.webm", 0.0, 0, 0, 0, 0, 1, 3)
    found = count([plan], 96)
    assert found["without_duration"] == 1
    assert found["tokens"]["visual_per_hour"] == 0 and found["chunks"]["mean_tokens"] is None


def test_duration_bins():
    assert durations([]) == {}
    assert durations([9.9, 10.0, 59.0, 20000.0])["30 to 60 s"] == 1
    assert durations([20000.0]) == {"3 h and more": 1}


def test_command_line(tmp_path, capsys):
    target = tmp_path / "stats.json"
    assert main(["data", "stats", "quickstart", "data.chunk_seconds=2", "--json", str(target)]) == 0
    shown = capsys.readouterr().out
    for words in ("6 streams, 13 questions", "visual tokens per hour", "full cache, per hour", "sum on the device"):
        assert words in shown
    assert json.loads(target.read_text())["chunk_seconds"] == 2
    assert main(["data", "stats", "quickstart", "--recipe", "quickstart", "data.fps=2"]) == 0
    assert "2 frames/s" in capsys.readouterr().out
    for arguments, words in [
        (["quickstart", "data.fbs=2"], "did you mean data.fps"),
        (["quickstart", "--recipe", "nothing"], "nothing"),
        ([str(tmp_path / "gone.jsonl")], "gone.jsonl"),
    ]:
        assert main(["data", "stats", *arguments]) == 2
        assert words in capsys.readouterr().err
