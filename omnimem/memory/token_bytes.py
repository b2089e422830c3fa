"""Bytes of a stored token, from shapes alone, and the budgets that a number of GiB holds.

    mean = mean_budget_within(1.5, backbone, method, "int8")     # tokens per layer that fit into 1.5 GiB
    token = token_bytes_of(backbone, method, "int8")              # bytes of one of them, part by part

The sizes equal what a filled `CompressedCache` reports as `resident_nbytes`: a layer with n stored tokens of one stream
takes ``n * token.total`` bytes. While a chunk runs, a cache holds the tokens of that chunk in addition (`peak_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from typing import Any

import torch

from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.budget.allocation import least_mean, rescale, with_mean
from omnimem.budget.profile import LARGEST_BUDGET
from omnimem.errors import OmniMemError
from omnimem.memory.codec import KvDtype, codecs
from omnimem.selection.base import SelectionMethod, compute_dtype
from omnimem.token_metadata import TokenMetadata

GIB = 2**30


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of one stored token of one stream in one layer.

    Attributes
    ----------
    keys_values : int
        Key and value of all heads, as they are stored.
    features : int
        What the selection method stores of the hidden states.
    metadata : int
        Index, position ids, seconds, modality, validity; once per key-value head where heads retain their own tokens.
    scores : int
        Attention scores, likewise.
    new_keys_values : int
        Key and value in the dtype of the model, as a forward pass holds its own tokens.
    """

    keys_values: int
    features: int
    metadata: int
    scores: int
    new_keys_values: int

    @property
    def total(self) -> int:
        """All parts of a stored token."""
        return self.keys_values + self.features + self.metadata + self.scores

    def parts(self) -> dict[str, int]:
        """Parts of `total` by name."""
        parts = {
            "keys and values": self.keys_values,
            "features": self.features,
            "metadata": self.metadata,
            "attention scores": self.scores,
        }
        return {name: size for name, size in parts.items() if size}


def token_bytes(
    config: Any,
    method: SelectionMethod,
    dtype: torch.dtype,
    kv_dtype: KvDtype = "auto",
    id_dtype: torch.dtype = torch.int64,
) -> TokenBytes:
    """Bytes of a token in a layer.

    Parameters
    ----------
    config : PreTrainedConfig
        Configuration of the model, or of its language model.
    method : SelectionMethod
        Says which features and attention scores are stored.
    dtype : torch.dtype
        Of the model.
    kv_dtype : {"auto", "fp8", "int8", "int4"}
        How keys and values are stored.
    id_dtype : torch.dtype
        Of position ids (`Backbone.position_id_dtype`).
    """
    model = ModelFingerprint.of(config)
    unrounded = 2 * model.kv_heads * model.head_dim * dtype.itemsize
    encoded = 0 if kv_dtype == "auto" else sum(one.nbytes for one in codecs(kv_dtype, model.head_dim))
    rows = model.kv_heads if method.per_head else 1
    score = 0 if method.attention_scores is None else compute_dtype(dtype).itemsize
    return TokenBytes(
        keys_values=model.kv_heads * encoded or unrounded,
        features=method.feature_nbytes(config.get_text_config().hidden_size, dtype),
        metadata=rows * TokenMetadata.token_nbytes(id_dtype),
        scores=rows * score,
        new_keys_values=unrounded,
    )


def token_bytes_of(backbone: Any, method: SelectionMethod, kv_dtype: KvDtype = "auto") -> TokenBytes:
    """`token_bytes` of a `Backbone`, which may have shapes only (``meta`` device)."""
    return token_bytes(backbone.config, method, backbone.model.dtype, kv_dtype, backbone.position_id_dtype)


def resident_bytes(profile: BudgetProfile, token: TokenBytes, text: int = 0) -> int:
    """Bytes of a cache of one stream whose layers are at their budgets and hold `text` text tokens each."""
    return sum(layer.total + text for layer in profile.layers) * token.total


def peak_bytes(profile: BudgetProfile, token: TokenBytes, chunk: int, text: int = 0) -> int:
    """Bytes while a chunk of `chunk` tokens runs: buffers have room for it, and encoded ones hold it unrounded too."""
    waiting = 0 if token.keys_values == token.new_keys_values else token.new_keys_values
    return resident_bytes(profile, token, text) + len(profile.layers) * chunk * (token.total + waiting)


def mean_budget_within(
    gib: float, backbone: Any, method: SelectionMethod, kv_dtype: KvDtype = "auto", least: int = 2
) -> int:
    """Largest mean budget whose `resident_bytes`, without text, are at most `gib` GiB (2^30 bytes).

    Parameters
    ----------
    gib : float
        GiB of all layers and parts together, for one stream.
    backbone : Backbone
        The model; shapes are enough.
    method : SelectionMethod
        The method that will use the budget.
    kv_dtype : {"auto", "fp8", "int8", "int4"}
        How keys and values are stored.
    least : int
        Smallest mean budget that is possible (`omnimem.budget.allocation.least_mean`).

    Raises
    ------
    OmniMemError
        `gib` holds fewer than `least` tokens per layer, or the method retains everything.
    """
    if method.keeps_everything:
        raise OmniMemError(
            f"a memory of {gib:g} GiB needs a selection method with a budget, and {type(method).__name__.lower()} "
            "retains everything: choose another method, or leave the GiB out"
        )
    token, layers = token_bytes_of(backbone, method, kv_dtype).total, ModelFingerprint.of(backbone.config).layers
    mean = min(int(Fraction(gib) * GIB / (layers * token)), LARGEST_BUDGET)
    if mean < least:
        raise OmniMemError(
            f"a memory of {gib:g} GiB holds {mean} tokens per layer ({token:,} bytes per token, {layers} layers); the "
            f"minimum is {least} tokens: give at least {_rounded_up(least * layers * token / GIB)} GiB"
        )
    return mean


def within(
    profile: BudgetProfile, gib: float, backbone: Any, method: SelectionMethod, kv_dtype: KvDtype = "auto"
) -> BudgetProfile:
    """The profile at the `mean_budget_within` a number of GiB; its proportions are kept.

    Raises
    ------
    OmniMemError
        `gib` holds fewer tokens than the floors of the profile, or the method retains everything.
    """
    if profile.source == "uniform":  # no layer is special, so the default floor has no purpose
        return replace(profile, layers=rescale(profile.layers, mean_budget_within(gib, backbone, method, kv_dtype), 1))
    return with_mean(profile, mean_budget_within(gib, backbone, method, kv_dtype, least_mean(profile)))


def _rounded_up(number: float) -> str:
    """The number with three significant digits, rounded up."""
    unit = Decimal(1).scaleb(Decimal(number).adjusted() - 2)
    return f"{Decimal(number).quantize(unit, ROUND_CEILING):f}"
