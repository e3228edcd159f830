"""Entry point of ``python -m resnext`` and of the script ``resnext``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or print what to install if its libraries are missing."""
    try:
        from resnext import cli

        cli.main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        print(
            f"error: the command line needs {package}: install gconv with its extra 'train'", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
