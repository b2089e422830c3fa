"""The memory holds exactly its budgets after every chunk, the same values however it is held, and forgets questions."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from omnimem.backbones import ChunkInputs
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.memory import CompressedCache, attach
from omnimem.modality import AUDIO, TEXT, VISUAL
from omnimem.selection import SELECTION_METHODS
from oracles import (
    WIDTH,
    batch_parts,
    kept,
    media_part,
    profile,
    run,
    step,
    stream,
    stream_parts,
    text_model,
    text_part,
)
from small_decoder import new_method

BUDGETS = profile((6, 3), (2, 9), (25, 1))
AMPLE = profile((500, 500), (500, 500), (500, 500))
SIZES = [(5, 2), (8, 4), (3, 0), (0, 6), (9, 3), (1, 1), (7, 5)]
OTHER_SIZES = [(2, 6), (4, 4), (9, 1)]
SELECTIONS = [
    ("full", {}),
    ("uniform", {}),
    ("random", {}),
    ("omnimem", {}),
    ("omnimem", {"variant": "release"}),
    ("omnimem", {"redundancy": "sketch", "lambda": 1.0}),
    ("omnimem", {"redundancy": "value", "neighbours": "modality", "accumulation": "ema"}),
]
METHODS = pytest.mark.parametrize(
    ("method", "options"), SELECTIONS, ids=[f"{m}-{o}" if o else m for m, o in SELECTIONS]
)


@pytest.fixture(scope="module")
def model():
    model = text_model()
    attach(model)
    return model


def new_cache(budgets: BudgetProfile = BUDGETS, method: str = "omnimem", **options) -> CompressedCache:
    return CompressedCache(budgets, new_method(method, **options))


def snapshot(cache: CompressedCache) -> list[torch.Tensor]:
    tensors = []
    for layer in cache.layers:
        table = layer.metadata
        tensors += [layer.keys, layer.values, table.index, table.position_ids, table.time, table.modality, table.valid]
        if layer.attention_scores is not None:
            # Mass may be stored for a part of the columns; the rest has none yet.
            tensors.append(
                torch.nn.functional.pad(layer.attention_scores, (0, len(table) - layer.attention_scores.shape[1]))
            )
        if layer.features is not None:
            tensors.append(layer.features)
    return [tensor.clone() for tensor in tensors]


def assert_same(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert old.shape == new.shape
        assert torch.equal(old.nan_to_num(-1), new.nan_to_num(-1))


# ---- how much is stored ------------------------------------------------------------------------------------------


@METHODS
def test_after_every_chunk_each_layer_stores_text_and_the_budget_of_each_modality(model, method, options):
    cache = new_cache(method=method, **options)
    parts = stream_parts(SIZES)
    visual = audio = 0
    with torch.no_grad():
        run(model, cache, parts[0], text=True)
        for part, (more_visual, more_audio) in zip(parts[1:], SIZES, strict=True):
            run(model, cache, part)
            cache.compress()
            visual, audio = visual + more_visual, audio + more_audio
            for counts, length, budget in zip(cache.token_counts(), cache.lengths(), BUDGETS.layers, strict=True):
                full = method == "full"
                expected_visual = visual if full else min(budget.visual, visual)
                expected_audio = audio if full else min(budget.audio, audio)
                assert counts == {"text": [3], "visual": [expected_visual], "audio": [expected_audio]}
                assert length == 3 + expected_visual + expected_audio
            for layer in cache.layers:
                assert layer.keys.shape == layer.values.shape == (1, 2, len(layer.metadata), 8)


@METHODS
@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "functional"])
def test_budgets_hold_for_every_sample_of_a_ragged_batch(model, method, options, grad):
    cache = new_cache(method=method, **options)
    sizes = (SIZES, OTHER_SIZES)
    steps = batch_parts(stream_parts(SIZES, prefix=3), stream_parts(OTHER_SIZES, prefix=5, seed=1))
    seen = [[0, 0], [0, 0]]
    with torch.set_grad_enabled(grad):
        run(model, cache, steps[0], text=True)
        for number, step in enumerate(steps[1:]):
            run(model, cache, step)
            cache.compress()
            for sample in (0, 1):
                more = sizes[sample][number] if number < len(sizes[sample]) else (0, 0)
                seen[sample] = [a + b for a, b in zip(seen[sample], more, strict=True)]
            for counts, budget in zip(cache.token_counts(), BUDGETS.layers, strict=True):
                if method == "full":
                    assert counts["visual"] == [s[0] for s in seen] and counts["audio"] == [s[1] for s in seen]
                else:
                    assert counts["visual"] == [min(budget.visual, s[0]) for s in seen]
                    assert counts["audio"] == [min(budget.audio, s[1]) for s in seen]
                assert counts["text"] == [3, 5]


def test_what_is_stored_is_what_was_fed_in(model):
    """Rotary ids, seconds, modality and place in the stream of every retained token read back unchanged."""
    for samples in ([stream_parts(SIZES)], [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=6, seed=2)]):
        cache = new_cache()
        with torch.no_grad():
            stream(model, cache, batch_parts(*samples) if len(samples) > 1 else samples[0])
        for sample, parts in enumerate(samples):
            positions = torch.cat([part.position_ids[:, 0] for part in parts], dim=1).T
            times = torch.cat([part.time[0] for part in parts]).float()
            kinds = torch.cat([part.modality[0] for part in parts])
            for layer in range(3):
                table = cache.token_metadata(layer)
                real = table.valid[sample]
                index = table.index[sample][real]
                assert index.tolist() == sorted(set(index.tolist()))
                assert torch.equal(table.position_ids[sample][real], positions[index])
                assert torch.equal(table.modality[sample][real], kinds[index])
                assert torch.equal(table.time[sample][real].nan_to_num(-1), times[index].nan_to_num(-1))
                assert table.time[sample][real][kinds[index] == TEXT].isnan().all()
        assert cache.next_position_id.tolist() == [int(parts[-1].next_position_id[0]) for parts in samples]


@METHODS
def test_text_in_the_middle_of_the_stream_is_always_retained(model, method, options):
    cache = new_cache(method=method, **options)
    parts = stream_parts(SIZES)
    texts, seen = [0, 1, 2], 3
    with torch.no_grad():
        run(model, cache, parts[0], text=True)
        for number, part in enumerate(parts[1:]):
            run(model, cache, part)
            cache.compress()
            seen += len(part)
            if number % 2:
                run(model, cache, text_part(2, int(part.next_position_id[0]) + 1, seed=number), text=True)
                texts += [seen, seen + 1]
                seen += 2
            for layer in range(3):
                table = cache.token_metadata(layer)
                assert table.index[0][table.modality[0] == TEXT].tolist() == texts
    assert cache.get_seq_length() == cache.lengths()[0] <= seen


def test_text_between_a_chunk_and_its_compression_does_not_lose_the_chunks_attention(model):
    """Attention scores come from the queries of a chunk, whatever is appended before it is compressed."""
    parts = stream_parts([(8, 4), (9, 3)])
    after_compression, before_compression = new_cache(lambda_=1.0), new_cache(lambda_=1.0)
    with torch.no_grad():
        for cache in (after_compression, before_compression):
            stream(model, cache, parts[:2])
            run(model, cache, parts[2])
        note = text_part(2, int(parts[2].next_position_id[0]))
        after_compression.compress()
        run(model, after_compression, note, text=True)
        run(model, before_compression, note, text=True)
        before_compression.compress()
    # The text is one more neighbour of the last token, so only what both kept can be compared.
    for layer in range(3):
        ours, theirs = (
            dict(zip(kept(cache, layer), cache.layers[layer].attention_scores[0].tolist(), strict=False))
            for cache in (before_compression, after_compression)
        )
        for index in (ours.keys() & theirs.keys()) - {*kept(before_compression, layer)[-2:]}:
            assert ours[index] == pytest.approx(theirs[index], abs=1e-9)


def test_the_full_method_never_evicts(model):
    cache = new_cache(profile((1, 1), (1, 1), (1, 1)), method="full")
    parts = stream_parts(SIZES)
    with torch.no_grad():
        hidden = stream(model, cache, parts)
        whole = ChunkInputs.batch([parts[0]])
        for part in parts[1:]:
            whole = whole + part
        expected = run(model, new_cache(AMPLE), whole)
    total = 3 + sum(v + a for v, a in SIZES)
    assert cache.lengths() == [total] * 3
    assert [kept(cache, layer) for layer in range(3)] == [list(range(total))] * 3
    assert (torch.cat(hidden, 1) - expected).abs().max() <= 1e-12


# ---- two ways of holding -----------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("samples", [1, 2])
def test_in_place_and_functional_memories_are_equal(model, method, options, samples):
    streams = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)][:samples]
    parts = batch_parts(*streams) if samples > 1 else streams[0]
    caches, outputs = [], []
    for grad in (False, True):
        cache = new_cache(method=method, **options)
        with torch.set_grad_enabled(grad):
            outputs.append(stream(model, cache, parts))
        caches.append(cache)
    for ours, theirs, part in zip(*outputs, parts, strict=True):
        real = slice(None) if part.valid is None else part.valid
        assert (ours - theirs)[real].abs().max() <= 1e-12
    for layer in range(3):
        for sample in range(samples):
            assert kept(caches[0], layer, sample) == kept(caches[1], layer, sample)
        real = caches[0].token_metadata(layer).valid
        for name in ("keys", "values"):
            a, b = (getattr(cache.layers[layer], name).transpose(1, 2)[real] for cache in caches)
            assert (a - b).abs().max() <= 1e-12


def test_a_cache_can_change_between_forward_and_backward(model):
    parts = stream_parts(SIZES)
    expected, cache = new_cache(), new_cache()
    with torch.no_grad():
        stream(model, expected, parts)
        run(model, cache, parts[0], text=True)
    for number, part in enumerate(parts[1:]):
        with torch.set_grad_enabled(number % 2 == 0):
            run(model, cache, part)
            cache.compress()
    assert [kept(cache, layer) for layer in range(3)] == [kept(expected, layer) for layer in range(3)]
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert (ours.keys - theirs.keys).abs().max() <= 1e-12
        assert (ours.values - theirs.values).abs().max() <= 1e-12


# ---- memory stays bounded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(set(SELECTION_METHODS) - {"full"}))
def test_bytes_and_buffers_are_constant_over_a_twenty_times_longer_stream(model, method):
    budgets = profile((6, 3), (20, 9), (12, 1))
    cache = new_cache(budgets, method=method)
    with torch.no_grad():
        run(model, cache, text_part(3, 0), text=True)
        for number in range(120):
            step(model, cache, media_part(5, 3, 5 * number, seed=number))
            if number == 5:
                pointers = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
                lengths, nbytes, kv_nbytes = cache.lengths(), cache.nbytes, cache.kv_nbytes
            if number > 5:
                assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == pointers
                assert cache.lengths() == lengths == [3 + budget.total for budget in budgets.layers]
                assert cache.nbytes == nbytes
    assert cache.get_seq_length() == cache.lengths()[0] < 3 + 120 * 8
    assert kv_nbytes == sum(lengths) * 2 * 2 * 8 * 8
    # The buffers hold the budget, the text and one chunk, no more; for probing methods the probe after it.
    probe = 4 if cache.method.probes else 0
    for layer, budget in zip(cache.layers, budgets.layers, strict=True):
        assert layer.state.keys.storage.shape[2] <= 3 + budget.total + 8 + probe


def test_the_functional_cache_is_as_small(model):
    cache = new_cache()
    stream(model, cache, stream_parts(SIZES))
    for layer, budget in zip(cache.layers, BUDGETS.layers, strict=True):
        assert layer.keys.shape[2] == 3 + min(budget.visual, 33) + min(budget.audio, 21)


# ---- questions leave no trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [1, 4, 300], ids=["one-token", "short", "buffer-grows"])
@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "functional"])
@pytest.mark.parametrize("samples", [1, 2])
def test_scratch_leaves_no_trace(model, question, grad, samples):
    streams = [stream_parts(SIZES), stream_parts(SIZES[::-1], prefix=5, seed=1)][:samples]
    parts = batch_parts(*streams) if samples > 1 else streams[0]
    asked, untouched = new_cache(), new_cache()
    with torch.set_grad_enabled(grad):
        for cache in (asked, untouched):
            stream(model, cache, parts[:5])
        before = snapshot(asked)
        numbers = (asked.get_seq_length(), asked.lengths(), asked.next_position_id.tolist(), asked.nbytes)
        rows = [text_part(question + i, 90 + i, seed=i) for i in range(samples)]
        with asked.scratch() as inside:
            assert inside is asked
            run(model, asked, ChunkInputs.batch(rows), text=True)
            assert asked.lengths()[0] == numbers[1][0] + question + samples - 1
            run(model, asked, ChunkInputs.batch([text_part(1, 999)] * samples), text=True)
        assert_same(before, snapshot(asked))
        assert (asked.get_seq_length(), asked.lengths(), asked.next_position_id.tolist(), asked.nbytes) == numbers
        for part in parts[5:]:
            ours, theirs = (run(model, cache, part) for cache in (asked, untouched))
            assert torch.equal(ours, theirs)
            asked.compress()
            untouched.compress()
        assert_same(snapshot(untouched), snapshot(asked))


def test_scratch_leaves_no_trace_when_the_question_fails(model):
    cache = new_cache()
    with torch.no_grad():
        stream(model, cache, stream_parts(SIZES))
        before = snapshot(cache)
        with pytest.raises(ZeroDivisionError), cache.scratch():
            run(model, cache, text_part(4, 99), text=True)
            raise ZeroDivisionError
        assert_same(before, snapshot(cache))
        cache.compress()  # allowed again


def test_scratches_can_be_nested(model):
    cache = new_cache()
    with torch.no_grad():
        stream(model, cache, stream_parts(SIZES))
        before = snapshot(cache)
        with cache.scratch():
            run(model, cache, text_part(4, 99), text=True)
            inner = snapshot(cache)
            with cache.scratch():
                run(model, cache, text_part(7, 120), text=True)
            assert_same(inner, snapshot(cache))
        assert_same(before, snapshot(cache))


def test_a_question_must_not_compress_the_cache(model):
    cache = new_cache()
    with torch.no_grad():
        stream(model, cache, stream_parts(SIZES))
        with cache.scratch(), pytest.raises(RuntimeError, match="scratch"):
            cache.compress()


def test_a_question_between_a_chunk_and_its_compression_changes_nothing(model):
    parts = stream_parts(SIZES)
    asked, untouched = new_cache(lambda_=1.0), new_cache(lambda_=1.0)
    with torch.no_grad():
        for cache in (asked, untouched):
            stream(model, cache, parts[:5])
            run(model, cache, parts[5])
        with asked.scratch():
            run(model, asked, text_part(4, 99), text=True)
        asked.compress()
        untouched.compress()
    assert_same(snapshot(untouched), snapshot(asked))


def test_reset_forgets_everything(model):
    cache, fresh = new_cache(), new_cache()
    with torch.no_grad():
        stream(model, cache, batch_parts(stream_parts(OTHER_SIZES, seed=4), stream_parts(SIZES, prefix=5, seed=5)))
        cache.reset()
        assert cache.lengths() == [0, 0, 0] and cache.nbytes == 0 and cache.get_seq_length() == 0
        assert cache.next_position_id is None
        with pytest.raises(RuntimeError, match="empty"):
            cache.token_metadata(0)
        with pytest.raises(RuntimeError, match="empty"):
            _ = cache.rope_deltas
        ours, theirs = (stream(model, c, stream_parts(SIZES)) for c in (cache, fresh))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert_same(snapshot(fresh), snapshot(cache))


# ---- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "functional"])
@pytest.mark.parametrize("budgets", [AMPLE, BUDGETS], ids=["ample", "evicting"])
@METHODS
def test_streams_of_different_lengths_side_by_side_equal_each_alone(model, method, options, budgets, grad):
    streams = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)]
    compare_with_alone(model, streams, budgets, method, options, grad)


@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "functional"])
@METHODS
def test_streams_of_equal_lengths_but_unequal_mixtures_equal_each_alone(model, method, options, grad):
    """No padding goes in, yet eviction leaves rows of unequal length: their padding must never be attended to."""
    sizes = [(10, 2), (10, 2), (10, 2)], [(3, 9), (3, 9), (3, 9)]
    streams = [stream_parts(one, seed=seed) for seed, one in enumerate(sizes)]
    compare_with_alone(model, streams, profile((4, 5), (8, 3), (5, 5)), method, options, grad)


def compare_with_alone(model, streams, budgets, method, options, grad):
    question = [text_part(4, int(parts[-1].next_position_id[0]), seed=9) for parts in streams]
    together = new_cache(budgets, method=method, **options)
    steps = batch_parts(*streams)
    with torch.set_grad_enabled(grad):
        hidden = [*stream(model, together, steps), run(model, together, ChunkInputs.batch(question), text=True)]
        for sample, parts in enumerate(streams):
            alone = new_cache(budgets, method=method, **options)
            expected = [*stream(model, alone, parts), run(model, alone, question[sample], text=True)]
            for layer in range(3):
                assert kept(together, layer, sample) == kept(alone, layer)
            rows = [*range(len(parts)), len(steps)]
            for row, one in zip(rows, expected, strict=True):
                assert (hidden[row][sample, : one.shape[1]] - one[0]).abs().max() <= 1e-12


# ---- hooks -------------------------------------------------------------------------------------------------------


def stock_calls():
    """Arguments of a transformers decoder without our cache, as generate() and users make them."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 9, WIDTH, generator=generator, dtype=torch.float64)
    left = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    ids = torch.arange(9).expand(3, 2, -1)
    return {
        "plain": {"inputs_embeds": embeds},
        "no cache": {"inputs_embeds": embeds, "use_cache": False},
        "ids": {"input_ids": torch.arange(18).view(2, 9)},
        "left padding": {"inputs_embeds": embeds, "attention_mask": left},
        "three-row positions": {"inputs_embeds": embeds, "position_ids": ids * 3},
        "four-row positions": {"inputs_embeds": embeds, "position_ids": torch.cat((ids[:1], ids * 3))},
        "two-row positions": {"inputs_embeds": embeds, "position_ids": ids[0], "attention_mask": left},
    }


