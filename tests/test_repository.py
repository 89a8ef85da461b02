"""What a stranger meets first: the commands of the README, the examples, the package's own metadata."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_readme_and_ci_run_the_same_tests():
    command = 'pip install -e ".[test]" && pytest'
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci" / "run").read_text()


def test_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_setup_imports_neither_torch_nor_triton():
    code = """
import sys
for name in ("torch", "triton"):
    sys.modules[name] = None
sys.argv = ["setup.py", "--version"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    version = (ROOT / "dwconv_kernels" / "_version.py").read_text().split('"')[1]
    assert done.stdout.strip().endswith(version)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_dependencies_leave_triton_to_torch():
    text = (ROOT / "setup.py").read_text()
    assert 'install_requires=["torch>=2.6"]' in text
    assert '"triton' not in text
    assert 'requires = ["setuptools>=64"]' in (ROOT / "pyproject.toml").read_text()


NEEDED = {  # by the examples, besides torch and what the package itself needs
    "accelerate_anything": ("timm", "torchvision"), "any_checkpoint": ("timm",),
    "finetune_detection": ("torchvision",), "lora_huggingface": ("peft", "transformers"), "train_timm": ("timm",),
}  # fmt: skip


def run_example(name: str, *arguments: str, processes: int = 1) -> str:
    """What an example prints."""
    for library in NEEDED.get(name, ()):
        pytest.importorskip(library)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else ()), "-m", "tests.run_example", f"examples/{name}.py", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if processes > 1 else None  # there may be one GPU only
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str, pattern: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_every_example_is_run():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {*NEEDED, "large_kernel_network"}


def test_examples_run_large_kernel_network():
    assert numbers(run_example("large_kernel_network"), r"loss (\S+)")[0] > 0


def test_examples_run_any_checkpoint():
    printed = run_example("any_checkpoint")
    (difference,) = numbers(printed, r"largest difference of logits: (\S+)")
    assert difference < 1e-5
    assert "All keys matched" in printed


def test_examples_run_accelerate_anything():
    """On whichever of the libraries are installed."""
    printed = run_example("accelerate_anything")
    run = re.findall(r"== (\w+)\n\w+: (\d+) swapped, 0 skipped", printed)
    skipped = re.findall(r"== (\w+): skipped", printed)
    assert len(run) + len(skipped) == 8
    expected = {"timm_network": "12", "timm_by_another_name": "12", "torchvision_network": "18"}
    if importlib.util.find_spec("transformers") is not None:
        expected |= {"hugging_face_v1": "12", "hugging_face_v2": "12", "hugging_face_dinov3": "12"}
    if importlib.util.find_spec("segmentation_models_pytorch") is not None:
        expected["segmentation_models_pytorch"] = "12"
    assert expected.items() <= dict(run).items()
    differences = numbers(printed, r"largest difference: (\S+)")
    assert len(differences) == len(run)
    assert all(difference < (1e-3 if torch.cuda.is_available() else 1e-5) for difference in differences)
    assert any(differences), "nothing ran on other operators than before"


def test_examples_run_train_timm(tmp_path):
    """What it saves is timm's: accelerated or not, a network of timm reads it."""
    output = tmp_path / "last.pth"
    printed = run_example("train_timm", "--output", str(output))
    assert "12 swapped, 0 skipped" in printed
    losses = numbers(printed, r"epoch \d+: loss ([\d.]+)")
    assert len(losses) == 5
    assert losses[-1] < 0.75 * losses[0]
    saved = torch.load(output, weights_only=True)
    model = pytest.importorskip("timm").create_model("convnext_atto", num_classes=4, checkpoint_path=str(output))
    assert list(saved["state_dict"]) == list(model.state_dict())
    assert all(torch.equal(value, saved["state_dict_ema"][name]) for name, value in model.state_dict().items())


def test_examples_run_train_timm_in_two_processes(tmp_path):
    """On a folder of images, black ones and white ones."""
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 16), ("val", 5)):
        for colour in ("black", "white"):
            folder = tmp_path / split / colour
            folder.mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (40, 48), colour).save(folder / f"{i}.png")
    options = ["--mixup", "0.8", "--epochs", "4", "--batch-size", "4", "--output", str(tmp_path / "last.pth")]
    printed = run_example("train_timm", "--data", str(tmp_path), *options, processes=2)
    assert printed.count("swapped, ") == 1, "both ranks report"
    assert numbers(printed, r"epoch \d+: loss ([\d.]+)")[-1] < 1
    assert numbers(printed, r"([\d.]+) % of the validation")[-1] > 75
    state = torch.load(tmp_path / "last.pth", weights_only=True)["state_dict"]
    model = pytest.importorskip("timm").create_model("convnext_atto", num_classes=2)
    assert "All keys matched" in str(model.load_state_dict(state, strict=True))


def test_examples_run_finetune_detection():
    printed = run_example("finetune_detection", "--steps", "40")
    losses = numbers(printed, r"loss ([\d.]+)")
    assert len(losses) == 4
    assert losses[-1] < 0.75 * losses[0]
    assert "not evaluated" in printed or numbers(printed, r"(\d+) % of the rectangles")[0] > 5


def test_examples_run_lora_huggingface():
    printed = run_example("lora_huggingface")
    before, tuned, merged = (part.split("\n\n")[0] for part in re.split("before LoRA|with LoRA|merged", printed)[1:])
    assert "12 swapped" in before
    assert "own forward" not in before
    assert "12 swapped" in tuned
    assert re.search(r"swapped +8 .*own forward: pwconv1 is peft", tuned)
    assert re.search(r"swapped +4 .*block of Hugging Face$", tuned, re.MULTILINE)
    assert merged.split("\n")[1:3] == before.split("\n")[1:3]
    losses = numbers(printed, r"loss ([\d.]+)")
    assert losses[-1] < 0.75 * losses[0]
    assert numbers(printed, r"largest difference: (\S+)")[0] < (1e-3 if torch.cuda.is_available() else 1e-5)
