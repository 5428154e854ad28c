"""A linear layer's forward that is fast on a CPU for a single row, as in generation."""

import torch
import torch.nn.functional as fn


LEAST = 2**18  # numbers in a matrix: a smaller one is no work to share out


def forward(linear, x):
    """nn.Linear's forward, x (..., in) -> (..., out); a single row is the work of all cores.

    A row costs what reading the weights costs, and torch leaves it to one core. As a batch of
    products, one for every 64 outputs, it is shared out: twice as fast on two cores.
    """
    n_out, n_in = linear.weight.shape
    if x.numel() != n_in or n_out % 64 or torch.get_num_threads() == 1:
        return fn.linear(x, linear.weight, linear.bias)
    weight = linear.weight.view(-1, 64, n_in)
    rows = x.reshape(1, n_in).expand(len(weight), 1, n_in)
    y = torch.bmm(rows, weight.mT).view(*x.shape[:-1], n_out)
    if linear.bias is not None:
        y = y + linear.bias
    return y