@pytest.mark.parametrize("call", stock_calls())
def test_without_a_compressed_cache_an_attached_model_is_the_transformers_model(model, call):
    stock = text_model()
    arguments = stock_calls()[call]
    assert stock.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(**arguments).last_hidden_state, stock(**arguments).last_hidden_state)


def test_with_a_dynamic_cache_an_attached_model_is_the_transformers_model(model):
    stock = text_model()
    embeds = torch.randn(2, 12, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    caches = [DynamicCache(config=stock.config), DynamicCache(config=stock.config)]
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 9), (9, 10), (10, 12)):
            ours, theirs = (
                one(inputs_embeds=embeds[:, start:stop], past_key_values=cache).last_hidden_state
                for one, cache in zip((model, stock), caches, strict=True)
            )
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)


def test_attaching_again_changes_nothing(model):
    again = text_model()
    for _ in range(3):
        attach(again)
    parts = stream_parts(SIZES)
    caches = [new_cache(), new_cache()]
    with torch.no_grad():
        for ours, theirs in zip(stream(model, caches[0], parts), stream(again, caches[1], parts), strict=True):
            assert torch.equal(ours, theirs)
    assert_same(snapshot(caches[0]), snapshot(caches[1]))


def test_attaching_works_after_the_attention_was_set_back(model):
    again = text_model()
    attach(again)
    again.set_attn_implementation("sdpa")
    attach(again)
    parts = stream_parts(SIZES)
    caches = [new_cache(), new_cache()]
    with torch.no_grad():
        for ours, theirs in zip(stream(model, caches[0], parts), stream(again, caches[1], parts), strict=True):
            assert torch.equal(ours, theirs)
    assert caches[1].get_seq_length() == caches[0].get_seq_length()


