"""Images, their order, and augmentation."""

import errno
import random
import sys
from pathlib import Path

import pytest
import torch

from convnext_fast.data import (
    Augmentation,
    EpochBatches,
    ImageFiles,
    Mixing,
    Preprocessing,
    ShardBatches,
    TensorImages,
    derive_seed,
    open_image,
)

from .image_folders import COLOURS, make_folder, noisy_image, truncate

image_module = pytest.importorskip("PIL.Image")


# Decoding


MODES = {
    "png": ("RGB", "L", "P", "RGBA", "1", "LA"),
    "webp": ("RGB", "L", "P", "RGBA"),
    "jpg": ("RGB", "L", "CMYK", "1"),
    "bmp": ("RGB", "L", "P", "RGBA", "1"),
}


@pytest.mark.parametrize("suffix, mode", [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_every_mode_becomes_rgb(tmp_path, suffix, mode):
    image = noisy_image((200, 100, 50), 0).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    decoded = open_image(tmp_path / f"a.{suffix}")
    assert decoded.mode == "RGB"
    assert decoded.size == image.size
    if suffix == "png" and mode in ("RGB", "RGBA"):
        assert decoded.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("value", [0, 257, 30000, 65535])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, value):
    image_module.frombytes("I;16", (4, 4), value.to_bytes(2, "little") * 16).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((1, 1)) == (round(value / 257),) * 3


def test_palette_with_transparency(tmp_path):
    image = noisy_image((200, 100, 50), 0).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert open_image(tmp_path / "a.png").tobytes() == image.convert("RGB").tobytes()


def test_exif_orientation_is_applied(tmp_path):
    image = image_module.new("RGB", (20, 10), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90° clockwise to see it upright
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (10, 20)


def test_what_is_not_an_image_is_an_error(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"a\.png is not an image that can be read"):
        open_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png does not exist"):
        open_image(tmp_path / "b.png")


def test_a_missing_pillow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'reading images needs pillow: pip install "convnext-fast\[train\]"'):
        open_image(tmp_path / "a.png")


# Preprocessing


def test_preprocessing_takes_the_centre_and_normalises():
    image = image_module.new("RGB", (80, 40), (0, 0, 0))
    image.paste((255, 255, 255), (30, 10, 50, 30))  # exactly the centre square of half the short side
    preprocessing = Preprocessing(16, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0), crop_fraction=0.5)
    result = preprocessing(image)
    assert result.shape == (3, 16, 16)
    inner = result[:, 2:-2, 2:-2]  # at its edge a bicubic sample sees two pixels of what lies around the crop
    torch.testing.assert_close(inner, torch.tensor([1.0, 3.0, 0.5]).view(3, 1, 1).expand_as(inner))


def test_preprocessing_keeps_the_order_of_rows_columns_and_channels():
    image = noisy_image((120, 100, 90), 3, (32, 32))
    pixels = Preprocessing(32, crop_fraction=1.0).pixels(image)
    for x, y in ((0, 0), (31, 0), (5, 17)):
        assert tuple((pixels[:, y, x] * 255).round().int().tolist()) == image.getpixel((x, y))


def test_preprocessing_survives_a_checkpoint():
    preprocessing = Preprocessing(28, 1, (0.1,), (0.3,), 1.0)
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


# Augmentation


def test_crops_stay_inside_and_have_the_asked_area():
    augmentation, rng = Augmentation(crop_scale=(0.08, 1.0)), random.Random(0)
    for width, height in ((500, 300), (40, 36), (7, 5)):
        for _ in range(300):
            left, top, right, bottom = augmentation.crop_box(width, height, rng)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            if width == 500:  # of the others rounding to whole pixels moves the area
                assert 0.079 < (right - left) * (bottom - top) / (width * height) <= 1
                assert 0.74 < (right - left) / (bottom - top) < 1.35
    assert augmentation.crop_box(1000, 2, rng) == (499, 0, 501, 2)  # no allowed shape fits


