"""The commands of ``python -m gconv``: options and printing. The work is in :mod:`gconv.measure`."""
