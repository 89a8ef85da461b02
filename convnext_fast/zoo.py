"""The published networks, as builders: ConvNeXt, and those that it is compared with.

Every builder takes ``pretrained`` and ``in_22k`` and passes what is left to the constructor of its network:

- ``pretrained=True`` downloads the published weights (:mod:`convnext_fast.pretrained`); a path loads that file, in any
  dialect that :func:`convnext_fast.load_checkpoint` reads.
- ``in_22k=True`` asks for the weights that were pretrained on ImageNet-22K. For V1 these have 21 841 classes, so
  ``num_classes`` then defaults to that; those of V2 were fine-tuned on ImageNet-1K and have 1000.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

from torch import nn

from .convmixer import ConvMixer
from .dwnet import DWNet
from .model import ConvNeXt, ConvNeXtIsotropic
from .pretrained import load_pretrained, pretrained_arguments
from .replknet import RepLKNet

MODELS: dict[str, Callable[..., nn.Module]] = {}
NETWORKS: dict[str, type[nn.Module]] = {}


def list_models() -> list[str]:
    """Names of all builders, each also an attribute of :mod:`convnext_fast`."""
    return list(MODELS)


def create_model(name: str, **kwargs) -> nn.Module:
    """``create_model("convnext_tiny", ...)`` is ``convnext_tiny(...)``.

    Raises:
        ValueError: there is no network of that name.
    """
    _check_name(name)
    return MODELS[name](**kwargs)


def network_arguments(name: str) -> set[str]:
    """Names of the arguments of the network ``name``, those of its builder left out.

    Raises:
        ValueError: there is no network of that name.
    """
    _check_name(name)
    return set(inspect.signature(NETWORKS[name]).parameters)


def _check_name(name: str) -> None:
    if name not in MODELS:
        raise ValueError(f"name is {name!r}; allowed: {', '.join(MODELS)}")


def _builder(name: str, network: type[nn.Module], summary: str, **architecture) -> Callable[..., nn.Module]:
    def build(pretrained: bool | str | os.PathLike = False, in_22k: bool = False, **kwargs) -> nn.Module:
        pretrained = pretrained if isinstance(pretrained, (str, os.PathLike)) else bool(pretrained)
        published = pretrained_arguments(name, in_22k) if pretrained is True else {}
        model = network(**{**architecture, **published, **kwargs})
        if pretrained:
            load_pretrained(model, name, pretrained, in_22k)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{summary}; ``**kwargs`` go to :class:`{network.__name__}`, see :mod:`convnext_fast.zoo`."
    MODELS[name], NETWORKS[name] = build, network
    return build


def _v1(name: str, depths: tuple, dims: tuple) -> Callable[..., nn.Module]:
    return _builder(name, ConvNeXt, f"ConvNeXt, depths {depths}, dims {dims}", depths=depths, dims=dims)


def _v2(name: str, depths: tuple, dims: tuple) -> Callable[..., nn.Module]:
    summary = f"ConvNeXt V2 (GRN, no layer scale), depths {depths}, dims {dims}"
    return _builder(name, ConvNeXt, summary, depths=depths, dims=dims, use_grn=True, layer_scale_init_value=0.0)


def _isotropic(name: str, depth: int, dim: int) -> Callable[..., nn.Module]:
    return _builder(name, ConvNeXtIsotropic, f"Isotropic ConvNeXt, depth {depth}, dim {dim}", depth=depth, dim=dim)


convnext_atto = _v1("convnext_atto", (2, 2, 6, 2), (40, 80, 160, 320))
convnext_femto = _v1("convnext_femto", (2, 2, 6, 2), (48, 96, 192, 384))
convnext_pico = _v1("convnext_pico", (2, 2, 6, 2), (64, 128, 256, 512))
convnext_nano = _v1("convnext_nano", (2, 2, 8, 2), (80, 160, 320, 640))
convnext_tiny = _v1("convnext_tiny", (3, 3, 9, 3), (96, 192, 384, 768))
convnext_small = _v1("convnext_small", (3, 3, 27, 3), (96, 192, 384, 768))
convnext_base = _v1("convnext_base", (3, 3, 27, 3), (128, 256, 512, 1024))
convnext_large = _v1("convnext_large", (3, 3, 27, 3), (192, 384, 768, 1536))
convnext_xlarge = _v1("convnext_xlarge", (3, 3, 27, 3), (256, 512, 1024, 2048))

convnext_isotropic_small = _isotropic("convnext_isotropic_small", 18, 384)
convnext_isotropic_base = _isotropic("convnext_isotropic_base", 18, 768)
convnext_isotropic_large = _isotropic("convnext_isotropic_large", 36, 1024)

convnextv2_atto = _v2("convnextv2_atto", (2, 2, 6, 2), (40, 80, 160, 320))
convnextv2_femto = _v2("convnextv2_femto", (2, 2, 6, 2), (48, 96, 192, 384))
convnextv2_pico = _v2("convnextv2_pico", (2, 2, 6, 2), (64, 128, 256, 512))
convnextv2_nano = _v2("convnextv2_nano", (2, 2, 8, 2), (80, 160, 320, 640))
convnextv2_tiny = _v2("convnextv2_tiny", (3, 3, 9, 3), (96, 192, 384, 768))
convnextv2_small = _v2("convnextv2_small", (3, 3, 27, 3), (96, 192, 384, 768))
convnextv2_base = _v2("convnextv2_base", (3, 3, 27, 3), (128, 256, 512, 1024))
convnextv2_large = _v2("convnextv2_large", (3, 3, 27, 3), (192, 384, 768, 1536))
convnextv2_huge = _v2("convnextv2_huge", (3, 3, 27, 3), (352, 704, 1408, 2816))


def _convmixer(name: str, dim: int, depth: int, **architecture) -> Callable[..., nn.Module]:
    return _builder(name, ConvMixer, f"ConvMixer, dim {dim}, depth {depth}", dim=dim, depth=depth, **architecture)


def _dwnet(name: str, embed_dim: int, depths: tuple) -> Callable[..., nn.Module]:
    summary = f"Swin Transformer with 7×7 depthwise convolution for attention, depths {depths}, embed_dim {embed_dim}"
    return _builder(name, DWNet, summary, embed_dim=embed_dim, depths=depths)


def _replknet(name: str, sizes: tuple, channels: tuple, **architecture) -> Callable[..., nn.Module]:
    summary = f"RepLKNet, large kernels {sizes}, channels {channels}"
    settings = {"large_kernel_sizes": sizes, "layers": (2, 2, 18, 2), "channels": channels, "drop_path_rate": 0.3}
    return _builder(name, RepLKNet, summary, **settings, **architecture)


convmixer_1536_20 = _convmixer("convmixer_1536_20", 1536, 20, kernel_size=9, patch_size=7)
convmixer_768_32 = _convmixer("convmixer_768_32", 768, 32, kernel_size=7, patch_size=7, act_layer=nn.ReLU)
convmixer_1024_20_ks9_p14 = _convmixer("convmixer_1024_20_ks9_p14", 1024, 20, kernel_size=9, patch_size=14)

dwnet_tiny = _dwnet("dwnet_tiny", 96, (2, 2, 6, 2))
dwnet_base = _dwnet("dwnet_base", 128, (2, 2, 18, 2))

replknet_31b = _replknet("replknet_31b", (31, 29, 27, 13), (128, 256, 512, 1024), small_kernel=5)
replknet_31l = _replknet("replknet_31l", (31, 29, 27, 13), (192, 384, 768, 1536), small_kernel=5)
replknet_xl = _replknet("replknet_xl", (27, 27, 27, 13), (256, 512, 1024, 2048), small_kernel=None, dw_ratio=1.5)
