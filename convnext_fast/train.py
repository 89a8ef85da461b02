"""The training loop: AdamW with warm-up and cosine schedule, mixed precision, EMA, exact resuming, several processes.

Every random draw is a function of (seed, epoch, step, rank) or (seed, epoch, image). A run that is killed and resumed
therefore ends, on a CPU, with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import dwconv_kernels as dk

from .backend_in_use import describe_backend, kernels_take_blocks
from .data import EpochBatches, Mixing, Preprocessing, ShardBatches, derive_seed
from .distributed import World, outlive_signals, stop_workers
from .run_folder import FORMAT, RunFolder, can_plot, read_run_checkpoint, save_run

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# A resumed run may change these: where and how fast it computes, not what.
FREE_OPTIONS = ("workers", "checkpoint_every")


def _difference(name: str, ours: Any, theirs: Any) -> str:
    return "the images are others" if name == "images" else f"{name} is {ours!r}, was {theirs!r}"


class Interrupted(Exception):
    """SIGTERM came; the state is saved."""


@dataclass(frozen=True)
class Options:
    """What determines a run, apart from the network and the images.

    ``batch_size`` is per process; ``lr`` None means 4e-3 per 4096 images of the global batch, as in the paper.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float | None = None
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    amp: str = "none"
    ema_decay: float = 0.0
    clip_grad: float = 0.0
    channels_last: bool = False
    grad_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    workers: int = 0
    checkpoint_every: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; 1 or more is allowed")
        at_least_0 = ("min_lr", "weight_decay", "warmup_epochs", "mixup", "cutmix", "clip_grad", "workers",
                      "checkpoint_every")  # fmt: skip
        for name in at_least_0:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; 0 or more is allowed")
        for name in ("label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a number in [0, 1) is allowed")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; a positive number is allowed")
        if self.amp not in AMP_DTYPES:
            raise ValueError(f"amp is {self.amp!r}; allowed: {', '.join(AMP_DTYPES)}")


@dataclass(frozen=True)
class Task:
    """What is trained on what. ``architecture`` and ``class_names`` go into the checkpoints, for inference.

    ``settings`` are further options that determine the result (augmentation, image size, …): those of a resumed run
    must be equal. Datasets are indexed by (epoch, index), see :class:`convnext_fast.data.ImageFiles`.
    """

    model: nn.Module
    architecture: dict[str, Any]
    class_names: list[str]
    preprocessing: Preprocessing
    train_data: Dataset
    val_data: Dataset
    settings: dict[str, Any]


