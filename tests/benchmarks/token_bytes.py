"""Bytes per stored token and layer of a selection method, measured in a filled cache of the 7B shape."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from transformers import Qwen2_5OmniTextConfig, Qwen2_5OmniThinkerTextModel

from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.memory import CompressedCache, attach
from omnimem.modality import AUDIO, VISUAL
from omnimem.selection import build_selection

HIDDEN_SIZE, HEADS, KV_HEADS = 3584, 28, 4
"""Of Qwen2.5-Omni-7B: 4 key-value heads of 128 channels, 2048 bytes of keys and values per token in bfloat16."""

CHUNK = torch.tensor([[VISUAL] * 18 + [AUDIO] * 6])


def bytes_per_token(method: str, options: dict[str, Any]) -> float:
    """Bytes of keys, values, features, metadata and scores per retained token in one layer."""
    return _measured(method, json.dumps(options, sort_keys=True))


@cache
def _measured(name: str, options: str) -> float:
    method = build_selection(name, **json.loads(options))
    if hasattr(method, "new_heads"):
        method.new_heads(1, HIDDEN_SIZE)  # pyright: ignore[reportAttributeAccessIssue]
    memory = CompressedCache(BudgetProfile((LayerBudget(9, 4),)), method)
    with torch.no_grad():
        _decoder()(
            inputs_embeds=torch.randn(1, CHUNK.shape[1], HIDDEN_SIZE, dtype=torch.bfloat16),
            past_key_values=memory,
            modality=CHUNK,
        )
        memory.compress()  # without autograd, features are encoded as at inference
    state = memory.layers[0].state
    stored = sum(buffer.stored_nbytes for buffer in (state.keys, state.values, state.features))
    stored += sum(part.nbytes for part in (state.metadata, state.attention_scores) if part is not None)
    return stored / len(state)


@cache
def _decoder() -> Qwen2_5OmniThinkerTextModel:
    """One layer of the 7B shape with a small MLP, which the cache does not see."""
    config = Qwen2_5OmniTextConfig(
        vocab_size=8,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    )
    decoder = Qwen2_5OmniThinkerTextModel(config).bfloat16().eval()
    attach(decoder)
    return decoder
