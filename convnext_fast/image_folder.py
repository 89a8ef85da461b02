"""Training on a folder of images: from options to a :class:`convnext_fast.train.Trainer` that is ready to run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import own_names, read_checkpoint
from .data import Augmentation, ImageFiles, Preprocessing
from .distributed import World
from .folder_listing import FolderListing, list_folder
from .pretrained import DownloadError, download_pretrained, pretrained_arguments
from .run_folder import RunFolder
from .train import Options, Task, Trainer
from .zoo import create_model, network_arguments

# Arguments of networks that are no matter of choice here, or of another option.
_NOT_FOR_TRAINING = {
    **dict.fromkeys(("features_only", "out_indices"), "training needs the head of a classifier"),
    **dict.fromkeys(("in_chans", "in_channels"), "images are read as RGB"),
    "num_classes": "there is a class per folder of images",
    "drop_path_rate": "the option for it is drop_path, --drop-path",
    "device": "the option for it is --device",
    "dtype": "the option for half precision is --amp",
}


@dataclass(frozen=True)
class FolderOptions:
    """Network and images of a run.

    ``augment=False`` trains on centre crops; ``init_from`` is a checkpoint of any dialect, ``pretrained``
    the published one. ``model_kwargs`` are further arguments of the network, such as {"kernel_size": 9}.
    """

    model: str = "convnext_tiny"
    image_size: int = 224
    val_fraction: float | None = None
    drop_path: float = 0.1
    augment: bool = True
    hflip: float = 0.5
    randaugment: int = 0
    pretrained: bool = False
    init_from: str | None = None
    model_kwargs: dict[str, Any] | None = None

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; 1 or more is allowed")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; a probability in [0, 1) is allowed")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip is {self.hflip}; a probability in [0, 1] is allowed")
        if not 0 <= self.randaugment < 30:
            raise ValueError(f"randaugment is {self.randaugment}; a magnitude from 0 (off) to 29 is allowed")
        if self.randaugment and not self.augment:
            raise ValueError(f"randaugment is {self.randaugment} and augment False; one of them is allowed")
        if self.pretrained and self.init_from:
            raise ValueError("pretrained and init_from are both given; one of them is allowed")
        taken = network_arguments(self.model) - _NOT_FOR_TRAINING.keys()
        if unknown := [name for name in self.model_kwargs or {} if name not in taken]:
            names = (f"{name} ({_NOT_FOR_TRAINING[name]})" if name in _NOT_FOR_TRAINING else name for name in unknown)
            raise ValueError(
                f"model_kwargs has {', '.join(names)}; of {self.model} are allowed: {', '.join(sorted(taken))}"
            )


def folder_trainer(
    data_dir: str | Path,
    folder_options: FolderOptions,
    options: Options,
    out: str | Path,
    world: World,
    resume: str | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[..., Iterable] = lambda iterable, **_: iterable,
) -> Trainer:
    """A trainer for the images in ``data_dir``, see :func:`convnext_fast.folder_listing.list_folder`.

    ``resume``: a checkpoint to go on from; "auto" is the one in ``out``, if there is one already.

    Raises:
        FileNotFoundError, ValueError: something in ``data_dir`` or ``out``, a checkpoint or an option is not as needed.
        ImportError: a package of the extra ``train`` is missing.
    """
    folder, o = RunFolder(out), folder_options
    augmentation = Augmentation(hflip=o.hflip, randaugment=o.randaugment) if o.augment else None
    if augmentation is not None:
        augmentation.check()

    def prepare():
        if resume is None and folder.last.exists():
            raise ValueError(f"{folder.path} holds a run already; go on with --resume, or choose another --out")
        if resume not in (None, "auto") and not Path(resume).is_file():
            raise FileNotFoundError(f"--resume: checkpoint {resume} does not exist or is not a file")
        resume_from = resume if resume != "auto" else (str(folder.last) if folder.last.exists() else None)
        listing = list_folder(data_dir, o.val_fraction, folder.images, progress)
        if len(listing.train) < world.size:
            raise ValueError(f"{len(listing.train)} training images are fewer than the {world.size} processes")
        before = None if resume_from is None else FolderListing.read(Path(resume_from).with_name(folder.samples.name))
        if before is not None:
            listing = listing.as_in(before)
        if resume_from is None and o.pretrained:
            _download(o.model)  # one process; the others find the file
        return listing, resume_from

    def keep_listing():
        folder.create()
        listing.write(folder.samples)

    listing, resume_from = world.on_main(prepare)
    torch.manual_seed(options.seed)
    report = report if world.is_main else lambda line: None
    num_classes = len(listing.class_names)
    # Of the published weights one network differs from its builder's defaults by more than the head.
    kwargs = pretrained_arguments(o.model, False) if o.pretrained else {}
    kwargs |= {**(o.model_kwargs or {}), "num_classes": num_classes}
    if resume_from is None:
        model = world.on_all(lambda: _initial_network(o, num_classes, report))
    else:  # whatever it began with, its weights are in the checkpoint
        model = world.on_all(lambda: _create(o, **kwargs))
    preprocessing, root = Preprocessing(image_size=o.image_size), Path(listing.root)
    start = None if o.init_from is None else os.path.realpath(o.init_from)  # the same file by whatever way
    task = Task(
        model=model,
        architecture={"name": o.model, "kwargs": kwargs},
        class_names=listing.class_names,
        preprocessing=preprocessing,
        train_data=ImageFiles(root, listing.train, preprocessing, augmentation, options.seed),
        val_data=ImageFiles(root, listing.val, preprocessing),
        settings={**asdict(o), "init_from": start, "images": listing.fingerprint()},
    )
    trainer = Trainer(task, options, folder, world, report, progress)
    if resume_from is not None:
        world.on_all(lambda: trainer.load(resume_from))
    world.on_main(keep_listing)  # now that nothing can be refused any more: it may replace that of another run
    return trainer


def _download(name: str) -> None:
    try:
        download_pretrained(name)
    except DownloadError as error:
        advice = " Try again, or get the file in another way and name it with --init-from"
        raise DownloadError(error.message + advice) from error


def _initial_network(o: FolderOptions, num_classes: int, report: Callable[[str], None]) -> nn.Module:
    model = _start(o, num_classes, report)
    if o.image_size < model.reduction:
        raise ValueError(f"image_size is {o.image_size}; {model.reduction} or more is allowed for {o.model}")
    if model.num_classes != num_classes:
        report(
            f"the checkpoint's head has {model.num_classes} classes, here are {num_classes}: re-initialised the head"
        )
        model.reset_classifier(num_classes)
    return model


def _start(o: FolderOptions, num_classes: int, report: Callable[[str], None]) -> nn.Module:
    if o.pretrained:
        return _create(o, pretrained=True)
    if o.init_from is None:
        return _create(o, num_classes=num_classes)
    head = head_size(read_checkpoint(o.init_from))
    model = _create(o, pretrained=o.init_from, num_classes=head)
    report(f"initialised {o.model} from {o.init_from}")
    return model


def _create(o: FolderOptions, **kwargs) -> nn.Module:
    try:
        return create_model(o.model, **{**kwargs, **(o.model_kwargs or {}), "drop_path_rate": o.drop_path})
    except TypeError as error:  # of numbers where lists are expected, and the like
        if not o.model_kwargs:
            raise
        raise ValueError(f"model_kwargs is {o.model_kwargs}, which {o.model} cannot be built with: {error}") from error


def head_size(state_dict: dict) -> int:
    """Number of classes of a checkpoint of any dialect; 0 where it has no head."""
    head = own_names(state_dict).get("head.weight")
    return 0 if head is None else len(head)


def read_class_names(path: str | Path) -> list[str]:
    """Class names from a text file (one a line) or JSON: a list, or an object {"0": name} or {"0": [id, name]}.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"class names file {path} does not exist or is not a file")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        names = json.loads(text)
        if isinstance(names, dict):
            names = [names[str(i)] for i in range(len(names))]
        return [str(name[-1] if isinstance(name, list) else name) for name in names]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        allowed = 'one name per line, or JSON: a list, {"0": name, ...} or {"0": [id, name], ...}'
        raise ValueError(f"class names file {path} cannot be read; allowed: {allowed}") from error
