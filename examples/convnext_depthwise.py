"""Convert the depthwise 7x7 convolutions of a ConvNeXt, selected by a filter, and convert them back."""

from __future__ import annotations

import argparse

import timm
import torch
from torch import nn

import gconv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="convnext_atto", help="name of a timm model (default: %(default)s)"
    )
    parser.add_argument(
        "--image", type=int, default=64, help="height and width of the images (default: %(default)s)"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(options.model).eval().to(device, memory_format=torch.channels_last)
    x = torch.randn(4, 3, options.image, options.image, device=device).to(memory_format=torch.channels_last)

    # By default, depthwise convolutions are skipped.
    print(f"convert(model): {len(gconv.convert(model).converted)} layers converted")

    # Skip the first stage, which has the largest images.
    def later_stages(module: nn.Module, name: str) -> bool:
        return not name.startswith("stages.0.")

    report = gconv.convert(model, depthwise=True, filter=later_stages)
    if not report.converted:
        parser.error(f"{options.model} has no depthwise convolution after stages.0")
    print(f"convert(model, depthwise=True, filter=...): {len(report.converted)} layers converted, such as")
    name = report.converted[0].name
    layer = model.get_submodule(name)

    seen = {}
    hook = layer.register_forward_hook(lambda module, args, output: seen.update(input=args[0]))
    with torch.inference_mode():
        y = model(x)
    hook.remove()
    print(f"{name}: {gconv.explain(layer, seen['input'])}")

    print(f"revert(model): {len(gconv.revert(model))} layers converted back")
    with torch.inference_mode():
        print(f"largest difference: {(model(x) - y).abs().max():.1e}")


if __name__ == "__main__":
    main()
