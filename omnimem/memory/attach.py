"""Make a transformers decoder use a `CompressedCache`: three hooks and one attention function.

transformers passes an attention function neither the cache nor the position ids, so hooks do: the model announces each
forward pass to the cache, every decoder layer reports its input, and every attention module gets its own layer of the
cache. Without a `CompressedCache` the model behaves as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from omnimem.errors import OmniMemError
from omnimem.memory.attention import attention_with_scores, lower_right_attention
from omnimem.memory.cache import CompressedCache
from omnimem.memory.layer import CompressedLayer
from omnimem.memory.rotary import Rotary
from omnimem.memory.scores import attention_scores, probe_attention
from omnimem.memory.selection_gradient import soft_attention_inputs

ATTENTION_NAME = "omnimem"
"""Name under which `compressed_attention` is registered with transformers."""


def compressed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cache_layer: CompressedLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function registered with transformers; a hook passes `memory`, the layer of the cache.

    With `memory` the causal mask follows from the shapes and the padding from the layer; `attention_mask` is not used,
    and the attention scores that the selection method observes are reported to the layer. Without `memory` this is
    transformers' SDPA attention.

    Parameters
    ----------
    query : Tensor
        Post-RoPE queries ``[B, H, Q, D]``.
    key, value : Tensor
        ``[B, G, K, D]``: those of the layer, the new ones at the end, or what `CompressedLayer.attention_parts` takes.

    Returns
    -------
    tuple of Tensor and None
        ``[B, Q, H, D]``; no attention weights.
    """
    if cache_layer is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **kwargs,  # pyright: ignore
        )
    assert cache_layer.step is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    valid, spec, probe = cache_layer.step.valid, cache_layer.observed_scores, cache_layer.probe
    outputs, scores, probe_scores = [], [], []
    # Dropout draws its random numbers for all heads together, as the recomputation under autograd does.
    for queries, keys, values in cache_layer.attention_parts(query, key, value, at_once=dropout > 0):
        queries, keys = soft_attention_inputs(cache_layer.state, queries, keys, scale)
        if probe is not None:
            probe_scores.append(probe_attention(queries, keys, valid, scale, probe.softmax_over))
        if spec is not None and spec.kind != "concat" and dropout == 0:
            output, found = attention_with_scores(
                queries, keys, values, valid, scale, spec.stride, spec.window, fused=not cache_layer.learns_attention
            )
            scores.append(found if spec.kind == "kv_heads" else found.mean(1))
        else:
            output = lower_right_attention(queries, keys, values, valid, scale, dropout)
            if spec is not None:
                scores.append(attention_scores(queries, keys, valid, scale, spec.kind, spec.stride, spec.window))
        if cache_layer.margin is not None and torch.is_grad_enabled():
            output = cache_layer.margin.attach_gradient(output, queries, keys, valid, scale)
        outputs.append(output)
    if probe is not None:
        cache_layer.observe_probe(_mean(probe_scores))
    if spec is not None:
        cache_layer.observe_attention(_joined(scores) if spec.kind == "kv_heads" else _mean(scores))
    return _joined(outputs).transpose(1, 2).contiguous(), None


def _joined(parts: list[Tensor]) -> Tensor:
    """The heads of all parts."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _mean(parts: list[Tensor]) -> Tensor:
    """Mean over heads; all parts have equally many."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


AttentionInterface.register(ATTENTION_NAME, compressed_attention)
# transformers builds a mask for SDPA only if a mask function is registered under the same name.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def attach(language_model: PreTrainedModel) -> None:
    """Make a decoder accept a `CompressedCache` as `past_key_values`; calling it again changes nothing.

    With such a cache the decoder's forward takes three more arguments: `modality` ``[B, T]``, `time` ``[B, T]`` and
    `next_position_id` ``[B]`` (see `CompressedCache.begin`); its 2-D `attention_mask` says which of the last T columns
    are real. Without `position_ids` the new tokens continue the stream as text.

    Parameters
    ----------
    language_model : PreTrainedModel
        A transformers decoder with `layers` of `self_attn` modules (Qwen2.5-Omni, Qwen3-VL, Qwen2, …).

    Raises
    ------
    OmniMemError
        The decoder has sliding-window layers, which drop tokens outside their window.
    """
    if "sliding_attention" in (getattr(language_model.config, "layer_types", None) or ()):
        raise OmniMemError(
            f"{type(language_model).__name__} has sliding-window layers; a compressed cache needs full attention"
        )
    if language_model.config._attn_implementation != ATTENTION_NAME:
        language_model.set_attn_implementation(ATTENTION_NAME)
    if _announce_tokens_hook in language_model._forward_pre_hooks.values():
        return
    language_model.register_forward_pre_hook(_announce_tokens_hook, with_kwargs=True)
    layers: Any = language_model.layers
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_layer_input_hook(index), with_kwargs=True)
        layer.self_attn.register_forward_pre_hook(_inject_cache_layer(index), with_kwargs=True)


def _announce_tokens_hook(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook of the decoder: tell the cache which tokens come."""
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
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        start = torch.zeros(batch, dtype=torch.int64) if cache.next_position_id is None else cache.next_position_id
        position_ids = (start[:, None] + torch.arange(length, device=start.device)).to(inputs.device).expand(3, -1, -1)
    elif position_ids.ndim == 2:
        position_ids = position_ids.expand(3, *position_ids.shape)
    # generate() sends one row for all three axes, or a fourth in front that only serves packed sequences.
    position_ids = position_ids[-3:].expand(3, batch, -1)
    rotary = Rotary(model.rotary_emb)
    cache.bind(rotary)
    mask = kwargs.get("attention_mask")
    cache.begin(
        position_ids,
        kwargs.pop("modality", None),
        kwargs.pop("time", None),
        None if mask is None else mask[:, -length:],
        kwargs.pop("next_position_id", None),
    )
    kwargs["position_ids"] = rotary.decoder_ids(position_ids)
    # transformers passes a 4-D mask through unread, so no [T, K] mask is built.
    kwargs["attention_mask"] = torch.empty(1, 1, 0, 0, device=inputs.device)
    return args, kwargs


def _layer_input_hook(index: int) -> Any:
    """Hook of a decoder layer: report its input, and replace it where the cache says so."""

    def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, CompressedCache):
            return None
        memory = cache.layers[index]
        given = hidden = args[0] if args else kwargs["hidden_states"]
        if index > 0 and index == cache.detach_below:
            # In lockstep a gradient of zero is passed on, so that the layers below are differentiated all the same.
            hidden = given.detach() + (given - given.detach()) * 0 if cache.lockstep else given.detach()
        memory.observe_hidden(hidden)
        features = None if memory.step is None else memory.step.features
        if cache.lockstep and features is not None and features.requires_grad:
            # So that weights the features depend on are gathered in the backward pass of every process alike.
            hidden = hidden + (features.sum() * 0).to(hidden.dtype)
        if memory.probe_embeds is not None:
            # A probe that does not propagate: every layer is given the embeddings themselves.
            hidden = memory.probe_embeds
        if hidden is given:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return hook


def _inject_cache_layer(index: int) -> Any:
    """Hook of an attention module: pass its layer of the cache to the attention function."""

    def hook(_attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, CompressedCache):
            return None
        return args, {**kwargs, "cache_layer": cache.layers[index]}

    return hook
