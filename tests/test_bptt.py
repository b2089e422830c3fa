"""The way back through a stream, step after step undone, gives the gradient of plain autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

import omnimem.memory.layer
import omnimem.memory.selection_gradient
from omnimem.backbones import ChunkInputs
from omnimem.bptt import ChunkwiseBPTT, Truncation
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, SelectionGradient, attach
from omnimem.memory.offload_store import DiskStore, HostStore, Store
from omnimem.selection import build_selection
from oracles import held, offline, profile, run, same, stream_parts, text_model, text_part
from small_decoder import BUDGETS, answer, answer_loss, head_weights, lora_weights, model, new_method, streams  # noqa: F401

ASKED = (1, 3, 3, 4)
"""Steps (the first one is text) after which a question is asked."""

SETTINGS = [
    ("omnimem", {}, None),
    ("omnimem", {}, SelectionGradient()),
    ("similarity_only", {}, SelectionGradient(margin=2, threshold="bisection")),
    ("omnimem", {"lambda": 1.0}, SelectionGradient(margin=1, through_attention=True)),
    ("omnimem", {"lambda": 1.0, "query_stride": 1, "accumulation": "mean"}, SelectionGradient(through_attention=True)),
    ("omnimem", {"variant": "release"}, SelectionGradient(temperature=1.0)),
    ("omnimem", {}, SelectionGradient("soft")),
    ("omnimem", {"lambda": 1.0}, SelectionGradient("soft", margin=2, threshold="bisection", through_attention=True)),
    ("omnimem", {"redundancy": "sketch", "sketch_dim": 24}, SelectionGradient()),
    ("similarity_only", {"redundancy": "value"}, SelectionGradient()),
    ("omnimem", {"redundancy": "key", "neighbours": "modality"}, SelectionGradient(margin=2)),
    ("learned", {}, SelectionGradient()),
    ("learned", {"head_hidden_size": 6, "sketch_bits": 4}, SelectionGradient("soft")),
    (
        "learned",
        {"attention_term": True, "age_term": True, "novelty": "every_chunk"},
        SelectionGradient(through_attention=True),
    ),
    ("omnimem", {"position_ids": "compact"}, None),
    ("full", {}, None),
    ("random", {}, None),
    ("h2o", {"position_ids": "compact"}, None),
    ("streaming_llm", {}, None),
    ("snapkv", {}, None),
    ("streammem", {}, None),
    ("streammem", {"position_ids": "compact"}, None),
    ("infinipot_v", {}, None),
    ("hermes", {}, None),
    ("hermes", {"position_ids": "original"}, None),
]


def cache_of(method: str, options: dict[str, Any], gradient: SelectionGradient | None = None) -> CompressedCache:
    return CompressedCache(BUDGETS, new_method(method, **options), gradient)


def parts_of(samples: int) -> list[ChunkInputs]:
    """Inputs whose gradient is looked at as well."""
    return [replace(part, embeds=part.embeds.clone().requires_grad_()) for part in streams(samples)]


def plain(model, cache, parts, asked=ASKED, cut=()) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients by autograd through everything; the memory before the steps `cut` is a constant."""
    flow = Stream(offline(model), cache)
    losses = []
    for number, part in enumerate(parts):
        if number in cut:
            cache.differentiable_state = {key: tensor.detach() for key, tensor in cache.differentiable_state.items()}
        if number == 0:
            flow.forward(part, text=True)
        else:
            flow.step(part)
        losses += [answer_loss(answer(model, cache, seed=50 + number)) for _ in range(asked.count(number))]
    loss = torch.stack(losses).sum()
    return loss.detach(), gradients_of(model, cache, parts, lambda: loss.backward())


def taped(model, tape: ChunkwiseBPTT, parts, asked=ASKED, weight: float = 1.0) -> tuple[Tensor, list[Tensor | None]]:
    values = []
    for number, part in enumerate(parts):
        if number == 0:
            tape.forward(part)
        else:
            tape.step(part)
        for _ in range(asked.count(number)):
            values += tape.add_loss(lambda n=number: (answer_loss(answer(model, tape.cache, seed=50 + n)),))
    return torch.stack(values).sum(), gradients_of(model, tape.cache, parts, lambda: tape.backward(weight))


