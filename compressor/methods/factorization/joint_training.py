"""Factors of a block's weights trained together, towards what the block gave before: choices of atoms included.

A weight is S_b D_b block by block, with S_b = P(latent): of each row the k entries that matter most, |entry| times the
size of its atom. P has no useful gradient, so the gradient of S_b is passed straight through to all of the latent
matrix; an entry that is not chosen can grow until it is (the straight-through estimator of Bengio, Léonard and
Courville 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHECK_EVERY = 50  # steps
HELD_OUT = 10  # one batch of so many is not trained on, and says which step was best


class StraightThrough(nn.Module):
    """Stands in for a linear module, with the factors that it is stored as.

    atoms  (blocks, m, B), values (out, blocks, k), index (out, blocks, k), as `SparseFactorLinear` has them
    lower  (blocks, B, B), L of each block's second moments, in which atoms are measured
    """

    lower: Tensor

    def __init__(self, atoms: Tensor, values: Tensor, index: Tensor, lower: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.k, self.bias = values.shape[2], bias
        latent = values.new_zeros(*values.shape[:2], atoms.shape[1]).scatter_(2, index, values)
        self.atoms, self.latent = nn.Parameter(atoms.clone()), nn.Parameter(latent)
        self.register_buffer("lower", lower)

    def support(self) -> Tensor:
        """Which entries of each row are kept: (out, blocks, k) int64, ascending."""
        with torch.no_grad():
            sizes = (self.atoms @ self.lower).norm(dim=2)
            return (self.latent.abs() * sizes).topk(self.k, dim=2).indices.sort(2).values

    def weight(self) -> Tensor:
        """(out, in); the gradient of the kept entries is that of all."""
        kept = torch.zeros_like(self.latent).scatter_(2, self.support(), 1.0)
        chosen = self.latent + (self.latent * kept - self.latent).detach()
        return torch.einsum("onm,nmb->onb", chosen, self.atoms).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight().to(x.dtype), self.bias)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """atoms, values and index, as they were given."""
        index = self.support()
        return self.atoms.detach(), self.latent.detach().gather(2, index), index


def split(batches: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on, and of those held out; one batch alone is both."""
    held = max(1, batches // HELD_OUT)
    return (list(range(batches - held)), list(range(batches - held, batches))) if batches > 1 else ([0], [0])


def mean_loss(run: Callable[[int], Tensor], targets: Sequence[Tensor], batches: Sequence[int]) -> float:
    """Mean squared difference of outputs, over all values of these batches."""
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
    """Adam, in place, on one batch a step; at the end the modules are as at the best check on held-out batches.

    run      batch number -> the block's output with the modules in place
    targets  the outputs wanted, by batch
    rate     of learning, times the root mean square of each parameter
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
