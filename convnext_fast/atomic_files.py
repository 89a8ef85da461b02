"""Writing files such that none is ever half there, whatever ends the writing."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file such that after a kill at any moment either the old or the new content is there.

    ``content``: the bytes, or a function that writes them to the path it is given, a hidden one in the same folder.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        OSError: the disk is full, or whatever else stands in the way; the old content is left, and nothing beside it.
    """
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; the name of a file is allowed")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save answers a full disk with a RuntimeError about its own file positions; what the disk said is its
        # context. safetensors' exception is neither, and its caller turns it into one.
        cause = error if isinstance(error, OSError) or not isinstance(error.__context__, OSError) else error.__context__
        failed = OSError(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}")
        failed.errno = getattr(cause, "errno", None)
        raise failed from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_remains(path: Path) -> None:
    """Delete what a kill in the middle of :func:`write_atomically` to ``path`` left beside it."""
    for temporary in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 32}.tmp"):
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and the rename is as durable as it gets
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
