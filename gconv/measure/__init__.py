"""Measure and explain convolutions: problems and their truth, timing, tuning, the compiler's output.

Nothing that runs a convolution imports this package.
"""
