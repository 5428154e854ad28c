"""A linear layer that is fast on a CPU for a single row, as in the generation of one text."""

import torch
import torch.nn as nn
import torch.nn.functional as fn


class Linear(nn.Linear):
    """An nn.Linear of which a single row is the work of every core.

    A row costs what reading the weights costs, and torch leaves it to one core. As a batch of
    products, one for every 64 outputs, it is shared out: twice as fast on two cores.
    """

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        n_out, n_in = self.weight.shape
        if x.numel() != n_in or n_out % 64:
            return fn.linear(x, self.weight, self.bias)
        weight = self.weight.view(-1, 64, n_in)
        rows = x.reshape(1, n_in).expand(len(weight), 1, n_in)
        y = torch.bmm(rows, weight.mT).view(*x.shape[:-1], n_out)
        if self.bias is not None:
            y = y + self.bias
        return y
