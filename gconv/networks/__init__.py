"""Use gconv in existing networks.

- ``convert.py``: swap the grouped convolutions of a network for gconv's, and swap them back
- ``subclasses.py``: how subclasses of PyTorch's convolutions, such as timm's, are swapped
- ``layout.py``: move the weights of a network to channels_last and back
- ``fuse.py``: build a faster copy of a network for inference
- ``trace.py``: turn a network into a graph, and a graph into a network
- ``rewrite.py``: fold batch norms and fuse activations and sums in that graph
- ``reports.py``: what ``convert`` and ``fuse`` did, as tables
- ``conv_between_norms.py``: a convolution with the batch norms and ReLUs around it inside its kernels
"""
