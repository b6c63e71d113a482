"""Implements the linear algebra of a rotated residual stream: folding norms, centring and orthogonal matrices.

An RMSNorm without gain commutes with an orthogonal map, rms(x Q) = rms(x) Q (Ashkboos et al. 2024, arXiv 2401.15024,
section 3.1). Every read and write of the stream is along one axis of a parameter: the input axis of an input
projection, the output axis of an output projection, the last axis of an embedding, the only axis of a bias. So one
function, `rotate`, rotates all of them along a given axis, and Conv1D and fused experts need no special case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from compressor.errors import PassError
from compressor.kernels.ops.hadamard_matrix import sylvester
from compressor.lazy import torch

if TYPE_CHECKING:
    from compressor.model.facts import ModelFacts
    from compressor.model.residual_records import ResidualNorm, ResidualWrite
    from compressor.protocol import PartView

# eigh and QR lose a few units in the last place per dimension (measured: 4e-15 at 512); much more is a failure
ORTHOGONAL_TOLERANCE = 1e-12


def fold_gain(matrix: torch.Tensor, gain: torch.Tensor, axis: int) -> torch.Tensor:
    """W diag(g): fold the gain of a norm into a matrix that reads its output.

    matrix  any shape, with `axis` along the norm's output
    gain    (matrix.shape[axis],), the whole factor: 1 + weight if a family stores the gain minus 1
    """
    return matrix * _along(gain, axis, matrix.dim())


def fold_shift(matrix: torch.Tensor, shift: torch.Tensor, axis: int) -> torch.Tensor:
    """W c: the addition to the matrix's bias that replaces a norm's shift c. The gain must not be folded into W yet.

    returns  the matrix's shape without `axis`
    """
    return matrix.movedim(axis, -1) @ shift


def center(matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """Subtract the mean along `axis`, so that the write to the stream has mean zero over its width.

    It turns LayerNorm into RMSNorm. It is only for LayerNorm models: an RMSNorm model's outputs would change.
    """
    return matrix - matrix.mean(axis, keepdim=True)


def rotate(tensor: torch.Tensor, q: torch.Tensor, axis: int) -> torch.Tensor:
    """Multiply by q along `axis`: W Q for (out, in) and axis 1, Qᵀ W for axis 0.

    q  (D, d): the whole orthogonal matrix, or the columns that are kept
    """
    return (tensor.movedim(axis, -1) @ q).movedim(-1, axis)


def _along(vector: torch.Tensor, axis: int, dims: int) -> torch.Tensor:
    shape = [1] * dims
    shape[axis] = -1
    return vector.reshape(shape)


@dataclass
class Covariance:
    """Sum of xᵀ x over tokens, (D, D) float64; not centred.

    Padding must not be added: `add` takes a mask, and a masked token contributes nothing, not even NaN.
    """

    matrix: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> Covariance:
        return cls(torch.zeros(width, width, dtype=torch.float64, device=device))

    def add(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, normalised: bool = False, where: str = ""
    ) -> Covariance:
        """Add the tokens of x that are not masked.

        x           (..., D)
        mask        (...), true or 1 for tokens that are added
        normalised  divide each token by its root mean square first, so that a few large ones don't dominate; a token
                    of zeros (the embedding of padding) stays zeros, as in a norm
        where       the source of the signal, for the error
        raises      PassError if a token that is added is not finite
        """
        rows = x.reshape(-1, x.shape[-1])
        if mask is not None:
            rows = rows[mask.reshape(-1).to(device=rows.device, dtype=torch.bool)]
        rows = rows.to(self.matrix.dtype)
        if not bool(torch.isfinite(rows).all()):
            raise PassError(
                "the calibration signal has NaN or Inf",
                where=where,
                hint="Set model.dtype: float32, or check the model's outputs on this data.",
                data={"reason": "signal-not-finite"},
            )
        if normalised:
            squares = rows.square().mean(-1, keepdim=True)
            rows = rows * torch.where(squares > 0, torch.rsqrt(squares), 0.0)
        self.matrix.addmm_(rows.t(), rows)
        self.tokens += rows.shape[0]
        return self


def pca(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix, largest first: C = Q diag(λ) Qᵀ.

    covariance  (D, D), computed on in float64
    returns     eigenvalues (D,) and Q (D, D), both float64; in each column of Q the entry largest in magnitude (the
                first of equals) is positive. Within equal eigenvalues any basis is valid: compare Q_d Q_dᵀ, not Q.
    raises      PassError if it is not finite, doesn't converge, or Q is not orthogonal to 1e-12 even after one QR
    """
    matrix = covariance.to(torch.float64)
    trace = float(matrix.diagonal().sum())
    if not bool(torch.isfinite(matrix).all()):
        raise PassError(
            "the covariance has NaN or Inf",
            hint="Set model.dtype: float32, or check the model's outputs on this data.",
            data={"reason": "covariance-not-finite"},
        )
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = _eigh_scaled(matrix.cpu(), trace)
        values, vectors = values.to(matrix.device), vectors.to(matrix.device)
    values, q = values.flip(0), vectors.flip(1)
    if orthogonality_error(q) > ORTHOGONAL_TOLERANCE:
        q, triangle = torch.linalg.qr(q)
        q = q * torch.sign(triangle.diagonal())
        if orthogonality_error(q) > ORTHOGONAL_TOLERANCE:
            raise PassError(
                f"the eigenvectors are not orthogonal (off by {orthogonality_error(q):.1e})",
                hint="Set model.dtype: float32, or a larger data.samples.",
                data={"reason": "not-orthogonal", "error": orthogonality_error(q)},
            )
    largest = q.abs().argmax(0)  # the first where several are equal
    return values, q * torch.sign(q.gather(0, largest[None]))


