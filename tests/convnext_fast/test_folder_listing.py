"""Which images a folder holds: classes, splits, broken files, links."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from convnext_fast import folder_listing
from convnext_fast.data import Augmentation, ImageFiles, Preprocessing
from convnext_fast.folder_listing import FolderListing, list_folder

from .image_folders import make_folder, noisy_image, truncate

pytest.importorskip("PIL")


def test_train_and_val_folders(tmp_path):
    listing = list_folder(make_folder(tmp_path, train=2, val=1))
    assert listing.class_names == ["blue", "green", "red"]
    assert listing.train[:3] == [("train/blue/0.png", 0), ("train/blue/1.png", 0), ("train/green/0.png", 1)]
    assert listing.val == [("val/blue/0.png", 0), ("val/green/0.png", 1), ("val/red/0.png", 2)]
    files = ImageFiles(tmp_path, listing.train, Preprocessing(16), Augmentation(), seed=3)
    image, label = files[1, 4]
    assert (image.shape, label) == ((3, 16, 16), 2)
    assert torch.equal(image, files[1, 4][0])
    assert not torch.equal(image, files[2, 4][0]), "the next epoch must crop elsewhere"


def test_a_flat_folder_is_split_by_class_and_the_split_does_not_move(tmp_path):
    root = make_folder(tmp_path, train=10, val=1) / "train"
    listing = list_folder(root, 0.3)
    assert len(listing.val) == 9
    assert [label for _, label in listing.val] == [0] * 3 + [1] * 3 + [2] * 3
    assert not {path for path, _ in listing.train} & {path for path, _ in listing.val}
    assert len(listing.train) == 21
    assert list_folder(root, 0.3) == listing
    assert len(list_folder(root).val) == 3, "0.1 is the default"
    (root / "red" / "11.png").write_bytes((root / "red" / "1.png").read_bytes())
    assert list_folder(root, 0.3).fingerprint() != listing.fingerprint()


def test_broken_images_are_left_out_with_one_warning(tmp_path, caplog):
    make_folder(tmp_path)
    truncate(tmp_path / "train/green/2.png")
    noisy_image((0, 0, 0), 0, (600, 600)).save(tmp_path / "train/red/9.jpg")
    truncate(tmp_path / "train/red/9.jpg")
    (tmp_path / "val/blue/0.png").write_bytes(b"")
    (tmp_path / "train/blue/note.txt").write_text("not counted")
    cache = tmp_path / "images.json"
    listing = list_folder(tmp_path, cache=cache)
    assert len(caplog.records) == 1
    assert caplog.messages[0] == (
        "skipped 3 of 34 images that cannot be read: train/green/2.png, train/red/9.jpg, val/blue/0.png"
    )
    assert len(listing.train) == 23
    assert len(listing.val) == 8
    assert list_folder(tmp_path, cache=cache) == listing, "the same with what the cache remembers"
    noisy_image((0, 0, 0), 0).save(tmp_path / "val/blue/0.png")
    assert len(list_folder(tmp_path, cache=cache).val) == 9, "a file that changed is looked at again"


def _remove(root, pattern):
    for path in root.glob(pattern):
        path.unlink()


def _spoil(root, pattern):
    for path in root.glob(pattern):
        path.write_bytes(b"broken")


BAD_FOLDERS = [
    ("no images", lambda root: _remove(root, "train/*/*"), r"train has no images; expected .*<class>"),
    ("empty class", lambda root: _remove(root, "train/green/*"), "class green in .*train has no images"),
    ("all broken", lambda root: _spoil(root, "*/*/*.png"), "none of the 33 images in .* can be read"),
    ("a class broken", lambda root: _spoil(root, "train/red/*"), "no image can be read of class red"),
    ("new class in val", lambda root: (root / "val/red").rename(root / "val/pink"), "that .*train does not: pink"),
    ("no val", lambda root: (root / "val").rename(root / "test"), "has train/ but no val/ folder"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, message", [row[1:] for row in BAD_FOLDERS], ids=[row[0] for row in BAD_FOLDERS])
def test_bad_folders(tmp_path, spoil, message):
    spoil(make_folder(tmp_path))
    with pytest.raises(ValueError, match=message):
        list_folder(tmp_path)


def test_a_single_class_and_a_missing_folder(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "train/red").rename(tmp_path / "one/red")
    with pytest.raises(ValueError, match=r"one holds the single class 'red'; at least two"):
        list_folder(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="nothing does not exist or is not a folder"):
        list_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"val_fraction is 1\.0; a number between 0 and 1"):
        list_folder(tmp_path, 1.0)
    with pytest.raises(ValueError, match=r"--val-fraction is given, and .* has a val/ folder"):
        list_folder(tmp_path, 0.5)


# Links and names


def test_links_that_lead_back_multiply_nothing(tmp_path, caplog):
    plain = list_folder(make_folder(tmp_path, train=4, val=2))
    (tmp_path / "train/blue/loop").symlink_to(tmp_path / "train/blue")
    (tmp_path / "train/blue/above").symlink_to(tmp_path)
    (tmp_path / "train/green/other").symlink_to(tmp_path / "train/red")
    (tmp_path / "train/red/val").symlink_to(tmp_path / "val/red")
    assert list_folder(tmp_path) == plain
    assert not caplog.records


def test_a_file_under_several_names_counts_once(tmp_path, caplog):
    plain = list_folder(make_folder(tmp_path, train=4, val=2))
    (tmp_path / "train/blue/again.png").symlink_to("0.png")
    (tmp_path / "train/blue/00.png").symlink_to("../../val/blue/1.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes((tmp_path / "train/red/0.png").read_bytes())
    (tmp_path / "val/red/8.png").symlink_to(elsewhere / "x.png")
    (tmp_path / "val/red/9.png").symlink_to(elsewhere / "x.png")
    listing = list_folder(tmp_path)
    assert listing.train == plain.train
    assert listing.val == [*plain.val, ("val/red/8.png", 2)]
    names = "train/blue/00.png, train/blue/again.png, val/red/9.png"
    assert caplog.messages == [f"left out 3 links to images that are there under another name: {names}"]


def test_linked_classes_are_read_and_a_linked_copy_of_a_class_is_an_error(tmp_path):
    make_folder(tmp_path / "real")
    for part in ("train", "val"):
        (tmp_path / "links" / part).mkdir(parents=True)
        for name in ("blue", "green"):
            (tmp_path / "links" / part / name).symlink_to(tmp_path / "real" / part / name)
    listing = list_folder(tmp_path / "links")
    assert (len(listing.train), len(listing.val)) == (16, 6)
    (tmp_path / "links/train/copy").symlink_to(tmp_path / "real/train/blue")
    with pytest.raises(ValueError, match=r"class copy in .* has no images that no other class or part has"):
        list_folder(tmp_path / "links")


def test_links_that_lead_nowhere_are_broken_images(tmp_path, caplog):
    plain = list_folder(make_folder(tmp_path))
    (tmp_path / "train/blue/nowhere.png").symlink_to("gone.png")
    (tmp_path / "train/blue/self.png").symlink_to("self.png")
    for _ in range(2):
        listing = list_folder(tmp_path, cache=tmp_path / "images.json")
        assert (listing.train, listing.val) == (plain.train, plain.val)
        assert listing.broken == ["train/blue/nowhere.png", "train/blue/self.png"]
        assert caplog.messages[-1].startswith("skipped 2 of 35 images that cannot be read: train/blue/nowhere.png")


def test_names_that_are_not_utf_8(tmp_path):
    root = make_folder(tmp_path, train=4) / "train"
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (root / "red/0.png").rename(root / "red" / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    listing = list_folder(root, 0.5, cache=tmp_path / "images.json")
    assert f"red/{name}" in [path for path, _ in listing.train + listing.val]
    assert list_folder(root, 0.5, cache=tmp_path / "images.json").fingerprint() == listing.fingerprint()
    listing.write(tmp_path / "samples.json")
    assert FolderListing.read(tmp_path / "samples.json") == listing


def test_a_split_of_single_images_says_what_is_missing(tmp_path):
    root = make_folder(tmp_path, train=1) / "train"
    with pytest.raises(ValueError, match=r"every class in .*train has a single image; one more is needed to validate"):
        list_folder(root, 0.5)


# The cache


@pytest.mark.parametrize("content", ["[1]", '{"a": 5}', '{"train/blue/0.png": [1, 2]}', "3", "{", "[" * 100_000])
def test_a_damaged_cache_is_ignored(tmp_path, content):
    plain = list_folder(make_folder(tmp_path))
    (tmp_path / "images.json").write_text(content)
    assert list_folder(tmp_path, cache=tmp_path / "images.json") == plain
    assert len(json.loads((tmp_path / "images.json").read_text())) == 33


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_an_error_of_the_system_is_not_a_broken_image(tmp_path, monkeypatch, number):
    plain, cache = list_folder(make_folder(tmp_path)), tmp_path / "images.json"
    image_module, image_ops = folder_listing.pillow()

    class Failing:
        @staticmethod
        def open(path):
            if Path(path).name == "2.png":
                raise OSError(number, os.strerror(number), str(path))
            return image_module.open(path)

    with monkeypatch.context() as patch:
        patch.setattr(folder_listing, "pillow", lambda: (Failing, image_ops))
        with pytest.raises(OSError, match=r"2\.png") as caught:
            list_folder(tmp_path, cache=cache)
    assert caught.value.errno == number
    assert list_folder(tmp_path, cache=cache) == plain


# Going on with the samples that a run began with


def test_a_run_keeps_its_samples(tmp_path, caplog):
    make_folder(tmp_path)
    truncate(tmp_path / "train/red/7.png")
    began = list_folder(tmp_path)
    caplog.clear()
    for path in ("train/blue/3.png", "val/green/0.png"):
        truncate(tmp_path / path)
    noisy_image((1, 2, 3), 0).save(tmp_path / "train/red/7.png")  # repaired: still no sample of that run
    now = list_folder(tmp_path)
    assert now.fingerprint() != began.fingerprint()
    assert now.as_in(began) == began
    assert caplog.messages[-1].startswith("2 of 32 images of the run cannot be read any more")
    assert caplog.messages[-1].endswith("train/blue/3.png, val/green/0.png")
    (tmp_path / "train/blue/3.png").unlink()
    for i in range(7):
        noisy_image((1, 2, 3), i).save(tmp_path / f"train/red/new{i}.png")
    added = ", ".join(f"train/red/new{i}.png" for i in range(5))
    message = f"began with; 1 was removed: train/blue/3.png; 7 were added: {added} and 2 more$"
    with pytest.raises(ValueError, match=message):
        list_folder(tmp_path).as_in(began)


def test_a_listing_is_read_as_it_was_written(tmp_path):
    listing, file = list_folder(make_folder(tmp_path)), tmp_path / "samples.json"
    listing.write(file)
    assert FolderListing.read(file) == listing
    assert FolderListing.read(tmp_path / "none.json") is None
    for content in ("[1]", "{", '{"train": 3}'):
        file.write_text(content)
        assert FolderListing.read(file) is None
