"""Llama 4's experts, made to run like everybody's.

Its block scales a token's states before they enter an expert, gives every expert all tokens (zeros where
it was not chosen), and adds up. Expert(0) is 0, so only chosen tokens count: here the block routes them to
`surgeon.calibrate.experts.run_experts` instead, with the router's own scores as weights, which enter before the
expert. What an expert gets and gives is then seen, streamed and differentiated as in any other family.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from surgeon.calibrate.experts import run_experts

BLOCK = "Llama4TextMoe"
"""Name of the class of such blocks in the library."""


def adapt(model: Any) -> None:
    """Change the blocks of a model whose experts scale their inputs; other models stay as they are."""
    for block in model.modules():
        if type(block).__name__ == BLOCK:
            _describe(block.experts)
            block.forward = types.MethodType(_forward, block)


def _describe(experts: Any) -> None:
    """Say of an expert module what the library says of those it can run through a registered function."""
    experts.has_gate = True
    experts.has_bias = False
    experts.has_post_expert_norm = False
    experts.is_transposed = True  # [experts, in, out]
    experts.is_concatenated = True
    experts.surgeon_gates_input = True
    experts._apply_gate = types.MethodType(_apply_gate, experts)


def _apply_gate(experts: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * experts.act_fn(gate)


def _forward(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the block's output [tokens, hidden] and its router's logits [tokens, experts]."""
    hidden = hidden_states.reshape(-1, block.hidden_dim)
    scores, logits = block.router(hidden)
    index = torch.topk(logits, block.top_k, dim=1).indices
    total = run_experts(block.experts, hidden, index, scores.gather(1, index))
    return block.shared_expert(hidden) + total, logits
