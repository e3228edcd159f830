"""Convert a timm network in three lines, and profile its convolutions on this machine."""

from __future__ import annotations

import argparse
import copy

import timm
import torch

import gconv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="resnext50_32x4d", help="name of a timm model (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8, help="batch size (default: %(default)s)")
    parser.add_argument(
        "--image", type=int, default=160, help="height and width of the images (default: %(default)s)"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(options.batch, 3, options.image, options.image, device=device)

    # 1: create your network. Add pretrained=True for trained weights.
    model = timm.create_model(options.model).eval().to(device)
    original = copy.deepcopy(model)
    # 2: convert its grouped convolutions in place, and its weights to channels_last.
    report = gconv.convert(model)
    # 3: use it as before.
    with torch.inference_mode():
        y = model(x)

    print(report)
    with torch.inference_mode():
        expected = original(x)
    print(
        f"largest difference: {(y - expected).abs().max() / expected.abs().max():.1e} of the largest logit\n"
    )
    print(gconv.profile(model, x))


if __name__ == "__main__":
    main()
