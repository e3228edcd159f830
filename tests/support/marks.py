"""Marks that several test files share."""

from __future__ import annotations

import os

import pytest
import torch

interpreted = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="the kernels run on the GPU: pytest -m gpu"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
# For files that run kernels in the interpreter.
INTERPRETED_KERNELS = [
    pytest.mark.usefixtures("boolean_masks", "nothing_is_zero_by_chance"),
    interpreted,
]
# For files with tests that need a GPU. They must also use `pytest.mark.gpu`, which on_gpu.py selects.
ON_A_GPU = [
    pytest.mark.usefixtures("however_small", "no_tables"),
    needs_gpu,
    # Warnings of cuDNN and the compiler differ between machines: show them, but don't fail.
    pytest.mark.filterwarnings("default::UserWarning", "ignore:Using padding='same':UserWarning"),
]
