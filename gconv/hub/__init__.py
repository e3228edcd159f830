"""gconv as a kernel for the Hugging Face hub, which their `kernels` library loads.

- ``build.py``: write the kernel
- ``files.py``: the texts of its files that are not gconv's modules
- ``layers.py``: layers for ``kernels.kernelize``; ``gconv.layers`` in the kernel
"""
