"""The namespace of gconv's operators in ``torch.ops``.

PyTorch defines an operator only once in a process, so each copy of gconv needs a namespace of its own. A
kernel for the Hugging Face hub, which ``gconv.hub.build`` writes, has another file in place of this one.
"""

from __future__ import annotations

import torch

NAMESPACE = "gconv"
registered = getattr(torch.ops, NAMESPACE)
