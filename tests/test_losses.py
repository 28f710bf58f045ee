from __future__ import annotations

import torch

from lightning_mmgen.losses import diffusion_loss


def test_diffusion_loss_equals_a_plain_loop() -> None:
    prediction, target, weight = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5), torch.tensor([0.5, 2.0, 0.0])
    total = 0.0
    for b in range(3):
        error = sum((p - t) ** 2 for p, t in zip(prediction[b].flatten().tolist(), target[b].flatten().tolist(), strict=True))
        total += weight[b].item() * error / (2 * 4 * 5)
    torch.testing.assert_close(diffusion_loss(prediction, target, weight).item(), total / 3, rtol=1e-5, atol=1e-6)


def test_diffusion_loss_is_a_float32_scalar_that_carries_gradients() -> None:
    prediction = torch.randn(2, 1, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randn(2, 1, 3, 3, dtype=torch.bfloat16)
    loss = diffusion_loss(prediction, target, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert prediction.grad is not None
    assert prediction.grad[0].abs().sum() > 0 and prediction.grad[1].abs().sum() == 0
