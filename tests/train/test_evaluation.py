"""Evaluation during training: hard selection, the best adapter is saved, early stopping."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from clips import MEDIA
from omnimem.stream import StreamingSession
from small_runs import ROWS, adapter, arguments, main, metrics, trained_run, write_manifest

HELD_OUT = [{**ROWS[1], "questions": [{"question": "What is heard?", "answer": "Room noise."}]}]


def held_out(folder) -> tuple[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    return f"eval.path={write_manifest(folder / 'held_out.jsonl', HELD_OUT)}", f"eval.root={MEDIA}"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    return trained_run(folder, *held_out(folder), "eval.eval_steps=2", "train.max_steps=5")


def test_evaluations_take_place_every_eval_steps_and_at_the_end(evaluated):
    assert [record["step"] for record in metrics(evaluated) if "eval_loss" in record] == [2, 4, 5]


def test_the_best_adapter_is_saved_with_its_result(evaluated):
    losses = {record["step"]: record["eval_loss"] for record in metrics(evaluated) if "eval_loss" in record}
    best = json.loads((evaluated / "best" / "evaluation.json").read_text())
    assert best["loss"] == min(losses.values()) == losses[best["step"]]
    assert {"adapter_model.safetensors", "adapter_config.json", "budget_profile.json"} <= {
        path.name for path in (evaluated / "best").iterdir()
    }


def test_the_eval_loss_equals_that_of_a_session(evaluated):
    """The last evaluation equals the loss of a streaming session with the saved adapter."""
    session = StreamingSession.from_pretrained(evaluated)
    for _ in session.watch(MEDIA / HELD_OUT[0]["media"]):
        pass
    found = session.score_answer("What is heard?", "Room noise.")
    assert found == pytest.approx(metrics(evaluated)[-1]["eval_loss"], rel=1e-5)


def test_an_evaluation_does_not_change_the_training(evaluated, tmp_path):
    plain = trained_run(tmp_path, "train.max_steps=5", out="plain")
    assert [record["loss"] for record in metrics(plain)] == [record["loss"] for record in metrics(evaluated)]
    for name, weight in adapter(plain).items():
        assert torch.equal(weight, adapter(evaluated)[name])


def test_an_evaluation_has_no_teacher(evaluated, tmp_path):
    """With equal weights the evaluation of a distilled run is the same cross-entropy."""
    options = (*held_out(tmp_path), "eval.eval_steps=1", "train.max_steps=1", "train.learning_rate=0.0")
    plain = trained_run(tmp_path, *options, out="plain")
    distilled = trained_run(tmp_path, *options, "distill.weight=2.0", out="distilled")
    assert metrics(plain)[0]["eval_loss"] == pytest.approx(metrics(distilled)[0]["eval_loss"], rel=1e-6)


def test_early_stopping(tmp_path):
    """With a learning rate of zero no evaluation is better than the first."""
    options = (
        *held_out(tmp_path),
        "eval.eval_steps=1",
        "eval.early_stopping_patience=2",
        "train.max_steps=9",
        "train.learning_rate=0.0",
    )
    run = trained_run(tmp_path, *options)
    assert [record["step"] for record in metrics(run)] == [1, 2, 3]
    assert json.loads((run / "best" / "evaluation.json").read_text())["step"] == 1
    assert (run / "adapter_model.safetensors").is_file()
    # Started again it is still at its end.
    assert main(arguments(tmp_path, *options)) == 0
    assert [record["step"] for record in metrics(run)][:3] == [1, 2, 3] and len(metrics(run)) <= 3


@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_best(evaluated, tmp_path):
    options = (*held_out(tmp_path), "eval.eval_steps=2", "train.max_steps=5", "train.save_steps=2")
    run = trained_run(tmp_path, *options)
    # As if it had been killed between its last evaluation and its last checkpoint.
    newest = sorted((run / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    (run / "adapter_model.safetensors").unlink()
    assert main(arguments(tmp_path, *options)) == 0
    best = "best/evaluation.json"
    assert (run / best).read_text() == (evaluated / best).read_text()
    assert [r["eval_loss"] for r in metrics(run) if "eval_loss" in r] == [
        r["eval_loss"] for r in metrics(evaluated) if "eval_loss" in r
    ]


def test_a_missing_manifest_is_found_before_anything_is_written(tmp_path, capsys):
    assert main(arguments(tmp_path, "eval.path=nowhere.jsonl")) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_is_nan_saves_nothing_and_does_not_stop_the_run(tmp_path, monkeypatch):
    losses = iter([1.0, float("nan"), 0.5])
    monkeypatch.setattr("train.evaluation.Evaluation.measure", lambda *_: next(losses))
    run = trained_run(
        tmp_path, *held_out(tmp_path), "eval.eval_steps=1", "eval.save_total_limit=2", "train.max_steps=3"
    )
    assert [record["eval_loss"] for record in metrics(run)] == [1.0, None, 0.5]
    kept = {path.name: json.loads((path / "evaluation.json").read_text()) for path in run.glob("best*")}
    assert kept == {"best": {"step": 3, "loss": 0.5}, "best-step-00000001": {"step": 1, "loss": 1.0}}


@pytest.mark.long
def test_a_step_that_is_evaluated_twice_is_saved_once(tmp_path):
    """A run that is killed between an evaluation and its checkpoint repeats the step when it resumes."""
    options = (
        *held_out(tmp_path),
        "eval.eval_steps=1",
        "eval.save_total_limit=2",
        "train.max_steps=4",
        "train.save_steps=2",
    )
    run = trained_run(tmp_path, *options)

    def found() -> dict[str, str]:
        return {path.name: (path / "evaluation.json").read_text() for path in run.glob("best*")}

    before = found()
    assert len(before) == 2
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "adapter_model.safetensors").unlink()
    assert main(arguments(tmp_path, *options)) == 0
    assert found() == before


@pytest.mark.long
def test_the_best_of_a_run_that_was_never_saved_does_not_count(tmp_path):
    options = (*held_out(tmp_path), "eval.eval_steps=1", "train.max_steps=3")
    run = trained_run(tmp_path, *options)
    shutil.rmtree(run / "checkpoints")
    (run / "adapter_model.safetensors").unlink()
    (run / "adapter_config.json").unlink()
    best = json.loads((run / "best" / "evaluation.json").read_text())
    (run / "best" / "evaluation.json").write_text(json.dumps({**best, "loss": 0.0}))
    assert main(arguments(tmp_path, *options)) == 0
    assert json.loads((run / "best" / "evaluation.json").read_text()) == best


@pytest.mark.long
@pytest.mark.parametrize("keep", [2, *(pytest.param(keep, marks=pytest.mark.long) for keep in (1, 3))])
def test_save_total_limit_best_adapters_are_kept(tmp_path, monkeypatch, keep):
    """For any order of the losses; the best one is always `best/`."""
    losses = [3.0, 1.0, 2.0, 0.5, 4.0, 0.7]
    monkeypatch.setattr("train.evaluation.Evaluation.measure", lambda self, *_: losses[self.asked()])
    asked = iter(range(99))
    monkeypatch.setattr("train.evaluation.Evaluation.asked", lambda _: next(asked), raising=False)
    options = (
        *held_out(tmp_path),
        "eval.eval_steps=1",
        f"eval.save_total_limit={keep}",
        "train.max_steps=6",
        "train.save_steps=9",
    )
    run = trained_run(tmp_path, *options)
    found = {path.name: json.loads((path / "evaluation.json").read_text()) for path in run.glob("best*")}
    assert found["best"] == {"step": 4, "loss": 0.5}
    others = {name: numbers for name, numbers in found.items() if name != "best"}
    assert sorted(numbers["loss"] for numbers in others.values()) == sorted(losses)[1:keep]
    assert all(name == f"best-step-{numbers['step']:08d}" for name, numbers in others.items())
    assert all((run / name / "adapter_model.safetensors").is_file() for name in found)
