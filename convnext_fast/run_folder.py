"""What a training run leaves behind: checkpoints, written so that no kill can spoil them, a log and a plot."""

from __future__ import annotations

import io
import json
import os
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import torch

FORMAT = "convnext_fast.train/1"


class RunFolder:
    """``last.pth`` (all that resuming needs), ``best.pth`` (for inference), ``log.jsonl`` and ``loss.png`` of a run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"the output folder {self.path} exists and is not a folder")
        self.last, self.best = self.path / "last.pth", self.path / "best.pth"
        self.log, self.plot = self.path / "log.jsonl", self.path / "loss.png"

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def write_log(self, history: list[dict]) -> None:
        """One JSON object per epoch. Written anew, so that a resumed run has no line twice."""
        write_atomically(self.log, "".join(json.dumps(record) + "\n" for record in history).encode())

    def write_plot(self, history: list[dict]) -> bool:
        """Draw the losses and accuracies; False where there is nothing to draw, or no matplotlib."""
        if not history or not can_plot():
            return False
        from matplotlib.figure import Figure  # an optional dependency; without pyplot no display is ever asked for

        epochs = [record["epoch"] for record in history]
        figure = Figure(figsize=(10, 4), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        for key, label in (("train_loss", "train"), ("val_loss", "validation"), ("ema_val_loss", "validation, EMA")):
            if key in history[-1]:
                loss.plot(epochs, [record[key] for record in history], marker=".", label=label)
        for key, label in (("val_accuracy", "validation"), ("ema_val_accuracy", "validation, EMA")):
            if key in history[-1]:
                accuracy.plot(epochs, [100 * record[key] for record in history], marker=".", label=label)
        loss.set(xlabel="epoch", ylabel="loss")
        accuracy.set(xlabel="epoch", ylabel="accuracy, %")
        for axes in (loss, accuracy):
            axes.grid(alpha=0.3)
            axes.legend()
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        write_atomically(self.plot, image.getvalue())
        return True


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file such that after a kill at any moment either the old or the new content is there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def save_atomically(state: dict, path: Path) -> None:
    """``torch.save`` with the promise of :func:`write_atomically`."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and the rename is as durable as it gets
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_run_checkpoint(path: str | Path) -> dict | None:
    """The dictionary that ``train`` or ``demo`` saved at ``path``; None where the file is some other checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or no checkpoint at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
    if path.suffix == ".safetensors":
        return None
    damaged = f"checkpoint {path} is not a file that torch.load can read, or is truncated"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if "Unsupported" in str(error):  # objects other than plain types: not ours; load_checkpoint decides about them
            return None
        raise ValueError(damaged) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(damaged) from error
    return state if isinstance(state, dict) and state.get("format") == FORMAT else None
