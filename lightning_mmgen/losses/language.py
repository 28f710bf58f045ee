"""The language loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy


def language_loss(logits: Tensor, tokens: Tensor, said: Tensor) -> Tensor:
    """Mean over the tokens that are ``said`` of -log p(token i | tokens before i); a zero that is connected to the graph if there are none.

    Args:
        logits: [b, n, vocabulary]; row i - 1 predicts token i.
        tokens: [b, n].
        said: [b, n], True for the tokens that count.
    """
    counted = said[:, 1:]
    if not counted.any():
        return logits.sum() * 0
    return cross_entropy(logits[:, :-1][counted].float(), tokens[:, 1:][counted])
