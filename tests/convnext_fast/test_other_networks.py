"""What ConvMixer, DWNet and RepLKNet have in common with ConvNeXts here: training, layouts, dtypes, command line."""

import json
import sys

import pytest
import torch
from torch import nn

import convnext_fast
import dwconv_kernels as dk
from convnext_fast import cli
from convnext_fast.checkpoint import own_names
from convnext_fast.image_folder import FolderOptions
from convnext_fast.run_folder import read_run_checkpoint

from .small_models import OTHERS, assert_all_close, each_other, gradients, randomised, with_statistics
from .test_train import make_trainer, run

BUILDERS = {"convmixer": "convmixer_768_32", "dwnet": "dwnet_tiny", "replknet": "replknet_31b"}


@each_other
@pytest.mark.parametrize("size", [(8, 8), (21, 34)], ids=str)
def test_any_image_size_layout_and_number_of_channels(build, size):
    channels = 2 if build is not OTHERS["replknet"] else 3
    model = with_statistics(build(**({"in_chans": 2} if channels == 2 else {}))).eval()
    x = torch.randn(2, channels, *size)
    logits = model(x)
    assert logits.shape == (2, 5)
    for strided in (x.to(memory_format=torch.channels_last), x.flip(3).contiguous().flip(3)):
        assert_all_close([model(strided)], [logits])
    assert_all_close([model.to(memory_format=torch.channels_last)(x)], [logits])
    too_small = torch.randn(1, channels, model.reduction - 1, 40)
    with pytest.raises(ValueError, match=rf"at least {model.reduction}×{model.reduction} is allowed"):
        model(too_small)


@each_other
def test_every_depthwise_layer_is_the_operator_and_gets_a_channels_last_map(build):
    model = build()
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert depthwise
    assert {type(module) for module in depthwise} == {dk.DepthwiseConv2d}
    seen = []
    for module in depthwise:
        module.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    model(torch.randn(2, 3, 32, 24))
    assert seen == [True] * len(depthwise)


@each_other
def test_backends_agree(build):
    """The written-out definitions of the operators, as the kernels are proved against."""
    model, x = with_statistics(build()).double().eval(), torch.randn(2, 3, 16, 20, dtype=torch.float64)
    expected = [model(x), *gradients(model, x)]
    with dk.backend("reference"):
        assert_all_close([model(x), *gradients(model, x)], expected, 1e-10)


@each_other
def test_half_precision_and_autocast(build):
    model, x = with_statistics(build()).eval(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    assert (mixed.float() - expected).abs().max() < 0.05 * expected.abs().max()
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()
    made = build(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}


@each_other
def test_checkpointing_changes_neither_gradients_nor_running_statistics(build):
    """The blocks run twice, and see the batch once."""
    plain, recomputed = randomised(build(drop_path_rate=0.4)), randomised(build(drop_path_rate=0.4))
    recomputed.load_state_dict(plain.state_dict())
    recomputed.set_grad_checkpointing()
    x = torch.randn(6, 3, 24, 24)
    results = []
    for model in (plain, recomputed):
        torch.manual_seed(7)
        loss = model.train()(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()  # the blocks run a third time
        results.append([parameter.grad for parameter in model.parameters()])
    assert_all_close(*results)
    for (name, expected), actual in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
    norms = [module for module in recomputed.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}
    assert {norm.momentum for norm in norms} == {0.1}


@each_other
def test_heads(build):
    model, x = build().eval(), torch.randn(2, 3, 16, 16)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features)
    assert torch.equal(model(x), model.get_classifier()(features))
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)
    model.reset_classifier(0)
    assert torch.equal(model(x), features)
    assert build(num_classes=0)(x).shape == (2, model.num_features)


@each_other
def test_compiles_without_breaks_and_exports(build):
    model, x = with_statistics(build()).eval(), torch.randn(2, 3, 16, 20)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_all_close([compiled(x)], [expected])
    assert_all_close(gradients(compiled, x), gradients(model, x))
    exported = torch.export.export(model, (x,)).module()
    assert_all_close([exported(x)], [expected])
    assert_all_close([torch.fx.symbolic_trace(model)(x)], [expected])


