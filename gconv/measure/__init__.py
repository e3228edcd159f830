"""Measure and explain convolutions. No module that runs a convolution imports this package.

What to measure:

- ``suites.py``: the grouped layers of well-known networks
- ``problem.py``: one pass of one convolution: operands, PyTorch's result, gconv's, and the exact one
- ``recorder.py``: the convolutions that a network calls

How long it takes:

- ``timing.py``: time calls on a device, side by side
- ``candidates.py``: the tiles that are worth measuring for a pass
- ``tuner.py``: find the fastest tile of a pass, and write tables of them
- ``profile.py``: ``gconv.profile``: time each convolution of a network
- ``profiled.py``: the result of ``gconv.profile``, as tables and plots
- ``check.py``: the check of ``python -m gconv``: right results, and what gconv gains here

What explains it:

- ``explain.py``: ``gconv.explain``: what one convolution costs, and which backend runs it
- ``compiled.py``: compile kernels for any GPU, on any machine
- ``machine_code.py``: read registers, spills and instructions of a compiled kernel
- ``environment.py``: describe the machine, versions and commit

And for all of them:

- ``figures.py``: the look of plots: colors, fonts, file formats
- ``plots.py``: plots of times against the memory floor, and rooflines
- ``files.py``: write files that are whole at any time
- ``terminal.py``: progress lines, and errors in one line
"""
