"""Classifying image files with a checkpoint of ``train`` or ``demo``, or one of any other origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .checkpoint import load_checkpoint, own_names, read_checkpoint
from .data import Preprocessing, open_image
from .image_folder import head_size
from .model import ConvNeXt
from .run_folder import read_run_checkpoint
from .zoo import create_model, list_models


@dataclass
class Classifier:
    """A network in evaluation mode with what belongs to it."""

    model: nn.Module
    class_names: Sequence[str]
    preprocessing: Preprocessing

    @torch.inference_mode()
    def __call__(self, path: str | Path, topk: int = 5) -> list[tuple[str, float]]:
        """The ``topk`` most probable (class name, probability) of an image file, best first.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it is not an image.
        """
        if topk < 1:
            raise ValueError(f"topk is {topk}; 1 or more is allowed")
        device = next(self.model.parameters()).device
        pixels = self.preprocessing(open_image(path, self.preprocessing.channels))
        probabilities = self.model(pixels.unsqueeze(0).to(device)).float().softmax(1)[0]
        values, indices = probabilities.topk(min(topk, len(probabilities)))
        return [(self.class_names[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]


def load_classifier(
    checkpoint: str | Path,
    model: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """The classifier in a checkpoint file.

    One of ``train`` or ``demo`` brings everything; with EMA its averaged weights are taken. For any other ``model`` is
    the network's name (found by the shapes of the weights where None), and images are normalised as for ImageNet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, does not fit ``model``, ``class_names`` are not as many as its classes, or
            ``image_size`` is too small for the network.
    """
    run = read_run_checkpoint(checkpoint)
    if run is not None:
        network, names, preprocessing = _from_run(run, checkpoint, model)
    else:
        weights = read_checkpoint(checkpoint)
        num_classes = head_size(weights)
        if num_classes == 0:
            raise ValueError(f"checkpoint {checkpoint} has no head to classify with")
        network = create_model(model or _name_of(weights, checkpoint), num_classes=num_classes)
        load_checkpoint(network, checkpoint)
        names, preprocessing = [f"class {i}" for i in range(num_classes)], Preprocessing()
    if class_names is not None and len(class_names) != len(names):
        raise ValueError(f"{len(class_names)} class names are given; the checkpoint has {len(names)} classes")
    if image_size is not None:
        if image_size < network.reduction:
            raise ValueError(f"image_size is {image_size}; {network.reduction} or more is allowed for this network")
        preprocessing = replace(preprocessing, image_size=image_size)
    return Classifier(network.to(device).eval(), class_names or names, preprocessing)


def build_network(architecture: dict) -> nn.Module:
    """The network that ``architecture`` {"name": of a builder or None, "kwargs": …} of a checkpoint describes."""
    name, kwargs = architecture["name"], architecture["kwargs"]
    return ConvNeXt(**kwargs) if name is None else create_model(name, **kwargs)


def _from_run(run: dict, checkpoint: str | Path, model: str | None) -> tuple[nn.Module, list[str], Preprocessing]:
    try:
        name = run["architecture"]["name"]
        if model is not None and model != name:
            raise ValueError(
                f"--model is {model}; checkpoint {checkpoint} was trained as {name or 'a custom ConvNeXt'}"
            )
        network = build_network(run["architecture"])
        weights = run["model"] if run.get("model_ema") is None else run["model_ema"]
        network.load_state_dict(weights)
        return network, run["class_names"], Preprocessing.from_dict(run["preprocessing"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"checkpoint {checkpoint} says it is of this package, and is incomplete: {error}") from error


def _name_of(weights: dict, checkpoint: str | Path) -> str:
    """The builder whose parameters have the names and shapes of ``weights``, the head aside."""
    found = _shapes(own_names(weights))
    for name in list_models():
        if _shapes(create_model(name, device="meta").state_dict()) == found:
            return name
    raise ValueError(f"no network of convnext_fast has the shapes of checkpoint {checkpoint}; name one with --model")


def _shapes(state_dict: dict) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items() if not key.startswith("head.")}
