"""``python -m gconv.kernels``, another name of ``python -m gconv kernels``."""

import sys

from gconv.commands.kernels import main

if __name__ == "__main__":
    sys.exit(main())
