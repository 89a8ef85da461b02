"""Lets torchvision be imported beside a torch that its compiled operators were not built for."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # operators disappear with the Library object that defines them


def install() -> None:
    """Declare the operators that torchvision registers fakes for at import, where its C extension does not load.

    Only then, and only if torchvision is installed: PyPI's wheels want CUDA libraries, so beside a CPU build of torch
    `import torchvision`, and with it timm, ends in "operator torchvision::nms does not exist". The networks work
    without these two; what calls them gets an error. Call this before anything imports torchvision.
    """
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or "torchvision" in sys.modules:
        return
    for extension in (file for suffix in ("so", "pyd") for file in Path(spec.origin).parent.glob(f"_C*.{suffix}")):
        with contextlib.suppress(OSError):  # it links libraries that are not there
            torch.ops.load_library(extension)
    if hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
