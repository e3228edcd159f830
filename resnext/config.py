"""What is trained, on what and how: the settings of a run, and what they are for each data set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from resnext.errors import UserError
from resnext.model import VARIANTS, ResNeXt

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Network:
    """The arguments of :class:`resnext.ResNeXt`, but for those that follow from the data."""

    repeats: tuple[int, ...] = (1, 1, 1, 1)
    cardinality: int = 8
    base_width: int = 4
    stem_width: int = 16
    stem: str = "small"
    fused: bool = False

    @classmethod
    def of_variant(cls, name: str) -> Network:
        """That of a named network, such as "resnext50_32x4d"."""
        with torch.device("meta"):
            model = VARIANTS[name]()
        width = model.conv1.out_channels
        return cls(model.repeats, model.cardinality, model.base_width, width, model.stem)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images of one update of the weights, of all processes together.
        micro_batch: images of one pass, which is what batch norm takes its statistics of; a batch is as many
            passes as it takes, one after the other or in several processes.
        optimizer: "adamw", or "sgd" with Nesterov's momentum of 0.9.
        learning_rate: the highest.
        weight_decay: of all parameters, as in the ResNeXt paper.
        schedule: "cosine", or "step", a tenth from each of ``milestones`` on.
        milestones: parts of the training.
        warmup_epochs: over which the rate rises from 0.
        label_smoothing: share of a target that goes to all classes alike.
        mixup, cutmix: alphas, as in :class:`resnext.data.augment.Augmentation`.
        ema: of the weights' moving average, what remains at each update; 0 is without one.
        precision: of autocast.
        sync_batch_norm: statistics of all processes' images, by ``nn.SyncBatchNorm``.
        seed: of the weights, the order and the augmentation.
    """

    epochs: int = 8
    batch_size: int = 64
    micro_batch: int = 32
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (1 / 2, 3 / 4)
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    precision: str = "float32"
    sync_batch_norm: bool = False
    seed: int = 0

    def lasting(self, epochs: int) -> Recipe:
        """The same of so many epochs; no more than a fifth of them to warm up."""
        return replace(self, epochs=epochs, warmup_epochs=min(self.warmup_epochs, epochs / 5))


@dataclass(frozen=True)
class Source:
    """Where the images come from: the arguments of :func:`resnext.data.load_data`."""

    name: str = "mnist5k"
    path: str | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Settings:
    """All that decides what comes out of a run: kept with the network, and the same in a resumed run."""

    source: Source = Source()
    network: Network = Network()
    recipe: Recipe = Recipe()

    def to_dict(self) -> dict[str, Any]:
        """As it is kept in files."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: dict[str, dict[str, Any]]) -> Settings:
        """Back from :meth:`to_dict`, from JSON as well."""
        network, recipe = dict(kept["network"]), dict(kept["recipe"])
        network["repeats"], recipe["milestones"] = tuple(network["repeats"]), tuple(recipe["milestones"])
        return cls(Source(**kept["source"]), Network(**network), Recipe(**recipe))


@dataclass(frozen=True)
class Options:
    """How a run is carried out, which may change when it is resumed.

    Attributes:
        workers: processes that decode images.
        skip_corrupt: go on where an image cannot be read.
        channels_last: the layout of weights and activations.
        compile: by torch.compile.
        checkpoint_steps: updates after which one is written, besides after each epoch; 0 for none.
        tensorboard: write its event files too.
    """

    workers: int = 0
    skip_corrupt: bool = False
    channels_last: bool = True
    compile: bool = False
    checkpoint_steps: int = 0
    tensorboard: bool = False


DEFAULT_OPTIONS = Options()
_DIGITS = Settings()
_CIFAR = Settings(
    network=Network((3, 3, 3, 0), 8, 64, 64),
    # Section 5.3 of the ResNeXt paper: 300 epochs, a tenth from the 150th and the 225th on.
    recipe=Recipe(300, 128, 32, "sgd", 0.1, 5e-4, "step", warmup_epochs=0.0),
)
_DEFAULTS = {
    "mnist5k": _DIGITS,
    "digits": replace(_DIGITS, recipe=replace(_DIGITS.recipe, epochs=30)),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder": Settings(
        network=Network((3, 4, 6, 3), 32, 4, 64, "imagenet"),
        # Section 4 of the paper, which takes the schedule of fb.resnet.torch; 32 images on each of 8 GPUs.
        recipe=Recipe(90, 256, 32, "sgd", 0.1, 1e-4, "step", (1 / 3, 2 / 3), warmup_epochs=0.0),
    ),
}


def defaults(data: str) -> Settings:
    """What holds for the data set ``data`` where nothing else is said."""
    settings = _DEFAULTS[data]
    return replace(settings, source=Source(data))


def build(network: Network, num_classes: int, in_channels: int) -> ResNeXt:
    """The network, untrained.

    Raises:
        UserError: its settings do not go together.
    """
    try:
        return ResNeXt(**asdict(network), num_classes=num_classes, in_channels=in_channels)
    except ValueError as error:
        raise UserError(f"--repeats {','.join(map(str, network.repeats))}: {error}") from None


def difference(kept: Settings, wanted: Settings) -> str | None:
    """The first setting in which two runs differ, in words, the place of their images aside."""
    for part in ("source", "network", "recipe"):
        there, here = (asdict(getattr(settings, part)) for settings in (kept, wanted))
        for name, value in there.items():
            if value != here[name] and name != "path":
                return f"its {name.replace('_', ' ')} is {value}, not {here[name]}"
    return None
