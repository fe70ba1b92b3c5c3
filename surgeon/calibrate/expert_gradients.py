"""Gradients of stacked experts, one expert at a time.

Autograd on a stacked parameter [experts, ...] makes a gradient of the whole stack for every expert
it indexes. Here the experts of a module are one differentiable function instead: its backward pass
recomputes each expert from its routed tokens and hands over that expert's gradients at once. Weights
come from the loaded stack, or straight from the checkpoint when a layer's experts are too many.

What is handed over is either the gradients of the weights, or, with frozen weights, the gated
activations and their gradients, or the inputs of every matrix and the gradients at its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.calibrate.experts import routed, stacked_parameters, weighted_expert
from surgeon.calibrate.pieces import Piece
from surgeon.calibrate.skeleton import Skeleton

Slices = Callable[[int], dict[str, Tensor]]
"""Expert -> its slice of every stacked parameter, by parameter name."""

Receive = Callable[[Piece, Tensor, Tensor], None]
"""(piece, weight, gradient)."""

ReceiveGated = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""(expert, token rows [T], gated activations [T, I], their gradients [T, I], down projection [hidden, I])."""


ReceiveOutputs = Callable[[int, str, Tensor, Tensor, Tensor], None]
"""(expert, parameter name, token rows [T], inputs of the matrix [T, in], gradients at its outputs [T, out])."""


