"""Addresses of the block's kernels in matrices of more than 2^31 elements, one program of each launch."""

from functools import partial

import pytest

from tests.interpreter import test_norm_linear_addresses as norm_linear
from tests.interpreter.test_norm_linear_addresses import LAST, ROWS, P, elements

C, D, PIXELS = 40, 72, 7  # P rows are images of 7 pixels; P·C and P·D are far beyond 2^31
IMAGES = {row // PIXELS for row in ROWS}
NORM = {"HAS_NORM_WEIGHT": True, "HAS_NORM_BIAS": True, "HAS_FC1_BIAS": True}
END = {"HAS_FC2_BIAS": True, "HAS_LAYER_SCALE": True, "HAS_ROW_SCALE": True}
touched = partial(norm_linear.touched, family="block", C=C, D=D)
of_images = partial(norm_linear.touched, family="block", D=D)


def forward():
    found = touched(
        "fwd", LAST, P=P, pixels=PIXELS, length=D, eps=1.0, **NORM, **END, STORE_STATISTICS=True, AHEAD=True, K0=64,
        K1=0, N0=32, N1=16, BLOCK_P=64, BLOCK_D=32,
    )  # fmt: skip
    for name in ("y_ptr", "x_ptr", "out_ptr"):
        assert found[name] == elements(range(C), C), name
    assert found["mean_ptr"] == found["rstd_ptr"] == set(ROWS)
    assert found["fc1_ptr"] == found["fc2_ptr"] == set(range(C * D))
    assert found["row_scale_ptr"] == IMAGES


def resident():
    # A program that has the last block of rows only.
    found = touched(
        "fwd_resident", LAST, P=P, pixels=PIXELS, programs=P, eps=1.0, **NORM, **END, STORE_STATISTICS=True, C0=32,
        C1=16, BLOCK_P=64, BLOCK_D=8,
    )  # fmt: skip
    for name in ("y_ptr", "x_ptr", "out_ptr"):
        assert found[name] == elements(range(C), C), name
    assert found["mean_ptr"] == found["rstd_ptr"] == set(ROWS)


def out():
    found = touched(
        "out", 2 * LAST + 1, P=P, pixels=PIXELS, length=D, **END, BLOCK_P=64, BLOCK_C=32, BLOCK_D=32, PRECISION="ieee"
    )
    assert found["h_ptr"] == elements(range(D), D)
    assert found["x_ptr"] == found["out_ptr"] == elements(range(32, C), C)
    assert found["fc2_ptr"] == set(range(32 * D, C * D))


def rows():
    found = touched(
        "bwd_rows", LAST, P=P, pixels=PIXELS, **NORM, HAS_ROW_SCALE=True, BALANCED=False, STORE_XHAT=True,
        STORE_H=True, STORE_DU=True, PARTIALS=True, C0=32, C1=16, BLOCK_P=64, BLOCK_D=32,
    )  # fmt: skip
    for name in ("y_ptr", "d_ptr", "dy_ptr", "xhat_ptr"):
        assert found[name] == elements(range(C), C), name
    for name in ("h_ptr", "du_ptr"):
        assert found[name] == elements(range(D), D), name
    assert found["partials_ptr"] == {LAST * D + k for k in range(D)}


def hidden():
    for given in (False, True):
        found = touched(
            "bwd_hidden", 3 * LAST + 2, P=P, pixels=PIXELS, length=C, HAS_FC1_BIAS=True, HAS_ROW_SCALE=True,
            BALANCED=False, GIVEN_PRODUCT=given, SUMS=True, PARTIALS=True, STORE_H=True, BLOCK_P=64, BLOCK_D=32,
            BLOCK_C=32, PRECISION="ieee",
        )  # fmt: skip
        columns = elements(range(64, D), D)
        assert found["d_ptr"] == elements(range(C), C)
        assert found["h_ptr"] == found["du_ptr"] == columns
        assert found["product_ptr" if given else "normed_ptr"] == (columns if given else elements(range(C), C))
        assert found["partials_ptr"] == {LAST * D + k for k in range(64, D)}
        assert found["sums_ptr"] == {4 * P + row for row in ROWS} | {5 * P + row for row in ROWS}


def gradient():
    part = 2**28
    last = range(2 * part, P)  # four rows
    found = norm_linear.touched(
        "bwd_gradient", 2 * 2 + 1, "block", P=P, pixels=PIXELS, rows=part, C=C, HAS_ROW_SCALE=True, STORE=True,
        SUMS=True, BLOCK_P=16, BLOCK_C=32,
    )  # fmt: skip
    assert found["dout_ptr"] == found["d_ptr"] == elements(range(32, C), C, last)
    assert found["partials_ptr"] == {2 * C + c for c in range(32, C)}


def grn():
    images, image = P // PIXELS, P // PIXELS - 1
    last = range(image * PIXELS, images * PIXELS)
    block = {"BLOCK_P": 16, "BLOCK_D": 64}
    columns, here = elements(range(64, D), D, last), {image * D + k for k in range(64, D)}
    found = of_images(
        "grn_sums", 2 * image + 1, pixels=PIXELS, images=images, BACKWARD=True, HAS_FC1_BIAS=True, **block
    )
    assert found["a_ptr"] == found["dh_ptr"] == columns
    assert found["sums_ptr"] == {i * images * D + e for i in range(3) for e in here}
    found = of_images("grn_apply", 2 * image + 1, pixels=PIXELS, **block)
    assert found["a_ptr"] == columns
    assert found["scale_ptr"] == here
    found = of_images(
        "grn_bwd", 2 * image + 1, pixels=PIXELS, images=images, HAS_FC1_BIAS=True, SUMS=True, PARTIALS=True, **block
    )
    assert found["product_ptr"] == found["dh_ptr"] == columns
    assert found["scale_ptr"] == found["direction_ptr"] == found["partials_ptr"] == here
    assert found["sums_ptr"] == {i * images * PIXELS + row for i in (2, 3) for row in last}


CHECKS = {f.__name__: f for f in (forward, resident, out, rows, hidden, gradient, grn)}
# Where the kernel computes what is checked, and how it says 64 bits there.
WIDENED = {
    "forward": ("block/kernels.py", ".to(tl.int64)", ""),
    "resident": ("block/kernels.py", "tl.cast(row, tl.int64)", "row"),
    "out": ("block/kernels.py", ".to(tl.int64)", ""),
    "rows": ("block/kernels_backward.py", ".to(tl.int64)", ""),
    "hidden": ("block/kernels_backward.py", ".to(tl.int64)", ""),
    "gradient": ("block/kernels_backward.py", ".to(tl.int64)", ""),
    "grn": ("block/kernels_grn.py", ".to(tl.int64)", ""),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_addresses(check):
    check()
