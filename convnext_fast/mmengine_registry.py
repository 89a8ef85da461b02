"""``import convnext_fast.mmengine_registry`` registers the backbone ``ConvNeXtFast`` with OpenMMLab's mmengine.

In a config of mmdetection, mmsegmentation or mmpretrain::

    custom_imports = dict(imports=["convnext_fast.mmengine_registry"])
    model = dict(backbone=dict(type="ConvNeXtFast", arch="tiny", ...))  # the arguments of mmpretrain.ConvNeXt

Checkpoints of mmpretrain's ConvNeXt fit as they are, ``init_cfg=dict(type="Pretrained", ...)`` included.
"""

from __future__ import annotations

from .backbone import ConvNeXtBackbone


def _register() -> type[ConvNeXtBackbone]:
    try:
        from mmengine.model import BaseModule
        from mmengine.registry import MODELS
    except ImportError as error:
        raise ImportError(f"convnext_fast.mmengine_registry needs mmengine (pip install mmengine): {error}") from error

    class ConvNeXtFast(ConvNeXtBackbone, BaseModule):
        __doc__ = ConvNeXtBackbone.__doc__

        def __init__(self, *args, init_cfg=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.init_cfg = init_cfg  # weights are initialised already, as mmpretrain's init_cfg would by default

    ConvNeXtFast.__qualname__ = "ConvNeXtFast"  # so that it can be pickled
    MODELS.register_module(module=ConvNeXtFast, force=True)
    return ConvNeXtFast


ConvNeXtFast = _register()
