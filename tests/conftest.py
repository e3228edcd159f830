from __future__ import annotations

import pytest
import torch
from oracle import CASES, PATHS, Case

from resnext.data import Digits, load_mnist5k


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
def digits() -> tuple[Digits, Digits]:
    return load_mnist5k()
