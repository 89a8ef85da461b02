"""The comparisons themselves: each must fail on the mistake that it is for."""

import math

import pytest
import torch

from dwconv_kernels import testing


def test_exact_sees_one_wrong_element_nan_and_shape():
    expected = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    testing.assert_exact(expected.float(), expected)
    for wrong in (expected.float() + torch.eye(3, 4) * 1e-5, expected.float().fill_(math.nan)):
        with pytest.raises(AssertionError, match="elements are wrong, the first at"):
            testing.assert_exact(wrong, expected)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_exact(expected.float().unsqueeze(-1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_componentwise_takes_rounding_and_sees_truncation_of_a_term(dtype):
    torch.manual_seed(0)
    terms = torch.randn(200, 49, dtype=torch.float64)
    exact, magnitude = terms.sum(1), terms.abs().sum(1)
    testing.assert_componentwise(exact.to(dtype), exact, magnitude, 49)
    with pytest.raises(AssertionError, match="times its rounding bound"):
        testing.assert_componentwise(terms[:, 1:].sum(1).to(dtype), exact, magnitude, 49)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_componentwise(exact.to(dtype), exact.view(-1, 1), magnitude, 49)


def test_no_worse_and_unbiased_see_truncation():
    exact = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = exact.bfloat16()
    truncated = (exact.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    testing.assert_no_worse(rounded, rounded, exact, 1.05, 1.25)
    testing.assert_unbiased(rounded, exact)
    with pytest.raises(AssertionError, match="rms error"):
        testing.assert_no_worse(truncated, rounded, exact, 1.05, 1.25)
    with pytest.raises(AssertionError, match="biased"):
        testing.assert_unbiased(truncated, exact)
    testing.assert_no_worse(rounded[:0], rounded[:0], exact[:0], 1, 1)


def test_layouts_hold_the_same_values_in_different_strides():
    x = torch.randn(2, 3, 4, 5)
    layouts = testing.in_layouts(x)
    assert len({(t.stride(), t.storage_offset()) for t in layouts.values()}) == len(layouts)
    assert all(torch.equal(t, x) for t in layouts.values())
