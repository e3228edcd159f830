"""The grouped layers of well-known networks, for which gconv is compiled, tuned and measured."""

from __future__ import annotations

from dataclasses import dataclass

from gconv.geometry import ConvGeometry, Padding


@dataclass(frozen=True, slots=True)
class Layer:
    """A grouped convolution with the same number of input and output channels.

    The padding is half the kernel size: at stride 1, an odd kernel keeps the size and an even kernel makes it
    one larger.

    Args:
        channels, groups: the number of channels, C = K, and of groups.
        size: height and width of the output, or the length for 1-d. For a transposed layer, of its input.
        kernel: height and width of the kernel, or its length. Defaults to 3.
        stride: stride along each axis. Defaults to 1.
        dims: 2, or 1 for images of one row. Defaults to 2.
        transposed: whether this is a transposed convolution: its forward pass is the input gradient of the
            convolution described by the other fields, and its input gradient is that convolution. It is
            padded to make the output ``stride`` times as large as the input. Defaults to False.
    """

    channels: int
    groups: int
    size: int
    kernel: int = 3
    stride: int = 1
    dims: int = 2
    transposed: bool = False

    @property
    def name(self) -> str:
        """The layer's name, such as "256/32, 28x28, stride 2" or "512/512, length 1000, kernel 31".

        It contains channels / groups, the size, the kernel if not 3x3, and the stride if not 1.
        """
        size = f"{self.size}x{self.size}" if self.dims == 2 else f"length {self.size}"
        sides = f"{self.kernel}x{self.kernel}" if self.dims == 2 else f"kernel {self.kernel}"
        kernel = f", {sides}" if self.kernel != 3 or self.dims == 1 else ""
        stride = f", stride {self.stride}" if self.stride != 1 else ""
        transposed = ", transposed" if self.transposed else ""
        return f"{self.channels}/{self.groups}, {size}{kernel}{stride}{transposed}"

    def geometry(self, batch: int) -> ConvGeometry:
        """Return the sizes and settings of a call with ``batch`` images."""
        zeros = (self.kernel - self.stride + 1) // 2 if self.transposed else self.kernel // 2
        flat = self.dims == 1
        height, kernel, stride = (1, 1, 1) if flat else (self.size * self.stride, self.kernel, self.stride)
        return ConvGeometry(
            input_size=(batch, self.channels, height, self.size * self.stride),
            weight_size=(self.channels, self.channels // self.groups, kernel, self.kernel),
            stride=(stride, self.stride),
            padding=Padding(*[0 if flat else zeros] * 2, *[zeros] * 2),
            dilation=(1, 1),
            groups=self.groups,
        )


def _stages(width: int, groups: int) -> tuple[Layer, ...]:
    """Return the distinct grouped layers of a ResNeXt on 224x224 images; later stages start with stride 2."""
    layers = [Layer(width, groups, 56)]
    for stage in (1, 2, 3):
        channels, size = width << stage, 56 >> stage
        layers += [Layer(channels, groups, size, stride=2), Layer(channels, groups, size)]
    return tuple(layers)


def _regnety() -> tuple[Layer, ...]:
    """Return layers of RegNetY-400MF, 800MF, 3.2GF, 8GF and 16GF, with groups of 8 to 112 channels."""
    shapes = [(208, 26, 14), (320, 20, 14), (216, 9, 28), (448, 8, 28), (1232, 11, 14)]
    return tuple(Layer(*shape, stride=stride) for shape in shapes for stride in (2, 1))


SUITES: dict[str, tuple[Layer, ...]] = {
    "resnext50_32x4d": _stages(128, 32),
    "resnext101_32x8d": _stages(256, 32),
    "resnext101_64x4d": _stages(256, 64),
    "regnety": _regnety(),
    # 3x3 at stride 1 and 2 as in MobileNet, and 7x7 as in ConvNeXt.
    "depthwise": (
        Layer(144, 144, 56),
        Layer(144, 144, 28, stride=2),
        Layer(384, 384, 14),
        Layer(96, 96, 56, kernel=7),
        Layer(384, 384, 14, kernel=7),
    ),
    # The first and the last stage of RepLKNet-31B.
    "large_depthwise": (
        Layer(128, 128, 56, kernel=31),
        Layer(1024, 1024, 7, kernel=13),
    ),
    # For ten seconds of audio: the positional convolution of wav2vec 2.0 at 50 frames per second, and a
    # Conformer's convolution at 100. Also a short convolution, as in the blocks of Mamba and Hyena.
    "audio": (
        Layer(768, 16, 500, kernel=128, dims=1),
        Layer(512, 512, 1000, kernel=31, dims=1),
        Layer(512, 512, 1000, kernel=3, dims=1),
    ),
    # The upsampling layers of a U-Net, in groups, and depthwise upsampling.
    "transposed": (
        Layer(256, 32, 28, stride=2, transposed=True),
        Layer(256, 32, 28, kernel=2, stride=2, transposed=True),
        Layer(256, 32, 28, kernel=4, stride=2, transposed=True),
        Layer(256, 256, 28, kernel=4, stride=2, transposed=True),
    ),
    # From no network: for trying a tool in seconds.
    "tiny": (Layer(16, 4, 6), Layer(16, 4, 3, stride=2)),
}

REAL = [name for name in SUITES if name != "tiny"]  # the suites of real networks
# The suites whose kernels are also compiled with epilogues and norms for the committed tables. The others are
# left out because each of their kernels takes many seconds to compile.
QUICK = [name for name in REAL if name not in ("large_depthwise", "audio")]
