"""Computes masks of the variational information bottleneck, which learn the units that a task needs.

Each unit of a model (a head, a neuron, a channel) gets a factor z = mu + sigma eps with eps ~ N(0, 1). The bottleneck's
prior has a cost for the information in a unit. If the task doesn't need the unit, its noise grows and its mean falls:

    log alpha = log sigma² - log(mu² + 1e-8)          keep if it is below 0: the signal is as strong as the noise
    KL        = 1/2 sum log(1 + mu² / (sigma² + 1e-8))
    soft keep = sigmoid(-10 log alpha)                differentiable; gives the size of the model

These forms and constants are those of the public code of the same authors' variant for large models (TVA-Prune).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from compressor.lazy import torch

TINY = 1e-8  # inside both logarithms
SHARPNESS = 10.0  # of the soft keep; the authors need at least 5 for expected and real size to agree
FIRST_MEAN, FIRST_LOG_VARIANCE, SPREAD = 1.0, -9.0, 0.01  # masks start as N(1, 0.01), log sigma² as N(-9, 0.01)


def log_alpha(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log of noise over signal for each unit."""
    return log_variance - torch.log(mean.square() + TINY)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """The information in each unit under the bottleneck's prior, in nats."""
    return 0.5 * torch.log1p(mean.square() / (log_variance.exp() + TINY))


def soft_keep(alpha: torch.Tensor) -> torch.Tensor:
    """A number between 0 and 1: about 1 if log alpha is below 0."""
    return torch.sigmoid(-SHARPNESS * alpha)


def seeded(*seeds: int | str) -> torch.Generator:
    """A generator of the CPU whose numbers depend only on the seeds."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def noise(rows: int, units: int, *seeds: int) -> torch.Tensor:
    """(rows, units) standard normal numbers that depend only on the seeds."""
    return torch.randn(rows, units, generator=seeded(*seeds))


def warmed(target: float, step: int, warmup_steps: int) -> float:
    """The target at a step (from 0): it rises linearly from 0 during the warm-up."""
    return target * min(1.0, (step + 1) / warmup_steps) if warmup_steps else target


def lagrangian(removed: torch.Tensor, target: float, multipliers: torch.Tensor) -> torch.Tensor:
    """l1 (s - s*) + l2 (s - s*)². The masks minimize it while the multipliers (2,) maximize it."""
    apart = removed - target
    return multipliers[0] * apart + multipliers[1] * apart.square()


@dataclass
class Masks:
    """All masks of a model in one vector, and their lengths.

    mean, log_variance  (sum of sizes,) float32
    names, sizes        of the masks, in order
    """

    mean: torch.Tensor
    log_variance: torch.Tensor
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def fresh(cls, sizes: dict[str, int], generator: torch.Generator) -> Masks:
        total = sum(sizes.values())
        mean = FIRST_MEAN + SPREAD * torch.randn(total, generator=generator)
        log_variance = FIRST_LOG_VARIANCE + SPREAD * torch.randn(total, generator=generator)
        return cls(mean, log_variance, tuple(sizes), tuple(sizes.values()))

    def split(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """A vector over all units, by mask."""
        return dict(zip(self.names, value.split(self.sizes), strict=True))

    def scores(self) -> dict[str, list[float]]:
        """-log alpha of each unit: larger is more important."""
        with torch.no_grad():
            return {name: part.tolist() for name, part in self.split(-log_alpha(self.mean, self.log_variance)).items()}

    def means(self) -> dict[str, list[float]]:
        return {name: part.tolist() for name, part in self.split(self.mean.detach()).items()}
