"""``python -m resnext``, and the script ``resnext``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; says what to install where its libraries are missing."""
    try:
        from resnext import cli

        cli.main()
    except ModuleNotFoundError as error:
        print(
            f"error: the command line needs {error.name}: install gconv with its extra 'train'",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
