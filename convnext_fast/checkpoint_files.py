"""Checkpoint files: reading them without running what is in them, and writing them so that none is ever half there."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .atomic_files import write_atomically
from .dialects import CheckpointError

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar")
# Entries of a training checkpoint that hold its weights, and those that hold their moving average.
_WEIGHTS = ("model", "state_dict", "module")
_AVERAGED = ("model_ema", "state_dict_ema")


def read_checkpoint(path: str | os.PathLike, *, use_ema: bool = False) -> dict[str, Tensor]:
    """The flat state_dict in a file, on the CPU, under the names that it has there.

    ``.safetensors`` needs the package of that name; ``.pth .pt .bin .pkl .ckpt .tar`` are read by
    ``torch.load(weights_only=True)``, so no code in a file ever runs. Of Python's classes ``argparse.Namespace`` is let
    in, since the original repository keeps its arguments in one, and ``defaultdict``; NumPy's numbers and arrays beside
    the weights are passed over.

    Args:
        path: the file.
        use_ema: of a training checkpoint that holds both, take the averaged weights (``model_ema``,
            ``state_dict_ema``) instead of ``model`` or ``state_dict``. A file with only averaged ones gives those.

    Raises:
        TypeError: ``path`` is no path.
        FileNotFoundError, IsADirectoryError: there is no such file, or it is a folder.
        CheckpointError: a ValueError; it is damaged, holds Python objects, or holds no tensors.
        ImportError: it is a .safetensors file, and that package is not installed.
    """
    return unwrap(read_content(path), use_ema, f"checkpoint {path}")


def read_content(path: str | os.PathLike) -> Any:
    """All that is in a checkpoint file, see :func:`read_checkpoint`, which has the errors."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"the checkpoint is a {type(path).__name__}; the path of a file is allowed")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"checkpoint {path} is a folder; a file is allowed")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist, or is not a file")
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise CheckpointError(f"checkpoint {path}: its suffix may be .safetensors {' '.join(_TORCH_SUFFIXES)}")
    with path.open("rb"):
        pass  # an error here is about permissions or the disk, and says so; any later one is about what is in the file
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


