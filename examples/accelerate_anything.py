"""Networks of other libraries on the kernels: what was swapped in each, and what they compute before and after.

pip install timm torchvision transformers segmentation-models-pytorch && python examples/accelerate_anything.py
"""

import torch

import convnext_fast
import dwconv_kernels as dk

SIZES = {"depths": [2, 2, 6, 2], "hidden_sizes": [40, 80, 160, 320]}  # atto, as Hugging Face's configs spell it


def timm_network():
    import timm

    return timm.create_model("convnext_atto", pretrained=False)


def timm_by_another_name():
    """Where only a name can be given, this import makes one for every ConvNeXt of timm; nothing else is to be done."""
    import timm

    import convnext_fast.timm_registry  # noqa: F401

    return timm.create_model("convnextv2_fast_atto", pretrained=False)


def torchvision_network():
    from torchvision.models import convnext_tiny

    return convnext_tiny(weights=None)


def hugging_face_v1():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(ConvNextConfig(**SIZES))


def hugging_face_v2():
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    return ConvNextV2ForImageClassification(ConvNextV2Config(**SIZES))


def hugging_face_dinov3():
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

    return DINOv3ConvNextModel(DINOv3ConvNextConfig(**SIZES))


def segmentation_models_pytorch():
    import segmentation_models_pytorch as smp

    return smp.Unet("tu-convnext_atto", encoder_weights=None, classes=3)


def mmpretrain_backbone():
    """In a config of mmpretrain, mmdetection or mmsegmentation no code is needed:

    custom_imports = dict(imports=["convnext_fast.mmengine_registry"])
    model = dict(backbone=dict(type="ConvNeXtFast", arch="tiny", ...))  # the arguments of mmpretrain.ConvNeXt
    """
    from mmpretrain.models.backbones import ConvNeXt

    return ConvNeXt(arch="atto")


def tensor_of(output):
    """The tensor in what a network returns: Hugging Face returns objects, mmpretrain a tuple."""
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    return output[-1] if isinstance(output, (tuple, list)) else output


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # in fp32 the networks' own convolutions would be rounded to TF32 before
images = torch.randn(2, 3, 64, 64, device=device).to(memory_format=torch.channels_last)

for build in (
    timm_network, timm_by_another_name, torchvision_network, hugging_face_v1, hugging_face_v2, hugging_face_dinov3,
    segmentation_models_pytorch, mmpretrain_backbone,
):  # fmt: skip
    try:
        model = build()
    except Exception as error:  # a library that is not installed, or too old or new for what is installed beside it
        print(f"\n== {build.__name__}: skipped, {type(error).__name__}: {error}")
        continue
    model = model.to(device, memory_format=torch.channels_last)
    model.eval()
    convnext_fast.restore(model)  # what the name with "fast" had accelerated
    with torch.no_grad():  # in a network without training, layer scale 1e-6 or a GRN of zeros hides what blocks compute
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    # On a CPU accelerated modules run their own forward; under "torch" our operators, on PyTorch's kernels.
    with torch.inference_mode(), dk.backend("auto" if device == "cuda" else "torch"):
        before = tensor_of(model(images))
    report = convnext_fast.accelerate(model)  # the line that your script needs
    with torch.inference_mode(), dk.backend("auto" if device == "cuda" else "torch"):
        after = tensor_of(model(images))
    print(f"\n== {build.__name__}\n{report}")
    print(f"largest difference: {(after - before).abs().max() / before.abs().max():.1e} of the largest value")
