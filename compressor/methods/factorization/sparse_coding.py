"""Approximates a matrix by sparse combinations of few atoms: alternating support, values and atoms, all by products.

W (out, in) is divided into blocks of B columns, W_b = S_b D_b with atoms D_b (m, B) and coefficients S_b (out, m), k in
each row. The blocks are solved one after the other. The error is E of `low_rank`. For block b with the others fixed it
is, up to a constant,

    ‖(R_b - S_b D_b) L_b‖²    R_b = W_b + (Σ_{c≠b} (W_c - S_c D_c) H_cb) H_bb⁻¹    H_bb = L_b L_bᵀ

With T = R_b L_b, A = D_b L_b, G = A Aᵀ and C = T Aᵀ this is ‖T - S A‖², and everything about S needs only products of
(out, m) with (m, m) matrices, which run at the speed of large matrix products. A round is

1. Support: one step of ADMM for "at most k entries in each row" (Boyd, Parikh, Chu, Peleato and Eckstein 2011, section
   9.1; for pruning with a Hessian Boža 2024, arXiv 2401.02938). X = (C + ρ (S - U)) (G + ρ I)⁻¹, S = the k largest
   entries of X + U in each row, U = X + U - S.
2. Values: a step of conjugate gradients for least squares on the support.
3. Atoms: least squares, A = (SᵀS + ε I)⁻¹ SᵀT. The next round starts from A plus `MOMENTUM` times its last change.

Orthogonal matching pursuit, which chooses one atom after the other, needs out·k²·m/2 multiply-adds for one support, at
the speed of memory. A round needs about 6·out·m² at the speed of matrix products, so many rounds fit into its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from compressor.lazy import torch
from compressor.methods.factorization.low_rank import SCALE_BYTES, TINY, Metric, value_bytes

RIDGE = 1e-6  # relative to the mean diagonal
PENALTY = 0.5  # ρ, for atoms of norm 1; on the demo model 0.3 is about as good, and 1 or 0.15 end 5 to 10 % higher
MOMENTUM = 0.9  # of the atoms; on the demo model errors end 8 % lower than without
VALUE_STEPS = 1  # conjugate gradients in a round; 2 lower the error by 0.5 %, one more round by 2 %
LAST_STEPS = 4  # conjugate gradients for values that are stored; 12 change the error by less than 0.3 %
CHUNK_VALUES = 1 << 19  # coefficients of the rows that pass a round together: 2 MB, so that all temporaries are cached


@dataclass
class SparseFactors:
    """atoms   (blocks, m, B) float
    values  (out, blocks, k)
    index   (out, blocks, k) int64, ascending in each row, < m
    """

    atoms: torch.Tensor
    values: torch.Tensor
    index: torch.Tensor

    def block(self, b: int) -> torch.Tensor:
        """S_b D_b (out, B)"""
        return spread(self.values[:, b], self.index[:, b], self.atoms.shape[1]) @ self.atoms[b]

    def matrix(self) -> torch.Tensor:
        """(out, in)"""
        return torch.cat([self.block(b) for b in range(len(self.atoms))], 1)


def spread(values: torch.Tensor, index: torch.Tensor, atoms: int) -> torch.Tensor:
    """Stored coefficients (rows, k) as a matrix (rows, m)."""
    return values.new_zeros(len(values), atoms).scatter_(1, index, values)


@dataclass(frozen=True)
class Coder:
    """Finds coefficients for targets (rows, B) and atoms (m, B), both in the metric. The atoms are scaled to norm 1.

    norms  (m,) of the atoms, 1 for an atom of zeros
    unit   (m, B) the atoms with norm 1
    gram   (m, m) their products
    """

    norms: torch.Tensor
    unit: torch.Tensor
    gram: torch.Tensor

    @classmethod
    def of(cls, atoms: torch.Tensor) -> Coder:
        norms = atoms.norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        unit = atoms / norms[:, None]
        gram = unit @ unit.t()
        gram.diagonal().add_(RIDGE)  # so that conjugate gradients stay bounded if atoms are parallel
        return cls(norms, unit, gram)

    def chunks(self, rows: int) -> Iterator[slice]:
        step = max(1, CHUNK_VALUES // len(self.norms))
        for start in range(0, rows, step):
            yield slice(start, start + step)

    def solve_(self, products: torch.Tensor, support: torch.Tensor, sparse: torch.Tensor, steps: int) -> None:
        """Improve values (rows, m) in place by conjugate gradients for ‖target - S A‖².

        products  (rows, m) of targets and atoms; it is overwritten
        support   (rows, m) 1 where a value may change, otherwise 0
        """
        rest = products.addmm_(sparse, self.gram, alpha=-1).mul_(support)
        way, size = rest.clone() if steps > 1 else rest, squares(rest)
        for step in range(1, steps + 1):
            image = way @ self.gram
            length = size / (way * image).sum(1, keepdim=True).clamp(min=TINY)
            sparse.addcmul_(length, way)
            if step < steps:
                rest.addcmul_(image.mul_(support), length, value=-1)
                before, size = size, squares(rest)
                way.mul_(size / before.clamp(min=TINY)).add_(rest)

    def refit(self, targets: torch.Tensor, sparse: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
        """The best values (rows, m) for targets (rows, B) on their supports (rows, m), from `sparse`."""
        found = sparse * self.norms
        for rows in self.chunks(len(targets)):
            self.solve_(targets[rows] @ self.unit.t(), support[rows], found[rows], LAST_STEPS)
        return found / self.norms


def squares(rows: torch.Tensor) -> torch.Tensor:
    """(rows, 1) squared norm of each row."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).square()


