"""The few linear layers of a UNet whose rows are computed one by one, so that bytes never depend on neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowByRow(nn.Linear):
    """A linear layer whose result for a row of (rows, features) does not depend on the row's place.

    The CPU's matrix products round the last rows of a batch otherwise than the first where the number of rows is not
    a multiple of 4 (MKL, seen with 6 and 10 rows on 2 threads). Only the embeddings of time and size have so few rows.
    """

    @classmethod
    def over(cls, linear: nn.Linear) -> RowByRow:
        """A layer over the same weight and bias, under the same names."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, rows: Tensor) -> Tensor:
        """(rows, features) one by one; in a graph, exported or compiled, whose number of rows is not known, together."""
        if torch.compiler.is_compiling():
            return super().forward(rows)
        return torch.cat([nn.functional.linear(row, self.weight, self.bias) for row in rows.split(1)])


# The layers of a UNet that are given (rows, features): the embeddings of time, of the guidance scale and of SDXL's sizes,
# and where every residual block takes them in.
EMBEDDINGS = (
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "time_embedding.cond_proj",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
)


def embed_row_by_row(unet: nn.Module) -> None:
    """Put RowByRow in place of the UNet's embedding layers; weights and their names stay."""
    for name, module in list(unet.named_modules()):
        if type(module) is nn.Linear and (name in EMBEDDINGS or name.endswith(".time_emb_proj")):
            parent, _, own = name.rpartition(".")
            setattr(unet.get_submodule(parent), own, RowByRow.over(module))
