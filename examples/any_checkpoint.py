"""A checkpoint of another library in our ConvNeXt, and back: here timm's, saved by this script itself.

pip install timm torchvision && python examples/any_checkpoint.py
"""

import tempfile
from pathlib import Path

import timm
import torch

import convnext_fast

torch.manual_seed(0)
theirs = timm.create_model("convnext_femto", num_classes=10).eval()
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "fine_tuned.pth"
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, file)

    ours = convnext_fast.convnext_femto(num_classes=10).eval()
    print(convnext_fast.load_checkpoint(ours, file))

images = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    print("largest difference of logits:", (ours(images) - theirs(images)).abs().max().item())

back = convnext_fast.convert_state_dict(ours.state_dict(), to="timm", like=theirs)
print("back in timm:", theirs.load_state_dict(back, strict=True))
