"""Generate text with `generate` in a thread and yield it piece by piece; stop when the reader stops reading."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from omnimem.backbones import Backbone


def generate_text(
    backbone: Backbone, inputs: dict[str, Any], max_new_tokens: int, generation: dict[str, Any]
) -> Iterator[str]:
    """Yield the answer to a prompt while it is generated.

    Parameters
    ----------
    backbone : Backbone
    inputs : dict
        Prompt and cache, as keyword arguments of `generate`.
    max_new_tokens : int
        Longest answer in tokens.
    generation : dict
        Further arguments of `generate`; they override the defaults (greedy).
    """
    abandoned = _Abandoned()
    streamer = TextIteratorStreamer(backbone.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            defaults = {
                "do_sample": False,
                "eos_token_id": backbone.end_token_ids,
                "pad_token_id": backbone.tokenizer.pad_token_id,
                "max_new_tokens": max_new_tokens,
            }
            criteria = StoppingCriteriaList([abandoned, *generation.pop("stopping_criteria", [])])
            backbone.model.generate(
                **inputs, **{**defaults, **generation}, streamer=streamer, stopping_criteria=criteria
            )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        yield from streamer
    finally:
        abandoned.stop = True
        worker.join()
    if failure:
        raise failure[0]


class _Abandoned(StoppingCriteria):
    """Stops generation once nobody reads the text any more."""

    stop = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.stop, device=input_ids.device)
