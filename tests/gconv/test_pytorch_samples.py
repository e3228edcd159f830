"""The samples and error samples with which PyTorch tests its own convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import BACKENDS
from marks import interpreted
from oracle import FUNCTIONS, Case, check

from gconv.kinds import CONV1D, CONV2D, CONV3D, KINDS, Kind


@pytest.fixture(scope="module")
def pytorchs() -> dict[str, Any]:
    """Return PyTorch's tests of its convolutions; the catalog of all operators takes seconds to import."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.name.removeprefix("nn.functional."): op for op in op_db if "functional.conv" in op.name}


Convolve = Callable[..., torch.Tensor]


def call_sample(convolve: Convolve, sample: Any, **options: str) -> torch.Tensor:
    """Call a convolution with the arguments of a sample."""
    return convolve(sample.input, *sample.args, **sample.kwargs, **options)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pytorchs_own_samples(pytorchs: dict, kind: Kind, backend: str, dtype: torch.dtype) -> None:
    samples = list(pytorchs[kind.name].sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 10
    for sample in samples:
        ours = call_sample(FUNCTIONS[kind], sample, backend=backend)
        theirs = call_sample(kind.pytorch, sample)
        torch.testing.assert_close(ours, theirs)
        tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        grad = torch.randn_like(theirs)
        grads = [torch.autograd.grad(y, tensors, grad) for y in (ours, theirs)]
        torch.testing.assert_close(*grads)


# The interpreter takes seconds for images and half a minute for volumes.
IN_FLOAT32 = [
    pytest.param(
        *(kind, backend),
        id=f"{kind}-{backend}",
        marks=[interpreted, *[pytest.mark.long] * (kind.dims > 1)] if backend == "triton" else [],
    )
    for kind in KINDS
    for backend in (*BACKENDS, "triton")
]


@pytest.mark.usefixtures("boolean_masks", "nothing_is_zero_by_chance")
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize(("kind", "backend"), IN_FLOAT32)
def test_pytorchs_own_samples_in_float32(pytorchs: dict, kind: Kind, backend: str) -> None:
    for sample in pytorchs[kind.name].sample_inputs("cpu", torch.float32):
        x, w, b = sample.input, *sample.args
        # The samples are uniform in [-9, 9], but the bounds assume a standard deviation of 1.
        tensors = tuple(None if t is None else t / 5.2 for t in (x, w, b))
        case = Case("", tuple(x.shape), tuple(w.shape), sample.kwargs, b is not None, kind)
        check(case, backend, torch.float32, tensors=tensors)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_integers(pytorchs: dict, kind: Kind, backend: str) -> None:
    for sample in pytorchs[kind.name].sample_inputs("cpu", torch.int64):
        ours = call_sample(FUNCTIONS[kind], sample, backend=backend)
        assert torch.equal(ours, call_sample(kind.pytorch, sample))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [CONV1D, CONV2D, CONV3D], ids=str)
def test_pytorchs_own_error_samples_raise_the_same_type(pytorchs: dict, kind: Kind, backend: str) -> None:
    errors = list(pytorchs[kind.name].error_inputs("cpu"))
    assert len(errors) > 8
    for error in errors:
        with pytest.raises(error.error_type):
            call_sample(kind.pytorch, error.sample_input)
        with pytest.raises(error.error_type):
            call_sample(FUNCTIONS[kind], error.sample_input, backend=backend)


# PyTorch has no such samples for transposed convolutions.
