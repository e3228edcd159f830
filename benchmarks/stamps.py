"""``python -m benchmarks.stamps``: whether the code that decides a committed result has changed since.

``results/stamps.json`` has, for each result, a digest of its files, the commit it was made at, and a digest
of each source that decides it (see ``sources.py``). benchmarks/README.md has a table of it, which a test
compares with the code. The compiler's tables must be of the present kernels; other results may be of older
code, as long as the table says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.sources import ROOT, at_commit, digests, resolve
from benchmarks.store import RESULTS_FOLDER, is_committed, write_json
from gconv.kernels import choice
from gconv.measure.terminal import fail

STAMPS = RESULTS_FOLDER / "stamps.json"
README = ROOT / "benchmarks" / "README.md"
MARKS = ("<!-- stamps: `python -m benchmarks.stamps` writes this table -->\n", "<!-- end of stamps -->\n")
NO_STAMP = {"commit": None, "files": None, "sources": {}}


@dataclass(frozen=True)
class Result:
    """How a committed result is made.

    Args:
        command: makes it.
        roots: what decides it, as ``sources.digests`` takes it.
        must_hold: whether a change of the code fails the tests until the result is made anew.
    """

    command: str
    roots: tuple[str, ...]
    must_hold: bool = False


RESULTS = {
    "compiled": Result(
        "make matrix",
        (
            "benchmarks.matrix:TABLES",
            "gconv.measure.compiled:compile_job",
            "gconv.measure.compiled:find_jobs",
        ),
        must_hold=True,
    ),
    "cpu/bench.json": Result("make bench", ("benchmarks.test_host", "benchmarks.test_layers", "gconv.aten")),
    "cpu/cardinality": Result(
        "python -m resnext cardinality", ("resnext.study", "resnext.data.embedded:load_digits")
    ),
    "cpu/demo": Result(
        "make demo", ("resnext.loop:train", "resnext.config:defaults", "resnext.data.embedded:load_mnist5k")
    ),
    "cpu/fused": Result(
        "python -m benchmarks accuracy --out benchmarks/results/cpu/fused",
        ("benchmarks.accuracy", "gconv.reference"),
    ),
    "cpu/profile.txt": Result(
        "python tests/support/zoo.py examples/timm_in_three_lines.py --batch 4 --image 128",
        ("examples.timm_in_three_lines", "gconv.aten"),
    ),
}
ON_A_GPU = Result(
    "make measure",
    ("benchmarks.layers", "benchmarks.networks", "benchmarks.peers", "gconv.aten", "gconv.kernels"),
)


def results() -> dict[str, Result]:
    """Return all results by their path in ``results/``: those above, and a folder for each GPU."""
    gpus = sorted({path.parent.name for path in RESULTS_FOLDER.glob("*/environment.json")} - {"cpu"})
    return RESULTS | dict.fromkeys(gpus, ON_A_GPU)


def digest_of_files(name: str) -> str:
    """Return a digest of a result's files."""
    path = RESULTS_FOLDER / name
    files = sorted(file for file in [path, *path.rglob("*")] if file.is_file())
    parts = (
        f"{file.relative_to(RESULTS_FOLDER).as_posix()}\n".encode() + file.read_bytes() for file in files
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:8]


def read_stamps() -> dict[str, dict[str, Any]]:
    """Return the stamps by result."""
    return json.loads(STAMPS.read_text()) if STAMPS.exists() else {}


def stamp(name: str, commit: str | None) -> None:
    """Record that a result is what the code of ``commit``, or of the working tree if None, gives."""
    roots = results()[name].roots
    sources = digests(roots, at_commit(commit)) if commit else digests(roots)
    stamps = read_stamps() | {name: {"commit": commit, "files": digest_of_files(name), "sources": sources}}
    write_json(STAMPS, dict(sorted(stamps.items())))


def changed(name: str) -> list[str]:
    """Return the files in which code that decides a result has changed since its stamp: all without one."""
    before, now = read_stamps().get(name, NO_STAMP)["sources"], digests(results()[name].roots)
    return sorted(path for path in before | now if before.get(path) != now.get(path))


def table() -> str:
    """Return the table for benchmarks/README.md: what made each result, and whether the code has changed."""
    rows = ["| result | made by | at commit | code since |", "| --- | --- | --- | --- |"]
    for name, result in results().items():
        commit = (read_stamps().get(name, NO_STAMP)["commit"] or "")[:7]
        since = "unchanged" if result.must_hold or not changed(name) else "**changed**"
        rows.append(f"| `{name}` | `{result.command}` | {commit} | {since} |")
    for path in sorted(choice.SHIPPED.glob("*.json")):
        saved = json.loads(path.read_text())
        commit = (saved["environment"].get("commit") or "")[:7]
        outdated = choice.outdated(saved["kernels"])
        since = f"**changed**: {', '.join(outdated)}" if outdated else "unchanged"
        rows.append(f"| `{choice.SHIPPED.name}/{path.name}` | `python -m gconv tune` | {commit} | {since} |")
    return "\n".join(rows) + "\n"


def write_table() -> None:
    """Put the table into benchmarks/README.md."""
    text = README.read_text()
    start, end = (text.index(mark) for mark in MARKS)
    README.write_text(text[:start] + MARKS[0] + table() + text[end:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Stamp results, write the table, and print what has changed since each result was made."""
    parser = argparse.ArgumentParser("python -m benchmarks.stamps", description=__doc__.partition("\n\n")[2])
    parser.add_argument(
        "results", nargs="*", metavar="RESULT", help=f"stamp these, made anew: {', '.join(results())}"
    )
    parser.add_argument(
        "--commit", help="they were made at; default: the one in their environment.json, else HEAD"
    )
    parsed = parser.parse_args(arguments)
    for name in parsed.results:
        if name not in results():
            fail(f"no result {name!r} in {RESULTS_FOLDER}: choose from {', '.join(results())}")
        said = parsed.commit or _commit_of(name)
        commit = resolve(said) or fail(f"no commit {said} in this repository: fetch it, or give --commit")
        stamp(name, commit)
    write_table()
    for name in results():
        files = changed(name)
        print(f"{name}: {'changed since in ' + ', '.join(files) if files else 'unchanged'}")
    return 0


def _commit_of(name: str) -> str:
    """Return the commit that a result was made at; exit if its code was never committed."""
    environment = RESULTS_FOLDER / name / "environment.json"
    if environment.exists():
        commit = json.loads(environment.read_text())["commit"]
        if not is_committed(commit):
            fail(
                f"{name} was measured at {commit or 'an unknown commit'}, which nobody can look up: "
                "commit and measure again"
            )
        return commit
    roots = results()[name].roots
    if digests(roots) != digests(roots, at_commit("HEAD")):
        fail(f"code that decides {name} is not committed: commit it, then stamp the result")
    return "HEAD"


if __name__ == "__main__":
    sys.exit(main())