@each_other
def test_checkpoints_there_and_back(build, tmp_path):
    model = with_statistics(build())
    for suffix in ("pth", "safetensors"):
        if suffix == "safetensors":
            pytest.importorskip("safetensors")
        convnext_fast.save_checkpoint(model.state_dict(), tmp_path / f"model.{suffix}")
        other = build()
        assert convnext_fast.load_checkpoint(other, tmp_path / f"model.{suffix}").fits
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(convnext_fast.CheckpointError, match="these are not the parameters of a ConvNeXt"):
        convnext_fast.convert_state_dict(model.state_dict(), to="timm")


class Detector(nn.Module):
    def __init__(self, build):
        super().__init__()
        self.backbone, self.neck = build(), nn.Linear(4, 4)


@each_other
def test_what_lies_beside_the_network_in_the_model_is_loaded_or_missing(build):
    trained = Detector(build)
    state = with_statistics(trained).state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    for source in (state, wrapped, {**wrapped, "module.optimizer.weight": torch.zeros(3)}):
        model = Detector(build)
        report = convnext_fast.load_checkpoint(model, source)
        assert report.fits
        assert report.dropped == ("module.optimizer.weight",) * ("module.optimizer.weight" in source)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(convnext_fast.CheckpointError, match=r"missing +neck\.weight +\(4, 4\)"):
        convnext_fast.load_checkpoint(Detector(build), trained.backbone.state_dict())
    with pytest.raises(convnext_fast.CheckpointError, match=r"shape +neck\.weight +\(4, 4\) +\(3, 4\)"):
        convnext_fast.load_checkpoint(Detector(build), {**wrapped, "module.neck.weight": torch.zeros(3, 4)})


@each_other
def test_two_networks_are_refused(build):
    model = build()
    one, two = model.state_dict(), nn.ModuleDict({"student": build(), "teacher": build()})
    before = two.state_dict()["teacher.head.bias"].clone()
    text = r"there are 2 (ConvMixer|DWNet|RepLKNet)s, under the prefixes 'student\.', 'teacher\.'; pass only one"
    for target, source in ((model, two.state_dict()), (two, one), (two, two.state_dict())):
        with pytest.raises(convnext_fast.CheckpointError, match=text):
            convnext_fast.load_checkpoint(target, source)
    with pytest.raises(convnext_fast.CheckpointError, match=text):
        own_names(two.state_dict())
    assert torch.equal(two.state_dict()["teacher.head.bias"], before)
    other = convnext_fast.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))
    mixed = {**one, **{f"teacher.{name}": tensor for name, tensor in other.state_dict().items()}}
    with pytest.raises(convnext_fast.CheckpointError, match=r"there are a \w+ and a ConvNeXt, .* '', 'teacher\.'"):
        own_names(mixed)


@each_other
def test_resumed_training_ends_with_the_same_bits(build, tmp_path):
    """Running statistics, and their averages, are part of what is saved."""

    def trainer(name):
        torch.manual_seed(3)
        model = build(num_classes=3, drop_path_rate=0.3)
        return make_trainer(tmp_path / name, model=model, ema_decay=0.5, checkpoint_every=1, epochs=2)

    class Killed(Exception):
        pass

    whole, first = trainer("whole"), trainer("parts")
    whole.fit()
    checks = first._checks

    def checks_then_kill():
        checks()
        if (first.epoch, first.step) == (1, 2):
            raise Killed

    first._checks = checks_then_kill
    with pytest.raises(Killed):
        first.fit()
    second = trainer("parts")
    second.load(tmp_path / "parts/last.pth")
    second.fit()
    for a, b in ((whole.model, second.model), (whole.ema.module, second.ema.module)):
        assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())
    mean = next(name for name in whole.model.state_dict() if name.endswith("running_mean"))
    assert not torch.equal(whole.model.state_dict()[mean], whole.ema.module.state_dict()[mean])


# The command line, on the handwritten digits of scikit-learn


