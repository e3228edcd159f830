"""Convert the depthwise 1-d convolutions of a Conformer, a speech model.

Its activations are (N, L, C), so the convolutions get the memory layout of the kernels without a copy.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import gconv


class ConvolutionModule(nn.Module):
    """The convolution module of a Conformer (section 2.2 of arXiv 2005.08100): (N, L, C) to (N, L, C)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 2 * channels)
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.batch_norm = nn.BatchNorm1d(channels)
        self.contract = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.glu(self.expand(self.norm(x)))
        y = self.depthwise(y.transpose(1, 2))  # channels are adjacent in memory, as the kernels need them
        y = nn.functional.silu(self.batch_norm(y)).transpose(1, 2)
        return x + self.contract(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--frames", type=int, default=400, help="number of frames in a sequence (default: %(default)s)"
    )
    parser.add_argument("--channels", type=int, default=144, help="number of channels (default: %(default)s)")
    parser.add_argument(
        "--blocks", type=int, default=4, help="number of convolution modules (default: %(default)s)"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(*(ConvolutionModule(options.channels, 31) for _ in range(options.blocks)))
    model = model.eval().to(device)
    x = torch.randn(8, options.frames, options.channels, device=device)
    with torch.inference_mode():
        before = model(x)

    print(gconv.convert(model, depthwise=True))
    frames = torch.randn_like(x).transpose(1, 2)
    print(gconv.explain(model[0].depthwise, frames))
    with torch.inference_mode():
        print(f"largest difference: {(model(x) - before).abs().max():.1e}")
    print(gconv.profile(model, x))


if __name__ == "__main__":
    main()
