"""Calls that go straight to what implements an operator, and those that PyTorch's dispatcher has to see.

What runs here are definitions; which way a call takes does not depend on that.
"""

from unittest import mock

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import dwconv_kernels as dk
from dwconv_kernels import registration, runtime
from tests.dwconv_kernels.operands import block_operands

UNOBSERVED = registration.unobserved


def called_directly(function, *args) -> bool:
    """Does a call of the block's forward operator go straight to what implements it?"""
    seen = []
    with mock.patch.object(registration, "unobserved", lambda args: seen.append(UNOBSERVED(args)) or seen[-1]):
        function(*args)
    return all(seen)


def no_grad_block(*tensors):
    with torch.no_grad(), dk.backend("reference"):
        return dk.convnext_block(*tensors)


def test_plain_calls_are_direct():
    assert called_directly(no_grad_block, *block_operands((1, 4, 5, 5)))


def test_who_follows_calls_sees_the_operator():
    tensors = block_operands((1, 4, 5, 5))
    with FlopCounterMode(display=False) as counter:
        assert not called_directly(no_grad_block, *tensors)
    assert counter.get_total_flops() > 0
    for pre_dispatch in (False, True):
        graph = make_fx(lambda x: no_grad_block(x, *tensors[1:]), tracing_mode="real", pre_dispatch=pre_dispatch)(
            tensors[0]
        )
        targets = [node.target for node in graph.graph.nodes]
        assert torch.ops.dwconv_kernels.convnext_block.default in targets, (pre_dispatch, targets)
    with torch.profiler.profile() as profile:
        no_grad_block(*tensors)
    assert any("dwconv_kernels::convnext_block" in event.key for event in profile.key_averages())


def test_a_minus_sign_that_was_put_off_is_carried_out():
    tensors = block_operands((1, 4, 5, 5))
    expected = no_grad_block(-tensors[0], *tensors[1:])
    negated = torch._neg_view(tensors[0])
    assert negated.is_neg()
    assert not called_directly(no_grad_block, negated, *tensors[1:])
    assert torch.equal(no_grad_block(negated, *tensors[1:]), expected)


def test_what_does_not_change_is_found_out_once():
    """A call of an operator asks which Triton there is, which reads the metadata of installed packages."""
    for question in (runtime._why_not_triton, runtime._why_not_family):
        arguments = ("depthwise",) * (question is runtime._why_not_family)
        question(*arguments)
        with mock.patch.object(runtime, "triton_version", side_effect=AssertionError("asked again")):
            question(*arguments)


def test_a_wrong_call_is_refused_after_a_right_one():
    tensors = block_operands((2, 4, 5, 5), row_scale=True, dtype=torch.float32)
    no_grad_block(*tensors)
    for change in (
        {10: tensors[10].clone().requires_grad_()},
        {7: tensors[7].double()},
        {9: tensors[9][:2]},
        {0: tensors[0][:1]},
    ):
        changed = [change.get(i, t) for i, t in enumerate(tensors)]
        for _ in range(2):  # nor is it right when it comes again
            try:
                no_grad_block(*changed)
            except (ValueError, TypeError):
                continue
            raise AssertionError(f"let through: {list(change)}")
    with torch.autocast("cpu", torch.bfloat16):  # in which dtypes may differ
        mixed = [t.bfloat16() if i == 0 else t for i, t in enumerate(tensors)]
        no_grad_block(*mixed)
    try:
        no_grad_block(*mixed)
    except TypeError:
        return
    raise AssertionError("let through once autocast is over")


def test_batched_gradients_get_what_can_do_them():
    """Of is_grads_batched and jacobian(vectorize=True), tensors look plain, and have no memory of their own."""
    tensors = block_operands((1, 3, 4, 4), (3, 3), 5)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    with dk.backend("reference"):
        y = dk.convnext_block(*leaves)
    douts = torch.randn(2, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    (batched,) = torch.autograd.grad(y, leaves[5], douts, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, leaves[5], dout, retain_graph=True)[0] for dout in douts]
    torch.testing.assert_close(batched, torch.stack(one_by_one))
