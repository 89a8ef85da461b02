"""The networks that checkpoints come from: the original's, re-stated here, and each library's, all equally small."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import convnext_fast

DEPTHS, DIMS, CLASSES = (1, 2, 2, 1), (8, 12, 16, 20), 7


class OriginalNorm2d(nn.Module):
    """Layer norm over dimension 1, by its definition."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class OriginalGRN(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim)), nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.sqrt(x.pow(2).sum((1, 2), keepdim=True))
        return self.gamma * (x * (energy / (energy.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class OriginalBlock(nn.Module):
    def __init__(self, dim: int, v2: bool, layer_scale: bool):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim)) if layer_scale else None
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        if v2:
            self.grn = OriginalGRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        t = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        t = self.pwconv1(t)
        t = t * 0.5 * (1 + torch.erf(t / 2**0.5))
        t = self.pwconv2(self.grn(t) if hasattr(self, "grn") else t)
        t = t if self.gamma is None else self.gamma * t
        return x + t.permute(0, 3, 1, 2)


class Original(nn.Module):
    """The formulas and the parameter names of the two original repositories' classifiers."""

    def __init__(self, v2: bool = False):
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, DIMS[0], 4, 4), OriginalNorm2d(DIMS[0]))])
        for narrow, wide in itertools.pairwise(DIMS):
            self.downsample_layers.append(nn.Sequential(OriginalNorm2d(narrow), nn.Conv2d(narrow, wide, 2, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(OriginalBlock(dim, v2, layer_scale=not v2) for _ in range(depth)))
            for depth, dim in zip(DEPTHS, DIMS, strict=True)
        )
        self.norm, self.head = nn.LayerNorm(DIMS[-1], eps=1e-6), nn.Linear(DIMS[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((-2, -1))))


class OriginalIsotropic(nn.Module):
    def __init__(self, layer_scale: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 16, 16)
        self.blocks = nn.Sequential(*(OriginalBlock(24, False, layer_scale) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(24, eps=1e-6), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((-2, -1))))


def ours(v2: bool = False, **kwargs) -> nn.Module:
    arguments = {"depths": DEPTHS, "dims": DIMS, "num_classes": CLASSES, "use_grn": v2}
    return convnext_fast.ConvNeXt(**{**arguments, "layer_scale_init_value": 0.0 if v2 else 1e-6, **kwargs})


def timm(v2: bool = False, **kwargs) -> nn.Module:
    module = pytest.importorskip("timm.models.convnext")
    arguments = {"depths": DEPTHS, "dims": DIMS, "num_classes": CLASSES, "use_grn": v2}
    return module.ConvNeXt(**{**arguments, "ls_init_value": None if v2 else 1e-6, **kwargs})


def torchvision(**kwargs) -> nn.Module:
    module = pytest.importorskip("torchvision.models.convnext")
    dims = (*DIMS, None)
    settings = [module.CNBlockConfig(dims[i], dims[i + 1], DEPTHS[i]) for i in range(4)]
    return module.ConvNeXt(settings, stochastic_depth_prob=0.0, num_classes=CLASSES, **kwargs)


def huggingface(v2: bool = False, kind: str = "ForImageClassification", **kwargs) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    name = "ConvNextV2" if v2 else "ConvNext"
    config = getattr(transformers, f"{name}Config")(
        depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=CLASSES, **kwargs
    )
    return getattr(transformers, f"{name}{kind}")(config)


def dinov3(kind: str = "Model") -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="4.56")
    config = transformers.DINOv3ConvNextConfig(depths=list(DEPTHS), hidden_sizes=list(DIMS))
    return getattr(transformers, f"DINOv3ConvNext{kind}")(config)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its initial value, and no two alike: an exchanged or forgotten one then shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim in (2, 4) and parameter.shape[0] > 1 else 0
            noise = torch.rand(parameter.shape, generator=generator)
            # Weights keep the signal's size; vectors, layer scale (C, 1, 1) and GRN (1, 1, 1, 4C) are U(0.5, 1.5).
            parameter.copy_((noise - 0.5) * (12 / fan_in) ** 0.5 if fan_in else noise + 0.5)
    model.eval()  # of mmpretrain's, it returns None
    return model


