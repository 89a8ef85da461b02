"""Addresses in maps of more than 2^31 elements: single programs of launches that no test could run as a whole."""

import pytest
import torch

from dwconv_kernels import runtime
from tests.interpreter_accesses import SLOT_BITS
from tests.interpreter_guard import Guard

POINTERS = (
    "x_ptr", "dy_ptr", "residual_ptr", "y_ptr", "taps_ptr", "partials_ptr", "weight_ptr", "bias_ptr", "dw_ptr",
    "db_ptr",
)  # fmt: skip
LIMIT = 2**30 - 1  # elements of a row


class OneProgram(Guard):
    """Runs one program of a launch whose tensors are not there: each is a single element, whatever is asked for.

    Integers are checked for overflow as ever. ``touched`` says which elements of which argument the program meant.
    """

    def __init__(self, program: int):
        super().__init__()
        self.program = program
        self.touched: dict[str, set[int]] = {}

    def _next_program(self, builder, x, y, z):
        super()._next_program(builder, x, y, z)
        builder.grid_idx = (self.program, 0, 0)

    def _touch(self, pointers, mask, size, values):
        for address in pointers[mask].tolist():
            argument = self._arguments[address >> SLOT_BITS]
            element, rest = divmod(address - int(argument.base), size)
            assert rest == 0
            self.touched.setdefault(argument.name, set()).add(element)
            pointers = pointers * 0 + argument.real
        return pointers


def touched(kernel: str, program: int, **arguments) -> dict[str, set[int]]:
    """Elements that one program of the kernel loads from or stores to each of its arguments."""
    kernel = getattr(runtime.launchers("depthwise").kernels, kernel)
    stand_ins = {name: torch.zeros(1) for name in POINTERS if name in kernel.arg_names}
    with OneProgram(program) as guard:
        kernel[(1,)](**stand_ins, **arguments)
    return guard.touched


def elements(n, rows, columns, channels, sizes) -> set[int]:
    """Where these rows, columns and channels of image n are in a map (N, H, W, C) of ``sizes`` (H, W, C)."""
    h, w, c = sizes
    assert rows.stop <= h
    assert columns.stop <= w
    return {((n * h + row) * w + column) * c + channel for row in rows for column in columns for channel in channels}


def clipped(begin, end, size):
    return range(max(begin, 0), min(end, size))


