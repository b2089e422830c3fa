"""Training: what a run leaves behind, what it changes and what it does not, and how it refuses."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shlex
import struct
import sys
import termios
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import train.loop
import train.metrics
import train.objective
from data_prep.manifest import Question, Row
from omnimem.backbones import ChunkInputs, load_backbone
from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.memory import CompressedCache
from omnimem.memory.store import DiskStore
from omnimem.recipe import TrainConfig, load_recipe
from omnimem.stream_settings import StreamSettings
from small_runs import (
    AUDIO,
    FLOWER,
    HALF,
    RABBIT,
    ROWS,
    SILENT,
    SPEECH,
    VISUAL,
    adapter,
    arguments,
    copy_run,
    lines,
    main,
    metrics,
    trained_run,
    tree,
)
from train.checkpoint import checkpoints
from train.data import Sample, Schedule, TokenizedQuestion, load_rows, tokenise
from train.loop import MAX_SKIPPED, rate_at
from train.objective import StreamObjective
from train.setup import add_lora, profile_of, selection_of, settings_of

STEPS = 18
FIELDS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "skipped", "targets", "tokens", "tokens_per_second",
    "seconds", "retained", "memory_bytes", "peak_gib",
    "mean_budget", "temperature", "distilled", "retention", "gates",
}  # fmt: skip


class Trained:
    """A finished run with the model as it was before the first and after the last step."""

    def __init__(self, folder: Path) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.model: Any = None

        def capture(recipe, backbone):
            self.model = add_lora(recipe, backbone)
            self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
            return self.model

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.loop, "add_lora", capture)
            self.args = arguments(folder, f"train.max_steps={STEPS}", "train.save_steps=9")
            self.base = folder / "run" / "base"
            assert main(self.args) == 0
        self.run = folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


# ---- what a run leaves behind ----------------------------------------------------------------------------------------


def test_loss_falls(trained):
    losses = [record["loss"] for record in metrics(trained.run)]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_a_run_leaves_what_is_needed_to_use_and_to_repeat_it(trained):
    present = {path.name for path in trained.run.iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "budget_profile.json", "recipe.yaml", "metrics.jsonl",
        "environment.json", "checkpoints", "base",
    } <= present  # fmt: skip
    assert not [path for path in trained.run.rglob("*") if path.name.startswith(".")], "temporary files left behind"
    assert not [path for path in trained.run.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]

    recipe = load_recipe([*trained.args, "model.backbone=qwen2_5_omni"])  # recorded as detected
    assert load_recipe([f"recipe={trained.run / 'recipe.yaml'}"]) == recipe

    profile = BudgetProfile.load(trained.run / "budget_profile.json")
    assert [(layer.visual, layer.audio) for layer in profile.layers] == [(VISUAL, AUDIO)] * 3
    assert profile.selection == {"method": "omnimem", **selection_of(recipe).recorded()}
    assert profile.selection["variant"] == "paper"
    assert profile.stream["chunk_seconds"] == 2.0 and profile.stream["fps"] == 1.0 and profile.stream["audio"] is True
    assert profile.model == ModelFingerprint("qwen2_5_omni_text", 3, 2, 16)

    environment = json.loads((trained.run / "environment.json").read_text())
    assert all(environment["packages"][name] for name in ("torch", "transformers", "peft", "safetensors", "omnimem"))
    assert {"python", "platform", "commit", "device"} <= environment.keys()
    assert (environment["processes"], environment["distributed"], environment["backend"]) == (1, "none", None)
    assert shlex.split(environment["command"]) == sys.orig_argv


def test_metrics_have_a_line_a_step_with_every_field(trained):
    records = metrics(trained.run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    recipe = load_recipe(trained.args)
    for record in records:
        assert set(record) == FIELDS
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and record["skipped"] is False
        assert record["learning_rate"] == recipe.train.learning_rate * rate_at(record["step"] - 1, STEPS, recipe.train)
        assert record["epoch"] == record["step"] / 2
        assert record["tokens"] > 0 and record["tokens_per_second"] > 0 and record["seconds"] > 0
        assert 0 < record["peak_gib"] < 20
        # Both clips bring more of both modalities than a layer keeps.
        assert (record["retained"]["visual"], record["retained"]["audio"]) == (VISUAL, AUDIO)
        stored = record["retained"]["text"] + VISUAL + AUDIO
        assert record["memory_bytes"] == 3 * stored * 2 * 2 * 16 * 4  # layers, K and V, groups, head size, float32


def test_only_adapters_on_the_language_model_train(trained):
    after = trained.model.state_dict()
    assert after.keys() == trained.before.keys()
    changed = {name for name in after if not torch.equal(after[name], trained.before[name])}
    lora = {name for name in after if ".lora_" in name}
    # 3 layers, 4 projections, A and B; every one of them has moved.
    assert changed == lora and len(lora) == 3 * 4 * 2
    assert all(".language_model.layers." in name for name in lora)
    assert {name for name, p in trained.model.named_parameters() if p.requires_grad} == lora
    assert not [name for name in adapter(trained.run) if "audio_tower" in name or "visual" in name]
    assert len(adapter(trained.run)) == len(lora)

    on_disk = load_backbone(trained.base, dtype="float32", device="cpu").model.state_dict()
    for name, value in on_disk.items():
        inside = f"base_model.model.{name}"
        if inside not in trained.before:
            stem, last = inside.rsplit(".", 1)
            inside = f"{stem}.base_layer.{last}"
        assert torch.equal(after[inside], value), name


def test_saved_checkpoints_are_adapters_too(trained):
    last = checkpoints(trained.run)[-1]
    assert last.name == f"step-{STEPS:08d}"
    final, saved = adapter(trained.run), adapter(last)
    assert final.keys() == saved.keys() and all(torch.equal(final[name], saved[name]) for name in final)


def test_only_the_newest_checkpoints_stay(tmp_path):
    run = trained_run(tmp_path, "train.max_steps=3", "train.save_steps=1", "train.save_total_limit=2")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]


# ---- the objective ---------------------------------------------------------------------------------------------------


class Bench:
    """Objective and samples of a recipe in float64; adapters start away from zero, so that all of them have a say."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], *overrides: str) -> None:
        self.recipe = load_recipe(arguments(folder, "model.dtype=float64", *overrides, rows=rows))
        self.backbone = load_backbone("tiny", backbone="qwen2_5_omni", dtype="float64", device="cpu")
        self.backbone.model.requires_grad_(False)
        self.method, self.settings = selection_of(self.recipe), settings_of(self.recipe)
        self.profile = profile_of(self.recipe, self.backbone, self.method, self.settings)
        self.model = add_lora(self.recipe, self.backbone)
        generator = torch.Generator().manual_seed(1)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.model.train()
        self.samples = [tokenise(row, self.backbone) for row in load_rows(self.recipe.data).rows]

    def reset(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.start[name])

    def objective(self, **options: Any) -> StreamObjective:
        return StreamObjective(self.backbone, self.model, self.profile, self.method, self.settings, **options)

    def gradients(self, batches: list[list[Sample]], **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
        """Mean loss and its gradient as the loop takes them: summed over batches, divided by all answer tokens."""
        self.model.zero_grad(set_to_none=True)
        objective, total = self.objective(**options), 0.0
        targets = sum(sample.targets for batch in batches for sample in batch)
        torch.manual_seed(7)
        for batch in batches:
            outcome = objective(batch)
            outcome.backward(1 / targets)
            total += outcome.loss.item() / targets
        return total, {name: p.grad.clone() for name, p in self.parameters.items()}

    def descend(self, batches: list[list[Sample]], steps: int = 2, rate: float = 0.5) -> dict[str, torch.Tensor]:
        """Parameters after plain gradient steps from the start (SGD shows errors of scale that Adam hides)."""
        self.reset()
        for _ in range(steps):
            _, gradients = self.gradients(batches)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter -= rate * gradients[name]
        result = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.reset()
        return result


UNEQUAL = [
    *ROWS,
    {"media": SPEECH, "question": "What is heard?", "answer": "Two sentences."},
    {"media": SILENT, "audio": False, "question": "What is seen?", "answer": "A mirror.", "time": 2},
]
"""Picture and sound of 5 s and 8 s, sound alone, picture alone; questions at the end and before it."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), UNEQUAL)


@pytest.fixture(scope="module")
def ample(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ample"), UNEQUAL, "memory.mean_budget=2000")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference, in units of the largest entry."""
    assert one.keys() == other.keys()
    scale = max(value.abs().max().item() for value in one.values())
    return max((one[name] - other[name]).abs().max().item() for name in one) / scale


@pytest.mark.parametrize("budget", ["ample", "evicting"])
def test_accumulated_batches_equal_one_batch(bench, ample, budget):
    made = ample if budget == "ample" else bench
    flower, rabbit, speech, silent = made.samples
    start = made.start
    # One stream at a time, and side by side with one that is longer, has other modalities or other question times.
    for group in ([flower, rabbit], [speech, silent, rabbit]):
        apart = made.descend([[sample] for sample in group])
        together = made.descend([group])
        assert distance(start, apart) > 1e-3, "the steps moved nothing"
        assert distance(apart, together) <= 1e-12
    apart = made.descend([[flower], [rabbit], [speech], [silent]])
    assert distance(apart, made.descend([[flower, rabbit], [speech, silent]])) <= 1e-12


def plain_gradients(bench: Bench, sample: Sample, row: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss of a stream and its gradient, by one backward through everything."""
    bench.model.zero_grad(set_to_none=True)
    stream = Stream(bench.backbone, CompressedCache(bench.profile, bench.method))
    reader, encoder = replace(bench.settings, audio=row.get("audio", True)).open(sample.row.media, bench.backbone)
    losses, waiting = [], list(sample.asked)

    def ask(asked: TokenizedQuestion) -> None:
        logits, targets = stream.answer_logits(encoder.closing(), [asked.question], [asked.answer])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    stream.forward(encoder.prefix(), text=True)
    for chunk in reader:
        stream.step(encoder.encode(chunk))
        while waiting and waiting[0].time is not None and waiting[0].time <= chunk.t1:
            ask(waiting.pop(0))
    for asked in waiting:
        ask(asked)
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in bench.parameters.items()}


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_gradient_is_that_of_plain_autograd(bench, number):
    """Real clips, questions before the end and behind it (stock norms round to float32 inside; exact: `test_tape`)."""
    sample = bench.samples[number]
    loss, expected = plain_gradients(bench, sample, UNEQUAL[number])
    value, found = bench.gradients([[sample]])
    assert value * sample.targets == pytest.approx(loss, rel=1e-12)
    assert distance({name: p * sample.targets for name, p in found.items()}, expected) <= 1e-6


def test_dropout_falls_alike_on_both_ways_wherever_records_wait(bench, tmp_path):
    layers = [module for module in bench.model.modules() if hasattr(module, "lora_dropout")]
    batches = [[bench.samples[1]], bench.samples[:3]]
    without, _ = bench.gradients(batches)
    for layer in layers:
        layer.lora_dropout["default"] = torch.nn.Dropout(0.3)
    try:
        here, kept = bench.gradients(batches)
        away, again = bench.gradients(batches, store=DiskStore(tmp_path))
        assert here == away != without
        assert distance(kept, again) == 0
        assert not list(tmp_path.iterdir())
    finally:
        for layer in layers:
            layer.lora_dropout["default"] = torch.nn.Identity()


@torch.no_grad()
def answers_by_hand(bench: Bench, sample: Sample, row: dict[str, Any]) -> list[tuple[float, int]]:
    """Summed negative log-likelihood and length of each answer: the inference path, one question at a time."""
    cache = CompressedCache(bench.profile, bench.method)
    stream = Stream(bench.backbone, cache)
    settings = replace(bench.settings, audio=row.get("audio", True))
    reader, encoder = settings.open(sample.row.media, bench.backbone)
    stream.forward(encoder.prefix(), text=True)
    asked = sorted(sample.row.questions, key=lambda q: math.inf if q.time is None else q.time)
    results = []

    def ask(question: Question) -> None:
        ids = bench.backbone.question_ids(question.question)
        answer = bench.backbone.answer_ids(question.answer)[0]
        with cache.scratch():
            closing = encoder.closing()
            stream.forward(closing, text=True)
            position = int(closing.next_position_id[0])
            hidden = stream.forward(ChunkInputs.text(bench.backbone.embed(ids), position), text=True)[:, -1:]
            position += ids.shape[1]
            nll = 0.0
            for token in answer:  # one token at a time, as generation goes
                scores = bench.backbone.lm_head(hidden)[0, -1].double().log_softmax(-1)
                nll -= scores[token].item()
                step = ChunkInputs.text(bench.backbone.embed(token[None, None]), position)
                hidden, position = stream.forward(step, text=True), position + 1
        results.append((nll, len(answer)))

    for chunk in reader:
        stream.step(encoder.encode(chunk))
        while asked and asked[0].time is not None and chunk.t0 < asked[0].time <= chunk.t1:
            ask(asked.pop(0))
    for question in asked:
        ask(question)
    return results


def test_loss_is_the_mean_over_all_answer_tokens(bench):
    bench.model.eval()
    try:
        by_hand = [answers_by_hand(bench, s, row) for s, row in zip(bench.samples, UNEQUAL, strict=True)]
        for answers, sample in zip(by_hand, bench.samples, strict=True):
            outcome = bench.objective()([sample])
            assert outcome.targets == sample.targets == sum(length for _, length in answers)
            assert outcome.loss.item() == pytest.approx(sum(nll for nll, _ in answers), rel=1e-12)
        nll = sum(nll for answers in by_hand for nll, _ in answers)
        count = sum(length for answers in by_hand for _, length in answers)
    finally:
        bench.model.train()
    mean, _ = bench.gradients([bench.samples[:2], bench.samples[2:]])
    assert mean == pytest.approx(nll / count, rel=1e-12)


def test_the_loss_of_a_float64_model_is_float64(bench):
    assert bench.objective()([bench.samples[0]]).loss.dtype == torch.float64


def test_the_loop_logs_the_mean_over_the_answer_tokens_of_a_step(trained, tmp_path):
    """The first logged loss is that of the fresh adapter, which is the base's own."""
    recipe = load_recipe(arguments(tmp_path, "train.per_device_train_batch_size=2", "train.max_steps=1"))
    run = trained_run(tmp_path, "train.per_device_train_batch_size=2", "train.max_steps=1")
    backbone = load_backbone(run / "base", dtype="float32", device="cpu")
    method, settings = selection_of(recipe), settings_of(recipe)
    profile = profile_of(recipe, backbone, method, settings)
    objective = StreamObjective(backbone, backbone.model, profile, method, settings)
    total = count = 0
    with torch.no_grad():
        for row in load_rows(recipe.data).rows:
            sample = tokenise(row, backbone)
            total += objective([sample]).loss.item()
            count += sample.targets
    (record,) = metrics(run)
    assert record["targets"] == count
    assert record["loss"] == pytest.approx(total / count, rel=1e-5)


# ---- questions before the end ----------------------------------------------------------------------------------------


class Watched:
    """Records what the memory held whenever a question was asked, and at the end."""

    def __init__(self, monkeypatch) -> None:
        self.asked: list[tuple[int, float]] = []  # steps taken, latest second in the memory's stream
        self.caches: list[CompressedCache] = []
        self.steps = 0
        watched = self

        class Cache(CompressedCache):
            def __init__(self, *args):
                super().__init__(*args)
                watched.caches.append(self)

        class Recorded(Stream):
            def step(self, inputs, rewindable=False):
                watched.steps += 1
                return super().step(inputs, rewindable)

            def answer_logits(self, *args):
                before = self.cache.state()
                result = super().answer_logits(*args)
                after = self.cache.state()
                for one, other in zip(before.layers, after.layers, strict=True):
                    assert all(torch.equal(one[name][0], other[name][0]) for name in ("_keys", "_values"))
                    assert torch.equal(one["table"].index, other["table"].index)
                    assert torch.equal(one["mass"], other["mass"])
                assert all(torch.equal(a, b) for a, b in zip(before.counters[:2], after.counters[:2], strict=True))
                watched.asked.append((watched.steps, int(self.cache._next_index[0])))
                return result

        monkeypatch.setattr(train.objective, "CompressedCache", Cache)
        monkeypatch.setattr(train.objective, "Stream", Recorded)


def with_times(sample: Sample, *times: float | None) -> Sample:
    asked = sample.asked[0]
    return replace(sample, asked=tuple(replace(asked, time=time) for time in times))


def test_a_question_is_asked_after_its_chunk_and_leaves_no_trace(bench, monkeypatch):
    watched = Watched(monkeypatch)
    rabbit = bench.samples[1]  # chunks end at 2, 4, 6 and 7.8 s
    objective = bench.objective()
    objective([with_times(rabbit, 0.5, 2.0, 2.1, 5.0, 7.8, 99.0, None)])
    assert [steps for steps, _ in watched.asked] == [1, 1, 2, 3, 4, 4, 4]
    objective([with_times(rabbit, None)])
    with_questions, without = watched.caches
    for one, other in zip(with_questions.layers, without.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert torch.equal(one.metadata.index, other.metadata.index) and torch.equal(
            one.metadata.position_ids, other.metadata.position_ids
        )


def test_questions_of_a_batch_are_asked_in_their_own_streams_time(bench, monkeypatch):
    """Side by side or alone, a stream is asked when its own chunk has come; the end of one is not that of all."""
    flower, rabbit = bench.samples[:2]
    pairs = [with_times(flower, 1.0, 4.0, None), with_times(rabbit, 3.0, 4.0, 6.0, 50.0)]
    alone = [bench.objective()([sample]).loss.item() for sample in pairs]
    watched = Watched(monkeypatch)
    together = bench.objective()(pairs)
    assert together.loss.item() == pytest.approx(sum(alone), rel=1e-12)
    assert together.targets == sum(sample.targets for sample in pairs)
    # 1 s after chunk 1; 3 s with 4 s, then 4 s, after chunk 2; 6 s after chunk 3; the ends after chunk 4.
    assert [steps for steps, _ in watched.asked] == [1, 2, 2, 3, 4]


# ---- order and learning rate -----------------------------------------------------------------------------------------


def schedule(rows: int, *, processes: int = 1, shuffle: bool = True, **settings: Any) -> Schedule:
    samples = [Sample(Row(Path(str(i)), (), True, i, str(i)), ()) for i in range(rows)]
    return Schedule(samples, TrainConfig(**settings), shuffle, processes)


def names(batches: list[list[Sample]]) -> list[str]:
    return [sample.row.name for batch in batches for sample in batch]


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "processes"),
    [(7, 1, 1, 1), (7, 2, 1, 1), (5, 2, 3, 2), (3, 4, 2, 2), (1, 1, 1, 4)],
)
def test_every_row_comes_once_an_epoch(rows, batch, accumulation, processes):
    epochs = batch * accumulation * processes  # so that whole steps end where an epoch ends
    made = schedule(
        rows,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        processes=processes,
        num_train_epochs=epochs,
    )
    assert made.steps == rows
    order = []
    for step in range(made.steps):
        for rank in range(processes):
            batches = made.step(step, rank)
            assert [len(one) for one in batches] == [batch] * accumulation
            order += names(batches)
    for epoch in range(epochs):
        assert Counter(order[epoch * rows : (epoch + 1) * rows]) == Counter(str(i) for i in range(rows))
    assert made.epoch(made.steps) == epochs


def test_order_is_a_function_of_seed_and_step_alone():
    first, second = schedule(9, per_device_train_batch_size=2), schedule(9, per_device_train_batch_size=2)
    forwards = [names(first.step(step, 0)) for step in range(20)]
    torch.manual_seed(123)
    backwards = [names(second.step(step, 0)) for step in reversed(range(20))][::-1]
    assert forwards == backwards
    other = schedule(9, per_device_train_batch_size=2, seed=1)
    assert [names(other.step(step, 0)) for step in range(20)] != forwards
    rows = [name for step in forwards for name in step]
    assert rows[:9] != rows[9:18], "the second pass is in another order"
    plain = schedule(4, shuffle=False)
    assert [names(plain.step(step, 0))[0] for step in range(8)] == list("01230123")


def test_the_same_samples_in_the_same_step_on_any_number_of_ranks():
    one = schedule(5, gradient_accumulation_steps=4)
    two = schedule(5, gradient_accumulation_steps=2, processes=2)
    for step in range(10):
        assert names(one.step(step, 0)) == names(two.step(step, 0)) + names(two.step(step, 1))
        assert one.targets(step) == two.targets(step)


def test_steps_follow_from_epochs_unless_given():
    assert schedule(10, per_device_train_batch_size=4, num_train_epochs=1.0).steps == 3
    assert schedule(10, num_train_epochs=0.01).steps == 1
    assert schedule(10, num_train_epochs=3, max_steps=2).steps == 2


def rates(steps: int, **settings: Any) -> list[float]:
    return [rate_at(step, steps, TrainConfig(**settings)) for step in range(steps + 1)]


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    found = rates(100, warmup_ratio=0.1, min_lr_rate=0.0)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(found) == found[9] == found[10] == 1.0
    assert all(later < earlier for earlier, later in pairwise(found[10:]))
    assert found[55] == pytest.approx(0.5)
    assert all(rate > 0 for rate in found[:100]) and found[100] == pytest.approx(0.0)
    assert rates(100, min_lr_rate=0.2)[100] == pytest.approx(0.2)
    assert rates(1, warmup_ratio=0.0)[0] == 1.0 and rates(1, warmup_ratio=1.0)[0] == 1.0
    assert rates(10, warmup_ratio=0.0)[0] == 1.0


# ---- losses that are not finite --------------------------------------------------------------------------------------


class Poisoned:
    """Makes the objective's loss not finite at the given calls and keeps the adapter as each call found it."""

    def __init__(self, monkeypatch, calls: set[int], value: float = math.nan) -> None:
        self.weights: list[list[torch.Tensor]] = []
        genuine = StreamObjective.__call__

        def call(objective, *args):
            number = len(self.weights)
            self.weights.append([p.detach().clone() for p in objective.model.parameters() if p.requires_grad])
            outcome = genuine(objective, *args)
            return replace(outcome, loss=outcome.loss * value) if number in calls else outcome

        monkeypatch.setattr(StreamObjective, "__call__", call)

    def changed(self, step: int) -> bool:
        pairs = zip(self.weights[step], self.weights[step + 1], strict=True)
        return any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_loss_is_skipped(tmp_path, monkeypatch, value):
    poisoned = Poisoned(monkeypatch, {1, 2}, value)
    run = trained_run(tmp_path, "train.max_steps=5", "train.save_steps=100")
    assert [poisoned.changed(step) for step in range(4)] == [True, False, False, True]
    records = metrics(run)
    assert [record["skipped"] for record in records] == [False, True, True, False, False]
    assert [record["loss"] is None for record in records] == [False, True, True, False, False]
    assert all(torch.isfinite(value).all() for value in adapter(run).values())


def test_a_run_of_them_ends_the_training_with_one_line(tmp_path, monkeypatch, capsys):
    Poisoned(monkeypatch, set(range(1, 100)))
    assert main(arguments(tmp_path, "train.max_steps=20", "train.save_steps=100")) != 0
    shown = lines(capsys.readouterr().err)
    assert "Traceback" not in " ".join(shown)
    assert len([line for line in shown if f"{MAX_SKIPPED} steps in a row" in line]) == 1
    assert shown[-1].startswith("train: ") and (FLOWER in shown[-1] or RABBIT in shown[-1])
    # Step 1 and four skipped ones; the fifth in a row ends the run.
    assert [record["skipped"] for record in metrics(tmp_path / "run")] == [False] + [True] * (MAX_SKIPPED - 1)


def test_steps_that_are_not_skipped_in_a_row_do_not_end_the_training(tmp_path, monkeypatch):
    skipped = [1, 2, 3, 4, 6, 7, 8, 9]
    assert len(skipped) > MAX_SKIPPED
    Poisoned(monkeypatch, set(skipped))
    run = trained_run(tmp_path, "train.max_steps=11", "train.save_steps=100", "data.chunk_seconds=4", rows=ROWS[:1])
    assert [record["step"] - 1 for record in metrics(run) if record["skipped"]] == skipped


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_plans_without_weights_and_writes_nothing(tmp_path, monkeypatch, capsys, tiny_path):
    monkeypatch.setenv("COLUMNS", "200")
    model = copy_run(tiny_path, tmp_path / "model")
    (model / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path / "job", f"model.name_or_path={model}", "dry_run=true")
    before = tree(tmp_path)
    assert main(args) == 0
    assert tree(tmp_path) == before and not (tmp_path / "job" / "run").exists()
    shown = capsys.readouterr().out
    assert FLOWER in shown and RABBIT in shown
    assert "4 optimiser steps" in shown and "2.00 epochs" in shown
    assert "24 positions a layer" in shown and "weights" in shown and "sum" in shown


def test_a_dry_run_counts_what_the_run_streams(trained, tmp_path, capsys):
    assert main([*trained.args, "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    planned = {}
    for line in shown.splitlines():
        cells = [cell.strip() for cell in line.replace("┃", "│").split("│")]
        if len(cells) > 5 and cells[1].startswith(("silent", "ambient")):
            planned[cells[1][:6]] = int(cells[4]) + int(cells[5])
    streamed = {record["tokens"] for record in metrics(trained.run)}
    assert len(planned) == 2
    # The header gives the plan its duration, so the end of a stream may differ by a fraction of a second.
    assert [abs(a - b) <= 26 for a, b in zip(sorted(planned.values()), sorted(streamed), strict=True)] == [True, True]


def test_a_dry_run_of_the_offline_model_writes_nothing(tmp_path, monkeypatch):
    args = arguments(tmp_path, "dry_run=true")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert main(args) == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "override", ["data.chunk_seconds=3", "lora.target_modules=[nosuch]", "memory.profile=nosuch.json"]
)
def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path, capsys, override):
    word = "nosuch" if "nosuch" in override else "chunk_seconds"
    assert word in refused(arguments(tmp_path, override, "dry_run=true"), capsys)


# ---- progress --------------------------------------------------------------------------------------------------------


def test_a_log_file_gets_a_line_every_few_steps(tmp_path, capsys, caplog):
    with caplog.at_level("INFO", "omnimem.train"):
        run = trained_run(
            tmp_path, "train.max_steps=5", "train.logging_steps=2", "train.learning_rate=3e-4", "train.min_lr_rate=1"
        )
    assert "\r" not in capsys.readouterr().err
    shown = [message for message in caplog.messages if message.startswith("step ")]
    records = {record["step"]: record for record in metrics(run)}
    assert list(records) == [2, 4, 5]
    for line, (step, record) in zip(shown, records.items(), strict=True):
        learned = f"step {step}/5 loss {record['loss']:.3f} lr 3.0e-04 kept {VISUAL}v+{AUDIO}a"
        spent = f"{record['tokens_per_second']:.0f} tokens/s {record['peak_gib']:.2f} GiB"
        assert re.fullmatch(rf"{re.escape(f'{learned} {spent}')} eta 0:0\d:\d\d", line), line
    assert shown[-1].endswith("eta 0:00:00")


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch, caplog):
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    recipe = load_recipe(arguments(tmp_path))
    record = {"step": 2, "loss": None, "learning_rate": 1e-3, "retained": {"visual": 80.0, "audio": 16.0}}
    with os.fdopen(writer, "w") as terminal, caplog.at_level("INFO", "omnimem.train"):
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = train.metrics.Metrics(tmp_path, 1, 3, True, recipe)
        shown.progress({**record, "tokens_per_second": 1234.0, "peak_gib": 0.91})
        shown.close()
        text = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "\rtrain:  67%| 2/3 [" in text
    assert "loss not finite lr 1.0e-03 kept 80v+16a 1234 tokens/s 0.91 GiB]" in text
    assert not caplog.messages


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_the_metrics_when_installed(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained.run / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/retained/visual"} <= set(
        events.Tags()["scalars"]
    )
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in metrics(trained.run)]


