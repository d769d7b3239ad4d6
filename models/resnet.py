"""ResNet for small images (He et al. 2015, section 4.2): three stages of 3x3 convolutions.

forward(image: FLOAT [B, 3, H, W], values in [0, 1]) -> logits FLOAT [B, num_classes]

The image is normalised inside the model, so that everyone who holds the archive feeds it the same
plain pixels. Where a stage changes the shape, the shortcut is a 1x1 convolution.

Options:
  depth         6n + 2: 8, 14, 20, ... n residual blocks of two convolutions a stage. Required.
  width         channels of the first stage; the others have two and four times as many. Default: 16.
  num_classes   columns of the logits. Required.
  norm          batch (statistics are buffers) or group (8 groups, no buffers). Default: batch.
  mean, std     of the three channels, in [0, 1]. Default: those of CIFAR-10.
"""

from typing import List

import torch
from torch import nn

from models.options import Options


def _norm(kind, channels):
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(8, channels)


def _convolution(in_channels, out_channels, size, stride):
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, in_channels, channels, stride, norm):
        super().__init__()
        self.conv1 = _convolution(in_channels, channels, 3, stride)
        self.norm1 = _norm(norm, channels)
        self.conv2 = _convolution(channels, channels, 3, 1)
        self.norm2 = _norm(norm, channels)
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                _convolution(in_channels, channels, 1, stride), _norm(norm, channels)
            )
        else:
            self.shortcut = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    # Attributes and not buffers: constants have no business in pushes and checkpoints.
    mean: List[float]
    std: List[float]

    def __init__(self, blocks, width, num_classes, norm, mean, std):
        super().__init__()
        self.mean = mean
        self.std = std
        self.conv = _convolution(3, width, 3, 1)
        self.norm = _norm(norm, width)
        stages = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                out = width * 2**stage
                stages.append(Block(channels, out, stride, norm))
                channels = out
        self.blocks = nn.Sequential(*stages)
        self.output = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(self.mean, dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
        x = torch.relu(self.norm(self.conv((image - mean) / std)))
        return self.output(self.blocks(x).mean(dim=[2, 3]))


def build(options):
    opts = Options("resnet", options)
    depth = opts.integer("depth", minimum=8)
    width = opts.integer("width", "16")
    num_classes = opts.integer("num_classes")
    norm = opts.choice("norm", ("batch", "group"), "batch")
    mean = opts.numbers("mean", "0.4914,0.4822,0.4465")
    std = opts.numbers("std", "0.2470,0.2435,0.2616")
    opts.finish()
    if (depth - 2) % 6 != 0:
        opts.refuse("depth", str(depth), "6n + 2: 8, 14, 20, ...")
    if norm == "group" and width % 8 != 0:
        opts.refuse("width", str(width), "a multiple of 8 where norm is group")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            opts.refuse(name, ",".join(map(str, values)), "three numbers, one a channel")
    if min(std) <= 0:
        opts.refuse("std", ",".join(map(str, std)), "three numbers above 0")
    return ResNet((depth - 2) // 6, width, num_classes, norm, mean, std)
