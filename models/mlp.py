"""Multi-layer perceptron for dense inputs.

forward(x: FLOAT [B, in_features]) -> logits FLOAT [B, num_classes]

Options:
  in_features   inputs of one example. Required.
  hidden        widths of the hidden layers, e.g. 128,128; empty = a linear model. Default: 128,128.
  num_classes   columns of the logits. Required.
  activation    relu, tanh or gelu. Default: relu.
  dropout       rate after every hidden layer. Default: 0.

Parameters: fc1.weight, fc1.bias, fc2.weight, ...; the last layer gives the logits.
"""

from collections import OrderedDict

import torch
from torch import nn

from models.options import Options

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Mlp(nn.Sequential):
    """A Sequential, so that parameters are called fc1.weight and not after their container."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        return x


def build(options):
    opts = Options("mlp", options)
    in_features = opts.integer("in_features")
    hidden = opts.integers("hidden", "128,128")
    num_classes = opts.integer("num_classes")
    activation = _ACTIVATIONS[opts.choice("activation", tuple(_ACTIVATIONS), "relu")]
    dropout = opts.fraction("dropout", "0")
    opts.finish()

    layers = OrderedDict()
    widths = [in_features] + hidden + [num_classes]
    for i in range(1, len(widths)):
        layers[f"fc{i}"] = nn.Linear(widths[i - 1], widths[i])
        if i < len(widths) - 1:
            layers[f"activation{i}"] = activation()
            if dropout > 0:
                layers[f"dropout{i}"] = nn.Dropout(dropout)
    return Mlp(layers)
