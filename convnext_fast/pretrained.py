"""Published weights: where they are, and how they get into a network that may have other classes or channels.

- V1 comes from the original repository (MIT), except that atto, femto, pico and nano were never published there and are
  timm's (Apache-2.0). V2 comes from its original repository, **CC BY-NC 4.0: not for commercial use**.
- The isotropic networks and V1 tiny to large are trained on ImageNet-1K; ``in_22k=True`` asks for V1 as pretrained on
  ImageNet-22K (21 841 classes), and for V2 as pretrained there and then fine-tuned on ImageNet-1K (1000 classes).
- ConvMixer's (MIT) and DWNet's (MIT) are their authors'. RepLKNet's are on Google Drive alone, from where no program
  gets them; ``pretrained="/path/to/file"`` reads them.
- The addresses are those which these repositories and timm list. No test downloads from them: they are the one thing
  here that nothing but a user's network can prove.
"""

from __future__ import annotations

import http.client
import os
import re
import warnings
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError, check_values, load_checkpoint, own_names, read_checkpoint

_FACEBOOK = "https://dl.fbaipublicfiles.com/convnext/"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-rsb-weights/"

_CONVMIXER = "https://github.com/tmp-iclr/convmixer/releases/download/timm-v1.0/"
_DWNET = "https://github.com/Atten4Vis/DemystifyLocalViT/releases/download/prerelease/"

# (builder, in_22k) -> (address, classes). timm's file names end in the SHA-256's first digits, the others have none.
PRETRAINED: dict[tuple[str, bool], tuple[str, int]] = {
    ("convnext_atto", False): (f"{_TIMM}convnext_atto_d2-01bb0f51.pth", 1000),
    ("convnext_femto", False): (f"{_TIMM}convnext_femto_d1-d71d5b4c.pth", 1000),
    ("convnext_pico", False): (f"{_TIMM}convnext_pico_d1-10ad7f0d.pth", 1000),
    ("convnext_nano", False): (f"{_TIMM}convnext_nano_d1h-7eb4bdea.pth", 1000),
    ("convnext_tiny", False): (f"{_FACEBOOK}convnext_tiny_1k_224_ema.pth", 1000),
    ("convnext_small", False): (f"{_FACEBOOK}convnext_small_1k_224_ema.pth", 1000),
    ("convnext_base", False): (f"{_FACEBOOK}convnext_base_1k_224_ema.pth", 1000),
    ("convnext_large", False): (f"{_FACEBOOK}convnext_large_1k_224_ema.pth", 1000),
    ("convnext_tiny", True): (f"{_FACEBOOK}convnext_tiny_22k_224.pth", 21841),
    ("convnext_small", True): (f"{_FACEBOOK}convnext_small_22k_224.pth", 21841),
    ("convnext_base", True): (f"{_FACEBOOK}convnext_base_22k_224.pth", 21841),
    ("convnext_large", True): (f"{_FACEBOOK}convnext_large_22k_224.pth", 21841),
    ("convnext_xlarge", True): (f"{_FACEBOOK}convnext_xlarge_22k_224.pth", 21841),
    ("convnext_isotropic_small", False): (f"{_FACEBOOK}convnext_iso_small_1k_224_ema.pth", 1000),
    ("convnext_isotropic_base", False): (f"{_FACEBOOK}convnext_iso_base_1k_224_ema.pth", 1000),
    ("convnext_isotropic_large", False): (f"{_FACEBOOK}convnext_iso_large_1k_224_ema.pth", 1000),
    ("convnextv2_atto", False): (f"{_FACEBOOK}convnextv2/im1k/convnextv2_atto_1k_224_ema.pt", 1000),
    ("convnextv2_femto", False): (f"{_FACEBOOK}convnextv2/im1k/convnextv2_femto_1k_224_ema.pt", 1000),
    ("convnextv2_pico", False): (f"{_FACEBOOK}convnextv2/im1k/convnextv2_pico_1k_224_ema.pt", 1000),
    ("convnextv2_nano", False): (f"{_FACEBOOK}convnextv2/im1k/convnextv2_nano_1k_224_ema.pt", 1000),
    ("convnextv2_tiny", False): (f"{_FACEBOOK}convnextv2/im1k/convnextv2_tiny_1k_224_ema.pt", 1000),
    ("convnextv2_base", False): (f"{_FACEBOOK}convnextv2/im1k/convnextv2_base_1k_224_ema.pt", 1000),
    ("convnextv2_large", False): (f"{_FACEBOOK}convnextv2/im1k/convnextv2_large_1k_224_ema.pt", 1000),
    ("convnextv2_huge", False): (f"{_FACEBOOK}convnextv2/im1k/convnextv2_huge_1k_224_ema.pt", 1000),
    ("convnextv2_nano", True): (f"{_FACEBOOK}convnextv2/im22k/convnextv2_nano_22k_224_ema.pt", 1000),
    ("convnextv2_tiny", True): (f"{_FACEBOOK}convnextv2/im22k/convnextv2_tiny_22k_224_ema.pt", 1000),
    ("convnextv2_base", True): (f"{_FACEBOOK}convnextv2/im22k/convnextv2_base_22k_224_ema.pt", 1000),
    ("convnextv2_large", True): (f"{_FACEBOOK}convnextv2/im22k/convnextv2_large_22k_224_ema.pt", 1000),
    ("convnextv2_huge", True): (f"{_FACEBOOK}convnextv2/im22k/convnextv2_huge_22k_384_ema.pt", 1000),
    ("convmixer_1536_20", False): (f"{_CONVMIXER}convmixer_1536_20_ks9_p7.pth.tar", 1000),
    ("convmixer_768_32", False): (f"{_CONVMIXER}convmixer_768_32_ks7_p7_relu.pth.tar", 1000),
    ("convmixer_1024_20_ks9_p14", False): (f"{_CONVMIXER}convmixer_1024_20_ks9_p14.pth.tar", 1000),
    ("dwnet_tiny", False): (f"{_DWNET}dwnet_tiny_224.pth", 1000),
    ("dwnet_base", False): (f"{_DWNET}dwnet_base_224.pth", 1000),
}


