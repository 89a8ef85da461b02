"""Addresses in matrices of more than 2^31 elements: single programs of launches that no test could run as a whole."""

import pytest
import torch

from dwconv_kernels import runtime
from tests.interpreter.test_depthwise_addresses import OneProgram

P, C, D = 2**29 + 3, 33, 40  # rows; P·C and P·D are far beyond 2^31
STRIDE = 2**10 + 1
BLOCK = {"BLOCK_P": 64, "BLOCK_D": 32, "BLOCK_C": 64, "PRECISION": "ieee"}
GIVEN = {"HAS_NORM_WEIGHT": True, "HAS_NORM_BIAS": True}
LAST = (P - 1) // 64  # the last block of 64 rows; it has 3
ROWS = range(LAST * 64, P)


def touched(kernel: str, program: int, family: str = "norm_linear", **arguments) -> dict[str, set[int]]:
    """Elements that one program of the kernel loads from or stores to each of its arguments."""
    kernel = getattr(runtime.launchers(family).kernels, f"_{family}_{kernel}_kernel")
    stand_ins = {name: torch.ones(1) for name in kernel.arg_names if name.endswith("_ptr")}
    with OneProgram(program) as guard:
        kernel[(1,)](**stand_ins, **arguments)
    return guard.touched


def elements(columns, width: int, rows=ROWS) -> set[int]:
    return {row * width + column for row in rows for column in columns}


def forward():
    found = touched(
        "fwd", LAST, P=P, stride_x=STRIDE, eps=1.0, tiles=2, C=C, D=D, DENSE=False, **GIVEN, HAS_BIAS=True, GELU=True,
        C0=32, C1=16, BLOCK_P=64, BLOCK_D=32, PRECISION="ieee",
    )  # fmt: skip
    assert found["x_ptr"] == elements(range(C), STRIDE)
    assert found["y_ptr"] == elements(range(D), D)
    assert found["mean_ptr"] == found["rstd_ptr"] == set(ROWS)
    assert found["weight_ptr"] == set(range(C * D))
    assert found["bias_ptr"] == set(range(D))


def longest_rows():
    """As far from each other as they may be to be read in place, in the largest block."""
    stride, rows = 2**23 - 1, 2**16
    arguments = {"P": rows, "stride_x": stride, "C": C, "D": D, "DENSE": False, **BLOCK, "BLOCK_P": 128}
    expected = elements(range(C), stride, range(rows - 128, rows))
    forward = arguments | GIVEN | {"eps": 1.0, "tiles": 2, "HAS_BIAS": False, "GELU": False, "C0": 32, "C1": 16}
    assert touched("fwd", rows // 128 - 1, **{k: v for k, v in forward.items() if k != "BLOCK_C"})["x_ptr"] == expected
    backward = arguments | {"length": D, "sum_blocks": 1, "HAS_NORM_WEIGHT": True, "WHOLE_ROWS": True}
    assert touched("bwd_x", rows // 128 - 1, **backward)["x_ptr"] == expected


def normalise():
    found = touched(
        "norm", LAST, P=P, stride_x=STRIDE, eps=1.0, C=C, DENSE=False, **GIVEN, GIVEN_STATISTICS=False,
        STORE_NORMED=True, STORE_XHAT=True, BLOCK_P=64, BLOCK_C=64,
    )  # fmt: skip
    assert found["x_ptr"] == elements(range(C), STRIDE)
    assert found["normed_ptr"] == found["xhat_ptr"] == elements(range(C), C)


def product():
    found = touched(
        "product", 2 * LAST + 1, P=P, length=C, C=C, D=D, HAS_BIAS=True, HAS_FACTOR=True, GELU=False,
        STORE_PRODUCT=True, **BLOCK,
    )  # fmt: skip
    assert found["normed_ptr"] == elements(range(C), C)
    assert found["y_ptr"] == found["product_ptr"] == elements(range(32, D), D)
    assert found["weight_ptr"] == set(range(32 * C, D * C))


def hidden():
    found = touched(
        "bwd_du", 2 * LAST + 1, P=P, length=C, C=C, D=D, HAS_BIAS=True, GELU=True, SUMS=True, PARTIALS=True, **BLOCK
    )  # fmt: skip
    assert found["normed_ptr"] == elements(range(C), C)
    assert found["dy_ptr"] == found["du_ptr"] == elements(range(32, D), D)
    assert found["partials_ptr"] == {LAST * D + k for k in range(32, D)}
    assert found["sums_ptr"] == {2 * P + row for row in ROWS} | {3 * P + row for row in ROWS}


def input_gradient():
    for whole in (True, False):
        found = touched(
            "bwd_x", LAST, P=P, stride_x=STRIDE, length=D, sum_blocks=5, C=C, D=D, DENSE=False,
            HAS_NORM_WEIGHT=True, WHOLE_ROWS=whole, **BLOCK,
        )  # fmt: skip
        assert found["x_ptr"] == elements(range(C), STRIDE)
        assert found["dx_ptr"] == elements(range(C), C)
        assert found["du_ptr"] == elements(range(D), D)
        assert found.get("sums_ptr", set()) == (set() if whole else {i * P + row for i in range(10) for row in ROWS})


def weight_gradient():
    rows = 2**28
    found = touched("bwd_weight", 2 * 2 + 1, P=P, rows=rows, C=C, D=D, **BLOCK)
    assert found["du_ptr"] == elements(range(32, D), D, range(2 * rows, P))
    assert found["xhat_ptr"] == elements(range(C), C, range(2 * rows, P))
    assert found["parts_ptr"] == {2 * D * C + e for e in range(32 * C, D * C)}


def finish():
    wide = 2**14
    found = touched(
        "finish", 2 * (wide // 64) - 1, parts=2, row_blocks=40, C=wide, D=64, HAS_PARTS=True, STORE_DW=True,
        STORE_DB=True, NORM_PARTS=True, **GIVEN, BLOCK_P=32, BLOCK_D=32, BLOCK_C=64,
    )  # fmt: skip
    assert found["partials_ptr"] == {p * 64 + k for p in range(40) for k in range(32, 64)}
    last = {k * wide + c for k in range(32, 64) for c in range(wide - 64, wide)}
    assert found["dw_ptr"] == last
    assert found["parts_ptr"] == last | {64 * wide + e for e in last}
    assert found["norm_parts_ptr"] == {i * wide + c for i in (2, 3) for c in range(wide - 64, wide)}


CHECKS = {f.__name__: f for f in (forward, normalise, product, hidden, input_gradient, weight_gradient)}
# Where the kernel computes what is checked.
FILES = {
    "forward": "norm_linear/kernels.py",
    "normalise": "norm_linear/kernels.py",
    "product": "norm_linear/tiles.py",
    "hidden": "norm_linear/kernels_backward.py",
    "input_gradient": "norm_linear/kernels_backward.py",
    "weight_gradient": "norm_linear/kernels_backward.py",
}


@pytest.mark.parametrize("check", [*CHECKS.values(), longest_rows, finish], ids=lambda check: check.__name__)
def test_addresses(check):
    check()