class Cut:
    """The last program of a forward kernel: of the last image, rows, strip and block of channels."""

    def __init__(self, h, w, c, block_w, kernel, padding):
        self.size, (self.kh, self.kw), (self.ph, self.pw) = (h, w, c), kernel, padding
        self.out = (h + 2 * self.ph - self.kh + 1, w + 2 * self.pw - self.kw + 1, c)
        self.strips, self.blocks, self.rows, self.images = -(-self.out[1] // block_w), -(-c // 32), 2, 2
        masked = padding != (self.kh // 2, self.kw // 2)
        self.begin = (self.strips - 1) * block_w if masked else self.out[1] - block_w
        self.columns = range(self.begin, self.out[1])
        self.channels = range((self.blocks - 1) * 32, c)
        self.constants = {"C": c, "KH": self.kh, "KW": self.kw, "DH": 1, "DW": 1, "BLOCK_W": block_w, "BLOCK_C": 32}
        self.edge = {"EDGE": "masked" if masked else "strips"}
        self.sizes = {"H": h, "W": w, "rows": self.rows, "strips": self.strips}
        self.outs = {"OH": self.out[0], "OW": self.out[1], "padding_h": self.ph, "padding_w": self.pw}

    def under(self, rows):
        """Columns and rows of x under those of the result, inside of the map."""
        h, w, _ = self.size
        return clipped(rows.start - self.ph, rows.stop - self.ph + self.kh - 1, h), clipped(
            self.columns.start - self.pw, self.columns.stop - self.pw + self.kw - 1, w
        )


# Rows that are as long as they may be.
IN_MASKS = Cut(35, 2**15 - 4, 2**15 - 1, 4, (3, 5), (2, 2))
IN_STRIPS = Cut(35, 2**15 - 1, 2**15 - 1, 7, (3, 5), (1, 2))
IN_PAIRS = Cut(35, 2**15 - 1, 2**15 - 1, 7, (7, 3), (3, 1))


def test_rows_are_as_long_as_they_may_be():
    for cut in (IN_MASKS, IN_STRIPS, IN_PAIRS):
        assert LIMIT - 10**6 < cut.size[1] * cut.size[2] < LIMIT
        assert 2 * cut.size[0] * cut.size[1] * cut.size[2] > 2**36


@pytest.mark.parametrize("cut, kernel", [
    (IN_MASKS, "_depthwise_fwd_kernel"), (IN_STRIPS, "_depthwise_fwd_kernel"),
    (IN_PAIRS, "_depthwise_fwd_pairs_kernel"),
], ids=["masked", "strips", "pairs"])  # fmt: skip
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_forward(cut, kernel, residual):
    chunks = -(-cut.out[0] // cut.rows)
    program = 3 * chunks * cut.strips * cut.blocks - 1  # the last one of three images
    pairs = "pairs" in kernel
    arguments = {**cut.sizes, **cut.constants, "HAS_RESIDUAL": residual}
    arguments |= {} if pairs else {**cut.outs, **cut.edge, "CACHED": False}
    found = touched(kernel, program, **arguments)
    rows = range((chunks - 1) * cut.rows, cut.out[0])
    assert found["y_ptr"] == elements(2, rows, cut.columns, cut.channels, cut.out)
    assert found.get("residual_ptr") == (found["y_ptr"] if residual else None)
    rows, columns = cut.under(rows)
    if pairs:  # they begin with an even one
        rows = range(rows.start - rows.start % 2, rows.stop)
    assert found["x_ptr"] == elements(2, rows, columns, cut.channels, cut.size)
    count = cut.kh * cut.kw + 1 + (cut.kh // 2 * cut.kw if pairs else 0)
    assert found["taps_ptr"] == {q * cut.size[2] + channel for q in range(count) for channel in cut.channels}


@pytest.mark.parametrize("cut, kernel", [
    (IN_MASKS, "_depthwise_bwd_weight_kernel"), (IN_STRIPS, "_depthwise_bwd_weight_kernel"),
    (IN_PAIRS, "_depthwise_bwd_weight_pairs_kernel"),
], ids=["masked", "strips", "pairs"])  # fmt: skip
def test_weight_gradient(cut, kernel):
    h, c = cut.size[0], cut.size[2]
    chunks, groups = -(-h // cut.rows), 2
    parts = groups * chunks * cut.strips
    arguments = {"N": 3, "images": cut.images, **cut.sizes, **cut.constants}
    arguments |= {"PREFETCH": True} if "pairs" in kernel else {**cut.outs, **cut.edge, "GROUP": cut.kh}
    found = touched(kernel, parts * cut.blocks - 1, **arguments)
    rows = range((chunks - 1) * cut.rows, h)
    _, columns = cut.under(rows)
    # The group's second image is not there; columns of dy that belong to the strip before are loaded, times 0.
    assert found["x_ptr"] == elements(2, rows, columns, cut.channels, cut.size)
    reach = clipped(rows.start + cut.ph - cut.kh + 1, rows.stop + cut.ph, cut.out[0])
    needed = elements(2, reach, cut.columns, cut.channels, cut.out)
    last_row = elements(2, range(cut.out[0] - 1, cut.out[0]), cut.columns, cut.channels, cut.out)
    assert needed <= found["dy_ptr"] <= needed | last_row
    taps = cut.kh * cut.kw + 1
    assert found["partials_ptr"] == {
        ((parts - 1) * taps + q) * c + channel for q in range(taps) for channel in cut.channels
    }


def test_second_stage():
    c, taps, count = 2**15 - 1, 82, 1000
    blocks = -(-c // 32)
    channels = range((blocks - 1) * 32, c)
    arguments = {
        "count": count, "wants_dw": 1, "wants_db": 1, "channels": c, "stride_wc": 2**17, "stride_wh": 2**28,
        "stride_ww": 2**29, "KH": 9, "KW": 9, "GROUPS": 1, "BLOCK_P": 32, "BLOCK_C": 32,
    }  # fmt: skip
    for q, name, expected in (
        (80, "dw_ptr", {channel * 2**17 + 8 * 2**28 + 8 * 2**29 for channel in channels}),
        (81, "db_ptr", set(channels)),
    ):
        found = touched("_depthwise_sum_kernel", q * blocks + blocks - 1, **arguments)
        assert found["partials_ptr"] == {(p * taps + q) * c + channel for p in range(count) for channel in channels}
        assert found[name] == expected
        assert {"dw_ptr", "db_ptr"} & found.keys() == {name}


@pytest.mark.parametrize("flip", [0, 1])
def test_table_of_taps(flip):
    """Weights may be slices with any strides."""
    c, blocks = 1000, 8
    channels = range(7 * 128, c)
    arguments = {
        "has_bias": 1, "flip": flip, "pairs": 0, "channels": c, "stride_wc": 2**23, "stride_wh": 2**30,
        "stride_ww": 2**33, "stride_b": 2**24, "KH": 3, "KW": 5, "BLOCK_C": 128,
    }  # fmt: skip
    found = touched("_depthwise_taps_kernel", 13 * blocks + 7, **arguments)
    tap = 2**30 * (0 if flip else 2) + 2**33 * (1 if flip else 3)
    assert found == {
        "weight_ptr": {channel * 2**23 + tap for channel in channels},
        "taps_ptr": {13 * c + channel for channel in channels},
    }
    found = touched("_depthwise_taps_kernel", 15 * blocks + 7, **arguments)
    assert found == {
        "bias_ptr": {channel * 2**24 for channel in channels},
        "taps_ptr": {15 * c + channel for channel in channels},
    }