def pretrained_arguments(name: str, in_22k: bool) -> dict[str, int | float]:
    """The constructor arguments in which the published weights of the builder ``name`` differ from its defaults.

    Raises:
        ValueError: there are no such weights; the message says which there are.
    """
    arguments: dict[str, int | float] = {"num_classes": _published(name, in_22k)[1]}
    if name == "convnext_isotropic_large":
        # The original trains it with layer scale, unlike the two smaller ones (its TRAINING.md), and its builder's
        # default has none.
        arguments["layer_scale_init_value"] = 1e-6
    return arguments


# The convolution that sees the images: isotropic ConvNeXt, ConvNeXt, ConvMixer, DWNet, RepLKNet.
_STEMS = (
    "stem.weight", "downsample_layers.0.0.weight", "stem.0.weight", "patch_embed.proj.weight", "stem.0.conv.weight",
)  # fmt: skip


class DownloadError(OSError, RuntimeError):
    """Published weights cannot be had. ``message`` is the text without advice on this package's functions."""

    def __init__(self, message: str, advice: str = ""):
        super().__init__(message + advice)
        self.message = message


def download_pretrained(name: str, in_22k: bool = False) -> None:
    """Get the weights of the builder ``name`` into torch's cache, unless they are there.

    Raises:
        ValueError: nothing is published under this name.
        DownloadError: a RuntimeError; the download failed, or gave a file that cannot be read; that file is not kept.
    """
    _download(_published(name, in_22k)[0])


