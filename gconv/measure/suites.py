"""The grouped layers of well-known networks, which gconv is compiled, tuned and measured on."""

from __future__ import annotations

from dataclasses import dataclass

from gconv.geometry import ConvGeometry, Padding


@dataclass(frozen=True, slots=True)
class Layer:
    """A grouped convolution with as many output as input channels, padded to keep the size at stride 1.

    Args:
        channels, groups: C = K, and the number of groups.
        size: height and width of the output.
        kernel: height and width of the kernel, odd. Defaults to 3.
        stride: vertical and horizontal stride. Defaults to 1.
    """

    channels: int
    groups: int
    size: int
    kernel: int = 3
    stride: int = 1

    @property
    def name(self) -> str:
        """Such as "256/32, 28x28, stride 2": channels / groups, output size, kernel and stride if unusual."""
        kernel = f", {self.kernel}x{self.kernel}" if self.kernel != 3 else ""
        stride = f", stride {self.stride}" if self.stride != 1 else ""
        return f"{self.channels}/{self.groups}, {self.size}x{self.size}{kernel}{stride}"

    def geometry(self, batch: int) -> ConvGeometry:
        """Return the sizes of a call with ``batch`` images."""
        return ConvGeometry(
            input_size=(batch, self.channels, self.size * self.stride, self.size * self.stride),
            weight_size=(self.channels, self.channels // self.groups, self.kernel, self.kernel),
            stride=(self.stride, self.stride),
            padding=Padding(*[self.kernel // 2] * 4),
            dilation=(1, 1),
            groups=self.groups,
        )


def _stages(width: int, groups: int) -> tuple[Layer, ...]:
    """Return the distinct grouped layers of a ResNeXt at 224 pixels: later stages start with stride 2."""
    layers = [Layer(width, groups, 56)]
    for stage in (1, 2, 3):
        channels, size = width << stage, 56 >> stage
        layers += [Layer(channels, groups, size, stride=2), Layer(channels, groups, size)]
    return tuple(layers)


def _regnety() -> tuple[Layer, ...]:
    """Return layers of RegNetY-400MF, 800MF, 3.2GF, 8GF and 16GF, whose groups have 8 to 112 channels."""
    shapes = [(208, 26, 14), (320, 20, 14), (216, 9, 28), (448, 8, 28), (1232, 11, 14)]
    return tuple(Layer(*shape, stride=stride) for shape in shapes for stride in (2, 1))


SUITES: dict[str, tuple[Layer, ...]] = {
    "resnext50_32x4d": _stages(128, 32),
    "resnext101_32x8d": _stages(256, 32),
    "resnext101_64x4d": _stages(256, 64),
    "regnety": _regnety(),
    # 3x3 with stride 1 and 2 as in MobileNet, and 7x7 as in ConvNeXt.
    "depthwise": (
        Layer(144, 144, 56),
        Layer(144, 144, 28, stride=2),
        Layer(384, 384, 14),
        Layer(96, 96, 56, kernel=7),
        Layer(384, 384, 14, kernel=7),
    ),
    # From no network: to try a tool in seconds.
    "tiny": (Layer(16, 4, 6), Layer(16, 4, 3, stride=2)),
}

REAL = [name for name in SUITES if name != "tiny"]  # of real networks