def gradients_of(model, cache, parts, backward) -> list[Tensor | None]:
    leaves = [*lora_weights(model), *head_weights(cache.method), *(part.embeds for part in parts)]
    for leaf in leaves:
        leaf.grad = None
    backward()
    return [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]


def assert_equal(ours: list[Tensor | None], theirs: list[Tensor | None], limit: float = 1e-10) -> None:
    scale = max(1.0, *(float(one.abs().max()) for one in theirs if one is not None))
    for one, other in zip(ours, theirs, strict=True):
        one, other = (torch.zeros(()) if x is None else x for x in (one, other))
        assert (one - other).abs().max() <= limit * scale


def new_tape(model, cache, **options: Any) -> ChunkwiseBPTT:
    return ChunkwiseBPTT(Stream(offline(model), cache), **options)


# ---- the same gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(("method", "options", "gradient"), SETTINGS)
def test_the_backward_pass_gives_the_gradient_of_plain_autograd(model, samples, method, options, gradient):
    """With respect to every weight and every input, through evictions, merges, margins and re-numbered ids."""
    parts = parts_of(samples)
    loss, expected = plain(model, cache_of(method, options, gradient), parts)
    value, found = taped(model, new_tape(model, cache_of(method, options, gradient)), parts)
    assert abs(value - loss) <= 1e-12 * abs(loss)
    assert all(one is not None and one.abs().max() > 0 for one in expected)
    assert_equal(found, expected)


@pytest.mark.parametrize("method", ["omnimem", "streammem"])
def test_losses_of_the_forward_pass_are_those_of_inference(model, method):
    parts = parts_of(2)
    tape, cache = new_tape(model, cache_of(method, {}, None)), cache_of(method, {})
    flow = Stream(offline(model), cache)
    with torch.no_grad():
        tape.forward(parts[0])
        flow.forward(parts[0], text=True)
        for part in parts[1:]:
            tape.step(part)
            flow.step(part)
            assert same(held(tape.cache), held(cache))
            (value,) = tape.add_loss(lambda: (answer_loss(answer(model, tape.cache)),))
            assert torch.equal(value, answer_loss(answer(model, cache)))
            assert same(held(tape.cache), held(cache))


def test_the_weight_scales_the_gradient_and_gradients_add_up(model):
    parts = parts_of(1)
    _, once = taped(model, new_tape(model, cache_of("omnimem", {}, SelectionGradient())), parts)
    _, scaled = taped(model, new_tape(model, cache_of("omnimem", {}, SelectionGradient())), parts, weight=0.25)
    assert_equal([4 * one for one in scaled if one is not None], [one for one in once if one is not None], 1e-12)


def test_a_stream_nobody_asks_about_has_no_gradient(model):
    parts = parts_of(1)
    tape = new_tape(model, cache_of("omnimem", {}))
    tape.forward(parts[0])
    tape.step(parts[1])
    assert gradients_of(model, tape.cache, parts, tape.backward) == [None] * (len(lora_weights(model)) + len(parts))


def test_dropout_is_the_same_in_the_recomputation(model):
    layers = [module for module in model.modules() if hasattr(module, "lora_dropout")]
    for layer in layers:
        layer.lora_dropout["default"] = torch.nn.Dropout(0.3)
    model.train()
    try:
        parts = parts_of(1)
        torch.manual_seed(5)
        loss, expected = plain(model, cache_of("omnimem", {}), parts)
        torch.manual_seed(5)
        tape = new_tape(model, cache_of("omnimem", {}))
        value, found = taped(model, tape, parts)
        assert torch.equal(value, loss) or abs(value - loss) <= 1e-12 * loss
        assert_equal(found, expected)
        after = torch.rand(1)
        torch.manual_seed(5)
        plain(model, cache_of("omnimem", {}), parts)
        assert torch.equal(torch.rand(1), after), "the way back draws nothing of its own"
        assert abs(taped(model, new_tape(model, cache_of("omnimem", {})), parts)[0] - value) > 1e-6
    finally:
        for layer in layers:
            layer.lora_dropout["default"] = torch.nn.Identity()
        model.eval()


