"""What training sees of positions that were just evicted: the gradient that teaches what to keep.

The forward pass is the hard selection of inference, to the bit. The positions evicted after a chunk stay one chunk
longer as the *margin*, detached, and add to every attention output of that chunk a term whose value is zero. For the
backward pass they are stored once, also those the chunk itself brought, which nothing else would have to keep::

    o_q += c · Σ_k (g_k − sg g_k) · sg[σ(s_qk − ℓ_q) · (v_k − o_q)]

σ(s − ℓ)·(v − o) is the change of the output had that state been kept, so its gates g learn by how much keeping it would
have helped.

The soft form keeps them in the memory instead, and adds Σ log g over the chunks so far to the logits of every position:
a forward pass of its own, near that of inference where the temperature is low. At inference nothing of either exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimem.errors import OmniMemError
from omnimem.memory.attention import row_lse

TILE = 256
"""Queries whose attention to the margin exists at once."""


@dataclass(frozen=True)
class SelectionGradient:
    """How a gradient reaches the selection.

    Attributes
    ----------
    form : {"straight_through", "soft"}
        The forward pass of inference and a term without value; or a memory whose next best positions stay as well,
        gates weighing all of them in attention.
    temperature : float
        T of the gates; low ones (0.3) teach best.
    margin : int or None
        Evicted positions of a layer that are looked at, those nearest to being kept; None: all, or in the soft form as
        many as the chunk brought.
    gain : float
        c, weight of the term, or of the gradient of the soft gates (1: the exact one): 16 teaches best in
        `tests/benchmarks/streaming_recall.py`.
    threshold : {"boundary", "bisection"}
        See `omnimem.selection.gates`.
    attention : bool
        Whether the gradient also goes through the attention mass (worth it with a large λ).
    """

    form: Literal["straight_through", "soft"] = "straight_through"
    temperature: float = 0.3
    margin: int | None = None
    gradient_scale: float = 16.0
    threshold: Literal["boundary", "bisection"] = "boundary"
    through_attention: bool = False

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("form", self.form in ("straight_through", "soft"), "straight_through or soft"),
            ("temperature", self.temperature > 0, "above 0"),
            ("margin", self.margin is None or self.margin >= 1, "at least 1"),
            ("gain", self.gradient_scale >= 0, "at least 0"),
            ("threshold", self.threshold in ("boundary", "bisection"), "boundary or bisection"),
        ):
            if not holds:
                raise OmniMemError(f"selection gradient: {name} must be {rule}, got {getattr(self, name)!r}")


class Margin(NamedTuple):
    """Positions evicted after the last chunk.

    Attributes
    ----------
    keys, values : Tensor
        ``[B, G, M, D]`` post-RoPE, detached.
    gates : Tensor
        ``[B, M]`` with their graph; 0 where a sample has fewer.
    gain : float
        Weight of the term.
    """

    keys: Tensor
    values: Tensor
    gates: Tensor
    gain: float

    def reach(self, output: Tensor, query: Tensor, key: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """The same attention output ``[B, H, Q, D]``, through which gradients reach the gates.

        Parameters
        ----------
        output : Tensor
            ``[B, H, Q, D]``.
        query, key, valid
            What it was computed from, as in `omnimem.memory.attention.lower_right_attention`.
        scale : float
            Factor on q·k.
        """
        margin = (self.gates, self.keys, self.values)
        return _Reach.apply(output, *margin, query, key, valid, scale, self.gain)  # pyright: ignore[reportReturnType]


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output, gates, keys, values, query, key, valid, scale, gain):
        ctx.save_for_backward(output, gates, keys, values, query, key, valid)
        ctx.scale, ctx.gain = scale, gain
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        output, gates, keys, values, query, key, valid = ctx.saved_tensors
        batch, _, queries, _ = query.shape
        groups = keys.shape[1]
        lse = row_lse(query, key, valid, ctx.scale)
        keys, values = keys.to(lse.dtype), values.to(lse.dtype)
        reached = torch.zeros(batch, groups, keys.shape[2], dtype=lse.dtype, device=keys.device)
        for start in range(0, queries, TILE):

            def rows(states: Tensor, start: int = start) -> Tensor:
                """A tile of queries, the heads of a group one after the other: ``[B, G, rows, D]``."""
                return states[:, :, start : start + TILE].to(lse.dtype).reshape(batch, groups, -1, states.shape[-1])

            weight = torch.sigmoid(rows(query) @ keys.transpose(-1, -2) * ctx.scale - rows(lse[..., None]))
            behind = rows(grad)
            # (v_k − o_q)·do_q
            change = behind @ values.transpose(-1, -2) - (behind * rows(output)).sum(-1, keepdim=True)
            reached += (weight * change).sum(2)
        return grad, (ctx.gain * reached.sum(1)).to(gates.dtype), *[None] * 7
