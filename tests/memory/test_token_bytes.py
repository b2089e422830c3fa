"""Bytes of a stored token, computed from shapes, against what filled caches hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omnimem.backbones import load_backbone
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, attach
from omnimem.memory.state import BUFFERS
from omnimem.memory.token_bytes import mean_budget_within, peak_bytes, resident_bytes, token_bytes, token_bytes_of
from omnimem.selection import build_selection
from oracles import offline, profile, stream_parts, text_model
from small_decoder import new_method

BUDGETS = profile((6, 3), (2, 9), (8, 4))
SIZES = [(5, 2), (8, 4), (3, 0), (0, 6), (9, 3), (12, 12)]
LARGEST_CHUNK, TEXT = 24, 3
METHODS = [
    ("omnimem", {}),
    ("omnimem", {"redundancy": "sketch", "sketch_dim": 7}),
    ("omnimem", {"redundancy": "value"}),
    ("similarity_only", {}),
    ("attention_only", {}),
    ("novelty", {}),
    ("novelty", {"lambda": 0.1, "sketch_bits": 4, "sketch_dim": 9, "novelty": "every_chunk"}),
    ("learned", {}),
    ("learned", {"attention_term": True, "age_term": True, "sketch_bits": 4}),
    ("dms", {}),
    ("trim_kv", {}),
    ("random", {}),
    ("uniform", {"position_ids": "compact"}),
    ("streaming_llm", {}),
    ("h2o", {}),
    ("snapkv", {"position_ids": "compact"}),
    ("infinipot_v", {}),
    ("streammem", {}),
    ("hermes", {}),
]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def decoder(request) -> Any:
    model = text_model(dtype=request.param)
    attach(model)
    return model


def build(name: str, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """Heads have the dtype that training and sessions give them."""
    method = new_method(name, **options)
    for head in getattr(method, "heads", None) or ():
        head.to(torch.promote_types(dtype, torch.float32))
    return method


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize(("name", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_filled_cache_holds_the_computed_bytes(decoder, name, options, kv_dtype):
    method = build(name, options, decoder.dtype)
    cache = CompressedCache(BUDGETS, method, kv_dtype=kv_dtype)
    token = token_bytes(decoder.config, method, decoder.dtype, kv_dtype)
    flow = Stream(offline(decoder), cache)
    for number, part in enumerate(stream_parts(SIZES, prefix=TEXT, dtype=decoder.dtype)):
        flow.forward(part, text=True) if number == 0 else flow.step(part)
    for layer, budget in zip(cache.layers, BUDGETS.layers, strict=True):
        state, stored = layer.state, budget.total + TEXT
        assert len(state) == stored
        parts = {name: getattr(state, name).stored_nbytes for name in BUFFERS}
        assert parts["keys"] + parts["values"] == state.kv_nbytes == stored * token.keys_values
        assert parts["features"] == stored * token.features
        assert state.metadata is not None and state.metadata.nbytes == stored * token.metadata
        scores = state.attention_scores
        assert (0 if scores is None else scores.nbytes) == stored * token.scores
        assert state.resident_nbytes == stored * token.total <= state.nbytes
    assert cache.resident_nbytes == resident_bytes(BUDGETS, token, TEXT)
    assert sum(token.parts().values()) == token.total


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni"])
def test_position_ids_of_a_backbone_have_the_dtype_it_names(name, tmp_path):
    """Qwen3-Omni's are fractional."""
    backbone = load_backbone("tiny", backbone=name, dtype="float32", device="cpu")
    encoder = backbone.stream_encoder(video=True, audio=True, fps=2.0, duration=8.0)
    assert encoder.prefix().position_ids.dtype == backbone.position_id_dtype
    assert token_bytes_of(backbone, build_selection("random")).metadata == (26 if name == "qwen3_omni" else 38)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_backbone("tiny", dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("name", "options", "kv_dtype"),
    [("omnimem", {}, "auto"), ("omnimem", {"redundancy": "sketch"}, "int8"), ("h2o", {}, "int4")],
)
@pytest.mark.parametrize("gib", [0.0005, 0.01, 1.5])
def test_a_budget_is_the_largest_that_fits(tiny, name, options, kv_dtype, gib):
    method = build_selection(name, **options)
    token = token_bytes_of(tiny, method, kv_dtype)
    mean = mean_budget_within(gib, tiny, method, kv_dtype)
    sizes = [resident_bytes(BudgetProfile.uniform(tiny.config, mean + more), token) for more in (0, 1)]
    assert sizes[0] <= gib * 2**30 < sizes[1]


def test_a_limit_that_is_met_exactly_fits(tiny):
    method = build_selection("random")
    exact = resident_bytes(BudgetProfile.uniform(tiny.config, 77), token_bytes_of(tiny, method)) / 2**30
    assert mean_budget_within(exact, tiny, method) == 77 == mean_budget_within(exact * 1.001, tiny, method)


@pytest.mark.parametrize("least", [2, 32])
def test_too_few_bytes_are_refused_with_the_least_possible_number(tiny, least):
    method = build_selection("omnimem")
    with pytest.raises(OmniMemError, match=f"the minimum is {least} tokens: give at least") as error:
        mean_budget_within(1e-7, tiny, method, least=least)
    assert "\n" not in str(error.value)
    possible = float(str(error.value).split()[-2])
    assert least <= mean_budget_within(possible, tiny, method, least=least) <= 1.02 * least


def test_a_method_that_retains_everything_has_no_size(tiny):
    with pytest.raises(OmniMemError, match="full retains everything"):
        mean_budget_within(1.0, tiny, build_selection("full"))


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_cache_never_holds_more_than_the_computed_peak(decoder, kv_dtype):
    """It comes within a chunk of it: buffers double until they have room for the budget and a chunk."""
    method = build_selection("omnimem")
    cache = CompressedCache(BUDGETS, method, kv_dtype=kv_dtype)
    token = token_bytes(decoder.config, method, decoder.dtype, kv_dtype)
    flow = Stream(offline(decoder), cache)
    for number, part in enumerate(stream_parts([*SIZES, SIZES[-1]], prefix=TEXT, dtype=decoder.dtype)):
        flow.forward(part, text=True) if number == 0 else flow.step(part)
    peak = peak_bytes(BUDGETS, token, LARGEST_CHUNK, TEXT)
    assert 0.9 * peak <= cache.peak_nbytes <= peak