def test_random_states_are_those_of_the_device_of_the_model(model, monkeypatch):
    """Which need not be the current one; the random states of a GPU stand for themselves here."""
    read, written = [], []

    def get_rng_state(device: Any = "cuda") -> Tensor:
        read.append(torch.device(device))
        return torch.tensor([len(read)])

    def set_rng_state(state: Tensor, device: Any = "cuda") -> None:
        written.append((torch.device(device), int(state)))

    monkeypatch.setattr(torch.cuda, "get_rng_state", get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_rng_state)
    parts, device = streams(1), torch.device("cuda:1")
    tape = new_tape(model, cache_of("omnimem", {}))
    tape.stream.backbone.device = device  # pyright: ignore[reportAttributeAccessIssue]
    tape.forward(parts[0])
    tape.step(parts[1])
    tape.add_loss(lambda: (answer_loss(answer(model, tape.cache)),))
    tape.backward()
    # The question's, those of the two steps, and at the end the one from before `backward`.
    assert written == [(device, 3), (device, 2), (device, 1), (device, 4)]
    assert read == [device] * 4


@pytest.mark.parametrize("samples", [1, 2])
def test_evictions_are_replayed_and_never_selected_again(model, monkeypatch, samples):
    """Scores and gates may come out differently the second time (rounding); who stays and who is watched may not."""
    gradient, parts = SelectionGradient(margin=2), parts_of(samples)
    _, expected = plain(model, cache_of("omnimem", {}, gradient), parts)
    tape, exact, called = (
        new_tape(model, cache_of("omnimem", {}, gradient)),
        omnimem.memory.selection_gradient.gates,
        [],
    )

    def shaken(*args: Any) -> Tensor:
        """Other values in another order, with the gradient of the right ones."""
        called.append(exact(*args))
        return called[-1] + (1 - 2 * called[-1].detach()) * (called[-1].detach() > 0)

    def never(*_: Any) -> None:
        raise AssertionError("decided again")

    back = tape.backward

    def backward(weight: float) -> None:
        monkeypatch.setattr(omnimem.memory.selection_gradient, "gates", shaken)
        monkeypatch.setattr(omnimem.memory.layer.CompressedLayer, "select", never)
        back(weight)

    monkeypatch.setattr(tape, "backward", backward)
    _, found = taped(model, tape, parts)
    assert_equal(found, expected)
    assert len(called) > 12, "gates were computed again"


# ---- undoing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(("method", "options", "gradient"), SETTINGS)
def test_a_step_is_undone_to_the_bit(model, samples, method, options, gradient):
    cache, parts = cache_of(method, options, gradient), streams(samples)
    flow = Stream(offline(model), cache)
    flow.forward(parts[0], text=True)
    seen = []
    for part in parts[1:]:
        seen.append((cache.snapshot().without_tokens, real_states(cache), flow.step(part, log_evicted=True)))
    for before, states, decided in reversed(seen):
        cache.undo(before, decided)
        assert same(real_states(cache), states)
    # And the stream goes on from there as if nothing had been.
    flow.step(parts[1])
    other = cache_of(method, options, gradient)
    fresh = Stream(offline(model), other)
    fresh.forward(parts[0], text=True)
    fresh.step(parts[1])
    assert same(held(cache), held(other))


def real_states(cache: CompressedCache) -> list[Tensor]:
    """Copies of what is stored of real tokens."""
    found = []
    for layer in cache.layers:
        valid = layer.metadata.valid
        found += [layer.keys.transpose(1, 2)[valid], layer.values.transpose(1, 2)[valid]]
        found += [] if layer.features is None else [layer.features[valid]]
        found += [] if layer.margin is None else [*layer.margin[:3]]
    return [one.clone() for one in found]


