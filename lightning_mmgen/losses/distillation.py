"""What a student's features lack of a teacher's, in all and along one direction."""

from __future__ import annotations

from torch import Tensor


def relative_error(features: Tensor, teacher: Tensor) -> Tensor:
    """|| f - f_T ||^2 / || f_T ||^2 of each sample: [b, ...] each -> [b] in float32; the teacher is a constant (BK-SDM, Kim et al. 2024,
    equation 3, there without the denominator, by which layers of all widths count alike)."""
    constant = teacher.detach().float().flatten(1)
    error = (features.float().flatten(1) - constant).square().sum(1)
    return error / constant.square().sum(1).clamp(min=1e-12)


def error_along(features: Tensor, teacher: Tensor, foil: Tensor) -> Tensor:
    """The part of :func:`relative_error` that lies along what tells a teacher's features from those of a foil, d = f_T - f_foil:
    <f - f_T, d>^2 / (|| d ||^2 || f_T ||^2) of each sample: [b, ...] each -> [b] in float32; 0 where the foil's are the teacher's.

    By Cauchy's inequality it is never more than the whole. A student that knows all but on which side of the foil it stands, and so
    takes the middle, has || d ||^2 / (4 || f_T ||^2).
    """
    constant, other = (t.detach().float().flatten(1) for t in (teacher, foil))
    apart = constant - other
    error = ((features.float().flatten(1) - constant) * apart).sum(1).square()
    return error / (apart.square().sum(1) * constant.square().sum(1)).clamp(min=1e-12)
