from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
# A second thread gains nothing on small tensors, and waits for a core that another test uses.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start
# Inductor's C++ compiles in half the time without vectors. It then needs no programs that examine the
# processor, no precompiled headers, and no processes that wait for kernels of a GPU.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
os.environ.setdefault("TORCH_WARM_POOL", "0")

import interpreter
from commands import Run
from optional import OptionalModule, skipping
from oracle import CASES, OTHERS, PATHS, Case

from gconv import ops

if TYPE_CHECKING:
    from edges import Processors

    from resnext.data import Data

# Fixtures import what the trainer needs themselves: the tests of the kernels run without it.


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
        interpreter.speed_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the test that takes minutes first, so that the others run beside it."""
    items.sort(key=lambda item: item.name != "test_every_grouped_convolution_of_timm_is_swapped")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return OptionalModule.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with skipping(item.name):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with skipping(item.name):
        yield


@pytest.fixture(params=CASES + OTHERS, ids=lambda case: case.name)
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
    from resnext.data import load_data

    return load_data("mnist5k")


@pytest.fixture(scope="session")
def digits() -> Data:
    from resnext.data import load_data

    return load_data("digits")


@pytest.fixture(scope="session")
def few(mnist: Data) -> Data:
    """300 digits of MNIST, and 100 held out."""
    from resnext.data import Images

    parts = ((mnist.train, 300), (mnist.test, 100))
    train, test = (Images(part.images[:n], part.labels[:n]) for part, n in parts)
    return replace(mnist, train=train, test=test)


@pytest.fixture
def run(
    few: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The command line in an empty folder, where mnist5k is ``few``: (exit code, stdout, stderr)."""
    from resnext.__main__ import main
    from resnext.cli.runtime import console

    monkeypatch.setattr("resnext.data.load_mnist5k", lambda: few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(console, "width", 120)  # otherwise that of the terminal when it was first imported

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resnext", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture(scope="session")
def _trained_once(few: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rich.console import Console

    from resnext.config import Network, Recipe, Settings
    from resnext.loop import train
    from resnext.world import World

    folder = tmp_path_factory.mktemp("trained") / "demo"
    settings = Settings(network=Network((1, 1, 0, 0), 2, 2), recipe=Recipe(batch_size=20).lasting(2))
    train(settings, few, folder, World(torch.device("cpu")), Console(quiet=True))
    return folder


@pytest.fixture
def trained(run: Run, _trained_once: Path, tmp_path: Path) -> Path:
    """``runs/demo``, a small network trained for two epochs on ``few``, in the folder of ``run``."""
    return shutil.copytree(_trained_once, tmp_path / "runs" / "demo")


@pytest.fixture
def boolean_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse the masks that Triton 3.9's interpreter refuses, whichever Triton is installed."""
    from triton.runtime.interpreter import InterpreterBuilder

    def checking(access: Callable, place: int) -> Callable:
        def checked(self: InterpreterBuilder, *arguments: object) -> object:
            assert arguments[place].data.dtype == bool, "the mask of a load or store holds integers"
            return access(self, *arguments)

        return checked

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        monkeypatch.setattr(InterpreterBuilder, name, checking(getattr(InterpreterBuilder, name), place))


@pytest.fixture
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``auto`` take the kernels for small images too, which it leaves to PyTorch to save host time."""
    from gconv import dispatch

    monkeypatch.setattr(dispatch, "HOST", 0.0)


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Multiply float32 in full, as the bounds expect; tests of TF32 ask for it themselves."""
    from gconv.measure.problem import cudnn_precision

    with cudnn_precision("ieee"):
        yield


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let ``auto`` decide by rule, as if neither gconv nor the user had measured anything."""
    import tables

    from gconv.kernels import choice

    monkeypatch.setattr(choice, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("GCONV_CACHE", str(tmp_path / "own"))
    tables.forget()
    yield
    tables.forget()


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time each call of a benchmark in two rounds."""
    monkeypatch.setattr("gconv.measure.timing.LEAST_ROUNDS", 2)
    monkeypatch.setattr("gconv.measure.timing.SECONDS", 0)
    yield
    torch.compiler.reset()


@pytest.fixture
def nothing_is_zero_by_chance() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with each fused forward pass."""
    calls, run = [], ops.norm_forward

    def noting(*args: object) -> object:
        calls.append("norm_forward")
        return run(*args)

    monkeypatch.setattr(ops, "norm_forward", noting)
    return calls


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Processors:
    """Return a function that sets the number of processors of the interpreter."""
    from gconv.kernels import launch
    from gconv.kernels.device import Device

    def set_to(count: int) -> Device:
        device = Device("cpu", "interpreter", count)
        monkeypatch.setattr(launch, "device_of", lambda _: device)
        return device

    return set_to
