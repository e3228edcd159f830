"""Measure and explain convolutions. Modules that run convolutions never import this package.

What to measure:

- ``suites.py``: the grouped layers of well-known networks
- ``problem.py``: one pass of one convolution, with its operands, its results and a float64 reference
- ``recorder.py``: the convolutions that a network calls

How long it takes:

- ``timing.py``: time calls on a device, side by side
- ``candidates.py``: the tiles that are worth measuring for a pass
- ``tuner.py``: find the fastest tile for each pass and write the table of tiles
- ``profile.py``: ``gconv.profile``, which times each convolution of a network
- ``profiled.py``: the result of ``gconv.profile``, as tables and plots
- ``check.py``: ``python -m gconv``, which checks the results and measures what gconv gains on this machine

Why it takes that long:

- ``explain.py``: ``gconv.explain``, which shows what one convolution costs and which backend runs it
- ``compiled.py``: compile kernels for any GPU, on any machine
- ``machine_code.py``: read registers, spills and instructions from a compiled kernel
- ``environment.py``: describe the machine, versions and commit

Shared by all of them:

- ``figures.py``: the look of plots: colors, fonts, file formats
- ``plots.py``: plots of times against the memory floor, and rooflines
- ``files.py``: write files atomically
- ``terminal.py``: progress lines and one-line errors
"""
