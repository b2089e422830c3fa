"""The text around a stream: ChatML as Qwen2.5-Omni was trained with it."""

from __future__ import annotations

SYSTEM_PROMPT = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
"""The system prompt of the published model card; without it the published checkpoints answer worse."""


def opening(system: str = SYSTEM_PROMPT) -> str:
    """Text before the media: system turn and the start of the user's."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


def question_turn(question: str) -> str:
    """Text after the media: the question and the start of the assistant's turn."""
    return f"{question}<|im_end|>\n<|im_start|>assistant\n"


ANSWER_END = "<|im_end|>"
"""Token that ends an answer."""
