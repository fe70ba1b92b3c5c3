"""How far a model's predictions are from a reference's: KL divergence and top-1 agreement.

KL(reference || model) per token, in nats, over the tokens the text counts. Both models are walked
one layer at a time; then both heads are read block by block over the vocabulary and the sums are
kept running, so neither the heads nor the logits are ever in memory as a whole:

    KL = sum_v p_v (a_v - b_v) - lse(a) + lse(b)        a: reference logits, b: model logits, p = softmax(a)

Codes: E396 the vocabularies do not agree.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from surgeon.calibrate.head import Head
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.vocabulary import has_tokenizer, read_vocabulary
from surgeon.errors import InputError, Where
from surgeon.evaluate.intervals import bootstrap
from surgeon.evaluate.model import Described
from surgeon.evaluate.perplexity import grouped, predicting, walked
from surgeon.evaluate.texts import Passage

TOKENS = 1024
"""Positions whose logits of one block are held at once."""


@dataclass(frozen=True)
class Divergence:
    """Per passage: KL in nats [counted] and whether the most probable tokens agree [counted]."""

    kl: list[np.ndarray]
    agreement: list[np.ndarray]


def check_vocabularies(model: Described, reference: Described) -> None:
    """Refuse models whose tokens differ: their predictions cannot be compared (E396)."""
    for described in (model, reference):
        if not has_tokenizer(described.path):
            raise InputError(
                "E375",
                f"{described.name} has no tokenizer",
                where=Where(str(described.path)),
                help="copy tokenizer.json and tokenizer_config.json of the model into it",
            )
    ours, theirs = read_vocabulary(model.path), read_vocabulary(reference.path)
    if ours.tokens == theirs.tokens:
        return
    other = sum(theirs.tokens.get(token) != index for token, index in ours.tokens.items())
    other += sum(token not in ours.tokens for token in theirs.tokens)
    raise InputError("E396", f"the vocabularies of {model.name} and {reference.name} differ in {other:,} tokens",
                     where=Where(str(reference.path)), help="KL compares predictions token by token: give a reference with the same tokenizer")  # fmt: skip


def divergence(
    model: Checkpoint,
    reference: Checkpoint,
    passages: Sequence[Passage],
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Divergence:
    """Compare two models' predictions; rows of padding that only one head has are left out."""

    def half(offset: int) -> Callable[[int, int], None] | None:
        if progress is None:
            return None
        tell = progress
        return lambda done, total: tell(offset * total + done, 2 * total)

    found = Divergence([np.empty(0)] * len(passages), [np.empty(0, bool)] * len(passages))
    with contextlib.ExitStack() as stack:
        walks = []
        for i, checkpoint in enumerate((reference, model)):
            walk = walked(checkpoint, passages, settings, progress=half(i), stop=stop)
            walks.append(stack.enter_context(walk))
        heads = [
            Head(c, settings, skeleton=w.skeleton) for c, w in zip((reference, model), walks, strict=True)
        ]
        for first, second in zip(*(grouped(predicting(w, passages)) for w in walks), strict=True):
            hidden = [torch.cat([h for _, h in group]) for group in (first, second)]
            kl, agree = compare(heads[0], heads[1], hidden[0], hidden[1])
            place = 0
            for number, part in first:
                found.kl[number] = kl[place : place + len(part)]
                found.agreement[number] = agree[place : place + len(part)]
                place += len(part)
    return found


@torch.no_grad()
def compare(
    reference: Head, model: Head, ours: torch.Tensor, theirs: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return KL [n] and agreement [n] of two models at the same positions.

    Args:
        reference, model: the heads.
        ours, theirs: hidden states [n, H] of the reference and of the model.
    """
    count = ours.shape[0]
    ours, theirs = reference.entering(ours), model.entering(theirs)
    shared = min(reference.vocabulary, model.vocabulary)
    rows = min(h.rows_per_block(min(count, TOKENS)) for h in (reference, model))
    state = [_Running(count) for _ in range(math.ceil(count / TOKENS))]
    for (start, stop, weight_a, bias_a), (_, _, weight_b, bias_b) in zip(
        reference.blocks(rows), model.blocks(rows), strict=False
    ):
        width = min(stop, shared) - start
        if width <= 0:
            break
        for i, running in enumerate(state):
            piece = slice(i * TOKENS, (i + 1) * TOKENS)
            a = reference.block_logits(ours[piece], weight_a, bias_a)[:, :width]
            b = model.block_logits(theirs[piece], weight_b, bias_b)[:, :width]
            running.add(a.double().cpu(), b.double().cpu(), start)
    results = [running.finish() for running in state]
    return np.concatenate([r[0] for r in results]), np.concatenate([r[1] for r in results])


class _Running:
    """Sums over the vocabulary seen so far, for up to `TOKENS` positions, float64."""

    def __init__(self, count: int) -> None:
        self.first: list[torch.Tensor] = []

    def add(self, a: torch.Tensor, b: torch.Tensor, start: int) -> None:
        """Add logits [n, rows] of a block that begins at vocabulary row ``start``."""
        top_a, best_a = a.max(dim=1)
        top_b, best_b = b.max(dim=1)
        if not self.first:
            self.first = [
                torch.full_like(top_a, -torch.inf), torch.zeros_like(top_a), torch.zeros_like(top_a), best_a,
                torch.full_like(top_b, -torch.inf), torch.zeros_like(top_b), best_b,
            ]  # fmt: skip
        peak_a, mass_a, moved, token_a, peak_b, mass_b, token_b = self.first
        higher = torch.maximum(peak_a, top_a)
        scale, shares = torch.exp(peak_a - higher), torch.exp(a - higher[:, None])
        mass_a = mass_a * scale + shares.sum(dim=1)
        moved = moved * scale + (shares * (a - b)).sum(dim=1)
        token_a = torch.where(top_a > peak_a, best_a + start, token_a)
        above = torch.maximum(peak_b, top_b)
        mass_b = mass_b * torch.exp(peak_b - above) + torch.exp(b - above[:, None]).sum(dim=1)
        token_b = torch.where(top_b > peak_b, best_b + start, token_b)
        self.first = [higher, mass_a, moved, token_a, above, mass_b, token_b]

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        peak_a, mass_a, moved, token_a, peak_b, mass_b, token_b = self.first
        kl = moved / mass_a - (peak_a + mass_a.log()) + (peak_b + mass_b.log())
        return kl.numpy(), (token_a == token_b).numpy()


def metrics(found: Divergence, *, seed: int = 0) -> dict[str, Any]:
    """Return kl and top1_agreement with intervals over resampled passages.

    Raises:
        InputError: E394 a divergence is not a number.
    """
    counts = np.array([len(part) for part in found.kl], dtype=np.float64)
    sums = {
        "kl": np.array([float(part.sum()) for part in found.kl]),
        "top1_agreement": np.array([float(part.sum()) for part in found.agreement]),
    }
    if not np.isfinite(sums["kl"]).all():
        raise InputError("E394", "one of the models gives non-finite logits", help="surgeon verify MODEL")
    intervals = bootstrap(
        len(counts), lambda rows: {k: v[rows].sum(axis=1) / counts[rows].sum(axis=1) for k, v in sums.items()}, seed=seed
    )  # fmt: skip
    result = {}
    for name, values in sums.items():
        low, high = intervals[name] or (None, None)
        # Rounding may leave the divergence of a model from itself a hair below 0.
        value = max(0.0, float(values.sum() / counts.sum()))
        result[name] = {
            "value": value,
            "low": None if low is None else max(0.0, low),
            "high": None if high is None else max(0.0, high),
            "n": int(counts.sum()),
        }
    return result