# ---- in lower precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "questions"), [(2, 60), (60, 1)])
def test_many_small_gradients_do_not_vanish_beside_a_large_one_in_bfloat16(chunks, questions):
    """One question of weight 8 at the end and 60 that weigh 1 together, all at the end or one after every chunk.

    Gradients are linear in the weights, so those of the small questions can be measured with the large one and without.
    Summed in bfloat16 they differed by 9 % and 21 %.
    """
    decoder: Any = text_model(layers=1, dtype=torch.bfloat16).requires_grad_(False)
    attach(decoder)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    decoder = inject_adapter_in_model(config, decoder)
    weights = lora_weights(decoder)
    for weight in weights:
        weight.data = weight.data.float()  # as PeftModel has it
    prefix, *rest = stream_parts([(4, 2)] * chunks, dtype=torch.bfloat16)

    def gradient(small: float, large: float) -> Tensor:
        cache = CompressedCache(profile((4, 2)), build_selection("streaming_llm"))
        tape = new_tape(decoder, cache)

        def ask(seed: int, factor: float) -> None:
            def loss() -> tuple[Tensor]:
                text = text_part(4, int(cache.next_position_id[0]), seed, torch.bfloat16)
                with cache.scratch():
                    return (factor * answer_loss(run(decoder, cache, text, text=True).double()),)

            tape.add_loss(loss)

        tape.forward(prefix)
        for number, part in enumerate(rest, start=1):
            tape.step(part)
            for _ in range(questions if questions == 1 or number == chunks else 0):
                ask(8, small)
        ask(7, large)
        found = gradients_of(decoder, tape.cache, [], tape.backward)
        return torch.cat([one.flatten() for one in found if one is not None])

    alone, beside = gradient(1 / 60, 0.0), gradient(1 / 60, 8.0) - gradient(0.0, 8.0)
    assert (beside - alone).norm() <= 0.02 * alone.norm()


# ---- where records wait ----------------------------------------------------------------------------------------------


def test_records_on_disk_give_the_same_bits_and_are_gone_afterwards(model, tmp_path):
    gradient = SelectionGradient(margin=2)
    parts = streams(2)
    results, written = [], 0
    for store in (None, DiskStore(tmp_path)):
        tape = new_tape(model, cache_of("omnimem", {}, gradient), store=store)
        weights = lora_weights(model)
        for weight in weights:
            weight.grad = None
        tape.forward(parts[0])
        for part in parts[1:]:
            tape.step(part)
        tape.add_loss(lambda tape=tape: (answer_loss(answer(model, tape.cache)),))
        written = max(written, len(list(tmp_path.iterdir())))
        tape.backward()
        results.append([weight.grad.clone() for weight in weights])
    assert all(map(torch.equal, results[0], results[1]))
    assert written == len(parts) and not list(tmp_path.iterdir())


def test_the_record_of_a_step_does_not_grow_with_the_stream(model):
    """Each state is stored once: a record holds evicted tokens, not the cache."""
    sizes = []

    class Weighed(Store):
        def put(self, record):
            gone = [one.log for one in record.evictions if one is not None]
            sizes.append(sum(tensor.nbytes for columns in gone for tensor in columns[:2]))
            return super().put(record)

    cache = cache_of("omnimem", {})
    tape = new_tape(model, cache, store=Weighed())
    parts = streams(1)
    tape.forward(parts[0])
    for part in parts[1:] * 3:
        tape.step(part)
    held_at_once = cache.kv_nbytes
    # Steps of at most ten tokens: a step never evicts more tokens than it appends.
    assert len(sizes) == 13 and max(sizes[2:]) < held_at_once
    streamed = sum(len(part) for part in parts[1:] * 3) + len(parts[0])
    assert sum(sizes) + held_at_once <= streamed * 3 * 2 * 2 * 8 * 8


@pytest.mark.parametrize(
    ("gradient", "exactly"), [(None, False), (SelectionGradient(), True), (SelectionGradient(margin=2), False)]
)
def test_a_token_is_stored_once_whatever_still_uses_it(model, gradient, exactly):
    """In the cache, the margin or one record; tokens evicted on arrival and outside the margin are nowhere."""
    stored = [0, 0, 0]

    class Counted(Store):
        def put(self, record):
            for i, ((state, _), eviction) in enumerate(zip(record.before.layers, record.evictions, strict=True)):
                gone = () if eviction is None else eviction.log[:2]
                margin = () if state.margin is None else state.margin[:2]
                stored[i] += sum(tensor.shape[2] for tensor in (*gone, *margin))
            return super().put(record)

    cache = cache_of("omnimem", {}, gradient)
    tape = new_tape(model, cache, store=Counted())
    parts = streams(1)
    tape.forward(parts[0])
    for part in parts[1:] * 3:
        tape.step(part)
    streamed = 2 * (len(parts[0]) + 3 * sum(map(len, parts[1:])))
    for layer, count in zip(cache.layers, stored, strict=True):
        held_now = 2 * len(layer.metadata) + (0 if layer.margin is None else 2 * layer.margin.keys.shape[2])
        assert count > 0 and (count + held_now == streamed if exactly else count + held_now < streamed)


