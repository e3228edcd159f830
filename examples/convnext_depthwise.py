"""ConvNeXt, whose 7x7 convolutions are depthwise: swapped on request, by a filter, and swapped back."""

from __future__ import annotations

import argparse

import timm
import torch
from torch import nn

import gconv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="convnext_atto", help="any name of timm's; default: %(default)s")
    parser.add_argument("--image", type=int, default=64, help="height and width; default: %(default)s")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(options.model).eval().to(device, memory_format=torch.channels_last)
    x = torch.randn(4, 3, options.image, options.image, device=device).to(memory_format=torch.channels_last)

    # Depthwise convolutions stay PyTorch's unless asked for.
    print(f"convert(model) swaps {len(gconv.convert(model).converted)}")

    # Not those of the first stage, whose images are the largest.
    def later_stages(module: nn.Module, name: str) -> bool:
        return not name.startswith("stages.0.")

    report = gconv.convert(model, depthwise=True, filter=later_stages)
    if not report.converted:
        parser.error(f"{options.model} has no depthwise convolution after stages.0")
    print(f"convert(model, depthwise=True, filter=...) swaps {len(report.converted)}, such as")
    name = report.converted[0].name
    layer = model.get_submodule(name)

    seen = {}
    hook = layer.register_forward_hook(lambda module, args, output: seen.update(input=args[0]))
    with torch.inference_mode():
        y = model(x)
    hook.remove()
    print(f"{name}: {gconv.explain(layer, seen['input'])}")

    print(f"revert(model) brings {len(gconv.revert(model))} back")
    with torch.inference_mode():
        print(f"largest difference: {(model(x) - y).abs().max():.1e}")


if __name__ == "__main__":
    main()
