"""What the GPU lane stands on, where no GPU is: how its work is shared out, and that expected values are what they say.

Not part of ``pytest -m gpu``.
"""

import os
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dwconv_kernels import runtime
from tests import block_proofs, depthwise_proofs, norm_linear_proofs
from tests.block_cases import BlockCase
from tests.cases import KernelCase
from tests.gpu import conftest, workers
from tests.gpu.workers import Proof
from tests.norm_linear_cases import NormLinearCase

DEPTHWISE = KernelCase("bf16", 1, 3, 4, 5, 3, 3, 1, 1)
BLOCK = BlockCase("bf16", 8, 192, 2, 3, 24, 1, 1, row_scale=True)
needs_launchers = pytest.mark.skipif(not runtime.has_kernels("depthwise"), reason="Triton is not installed")


# How the work is shared out


def test_workers_of_xdist_start_no_processes(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    proofs = [Proof("exact", DEPTHWISE, "cpu")] * 100
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert workers._jobs(proofs) == 12
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert workers._jobs(proofs) == 1


@pytest.mark.parametrize("given, then", [(None, 1), (5, 5)])
def test_workers_of_xdist_are_given_few_tests_at_a_time(given, then, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    config = SimpleNamespace(option=SimpleNamespace(maxschedchunk=given))
    conftest.pytest_configure(config)
    assert config.option.maxschedchunk == then
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace()))  # without xdist


def test_what_is_not_usual_is_full():
    proofs = [Proof("exact", DEPTHWISE._replace(n=n), "cpu") for n in range(1, 5)]
    found = conftest.parameters([proofs[2], proofs[0], proofs[2]], proofs)
    assert [p.values[0] for p in found] == [proofs[2], proofs[0], proofs[1], proofs[3]]
    assert [[mark.name for mark in p.marks] for p in found] == [[], [], ["full"], ["full"]]
    assert [p.id for p in found] == [str(p.values[0]) for p in found]


@pytest.mark.parametrize("case, proofs, mean", [
    (DEPTHWISE, depthwise_proofs, (3.0,)), (BLOCK, block_proofs, ()),
    (NormLinearCase("bf16", (3,), 8, 8), norm_linear_proofs, ()),
], ids=["depthwise", "block", "norm_linear"])  # fmt: skip
def test_a_proof_is_made_by_its_family(case, proofs, mean, monkeypatch):
    made = []
    monkeypatch.setattr(proofs, "prove_exact", lambda *given: made.append(given))
    monkeypatch.setattr(proofs, "prove_rounding", lambda *given, device: made.append((*given, device)))
    for kind in ("exact", "rounding"):
        workers.prove(Proof(kind, case, "cpu", 3.0))
    assert made == [(case, "cpu"), (case, *mean, "cpu")]


# What is expected


def expected(case):
    """Values by name, as they are in results' dtypes."""
    tensors, dout, _, rows = block_proofs.integer_operands(case)
    found = block_proofs.Expected(case, tensors, dout, rows)
    return found, {name: value.to(block_proofs.DTYPES[case.dtype]) for name, (value, _, _) in found.values.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("offset", [6, 7, 8])
def test_operands_for_eight_images(offset, dtype):
    found, values = expected(BLOCK._replace(dtype=dtype, offset=offset))
    found.check(values)
    assert len(found.factors) == BLOCK.rows


@pytest.mark.parametrize("c, exact", [(512, True), (1024, False)])
def test_what_is_exact_of_many_channels(c, exact):
    """Of 1024, the gradient of the norm is not exact in fp32, and its bound holds for what is off by its last bit."""
    found, values = expected(BLOCK._replace(dtype="fp32", n=2, c=c, layer_scale=False, grn=False))
    dx = values["dx"]
    found.check({"dx": dx})
    magnitude = found.values["dx"][1]
    place = tuple((magnitude == magnitude.max()).nonzero()[0])
    dx[place] = torch.nextafter(dx[place], dx.new_tensor(torch.inf))
    if exact:
        with pytest.raises(AssertionError, match="dx: 1 of"):
            found.check({"dx": dx})
    else:
        found.check({"dx": dx})
        dx[place] += 1
        with pytest.raises(AssertionError, match="dx: an element"):
            found.check({"dx": dx})


@needs_launchers
def test_what_is_refused_is_not_passed_over(monkeypatch):
    launch = runtime.launchers("depthwise")
    if launch.tensor is None:
        pytest.skip(launch._NO_GLUON)
    with depthwise_proofs.cut("tensor whole"):
        pass
    monkeypatch.setitem(launch.tensor._refusals, launch.tensor._LARGE, "Triton 0 does not compile it")
    with pytest.raises(AssertionError, match="Triton 0"), depthwise_proofs.cut("tensor whole"):
        pass
    with depthwise_proofs.cut("whole"):
        pass
    monkeypatch.setattr(launch, "tensor", None)
    monkeypatch.setattr(launch, "_NO_GLUON", "another Gluon", raising=False)
    with pytest.raises(AssertionError, match="another Gluon"), depthwise_proofs.cut("tensor whole"):
        pass


def test_where_cudnn_has_nothing_pytorch_computes_it(monkeypatch):
    inputs, dy = depthwise_proofs.operands(DEPTHWISE, torch.randn)
    wanted = depthwise_proofs.by_pytorch(DEPTHWISE, inputs, dy)
    asked = []

    def convolution(*tensors, **settings):
        asked.append(torch.backends.cudnn.enabled)
        if asked[-1]:
            raise RuntimeError("Unable to find an engine to execute this computation")
        return original(*tensors, **settings)

    original = F.conv2d
    monkeypatch.setattr(F, "conv2d", convolution)
    found = depthwise_proofs.by_pytorch(DEPTHWISE, inputs, dy)
    assert asked == [True, False]
    assert torch.backends.cudnn.enabled
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_truncation_in_sums_is_allowed():
    """Much less than truncation of results, which is √(3/4)·√numel standard errors."""
    result = torch.empty(500)
    assert depthwise_proofs.sigmas(DEPTHWISE, result) == 5
    assert 6 < depthwise_proofs.sigmas(DEPTHWISE._replace(cut="tensor whole"), result) < 0.5 * 500**0.5
    assert norm_linear_proofs.SIGMAS["y"] + norm_linear_proofs.CUT_OFF * 500**0.5 < 0.5 * 500**0.5


def test_ratios_of_fp32_on_a_gpu():
    assert depthwise_proofs.fp32_ratios(SimpleNamespace(is_cuda=True), (1.5, 2)) == (3, 4)
    assert depthwise_proofs.fp32_ratios(torch.empty(1), (1.5, 2)) == (1.5, 2)
