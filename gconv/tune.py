"""``python -m gconv.tune``, another name of ``python -m gconv tune``."""

import sys

from gconv.commands.tune import main

if __name__ == "__main__":
    sys.exit(main())