def test_attaching_works_on_a_second_model_of_the_same_configuration(model):
    second = type(model)(copy.deepcopy(model.config)).double().eval()
    second.load_state_dict(model.state_dict())
    attach(second)
    parts = stream_parts(SIZES)
    with torch.no_grad():
        for ours, theirs in zip(stream(model, new_cache(), parts), stream(second, new_cache(), parts), strict=True):
            assert torch.equal(ours, theirs)


def test_an_attached_configuration_saves_without_our_attention(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    assert "omnimem" not in (tmp_path / "config.json").read_text()


def test_a_cache_on_a_model_without_hooks_says_what_to_do():
    with pytest.raises((OmniMemError, RuntimeError), match=r"attach\(language_model\)"), torch.no_grad():
        text_model()(inputs_embeds=text_part(4, 0).embeds, past_key_values=new_cache())


def test_gradient_checkpointing_of_transformers_is_refused(model):
    """In training mode it would drop the cache from every layer without an error."""
    checkpointed = text_model()
    attach(checkpointed)
    checkpointed.gradient_checkpointing_enable()
    checkpointed.train()
    with pytest.raises(OmniMemError, match="gradient_checkpointing_enable") as error:
        run(checkpointed, new_cache(), text_part(4, 0), text=True)
    assert "\n" not in str(error.value)
    checkpointed.gradient_checkpointing_disable()
    cache = new_cache()
    run(checkpointed, cache, text_part(4, 0), text=True)
    assert cache.lengths() == [4, 4, 4]


def test_sliding_window_decoders_are_refused():
    model = text_model()
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(OmniMemError, match="sliding-window"):
        attach(model)


def test_left_out_arguments_continue_the_stream_as_text(model):
    cache, explicit = new_cache(), new_cache()
    parts = stream_parts(SIZES)
    after = int(parts[-1].next_position_id[0])
    with torch.no_grad():
        for one in (cache, explicit):
            stream(model, one, parts)
        note = text_part(4, after)
        ours = model(inputs_embeds=note.embeds, past_key_values=cache).last_hidden_state
        theirs = run(model, explicit, note, text=True)
    assert torch.equal(ours, theirs)
    assert_same(snapshot(explicit), snapshot(cache))
    assert cache.next_position_id.tolist() == [after + 4]
    assert {int(kind) for kind in cache.token_metadata(0).modality.unique()} == {TEXT, VISUAL, AUDIO}
