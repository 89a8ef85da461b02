"""The command line: every expected failure is one line and exit status 2; classify and convert make the round trip."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

import convnext_fast
from convnext_fast import cli
from convnext_fast.image_folder import read_class_names
from convnext_fast.run_folder import read_run_checkpoint

from .image_folders import COLOURS, make_folder, noisy_image, truncate

TRAIN = [
    "--model",
    "convnext_atto",
    "--image-size",
    "32",
    "--batch-size",
    "8",
    "--warmup-epochs",
    "0",
    "--workers",
    "0",
]


def fails(capsys, *arguments, lines: int = 1) -> str:
    """Standard error of a command that must end with status 2, so many lines and no traceback."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("convnext-fast: error: ")
    assert error.count("\n") == lines
    return error


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a short run on images of three colours, in ``data`` and ``out``."""
    pytest.importorskip("PIL")
    root = tmp_path_factory.mktemp("trained")
    make_folder(root / "data", train=16, val=4)
    options = ["--epochs", "4", "--lr", "2e-3", "--label-smoothing", "0", "--drop-path", "0"]
    assert cli.main(["train", str(root / "data"), "--out", str(root / "out"), *TRAIN, *options]) == 0
    return root


def test_python_m_is_the_same_command():
    result = subprocess.run([sys.executable, "-m", "convnext_fast", "info"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for name in (
        convnext_fast.__version__,
        "Python",
        torch.__version__,
        "Triton",
        "CUDA",
        "cuDNN",
        "device",
        "backend",
    ):
        assert name in result.stdout
    result = subprocess.run([sys.executable, "-m", "convnext_fast", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("convnext-fast: error: ")


def test_importing_the_package_imports_no_optional_dependency():
    names = "matplotlib", "sklearn", "kornia", "PIL", "mlxtend", "timm", "torchvision", "transformers"
    code = f"import sys, convnext_fast.cli; print([name for name in {names!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[]\n"


def test_ctrl_c_and_debug(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_demo", interrupt)
    assert cli.main(["demo"]) == 130
    capsys.readouterr()
    assert cli.main(["train", "nothing", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


# train


def test_train_learns_the_colours_and_writes_its_folder(trained, capsys):
    out = trained / "out"
    names = {"best.pth", "images.json", "last.pth", "log.jsonl", "samples.json"}
    assert names <= {path.name for path in out.iterdir()} <= names | {"loss.png"}
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["val_accuracy"] >= 0.9
    assert last["val_images"] == 12
    again = fails(capsys, "train", trained / "data", "--out", out, *TRAIN)
    assert "holds a run already; go on with --resume, or choose another --out" in again


def test_resume_names_the_options_that_differ(trained, capsys):
    options = ["--epochs", "4", "--lr", "1e-3", "--label-smoothing", "0", "--drop-path", "0", "--hflip", "0"]
    error = fails(capsys, "train", trained / "data", "--out", trained / "out", *TRAIN, *options, "--resume")
    assert "options that change the result: lr is 0.001, was 0.002; hflip is 0.0, was 0.5" in error
    noisy_image((1, 2, 3), 0).save(trained / "data/train/red/new.png")
    try:
        error = fails(capsys, "train", trained / "data", "--out", trained / "out", *TRAIN, *options, "--resume")
        assert "not those that the run began with; 1 was added: train/red/new.png" in error
    finally:
        (trained / "data/train/red/new.png").unlink()


def test_resume_auto_starts_where_there_is_nothing(trained, tmp_path, capsys):
    arguments = ["train", str(trained / "data"), "--out", str(tmp_path / "new"), *TRAIN, "--epochs", "1"]
    assert cli.main([*arguments, "--resume"]) == 0
    assert "resumed" not in capsys.readouterr().out
    assert cli.main([*arguments, "--resume", "auto"]) == 0
    assert "at epoch 2, step 0" in capsys.readouterr().out
    error = fails(capsys, *arguments[:4], *TRAIN, "--resume", tmp_path / "none.pth")
    assert "--resume: checkpoint" in error
    assert "none.pth does not exist" in error


def test_fine_tuning_reinitialises_a_head_of_another_size(trained, tmp_path, capsys):
    data = trained / "data"
    start = trained / "out/best.pth"
    same = ["train", str(data), *TRAIN, "--epochs", "1", "--lr", "1e-9", "--min-lr", "0", "--init-from", str(start)]
    assert cli.main([*same, "--out", str(tmp_path / "same")]) == 0
    assert "re-initialised" not in capsys.readouterr().out
    loaded, trained_on = (read_run_checkpoint(path)["model"] for path in (start, tmp_path / "same/last.pth"))
    torch.testing.assert_close(loaded, trained_on, rtol=0, atol=1e-6)

    torch.save(convnext_fast.convnext_atto(num_classes=7).state_dict(), tmp_path / "seven.pth")
    other = ["train", str(data), *TRAIN, "--epochs", "1", "--init-from", str(tmp_path / "seven.pth")]
    assert cli.main([*other, "--out", str(tmp_path / "other")]) == 0
    assert "head has 7 classes, here are 3: re-initialised the head" in capsys.readouterr().out
    assert len(read_run_checkpoint(tmp_path / "other/last.pth")["model"]["head.weight"]) == 3


BAD_TRAIN = [
    (["--model", "resnet50"], "name is 'resnet50'; allowed: convnext_atto"),
    (["--image-size", "16"], "image_size is 16; 32 or more is allowed for convnext_atto"),
    (["--epochs", "0"], "epochs is 0; 1 or more is allowed"),
    (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
    (["--hflip", "2"], "hflip is 2.0; a probability in [0, 1] is allowed"),
    (["--randaugment", "30"], "randaugment is 30; a magnitude from 0 (off) to 29 is allowed"),
    (["--device", "toaster"], "device is 'toaster'; cpu, cuda"),
    (["--device", "xpu"], "device is 'xpu'; cpu, cuda, one of several such as cuda:1, or mps is allowed"),
    (["--device", "meta"], "device is 'meta'; cpu"),
    (["--device", "cuda:-1"], "device is 'cuda:-1'; cpu"),
    (["--no-augment", "--randaugment", "9"], "--no-augment and --randaugment are given; leave out one of them"),
    (["--no-augment", "--hflip", "0.5"], "--no-augment and --hflip are given; leave out one of them"),
    (["--init-from", "none.pth"], "none.pth"),
    (["--init-from", "x", "--pretrained"], "pretrained and init_from are both given"),
    (["--val-fraction", "0.2"], "--val-fraction is given, and"),
]


@pytest.mark.parametrize("options, message", BAD_TRAIN, ids=[" ".join(row[0]) for row in BAD_TRAIN])
def test_bad_train_options(trained, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    arguments = ["train", trained / "data", "--out", out, *TRAIN, "--epochs", "1", *options]
    assert message in fails(capsys, *arguments)
    assert not (out / "last.pth").exists()


def test_a_folder_that_is_missing_leaves_nothing_behind(tmp_path, capsys):
    error = fails(capsys, "train", tmp_path / "nothing", "--out", tmp_path / "out", *TRAIN)
    assert f"DATA_DIR {tmp_path / 'nothing'} does not exist or is not a folder" in error
    assert not (tmp_path / "out").exists()


def test_a_missing_kornia_is_named(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    monkeypatch.setitem(sys.modules, "kornia.augmentation.auto", None)
    error = fails(capsys, "train", trained / "data", "--out", tmp_path / "out", *TRAIN, "--randaugment", "9")
    assert 'randaugment needs kornia: pip install "convnext-fast[train]"' in error


def test_the_triton_backend_on_a_cpu_is_an_error(trained, tmp_path, capsys):
    from dwconv_kernels import backend, runtime

    if runtime.INTERPRETER:
        pytest.skip("the interpreter runs the kernels on the CPU")
    with backend("triton"):
        error = fails(capsys, "train", trained / "data", "--out", tmp_path / "out", *TRAIN, "--device", "cpu")
    assert "the backend is set to triton, which cannot run here" in error


# classify


def classify(capsys, *arguments):
    assert cli.main(["classify", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("file", ["best.pth", "last.pth"])
def test_classify_needs_only_the_checkpoint(trained, tmp_path, capsys, file):
    images = []
    for name, colour in COLOURS.items():
        images.append(tmp_path / f"{name}.png")
        noisy_image(colour, 12345).save(images[-1])
    lines = classify(capsys, *images, "--checkpoint", trained / "out" / file)
    assert len(lines) == 3 * (1 + 3), "three classes are all of the top five"
    for i, (name, image) in enumerate(zip(COLOURS, images, strict=True)):
        assert lines[4 * i] == str(image)
        answers = [line.split() for line in lines[4 * i + 1 : 4 * i + 4]]
        assert answers[0][1] == name
        probabilities = [float(probability.rstrip("%")) for probability, _ in answers]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(100, abs=0.01)


def test_classify_a_foreign_checkpoint(tmp_path, capsys):
    pytest.importorskip("PIL")
    torch.manual_seed(0)
    model = convnext_fast.convnextv2_atto(num_classes=20)
    torch.save({"model": model.state_dict()}, tmp_path / "foreign.pth")
    noisy_image((200, 10, 10), 0).save(tmp_path / "a.png")
    arguments = [tmp_path / "a.png", "--checkpoint", tmp_path / "foreign.pth", "--image-size", "64"]
    found = classify(capsys, *arguments)
    assert len(found) == 6
    assert all(line.split()[1] == "class" for line in found[1:])
    assert classify(capsys, *arguments, "--model", "convnextv2_atto") == found
    (tmp_path / "names.json").write_text(json.dumps({str(i): [f"n{i}", f"thing{i}"] for i in range(20)}))
    named = classify(capsys, *arguments, "--class-names", tmp_path / "names.json")
    assert [line.replace("thing", "class ") for line in named] == found
    error = fails(capsys, "classify", *arguments, "--model", "convnext_femto", lines=23).splitlines()
    assert "does not fit ConvNeXt" in error[0]
    assert error[1].split() == ["name", "model", "checkpoint"], "a table stays one"
    assert "and" in error[-1]
    assert "strict=False" not in "".join(error), "an argument that no command has"
    for size in ("0", "16"):
        error = fails(capsys, "classify", *arguments[:3], "--image-size", size)
        assert f"image_size is {size}; 32 or more is allowed" in error


def test_class_names_files(tmp_path):
    (tmp_path / "a.txt").write_text("tench\n\ngreat white shark\n")
    assert read_class_names(tmp_path / "a.txt") == ["tench", "great white shark"]
    (tmp_path / "a.json").write_text('["x", "y"]')
    assert read_class_names(tmp_path / "a.json") == ["x", "y"]
    for content in ("{", '{"1": "a"}', "3"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"a\.json cannot be read; allowed: one name per line"):
            read_class_names(tmp_path / "a.json")


class _Evil:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_classify_errors(trained, tmp_path, capsys):
    image, checkpoint = tmp_path / "a.png", trained / "out/best.pth"
    noisy_image((1, 2, 3), 0).save(image)
    text = tmp_path / "text.png"
    text.write_text("no image")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(checkpoint.read_bytes())
    truncate(damaged)
    evil = tmp_path / "evil.pth"
    torch.save({"model": _Evil()}, evil)
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps(_Evil()))
    names = tmp_path / "names.txt"
    names.write_text("only one\n")
    for arguments, message in (
        ([tmp_path / "b.png", "--checkpoint", checkpoint], "b.png does not exist"),
        ([text, "--checkpoint", checkpoint], "text.png is not an image that can be read"),
        ([image, "--checkpoint", tmp_path / "none.pth"], "none.pth does not exist"),
        ([image, "--checkpoint", damaged], "damaged.pth"),
        ([image, "--checkpoint", evil], "evil.pth holds Python objects other than tensors"),
        ([image, "--checkpoint", tmp_path], "is a folder; a file is allowed"),
        ([image, "--checkpoint", bare], "bare.pth"),
        ([image, "--checkpoint", checkpoint, "--model", "convnext_tiny"], "was trained as convnext_atto"),
        ([image, "--checkpoint", checkpoint, "--class-names", names], "1 class names are given; the checkpoint has 3"),
        ([image, "--checkpoint", checkpoint, "--topk", "0"], "topk is 0; 1 or more is allowed"),
    ):
        error = fails(capsys, "classify", *arguments)
        assert message in error
        assert "this code must not run" not in error


# convert


def test_convert_there_and_back(trained, tmp_path, capsys):
    best = trained / "out/best.pth"
    there, back = tmp_path / "timm.pth", tmp_path / "facebook.pth"
    assert cli.main(["convert", str(best), str(there), "--to", "timm"]) == 0
    assert cli.main(["convert", str(there), str(back), "--to", "facebook"]) == 0
    assert "with the names of facebook" in capsys.readouterr().out
    original = read_run_checkpoint(best)["model"]
    converted = torch.load(there, weights_only=True)
    converted = converted.get("state_dict", converted)
    assert "stages.0.blocks.0.conv_dw.weight" in converted
    result = torch.load(back, weights_only=True)
    result = result.get("model", result)
    assert result.keys() == original.keys()
    assert all(torch.equal(result[key], original[key]) for key in original)
    assert cli.main(["convert", str(best), str(tmp_path / "like.pth"), "--to", "timm", "--like", str(there)]) == 0


def test_convert_errors(trained, tmp_path, capsys):
    best = trained / "out/best.pth"
    assert "none.pth" in fails(capsys, "convert", tmp_path / "none.pth", tmp_path / "a.pth", "--to", "timm")
    assert "argument --to: invalid choice: 'keras'" in fails(
        capsys, "convert", best, tmp_path / "a.pth", "--to", "keras"
    )
    error = fails(capsys, "convert", best, tmp_path / "no/a.pth", "--to", "timm")
    assert f"folder {tmp_path / 'no'} does not exist" in error
    (tmp_path / "out.pth").mkdir()
    error = fails(capsys, "convert", best, tmp_path / "out.pth", "--to", "timm")
    assert f"cannot write {tmp_path / 'out.pth'}: it is a folder" in error
