"""Shapes that operators are tested on, each with its reason."""

from __future__ import annotations

from typing import NamedTuple


class Depthwise(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    reason: str = ""

    def __str__(self) -> str:
        return (
            f"{self.n}x{self.c}x{self.h}x{self.w}-k{self.kh}x{self.kw}-s{self.stride[0]}{self.stride[1]}"
            f"-p{self.padding[0]}{self.padding[1]}-d{self.dilation[0]}{self.dilation[1]}-{self.reason}"
        ).replace(" ", "_")


DEPTHWISE = [
    Depthwise(2, 96, 14, 14, 7, 7, padding=(3, 3), reason="ConvNeXt-T, stage 1, smaller map"),
    Depthwise(1, 33, 7, 7, 7, 7, padding=(3, 3), bias=False, reason="map as wide as the kernel"),
    Depthwise(3, 17, 5, 11, 7, 7, padding=(3, 3), reason="H smaller than K, primes"),
    Depthwise(2, 7, 1, 1, 7, 7, padding=(3, 3), reason="one pixel"),
    Depthwise(2, 1, 13, 6, 3, 3, padding=(1, 1), reason="one channel: ambiguous strides"),
    Depthwise(1, 3, 9, 8, 5, 5, padding=(4, 4), reason="padding of K-1: map grows"),
    Depthwise(2, 31, 12, 10, 9, 9, reason="no padding: map shrinks"),
    Depthwise(1, 40, 8, 23, 1, 11, padding=(0, 5), reason="row kernel"),
    Depthwise(1, 40, 23, 8, 11, 1, padding=(5, 0), reason="column kernel"),
    Depthwise(2, 5, 16, 9, 3, 7, padding=(0, 3), reason="rectangular kernel, padding in one direction"),
    Depthwise(1, 6, 33, 35, 31, 31, padding=(15, 15), bias=False, reason="RepLKNet"),
    Depthwise(2, 12, 15, 14, 7, 7, (2, 2), (3, 3), reason="stride of a downsampling layer"),
    Depthwise(2, 12, 15, 14, 5, 3, (3, 1), (2, 0), reason="stride larger in rows, columns cut off"),
    Depthwise(1, 9, 20, 21, 7, 7, (1, 1), (9, 9), (3, 3), reason="dilation of VAN"),
    Depthwise(1, 8, 17, 18, 3, 5, (2, 3), (2, 4), (2, 3), reason="stride, padding and dilation all differ"),
    Depthwise(2, 10, 8, 9, 4, 2, padding=(2, 1), reason="even kernel"),
    Depthwise(1, 255, 6, 5, 3, 3, padding=(1, 1), reason="many channels, not a power of two"),
    Depthwise(1, 1023, 3, 4, 3, 3, padding=(1, 1), reason="most channels"),
    Depthwise(2, 129, 4, 4, 1, 1, reason="one tap"),
    Depthwise(2, 97, 5, 3, 5, 5, padding=(2, 2), reason="one channel more than a multiple of 32"),
    Depthwise(1, 192, 7, 6, 7, 7, padding=(3, 3), reason="ConvNeXt-T, stage 2, smaller map"),
    Depthwise(1, 768, 3, 4, 7, 7, padding=(3, 3), bias=False, reason="ConvNeXt-T, stage 4, smaller map"),
]

EMPTY_MAPS = [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (2, 0, 5, 6), (0, 0, 0, 0)]

CHANNELS = [1, 3, 7, 17, 31, 33, 40, 96, 97, 129, 192, 255, 768, 1023]
MEANS = [0.0, 1.0, 10.0, 100.0]
