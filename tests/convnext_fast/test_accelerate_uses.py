"""What people do to an accelerated network: compile, export, trace, checkpoint, average, quantise, fine-tune."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import convnext_fast
import dwconv_kernels as dk

from .accelerated import assert_all_close, outputs_and_gradients
from .networks import CLASSIFIERS, DEPTHS, huggingface, images, randomise, timm, torchvision
from .test_accelerate import BLOCKS, operators_of

NAMES = ("original", "timm-conv", "timm-v2-linear", "torchvision", "huggingface-v2")
each_library = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def accelerated(name, **settings):
    model = randomise(CLASSIFIERS[name][2]())
    convnext_fast.accelerate(model, **settings)
    return model


def tensor_of(y):
    return y if isinstance(y, torch.Tensor) else y.logits


@each_library
@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.full), "reference"])
def test_compile_the_whole_network(name, backend):
    torch._dynamo.reset()
    model = accelerated(name)
    with dk.backend(backend):
        expected = outputs_and_gradients(model, images(2, 64, 64))
        compiled = torch.compile(model, fullgraph=name != "huggingface-v2", backend="aot_eager")
        assert_all_close(outputs_and_gradients(compiled, images(2, 64, 64)), expected, 1e-4)


def test_compiled_before_accelerate_and_restored_after():
    """Dynamo notices that the classes of modules changed."""
    torch._dynamo.reset()
    model = randomise(timm())
    seen = []

    def backend(graph, _):
        seen.append(sum("convnext_block" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with dk.backend("reference"), torch.no_grad():
        expected = compiled(images(2, 64, 64))
        report = convnext_fast.accelerate(compiled)
        assert report.swapped[0][0] == "_orig_mod.stages.0.blocks.0"
        torch.testing.assert_close(compiled(images(2, 64, 64)), expected, rtol=1e-4, atol=1e-4)
        convnext_fast.restore(compiled)
        torch.testing.assert_close(compiled(images(2, 64, 64)), expected)
    assert seen == [0, BLOCKS] or seen == [0, BLOCKS, 0]


def test_compile_with_drop_path_and_dynamic_sizes():
    torch._dynamo.reset()
    model = randomise(timm(drop_path_rate=0.5)).stages[1]
    convnext_fast.accelerate(model)
    model.train()
    sizes = [images(4, size, 64, channels=8) for size in (16, 24)]
    with dk.backend("reference"):
        expected = [outputs_and_gradients(model, x) for x in sizes]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for x, wanted in zip(sizes, expected, strict=True):
            assert_all_close(outputs_and_gradients(compiled, x), wanted, 1e-4)


@each_library
def test_export_is_the_networks_own_and_trains(name):
    """Non-zero, right gradients of every parameter through `export().module()`; no operator of ours in it."""
    model, x = accelerated(name), images(2, 64, 64)
    expected = outputs_and_gradients(model, x)
    program = torch.export.export(model, (x,))
    assert not any("dwconv_kernels" in str(node.target) for node in program.graph.nodes)
    module = program.module()
    names = [n for n, _ in model.named_parameters()]
    actual = outputs_and_gradients(module, x, lambda m, x: [tensor_of(m(x))])
    mine = dict(zip([n for n, _ in module.named_parameters()], actual[2:], strict=True))
    assert_all_close([*actual[:2], *(mine[n] for n in names)], expected)
    assert all(g.any() for g in actual)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", ["timm-v2-conv", "torchvision"])
def test_onnx(name, dynamo, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, file, x = accelerated(name), str(tmp_path / "network.onnx"), images(2, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=dynamo, input_names=["x"])
    (y,) = runtime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_ahead_of_time_inductor(tmp_path):
    model, x = accelerated("timm-v2-linear").stages[0], torch.randn(2, 8, 16, 16)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        y = torch._inductor.aoti_load_package(file)(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


@each_library
def test_jit_trace(name):
    model, x = accelerated(name), images(2, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x, strict=False)
    assert "dwconv_kernels" not in str(traced.inlined_graph)
    y = traced(x)
    torch.testing.assert_close(y["logits"] if isinstance(y, dict) else y, tensor_of(model(x)))


@pytest.mark.parametrize("name, node", [
    ("timm-linear", "stages.{}.blocks.0"), ("timm-conv", "stages.{}.blocks.0.conv_dw"),
    ("torchvision", "features.{}.0"), ("torchvision", "features.{}.0.block.0"), ("original", "stages.{}.0"),
], ids=str)  # fmt: skip
def test_training_through_torchvisions_feature_extractor(name, node):
    """The traced network calls the children; its gradients are right and none is zero."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = randomise(CLASSIFIERS[name][2]()), images(2, 64, 64)
    stages = (1, 3) if name != "torchvision" else (3, 7)
    nodes = {node.format(i): str(i) for i in stages}

    def outputs(network, x):
        return list(network(x).values())

    expected = outputs_and_gradients(extraction.create_feature_extractor(copy.deepcopy(model), nodes), x, outputs)
    convnext_fast.accelerate(model)
    extractor = extraction.create_feature_extractor(model, nodes)
    for backend in ("auto", "torch", "reference"):
        with dk.backend(backend):
            actual = outputs_and_gradients(extractor, x, outputs)
        assert_all_close(actual, expected, 2e-5)
        assert all(g is None or g.any() for g in actual)
    assert operators_of(extractor, x)["depthwise_conv2d"] >= 5, "the convolutions in it are still swapped"


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    plain, saving = (randomise(timm(drop_path_rate=0.5)).train() for _ in range(2))
    for model in (plain, saving):
        convnext_fast.accelerate(model)
    saving.set_grad_checkpointing()
    if reentrant:

        def forward(blocks, x):
            for block in blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
            return x

        for stage in saving.stages:
            stage.grad_checkpointing = False
            stage.blocks.forward = forward.__get__(stage.blocks)
    for backend in ("torch", "reference"):
        with dk.backend(backend):
            expected = outputs_and_gradients(plain, images(4, 64, 64))
            assert_all_close(outputs_and_gradients(saving, images(4, 64, 64)), expected)


