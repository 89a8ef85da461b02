"""Which images a data folder holds, which of them can be read, and which are to train or to validate on."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .atomic_files import write_atomically
from .data import Sample, is_of_the_system, pillow, some_names

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Of a link that leads nowhere, or to itself, and of a file that was deleted since the folder was listed.
_LEADS_NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)

Identity = tuple[int, int]  # device and inode


@dataclass(frozen=True)
class FolderListing:
    """The images of a data folder; paths are relative to ``root`` with forward slashes. ``broken`` cannot be read."""

    root: str
    class_names: list[str]
    train: list[Sample]
    val: list[Sample]
    broken: list[str]

    def fingerprint(self) -> str:
        """Changes when an image or a class is added, removed or renamed."""
        content = json.dumps([self.class_names, self.train, self.val])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> FolderListing | None:
        """What :meth:`write` wrote; None where there is no such file, or something else is in it."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            train, val = ([(str(name), int(label)) for name, label in values[part]] for part in ("train", "val"))
            return cls(values["root"], list(values["class_names"]), train, val, list(values["broken"]))
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def as_in(self, run: FolderListing) -> FolderListing:
        """The samples with which ``run`` began, in this folder, where each of them must still be a file.

        Those that cannot be read any more stay in the list, since without them every later sample would be another.

        Raises:
            ValueError: files were removed, or images added; the message has their names.
        """
        before = [path for path, _ in run.train + run.val]
        readable = [path for path, _ in self.train + self.val]
        here, known = {*readable, *self.broken}, {*before, *run.broken}
        removed, added = [path for path in before if path not in here], [path for path in readable if path not in known]
        changes = [
            f"{len(names)} {'was' if len(names) == 1 else 'were'} {what}: {some_names(names)}"
            for what, names in (("removed", removed), ("added", added))
            if names
        ]
        if changes:
            raise ValueError(f"the images in {self.root} are not those that the run began with; {'; '.join(changes)}")
        gone = set(self.broken).intersection(before)
        if gone:
            logger.warning(
                "%d of %d images of the run cannot be read any more, and others of their class are taken in their "
                "place: %s", len(gone), len(before), some_names(sorted(gone)),
            )  # fmt: skip
        return replace(run, root=self.root)


