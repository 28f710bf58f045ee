from __future__ import annotations

import torch

from lightning_mmgen.losses import error_along, relative_error


def test_only_what_lies_along_the_foil_counts() -> None:
    teacher, foil = torch.tensor([[[3.0, 4.0]]] * 3), torch.tensor([[[3.0, 2.0]]] * 3)  # they differ in the second number, by 2
    features = torch.tensor([[[3.0, 3.0]], [[9.0, 4.0]], [[3.0, 2.0]]])  # in the middle, wrong across, at the foil
    torch.testing.assert_close(error_along(features, teacher, foil), torch.tensor([1.0, 0.0, 4.0]) / 25)


def test_it_is_a_part_of_the_whole_error_and_zero_without_a_foil() -> None:
    f, t, o = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind(0)
    assert (error_along(f, t, o) <= relative_error(f, t)).all() and (error_along(t, t, o) == 0).all()
    torch.testing.assert_close(error_along(o, t, o), relative_error(o, t))  # the foil's features are all wrong along it
    assert (error_along(f, t, t) == 0).all()


def test_the_gradient_runs_along_the_foil_alone() -> None:
    f, t, o = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    f, t = f.requires_grad_(), t.requires_grad_()
    error_along(f, t, o).sum().backward()
    assert f.grad is not None and t.grad is None
    torch.testing.assert_close(torch.cosine_similarity(f.grad, (t - o).detach()).abs(), torch.ones(2))
