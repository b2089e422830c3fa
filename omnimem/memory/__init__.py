"""The memory: a compressed key-value cache, its attention function and attention mass."""

from omnimem.memory.attach import attach
from omnimem.memory.attention import attention_scores, attention_with_scores, lower_right_attention
from omnimem.memory.cache import CompressedCache, MemoryState
from omnimem.memory.layer import Eviction
from omnimem.memory.margin import SelectionGradient
from omnimem.memory.table import TokenMetadata

__all__ = [
    "CompressedCache",
    "Eviction",
    "MemoryState",
    "SelectionGradient",
    "TokenMetadata",
    "attach",
    "attention_scores",
    "attention_with_scores",
    "lower_right_attention",
]
