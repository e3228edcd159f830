"""What the forward kernels compute: correlations, which the forward pass and the input gradient both are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gconv.geometry import ConvGeometry, Padding


@dataclass(frozen=True, slots=True)
class Correlation:
    """One grouped correlation of a source x (N, H, W, groups, inputs) into y (N, P, Q, groups, outputs).

        y[n, p, q, g, o] = sum over r, s, i of x[n, h, w, g, i] weight[g, i, o, r, s]
        where  divisor h = step p + dilation r - top,  and w likewise from q, s and left,

    and x counts as zero outside the image and where the division leaves a rest. The forward pass steps and
    divides by 1. The input gradient divides by the stride and meets the taps in the opposite order.

    Args:
        size: (N, H, W) of x.
        output: (P, Q).
        groups: number of groups.
        inputs, outputs: channels of one group of x and of y.
        kernel: (R, S).
        step, divisor, dilation: (vertical, horizontal).
        top, left: zeros around x. May be negative: rows and columns that are skipped.
        transposed: weights are stored as (outputs, inputs) for the forward pass; this swaps the two and flips
            the taps.
    """

    size: tuple[int, int, int]
    output: tuple[int, int]
    groups: int
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    step: tuple[int, int]
    divisor: tuple[int, int]
    dilation: tuple[int, int]
    top: int
    left: int
    transposed: bool

    @classmethod
    def of(cls, pass_: str, geometry: ConvGeometry) -> Correlation:
        """That of "forward" or "input_grad"."""
        return cls.forward(geometry) if pass_ == "forward" else cls.input_grad(geometry)

    @classmethod
    def forward(cls, geometry: ConvGeometry) -> Correlation:
        """y from x."""
        n, _, h, w = geometry.input_size
        cg, kg = geometry.channels_per_group
        return cls(
            size=(n, h, w),
            output=geometry.output_size[2:],
            groups=geometry.groups,
            inputs=cg,
            outputs=kg,
            kernel=geometry.weight_size[2:],
            step=geometry.stride,
            divisor=(1, 1),
            dilation=geometry.dilation,
            top=geometry.padding.top,
            left=geometry.padding.left,
            transposed=False,
        )

    @classmethod
    def input_grad(cls, geometry: ConvGeometry) -> Correlation:
        """dx from dy: tap r of the correlation is tap R - 1 - r of the convolution."""
        n, _, h, w = geometry.input_size
        _, _, p, q = geometry.output_size
        cg, kg = geometry.channels_per_group
        _, _, r, s = geometry.weight_size
        return cls(
            size=(n, p, q),
            output=(h, w),
            groups=geometry.groups,
            inputs=kg,
            outputs=cg,
            kernel=(r, s),
            step=(1, 1),
            divisor=geometry.stride,
            dilation=geometry.dilation,
            top=geometry.dilation[0] * (r - 1) - geometry.padding.top,
            left=geometry.dilation[1] * (s - 1) - geometry.padding.left,
            transposed=True,
        )

    @property
    def lies_flat(self) -> bool:
        """Whether it is 1-d, one row of several taps, at stride and dilation 1."""
        flat = self.size[1] == self.output[0] == self.kernel[0] == 1 and self.top == 0
        return flat and self.step[1] == self.divisor[1] == self.dilation[1] == 1 < self.kernel[1]

    def upright(self) -> Correlation:
        """The same with rows for columns, for operands whose strides are swapped, too."""
        return replace(
            self,
            size=(self.size[0], self.size[2], self.size[1]),
            output=self.output[::-1],
            kernel=self.kernel[::-1],
            step=self.step[::-1],
            divisor=self.divisor[::-1],
            dilation=self.dilation[::-1],
            top=self.left,
            left=self.top,
        )

    def weight_strides(self, strides: Sequence[int]) -> tuple[int, int, int, int, int, int]:
        """Where weight[g, i, o, r, s] stands in a (K, C / groups, R, S) tensor of ``strides``.

        Returns:
            Position of the first one, then strides along g, i, o, r and s.
        """
        k, c, r, s = strides
        if not self.transposed:
            return 0, self.outputs * k, c, k, r, s
        last_tap = (self.kernel[0] - 1) * r + (self.kernel[1] - 1) * s
        return last_tap, self.inputs * k, k, c, -r, -s


def stands_upright(geometry: ConvGeometry) -> bool:
    """Whether weight gradients slide along the rows of ``geometry``: its kernel is one row of several taps.

    Tap (0, s) has the same number as tap (s, 0) of the kernel that stands upright.
    """
    _, _, r, s = geometry.weight_size
    return r == 1 < s and geometry.stride[1] == geometry.dilation[1] == 1


def upright_geometry(geometry: ConvGeometry) -> ConvGeometry:
    """``geometry`` with rows for columns, for operands whose strides are swapped, too."""
    (n, channels, h, w), (k, group_in, r, s) = geometry.input_size, geometry.weight_size
    top, bottom, left, right = geometry.padding
    return replace(
        geometry,
        input_size=(n, channels, w, h),
        weight_size=(k, group_in, s, r),
        stride=geometry.stride[::-1],
        padding=Padding(left, right, top, bottom),
        dilation=geometry.dilation[::-1],
    )


def pairs_of(length: int, offset: int) -> tuple[int, int]:
    """The first a, and how many, so that all of 0 .. length - 1 are 2a + offset or 2a + 1 + offset."""
    first = -offset // 2
    return first, (length - 1 - offset) // 2 - first + 1
