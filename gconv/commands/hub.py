"""``python -m gconv hub``: write gconv as a kernel for the Hugging Face hub."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from gconv.commands.options import new_parser
from gconv.hub.build import write
from gconv.measure.terminal import fail

DESCRIPTION = """\
Write gconv as a kernel for the Hugging Face hub: the source for Hugging Face's kernel-builder, and builds
that the kernels library can load from the folder, without the hub.

  python -m gconv hub kernel
  python -c "import kernels, pathlib; print(kernels.get_local_kernel(pathlib.Path('kernel')))"
"""


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv hub") -> int:
    """Write the kernel.

    Args:
        command: the command line. Defaults to None, that of this process.
        prog: name of the program, for help and errors.

    Returns:
        0.
    """
    parser = _parser(prog)
    arguments = parser.parse_args(command)
    if not re.fullmatch(r"\w*", arguments.id or "", re.ASCII):
        parser.error(f"--id must be letters, digits and underscores, got {arguments.id!r}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.repo_id or "a/b", re.ASCII):
        parser.error(f"--repo-id must be ORGANIZATION/NAME, got {arguments.repo_id!r}")
    if arguments.version < 0:
        parser.error(f"--version must not be negative, got {arguments.version}")
    try:
        namespaces = write(arguments.folder, arguments.version, arguments.repo_id, arguments.id or None)
    except FileExistsError as error:
        fail(error)
    except OSError as error:
        fail(f"can't write {arguments.folder}: {error.strerror}")
    print(f"{arguments.folder}: a kernel with the operators torch.ops.{', torch.ops.'.join(namespaces)}")
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = new_parser(prog, DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write, empty or new")
    parser.add_argument("--repo-id", metavar="ORGANIZATION/NAME", help="repository on the hub")
    parser.add_argument("--version", type=int, default=0, metavar="N", help="version on the hub (default: 0)")
    parser.add_argument(
        "--id", metavar="TEXT",
        help="suffix of the operators' namespaces, such as a commit (default: a digest of the files)",
    )  # fmt: skip
    return parser
