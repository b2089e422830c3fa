"""Shared by video-only models whose decoder uses 1-D RoPE: the LLaVA family and VideoLLaMA 3.

Position ids count up token by token. Prompts come from the chat template of the checkpoint. A prompt is tokenized as a
whole and split at the video token, because some tokenizers (Llama) add a BOS token and tokenize parts differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnimem.backbones.qwen import TransformersBackbone
from omnimem.errors import OmniMemError
from omnimem.memory import CompressedCache


class Rope1DBackbone(TransformersBackbone):
    """A backbone with 1-D position ids and the prompts of the checkpoint's chat template; parameters: `QwenBackbone`.

    Raises
    ------
    OmniMemError
        The checkpoint's chat template is missing, or does not put the video before the question.
    """

    supports_audio = False

    def __init__(self, model: Any, processor: Any, model_id: str = "") -> None:
        super().__init__(model, processor, model_id)
        # Only generate() calls this module; streams call the decoder with explicit position ids.
        inner = self.model.model
        if _shift_position_ids not in inner._forward_pre_hooks.values():
            inner.register_forward_pre_hook(_shift_position_ids, with_kwargs=True)
        if processor.chat_template is None:
            raise OmniMemError(f"{model_id}: the processor has no chat template (chat_template.jinja is missing)")
        self.prompt_prefix_ids, _ = self._split_prompt("")
        if not torch.equal(self.prompt_prefix_ids, self._split_prompt("What?")[0]):
            raise OmniMemError(f"{model_id}: the chat template does not put the video before the question")

    @property
    def temporal_patch(self) -> int:
        """1: frames are encoded independently."""
        return 1

    def text_ids(self, text: str) -> Tensor:
        """Token ids int64 ``[1, T]`` of a text, without BOS token."""
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def question_ids(self, question: str) -> Tensor:
        """Token ids of the prompt after the video, int64 ``[1, Q]``."""
        return self._split_prompt(question)[1]

    def answer_ids(self, answer: str) -> Tensor:
        """Token ids of the stripped answer, as tokenized after the prompt, and the end token, int64 ``[1, A]``."""
        prompt = self._prompt("")
        between = "" if prompt[-1].isspace() else " "
        ids = self._prompt_ids(prompt + between + answer.strip())[:, self._prompt_ids(prompt).shape[1] :]
        return torch.cat((ids, torch.tensor([[self.tokenizer.eos_token_id]])), dim=1)

    @property
    def end_token_ids(self) -> list[int]:
        """The tokenizer's own end and padding tokens."""
        return sorted({self.tokenizer.eos_token_id, self.tokenizer.pad_token_id} - {None})

    def _split_prompt(self, question: str) -> tuple[Tensor, Tensor]:
        """Token ids of the prompt before and after the video token."""
        ids = self._prompt_ids(self._prompt(question))
        video = (ids[0] == self.processor.video_token_id).nonzero()
        if len(video) == 0:
            raise OmniMemError(f"{self.model_id}: the chat template does not contain {self.processor.video_token}")
        return ids[:, : video[0]], ids[:, video[0] + 1 :]

    def _prompt(self, question: str) -> str:
        """Text of a prompt with one video."""
        content = [{"type": "video"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _prompt_ids(self, text: str) -> Tensor:
        """Token ids int64 ``[1, T]`` with the BOS token that the tokenizer adds, unless the text already has it."""
        has_bos = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not has_bos, return_tensors="pt").input_ids


def _shift_position_ids(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: add `rope_deltas` to the position ids of generate(), as models with M-RoPE do."""
    if not isinstance(kwargs.get("past_key_values"), CompressedCache) or kwargs.get("position_ids") is None:
        return None
    return args, {**kwargs, "position_ids": kwargs["position_ids"] + model.rope_deltas}
