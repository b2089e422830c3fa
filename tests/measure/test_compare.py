"""`omnimem compare`: the numbers of the table are correct, budgets hold, and finished cells are reused."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor

import omnimem.measure.compare
import omnimem.measure.figures
from clips import MEDIA, RABBIT, WEBB
from omnimem.budget import BudgetProfile
from omnimem.budget.statistics import Compressibility, LayerStatistics
from omnimem.cli import main
from omnimem.errors import OmniMemError
from omnimem.measure.cells import Cell, run_cells
from omnimem.measure.questions import cluster_interval, normalised
from omnimem.memory.token_bytes import token_bytes_of
from omnimem.selection import build_selection, untrained_methods
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings
from small_runs import FLOWER, NO_INDEX, ROWS, start, write_manifest

BUDGETS = (12, 24)
OPTIONS = ["--chunk-seconds", "2", "--max-new-tokens", "2", "--device", "cpu"]
GRID = ["--methods", "full,uniform,omnimem", "--mean-budgets", "12,24"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Two readable clips and an unreadable one; a question in the middle of the second."""
    folder = tmp_path_factory.mktemp("questions")
    for name in (FLOWER, RABBIT.name, NO_INDEX):
        shutil.copy(MEDIA / name, folder)
    rows = [*ROWS, {"media": NO_INDEX, "question": "What is seen?", "answer": "Nothing."}]
    return write_manifest(folder / "questions.jsonl", rows)


@pytest.fixture(scope="module")
def compared(tiny_path, questions, tmp_path_factory) -> tuple[Path, str]:
    """A finished comparison: its folder and what was printed."""
    out = tmp_path_factory.mktemp("compared")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert compare(tiny_path, questions, out, *GRID) == 0
    return out, printed.getvalue()


def compare(model, questions, out, *options) -> int:
    return main(["compare", str(model), str(questions), "--out", str(out), *OPTIONS, *options])


def results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["cells"]


def written(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}


