"""Small generated image folders: every class is a colour with noise, which a few steps of training can tell apart."""

from pathlib import Path

import torch

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


def noisy_image(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 36)):
    from PIL import Image

    noise = torch.randint(-40, 40, (*size[::-1], 3), generator=torch.Generator().manual_seed(seed))
    pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
    return Image.frombytes("RGB", size, bytes(pixels.flatten().tolist()))


def make_folder(root: Path, train: int = 8, val: int = 3) -> Path:
    """``root/{train,val}/<colour>/<i>.png``, with ``train`` and ``val`` images per class."""
    for part, count in (("train", train), ("val", val)):
        for label, (name, colour) in enumerate(COLOURS.items()):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noisy_image(colour, 1000 * label + i + (500 if part == "val" else 0)).save(folder / f"{i}.png")
    return root


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
