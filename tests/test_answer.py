"""`omnimem answer`: any model, any clip, one question; mistakes give one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnimem import StreamingSession
from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.cli import main as omnimem
from small_runs import FLOWER, HALF, MEDIA, NO_INDEX, RABBIT, SILENT, SPEECH, lines, metrics, start, trained_run
from train.export import export_run

FIELDS = {
    "answer", "question", "media", "model", "chunk", "seconds", "duration", "new_tokens", "retained", "bytes",
    "kv_bytes", "last", "tokens", "mean_budget", "method", "kv_dtype", "watch_seconds", "first_token_seconds",
}  # fmt: skip
FEW = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("run"), "train.max_steps=2")


@pytest.fixture(scope="module")
def export(run) -> Path:
    export_run(run, run.parent / "merged")
    return run.parent / "merged"


def answered(capsys, model: str | Path, clip: str, *options: str, question: str = "What is seen?") -> dict:
    """The JSON object of an answer; progress goes to stderr, without warnings."""
    capsys.readouterr()
    assert omnimem(["answer", str(model), str(MEDIA / clip), question, "--json", *FEW, *options]) == 0
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    report = json.loads(shown.out)
    assert set(report) == FIELDS
    return report


def test_json_reports_the_stream_and_the_retained_tokens(run, capsys):
    report = answered(capsys, run, RABBIT)
    assert report["question"] == "What is seen?" and report["media"] == str(MEDIA / RABBIT)
    assert report["model"] == str(run) and report["method"] == "omnimem" and report["mean_budget"] == 24
    assert isinstance(report["answer"], str)
    assert report["seconds"] == pytest.approx(7.8, abs=0.1) == pytest.approx(report["duration"], abs=0.1)
    assert report["chunk"] == 3 and report["last"] is True  # four chunks of 2 s
    assert report["retained"]["visual"] == 20 and report["retained"]["audio"] == 4
    assert 0 < report["new_tokens"] < report["tokens"]
    assert 0 < report["kv_bytes"] <= report["bytes"]
    assert report["watch_seconds"] > 0
    streamed = {record["tokens"] for record in metrics(run)}
    assert report["tokens"] in streamed, "answering streams what training streamed"


def test_run_export_and_checkpoint_answer_alike(run, export, capsys):
    options = ("--dtype", "float32", "--device", "cpu")
    reports = [answered(capsys, model, FLOWER, *options) for model in (run, export, run / "checkpoints/step-00000002")]
    for name in ("answer", "tokens", "retained", "seconds", "mean_budget", "method", "kv_bytes"):
        assert reports[0][name] == reports[1][name] == reports[2][name]


def test_a_process_answers_on_stdout_and_shows_its_progress_on_stderr(export):
    done = start("-m", "omnimem", "answer", export, MEDIA / FLOWER, "What is seen?", *FEW, COLUMNS="80")
    assert done.returncode == 0
    assert done.stdout.endswith("\n") and "MiB" not in done.stdout
    (line,) = lines(done.stderr)  # one, however narrow: it is read by scripts and logs too
    assert "5 of 5 s read" in line and "20 visual + 4 audio" in line and "MiB" in line


def test_the_offline_model_answers(capsys):
    report = answered(capsys, "tiny", FLOWER, "--chunk-seconds", "2")
    kept = report["retained"]
    assert report["mean_budget"] == 8192 and report["tokens"] == kept["visual"] + kept["audio"]


def test_asked_before_the_end(run, capsys):
    report = answered(capsys, run, RABBIT, "--at", "3")
    assert report["seconds"] == 4 and report["chunk"] == 1 and report["last"] is False
    assert answered(capsys, run, RABBIT, "--at", "0")["seconds"] == 2
    assert answered(capsys, run, RABBIT, "--at", "4")["seconds"] == 4


def test_asked_after_the_end(run, capsys):
    capsys.readouterr()
    assert omnimem(["answer", str(run), str(MEDIA / FLOWER), "What?", "--at", "60", *FEW]) == 0
    assert "before --at 60" in " ".join(capsys.readouterr().err.split())


def test_reading_options(run, capsys):
    assert answered(capsys, run, RABBIT, "--no-audio")["retained"]["audio"] == 0
    assert answered(capsys, run, RABBIT, "--max-seconds", "3")["seconds"] == pytest.approx(3, abs=0.1)
    assert answered(capsys, run, RABBIT, "--chunk-seconds", "4")["chunk"] == 1
    once, twice = (answered(capsys, run, RABBIT, "--no-audio", "--fps", rate)["tokens"] for rate in "12")
    assert twice == 2 * once


def test_memory_options(run, capsys, tmp_path):
    for options, visual, audio in (
        (("--mean-budget", "12"), 10, 2),
        (("--mean-budget", "12", "--ratio", "1"), 6, 6),
        (("--mean-budget", "12", "--method", "uniform"), 10, 2),
        (("--variant", "release"), 20, 4),
    ):
        report = answered(capsys, run, RABBIT, *options)
        assert (report["retained"]["visual"], report["retained"]["audio"]) == (visual, audio)
    full = answered(capsys, run, RABBIT, "--method", "full")
    assert full["retained"]["visual"] + full["retained"]["audio"] == full["tokens"]
    BudgetProfile((LayerBudget(5, 1), LayerBudget(7, 3), LayerBudget(9, 2))).save(tmp_path / "profile.json")
    report = answered(capsys, run, RABBIT, "--profile", str(tmp_path / "profile.json"))
    assert report["retained"]["visual"] == 7 and report["retained"]["audio"] == 2 and report["mean_budget"] == 9


def test_video_only_and_audio_only(run, capsys):
    silent, audio_only = answered(capsys, run, SILENT), answered(capsys, run, SPEECH)
    assert silent["retained"]["audio"] == 0 and silent["retained"]["visual"] > 0
    assert audio_only["retained"]["visual"] == 0 and audio_only["retained"]["audio"] == 4


def test_a_truncated_clip_when_allowed(run, capsys):
    report = answered(capsys, run, HALF, "--allow-truncated")
    assert 2 <= report["seconds"] < 4.5 and report["duration"] == pytest.approx(7.8, abs=0.1)
    assert report["last"] is True


def test_a_run_answers_with_the_settings_it_was_trained_with(tmp_path):
    """All settings that shape the tokens: frame rate, chunks, resolution, audio."""
    settings = {"fps": 2.0, "chunk_seconds": 4.0, "short_side": 120, "audio": False, "max_pixels": 5 * 28 * 28}
    overrides = [f"data.{key}={str(value).lower()}" for key, value in settings.items()]
    run = trained_run(tmp_path, "train.max_steps=2", *overrides, "selection.lambda=0.5")
    session = StreamingSession.from_pretrained(run)
    assert session.settings.fps == 2.0 and session.settings.chunk_seconds == 4.0
    assert session.settings.short_side == 120 and session.settings.audio is False
    assert session.cache.method.settings()["lambda"] == 0.5
    streamed = {sum(event.new_tokens for event in session.watch(MEDIA / clip)) for clip in (FLOWER, RABBIT)}
    assert streamed == {record["tokens"] for record in metrics(run)}


# ---- wrong input -----------------------------------------------------------------------------------------------------


def other_profile(folder: Path) -> str:
    """A profile for two layers; the tiny model has three."""
    BudgetProfile((LayerBudget(5, 1), LayerBudget(7, 3))).save(folder / "two.json")
    return str(folder / "two.json")


def zero_profile(folder: Path) -> str:
    (folder / "zero.json").write_text("[[0, 5], [1, 5], [1, 5]]")
    return str(folder / "zero.json")


def text_file(folder: Path) -> str:
    (folder / "notes.txt").write_text("this is not a clip\n" * 50)
    return str(folder / "notes.txt")


def run_without_adapter(folder: Path) -> str:
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "recipe.yaml").write_text("model: {name_or_path: tiny}\n")
    return str(folder / "unfinished")


def empty_folder(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


GOOD = str(MEDIA / FLOWER)

WRONG = {
    "missing clip": ("tiny", "gone.mp4", [], "gone.mp4"),
    "folder as clip": ("tiny", str(MEDIA), [], "media"),
    "corrupt clip": ("tiny", str(MEDIA / NO_INDEX), [], NO_INDEX),
    "clip that breaks off": ("tiny", str(MEDIA / HALF), [], HALF),
    "text file": ("tiny", text_file, [], "notes.txt"),
    "empty question": ("tiny", GOOD, ["question", " "], "question is empty"),
    "budget 0": ("tiny", GOOD, ["--mean-budget", "0"], "at least 2"),
    "budget 1": ("tiny", GOOD, ["--mean-budget", "1"], "at least 2"),
    "budget 0 in a profile": ("tiny", GOOD, ["--profile", zero_profile], "at least 1"),
    "profile of another model": ("tiny", GOOD, ["--profile", other_profile], "2 layers"),
    "missing profile": ("tiny", GOOD, ["--profile", "gone.json"], "gone.json"),
    "clip as profile": ("tiny", GOOD, ["--profile", GOOD], FLOWER),
    "run without adapter": (run_without_adapter, GOOD, [], "without an adapter"),
    "empty folder as model": (empty_folder, GOOD, [], "config.json"),
    "missing model": ("/nosuch/folder", GOOD, [], "/nosuch/folder"),
    "clip as model": (GOOD, GOOD, [], FLOWER),
    "unknown method": ("tiny", GOOD, ["--method", "nosuch"], "nosuch"),
    "variant of another method": ("tiny", GOOD, ["--method", "uniform", "--variant", "paper"], "variant"),
    "unknown device": ("tiny", GOOD, ["--device", "nosuch"], "nosuch"),
    "absent device": ("tiny", GOOD, ["--device", "cuda:7"], "cuda:7"),
    "chunks off the grid": ("tiny", GOOD, ["--chunk-seconds", "3"], "multiple of 2"),
    "half frames": ("tiny", GOOD, ["--fps", "0.3", "--chunk-seconds", "10"], "multiple of"),
    "audio only with --no-audio": ("tiny", str(MEDIA / SPEECH), ["--no-audio"], SPEECH),
    "fps 0": ("tiny", GOOD, ["--fps", "0"], "above 0"),
    "a time that is not a number": ("tiny", GOOD, ["--at", "soon"], "soon"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_status_2(case, tmp_path, capsys):
    model, clip, options, word = WRONG[case]
    model, clip, *options = (made(tmp_path) if callable(made) else made for made in (model, clip, *options))
    question = "What is seen?"
    if options[:1] == ["question"]:
        question, options = options[1], options[2:]
    capsys.readouterr()
    try:
        status = omnimem(["answer", model, clip, question, *options])
    except SystemExit as stopped:
        status = stopped.code
    shown = capsys.readouterr()
    assert status == 2 and shown.out == ""
    told = lines(shown.err)
    assert len(told) == 1, shown.err
    assert told[0].startswith("omnimem") and word in told[0], told[0]


def test_a_profile_of_another_model_of_as_many_layers(run, tmp_path, capsys):
    content = json.loads((run / "budget_profile.json").read_text())
    content["model"]["architecture"] = "qwen3_vl_text"
    (tmp_path / "other.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert omnimem(["answer", str(run), GOOD, "What?", "--profile", str(tmp_path / "other.json")]) == 2
    (line,) = lines(capsys.readouterr().err)
    assert "qwen3_vl_text" in line and "qwen2_5_omni_text" in line


@pytest.mark.long
def test_wrong_input_in_a_new_process():
    done = start("-m", "omnimem", "answer", "tiny", MEDIA / NO_INDEX, "What?")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = lines(done.stderr)
    assert line.startswith("omnimem: ") and NO_INDEX in line
