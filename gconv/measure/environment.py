"""Describe the machine, versions and commit that a measurement depends on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LOAD_SECONDS = 0.2  # an idle GPU needs about this long to raise its clocks
LOAD_BYTES = 2**26  # copied to keep the GPU busy: larger than its cache


def environment(device: torch.device) -> dict[str, Any]:
    """Return the machine, versions, commit and time, to be saved with every measurement.

    The driver version, the power limit in W and the clocks in MHz come from ``nvidia-smi``. The clocks
    "under load" are read while the GPU copies memory, because an idle GPU lowers them. The commit ends in
    "-dirty" if the working tree has uncommitted changes, and is None outside a checkout.
    """
    facts: dict[str, Any] = {
        "gpu": None,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gconv": _version("gconv"),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["cuda"] = torch.version.cuda or torch.version.hip
        facts |= _nvidia_smi(device)
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of this checkout, or ``GCONV_COMMIT`` if set, for copies without a repository."""
    folder = Path(__file__).parent
    command = ("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return os.environ.get("GCONV_COMMIT") or _output(*command)


@contextmanager
def busy(work: Callable[[], object]) -> Iterator[None]:
    """Repeat ``work`` in another thread, from ``LOAD_SECONDS`` before the ``with`` block until it ends."""
    done = threading.Event()

    def repeat() -> None:
        while not done.is_set():
            work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        time.sleep(LOAD_SECONDS)
        yield
    finally:
        done.set()
        thread.join()


def _copying(device: torch.device) -> Callable[[], None]:
    """Return a function that keeps the GPU busy for a moment by copying memory."""
    source, target = (torch.empty(LOAD_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        for _ in range(16):
            target.copy_(source)
        torch.cuda.synchronize(device)

    return copy


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    fields = {
        "driver": "driver_version",
        "clock_sm_under_load_mhz": "clocks.sm",
        "clock_memory_under_load_mhz": "clocks.mem",
        "clock_sm_max_mhz": "clocks.max.sm",
        "power_limit_w": "power.limit",
    }
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ("nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits")
    with busy(_copying(device)):
        this_gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        printed = _output(*command, this_gpu) or _output(*command)
    values = [] if printed is None else printed.splitlines()[0].split(", ")
    return dict(zip(fields, values, strict=False))


def _output(*command: str) -> str | None:
    """Return what a program prints, or None if it isn't installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
