"""The settings of a run, their defaults for each data set, and the command-line options made from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from resnext.data import DATA_SETS
from resnext.errors import UserError
from resnext.model import VARIANTS, ResNeXt

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Option:
    """The command-line option of a field of the settings. ``cli/options.py`` makes options from these.

    Args:
        help: help text, without the default.
        name: name of the option without dashes, or a positional argument in capitals. Defaults to the name of
            the field.
        least: lower bound of a number, inclusive.
        most: upper bound of a number, inclusive.
        choices: allowed values of a text.
        default: description of the default in the help. Defaults to the value of the field for each data set.
    """

    help: str
    name: str | None = None
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()
    default: str | None = None


def option(help: str, **details: Any) -> dict[str, Option]:
    """Return metadata that makes a dataclass field an option. The arguments are those of `Option`."""
    return {"option": Option(help, **details)}


@dataclass(frozen=True)
class Source:
    """Source of the images: the arguments of `resnext.data.load_data`."""

    name: str = field(
        default="mnist5k",
        metadata=option(
            "data set: mnist5k or digits, 5,000 or 1,797 handwritten digits that come with installed "
            "packages; cifar10 or cifar100, whose PATH is the published archive (python or binary) or its "
            "folder; or folder, whose PATH contains train/CLASS/*.jpg and val/CLASS/*.jpg",
            name="data",
            choices=DATA_SETS,
            default="mnist5k",
        ),
    )
    path: str | None = field(
        default=None,
        metadata=option("archive or folder of images, for cifar10, cifar100 and folder", name="PATH"),
    )
    image_size: int | None = field(
        default=None,
        metadata=option(
            "height and width that images are scaled to, for --data folder",
            least=8,
            most=2**12,
            default="224",
        ),
    )


@dataclass(frozen=True)
class Network:
    """Arguments of `resnext.ResNeXt`, except those that follow from the data."""

    repeats: tuple[int, ...] = field(
        default=(1, 1, 1, 1), metadata=option("number of blocks in each of the four stages")
    )
    cardinality: int = field(
        default=8, metadata=option("number of groups in each 3x3 convolution", least=1, most=4096)
    )
    base_width: int = field(
        default=4,
        metadata=option(
            "channels per group in the first stage, doubled in each later one", least=1, most=4096
        ),
    )
    stem_width: int = field(default=16, metadata=option("number of channels of the stem", least=1, most=4096))
    stem: str = "small"  # follows from --network
    fused: bool = field(
        default=False,
        metadata=option(
            "run batch norm and ReLU inside the kernels of the 3x3 convolutions: the same network with less "
            "memory traffic"
        ),
    )

    @classmethod
    def of_variant(cls, name: str) -> Network:
        """Return the settings of a named network, such as "resnext50_32x4d"."""
        with torch.device("meta"):
            model = VARIANTS[name]()
        width = model.conv1.out_channels
        return cls(model.repeats, model.cardinality, model.base_width, width, model.stem)


@dataclass(frozen=True)
class Recipe:
    """Training settings. ``milestones`` are fractions of the training; the options describe the rest."""

    epochs: int = field(default=8, metadata=option("number of training epochs", least=1))
    batch_size: int = field(
        default=64,
        metadata=option(
            "images per optimizer step, over all processes; images left over at the end of an epoch are "
            "skipped, different ones each time",
            least=2,
        ),
    )
    micro_batch: int = field(
        default=32,
        metadata=option(
            "largest number of images per forward pass, over which batch norm computes its statistics; a "
            "larger batch is split into several passes with accumulated gradients, or over several processes",
            least=1,
        ),
    )
    optimizer: str = field(
        default="adamw",
        metadata=option("optimizer; sgd uses Nesterov momentum of 0.9", choices=OPTIMIZERS),
    )
    learning_rate: float = field(default=3e-3, metadata=option("peak learning rate", least=0))
    weight_decay: float = field(
        default=0.05, metadata=option("weight decay, applied to all weights", least=0)
    )
    schedule: str = field(
        default="cosine",
        metadata=option(
            "learning rate schedule: cosine decay, or two steps to a tenth each", choices=SCHEDULES
        ),
    )
    milestones: tuple[float, ...] = (1 / 2, 3 / 4)
    warmup_epochs: float = field(
        default=1.0, metadata=option("number of epochs in which the learning rate rises from 0", least=0)
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=option("label smoothing, such as 0.1; 0 turns it off", least=0, most=1),
    )
    mixup: float = field(default=0.0, metadata=option("alpha of mixup, such as 0.2; 0 turns it off", least=0))
    cutmix: float = field(default=0.0, metadata=option("alpha of cutmix, such as 1; 0 turns it off", least=0))
    ema: float = field(
        default=0.0,
        metadata=option(
            "decay of a moving average of the weights, such as 0.9999, which is tested and saved in their "
            "place; 0 turns it off",
            least=0,
            most=1,
        ),
    )
    precision: str = field(
        default="float32",
        metadata=option("precision of autocast; float16 uses loss scaling", choices=tuple(PRECISIONS)),
    )
    sync_batch_norm: bool = field(
        default=False,
        metadata=option("compute batch norm statistics over the images of all GPUs (nn.SyncBatchNorm)"),
    )
    seed: int = field(
        default=0,
        metadata=option(
            "seed of the initial weights, the order of images and the augmentation", least=0, most=2**31
        ),
    )

    def lasting(self, epochs: int) -> Recipe:
        """Return the recipe with another number of epochs, at most a fifth of which are warm-up."""
        return replace(self, epochs=epochs, warmup_epochs=min(self.warmup_epochs, epochs / 5))


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run: saved with the network and fixed on resuming."""

    source: Source = Source()
    network: Network = Network()
    recipe: Recipe = Recipe()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values that files can store."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, dict[str, Any]]) -> Settings:
        """Return the settings from the result of `to_dict`, which may have been through JSON."""
        network, recipe = dict(saved["network"]), dict(saved["recipe"])
        network["repeats"], recipe["milestones"] = tuple(network["repeats"]), tuple(recipe["milestones"])
        return cls(Source(**saved["source"]), Network(**network), Recipe(**recipe))


