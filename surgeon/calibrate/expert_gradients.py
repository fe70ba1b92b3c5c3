"""Gradients of stacked experts, one expert at a time.

Autograd on a stacked parameter [experts, ...] makes a gradient of the whole stack for every expert
it indexes. Here the experts of a module are one differentiable function instead: its backward pass
recomputes each expert from its routed tokens and hands over that expert's gradients at once. Weights
come from the loaded stack, or straight from the checkpoint when a layer's experts are too many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.calibrate.experts import one_expert, routed, stacked_parameters
from surgeon.calibrate.pieces import Piece
from surgeon.calibrate.skeleton import Skeleton

Slices = Callable[[int], dict[str, Tensor]]
"""Expert -> its slice of every stacked parameter, by parameter name."""

Receive = Callable[[Piece, Tensor, Tensor], None]
"""(piece, weight, gradient)."""


class _Experts(torch.autograd.Function):
    """The weighted sum of routed experts' outputs [tokens, hidden], as a function of states and weights."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, index: Tensor, module: Any, run: Any) -> Tensor:
        ctx.save_for_backward(hidden, weights, index)
        ctx.module, ctx.run = module, run
        total = torch.zeros_like(hidden)
        for expert, rows, slots in routed(index, module.num_experts):
            slices = run.slices(expert)
            out = one_expert(module, expert, rows, hidden[rows], lambda e, name, s=slices: s[name])
            total.index_add_(0, rows, (out * weights[rows, slots, None]).to(total.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (given,) = gradients
        hidden, weights, index = ctx.saved_tensors
        to_hidden, to_weights = torch.zeros_like(hidden), torch.zeros_like(weights)
        for expert, rows, slots in routed(index, ctx.module.num_experts):
            slices = {name: value.detach().requires_grad_() for name, value in ctx.run.slices(expert).items()}
            inputs = hidden[rows].detach().requires_grad_()
            scales = weights[rows, slots].detach().requires_grad_()
            with torch.enable_grad():
                out = one_expert(ctx.module, expert, rows, inputs, lambda e, name, s=slices: s[name])
                out = (out * scales[:, None]).to(given.dtype)
            found = torch.autograd.grad(out, [inputs, scales, *slices.values()], given[rows])
            to_hidden.index_add_(0, rows, found[0])
            to_weights[rows, slots] = found[1]
            ctx.run.deliver(
                expert, dict(zip(slices, zip(slices.values(), found[2:], strict=True), strict=True))
            )
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

    def deliver(self, expert: int, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (weight, gradient) in found.items():
            for piece in self._pieces[name, expert]:
                inside = piece.index[1:]
                self._receive(piece, weight.detach()[inside], gradient[inside])


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
    stacked = {name.rpartition(".")[2]: value for name, value in stacked_parameters(module)}
    pieces = {
        name.rpartition(".")[2]: listed
        for name, listed in skeleton.pieces(layer).items()
        if name in dict(stacked_parameters(module))
    }

    def loaded(expert: int) -> dict[str, Tensor]:
        return {name: value.detach()[expert] for name, value in stacked.items()}

    def read(expert: int) -> dict[str, Tensor]:
        return skeleton.read_expert(layer, expert)

    held = not any(value.is_meta for value in stacked.values())
    run = _Run(loaded if held else read, pieces, receive)
    found.surgeon_deferred = lambda hidden, index, weights: _Experts.apply(hidden, weights, index, found, run)
    try:
        yield
    finally:
        del found.surgeon_deferred