def test_demo_learns_digits_with_each_network(tmp_path):
    """In 6 of 25 epochs. The same networks with kernels of one pixel reach 24 % and 62 % in these."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    for network, bar in (("convmixer", 0.95), ("dwnet", 0.94)):
        out = tmp_path / network
        assert cli.main(["demo", "--model", network, "--epochs", "6", "--out", str(out)]) == 0
        results = json.loads((out / "results.json").read_text())
        assert results["network"] == network
        assert results["test_accuracy"] >= bar
        assert 0 < results["gradients_relative_error"] <= 1e-4
        architecture = read_run_checkpoint(out / "checkpoint.pth")["architecture"]
        assert architecture["name"] == BUILDERS[network]


@pytest.mark.full
@pytest.mark.parametrize("network", BUILDERS)
def test_demo_keeps_its_promise(tmp_path, network):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert cli.main(["demo", "--model", network, "--out", str(tmp_path)]) == 0


def digits_folder(root, classes=(0, 1, 2), train=24, val=8):
    """``root/{train,val}/<digit>/<i>.png`` of real handwritten digits."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    image = pytest.importorskip("PIL.Image")
    pixels, labels = load_digits(return_X_y=True)
    for label in classes:
        of_class = (pixels[labels == label] * 255 / 16).astype("uint8")
        for i, digit in enumerate(of_class[: train + val]):
            folder = root / ("train" if i < train else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.frombytes("L", (8, 8), digit.tobytes()).save(folder / f"{i}.png")
    return root


ARGUMENTS = {  # small networks by the names of published ones, for images of 16×16 pixels
    "convmixer": ["dim=32", "depth=3", "patch_size=2", "kernel_size=5"],
    "dwnet": ["embed_dim=16", "depths=[2,2]", "patch_size=2"],
    "replknet": ["layers=[1,1]", "channels=[32,48]", "large_kernel_sizes=[7,5]"],
}


@pytest.mark.parametrize("network", ARGUMENTS)
def test_train_and_classify_real_images(tmp_path, capsys, network):
    data = digits_folder(tmp_path / "data")
    command = [
        "train", str(data), "--model", BUILDERS[network], "--model-kwargs", *ARGUMENTS[network], "--image-size", "16",
        "--batch-size", "12", "--lr", "4e-3", "--label-smoothing", "0", "--drop-path", "0", "--warmup-epochs", "1",
        "--no-augment", "--workers", "0", "--ema-decay", "0.8", "--channels-last",
    ]  # fmt: skip
    out = tmp_path / "out"
    assert cli.main([*command, "--epochs", "8", "--out", str(out)]) == 0
    history = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert max(record["val_accuracy"] for record in history) >= 0.9
    assert history[-1]["ema_val_accuracy"] >= 0.9, "averages of weights without those of running statistics"
    assert cli.main([*command, "--epochs", "8", "--out", str(out), "--resume"]) == 0
    capsys.readouterr()
    wrong = [*command, "--epochs", "8", "--out", str(out), "--resume"]
    wrong[wrong.index(ARGUMENTS[network][0])] += "0" if network == "convmixer" else " "
    assert cli.main(wrong) == (2 if network == "convmixer" else 0)
    assert ("model_kwargs is {'dim': 320" in capsys.readouterr().err) == (network == "convmixer")

    files = [str(data / f"val/{label}/{24 + i}.png") for label in range(3) for i in range(8)]
    assert cli.main(["classify", *files, "--checkpoint", str(out / "best.pth"), "--topk", "1"]) == 0
    answers = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1::2]]
    assert sum(answer == file.split("/")[-2] for answer, file in zip(answers, files, strict=True)) >= 21


def test_train_starts_from_a_checkpoint_of_another_head_and_kernel_size_is_an_argument(tmp_path, capsys):
    data = digits_folder(tmp_path / "data", train=4, val=2)
    small = {"dim": 8, "depth": 2, "patch_size": 4, "kernel_size": 3}
    start = convnext_fast.convmixer_768_32(**small, num_classes=7)
    torch.save(start.state_dict(), tmp_path / "seven.pth")
    command = ["train", str(data), "--image-size", "16", "--epochs", "1", "--workers", "0", "--batch-size", "4"]
    texts = [f"{name}={value}" for name, value in small.items()]
    options = ["--model", "convmixer_768_32", "--model-kwargs", *texts, "--init-from", str(tmp_path / "seven.pth")]
    assert cli.main([*command, *options, "--out", str(tmp_path / "mixer")]) == 0
    assert "head has 7 classes, here are 3: re-initialised the head" in capsys.readouterr().out

    options = ["--model", "convnext_atto", "--model-kwargs", "kernel_size=9", "depths=[1,1,1,1]", "dims=[8,8,8,8]"]
    options += ["patch_size=2"]
    assert cli.main([*command, *options, "--out", str(tmp_path / "convnext")]) == 0
    saved = read_run_checkpoint(tmp_path / "convnext/last.pth")
    assert saved["model"]["stages.0.0.dwconv.weight"].shape == (8, 1, 9, 9)
    assert saved["architecture"]["kwargs"]["kernel_size"] == 9