def test_nothing_breaks_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(train.metrics, "find_spec", lambda name: None)
    run = trained_run(tmp_path, "train.max_steps=1")
    assert len(metrics(run)) == 1 and not (run / "tensorboard").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(args: list[str], capsys) -> str:
    """The one line of a run that must not start, and must not touch what is there."""
    capsys.readouterr()
    assert main(args) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith("train: ")
    return line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rate=0.5", ["train.learning_rate=0.01", "0.5"]),
        ("memory.mean_budget=48", ["memory.mean_budget=24", "48"]),
        ("train.seed=1", ["train.seed=0", "1"]),
        ("resume_from_checkpoint=false", ["already holds a run", "resume_from_checkpoint=true"]),
    ],
)
def test_a_run_is_not_mixed_with_another(trained, capsys, override, words):
    before = tree(trained.run)
    line = refused([*trained.args, override], capsys)
    assert str(trained.run) in line and all(word in line for word in words)
    assert tree(trained.run) == before


def test_a_run_is_not_continued_on_other_data(trained, tmp_path, capsys):
    other = [{**ROWS[0], "questions": [{"question": "What is seen?", "answer": "A blue flower."}]}, ROWS[1]]
    before = tree(trained.run)
    args = [*trained.args, *arguments(tmp_path, rows=other)[1:2]]
    line = refused(args, capsys)
    assert "other data" in line and str(trained.run) in line
    assert tree(trained.run) == before


