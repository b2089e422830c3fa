"""Bytes per stored token and layer at the shape of a 7B model, which is what a user of the method pays."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2_5OmniTextConfig

from omnimem.memory.token_bytes import token_bytes
from omnimem.selection import build_selection

CONFIG = Qwen2_5OmniTextConfig(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4)
"""Of Qwen2.5-Omni-7B: 4 key-value heads of 128 channels, 2048 bytes of keys and values per token in bfloat16."""


def bytes_per_token(method: str, options: dict[str, Any]) -> int:
    """Bytes of keys, values, features, metadata and scores per retained token in one layer."""
    return token_bytes(CONFIG, build_selection(method, **options), torch.bfloat16).total
