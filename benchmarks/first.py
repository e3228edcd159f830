"""``python -m benchmarks first STEP``: the first half hour on a GPU, in three steps of under ten minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sources import ROOT
from benchmarks.store import is_committed, write_json
from gconv.measure.environment import commit
from gconv.measure.terminal import STOPPED
from gconv.text import columns

FIRST_HALF_HOUR = """\
Check gconv on a GPU and see how fast it is, in three steps of less than ten minutes each:

  right   are the results right? Run the tests that need a GPU, compute-sanitizer, and python -m gconv
  where   where does the time go? Measure the memory's speed for pieces of pixels, and read Nsight Compute's
          counters for ResNeXt-50's layers
  fast    how fast is it? Tune ResNeXt-50's layers, time them and cuDNN, time the complete network, and write
          a report

  python -m benchmarks first right && python -m benchmarks first where && python -m benchmarks first fast

Each result is saved as soon as it is made, all in one folder; run the same command again to continue. The
table of tuned tiles is saved in DIR/tuned, and the other parts use it.

Exit code: 0 if everything succeeded, 1 if something failed, 3 if --minutes ran out first.
"""
QUICK = ("--contenders", "auto", "triton", "F.conv2d")  # without torch.compile, which takes minutes
OF_LAYERS = ("--suite", "resnext50_32x4d", "--dtypes", "bfloat16", "--batch", "256")


@dataclass(frozen=True)
class Part:
    """One program of a step.

    Args:
        name: its name in ``first.json``.
        arguments: arguments of Python. "{out}" is replaced by the folder.
        share: the share of the remaining minutes that the part gets as its --minutes. Defaults to 0, for
            programs without this option.
        output: file in the folder to which the part's output is written. Defaults to None, which shows it.
        once: whether to skip the part once it has succeeded. Defaults to False, for programs that find out
            themselves what is left to do.
    """

    name: str
    arguments: tuple[str, ...]
    share: float = 0.0
    output: str | None = None
    once: bool = False


STEPS = {
    "right": (
        Part("tests", ("tests/gpu/on_gpu.py", "--out", "{out}/tests.json"), 0.85),
        Part("check", ("-m", "gconv", "--json"), output="check.json", once=True),
    ),
    "where": (
        Part("pieces", ("-m", "benchmarks", "pieces", "--out", "{out}"), once=True),
        Part("counters", ("-m", "benchmarks", "counters", "--out", "{out}"), 1.0),
    ),
    "fast": (
        Part("tune", ("-m", "gconv", "tune", *OF_LAYERS, "--times", "{out}/tiles.jsonl"), 0.5),
        Part("layers", ("-m", "benchmarks", "run", *OF_LAYERS, *QUICK, "--out", "{out}"), 0.4),
        Part(
            "networks",
            (
                *("-m", "benchmarks", "networks", "--network", "resnext50_32x4d", "resnet50"),
                *("--modes", "graphed", "--batch", "256", "--out", "{out}"),
            ),
            0.9,
        ),
        Part("report", ("-m", "benchmarks", "report", "{out}")),
    ),
}


def run(step: str, folder: Path, minutes: float) -> int:
    """Run the parts of a step and record how each ended in ``first.json``.

    Args:
        step: a key of ``STEPS``.
        folder: folder for all results. Created if it doesn't exist.
        minutes: about how long the step may take.

    Returns:
        The exit code: 0 if all parts succeeded, 1 if one failed, ``STOPPED`` if time ran out first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = Outcomes(folder / "first.json")
    end = time.monotonic() + 60 * minutes
    codes = []
    for part in STEPS[step]:
        if part.once and outcomes.succeeded(step, part.name):
            print(f"== {step}: {part.name} has already succeeded", file=sys.stderr)
            continue
        left = (end - time.monotonic()) / 60
        if left <= 0:
            codes.append(STOPPED)
            print(f"== {step}: no time left for {part.name}", file=sys.stderr)
            continue
        codes.append(_run_part(part, step, folder, left, outcomes))
    print(columns([("step", "part", "exit code", "seconds"), *outcomes.rows(step)], left=2, rule=True))
    return 1 if set(codes) - {0, STOPPED} else max(codes, default=0)


class Outcomes:
    """How each part ended, kept in a file. Outcomes of another commit or of uncommitted code are dropped."""

    def __init__(self, path: Path) -> None:
        self.path, self.commit = path, commit()
        kept = json.loads(path.read_text()) if path.exists() and is_committed(self.commit) else []
        self.parts: list[dict[str, Any]] = [part for part in kept if part["commit"] == self.commit]

    def add(self, step: str, part: str, code: int, seconds: float) -> None:
        """Record how a part ended, replacing its earlier outcome."""
        self.parts = [p for p in self.parts if (p["step"], p["part"]) != (step, part)]
        fields = {"step": step, "part": part, "code": code, "seconds": round(seconds, 1)}
        self.parts.append({**fields, "commit": self.commit})
        write_json(self.path, self.parts)

    def succeeded(self, step: str, part: str) -> bool:
        """Return whether a part has already succeeded."""
        return any((p["step"], p["part"], p["code"]) == (step, part, 0) for p in self.parts)

    def rows(self, step: str) -> list[tuple[str, ...]]:
        """Return the parts of a step as rows of a table."""
        return [
            (p["step"], p["part"], str(p["code"]), f"{p['seconds']:.0f}")
            for p in self.parts
            if p["step"] == step
        ]


def _run_part(part: Part, step: str, folder: Path, minutes: float, outcomes: Outcomes) -> int:
    """Run a part in a separate process, with the folder's tuned table, and record how it ended."""
    limit = ("--minutes", f"{part.share * minutes:.2f}") if part.share else ()
    command = [sys.executable, *(a.format(out=folder.resolve()) for a in part.arguments), *limit]
    environment = {**os.environ, "GCONV_CACHE": str(folder.resolve() / "tuned")}
    print(f"== {step}: {part.name}, {minutes:.1f} minutes left", file=sys.stderr, flush=True)
    start = time.monotonic()
    with open(folder / part.output, "w") if part.output else nullcontext() as output:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output).returncode
    outcomes.add(step, part.name, code, time.monotonic() - start)
    return code