def test_a_checkpoint_of_more_processes_is_not_resumed_by_fewer(trained, tmp_path, capsys):
    run = copy_run(trained.run, tmp_path / "run")
    state = checkpoints(run)[-1] / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "processes": 2}))
    before = adapter(run)
    capsys.readouterr()
    assert main([*trained.args, f"output_dir={run}", f"train.max_steps={STEPS + 1}"]) == 2
    line = lines(capsys.readouterr().err)[-1]
    assert line.startswith("train: ") and "saved by 2 processes, resumed by 1" in line
    assert all(torch.equal(value, before[name]) for name, value in adapter(run).items())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.target_modules=[q_proj,nosuch]", ["lora.target_modules", "nosuch", "q_proj"]),
        ("selection.method=nosuch", ["selection method", "nosuch", "omnimem"]),
        ("selection.method=uniform selection.lambda=0.5", ["uniform", "lambda"]),
        ("memory.profile=nosuch.json", ["nosuch.json"]),
        ("memory.mean_budget=0", ["memory.mean_budget", "at least 1"]),
        ("memory.mean_budget=1", ["at least 2"]),
        ("data.path=nosuch.jsonl", ["nosuch.jsonl"]),
        ("data.chunk_seconds=3", ["chunk_seconds", "multiple of 2"]),
        ("model.name_or_path=/nosuch/folder", ["/nosuch/folder"]),
        ("model.backbone=nosuch", ["nosuch", "qwen2_5_omni"]),
        ("output_dir=" + "x" * 300, ["output_dir must be of names within 255 bytes"]),
        ("output_dir=" + "x/" * 3000, ["output_dir", "File name too long"]),
        ("train.seed=1" + "0" * 26, ["train.seed must be at most"]),
        ("data.path=" + "x" * 300, ["File name too long"]),
    ],
)
def test_wrong_settings_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch, override, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused(arguments(tmp_path, *override.split()), capsys)
    assert all(word in line for word in words), line
    run = tmp_path / "run"
    assert not run.exists() or not (run / "recipe.yaml").exists(), "a run that never began cannot be resumed"


