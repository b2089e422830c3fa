"""Features as bytes: a few floats, then the whole numbers of a sketch in 8 or 4 bits each. Nothing is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeatureCodec:
    """Stores features ``[..., columns + numbers]`` as one row of bytes per token.

    Attributes
    ----------
    columns : int
        Floats before the sketch, stored in their own dtype.
    numbers : int
        Whole numbers of the sketch, at most 127 in magnitude with 8 bits and 7 with 4.
    bits : int
        8 or 4.
    """

    columns: int
    numbers: int
    bits: int = 8

    @torch.no_grad()
    def encode(self, states: Tensor) -> Tensor:
        """Bytes (uint8 ``[..., nbytes]``) of features ``[..., columns + numbers]``."""
        floats, numbers = states[..., : self.columns], states[..., self.columns :].to(torch.int8)
        if self.bits == 4:
            low, high = F.pad(numbers + 8, (0, self.numbers % 2)).chunk(2, dim=-1)
            numbers = low | high << 4
        return torch.cat((floats.contiguous().view(torch.uint8), numbers.view(torch.uint8)), dim=-1)

    @torch.no_grad()
    def decode(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """Features of bytes; `dtype` is the dtype they had."""
        size = self.columns * dtype.itemsize
        numbers = data[..., size:]
        if self.bits == 4:
            numbers = torch.cat((numbers & 15, numbers >> 4), dim=-1)[..., : self.numbers].view(torch.int8) - 8
        else:
            numbers = numbers.contiguous().view(torch.int8)
        if self.columns == 0:
            return numbers.to(dtype)
        return torch.cat((data[..., :size].contiguous().view(dtype), numbers.to(dtype)), dim=-1)

    def rounded(self, states: Tensor) -> Tensor:
        """The same features: they are stored exactly."""
        return states
