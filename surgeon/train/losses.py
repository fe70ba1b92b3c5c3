"""Losses of a student, as sums over tokens, so that parts of a step add up to what one large batch would give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 2.0**-7
"""The machine epsilon of bfloat16, as in the released code of SquareHead."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the negative log-likelihoods of targets [n] under logits [n, vocabulary], nats."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the sum over tokens of T^2 KL(teacher / T || student / T), nats.

    Hinton et al., arXiv 1503.02531, section 2: T^2 keeps the size of the gradient while T changes.

    Args:
        student, teacher: logits [n, vocabulary].
        temperature: T.
    """
    ours = functional.log_softmax(student.float() / temperature, dim=-1)
    theirs = functional.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * functional.kl_div(ours, theirs, reduction="sum", log_target=True)


def square_head(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Return mean((h_s - h_t)^2) / (mean(h_t^2) + eps) over valid tokens: SquareHead, free of scale.

    Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of LLMs", arXiv 2310.06927, section 3.

    Args:
        student, teacher: hidden states [samples, tokens, channels].
        valid: bool [samples, tokens].
    """
    ours, theirs = student[valid].float(), teacher[valid].float()
    return functional.mse_loss(ours, theirs) / (theirs.square().mean() + EPSILON)


def block_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    valid: Tensor,
    layers: Sequence[int],
    channels: Tensor | None = None,
) -> Tensor:
    """Return the mean over the student's blocks of `square_head` to the blocks they answer to.

    Args:
        student, teacher: outputs of all blocks, each [samples, tokens, hidden].
        valid: bool [samples, tokens].
        layers: the teacher's block for each of the student's.
        channels: channels of the teacher's residual stream that the student has kept, int64; None for all.
    """
    terms = []
    for ours, number in zip(student, layers, strict=True):
        theirs = teacher[number] if channels is None else teacher[number][..., channels]
        terms.append(square_head(ours, theirs, valid))
    return torch.stack(terms).mean()
