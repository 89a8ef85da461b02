"""What goes wrong around a run, through the command line: downloads, payloads, disks, images that break, resuming."""

import json
import os
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path

import pytest
import torch

import convnext_fast
from convnext_fast import cli, data, image_folder
from convnext_fast.distributed import World
from convnext_fast.run_folder import read_run_checkpoint

from .image_folders import COLOURS, make_folder, noisy_image, truncate
from .test_cli import TRAIN, fails

pytest.importorskip("PIL")

SHORT = [*TRAIN, "--batch-size", "4", "--epochs", "2", "--lr", "1e-3", "--checkpoint-every", "1"]


class Payload:
    """What a hostile checkpoint holds: a call."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def folder(tmp_path):
    """4 images of each class to train on, 2 to validate on."""
    return make_folder(tmp_path / "data", train=4, val=2)


def train(*arguments) -> int:
    return cli.main(["train", *map(str, arguments)])


def interrupted_run(folder, out, monkeypatch, capsys, *options):
    """A run that is killed after its first step, with a checkpoint of it."""
    with monkeypatch.context() as patch:
        checks = convnext_fast.train.Trainer._checks

        def once(trainer):
            checks(trainer)
            raise KeyboardInterrupt

        patch.setattr(convnext_fast.train.Trainer, "_checks", once)
        assert train(folder, "--out", out, *SHORT, *options) == 130
    capsys.readouterr()
    assert read_run_checkpoint(out / "last.pth")["step"] == 1


def same_weights(*runs) -> bool:
    first, *others = (read_run_checkpoint(out / "last.pth")["model"] for out in runs)
    return all(torch.equal(other[key], first[key]) for other in others for key in first)


# Where a run starts from


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    def urlopen(request):
        raise urllib.error.URLError("name resolution failed")

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_a_failing_download_is_one_line(folder, tmp_path, capsys, no_network):
    error = fails(capsys, "train", folder, "--out", tmp_path / "out", *SHORT, "--pretrained")
    assert "cannot download https://" in error
    assert "name resolution failed" in error
    assert error.rstrip().endswith("get the file in another way and name it with --init-from")


def test_one_process_downloads(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(image_folder, "download_pretrained", asked.append)
    monkeypatch.setattr(World, "on_main", lambda self, function: function() if self.is_main else pytest.skip("never"))
    options = image_folder.FolderOptions(model="convnext_atto", image_size=32, pretrained=True)

    def create_model(name, pretrained=False, **kwargs):
        assert not pretrained or asked == [name], "the file must be there before any process reads it"
        return convnext_fast.create_model(name, num_classes=3)

    monkeypatch.setattr(image_folder, "create_model", create_model)
    world = World(torch.device("cpu"))
    image_folder.folder_trainer(folder, options, convnext_fast.train.Options(), tmp_path / "out", world)
    assert asked == ["convnext_atto"]


def test_a_grey_checkpoint_starts_a_network_for_rgb(folder, tmp_path):
    torch.manual_seed(0)
    grey = convnext_fast.convnext_atto(num_classes=3, in_chans=1)
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    options = ["--epochs", "1", "--lr", "1e-9", "--min-lr", "0", "--init-from", tmp_path / "grey.pth"]
    assert train(folder, "--out", tmp_path / "out", *TRAIN, *options) == 0
    weights = read_run_checkpoint(tmp_path / "out/last.pth")["model"]
    model = convnext_fast.convnext_atto(num_classes=3)
    model.load_state_dict(weights)
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(images.expand(-1, 3, -1, -1)), grey.eval()(images), rtol=1e-4, atol=1e-5
        )


def test_resuming_needs_no_source_and_knows_it_by_any_path(folder, tmp_path, capsys, monkeypatch):
    start, out = tmp_path / "start.pth", tmp_path / "out"
    torch.save(convnext_fast.convnext_atto(num_classes=3).state_dict(), start)
    monkeypatch.chdir(tmp_path)
    interrupted_run(folder, out, monkeypatch, capsys, "--init-from", start)
    start.unlink()
    assert train(folder, "--out", out, *SHORT, "--init-from", "./data/../start.pth", "--resume") == 0
    error = fails(capsys, "train", folder, "--out", out, *SHORT, "--init-from", "other.pth", "--resume")
    assert f"init_from is '{tmp_path / 'other.pth'}', was '{start}'" in error


def test_resuming_downloads_nothing(folder, tmp_path, capsys, monkeypatch, no_network):
    out = tmp_path / "out"
    monkeypatch.setattr(image_folder, "download_pretrained", lambda name: None)

    def create_model(name, pretrained=False, **kwargs):
        return convnext_fast.create_model(name, **{"num_classes": 3, **kwargs})

    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "create_model", create_model)
        interrupted_run(folder, out, monkeypatch, capsys, "--pretrained")
    assert train(folder, "--out", out, *SHORT, "--pretrained", "--resume") == 0


# Checkpoints


@pytest.mark.parametrize("command", ["classify", "resume"])
def test_a_payload_is_named_and_does_not_run(folder, tmp_path, capsys, command):
    trap, file = tmp_path / "ran", tmp_path / "hostile.pth"
    torch.save({"format": "convnext_fast.train/1", "model": {}, "extra": Payload(trap)}, file)
    if command == "classify":
        error = fails(capsys, "classify", folder / "val/red/0.png", "--checkpoint", file)
    else:
        error = fails(capsys, "train", folder, "--out", tmp_path / "out", *SHORT, "--resume", file)
    assert "hostile.pth holds Python objects other than tensors" in error
    assert "posix.system" in error
    assert "truncated" not in error
    assert not trap.exists()


def test_a_disk_that_fills_up(folder, tmp_path):
    code = (
        "import resource, sys; from convnext_fast import cli;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY)); sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["train", folder, "--out", tmp_path / "out", *SHORT]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"convnext-fast: error: cannot write {tmp_path / 'out/last.pth'}: File too large"
    )
    assert "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images.json", "samples.json"}


# Images


def test_classify_goes_on_after_a_broken_image(folder, tmp_path, capsys):
    assert train(folder, "--out", tmp_path / "out", *SHORT) == 0
    files = [tmp_path / name for name in ("good.png", "bad.png", "good2.png", "none.png")]
    for file in files[:3]:
        noisy_image(COLOURS["red"], 0).save(file)
    truncate(files[1])
    capsys.readouterr()
    status = cli.main(["classify", *map(str, files), "--checkpoint", str(tmp_path / "out/best.pth"), "--topk", "1"])
    output = capsys.readouterr()
    assert status == 2
    assert output.out.splitlines()[::2] == [str(files[0]), str(files[2])]
    errors = output.err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"convnext-fast: error: {files[1]} is not an image that can be read: ")
    assert errors[1] == f"convnext-fast: error: image {files[3]} does not exist or is not a file"


def test_names_of_any_encoding_are_printed(folder, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    try:
        for part in ("train", "val"):
            (folder / part / "red").rename(folder / part / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    assert train(folder, "--out", tmp_path / "out", *SHORT) == 0
    arguments = ["classify", folder / "val" / name / "0.png", "--checkpoint", tmp_path / "out/best.pth"]
    command = [sys.executable, "-m", "convnext_fast", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(rb"caf\udce9") == 2


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_breaks_during_a_run_does_not_end_it(folder, tmp_path, caplog, monkeypatch, workers):
    listed = image_folder.list_folder

    def list_then_break(*arguments):
        listing = listed(*arguments)
        truncate(folder / "train/red/1.png")
        truncate(folder / "val/blue/0.png")
        return listing

    monkeypatch.setattr(image_folder, "list_folder", list_then_break)
    assert train(folder, "--out", tmp_path / "out", *SHORT, "--workers", workers) == 0
    cannot = "cannot be read any more, and others of their class were taken in their place"
    for warning in (f"1 of 12 images {cannot}: train/red/1.png", f"1 of 6 images {cannot}: val/blue/0.png"):
        assert warning in caplog.messages


def test_a_resumed_run_keeps_its_samples(folder, tmp_path, capsys, caplog, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(folder, "--out", whole, *SHORT) == 0
    interrupted_run(folder, killed, monkeypatch, capsys)
    assert train(folder, "--out", killed, *SHORT, "--resume") == 0
    assert same_weights(whole, killed), "unchanged images: the same bits"

    parts = [tmp_path / "a", tmp_path / "b"]
    for out in parts:
        interrupted_run(folder, out, monkeypatch, capsys)
    (tmp_path / "c").mkdir()
    removed = (folder / "train/red/2.png").read_bytes()
    (folder / "train/red/2.png").unlink()
    error = fails(capsys, "train", folder, "--out", parts[0], *SHORT, "--resume")
    assert "not those that the run began with; 1 was removed: train/red/2.png" in error
    (folder / "train/red/2.png").write_bytes(removed)
    truncate(folder / "train/red/2.png")
    for out in parts:
        caplog.clear()
        assert train(folder, "--out", out, *SHORT, "--resume") == 0
        assert any("1 of 18 images of the run cannot be read any more" in message for message in caplog.messages)
    assert same_weights(*parts), "what is taken in its place is no accident"
    # Into another folder, which has then all that is needed to go on.
    arguments = [folder, "--out", tmp_path / "c", *SHORT, "--resume"]
    assert train(*arguments, parts[0] / "last.pth") == 0
    assert json.loads((tmp_path / "c/samples.json").read_text())["train"]


# Messages


def test_warnings_are_lines_of_this_command(monkeypatch, capsys, caplog):
    def warn(arguments):
        warnings.warn("the head is new", UserWarning, stacklevel=1)

    monkeypatch.setattr(cli, "_info", warn)
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["info"]) == 0
        assert caplog.messages == ["the head is new"]
    assert warnings.showwarning is shown


def test_a_warning_of_a_command(tmp_path):
    torch.save({**convnext_fast.convnext_atto().state_dict(), "text.x": torch.ones(2)}, tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save({f"backbone.{key}" if key != "text.x" else key: value for key, value in state.items()},
               tmp_path / "b.pth")  # fmt: skip
    command = [sys.executable, "-m", "convnext_fast", "convert", tmp_path / "b.pth", tmp_path / "c.pth", "--to", "timm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "convnext-fast: warning: ignored what lies beside the network: text.x\n"


def test_the_decoder_running_out_of_memory_is_no_broken_image(folder, monkeypatch):
    image_module, image_ops = data.pillow()

    class Failing:
        @staticmethod
        def open(path):
            raise MemoryError

    monkeypatch.setattr(data, "pillow", lambda: (Failing, image_ops))
    with pytest.raises(MemoryError):
        data.open_image(folder / "val/red/0.png")
    assert image_module.open(folder / "val/red/0.png").size == (40, 36)
