"""Bytes of keys and values: the error of a round trip, the gradient of the straight-through form, the size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnimem.memory.codec import Codec

KINDS = pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])


def states(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers around a different mean in every channel, some of them far from zero, as those of keys."""
    generator = torch.Generator().manual_seed(seed)
    offset = 5 * torch.randn(shape[-1], generator=generator)
    return (torch.randn(shape, generator=generator) + offset).to(dtype)


def by_hand(row: list[float], kind: str) -> list[float]:
    """One group of channels, rounded with plain numbers."""

    def bfloat16(number: float) -> float:
        return float(torch.tensor(number).bfloat16())

    if kind == "int4":
        least = bfloat16(min(row))
        step = bfloat16((max(row) - least) / 15 * (1 + 2**-8))
        return [least + step * min(15, max(0, round((x - least) / step))) for x in row]
    largest = max(abs(x) for x in row)
    if kind == "int8":
        step = bfloat16(largest / 127 * (1 + 2**-8))
        return [step * round(x / step) for x in row]
    step = bfloat16(largest / 448 * (1 + 2**-8))
    return [step * float(torch.tensor(x / step).to(torch.float8_e4m3fn)) for x in row]


@KINDS
@pytest.mark.parametrize(("dim", "group"), [(128, 32), (128, None), (16, 32), (8, None), (6, None), (7, None), (12, 4)])
def test_a_round_trip_gives_what_plain_numbers_give(kind, dim, group):
    codec, given = Codec(kind, dim, group), states(2, 3, 5, dim, dtype=torch.float64)
    found = codec.decode(codec.encode(given), torch.float64)
    width = dim if group is None or dim % group else group
    for row, expected in zip(found.view(-1, width).tolist(), given.view(-1, width).tolist(), strict=True):
        assert row == pytest.approx(by_hand(expected, kind), abs=1e-12)


@KINDS
@DTYPES
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e4, 1e30])
def test_the_error_is_bounded_at_every_magnitude(kind, dtype, magnitude):
    codec = Codec(kind, 64, 32)
    given = (states(3, 2, 40, 64, dtype=torch.float64) * magnitude).to(dtype)
    found = codec.decode(codec.encode(given), dtype)
    assert found.dtype == dtype and found.isfinite().all()
    exact = given.double().unflatten(-1, (2, 32))
    error = (found.double().unflatten(-1, (2, 32)) - exact).abs() - torch.finfo(dtype).eps / 2 * exact.abs()
    largest, least = exact.abs().amax(-1, keepdim=True), exact.amin(-1, keepdim=True)
    bound = {
        "int8": largest / 252,
        # The minimum of a group is exact in bfloat16 alone.
        "int4": (exact.amax(-1, keepdim=True) - least) / 29 + (dtype != torch.bfloat16) * least.abs() / 2**8,
        "fp8": torch.maximum(exact.abs() / 16, largest / 450_000),
    }[kind]
    assert (error <= bound).all()


@KINDS
@DTYPES
def test_zeros_and_equal_channels_come_back(kind, dtype):
    codec = Codec(kind, 32)
    for number in (0.0, 3.0, -0.75):
        given = torch.full((2, 1, 4, 32), number, dtype=dtype)
        found = codec.decode(codec.encode(given), dtype)
        assert (found - given).abs().max() <= abs(number) / 252
        assert number != 0 or torch.equal(found, given)


@KINDS
def test_no_tokens_have_no_bytes(kind):
    codec = Codec(kind, 8, 32)
    data = codec.encode(torch.zeros(2, 3, 0, 8))
    assert data.shape == (2, 3, 0, codec.nbytes) and codec.decode(data, torch.float32).shape == (2, 3, 0, 8)


@KINDS
def test_every_token_and_head_is_encoded_by_itself(kind):
    """Whatever stands beside it, and decoded from a part of a larger buffer as from the whole."""
    codec, given = Codec(kind, 64, 32), states(2, 3, 7, 64)
    data = codec.encode(given)
    louder = given.clone()
    louder[:, 1], louder[:, :, 3] = 100, -50
    same = torch.ones(2, 3, 7, dtype=torch.bool)
    same[:, 1], same[:, :, 3] = False, False
    assert torch.equal(codec.encode(louder)[same], data[same])
    decoded = codec.decode(data, torch.float32)
    for part in ((slice(1, 2), slice(None)), (slice(None), slice(2, 3)), (slice(None), slice(None), slice(1, 5))):
        assert torch.equal(codec.decode(data[part], torch.float32), decoded[part])


@KINDS
def test_channels_of_different_size_do_not_share_a_scale(kind):
    """One large channel, as keys have it, leaves the channels of other groups as they were."""
    given = states(1, 1, 20, 128)
    loud = given.clone()
    loud[..., 5] = 1e3
    found, expected = (Codec(kind, 128, 32).encode(one) for one in (loud, given))
    found, expected = (Codec(kind, 128, 32).decode(one, torch.float32)[..., 32:] for one in (found, expected))
    assert torch.equal(found, expected)


@KINDS
@DTYPES
def test_the_straight_through_form_has_the_rounded_value_and_the_gradient_of_the_identity(kind, dtype):
    codec, given = Codec(kind, 64, 32), states(2, 2, 9, 64, dtype=dtype).requires_grad_()
    found = codec.rounded(given)
    assert torch.equal(found, codec.decode(codec.encode(given), dtype)) and not torch.equal(found, given)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (gradient,) = torch.autograd.grad((found * weight).sum(), given)
    assert torch.equal(gradient, weight)


@pytest.mark.parametrize(
    ("kind", "dim", "keys", "values"),
    [("int8", 128, 136, 130), ("fp8", 128, 136, 130), ("int4", 128, 80, 68), ("int8", 16, 18, 18), ("int4", 6, 8, 8)],
)
def test_bytes_of_a_token(kind, dim, keys, values):
    for group, expected in ((32, keys), (None, values)):
        codec = Codec(kind, dim, group)
        data = codec.encode(states(1, 1, 3, dim))
        assert data.dtype == torch.uint8 and data.shape[-1] == codec.nbytes == expected
    assert dim < 128 or keys + values <= {"int8": 0.55, "fp8": 0.55, "int4": 0.3}[kind] * 2 * dim * 2
