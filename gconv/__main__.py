"""Run the command line: ``python -m gconv``."""

import sys

from gconv.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
