"""The output embedding in pieces: logits and losses without the whole matrix or all logits in memory.

The head is read in blocks of vocabulary rows. Losses keep a running maximum and sum for every
token (the streaming form of log-sum-exp), so memory is one block of rows and one block of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from surgeon.calibrate.pieces import Piece, read_tensor
from surgeon.calibrate.placement import Placement
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Where

BLOCK_BYTES = 32 << 20
"""Bytes of the head, and of logits, held at once."""


class Head:
    """A model's output embedding, read block by block.

    Includes what the family does to its logits: a bias, a scale, a soft cap.

    Attributes:
        vocabulary: number of logits.
        tensor: the checkpoint tensor that holds the matrix; the embedding when tied.

    Raises (constructor):
        InputError: E386 the model has no output embedding.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, *, skeleton: Skeleton | None = None
    ) -> None:
        skeleton = skeleton or Skeleton(checkpoint, settings)
        pieces = skeleton.head_pieces()
        if "weight" not in pieces:
            raise InputError("E386", f"{checkpoint.label} has no output embedding, so it predicts no tokens",
                             where=Where(checkpoint.label),
                             help="use the language model, not the base model or a classifier")  # fmt: skip
        config: Any = skeleton.model.config
        self._checkpoint = checkpoint
        self._skeleton = skeleton
        self._dtype = skeleton.dtype
        self._device = skeleton.placement.outer
        self._placement: Placement = skeleton.placement
        self.tensor = pieces["weight"][0].tensor
        self.vocabulary, self._width = checkpoint.tensors[self.tensor].shape
        self._bias: list[Piece] | None = pieces.get("bias")
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._divisor: float = getattr(config, "logits_scaling", 1.0) or 1.0

    def rows_per_block(self, tokens: int) -> int:
        """Return how many vocabulary rows fit beside the logits of so many tokens."""
        size = torch.empty(0, dtype=self._dtype).element_size()
        return max(
            1, min(BLOCK_BYTES // (self._width * size), BLOCK_BYTES // (4 * max(tokens, 1)), self.vocabulary)
        )

    def blocks(self, rows: int) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """Yield (first row, last row + 1, weight [rows, hidden], bias [rows] or None)."""
        for start in range(0, self.vocabulary, rows):
            stop = min(start + rows, self.vocabulary)
            weight = read_tensor(
                self._checkpoint, self.tensor, start * self._width, stop * self._width, self._dtype
            )
            bias = None
            if self._bias is not None:
                bias = read_tensor(self._checkpoint, self._bias[0].tensor, start, stop, self._dtype)
                bias = self._placement.send(bias, self._device)
            yield start, stop, self._placement.send(weight.reshape(-1, self._width), self._device), bias

    def block_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits [n, rows] of one block, float32, scaled and capped as the family does."""
        logits = torch.nn.functional.linear(hidden, weight, bias)
        if self._divisor != 1.0:
            logits = logits / self._divisor
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.float()

    def entering(self, hidden: Tensor) -> Tensor:
        """Return what the matrix is applied to: last hidden states [n, hidden] in the head's precision.

        BERT's head transforms them first; `block_logits` takes what this returns.
        """
        hidden = self._placement.send(hidden.to(self._dtype), self._device)
        return self._skeleton.head_input(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, vocabulary] of hidden states [n, hidden], float32."""
        hidden = self.entering(hidden)
        out = torch.empty(hidden.shape[0], self.vocabulary, dtype=torch.float32, device=self._device)
        for start, stop, weight, bias in self.blocks(self.rows_per_block(hidden.shape[0])):
            out[:, start:stop] = self.block_logits(hidden, weight, bias)
        return out

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return -log p(target) [n] for hidden states [n, hidden] and token ids [n], float32."""
        hidden = self.entering(hidden)
        targets = targets.to(self._device)
        count = hidden.shape[0]
        peak = torch.full((count,), -torch.inf, device=self._device)
        total = torch.zeros(count, device=self._device)
        chosen = torch.full((count,), -torch.inf, device=self._device)
        for start, stop, weight, bias in self.blocks(self.rows_per_block(min(count, 1024))):
            for first in range(0, count, 1024):
                rows = slice(first, min(first + 1024, count))
                logits = self.block_logits(hidden[rows], weight, bias)
                higher = torch.maximum(peak[rows], logits.amax(dim=1))
                total[rows] = total[rows] * torch.exp(peak[rows] - higher) + torch.exp(
                    logits - higher[:, None]
                ).sum(dim=1)
                peak[rows] = higher
                inside = ((targets[rows] >= start) & (targets[rows] < stop)).nonzero().reshape(-1)
                chosen[first + inside] = logits[inside, targets[rows][inside] - start]
        return peak + torch.log(total) - chosen


def token_losses(
    checkpoint: Checkpoint, hidden: Tensor, ids: Tensor, settings: Settings, *, head: Head | None = None
) -> Tensor:
    """Return -log p(next token) for every token but the last.

    Args:
        checkpoint: the model.
        hidden: its last hidden states [T, hidden].
        ids: the tokens [T].
        settings: device and precision.
        head: an open head, so that several samples share it.

    Returns:
        [T - 1], float32.
    """
    with torch.no_grad():
        return (head or Head(checkpoint, settings)).losses(hidden[:-1], torch.as_tensor(ids)[1:])
