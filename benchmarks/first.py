"""The first half hour on a GPU, in three steps of under ten minutes: ``python -m benchmarks first STEP``."""

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
Spend the first half hour on a GPU: three steps of under ten minutes each, one command for each.

  right   the tests that need a GPU, compute-sanitizer, and python -m gconv
  where   the speed of memory for pieces of pixels, and Nsight Compute's counters of ResNeXt-50's layers
  fast    ResNeXt-50's layers tuned, timed beside cuDNN, then the whole network, and a report

All results go into one folder as they come, and the same command goes on where it was stopped. The tuned
table of tiles goes to DIR/tuned, where the other parts find it. Exit codes: 0 when all is done, 3 if time was
up before, 1 if something failed.

  python -m benchmarks first right && python -m benchmarks first where && python -m benchmarks first fast
"""
QUICK = ("--contenders", "auto", "triton", "F.conv2d")  # torch.compile takes minutes
OF_LAYERS = ("--suite", "resnext50_32x4d", "--dtypes", "bfloat16", "--batch", "256")


@dataclass(frozen=True)
class Part:
    """One program of a step.

    Args:
        name: in ``first.json``.
        arguments: of Python; "{out}" stands for the folder.
        share: of the minutes left when it starts, for its --minutes; 0 if it has no such option.
        output: file in the folder for what the part prints; None to show it.
        once: whether to skip the part once it has succeeded. Other parts find out what is left themselves.
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
    """Run the parts of a step and note what became of each in ``first.json``.

    Args:
        step: a key of ``STEPS``.
        folder: where everything is written; made if it does not exist.
        minutes: about when the last part must have ended.

    Returns:
        0 if all parts succeeded, ``STOPPED`` if time was up before, 1 if one failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = Outcomes(folder / "first.json")
    end = time.monotonic() + 60 * minutes
    codes = []
    for part in STEPS[step]:
        if part.once and outcomes.succeeded(step, part.name):
            print(f"== {step}: {part.name} was done before", file=sys.stderr)
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
    """How each part ended, kept in a file. Parts of another commit, or of uncommitted code, are dropped."""

    def __init__(self, path: Path) -> None:
        self.path, self.commit = path, commit()
        kept = json.loads(path.read_text()) if path.exists() and is_committed(self.commit) else []
        self.parts: list[dict[str, Any]] = [part for part in kept if part["commit"] == self.commit]

    def add(self, step: str, part: str, code: int, seconds: float) -> None:
        """Note how a part ended, instead of how it ended before."""
        self.parts = [p for p in self.parts if (p["step"], p["part"]) != (step, part)]
        fields = {"step": step, "part": part, "code": code, "seconds": round(seconds, 1)}
        self.parts.append({**fields, "commit": self.commit})
        write_json(self.path, self.parts)

    def succeeded(self, step: str, part: str) -> bool:
        """Return whether a part has succeeded before."""
        return any((p["step"], p["part"], p["code"]) == (step, part, 0) for p in self.parts)

    def rows(self, step: str) -> list[tuple[str, ...]]:
        """Return the parts of a step as rows of a table."""
        return [
            (p["step"], p["part"], str(p["code"]), f"{p['seconds']:.0f}")
            for p in self.parts
            if p["step"] == step
        ]


def _run_part(part: Part, step: str, folder: Path, minutes: float, outcomes: Outcomes) -> int:
    """Run a part in a process of its own, with the tuned table of the folder."""
    limit = ("--minutes", f"{part.share * minutes:.2f}") if part.share else ()
    command = [sys.executable, *(a.format(out=folder.resolve()) for a in part.arguments), *limit]
    environment = {**os.environ, "GCONV_CACHE": str(folder.resolve() / "tuned")}
    print(f"== {step}: {part.name}, {minutes:.1f} minutes left", file=sys.stderr, flush=True)
    start = time.monotonic()
    with open(folder / part.output, "w") if part.output else nullcontext() as output:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output).returncode
    outcomes.add(step, part.name, code, time.monotonic() - start)
    return code
