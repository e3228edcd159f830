"""The results of ``tests/gpu/on_gpu.py``: printed and saved as they come, and read by the next run."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from shard import Finished

TO_RESUME = ("commit", "gpu", "torch", "triton")  # if these match, tests that have passed don't run again
INTERVAL = 10  # seconds between progress lines
LINES = 6  # printed lines of a failure
KEPT = 4000  # saved characters of a failure


@cache
def environment() -> dict[str, Any]:
    """Return the environment of the results, see ``gconv.measure.environment.environment``."""
    import torch  # late, so that the processes can start and import it in the meantime

    from gconv.measure.environment import environment

    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class Record:
    """The results, printed and saved in ``path`` as they come.

    Args:
        path: a JSON file. If it exists, the results of the earlier run are read from it. With None, results
            aren't saved.

    Attributes:
        tests: outcome, seconds and message of tests and of modules that can't be collected, by node id.
        problems: errors outside of tests.
        sanitizer: outcome, seconds and message of compute-sanitizer.
        stopped: why not everything has run, or None if everything has.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self.sanitizer: dict[str, Any] = {}
        self.stopped: str | None = "stopped"
        self.start = self.shown = time.monotonic()
        if path is not None and path.exists():
            try:
                self._read(json.loads(path.read_text()))
            except (ValueError, LookupError, TypeError):
                from gconv.measure.terminal import fail

                fail(f"{path} doesn't contain results of these tests: choose a different --out, or remove it")

    def _read(self, earlier: dict[str, Any]) -> None:
        from benchmarks.store import is_committed

        facts, before = environment(), earlier["environment"]
        if not is_committed(facts["commit"]) or any(facts[name] != before.get(name) for name in TO_RESUME):
            message = "is from different code or from a different machine: running all tests again"
            print(f"{self.path} {message}", flush=True)
            return
        self.tests = {name: test for name, test in earlier["tests"].items() if test["outcome"] == "passed"}
        if earlier["sanitizer"].get("outcome") == "passed":
            self.sanitizer = earlier["sanitizer"]
        print(f"skipping {len(self.tests)} tests that have already passed, see {self.path}", flush=True)

    @property
    def counts(self) -> Counter[str]:
        """The number of tests by outcome."""
        return Counter(test["outcome"] for test in self.tests.values())

    def take(self, result: Finished) -> None:
        """Record a result, and print it if it is a failure."""
        known = {"outcome": result.outcome, "seconds": result.seconds}
        again = result.test in self.tests  # for example, a module that can't be collected
        self.tests[result.test] = known | ({"message": result.message[-KEPT:]} if result.message else {})
        if result.outcome == "failed" and not again:
            lines = [line for line in result.message.splitlines() if line.startswith("E ")]
            lines = lines or result.message.splitlines()[-LINES:]
            print(f"FAILED {result.test}", *lines[:LINES], sep="\n", flush=True)

    def take_sanitizer(self, code: int, output: str, seconds: float) -> None:
        """Record compute-sanitizer's result, and print its ``output`` if it found an error."""
        outcome = "failed" if code else "passed"
        self.sanitizer = {"outcome": outcome, "seconds": round(seconds, 1), "message": output[-KEPT:]}
        if code:
            print(f"FAILED compute-sanitizer\n{output[-KEPT:]}", flush=True)

    def add_problem(self, problem: str) -> None:
        """Record and print an error outside of tests."""
        self.problems.append(problem[-KEPT:])
        print(problem[-KEPT:], flush=True)

    def show_progress(self, left: int) -> None:
        """Print the progress and save the results every ``INTERVAL`` seconds; ``left`` tests remain."""
        if time.monotonic() < self.shown + INTERVAL:
            return
        self.shown = time.monotonic()
        counts = self.counts
        done, seconds = counts.total(), self.shown - self.start
        print(f"{done} of {done + left} tests, {counts['failed']} failed, {seconds:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        """Save all results."""
        if self.path is None:
            return
        from benchmarks.store import write_json

        known = {
            "environment": environment(),
            "seconds": round(time.monotonic() - self.start, 1),
            "stopped": self.stopped,
            "counts": self.counts,
            "problems": self.problems,
            "sanitizer": self.sanitizer,
            "tests": self.tests,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, known)

    def conclude(self) -> int:
        """Print a summary and return the exit code."""
        reasons = Counter(t["message"] for t in self.tests.values() if t["outcome"] == "skipped")
        for reason, count in reasons.items():
            print(f"skipped {count}: {reason}")
        counts, seconds = self.counts, time.monotonic() - self.start
        results = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
        sanitizer = self.sanitizer.get("outcome", "not started")
        print(f"{results}; compute-sanitizer: {sanitizer}; {self.stopped or 'complete'}; {seconds:.0f} s")
        if counts["failed"] or self.problems or sanitizer == "failed":
            return 1
        if self.stopped:
            return 3
        if not counts["passed"]:
            print("no test has passed: does this machine have a GPU that PyTorch can use?", flush=True)
        return 0 if counts["passed"] else 1
