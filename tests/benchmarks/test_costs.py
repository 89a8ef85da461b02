"""Bytes and FLOPs that the benchmarks count with, against tensors and products that are counted."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import convnext_fast
from benchmarks import networks, probes
from benchmarks.machine import bytes_of
from benchmarks.networks import NetworkCase
from benchmarks.operators import BLOCK_PARAMETERS, OPERATORS, Case

CASES = [
    Case(2, 8, 9, 7, "bf16", (7, 7)),
    Case(1, 4, 5, 6, "fp32", (13, 13)),  # more beside the map than in it
    Case(3, 5, 8, 8, "fp16", (3, 5)),
]


def products(case: Case) -> int:
    """Counted: of ones, each output is the number of products that it is made of."""
    ones = torch.ones(case.n, case.c, case.h, case.w, dtype=torch.float64)
    taps = torch.ones(case.c, 1, *case.kernel, dtype=torch.float64)
    return int(F.conv2d(ones, taps, padding=tuple(k // 2 for k in case.kernel), groups=case.c).sum())


def tensors_of(suite: str, case: Case):
    """What a pass has to read and write, as tensors."""
    operator = next(operator for operator in OPERATORS.values() if suite in operator.passes)
    inputs = operator.inputs(case, torch.device("cpu"))
    dy = inputs.pop("dy")
    y = operator.providers["eager"](case)(**inputs)
    assert y.shape == dy.shape
    assert y.dtype == dy.dtype == inputs["x"].dtype
    return list(inputs.values()), dy, y, inputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_depthwise(case):
    _, dy, y, inputs = tensors_of("depthwise_forward", case)
    passes = OPERATORS["depthwise"].passes
    count = 2 * products(case)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    assert passes["depthwise_forward"].cost(case) == (bytes_of([x, weight, bias, y]), count)
    assert passes["depthwise_input_gradient"].cost(case) == (bytes_of([dy, weight, torch.empty_like(x)]), count)
    gradients = [torch.empty_like(weight), torch.empty_like(bias)]
    assert passes["depthwise_weight_gradient"].cost(case) == (bytes_of([dy, x, *gradients]), count)


@pytest.mark.parametrize("operator", ["layer_norm_linear", "block"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_training(operator, case):
    operands, dy, y, inputs = tensors_of(f"{operator}_forward", case)
    passes = next(row.passes for row in OPERATORS.values() if f"{operator}_forward" in row.passes)
    forward, training = passes[f"{operator}_forward"], passes[f"{operator}_training"]
    moved = bytes_of([*operands, y])
    assert forward.cost(case).bytes == moved
    # All gradients are as large as what they are of.
    assert set(training.gradients) == set(inputs)
    assert training.cost(case).bytes == moved + bytes_of([*operands, dy]) + bytes_of(operands)
    with FlopCounterMode(display=False) as counter:
        OPERATORS["norm_linear" if operator != "block" else "block"].providers["eager"](case)(**inputs)
    counted = counter.get_total_flops()
    if operator == "block":  # PyTorch's counter also counts what lies beside the map
        beside = case.n * case.c * case.h * case.w * case.kernel[0] * case.kernel[1] - products(case)
        counted -= 2 * beside
    assert forward.cost(case).flops == counted
    assert training.cost(case).flops == 3 * counted


def test_every_parameter_of_the_block_has_a_gradient():
    case = Case(1, 4, 3, 3, kernel=(7, 7))
    assert [name for name in OPERATORS["block"].inputs(case, torch.device("cpu")) if name not in ("x", "dy")] == list(
        BLOCK_PARAMETERS
    )


@pytest.mark.parametrize("model", ["convnext_tiny", "convnext_atto", "convnextv2_tiny"])
def test_network(model):
    case = NetworkCase(model, 64, 2, "fp32", training=False)
    costs = list(networks.network_costs(case))
    with torch.device("meta"):
        network, images = convnext_fast.create_model(model), torch.empty(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        network(images)
    counted = counter.get_total_flops()
    flops = sum(cost.flops for cost in costs)
    # PyTorch's counter also counts products beside the map, which on maps of 2×2 are most of a 7×7 kernel's.
    assert 0.9 * counted < flops <= counted
    assert len(costs) == 4 + sum(len(stage) for stage in network.stages) + 1
    parameters = sum(p.numel() for p in network.parameters() if p.ndim > 1 and "grn" not in str(p))
    assert sum(cost.bytes for cost in costs) > 4 * 0.9 * parameters


def test_training_of_a_network():
    """Forward, backward without the images' gradient, and AdamW: four numbers read and three written per parameter."""
    forward, training = (
        list(networks.network_costs(NetworkCase("convnext_tiny", 64, 2, "amp_bf16", training)))
        for training in (False, True)
    )
    assert training[0].flops == 2 * forward[0].flops
    assert all(after.flops == 3 * before.flops for before, after in zip(forward[1:], training[1:], strict=False))
    count = sum(p.numel() for p in convnext_fast.convnext_tiny().parameters())
    assert training[-1] == (7 * 4 * count, 0)
    # The stem reads images twice, its result's gradient and the weights once, and writes its result and their gradient.
    images, maps, weights = 2 * 3 * 64**2, 2 * 96 * 16**2, 3 * 96 * 4**2
    assert forward[0].bytes == 2 * (images + maps + weights)
    assert training[0].bytes == 2 * (2 * images + 2 * maps + 2 * weights)
    # The first layer of the second stage also writes the gradient of what it reads, for which it reads weights.
    before, after, weights = 2 * 96 * 16**2, 2 * 192 * 8**2, 96 * 192 * 2**2
    assert training[4].bytes == 2 * (3 * before + 2 * after + 3 * weights)
    head, last, logits = 768 * 1000, 2 * 768 * 2**2, 2 * 1000
    assert forward[-1].bytes == 2 * (last + logits + head)
    assert training[-2].bytes == 2 * (2 * last + 2 * logits + 3 * head)


