"""Read the machine code of a compiled kernel: its registers, its spills and its main loop's instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ACCESS_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # by suffix in SASS; otherwise 4


class MachineCode(NamedTuple):
    """The machine code of a kernel.

    Args:
        registers: registers per thread.
        spills: bytes per thread that didn't fit in registers.
        listing: instructions and labels. Labels end in a colon.
    """

    registers: int
    spills: int
    listing: list[str]


def read_machine_code(compiled: CompiledKernel) -> MachineCode:
    """Read a kernel that was compiled for an NVIDIA or AMD GPU."""
    return _read_cubin(compiled) if "cubin" in compiled.asm else _read_amdgcn(compiled)


def main_loop(listing: list[str]) -> list[str]:
    """Return the instructions of the longest innermost loop in a listing; empty if there is no loop."""
    labels: dict[str, int] = {}
    loops = []
    for i, line in enumerate(listing):
        if line.endswith(":"):
            labels[line[:-1]] = i
        elif re.search(r"\bBRA\b|s_cbranch|s_branch", line):
            target = re.search(r"(\.?L[\w.$]+)\)?$", line)
            if target and target[1] in labels and i - labels[target[1]] > 1:
                loops.append((labels[target[1]], i + 1))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return [line for line in listing[start:end] if not line.endswith(":")]


def bytes_moved(instruction: str) -> int:
    """Return the bytes of global memory that an NVIDIA instruction loads or stores per thread."""
    match = re.search(r"\b(?:LDGSTS|LDG|STG)(\.\S+)", instruction)
    if match is None:
        return 0
    return next((size for name, size in ACCESS_BYTES.items() if f".{name}." in f"{match[1]}."), 4)


def reads_shared_memory(instruction: str) -> bool:
    """Whether an NVIDIA instruction reads shared memory."""
    return re.search(r"\bLDSM?\b", instruction) is not None


def copied_ahead(loop: list[str]) -> str:
    """Return the cache through which a loop copies to shared memory: "L1", "L2", or "" for no copies."""
    copies = [line for line in loop if "LDGSTS" in line]
    return ("L2" if all("BYPASS" in line for line in copies) else "L1") if copies else ""


def _read_cubin(compiled: CompiledKernel) -> MachineCode:
    """Read machine code for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
        code = _run_tool("nvdisasm", "-c", "-ndf", file.name)  # no data flow: the same listing in less time
    labels_and_code = re.findall(r"^(\.L_x_\d+:)|^\s+/\*[0-9a-f]{4,}\*/\s+([^;]*?)\s*;", code, re.MULTILINE)
    listing = [label or instruction.replace("`", "") for label, instruction in labels_and_code]
    return MachineCode(_number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), listing)


def _read_amdgcn(compiled: CompiledKernel) -> MachineCode:
    """Read assembly for an AMD GPU."""
    text = compiled.asm["amdgcn"]
    registers, spills = (
        _number(rf"^\s+\.{field}:\s+(\d+)", text) for field in ("vgpr_count", "private_segment_fixed_size")
    )
    labels_and_code = re.findall(r"^(\.L\w+:)|^\t([a-z]\w*_.*?)\s*(?:;.*)?$", text, re.MULTILINE)
    return MachineCode(registers, spills, [label or line for label, line in labels_and_code])


def _number(pattern: str, text: str) -> int:
    """Return the first number that a pattern finds in the output of the compiler's tools."""
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"can't find {pattern!r} in the compiler's output: {text[:200]!r}")
    return int(match[1])


def _run_tool(name: str, *arguments: str) -> str:
    """Return the output of a tool that comes with Triton."""
    command = [str(NVIDIA_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
