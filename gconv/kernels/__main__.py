"""Make ``python -m gconv.kernels`` run ``python -m gconv kernels``."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "kernels")
    runpy.run_module("gconv", run_name="__main__")
