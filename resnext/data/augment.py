"""Data augmentation with kornia. It depends only on the images and a seed, which each batch has."""

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
    """Return a seed that depends on all ``numbers`` and on nothing else."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random draws inside, and restore the generator afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class RandomCrop:
    """A random crop of 8% to 100% of a photograph, with an aspect ratio from 3/4 to 4/3, scaled to a size.

    This is the crop of "Going Deeper with Convolutions" (arXiv 1409.4842), which ResNeXt was trained with.
    kornia draws the crop, and Pillow scales the decoded pixels with antialiasing.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, image: Image.Image, size: int) -> Image.Image:
        """Return the crop, ``size`` x ``size``."""
        with seeded(self.seed):
            corners = _crop(size).forward_parameters(torch.Size((1, 3, image.height, image.width)))["src"][0]
        (left, top), (right, bottom) = corners[0].tolist(), (corners[2] + 1).tolist()
        return cut(image, (left, top, right, bottom), size)


@cache
def _crop(size: int) -> K.RandomResizedCrop:
    return K.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))


def moves(name: str) -> nn.Module:
    """Return the geometric augmentation of the data set ``name``, for pixels from 0 to 1."""
    if name in ("mnist5k", "digits"):
        # Rotation by up to 10 degrees, scale by up to 10%, shift by up to 7%, which is 2 of MNIST's 28
        # pixels.
        return K.RandomAffine(10.0, translate=(2 / 28, 2 / 28), scale=(0.9, 1.1), p=1.0)
    if name in ("cifar10", "cifar100"):
        return nn.Sequential(K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip())
    return K.RandomHorizontalFlip()


class Augmentation:
    """Augments the images and labels of a batch.

    Args:
        name: name of the data set.
        form: format of the images that the network accepts.
        num_classes: number of classes.
        mixup: alpha of mixup (arXiv 1710.09412), the parameter of the Beta distribution of the shares of two
            images. Defaults to 0, which turns it off.
        cutmix: alpha of cutmix (arXiv 1905.04899), the same for the area pasted from another image. Defaults
            to 0, which turns it off. If both are above 0, each batch gets one of them at random.
    """

    def __init__(
        self, name: str, form: ImageFormat, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0
    ) -> None:
        self.form, self.num_classes, self.mixup, self.cutmix = form, num_classes, mixup, cutmix
        self.moves = moves(name)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Augment uint8 images (N, C, H, W) and labels (N,); return float32 images and labels or shares."""
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
    """Return images mixed in pairs, and (N, 3): label, label of the other image, share of the other image."""
    mix = K.RandomMixUpV2(data_keys=["input", "class"])
    drawn = mix.forward_parameters(images.shape)
    # kornia draws uniform shares, the paper draws them from a Beta distribution.
    shares = torch.distributions.Beta(alpha, alpha).sample(drawn["mixup_lambdas"].shape)
    return mix(images, labels, params={**drawn, "mixup_lambdas": shares})


def _cutmix(images: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return images with a part of another image pasted in, and (N, 3) as in `_mixup`."""
    mix = K.RandomCutMixV2(data_keys=["input", "class"], beta=alpha, use_correct_lambda=True)
    images, pairs = mix(images, labels)
    own, other, share = pairs[0].unbind(1)  # here kornia returns the share of the image itself
    return images, torch.stack((own, other, 1 - share), 1)
