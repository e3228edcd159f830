"""How strip kernels walk down the rows: one loop over the rows of all images.

Images are placed side by side in groups, and the strips of a group are cut into tiles, its ``parts``. A
program keeps to one part, so its columns and their masks are the same in every group. The groups are stacked:
a program slides down the rows of one group, then of the next, without a break. What an iteration ("turn") of
its loop needs is loaded some turns ahead, even if it belongs to another image.
"""

from __future__ import annotations

from typing import NamedTuple

from gconv.geometry import ConvGeometry
from gconv.kernels import tiles
from gconv.kernels.device import Device


class Walk(NamedTuple):
    """How programs share the strips of all images.

    Args:
        images: number of images.
        strips: number of strips in an image.
        group: number of images in a group.
        parts: number of tiles of strips in a group.
        turns: number of turns of the loop that the rows of an image take.
        rows: number of turns of a program, out of all images' turns.
        splits: number of programs that share a part.
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
        """Return the walk of a kernel in ``tile``.

        Args:
            images, strips, turns: as in the class.
            programs: number of programs for each tile of strips, for packs and blocks of channels.
            bytes_a_split: size of the sums that the programs of a tile of strips store; 0 if none.
            tile: the kernel's tile.
            device: the GPU whose processors share the work.
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
        """Return the walk of a weight gradient with ``programs`` programs for each tile of strips."""
        (n, _, h, _), (_, _, p, q), stride = geometry.input_size, geometry.output_size, geometry.stride[0]
        turns = p + (2 if stride == 1 else 1)
        if geometry.padding.top > 0 and (turns - 1) * stride - geometry.padding.top >= h:
            turns -= 1  # its row of x is zero, and so is the first row of the next image
        return cls.of(n, -(-q // tile.columns), turns, programs, bytes_a_split, tile, device)


def images_in_group(images: int, strips: int, pixels: int, most: int) -> int:
    """Return how many images best fill tiles of ``pixels`` strips: the fewest that need the fewest tiles.

    Only group sizes with at most ``most`` parts count, because programs have to share the parts; one image
    always counts.
    """

    def parts(group: int) -> int:
        return -(-group * strips // pixels)

    groups = [g for g in range(1, min(images, pixels) + 1) if parts(g) <= max(most, parts(1))]
    return min(groups, key=lambda group: (-(-images // group) * parts(group), group))
