"""Running a whole model in training: block outputs, logits or the last hidden states, in one precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.calibrate.answers import TokenSample, check_answers, check_lengths
from surgeon.calibrate.conditions import memory_faults
from surgeon.calibrate.placement import Placement
from surgeon.deploy.build import body, load
from surgeon.deploy.per_layer import base_type
from surgeon.errors import InputError, Where
from surgeon.train.batches import Batch

TORCH_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Outputs:
    """What a model says about a batch.

    Attributes:
        blocks: output of every block [samples, tokens, hidden]; empty when not asked for.
        logits: at the places that predict [n, vocabulary]; None for an encoder.
        last: an encoder's last hidden states [samples, tokens, hidden]; None for a decoder.
        pooled: an encoder's pooled output [samples, hidden], if it has one.
    """

    blocks: tuple[Tensor, ...]
    logits: Tensor | None = None
    last: Tensor | None = None
    pooled: Tensor | None = None


class Runner:
    """A loaded model and how it is run.

    Args:
        folder: a model folder, stock or with per-layer shapes.
        device: where it goes.
        dtype: of the parameters.
        precision: "float32", or "bfloat16" for matrix products in bfloat16 (autocast).

    Attributes:
        model: the library's model.
        layers: its blocks.
        causal: whether a token sees earlier ones only.

    Raises:
        InputError: what `surgeon.deploy.build.load` and `body` there raise.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, precision: str) -> None:
        with memory_faults("loading the model"):
            self.model: Any = load(folder, dtype=dtype, device=str(device))
        self.device, self.precision = device, precision
        config = self.model.config
        self.family = base_type({"model_type": config.model_type})
        self.base: Any
        self.layers: list[nn.Module]
        self.base, self.layers = body(self.model, folder)
        self.causal = self.family != "bert" or bool(config.is_decoder)

    @property
    def positions(self) -> int | None:
        """The longest sample the model takes, None when it does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def run(self, batch: Batch, *, blocks: bool = False) -> Outputs:
        """Run a batch; gradients follow the surrounding mode."""
        seen: list[Tensor] = []
        with self._precision(), _kept(self.layers, seen) if blocks else _nothing(), memory_faults("training"):
            if self.causal:  # padding on the right is invisible, and no mask is the fast path
                logits = self.model(input_ids=batch.ids, use_cache=False).logits
                return Outputs(tuple(seen), logits[batch.predicts])
            out = self.base(input_ids=batch.ids, attention_mask=batch.mask)
        return Outputs(tuple(seen), None, out.last_hidden_state, getattr(out, "pooler_output", None))

    def _precision(self) -> Any:
        wanted = self.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)


@contextmanager
def _kept(layers: list[nn.Module], seen: list[Tensor]) -> Iterator[None]:
    """Collect what the blocks return: before the final norm, which the library's own list has applied to the last."""

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def device_of(name: str) -> torch.device:
    """Return the device a text names ("cpu", "cuda", "cuda:N", "auto"); of several GPUs the freest.

    Raises:
        EnvironmentFault: E515 there is no such GPU. UsageError: E230 not a device.
    """
    return Placement.of(name, 1).outer


def check_samples(samples: Sequence[TokenSample], runner: Runner) -> None:
    """Refuse samples that a model cannot be trained on.

    Raises:
        InputError: E385 none, or longer than the model takes; E387 without answer tokens; E383 foreign ids.
    """
    check_lengths(samples, runner.positions)
    if runner.causal:
        check_answers(samples)
    elif not samples:
        raise InputError("E385", "there are no samples to train on", help="give calibration text")
    rows = runner.model.config.vocab_size
    for sample in samples:
        if len(sample.ids) and not 0 <= int(sample.ids.min()) <= int(sample.ids.max()) < rows:
            raise InputError("E383", f"the sample at line {sample.line} has a token outside the vocabulary of {rows:,}",
                             where=Where(line=sample.line or None), help="the text was tokenized for another model")  # fmt: skip
