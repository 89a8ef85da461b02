"""Train timm's ConvNeXt on the kernels, in one process or several: a script like any other on timm, plus a line.

python examples/train_timm.py                              # random images, a few seconds on any machine
torchrun --nproc-per-node 8 examples/train_timm.py --data imagenet --model convnext_tiny --image-size 224 \
    --batch-size 128 --epochs 300 --lr 4e-3 --mixup 0.8 --workers 8   # imagenet/train/<class>/*, imagenet/val/<class>/*
"""

import argparse

import timm
import torch
from timm.data import Mixup, create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, init_distributed_device_so
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from torchvision.datasets import ImageFolder

import convnext_fast


def datasets(args):
    """(training, validation, number of classes), of a folder or of noise whose brightness tells the class."""
    if args.data is None:
        labels = torch.arange(96) % 4
        images = torch.randn(96, 3, args.image_size, args.image_size) + labels.float().view(-1, 1, 1, 1) - 1.5
        return TensorDataset(images[:64], labels[:64]), TensorDataset(images[64:], labels[64:]), 4
    pretrained = timm.get_pretrained_cfg(args.model).to_dict()
    config = resolve_data_config({"img_size": args.image_size}, pretrained_cfg=pretrained)
    augmented = create_transform(**config, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)
    train = ImageFolder(f"{args.data}/train", augmented)
    return train, ImageFolder(f"{args.data}/val", create_transform(**config)), len(train.classes)


def main(args):
    on_gpu = torch.cuda.is_available()
    process = init_distributed_device_so("cuda" if on_gpu else "cpu")  # nccl or gloo, where torchrun started several
    device, rank, world = torch.device(process["device"]), process["global_rank"], process["world_size"]
    say = print if rank == 0 else lambda *_: None
    torch.manual_seed(0)  # the same weights everywhere

    train_set, val_set, classes = datasets(args)
    model = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=classes, drop_path_rate=args.drop_path
    )
    model = model.to(device, memory_format=torch.channels_last)
    report = convnext_fast.accelerate(model)  # before DDP and torch.compile, which look at what they wrap
    say(report)

    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True)
    net = DistributedDataParallel(model, [device] if on_gpu else None) if world > 1 else model
    net = torch.compile(net) if args.compile else net

    sampler = DistributedSampler(train_set, world, rank)
    settings = {"num_workers": args.workers, "pin_memory": on_gpu}
    train = DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, **settings)
    val = DataLoader(Subset(val_set, range(rank, len(val_set), world)), args.batch_size, **settings)
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.epochs, warmup_epochs=args.epochs // 15, warmup_lr=1e-6,
        step_on_epochs=False, updates_per_epoch=len(train),
    )  # fmt: skip
    mixup = Mixup(args.mixup, cutmix_alpha=1.0, num_classes=classes) if args.mixup > 0 else None
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)

    torch.manual_seed(rank)  # but what is drawn for the images differs
    step = 0
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        net.train()
        total = torch.zeros((), device=device)
        for images, labels in train:
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            if mixup:
                images, labels = mixup(images, labels)
            with torch.autocast(device.type, torch.bfloat16):
                loss = criterion(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            ema.update(model, step)
            total += loss.detach()

        right = torch.zeros((), device=device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            for images, labels in val:
                logits = ema.module(images.to(device, memory_format=torch.channels_last))
                right += (logits.argmax(1) == labels.to(device)).sum()
        if world > 1:
            for value in (total, right):
                dist.all_reduce(value)
        mean, accuracy = total.item() / len(train) / world, 100 * right.item() / len(val_set)
        say(f"epoch {epoch + 1}: loss {mean:.3f}, {accuracy:.1f} % of the validation images right (EMA)")
        if rank == 0:  # names and values are timm's: timm.create_model(..., checkpoint_path=args.output) reads it
            states = {"state_dict": model.state_dict(), "state_dict_ema": ema.module.state_dict()}
            torch.save({"arch": args.model, "epoch": epoch, **states}, args.output)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder with train/<class>/* and val/<class>/*; random images without")
    parser.add_argument("--model", default="convnext_atto")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--output", default="last.pth")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--mixup", type=float, default=0.0, help="its α, with CutMix beside it; even batches only")
    for name, default in (("image-size", 32), ("batch-size", 8), ("epochs", 4), ("workers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("lr", 1e-3), ("drop-path", 0.1), ("ema-decay", 0.9999)):
        parser.add_argument(f"--{name}", type=float, default=default)
    main(parser.parse_args())