class _PassedOver:
    """Stands in for an object of NumPy's, of which nothing is taken: so none of NumPy's own code is run by a file."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _dictionary(factory: Any = None) -> dict:
    return {}  # for a defaultdict: a look-up in it should not add entries


# What training scripts leave beside the weights. A pair maps the name in the file to what is called in its place.
_LET_IN = [
    argparse.Namespace,
    (_dictionary, "collections.defaultdict"),
    *((kind, f"builtins.{kind.__name__}") for kind in (bool, dict, float, int, list, set, str, tuple)),
    *((_PassedOver, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *(
        (_PassedOver, f"numpy.{core}.multiarray.{name}")  # NumPy 2 and 1
        for core in ("_core", "core")
        for name in ("scalar", "_reconstruct")
    ),
]


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_LET_IN):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sums(path)
        return content
    except Exception as error:  # damaged bytes surface as errors of any kind, OSError included
        # torch's own text is advice to trust the file; what it found comes after this mark.
        found = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        first = found.split("\n")[0][:120] or type(error).__name__
        # The last two are how it refuses what an object brings: calls, and state.
        refused = re.search(r"GLOBAL|Unsupported class|Trying to (call|instantiate)|Can only (build|create)", found)
        if isinstance(error, pickle.UnpicklingError) and refused:
            name = re.search(r"GLOBAL (\S+)", found)
            raise CheckpointError(
                f"checkpoint {path} holds Python objects other than tensors, and these are never loaded, since they "
                f"can run code: {name[1] if name else first}. If you trust whoever made the file, load it yourself and "
                "save its state_dict alone"
            ) from error
        raise CheckpointError(f"checkpoint {path} is damaged, incomplete, or no checkpoint: {first}") from error


def _check_sums(path: Path) -> None:
    """Compare the contents with the checksums that torch.save writes and torch.load does not look at."""
    if not zipfile.is_zipfile(path):  # the format before torch 1.6, which has none
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.CRC:  # torch.serialization.set_crc32_options(False) leaves them out
                with archive.open(entry) as content:
                    while content.read(1 << 20):
                        pass


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    load_file = _safetensors(path).load_file
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # safetensors has an exception class of its own, and its header parser others
        raise CheckpointError(f"checkpoint {path} is damaged or incomplete: {error}") from error


def _safetensors(path: Path) -> ModuleType:
    try:
        import safetensors.torch  # optional: most checkpoints are .pth
    except ImportError as error:
        raise ImportError(
            f"{path}: .safetensors files need the package safetensors (pip install safetensors)"
        ) from error
    return safetensors.torch


def unwrap(checkpoint: Mapping[str, Any], use_ema: bool = False, what: str = "state_dict") -> dict[str, Tensor]:
    """The flat state_dict in what a file holds, which may nest it in entries with the usual names.

    Raises:
        CheckpointError: there are no tensors, or ``use_ema`` and no averaged weights.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{what} is a {type(checkpoint).__name__}, not a dictionary of tensors")
    if use_ema:
        key = next((key for key in _AVERAGED if _holds_tensors(checkpoint.get(key))), None)
        if key is None:
            raise CheckpointError(f"use_ema=True, and {what} has no {' or '.join(_AVERAGED)}, only {some(checkpoint)}")
        checkpoint = checkpoint[key]
    while key := next((key for key in (*_WEIGHTS, *_AVERAGED) if _holds_tensors(checkpoint.get(key))), None):
        checkpoint = checkpoint[key]
    tensors = {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{what} holds no tensors, only {some(checkpoint) or 'nothing'}")
    return tensors


def _holds_tensors(value: Any, levels: int = 4) -> bool:
    if not isinstance(value, Mapping) or levels == 0:  # a dictionary in a file may contain itself
        return False
    return any(isinstance(item, Tensor) or _holds_tensors(item, levels - 1) for item in value.values())


def save_checkpoint(state_dict: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write a flat state_dict to ``path``, as .safetensors or, by ``torch.save``, as .pth or .pt.

    The file has its name only when it is complete. Tensors are saved from the CPU, and without what else shares their
    storage.

    Raises:
        CheckpointError: a ValueError; the suffix is another one, or ``state_dict`` holds other things than tensors.
        OSError: the folder does not exist, ``path`` is a folder, or the disk is full.
        ImportError: the suffix is .safetensors, and that package is not installed.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise CheckpointError(f"path is {path}; its suffix may be .safetensors, .pth or .pt")
    others = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if others or not state_dict:
        raise CheckpointError(f"state_dict holds {some(others) or 'nothing'}; a name and a tensor per entry is allowed")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path is {path}; the folder {path.parent} does not exist")
    seen: set[int] = set()
    tensors = {name: _with_own_storage(tensor, seen) for name, tensor in state_dict.items()}
    write_atomically(
        path, _safetensors_writer(path, tensors) if path.suffix == ".safetensors" else torch_writer(tensors)
    )


def torch_writer(content: Any) -> Callable[[Path], None]:
    """``torch.save(content, ...)`` for :func:`convnext_fast.atomic_files.write_atomically`."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # given a path, torch.save would write its name into the file
            torch.save(content, file)

    return write


def _safetensors_writer(path: Path, tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    save_file = _safetensors(path).save_file

    def write(path: Path) -> None:
        try:
            save_file(tensors, str(path), metadata={"format": "pt"})
        except Exception as error:  # its own class, with what the disk said as text
            raise OSError(str(error)) from error

    return write


def _with_own_storage(tensor: Tensor, seen: set[int]) -> Tensor:
    """A contiguous CPU copy, or the tensor itself if nothing shares its storage; safetensors takes nothing else."""
    tensor = tensor.detach().cpu().contiguous()
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    seen.add(storage.data_ptr())
    return tensor


def some(names: Iterable[Any], most: int = 6) -> str:
    """The first few of ``names``, for an error message."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
