"""Which depthwise kernel runs on what: properties of config.py over all sizes, and what the tests' own cover covers."""

import ast
import functools
import itertools
from pathlib import Path

import pytest

from dwconv_kernels import devices
from dwconv_kernels.depthwise import config
from tests import cases
from tests.cases import (
    CHANNELS,
    DILATED,
    DTYPES,
    GEOMETRIES,
    KERNELS,
    LARGE,
    ONE,
    STRIDED,
    geometry_cases,
    kernel_cases,
)

ARCHITECTURES = (0, 75, *devices.MULTIPROCESSORS, 999)  # the interpreter, known ones, and two that are not
SIZES = [(kernel, ONE) for kernel in KERNELS] + [((kh, kw), dilation) for kh, kw, _, dilation in DILATED + LARGE]
KINDS = list(itertools.product(DTYPES, SIZES, (False, True)))


@functools.cache
def picked(dtype, size, strict, widths=range(1, 201)):
    """Each choice for maps of these widths, and the widths it is for; ``size`` is of the kernel, and its dilation."""
    found, (kernel, dilation) = {}, (size[0], config.dilation_of(*size[0], size[1]))
    for pick, same, w in itertools.product((config.pick_forward, config.pick_backward_weight), (True, False), widths):
        found.setdefault(pick(dtype, *kernel, same, w, strict, dilation), []).append(w)
    return found