def _eigh_scaled(matrix: torch.Tensor, trace: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The second attempt: on the CPU, scaled to trace one."""
    try:
        values, vectors = torch.linalg.eigh(matrix / trace)
    except torch.linalg.LinAlgError as error:
        raise PassError(
            f"the eigenvectors of the covariance can't be found ({error})",
            hint="Set model.dtype: float32, or a larger data.samples.",
            data={"reason": "no-eigenvectors", "cause": str(error)},
        ) from error
    return values * trace, vectors


def orthogonality_error(q: torch.Tensor) -> float:
    """max |Qᵀ Q - I|."""
    eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    return float((q.t() @ q - eye).abs().max())


def random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """(n, n) float64 from the Haar measure: Q of a Gaussian matrix's QR, with R's diagonal made positive.

    Without the signs the result depends on LAPACK's convention and is not uniform (Mezzadri 2007, arXiv
    math-ph/0609050).
    """
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator, device=generator.device)
    q, triangle = torch.linalg.qr(gaussian)
    return q * torch.sign(triangle.diagonal())


def randomized_hadamard(n: int, generator: torch.Generator) -> torch.Tensor:
    """(n, n) float64: diag(s) (H ⊗ M) with random signs s, the Hadamard matrix H of the largest power of two in n.

    M is for the odd factor m = n / 2^k, for which there may be no Hadamard matrix. Our choice is the orthonormal DCT-II
    matrix: it is deterministic and has entries of at most sqrt(2 / m). So for n = 2^k all entries are ±1/sqrt(n), and
    for other n they are at most sqrt(2) times larger.
    """
    if n < 1:
        raise ValueError(f"a matrix of {n} dimensions")
    power = n & -n  # the largest power of two in n
    length = 1.0
    for _ in range(power.bit_length() - 1):
        length *= 1.0 / 2**0.5
    hadamard = sylvester(power).to(generator.device) * length
    signs = torch.randint(0, 2, (n, 1), generator=generator, device=generator.device).to(torch.float64) * 2 - 1
    return signs * torch.kron(hadamard, _dct(n // power).to(generator.device))


def _dct(m: int) -> torch.Tensor:
    """The orthonormal DCT-II matrix, (m, m): its rows are cosines of increasing frequency."""
    index = torch.arange(m, dtype=torch.float64)
    cosines = torch.cos(torch.pi / m * index[:, None] * (index[None] + 0.5)) * (2.0 / m) ** 0.5
    cosines[0] /= 2**0.5
    return cosines


def untied_head(
    model: ModelFacts,
) -> tuple[dict[str, Any], dict[str, tuple[int, ...] | None], tuple[str, ...]]:
    """(config, shapes, notes) of a Redefinition that gives a tied output head weights of its own."""
    shared = [consumer.parameter for consumer in model.residual.end.consumers if consumer.parameter in model.tied]
    if not shared:
        return {}, {}, ()
    count = sum(prod(model.shapes[name]) for name in shared)
    note = f"{shared[0]} shared the embedding's weights and gets its own: {count:,} parameters more"
    return {"tie_word_embeddings": False}, {name: model.shapes[name] for name in shared}, (note,)


def rotate_part(view: PartView, q: torch.Tensor) -> None:
    """Rotate every parameter of this part of the model along the stream.

    q  (D, d) float64: the whole orthogonal matrix, or the columns that are kept
    """
    if view.index < 0:
        rotate_writes(view, view.residual.embeddings, q)
    for stream in view.sublayers:
        for norm in stream.norms:
            rotate_consumers(view, norm, q)
        rotate_writes(view, stream.writes, q)
    if view.index == len(view.residual.blocks):
        rotate_consumers(view, view.residual.end, q)


def rotate_consumers(view: PartView, norm: ResidualNorm, q: torch.Tensor) -> None:
    for consumer in norm.consumers:
        view.change(consumer.parameter, partial(rotate, q=q, axis=consumer.axis), consumer.axis)


def rotate_writes(view: PartView, writes: tuple[ResidualWrite, ...], q: torch.Tensor) -> None:
    for write in writes:
        view.change(write.parameter, partial(rotate, q=q, axis=write.axis), write.axis)


def pooled_covariance(views: Iterator[PartView], normalised: bool = False) -> tuple[torch.Tensor, int]:
    """(sum over all sublayers of their second moments, each scaled to trace 1; tokens): (D, D) float64.

    Without the scaling the last sublayers would dominate, since the stream grows with depth.
    """
    total, tokens = None, 0
    for view in views:
        for norm in norms_of(view):
            covariance = norm_covariance(view, norm, normalised)
            scaled = of_trace_one(covariance.matrix)
            total, tokens = scaled if total is None else total + scaled, covariance.tokens
    assert total is not None  # there is an output head
    return total, tokens


def of_trace_one(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix of second moments divided by its trace. Signals of zeros give zeros."""
    return matrix / (float(matrix.trace()) or 1.0)


def norms_of(view: PartView) -> list[ResidualNorm]:
    """One norm of each sublayer of this part of the model; of the output head the last norm."""
    is_output_head = view.index == len(view.residual.blocks)
    return [stream.norms[0] for stream in view.sublayers] + ([view.residual.end] if is_output_head else [])


def norm_covariance(view: PartView, norm: ResidualNorm, normalised: bool) -> Covariance:
    """Second moments of a norm's input. raises PassError if no calibration token reached it, or one is not finite"""
    covariance = Covariance.zeros(view.residual.width, view.device)
    for x in view.signals(norm):
        covariance.add(x, normalised=normalised, where=norm.module)
    if not covariance.tokens:
        raise PassError(
            "no calibration token reached it", where=norm.module, hint="Set data.source and data.samples in the recipe."
        )
    return covariance
