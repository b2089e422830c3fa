"""Rivals that NVIDIA's kvpress has too score and keep what it does: recorded in `kvpress/scores.safetensors`.

`kvpress/make_scores.py` says how. Every layer's post-RoPE states go through our memory as one chunk of frame.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from clips import ROOT
from omnimem.budget import LayerBudget
from omnimem.memory import CompressedCache
from omnimem.memory.attach import compressed_attention
from omnimem.memory.layer import CompressedLayer
from omnimem.modality import VISUAL
from omnimem.selection import build_selection
from omnimem.selection.topk import keep_mask
from oracles import profile

with safe_open(ROOT / "tests" / "data" / "kvpress" / "scores.safetensors", "pt") as file:
    RECORDED = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("weights.")}  # noqa: SIM118
    METADATA = file.metadata()

PRESSES = json.loads(METADATA["presses"])
TOKENS, KEPT = int(METADATA["tokens"]), int(METADATA["n_kept"])
LAYERS = json.loads(METADATA["model_config"])["num_hidden_layers"]
WINDOW, KERNEL = PRESSES["snapkv"]["window_size"], PRESSES["snapkv"]["kernel_size"]


def prefilled(method: str, **options) -> CompressedCache:
    """A memory after the recorded prompt, before its compression."""
    cache = CompressedCache(profile(*[(KEPT, 1)] * LAYERS), build_selection(method, position_ids="original", **options))
    cache.begin(torch.arange(TOKENS).expand(3, 1, -1), torch.full((1, TOKENS), VISUAL))
    with torch.no_grad():
        for number, layer in enumerate(cache.layers):
            query, key, value = (RECORDED[f"layer{number}.{part}"] for part in ("query", "key", "value"))
            compressed_attention(torch.nn.Identity(), query, *layer.update(key, value), None, cache_layer=layer)
            layer.pad_scores()
    return cache


def ours(layer: CompressedLayer) -> Tensor:
    """Scores ``[rows, T]`` as the method gives them."""
    return layer.method.score(layer.candidates())


def recorded(layer: CompressedLayer, press: str, what: str) -> Tensor:
    return RECORDED[f"layer{layer.index}.{press}.{what}"][0]


def assert_kept(cache: CompressedCache, press: str) -> None:
    """One row a key-value head where heads keep their own; else one that is that of every head."""
    cache.compress()
    for layer in cache.layers:
        expected = recorded(layer, press, "kept")
        kept = cache.token_metadata(layer.index).index
        assert kept.expand_as(expected).tolist() == expected.tolist()
        # What stays is stored as it was.
        for stored, part in ((layer.keys, "key"), (layer.values, "value")):
            before = RECORDED[f"layer{layer.index}.{part}"][0]
            for group, columns in enumerate(expected):
                row = stored[group, 0] if len(kept) > 1 else stored[0, group]
                assert torch.equal(row, before[group, columns])


def test_the_recording_is_of_grouped_heads_and_of_a_prompt_that_does_not_fit():
    assert LAYERS > 1 and RECORDED["layer0.query"].shape[1] > RECORDED["layer0.key"].shape[1] > 1
    assert KEPT < TOKENS


def test_snapkv_scores_are_those_of_kvpress():
    """Ours sums over the window's queries, theirs is their mean; the window itself is beyond comparison in both."""
    cache = prefilled("snapkv", window_size=WINDOW, kernel_size=KERNEL)
    for layer in cache.layers:
        score, expected = ours(layer), recorded(layer, "snapkv", "score")
        assert score[:, -WINDOW:].isinf().all()
        torch.testing.assert_close(score[:, :-WINDOW] / WINDOW, expected[:, :-WINDOW], rtol=0, atol=1e-6)


def test_snapkv_keeps_what_kvpress_keeps():
    assert_kept(prefilled("snapkv", window_size=WINDOW, kernel_size=KERNEL), "snapkv")


@pytest.mark.parametrize(
    "options", [{"window_size": WINDOW - 1, "kernel_size": KERNEL}, {"window_size": WINDOW, "kernel_size": 1}], ids=str
)
def test_another_window_or_kernel_keeps_something_else(options):
    """Equality above is no accident of a prompt on which everything agrees."""
    with pytest.raises(AssertionError):
        assert_kept(prefilled("snapkv", **options), "snapkv")


def test_streaming_llm_keeps_what_kvpress_keeps():
    """Sinks that are media take places of the budget, as all sinks do there."""
    sinks = PRESSES["streaming_llm"]["n_sink"]
    cache = prefilled("streaming_llm", num_sink_tokens=sinks)
    assert_kept(cache, "streaming_llm")
    expected = [*range(sinks), *range(TOKENS - KEPT + sinks, TOKENS)]
    assert cache.token_metadata(0).index[0].tolist() == expected


def test_accumulated_attention_scores_are_the_column_sum_of_the_models_attention():
    cache = prefilled("h2o")
    for layer in cache.layers:
        assert layer.attention_scores is not None
        expected = recorded(layer, "accumulated_attention", "score")
        torch.testing.assert_close(layer.attention_scores, expected, rtol=0, atol=1e-5)
        # kvpress divides by the number of queries that see a key; H2O does not (old tokens gain).
        observed = recorded(layer, "observed_attention", "score")
        seen_by = torch.arange(TOKENS, 0, -1)
        torch.testing.assert_close(layer.attention_scores / seen_by, observed, rtol=0, atol=1e-5)


def test_the_heavy_hitters_are_the_same():
    cache = prefilled("h2o")
    for layer in cache.layers:
        assert layer.attention_scores is not None
        heaviest = keep_mask(layer.attention_scores, layer.metadata, LayerBudget(KEPT, 1))
        assert [row.nonzero()[:, 0].tolist() for row in heaviest] == recorded(
            layer, "accumulated_attention", "kept"
        ).tolist()


def test_h2o_keeps_the_recent_half_and_the_heaviest_others():
    cache = prefilled("h2o")
    cache.compress()
    for layer in cache.layers:
        for row, score in enumerate(recorded(layer, "accumulated_attention", "score").tolist()):
            recent = range(TOKENS - KEPT // 2, TOKENS)
            heaviest = sorted(range(recent.start), key=lambda k: -score[k])[: KEPT // 2]
            assert cache.token_metadata(layer.index).index[row].tolist() == [*sorted(heaviest), *recent]
