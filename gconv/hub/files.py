"""Texts of the files of a kernel for the Hugging Face hub, besides gconv's own modules."""

from __future__ import annotations

# kernel-builder reads it: docs/source/builder/writing-kernels.md in huggingface/kernels. Its version 0 is for
# kernels whose API may still change. "cpu" is for machines without a GPU, where PyTorch's convolution runs.
BUILD = """\
[general]
name = "gconv"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda", "rocm"]
{hub}
[torch-noarch]
pyext = ["py", "json"]
"""
HUB = """
[general.hub]
repo-id = "{repo_id}"
"""

FLAKE = """\
{
  description = "gconv: grouped convolutions for PyTorch";

  inputs = {
    kernel-builder.url = "github:huggingface/kernels";
  };

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

# A Jinja template that kernel-builder fills in.
CARD = """\
---
library_name: kernels
license: {{ license }}
---

Grouped convolutions for PyTorch as Triton kernels: 1-d, 2-d, 3-d, transposed 1-d and 2-d, forward pass and
gradients.

```python
from kernels import get_kernel

gconv = get_kernel("{{ repo_id }}", version={{ version }})
print(gconv.convert(model))  # converts the grouped convolutions of a network, in place
```

Needs Python 3.11, PyTorch 2.11 and Triton 3.6, or newer.

## Functions and classes
{% for func in functions %}
- `{{ func }}`
{% endfor %}

## Layers
{% for layer in layers %}
- `{{ layer }}`
{% endfor %}
"""

# Comes before the imports in __init__.py.
HEADER = """\
import sys

if sys.version_info < (3, 11):
    raise ImportError(f"gconv needs Python 3.11 or newer, got {sys.version.split()[0]}")

from . import layers
"""

# Takes the place of gconv/namespace.py. kernel-builder generates _ops.py.
NAMESPACE = '''\
"""The namespace of this build's operators in ``torch.ops``."""

from ._ops import add_op_namespace_prefix
from ._ops import ops as registered

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
'''

# The same names as kernel-builder's _ops.py.
OPS = '''\
"""The namespace of this build's operators in ``torch.ops``, unique to it."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """Prefix the name of an operator with the namespace."""
    return f"{id}::{{op_name}}"
'''
