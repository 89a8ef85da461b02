"""RetinaNet of torchvision on a ConvNeXt with a feature pyramid, trained to find coloured rectangles.

pip install torchvision && python examples/finetune_detection.py
python examples/finetune_detection.py --model convnext_tiny --pretrained --channels 256 --batch-size 16 --steps 500
"""

import argparse
from functools import partial

import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, nms

import convnext_fast

SIZE = 96  # of the images; with an own data set, leave min_size and max_size below to torchvision
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.9]])  # one for each class


def rectangles(generator):
    """(image, target) as torchvision's detectors take them: two rectangles on grey noise."""
    image = 0.5 + 0.1 * torch.randn(3, SIZE, SIZE, generator=generator)
    labels = torch.randint(len(COLOURS), (2,), generator=generator)
    corners = torch.randint(0, SIZE // 2, (2, 2), generator=generator)
    sides = torch.randint(SIZE // 5, SIZE // 2, (2, 2), generator=generator)
    for label, (x, y), (w, h) in zip(labels, corners, sides, strict=True):
        image[:, y : y + h, x : x + w] = COLOURS[label, :, None, None]
    return image, {"boxes": torch.cat([corners, corners + sides], dim=1).float(), "labels": labels}


def batch(size, generator, device):
    images, targets = zip(*(rectangles(generator) for _ in range(size)), strict=True)
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return [image.to(device) for image in images], targets


def parameter_groups(model, lr, decay=0.8, weight_decay=0.05):
    """Lower learning rates for earlier stages; no weight decay for biases, norms and layer scales."""
    groups = {}
    for name, parameter in model.named_parameters():
        stage = int(name.split(".")[2]) if name.startswith("backbone.body.") else 4
        # Layer scales are (C, 1, 1) in torchvision's networks, GRN's parameters (1, 1, 1, C) in Hugging Face's.
        groups.setdefault((stage, parameter.squeeze().ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * decay ** (4 - stage), "weight_decay": weight_decay * decays}
        for (stage, decays), parameters in groups.items()
    ]


def main(args):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # timm's, torchvision's or Hugging Face's would do, too, after convnext_fast.accelerate(network).
    network = convnext_fast.create_model(args.model, pretrained=args.pretrained, drop_path_rate=0.1)
    backbone = convnext_fast.fpn_backbone(network, out_channels=args.channels, out_indices=(1, 2, 3))
    # One size of anchors for each map of the pyramid, here 12×12, 6×6, 3×3 and, pooled by torchvision, 2×2.
    anchors = AnchorGenerator(((16, 20, 25), (32, 40, 50), (64, 80, 100), (90, 110, 130)), ((0.5, 1.0, 2.0),) * 4)
    head = RetinaNetHead(args.channels, 9, len(COLOURS), partial(torch.nn.GroupNorm, 32))  # 9 anchors a pixel
    model = RetinaNet(backbone, len(COLOURS), SIZE, SIZE, anchor_generator=anchors, head=head)
    model = model.to(device, memory_format=torch.channels_last)

    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=args.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(1)
    model.train()
    mean = 0.0
    for step in range(1, args.steps + 1):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = model(*batch(args.batch_size, generator, device))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += loss.detach() / 10
        if step % 10 == 0:
            print(f"steps {step - 9} to {step}: loss {mean:.3f}")
            mean = 0.0

    try:
        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except RuntimeError:
        print("not evaluated: detections need compiled operators, which this torchvision does not have")
        return
    model.eval()
    images, targets = batch(32, generator, device)
    with torch.inference_mode():
        detections = model(images)
    found = []
    for detection, target in zip(detections, targets, strict=True):
        best = {name: value[: len(target["boxes"])] for name, value in detection.items()}  # sorted by score
        hit = box_iou(target["boxes"], best["boxes"]) > 0.5
        found.append((hit & (target["labels"][:, None] == best["labels"])).any(1))
    print(f"{100 * torch.cat(found).float().mean():.0f} % of the rectangles found in images not seen before")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnext_atto")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--channels", type=int, default=64, help="of the pyramid; 256 is usual")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    main(parser.parse_args())
