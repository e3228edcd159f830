"""The grouped layers of well-known networks: what gconv is compiled, tuned and measured on."""

from __future__ import annotations

from dataclasses import dataclass

from gconv.geometry import ConvGeometry, Padding


@dataclass(frozen=True, slots=True)
class Layer:
    """A grouped convolution with as many channels out as in, padded to keep the size at stride 1.

    Args:
        channels, groups: C = K, and into how many groups they are split.
        size: height and width of the output.
        kernel: height and width of the kernel, odd.
        stride: the same both ways.
    """

    channels: int
    groups: int
    size: int
    kernel: int = 3
    stride: int = 1

    @property
    def name(self) -> str:
        """Such as "256/32, 28x28, stride 2": channels / groups, the output's size, and what is unusual."""
        kernel = f", {self.kernel}x{self.kernel}" if self.kernel != 3 else ""
        stride = f", stride {self.stride}" if self.stride != 1 else ""
        return f"{self.channels}/{self.groups}, {self.size}x{self.size}{kernel}{stride}"

    def geometry(self, batch: int) -> ConvGeometry:
        """The sizes of a call with ``batch`` images."""
        return ConvGeometry(
            input_size=(batch, self.channels, self.size * self.stride, self.size * self.stride),
            weight_size=(self.channels, self.channels // self.groups, self.kernel, self.kernel),
            stride=(self.stride, self.stride),
            padding=Padding(*[self.kernel // 2] * 4),
            dilation=(1, 1),
            groups=self.groups,
        )


def _stages(width: int, groups: int) -> tuple[Layer, ...]:
    """The distinct grouped layers of a ResNeXt at 224 pixels: a later stage's first block has stride 2."""
    layers = [Layer(width, groups, 56)]
    for stage in (1, 2, 3):
        channels, size = width << stage, 56 >> stage
        layers += [Layer(channels, groups, size, stride=2), Layer(channels, groups, size)]
    return tuple(layers)


def _regnety() -> tuple[Layer, ...]:
    """Groups of 8, 16, 24, 56 and 112 channels: from RegNetY-400MF, 800MF, 3.2GF, 8GF and 16GF."""
    shapes = [(208, 26, 14), (320, 20, 14), (216, 9, 28), (448, 8, 28), (1232, 11, 14)]
    return tuple(Layer(*shape, stride=stride) for shape in shapes for stride in (2, 1))


SUITES: dict[str, tuple[Layer, ...]] = {
    "resnext50_32x4d": _stages(128, 32),
    "resnext101_32x8d": _stages(256, 32),
    "resnext101_64x4d": _stages(256, 64),
    "regnety": _regnety(),
    # MobileNet's 3x3, stride 1 and 2, and ConvNeXt's 7x7
    "depthwise": (
        Layer(144, 144, 56),
        Layer(144, 144, 28, stride=2),
        Layer(384, 384, 14),
        Layer(96, 96, 56, kernel=7),
        Layer(384, 384, 14, kernel=7),
    ),
    # no network's: to try a harness in seconds
    "tiny": (Layer(16, 4, 6), Layer(16, 4, 3, stride=2)),
}

REAL = [name for name in SUITES if name != "tiny"]
