"""What a stranger meets first: the commands of the README, the examples, the package's own metadata."""

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example):
    if example.stem == "any_checkpoint":
        pytest.importorskip("timm")
    code = f"from tests.torchvision_shim import install; install(); import runpy; runpy.run_path({str(example)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if example.stem == "any_checkpoint":
        difference = float(done.stdout.split("largest difference of logits:")[1].split()[0])
        assert difference < 1e-5
        assert "All keys matched" in done.stdout
