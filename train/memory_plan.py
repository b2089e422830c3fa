"""Memory plan of a training step: bytes of each part for the longest stream, computed from shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from omnimem.backbones import Backbone
from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.memory.codec import codecs
from omnimem.recipe import Recipe
from omnimem.selection import SelectionMethod
from train.setup import add_heads, add_lora, selection_method
from train.stream_plan import StreamPlan

TRAINED_BYTES = 4 + 4 + 8
"""Bytes per trained parameter, all float32: weight, gradient, two moments of Adam."""

NF4_BYTES = 0.5 + 1 / 64 * (1 + 4 / 256)
"""Bytes per weight in NF4: half a byte, a byte of scale per block of 64, a float32 per 256 blocks."""

RETAINED_PART = "cache (all layers at budget)"
"""Name of the part whose size is fixed by the budget."""

EVICTED_PART = "evicted tokens kept for the backward pass,"
"""Start of the name of the part that grows with the stream; it is on the device only with ``train.offload=none``."""


@dataclass(frozen=True)
class StepShape:
    """Sizes of a training step.

    Attributes
    ----------
    layers, batch : int
        Decoder layers; streams per batch.
    chunk, stream : int
        Tokens of the largest chunk and of the longest stream, text between frames included.
    retained : int
        Tokens in the cache, summed over layers.
    margin : int
        Evicted tokens per layer that receive a selection gradient.
    itemsize : int
        Bytes of a number in the model's dtype.
    kv_bytes : int
        Bytes of the key and value of a token in a layer, in the model's dtype.
    stored_bytes : int
        Bytes of them as they are stored (``memory.kv_dtype``).
    feature_bytes : int
        Bytes of the hidden state that the selection method stores with them; 0 without.
    differentiable_bytes : int
        Bytes of a token in a layer that receive a gradient.
    """

    layers: int
    batch: int
    chunk: int
    stream: int
    retained: int
    margin: int
    itemsize: int
    kv_bytes: int
    stored_bytes: int
    feature_bytes: int
    differentiable_bytes: int

    @classmethod
    def of(
        cls, recipe: Recipe, backbone: Backbone, profile: BudgetProfile, method: SelectionMethod, longest: StreamPlan
    ) -> StepShape:
        """Shape of a step on the longest stream."""
        text = backbone.config.text_config
        model = ModelFingerprint.of(backbone.config)
        itemsize = backbone.model.dtype.itemsize
        kv_bytes = 2 * model.kv_heads * model.head_dim * itemsize
        stored_bytes = kv_bytes
        if recipe.memory.kv_dtype != "auto":
            stored_bytes = model.kv_heads * sum(one.nbytes for one in codecs(recipe.memory.kv_dtype, model.head_dim))
        feature_bytes = text.hidden_size * itemsize if method.stores_features else 0
        differentiable = recipe.selection.gradient != "none"
        media = longest.largest_chunk
        return cls(
            layers=text.num_hidden_layers,
            batch=recipe.train.per_device_train_batch_size,
            chunk=media + math.ceil(longest.text / max(1, longest.chunks)),
            stream=longest.tokens + longest.text,
            retained=sum(layer.total for layer in profile.layers) + text.num_hidden_layers * longest.text,
            margin=min(recipe.gate.margin or media, media) if differentiable else 0,
            itemsize=itemsize,
            kv_bytes=kv_bytes,
            stored_bytes=stored_bytes,
            feature_bytes=feature_bytes,
            differentiable_bytes=kv_bytes + (feature_bytes if differentiable else 0),
        )


def memory_plan(
    recipe: Recipe, backbone: Backbone, profile: BudgetProfile, method: SelectionMethod, streams: list[StreamPlan]
) -> dict[str, int]:
    """Bytes of each part of a training step; `backbone` has shapes only and receives its adapter here."""
    longest = max(streams, key=lambda stream: stream.tokens)
    shape = StepShape.of(recipe, backbone, profile, method, longest)
    place = {"none": "on the device", "host": "in host memory", "disk": "on disk"}[recipe.train.offload]
    return {
        "weights": weight_bytes(recipe, backbone),
        "adapter, gradients, optimizer": adapter_bytes(recipe, backbone),
        RETAINED_PART: shape.batch * shape.retained * (shape.stored_bytes + shape.feature_bytes),
        "backward: restored cache, its gradient": restored_bytes(recipe, shape, longest),
        "evicted tokens with gates (margin)": shape.batch * shape.layers * shape.margin * shape.kv_bytes,
        "activations of a chunk": activation_bytes(backbone, shape),
        "logits of an answer": shape.batch * longest.answer * backbone.config.text_config.vocab_size * 3 * 4,
        "the teacher's cache": teacher_bytes(recipe, shape),
        f"{EVICTED_PART} {place}": evicted_bytes(recipe, backbone, shape),
    }


def device_bytes(recipe: Recipe, parts: dict[str, int]) -> int:
    """Sum of the parts that are on the device."""
    return sum(size for name, size in parts.items() if EVICTED_PART not in name or recipe.train.offload == "none")


def weight_bytes(recipe: Recipe, backbone: Backbone) -> int:
    """Weights of the base model; call it before LoRA is added."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in backbone.model.parameters())
    if recipe.model.load_in_4bit:
        projections = [m.weight for m in backbone.language_model.layers.modules() if isinstance(m, nn.Linear)]
        size += round(sum(weight.numel() * (NF4_BYTES - weight.element_size()) for weight in projections))
    return size


