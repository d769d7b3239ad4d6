"""LSTM language model whose recurrent state travels as inputs and outputs.

forward(tokens: INT64 [B, T], h: FLOAT [layers, B, hidden], c: FLOAT [layers, B, hidden])
    -> (logits FLOAT [B, T, vocabulary], h, c)

Zeros for h and c start a text; what comes back continues it with the next T tokens of each lane.

Options:
  vocabulary   number of tokens. Required.
  embedding    dimension of the token embedding. Default: 128.
  hidden       units of each LSTM layer. Default: 256.
  layers       number of LSTM layers. Default: 1.
  dropout      rate on the embeddings, between layers, and before the logits. Default: 0.
  tied         true: the logits use the embedding matrix (Press and Wolf 2017), behind a linear map
               where hidden differs from embedding. Default: true.
"""

from typing import Final, Tuple

import torch
from torch import nn
from torch.nn import functional

from models.options import Options


class LstmLm(nn.Module):
    # One parameter under one name even where it is used twice: nobody downstream needs to know.
    tied: Final[bool]

    def __init__(self, vocabulary, embedding, hidden, layers, dropout, tied):
        super().__init__()
        self.tied = tied
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.dropout = nn.Dropout(dropout)
        # Dropout of nn.LSTM acts between layers; torch warns where there is no such place.
        self.lstm = nn.LSTM(
            embedding, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0
        )
        width = hidden
        if tied and hidden != embedding:
            self.projection = nn.Linear(hidden, embedding, bias=False)
            width = embedding
        else:
            self.projection = nn.Identity()
        if not tied:
            self.output_weight = nn.Parameter(torch.empty(vocabulary, width))
            nn.init.uniform_(self.output_weight, -0.05, 0.05)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)

    def forward(
        self, tokens: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.dropout(self.embedding(tokens))
        y, (h, c) = self.lstm(x, (h, c))
        y = self.dropout(self.projection(y))
        if self.tied:
            logits = functional.linear(y, self.embedding.weight, self.output_bias)
        else:
            logits = functional.linear(y, self.output_weight, self.output_bias)
        return logits, h, c


def build(options):
    opts = Options("lstm_lm", options)
    vocabulary = opts.integer("vocabulary", minimum=2)
    embedding = opts.integer("embedding", "128")
    hidden = opts.integer("hidden", "256")
    layers = opts.integer("layers", "1")
    dropout = opts.fraction("dropout", "0")
    tied = opts.boolean("tied", "true")
    opts.finish()
    return LstmLm(vocabulary, embedding, hidden, layers, dropout, tied)
