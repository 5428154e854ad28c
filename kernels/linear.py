"""A linear layer that is fast on a CPU where it has a single row, as in the generation of one text."""
import torch
import torch.nn as nn


class Linear(nn.Linear):
    """nn.Linear whose single rows are the work of every core.

    A row costs what reading the weights costs, and torch leaves it to one core. As a batch of products, one for every
    64 outputs, it is shared out: twice as fast on two cores.
    """

    def forward(self, x):
        """x (..., in_features) -> (..., out_features)."""
        if x.device.type != 'cpu' or x.numel() != self.in_features or self.out_features % 64:
            return super().forward(x)
        weight = self.weight.view(-1, 64, self.in_features)
        y = torch.bmm(x.reshape(1, 1, -1).expand(len(weight), -1, -1), weight.transpose(1, 2)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias
