"""Train timm's ConvNeXt on the kernels, in one process or several: a script like any other on timm, plus a line.

python examples/train_timm.py                              # random images, a few seconds on any machine
torchrun --nproc-per-node 8 examples/train_timm.py --data imagenet --model convnext_tiny --image-size 224 \
    --batch-size 128 --epochs 300 --lr 1e-3 --mixup 0.8 --workers 8   # imagenet/train/<class>/*, imagenet/val/<class>/*

The learning rate is for 1024 images a step (the paper's 4e-3 is for 4096). Nothing is kept to resume from.
"""

import argparse
import gc
from functools import partial

import timm
import torch
from timm.data import Mixup, create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from timm.utils.distributed import init_distributed_device_so
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
    # Not timm's "rand-m9...": it may posterize to no bits at all, which Pillow by now refuses.
    augmented = create_transform(**config, is_training=True, auto_augment="3a", re_prob=0.25)
    train = ImageFolder(f"{args.data}/train", augmented)
    return train, ImageFolder(f"{args.data}/val", create_transform(**config)), len(train.classes)


def main(args):
    on_gpu = torch.cuda.is_available()
    process = init_distributed_device_so("cuda" if on_gpu else "cpu")  # nccl or gloo, where torchrun started several
    device, rank, world = torch.device(process["device"]), process["global_rank"], process["world_size"]
    say = print if rank == 0 else lambda *_: None
    random_seed(0)  # the same weights everywhere

    train_set, val_set, classes = datasets(args)
    model = timm.create_model(args.model, args.pretrained, num_classes=classes, drop_path_rate=args.drop_path)
    model = model.to(device, memory_format=torch.channels_last)
    report = convnext_fast.accelerate(model)  # before DDP and torch.compile, which look at what they wrap
    say(report)

    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True)
    net = DistributedDataParallel(model, [device] if on_gpu else None) if world > 1 else model
    net = torch.compile(net) if args.compile else net

    sampler = DistributedSampler(train_set, world, rank)
    loader = partial(DataLoader, batch_size=args.batch_size, num_workers=args.workers, pin_memory=on_gpu)
    train = loader(train_set, sampler=sampler, drop_last=True)
    if len(train) == 0:
        raise SystemExit(f"{len(train_set)} images are fewer than {world} processes × --batch-size {args.batch_size}")
    val = loader(Subset(val_set, range(rank, len(val_set), world)))
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05)
    per_update = {"step_on_epochs": False, "updates_per_epoch": len(train)}
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=args.epochs, warmup_epochs=args.epochs // 15, **per_update)
    mixup = Mixup(args.mixup, cutmix_alpha=1.0, num_classes=classes) if args.mixup > 0 else None
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)

    random_seed(0, rank)  # but what is drawn for the images differs
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        net.train()
        sums = torch.zeros(2, device=device)  # of losses, and of images that are classified right
        for step, (images, labels) in enumerate(train, 1 + epoch * len(train)):
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            images, labels = mixup(images, labels) if mixup else (images, labels)
            with torch.autocast(device.type, torch.bfloat16):
                loss = criterion(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(step)
            ema.update(model, step)
            sums[0] += loss.detach()

        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            for images, labels in val:
                logits = ema.module(images.to(device, memory_format=torch.channels_last))
                sums[1] += (logits.argmax(1) == labels.to(device)).sum()
        if world > 1:
            dist.all_reduce(sums)
        loss, right = sums[0] / len(train) / world, 100 * sums[1] / len(val_set)
        say(f"epoch {epoch + 1}: loss {loss:.3f}, {right:.1f} % of the validation images right (EMA)")
        if rank == 0:  # names and values are timm's: timm.create_model(..., checkpoint_path=args.output) reads them
            states = {"state_dict": model.state_dict(), "state_dict_ema": ema.module.state_dict()}
            torch.save({"arch": args.model, "epoch": epoch, **states}, args.output)
    if world > 1:
        del net
        gc.collect()  # with gloo, a process can wait for ever where DDP's reducer outlives the group
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="a folder with train/<class>/* and val/<class>/*; without it, random images")
    add("--model", default="convnext_atto")
    add("--pretrained", action="store_true")
    add("--output", default="last.pth")
    add("--compile", action="store_true")
    add("--mixup", type=float, default=0.0, help="its α, with CutMix beside it; even batches only")
    for name, default in {"image-size": 32, "batch-size": 8, "epochs": 5, "workers": 0}.items():
        add(f"--{name}", type=int, default=default)
    for name, default in {"lr": 5e-4, "drop-path": 0.1, "ema-decay": 0.9999}.items():
        add(f"--{name}", type=float, default=default)
    main(parser.parse_args())
