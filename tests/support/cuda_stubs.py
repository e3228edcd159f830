"""Replace the CUDA libraries of a torch that was installed without them, so that it imports on a CPU.

The wheels of torch on PyPI are half a gigabyte and load 2 GB of CUDA libraries on import, which a machine
without a GPU never calls. Needs binutils and a C compiler, which Triton needs too.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

CUDA_LIBRARY = re.compile(r"NEEDED.*\[(lib(?:cu|nv|nccl)[^\]]+)\]")
CUDA_SYMBOL = re.compile(r"cu|nccl|nvshmem")
NO_DEVICE = 100  # cudaErrorNoDevice; in other libraries just an error


def stub_cuda(libraries: Path) -> list[str]:
    """Write a stub of each CUDA library that torch needs; all functions return an error.

    Args:
        libraries: folder of torch's libraries, in which the stubs are written.

    Returns:
        The names of the stubs; empty for a CPU build.
    """
    ours = sorted(libraries.glob("*.so"))
    needed = {name for path in ours for name in CUDA_LIBRARY.findall(_output("readelf", "-dW", path))}
    symbols, versions = _undefined(ours, needed)
    for name in needed:
        _compile(libraries / name, symbols[name], versions.get(name, name))
    return sorted(needed)


def _undefined(ours: list[Path], needed: set[str]) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Return the functions that each library must have, and the symbol version of each library.

    Functions without a version can be in any library; they are added to the CUDA runtime.
    """
    listings = [_output("nm", "-D", "--defined-only", path).split() for path in ours]
    defined = {word.partition("@")[0] for listing in listings for word in listing}
    runtime = next((name for name in needed if name.startswith("libcudart")), "")
    symbols, versions = defaultdict(set), {}
    for path in ours:
        # "File: libcublas.so.13  Cnt: 1", then a line with "Name: libcublas.so.13" for each version
        needs = re.findall(r"File: (\S+).*\n((?:.*Name: .*\n)+)", _output("readelf", "-VW", path))
        files = {version: file for file, body in needs for version in re.findall(r"Name: (\S+)", body)}
        for line in _output("nm", "-D", "--undefined-only", path).splitlines():
            symbol, _, version = line.split()[-1].partition("@")
            file = files.get(version.strip("@"))
            if file in needed:
                symbols[file].add(symbol)
                versions[file] = version.strip("@")
            elif not version and symbol not in defined and CUDA_SYMBOL.match(symbol):
                symbols[runtime].add(symbol)
    return symbols, versions


def _compile(path: Path, symbols: set[str], version: str) -> None:
    """Build a library whose functions return an error, or the text of an error."""
    text = {"cudaGetErrorString", "cudaGetErrorName"} & symbols
    code = [f"long {symbol}(void) {{ return {NO_DEVICE}; }}" for symbol in sorted(symbols - text)]
    code += [f'const char *{symbol}(int error) {{ return "no CUDA here"; }}' for symbol in sorted(text)]
    script = path.with_suffix(".map")
    script.write_text(f"{version} {{ global: *; }};\n")
    linking = [f"-Wl,-soname,{path.name}", f"-Wl,--version-script={script}"]
    command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", *linking, "-o", path, "-x", "c", "-"]
    subprocess.run(command, input="\n".join(code), text=True, check=True)
    script.unlink()


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
