"""Images for training: folders, decoding and augmentation.

Nothing here depends on the state of a random generator, the number of workers or where a run was interrupted: the order
of images is a function of (seed, epoch) and the augmentation of an image one of (seed, epoch, image).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Sample = tuple[str, int]  # (path relative to the root, label)


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2⁶³) from what it is for; any change of a part gives an unrelated one."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _pil():
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
        ValueError: the file is not an image, or is damaged.
    """
    image_module, image_ops = _pil()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist or is not a file")
    try:
        with image_module.open(path) as image:
            image.load()
            image = image_ops.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise whatever they trip over: OSError, SyntaxError, struct.error, …
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    if image.mode.startswith("I"):  # 16 bits (I;16) or 32 that hold 16 (I); convert("RGB") would clip at 255
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


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
        image_module, _ = _pil()
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
    """Samples (path relative to ``root``, label) as a dataset; items are asked for as (epoch, index)."""

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

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        path, label = self.samples[index]
        image = open_image(self.root / path, self.preprocessing.channels)
        if self.augmentation is None:
            return self.preprocessing(image), label
        return self.augmentation(image, self.preprocessing, derive_seed("augment", self.seed, epoch, index)), label


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


@dataclass(frozen=True)
class FolderListing:
    """The images of a data folder; paths are relative to ``root`` with forward slashes."""

    root: str
    class_names: list[str]
    train: list[Sample]
    val: list[Sample]

    def fingerprint(self) -> str:
        """Changes when an image or a class is added, removed or renamed."""
        content = json.dumps([self.class_names, self.train, self.val])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def list_folder(
    data_dir: str | Path,
    val_fraction: float | None = None,
    cache: Path | None = None,
    progress: Callable[..., Iterable] = lambda iterable, **_: iterable,
) -> FolderListing:
    """Find, check and split the images of ``data_dir``.

    Either ``data_dir/train/<class>/`` and ``data_dir/val/<class>/``, or ``data_dir/<class>/``, of which a part
    ``val_fraction`` (default 0.1) of every class is held out by a hash of the file names, whatever the seed. Every file
    is decoded once (JPEG at an eighth of its size); those that cannot be are left out with one warning. ``cache`` (a
    JSON file) remembers the outcome by size and time of change.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it does not hold images of at least two classes.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"DATA_DIR {root} does not exist or is not a folder")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; a number between 0 and 1 is allowed")
    has_parts = (root / "train").is_dir()
    train_root = root / "train" if has_parts else root
    files = _class_files(train_root, root)
    classes = list(files)
    if len(classes) < 2:
        raise ValueError(f"{train_root} holds the single class {classes[0]!r}; at least two are needed to train")

    val_files: dict[str, list[str]] = {}
    if has_parts and (root / "val").is_dir():
        if val_fraction is not None:
            raise ValueError(f"--val-fraction is given, and {root} has a val/ folder; leave out one of them")
        val_files = _class_files(root / "val", root)
        if unknown := [name for name in val_files if name not in files]:
            raise ValueError(f"{root / 'val'} holds classes that {train_root} does not: {_first(unknown)}")
    elif has_parts and val_fraction is None:
        raise ValueError(f"{root} has train/ but no val/ folder; add one, or split train/ with --val-fraction")

    readable = _readable(root, [path for group in (files, val_files) for paths in group.values() for path in paths],
                         cache, progress)  # fmt: skip
    files = {name: [path for path in paths if path in readable] for name, paths in files.items()}
    if empty := [name for name, paths in files.items() if not paths]:
        raise ValueError(f"no image can be read of class {_first(empty)} in {train_root}")
    if val_files:
        val_files = {name: [path for path in paths if path in readable] for name, paths in val_files.items()}
    else:
        files, val_files = _split(files, 0.1 if val_fraction is None else val_fraction)

    label = {name: i for i, name in enumerate(classes)}
    train, val = (
        [(path, label[name]) for name, paths in group.items() for path in paths] for group in (files, val_files)
    )
    if not val:
        raise ValueError(f"no validation image is left in {root}; put some into val/, or use a larger --val-fraction")
    return FolderListing(str(root), classes, train, val)


def _class_files(folder: Path, root: Path) -> dict[str, list[str]]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = {name: sorted(_images_under(folder / name, root)) for name in classes}
    allowed = ", ".join(IMAGE_SUFFIXES)
    if not any(files.values()):
        raise ValueError(f"{folder} has no images; expected {folder}/<class>/*, ending in {allowed}")
    if empty := [name for name, paths in files.items() if not paths]:
        raise ValueError(f"class {_first(empty)} in {folder} has no images, ending in {allowed}")
    return files


def _images_under(folder: Path, root: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield (Path(parent) / name).relative_to(root).as_posix()


def _split(files: dict[str, list[str]], fraction: float) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    train, val = {}, {}
    for name, paths in files.items():
        by_hash = sorted(paths, key=lambda path: hashlib.blake2b(path.encode(), digest_size=8).digest())
        count = min(max(1, round(len(paths) * fraction)), len(paths) - 1)  # at least one for each, training first
        train[name], val[name] = sorted(by_hash[count:]), sorted(by_hash[:count])
    return train, val


def _readable(root: Path, paths: list[str], cache: Path | None, progress: Callable[..., Iterable]) -> set[str]:
    _pil()  # its absence is one error here, not one broken image per file
    stats = {path: (root / path).stat() for path in paths}
    stamps = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    known = {}
    if cache is not None and cache.is_file():
        try:
            known = json.loads(cache.read_text())
        except ValueError:
            logger.debug("%s is not JSON; checking all images again", cache)
    known = {path: known[path] for path in paths if known.get(path, [None])[:2] == stamps[path]}
    unknown = [path for path in paths if path not in known]
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # decoders release the GIL
        checked = pool.map(lambda path: _decodes(root / path), unknown)
        checked = progress(checked, total=len(unknown), desc="checking images") if unknown else checked
        known |= {path: [*stamps[path], ok] for path, ok in zip(unknown, checked, strict=True)}
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(".tmp")
        temporary.write_text(json.dumps(known))
        os.replace(temporary, cache)

    broken = [path for path in paths if not known[path][2]]
    if len(broken) == len(paths):
        raise ValueError(f"none of the {len(paths)} images in {root} can be read, e.g. {broken[0]}")
    if broken:
        logger.warning("skipped %d of %d images that cannot be read: %s", len(broken), len(paths), _first(broken))
    return set(paths) - set(broken)


def _decodes(path: Path) -> bool:
    image_module, _ = _pil()
    try:
        with image_module.open(path) as image:
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))  # JPEG only: reads all, faster
            image.load()
    except Exception:  # see open_image
        return False
    return True


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