def test_a_record_comes_back_as_it_was(tmp_path):
    """Whatever is nested in it, of whatever type and shape, views and empty tensors included."""
    wide = torch.randn(6, 10)
    record = {
        "views": (wide[:, 2:5], wide.T, wide[0].expand(3, 10)),
        "types": [
            torch.tensor([True, False, True]),
            torch.arange(5, dtype=torch.int8),
            torch.tensor(3),
            wide.bfloat16(),
        ],
        "empty": torch.zeros(2, 0, 3),
        "other": (None, "text", 7, ChunkInputs.text(torch.randn(1, 2, 4), 5)),
        "nan": torch.tensor([torch.nan, torch.inf]),
    }
    store = DiskStore(tmp_path)
    found = store.fetch(store.put(record))

    def pairs(one: Any, other: Any):
        assert type(one) is type(other)
        if isinstance(one, Tensor):
            yield one, other
        elif isinstance(one, dict):
            for key in one:
                yield from pairs(one[key], other[key])
        elif isinstance(one, (list, tuple)):
            for a, b in zip(one, other, strict=True):
                yield from pairs(a, b)
        elif isinstance(one, ChunkInputs):
            yield from pairs(vars(one), vars(other))
        else:
            assert one == other

    compared = list(pairs(record, found))
    assert len(compared) == 14
    for one, other in compared:
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.nan_to_num(9) if one.is_floating_point() else one,
                           other.nan_to_num(9) if other.is_floating_point() else other)  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_host_memory_returns_what_was_offloaded():
    device = torch.device("cuda")
    store = HostStore(device)
    records = [{"a": torch.randn(1000, 100, device=device), "b": (torch.arange(5), i)} for i in range(20)]
    copies = [record["a"].clone() for record in records]
    handles = [store.put(record) for record in records]
    del records
    junk = [torch.full((1000, 100), 7.0, device=device) for _ in range(40)]
    for number in reversed(range(20)):
        if number:
            store.prefetch(handles[number - 1])
        found = store.fetch(handles[number])
        assert torch.equal(found["a"], copies[number]) and found["b"][1] == number
    assert len(junk) == 40


# ---- where gradients end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("gradient", [None, SelectionGradient()])
@pytest.mark.parametrize("window", [2, *(pytest.param(window, marks=pytest.mark.long) for window in (1, 3))])
@pytest.mark.parametrize("asked", [(1, 4), (1, 2, 3, 4, 4)])
def test_a_window_limits_the_gradient_of_each_question_by_itself(model, samples, gradient, window, asked):
    """The reference backpropagates every question alone, with the memory before its window detached."""
    parts = parts_of(samples)
    expected: list[Any] = [0.0] * (len(lora_weights(model)) + len(parts))
    for question in asked:
        _, alone = plain(model, cache_of("omnimem", {}, gradient), parts, (question,), cut=(question + 1 - window,))
        expected = [total if one is None else total + one for total, one in zip(expected, alone, strict=True)]
    tape = new_tape(model, cache_of("omnimem", {}, gradient), truncation=Truncation(window=window))
    _, found = taped(model, tape, parts, asked)
    assert_equal(found, [torch.as_tensor(one) for one in expected])


def test_chunks_out_of_reach_are_not_recomputed(model):
    calls: list[Any] = []
    truncation = Truncation(window=2)
    tape = new_tape(model, cache_of("omnimem", {}), truncation=truncation, call=lambda f: calls.append(f) or f())
    taped(model, tape, parts_of(1), asked=(4,))
    assert len(calls) == 5 + 1 + (1 + 2), "five steps and a question forwards, the question and two steps backwards"


@pytest.mark.parametrize(("window", "recomputed"), [(None, 5), (1, 5), (2, 1 + 2 + 2 + 2 + 1), (3, 1 + 2 + 3 + 2 + 1)])
def test_a_step_is_recomputed_once_for_every_place_where_gradients_end(model, window, recomputed):
    """Questions after all five steps. Gradients that end at the same step share a pass, as all do at the first."""
    calls: list[Any] = []
    truncation = Truncation(window=window)
    tape = new_tape(model, cache_of("omnimem", {}), truncation=truncation, call=lambda f: calls.append(f) or f())
    taped(model, tape, parts_of(1), asked=(0, 1, 2, 3, 4))
    assert len(calls) == 5 + 5 + (5 + recomputed)


