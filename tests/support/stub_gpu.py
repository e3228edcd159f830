"""A Triton driver without a GPU: compiles kernels for sm_90, and records launches instead of running them."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

LAUNCHES: list[tuple] = []  # (name of the kernel, grid, arguments)


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        *grid, _, _, _, metadata, enter_hook, exit_hook = arguments[:9]
        LAUNCHES.append((self.name, tuple(grid), arguments[9:]))
        for hook in (enter_hook, exit_hook):
            if hook is not None:
                hook(metadata)


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 100, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


class Driver:
    launcher_cls = Launcher
    utils = Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install() -> None:
    driver.set_active(Driver())
