"""The commands of ``python -m gconv``.

- ``main.py``: run the command given on the command line
- ``check.py``: check this machine; the default if no command is given
- ``tune.py``: measure which tiles are fastest on this GPU, and save them in a table
- ``profile.py``: time the convolutions of a network
- ``kernels.py``: compile the kernels, and print their registers, spills and instructions
- ``hub.py``: write gconv as a kernel for the Hugging Face hub
- ``options.py``: options that several commands share
"""