TWO_PROCESSES = """
import sys
import torch
from convnext_fast.distributed import join_world
from convnext_fast.image_folder import FolderOptions, folder_trainer
from convnext_fast.train import Options

torch.set_num_threads(1)
world = join_world("cpu")
small = {"dim": 8, "depth": 1, "patch_size": 4, "kernel_size": 3}
folder_options = FolderOptions(model="convmixer_768_32", image_size=16, drop_path=0.0, model_kwargs=small)
trainer = folder_trainer(sys.argv[1], folder_options, Options(epochs=2, batch_size=3, lr=1e-2), sys.argv[2], world)
trainer.fit()
torch.save(trainer.model.state_dict(), f"{sys.argv[2]}/rank{world.rank}.pth")
world.leave()
"""


@pytest.mark.full
def test_two_processes_evaluate_the_same_network(tmp_path):
    """Every rank has running statistics of its own images; all are evaluated, and saved, with those of the first."""
    data = digits_folder(tmp_path / "data", train=5, val=2)
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launcher, str(script), str(data), str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"out/rank{i}.pth", weights_only=True) for i in (0, 1))
    saved = read_run_checkpoint(tmp_path / "out/last.pth")["model"]
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], saved[name]) for name in saved)


BAD_KWARGS = [
    ("dim", "'dim' is not of the form NAME=VALUE"),
    ("dim=__import__('os')", "is not of the form NAME=VALUE"),
    ("size=3", "model_kwargs has size; of convmixer_768_32 are allowed: act_layer, depth, dim, drop_rate"),
    ("num_classes=3", "model_kwargs has num_classes (there is a class per folder of images); of convmixer_768_32 are"),
    ("drop_path_rate=0.2", "model_kwargs has drop_path_rate (the option for it is drop_path, --drop-path); of"),
    ("in_chans=1", "model_kwargs has in_chans (images are read as RGB); of"),
    ("kernel_size=6", "kernel_size is 6; a positive odd integer is allowed"),
    ("dim=wide", "dim is 'wide'; an integer of at least 1 is allowed"),
    ("act_layer=relu", "model_kwargs is {'act_layer': 'relu'}, which convmixer_768_32 cannot be built with"),
]


@pytest.mark.parametrize("text, message", BAD_KWARGS)
def test_bad_arguments_of_a_network_are_one_line(tmp_path, capsys, text, message):
    data = digits_folder(tmp_path / "data", train=2, val=1)
    command = ["train", str(data), "--model", "convmixer_768_32", "--image-size", "16", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--model-kwargs", text]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out/last.pth").exists()


def test_arguments_that_training_cannot_use_are_not_among_the_allowed():
    for model, names in (
        ("convnext_tiny", ("features_only", "out_indices", "in_chans", "num_classes", "drop_path_rate")),
        ("replknet_31b", ("in_channels", "num_classes", "drop_path_rate", "device", "dtype")),
    ):
        for name in names:
            text = rf"model_kwargs has {name} \(.+\); of {model} are allowed: "
            with pytest.raises(ValueError, match=text) as caught:
                FolderOptions(model=model, model_kwargs={name: 1})
            assert name not in str(caught.value).rpartition(":")[2]


def test_model_kwargs_add_up_and_none_is_given_twice(tmp_path, capsys):
    command = ["train", str(tmp_path), "--model", "convmixer_768_32"]
    for texts in (["dim=8", "--model-kwargs", "depth=2", "dim=9"], ["dim=8", "dim=8"]):
        assert cli.main([*command, "--model-kwargs", *texts]) == 2
        assert "--model-kwargs: dim is given twice; once is allowed" in capsys.readouterr().err
    assert cli.main([*command, "--model-kwargs", "size=1", "--model-kwargs", "depth=2", "length=3"]) == 2
    assert "model_kwargs has size, length; of convmixer_768_32 are allowed" in capsys.readouterr().err


def test_classify_tells_published_networks_by_their_shapes(tmp_path, capsys):
    digits_folder(tmp_path / "data", classes=(0,), train=0, val=1)
    model = convnext_fast.dwnet_tiny(num_classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "dwnet.pth")
    image = str(tmp_path / "data/val/0/0.png")
    assert cli.main(["classify", image, "--checkpoint", str(tmp_path / "dwnet.pth"), "--image-size", "32"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