@pytest.mark.parametrize("randaugment", [0, 9])
def test_augmentation_is_a_function_of_the_seed(randaugment):
    if randaugment:
        pytest.importorskip("kornia")
    image, preprocessing = noisy_image((200, 100, 50), 0), Preprocessing(24)
    augmentation = Augmentation(randaugment=randaugment)
    torch.manual_seed(1)
    random.seed(1)
    state = torch.get_rng_state()
    results = [augmentation(image, preprocessing, seed) for seed in range(6)]
    assert torch.equal(state, torch.get_rng_state()), "the global generator was moved"
    torch.manual_seed(2)
    random.seed(2)
    again = [Augmentation(randaugment=randaugment)(image, preprocessing, seed) for seed in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert not any(torch.equal(results[0], other) for other in results[1:])
    if randaugment:
        plain = [Augmentation()(image, preprocessing, seed) for seed in range(6)]
        assert sum(not torch.allclose(a, b) for a, b in zip(results, plain, strict=True)) >= 4


def test_hflip_is_switchable():
    image, preprocessing = noisy_image((120, 100, 90), 0), Preprocessing(24)
    for seed in range(20):
        never, always = (
            Augmentation(hflip=hflip, crop_scale=(1, 1))(image, preprocessing, seed) for hflip in (0.0, 1.0)
        )
        assert torch.equal(never.flip(-1), always)


@pytest.mark.parametrize("mixup, cutmix", [(0, 0), (0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixed_targets_are_probabilities_and_match_the_pixels(mixup, cutmix):
    classes, labels = 5, torch.tensor([0, 1, 2, 3, 4, 0])
    # Every image is its label's one-hot vector in all pixels: the mean over pixels is then the unsmoothed target.
    images = torch.eye(classes)[labels].view(6, classes, 1, 1).expand(6, classes, 9, 7).contiguous()
    mixing = Mixing(classes, mixup, cutmix, label_smoothing=0.1)
    seen = set()
    for seed in range(20):
        mixed, targets = mixing(images, labels, seed)
        assert mixed.shape == images.shape
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        assert targets.min() >= 0.1 / classes - 1e-6
        torch.testing.assert_close(targets, mixed.mean((2, 3)) * 0.9 + 0.1 / classes)
        again = mixing(images, labels, seed)
        assert torch.equal(mixed, again[0])
        assert torch.equal(targets, again[1])
        seen.add(tuple(targets.flatten().tolist()))
    assert len(seen) > 10 if mixup or cutmix else len(seen) == 1


# Order


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, first_step=0):
        batches = EpochBatches(20, 4, seed)
        batches.set_position(epoch, first_step)
        return [index for batch in batches for _, index in batch]

    assert sorted(order(0, 0)) == list(range(20))
    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    assert order(0, 3)[8:] == order(0, 3, first_step=2)


def test_ranks_share_the_global_batch_of_one_process():
    alone = list(EpochBatches(50, 12, 7))
    ranks = [list(EpochBatches(50, 4, 7, rank, 3)) for rank in range(3)]
    assert len(alone) == len(ranks[0]) == 4
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(item for rank in ranks for item in rank[step])


def test_fewer_images_than_a_batch_are_one_batch_and_fewer_than_ranks_an_error():
    assert [len(batch) for batch in EpochBatches(5, 4, 0, 0, 2)] == [3]
    assert [len(batch) for batch in EpochBatches(5, 4, 0, 1, 2)] == [2]
    with pytest.raises(ValueError, match="1 training images are fewer than the 2 processes"):
        EpochBatches(1, 4, 0, 0, 2)


@pytest.mark.parametrize("size", [1, 7, 8])
def test_validation_counts_every_image_once(size):
    shards = [[index for batch in ShardBatches(size, 2, rank, 3) for _, index in batch] for rank in range(3)]
    assert sorted(index for shard in shards for index in shard) == list(range(size))


def test_seeds_differ():
    assert len({derive_seed(a, b) for a in range(10) for b in range(10)} | {derive_seed("1/0")}) == 101 - 1
    assert 0 <= derive_seed("x") < 2**63


def test_tensor_images_checks_shapes():
    with pytest.raises(ValueError, match=r"images has shape \(2, 3\)"):
        TensorImages(torch.zeros(2, 3), torch.zeros(2))


# Images that break while a run is on


def _files(root, **kwargs):
    samples = [(f"train/{name}/{i}.png", label) for label, name in enumerate(COLOURS) for i in range(4)]
    return ImageFiles(root, samples, Preprocessing(16), **kwargs)


@pytest.mark.parametrize("spoil", [truncate, Path.unlink])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_breaks_is_replaced_by_one_of_its_class(tmp_path, caplog, spoil, workers):
    make_folder(tmp_path, train=4)
    whole = _files(tmp_path)
    others = [whole[0, i][0] for i in (4, 6, 7)]
    spoil(tmp_path / "train/green/1.png")
    files = _files(tmp_path)
    items = [[(epoch, 5), (epoch, 2)] for epoch in range(8)]
    loader = torch.utils.data.DataLoader(files, batch_sampler=items, num_workers=workers)
    batches = list(loader)
    found = set()
    for images, labels in batches:
        assert labels.tolist() == [1, 0]
        assert torch.equal(images[1], whole[0, 2][0])
        found |= {i for i, other in enumerate(others) if torch.equal(images[0], other)}
    assert len(found) > 1, "another one in another epoch"
    again = [_files(tmp_path)[epoch, 5][0] for epoch in range(8)]
    assert all(torch.equal(images[0], other) for (images, _), other in zip(batches, again, strict=True))
    files.warn_of_replaced()
    files.warn_of_replaced()
    assert caplog.messages == [
        "1 of 12 images cannot be read any more, and others of their class were taken in their place: train/green/1.png"
    ]


def test_a_disk_that_is_gone_ends_the_run(tmp_path, monkeypatch):
    files = _files(make_folder(tmp_path, train=4))
    for path in (tmp_path / "train/red").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"red/1\.png does not exist"):
        files[0, 9]

    def no_descriptors(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("convnext_fast.data.open_image", no_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        files[0, 0]