def test_a_missing_clip_is_found_before_anything_is_written(tmp_path, capsys):
    line = refused(arguments(tmp_path, rows=[*ROWS, {"media": "gone.mp4", "question": "?", "answer": "!"}]), capsys)
    assert "gone.mp4" in line and ":3:" in line
    assert not (tmp_path / "run").exists()


def test_the_clip_of_the_last_question_is_looked_for_before_training(tmp_path, capsys):
    line = refused(arguments(tmp_path, "finish.question=What?", "finish.media=gone.mp4"), capsys)
    assert "gone.mp4" in line and "finish.media" in line
    assert not (tmp_path / "run").exists()


def test_a_clip_that_breaks_off_ends_the_run_with_one_line_of_its_own(tmp_path, capsys):
    rows = [ROWS[0], {"media": HALF, "question": "What is seen?", "answer": "A rabbit."}]
    assert main(arguments(tmp_path, "data.shuffle=false", rows=rows)) == 2
    shown = lines(capsys.readouterr().err)
    assert shown[-1].startswith("train: ") and HALF in shown[-1], shown[-1]
    assert len([line for line in shown if HALF in line]) == 1
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_clip_that_breaks_off_can_be_used_up_to_there(tmp_path):
    rows = [ROWS[0], {"media": HALF, "question": "What is seen?", "answer": "A rabbit."}]
    run = trained_run(tmp_path, "data.on_bad_row=skip", "data.shuffle=false", "train.max_steps=2", rows=rows)
    assert [record["skipped"] for record in metrics(run)] == [False, False]


