"""``python -m resnext``, and the script ``resnext``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; says what to install where its libraries are missing."""
    try:
        from resnext import cli
    except ModuleNotFoundError as error:
        print(f"error: the command line needs {error.name}: pip install 'gconv[train]'", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
