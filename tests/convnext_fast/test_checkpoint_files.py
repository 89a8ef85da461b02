"""Reading and saving checkpoint files: damaged, hostile, half-written."""

import argparse
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from convnext_fast.checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

from .networks import (
    assert_identical,
    ours,
    v1,
)


class Payload:
    """What a hostile checkpoint holds: a call."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pkl", ".safetensors"])
def test_reads_what_was_saved(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    state, file = v1(), tmp_path / f"net{suffix}"
    save = torch.save if suffix in (".bin", ".pkl") else save_checkpoint
    save(state, file)
    assert_identical({k: read_checkpoint(file)[k] for k in state}, state)
    assert load_checkpoint(ours(), file).fits
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_original_training_checkpoint(tmp_path):
    """The original's hold its arguments as a Namespace, and the optimizer's state."""
    state = v1()
    args = argparse.Namespace(model="convnext_tiny", lr=4e-3, betas=(0.9, 0.999), opt=None)
    torch.save({"model": state, "args": args, "epoch": 299, "optimizer": {"state": {}}}, tmp_path / "c.pth")
    assert_identical(read_checkpoint(tmp_path / "c.pth"), state)
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "left open for everybody"


@pytest.mark.parametrize("legacy", [False, True])
def test_python_objects_are_refused_and_do_not_run(tmp_path, legacy):
    trap, file = tmp_path / "ran", tmp_path / "hostile.pth"
    torch.save({"model": v1(), "args": Payload(trap)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"hostile\.pth holds Python objects other than tensors.*posix\.system"):
        load_checkpoint(ours(), file)
    assert not trap.exists()


def test_plain_pickle_is_refused_and_does_not_run(tmp_path):
    trap, file = tmp_path / "ran", tmp_path / "plain.pkl"
    file.write_bytes(pickle.dumps({"model": Payload(trap)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"plain\.pkl"):
        read_checkpoint(file)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "a web page", "header only"])
def test_damaged_files(tmp_path, suffix, damage):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    file = tmp_path / f"damaged{suffix}"
    save_checkpoint(v1(), file)
    whole = file.read_bytes()
    file.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "a web page": b"<!DOCTYPE html><html>404</html>"}.get(
            damage, whole[:6]
        )
    )
    with pytest.raises(CheckpointError, match=r"damaged\.(pth|safetensors) is damaged"):
        load_checkpoint(ours(), file)


def test_other_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: there is no such file"):
        load_checkpoint(ours(), tmp_path / "nowhere.pth")
    torch.save({"epoch": 3, "names": ["a"]}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth holds no tensors, only epoch, names"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth is a list, not a dictionary"):
        read_checkpoint(tmp_path / "list.pth")
    (tmp_path / "net.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"net\.onnx: its suffix may be \.safetensors \.pth"):
        read_checkpoint(tmp_path / "net.onnx")
    loop: dict = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "loop.pth")
    with pytest.raises(CheckpointError, match=r"loop\.pth holds no tensors"):
        read_checkpoint(tmp_path / "loop.pth")


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(ImportError, match=r"net\.safetensors.*pip install safetensors"):
        read_checkpoint(file)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_checkpoint(v1(), file)
    assert file.read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_saves_views_and_shared_tensors(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    base = torch.rand(1000, 8)
    state = {
        "view": base[:2],
        "same": base[:2],
        "tied": base,
        "to it": base,
        "strided": base.t(),
        "cl": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    save_checkpoint(state, tmp_path / f"views{suffix}")
    again = read_checkpoint(tmp_path / f"views{suffix}")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert again["view"].untyped_storage().nbytes() == 64, "the whole of base was saved with it"


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "net.pth"
    save_checkpoint(v1(), file)
    before = file.read_bytes()

    def full_disk(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint({"a": torch.ones(2)}, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    for state, path, message in (
        ({"a": torch.ones(1)}, tmp_path / "net.onnx", r"suffix may be \.safetensors, \.pth or \.pt"),
        ({"a": torch.ones(1), "epoch": 3}, file, "state_dict holds epoch; "),
        ({}, file, "state_dict holds nothing; "),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(state, path)
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        save_checkpoint({"a": torch.ones(1)}, tmp_path / "missing" / "net.pth")