def list_folder(
    data_dir: str | Path,
    val_fraction: float | None = None,
    cache: Path | None = None,
    progress: Callable[..., Iterable] = lambda iterable, **_: iterable,
) -> FolderListing:
    """Find, check and split the images of ``data_dir``.

    Either ``data_dir/train/<class>/`` and ``data_dir/val/<class>/``, or ``data_dir/<class>/``, of which a part
    ``val_fraction`` (default 0.1) of every class is held out by a hash of the file names, whatever the seed. Every file
    is decoded once (JPEG at an eighth of its size); those that cannot be are left out with one warning. ``cache`` (a
    JSON file) remembers the outcome by size and time of change. A file that several links lead to counts once, and
    links to a folder above or to another class are not followed.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it does not hold images of at least two classes.
        OSError: the system could not read a file, for a reason that may pass.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"DATA_DIR {root} does not exist or is not a folder")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; a number between 0 and 1 is allowed")
    has_parts = (root / "train").is_dir()
    train_root = root / "train" if has_parts else root
    parts = [train_root]
    if has_parts and (root / "val").is_dir():
        if val_fraction is not None:
            raise ValueError(f"--val-fraction is given, and {root} has a val/ folder; leave out one of them")
        parts.append(root / "val")
    elif has_parts and val_fraction is None:
        raise ValueError(f"{root} has train/ but no val/ folder; add one, or split train/ with --val-fraction")

    files, *rest = _files_of(root, parts)
    classes = list(files)
    if len(classes) < 2:
        raise ValueError(f"{train_root} holds the single class {classes[0]!r}; at least two are needed to train")
    val_files: dict[str, list[str]] = rest[0] if rest else {}
    if unknown := [name for name in val_files if name not in files]:
        raise ValueError(f"{root / 'val'} holds classes that {train_root} does not: {some_names(unknown)}")

    every = [path for group in (files, val_files) for paths in group.values() for path in paths]
    readable = _readable(root, every, cache, progress)
    files = {name: [path for path in paths if path in readable] for name, paths in files.items()}
    if empty := [name for name, paths in files.items() if not paths]:
        raise ValueError(f"no image can be read of class {some_names(empty)} in {train_root}")
    if val_files:
        val_files = {name: [path for path in paths if path in readable] for name, paths in val_files.items()}
    else:
        if max(map(len, files.values())) == 1:
            raise ValueError(f"every class in {train_root} has a single image; one more is needed to validate on")
        files, val_files = _split(files, 0.1 if val_fraction is None else val_fraction)

    label = {name: i for i, name in enumerate(classes)}
    train, val = (
        [(path, label[name]) for name, paths in group.items() for path in paths] for group in (files, val_files)
    )
    if not val:
        raise ValueError(f"no validation image is left in {root}; none of those in val/ can be read")
    return FolderListing(str(root), classes, train, val, [path for path in every if path not in readable])


def _files_of(root: Path, parts: list[Path]) -> list[dict[str, list[str]]]:
    """For each of ``parts`` the paths below ``root`` by class; no file twice, however many links lead to it."""
    folders = [
        {entry.name: entry for entry in sorted(part.iterdir()) if entry.is_dir() and not entry.name.startswith(".")}
        for part in parts
    ]
    own = {_identity(folder) for part in folders for folder in part.values()} | {_identity(p) for p in (root, *parts)}
    found = [
        (part, name, file)
        for part, by_name in enumerate(folders)
        for name, folder in by_name.items()
        for file in sorted(_images_under(folder, own - {_identity(folder)}), key=lambda file: file.path)
    ]
    # Of several names of a file, the one that is no link is kept, or else the first: of a class the first by name, and
    # of train/ before val/. sorted() keeps that order.
    kept: dict[str, str] = {}
    for _, _, file in sorted(found, key=lambda item: item[2].is_link):
        kept.setdefault(file.real, file.path)
    files: list[dict[str, list[str]]] = [{name: [] for name in by_name} for by_name in folders]
    left_out = []
    for part, name, file in found:
        path = Path(file.path).relative_to(root).as_posix()
        files[part][name].append(path) if kept[file.real] == file.path else left_out.append(path)
    if left_out:
        logger.warning(
            "left out %d links to images that are there under another name: %s", len(left_out), some_names(left_out)
        )
    allowed = ", ".join(IMAGE_SUFFIXES)
    for part, by_class in zip(parts, files, strict=True):
        if not any(by_class.values()):
            raise ValueError(f"{part} has no images; expected {part}/<class>/*, ending in {allowed}")
        if empty := [name for name, paths in by_class.items() if not paths]:
            besides = " that no other class or part has" if left_out else ""
            raise ValueError(f"class {some_names(empty)} in {part} has no images{besides}, ending in {allowed}")
    return files


@dataclass(frozen=True)
class _File:
    path: str
    real: str
    is_link: bool


def _images_under(folder: Path, visited: set[Identity]) -> Iterator[_File]:
    """Images in ``folder`` and below; ``visited``: folders not to go into, since a link to one would be a loop."""
    if _identity(folder) in visited:
        return
    visited.add(_identity(folder))
    real_folder = os.path.realpath(folder)
    linked = real_folder != os.path.join(os.path.realpath(folder.parent), folder.name)
    with os.scandir(folder) as entries:
        children = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))  # what is here before links
    for entry in children:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            for file in _images_under(folder / entry.name, visited):
                yield replace(file, is_link=True) if linked else file
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and (entry.is_symlink() or entry.is_file()):
            # realpath() of every file would ask the disk for every folder above it again.
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real_folder, entry.name)
            yield _File(entry.path, real, linked or entry.is_symlink())


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself; to nowhere would be False
        if error.errno in _LEADS_NOWHERE:
            return False
        raise


def _identity(folder: Path) -> Identity:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _split(files: dict[str, list[str]], fraction: float) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    train, val = {}, {}
    for name, paths in files.items():
        # fsencode: a name need not be UTF-8.
        by_hash = sorted(paths, key=lambda path: hashlib.blake2b(os.fsencode(path), digest_size=8).digest())
        count = min(max(1, round(len(paths) * fraction)), len(paths) - 1)  # at least one for each, training first
        train[name], val[name] = sorted(by_hash[count:]), sorted(by_hash[:count])
    return train, val


def _readable(root: Path, paths: list[str], cache: Path | None, progress: Callable[..., Iterable]) -> set[str]:
    pillow()  # its absence is one error here, not one broken image per file
    stamps = {path: _stamp(root / path) for path in paths}
    known = {path: entry for path, entry in _read_cache(cache).items() if stamps.get(path) == entry[:2]}
    unknown = [path for path in paths if path not in known and stamps[path] is not None]
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # decoders release the GIL
        checked = pool.map(lambda path: _decodes(root / path), unknown)
        checked = progress(checked, total=len(unknown), desc="checking images") if unknown else checked
        known |= {path: [*stamps[path], ok] for path, ok in zip(unknown, checked, strict=True)}
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps(known).encode())

    broken = [path for path in paths if path not in known or not known[path][2]]
    if len(broken) == len(paths):
        raise ValueError(f"none of the {len(paths)} images in {root} can be read, e.g. {broken[0]}")
    if broken:
        logger.warning("skipped %d of %d images that cannot be read: %s", len(broken), len(paths), some_names(broken))
    return set(paths) - set(broken)


def _stamp(path: Path) -> list[int] | None:
    """Size and time of change of a file; None where a link leads nowhere."""
    try:
        stat = path.stat()
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return None
        raise
    return [stat.st_size, stat.st_mtime_ns]


def _read_cache(cache: Path | None) -> dict[str, list]:
    """path -> [size, time of change, can it be read?]; empty where the file is not there or of another shape."""
    try:
        known = json.loads(cache.read_text(encoding="utf-8")) if cache is not None and cache.is_file() else {}
    except (ValueError, RecursionError):
        known = None
    if isinstance(known, dict) and all(_is_entry(entry) for entry in known.values()):
        return known
    logger.debug("%s is damaged; checking all images again", cache)
    return {}


def _is_entry(entry: Sequence) -> bool:
    return isinstance(entry, list) and [type(value) for value in entry] == [int, int, bool]


def _decodes(path: Path) -> bool:
    image_module, _ = pillow()
    try:
        with image_module.open(path) as image:
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))  # JPEG only: reads all, faster
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # see open_image
        # Of a file that the system cannot read now nothing is known, least of all for the next run.
        if is_of_the_system(error) and error.errno not in _LEADS_NOWHERE:
            raise
        return False
    return True
