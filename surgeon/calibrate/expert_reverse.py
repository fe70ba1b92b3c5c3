"""The way back through one layer whose experts are read one at a time.

For a group of batches: every batch runs up to the experts; one expert after the other is read and adds its
share; every batch goes back from the layer's output to the sum of experts; one expert after the other is read
again, hands over its gated activations with their gradients and goes back to its inputs; every batch goes back
from there to the layer's input. Each expert is read twice a group, everything but experts is computed three
times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from surgeon.calibrate.expert_gradients import reverse_gated
from surgeon.calibrate.experts import routed, weighted_expert
from surgeon.calibrate.skeleton import Call, Skeleton
from surgeon.calibrate.streaming import ExpertStream
from surgeon.calibrate.watching import Watching

Deliver = Callable[[int, int, Tensor, Tensor, Tensor, Tensor], None]
"""(batch, expert, token rows [T], gated activations [T, I], their gradients [T, I], down projection [hidden, I])."""

Share = Mapping[int, tuple[Tensor, Tensor]]
"""Expert -> (token rows, slots) of one batch."""


class Unwatched:
    """An observer that wants nothing."""

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing is observed here")


class ReversedExperts(ExpertStream):
    """Goes back through one layer of experts for groups of batches, reading expert by expert."""

    def __init__(self, skeleton: Skeleton, layer: int) -> None:
        super().__init__(skeleton, layer, Watching(Unwatched()))

    def back(
        self,
        inputs: Mapping[int, Tensor],
        towards: Mapping[int, Tensor],
        calls: Mapping[int, Call],
        deliver: Deliver,
        check: Callable[[], None],
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (batch number, gradient of the layer's input) for a group of batches.

        Args:
            inputs, towards: by batch, the layer's input and the gradient of its output.
            calls: by batch, what the layer is called with.
            deliver: gets gated activations and their gradients.
            check: raises when the pass is to end.
        """
        arrived = {number: self._arrive(states, calls[number]) for number, states in inputs.items()}
        shares: dict[int, Share] = {
            number: {expert: (rows, slots) for expert, rows, slots in routed(index, self._module.num_experts)}
            for number, (_, index, _) in arrived.items()
        }
        given = {number: (hidden, scale) for number, (hidden, _, scale) in arrived.items()}
        del arrived
        sums = self._sums(given, shares, check)
        direct: dict[int, Tensor] = {}
        to_sum: dict[int, Tensor] = {}
        for number, states in inputs.items():
            check()
            direct[number], to_sum[number] = self._to_sum(
                states, sums.pop(number), calls[number], towards[number]
            )
        found = self._through_experts(given, shares, to_sum, deliver, check)
        for number, states in inputs.items():
            check()
            leaf = states.detach().requires_grad_()
            with torch.enable_grad():
                hidden, _, scale = self._arrive(leaf, calls[number])
            (through,) = torch.autograd.grad([hidden, scale], leaf, found.pop(number))
            yield number, direct.pop(number) + through

    def _sums(
        self,
        given: Mapping[int, tuple[Tensor, Tensor]],
        shares: Mapping[int, Share],
        check: Callable[[], None],
    ) -> dict[int, Tensor]:
        """Return the weighted sum of experts of every batch."""
        sums = {number: torch.zeros_like(hidden) for number, (hidden, _) in given.items()}
        for expert, weights in self._experts(
            sorted({expert for share in shares.values() for expert in share})
        ):
            check()
            for number, share in shares.items():
                if expert not in share:
                    continue
                rows, slots = share[expert]
                hidden, scale = given[number]
                out = weighted_expert(
                    self._module, expert, rows, hidden[rows], scale[rows, slots], lambda _, name, w=weights: w[name]
                )  # fmt: skip
                sums[number].index_add_(0, rows, out.to(hidden.dtype))
        return sums

    def _to_sum(self, states: Tensor, total: Tensor, call: Call, towards: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the layer's input, experts left out, and of the sum of experts."""
        leaf, total = states.detach().requires_grad_(), total.detach().requires_grad_()
        self._module.surgeon_deferred = lambda hidden, index, scale: total
        try:
            with torch.enable_grad():
                out = self._skeleton.call(self._layer, leaf, call)
        finally:
            del self._module.surgeon_deferred
        to_input, to_total = torch.autograd.grad(out, [leaf, total], towards.to(out.device))
        return to_input, to_total

    def _through_experts(
        self,
        given: Mapping[int, tuple[Tensor, Tensor]],
        shares: Mapping[int, Share],
        to_sum: Mapping[int, Tensor],
        deliver: Deliver,
        check: Callable[[], None],
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Return, by batch, the gradients of what the experts are given and of the routing weights."""
        found = {
            n: (torch.zeros_like(hidden), torch.zeros_like(scale)) for n, (hidden, scale) in given.items()
        }
        for expert, weights in self._experts(
            sorted({expert for share in shares.values() for expert in share})
        ):
            check()
            for number, share in shares.items():
                if expert not in share:
                    continue
                rows, slots = share[expert]
                hidden, scale = given[number]

                def receive(
                    e: int, r: Tensor, a: Tensor, gradient: Tensor, down: Tensor, batch: int = number
                ) -> None:
                    deliver(batch, e, r, a, gradient, down)

                to_inputs, to_scales = reverse_gated(
                    self._module, expert, rows, hidden[rows], scale[rows, slots], to_sum[number][rows], weights, receive
                )  # fmt: skip
                found[number][0].index_add_(0, rows, to_inputs)
                found[number][1][rows, slots] = to_scales
        return found
