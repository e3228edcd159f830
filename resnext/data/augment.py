"""Augmentation: kornia's, drawn anew for each batch from a seed, so that it depends on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import kornia.augmentation as K
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from resnext.data.images import ImageFormat, cut, unit


def seed_of(*numbers: int) -> int:
    """Return a seed that depends on all ``numbers``, and on nothing else."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start random draws inside from ``seed``; later ones continue where earlier ones ended."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class RandomCrop:
    """A random part of a photograph, between 8% and all of it, a little wider or higher, scaled.

    As in "Going Deeper with Convolutions" (arXiv 1409.4842), which ResNeXt was trained with. kornia draws the
    part; Pillow scales it, antialiased, from the pixels as they were decoded.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, image: Image.Image, size: int) -> Image.Image:
        """The part, ``size`` x ``size``."""
        with seeded(self.seed):
            corners = _crop(size).forward_parameters(torch.Size((1, 3, image.height, image.width)))["src"][0]
        (left, top), (right, bottom) = corners[0].tolist(), (corners[2] + 1).tolist()
        return cut(image, (left, top, right, bottom), size)


@cache
def _crop(size: int) -> K.RandomResizedCrop:
    return K.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))


def moves(name: str) -> nn.Module:
    """Return how images of the data set ``name`` are moved, with pixels from 0 to 1, before normalising."""
    if name in ("mnist5k", "digits"):
        # Digits turned by up to 10 degrees, scaled by up to 10%, moved by up to 7%: two pixels of MNIST's 28.
        return K.RandomAffine(10.0, translate=(2 / 28, 2 / 28), scale=(0.9, 1.1), p=1.0)
    if name in ("cifar10", "cifar100"):
        return nn.Sequential(K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip())
    return K.RandomHorizontalFlip()


class Augmentation:
    """Turns the images and labels of a batch into those that a network is trained on.

    Args:
        name: the data set's.
        form: what the network takes.
        num_classes: of the targets.
        mixup: alpha of the Beta distribution that the shares of two images are drawn from (arXiv 1710.09412).
        cutmix: alpha of that for the side of the part that is another image's (arXiv 1905.04899). With both
            above 0 one or the other is drawn for each batch; 0 is without.
    """

    def __init__(
        self, name: str, form: ImageFormat, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0
    ) -> None:
        self.form, self.num_classes, self.mixup, self.cutmix = form, num_classes, mixup, cutmix
        self.moves = moves(name)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """uint8 images (N, C, H, W), labels (N,) -> float32 images, and labels or shares (N, classes)."""
        with seeded(seed):
            images = self.form.normalize(self.moves(unit(images)))
            alphas = [(mix, alpha) for mix, alpha in ((_mixup, self.mixup), (_cutmix, self.cutmix)) if alpha]
            if not alphas:
                return images, labels
            mix, alpha = alphas[int(torch.randint(len(alphas), ()))]
            images, pairs = mix(images, labels, alpha)
        own, other, share = pairs.unbind(1)
        ours, theirs = (F.one_hot(each.long(), self.num_classes).to(share.dtype) for each in (own, other))
        return images, torch.lerp(ours, theirs, share.unsqueeze(1))


def _mixup(images: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return images mixed in pairs, and label, other label and share of the other (N, 3)."""
    mix = K.RandomMixUpV2(data_keys=["input", "class"])
    drawn = mix.forward_parameters(images.shape)
    # kornia draws shares evenly, the paper from a Beta distribution.
    shares = torch.distributions.Beta(alpha, alpha).sample(drawn["mixup_lambdas"].shape)
    return mix(images, labels, params={**drawn, "mixup_lambdas": shares})


def _cutmix(images: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the same for images with a part of another one pasted in."""
    mix = K.RandomCutMixV2(data_keys=["input", "class"], beta=alpha, use_correct_lambda=True)
    images, pairs = mix(images, labels)
    own, other, share = pairs[0].unbind(1)  # here kornia gives the share of the image itself
    return images, torch.stack((own, other, 1 - share), 1)
