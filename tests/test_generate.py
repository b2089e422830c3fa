"""Answers are generated from the compressed cache, with the right position ids, and leave the cache unchanged."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clips import RABBIT, WEBB
from omnimem import generation
from omnimem.backbones import ChunkInputs, load_backbone
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.measure.meter import Meter
from omnimem.memory import CompressedCache
from omnimem.selection import build_selection
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings

QUESTION = "What is seen and what is heard?"
OTHER = "Who speaks?"
TOKENS = 8
SETTINGS = StreamSettings(chunk_seconds=4, max_seconds=12)


def new_session(backbone, mean: int = 40, method: str = "omnimem") -> StreamingSession:
    profile = BudgetProfile.uniform(backbone.config, mean=mean, ratio=2.0)
    return StreamingSession(backbone, profile, method, SETTINGS)


def watch(session: StreamingSession, clip=WEBB) -> StreamingSession:
    for _ in session.watch(clip):
        pass
    return session


def state(session: StreamingSession) -> list[torch.Tensor]:
    layers = session.cache.layers
    return [
        t.clone() for layer in layers for t in (layer.keys, layer.values, layer.metadata.index, layer.attention_scores)
    ]


def assert_untouched(session: StreamingSession, before: list[torch.Tensor], seen: int) -> None:
    after = state(session)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert session.cache.get_seq_length() == seen == session.cache.lengths()[0]


class PositionRecorder:
    """Position ids passed to every forward of the language model."""

    def __init__(self, backbone):
        self.ids: list[torch.Tensor] = []
        self.handle = backbone.language_model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, _model, _args, kwargs):
        self.ids.append(kwargs["position_ids"].clone())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@torch.no_grad()
def greedy_by_hand(session: StreamingSession, question: str, count: int) -> tuple[list[int], list[int]]:
    """Token by token with explicit position ids; returns the tokens and the position ids used after the media."""
    backbone, memory = session.backbone, session.cache
    stream, end = Stream(backbone, memory), set(backbone.end_token_ids)
    tokens, used = [], []
    with memory.scratch():
        stream.forward(session._encoder.closing(), text=True)
        position = int(memory.next_position_id[0])
        ids = backbone.question_ids(question)
        while True:
            part = ChunkInputs.text(backbone.embed(ids), position)
            used += part.position_ids[0, 0].tolist()
            position += ids.shape[1]
            tokens.append(int(backbone.lm_head(stream.forward(part, text=True)[:, -1]).argmax()))
            if tokens[-1] in end or len(tokens) == count:
                return tokens, used
            ids = torch.tensor([tokens[-1:]])


@pytest.mark.parametrize("method", ["omnimem", "random"])
@pytest.mark.parametrize("clip", [WEBB, RABBIT], ids=["webb", "rabbit"])
def test_generate_equals_a_manual_greedy_loop_with_the_same_position_ids(tiny64, clip, method):
    session = watch(new_session(tiny64, method=method), clip)
    seen = int(session.cache.token_metadata(0).index.max()) + 1
    assert min(session.cache.lengths()) < seen, "this test is about a memory that has evicted"
    expected, positions = greedy_by_hand(session, QUESTION, TOKENS)
    assert len(expected) > 2, "the tiny model should say something"
    with session._question_inputs(QUESTION) as inputs, PositionRecorder(tiny64) as recorder:
        output = tiny64.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=tiny64.end_token_ids,
            pad_token_id=tiny64.tokenizer.pad_token_id,
        )
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == expected
    used = torch.cat(recorder.ids, dim=-1)
    assert used.shape[:2] == (3, 1)
    for row in used[:, 0].tolist():
        assert row == positions
    assert positions == list(range(positions[0], positions[0] + len(positions)))


def test_position_ids_of_the_answer_follow_the_media_not_the_cache_length(tiny64):
    session = watch(new_session(tiny64))
    after_media = int(session.cache.next_position_id[0])
    assert after_media > max(session.cache.lengths())
    with PositionRecorder(tiny64) as recorder:
        session.ask(QUESTION, max_new_tokens=2)
    closing, question = recorder.ids[:2]
    # Both closing tokens share one position id; the question begins one after it.
    assert closing.unique().tolist() == [after_media]
    assert question[0, 0, 0] == after_media + 1


def test_a_repeated_question_has_the_same_answer_and_leaves_the_cache_unchanged(tiny64):
    session = watch(new_session(tiny64))
    before, seen = state(session), session.cache.get_seq_length()
    first = session.ask(QUESTION, max_new_tokens=TOKENS)
    assert_untouched(session, before, seen)
    session.ask(OTHER, max_new_tokens=TOKENS)
    assert session.ask(QUESTION, max_new_tokens=TOKENS) == first
    assert_untouched(session, before, seen)


def test_questions_in_the_middle_of_the_stream_do_not_change_the_rest(tiny64):
    quiet = watch(new_session(tiny64))
    asked = new_session(tiny64)
    for _ in asked.watch(WEBB):
        before, seen = state(asked), asked.cache.get_seq_length()
        answers = {asked.ask(QUESTION, max_new_tokens=TOKENS) for _ in range(2)}
        assert len(answers) == 1
        assert_untouched(asked, before, seen)
    assert all(torch.equal(a, b) for a, b in zip(state(quiet), state(asked), strict=True))
    assert asked.ask(OTHER, max_new_tokens=TOKENS) == quiet.ask(OTHER, max_new_tokens=TOKENS)


def test_position_ids_in_the_middle_equal_those_of_a_clip_that_ends_there(tiny64):
    session, cut = new_session(tiny64), new_session(tiny64)
    for event in session.watch(WEBB):
        if event.seconds == 8:
            break
    for _ in cut.watch(WEBB, max_seconds=8):
        pass
    assert cut.cache.get_seq_length() == session.cache.get_seq_length()
    assert greedy_by_hand(cut, QUESTION, 2)[1][0] == greedy_by_hand(session, QUESTION, 2)[1][0]


def test_two_videos_in_a_row_equal_a_fresh_model(tiny64, tiny_path):
    """Without a reset, `generate()` of transformers would continue the position ids of the first video."""
    session = watch(new_session(tiny64), WEBB)
    session.ask(QUESTION, max_new_tokens=TOKENS)
    stale = tiny64.model.model.rope_deltas.clone()
    watch(session, RABBIT)
    second, _ = greedy_by_hand(session, QUESTION, TOKENS)
    answer = session.ask(QUESTION, max_new_tokens=TOKENS)
    assert not torch.equal(tiny64.model.model.rope_deltas, stale)

    fresh = watch(new_session(load_backbone(tiny_path, dtype=torch.float64, device="cpu")), RABBIT)
    assert all(torch.equal(a, b) for a, b in zip(state(fresh), state(session), strict=True))
    assert greedy_by_hand(fresh, QUESTION, TOKENS)[0] == second
    assert fresh.ask(QUESTION, max_new_tokens=TOKENS) == answer


def test_two_sessions_on_one_model_do_not_disturb_each_other(tiny64):
    one, two = watch(new_session(tiny64), WEBB), watch(new_session(tiny64), RABBIT)
    first = one.ask(QUESTION, max_new_tokens=TOKENS)
    second = two.ask(QUESTION, max_new_tokens=TOKENS)
    assert one.ask(QUESTION, max_new_tokens=TOKENS) == first
    assert two.ask(QUESTION, max_new_tokens=TOKENS) == second


def test_streamed_text_is_the_answer(tiny64):
    session = watch(new_session(tiny64))
    before, seen = state(session), session.cache.get_seq_length()
    pieces = session.ask(QUESTION, stream=True, max_new_tokens=TOKENS)
    assert not isinstance(pieces, str)
    assert "".join(pieces) == session.ask(QUESTION, max_new_tokens=TOKENS)
    assert_untouched(session, before, seen)


class Largest(TorchDispatchMode):
    """Size of the largest tensor of each dtype among inputs and outputs of operations."""

    def __init__(self):
        super().__init__()
        self.of: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, result)):
            if isinstance(one, torch.Tensor):
                self.of[one.dtype] = max(self.of.get(one.dtype, 0), one.numel())
        return result


class Inline:
    """A thread that runs in the caller: dispatch modes see one thread only."""

    def __init__(self, target, daemon):
        self.start = target

    def join(self):
        pass


def test_tensors_of_a_question_do_not_grow_with_the_stream(tiny64, monkeypatch):
    monkeypatch.setattr(generation, "Thread", Inline)
    profile = BudgetProfile.uniform(tiny64.config, mean=24, ratio=2.0)
    settings = StreamSettings(chunk_seconds=2.0, short_side=56)
    session = StreamingSession(tiny64, profile, "omnimem", settings)
    largest, seen = {}, 0
    with Meter(session) as meter:
        for event in meter.watch(RABBIT, loop_seconds=120.0):
            seen += event.new_tokens
            if event.chunk + 1 in (3, 60):
                with Largest() as recorded:
                    session.ask(QUESTION, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
                largest[event.chunk + 1] = recorded.of
                tokens, _ = greedy_by_hand(session, QUESTION, TOKENS)
                said = tiny64.tokenizer.decode(tokens, skip_special_tokens=True)
                assert session.ask(QUESTION, max_new_tokens=TOKENS) == said
    assert seen > 1000 and largest[60] == largest[3]


def test_closing_a_streamed_answer_early_stops_it_and_restores_the_cache(tiny64):
    session = watch(new_session(tiny64))
    expected = session.ask(QUESTION, max_new_tokens=TOKENS)
    before, seen = state(session), session.cache.get_seq_length()
    with PositionRecorder(tiny64) as recorder:
        pieces = session.ask(QUESTION, stream=True, max_new_tokens=1000, min_new_tokens=1000)
        next(pieces)
        pieces.close()
    assert len(recorder.ids) < 1000
    assert_untouched(session, before, seen)
    assert session.ask(QUESTION, max_new_tokens=TOKENS) == expected


def test_an_error_in_generation_is_raised_and_the_cache_restored(tiny64):
    session = watch(new_session(tiny64))
    before, seen = state(session), session.cache.get_seq_length()
    with pytest.raises((ValueError, TypeError)):
        session.ask(QUESTION, max_new_tokens=TOKENS, no_such_argument=1)
    assert_untouched(session, before, seen)


def test_streaming_an_answer_does_not_switch_off_the_callers_gradients(tiny64):
    session = watch(new_session(tiny64))
    pieces = session.ask(QUESTION, stream=True, max_new_tokens=TOKENS)
    next(pieces)
    enabled = torch.is_grad_enabled()
    pieces.close()
    assert torch.is_grad_enabled()
    assert enabled


def test_watching_does_not_switch_off_the_callers_gradients(tiny64):
    for _ in new_session(tiny64).watch(RABBIT):
        assert torch.is_grad_enabled()


def test_asking_before_watching_and_empty_questions_are_refused(tiny64):
    session = new_session(tiny64)
    with pytest.raises(OmniMemError, match="watch"):
        session.ask(QUESTION)
    watch(session, RABBIT)
    with pytest.raises(OmniMemError, match="empty"):
        session.ask("   ")


def test_teacher_forced_logits_equal_the_greedy_loop(tiny64):
    """Teacher forcing and generation use the same cache: its argmax is the next generated token."""
    session = watch(new_session(tiny64))
    tokens, _ = greedy_by_hand(session, QUESTION, TOKENS)
    before, seen = state(session), session.cache.get_seq_length()
    stream = Stream(tiny64, session.cache)
    with torch.no_grad():
        logits, targets = stream.answer_logits(
            session._encoder.closing(), [tiny64.question_ids(QUESTION)[0]], [torch.tensor(tokens)]
        )
    assert targets.tolist() == tokens
    assert logits.argmax(-1).tolist() == tokens
    assert_untouched(session, before, seen)


def test_generate_accepts_the_cache_directly(tiny64):
    """Cache, rope_deltas and a mask over cached and new tokens are enough."""
    cache = CompressedCache(BudgetProfile.uniform(tiny64.config, mean=6, ratio=1.0), build_selection("omnimem"))
    ids = tiny64.question_ids(QUESTION)
    with torch.no_grad():
        tiny64.language_model(input_ids=ids, past_key_values=cache)
        tiny64.set_rope_deltas(cache.rope_deltas)
        more = tiny64.question_ids(OTHER)
        mask = torch.ones(1, cache.get_seq_length() + more.shape[1], dtype=torch.int64)
        output = tiny64.model.generate(
            input_ids=more, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=TOKENS,
            eos_token_id=None, pad_token_id=tiny64.tokenizer.pad_token_id,
        )  # fmt: skip
        reference = tiny64.model.generate(
            input_ids=torch.cat((ids, more), 1), do_sample=False, max_new_tokens=TOKENS, eos_token_id=None,
            attention_mask=mask, pad_token_id=tiny64.tokenizer.pad_token_id,
        )  # fmt: skip
    assert output[0, more.shape[1] :].tolist() == reference[0, mask.shape[1] :].tolist()
