"""What a measurement depends on besides the code that is measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and time, to be written beside every number.

    Clocks in MHz, the driver's version and the power limit in W are what ``nvidia-smi`` says at the moment.
    The commit ends in "-dirty" where the working tree had changes; it is None outside a checkout.
    """
    facts = {
        "gpu": None,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gconv": _version("gconv"),
        "commit": _commit(),
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


def slug(name: str) -> str:
    """A device's name as files and folders bear it, such as nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that gconv lies in; GCONV_COMMIT where the code travelled without its repository."""
    folder = Path(__file__).parent
    command = ("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return os.environ.get("GCONV_COMMIT") or _output(*command)


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    fields = {
        "driver": "driver_version",
        "clock_sm_mhz": "clocks.sm",
        "clock_memory_mhz": "clocks.mem",
        "clock_sm_max_mhz": "clocks.max.sm",
        "power_limit_w": "power.limit",
    }
    command = ("nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits")
    said = _output(*command, f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}") or _output(*command)
    values = [] if said is None else said.splitlines()[0].split(", ")
    return dict(zip(fields, values, strict=False))


def _output(*command: str) -> str | None:
    """What a program prints, None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
