"""The way of kernels that slide strips of columns down the rows: one loop over the rows of all images.

Images stand side by side in groups, and a group's strips are cut into tiles, ``parts`` of them. A program
keeps to one part, so its columns and their masks are the same in every group. Groups lie one below the other:
a program slides down the rows of one, then of the next, without a stop, and what a turn of its loop needs is
on its way turns before, across images too.
"""

from __future__ import annotations

from typing import NamedTuple

from gconv.geometry import ConvGeometry
from gconv.kernels import tiles
from gconv.kernels.device import Device


class Walk(NamedTuple):
    """How the strips of all images are shared among programs.

    Args:
        images: all of them.
        strips: of an image.
        group: images in a group.
        parts: tiles of strips in a group.
        turns: turns of the loop that the rows of an image take.
        rows: turns of a program, of all images' turns.
        splits: programs that share a part.
    """

    images: int
    strips: int
    group: int
    parts: int
    turns: int
    rows: int
    splits: int

    @classmethod
    def of(
        cls,
        images: int,
        strips: int,
        turns: int,
        programs: int,
        bytes_a_split: int,
        tile: tiles.Tile,
        device: Device,
    ) -> Walk:
        """The walk of a kernel in ``tile``.

        Args:
            images, strips, turns: as above.
            programs: that each tile of strips takes, for packs and blocks of channels.
            bytes_a_split: of the sums that the programs of a tile of strips leave; 0 if none.
            tile: of the kernel.
            device: whose processors share the work.
        """
        most = tile.resident * device.processors // programs
        if bytes_a_split:
            most = min(most, tiles.WORKSPACE // bytes_a_split)
        group = images_in_group(images, strips, tile.pixels, most)
        parts = -(-group * strips // tile.pixels)
        all_turns = -(-images // group) * turns
        rows, splits = tiles.rows_of_split(all_turns, programs * parts, bytes_a_split * parts, tile, device)
        return cls(images, strips, group, parts, turns, rows, splits)

    @classmethod
    def of_weights(
        cls, geometry: ConvGeometry, tile: tiles.Tile, programs: int, bytes_a_split: int, device: Device
    ) -> Walk:
        """The walk of a weight gradient, of which each tile of strips takes ``programs``."""
        (n, _, h, _), (_, _, p, q), stride = geometry.input_size, geometry.output_size, geometry.stride[0]
        turns = p + (2 if stride == 1 else 1)
        if geometry.padding.top > 0 and (turns - 1) * stride - geometry.padding.top >= h:
            turns -= 1  # its row of x is zero, as the first one of the next image is
        return cls.of(n, -(-q // tile.columns), turns, programs, bytes_a_split, tile, device)


def images_in_group(images: int, strips: int, pixels: int, most: int) -> int:
    """How many images fill tiles of ``pixels`` strips best: the fewest that take the fewest tiles.

    Of those that make no more than ``most`` parts, which programs have to share; but one image may.
    """

    def parts(group: int) -> int:
        return -(-group * strips // pixels)

    groups = [g for g in range(1, min(images, pixels) + 1) if parts(g) <= max(most, parts(1))]
    return min(groups, key=lambda group: (-(-images // group) * parts(group), group))
