"""The compressed cache, the attention function that reads it, and the gradient of its selection. See README.md."""

from omnimem.memory.attach import attach
from omnimem.memory.attention import attention_with_scores, lower_right_attention
from omnimem.memory.cache import CacheSnapshot, CompressedCache
from omnimem.memory.eviction import Eviction
from omnimem.memory.scores import attention_scores
from omnimem.memory.selection_gradient import SelectionGradient

__all__ = [
    "CacheSnapshot",
    "CompressedCache",
    "Eviction",
    "SelectionGradient",
    "attach",
    "attention_scores",
    "attention_with_scores",
    "lower_right_attention",
]
