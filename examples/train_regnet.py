"""Train a RegNet on handwritten digits with gconv, under autocast and optionally torch.compile."""

from __future__ import annotations

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from torch.optim.lr_scheduler import OneCycleLR

import gconv


def digits(size: int, device: str) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 images (N, 3, size, size) and their labels (N,)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device).unsqueeze(1) / 8 - 1
    images = interpolate(images, size=(size, size), mode="bilinear").repeat(1, 3, 1, 1)
    return images, torch.tensor(data.target, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="regnety_002", help="name of a timm model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=160, help="number of steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="batch size (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    images, labels = digits(32, device)
    order = torch.randperm(len(images))
    train, test = order[:-300], order[-300:]

    model = timm.create_model(options.model, num_classes=10).to(device)
    report = gconv.convert(model)
    print(f"{options.model}: converted {len(report.converted)} of {len(report.layers)} convolutions")
    run = torch.compile(model, fullgraph=True) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = OneCycleLR(optimizer, max_lr=4e-3, total_steps=options.steps)

    for step in range(1, options.steps + 1):
        batch = train[torch.randint(len(train), (options.batch,))]
        with torch.autocast(device, torch.bfloat16):
            loss = cross_entropy(run(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == options.steps:
            print(f"step {step:4}  loss {loss.item():.3f}")

    model.eval()
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        right = (run(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"{right:.1%} of {len(test)} held-out digits right")


if __name__ == "__main__":
    main()