def test_table_json_csv_and_cells_agree(compared):
    out, printed = compared
    rows = results(out)
    assert [(row["method"], row["mean_budget"]) for row in rows] == [
        ("full", None),
        *((method, budget) for method in ("uniform", "omnimem") for budget in BUDGETS),
    ]
    with (out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(rows, lines, strict=True):
        cell = json.loads((out / row["file"]).read_text())["result"]
        assert all(row[name] == value for name, value in cell.items())
        assert float(line["nll"]) == row["nll"] and line["method"] == row["method"]
        answers = row["answers"]
        assert row["questions"] == len(answers) == 3
        right = [normalised(a["answer"]) == normalised(a["reference"]) for a in answers]
        assert [a["correct"] for a in answers] == right and row["accuracy"] == sum(right) / 3
        assert row["nll"] == pytest.approx(sum(a["nll"] for a in answers) / 3)
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert min(row["chunk_ms"], row["first_token_ms"]) > 0 and row["device_peak_bytes"] is None
    shown = [line.split() for line in printed.splitlines()[1:6]]
    by_size = sorted(rows, key=lambda row: row["resident_bytes"])
    assert [line[:3] for line in shown] == [
        [row["method"], f"{row['resident_bytes'] / 2**20:.3f}", str(row["mean_budget"] or "-")] for row in by_size
    ]
    assert shown[-1][0] == "full" and (out / "accuracy_vs_memory.png").read_bytes().startswith(b"\x89PNG")
    assert "3 questions about 2 clips, 1 clips skipped" in printed
    assert (out / "accuracy_vs_budget.png").read_bytes().startswith(b"\x89PNG") and "accuracy_vs_budget.png" in printed


def test_a_number_of_gib_gives_each_method_its_own_budget(tiny_path, tiny, questions, tmp_path, capsys):
    gib = 0.00003
    assert compare(tiny_path, questions, tmp_path, "--methods", "full,uniform,omnimem", "--gib", f"{gib}") == 0
    rows = {row["method"]: row for row in results(tmp_path)}
    assert rows["full"]["mean_budget"] is None and rows["full"]["gib"] is None
    for name in ("uniform", "omnimem"):
        token = token_bytes_of(tiny, build_selection(name)).total * tiny.config.get_text_config().num_hidden_layers
        assert rows[name]["mean_budget"] == gib * 2**30 // token and rows[name]["gib"] == gib
        assert rows[name]["retained"] == rows[name]["mean_budget"]
    assert rows["uniform"]["mean_budget"] > rows["omnimem"]["mean_budget"]
    assert "resident MiB" in capsys.readouterr().out


def test_budgets_hold_at_answer_time_and_full_retains_most(compared, tiny):
    text = tiny.config.get_text_config()
    per_token = (
        text.num_hidden_layers * 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    )
    full, *others = results(compared[0])
    bytes_of = {(row["method"], row["mean_budget"]): row["answer_bytes"] for row in others}
    for row in others:
        assert all(answer["retained"] <= row["mean_budget"] for answer in row["answers"])
        assert row["retained"] == row["mean_budget"]
        # Includes the chunk before compression, and is never below the size at answer time.
        assert row["answer_bytes"] < row["peak_bytes"] <= row["memory_peak_bytes"]
        assert row["answer_bytes"] < row["resident_bytes"] < row["memory_peak_bytes"]
        assert full["answer_bytes"] > row["answer_bytes"] and full["peak_bytes"] > row["peak_bytes"]
    for method in ("uniform", "omnimem"):
        assert bytes_of[method, 24] - bytes_of[method, 12] == 12 * per_token


def test_questions_are_asked_at_their_time(compared):
    for row in results(compared[0]):
        asked = [(a["clip"], a["question"], a["seconds"]) for a in row["answers"]]
        assert asked[0][0] == FLOWER and asked[0][2] > 4
        # The rabbit's second question has time 4 and comes first.
        assert asked[1] == (RABBIT.name, "What is heard?", 4.0)
        assert asked[2][1] == "What is seen?" and asked[2][2] > 7


class Forced(LogitsProcessor):
    """Forces `generate` to emit given tokens and records their probabilities."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.log = tokens, []

    def __call__(self, input_ids, scores):
        token = self.tokens[len(self.log)]
        self.log.append(float(scores[0].log_softmax(-1)[token]))
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)


def test_the_score_of_an_answer_equals_that_of_generation(tiny):
    session = StreamingSession(tiny, BudgetProfile.uniform(tiny.config, 24), "omnimem", StreamSettings(chunk_seconds=4))
    with pytest.raises(OmniMemError, match="no media streamed"):
        session.score_answer("Who?", "He.")
    for event in session.watch(WEBB):
        if event.chunk == 1:
            break
    before = session.cache.kv_nbytes
    tokens = tiny.answer_ids("A telescope mirror.")[0].tolist()
    forced = Forced(tokens)
    session.ask("What is seen?", max_new_tokens=len(tokens), logits_processor=[forced])
    score = session.score_answer("What is seen?", "A telescope mirror.")
    assert score == pytest.approx(-sum(forced.log) / len(tokens), abs=1e-4) and len(forced.log) == len(tokens)
    assert session.cache.kv_nbytes == before


def test_finished_cells_are_reused_and_others_added(compared, tiny_path, questions, capsys):
    out, printed = compared
    before = written(out)
    assert compare(tiny_path, questions, out, *GRID) == 0
    assert written(out) == before and capsys.readouterr().out == printed
    assert compare(tiny_path, questions, out, "--methods", "uniform", "--mean-budgets", "12,36") == 0
    after = written(out)
    assert len(after) == len(before) + 1 and before.items() <= after.items()
    assert [row["mean_budget"] for row in results(out)] == [12, 36]
    # Other stream settings are another cell.
    assert compare(tiny_path, questions, out, "--methods", "uniform", "--mean-budgets", "12", "--max-seconds", "2") == 0
    assert len(written(out)) == len(after) + 1
    assert compare(tiny_path, questions, out, "--methods", "uniform", "--mean-budgets", "12", "--overwrite") == 0
    changed = {name for name, time in written(out).items() if after.get(name, time) != time}
    assert len(changed) == 1


def test_an_interrupted_comparison_resumes(tiny_path, questions, tmp_path, monkeypatch, capsys):
    genuine, calls = omnimem.measure.compare.answer_questions, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*args)

    monkeypatch.setattr(omnimem.measure.compare, "answer_questions", interrupted)
    assert compare(tiny_path, questions, tmp_path, *GRID, "--limit", "1") == 1
    assert "interrupted" in capsys.readouterr().err
    before = written(tmp_path)
    assert len(before) == 2 == len(results(tmp_path))
    assert compare(tiny_path, questions, tmp_path, *GRID, "--limit", "1") == 0
    assert len(calls) == 3 + 3 and before.items() <= written(tmp_path).items()
    # An incomplete cell file is reported, not used.
    file = next((tmp_path / "cells").iterdir())
    file.write_text(file.read_text()[:100])
    assert compare(tiny_path, questions, tmp_path, *GRID, "--limit", "1") == 2
    assert f"{file}: not a finished cell" in capsys.readouterr().err


def test_lambda_and_temperature_are_swept(tiny, tiny_path, questions, tmp_path, capsys):
    layers = [LayerStatistics(*[Compressibility(0.2 + 0.2 * i, 0.0, 100.0)] * 3) for i in range(3)]
    about = {"method": "avba", "ratio": 5.0, "temperature": 0.2, "floor": 2, "layers": [asdict(one) for one in layers]}
    profile = tmp_path / "profile.json"
    uniform = BudgetProfile.uniform(tiny.config)
    BudgetProfile(uniform.layers, uniform.model, statistics=about, source="calibrated").save(profile)
    sweep = ["--lambda", "0,0.5", "--temperature", "0.1,10", "--profile", str(profile), "--limit", "1"]
    grid = ["--methods", "full,uniform,omnimem", "--mean-budgets", "30"]
    assert compare(tiny_path, questions, tmp_path, *grid, *sweep) == 0
    rows = results(tmp_path)
    places = [(row["method"], row["lambda"], row["temperature"]) for row in rows]
    assert places[0] == ("full", None, None)
    assert places[1:3] == [("uniform", None, 0.1), ("uniform", None, 10)]
    assert set(places[3:]) == {("omnimem", lam, t) for lam in (0, 0.5) for t in (0.1, 10)} and len(places) == 7
    for row in rows[1:]:
        totals = [sum(layer) for layer in row["layers"]]
        assert sum(totals) == 3 * 30 and row["retained"] <= 30
        assert totals == sorted(totals) and (totals[2] > 2 * totals[0]) == (row["temperature"] == 0.1)
        assert row["method"] != "omnimem" or row["options"]["lambda"] == row["lambda"]
    for name in ("budget", "lambda", "temperature"):
        assert (tmp_path / f"accuracy_vs_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert " λ " in capsys.readouterr().out
    # Without a temperature, the profile is scaled.
    assert compare(tiny_path, questions, tmp_path, *grid, "--profile", str(profile), "--limit", "1") == 0
    assert sum(map(sum, results(tmp_path)[1]["layers"])) == 90


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--methods", "omnimen"], "did you mean 'omnimem'?"),
        (["--option", "omnimem.lamb=1"], "did you mean 'lambda'?"),
        (["--option", "omnimem.lambda"], "method.key=value"),
        (["--option", "omnimem.lambda=often"], "does not take"),
        (["--methods", "uniform", "--option", "omnimem.lambda=1"], "not among the chosen methods"),
        (["--methods", "uniform,full", "--lambda", "0.1"], "none of the chosen methods"),
        (["--temperature", "0.1"], "calibrated profile"),
        (["--profile", "missing.json"], "no such budget profile"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_before_the_model_is_loaded(questions, tmp_path, capsys, options, reason):
    assert compare("no/such/model", questions, tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_budgets_below_the_floor_and_a_ratio_with_a_profile_are_refused(tiny, questions, tmp_path, capsys):
    BudgetProfile.uniform(tiny.config).save(tmp_path / "p.json")
    given = ["--profile", str(tmp_path / "p.json")]
    assert compare("no/such/model", questions, tmp_path, *given, "--mean-budgets", "8") == 2
    assert "below the minimum" in capsys.readouterr().err
    assert compare("no/such/model", questions, tmp_path, *given, "--ratio", "2") == 2
    assert "has its own" in capsys.readouterr().err
    for wrong in ("1", "24,x", ""):
        with pytest.raises(SystemExit):
            compare("tiny", questions, tmp_path, "--mean-budgets", wrong)


def test_no_clip_and_no_matplotlib_are_one_line(tiny_path, questions, tmp_path, capsys, monkeypatch):
    only = write_manifest(questions.parent / "only.jsonl", [{"media": NO_INDEX, "question": "What?", "answer": "No."}])
    assert compare(tiny_path, only, tmp_path, *GRID) == 2
    assert "no question could be asked" in capsys.readouterr().err
    monkeypatch.setattr(omnimem.measure.figures, "find_spec", lambda name: None)
    assert compare("no/such/model", questions, tmp_path, *GRID) == 2
    assert "omnimem[report]" in capsys.readouterr().err


def test_a_cell_out_of_memory_is_skipped(tmp_path, caplog):
    def exhausted():
        raise MemoryError

    cells = [
        Cell(name, {"method": name}, {"command": "test", "method": name}, compute)
        for name, compute in (("full", exhausted), ("uniform", lambda: {"accuracy": 1.0}))
    ]
    rows = run_cells(cells, tmp_path, False, lambda rows: None)
    assert [row["method"] for row in rows] == ["uniform"] and "full: out of memory" in caplog.text
    with pytest.raises(OmniMemError, match="ran out of memory"):
        run_cells(cells[:1], tmp_path, False, lambda rows: None)


def test_interval_accounts_for_correlated_answers_about_a_clip():
    alone = [[True], [False]] * 20
    low, high = cluster_interval(alone)
    assert low + high == pytest.approx(1) and high - low == pytest.approx(0.30, abs=0.02)
    # Ten equal answers about one clip carry no more information than one.
    assert cluster_interval([clip * 10 for clip in alone]) == pytest.approx((low, high))
    # Answers that vary within a clip count at most as independent ones.
    assert cluster_interval([[True, False]] * 20) == pytest.approx((low, high), abs=0.01)
    assert cluster_interval([[False] * 10] * 5) == pytest.approx((0, 0.43), abs=0.01)
    assert cluster_interval([[True]])[0] < 0.3


def test_answers_count_up_to_case_space_and_final_punctuation():
    assert normalised("  A Red\n flower. ") == normalised("a red flower") != normalised("a red, flower")


def test_all_methods_are_the_default_and_help_needs_no_torch():
    code = "import sys; from omnimem.cli import build_parser; p = build_parser(); "
    code += "a = p.parse_args(['compare', 'm', 'q', '--out', 'o']); b = p.parse_args(['bench', '--out', 'o']); "
    code += "print(a.methods, b.methods, 'torch' in sys.modules)"
    assert start("-c", code).stdout == "all all False\n"
    assert set(omnimem.measure.compare.choose_methods("all", [])) == set(untrained_methods())