# ---- other settings --------------------------------------------------------------------------------------------------


def test_a_bfloat16_model_trains_on_the_cpu(tmp_path):
    run = trained_run(tmp_path, "model.dtype=bfloat16", "train.max_steps=2", "train.per_device_train_batch_size=2")
    assert all(math.isfinite(record["loss"]) and not record["skipped"] for record in metrics(run))
    assert {value.dtype for value in adapter(run).values()} == {torch.float32}
    assert all(value.any() for name, value in adapter(run).items() if "lora_B" in name)


@pytest.mark.parametrize("method", ["full", "uniform", "random"])
def test_every_selection_method_trains(tmp_path, method):
    run = trained_run(
        tmp_path,
        f"selection.method={method}",
        "selection.gradient=none",
        "train.max_steps=1",
        "train.per_device_train_batch_size=2",
    )
    (record,) = metrics(run)
    assert math.isfinite(record["loss"])
    if method == "full":
        assert record["retained"]["visual"] > VISUAL
    else:
        assert (record["retained"]["visual"], record["retained"]["audio"]) == (VISUAL, AUDIO)
    assert BudgetProfile.load(run / "budget_profile.json").selection["method"] == method


def test_training_ends_at_once_when_all_steps_are_done(trained, tmp_path):
    run = copy_run(trained.run, tmp_path / "run")
    assert main([*trained.args, f"output_dir={run}"]) == 0
    assert tree(run)["adapter_model.safetensors"] == tree(trained.run)["adapter_model.safetensors"]
    assert tree(run)["metrics.jsonl"] == tree(trained.run)["metrics.jsonl"]


