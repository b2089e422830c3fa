"""What models without sound share whose decoder has one rotary axis: the LLaVA family and VideoLLaMA 3.

Every position takes the next id, as in a text, and the turns are what the checkpoint's own chat template writes. A
prompt is tokenised whole and cut at the video: some tokenizers (Llama's) begin every text with a token of their own and
segment a piece by itself differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnimem.backbones.qwen import QwenBackbone
from omnimem.errors import OmniMemError
from omnimem.memory import CompressedCache


class Rope1DBackbone(QwenBackbone):
    """See `QwenBackbone` for the parameters.

    Raises
    ------
    OmniMemError
        The checkpoint's chat template is missing, or does not put the video before the question.
    """

    supports_audio = False

    def __init__(self, model: Any, processor: Any, model_id: str = "") -> None:
        super().__init__(model, processor, model_id)
        # generate() goes through this module; streams bring their ids to the decoder themselves.
        whole = self.model.model
        if _shift_generated not in whole._forward_pre_hooks.values():
            whole.register_forward_pre_hook(_shift_generated, with_kwargs=True)
        if processor.chat_template is None:
            raise OmniMemError(f"{model_id}: the processor has no chat template (chat_template.jinja is missing)")
        self.opening_ids, _ = self._turns("")
        if not torch.equal(self.opening_ids, self._turns("What?")[0]):
            raise OmniMemError(f"{model_id}: the chat template does not put the video before the question")

    @property
    def temporal_patch(self) -> int:
        """Every frame by itself."""
        return 1

    def text_ids(self, text: str) -> Tensor:
        """int64 ``[1, T]``: a text by itself, without the token that begins a prompt."""
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def question_ids(self, question: str) -> Tensor:
        """What the chat template writes behind the video."""
        return self._turns(question)[1]

    def answer_ids(self, answer: str) -> Tensor:
        """The answer as it goes on from the prompt, and the token that ends it; white space around it is dropped."""
        prompt = self._prompt("")
        between = "" if prompt[-1].isspace() else " "
        ids = self._whole_ids(prompt + between + answer.strip())[:, self._whole_ids(prompt).shape[1] :]
        return torch.cat((ids, torch.tensor([[self.tokenizer.eos_token_id]])), dim=1)

    @property
    def end_token_ids(self) -> list[int]:
        """The tokenizer's own end and padding tokens."""
        return sorted({self.tokenizer.eos_token_id, self.tokenizer.pad_token_id} - {None})

    def _turns(self, question: str) -> tuple[Tensor, Tensor]:
        """Ids before and behind the video."""
        ids = self._whole_ids(self._prompt(question))
        place = (ids[0] == self.processor.video_token_id).nonzero()
        if len(place) == 0:
            raise OmniMemError(f"{self.model_id}: the chat template does not write {self.processor.video_token}")
        return ids[:, : place[0]], ids[:, place[0] + 1 :]

    def _prompt(self, question: str) -> str:
        content = [{"type": "video"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _whole_ids(self, text: str) -> Tensor:
        """int64 ``[1, T]``; begun as the tokenizer begins a prompt, unless the template has done so."""
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not begun, return_tensors="pt").input_ids


def _shift_generated(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Add the `rope_deltas` to what generate() counts: the stock classes of models with three axes do so themselves."""
    if not isinstance(kwargs.get("past_key_values"), CompressedCache) or kwargs.get("position_ids") is None:
        return None
    return args, {**kwargs, "position_ids": kwargs["position_ids"] + model.rope_deltas}
