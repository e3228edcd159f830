"""``make compat``: a short selection of the tests with the oldest and the newest supported torch and Triton.

The pairs are in pyproject.toml under ``[tool.gconv.compat]``. Each package is installed without dependencies
into its own folder, which precedes the packages of this Python. If pip finds no such torch, the pair's Triton
is tested with the installed torch, and the table says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from cuda_stubs import stub_cuda

from gconv.text import columns

ROOT = Path(__file__).parents[2]
# What pytest runs for each check, without tests marked `long`.
CHECKS = {
    "kernels, interpreted": ["tests/kernels/test_kernels.py", "-k", "every_family and float16"],
    "norms, interpreted": ["tests/kernels/test_fused_kernels.py", "-k", "before_and_after"],
    "compile for sm_90": ["tests/measure/test_compiled.py", "-k", "a_sample_comes_out"],
    "launch": ["tests/kernels/test_launch.py"],
    "autograd": [
        "tests/gconv/test_triton_backend.py",
        "tests/gconv/test_autograd.py",
        "-k",
        "gradients or step or autocast",
    ],
    "operators": [
        "tests/gconv/test_triton_backend.py",
        "tests/gconv/test_ops.py",
        "-k",
        "opcheck or each_pass",
    ],
    "torch.compile": [
        "tests/gconv/test_triton_backend.py",
        "tests/gconv/test_compile.py",
        "-k",
        "compiled_graph or (gives_the_same and static)",
    ],
    "export": ["tests/gconv/test_compile.py", "tests/networks/test_ecosystem.py", "-k", "export or onnx"],
}
VERSIONS = "import torch, triton, numpy; print(torch.__version__, triton.__version__, numpy.__version__)"


def main() -> int:
    """Test each pair, installing into the folder that the command line names; return 1 if a check failed."""
    rows, notes = [("pair", "torch", "triton", "numpy", "check", "result", "seconds")], []
    pairs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["gconv"]["compat"]
    for pair, versions in pairs.items():
        folders = []
        for package, version in versions.items():
            folder, problem = install(package, version, Path(sys.argv[1]).resolve())
            folders += [folder] if folder else []
            notes += [f"{pair}: {package} {version} cannot be installed: {problem}"] if problem else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT]))}
        found = _python(["-c", VERSIONS], environment).stdout.split() or ["cannot be imported", "", ""]
        for check, arguments in CHECKS.items():
            result, seconds, failure = run(arguments, environment)
            rows.append((pair, *found, check, result, f"{seconds:.0f}"))
            notes += [f"== {pair}, {check}", failure] if failure else []
            print(f"{pair}, {check}: {result} in {seconds:.0f} s", file=sys.stderr, flush=True)
    print(columns(rows, left=6, rule=True), *notes, sep="\n")
    return 0 if all(row[5].endswith("passed") and "failed" not in row[5] for row in rows[1:]) else 1


def install(package: str, version: str, root: Path) -> tuple[Path | None, str]:
    """Install a package into ``root`` unless it is there; return its folder, or why there is none."""
    folder = root / f"{package}-{version}"
    if folder.exists():
        return folder, ""
    part = root / f"{package}.part"
    shutil.rmtree(part, ignore_errors=True)
    print(f"installing {package} {version}", file=sys.stderr, flush=True)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(part)]
    done = _python(["-m", "pip", "install", *options, f"{package}=={version}"], dict(os.environ))
    if done.returncode:
        return None, next((line for line in done.stderr.splitlines() if "ERROR" in line), "pip failed")
    if package == "torch":
        stub_cuda(part / "torch" / "lib")
    part.rename(folder)
    return folder, ""


def run(arguments: list[str], environment: dict[str, str]) -> tuple[str, float, str]:
    """Return pytest's counts, the seconds, and the end of its output if something failed or nothing ran."""
    start = time.perf_counter()
    done = _python(["-m", "pytest", "-q", "--tb=short", *arguments], environment)
    counted = (done.stdout.strip().splitlines() or [""])[-1].partition(" in ")[0].strip("= ")
    seconds = time.perf_counter() - start
    counts = ", ".join(part for part in counted.split(", ") if "deselected" not in part)
    failure = (done.stdout + done.stderr)[-4000:] if done.returncode else ""
    return counts or "failed: nothing ran", seconds, failure


def _python(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


if __name__ == "__main__":
    sys.exit(main())