class _Experts(torch.autograd.Function):
    """The weighted sum of routed experts' outputs [tokens, hidden], as a function of states and weights."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, index: Tensor, module: Any, run: Any) -> Tensor:
        ctx.save_for_backward(hidden, weights, index)
        ctx.module, ctx.run = module, run
        total = torch.zeros_like(hidden)
        for expert, rows, slots in routed(index, module.num_experts):
            slices = run.slices(expert)
            out = weighted_expert(
                module, expert, rows, hidden[rows], weights[rows, slots], lambda e, name, s=slices: s[name]
            )
            total.index_add_(0, rows, out.to(total.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (given,) = gradients
        hidden, weights, index = ctx.saved_tensors
        to_hidden, to_weights = torch.zeros_like(hidden), torch.zeros_like(weights)
        for expert, rows, slots in routed(index, ctx.module.num_experts):
            to_inputs, to_scales = ctx.run.reverse(
                ctx.module, expert, rows, hidden[rows], weights[rows, slots], given[rows]
            )
            to_hidden.index_add_(0, rows, to_inputs)
            to_weights[rows, slots] = to_scales
        return to_hidden, to_weights, None, None, None


class _Run:
    """Where one module's expert slices come from and where their gradients go."""

    def __init__(self, slices: Slices, pieces: Mapping[str, list[Piece]], receive: Receive) -> None:
        self.slices = slices
        self._receive = receive
        self._pieces: dict[tuple[str, int], list[Piece]] = {}
        for name, listed in pieces.items():
            for piece in listed:
                assert piece.expert is not None  # stacked parameters are always split by expert
                self._pieces.setdefault((name, piece.expert), []).append(piece)

    def reverse(
        self, module: Any, expert: int, rows: Tensor, hidden: Tensor, weights: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Deliver one expert's gradients; return those of its inputs and of its routing weights."""
        slices = {name: value.detach().requires_grad_() for name, value in self.slices(expert).items()}
        inputs, scales = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
        with torch.enable_grad():
            out = weighted_expert(module, expert, rows, inputs, scales, lambda e, name: slices[name])
            out = out.to(given.dtype)
        found = torch.autograd.grad(out, [inputs, scales, *slices.values()], given)
        for (name, weight), gradient in zip(slices.items(), found[2:], strict=True):
            for piece in self._pieces[name, expert]:
                inside = piece.index[1:]
                self._receive(piece, weight.detach()[inside], gradient[inside])
        return found[0], found[1]


class _GatedRun:
    """Where one module's expert slices come from and where its gated activations go."""

    def __init__(self, slices: Slices, receive: ReceiveGated) -> None:
        self.slices = slices
        self._receive = receive

    def reverse(
        self, module: Any, expert: int, rows: Tensor, hidden: Tensor, weights: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        return reverse_gated(module, expert, rows, hidden, weights, given, self.slices(expert), self._receive)


def reverse_gated(
    module: Any, expert: int, rows: Tensor, hidden: Tensor, weights: Tensor, given: Tensor,
    slices: Mapping[str, Tensor], receive: ReceiveGated,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Recompute one expert with frozen weights, hand over its gated activations and go back through it.

    Args:
        module: the expert module.
        expert, rows: its number, and the rows [T] of the tokens routed to it.
        hidden, weights: what it is given [T, hidden], and the routing weights [T].
        given: gradient of the sum of experts at those tokens [T, hidden].
        slices: its weights, by parameter name.
        receive: gets the activations before the down projection, and their gradients, which contain the
            routing weight.

    Returns:
        Gradients of ``hidden`` and ``weights``.
    """
    inputs, scales = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    gated: list[Tensor] = []

    def watch(
        number: int, name: str, where: Tensor, entering: Tensor, out: Tensor, gates: Tensor | None
    ) -> None:
        if name == "down_proj":
            gated.append(entering)

    module.surgeon_watch = watch
    try:
        with torch.enable_grad():
            out = weighted_expert(module, expert, rows, inputs, scales, lambda e, name: slices[name])
            out = out.to(given.dtype)
    finally:
        del module.surgeon_watch
    to_inputs, to_scales, to_gated = torch.autograd.grad(out, [inputs, scales, gated[0]], given)
    down = slices["down_proj"]
    receive(expert, rows, gated[0].detach(), to_gated, down.T if module.is_transposed else down)
    return to_inputs, to_scales


class _OutputsRun:
    """Where one module's expert slices come from and where the gradients at their outputs go."""

    def __init__(self, slices: Slices, receive: ReceiveOutputs) -> None:
        self.slices = slices
        self._receive = receive

    def reverse(
        self, module: Any, expert: int, rows: Tensor, hidden: Tensor, weights: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hand over what one expert's matrices are given and the gradients at their outputs, which contain the routing
        weight; return the gradients of its inputs and of its routing weights."""
        inputs, scales = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
        seen: list[tuple[str, Tensor, Tensor]] = []

        def watch(
            number: int, name: str, where: Tensor, entering: Tensor, out: Tensor, gates: Tensor | None
        ) -> None:
            seen.append((name, entering, out))

        slices = self.slices(expert)
        module.surgeon_watch = watch
        try:
            with torch.enable_grad():
                out = weighted_expert(module, expert, rows, inputs, scales, lambda e, name: slices[name])
                out = out.to(given.dtype)
        finally:
            del module.surgeon_watch
        found = torch.autograd.grad(out, [inputs, scales, *(left for _, _, left in seen)], given)
        for (name, entering, _), gradient in zip(seen, found[2:], strict=True):
            self._receive(expert, name, rows, entering.detach(), gradient)
        return found[0], found[1]


@contextmanager
def delivering_experts(skeleton: Skeleton, layer: int, module: nn.Module, receive: Receive) -> Iterator[None]:
    """Make the experts of a layer hand over their gradients during a backward pass.

    Args:
        skeleton, layer: where the layer belongs.
        module: the layer with its weights, or without those of its experts, which are then read one by one.
        receive: gets every piece once per backward pass; experts without tokens are left out.
    """
    found: Any = skeleton.expert_module(layer)
    if found is None:
        yield
        return
    stacked = dict(stacked_parameters(module))
    pieces = {
        name.rpartition(".")[2]: listed for name, listed in skeleton.pieces(layer).items() if name in stacked
    }
    with _running(found, _Run(_slices(skeleton, layer, module), pieces, receive)):
        yield


@contextmanager
def delivering_gated(
    skeleton: Skeleton, layer: int, module: nn.Module, receive: ReceiveGated
) -> Iterator[None]:
    """Make the experts of a layer hand over gated activations and their gradients during a backward pass.

    Args:
        skeleton, layer, module: as for `delivering_experts`.
        receive: called once per backward pass for every expert that got tokens.
    """
    found: Any = skeleton.expert_module(layer)
    if found is None:
        yield
        return
    with _running(found, _GatedRun(_slices(skeleton, layer, module), receive)):
        yield


@contextmanager
def delivering_outputs(
    skeleton: Skeleton, layer: int, module: nn.Module, receive: ReceiveOutputs
) -> Iterator[None]:
    """Make the experts of a layer hand over the inputs of their matrices and the gradients at their outputs.

    Args:
        skeleton, layer, module: as for `delivering_experts`.
        receive: called for both matrices of every expert that got tokens, once per backward pass.
    """
    found: Any = skeleton.expert_module(layer)
    if found is None:
        yield
        return
    with _running(found, _OutputsRun(_slices(skeleton, layer, module), receive)):
        yield


def _slices(skeleton: Skeleton, layer: int, module: nn.Module) -> Slices:
    """Return what gives an expert's weights: the loaded stack, or the checkpoint where it is not loaded."""
    stacked = {name.rpartition(".")[2]: value for name, value in stacked_parameters(module)}

    def loaded(expert: int) -> dict[str, Tensor]:
        return {name: value.detach()[expert] for name, value in stacked.items()}

    def read(expert: int) -> dict[str, Tensor]:
        return skeleton.read_expert(layer, expert)

    return read if any(value.is_meta for value in stacked.values()) else loaded


@contextmanager
def _running(module: Any, run: _Run | _GatedRun | _OutputsRun) -> Iterator[None]:
    module.surgeon_deferred = lambda hidden, index, weights: _Experts.apply(
        hidden, weights, index, module, run
    )
    try:
        yield
    finally:
        del module.surgeon_deferred
