"""Arrows point down only: parses every import of the two packages and fails on an upward or sideways one."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAMILIES = ("depthwise", "norm_linear", "block")
OPTIONAL = {
    "kornia", "matplotlib", "mlxtend", "mmengine", "numpy", "PIL", "safetensors", "sklearn", "timm", "torchvision",
    "tqdm",
}  # fmt: skip

# (Of the reference, a launcher takes names of parameters and constants, and nothing that computes.)
LAUNCH = {"torch", "runtime", "registration", "dtypes", "kernels", "kernels_gluon", "config", "reference"}
# What a module of a family may import besides the standard library; "torch" and "triton" are the packages.
MAY_IMPORT = {
    "strips": {"triton", "primitives"},  # what the depthwise kernels share
    "tiles": {"triton", "primitives"},  # what those of layer norm + linear share, and those of the block
    "kernels": {
        "triton",
        "primitives",
        "strips",
        "kernels_weight",
        "kernels_strided",
        "tiles",
        "kernels_backward",
        "kernels_grn",
    },
    "kernels_backward": {"triton", "primitives", "tiles"},
    "kernels_grn": {"triton", "primitives"},
    "kernels_weight": {"triton", "primitives", "strips"},
    "kernels_strided": {"triton", "primitives", "strips", "kernels_weight"},
    "tiles_gluon": {"triton"},  # what the depthwise kernels for tensor cores share
    "kernels_gluon": {"triton", "tiles_gluon"},
    "kernels_tables": {"triton"},
    "config": {"devices", "config_tensor"},
    "config_tensor": {"devices"},
    "reference": {"torch", "dtypes"},
    "launch": {*LAUNCH, "launch_common", "launch_backward", "launch_tensor"},
    "launch_tensor": {*LAUNCH, "triton", "gluon_emulator", "config_tensor", "kernels_tables"},
    "launch_common": LAUNCH,  # of the block, whose launchers are in three files
    "launch_backward": {*LAUNCH, "launch_common"},
    "op": {"torch", "runtime", "registration", "dtypes", "config", "reference"},
    "__init__": set(),
}
# The block is made of the other two: it alone may stand on another family.
BLOCK_STANDS_ON = {
    "tiles": {"tiles"}, "kernels": {"tiles"}, "kernels_backward": {"tiles", "kernels_backward"},
    "kernels_grn": {"tiles"}, "config": {"config"}, "launch": {"launch", "config"}, "launch_common": {"launch"},
    "launch_backward": {"launch", "config"}, "reference": {"reference"},
    "op": {"op"},
}  # fmt: skip

# Files of a package's own folder, lowest first: each may import what stands before it.
DWCONV_KERNELS = [
    "_version", "devices", "dtypes", "runtime", "primitives", "interpreter", "gluon_emulator", "testing",
    "registration", "FAMILIES", "modules", "self_check_common", "self_check_depthwise", "self_check_norm_linear_bounds",
    "self_check_norm_linear", "self_check_block", "self_check", "__init__",
]  # fmt: skip
CONVNEXT_FAST = [
    "backend_in_use", "block", "class_swap", "block_dialects", "block_proof", "accelerate", "model", "convmixer",
    "dwnet", "replknet", "dialects", "other_names", "atomic_files", "checkpoint_files", "load_report", "checkpoint",
    "pretrained", "zoo", "backbone", "timm_registry", "mmengine_registry", "__init__", "distributed", "run_folder",
    "data", "folder_listing", "train", "image_folder", "classify", "demo", "cli", "__main__",
]  # fmt: skip


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path):
    """(dotted name of what is imported, line, is it inside a function?) for every import of a file."""
    module = path.relative_to(ROOT).with_suffix("").parts
    package = module[:-1]
    tree = ast.parse(path.read_text(), str(path))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    type_checking = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in type_checking:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                is_module = (ROOT / whole.replace(".", "/")).with_suffix(".py").exists() or (
                    ROOT / whole.replace(".", "/")
                ).is_dir()
                yield (whole if is_module else base), node.lineno, id(node) in inside


def is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def complaint_in_dwconv_kernels(path: Path, name: str) -> str | None:
    parts = path.relative_to(ROOT / "dwconv_kernels").with_suffix("").parts
    target = name.split(".")
    if len(parts) == 2:  # a module of a family
        family, module = parts
        allowed = MAY_IMPORT.get(module)
        if allowed is None:
            return f"a family has no file {module}.py"
        if target[0] != "dwconv_kernels":
            return None if target[0] in allowed else f"{module}.py may import {sorted(allowed)}"
        if len(target) > 1 and target[1] in FAMILIES:
            if len(target) < 3:
                return "import a module of the family, not the family"
            own = target[1] == family and target[2] in allowed
            other = family == "block" and target[2] in BLOCK_STANDS_ON.get(module, set())
            return None if own or other else f"{family}/{module}.py may not import {name}"
        return None if len(target) > 1 and target[1] in allowed else f"{module}.py may import {sorted(allowed)}"
    if parts[0] in ("primitives", "interpreter", "gluon_emulator") and target[0] in ("triton", "numpy"):
        return None
    if target[0] not in ("dwconv_kernels", "torch"):
        return "only torch, and Triton below the launchers"
    if target[0] == "torch":
        return None
    above = DWCONV_KERNELS.index(parts[0])
    below = "FAMILIES" if target[1] in FAMILIES else target[1]
    if target[1] in FAMILIES and (len(target) < 3 or target[2] != "op"):
        return "from above, a family is its op"
    return None if DWCONV_KERNELS.index(below) < above else f"{parts[0]}.py stands below {below}.py"


def complaint_in_convnext_fast(path: Path, name: str, inside: bool) -> str | None:
    module, target = path.stem, name.split(".")
    if target[0] == "torch":
        return None
    if target[0] == "dwconv_kernels":
        return None if len(target) == 1 or target[1] == "_version" else "only the public names of dwconv_kernels"
    if target[0] == "convnext_fast":
        below = target[1] if len(target) > 1 else "__init__"
        if CONVNEXT_FAST.index(below) < CONVNEXT_FAST.index(module):
            return None
        return f"{module}.py stands below {below}.py"
    return None if inside and target[0] in OPTIONAL else "an optional dependency is imported where it is used"


@pytest.mark.parametrize(
    "path", files("dwconv_kernels") + files("convnext_fast"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_arrows_point_down(path):
    complaints = []
    for name, line, inside in imports(path):
        if is_standard(name):
            continue
        if path.is_relative_to(ROOT / "dwconv_kernels"):
            complaint = complaint_in_dwconv_kernels(path, name)
        else:
            complaint = complaint_in_convnext_fast(path, name, inside)
        if complaint is None and inside and name.split(".")[0] in ("dwconv_kernels", "convnext_fast"):
            complaint = "an import inside a function hides a cycle"
        if complaint is not None:
            complaints.append(f"{path.name}:{line} imports {name}: {complaint}")
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    "file, code",
    [
        ("dwconv_kernels/depthwise/reference.py", "from . import op"),
        ("dwconv_kernels/depthwise/reference.py", "from .. import runtime"),
        ("dwconv_kernels/depthwise/op.py", "from ..norm_linear import op"),
        ("dwconv_kernels/depthwise/op.py", "import triton"),
        ("dwconv_kernels/depthwise/op.py", "from . import kernels"),
        ("dwconv_kernels/depthwise/config.py", "import torch"),
        ("dwconv_kernels/depthwise/kernels.py", "import torch"),
        ("dwconv_kernels/norm_linear/op.py", "from ..modules import DepthwiseConv2d"),
        ("dwconv_kernels/runtime.py", "from . import registration"),
        ("dwconv_kernels/runtime.py", "import triton"),
        ("dwconv_kernels/modules.py", "from .depthwise import reference"),
        ("dwconv_kernels/testing.py", "import convnext_fast"),
        ("convnext_fast/block.py", "from . import model"),
        ("convnext_fast/block.py", "from dwconv_kernels.depthwise.op import depthwise_conv2d"),
        ("convnext_fast/zoo.py", "import timm"),
        ("convnext_fast/zoo.py", "def f():\n    from . import train"),
        ("convnext_fast/model.py", "import PIL"),
    ],
)
def test_the_test_sees_wrong_arrows(file, code, tmp_path, monkeypatch):
    """The same check on a tree where one file holds one wrong import."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for path in Path(__file__).parents[1].glob("*/**/*.py"):
        relative = path.relative_to(Path(__file__).parents[1])
        if relative.parts[0] in ("dwconv_kernels", "convnext_fast"):
            (tmp_path / relative).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / relative).touch()
    for name in ("kernels", "config"):  # not every family has them yet
        (tmp_path / "dwconv_kernels" / "depthwise" / f"{name}.py").touch()
    (tmp_path / file).write_text(code + "\n")
    with pytest.raises(AssertionError, match="imports"):
        test_arrows_point_down(tmp_path / file)
