"""``import convnext_fast.timm_registry`` registers timm's ConvNeXt networks on the kernels with timm.

``timm.create_model("convnext_fast_tiny", pretrained=True)`` is ``timm.create_model("convnext_tiny", pretrained=True)``
and :func:`convnext_fast.accelerate`: the same arguments, weights, parameter names and methods. So for every name that
begins with ``convnext_`` or ``convnextv2_``, with tags (``convnext_fast_tiny.in12k_ft_in1k``), ``features_only=True``,
and where others go by timm's names: ``segmentation_models_pytorch.Unet("tu-convnext_fast_tiny")``. Not with
``scriptable=True``: torch.jit.script needs :func:`convnext_fast.restore` first.
"""

from __future__ import annotations

import sys

from torch import nn

from .accelerate import accelerate

__all__: list[str] = []  # timm adds the names that it registers,
default_cfgs: dict = {}  # and finds here where their weights are


def _register() -> None:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"convnext_fast.timm_registry needs timm (pip install timm): {error}") from error
    for name in timm.list_models(["convnext_*", "convnextv2_*"], exclude_filters=["*_fast_*"]):
        fast = name.replace("_", "_fast_", 1)
        if not timm.is_model(fast):  # a second time, where this module is reloaded
            weights = timm.models.get_arch_pretrained_cfgs(name)
            named = {tagged.replace(name, fast, 1): cfg for tagged, cfg in weights.items()}
            default_cfgs.update(timm.models.generate_default_cfgs(named))
            timm.models.register_model(_entry(fast, timm.models.model_entrypoint(name)))


def _entry(name: str, original):
    """A function ``name`` of this module that builds ``original`` and accelerates it."""

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        model = original(pretrained=pretrained, **kwargs)
        accelerate(model)
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"timm's {original.__name__}, accelerated."
    setattr(sys.modules[__name__], name, entry)
    return entry


_register()
