"""The memory: a compressed key-value cache, its attention function and attention mass."""

from omnimem.memory.attach import attach
from omnimem.memory.attention import attention_mass, attention_with_mass, lower_right_attention
from omnimem.memory.cache import CompressedCache, MemoryState
from omnimem.memory.layer import Kept
from omnimem.memory.margin import SelectionGradient
from omnimem.memory.table import PositionTable

__all__ = [
    "CompressedCache",
    "Kept",
    "MemoryState",
    "PositionTable",
    "SelectionGradient",
    "attach",
    "attention_mass",
    "attention_with_mass",
    "lower_right_attention",
]
