"""``python -m benchmarks.matrix``: compile every kernel for every GPU, and save tables of the results.

Compile every kernel for every GPU, and save the tables that `python -m gconv kernels` prints. They replace
the committed tables, together with their stamp, only once all are complete and no kernel for an NVIDIA GPU
spills. Until then they are kept in build/, so you can stop the command and run it again to continue.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import triton

from benchmarks import stamps
from benchmarks.sources import ROOT, digests
from gconv.measure.suites import QUICK
from gconv.measure.terminal import fail

# Options of ``python -m gconv kernels`` for each table. It compiles for five GPUs, by default in float16.
TABLES = {
    "plain": ("--dtypes", "float16", "bfloat16", "tf32", "float32"),
    "epilogue": ("--form", "epilogue", "--suite", *QUICK),
    "residual": ("--form", "residual", "--suite", *QUICK),
    "norm": ("--form", "norm", "--suite", *QUICK),
}
# Other versions of Triton than the installed one compile only a part, because their code is nearly the same.
OLDER = ("sm_80", "sm_90")
OLDER_OPTIONS = ("--dtypes", "float16", "--targets", *OLDER)
COMMITTED = stamps.RESULTS_FOLDER / "compiled"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and write all tables, and return the exit code: 1 if a kernel spills."""
    parsed, options = _parser().parse_known_args(arguments)
    if options and parsed.out == COMMITTED:
        fail("only the complete matrix can replace the committed tables: add --out DIR")
    if parsed.out.exists() and parsed.out != COMMITTED:
        fail(f"{parsed.out} already exists: remove it, or choose a different --out")
    start, work = time.monotonic(), _work(options)
    made = [
        _make(work / f"triton-{version}" / f"{name}.txt", folder, options)
        for folder, version in [(None, triton.__version__), *((f, _version(f)) for f in parsed.triton)]
        for name in TABLES
    ]
    minutes = f"{(time.monotonic() - start) / 60:.1f} minutes"
    if not all(made):
        print(f"error: {made.count(False)} of {len(made)} tables failed, after {minutes}", file=sys.stderr)
        return 1
    if work != _work(options):
        fail(f"the kernels were changed while this ran, for {minutes}: run the command again")
    shutil.rmtree(parsed.out, ignore_errors=True)
    shutil.move(work, parsed.out)
    if parsed.out == COMMITTED:
        stamps.stamp("compiled", None)
        stamps.write_table()
    print(f"{len(made)} tables in {parsed.out}, after {minutes}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.matrix",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are passed on to python -m gconv kernels, to compile only a part:\n\n"
        "  python -m benchmarks.matrix --suite tiny --out DIR\n",
    )
    parser.add_argument(
        "--triton", type=Path, nargs="*", default=[], metavar="DIR",
        help="folders with other versions of Triton to compile with, too; make one with "
        "pip install --no-deps --target DIR triton==VERSION",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        default=COMMITTED,
        metavar="DIR",
        help="new folder for the tables (default: %(default)s)",
    )
    return parser


def _make(path: Path, folder: Path | None, options: Sequence[str]) -> bool:
    """Make a table of ``TABLES`` if it doesn't exist; return False if a kernel spills or doesn't compile."""
    what = f"{path.stem}, {path.parent.name}"
    if path.exists():
        print(f"{what}: already made", file=sys.stderr)
        return True
    print(f"{what}:", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(folder.resolve())] if folder else []
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    less = OLDER_OPTIONS if folder else ()
    command = [sys.executable, "-m", "gconv.kernels", *TABLES[path.stem], *less, *options]
    part = path.with_suffix(".part")
    with open(part, "w") as file:
        done = subprocess.run(command, stdout=file, env=environment, cwd=ROOT)
    if done.returncode == 0:
        part.replace(path)
    return done.returncode == 0


def _version(folder: Path) -> str:
    """Return the version of the Triton in ``folder``."""
    for found in distributions(name="triton", path=[str(folder)]):
        return found.version
    fail(f"can't find Triton in {folder}: pip install --no-deps --target {folder} triton==VERSION")


def _work(options: Sequence[str]) -> Path:
    """Return the folder for unfinished tables, made from the current sources with ``options``."""
    decided = [*digests(stamps.RESULTS["compiled"].roots).items(), *options]
    return ROOT / "build" / f"matrix-{hashlib.sha256(repr(decided).encode()).hexdigest()[:8]}"


if __name__ == "__main__":
    sys.exit(main())