def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """(rows, m): 1 at the k entries of each row with the largest magnitude, otherwise 0."""
    kept = values.abs().topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(values).scatter_(1, kept, 1.0)


@dataclass(frozen=True)
class Solution:
    """Atoms (m, B) and coefficients (rows, m) of one block in the metric, with 1 at the k stored ones in `support`."""

    error: float
    atoms: torch.Tensor
    sparse: torch.Tensor
    support: torch.Tensor


def solve_block(targets: torch.Tensor, atoms: torch.Tensor, sparse: torch.Tensor, k: int, rounds: int) -> Solution:
    """The best of some rounds of support, values and atoms, for targets (rows, B) in the metric.

    sparse  (rows, m) the coefficients to start from; zeros for the first time
    """
    whole = float(targets.double().square().sum())
    sparse, dual, support = sparse.clone(), torch.empty_like(sparse), torch.empty_like(sparse)
    best, last = Solution(math.inf, atoms, sparse, support), atoms
    for number in range(rounds):
        coder = Coder.of(atoms)
        shifted = coder.gram.clone()
        shifted.diagonal().add_(PENALTY)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        normal, sides = torch.zeros_like(coder.gram), torch.zeros_like(atoms)
        for rows in coder.chunks(len(targets)):
            products, now, past = targets[rows] @ coder.unit.t(), sparse[rows].mul_(coder.norms), dual[rows]
            if number:
                moved = torch.addmm(past, torch.sub(now, past).mul_(PENALTY).add_(products), inverse)
            else:  # with the dual variable that keeps the coefficients if they have the least error on their supports
                moved = torch.addmm(products, now, coder.gram, alpha=-1).div_(PENALTY).add_(now)
            chosen = largest(moved, k)
            torch.mul(moved, chosen, out=now)
            torch.sub(moved, now, out=past)
            support[rows] = chosen
            coder.solve_(products, chosen, now, VALUE_STEPS)
            normal.addmm_(now.t(), now)
            sides.addmm_(now.t(), targets[rows])
        found = improve_atoms(targets, sparse, normal, sides)
        error = whole - float(((2 * sides - normal @ found) * found).double().sum())
        if error < best.error:
            best = Solution(error, found, sparse.clone(), support.clone())
        atoms, last = found + MOMENTUM * (found - last) if number else found, found
    return best


