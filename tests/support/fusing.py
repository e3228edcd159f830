"""Networks to fuse, and comparisons of the fused network with the original."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gconv


class Branch(nn.Module):
    """A residual branch that ends in a grouped convolution, followed by a sum and an activation."""

    def __init__(
        self, activation: nn.Module | None = None, inplace: bool = False, swap: bool = False
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.activation, self.inplace, self.swap = activation, inplace, swap

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.last(F.relu(self.norm(self.first(x)))))
        if self.inplace:
            y += x
        else:
            y = x + y if self.swap else y + x
        return y if self.activation is None else self.activation(y)


def trained(model: nn.Module) -> nn.Module:
    """Return ``model`` with random statistics and scales, in float64 and evaluation mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model.double().eval()


def counts(report: gconv.FusionReport) -> tuple[int, int, int, int]:
    """Count batch norms folded and not folded, and activations and residuals fused into convolutions."""
    return (
        len(report.folded),
        len(report.not_folded),
        sum(layer.activation is not None for layer in report.layers),
        sum(layer.residual for layer in report.layers),
    )


@torch.no_grad()
def assert_same(model: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Check that ``fused`` returns what ``model`` does, in float64."""
    right, found = model(x), fused(x)
    assert (found - right).abs().max() <= 1e-9 * (1 + right.abs().max())
