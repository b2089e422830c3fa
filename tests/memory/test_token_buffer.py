"""Keeping columns in place, as at inference, gives what gathering gives, at the sizes of the recipes."""

from __future__ import annotations

import pytest
import torch

from omnimem.memory.token_buffer import TILE, TokenBuffer


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("dim", "shape"), [(2, (2, -1, 4)), (1, (-1, 6))])
def test_more_columns_than_a_tile_are_kept_in_place_as_by_a_gather(rows, dim, shape):
    """Several times, with columns appended in between and different ones kept in every row."""
    generator = torch.Generator().manual_seed(0)
    inplace, functional = TokenBuffer(dim), TokenBuffer(dim)
    before, kept = None, 8192
    assert kept > 4 * TILE
    for step in (9000, 1500, 2500):
        size = [rows, *(step if length == -1 else length for length in shape)]
        new = torch.randn(size, generator=generator)
        with torch.no_grad():
            inplace = inplace.append(new, lambda: None)
        functional = functional.append(new, lambda: None)
        count = functional.tensor.shape[dim]
        columns = torch.stack([torch.randperm(count, generator=generator)[:kept].sort().values for _ in range(rows)])
        with torch.no_grad():
            inplace = inplace.compact(columns)
        functional = functional.compact(columns)
        assert inplace.storage is not None and functional.storage is None, "one in place, the other not"
        assert torch.equal(inplace.tensor, functional.tensor)
        # And both give what indexing gives, row by row.
        everything = new if before is None else torch.cat((before, new), dim)
        before = torch.stack([everything[row].index_select(dim - 1, columns[row]) for row in range(rows)])
        assert torch.equal(functional.tensor, before)
