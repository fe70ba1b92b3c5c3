"""Experts, one after the other: what runs in place of the library's stacked multiplications.

The library lets a function be registered for all expert modules. This one goes through the experts
that tokens were routed to, takes each one's weights from the loaded stack or straight from the
checkpoint, and can show every expert's own inputs and outputs to an observer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from surgeon.calibrate.pieces import is_experts

NAME = "surgeon_experts"

Weights = Callable[[int, str], Tensor]
"""(expert, parameter name) -> that expert's slice of a stacked parameter."""

Watch = Callable[[int, str, Tensor, Tensor, Tensor, Tensor | None], None]
"""(expert, "gate_up" or "down", token rows, inputs, outputs, what the expert's output is multiplied by: None for 1)."""


class RoutingWatch(Protocol):
    """What an expert module reports to when somebody looks at routing (attribute ``surgeon_routing``)."""

    def output(self, expert: int, rows: Tensor, slots: Tensor, out: Tensor, top_k_index: Tensor) -> None:
        """Look at one expert's outputs [rows, hidden], before their weights."""
        ...

    def chosen(self, top_k_index: Tensor, top_k_weights: Tensor, total: Tensor) -> None:
        """Look at choices and weights [tokens, k] and the weighted sum [tokens, hidden], after all outputs."""
        ...


def install(model: Any) -> None:
    """Make a model's expert modules run through this module; models without experts stay as they are."""
    found = [module for module in model.modules() if is_experts(module)]
    if all(getattr(module, "surgeon_gates_input", False) for module in found):
        return  # none, or blocks that run them by themselves (see `input_gated`)
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)
    model.set_experts_implementation(NAME)


def stacked_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the stacked parameters of all expert modules inside ``root``, by name."""
    for path, module in root.named_modules():
        if is_experts(module):
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{name}" if path else name, parameter


def run_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the routed experts of tokens.

    Args:
        module: an expert module of the library.
        hidden: [tokens, hidden].
        top_k_index: the experts of each token [tokens, k].
        top_k_weights: their weights [tokens, k].

    Returns:
        The weighted sum of the experts' outputs [tokens, hidden].
    """
    deferred = getattr(module, "surgeon_deferred", None)
    routing: RoutingWatch | None = getattr(module, "surgeon_routing", None)
    if deferred is not None:
        total = deferred(hidden, top_k_index, top_k_weights)
    else:
        total = torch.zeros_like(hidden)
        for expert, rows, slots in routed(top_k_index, module.num_experts):
            scales = top_k_weights[rows, slots]
            inputs = entering(module, hidden[rows], scales)
            out = one_expert(
                module, expert, rows, inputs, lambda e, name: getattr(module, name)[e], scales=scales
            )
            if routing is not None:
                routing.output(expert, rows, slots, out, top_k_index)
            total.index_add_(0, rows, leaving(module, out, scales).to(total.dtype))
    if routing is not None:
        routing.chosen(top_k_index, top_k_weights, total)
    return total


def routed(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (expert, token rows, slots) for every expert that got tokens, in ascending order."""
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat[flat < experts], minlength=experts).tolist()
    k = top_k_index.shape[-1]
    start = 0
    for expert, count in enumerate(counts):
        if count:
            chosen = order[start : start + count]
            yield expert, chosen // k, chosen % k
        start += count


def entering(module: Any, inputs: Tensor, scales: Tensor) -> Tensor:
    """Return what enters an expert [tokens, hidden]; some families put the routing weight [tokens] there."""
    return inputs * scales[:, None] if getattr(module, "surgeon_gates_input", False) else inputs


def leaving(module: Any, outputs: Tensor, scales: Tensor) -> Tensor:
    """Return what an expert adds to the sum [tokens, hidden]: its outputs under their routing weights [tokens]."""
    return outputs if getattr(module, "surgeon_gates_input", False) else outputs * scales[:, None]


def weighted_expert(
    module: Any, expert: int, rows: Tensor, inputs: Tensor, scales: Tensor, weights: Weights
) -> Tensor:
    """Return what one expert adds to the sum [tokens, hidden] for its tokens' states."""
    return leaving(
        module,
        one_expert(module, expert, rows, entering(module, inputs, scales), weights, scales=scales),
        scales,
    )


def one_expert(
    module: Any, expert: int, rows: Tensor, inputs: Tensor, weights: Weights, *, scales: Tensor | None = None
) -> Tensor:
    """Return one expert's output [tokens, hidden] for its inputs, before the routing weight.

    ``scales`` [tokens] are the routing weights, for who watches; they change nothing.
    """
    watch: Watch | None = getattr(module, "surgeon_watch", None)
    gates = None if getattr(module, "surgeon_gates_input", False) else scales
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(module, expert, first, inputs, weights)
    if watch is not None:
        watch(expert, first, rows, inputs, inner, gates)
    gated = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = _linear(module, expert, "down_proj", gated, weights)
    if watch is not None:
        watch(expert, "down_proj", rows, gated, out, gates)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def _linear(module: Any, expert: int, name: str, inputs: Tensor, weights: Weights) -> Tensor:
    weight = weights(expert, name)
    rows = inputs.shape[0]
    if inputs.device.type == "cpu" and inputs.dtype in (torch.bfloat16, torch.float16):
        inputs = functional.pad(inputs, (0, 0, 0, usual_rows(rows) - rows))
    out = inputs @ weight if module.is_transposed else inputs @ weight.T
    out = out[:rows]
    return out + weights(expert, f"{name}_bias") if module.has_bias else out


def usual_rows(rows: int) -> int:
    """Round a number of rows up to one of four sizes between powers of two.

    The CPU library compiles and keeps a kernel of about a megabyte for every number of rows in 16 bits.
    Experts get a different number each time; in a layer of many that is more memory than its weights.
    """
    step = max(16, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step
