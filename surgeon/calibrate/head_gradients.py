"""The loss at the output head and its gradients, in blocks of the vocabulary.

With hidden states h [n, H] at the places that predict an answer token, logits z = c(h W' + b) and
the mean negative log-likelihood L of the targets y:

    dL/dz = (softmax(z) - onehot(y)) / n,   dL/dh = sum over blocks (dL/dz c'(.)) W,   dL/dW = (dL/dz c'(.))' h

The first pass over the blocks finds each token's log-sum-exp, the second one the gradients. Neither
all logits nor the whole head is ever held. c is what the family does to logits: a division, or
Gemma's soft cap s tanh(x / s). Softmax and its gradient are float32 whatever the compute precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgeon.calibrate.head import Head
from surgeon.errors import InputError, Where


@dataclass(frozen=True)
class LogitRule:
    """The derivative of what a family does to its logits, z = s tanh(x / (d s)) or z = x / d.

    Attributes:
        divisor: d, ``logits_scaling`` of granitemoe.
        cap: s, ``final_logit_softcapping`` of gemma2; None for none.
    """

    divisor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """Return the rule of a library configuration."""
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(float(getattr(config, "logits_scaling", None) or 1.0), None if cap is None else float(cap))

    def pull_back(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return dL/dx from z and dL/dz."""
        if self.cap is not None:
            gradient = gradient * (1 - (z / self.cap) ** 2)
        return gradient / self.divisor if self.divisor != 1 else gradient


@dataclass
class Answer:
    """One sample's part in the loss.

    Attributes:
        sample: its index.
        hidden: states that predict an answer token [n, H].
        targets: those tokens [n].
    """

    sample: int
    hidden: Tensor
    targets: Tensor


Deliver = Callable[[Answer, str, Tensor, Tensor, slice], None]
"""(answer, "weight" or "bias", the block's values, their gradient, rows of the head)."""


def loss_and_gradients(
    head: Head, rule: LogitRule, answers: Sequence[Answer], deliver: Deliver | None
) -> tuple[list[float], list[Tensor]]:
    """Return each sample's loss and its gradient towards the hidden states [n, H].

    Args:
        head, rule: the output head, and what the family does to logits.
        answers: the samples.
        deliver: gets the gradients of weight and bias, block by block, sample by sample. None says that
            the weights are frozen: the loss is then the sum over tokens instead of the mean, and its
            gradient float32, so that nothing of it is lost before it is scaled.

    Raises:
        InputError: E383 a target is outside the vocabulary.
    """
    for answer in answers:
        highest = int(answer.targets.max())
        if highest >= head.vocabulary:
            raise InputError("E383", f"a token id is outside the vocabulary of {head.vocabulary}: {highest}",
                             where=Where(tensor=head.tensor), help="the text was tokenized for another model")  # fmt: skip
    step = head.rows_per_block(max(len(answer.targets) for answer in answers))
    normalisers, chosen = _normalisers(head, answers, step)
    towards = [torch.zeros_like(a.hidden, dtype=torch.float32) for a in answers]
    for start, stop, weight, bias in head.blocks(step):
        rows = slice(start, stop)
        for at, answer in enumerate(answers):
            z = head.block_logits(answer.hidden, weight, bias)
            gradient = torch.exp(z - normalisers[at][:, None])
            place = ((answer.targets >= start) & (answer.targets < stop)).nonzero().reshape(-1)
            gradient[place, answer.targets[place] - start] -= 1.0
            if deliver is None:
                towards[at] += _frozen(rule.pull_back(z, gradient), weight)
                continue
            gradient /= len(answer.targets)
            raw = rule.pull_back(z, gradient).to(answer.hidden.dtype)
            towards[at] += raw @ weight
            deliver(answer, "weight", weight, raw.T @ answer.hidden, rows)
            if bias is not None:
                deliver(answer, "bias", bias, raw.sum(0), rows)
    losses = [(n.double() - c.double()) for n, c in zip(normalisers, chosen, strict=True)]
    if deliver is None:
        return [float(loss.sum()) for loss in losses], towards
    return [float(loss.mean()) for loss in losses], [
        t.to(a.hidden.dtype) for t, a in zip(towards, answers, strict=True)
    ]


SCALE = 2.0**10
"""Loss scale of the frozen product in 16 bits: probabilities down to 1e-10 count, and those near 1 stay far from overflow."""


def _frozen(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return dL/dx W [n, H] in float32 from dL/dx [n, rows] in float32."""
    if weight.element_size() > 2:
        return gradient.to(weight.dtype) @ weight
    return ((gradient * SCALE).to(weight.dtype) @ weight).float() / SCALE


def _normalisers(head: Head, answers: Sequence[Answer], step: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return each token's log-sum-exp over the vocabulary and its target's logit, float32 [n]."""
    found = [torch.full_like(a.targets, -torch.inf, dtype=torch.float32) for a in answers]
    chosen = [torch.zeros_like(n) for n in found]
    for start, stop, weight, bias in head.blocks(step):
        for at, answer in enumerate(answers):
            z = head.block_logits(answer.hidden, weight, bias)
            found[at] = torch.logaddexp(found[at], torch.logsumexp(z, dim=1))
            place = ((answer.targets >= start) & (answer.targets < stop)).nonzero().reshape(-1)
            chosen[at][place] = z[place, answer.targets[place] - start]
    return found, chosen