@pytest.mark.parametrize("memory", ["default", "lean"])
def test_memory_kept_for_the_backward_pass(memory):
    """By a block alone, in maps of its own size: lean keeps its input."""
    block = randomise(timm()).stages[1].blocks[0]
    convnext_fast.accelerate(block, memory=memory)
    x, kept = torch.randn(2, 12, 16, 16, requires_grad=True), []
    with dk.backend("reference"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = block(x)
    parameters = {p.data_ptr() for p in block.parameters()}
    maps = sum(t.numel() for t in kept if t.data_ptr() not in parameters) / x.numel()
    assert maps == 1 if memory == "lean" else 2 <= maps < 2.5
    with dk.backend("reference"):
        y.sum().backward()
    assert x.grad.any()


def test_averaged_models():
    utils = pytest.importorskip("timm.utils")
    model = randomise(timm())
    convnext_fast.accelerate(model)
    averages = [utils.ModelEmaV3(model, decay=0.5), torch.optim.swa_utils.AveragedModel(model)]
    for average in averages:
        assert operators_of(average.module) == {"convnext_block": BLOCKS}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with dk.backend("reference"):
        model(images()).square().mean().backward()
    optimizer.step()
    averages[0].update(model)
    moved = [(a - p).abs().max() for a, p in zip(averages[0].module.parameters(), model.parameters(), strict=True)]
    assert 0 < max(moved) < 1


def test_grad_scaler_and_autocast_train():
    """fp16 with a scaler: an overflow is skipped, then the loss falls."""
    model = randomise(timm())
    convnext_fast.accelerate(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses, scales = [], []
    for _ in range(24):
        with torch.autocast("cpu", torch.float16), dk.backend("reference"):
            loss = nn.functional.cross_entropy(model(images(4, 32, 32)).float(), torch.arange(4))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**40, "the first step must overflow"
    assert losses[-1] < losses[0]


def test_resuming_with_the_optimizer_of_before():
    """Parameters and their order are the same, so the state of an optimizer fits, whichever side it comes from."""
    model = randomise(timm()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model(images()).square().mean().backward()
    optimizer.step()
    other = copy.deepcopy(model)
    convnext_fast.accelerate(other)
    resumed = torch.optim.SGD(other.parameters(), lr=1e-3, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, optim, backend in ((model, optimizer, "auto"), (other, resumed, "torch")):
        with dk.backend(backend):
            optim.zero_grad()
            network(images()).square().mean().backward()
            optim.step()
    assert_all_close(list(other.parameters()), list(model.parameters()), 1e-4)


@pytest.mark.parametrize("name, dtype, linear, runs", [
    ("timm-conv", None, "ieee", 0), ("timm-conv", None, "tf32", BLOCKS), ("timm-conv", torch.bfloat16, "ieee", BLOCKS),
    ("timm-linear", None, "ieee", BLOCKS),
], ids=str)  # fmt: skip
def test_tf32_of_convolutions_is_not_lost(name, dtype, linear, runs, monkeypatch):
    """By PyTorch's defaults 1×1 convolutions in fp32 are TF32 and linear layers are not; on a GPU, by `auto`."""
    model, calls = accelerated(name), []
    monkeypatch.setattr(dk, "engages", lambda x: True)
    original = dk.convnext_block
    monkeypatch.setattr(dk, "convnext_block", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if linear == "tf32" else "highest")
        assert torch.backends.cudnn.allow_tf32
        assert dk.tf32_in_convolutions_alone() == (linear == "ieee")
        with torch.autocast("cpu", dtype, enabled=dtype is not None), torch.no_grad():
            model(images())
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(calls) == runs


# Children that other libraries replace.


@pytest.mark.parametrize("first", ["accelerate", "lora"])
def test_lora(first):
    """Blocks with adapters call their children, the convolution on the operators; merged, they are fused again."""
    peft = pytest.importorskip("peft")
    model, x = randomise(huggingface()), images(2, 64, 64)

    def adapt(network):
        config = peft.LoraConfig(target_modules=["pwconv1"], r=4, init_lora_weights=False)
        torch.manual_seed(4)
        return peft.get_peft_model(network, config).eval()

    def outputs(network, x):
        return [network(x).logits]

    expected = outputs_and_gradients(adapt(copy.deepcopy(model)), x, outputs)
    if first == "accelerate":
        convnext_fast.accelerate(model)
        adapted = adapt(model)
    else:
        adapted = adapt(model)
        report = convnext_fast.accelerate(adapted)
        assert len(report.swapped) == BLOCKS  # convolutions
        assert all("pwconv1 is peft.tuners.lora" in why for _, why in report.skipped)
    assert operators_of(adapted, x) == {"depthwise_conv2d": BLOCKS}
    for backend in ("auto", "torch", "reference"):
        with dk.backend(backend):
            assert_all_close(outputs_and_gradients(adapted, x, outputs), expected, 2e-5)
    if first == "accelerate":
        text = str(convnext_fast.accelerate(adapted))
        assert "for now by its own forward: pwconv1 is peft.tuners.lora" in text
    merged = adapted.merge_and_unload()
    if first == "lora":
        convnext_fast.accelerate(merged)
    assert operators_of(merged, x) == {"convnext_block": BLOCKS}
    assert_all_close([merged(x).logits], [expected[0]])


def test_lora_on_the_convolution():
    peft = pytest.importorskip("peft")
    model, x = randomise(timm()), images(2, 64, 64)
    convnext_fast.accelerate(model)
    config = peft.LoraConfig(target_modules=["stages.1.blocks.0.conv_dw"], r=12, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    y = adapted(x)
    assert operators_of(adapted, x) == {"convnext_block": BLOCKS - 1, "depthwise_conv2d": 1}
    with dk.backend("reference"):
        assert_all_close([adapted(x)], [y])


@pytest.mark.parametrize("order", ["accelerate first", "quantise first"])
def test_quantised_children(order):
    """torchao's weights: blocks call their children, which know what to do with them."""
    torchao = pytest.importorskip("torchao.quantization")
    model, x = randomise(timm()), images(2, 64, 64)
    exact = model(x)
    quantised = copy.deepcopy(model)
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        expected = quantised(x)
    assert not torch.equal(exact, expected)
    if order == "accelerate first":
        convnext_fast.accelerate(model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    report = convnext_fast.accelerate(model)
    assert all(
        "for now by its own forward: mlp.fc1 has hooks, or a forward or parameters" in w for _, w in report.swapped
    )
    for backend in ("auto", "torch", "reference"):
        with torch.no_grad(), dk.backend(backend):
            assert_all_close([model(x)], [expected])
    assert operators_of(model, x) == {"depthwise_conv2d": BLOCKS}


def test_pruned_children():
    model = randomise(timm())
    convnext_fast.accelerate(model)
    for block in model.stages[1].blocks:
        prune.l1_unstructured(block.mlp.fc1, "weight", 0.5)
    assert operators_of(model) == {"convnext_block": BLOCKS - DEPTHS[1], "depthwise_conv2d": DEPTHS[1]}
    with dk.backend("reference"):
        actual = outputs_and_gradients(model, images())
    convnext_fast.restore(model)
    assert_all_close(actual, outputs_and_gradients(model, images()), 2e-5)


def test_functional_call_and_vmap():
    model = randomise(timm())
    convnext_fast.accelerate(model)
    parameters = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    x = images(2, 64, 64)
    expected = torch.func.functional_call(copy.deepcopy(model), parameters, (x,))
    with dk.backend("reference"):
        actual = torch.func.functional_call(model, parameters, (x,))
    assert_all_close([actual.detach()], [expected.detach()])

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    with dk.backend("torch"):
        per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(2):
        one = torch.func.grad(loss)(parameters, x[i])
        assert_all_close([g[i] for g in per_image.values()], list(one.values()), 1e-4)


def test_meta_and_moved_models():
    with torch.device("meta"):
        model = torchvision()
    report = convnext_fast.accelerate(model)
    assert "on meta" in str(report)
    assert len(report.swapped) == BLOCKS
    model = randomise(model.to_empty(device="cpu"))
    assert operators_of(model) == {"convnext_block": BLOCKS}
    model.double()
    with dk.backend("reference"):
        assert model(images().double()).dtype == torch.float64
