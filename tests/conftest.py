from __future__ import annotations

import os

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from oracle import CASES, PATHS, Case

from gconv import ops
from resnext.data import Data, load_data


def pytest_configure() -> None:
    # The tensors are small: a second thread gains nothing, and waits for its core where something else runs.
    torch.set_num_threads(1)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mnist() -> Data:
    return load_data("mnist5k")


@pytest.fixture(scope="session")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each fused forward pass."""
    calls, run = [], ops.norm_forward

    def noting(*args: object) -> object:
        calls.append("norm_forward")
        return run(*args)

    monkeypatch.setattr(ops, "norm_forward", noting)
    return calls
