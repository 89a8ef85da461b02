"""What people do to a network between building and training it: compile, export, trace, copy, cast."""

import copy
import io
import pickle
import warnings

import pytest
import torch

import dwconv_kernels as dk
from convnext_fast import Block

from .small_models import VERSIONS, assert_all_close, each_version, gradients, randomised


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# A version that has no V1 or V2 block of its own, and PyTorch's operators, are left to the full lane.
COMPILED = [
    pytest.param(build, backend, id=f"{backend}-{name}", marks=full)
    for name, build in VERSIONS.items()
    for backend in ("torch", "reference")
    for full in ([pytest.mark.full] if backend == "torch" or name == "isotropic" else [],)
]


@pytest.mark.parametrize("build, backend", COMPILED)
def test_compile_the_whole_network(build, backend):
    torch._dynamo.reset()
    model, x = randomised(build()), torch.randn(2, 3, 64, 64)
    with dk.backend(backend):
        expected = gradients(model, x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    assert_all_close(actual, expected, 1e-4)


def test_compile_with_drop_path_and_checkpointing():
    torch._dynamo.reset()
    model = VERSIONS["v1"](drop_path_rate=0.2)
    model.set_grad_checkpointing()
    results, x = [], torch.randn(4, 3, 64, 64)
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        with dk.backend("reference"):
            results.append(torch.autograd.grad(function(x).square().sum(), list(model.parameters())))
    assert_all_close(results[1], results[0], 1e-4)


@pytest.mark.parametrize("first, later", [("reference", "torch"), ("torch", "reference")])
def test_checkpointed_blocks_run_again_on_the_backend_of_the_first_time(first, later):
    model, x = randomised(VERSIONS["v1"]()), torch.randn(2, 3, 64, 64)
    with dk.backend(first):
        expected = gradients(model, x)
        model.set_grad_checkpointing()
        loss = model(x).square().sum()
    with dk.backend(later):
        actual = torch.autograd.grad(loss, list(model.parameters()))
    assert_all_close(actual, expected)


@each_version
def test_export_and_symbolic_tracing(build):
    model, x = randomised(build()).eval(), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
    traced = torch.fx.symbolic_trace(model)
    with dk.backend("reference"):
        expected = dict(zip(dict(model.named_parameters()), gradients(model, x), strict=True))
        assert_all_close(gradients(traced, x), [expected[name] for name, _ in traced.named_parameters()])


@each_version
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_export_with_dynamic_sizes(build, dynamo, tmp_path):
    """Both exporters, another size than the one exported with, against ONNX Runtime."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
        sizes = {"dynamic_shapes": {"x": {0: "batch", 2: "height", 3: "width"}}}
    else:
        sizes = {"dynamic_axes": {"x": {0: "batch", 2: "height", 3: "width"}}}
    model, file = randomised(build()).eval(), str(tmp_path / "network.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(2, 3, 64, 64),), file, dynamo=dynamo, input_names=["x"], **sizes)
    x = torch.randn(3, 3, 96, 128)
    (y,) = runtime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_training_through_torchvisions_feature_extractor():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = randomised(VERSIONS["v1"]()), torch.randn(2, 3, 64, 64)
    extractor = extraction.create_feature_extractor(model, {"stages.1.0": "a", "stages.3.0": "b"})
    parameters = [p for name, p in model.named_parameters() if not name.startswith(("norm", "head"))]
    with dk.backend("reference"):
        out = extractor(x)
        actual = torch.autograd.grad(out["a"].square().sum() + out["b"].square().sum(), list(extractor.parameters()))
        maps = model.forward_maps(x, (1, 3))
        expected = torch.autograd.grad(sum(m.square().sum() for m in maps), parameters)
    names = [name for name, _ in extractor.named_parameters()]
    wanted = {name for name, _ in model.named_parameters() if not name.startswith(("norm", "head"))}
    assert set(names) == wanted
    expected = dict(zip([n for n, _ in model.named_parameters() if n in wanted], expected, strict=True))
    assert_all_close(actual, [expected[name] for name in names])


@each_version
def test_copies_and_pickles(build):
    model, x = randomised(build()), torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x))
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))
    torch.testing.assert_close(traced(x), model(x))
    fresh = build()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(x), model(x))


@each_version
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_channels_last(build, dtype):
    model, x = randomised(build()), torch.randn(2, 3, 64, 64)
    expected = model(x)
    model.to(dtype=dtype, memory_format=torch.channels_last)
    y = model(x.to(dtype, memory_format=torch.channels_last))
    assert y.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    y.square().sum().backward()
    for p in model.parameters():
        assert p.grad.stride() == p.stride()


@each_version
def test_stages_run_in_channels_last(build):
    model, seen = build(), []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    model(torch.randn(2, 3, 64, 64))
    assert seen
    for x, y in seen:
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last)


@each_version
def test_training_under_autocast(build):
    model, x = randomised(build()), torch.randn(2, 3, 64, 64)
    expected = gradients(model, x)
    for backend in ("torch", "reference"):
        with torch.autocast("cpu", torch.bfloat16), dk.backend(backend):
            loss = model(x).float().square().sum()
        actual = torch.autograd.grad(loss, list(model.parameters()))
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == torch.float32
            assert (a - e).norm() <= 0.1 * e.norm() + 1e-3
