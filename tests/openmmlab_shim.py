"""Lets mmpretrain, mmdetection and mmsegmentation be imported as their wheels are, years behind what they stand on."""

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path


class _Missing(types.ModuleType):
    """A module whose functions exist and raise: what nobody calls is not missed."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise RuntimeError(f"{self.__name__}.{name} is compiled code that is not installed")

        return missing


def install() -> None:
    """Stand-ins for mmcv's compiled operators (mmcv-lite has none), and for mmpretrain's models of language and images.

    Those import names that transformers no longer has, and `mmpretrain.models` imports them with its backbones. Call
    this before anything imports mmcv.
    """
    spec = importlib.util.find_spec("mmcv")
    if spec is None:
        return
    compiled = any(Path(spec.origin).parent.glob("_ext*"))
    for name in ("mmpretrain.models.multimodal",) if compiled else ("mmcv._ext", "mmpretrain.models.multimodal"):
        if name not in sys.modules:
            module = sys.modules[name] = _Missing(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__all__ = []
