"""The training loop: schedule, EMA, resuming to the same bits, several processes."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from convnext_fast import ConvNeXt
from convnext_fast.data import Preprocessing, TensorImages
from convnext_fast.distributed import World
from convnext_fast.run_folder import RunFolder, read_run_checkpoint
from convnext_fast.train import Options, Task, Trainer, learning_rate, parameter_groups

from .image_folders import make_folder

KWARGS = {"in_chans": 3, "num_classes": 3, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 1}


def make_trainer(out, poison=(), model=None, **options):
    """A small network, or ``model``, on 24 random images of 8×8 pixels; the images ``poison`` are NaN."""
    torch.manual_seed(5)
    images, labels = torch.randn(30, 3, 8, 8), torch.arange(30) % 3
    images[list(poison)] = math.nan
    task = Task(
        model=model or ConvNeXt(**KWARGS, drop_path_rate=0.3),
        architecture={"name": None, "kwargs": KWARGS},
        class_names=["a", "b", "c"],
        preprocessing=Preprocessing(8, 3),
        train_data=TensorImages(images[:24], labels[:24]),
        val_data=TensorImages(images[24:], labels[24:]),
        settings={"data": "random"},
    )
    folder = RunFolder(out)
    folder.create()
    defaults = {"epochs": 3, "batch_size": 6, "lr": 1e-2, "warmup_epochs": 1.0}
    return Trainer(task, Options(**{**defaults, **options}), folder, World(torch.device("cpu")))


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# The pieces


def test_schedule_end_points():
    total, warmup, peak, final = 100, 10, 0.5, 0.01
    rates = [learning_rate(step, total, warmup, peak, final) for step in range(total)]
    assert rates[0] == peak / warmup
    assert rates[9] == rates[10] == peak
    assert rates[-1] == pytest.approx(final, abs=1e-12)
    assert rates[10 + 89 // 2] == pytest.approx((peak + final) / 2, rel=0.02)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 0, peak, final) == peak


def test_no_weight_decay_on_biases_norms_scales_and_grn():
    model = ConvNeXt(**KWARGS, use_grn=True)
    decay, no_decay = parameter_groups(model, 0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    assert all(parameter.ndim in (2, 4) and names[parameter].endswith(".weight") for parameter in decay["params"])
    without = {names[parameter] for parameter in no_decay["params"]}
    assert {"stages.0.0.gamma", "stages.0.0.grn.gamma", "stages.0.0.grn.beta", "norm.weight", "head.bias"} <= without


def test_ema_follows_its_formula(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.9)
    expected = None
    for step in range(4):
        trainer.step = step
        trainer._train_step(torch.randn(6, 3, 8, 8), torch.arange(6) % 3)
        now = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        if expected is None:  # the first update takes over the weights
            expected = now
        expected = {name: 0.9 * expected[name] + 0.1 * now[name] for name in now}
        for name, value in trainer.ema.module.named_parameters():
            torch.testing.assert_close(value, expected[name])
    assert not torch.equal(trainer.ema.module.head.weight, trainer.model.head.weight)


BAD_OPTIONS = [
    ({"epochs": 0}, "epochs is 0; 1 or more"),
    ({"lr": -1.0}, "lr is -1.0; a positive number"),
    ({"lr": math.nan}, "lr is nan; a positive number"),
    ({"amp": "fp8"}, "amp is 'fp8'; allowed: none, bf16, fp16"),
    ({"ema_decay": 1.0}, r"ema_decay is 1.0; a number in \[0, 1\)"),
    ({"workers": -1}, "workers is -1; 0 or more"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_training_learns_and_records(tmp_path, amp):
    options = {"amp": amp, "epochs": 20, "label_smoothing": 0.0, "clip_grad": 1.0, "channels_last": True}
    trainer = make_trainer(tmp_path, **options, grad_checkpointing=True)
    summary = trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 21))
    assert lines[-1]["train_loss"] == summary["train_loss"] < 0.6 * lines[0]["train_loss"]
    assert summary["val_images"] == 6
    assert summary["images_per_second"] > 0
    best = read_run_checkpoint(tmp_path / "best.pth")
    assert best["metrics"]["val_accuracy"] == max(line["val_accuracy"] for line in lines) == trainer.best
    assert not list(tmp_path.glob(".*"))


# Resuming


@pytest.mark.parametrize("stop_after", [2, 4, 7])  # steps of 4 per epoch: within, at the end of, and within the second
def test_resumed_training_ends_with_the_same_bits(tmp_path, stop_after):
    options = {"ema_decay": 0.8, "mixup": 0.8, "cutmix": 1.0, "checkpoint_every": 1, "clip_grad": 1.0}
    whole = make_trainer(tmp_path / "whole", **options)
    expected = whole.fit()

    class Killed(Exception):
        pass

    first, steps = make_trainer(tmp_path / "parts", **options), 0
    checks = first._checks

    def checks_then_kill():
        nonlocal steps
        steps += 1
        checks()
        if steps == stop_after:
            raise Killed

    first._checks = checks_then_kill
    with pytest.raises(Killed):
        first.fit()
    torch.manual_seed(99)  # what another process would have
    second = make_trainer(tmp_path / "parts", **options)
    second.load(tmp_path / "parts/last.pth")
    # At the end of an epoch nothing is saved before its validation: the kill there costs one step, nothing else.
    assert (second.epoch, second.step) == ((0, 3) if stop_after == 4 else divmod(stop_after, 4))
    result = second.fit()
    assert result["train_loss"] == expected["train_loss"]
    assert result["ema_val_loss"] == expected["ema_val_loss"]
    assert same_weights(second.model.state_dict(), whole.model.state_dict())
    assert same_weights(second.ema.module.state_dict(), whole.ema.module.state_dict())
    histories = [[{**record, "images_per_second": 0} for record in run.history] for run in (whole, second)]
    assert histories[0] == histories[1]
    assert len((tmp_path / "parts/log.jsonl").read_text().splitlines()) == 3


def test_resuming_with_other_options_names_them(tmp_path):
    make_trainer(tmp_path, epochs=1).fit()
    other = make_trainer(tmp_path, epochs=2, lr=1e-3, workers=1, checkpoint_every=5)
    with pytest.raises(ValueError, match=r"change the result: epochs is 2, was 1; lr is 0.001, was 0.01$"):
        other.load(tmp_path / "last.pth")
    with pytest.raises(ValueError, match=r"best.pth is no checkpoint that training can go on from"):
        other.load(tmp_path / "best.pth")


def test_a_finished_run_resumes_to_its_result(tmp_path):
    expected = make_trainer(tmp_path, epochs=1).fit()
    (tmp_path / "log.jsonl").unlink()  # as if killed between the checkpoint and the log
    again = make_trainer(tmp_path, epochs=1)
    again.load(tmp_path / "last.pth")
    result = again.fit()
    assert result["train_loss"] == expected["train_loss"]
    assert result["images_per_second"] is None
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(tmp_path):
    make_trainer(tmp_path, epochs=2).fit()
    before = (tmp_path / "last.pth").read_bytes()
    trainer = make_trainer(tmp_path, poison=[3], epochs=2, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=r"the loss is not finite at epoch 1, step \d; .* is left as it was"):
        trainer.fit()
    # Checkpoints of the steps before the bad image are good and may be there; none may hold a NaN.
    state = read_run_checkpoint(tmp_path / "last.pth")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert before != b""


class _Broken(TensorImages):
    def __getitem__(self, item):
        raise ValueError("this image is broken")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_leaves_no_process_behind(tmp_path, workers):
    trainer = make_trainer(tmp_path, workers=workers)
    trainer.loader.dataset.__class__ = _Broken
    with pytest.raises(ValueError, match="this image is broken") as caught:
        trainer.fit()
    assert not multiprocessing.active_children(), f"workers outlive {caught.value!r}"


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    before = (tmp_path / "last.pth").read_bytes()
    with torch.no_grad():
        trainer.model.head.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match="a weight is not finite"):
        trainer.save()
    assert (tmp_path / "last.pth").read_bytes() == before


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.save()
    before = (tmp_path / "last.pth").read_bytes()

    def write_half(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    names = sorted(tmp_path.iterdir())
    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert (tmp_path / "last.pth").read_bytes() == before
    assert sorted(tmp_path.iterdir()) == names, "half a file is left"


def test_grad_clipping_bounds_the_update(tmp_path):
    norms = {}
    for clip in (0.0, 1e-3):
        trainer = make_trainer(tmp_path / str(clip), clip_grad=clip)
        seen = []
        step = trainer.optimizer.step

        def spy(*args, seen=seen, trainer=trainer, step=step, **kwargs):
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            seen.append(float(nn.utils.get_total_norm(grads)))
            return step(*args, **kwargs)

        trainer.optimizer.step = spy
        trainer._train_step(torch.randn(6, 3, 8, 8), torch.arange(6) % 3)
        norms[clip] = seen[0]
    assert norms[0.0] > 1e-2
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)


# As separate processes

TRAIN = ["--model", "convnext_atto", "--image-size", "32", "--batch-size", "4", "--lr", "1e-3", "--warmup-epochs", "1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(data, out, *more):
    return [sys.executable, "-m", "convnext_fast", "train", str(data), "--out", str(out), *TRAIN, *more]


def run(arguments, **kwargs):
    return subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **kwargs)


def start_and_wait_for_checkpoint(arguments, last):
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not last.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint after 60 s"
        time.sleep(0.005)
    return process


def test_killed_run_resumes_to_the_same_bits(tmp_path):
    pytest.importorskip("PIL")
    data = make_folder(tmp_path / "data", train=24)
    options = ["--epochs", "2", "--mixup", "0.8", "--cutmix", "1", "--ema-decay", "0.9", "--checkpoint-every", "3"]
    whole = run(command(data, tmp_path / "whole", *options, "--workers", "0"))
    assert whole.returncode == 0, whole.stderr

    arguments = command(data, tmp_path / "killed", *options, "--workers", "1")
    process = start_and_wait_for_checkpoint(arguments, tmp_path / "killed/last.pth")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = read_run_checkpoint(tmp_path / "killed/last.pth")
    assert state["epoch"] == 0
    assert 0 < state["step"] < 18, "the kill should have come within the first epoch of 18 steps"
    resumed = run([*arguments, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert f"at epoch 1, step {state['step']}" in resumed.stdout

    expected, result = (read_run_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "killed"))
    assert (result["epoch"], result["step"]) == (2, 0)
    assert result["history"][-1]["train_loss"] == expected["history"][-1]["train_loss"]
    for part in ("model", "model_ema"):
        assert same_weights(result[part], expected[part])
    assert result["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()


def test_sigterm_saves_and_leaves(tmp_path):
    pytest.importorskip("PIL")
    data = make_folder(tmp_path / "data", train=24)
    arguments = command(data, tmp_path / "out", "--epochs", "50", "--checkpoint-every", "1", "--workers", "0")
    process = start_and_wait_for_checkpoint(arguments, tmp_path / "out/last.pth")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM" in errors
    assert "Traceback" not in errors
    state = read_run_checkpoint(tmp_path / "out/last.pth")
    assert state["epoch"] < 50


RANK_SCRIPT = """
import sys, torch
from convnext_fast.distributed import join_world
from convnext_fast.image_folder import FolderOptions, folder_trainer
from convnext_fast.train import Options

