"""Trains the factors of a block's weights together, towards the block's dense outputs, with the choice of atoms.

A weight is S_b D_b block by block, with S_b = P(latent): the k most important entries of each row, by |entry| times the
norm of its atom. P has no useful gradient, so the gradient of S_b is passed straight through to the whole latent
matrix, and an entry that is not chosen can grow until it is (the straight-through estimator of Bengio, Léonard and
Courville 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHECK_EVERY = 50  # steps
HELD_OUT = 10  # one batch of this many is not trained on; it decides which step was best


class StraightThrough(nn.Module):
    """Replaces a linear module by the factors in which it is stored.

    atoms  (blocks, m, B), values (out, blocks, k), index (out, blocks, k), as `SparseFactorLinear` has them
    lower  (blocks, B, B), L of each block's second moments, which gives the norm of atoms
    """

    lower: Tensor

    def __init__(self, atoms: Tensor, values: Tensor, index: Tensor, lower: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.k, self.bias = values.shape[2], bias
        latent = values.new_zeros(*values.shape[:2], atoms.shape[1]).scatter_(2, index, values)
        self.atoms, self.latent = nn.Parameter(atoms.clone()), nn.Parameter(latent)
        self.register_buffer("lower", lower)

    def support(self) -> Tensor:
        """Indices of the kept entries of each row: (out, blocks, k) int64, ascending."""
        with torch.no_grad():
            sizes = (self.atoms @ self.lower).norm(dim=2)
            return (self.latent.abs() * sizes).topk(self.k, dim=2).indices.sort(2).values

    def weight(self) -> Tensor:
        """(out, in). The gradient of the kept entries is passed to all entries."""
        kept = torch.zeros_like(self.latent).scatter_(2, self.support(), 1.0)
        chosen = self.latent + (self.latent * kept - self.latent).detach()
        return torch.einsum("onm,nmb->onb", chosen, self.atoms).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight().to(x.dtype), self.bias)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """atoms, values and index, in the shapes of the arguments."""
        index = self.support()
        return self.atoms.detach(), self.latent.detach().gather(2, index), index


def split(batches: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on, and of the held-out ones. A single batch is both."""
    held = max(1, batches // HELD_OUT)
    return (list(range(batches - held)), list(range(batches - held, batches))) if batches > 1 else ([0], [0])


def mean_loss(run: Callable[[int], Tensor], targets: Sequence[Tensor], batches: Sequence[int]) -> float:
    """Mean squared difference of the outputs, over all values of these batches."""
    with torch.no_grad():
        errors = [(run(b).float() - targets[b].float()).square().sum() for b in batches]
        return float(sum(errors)) / sum(targets[b].numel() for b in batches)


def train(
    modules: Sequence[StraightThrough],
    run: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    steps: int,
    rate: float,
    generator: torch.Generator,
) -> None:
    """Train with Adam, in place, on one batch per step. At the end the modules have the state of the best check.

    run      batch number -> the block's output with these modules
    targets  the target outputs, by batch
    rate     learning rate, relative to the root mean square of each parameter
    """
    training, held = split(len(targets))
    parameters = [parameter for module in modules for parameter in (module.atoms, module.latent)]
    sizes = [float(parameter.detach().square().mean().sqrt()) for parameter in parameters]
    optimizer = torch.optim.Adam(
        [{"params": [parameter], "lr": rate * size} for parameter, size in zip(parameters, sizes, strict=True)]
    )
    best, kept = mean_loss(run, targets, held), [parameter.detach().clone() for parameter in parameters]
    for step in range(1, steps + 1):
        batch = training[int(torch.randint(len(training), (1,), generator=generator))]
        with torch.enable_grad():
            loss = (run(batch).float() - targets[batch].float()).square().mean()
            optimizer.zero_grad()
            loss.backward(inputs=parameters)
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == steps:
            found = mean_loss(run, targets, held)
            if found < best:
                best, kept = found, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
