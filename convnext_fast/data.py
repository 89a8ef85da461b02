"""Images for training: decoding, augmentation and order.

Nothing here depends on the state of a random generator, the number of workers or where a run was interrupted: the order
of images is a function of (seed, epoch) and the augmentation of an image one of (seed, epoch, image).
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Of the machine, not of one file: what is read in its place would fail as well.
_OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_MOST_REPLACEMENTS = 10
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Sample = tuple[str, int]  # (path relative to the root, label)


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2⁶³) from what it is for; any change of a part gives an unrelated one."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def pillow():
    """Pillow's Image and ImageOps."""
    # An optional dependency: the networks and kernels are used without reading a single image.
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError('reading images needs pillow: pip install "convnext-fast[train]"') from error
    return Image, ImageOps


def open_image(path: str | Path, channels: int = 3):
    """Decode an image file, upright, as PIL image of mode RGB (``channels=3``) or L (1).

    Palettes, grey, RGBA, CMYK and 16-bit files are converted; EXIF orientation is applied.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the system could not read it, for the reason in ``errno``.
        ValueError: the file is not an image, or is damaged.
    """
    image_module, image_ops = pillow()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist or is not a file")
    try:
        with image_module.open(path) as image:
            image.load()
            image = image_ops.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they trip over: OSError, SyntaxError, struct.error, …
        if is_of_the_system(error):
            raise
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    if image.mode.startswith("I"):  # 16 bits (I;16) or 32 that hold 16 (I); convert("RGB") would clip at 255
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def is_of_the_system(error: Exception) -> bool:
    """Did the operating system fail to read the file (and may succeed later), not Pillow to understand it?"""
    return isinstance(error, OSError) and error.errno is not None


def some_names(names: Sequence[str], count: int = 5) -> str:
    """The first few of ``names``, for people to read."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into the network's input, the same in training and inference.

    ``crop_fraction`` is the part of the image's short side that the centre crop keeps.
    """

    image_size: int = 224
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_fraction: float = 0.875

    def to_dict(self) -> dict:
        """Plain types, so that a checkpoint that holds it loads with ``weights_only=True``."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> Preprocessing:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def center_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        side = min(width, height) * self.crop_fraction
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def pixels(self, image, box: tuple[float, float, float, float] | None = None) -> Tensor:
        """``box`` (default: the centre) of a PIL image, resized: (channels, image_size, image_size) in [0, 1]."""
        image_module, _ = pillow()
        size = (self.image_size, self.image_size)
        image = image.resize(size, image_module.Resampling.BICUBIC, box=box or self.center_box(*image.size))
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return data.view(*size, self.channels).permute(2, 0, 1).float().div_(255)

    def normalize(self, pixels: Tensor) -> Tensor:
        mean, std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        return (pixels - mean) / std

    def __call__(self, image) -> Tensor:
        """Input (channels, image_size, image_size) of the network for a PIL image."""
        return self.normalize(self.pixels(image))


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop, horizontal flip and RandAugment of one training image.

    ``crop_scale``: smallest and largest part of the area that a crop keeps; ``randaugment``: magnitude 1 to 29 of two
    random operations, 0 for none.
    """

    hflip: float = 0.5
    crop_scale: tuple[float, float] = (0.08, 1.0)
    randaugment: int = 0
    _policy: list = field(default_factory=list, repr=False, compare=False)

    def check(self) -> None:
        """Raise now, not in a worker process, if RandAugment is asked for and cannot be had."""
        if self.randaugment:
            self._load_policy()

    def crop_box(self, width: int, height: int, rng: random.Random) -> tuple[float, float, float, float]:
        for _ in range(10):
            area = width * height * rng.uniform(*self.crop_scale)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            crop_w, crop_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_w <= width and 0 < crop_h <= height:
                left, top = rng.randint(0, width - crop_w), rng.randint(0, height - crop_h)
                return left, top, left + crop_w, top + crop_h
        side = min(width, height)  # an image too narrow for any of the shapes: its central square
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side

    def __call__(self, image, preprocessing: Preprocessing, seed: int) -> Tensor:
        """Input (channels, image_size, image_size) of the network, a function of the image and ``seed`` alone."""
        rng = random.Random(seed)
        pixels = preprocessing.pixels(image, self.crop_box(*image.size, rng))
        if rng.random() < self.hflip:
            pixels = pixels.flip(-1)
        if self.randaugment:
            policy = self._load_policy()
            with torch.random.fork_rng(devices=[]):  # kornia draws from torch's global generator
                torch.manual_seed(seed)
                pixels = policy(pixels.unsqueeze(0)).squeeze(0).clamp_(0, 1)
        return preprocessing.normalize(pixels)

    def _load_policy(self) -> Callable[[Tensor], Tensor]:
        if not self._policy:
            # Why kornia: torchvision cannot be imported beside a CPU build of torch (its wheels are linked to CUDA
            # builds), albumentations is no longer maintained by its authors. kornia is, and is pure PyTorch. It draws
            # one policy per call, therefore it is called per image. Optional, so imported where it is needed.
            try:
                from kornia.augmentation.auto import RandAugment
            except ImportError as error:
                raise ImportError('randaugment needs kornia: pip install "convnext-fast[train]"') from error
            self._policy.append(RandAugment(n=2, m=self.randaugment))
        return self._policy[0]