def improve_atoms(
    targets: torch.Tensor, sparse: torch.Tensor, normal: torch.Tensor, sides: torch.Tensor
) -> torch.Tensor:
    """The best atoms for given coefficients, A = (SᵀS + εI)⁻¹ SᵀT, from normal = SᵀS and sides = SᵀT.

    An atom that no row uses is replaced by the target with the largest error.
    """
    ridge = RIDGE * normal.diagonal().mean().clamp(min=TINY)
    found = torch.linalg.solve(normal + ridge * torch.eye(len(normal), dtype=ridge.dtype, device=ridge.device), sides)
    unused = (normal.diagonal() == 0).nonzero()[:, 0]
    if len(unused):
        left = (targets - sparse @ found).square().sum(1)
        worst = left.argsort(descending=True, stable=True)[: len(unused)]
        found[unused[: len(worst)]] = targets[worst]
    return found


def first_atoms(targets: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """First atoms (count, B) for targets T (rows, B) in the metric: right singular vectors, then rows for the others.

    The vectors are eigenvectors of TᵀT, in float64.
    """
    wide = targets.double()
    vectors = torch.linalg.eigh(wide.t() @ wide)[1].flip(1).t().to(targets.dtype)
    directions = min(targets.shape)
    if count <= directions:
        return vectors[:count].contiguous()
    return torch.cat((vectors[:directions], targets[spread_rows(targets, count - directions, generator)]))


def spread_rows(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers (count,) of rows with distant directions: k-means++ with distance 1 - cos², which ignores the sign.

    Numbers repeat if there are fewer directions than `count`.
    """
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    alive = (rows != 0).any(1)
    far = torch.ones(len(rows), dtype=rows.dtype, device=rows.device)
    chosen: list[int] = []
    for _ in range(count):
        odds = far.clamp(min=0).double() * alive
        if float(odds.sum()) <= 1e-9:
            odds = alive.double()
        number = int(torch.multinomial(odds.cpu(), 1, generator=generator))
        chosen.append(number)
        far = torch.minimum(far, 1 - (unit @ unit[number]).square())
        far = torch.where(far > 1e-6, far, torch.zeros_like(far))  # the same direction, except for rounding
    return torch.tensor(chosen, device=rows.device)


def block_bytes(shape: Sequence[int], block: int, atoms: int, k: int, values: str) -> int:
    """Bytes of the stored factors of a weight (out, in); `compressor.layers.sparse_factor_linear` has the formula."""
    out, columns = shape
    blocks, v = columns // block, value_bytes(values)
    scales = SCALE_BYTES * (blocks * atoms + out) if values == "int8" else 0
    index = -(-out * blocks * min(k * max(1, (atoms - 1).bit_length()), atoms) // 8)
    return v * atoms * columns + v * out * blocks * k + index + scales


@lru_cache(maxsize=1024)
def choose_shape(
    shape: tuple[int, ...], block: int, size: int, density: float, values: str, tolerance: float = 0.01
) -> tuple[int, int] | None:
    """(atoms, k) of at most `size` bytes; None if not even one atom fits.

    Candidates use all of `size` except `tolerance`; if there are none, they are the largest ones. Of these, k / atoms
    is nearest to `density` on a logarithmic scale. There are never more atoms than outputs.
    """
    found: list[tuple[bool, float, int, int]] = []
    for k in range(1, shape[0] + 1):
        if block_bytes(shape, block, k, k, values) > size:
            break
        low, high = k, shape[0]
        while low < high:  # the largest number of atoms that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if block_bytes(shape, block, middle, k, values) <= size else (low, middle - 1)
        used = block_bytes(shape, block, low, k, values) / size
        near = abs(math.log(k / low / density))
        found.append((used < 1 - tolerance, near if used >= 1 - tolerance else -used, low, k))
    if not found:
        return None
    return min(found)[2:]


def factorize(
    matrix: torch.Tensor,
    metric: Metric,
    block: int,
    atoms: int,
    k: int,
    sweeps: int,
    rounds: int,
    generator: torch.Generator,
    watch: Callable[[float], None] | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> SparseFactors:
    """Solve the blocks one after the other, each by rounds of support, values and atoms. A change must decrease E.

    Blocks that are not solved yet count as W itself, so each block corrects the errors of earlier ones. (With zeros in
    their place, the first blocks would compensate for the missing later ones: twice the final error.)

    The first atoms of a block are the directions of its SVD, in the metric. If more atoms are needed, they are rows of
    its target with distant directions.

    matrix  (out, in) float32 or float64, in divisible by `block`
    rounds  for each block and sweep
    watch   called with E after each accepted change, once all blocks are solved; for tests, since E costs more than
            the solve of a block
    report  called with the share of the work that is done, from 0 to 1
    """
    out, blocks = len(matrix), matrix.shape[1] // block
    rest = torch.zeros_like(matrix)  # W - W'
    found = SparseFactors(
        matrix.new_zeros(blocks, atoms, block),
        matrix.new_zeros(out, blocks, k),
        torch.arange(k, device=matrix.device).expand(out, blocks, k).contiguous(),
    )
    for sweep in range(sweeps):
        for b in range(blocks):
            report((sweep * blocks + b) / (sweeps * blocks))
            columns = slice(b * block, (b + 1) * block)
            target, lower = block_target(matrix, rest, metric, columns, matrix.shape[1] if sweep else columns.start)
            seen = target @ lower
            if not bool(seen.any()):
                continue
            best = math.inf
            if sweep:
                best = float(((target - matrix[:, columns] + rest[:, columns]) @ lower).square().sum())
            start = found.atoms[b] @ lower if sweep else first_atoms(seen, atoms, generator)
            solved = solve_block(seen, start, spread(found.values[:, b], found.index[:, b], atoms), k, rounds)
            if solved.error < best:
                sparse = solved.sparse
                if sweep == sweeps - 1:
                    sparse = Coder.of(solved.atoms).refit(seen, sparse, solved.support)
                found.atoms[b] = torch.linalg.solve_triangular(lower, solved.atoms, upper=False, left=False)
                found.index[:, b] = solved.support.nonzero()[:, 1].view(out, k)
                found.values[:, b] = sparse.gather(1, found.index[:, b])
                rest[:, columns] = matrix[:, columns] - sparse @ found.atoms[b]
                if watch is not None and (sweep or b == blocks - 1):
                    watch(metric.error(rest))
    return found


def block_target(
    matrix: torch.Tensor, rest: torch.Tensor, metric: Metric, columns: slice, solved: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """R_b (out, B) and L_b (B, B).

    rest    W - W' (out, in)
    solved  columns from this one on have no error yet
    """
    own = metric.hessian[columns, columns]
    lower = torch.linalg.cholesky(own).to(matrix.dtype)
    if not solved:
        return matrix[:, columns], lower
    beside = rest[:, :solved] @ metric.hessian[:solved, columns].to(matrix.dtype)
    if solved > columns.start:
        beside -= rest[:, columns] @ own.to(matrix.dtype)
    return matrix[:, columns] + torch.cholesky_solve(beside.t(), lower).t(), lower


def refit_values(matrix: torch.Tensor, metric: Metric, found: SparseFactors) -> SparseFactors:
    """Better values for given atoms and index, block after block. They correct the rounding of the atoms."""
    block, inputs = found.atoms.shape[2], matrix.shape[1]
    rest, values = matrix - found.matrix(), found.values.clone()
    for b in range(len(found.atoms)):
        columns = slice(b * block, (b + 1) * block)
        target, lower = block_target(matrix, rest, metric, columns, inputs)
        index, count = found.index[:, b], found.atoms.shape[1]
        support = spread(torch.ones_like(values[:, b]), index, count)
        sparse = Coder.of(found.atoms[b] @ lower).refit(target @ lower, spread(values[:, b], index, count), support)
        values[:, b] = sparse.gather(1, index)
        rest[:, columns] = matrix[:, columns] - sparse @ found.atoms[b]
    return SparseFactors(found.atoms, values, found.index)


def balance(found: SparseFactors) -> SparseFactors:
    """The same matrix with coefficients of equal mean square for every atom, which rounds with a smaller error."""
    atoms, values = found.atoms.clone(), found.values.clone()
    for b in range(len(atoms)):
        sizes = spread(values[:, b], found.index[:, b], atoms.shape[1]).square().mean(0).sqrt()
        sizes = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
        atoms[b] *= sizes[:, None]
        values[:, b] /= sizes[found.index[:, b]]
    return SparseFactors(atoms, values, found.index)
