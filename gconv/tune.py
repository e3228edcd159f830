"""``python -m gconv.tune`` is an alias of ``python -m gconv tune``."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "tune")
    runpy.run_module("gconv", run_name="__main__")
