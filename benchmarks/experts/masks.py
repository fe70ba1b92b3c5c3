"""A stock Qwen3-MoE in memory whose experts and channels are switched off in place.

A dropped expert's router logit is minus infinity, and a dropped channel's column of the down projection and rows of the
gate and up projections are zero: the definition of what a pruned checkpoint must compute, without any of
surgeon's code. One model in memory serves every choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import Qwen3MoeForCausalLM

Kept = Mapping[int, tuple[int, ...]]
Channels = Mapping[tuple[int, int], tuple[int, ...]]


class Masked:
    """The model of a folder, to be evaluated under choices.

    Attributes:
        layers: numbers of its layers with experts.
        experts, per_token, width: experts of a layer, experts a token is given to, channels of an expert.
    """

    def __init__(self, folder: Path) -> None:
        self.model = Qwen3MoeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        self.model.requires_grad_(False)
        config = self.model.config
        self.layers = tuple(range(config.num_hidden_layers))
        self.experts, self.per_token, self.width = (
            config.num_experts,
            config.num_experts_per_tok,
            config.moe_intermediate_size,
        )
        self._dropped: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            self._block(layer).gate.register_forward_hook(self._hook(layer))

    def _block(self, layer: int):
        return self.model.model.layers[layer].mlp

    def _hook(self, layer: int):
        def route(module, inputs, output):
            dropped = self._dropped.get(layer)
            if dropped is None:
                return None
            logits = output[0].masked_fill(dropped, -torch.inf)
            weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(module.top_k, dim=-1)
            if module.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(logits.dtype), chosen

        return route

    @contextmanager
    def only(self, kept: Kept | None = None, channels: Channels | None = None) -> Iterator[None]:
        """Switch everything else off. A layer that ``kept`` lacks keeps all experts, an expert that ``channels`` lacks all channels."""
        before = {}
        try:
            for layer, ids in (kept or {}).items():
                dropped = torch.ones(self.experts, dtype=torch.bool)
                dropped[list(ids)] = False
                self._dropped[layer] = dropped
            for (layer, expert), ids in (channels or {}).items():
                weights = self._block(layer).experts
                if layer not in before:
                    before[layer] = (weights.gate_up_proj.clone(), weights.down_proj.clone())
                gone = torch.ones(self.width, dtype=torch.bool)
                gone[list(ids)] = False
                weights.down_proj[expert][:, gone] = 0
                weights.gate_up_proj[expert][gone.repeat(2)] = 0
            yield
        finally:
            self._dropped.clear()
            for layer, (gate_up, down) in before.items():
                self._block(layer).experts.gate_up_proj.copy_(gate_up)
                self._block(layer).experts.down_proj.copy_(down)

    def losses(self, held_out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every block's mean loss, nats per token, by domain."""
        return losses(self.model, held_out)


@torch.inference_mode()
def losses(
    model: torch.nn.Module, held_out: Mapping[str, np.ndarray], batch: int = 32
) -> dict[str, np.ndarray]:
    """Return the mean loss of every block, nats per token: domain -> float64 [blocks]."""
    found = {}
    for domain, rows in held_out.items():
        each = []
        for start in range(0, len(rows), batch):
            ids = torch.from_numpy(rows[start : start + batch].astype(np.int64))
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            each.append(
                functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
                .double()
                .mean(1)
            )
        found[domain] = torch.cat(each).numpy()
    return found
