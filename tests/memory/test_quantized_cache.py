"""A cache of bytes: everything older than the running pass is rounded, once, and nothing else changes.

The reference is an unquantised cache whose tokens are rounded by hand: when the pass after theirs begins, or when they
are compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, SelectionGradient, attach
from omnimem.memory.codec import Codec
from omnimem.memory.offload_store import DiskStore
from omnimem.memory.token_buffer import TokenBuffer
from omnimem.selection import build_selection
from oracles import batch_parts, kept, offline, profile, run, same, stream_parts, text_model, text_part
from small_decoder import model, streams  # noqa: F401
from test_bptt import assert_equal, new_tape, parts_of, plain, taped

BUDGETS = profile((6, 3), (2, 9), (8, 4))
SIZES = [(5, 2), (8, 4), (3, 0), (0, 6), (9, 3), (7, 5)]
OTHER_SIZES = [(2, 6), (4, 4), (9, 1)]
KINDS = pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
METHODS = [
    ("omnimem", {}),
    ("omnimem", {"lambda": 1.0, "redundancy": "value"}),
    ("omnimem", {"redundancy": "key", "position_ids": "compact"}),
    ("full", {}),
    ("h2o", {}),
    ("h2o", {"position_ids": "compact"}),
    ("snapkv", {}),
    ("infinipot_v", {}),
    ("infinipot_v", {"position_ids": "compact"}),
    ("streammem", {}),
    ("hermes", {}),
    ("hermes", {"position_ids": "original"}),
    ("hermes_released", {}),
]


class RoundedByHand(CompressedCache):
    """An unquantised cache that replaces its tokens by their rounded values, with the gradient of the identity."""

    def __init__(self, *args: Any, kind: Any) -> None:
        super().__init__(*args)
        self.kind, self.rounded = kind, [0] * len(self.layers)

    def begin(self, *args: Any, **kwargs: Any) -> None:
        self.round()
        super().begin(*args, **kwargs)

    def compress(self, *args: Any, **kwargs: Any) -> Any:
        self.round()
        evictions = super().compress(*args, **kwargs)
        # Merged tokens are new: they come after the retained ones, which are rounded already.
        self.rounded = [
            len(layer.state) if one is None else one.columns.shape[1]
            for layer, one in zip(self.layers, evictions, strict=True)
        ]
        self.round()
        return evictions

    @contextmanager
    def scratch(self) -> Iterator[CompressedCache]:
        before = self.rounded
        with super().scratch():
            yield self
        self.rounded = before

    def round(self) -> None:
        for layer, count in zip(self.layers, self.rounded, strict=True):
            for name, group in (("keys", 32), ("values", None)):
                states = getattr(layer.state, name).tensor
                if states is not None:
                    old, new = states[:, :, :count], states[:, :, count:]
                    codec = Codec(self.kind, states.shape[-1], group)
                    near = codec.decode(codec.encode(new.detach()), states.dtype)
                    buffer = TokenBuffer(2, torch.cat((old, new + (near - new).detach()), dim=2))
                    layer.state = replace(layer.state, **{name: buffer})
        self.rounded = [len(layer.state) for layer in self.layers]


def new_cache(method: str, options: dict[str, Any], kind: Any, gradient: SelectionGradient | None = None) -> Any:
    return CompressedCache(BUDGETS, build_selection(method, **options), gradient, kind)


def reference(method: str, options: dict[str, Any], kind: Any, gradient: SelectionGradient | None = None) -> Any:
    return RoundedByHand(BUDGETS, build_selection(method, **options), gradient, kind=kind)


def inputs(samples: int) -> list[ChunkInputs]:
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)][:samples]
    return batch_parts(*rows) if samples > 1 else rows[0]


def outputs(model, cache, parts: list[ChunkInputs]) -> list[Tensor]:
    """Hidden states of a whole stream with text in the middle, and of a question of two passes after every chunk."""
    flow, found = Stream(offline(model), cache), []
    found.append(flow.forward(parts[0], text=True))
    for number, part in enumerate(parts[1:]):
        flow.forward(part)
        for probe in cache.method.probes:
            flow._run_probe(probe, len(part.embeds))
        cache.compress()
        if number == 2:
            found.append(flow.forward(note(cache, len(part.embeds), 3), text=True))
        with cache.scratch():
            found += [flow.forward(note(cache, len(part.embeds), length), text=True) for length in (4, 1, 2)]
    return found


def note(cache, samples: int, length: int) -> ChunkInputs:
    """Text after the cache; `Stream` shifts it where position ids are compact."""
    embeds = text_part(length, 0, seed=length).embeds.expand(samples, -1, -1)
    shift = 0 if cache._compact_ids is None or cache._compact_ids.shift is None else cache._compact_ids.shift
    return ChunkInputs.text(embeds, cache.next_position_id - shift)


def stored(cache) -> list[Tensor]:
    """Bytes of the real tokens, those in the tail encoded as well."""
    found = []
    with torch.no_grad():
        for layer in cache.layers:
            for buffer in (layer.state.keys, layer.state.values):
                data = buffer.settle(lambda: None).tensor
                assert data.dtype == torch.uint8
                found.append(data.transpose(1, 2)[layer.metadata.valid].clone())
    return found


def raw(cache) -> list[Tensor]:
    """Copies of the bytes and the tails as they are."""
    buffers = [one for layer in cache.layers for one in (layer.state.keys, layer.state.values)]
    return [one.clone() for buffer in buffers for one in (buffer.tensor, buffer.tail) if one is not None]


# ---- the values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["bytes", "autograd"])
@pytest.mark.parametrize("samples", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_stream_equals_one_rounded_by_hand(model, method, options, samples, grad):
    check(model, method, options, "int8", samples, grad)


@KINDS
@pytest.mark.parametrize("grad", [False, True], ids=["bytes", "autograd"])
def test_with_every_code_a_stream_equals_one_rounded_by_hand(model, kind, grad):
    check(model, "omnimem", {"lambda": 1.0}, kind, 2, grad)


def check(model, method, options, kind, samples, grad) -> None:
    parts, caches = inputs(samples), (new_cache(method, options, kind), reference(method, options, kind))
    with torch.set_grad_enabled(grad):
        found, expected = (outputs(model, cache, parts) for cache in caches)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10
    for number, (ours, theirs) in enumerate(zip(caches[0].layers, caches[1].layers, strict=True)):
        assert ours.state.keys.encoded != grad
        real = ours.metadata.valid
        for row in range(len(real)):
            assert kept(caches[0], number, row) == kept(caches[1], number, row)
        for name in ("keys", "values"):
            a, b = (getattr(layer, name).transpose(1, 2)[real] for layer in (ours, theirs))
            assert (a - b).abs().max() <= 1e-10
    unrounded = outputs(model, new_cache(method, options, "auto"), parts)
    assert any((ours - exact).abs().max() > 1e-4 for ours, exact in zip(found, unrounded, strict=True))


@torch.no_grad()
def test_a_chunk_attends_unrounded_and_retained_tokens_are_never_encoded_again(model):
    cache, parts = new_cache("omnimem", {}, "int4"), inputs(1)
    plain_cache = new_cache("omnimem", {}, "auto")
    first, exact = (run(model, one, parts[0], text=True) for one in (cache, plain_cache))
    assert torch.equal(first, exact)
    known: list[dict[int, Tensor]] = [{} for _ in cache.layers]
    for part in parts[1:]:
        run(model, cache, part)
        assert all(layer.state.keys.tail.shape[2] == len(part) for layer in cache.layers)
        cache.compress()
        for number, layer in enumerate(cache.layers):
            assert layer.state.keys.tail is layer.state.values.tail is None
            data = torch.cat((layer.state.keys.tensor, layer.state.values.tensor), -1)
            for column, index in enumerate(kept(cache, number)):
                assert torch.equal(data[:, :, column], known[number].setdefault(index, data[:, :, column].clone()))


@torch.no_grad()
@pytest.mark.parametrize("method", ["omnimem", "h2o"])
def test_attention_decodes_one_head_of_one_layer_at_a_time(model, method, monkeypatch):
    """And the selection nothing, unless it reads keys or values."""
    cache, parts, decoded = new_cache(method, {}, "int8"), inputs(2), []
    decode = Codec.decode

    def watched(codec: Codec, data: Tensor, dtype: torch.dtype) -> Tensor:
        decoded.append(data.shape[0] * data.shape[1])
        return decode(codec, data, dtype)

    monkeypatch.setattr(Codec, "decode", watched)
    outputs(model, cache, parts)
    assert set(decoded) == {2}, "two samples, one head"


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_question_leaves_the_cache_as_it_was_to_the_bit(model, method, options, samples):
    cache, parts = new_cache(method, options, "int8"), inputs(samples)
    flow = Stream(offline(model), cache)
    flow.forward(parts[0], text=True)
    for number, part in enumerate(parts[1:]):
        flow.step(part)
        if number == 2:  # with tokens that wait to be encoded
            flow.forward(note(cache, samples, 3), text=True)
        before, counts, nbytes = raw(cache), cache.lengths(), cache.nbytes
        with cache.scratch():
            for length in (40, 1, 2):
                flow.forward(note(cache, samples, length), text=True)
        assert same(raw(cache), before)
        assert cache.lengths() == counts and cache.nbytes == nbytes


def test_a_cache_can_change_between_inference_and_autograd(model):
    parts = inputs(1)
    mixed, expected = (new_cache("omnimem", {}, "int8") for _ in range(2))
    for number, part in enumerate(parts):
        for cache, grad in ((mixed, number % 3 == 1), (expected, False)):
            with torch.set_grad_enabled(grad):
                run(model, cache, part, text=number == 0)
                if number > 0:
                    cache.compress()
    assert not mixed.layers[0].state.keys.encoded and expected.layers[0].state.keys.encoded
    for ours, theirs in zip(mixed.layers, expected.layers, strict=True):
        assert (ours.keys - theirs.keys).abs().max() <= 1e-10
        assert (ours.values - theirs.values).abs().max() <= 1e-10


@torch.no_grad()
@KINDS
def test_bytes_count_codes_scales_and_tail(model, kind):
    cache, parts = new_cache("omnimem", {}, kind), inputs(1)
    flow = Stream(offline(model), cache)
    for number, part in enumerate([parts[0], *parts[1:] * 3]):
        flow.forward(part, text=True) if number == 0 else flow.step(part)
    each = 2 * 2 * Codec(kind, 8).nbytes
    assert cache.kv_nbytes == sum(cache.lengths()) * each
    before, buffers = cache.kv_nbytes, [layer.state.keys.storage.data_ptr() for layer in cache.layers]
    flow.forward(text_part(2, 900), text=True)
    assert cache.kv_nbytes == before + 3 * 2 * 2 * 2 * 8 * 8
    assert buffers == [layer.state.keys.storage.data_ptr() for layer in cache.layers]
    for layer, budget in zip(cache.layers, BUDGETS.layers, strict=True):
        longest = max(len(part) for part in parts)
        assert layer.state.keys.storage.shape[2] <= 3 + 3 + budget.total + longest


def test_errors_shrink_with_the_number_of_bits():
    """In bfloat16, hidden states of a question against those of an unquantised cache."""
    decoder: Any = text_model(dtype=torch.bfloat16)
    attach(decoder)
    parts = stream_parts(SIZES, dtype=torch.bfloat16)
    hidden = {}
    with torch.no_grad():
        for kind in ("auto", "int8", "fp8", "int4"):
            cache = new_cache("streaming_llm", {}, kind)
            flow = Stream(offline(decoder), cache)
            for number, part in enumerate(parts):
                flow.forward(part, text=True) if number == 0 else flow.step(part)
            text = text_part(6, int(cache.next_position_id[0]), dtype=torch.bfloat16)
            hidden[kind] = flow.forward(text, text=True).float()
    error = {kind: float((one - hidden["auto"]).norm() / hidden["auto"].norm()) for kind, one in hidden.items()}
    assert 0 < error["int8"] < error["fp8"] < error["int4"] < 0.3 and error["int8"] < 0.03


@pytest.mark.parametrize(
    ("method", "options", "kind", "message"),
    [("omnimem", {"variant": "release"}, "int8", "attention_scores=concat"), ("full", {}, "int3", "unknown kv_dtype")],
)
def test_what_cannot_work_is_refused(method, options, kind, message):
    with pytest.raises(OmniMemError, match=message) as error:
        new_cache(method, options, kind)
    assert "\n" not in str(error.value)


# ---- the gradient ----------------------------------------------------------------------------------------------------

SETTINGS = [
    ("omnimem", {}, None),
    ("omnimem", {}, SelectionGradient()),
    ("similarity_only", {}, SelectionGradient(margin=2, threshold="bisection")),
    ("omnimem", {"lambda": 1.0}, SelectionGradient(margin=1, through_attention=True)),
    ("omnimem", {}, SelectionGradient("soft")),
    ("omnimem", {"lambda": 1.0}, SelectionGradient("soft", margin=2, threshold="bisection", through_attention=True)),
    ("omnimem", {"position_ids": "compact"}, None),
    ("full", {}, None),
    ("h2o", {"position_ids": "compact"}, None),
    ("snapkv", {}, None),
    ("streammem", {}, None),
    ("infinipot_v", {}, None),
    ("hermes", {}, None),
]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(("method", "options", "gradient"), SETTINGS)
def test_the_backward_pass_gives_the_gradient_of_plain_autograd(model, samples, method, options, gradient):
    """Of the cache itself, and of the cache rounded by hand."""
    parts = parts_of(samples)
    by_hand, expected = plain(model, reference(method, options, "int8", gradient), parts)
    loss, direct = plain(model, new_cache(method, options, "int8", gradient), parts)
    value, found = taped(model, new_tape(model, new_cache(method, options, "int8", gradient)), parts)
    assert abs(value - loss) <= 1e-12 * abs(loss) and abs(loss - by_hand) <= 1e-12 * abs(loss)
    assert all(one is not None and one.abs().max() > 0 for one in expected)
    assert_equal(direct, expected)
    assert_equal(found, direct)


@KINDS
def test_with_every_code_the_backward_pass_gives_the_gradient_of_plain_autograd(model, kind):
    parts, gradient = parts_of(2), SelectionGradient()
    loss, expected = plain(model, reference("omnimem", {}, kind, gradient), parts)
    value, found = taped(model, new_tape(model, new_cache("omnimem", {}, kind, gradient)), parts)
    assert abs(value - loss) <= 1e-12 * abs(loss)
    assert_equal(found, expected)


def test_a_question_after_the_text_before_the_media_has_its_gradient(model):
    """The text is still waiting to be encoded then."""
    parts, asked = parts_of(2), (0, 0, 2)
    _, expected = plain(model, reference("omnimem", {}, "int8"), parts[:3], asked)
    _, found = taped(model, new_tape(model, new_cache("omnimem", {}, "int8")), parts[:3], asked)
    assert_equal(found, expected)
    _, expected = plain(model, reference("omnimem", {}, "int8"), parts[:1], (0,))
    _, found = taped(model, new_tape(model, new_cache("omnimem", {}, "int8")), parts[:1], (0,))
    assert_equal(found, expected)


def test_records_on_disk_give_the_same_bits(model, tmp_path):
    parts, results = streams(2), []
    for store in (None, DiskStore(tmp_path)):
        tape = new_tape(model, new_cache("omnimem", {}, "int4", SelectionGradient(margin=2)), store=store)
        results.append([one for one in taped(model, tape, parts)[1] if one is not None])
    assert results[0] and all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(("method", "options", "gradient"), SETTINGS)
def test_the_recorded_pass_is_that_of_inference_and_is_undone_to_the_bit(model, samples, method, options, gradient):
    recorded = new_cache(method, options, "int8", gradient)
    soft = gradient is not None and gradient.form == "soft"
    inference = new_cache(method, options, "int8", gradient if soft else None)
    flows, parts = [Stream(offline(model), cache) for cache in (recorded, inference)], streams(samples)
    for flow in flows:
        flow.forward(parts[0], text=True)
    seen = []
    for part in parts[1:]:
        before = recorded.snapshot().without_tokens, stored(recorded)
        seen.append((*before, flows[0].step(part, log_evicted=True)))
        logs = [one.log for one in seen[-1][2] if one is not None]
        assert all(tensor.dtype == torch.uint8 for log in logs for tensor in log[:2])
        flows[1].step(part)
        assert same(raw(recorded), raw(inference))
    for before, states, evictions in reversed(seen):
        recorded.undo(before, evictions)
        assert same(stored(recorded), states)
    for flow in (flows[0], fresh := Stream(offline(model), new_cache(method, options, "int8", gradient))):
        if flow is fresh:
            flow.forward(parts[0], text=True)
        flow.step(parts[1])
    assert same(raw(recorded), raw(fresh.cache))


def test_gradients_of_weights_pass_through_the_rounding(model):
    """Without it, a chunk that only a rounded token carries to the question would have no gradient."""
    parts = parts_of(1)
    _, found = taped(model, new_tape(model, new_cache("omnimem", {}, "int4")), parts, asked=(4,))
    assert all(one is not None and one.abs().max() > 0 for one in found)