def learning_rate(step: int, total: int, warmup: int, peak: float, final: float) -> float:
    """Linear from peak/warmup at step 0 to ``peak`` at the end of the warm-up, then a half cosine to ``final``.

    ``final`` is reached at the last step, total − 1.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters with and without weight decay: biases, norms, layer scale and GRN are without, as in the original."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_scale = parameter.ndim <= 1 or name.endswith((".bias", ".gamma", ".beta"))
            (no_decay if is_scale else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def _plain_iter(iterable: Iterable, **_: Any) -> Iterable:
    return iterable


class Trainer:
    """One run of ``options.epochs`` over ``task`` that writes to ``folder``.

    Args:
        world: from :func:`convnext_fast.distributed.join_world`.
        report: called with lines of text, on rank 0.
        progress: wraps the iteration over an epoch's steps, with the arguments of ``tqdm``.
    """

    def __init__(
        self,
        task: Task,
        options: Options,
        folder: RunFolder,
        world: World,
        report: Callable[[str], None] = lambda line: None,
        progress: Callable[..., Iterable] = _plain_iter,
    ):
        self.task, self.folder, self.world = task, folder, world
        self.report = report if world.is_main else lambda line: None
        self.progress = progress if world.is_main else _plain_iter
        # Said now, not by the first block of the first step.
        supported, reason = kernels_take_blocks(world.device)
        if dk.current_backend() == "triton" and not supported:
            raise ValueError(f"the backend is set to triton, which cannot run here: {reason}")
        peak = 4e-3 * options.batch_size * world.size / 4096 if options.lr is None else options.lr
        self.options = options = replace(options, lr=peak)

        memory_format = torch.channels_last if options.channels_last else torch.preserve_format
        self.model = task.model.to(world.device, memory_format=memory_format)
        if options.grad_checkpointing:
            self.model.set_grad_checkpointing()
        self.ema = None
        if options.ema_decay:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, options.weight_decay), lr=peak)
        self.amp_dtype = AMP_DTYPES[options.amp]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "fp16")
        self.net: Callable[[Tensor], Tensor] = self.model
        if world.size > 1:
            ids = [world.device] if world.device.type == "cuda" else None
            self.net = DistributedDataParallel(self.model, device_ids=ids)
        if options.compile:
            self.net = torch.compile(self.net)
        self.mixing = Mixing(len(task.class_names), options.mixup, options.cutmix, options.label_smoothing)

        self.batches = EpochBatches(len(task.train_data), options.batch_size, options.seed, world.rank, world.size)
        self.loader = self._loader(task.train_data, self.batches)
        self.val_loader = self._loader(
            task.val_data, ShardBatches(len(task.val_data), options.batch_size, world.rank, world.size)
        )
        self.epoch = self.step = 0
        self.best = -1.0
        self.history: list[dict] = []
        # MPS has no float64; what is lost there is digits of a number for display.
        sum_dtype = torch.float32 if world.device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=sum_dtype, device=world.device)  # of this epoch, this rank
        self.seconds, self.seen = 0.0, 0  # of this process, for images/s
        self.terminated = False

    def _loader(self, data: Dataset, batches) -> DataLoader:
        workers = self.options.workers
        return DataLoader(
            data,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.world.device.type == "cuda",
            worker_init_fn=outlive_signals,
        )

    @property
    def warmup_steps(self) -> int:
        return round(min(self.options.warmup_epochs, self.options.epochs) * self.batches.steps)

    def fit(self) -> dict:
        """Train until the last epoch; the last epoch's record with ``images_per_second`` of all training.

        Raises:
            Interrupted: after SIGTERM, with the state saved.
            FloatingPointError: the loss or a weight is not finite; what was saved before is left as it is.
        """
        o = self.options
        if not can_plot():
            self.report('no loss.png will be drawn: pip install "convnext-fast[train]" brings matplotlib')
        self.report(
            f"{len(self.task.train_data)} training and {len(self.task.val_data)} validation images, "
            f"{len(self.task.class_names)} classes; {o.epochs} epochs of {self.batches.steps} steps, "
            f"peak learning rate {o.lr:.3g}; backend {describe_backend(self.world.device)}"
        )
        if self.world.is_main and self.history:
            self.folder.write_log(self.history)  # a kill may have come between the checkpoint and the log
        with self._sigterm_sets_flag():
            try:
                while self.epoch < o.epochs:
                    self._train_epoch()
            finally:
                stop_workers(self.loader)
                stop_workers(self.val_loader)
                self._warn_of_replaced()  # an interrupted epoch's too
        if self.world.is_main:
            self.folder.write_plot(self.history)
        return {**self.history[-1], "images_per_second": self.seen / self.seconds if self.seconds else None}

    def _train_epoch(self) -> None:
        o, device, first_step = self.options, self.world.device, self.step
        self.batches.set_position(self.epoch, first_step)
        self.model.train()
        start, steps_here = time.perf_counter(), self.batches.steps - first_step
        label = f"epoch {self.epoch + 1}/{o.epochs}"
        for images, labels in self.progress(self.loader, total=steps_here, desc=label, leave=False):
            memory_format = torch.channels_last if o.channels_last else torch.preserve_format
            images = images.to(device, non_blocking=True, memory_format=memory_format)
            self._train_step(images, labels.to(device, non_blocking=True))
            self.step += 1
            self._checks()
        seconds, seen = time.perf_counter() - start, steps_here * self.batches.global_batch
        self.seconds, self.seen = self.seconds + seconds, self.seen + seen

        loss_sum = sum(part[0] for part in self.world.gather([self.loss_sum.item()]))
        record = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss_sum / (self.batches.steps * self.batches.global_batch),
            **self.evaluate(self.model),
            "images_per_second": seen / seconds,
        }
        accuracy, weights = record["val_accuracy"], self.model
        if self.ema is not None:
            record |= {f"ema_{key}": value for key, value in self.evaluate(self.ema.module).items()}
            if record["ema_val_accuracy"] > accuracy:
                accuracy, weights = record["ema_val_accuracy"], self.ema.module
        self._warn_of_replaced()
        self.history.append(record)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum.zero_()
        improved, self.best = accuracy > self.best, max(accuracy, self.best)
        if improved and self.world.is_main:
            save_run(self.inference_state(weights), self.folder.best)
        self.save()
        if self.world.is_main:
            self.folder.write_log(self.history)
        ema = f" (EMA {record['ema_val_accuracy']:.2%})" if self.ema is not None else ""
        self.report(
            f"{label}: loss {record['train_loss']:.4f}, validation loss {record['val_loss']:.4f}, "
            f"accuracy {record['val_accuracy']:.2%}{ema}, {record['images_per_second']:.0f} images/s"
        )

    def _warn_of_replaced(self) -> None:
        for data in (self.task.train_data, self.task.val_data):
            if hasattr(data, "warn_of_replaced"):  # files; what is in memory can be read
                data.warn_of_replaced()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        o = self.options
        seed = derive_seed("step", o.seed, self.epoch, self.step, self.world.rank)
        torch.manual_seed(seed)  # drop path draws from the global generator; so a resumed run draws the same
        images, targets = self.mixing(images, labels, seed)
        total = o.epochs * self.batches.steps
        at = self.epoch * self.batches.steps + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(at, total, self.warmup_steps, o.lr, min(o.min_lr, o.lr))

        with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = self.net(images)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        # DDP averages gradients over the ranks; with this factor they are those of the mean over the global batch, also
        # where the ranks' shares of it are not equal.
        self.scaler.scale(loss * (self.world.size / self.batches.global_batch)).backward()
        if o.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), o.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.loss_sum += loss.detach()

    def _checks(self) -> None:
        """After a step: is the loss finite, was SIGTERM received, is it time for a checkpoint?

        Looking at a loss on a GPU waits for it, and all ranks must stop at the same step: so every tenth step there.
        """
        every = self.options.checkpoint_every
        due = every > 0 and self.step % every == 0 and self.step < self.batches.steps
        alone = self.world.size == 1
        look = due or self.step == self.batches.steps or (alone and self.terminated)
        if not look and self.world.device.type != "cpu" and self.step % 10 != 0:
            return
        loss_sum, terminated = self.world.sum([self.loss_sum.item(), float(self.terminated)])
        if not math.isfinite(loss_sum):
            self._stop_for("the loss")
        if due or terminated:
            self.save()
        if terminated:
            raise Interrupted(f"stopped by SIGTERM; {self.folder.last} is saved, go on with --resume")

    def _stop_for(self, what: str) -> None:
        kept = f"{self.folder.last} is left as it was" if self.folder.last.exists() else "nothing was saved yet"
        raise FloatingPointError(
            f"{what} is not finite at epoch {self.epoch + 1}, step {self.step}; a lower --lr, --clip-grad or "
            f"--amp bf16 may help; {kept}"
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean loss and top-1 accuracy over the validation images, each counted once over all ranks."""
        model.eval()
        self.world.share(model.buffers())  # batch norms have statistics of their own on every rank
        device, totals = self.world.device, [0.0, 0.0, 0.0]
        for images, labels in self.val_loader:
            labels = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                logits = model(images.to(device, non_blocking=True)).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            totals = [a + b for a, b in zip(totals, (loss.item(), correct.item(), len(labels)), strict=True)]
        loss, correct, count = self.world.sum(totals)
        return {"val_loss": loss / count, "val_accuracy": correct / count, "val_images": int(count)}

    def inference_state(self, model: nn.Module) -> dict:
        """What classifying needs: weights, architecture, class names and preprocessing; plain types only."""
        task = self.task
        return {
            "format": FORMAT,
            "model": model.state_dict(),
            "architecture": task.architecture,
            "class_names": task.class_names,
            "preprocessing": task.preprocessing.to_dict(),
            "metrics": self.history[-1] if self.history else {},
        }

    def state(self) -> dict:
        """All that resuming needs. The schedule needs no state: it is a function of epoch and step."""
        return {
            **self.inference_state(self.model),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": None if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "loss_sums": [part[0] for part in self.world.gather([self.loss_sum.item()])],
            "rng": _rng_state(),
            "options": self._all_options(),
            "history": self.history,
            "best": self.best,
        }

    def save(self) -> None:
        """Write ``last.pth``; called on every rank.

        Raises:
            FloatingPointError: a weight is not finite (a finite loss can have a gradient that is not).
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            self._stop_for("a weight")
        state = self.state()
        if self.world.is_main:
            save_run(state, self.folder.last)

    def load(self, path) -> None:
        """Go on from what :meth:`save` wrote.

        Raises:
            FileNotFoundError, ValueError: the file cannot be read, is something else, or of a run with other options.
        """
        state = read_run_checkpoint(path)
        if state is None or "optimizer" not in state:
            raise ValueError(f"{path} is no checkpoint that training can go on from (last.pth is one)")
        theirs, ours = state["options"], self._all_options()
        names = [name for name in {**ours, **theirs} if name not in FREE_OPTIONS and ours.get(name) != theirs.get(name)]
        if names:
            differences = "; ".join(_difference(name, ours.get(name), theirs.get(name)) for name in names)
            raise ValueError(f"cannot resume {path} with options that change the result: {differences}")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model_ema"])
            self.ema.n_averaged.fill_(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.loss_sum.fill_(state["loss_sums"][self.world.rank])
        self.history = state["history"]
        _set_rng_state(state["rng"])
        self.report(f"resumed {path} at epoch {self.epoch + 1}, step {self.step}")

    def _all_options(self) -> dict:
        return {**asdict(self.options), **self.task.settings, "processes": self.world.size}

    @contextlib.contextmanager
    def _sigterm_sets_flag(self):
        if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
            yield
            return

        def handler(signum, frame):
            self.terminated = True

        before = signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _rng_state() -> dict:
    # Of no use to the loop, which seeds every step; for code of the user's that draws in between.
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
