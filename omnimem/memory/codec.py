"""Keys and values as bytes: 8 or 4 bits per channel, every token encoded by itself.

A token of one head becomes one row of bytes: the codes of its channels, then their scales. Rows of bytes are gathered,
moved, logged and offloaded like any other tokens, and no row is ever encoded again.

KIVI (arXiv 2402.02750) quantises keys per channel over groups of tokens, because some channels of keys are much larger
than the others. Here tokens are evicted one by one, so tokens cannot share a scale; instead 32 channels of one key
share one, which keeps large channels apart from small ones. A value has one scale for all of its channels: as in KIVI,
tokens do not share it.

The quantised tensors of torchao, optimum-quanto and HQQ are made for weights: tokens can neither be gathered from them
nor written into them. The QuantizedCache of transformers, which uses them, decodes a whole layer at every step and
encodes all of it again when its window of recent tokens is full, so that rounding errors add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omnimem.straight_through import straight_through

KvDtype = Literal["auto", "fp8", "int8", "int4"]
"""How stored keys and values are encoded; ``auto``: not at all, they keep the dtype of the model."""

KEY_GROUP = 32
"""Channels of a key that share a scale."""

SCALE_DTYPE = torch.bfloat16
"""It has the range of every model's dtype, so nothing overflows, and the minimum of bfloat16 states is exact in it.
Float16 scales would be rounded less but end at 65504 and lose precision below 6e-5."""

LARGEST_CODE = {"fp8": 448, "int8": 127, "int4": 15}

CODE_DTYPE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}


EncodedDtype = Literal["fp8", "int8", "int4"]


@dataclass(frozen=True)
class Codec:
    """Encodes states, one row of bytes per token and head.

    ``int8`` and ``fp8`` (e4m3) codes are multiplied by a scale. ``int4`` codes, two per byte, count the steps above the
    minimum of their group. Where a is the largest magnitude and r the range in a group, the error of bfloat16 states is
    at most a / 252 (int8), r / 29 (int4) or, for fp8, 1/16 of the channel's magnitude (at least a / 450000), besides
    the rounding of the result to bfloat16.

    Attributes
    ----------
    kind : {"fp8", "int8", "int4"}
        Form of the codes.
    dim : int
        Channels D of a head.
    group : int or None
        Channels that share a scale; all of them where it is None or does not divide D.
    """

    kind: EncodedDtype
    dim: int
    group: int | None = None

    @property
    def num_groups(self) -> int:
        """Groups of channels with a scale of their own."""
        return 1 if self.group is None or self.dim % self.group else self.dim // self.group

    @property
    def nbytes(self) -> int:
        """Bytes of a token in one head: its codes and scales."""
        return self._code_bytes + self.num_groups * (2 if self.kind == "int4" else 1) * SCALE_DTYPE.itemsize

    @torch.no_grad()
    def encode(self, states: Tensor) -> Tensor:
        """Bytes (uint8 ``[..., nbytes]``) of finite states ``[..., D]`` of any float dtype."""
        states = states.to(torch.promote_types(states.dtype, torch.float32)).unflatten(-1, (self.num_groups, -1))
        if self.kind == "int4":
            minimum = states.amin(-1, keepdim=True).to(SCALE_DTYPE)
            scale = self._scale(states.amax(-1, keepdim=True) - minimum)
            codes = ((states - minimum) / scale).round().clamp(0, LARGEST_CODE["int4"])
            scales = torch.cat((scale, minimum), dim=-1)
        else:
            scales = self._scale(states.abs().amax(-1, keepdim=True))
            codes = states / scales if self.kind == "fp8" else (states / scales).round()
        codes = codes.flatten(-2).to(CODE_DTYPE[self.kind]).view(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, self._padding))
        if self.kind == "int4":
            low, high = codes.chunk(2, dim=-1)
            codes = low | high << 4
        return torch.cat((codes, scales.flatten(-2).view(torch.uint8)), dim=-1)

    @torch.no_grad()
    def decode(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """States ``[..., D]`` of bytes ``[..., nbytes]``."""
        wide = torch.promote_types(dtype, torch.float32)
        codes, scales = data[..., : self._code_bytes], data[..., self._code_bytes :]
        if self.kind == "int4":
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        codes = codes.view(CODE_DTYPE[self.kind])[..., : self.dim].to(wide).unflatten(-1, (self.num_groups, -1))
        scales = scales.view(SCALE_DTYPE).to(wide).unflatten(-1, (self.num_groups, -1))
        states = codes * scales[..., :1]
        if self.kind == "int4":
            states = states + scales[..., 1:]
        return states.flatten(-2).to(dtype)

    def rounded(self, states: Tensor) -> Tensor:
        """Encode and decode states; the gradient passes unchanged (straight through)."""
        return straight_through(states, self.decode(self.encode(states), states.dtype))

    @property
    def _padding(self) -> int:
        """Channels added to a multiple of 4: two int4 codes fill a byte, and scales begin at an even byte."""
        return -self.dim % 4

    @property
    def _code_bytes(self) -> int:
        return (self.dim + self._padding) // (2 if self.kind == "int4" else 1)

    def _scale(self, extent: Tensor) -> Tensor:
        """Scale of groups with the largest magnitude (int4: the range) `extent`."""
        # Enlarged by half a unit in the last place, it is not rounded below what the largest code has to reach.
        scale = extent / LARGEST_CODE[self.kind] * (1 + torch.finfo(SCALE_DTYPE).eps / 2)
        return scale.clamp_min(torch.finfo(SCALE_DTYPE).tiny).to(SCALE_DTYPE)


def codecs(kind: EncodedDtype, dim: int) -> tuple[Codec, Codec]:
    """Codecs of keys and of values of `dim` channels."""
    return Codec(kind, dim, KEY_GROUP), Codec(kind, dim)