@dataclass(frozen=True)
class Options:
    """Options that don't decide the result of a run and may change on resuming."""

    workers: int = field(
        default=0,
        metadata=option(
            "number of processes that decode images; 0 decodes in the main process",
            least=0,
            default="one per core, at most 8, for image files; otherwise 0",
        ),
    )
    skip_corrupt: bool = field(
        default=False, metadata=option("skip images that can't be read and count them, instead of stopping")
    )
    channels_last: bool = field(
        default=True, metadata=option("keep weights and activations in channels_last", default="on")
    )
    compile: bool = field(default=False, metadata=option("compile the network with torch.compile"))
    checkpoint_steps: int = field(
        default=0,
        metadata=option(
            "write a checkpoint every N steps, in addition to the one after each epoch; 0 turns it off",
            least=0,
            default="1,000 for folder; otherwise 0",
        ),
    )
    tensorboard: bool = field(default=False, metadata=option("also write TensorBoard event files"))


DEFAULT_OPTIONS = Options()
_DIGITS = Settings()
_CIFAR = Settings(
    network=Network((3, 3, 3, 0), 8, 64, 64),
    # Section 5.3 of the ResNeXt paper: 300 epochs, a tenth of the learning rate from epochs 150 and 225 on.
    recipe=Recipe(
        epochs=300,
        batch_size=128,
        micro_batch=32,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=5e-4,
        schedule="step",
        warmup_epochs=0.0,
    ),
)
_DEFAULTS = {
    "mnist5k": _DIGITS,
    "digits": replace(_DIGITS, recipe=replace(_DIGITS.recipe, epochs=30)),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder": Settings(
        network=Network((3, 4, 6, 3), 32, 4, 64, "imagenet"),
        # Section 4 of the paper: 32 images on each of 8 GPUs, with the schedule of fb.resnet.torch.
        recipe=Recipe(
            epochs=90,
            batch_size=256,
            micro_batch=32,
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=1e-4,
            schedule="step",
            milestones=(1 / 3, 2 / 3),
            warmup_epochs=0.0,
        ),
    ),
}


def defaults(data: str) -> Settings:
    """Return the default settings for the data set ``data``."""
    settings = _DEFAULTS[data]
    return replace(settings, source=Source(data))


def build(network: Network, num_classes: int, in_channels: int) -> ResNeXt:
    """Build the untrained network.

    Raises:
        UserError: the settings don't fit together.
    """
    try:
        return ResNeXt(**asdict(network), num_classes=num_classes, in_channels=in_channels)
    except ValueError as error:
        raise UserError(f"--repeats {','.join(map(str, network.repeats))}: {error}") from None


def difference(saved: Settings, wanted: Settings) -> str | None:
    """Describe the first setting in which two runs differ, other than the path of their images."""
    for part in ("source", "network", "recipe"):
        there, here = (asdict(getattr(settings, part)) for settings in (saved, wanted))
        for name, value in there.items():
            if value != here[name] and name != "path":
                label = "data" if name == "name" else name.replace("_", " ")
                return f"{label} is {value}, got {here[name]}"
    return None
