"""The three equivalent forms of the ResNeXt block (figure 3 of the paper, arXiv 1611.05431).

    (a) SplitTransformMerge   C separate paths of 1x1, 3x3 and 1x1, whose outputs are summed
    (b) EarlyConcatenation    C paths of 1x1 and 3x3, whose outputs are concatenated, followed by a 1x1
    (c) resnext.Bottleneck    1x1, grouped 3x3, 1x1

All three compute the same function. `split` and `concatenate` convert a block of form (c), with its weights
and batch norm statistics, to forms (a) and (b), and `group` converts either of them back.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from resnext.model import Bottleneck, shortcut


class BlockPath(nn.Module):
    """One of the C paths: 1x1 and 3x3 convolution with batch norm and ReLU, and in form (a) another 1x1.

    Args:
        in_channels: number of input channels of the block.
        width: number of channels inside the path, d in the paper.
        stride: stride of the 3x3 convolution.
        out_channels: number of output channels of the last 1x1 convolution. Defaults to None, which leaves it
            out.
    """

    def __init__(self, in_channels: int, width: int, stride: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Identity() if out_channels is None else nn.Conv2d(width, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels or width, H / stride, W / stride), rounded up."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return self.conv3(torch.relu(self.bn2(self.conv2(out))))


class SplitTransformMerge(nn.Module):
    """Form (a) of the block: separate paths. The arguments are those of `resnext.Bottleneck`."""

    def __init__(
        self, in_channels: int, out_channels: int, cardinality: int, group_width: int, stride: int = 1
    ) -> None:
        super().__init__()
        paths = (BlockPath(in_channels, group_width, stride, out_channels) for _ in range(cardinality))
        self.paths = nn.ModuleList(paths)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        out = self.bn3(sum(path(x) for path in self.paths))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class EarlyConcatenation(nn.Module):
    """Form (b) of the block: concatenated paths. The arguments are those of `resnext.Bottleneck`."""

    def __init__(
        self, in_channels: int, out_channels: int, cardinality: int, group_width: int, stride: int = 1
    ) -> None:
        super().__init__()
        self.paths = nn.ModuleList(BlockPath(in_channels, group_width, stride) for _ in range(cardinality))
        self.conv3 = nn.Conv2d(cardinality * group_width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        out = self.bn3(self.conv3(torch.cat([path(x) for path in self.paths], 1)))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


F = TypeVar("F", Bottleneck, SplitTransformMerge, EarlyConcatenation)


def split(block: Bottleneck) -> SplitTransformMerge:
    """Return form (a) of a block, with copies of its weights."""
    return _ungroup(block, SplitTransformMerge, {"conv1", "bn1", "conv2", "bn2", "conv3"})


def concatenate(block: Bottleneck) -> EarlyConcatenation:
    """Return form (b) of a block, with copies of its weights."""
    return _ungroup(block, EarlyConcatenation, {"conv1", "bn1", "conv2", "bn2"})


def group(form: SplitTransformMerge | EarlyConcatenation) -> Bottleneck:
    """Return form (c), a `Bottleneck`, of a block in form (a) or (b), with copies of its weights."""
    path = form.paths[0]
    assert isinstance(path, BlockPath)
    conv = path.conv2
    block = Bottleneck(
        path.conv1.in_channels, form.bn3.num_features, len(form.paths), conv.in_channels, conv.stride[0]
    )
    state = {key: tensor for key, tensor in form.state_dict().items() if not key.startswith("paths.")}
    paths = [path.state_dict() for path in form.paths]
    for key in paths[0]:
        pieces = [path[key] for path in paths]
        state[key] = torch.cat(pieces, _group_dim(key)) if pieces[0].ndim else pieces[0]
    return _load(block, state, like=form)


def _ungroup(block: Bottleneck, form: type[F], per_path: set[str]) -> F:
    conv = block.conv2
    sizes = (block.conv1.in_channels, block.conv3.out_channels, conv.groups, conv.in_channels // conv.groups)
    state = {}
    for key, tensor in block.state_dict().items():
        if key.partition(".")[0] not in per_path:
            state[key] = tensor
            continue
        pieces = tensor.chunk(conv.groups, _group_dim(key)) if tensor.ndim else [tensor] * conv.groups
        state |= {f"paths.{i}.{key}": piece for i, piece in enumerate(pieces)}
    return _load(form(*sizes, conv.stride[0]), state, like=block)


def _group_dim(key: str) -> int:
    """Return the dimension of the groups: that of the inputs for the last 1x1, otherwise the outputs."""
    return 1 if key.startswith("conv3.") else 0


def _load(form: F, state: dict[str, Tensor], like: nn.Module) -> F:
    form.to(next(like.parameters())).load_state_dict(state)
    return form.train(like.training)
