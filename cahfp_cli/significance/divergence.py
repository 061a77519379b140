"""How far a network's predictions are from a reference."""

import torch


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """KL(reference, softmax(logits)), mean over samples, nats.

    Args: reference: (n, m), each row sums to 1; logits: (n, m).
    """
    entropy = torch.special.xlogy(reference, reference).sum(1)
    return float((entropy - (reference * logits.log_softmax(1)).sum(1)).double().mean())
