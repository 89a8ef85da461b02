"""What a training run leaves behind: checkpoints, written so that no kill can spoil them, a log and a plot."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

from .atomic_files import remove_remains, write_atomically
from .checkpoint_files import read_content, torch_writer

FORMAT = "convnext_fast.train/1"


class RunFolder:
    """``last.pth`` (all that resuming needs), ``best.pth`` (for inference), ``log.jsonl`` and ``loss.png`` of a run.

    One on a folder of images has ``images.json`` (which of the files can be read) and ``samples.json`` (those of the
    run) besides.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"the output folder {self.path} exists and is not a folder")
        self.last, self.best = self.path / "last.pth", self.path / "best.pth"
        self.log, self.plot = self.path / "log.jsonl", self.path / "loss.png"
        self.images, self.samples = self.path / "images.json", self.path / "samples.json"

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for path in (self.last, self.best, self.log, self.plot, self.images, self.samples):
            remove_remains(path)

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


def save_run(state: dict, path: Path) -> None:
    """``torch.save`` such that after a kill at any moment either the old or the new file is there."""
    write_atomically(path, torch_writer(state))


def read_run_checkpoint(path: str | Path) -> dict | None:
    """The dictionary that ``train`` or ``demo`` saved at ``path``; None where the file is some other checkpoint.

    Raises:
        FileNotFoundError, CheckpointError, ImportError: see :func:`convnext_fast.checkpoint.read_checkpoint`.
    """
    content = read_content(path)
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None
