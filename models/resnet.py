"""ResNet (He et al. 2015): for small images (section 4.2), three stages of 3x3 convolutions; for
large ones (section 4.1, table 1), a 7x7 convolution and a pooling, which leave a sixteenth of the
pixels, and four stages.

forward(image: FLOAT [B, 3, H, W], values in [0, 1]) -> logits FLOAT [B, num_classes]

The image is normalised inside the model, so that everyone who holds the archive feeds it the same
plain pixels. Where a stage changes the shape, the shortcut is a 1x1 convolution.

Options:
  layout        small or large. Default: small.
  depth         small: 6n + 2: 8, 14, 20, ... n residual blocks of two convolutions a stage.
                large: 18 or 34, of blocks of two convolutions, or 50, 101 or 152, of bottlenecks of
                three (the 3x3 one has the stride). Required.
  width         channels of the first stage; the others have two, four and eight times as many, and
                what comes out of a bottleneck four times that. Default: 16 if small, 64 if large.
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
    EXPANSION = 1

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


class Bottleneck(nn.Module):
    # Channels that come out, for each of those within.
    EXPANSION = 4

    def __init__(self, in_channels, channels, stride, norm):
        super().__init__()
        out_channels = channels * self.EXPANSION
        self.conv1 = _convolution(in_channels, channels, 1, 1)
        self.norm1 = _norm(norm, channels)
        self.conv2 = _convolution(channels, channels, 3, stride)
        self.norm2 = _norm(norm, channels)
        self.conv3 = _convolution(channels, out_channels, 1, 1)
        self.norm3 = _norm(norm, out_channels)
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                _convolution(in_channels, out_channels, 1, stride), _norm(norm, out_channels)
            )
        else:
            self.shortcut = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return torch.relu(y + self.shortcut(x))


# Blocks of each stage by depth (table 1).
LARGE = {
    18: (Block, (2, 2, 2, 2)),
    34: (Block, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    # Attributes and not buffers: constants have no business in pushes and checkpoints.
    mean: List[float]
    std: List[float]

    def __init__(self, large, block, blocks, width, num_classes, norm, mean, std):
        super().__init__()
        self.mean = mean
        self.std = std
        if large:
            self.conv = _convolution(3, width, 7, 2)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv = _convolution(3, width, 3, 1)
            self.pool = nn.Identity()
        self.norm = _norm(norm, width)
        stages = []
        channels = width
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                within = width * 2**stage
                stages.append(block(channels, within, stride, norm))
                channels = within * block.EXPANSION
        self.blocks = nn.Sequential(*stages)
        self.output = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(self.mean, dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
        x = self.pool(torch.relu(self.norm(self.conv((image - mean) / std))))
        return self.output(self.blocks(x).mean(dim=[2, 3]))


def build(options):
    opts = Options("resnet", options)
    large = opts.choice("layout", ("small", "large"), "small") == "large"
    depth = opts.integer("depth", minimum=8)
    width = opts.integer("width", "64" if large else "16")
    num_classes = opts.integer("num_classes")
    norm = opts.choice("norm", ("batch", "group"), "batch")
    mean = opts.numbers("mean", "0.4914,0.4822,0.4465")
    std = opts.numbers("std", "0.2470,0.2435,0.2616")
    opts.finish()
    if large and depth not in LARGE:
        opts.refuse("depth", str(depth), "18, 34, 50, 101 or 152 where layout is large")
    if not large and (depth - 2) % 6 != 0:
        opts.refuse("depth", str(depth), "6n + 2: 8, 14, 20, ...")
    if norm == "group" and width % 8 != 0:
        opts.refuse("width", str(width), "a multiple of 8 where norm is group")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            opts.refuse(name, ",".join(map(str, values)), "three numbers, one a channel")
    if min(std) <= 0:
        opts.refuse("std", ",".join(map(str, std)), "three numbers above 0")
    block, blocks = LARGE[depth] if large else (Block, ((depth - 2) // 6,) * 3)
    return ResNet(large, block, blocks, width, num_classes, norm, mean, std)