def test_network_costs_are_those_of_the_design():
    """ConvNeXt-T at 224²: 2.145 million elements of block inputs, 4.47 billion products per image."""
    costs = list(networks.network_costs(NetworkCase("convnext_tiny", 224, 1, "bf16", training=False)))
    assert sum(cost.flops for cost in costs) / 2 == pytest.approx(4.47e9, rel=0.01)
    with torch.device("meta"):
        network = convnext_fast.convnext_tiny()
    elements = sum(len(stage) * stage[0].dwconv.in_channels * (56 >> i) ** 2 for i, stage in enumerate(network.stages))
    assert elements == pytest.approx(2.145e6, rel=1e-3)


# Memory


def test_saved_bytes_counts_storage_once_and_no_parameters():
    weight = torch.randn(5, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)

    def forward():
        hidden = x @ weight.t()  # keeps x and the weight
        return (hidden.exp() * hidden.exp().detach()).sum()  # exp keeps its result, the product the other one

    kept = 3 * 4 + 3 * 5 + 3 * 5
    assert probes.saved_bytes(forward, [weight]) == 4 * kept
    assert probes.saved_bytes(forward, []) == 4 * (kept + 5 * 4)


def test_saved_bytes_of_a_view_are_those_of_its_storage():
    x = torch.randn(10, 10)
    weight = torch.randn(10, requires_grad=True)
    assert probes.saved_bytes(lambda: (x[:2] * weight).sum(), [weight]) == 400


def test_eager_block_keeps_what_the_design_says():
    """12 N elements and the statistics of the norm: x, y, the norm's result, fc1's and GELU's of four widths, fc2's."""
    case = Case(1, 16, 8, 8, "fp32", (7, 7))
    block = OPERATORS["block"]
    inputs = block.inputs(case, torch.device("cpu"))
    inputs.pop("dy")
    for value in inputs.values():
        value.requires_grad_()
    parameters = [value for name, value in inputs.items() if name != "x"]
    saved = probes.saved_bytes(lambda: block.providers["channels_last"](case)(**inputs), parameters)
    elements, pixels = case.pixels * case.c, case.pixels
    assert saved == 4 * (12 * elements + 2 * pixels)