def load_pretrained(model: nn.Module, name: str, source: bool | str | os.PathLike, in_22k: bool) -> None:
    """Load published weights, or those in a file, into ``model``.

    Names, shapes and finiteness of everything are checked before anything is changed.

    - A head of another number of classes is not loaded; the model's stays as it was initialised, with a warning. A
      model without a head (``num_classes=0``, ``features_only=True``) takes what it has.
    - A stem for images of Q channels is made from one for RGB or grey, W (C, P, k, k), so that images whose channels
      are all alike give the same features: for one channel ``W'[:, 0] = Σ_p W[:, p]``; for Q channels
      ``W'[:, q] = W[:, q mod P] · P / Q``, exact where Q is a multiple of P.

    Args:
        model: a network of this package.
        name: the builder's, such as ``"convnext_tiny"``.
        source: True downloads into ``torch.hub.get_dir()/checkpoints``, once; a path reads that file, of any dialect.
        in_22k: which of the published weights; see the module.

    Raises:
        ValueError: nothing is published under this name, or (CheckpointError) the weights do not fit the model.
        DownloadError: a RuntimeError; see :func:`download_pretrained`.
        FileNotFoundError: ``source`` is a path, and there is no such file.
    """
    if source is True:
        url, _ = _published(name, in_22k)
        where, state = url, _download(url)
    else:
        where, state = os.fspath(source), read_checkpoint(source)
    weights = own_names(state)
    own = model.state_dict()
    stem = next((name for name in _STEMS if name in own), None)
    if stem in weights:
        weights[stem] = _stem_for(weights[stem], own[stem].shape[1])
    theirs, ours = weights.get("head.weight"), own.get("head.weight")
    if theirs is not None and ours is not None and theirs.shape[0] != ours.shape[0]:
        warnings.warn(
            f"{where} has {theirs.shape[0]} classes and the model {ours.shape[0]}: everything is loaded but the head, "
            "which stays freshly initialised",
            stacklevel=3,
        )
        weights.update({key: own[key] for key in ("head.weight", "head.bias")})
    try:
        load_checkpoint(model, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", error.advice) from None


def _published(name: str, in_22k: bool) -> tuple[str, int]:
    if (name, bool(in_22k)) in PRETRAINED:
        return PRETRAINED[name, bool(in_22k)]
    if (name, not in_22k) in PRETRAINED:
        raise ValueError(f"{name} has no published weights with in_22k={in_22k}; in_22k={not in_22k} has")
    names = ", ".join(dict.fromkeys(name for name, _ in PRETRAINED))
    raise ValueError(f"no address of published weights is known for {name}; it is for: {names}")


def _download(url: str) -> dict[str, Tensor]:
    """The state_dict at ``url``, from torch's cache where it is there already."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    sha256 = re.search(r"-([0-9a-f]{8})\.", file.name)
    instead = ' Try again, or get the file in another way and pass pretrained="/path/to/file"'
    while True:
        cached = file.exists()
        if not cached:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Downloads under another name, checks the hash, and renames.
                torch.hub.download_url_to_file(url, str(file), sha256[1] if sha256 else None, progress=True)
            except (OSError, URLError, http.client.HTTPException, RuntimeError) as error:
                raise DownloadError(f"cannot download {url}: {error}.", instead) from error
        try:
            state = read_checkpoint(file)
            check_values(state)
            return state
        except CheckpointError as error:
            # A connection that breaks off leaves a short file, and torch.hub does not compare lengths.
            file.unlink(missing_ok=True)
            if not cached:
                raise DownloadError(f"{url} gave a file that cannot be used: {error}.", instead) from error


def _stem_for(weight: Tensor, channels: int) -> Tensor:
    """The weight (C, P, k, k) of a stem for RGB or grey images, for images of ``channels`` channels."""
    theirs = weight.shape[1]
    if theirs not in (1, 3) or channels == theirs:  # of other channels it is not known what they show
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(channels) % theirs] * (theirs / channels)