def test_settings_of_a_recipe_reach_the_reader(tmp_path):
    recipe = load_recipe(arguments(tmp_path, "data.fps=2", "data.audio=false", "data.max_seconds=4"))
    assert settings_of(recipe) == StreamSettings(fps=2.0, chunk_seconds=2.0, audio=False, max_seconds=4.0)
    with pytest.raises(OmniMemError, match="multiple of 2"):
        settings_of(load_recipe(arguments(tmp_path, "data.chunk_seconds=5"))).open(
            load_rows(recipe.data).rows[0].media, load_backbone("tiny", device="meta", dtype="float32")
        )


def test_a_clip_that_breaks_off_ends_the_run_or_is_left_out_of_the_loss(tmp_path, capsys):
    rows = [
        {"media": "broken_truncated_half_toy_rabbit.mp4", "question": "What is seen?", "answer": "A rabbit."},
        {"media": FLOWER, "question": "What is seen?", "answer": "A red flower."},
    ]
    assert main(arguments(tmp_path, rows=rows)) == 2
    line = lines(capsys.readouterr().err)[-1]
    assert line.startswith("train: broken_truncated_half_toy_rabbit.mp4") and "data.on_bad_row=skip" in line
    run = trained_run(tmp_path, "data.on_bad_row=skip", "data.shuffle=false", "train.max_steps=2", rows=rows)
    first, second = metrics(run)
    assert first["loss"] == 0 and first["grad_norm"] == 0 and second["loss"] > 0


