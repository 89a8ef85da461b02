"""Proofs of single cases in processes of their own; these import neither pytest nor the tests.

Under pytest-xdist its workers are those processes, and each proof is made by the worker that has its test.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from tests import block_proofs, depthwise_proofs, norm_linear_proofs
from tests.block_cases import BlockCase
from tests.cases import KernelCase
from tests.norm_linear_cases import NormLinearCase


class Proof(NamedTuple):
    """What is to be proved of a case, and where."""

    kind: str  # "exact" or "rounding"
    case: KernelCase | NormLinearCase | BlockCase
    device: str
    mean: float = 0.0  # of x, for "rounding" of a convolution; other cases have their own

    def __str__(self) -> str:
        case, mean = self.case, self.mean
        if isinstance(case, BlockCase):
            return f"{self.kind}-{case}-{case.x}-{case.dout}-{case.parameters}"
        if isinstance(case, NormLinearCase):
            given, mean = "".join(str(int(given)) for given in case.given), case.mean
            layouts = f"{case.x}-{case.dy}-{case.parameters}-{given}-{case.offset}-sums{case.group}"
        else:
            layouts = f"{case.x}-{case.dy}-{case.weight}-{case.bias}"
        return f"{self.kind}-{case}-{layouts}" + f"-mean{mean:g}" * (self.kind == "rounding")


def prove(proof: Proof) -> None:
    """
    Raises:
        AssertionError: something is not right.
    """
    families = {KernelCase: depthwise_proofs, NormLinearCase: norm_linear_proofs, BlockCase: block_proofs}
    proofs = families[type(proof.case)]
    with without_tf32():
        if proof.kind == "exact":
            proofs.prove_exact(proof.case, proof.device)
        else:
            mean = [proof.mean] if proofs is depthwise_proofs else []
            proofs.prove_rounding(proof.case, *mean, device=proof.device)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def proving(selected: Sequence[Proof]) -> Iterator[Callable[[Proof], None]]:
    """Starts all proofs; yields what waits for one of them and raises what went wrong."""
    jobs = _jobs(selected)
    if jobs <= 1:
        yield prove
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        futures = {proof: pool.submit(prove, proof) for proof in selected}
        yield lambda proof: futures[proof].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(selected: Sequence[Proof]) -> int:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return 1
    jobs = min(12, len(selected) // 4, max(1, (os.cpu_count() or 1) - 2))
    if selected and selected[0].device != "cpu":  # a process takes half a gigabyte before it has done anything
        jobs = min(jobs, torch.cuda.mem_get_info()[0] // 2**31)
    return jobs
