"""The settings of a run, what they are for each data set, and how the command line offers them."""

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
    """How the command line offers a field of the settings: ``cli/options.py`` makes options from these.

    Args:
        help: one or two sentences.
        name: the option, without dashes, or a positional argument in capitals. Defaults to the field's name.
        least, most: the range of a number, both included.
        choices: the allowed texts.
        default: describes the default in help. Defaults to the field's value for each data set.
    """

    help: str
    name: str | None = None
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()
    default: str | None = None


def option(help: str, **details: Any) -> dict[str, Option]:
    """Return metadata for ``dataclasses.field``: the field is an option, with the details of ``Option``."""
    return {"option": Option(help, **details)}


@dataclass(frozen=True)
class Source:
    """Where the images come from: the arguments of :func:`resnext.data.load_data`."""

    name: str = field(
        default="mnist5k",
        metadata=option(
            "Data set. mnist5k and digits: 5,000 and 1,797 handwritten digits that come with installed "
            "packages. cifar10 and cifar100: PATH is the published archive (python or binary) or its folder. "
            "folder: PATH has train/CLASS/*.jpg and val/CLASS/*.jpg.",
            name="data",
            choices=DATA_SETS,
            default="mnist5k",
        ),
    )
    path: str | None = field(
        default=None,
        metadata=option("Archive or folder with the images; mnist5k and digits need none.", name="PATH"),
    )
    image_size: int | None = field(
        default=None,
        metadata=option(
            "Height and width that images are scaled to; for folder only.",
            least=8,
            most=2**12,
            default="224",
        ),
    )


