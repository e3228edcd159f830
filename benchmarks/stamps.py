"""``python -m benchmarks.stamps``: show whether the code behind each committed result has changed since.

Show whether the code behind each committed result has changed since the result was made, and update the table
in benchmarks/README.md. With RESULT, first record that these results were made again.

  python -m benchmarks.stamps                   after a change of the code
  python -m benchmarks.stamps cpu/bench.json    after making a result again

results/stamps.json has, for each result, a digest of its files, the commit at which it was made, and a digest
of each source file that determines it (see sources.py). A test compares the table in README.md with the code.
The tables of the compiler must match the current kernels. Other results may be from older code, as long as
the table says so.
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
        command: the command that makes it.
        roots: the code that determines it, see ``sources.digests``.
        must_hold: whether the tests fail after a change of that code until the result is made again. Defaults
            to False.
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
    """Return all results by their path in ``results/``: ``RESULTS``, and a folder for each GPU."""
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
    """Record that a result was made by the code of ``commit``, or of the working tree if None."""
    roots = results()[name].roots
    sources = digests(roots, at_commit(commit)) if commit else digests(roots)
    stamps = read_stamps() | {name: {"commit": commit, "files": digest_of_files(name), "sources": sources}}
    write_json(STAMPS, dict(sorted(stamps.items())))


def changed(name: str) -> list[str]:
    """Return the files whose code for a result has changed since its stamp; without a stamp, all of them."""
    before, now = read_stamps().get(name, NO_STAMP)["sources"], digests(results()[name].roots)
    return sorted(path for path in before | now if before.get(path) != now.get(path))


def table() -> str:
    """Return the table for benchmarks/README.md: each result's command, and whether its code has changed."""
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
    """Write the table into benchmarks/README.md."""
    text = README.read_text()
    start, end = (text.index(mark) for mark in MARKS)
    README.write_text(text[:start] + MARKS[0] + table() + text[end:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Stamp results, write the table, and print the files that changed since each result was made."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.stamps",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results", nargs="*", metavar="RESULT",
        help=f"results that were made again, to be stamped: {', '.join(results())}",
    )  # fmt: skip
    parser.add_argument(
        "--commit", help="commit at which they were made (default: that of their environment.json, or HEAD)"
    )
    parsed = parser.parse_args(arguments)
    for name in parsed.results:
        if name not in results():
            fail(f"unknown result {name!r}: choose from {', '.join(results())}")
        said = parsed.commit or _commit_of(name)
        commit = resolve(said) or fail(
            f"can't find commit {said} in this repository: fetch it, or pass a different --commit"
        )
        stamp(name, commit)
    write_table()
    for name in results():
        files = changed(name)
        print(f"{name}: {'code has changed in ' + ', '.join(files) if files else 'code is unchanged'}")
    return 0


def _commit_of(name: str) -> str:
    """Return the commit at which a result was made, or exit if its code was never committed."""
    environment = RESULTS_FOLDER / name / "environment.json"
    if environment.exists():
        commit = json.loads(environment.read_text())["commit"]
        if not is_committed(commit):
            fail(
                f"{name} was measured at {commit or 'an unknown commit'}, which can't be looked up: commit "
                "the code and measure again"
            )
        return commit
    roots = results()[name].roots
    if digests(roots) != digests(roots, at_commit("HEAD")):
        fail(f"the code behind {name} has uncommitted changes: commit them, then stamp the result")
    return "HEAD"


if __name__ == "__main__":
    sys.exit(main())
