"""Convert a network, read the report, and check that outputs and gradients are the same as before.

Run it with ``python examples/first_steps.py``. It takes a few seconds on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import gconv


class Block(nn.Sequential):
    """A bottleneck with a grouped convolution, as in ResNeXt and RegNet, written for plain PyTorch."""

    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + super().forward(x))


def logits_and_gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of ``images`` and the gradients of a loss by all parameters, as one vector."""
    model.zero_grad()
    logits = model(images)
    nn.functional.cross_entropy(logits, torch.arange(len(images), device=images.device) % 10).backward()
    return logits.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a network and compare it with the original.")
    parser.add_argument("--batch", type=int, default=8, help="number of images (default: %(default)s)")
    parser.add_argument("--image", type=int, default=56, help="height and width (default: %(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (
        nn.Sequential(
            nn.Conv2d(3, 256, 7, stride=4, padding=3),
            Block(256, 128, groups=32),
            Block(256, 128, groups=32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        .eval()
        .to(device)
    )
    images = torch.randn(options.batch, 3, options.image, options.image, device=device)
    before = logits_and_gradients(model, images)

    print(">>> print(gconv.convert(model))")
    print(gconv.convert(model))

    after = logits_and_gradients(model, images)
    logits, gradients = [((a - b).norm() / b.norm()).item() for a, b in zip(after, before, strict=True)]
    print(f"\nrelative difference from the original: logits {logits:.0e}, gradients {gradients:.0e}\n")

    print(">>> print(gconv.explain(model[1][3], x))")
    print(gconv.explain(model[1][3], torch.randn(256, 128, 56, 56, device=device)))


if __name__ == "__main__":
    main()
