"""The sizes of one grouped convolution, and what follows from them: output size, FLOPs, compulsory bytes.

The names are the usual ones: N, C, H, W for the input, K, P, Q for the output, R, S for the kernel, and
Cg = C / groups and Kg = K / groups for the channels of one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

PASSES = ("forward", "input_grad", "weight_grad")


class Padding(NamedTuple):
    """Zeros on each side of an image, in pixels.

    Opposite sides differ only for ``padding="same"`` and an even kernel with odd dilation.
    """

    top: int
    bottom: int
    left: int
    right: int


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """Return the zeros before and after an axis that keep its length at stride 1; an odd one goes after."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


def output_length(length: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the output length along one axis; ``padding`` is the sum of both sides."""
    return (length + padding - dilation * (kernel - 1) - 1) // stride + 1


def steps_in_words(stride: tuple[int, ...], dilation: tuple[int, ...]) -> list[str]:
    """Describe stride and dilation unless they are 1, such as ["stride 2", "dilation (2, 1)"]."""
    steps = {"stride": stride, "dilation": dilation}
    return [
        f"{name} {step[0] if len(set(step)) == 1 else step}"
        for name, step in steps.items()
        if set(step) != {1}
    ]


def kernel_in_words(size: Sequence[int]) -> str:
    """Describe a kernel size, such as "3x3", or "kernel 31" in one dimension."""
    return f"kernel {size[0]}" if len(size) == 1 else "x".join(map(str, size))


@dataclass(frozen=True)
class ConvGeometry:
    """The sizes of one grouped convolution.

    It is the key of all caches of plans and decisions, so its hash is computed only once.

    Args:
        input_size: (N, C, H, W).
        weight_size: (K, C / groups, R, S).
        stride: (vertical, horizontal).
        padding: (top, bottom, left, right), in pixels.
        dilation: (vertical, horizontal).
        groups: number of groups; divides C and K.
    """

    input_size: tuple[int, int, int, int]
    weight_size: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(
        cls,
        input_size: Sequence[int],
        weight_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> ConvGeometry:
        """Make a geometry from any sequences, such as the lists that operators receive."""
        (n, c, h, w), (k, group_in, r, s) = input_size, weight_size
        (stride_h, stride_w), (dilation_h, dilation_w) = stride, dilation
        steps = (stride_h, stride_w), Padding(*padding), (dilation_h, dilation_w)
        return cls((n, c, h, w), (k, group_in, r, s), *steps, groups)

    def __hash__(self) -> int:
        found = self.__dict__.get("_hash")  # not cached_property, whose lock stops Dynamo
        if found is None:
            found = hash((self.input_size, self.weight_size, *self.settings))
            object.__setattr__(self, "_hash", found)
        return found

    @property
    def settings(self) -> tuple[tuple[int, int], Padding, tuple[int, int], int]:
        """(stride, padding, dilation, groups), the order of the operators' arguments."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        """Size of the output, (N, K, P, Q)."""
        n, _, h, w = self.input_size
        k, _, r, s = self.weight_size
        top, bottom, left, right = self.padding
        p = output_length(h, r, self.stride[0], top + bottom, self.dilation[0])
        q = output_length(w, s, self.stride[1], left + right, self.dilation[1])
        return n, k, p, q

    @property
    def most_items(self) -> int:
        """Number of input pixels, output pixels or weights, whichever is largest."""
        n, _, h, w = self.input_size
        _, _, p, q = self.output_size
        return max(n * h * w, n * p * q, math.prod(self.weight_size))

    @property
    def channels_per_group(self) -> tuple[int, int]:
        """(Cg, Kg): input and output channels of one group."""
        return self.weight_size[1], self.weight_size[0] // self.groups

    @property
    def flops(self) -> int:
        """Floating-point operations of one pass, counting a multiply and an add as two.

        Every pass combines each output with each tap of its group once: 2 N K P Q Cg R S.
        ``torch.utils.flop_counter`` counts the forward pass in the same way, including taps that fall on
        padding.
        """
        return 2 * math.prod(self.output_size) * math.prod(self.weight_size[1:])

    def __str__(self) -> str:
        """Describe the sizes, such as "8 x 128/32 x 56 x 56 -> 128, 3x3": N x C/groups x H x W -> K, RxS."""
        n, c, h, w = self.input_size
        k, _, r, s = self.weight_size
        groups = f"/{self.groups}" if self.groups > 1 else ""
        steps = steps_in_words(self.stride, self.dilation)
        return ", ".join([f"{n} x {c}{groups} x {h} x {w} -> {k}", kernel_in_words((r, s)), *steps])

    def compulsory_bytes(self, itemsize: int) -> int:
        """Return the bytes that a pass must move: x, w and y once each, with ``itemsize`` bytes per element.

        The number is the same for all passes: forward reads x and w and writes y, the input gradient reads dy
            and w
        and writes dx, the weight gradient reads dy and x and writes dw.
        """
        return itemsize * sum(
            math.prod(size) for size in (self.input_size, self.weight_size, self.output_size)
        )
