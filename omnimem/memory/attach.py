"""Teach a stock decoder to use a `CompressedCache`: three hooks and one attention function.

transformers passes an attention function neither the cache nor the positions (transformers.md rows 1, 4, 17), so the
hooks carry them: the model announces each step to the cache, every layer shows its input, every attention
module is handed its own layer of the memory. Without a `CompressedCache` the model behaves as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from omnimem.errors import OmniMemError
from omnimem.memory.attention import ATTENTION_NAME, compressed_attention
from omnimem.memory.cache import CompressedCache
from omnimem.memory.rotary import Rotary

AttentionInterface.register(ATTENTION_NAME, compressed_attention)
# Without a mask builder of the same name transformers passes no mask to the stock path (transformers.md row 6).
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def attach(language_model: PreTrainedModel) -> None:
    """Make a decoder accept a `CompressedCache` as `past_key_values`; calling it again changes nothing.

    With such a cache the decoder's forward takes three more arguments: `modality` ``[B, T]``, `time` ``[B, T]`` and
    `next_position_id` ``[B]`` (see `CompressedCache.begin`); its 2-D `attention_mask` says which of the last T columns
    are real. Left-out `position_ids` continue the stream as text.

    Parameters
    ----------
    language_model : PreTrainedModel
        A stock decoder with `layers` of `self_attn` modules (Qwen2.5-Omni, Qwen3-VL, Qwen2 and their relatives).

    Raises
    ------
    OmniMemError
        The decoder has sliding-window layers, which hold no position for good.
    """
    if "sliding_attention" in (getattr(language_model.config, "layer_types", None) or ()):
        raise OmniMemError(
            f"{type(language_model).__name__} has sliding-window layers; a compressed cache needs full attention"
        )
    if language_model.config._attn_implementation != ATTENTION_NAME:
        language_model.set_attn_implementation(ATTENTION_NAME)
    if _announce_step in language_model._forward_pre_hooks.values():
        return
    language_model.register_forward_pre_hook(_announce_step, with_kwargs=True)
    layers: Any = language_model.layers
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_show_hidden(index), with_kwargs=True)
        layer.self_attn.register_forward_pre_hook(_hand_memory(index), with_kwargs=True)


def _announce_step(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, CompressedCache):
        return None
    if model.layers[0].gradient_checkpointing:
        raise OmniMemError(
            "gradient_checkpointing_enable() makes transformers drop the cache in training; "
            "disable it: streams are checkpointed chunk by chunk instead"
        )
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = args[0] if args else kwargs["input_ids"]
    batch, length = inputs.shape[:2]
    kwargs = dict(kwargs)
    positions = kwargs.get("position_ids")
    if positions is None:
        start = torch.zeros(batch, dtype=torch.int64) if cache.next_position_id is None else cache.next_position_id
        positions = (start[:, None] + torch.arange(length, device=start.device)).to(inputs.device).expand(3, -1, -1)
    elif positions.ndim == 2:
        positions = positions.expand(3, *positions.shape)
    # generate() sends one row for all three axes, or a fourth in front that only serves packed sequences.
    positions = positions[-3:].expand(3, batch, -1)
    rotary = Rotary(model.rotary_emb)
    cache.bind(rotary)
    mask = kwargs.get("attention_mask")
    cache.begin(
        positions,
        kwargs.pop("modality", None),
        kwargs.pop("time", None),
        None if mask is None else mask[:, -length:],
        kwargs.pop("next_position_id", None),
    )
    kwargs["position_ids"] = rotary.ids(positions)
    # A 4-D mask is passed through unread, so no [T, K] mask is built: the layers own theirs.
    kwargs["attention_mask"] = torch.empty(1, 1, 0, 0, device=inputs.device)
    return args, kwargs


def _show_hidden(index: int) -> Any:
    def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, CompressedCache):
            return None
        memory = cache.layers[index]
        given = hidden = args[0] if args else kwargs["hidden_states"]
        if index > 0 and index == cache.cut:
            # In lockstep a gradient of zero goes on, so that the layers below are differentiated all the same.
            hidden = given.detach() + (given - given.detach()) * 0 if cache.lockstep else given.detach()
        memory.observe_hidden(hidden)
        if memory.shown is not None:
            # A probe that does not propagate: every layer sees the embeddings themselves.
            hidden = memory.shown
        if hidden is given:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return hook


def _hand_memory(index: int) -> Any:
    def hook(_attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, CompressedCache):
            return None
        return args, {**kwargs, "memory": cache.layers[index]}

    return hook
