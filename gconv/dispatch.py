"""Which backend runs a pass, and why.

A backend is a module with the three passes, ``forward``, ``input_grad`` and ``weight_grad``, over tensors and
a :class:`~gconv.geometry.ConvGeometry`. The choice is made here alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

from torch import Tensor

from gconv import aten, reference

IMPLEMENTATIONS: dict[str, ModuleType] = {"aten": aten, "reference": reference}
BACKENDS = ("auto", *IMPLEMENTATIONS)

# A plain global: torch.compile guards on it and compiles anew when it changes. It cannot trace a ContextVar,
# and it does not guard on thread-local state.
_current = "auto"


def backend(name: str) -> AbstractContextManager[None]:
    """Runs the grouped convolutions inside the ``with`` block, and their backward passes, on one backend.

    The setting is the process's, like those of ``torch.backends``, not the thread's. A ``backend=`` argument
    of the call goes before it.

    Args:
        name: "auto" takes the fastest, "aten" is PyTorch's own convolution, "reference" is readable PyTorch.

    Raises:
        ValueError: ``name`` is none of them.
    """
    check_backend(name)
    return _set(name)


@contextmanager
def _set(name: str) -> Iterator[None]:
    global _current
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous


def requested(name: str | None) -> str:
    """The backend that a call asks for: its argument, else that of the ``with backend(...)`` around it."""
    if name is None:
        return _current
    check_backend(name)
    return name


def check_backend(name: str) -> None:
    """Raises ValueError where ``name`` is no backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def choose(name: str, input: Tensor) -> str:
    """Who runs a convolution of ``input`` where ``name`` was requested: a key of ``IMPLEMENTATIONS``."""
    return "aten" if name == "auto" else name


def reason(name: str, input: Tensor) -> str:
    """Why :func:`choose` chose what it did, in words."""
    if name != "auto":
        return "asked for"
    return f"gconv has no kernel for {input.device.type}, PyTorch's own is the fastest"


def implementation(name: str, input: Tensor) -> ModuleType:
    """The module that runs a pass over ``input`` where backend ``name`` was requested."""
    return IMPLEMENTATIONS[choose(name, input)]
