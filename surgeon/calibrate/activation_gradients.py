"""Gated activations of routed experts and the gradients of the loss towards them, with frozen weights.

    a = act(gate x) * (up x)     [tokens, I], or act(up x) without a gate: what enters the down projection
    g = dL / da                  [tokens, I]; contains the routing weight (where a family multiplies what enters
                                 an expert by it, as Llama 4 does, a contains it)

L is the next-token cross entropy of the answers, summed over tokens, so that a token's gradients do not
depend on what else is in its batch.

Forward, layer by layer; the inputs of layers are kept: all when they fit in memory, else every eighth. Back,
layer by layer, down to the first layer with experts: each layer is recomputed from its input, missing inputs
from the kept one below (`Pass`). In 16 bits the gradient of each batch is multiplied by a power of two, chosen
anew at every layer so that its largest value is 64; what is handed over is divided by it again. Experts of a
layer that does not fit memory are read one at a time (`expert_reverse`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from surgeon.calibrate.activation_pass import ActivationReceiver, Gated, Pass
from surgeon.calibrate.answers import TokenSample, check_answers
from surgeon.calibrate.conditions import memory_faults, threads
from surgeon.calibrate.forward_and_back import KEPT_EVERY, Progress, SummedLoss
from surgeon.calibrate.settings import DTYPES, Settings
from surgeon.checkpoint.checkpoint import Checkpoint

__all__ = [
    "ActivationReceiver",
    "Gated",
    "Progress",
    "Settings",
    "SummedLoss",
    "activation_gradients",
    "spilled_bytes",
]


def activation_gradients(
    checkpoint: Checkpoint,
    samples: Sequence[TokenSample],
    receiver: ActivationReceiver,
    settings: Settings,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    resume: bool = False,
) -> SummedLoss:
    """Hand gated activations of all routed experts and their gradients to a receiver.

    Args:
        checkpoint: a decoder with a language-model head and experts.
        samples: token ids and where the answer starts (0: all text counts). All tokens are handed over,
            those of the prompt as well: they act on the answer.
        receiver: takes them.
        settings: device, precision, memory; ``spill`` keeps what a later pass continues from.
        progress: called after each layer.
        stop: ends the pass early with `Interrupted`.
        resume: continue where an interrupted pass over the same model, samples and settings stopped.

    Raises:
        InputError: E434 an expert's activations or gradients are not finite; E435 no expert can be measured;
            E387 a sample without answer; E384 other values that are not finite; E385 no samples, or one that is
            too long; E380 no language-model head; what `Skeleton` raises.
        EnvironmentFault: E504 not even one layer fits the memory limit.
    """
    check_answers(samples)
    with threads(settings.threads), torch.no_grad(), memory_faults("the gradients of expert activations"):
        return Pass(checkpoint, samples, receiver, settings, progress, stop).run(resume)


def spilled_bytes(layers: int, tokens: int, hidden: int, dtype: str) -> int:
    """Return the bytes that a pass with a spill folder puts on disk at most, sums and padding left out.

    Args:
        layers: of the model; tokens: of all samples; hidden: width of the residual stream; dtype: of `Settings`.
    """
    kept = -(-layers // KEPT_EVERY)
    return (kept + KEPT_EVERY + 2) * tokens * hidden * DTYPES[dtype].itemsize
