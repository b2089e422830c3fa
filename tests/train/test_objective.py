"""The training objective: loss and gradients of a batch, and when questions are asked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train.objective
from data_prep.manifest import Question
from omnimem.backbones import ChunkInputs, load_backbone
from omnimem.forward import Stream
from omnimem.memory import CompressedCache
from omnimem.memory.offload_store import DiskStore
from omnimem.recipe import load_recipe
from small_runs import (
    ROWS,
    SILENT,
    SPEECH,
    arguments,
    metrics,
    trained_run,
)
from train.data import load_rows
from train.objective import StreamObjective
from train.samples import Sample, TokenizedQuestion, tokenize_row
from train.setup import add_lora, budget_profile, selection_method, stream_settings


class Bench:
    """Objective and samples of a recipe in float64; adapters are not zero, so that all of them have an effect."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], *overrides: str) -> None:
        self.recipe = load_recipe(arguments(folder, "model.dtype=float64", *overrides, rows=rows))
        self.backbone = load_backbone("tiny", backbone="qwen2_5_omni", dtype="float64", device="cpu")
        self.backbone.model.requires_grad_(False)
        self.method, self.settings = selection_method(self.recipe), stream_settings(self.recipe)
        self.profile = budget_profile(self.recipe, self.backbone, self.method, self.settings)
        self.model = add_lora(self.recipe, self.backbone)
        generator = torch.Generator().manual_seed(1)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.model.train()
        self.samples = [tokenize_row(row, self.backbone) for row in load_rows(self.recipe.data).rows]

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
        targets = sum(sample.answer_tokens for batch in batches for sample in batch)
        torch.manual_seed(7)
        for batch in batches:
            result = objective(batch)
            result.backward(1 / targets)
            total += result.loss.item() / targets
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
"""Video with audio of 5 s and 8 s, audio only, video only; questions at the end and before it."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), UNEQUAL)


@pytest.fixture(scope="module")
def ample(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ample"), UNEQUAL, "memory.mean_budget=2000")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference relative to the largest entry."""
    assert one.keys() == other.keys()
    scale = max(value.abs().max().item() for value in one.values())
    return max((one[name] - other[name]).abs().max().item() for name in one) / scale


@pytest.mark.long
@pytest.mark.parametrize("budget", ["evicting", pytest.param("ample", marks=pytest.mark.long)])
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
    """Summed loss of a stream and its gradient by one backward pass of autograd."""
    bench.model.zero_grad(set_to_none=True)
    stream = Stream(bench.backbone, CompressedCache(bench.profile, bench.method))
    reader, encoder = replace(bench.settings, audio=row.get("audio", True)).open(sample.row.media, bench.backbone)
    losses, pending = [], list(sample.questions)

    def ask(asked: TokenizedQuestion) -> None:
        logits, targets = stream.answer_logits(encoder.closing(), [asked.question], [asked.answer])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    stream.forward(encoder.prefix(), text=True)
    for chunk in reader:
        stream.step(encoder.encode(chunk))
        while pending and pending[0].time is not None and pending[0].time <= chunk.t1:
            ask(pending.pop(0))
    for asked in pending:
        ask(asked)
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in bench.parameters.items()}


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_gradient_equals_plain_autograd(bench, number):
    """Real clips, questions before and at the end (norms of transformers compute in float32; exact: `test_bptt`)."""
    sample = bench.samples[number]
    loss, expected = plain_gradients(bench, sample, UNEQUAL[number])
    value, found = bench.gradients([[sample]])
    assert value * sample.answer_tokens == pytest.approx(loss, rel=1e-12)
    assert distance({name: p * sample.answer_tokens for name, p in found.items()}, expected) <= 1e-6


def test_dropout_is_the_same_in_forward_and_recompute_with_every_store(bench, tmp_path):
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
            result = bench.objective()([sample])
            assert result.answer_tokens == sample.answer_tokens == sum(length for _, length in answers)
            assert result.loss.item() == pytest.approx(sum(nll for nll, _ in answers), rel=1e-12)
        nll = sum(nll for answers in by_hand for nll, _ in answers)
        count = sum(length for answers in by_hand for _, length in answers)
    finally:
        bench.model.train()
    mean, _ = bench.gradients([bench.samples[:2], bench.samples[2:]])
    assert mean == pytest.approx(nll / count, rel=1e-12)


