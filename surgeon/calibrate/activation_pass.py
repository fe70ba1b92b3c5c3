"""The pass behind `surgeon.calibrate.activation_gradients`: what experts hand over on the way back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from surgeon.calibrate.activations import Activations
from surgeon.calibrate.answers import TokenSample
from surgeon.calibrate.expert_gradients import delivering_gated
from surgeon.calibrate.expert_reverse import ReversedExperts
from surgeon.calibrate.forward_and_back import ForwardAndBack, Progress, Receiver
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.watching import finite
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Where


@dataclass(frozen=True)
class Gated:
    """One batch's tokens in one expert, without padding.

    Attributes:
        layer, expert: which; the layer by its number in the model.
        activations: a [T, I], at least float32.
        gradients: dL/da [T, I], at least float32.
        down: the down projection [hidden, I] in the compute precision.
    """

    layer: int
    expert: int
    activations: Tensor
    gradients: Tensor
    down: Tensor


class ActivationReceiver(Receiver, Protocol):
    """What takes activations and gradients."""

    def gated(self, found: Gated) -> None:
        """Take what is only valid during the call. Layers come from last to first; experts without tokens never."""
        ...


class Pass(ForwardAndBack):
    """The pass that looks at the gated activations of experts; the way back ends at the first layer with experts."""

    name = "activation gradients"

    def __init__(
        self, checkpoint: Checkpoint, samples: Sequence[TokenSample], receiver: ActivationReceiver, settings: Settings,
        progress: Progress | None, stop: threading.Event | None,
    ) -> None:  # fmt: skip
        super().__init__(checkpoint, samples, receiver, settings, progress, stop)
        self._receiver = receiver

    def _first(self) -> int:
        skeleton = self.skeleton
        for layer in range(self.layers):
            if skeleton.expert_module(layer) is not None:
                return layer
        label = skeleton.checkpoint.label
        raise InputError("E435", f"{label} has no experts whose activations can be measured", where=Where(label),
                         help="they must be stored as plain numbers, in a family that is known here")  # fmt: skip

    def _back(
        self, layer: int, module: nn.Module, inputs: Activations, towards: Activations
    ) -> Iterator[tuple[int, Tensor]]:
        back = self._streamed if self.memory.streams(layer) else self._whole
        return back(layer, module, inputs, towards)

    def _whole(
        self, layer: int, module: nn.Module, inputs: Activations, towards: Activations
    ) -> Iterator[tuple[int, Tensor]]:
        for number, batch in enumerate(self.batches):
            self._check_stop()
            leaf = inputs.get(number).detach().requires_grad_()
            receive = self._receiver_of(layer, number)
            with delivering_gated(self.skeleton, layer, module, receive):
                with torch.enable_grad():
                    out = self.skeleton.call(layer, leaf, self._call(layer, batch))
                (gradient,) = torch.autograd.grad(out, leaf, towards.get(number).to(out.device))
            yield number, gradient

    def _streamed(
        self, layer: int, module: nn.Module, inputs: Activations, towards: Activations
    ) -> Iterator[tuple[int, Tensor]]:
        job = ReversedExperts(self.skeleton, layer)
        for group in self.memory.groups(self.batches):
            yield from job.back(
                {number: inputs.get(number) for number in group},
                {number: towards.get(number) for number in group},
                {number: self._call(layer, self.batches[number]) for number in group},
                lambda number, *found: self._receiver_of(layer, number)(*found),
                self._check_stop,
            )

    def _receiver_of(self, layer: int, number: int) -> Callable[[int, Tensor, Tensor, Tensor, Tensor], None]:
        """Return what takes the tokens of a batch in one expert: padding goes, the scale is undone."""
        batch, exponent = self.batches[number], int(self._state.exponents[number])
        real = batch.mask().reshape(-1) if batch.padded else None

        def receive(expert: int, rows: Tensor, activations: Tensor, gradients: Tensor, down: Tensor) -> None:
            if real is not None:
                keep = real.to(rows.device)[rows]
                activations, gradients = activations[keep], gradients[keep]
            if not len(activations):
                return
            for value, what in ((activations, "activations"), (gradients, "gradients")):
                if not finite(value):
                    raise InputError(
                        "E434", f"the {what} of expert {expert} in layer {layer} are not finite",
                        where=Where(self.skeleton.checkpoint.label),
                        help="its weights may be damaged, or the precision too low; try bfloat16 or float32",
                    )  # fmt: skip
            wide = torch.promote_types(activations.dtype, torch.float32)
            unscaled = gradients.to(wide) * 2.0**-exponent
            self._receiver.gated(Gated(layer, expert, activations.to(wide), unscaled, down))

        return receive