def adapter_bytes(recipe: Recipe, backbone: Backbone) -> int:
    """Trained parameters with gradients and optimizer state; adds adapter and selection heads to the model."""
    backbone.model.requires_grad_(False)
    model = add_lora(recipe, backbone)
    add_heads(selection_method(recipe), backbone)
    return TRAINED_BYTES * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def restored_bytes(recipe: Recipe, shape: StepShape, longest: StreamPlan) -> int:
    """Cache before and after a chunk in the backward pass, and the gradients of the cache.

    Gradients are summed in at least float32. With a BPTT window there is one gradient of the cache for each question
    in the window.
    """
    tokens = shape.retained + shape.layers * shape.chunk
    gradients = min(recipe.train.bptt_window or 1, longest.questions) * max(shape.itemsize, 4) / shape.itemsize
    return round(shape.batch * tokens * (2 + gradients) * shape.differentiable_bytes)


def activation_bytes(backbone: Backbone, shape: StepShape) -> int:
    """Activations of a chunk that autograd keeps.

    Per token and layer: two normalized inputs, residuals, q, k, v, the attention output, and the three wide tensors of
    the feed-forward block.
    """
    text = backbone.config.text_config
    queries = text.num_attention_heads * ModelFingerprint.of(backbone.config).head_dim
    feed_forward = 3 * text.intermediate_size
    if experts := getattr(text, "num_experts_per_tok", 0):
        feed_forward = experts * (text.hidden_size + 3 * text.moe_intermediate_size)
    token = (5 * text.hidden_size + 3 * queries + feed_forward) * shape.itemsize + 2 * shape.kv_bytes
    return shape.batch * shape.layers * shape.chunk * token


def teacher_bytes(recipe: Recipe, shape: StepShape) -> int:
    """The full cache of the distillation teacher."""
    return shape.batch * shape.layers * shape.stream * shape.kv_bytes if recipe.distill.weight > 0 else 0


def evicted_bytes(recipe: Recipe, backbone: Backbone, shape: StepShape) -> int:
    """Evicted tokens, and the decoder's inputs unless trained encoders recompute them."""
    text = backbone.config.text_config
    evicted = max(0, shape.stream * shape.layers - shape.retained)
    deepstack_layers = len(getattr(backbone.config.vision_config, "deepstack_visual_indexes", ()))
    inputs = shape.stream * (1 + deepstack_layers) * text.hidden_size * shape.itemsize
    if recipe.lora.modules_to_save:
        inputs = 0
    return shape.batch * (evicted * (shape.stored_bytes + shape.feature_bytes) + inputs)
