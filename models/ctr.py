"""Click-through-rate network: one embedding a categorical column, then an MLP with ReLU.

forward(numeric: FLOAT [B, n], categorical: INT64 [B, m]) -> logits FLOAT [B, num_classes]

The embeddings are ordinary parameters, as large as the vocabularies. An index outside its column's
cardinality is an error at run time, never another row.

Options:
  numeric         number of numeric columns, may be 0. Required.
  cardinalities   number of indices of each categorical column, e.g. 10,17,8. Required.
  embedding       dimension of every embedding. Default: 8.
  hidden          widths of the hidden layers. Default: 128,64.
  num_classes     1 = a single logit for the sigmoid, 2 = two for the softmax, ... Default: 1.
  dropout         rate after every hidden layer. Default: 0.
"""

from typing import List

import torch
from torch import nn

from models.options import Options


class Ctr(nn.Module):
    def __init__(self, numeric, cardinalities, embedding, hidden, num_classes, dropout):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, embedding) for size in cardinalities)
        for table in self.embeddings:
            # The first layer then sees inputs of about the same size from both kinds of column.
            nn.init.normal_(table.weight, std=embedding**-0.5)
        width = numeric + embedding * len(cardinalities)
        layers = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = size
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(width, num_classes)

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        columns: List[torch.Tensor] = [numeric]
        for i, table in enumerate(self.embeddings):
            columns.append(table(categorical[:, i]))
        return self.output(self.hidden(torch.cat(columns, dim=1)))


def build(options):
    opts = Options("ctr", options)
    numeric = opts.integer("numeric", minimum=0)
    cardinalities = opts.integers("cardinalities")
    embedding = opts.integer("embedding", "8")
    hidden = opts.integers("hidden", "128,64")
    num_classes = opts.integer("num_classes", "1")
    dropout = opts.fraction("dropout", "0")
    opts.finish()
    if numeric == 0 and not cardinalities:
        opts.refuse("cardinalities", "", "given where there are no numeric columns")
    return Ctr(numeric, cardinalities, embedding, hidden, num_classes, dropout)