@pytest.mark.parametrize("gradient", [None, SelectionGradient()])
@pytest.mark.parametrize(("from_layer", "to_layer"), [(1, None), (2, None), (0, 1), (0, 2), (1, 2)])
def test_layers_outside_the_cut_learn_from_the_last_chunk_alone(model, from_layer, to_layer, gradient):
    parts = parts_of(1)
    truncation = Truncation(detach_below_layer=from_layer, detach_from_layer=to_layer)
    tape = new_tape(model, cache_of("omnimem", {}, gradient), truncation=truncation)
    _, found = taped(model, tape, parts, asked=(4,))
    # The oracle: earlier chunks by themselves, their memory handed on by those layers alone.
    expected = cut_by_hand(model, parts, from_layer, 3 if to_layer is None else to_layer, gradient)
    assert_equal(found, expected)


def cut_by_hand(model, parts, start: int, stop: int, gradient) -> list[Tensor | None]:
    """As the paper: below `start` nothing but the last chunk has a gradient, and none flows down into it from above."""
    cache = cache_of("omnimem", {}, gradient)
    flow = Stream(offline(model), cache)

    def detached(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        return ((hidden.detach(), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden.detach()})

    def run_all() -> None:
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            handles = []
            if start > 0 and not last:
                handles.append(model.layers[start].register_forward_pre_hook(detached, with_kwargs=True, prepend=True))
            if number == 0:
                flow.forward(part, text=True)
            else:
                flow.step(part)
            for handle in handles:
                handle.remove()
            if not last:
                cache.differentiable_state = {
                    k: t if start <= k[0] < stop else t.detach() for k, t in cache.differentiable_state.items()
                }
        answer_loss(answer(model, cache, seed=50 + len(parts) - 1)).backward()

    return gradients_of(model, cache, parts, run_all)


# ---- in step with other processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 2, 3])
def test_in_lockstep_processes_make_the_same_passes_and_idle_ones_add_nothing(model, window):
    """One process takes four chunks in and is asked after each; the other has two chunks, and one question."""
    parts = parts_of(1)
    pending: list[bool] = []

    def tape_of(any_process):
        calls, backs = [], []

        def backward(total: Tensor) -> None:
            backs.append(len(calls))
            total.backward()

        options = {"call": lambda f: calls.append(f) or f(), "backward": backward, "lockstep": True}
        truncation = Truncation(window=window)
        return new_tape(model, cache_of("omnimem", {}), truncation=truncation, any_process=any_process, **options), (
            calls, backs,
        )  # fmt: skip

    def ask(tape: ChunkwiseBPTT, number: int) -> None:
        tape.add_loss(lambda: (answer_loss(answer(model, tape.cache, seed=50 + number)),))

    longer, passes_of_longer = tape_of(lambda here: pending.append(here) or here)
    longer.forward(parts[0])
    for number, part in enumerate(parts[1:], start=1):
        longer.step(part)
        ask(longer, number)
    gradients_of(model, longer.cache, parts, longer.backward)

    answers = iter(pending)
    shorter, passes_of_shorter = tape_of(lambda here: (next(answers), here)[0])
    shorter.forward(parts[0])
    shorter.step(parts[1])
    shorter.empty_pass(parts[0], matches_step=False)
    shorter.step(parts[2])
    ask(shorter, 2)
    for _ in range(2):
        before = held(shorter.cache)
        shorter.empty_pass(parts[0], matches_step=True)
        shorter.empty_pass(parts[0], matches_step=False)
        assert same(before, held(shorter.cache))
    found = gradients_of(model, shorter.cache, parts, shorter.backward)
    assert passes_of_shorter[1] == passes_of_longer[1] and next(answers, None) is None
    assert len(passes_of_shorter[0]) == len(passes_of_longer[0])
    cut = () if window is None else (3 - window,)
    assert_equal(found, plain(model, cache_of("omnimem", {}), parts, (2,), cut)[1])
