"""Positions made of others are weighted means: of values, and of keys without their rotation, turned to a new id."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from omnimem.memory import CompressedCache, Eviction, attach
from omnimem.modality import VISUAL
from omnimem.selection import build_selection
from omnimem.selection.base import MergedTokens
from omnimem.token_metadata import TokenMetadata
from oracles import batch_parts, profile, stream, stream_parts, text_model

SIZES = [(5, 2), (8, 4), (9, 3), (7, 5)]
OTHER_SIZES = [(2, 6), (4, 4), (9, 1)]


def turned(states: Tensor, ids: list[list[int]], sign: int) -> Tensor:
    """M-RoPE of states ``[G, N, 8]`` (sign 1) or its undoing (-1): pairs turn with time, time, height, width."""
    result = states.clone()
    for column, place in enumerate(ids):
        for pair, axis in enumerate((0, 0, 1, 2)):
            angle = torch.tensor(sign * place[axis] * 1e4 ** (-pair / 4), dtype=torch.float64)
            a, b = states[:, column, pair], states[:, column, pair + 4]
            result[:, column, pair] = a * angle.cos() - b * angle.sin()
            result[:, column, pair + 4] = b * angle.cos() + a * angle.sin()
    return result


@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "functional"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", ["streammem", "hermes", "hermes_released"])
def test_merged_states_are_means_without_rotation(method, positions, samples, grad):
    """Every merge of a stream against sums written out here."""
    model = text_model()
    attach(model)
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)][:samples]
    cache: Any = CompressedCache(profile((6, 3), (2, 9), (8, 30)), build_selection(method, position_ids=positions))
    checked = 0
    for layer in cache.layers:
        apply = layer.apply

        def checking(kept: Eviction | None, score=None, log_evicted=False, layer=layer, apply=apply) -> Eviction | None:
            nonlocal checked
            keys, values = layer.rotated_keys().detach().clone(), layer.values.detach().clone()
            ids, stayed = layer.metadata.position_ids, 0 if kept is None else kept.columns.shape[1]
            applied = apply(kept, score, log_evicted)
            if kept is None or kept.merged is None:
                return applied
            merged = kept.merged
            for row in range(len(merged.into)):
                raw = turned(keys[row], ids[row].tolist(), -1)
                for slot in merged.metadata.valid[row].nonzero()[:, 0].tolist():
                    parts = [(k, float(w)) for k, w in enumerate(merged.weight[row]) if merged.into[row, k] == slot]
                    assert sum(weight for _, weight in parts) == pytest.approx(1)
                    key = sum(weight * raw[:, k : k + 1] for k, weight in parts)
                    value = sum(weight * values[row, :, k] for k, weight in parts)
                    assert isinstance(key, Tensor)
                    # The memory's own angles are float32.
                    key = turned(key, [merged.metadata.position_ids[row, slot].tolist()], 1)[:, 0]
                    assert (layer.rotated_keys()[row, :, stayed + slot] - key).abs().max() <= 2e-5
                    assert (layer.values[row, :, stayed + slot] - value).abs().max() <= 1e-12
                    checked += 1
            return applied

        layer.apply = checking
    with torch.set_grad_enabled(grad):
        stream(model, cache, batch_parts(*rows) if samples == 2 else rows[0])
    assert checked >= 3


def test_slots_that_no_row_fills_are_left_out():
    """Four slots for two rows, of which nobody fills the first and the third; then none is filled at all."""
    into = torch.tensor([[1, -1, 3, 3], [3, 3, -1, -1]])
    valid = torch.tensor([[False, True, False, True], [False, False, False, True]])
    facts = torch.arange(8).view(2, 4)
    kinds = torch.full((2, 4), VISUAL, dtype=torch.int8)
    table = TokenMetadata(-1 - facts, facts[..., None].expand(-1, -1, 3), facts.float(), kinds, valid)
    weight = torch.tensor([[1.0, 0, 0.5, 0.5], [0.25, 0.75, 0, 0]])
    kept = Eviction.from_mask(torch.tensor([[True, False], [True, True]]), MergedTokens(into, weight, table))
    assert kept.merged is not None
    assert kept.merged.into.tolist() == [[0, -1, 1, 1], [1, 1, -1, -1]]
    assert torch.equal(kept.merged.weight, weight)
    assert kept.merged.metadata.index.tolist() == [[-2, -4], [-6, -8]]
    assert kept.merged.metadata.valid.tolist() == [[True, True], [False, True]]
    empty = TokenMetadata(table.index, table.position_ids, table.time, table.modality, torch.zeros_like(valid))
    assert (
        Eviction.from_mask(
            torch.ones(2, 2, dtype=torch.bool), MergedTokens(torch.full_like(into, -1), weight, empty)
        ).merged
        is None
    )
