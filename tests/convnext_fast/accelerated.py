"""How a network is compared with itself, before and after :func:`convnext_fast.accelerate`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import convnext_fast
import dwconv_kernels as dk

Outputs = Callable[[nn.Module, Tensor], list[Tensor]]


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors that a network of any library returns."""
    y = model(x)
    if isinstance(y, Tensor):
        return [y]
    if hasattr(y, "keys"):  # Hugging Face's, a dictionary
        y = [y["logits"]] if "logits" in y else [y[name] for name in y if name in ("last_hidden_state", "feature_maps")]
    return [t for part in y for t in (part if isinstance(part, (list, tuple)) else [part])]


def outputs_and_gradients(model: nn.Module, x: Tensor, outputs: Outputs = outputs_of) -> list[Tensor]:
    """Outputs, and the gradients of x and of every parameter of a loss that weights every output differently."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)  # for what is drawn in training
    ys = outputs(model, x)
    g = torch.Generator().manual_seed(9)
    model.zero_grad(set_to_none=True)
    sum((y * torch.randn(y.shape, generator=g)).sum() for y in ys).backward()
    gradients = [t.grad for t in (x, *model.parameters()) if t.requires_grad]
    model.zero_grad(set_to_none=True)
    return [*(y.detach() for y in ys), *gradients]


def assert_all_close(actual: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-5) -> None:
    """Each within ``tolerance`` of its largest expected value; at least one of them is not zero."""
    assert len(actual) == len(expected)
    assert any(e is not None and e.abs().max() > 0 for e in expected), "all zero, which proves nothing"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), f"{i}: one is None"
        if e is None:
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype), f"{i}: {a.shape} {a.dtype}, not {e.shape} {e.dtype}"
        error = (a - e).abs().max().item()
        assert error <= tolerance * e.abs().max().item() + 1e-30, f"{i}: {error:.2e} of {e.abs().max().item():.2e}"


def assert_unchanged(
    model: nn.Module, x: Tensor, blocks: int, outputs: Outputs = outputs_of, tolerance: float = 1e-5, **settings
) -> convnext_fast.AccelerateReport:
    """Accelerated, ``model`` computes what it did, on the operators; restored, to the bit. Returns the report."""
    state, parameters = list(model.state_dict()), list(model.parameters())
    expected = outputs_and_gradients(model, x, outputs)
    report = convnext_fast.accelerate(model, **settings)
    assert len(report.swapped) == blocks, report
    assert list(model.state_dict()) == state
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with dk.backend("torch"):
        assert_all_close(outputs_and_gradients(model, x, outputs), expected, tolerance)
    assert len(convnext_fast.restore(model)) >= blocks
    restored = outputs_and_gradients(model, x, outputs)
    assert all(a is b or torch.equal(a, b) for a, b in zip(restored, expected, strict=True))
    return report
