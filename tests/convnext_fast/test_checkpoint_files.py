"""Reading and saving checkpoint files: damaged, hostile, half-written."""

import argparse
import collections
import errno
import os
import pickle
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from convnext_fast.checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from convnext_fast.run_folder import RunFolder, save_run

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


def test_what_training_scripts_leave_beside_the_weights(tmp_path):
    numpy = pytest.importorskip("numpy")
    state = v1()
    best = collections.defaultdict(list, {"top1": [numpy.float64(81.3), numpy.float32(2), numpy.int64(7)]})
    arrays = {"a": numpy.arange(6.0).reshape(2, 3), "b": numpy.array([True]), "s": numpy.str_("x")}
    beside = {"best": best, "seen": collections.Counter("abc"), "arrays": arrays, "epoch": numpy.int64(3)}
    torch.save({"state_dict": collections.defaultdict(int, state), **beside}, tmp_path / "c.pth")
    assert_identical(read_checkpoint(tmp_path / "c.pth"), state)
    torch.save({"model": state, "best": numpy.float64(81.3)}, tmp_path / "legacy.pth",
               _use_new_zipfile_serialization=False)  # fmt: skip
    content = (tmp_path / "legacy.pth").read_bytes()
    modules = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"  # as NumPy 2 and NumPy 1 call it
    assert any(module in content for module in modules)
    for module in modules:
        (tmp_path / "other.pth").write_bytes(content.replace(modules[0], module).replace(modules[1], module))
        assert_identical(read_checkpoint(tmp_path / "other.pth"), state)


def test_other_objects_are_refused_in_our_own_words(tmp_path):
    torch.save({"model": v1(), "path": Path("x")}, tmp_path / "path.pth")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "path.pth")
    message = str(caught.value)
    assert re.search(r"path\.pth holds Python objects .*: pathlib\S*Path\. If you trust whoever made the file", message)
    assert message.endswith("load it yourself and save its state_dict alone")
    assert "safe_globals" not in message
    assert "weights_only" not in message
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=5))
    warnings.filterwarnings("ignore", "Detected pickle protocol")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "bare.pkl")
    assert "weights_only" not in str(caught.value)


def test_a_flipped_bit_is_damage(tmp_path):
    file, net = tmp_path / "net.pth", v1()
    save_checkpoint(net, file)
    content = bytearray(file.read_bytes())
    weight = net["stages.2.1.pwconv1.weight"].numpy().tobytes()
    content[content.index(weight) + 5] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net\.pth is damaged.*CRC"):
        read_checkpoint(file)


@pytest.mark.parametrize("written", [True, False])
def test_files_without_checksums_are_read(tmp_path, written):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(written)
    try:
        torch.save(v1(), tmp_path / "net.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_identical(read_checkpoint(tmp_path / "net.pth"), v1())


def test_what_is_no_path_and_what_is_a_folder(tmp_path):
    for nothing in (None, [1], 3):
        with pytest.raises(
            TypeError, match=rf"^checkpoint is a {type(nothing).__name__}; the path of a file or a dict"
        ):
            load_checkpoint(ours(), nothing)
        with pytest.raises(TypeError, match=rf"the checkpoint is a {type(nothing).__name__}; the path of a file"):
            read_checkpoint(nothing)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(IsADirectoryError, match=r"checkpoint .*folder\.pth is a folder; a file is allowed"):
        load_checkpoint(ours(), tmp_path / "folder.pth")
    for suffix in (".pth", ".pt"):
        (tmp_path / f"out{suffix}").mkdir()
        with pytest.raises(IsADirectoryError, match=rf"^cannot write .*/out{suffix}: it is a folder; the name of a"):
            save_checkpoint(v1(), tmp_path / f"out{suffix}")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_disk_that_fills_up(tmp_path, suffix):
    """A limit on the size of files stands in for the disk: the system's own error, in the middle of the file."""
    resource = pytest.importorskip("resource")
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    file = tmp_path / f"net{suffix}"
    save_checkpoint({"a": torch.ones(2)}, file)
    before, (soft, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=rf"^cannot write .*net{suffix}: .*File too large"):
            save_checkpoint({"a": torch.ones(3_000_000)}, file)
        with pytest.raises(OSError, match=r"^cannot write .*last\.pth: File too large") as caught:
            save_run({"a": torch.ones(3_000_000)}, tmp_path / "last.pth")
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_kill_left_is_removed_by_the_next_run(tmp_path):
    remains, other = tmp_path / f".last.pth.{'0f' * 16}.tmp", tmp_path / ".last.pth.mine.tmp"
    remains.touch()
    other.touch()
    RunFolder(tmp_path).create()
    assert list(tmp_path.iterdir()) == [other]


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
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
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

    def full_disk(tensors, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"^cannot write .*net\.pth: no space left on device$"):
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
