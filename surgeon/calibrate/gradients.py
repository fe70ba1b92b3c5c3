"""Exact gradients of the language-model loss, sample by sample, with one layer in memory.

Forward: the layers are loaded one after the other and every sample's input of every layer is kept
(`layer_inputs`). At the head the loss and its gradient are found in blocks of the vocabulary
(`head_gradients`). Backward: the layers are loaded again in reverse order; each is recomputed from its
kept input with gradients on, and every gradient is handed to a receiver as soon as it exists. So the
peak is one layer's weights, one of its gradients, and the kept inputs of a group of samples.

The loss of a sample is the mean negative log-likelihood of its answer tokens given all before them. The
gradients are those of ``loss.backward()`` on the library's model in evaluation mode, in two respects
also where that is a convention: the embedding's row of the padding token has no gradient from the input
side, and experts are differentiated for the tokens that were routed to them. A gradient of a mean over
many tokens is small: float16 loses part of it, bfloat16 does not.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from surgeon.calibrate.answers import TokenSample, check_answers
from surgeon.calibrate.backward import GradientReceiver, Pass
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import EnvironmentFault

__all__ = ["GradientReceiver", "Settings", "TokenSample", "gradients"]


def gradients(
    checkpoint: Checkpoint,
    samples: Sequence[TokenSample],
    receiver: GradientReceiver,
    settings: Settings,
    *,
    progress: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    hidden: Callable[[int, Tensor], None] | None = None,
) -> dict[int, float]:
    """Hand the exact gradients of every sample's loss to a receiver, and return the losses.

    Args:
        checkpoint: a decoder with a language-model head.
        samples: token ids and where the answer starts (0: all text counts).
        receiver: takes the gradients.
        settings: device, precision, memory.
        progress: called with the name of each step.
        stop: ends the pass early with `Interrupted`.
        hidden: also gets (sample, last hidden states at the places that predict the answer [n, H]).

    Raises:
        InputError: E387 a sample has no answer tokens; E384 values or a loss that are not finite;
            E385 no samples, or one that is too long; E380 a model without a language-model head; what
            `Skeleton` raises.
        EnvironmentFault: E504 not even one layer fits the memory limit.
    """
    check_answers(samples)
    skeleton = Skeleton(checkpoint, settings)
    with _threads(settings.threads), torch.no_grad():
        run = Pass(skeleton, samples, receiver, progress or (lambda step: None), stop, hidden)
        losses: dict[int, float] = {}
        with _memory_faults():
            for group in run.groups():
                losses |= run.group(group)
    return dict(sorted(losses.items()))


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _memory_faults() -> Iterator[None]:
    """Turn exhausted memory into a refusal."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory() from error
    except RuntimeError as error:  # what torch's CPU allocator raises
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise _out_of_memory() from error


def _out_of_memory() -> EnvironmentFault:
    return EnvironmentFault("E504", "the memory is used up while gradients are measured",
                            help="set --memory-limit, use bfloat16, or a shorter sequence length")  # fmt: skip