class ImageFiles:
    """Samples (path relative to ``root``, label) as a dataset; items are asked for as (epoch, index).

    An image that cannot be read is replaced by one of the same class, which (seed, epoch, index) determine: a run of
    days should not end for one file. :meth:`warn_of_replaced` names them.
    """

    def __init__(
        self,
        root: Path,
        samples: Sequence[Sample],
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        self.root, self.samples = root, list(samples)
        self.preprocessing, self.augmentation, self.seed = preprocessing, augmentation, seed
        # Worker processes mark here what they replaced; only memory that they share gets back to the main process.
        self._replaced = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        image, label = self._image(epoch, index), self.samples[index][1]
        if self.augmentation is None:
            return self.preprocessing(image), label
        return self.augmentation(image, self.preprocessing, derive_seed("augment", self.seed, epoch, index)), label

    def _image(self, epoch: int, index: int):
        try:
            return self._open(index)
        except (OSError, ValueError) as error:
            first = error
        if isinstance(first, OSError) and first.errno in _OUT_OF_MEANS:
            raise first
        self._replaced[index] = True
        same = [i for i, (_, label) in enumerate(self.samples) if label == self.samples[index][1] and i != index]
        random.Random(derive_seed("replace", self.seed, epoch, index)).shuffle(same)
        for other in same[:_MOST_REPLACEMENTS]:
            try:
                return self._open(other)
            except (OSError, ValueError):
                self._replaced[other] = True
        raise first  # not one file, but a disk or a folder is gone

    def _open(self, index: int):
        return open_image(self.root / self.samples[index][0], self.preprocessing.channels)

    def warn_of_replaced(self) -> None:
        """One warning with the number and names of the images that were replaced since the last call."""
        names = [self.samples[i][0] for i in self._replaced.nonzero().flatten().tolist()]
        self._replaced.zero_()
        if names:
            logger.warning(
                "%d of %d images cannot be read any more, and others of their class were taken in their place: %s",
                len(names), len(self), some_names(names),
            )  # fmt: skip


class TensorImages:
    """Images (N, C, H, W) and labels (N,) in memory as a dataset; items are asked for as (epoch, index)."""

    def __init__(self, images: Tensor, labels: Tensor):
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"images has shape {tuple(images.shape)} and labels {tuple(labels.shape)}; "
                "(N, C, H, W) and (N,) are allowed"
            )
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        return self.images[item[1]], int(self.labels[item[1]])


class EpochBatches:
    """One rank's batches of (epoch, index), as ``batch_sampler`` of a DataLoader.

    The global batch of step s is ``order[s·B·world : (s+1)·B·world]``, which the ranks share; what does not fill
    a batch is left out for this epoch, unless it is all there is.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if size < world_size:
            raise ValueError(f"{size} training images are fewer than the {world_size} processes")
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.global_batch = min(batch_size * world_size, size)
        self.steps = size // self.global_batch
        self.epoch = self.first_step = 0

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """Where the next iteration starts: ``first_step`` > 0 after an interruption."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, generator = self.epoch, torch.Generator()
        generator.manual_seed(derive_seed("order", self.seed, epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for step in range(self.first_step, self.steps):
            batch = order[step * self.global_batch : (step + 1) * self.global_batch]
            yield [(epoch, index) for index in batch[self.rank :: self.world_size]]


class ShardBatches:
    """One rank's share of a validation set, each image exactly once over all ranks, as ``batch_sampler``."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.indices, self.batch_size = range(rank, size, world_size), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


@dataclass(frozen=True)
class Mixing:
    """Mixup (https://arxiv.org/abs/1710.09412), CutMix (https://arxiv.org/abs/1905.04899) and label smoothing.

    ``mixup`` and ``cutmix`` are the α of Beta(α, α), 0 for off; with both on, a coin chooses per batch.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and target probabilities (N, num_classes) of labels (N,); a function of its arguments."""
        targets = torch.full((len(labels), self.num_classes), self.label_smoothing / self.num_classes)
        targets = targets.to(images.device)
        targets.scatter_(1, labels.unsqueeze(1), 1 - self.label_smoothing + self.label_smoothing / self.num_classes)
        if not (self.mixup or self.cutmix):
            return images, targets

        rng = random.Random(derive_seed("mix", seed))
        partner = list(range(len(labels)))
        rng.shuffle(partner)
        partner = torch.tensor(partner, device=images.device)
        if self.cutmix and (not self.mixup or rng.random() < 0.5):
            share = rng.betavariate(self.cutmix, self.cutmix)
            height, width = images.shape[2:]
            top, bottom = _cut(height, share, rng)
            left, right = _cut(width, share, rng)
            mixed = images.clone()
            mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)  # of the pixels, after rounding and clipping
        else:
            share = rng.betavariate(self.mixup, self.mixup)
            mixed = images * share + images[partner] * (1 - share)
        return mixed, targets * share + targets[partner] * (1 - share)


def _cut(size: int, share: float, rng: random.Random) -> tuple[int, int]:
    """Where a box begins and ends that takes √(1 − share) of this side, around any centre, clipped to the image."""
    length, center = round(size * math.sqrt(1 - share)), rng.randrange(size)
    return max(0, center - length // 2), min(size, center - length // 2 + length)
