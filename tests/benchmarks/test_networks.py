"""Networks as they are timed: who gets which layout, backend and compiler, and what a step consists of."""

import pytest
import torch

import convnext_fast
import dwconv_kernels as dk
from benchmarks import headline, networks
from benchmarks.contest import Wrong
from benchmarks.machine import Machine
from benchmarks.networks import NetworkCase

TRAINING = NetworkCase("convnext_atto", 32, 2, "fp32", training=True)
INFERENCE = TRAINING._replace(training=False)
OURS_AND_PYTORCH = ("ours", "ours_compile", "channels_last", "compile", "eager")


@pytest.fixture
def compiled(monkeypatch):
    """What was given to torch.compile, which then leaves it as it is."""
    found = []

    def compile(network, **options):
        found.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile)
    return found


def calls_of(case, provider, monkeypatch):
    """(images, backend, training, grad mode) of each call of a provider's network."""
    seen = []
    original = networks._network

    def network(*arguments):
        module, backend = original(*arguments)
        module.register_forward_pre_hook(
            lambda module, inputs: seen.append(
                (inputs[0], dk.current_backend(), module.training, torch.is_grad_enabled())
            )
        )
        return module, backend

    with monkeypatch.context() as patch:
        patch.setattr(networks, "_network", network)
        entry = networks.contest(case, (provider,)).begin(Machine("cpu"))(provider)
    return entry, seen


@pytest.mark.parametrize("provider", OURS_AND_PYTORCH)
@pytest.mark.parametrize("case", [TRAINING, INFERENCE], ids=["training", "inference"])
def test_layout_backend_and_mode(case, provider, monkeypatch, compiled):
    with dk.backend("reference"):
        entry, seen = calls_of(case, provider, monkeypatch)
        entry.timed.run()
    assert len(seen) >= 4
    for images, backend, training, gradients in seen:
        assert images.is_contiguous(memory_format=torch.contiguous_format) == (provider == "eager")
        assert images.is_contiguous(memory_format=torch.channels_last) == (provider != "eager")
        assert backend == ("reference" if provider.startswith("ours") else "torch")
        assert training == gradients == case.training
    assert len(compiled) == provider.endswith("compile")
    assert entry.facts["images"] == 2
    assert entry.facts["error"] < 1e-5


def test_peers_of_timm(monkeypatch, compiled):
    pytest.importorskip("timm")
    for provider in ("timm", "timm_compile", "ours_timm"):
        entry, seen = calls_of(INFERENCE, provider, monkeypatch)
        assert entry.facts.get("ran") == ("torch" if provider.startswith("ours") else None)
        assert entry.facts["error"] < 1e-5
        assert seen[0][0].is_contiguous(memory_format=torch.channels_last)
    assert len(compiled) == 1


def test_other_families_have_no_floor(monkeypatch, compiled):
    pytest.importorskip("timm")
    entry, _ = calls_of(INFERENCE._replace(size=64), "resnet50", monkeypatch)
    assert len(compiled) == 1
    assert entry.facts["fraction_of_floor"] is None
    assert entry.facts["images"] == 2


def test_without_timm_there_is_a_reason(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(networks.Unavailable, match="timm is not installed"):
        networks.contest(INFERENCE, ("timm",)).begin(Machine("cpu"))("timm")


@pytest.mark.parametrize("provider", networks.MODES)
def test_cuda_graphs_of_torch_compile_are_for_gpus(provider):
    assert provider in headline.GRAPHS
    with pytest.raises(networks.Unavailable, match="is for GPUs"):
        networks.contest(INFERENCE, (provider,)).begin(Machine("cpu"))(provider)


@pytest.mark.parametrize(("provider", "mode"), networks.MODES.items())
def test_modes_of_torch_compile(provider, mode, compiled):
    class Cuda:
        is_cuda = True

    networks._compiled(torch.nn.Identity(), provider, Cuda())
    assert compiled == [{"mode": mode, "dynamic": False}]


def test_a_wrong_network_has_no_speed(monkeypatch):
    """One block without its branch."""
    original = networks._network

    def network(*arguments):
        module, backend = original(*arguments)
        with torch.no_grad():
            module.stages[2][3].gamma.zero_()
        return module, backend

    monkeypatch.setattr(networks, "_network", network)
    for dtype in ("fp32", "bf16"):
        case = INFERENCE._replace(size=64, dtype=dtype)
        monkeypatch.setattr(networks, "state_of", strong)
        prepare = networks.contest(case, ("ours",)).begin(Machine("cpu"))
        with pytest.raises(Wrong, match="its logits are"):
            prepare("ours")


def strong(model):
    """Parameters of a network in which each block matters."""
    state = dict(_state_of(model))
    return {name: value * 5 if name.endswith("gamma") else value for name, value in state.items()}


_state_of = networks.state_of


def test_a_training_step_is_forward_backward_and_optimizer(monkeypatch):
    steps, stepped = [], torch.optim.AdamW.step

    def step(optimizer, *arguments, **options):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        steps.append(sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) / len(gradients))
        return stepped(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    networks_made = []
    original = networks._network
    monkeypatch.setattr(networks, "_network", lambda *a: networks_made.append(original(*a)) or networks_made[-1])
    entry = networks.contest(TRAINING, ("ours",)).begin(Machine("cpu"))("ours")
    before = len(steps)
    entry.timed.run()
    assert len(steps) == before + 1
    assert min(steps) > 0.95
    parameters = list(networks_made[0][0].parameters())
    assert all(parameter.grad is None for parameter in parameters)
    # It stays the same network, however many rounds there are.
    same = convnext_fast.create_model("convnext_atto")
    same.load_state_dict(networks.state_of("convnext_atto"))
    for parameter, expected in zip(parameters, same.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-8)


def test_networks_stand_on_all_operators():
    contest = networks.contest(TRAINING)
    assert contest.needs_of("ours") == ("depthwise", "norm_linear", "block", "training")
    assert contest.needs_of("ours_timm") == (*contest.needs, "accelerate")


def test_bytes_of_every_layer():
    """Of stem, downsampling and head: what goes in, what comes out, and the weights of their matrix products."""
    case = INFERENCE._replace(size=64)
    network, found = convnext_fast.create_model("convnext_atto"), {}

    def count(name, module):
        def hook(module, inputs, output):
            weights = sum(p.numel() for p in module.parameters() if p.ndim > 1)
            found[name] = inputs[0].numel() + output.numel() + weights

        module.register_forward_hook(hook)

    for i in range(4):
        count(f"down {i}", network.downsample_layers[i])
    count("head", network.head)
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
    costs = [cost.bytes for cost in networks.network_costs(case)]
    starts = [0, 3, 6, 13]  # of the stages, two blocks each and six in the third
    assert [costs[place] for place in starts] == [4 * found[f"down {i}"] for i in range(4)]
    pooled = 2 * 320  # the head is counted from the last map on, which has more pixels than one
    assert costs[-1] == 4 * (found["head"] - pooled + 2 * 320 * 2 * 2)
