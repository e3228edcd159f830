"""Use gconv in existing networks.

- ``convert.py``: replace the grouped convolutions of a network with gconv's, and undo that
- ``subclasses.py``: convert subclasses of PyTorch's convolutions, such as those of timm
- ``layout.py``: move the weights of a network to channels_last and back
- ``fuse.py``: build a faster copy of a network for inference
- ``trace.py``: turn a network into a graph, and a graph into a network
- ``rewrite.py``: fold batch norms and fuse activations and sums in that graph
- ``reports.py``: print what ``convert`` and ``fuse`` did, as tables
- ``conv_between_norms.py``: compute a convolution and the batch norms and ReLUs around it in its kernels
"""
