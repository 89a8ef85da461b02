"""Launches the tensor-core kernels: tables, cutting up, grids. launch.py checks, allocates, and decides who runs.

Maps are channels_last without gaps, (N, C, H, W) tensors over memory (N, H, W, C).
"""

from __future__ import annotations

import warnings

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from .. import runtime
from . import config_tensor as config
from . import kernels_gluon, kernels_tables

if runtime.INTERPRETER:
    from ..gluon_emulator import emulate

Pair = tuple[int, int]

_LARGE, _STREAM = "_depthwise_fwd_large_kernel", "_depthwise_fwd_stream_kernel"
_GRADIENT = "_depthwise_bwd_weight_stream_kernel"
_TABLE_BLOCK_C = 16
_BLOCKS = {"BLOCK_P": 16, "BLOCK_C": 32}


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, y: Tensor, flip: bool, residual: Tensor | None = None
) -> None:
    """Fills y (N, C, OH, OW) with x convolved with the weight, or the weight turned around, plus ``residual``."""
    weight, padding = _taps_in_reach(x, weight, padding, y, flip)
    (n, c, h, w), (oh, ow), (kh, kw) = x.shape, y.shape[2:], weight.shape[2:]
    arch = runtime.arch(x)
    choice = config.pick_forward(kh, kw, arch, _vectors(x, y, residual), residual is not None)
    p = choice.patches
    blocks = -(-c // choice.block_c)
    with runtime.on_device(x):
        table, table_bias = _table(x, weight, bias, flip, p, blocks * choice.block_c)
        if isinstance(choice, config.Large):
            _convolve_large(x, table, table_bias, residual, padding, y, choice)
            return
        strips = -(-ow // p.T)
        tiles = -(-n * strips // 16)
        rows, several = config.cut_stream(arch, tiles, blocks, oh, p.R, p.groups)
        grid = blocks * -(-oh // rows) * -(-tiles // several)
        _run(
            kernels_gluon._depthwise_fwd_stream_kernel, grid,
            x, table, table_bias, y if residual is None else residual, y,
            n, h, w, oh, ow, *padding, rows, strips, tiles, several,
            **choice.constants(c), HAS_RESIDUAL=residual is not None,
        )  # fmt: skip


def _taps_in_reach(x: Tensor, weight: Tensor, padding: Pair, y: Tensor, flip: bool) -> tuple[Tensor, Pair]:
    """The weight without taps that are off the map for every output, where that makes it a smaller kernel."""
    kernel = tuple(weight.shape[2:])
    used = config.used_taps(kernel, padding, x.shape[2:], y.shape[2:])
    for k, (first, end) in enumerate(used):
        weight = weight.narrow(2 + k, kernel[k] - end if flip else first, end - first)
    return weight, tuple(p - first for p, (first, _) in zip(padding, used, strict=True))


def _convolve_large(
    x: Tensor, table: Tensor, bias: Tensor, residual: Tensor | None, padding: Pair, y: Tensor, choice: config.Large
) -> None:
    (n, c, h, w), (oh, ow), p = x.shape, y.shape[2:], choice.patches
    channel_blocks = table.shape[1] // choice.block_c
    # Windows begin at blocks: the map begins within one.
    (shift_h, above), (shift_w, left) = divmod(padding[0], p.R), divmod(padding[1], p.T)
    hb, wb = -(-(h + above) // p.R), -(-(w + left) // p.T)
    maps = torch.empty((n, hb, wb, table.shape[1], 8), dtype=x.dtype, device=x.device)
    positions = -(-n * hb * wb // _BLOCKS["BLOCK_P"])
    kernels_tables._depthwise_blocks_kernel[(positions * -(-table.shape[1] // _BLOCKS["BLOCK_C"]),)](
        x, maps, n, h, w, hb, wb, above, left, C=c, R=p.R, **_BLOCKS, num_warps=4, num_stages=1,
    )  # fmt: skip
    columns = -(-ow // (2 * choice.strips * p.T)) * 2
    grid = channel_blocks * -(-oh // (choice.patch_rows * p.R)) * -(-n * columns // 16)
    _run(
        kernels_gluon._depthwise_fwd_large_kernel, grid,
        maps, table, bias, y if residual is None else residual, y,
        n, hb, wb, oh, ow, shift_h, shift_w, columns, p.pairs,
        **choice.constants(c), HAS_RESIDUAL=residual is not None,
    )  # fmt: skip


def weight_gradient(dy: Tensor, x: Tensor, kernel: Pair, padding: Pair, dw: Tensor | None, db: Tensor | None) -> None:
    """Fills dw (C, 1, KH, KW) and db (C,), each unless it is None."""
    used = config.used_taps(kernel, padding, x.shape[2:], dy.shape[2:], config.CUTS[:1])
    padding = tuple(p - first for p, (first, _) in zip(padding, used, strict=True))
    if dw is not None and any(end - first < k for k, (first, end) in zip(kernel, used, strict=True)):
        dw.zero_()  # the others, which no output needs
        for k, (first, end) in enumerate(used):
            dw = dw.narrow(2 + k, first, end - first)
    kernel = tuple(end - first for first, end in used)
    (n, c, h, w), (oh, ow), (kh, kw) = x.shape, dy.shape[2:], kernel
    arch = runtime.arch(x)
    choice = config.pick_backward_weight(kh, kw, _vectors(x, dy))
    p, constants = choice.patches, choice.constants(c)
    pairs = constants["PAIRS"]
    blocks = -(-c // choice.block_c)
    padded = blocks * choice.block_c
    strips = -(-ow // p.T)
    tiles = -(-n * strips // 16)
    rows, jobs = config.cut_weight(arch, tiles, blocks * choice.column_groups, oh, p.R, p.groups)
    parts = -(-tiles * -(-oh // rows) // jobs)
    with runtime.on_device(x):
        shape = (parts, choice.column_groups, pairs * p.groups + 1, padded, 128)
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
        _run(
            kernels_gluon._depthwise_bwd_weight_stream_kernel, parts * choice.column_groups * blocks,
            x, dy, sums, n, h, w, oh, ow, *padding, rows, strips, tiles, jobs,
            COLUMN_GROUPS=choice.column_groups, **constants,
        )  # fmt: skip
        sums = sums[0] if parts == 1 else sums.sum(0)
        kernels_tables._depthwise_diagonals_kernel[((kh * kw + 1) * -(-c // _TABLE_BLOCK_C),)](
            sums, db if dw is None else dw, dw if db is None else db, int(dw is not None), int(db is not None),
            c, padded, pairs, p.groups, kh, kw, p.log_r,
            *((0, 0, 0) if dw is None else (dw.stride(0), dw.stride(2), dw.stride(3))),
            BLOCK_C=_TABLE_BLOCK_C, num_warps=1, num_stages=1,
        )  # fmt: skip


def _table(
    x: Tensor, weight: Tensor, bias: Tensor | None, flip: bool, p: config.Patches, padded: int
) -> tuple[Tensor, Tensor]:
    """The second factors of all products, in x's dtype, and the bias, fp32, for ``padded`` channels."""
    c, _, kh, kw = weight.shape
    count = p.pairs * p.groups
    table = torch.empty((count, padded, 128), dtype=x.dtype, device=x.device)
    table_bias = torch.empty((padded,), dtype=torch.float32, device=x.device)
    kernels_tables._depthwise_fragments_kernel[(count * -(-padded // _TABLE_BLOCK_C),)](
        weight, weight if bias is None else bias, table, table_bias,
        int(bias is not None), int(flip), c, padded, p.groups, kh, kw,
        weight.stride(0), weight.stride(2), weight.stride(3), 0 if bias is None else bias.stride(0),
        p.log_r, BLOCK_C=_TABLE_BLOCK_C, num_warps=4, num_stages=1,
    )  # fmt: skip
    return table, table_bias


def _vectors(*maps: Tensor | None) -> bool:
    """Can all of them be read and written 8 channels at once?"""
    return all(m is None or (m.shape[1] % 8 == 0 and m.data_ptr() % 16 == 0) for m in maps)


class Refused(Exception):
    """This version of Triton does not compile a kernel, and does not from now on."""


_refusals: dict[str, str] = {}  # by the kernel's name


def why_refused(kh: int, kw: int) -> str | None:
    """Why Triton compiles a kernel for KH × KW not; None as long as that has not happened."""
    forward = _LARGE if isinstance(config.pick_forward(kh, kw, 90), config.Large) else _STREAM
    return _refusals.get(forward) or _refusals.get(_GRADIENT)


def _run(kernel, programs: int, *args, **constants) -> None:
    if runtime.INTERPRETER:
        emulate(kernel, programs, *args, **constants)
        return
    name = kernel.fn.__name__
    if name in _refusals:
        raise Refused(_refusals[name])
    try:
        kernel[(programs,)](*args, **constants, **config.options(constants))
    except Exception as error:
        if not _is_of_the_compiler(error):
            raise
        text = str(error).strip().splitlines() or [""]
        _refusals[name] = f"Triton {triton.__version__} does not compile {name}: {text[-1]}"
        warnings.warn(f"{_refusals[name]}; other kernels, or PyTorch's, take its place", stacklevel=2)
        raise Refused(_refusals[name]) from error


def _is_of_the_compiler(error: Exception) -> bool:
    # Passes of the compiler raise nothing more special, and neither do errors of a GPU.
    return isinstance(error, (TritonError, NotImplementedError)) or "PassManager" in str(error)
