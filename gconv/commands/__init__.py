"""The commands of ``python -m gconv``.

- ``main.py``: run the command that the command line names
- ``check.py``: check this machine; what runs without the name of a command
- ``tune.py``: measure which tiles are fastest on this GPU, and keep them in a table
- ``profile.py``: time the convolutions of a network
- ``kernels.py``: compile the kernels, and print registers, spills and instructions
- ``hub.py``: write gconv as a kernel for the Hugging Face hub
- ``options.py``: options that several commands share
"""
