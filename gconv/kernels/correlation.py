"""The operation that forward passes and input gradients have in common: a grouped correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gconv.geometry import ConvGeometry, Padding


@dataclass(frozen=True, slots=True)
class Correlation:
    """A grouped correlation of a source x (N, H, W, groups, inputs) to y (N, P, Q, groups, outputs).

        y[n, p, q, g, o] = sum over r, s, i of x[n, h, w, g, i] weight[g, i, o, r, s]
        where  divisor h = step p + dilation r - top,  and the same for w with q, s and left,

    x counts as zero outside the image and where the division leaves a remainder. The forward pass has a
    divisor of 1. The input gradient has a step of 1, divides by the stride and meets the taps in reverse
    order.

    Args:
        size: (N, H, W) of x.
        output: (P, Q).
        groups: number of groups.
        inputs, outputs: channels of one group of x and of y.
        kernel: (R, S).
        step, divisor, dilation: (vertical, horizontal).
        top, left: zeros around x. Negative values skip rows and columns.
        transposed: whether to swap inputs and outputs of the weights and flip the taps. Weights are stored as
            (outputs, inputs) for the forward pass.
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
        """Return the correlation of "forward" or "input_grad"."""
        return cls.forward(geometry) if pass_ == "forward" else cls.input_grad(geometry)

    @classmethod
    def forward(cls, geometry: ConvGeometry) -> Correlation:
        """Return the correlation that computes y from x."""
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
        """Return the correlation that computes dx from dy: its tap r is tap R - 1 - r of the convolution."""
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
        """Whether it is 1-d: one row of several taps, at stride and dilation 1."""
        flat = self.size[1] == self.output[0] == self.kernel[0] == 1 and self.top == 0
        return flat and self.step[1] == self.divisor[1] == self.dilation[1] == 1 < self.kernel[1]

    def upright(self) -> Correlation:
        """Return the correlation with rows and columns exchanged. Its operands' strides must be, too."""
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
        """Return where weight[g, i, o, r, s] is in a (K, C / groups, R, S) tensor of ``strides``.

        Returns:
            Position of the first weight, then strides along g, i, o, r and s.
        """
        k, c, r, s = strides
        if not self.transposed:
            return 0, self.outputs * k, c, k, r, s
        last_tap = (self.kernel[0] - 1) * r + (self.kernel[1] - 1) * s
        return last_tap, self.inputs * k, k, c, -r, -s


def stands_upright(geometry: ConvGeometry) -> bool:
    """Return whether weight gradients slide along the rows: the kernel is one row of several taps.

    Tap (0, s) of the kernel is tap (s, 0) of the upright kernel, and both have the same number.
    """
    _, _, r, s = geometry.weight_size
    return r == 1 < s and geometry.stride[1] == geometry.dilation[1] == 1


def upright_geometry(geometry: ConvGeometry) -> ConvGeometry:
    """Return ``geometry`` with rows and columns exchanged. The strides of its operands must be, too."""
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
    """Return the first a, and how many, such that 2a + offset and 2a + 1 + offset cover 0 .. length - 1."""
    first = -offset // 2
    return first, (length - 1 - offset) // 2 - first + 1
