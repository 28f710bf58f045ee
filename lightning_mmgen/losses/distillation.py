"""What a student's features lack of a teacher's."""

from __future__ import annotations

from torch import Tensor


def relative_error(features: Tensor, teacher: Tensor) -> Tensor:
    """|| f - f_T ||^2 / || f_T ||^2 of each sample: [b, ...] each -> [b] in float32; the teacher is a constant (BK-SDM, Kim et al. 2024,
    equation 3, there without the denominator, by which layers of all widths count alike)."""
    constant = teacher.detach().float().flatten(1)
    error = (features.float().flatten(1) - constant).square().sum(1)
    return error / constant.square().sum(1).clamp(min=1e-12)
