"""The margin: tokens evicted by the last compression, through which a gradient reaches the selection.

The forward pass is the hard selection of inference, bit for bit. The margin adds to every attention output of the next
chunk a term whose value is zero::

    o_q += c · Σ_k (g_k − sg g_k) · sg[σ(s_qk − ℓ_q) · (v_k − o_q)]

where g_k is the gate of an evicted token k, s_qk its attention logit, ℓ_q the log-sum-exp of the logits of query q,
o_q its attention output, c the `gradient_scale`, σ the sigmoid and sg the stop-gradient. σ(s − ℓ) · (v − o) is the
change of the output had token k been retained, so its gate learns by how much retaining it would have helped. Keys and
values of the margin are detached. At inference there is no margin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimem.memory.scores import row_lse

TILE = 256
"""Queries whose attention to the margin exists at once."""


class Margin(NamedTuple):
    """Tokens evicted by the last compression.

    Attributes
    ----------
    keys, values : Tensor
        ``[R, G, M, D]`` post-RoPE, detached.
    gates : Tensor
        ``[R, M]`` with their graph; 0 where a sample has fewer.
    gradient_scale : float
        Weight c of the term.
    """

    keys: Tensor
    values: Tensor
    gates: Tensor
    gradient_scale: float

    def attach_gradient(self, output: Tensor, query: Tensor, key: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """Return the same attention output, with a backward pass that also computes the gradient of the gates.

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
        return _GateGradient.apply(output, *margin, query, key, valid, scale, self.gradient_scale)  # pyright: ignore[reportReturnType]


class _GateGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output, gates, keys, values, query, key, valid, scale, gradient_scale):
        ctx.save_for_backward(output, gates, keys, values, query, key, valid)
        ctx.scale, ctx.gradient_scale = scale, gradient_scale
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output):  # pyright: ignore[reportIncompatibleMethodOverride]
        output, gates, keys, values, query, key, valid = ctx.saved_tensors
        batch, _, queries, _ = query.shape
        groups = keys.shape[1]
        lse = row_lse(query, key, valid, ctx.scale)
        keys, values = keys.to(lse.dtype), values.to(lse.dtype)
        grad_gates = torch.zeros(batch, groups, keys.shape[2], dtype=lse.dtype, device=keys.device)

        def tile_of(states: Tensor, start: int) -> Tensor:
            """Rows of one tile of queries, the heads of a group one after the other: ``[B, G, rows, D]``."""
            return states[:, :, start : start + TILE].to(lse.dtype).reshape(batch, groups, -1, states.shape[-1])

        for start in range(0, queries, TILE):
            logits = tile_of(query, start) @ keys.transpose(-1, -2) * ctx.scale
            weights = torch.sigmoid(logits - tile_of(lse[..., None], start))
            grad = tile_of(grad_output, start)
            # (v_k − o_q) · grad_output_q
            change = grad @ values.transpose(-1, -2) - (grad * tile_of(output, start)).sum(-1, keepdim=True)
            grad_gates += (weights * change).sum(2)
        return grad_output, (ctx.gradient_scale * grad_gates.sum(1)).to(gates.dtype), *[None] * 7
