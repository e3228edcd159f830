"""Run every kernel on small layers under compute-sanitizer, which checks their memory accesses:

    export PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --error-exitcode 1 python3 tests/gpu/sanitize.py

The second variable switches off PyTorch's memory cache, whose large blocks hide accesses past the end of a
tensor. Tensors and their pixels start at multiples of 16 bytes, as in most networks, because the kernels use
wider loads then. Results aren't checked: the other tests do that.
"""

from __future__ import annotations

import os

import torch

from gconv import kernels
from gconv.geometry import ConvGeometry
from gconv.measure.problem import Problem
from gconv.measure.terminal import fail

ONE, SAME, DOWN = (1, 1), (1, 1, 1, 1), (2, 2)
LAYERS = {
    "strips": ConvGeometry.of((3, 32, 9, 7), (32, 4, 3, 3), ONE, SAME, ONE, 8),
    "strips, one group": ConvGeometry.of((2, 48, 5, 6), (48, 48, 3, 3), ONE, SAME, ONE, 1),
    "pairs and residue": ConvGeometry.of((2, 32, 9, 11), (32, 16, 3, 3), DOWN, SAME, ONE, 2),
    "slide": ConvGeometry.of((2, 16, 5, 9), (16, 4, 3, 3), ONE, (0, 0, 0, 0), (1, 2), 4),
    "taps": ConvGeometry.of((2, 32, 5, 7), (16, 16, 1, 1), ONE, (0, 0, 0, 0), ONE, 2),
    "depthwise-slide": ConvGeometry.of((2, 32, 6, 9), (32, 1, 3, 3), ONE, SAME, ONE, 32),
    "depthwise-blocks": ConvGeometry.of((2, 32, 6, 9), (32, 1, 9, 9), ONE, (4, 4, 4, 4), ONE, 32),
    "depthwise": ConvGeometry.of((2, 32, 7, 9), (32, 1, 3, 3), DOWN, SAME, ONE, 32),
}
TYPES = ("bfloat16", "float32", "tf32")


def start_kernels(geometry: ConvGeometry, type_: str, device: torch.device) -> None:
    """Run the three passes with a bias, and with batch norms inside. ``type_`` is a member of ``TYPES``."""
    problem = Problem("forward", geometry, type_)
    x, weight, dy = problem.draw(device)
    norm = torch.randn(3, geometry.input_size[1], device=device)
    bias = torch.randn(geometry.weight_size[0], device=device, dtype=problem.dtype)
    with problem.precision():
        kernels.forward(x, weight, bias, geometry, "relu")
        kernels.input_grad(dy, weight, torch.randn_like(norm[0]).to(x.dtype), geometry, "relu")
        kernels.weight_grad(dy, x, geometry, True)
        kernels.norm_forward(x, norm, weight, bias, geometry)
        kernels.norm_input_grad(dy, weight, x, norm, geometry)
        kernels.norm_weight_grad(dy, x, norm, geometry, True)


def main() -> None:
    """Run all kernels on the GPU."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        fail("PYTORCH_NO_CUDA_MEMORY_CACHING must be 1: otherwise the sanitizer can't detect wrong accesses")
    for name, geometry in LAYERS.items():
        for type_ in TYPES:
            start_kernels(geometry, type_, torch.device("cuda"))
            torch.cuda.synchronize()
        print(f"ran the kernels of {name}", flush=True)


if __name__ == "__main__":
    main()