def in_phases(choice, widths):
    """(strips of each row, columns) of each phase of a dilation, for maps of these widths."""
    d = choice.dilation[1]
    return sorted({(choice.strips(w), columns) for w in widths for columns in (w // d, -(-w // d)) if columns > 0})


# Compiled variants


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strict", [False, True])
def test_at_most_eight_kernels_are_compiled_for_all_sizes(dtype, strict):
    """Per number of channels, dtype and size of the kernel; N and H are not even asked for."""
    for size in SIZES:
        compiled = {
            (choice.kernel, *choice.constants(96, *size[0]).items(), *choice.options().items())
            for choice in picked(dtype, size, strict)
        }
        assert len(compiled) + 2 <= 8, size  # the table of taps, and the second stage of the weight's gradient
    assert all(len(set(config.pick_strided(stride))) == 3 for stride in ((2, 2), (1, 2), (2, 1)))


def test_no_size_and_no_address_is_compiled_into_a_kernel():
    """Triton compiles anew for sizes of 1 and multiples of 16 and for aligned pointers, unless told not to."""
    folder = Path(config.__file__).parent
    lists = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse((folder / "strips.py").read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if target.id in ("SIZES", "POINTERS")
    }
    kernels = 0
    for file in sorted({*folder.glob("kernels*.py")} - {folder / "kernels_gluon.py", folder / "kernels_tables.py"}):
        for function in ast.parse(file.read_text()).body:
            if not isinstance(function, ast.FunctionDef) or not function.name.endswith("_kernel"):
                continue
            (decorator,) = function.decorator_list
            told = {keyword.arg: lists[keyword.value.id] for keyword in decorator.keywords}
            arguments = {argument.arg for argument in function.args.args if argument.annotation is None}
            pointers = {name for name in arguments if name.endswith("_ptr")}
            assert arguments - pointers <= set(told["do_not_specialize"]), function.name
            assert pointers <= set(told["do_not_specialize_on_alignment"]), function.name
            kernels += 1
    assert kernels == 9


@pytest.mark.parametrize("dtype, size, strict", KINDS, ids=str)
def test_shipped_is_all_there_is(dtype, size, strict):
    shipped = list(config.shipped(dtype, *size[0], strict, config.dilation_of(*size[0], size[1])))
    assert len(shipped) == len(set(shipped))
    assert set(shipped) == set(picked(dtype, size, strict, (*range(1, 301), 32_768, 32_769, 10**6)))
    for choice in shipped:
        assert choice.reason
        assert not (strict and choice.pairs)
        assert not (dtype == "fp32" and choice.pairs)


def test_choices_are_functions_of_their_arguments():
    """Whatever was asked before, and with nothing remembered."""
    asked = [(config.pick_forward, *kind) for kind in itertools.product(DTYPES, (3, 7), (3, 7), (True, False), (7, 30))]
    asked += [(config.pick_backward_weight, *arguments) for _, *arguments in asked]
    asked += [(config.rows_per_program, arch, columns, 56, 7) for arch in ARCHITECTURES for columns in (1, 96, 10**4)]
    asked += [(config.cut_backward_weight, arch, 24, n, 28, 7) for arch in ARCHITECTURES for n in (1, 3, 256)]
    first = [function(*arguments) for function, *arguments in asked]
    for function in {function for function, *_ in asked}:
        function.cache_clear()
    assert [function(*arguments) for function, *arguments in reversed(asked)] == first[::-1]


# Strips


def starts(choice, count, w):
    """As strips.strip_start has them, which the kernels' exact tests show to be right where these are."""
    if choice.edge == "masked":
        return [strip * choice.block_w for strip in range(count)]
    return [strip * (w - choice.block_w) // max(count - 1, 1) for strip in range(count)]


@pytest.mark.parametrize("dtype, size, strict", KINDS, ids=str)
def test_strips_cover_every_column_once(dtype, size, strict):
    """In each phase of a dilation, though their number is that of the widest phase."""
    for choice, widths in picked(dtype, size, strict).items():
        for count, w in in_phases(choice, widths):
            first = starts(choice, count, w)
            assert first[0] == 0
            assert w - choice.block_w <= first[-1] < w + (choice.edge == "masked" and choice.dilation[1] > 1)
            # A column is the first strip's that has it: columns_owned.
            owned = [
                column
                for strip, start in enumerate(first)
                for column in range(start, min(start + choice.block_w, w))
                if strip == 0 or column >= first[strip - 1] + choice.block_w
            ]
            assert owned == list(range(w)), (choice, w)


@pytest.mark.parametrize("dtype, size, strict", KINDS, ids=str)
def test_columns_beside_strips_are_all_inside_or_all_outside(dtype, size, strict):
    beside = size[0][1] // 2
    for choice, widths in picked(dtype, size, strict).items():
        if choice.edge == "masked":
            continue
        for count, w in in_phases(choice, widths):
            for start in starts(choice, count, w):
                end = start + choice.block_w
                assert beside <= choice.block_w or choice.edge == "whole"  # where outside, as many inside are read
                assert start >= 0
                assert end <= w
                assert start == 0 or start >= beside, (choice, w)
                assert end == w or end + beside <= w, (choice, w)
                assert choice.edge != "whole" or (start, end) == (0, w)


def test_other_padding_and_narrow_or_very_wide_maps_are_masked():
    picks = (config.pick_forward, config.pick_backward_weight)
    for pick, dtype, (kh, kw), strict in itertools.product(picks, DTYPES, KERNELS, (False, True)):
        for same, w in ((False, 7), (False, 100), (True, 3), (True, 6), (True, 32_769)):
            assert pick(dtype, kh, kw, same, w, strict).edge == "masked"
        assert pick(dtype, kh, kw, True, 7, strict).edge != "masked"
        assert pick(dtype, kh, kw, True, 32_768, strict).edge == "strips"


# Parts


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_programs_cover_all_rows_and_images(arch):
    sizes = [*range(1, 24), 28, 56, 57, 100, 224, 300]
    for columns, h, kh in itertools.product((1, 5, 96, 1000, 10**5), sizes, (1, 7, 11)):
        rows = config.rows_per_program(arch, columns, h, kh)
        assert rows > 0
        assert rows % 2 == 0
        assert rows <= h + 1
    for columns, n, h, kh in itertools.product(
        (1, 24, 1000), (1, 2, 3, 7, 64, 65, 300), (1, 2, 7, 14, 57, 300), (1, 7)
    ):
        images, rows = config.cut_backward_weight(arch, columns, n, h, kh)
        assert 1 <= images <= n
        assert rows > 0
        assert rows % 2 == 0
        assert rows <= h + 1


def test_work_is_cut_where_it_would_not_fill_the_machine():
    assert config.rows_per_program(90, 4, 56, 7) < 56 == config.rows_per_program(90, 10**5, 56, 7)
    assert config.rows_per_program(0, 1, 56, 7) == 56  # the interpreter
    assert config.cut_backward_weight(90, 24, 1, 56, 7)[1] < 56
    images, rows = config.cut_backward_weight(90, 24, 1024, 56, 7)
    assert images > 1
    assert rows == 56
    for n in (256, 1024, 4096, 2**15):  # partial sums stay few beside the pixels that they are sums of
        images, rows = config.cut_backward_weight(90, 24, n, 56, 7)
        parts = 8 * -(-56 // rows) * -(-n // images)  # strips of 7 columns
        assert parts * (7 * 7 + 1) <= n * 56 * 56 / 32


# What is not taken


@pytest.mark.parametrize("geometry", [
    *((*kernel, ONE, ONE) for kernel in [*KERNELS, (3, 1), (5, 9)]), *GEOMETRIES,
], ids=str)  # fmt: skip
def test_what_is_taken(geometry):
    kh, kw, stride, dilation = geometry
    spread = config.dilation_of(kh, kw, dilation)
    most = (spread[0] * (kh - 1), spread[1] * (kw - 1))
    for dtype, ph, pw in itertools.product(DTYPES, range(most[0] + 1), range(most[1] + 1)):
        assert config.why_not(dtype, kh, kw, stride, (ph, pw), dilation) is None
    for padding in ((most[0] + 1, 0), (0, most[1] + 1)):
        reason = config.why_not("bf16", kh, kw, stride, padding, dilation)
        assert str(padding) in reason
        assert str(most) in reason


def test_taps_and_sums_fit_in_registers():
    """Or are read through the cache; and the rows of taps of a group are all there are, the last ones too."""
    for dtype, (kernel, dilation) in itertools.product(DTYPES, SIZES):
        for choice in config.shipped(dtype, *kernel, False, config.dilation_of(*kernel, dilation)):
            (kh, kw), sums = kernel, (kernel[0] - 1) * choice.block_w
            if choice.group:
                assert (choice.groups(kh) - 1) * choice.group < kh <= choice.groups(kh) * choice.group
                assert choice.group * (kw + choice.block_w) <= config.TAPS_AND_SUMS
            elif "fwd_kernel" in choice.kernel:
                assert choice.cached == (kh * kw + sums > config.TAPS_AND_SUMS)
                assert sums <= config.TAPS_AND_SUMS


@pytest.mark.parametrize("change, came, allowed", [
    ({"dtype": "float64"}, "x is float64", "bfloat16, float16 and float32"),
    ({"stride": (3, 1)}, "stride (3, 1)", "up to stride 2"),
    ({"stride": (2, 1), "kh": 11}, "stride (2, 1); with stride", "9×9, and the kernel is 11×3"),
    ({"stride": (2, 2), "dilation": (1, 3)}, "stride (2, 2), dilation (1, 3)", "one or the other"),
    ({"dilation": (1, 4)}, "dilation (1, 4)", "up to dilation 3"),
    ({"dilation": (2, 1), "padding": (5, 1)}, "padding is (5, 1)", "here (4, 2)"),
    ({"kh": 4}, "4×3", "odd sizes"),
    ({"kw": 2}, "3×2", "odd sizes"),
    ({"dtype": "fp32", "kh": 19}, "19×3", "17×17, 1×51 and 51×1"),
    ({"kh": 1, "kw": 53}, "1×53", "1×51"),
    ({"dtype": "fp32", "kh": 31, "kw": 31}, "31×31", "17×17"),
])  # fmt: skip
def test_reasons_say_what_came_and_what_is_allowed(change, came, allowed):
    geometry = {"dtype": "bf16", "kh": 3, "kw": 3, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    assert config.why_not(**geometry) is None
    reason = config.why_not(**{**geometry, **change})
    assert came in reason
    assert allowed in reason


# The cases on which the kernels are run, cases.kernel_cases


def met(*names):
    return {meeting[1:] for case in kernel_cases() for meeting in cases.meetings(case) if meeting[0] == names}


@pytest.mark.parametrize("field, values", [
    ("c", CHANNELS), ("n", (1, 2, 3)), ("h", cases.HEIGHTS), ("w", cases.WIDTHS), ("kh", (1, 3, 5, 7, 9, 11)),
    ("kw", (1, 3, 5, 7, 9, 11)), ("x", cases.LAYOUTS), ("dy", cases.LAYOUTS), ("weight", cases.WEIGHT_LAYOUTS),
    ("bias", cases.BIAS_LAYOUTS), ("cut", cases.CUTS), ("order", cases.ORDERS), ("h < kh", (False, True)),
    ("w < kw", (False, True)), ("whole blocks", (False, True)),
], ids=str)  # fmt: skip
def test_the_cover_has_every_value_in_every_dtype(field, values):
    assert met(field, "dtype") == set(itertools.product(values, DTYPES))


def test_the_cover_has_every_kernel_and_padding():
    assert met("kernel", "same") == {(k, same) for k in KERNELS for same in (True, False)} - {((1, 1), False)}
    for size, padding in (("kh", "ph"), ("kw", "pw")):
        assert met(size, padding) == {(k, p) for k in (1, 3, 5, 7, 9, 11) for p in range(k)}
    assert met("offset") == {(offset,) for offset in range(1, 16)}


def test_the_cover_runs_everything_that_is_shipped():
    """Each choice in each dtype, each choice for each size of the kernel; and strict ones in each half type."""
    ran = {(case.dtype, case.kh, case.kw, case.strict, part.choice) for case in kernel_cases() for part in case.parts()}
    of_dtype = {(dtype, strict, choice) for dtype, _, _, strict, choice in ran}
    of_size = {(kh, kw, choice) for _, kh, kw, _, choice in ran}
    for dtype, (kh, kw), strict in itertools.product(DTYPES, KERNELS, (False, True)):
        for choice in config.shipped(dtype, kh, kw, strict):
            assert (kh, kw, choice) in of_size
            if not strict:
                assert (dtype, False, choice) in of_dtype
            elif (kh, kw) == (7, 7) and dtype != "fp32":  # elsewhere, strict kernels are the ones that run anyway
                assert (dtype, True, choice) in of_dtype


def test_the_cover_cuts_every_kernel_in_every_way():
    def found(name):
        values = {}
        for choice, value in met("choice", name):
            values.setdefault(choice, set()).add(value)
        return values

    assert all(values == {0, 1} for values in found("h is odd").values())
    assert all(values == {False, True} for values in found("n > 1").values())
    for (kernel, edge, *_), values in found("chunks").items():
        assert len(values) > 1, (kernel, edge)
    for (kernel, edge, *_), values in found("strips").items():
        assert values == {1} if edge == "whole" else values >= {2, 3}, (kernel, edge)
    for (kernel, edge, *_), values in found("groups").items():
        assert 2 in values or "weight" not in kernel, (kernel, edge)
    three_chunks = {kernel for (kernel, *_), values in found("chunks").items() if 3 in values}
    assert three_chunks == {kernel for kernel, *_ in found("chunks")}


def met_in(found, *names):
    return {meeting[1:] for case in found for meeting in cases.geometry_meetings(case) if meeting[0] == names}


def test_the_cover_of_other_geometries_runs_everything_that_is_shipped_for_them():
    ran = {(case.kh, case.kw, part.choice) for case in geometry_cases() for part in case.parts()}
    of_kernel = {(choice.kernel, choice.edge, choice.block_w, choice.cached) for _, _, choice in ran}
    for kh, kw, stride, dilation in GEOMETRIES:
        if (kh, kw, stride, dilation) in STRIDED:
            assert {choice for *_, choice in ran} >= set(config.pick_strided(stride))
            continue
        spread = config.dilation_of(kh, kw, dilation)
        shipped = {choice for strict in (False, True) for choice in config.shipped("bf16", kh, kw, strict, spread)}
        assert of_kernel >= {(choice.kernel, choice.edge, choice.block_w, choice.cached) for choice in shipped}
        assert any(choice in shipped for *size, choice in ran if size == [kh, kw])
    kinds = [(True, False, False), (False, True, False), (False, False, True)]
    for name, (dtype, kind) in itertools.product(("fwd", "bwd_weight"), itertools.product(DTYPES, kinds)):
        kernel = f"_depthwise_{name}_strided_kernel" if kind[0] else f"_depthwise_{name}_kernel"
        assert (kernel, kind, dtype) in met_in(geometry_cases(), "kernel", "kind", "dtype")
    uneven = {value for kind, value in met_in(geometry_cases(), "kind", "uneven") if kind == kinds[1]}
    assert uneven == set(itertools.product((False, True), repeat=2))
