"""Click-through-rate network: one embedding a categorical column, cross layers, an MLP with ReLU.

Either the rows come from an embedding table on the parameter servers (option rows):

forward(numeric: FLOAT [B, n], rows: FLOAT [B, m, embedding]) -> logits FLOAT [B, num_classes]

or the embeddings are ordinary parameters, as large as the vocabularies (option cardinalities); an
index outside its column's cardinality is then an error at run time, never another row:

forward(numeric: FLOAT [B, n], categorical: INT64 [B, m]) -> logits FLOAT [B, num_classes]

Columns and numbers, side by side, are what cross layers and MLP see; the logits are linear in both
together (Wang et al. 2021, arXiv 2008.13535, "parallel").

Options:
  numeric         number of numeric columns, may be 0. Required.
  rows            number of columns whose rows are given. This or cardinalities is required.
  cardinalities   number of indices of each categorical column, e.g. 10,17,8.
  embedding       dimension of every embedding; of a table, its dim. Default: 8.
  cross           number of cross layers, x <- x0 * (W x + b) + x. Default: 0.
  hidden          widths of the hidden layers. Default: 128,64.
  num_classes     1 = a single logit for the sigmoid, 2 = two for the softmax, ... Default: 1.
  dropout         rate after every hidden layer. Default: 0.
"""

from typing import List

import torch
from torch import nn

from models.options import Options


class Tower(nn.Module):
    """Logits of what all columns give, side by side."""

    def __init__(self, width, cross, hidden, num_classes, dropout):
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(cross))
        crossed = width if cross > 0 else 0
        layers = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = size
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(width + crossed, num_classes)
        self.crosses = cross > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deep = self.hidden(x)
        if not self.crosses:
            return self.output(deep)
        crossed = x
        for layer in self.cross:
            crossed = x * layer(crossed) + crossed
        return self.output(torch.cat([crossed, deep], dim=1))


class Ctr(nn.Module):
    """With embeddings of its own."""

    def __init__(self, cardinalities, embedding, tower):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, embedding) for size in cardinalities)
        for table in self.embeddings:
            # The first layer then sees inputs of about the same size from both kinds of column.
            nn.init.normal_(table.weight, std=embedding**-0.5)
        self.tower = tower

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        columns: List[torch.Tensor] = [numeric]
        for i, table in enumerate(self.embeddings):
            columns.append(table(categorical[:, i]))
        return self.tower(torch.cat(columns, dim=1))


class CtrOfRows(nn.Module):
    """With rows that are given."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, numeric: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.tower(torch.cat([numeric, rows.flatten(1)], dim=1))


def build(options):
    opts = Options("ctr", options)
    numeric = opts.integer("numeric", minimum=0)
    rows = opts.integer("rows", "0", minimum=0)
    cardinalities = opts.integers("cardinalities", "" if rows > 0 else None)
    embedding = opts.integer("embedding", "8")
    cross = opts.integer("cross", "0", minimum=0)
    hidden = opts.integers("hidden", "128,64")
    num_classes = opts.integer("num_classes", "1")
    dropout = opts.fraction("dropout", "0")
    opts.finish()
    if rows > 0 and cardinalities:
        opts.refuse("rows", str(rows), "left out where the model has embeddings of its own")
    columns = rows + len(cardinalities)
    if numeric == 0 and columns == 0:
        opts.refuse("cardinalities", "", "given where there are no numeric columns")
    tower = Tower(numeric + embedding * columns, cross, hidden, num_classes, dropout)
    return CtrOfRows(tower) if rows > 0 else Ctr(cardinalities, embedding, tower)