def images(n: int = 2, height: int = 61, width: int = 75, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(5))


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits if "logits" in y else y.pooler_output


Builder = Callable[[], nn.Module]
CLASSIFIERS: dict[str, tuple[str, bool, Builder]] = {
    # name: (dialect, V2, builder)
    "original": ("facebook", False, Original),
    "original-v2": ("facebook", True, lambda: Original(v2=True)),
    "timm-linear": ("timm", False, timm),
    "timm-conv": ("timm", False, lambda: timm(conv_mlp=True)),
    "timm-v2-linear": ("timm", True, lambda: timm(v2=True)),
    "timm-v2-conv": ("timm", True, lambda: timm(v2=True, conv_mlp=True)),
    "torchvision": ("torchvision", False, torchvision),
    "huggingface": ("huggingface", False, huggingface),
    "huggingface-v2": ("huggingface", True, lambda: huggingface(v2=True)),
}


# One network of every variant, each with the dialect that it must be told to be.
VARIANTS = {
    **{name: (dialect, v2, build) for name, (dialect, v2, build) in CLASSIFIERS.items()},
    "ours": ("facebook", False, ours),
    "ours-v2": ("facebook", True, lambda: ours(v2=True)),
    "huggingface-bare": ("huggingface", False, lambda: huggingface(kind="Model")),
    "huggingface-v2-bare": ("huggingface", True, lambda: huggingface(v2=True, kind="Model")),
    "dinov3": ("dinov3", False, dinov3),
    "dinov3-backbone": ("dinov3", False, lambda: dinov3("Backbone")),
}
HEADLESS = {"huggingface-bare", "huggingface-v2-bare", "dinov3", "dinov3-backbone"}
PAIRS = list(itertools.product(VARIANTS, VARIANTS))


def state_of(name: str) -> dict[str, Tensor]:
    return randomise(VARIANTS[name][2]()).state_dict()


def v1() -> dict[str, Tensor]:
    return randomise(ours()).state_dict()


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def mmpretrain_state(v2: bool = False) -> dict[str, Tensor]:
    """A classifier's names as mmpretrain 1.2 writes them, spelled out for depths (1, 1, 1, 1)."""
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        state[name] = torch.rand(shape, generator=torch.Generator().manual_seed(len(state)))

    for i, (before, dim) in enumerate(zip((3, *DIMS), DIMS, strict=False)):
        conv, norm = (0, 1) if i == 0 else (1, 0)
        patch = 4 if i == 0 else 2
        put(f"backbone.downsample_layers.{i}.{conv}.weight", dim, before, patch, patch)
        put(f"backbone.downsample_layers.{i}.{conv}.bias", dim)
        put(f"backbone.downsample_layers.{i}.{norm}.weight", dim if i == 0 else before)
        put(f"backbone.downsample_layers.{i}.{norm}.bias", dim if i == 0 else before)
        block = f"backbone.stages.{i}.0"
        if not v2:
            put(f"{block}.gamma", dim)
        put(f"{block}.depthwise_conv.weight", dim, 1, 7, 7)
        put(f"{block}.depthwise_conv.bias", dim)
        put(f"{block}.norm.weight", dim)
        put(f"{block}.norm.bias", dim)
        put(f"{block}.pointwise_conv1.weight", 4 * dim, dim)
        put(f"{block}.pointwise_conv1.bias", 4 * dim)
        if v2:
            put(f"{block}.grn.gamma", 4 * dim)
            put(f"{block}.grn.beta", 4 * dim)
        put(f"{block}.pointwise_conv2.weight", dim, 4 * dim)
        put(f"{block}.pointwise_conv2.bias", dim)
    put("backbone.norm3.weight", DIMS[-1])
    put("backbone.norm3.bias", DIMS[-1])
    put("head.fc.weight", CLASSES, DIMS[-1])
    put("head.fc.bias", CLASSES)
    return state
