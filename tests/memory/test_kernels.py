"""Attention scores of the Triton kernels are those of dense attention, without the attention matrix.

Without a GPU the kernels run in Triton's interpreter. Triton decides on that when it is first imported, which has
already happened here, so a process of its own measures all cases at once; on CUDA this process measures them too.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import traceback
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from small_runs import start

FIRST_LINE = "measurements: "
INTERPRETED = (
    "import sys; sys.path[:0] = ['tests', 'tests/memory']; import test_kernels; test_kernels.print_measurements()"
)

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-4, "float16": 1e-4}
"""Far below the 1e-2 of a number in bfloat16: products are summed in float32, and nothing is rounded in between."""


@dataclass(frozen=True)
class Case:
    """Rows of a chunk, `stride` tokens apart, that ends with the last key."""

    rows: int
    keys: int
    stride: int = 1
    batch: int = 1
    ratio: int = 4
    dim: int = 64
    dtype: str = "float32"
    packed: bool = False
    scaling: float | None = None

    def __str__(self) -> str:
        name = f"{self.batch}x{self.rows}x{self.keys}-stride{self.stride}"
        name += f"-ratio{self.ratio}-dim{self.dim}-{self.dtype}"
        return name + "-packed" * self.packed + ("" if self.scaling is None else f"-scaling{self.scaling}")


# A single key, a single query, no past, whole tiles, broken tiles, a long past, sampled rows with keys after the last.
SHAPES = [(1, 1, 1), (1, 150, 1), (70, 70, 1), (64, 128, 1), (37, 150, 1), (5, 500, 1), (20, 200, 4), (33, 131, 4)]
FEW = [(1, 70, 1), (21, 90, 1), (9, 100, 4)]
CASES = {
    str(case): case
    for case in [
        *(Case(*shape, batch=2, ratio=3) for shape in SHAPES),
        *(Case(*shape, ratio=ratio) for shape, ratio in itertools.product(FEW, (1, 4))),
        *(Case(*shape, dim=dim) for shape, dim in itertools.product(FEW[1:], (8, 80, 96, 128, 256))),
        *(Case(*shape, dtype="bfloat16") for shape in SHAPES),
        *(Case(*shape, dtype="bfloat16", dim=dim) for shape, dim in itertools.product(FEW[1:], (8, 80, 128))),
        *(Case(*shape, batch=2, dtype=dtype, packed=True) for shape, dtype in itertools.product(FEW, TOLERANCE)),
        *(Case(*FEW[2], scaling=scaling) for scaling in (-0.1, 0.5)),
    ]
}


def dense(query: Tensor, key: Tensor, first: int, stride: int, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Mass ``[B, G, K]`` and log-sum-exp ``[B, H, R]`` from the whole attention matrix, in float64."""
    batch, heads, rows, dim = query.shape
    groups, keys = key.shape[1:3]
    logits = query.double() @ key.double().repeat_interleave(heads // groups, dim=1).transpose(-1, -2)
    logits = logits * (dim**-0.5 if scaling is None else scaling)
    position = first + stride * torch.arange(rows)
    logits = logits.masked_fill(torch.arange(keys) > position[:, None], -torch.inf)
    mass = logits.softmax(-1).sum(2).view(batch, groups, heads // groups, keys).mean(2)
    return mass, logits.logsumexp(-1)


def inside(states: Tensor) -> Tensor:
    """The same numbers as a view of a buffer ``[B, length, heads, dim]`` that is larger every way and NaN elsewhere."""
    batch, heads, length, dim = states.shape
    buffer = torch.full((batch + 1, length + 11, heads + 1, 2 * dim + 3), torch.nan, dtype=states.dtype)
    view = buffer[1:, 5 : 5 + length, 1:, 2 : 2 + 2 * dim : 2].transpose(1, 2)
    view.copy_(states)
    return view


def states(case: Case, groups: int = 2) -> tuple[Tensor, Tensor, int]:
    """Queries, keys, and the token of the first query."""
    generator = torch.Generator().manual_seed(case.rows * 1000 + case.keys)
    dtype = getattr(torch, case.dtype)
    chunk = min(case.rows * case.stride, case.keys)
    query = torch.randn(case.batch, groups * case.ratio, chunk, case.dim, generator=generator).to(dtype)
    key = torch.randn(case.batch, groups, case.keys, case.dim, generator=generator).to(dtype)
    if not case.packed:
        query, key = inside(query), inside(key)
    return query[:, :, :: case.stride], key, case.keys - chunk


def measure(case: Case, device: str) -> dict[str, Any]:
    """How far the kernels are from dense attention."""
    from omnimem.memory.kernels import column_sums, row_lse

    query, key, first = states(case)
    expected, expected_lse = dense(query, key, first, case.stride, case.scaling)
    given_lse = expected_lse.float() if case.packed else inside(expected_lse.float()[..., None])[..., 0]
    last = first + (query.shape[2] - 1) * case.stride
    # `Tensor.to` would pack a view: its whole buffer has to move.
    query, key, given_lse = (moved(tensor, device) for tensor in (query, key, given_lse))
    where = (first, case.stride, case.scaling)
    lse = row_lse(query, key, *where)
    mass = column_sums(query, key, given_lse, *where)
    total = column_sums(query, key, lse, *where).sum(-1)
    return {
        "dtypes": [str(lse.dtype), str(mass.dtype)],
        "largest": expected.max().item(),
        "mass": (mass.cpu() - expected).abs().max().item(),
        "unseen": mass[..., last + 1 :].abs().sum().item(),
        "lse": (lse.cpu() - expected_lse).abs().max().item(),
        "total": (total - query.shape[2]).abs().max().item() / query.shape[2],
    }


def moved(tensor: Tensor, device: str) -> Tensor:
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype).set_(storage).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def measure_far_batch(device: str) -> dict[str, Any]:
    """Whether a sample more than 2^31 numbers after the first gets what it gets beside it."""
    from omnimem.memory.kernels import column_sums, row_lse

    query, key, first = states(Case(7, 40, batch=3, dim=16, dtype="float16", packed=True))
    query, key = query.to(device), key.to(device)
    # What lies between is never touched, so that on the CPU it takes no memory.
    distance = 2**30 + 64  # fits 32 bits, twice that does not
    far = torch.empty(2 * distance + key[0].numel(), dtype=key.dtype, device=device)
    far = far.as_strided(key.shape, (distance, *key.stride()[1:]))
    far.copy_(key)
    lse = row_lse(query, key, first)
    same = torch.equal(row_lse(query, far, first), lse)
    return {"same": same and torch.equal(column_sums(query, far, lse, first), column_sums(query, key, lse, first))}


def measurements(device: str) -> dict[str, Any]:
    """All cases; a case that raises is its traceback, so that the others are still heard."""
    measured: dict[str, Any] = {}
    for name in [*CASES, "far"]:
        try:
            measured[name] = measure_far_batch(device) if name == "far" else measure(CASES[name], device)
        except Exception:
            measured[name] = traceback.format_exc()
    return measured


def print_measurements() -> None:
    print(FIRST_LINE + json.dumps(measurements("cpu")))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module", params=["interpreter", *["cuda"] * torch.cuda.is_available()])
def measured(request) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "cuda":
        return measurements("cuda")
    done = start("-c", INTERPRETED, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(FIRST_LINE))
    return json.loads(line.removeprefix(FIRST_LINE))


def result(measured: dict[str, Any], name: str) -> dict[str, Any]:
    if isinstance(measured[name], str):
        pytest.fail(measured[name])
    return measured[name]


each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_attention_scores_are_the_column_sum_of_dense_attention_averaged_over_a_groups_heads(measured, name):
    found = result(measured, name)
    assert found["dtypes"] == ["torch.float32", "torch.float32"]
    assert found["mass"] <= TOLERANCE[CASES[name].dtype] * max(1.0, found["largest"])


@each_case
def test_lse_is_the_logsumexp_of_every_row(measured, name):
    assert result(measured, name)["lse"] <= TOLERANCE[CASES[name].dtype]


@each_case
def test_every_row_gives_a_attention_scores_of_one(measured, name):
    assert result(measured, name)["total"] <= TOLERANCE[CASES[name].dtype]


@each_case
def test_a_key_after_the_last_row_gets_nothing(measured, name):
    assert result(measured, name)["unseen"] == 0.0


def test_keys_may_lie_more_than_2_to_the_31_numbers_apart(measured):
    assert result(measured, "far")["same"]


def test_the_kernels_are_imported_by_those_who_ask_and_need_only_triton():
    program = """
import sys
import omnimem.memory
print("omnimem.memory.kernels" in sys.modules)
sys.modules["triton"] = None  # what a missing package looks like
try:
    import omnimem.memory.kernels
except ImportError as error:
    print(error.name)
"""
    done = start("-c", program)
    assert done.stdout.split() == ["False", "triton"], done.stderr


# ---- what only a GPU can show --------------------------------------------------------------------------------------


@pytest.fixture
def large() -> tuple[Tensor, Tensor, int]:
    """One sample's chunk of 500 after 5,000 stored keys."""
    query, key, first = states(Case(500, 5500, dim=128, dtype="bfloat16"))
    return moved(query, "cuda"), moved(key, "cuda"), first


@cuda
def test_the_same_states_give_the_same_bits(large):
    from omnimem.memory.kernels import column_sums, row_lse

    query, key, first = large
    lse = row_lse(query, key, first)
    mass = column_sums(query, key, lse, first)
    for _ in range(3):
        assert torch.equal(row_lse(query, key, first), lse)
        assert torch.equal(column_sums(query, key, lse, first), mass)


@cuda
@pytest.mark.parametrize("function", ["row_lse", "column_sums"])
def test_no_memory_is_taken_beyond_the_result(large, function):
    from omnimem.memory import kernels

    query, key, first = large
    arguments = (query, key, kernels.row_lse(query, key, first), first)
    if function == "row_lse":
        arguments = (query, key, first)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = getattr(kernels, function)(*arguments)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= out.numel() * out.element_size() + 512, "CUDA's allocator rounds up to 512 bytes"
