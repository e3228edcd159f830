"""``python -m benchmarks pieces``: its kernel moves every element."""

from __future__ import annotations

import pytest
import torch
from marks import interpreted


@interpreted
@pytest.mark.parametrize("way", ["copy", "read"])
def test_pieces_cover_the_tensor(way: str) -> None:
    from benchmarks import pieces

    x, y = (torch.randn(1, 32, 56, 56).half().contiguous(memory_format=torch.channels_last) for _ in range(2))
    total = (x.float() + y.float()).sum()
    for piece in (32, 64):
        moved = pieces.move(way, piece, 3, 1, x, y)
        if way == "copy":
            assert torch.equal(y, x)
            y.zero_()
        else:
            torch.testing.assert_close(moved.sum(), total, rtol=1e-3, atol=1e-1)
