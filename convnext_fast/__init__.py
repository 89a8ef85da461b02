"""ConvNeXt V1 and V2, and their peers, on :mod:`dwconv_kernels`: model zoo, checkpoints of every dialect, training."""

from dwconv_kernels._version import __version__

from . import zoo
from .accelerate import AccelerateReport, accelerate, restore
from .backbone import ConvNeXtBackbone, fpn_backbone, pyramid_stages
from .block import GRN, Block, DropPath
from .checkpoint import (
    CheckpointError,
    LoadReport,
    convert_state_dict,
    detect_dialect,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from .convmixer import ConvMixer
from .dwnet import DWNet
from .model import ConvNeXt, ConvNeXtIsotropic, LayerNorm2d
from .replknet import RepLKBlock, RepLKNet
from .zoo import *  # noqa: F403
from .zoo import create_model, list_models

__all__ = [
    "GRN", "AccelerateReport", "Block", "CheckpointError", "ConvMixer", "ConvNeXt", "ConvNeXtBackbone",
    "ConvNeXtIsotropic", "DWNet", "DropPath", "LayerNorm2d", "LoadReport", "RepLKBlock", "RepLKNet", "__version__",
    "accelerate", "convert_state_dict", "create_model", "detect_dialect", "fpn_backbone", "list_models",
    "load_checkpoint", "pyramid_stages", "read_checkpoint", "restore", "save_checkpoint", *zoo.MODELS,
]  # fmt: skip