@dataclass(frozen=True)
class Network:
    """The arguments of :class:`resnext.ResNeXt`, except those that follow from the data."""

    repeats: tuple[int, ...] = field(
        default=(1, 1, 1, 1), metadata=option("Number of blocks in each of the four stages.")
    )
    cardinality: int = field(
        default=8, metadata=option("Number of groups in each 3x3 convolution.", least=1, most=4096)
    )
    base_width: int = field(
        default=4, metadata=option("Channels of each group in the first stage.", least=1, most=4096)
    )
    stem_width: int = field(default=16, metadata=option("Channels of the stem.", least=1, most=4096))
    stem: str = "small"  # follows from --network
    fused: bool = field(
        default=False,
        metadata=option(
            "Run the batch norms inside the kernels of the 3x3 convolutions: the same network with fewer "
            "passes over memory."
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
    """How a network is trained. ``milestones`` are fractions of the training; the rest explains itself."""

    epochs: int = field(default=8, metadata=option("Number of training epochs.", least=1))
    batch_size: int = field(
        default=64,
        metadata=option(
            "Images per update of the weights, over all processes. Images left over at the end of an epoch "
            "are skipped, different ones each time.",
            least=2,
        ),
    )
    micro_batch: int = field(
        default=32,
        metadata=option(
            "Most images per forward pass, and so what batch norm sees. A larger batch takes several passes "
            "with accumulated gradients, or several processes.",
            least=1,
        ),
    )
    optimizer: str = field(
        default="adamw",
        metadata=option("Optimizer; sgd has Nesterov momentum of 0.9.", choices=OPTIMIZERS),
    )
    learning_rate: float = field(default=3e-3, metadata=option("Peak learning rate.", least=0))
    weight_decay: float = field(
        default=0.05, metadata=option("Weight decay, applied to all weights.", least=0)
    )
    schedule: str = field(
        default="cosine",
        metadata=option(
            "How the learning rate falls: cosine, or step, to a tenth at two points.", choices=SCHEDULES
        ),
    )
    milestones: tuple[float, ...] = (1 / 2, 3 / 4)
    warmup_epochs: float = field(
        default=1.0, metadata=option("Epochs over which the learning rate rises from 0.", least=0)
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=option("Label smoothing, such as 0.1; 0 turns it off.", least=0, most=1),
    )
    mixup: float = field(
        default=0.0, metadata=option("Alpha of mixup, such as 0.2; 0 turns it off.", least=0)
    )
    cutmix: float = field(
        default=0.0, metadata=option("Alpha of cutmix, such as 1; 0 turns it off.", least=0)
    )
    ema: float = field(
        default=0.0,
        metadata=option(
            "Decay of a moving average of the weights, such as 0.9999; the average is then tested and saved. "
            "0 turns it off.",
            least=0,
            most=1,
        ),
    )
    precision: str = field(
        default="float32",
        metadata=option("Precision of autocast; float16 comes with loss scaling.", choices=tuple(PRECISIONS)),
    )
    sync_batch_norm: bool = field(
        default=False,
        metadata=option("Compute batch norm statistics over the images of all GPUs (nn.SyncBatchNorm)."),
    )
    seed: int = field(
        default=0,
        metadata=option("Seed of the weights, the order and the augmentation.", least=0, most=2**31),
    )

    def lasting(self, epochs: int) -> Recipe:
        """Return the same recipe for another number of epochs, at most a fifth of them for warm-up."""
        return replace(self, epochs=epochs, warmup_epochs=min(self.warmup_epochs, epochs / 5))


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run: saved with the network and fixed when it is resumed."""

    source: Source = Source()
    network: Network = Network()
    recipe: Recipe = Recipe()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for files."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, dict[str, Any]]) -> Settings:
        """Return the settings that :meth:`to_dict` gave, also after a detour through JSON."""
        network, recipe = dict(saved["network"]), dict(saved["recipe"])
        network["repeats"], recipe["milestones"] = tuple(network["repeats"]), tuple(recipe["milestones"])
        return cls(Source(**saved["source"]), Network(**network), Recipe(**recipe))


@dataclass(frozen=True)
class Options:
    """How a run is carried out, which may change when it is resumed."""

    workers: int = field(
        default=0,
        metadata=option(
            "Number of processes that decode images; 0 decodes in the main process.",
            least=0,
            default="one per core, at most 8, for images in files; otherwise 0",
        ),
    )
    skip_corrupt: bool = field(
        default=False, metadata=option("Skip and count images that cannot be read, instead of stopping.")
    )
    channels_last: bool = field(
        default=True, metadata=option("Keep weights and activations in channels_last.", default="on")
    )
    compile: bool = field(default=False, metadata=option("Compile the network with torch.compile."))
    checkpoint_steps: int = field(
        default=0,
        metadata=option(
            "Write a checkpoint every so many updates, in addition to the one after each epoch; 0 for none.",
            least=0,
            default="1,000 for folder; otherwise 0",
        ),
    )
    tensorboard: bool = field(default=False, metadata=option("Also write TensorBoard's event files."))


DEFAULT_OPTIONS = Options()
_DIGITS = Settings()
_CIFAR = Settings(
    network=Network((3, 3, 3, 0), 8, 64, 64),
    # Section 5.3 of the ResNeXt paper: 300 epochs, a tenth from the 150th and the 225th on.
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
        # Section 4 of the paper, which takes the schedule of fb.resnet.torch; 32 images on each of 8 GPUs.
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
        UserError: its settings do not go together.
    """
    try:
        return ResNeXt(**asdict(network), num_classes=num_classes, in_channels=in_channels)
    except ValueError as error:
        raise UserError(f"--repeats {','.join(map(str, network.repeats))}: {error}") from None


def difference(saved: Settings, wanted: Settings) -> str | None:
    """Return in words the first setting in which two runs differ, apart from the path of their images."""
    for part in ("source", "network", "recipe"):
        there, here = (asdict(getattr(settings, part)) for settings in (saved, wanted))
        for name, value in there.items():
            if value != here[name] and name != "path":
                return f"its {name.replace('_', ' ')} is {value}, not {here[name]}"
    return None
