"""From the recipe to the answer: a run with encoded keys and values is answered as it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train.objective
from clips import MEDIA, WEBB
from omnimem.budget import BudgetProfile
from omnimem.cli import main as omnimem
from omnimem.memory import CompressedCache
from omnimem.selection.full import Full
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings
from small_runs import RABBIT, arguments, metrics, refused, trained_run
from small_runs import main as train_main
from test_generate import QUESTION, TOKENS, assert_untouched, greedy_by_hand, state, watch


@pytest.mark.parametrize("method", ["omnimem", "h2o", "hermes"])
@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_generate_equals_a_greedy_loop_by_hand_and_leaves_the_cache_unchanged(tiny64, method, kv_dtype):
    profile = BudgetProfile.uniform(tiny64.config, mean=40, ratio=2.0)
    settings = StreamSettings(chunk_seconds=4, max_seconds=8)
    session = watch(StreamingSession(tiny64, profile, method, settings, kv_dtype), WEBB)
    assert all(layer.state.keys.encoded for layer in session.cache.layers)
    if method == "omnimem":
        before, seen = state(session), session.cache.get_seq_length()
        expected, _ = greedy_by_hand(session, QUESTION, TOKENS)
        with session._question_inputs(QUESTION) as inputs:
            output = tiny64.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=TOKENS,
                eos_token_id=tiny64.end_token_ids,
                pad_token_id=tiny64.tokenizer.pad_token_id,
            )
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == expected
        assert_untouched(session, before, seen)
    nbytes = session.cache.nbytes
    first = session.ask(QUESTION, max_new_tokens=TOKENS)
    assert session.ask(QUESTION, max_new_tokens=TOKENS) == first
    assert session.cache.nbytes == nbytes


@pytest.fixture(scope="module")
def caches() -> list[CompressedCache]:
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, caches) -> Path:
    class Recorded(CompressedCache):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            caches.append(self)

    options = ("memory.kv_dtype=int8", "distill.weight=0.5", "train.max_steps=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.objective, "CompressedCache", Recorded)
        return trained_run(tmp_path_factory.mktemp("run"), *options)


def test_training_encodes_the_cache_of_the_student_and_not_that_of_the_teacher(run, caches):
    assert {cache.kv_dtype for cache in caches if isinstance(cache.method, Full)} == {"auto"}
    assert {cache.kv_dtype for cache in caches if not isinstance(cache.method, Full)} == {"int8"}
    assert all(torch.tensor(record["loss"]).isfinite() for record in metrics(run))
    assert BudgetProfile.load(run / "budget_profile.json").stream["kv_dtype"] == "int8"


def test_a_run_is_answered_with_the_kv_dtype_it_was_trained_with(run, capsys):
    assert StreamingSession.from_pretrained(run).cache.kv_dtype == "int8"
    assert StreamingSession.from_pretrained(run, mean_budget=12, kv_dtype="int4").cache.kv_dtype == "int4"
    reports = {}
    for options in ((), ("--kv-dtype", "auto"), ("--kv-dtype", "fp8")):
        capsys.readouterr()
        command = ["answer", str(run), str(MEDIA / RABBIT), "What is seen?", "--json", "--max-new-tokens", "3"]
        assert omnimem([*command, *options]) == 0
        report = json.loads(capsys.readouterr().out)
        reports[report["kv_dtype"]] = report["kv_bytes"]
    # A head of 16 channels: 64 bytes in float32, 16 codes and one scale of 2 bytes in int8 and fp8.
    assert set(reports) == {"int8", "auto", "fp8"}
    assert reports["int8"] == reports["fp8"] == reports["auto"] * 18 / 64


def test_what_cannot_be_trained_is_refused_before_the_run_starts(tmp_path, capsys):
    options = ("memory.kv_dtype=int8", "selection.variant=release")
    line = refused(arguments(tmp_path, *options), capsys)
    assert "attention_scores=concat" in line and "kv_dtype=auto" in line
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_the_bytes_that_are_stored(tmp_path, capsys):
    sizes = []
    for kv_dtype in ("auto", "int8", "int4"):
        options = ("dry_run=true", f"memory.kv_dtype={kv_dtype}", "memory.mean_budget=40000", "selection.method=h2o")
        assert train_main(arguments(tmp_path, *options, "selection.gradient=none")) == 0
        shown = capsys.readouterr().out
        (line,) = [line for line in shown.splitlines() if "all layers at budget" in line]
        sizes.append(float(line.split("│")[2]))
    each = [2 * (2 * head + 38 + 4) for head in (64, 18, 12)]  # 2 heads: key, value, metadata, attention score
    assert sizes[1] == pytest.approx(sizes[0] * each[1] / each[0], rel=0.02)
    assert sizes[2] == pytest.approx(sizes[0] * each[2] / each[0], rel=0.02), sizes
