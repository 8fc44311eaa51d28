"""The algebra of low-rank updates: singular values and truncations of B A from its thin factors, never from B A itself.

LoRA-Squeeze (arXiv 2602.10993). With B = Q_b R_b and A^T = Q_a R_a, the singular value decomposition of the r x r core
R_b R_a^T = U S V^T is that of B A = (Q_b U) S (Q_a V)^T: exact, at O((d + k) r^2 + r^3).

Shapes: E maps stacked one on another (the experts of a layer; else 1), R rank, I inputs, O outputs, K new rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Norm of a row of A as PEFT draws it: entries uniform within 1 / sqrt(I).
FRESH_ROW = 3**-0.5


@dataclass(frozen=True)
class Decomposed:
    """B A, taken apart in float64.

    values_ER: singular values, falling, with zeros at the end where the map has fewer than R. right_EQQ: V^T in the
    basis Q_a. basis_EIQ, triangle_EQR: Q_a and R_a, where Q = min(I, R). size_E11: root mean square of the norms of A's
    rows.
    """

    b_EOR: Tensor
    values_ER: Tensor
    right_EQQ: Tensor
    basis_EIQ: Tensor
    triangle_EQR: Tensor
    size_E11: Tensor


@dataclass(frozen=True)
class Truncated:
    """Factors of the best rank-K approximation, float64.

    by_a_EKR, by_b_ERK: new A = by_a @ A (where A has full rank), new B = B @ by_b.
    """

    b_EOK: Tensor
    a_EKI: Tensor
    by_a_EKR: Tensor
    by_b_ERK: Tensor


def decompose(b_EOR: Tensor, a_ERI: Tensor) -> Decomposed:
    """Take B A apart. Inputs: finite, of any float dtype."""
    a, b = a_ERI.double(), b_EOR.double()
    rank = a.shape[1]
    basis, triangle = torch.linalg.qr(a.mT)
    # All rows of V^T: where B has fewer outputs than the rank, directions without any effect are needed as well.
    _, values, right = torch.linalg.svd(torch.linalg.qr(b)[1] @ triangle.mT, full_matrices=True)
    size_E11 = torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True) / rank**0.5
    return Decomposed(
        b_EOR=b,
        values_ER=torch.cat((values, values.new_zeros(len(values), rank - values.shape[1])), dim=1),
        right_EQQ=right,
        basis_EIQ=basis,
        triangle_EQR=triangle,
        size_E11=torch.where(size_E11 > 0, size_E11, FRESH_ROW),
    )


def truncate(parts: Decomposed, rank: int) -> Truncated:
    """The best approximation of rank K <= R (Eckart-Young), split so that training can go on.

    The rows of the new A are orthogonal, and as long as those of A were in the mean; the singular values are in B. So A
    is of ordinary size and B holds what was learned, as in any adapter in training: directions that nothing was learned
    in have a row in A and zeros in B, where an even split would leave both at zero, without a gradient for ever.
    """
    size, right_EKQ = parts.size_E11, parts.right_EQQ[:, :rank]
    if (spare := rank - right_EKQ.shape[1]) > 0:  # more rank than inputs
        right_EKQ = torch.nn.functional.pad(right_EKQ, (0, 0, 0, spare))
    # A = R_a^T Q_a^T
    by_b_ERK = parts.triangle_EQR.mT @ right_EKQ.mT / size
    return Truncated(
        b_EOK=parts.b_EOR @ by_b_ERK,
        a_EKI=size * right_EKQ @ parts.basis_EIQ.mT,
        by_a_EKR=size * right_EKQ @ torch.linalg.pinv(parts.triangle_EQR.mT),
        by_b_ERK=by_b_ERK,
    )


def retained(values_ER: Tensor) -> Tensor:
    """V(k) = sum_{i<=k} s_i^2 / sum s_i^2 at k = 1..R, float64 [R], over all E maps together.

    The relative squared Frobenius error of the truncation to rank k is 1 - V(k). An update of zeros has V = 1.
    """
    kept_R = values_ER.double().square().sum(0).cumsum(0)
    return kept_R / kept_R[-1] if kept_R[-1] > 0 else torch.ones_like(kept_R)
