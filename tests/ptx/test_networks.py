"""A training step of whole networks on what was compiled for sm_90: as close to fp32 as PyTorch's own operators."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

import convnext_fast
import dwconv_kernels as dk
from dwconv_kernels import runtime
from tests.ptx.driver import emulated

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(runtime.INTERPRETER, reason="TRITON_INTERPRET keeps kernels from being compiled"),
]


def step(network, images, autocast: bool, backend: str) -> list[torch.Tensor]:
    """Logits, and the gradients of all parameters."""
    network.zero_grad()
    with dk.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = network(images).float()
    F.cross_entropy(logits, torch.arange(len(images))).backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_training_step(name):
    torch.manual_seed(0)
    network = convnext_fast.create_model(name, num_classes=1000).to(memory_format=torch.channels_last)
    with torch.no_grad():  # a layer scale of 1e-6 hides the blocks, as zeros in GRN do
        for key, parameter in network.named_parameters():
            if key.endswith("gamma") or "grn" in key:
                parameter.uniform_(0.1, 0.3)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    exact = step(network, images, False, "torch")
    peer = step(network, images, True, "torch")
    with emulated(90) as launches:
        ours = step(network, images, True, "triton")
    assert {"_depthwise_fwd_stream_kernel", "_block_out_kernel", "_depthwise_bwd_weight_stream_kernel"} <= set(launches)
    logits, gradients = distances(ours, exact)
    logits_of_peer, gradients_of_peer = distances(peer, exact)
    assert logits <= 1.2 * logits_of_peer
    assert gradients <= 1.2 * gradients_of_peer


def distances(results: list[torch.Tensor], exact: list[torch.Tensor]) -> tuple[float, float]:
    """Norms of what logits are off by, and all gradients together."""
    logits, *gradients = ((a - e).norm() for a, e in zip(results, exact, strict=True))
    return logits.item(), torch.stack(gradients).norm().item()