def test_the_loss_of_a_float64_model_is_float64(bench):
    assert bench.objective()([bench.samples[0]]).loss.dtype == torch.float64


def test_the_loop_logs_the_mean_over_the_answer_tokens_of_a_step(trained, tmp_path):
    """The first logged loss is that of a new adapter, which equals the base's."""
    recipe = load_recipe(arguments(tmp_path, "train.per_device_train_batch_size=2", "train.max_steps=1"))
    run = trained_run(tmp_path, "train.per_device_train_batch_size=2", "train.max_steps=1")
    backbone = load_backbone(run / "base", dtype="float32", device="cpu")
    method, settings = selection_method(recipe), stream_settings(recipe)
    profile = budget_profile(recipe, backbone, method, settings)
    objective = StreamObjective(backbone, backbone.model, profile, method, settings)
    total = count = 0
    with torch.no_grad():
        for row in load_rows(recipe.data).rows:
            sample = tokenize_row(row, backbone)
            total += objective([sample]).loss.item()
            count += sample.answer_tokens
    (record,) = metrics(run)
    assert record["answer_tokens"] == count
    assert record["loss"] == pytest.approx(total / count, rel=1e-5)


# ---- questions before the end ----------------------------------------------------------------------------------------


class Watched:
    """Records the cache at every question and at the end."""

    def __init__(self, monkeypatch) -> None:
        self.asked: list[tuple[int, float]] = []  # steps so far, tokens streamed so far
        self.caches: list[CompressedCache] = []
        self.steps = 0
        watched = self

        class Cache(CompressedCache):
            def __init__(self, *args):
                super().__init__(*args)
                watched.caches.append(self)

        class Recorded(Stream):
            def step(self, inputs, log_evicted=False):
                watched.steps += 1
                return super().step(inputs, log_evicted)

            def answer_logits(self, *args):
                before = self.cache.snapshot()
                result = super().answer_logits(*args)
                after = self.cache.snapshot()
                for (one, _), (other, _) in zip(before.layers, after.layers, strict=True):
                    assert torch.equal(one.keys.tensor, other.keys.tensor)
                    assert torch.equal(one.values.tensor, other.values.tensor)
                    assert torch.equal(one.metadata.index, other.metadata.index)
                    assert torch.equal(one.attention_scores, other.attention_scores)
                assert all(torch.equal(a, b) for a, b in zip(before.counters[:2], after.counters[:2], strict=True))
                watched.asked.append((watched.steps, int(self.cache._next_index[0])))
                return result

        monkeypatch.setattr(train.objective, "CompressedCache", Cache)
        monkeypatch.setattr(train.objective, "Stream", Recorded)


def with_times(sample: Sample, *times: float | None) -> Sample:
    asked = sample.questions[0]
    return replace(sample, questions=tuple(replace(asked, time=time) for time in times))


def test_a_question_is_asked_after_its_chunk_and_leaves_the_cache_unchanged(bench, monkeypatch):
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


def test_questions_of_a_batch_follow_the_time_of_their_own_stream(bench, monkeypatch):
    """In a batch or alone, a question follows the chunk of its own stream; streams end at different times."""
    flower, rabbit = bench.samples[:2]
    pairs = [with_times(flower, 1.0, 4.0, None), with_times(rabbit, 3.0, 4.0, 6.0, 50.0)]
    alone = [bench.objective()([sample]).loss.item() for sample in pairs]
    watched = Watched(monkeypatch)
    together = bench.objective()(pairs)
    assert together.loss.item() == pytest.approx(sum(alone), rel=1e-12)
    assert together.answer_tokens == sum(sample.answer_tokens for sample in pairs)
    # 1 s after chunk 1; 3 s with 4 s, then 4 s, after chunk 2; 6 s after chunk 3; the ends after chunk 4.
    assert [steps for steps, _ in watched.asked] == [1, 2, 2, 3, 4]
