"""A network of your own on the depthwise operator: three blocks with 13×13 kernels, one training step.

python examples/large_kernel_network.py
"""

import torch
from torch import nn

import dwconv_kernels as dk


class Block(nn.Module):
    """Depthwise convolution over space, then a linear layer over channels."""

    def __init__(self, channels: int, kernel_size: int = 13):
        super().__init__()
        self.depthwise = dk.DepthwiseConv2d(channels, channels, kernel_size, padding="same")
        self.expand = dk.LayerNormLinear(channels, 2 * channels, activation="gelu")  # over the last dimension
        self.project = nn.Linear(2 * channels, channels)

    def forward(self, x):  # (N, C, H, W), best in channels_last
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + self.project(self.expand(y)).permute(0, 3, 1, 2)


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
network = nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), *[Block(32) for _ in range(3)]).to(device)
images = torch.randn(2, 3, 64, 64, device=device).to(memory_format=torch.channels_last)

with torch.autocast(device, torch.bfloat16):
    loss = network(images).float().square().mean()
loss.backward()

block = network[1].depthwise
x = torch.randn(2, 32, 16, 16, device=device)
print("loss", loss.item())
print("on the kernels, or why not:", dk.supports(dk.depthwise_conv2d, x, block.weight, block.bias, padding=6))