def test_out_of_memory_names_the_three_settings_to_lower(tmp_path, capsys, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("train.objective.StreamObjective.__call__", exhausted)
    assert main(arguments(tmp_path)) == 2
    error = capsys.readouterr().err
    assert all(
        key in error for key in ("data.chunk_seconds", "memory.mean_budget", "train.per_device_train_batch_size")
    )
    assert "Traceback" not in error


def test_keys_that_nothing_reads_are_named(tmp_path, caplog):
    with caplog.at_level("WARNING", "omnimem.train"):
        trained_run(
            *(
                tmp_path,
                "selection.gradient=none",
                "gate.temperature=0.5",
                "distill.temperature=2",
                "eval.save_total_limit=2",
            ),
            "train.max_steps=1",
        )
    told = [message for message in caplog.messages if "without effect" in message]
    assert told == [
        "gate.temperature: without effect, because selection.gradient=none",
        "distill.temperature: without effect, because distill.weight=0",
        "eval.save_total_limit: without effect, because eval.path=null",
    ]


def test_where_records_wait_may_change_when_a_run_goes_on(tmp_path):
    trained_run(tmp_path, "train.max_steps=2", "train.save_steps=2")
    more = ("train.max_steps=4", "train.offload=disk", "data.prefetch_chunks=0")
    assert main(arguments(tmp_path, *more)) == 0
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4]