data, out, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
torch.optim.AdamW = torch.optim.SGD  # Adam would hide a wrong factor on all gradients
world = join_world("cpu")
options = Options(epochs=3, batch_size=batch_size, lr=0.2, warmup_epochs=1.0)
folder_options = FolderOptions(model="convnext_atto", image_size=32, drop_path=0.0, augment=False)
trainer = folder_trainer(data, folder_options, options, out, world)
summary = trainer.fit()
torch.save({"summary": summary, "model": trainer.model.state_dict()}, f"{out}/rank{world.rank}.pth")
world.leave()
"""


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    pytest.importorskip("PIL")
    # 21 images to train on, 9 to validate on: neither can be shared equally.
    data = make_folder(tmp_path / "data", train=7, val=3)
    script = tmp_path / "script.py"
    script.write_text(RANK_SCRIPT)
    alone = run([sys.executable, str(script), str(data), str(tmp_path / "one"), "22"])
    assert alone.returncode == 0, alone.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    both = run([*torchrun, str(data), str(tmp_path / "two"), "11"])
    assert both.returncode == 0, both.stderr

    expected = torch.load(tmp_path / "one/rank0.pth", weights_only=True)
    ranks = [torch.load(tmp_path / f"two/rank{i}.pth", weights_only=True) for i in range(2)]
    assert same_weights(ranks[0]["model"], ranks[1]["model"])
    for key in ("train_loss", "val_loss", "val_accuracy", "val_images"):
        assert ranks[0]["summary"][key] == ranks[1]["summary"][key]
        assert ranks[0]["summary"][key] == pytest.approx(expected["summary"][key], abs=1e-5)
    assert expected["summary"]["val_images"] == 9
    for name, value in expected["model"].items():
        torch.testing.assert_close(ranks[0]["model"][name], value, rtol=1e-4, atol=1e-6)
    assert len((tmp_path / "two/log.jsonl").read_text().splitlines()) == 3


def test_torchrun_reports_an_error_once(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run([*torchrun, "-m", *command(tmp_path / "nothing", tmp_path / "out")[2:], "--device", "cpu"])
    assert result.returncode != 0
    assert result.stderr.count("convnext-fast: error:") == 1
    assert f"DATA_DIR {tmp_path / 'nothing'} does not exist" in result.stderr


@pytest.mark.parametrize("options, message", [
    (["--image-size", "16"], "image_size is 16; 32 or more is allowed"),
    (["--init-from", "none.pth"], "none.pth does not exist"),
], ids=["image size", "checkpoint"])  # fmt: skip
def test_torchrun_reports_what_every_process_meets_once(tmp_path, options, message):
    pytest.importorskip("PIL")
    data = make_folder(tmp_path / "data", train=2, val=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run([*torchrun, "-m", *command(data, tmp_path / "out", *options)[2:], "--device", "cpu"])
    assert result.returncode != 0
    assert result.stderr.count("convnext-fast: error:") == 1
    assert message in result.stderr
