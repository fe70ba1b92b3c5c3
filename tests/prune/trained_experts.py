"""A tiny mixture of experts trained for a few seconds on a text with rules, so that its channels differ in worth."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

VOCABULARY, LENGTH, WIDTH = 64, 32, 12


ANSWER = LENGTH // 2
"""Where the second half starts, whose tokens are others: what a loss over the answers counts."""


def text(count: int, seed: int) -> np.ndarray:
    """Return sequences [count, LENGTH]: two second-order Markov chains, each over half of the vocabulary."""
    rules = np.random.default_rng(0)
    half = (VOCABULARY - 4) // 2
    followers = rules.integers(0, half, (2, half, 4, 4))
    chance = rules.dirichlet(np.ones(4) * 0.4, (2, half, 4))
    drawn = np.random.default_rng(seed)
    out = drawn.integers(0, half, (count, LENGTH))
    for place in range(LENGTH):
        if place % ANSWER < 2:
            continue
        now, before, part = out[:, place - 1], out[:, place - 2] % 4, place // ANSWER
        step = (drawn.random(count)[:, None] > chance[part, now, before].cumsum(1)).sum(1).clip(max=3)
        out[:, place] = followers[part, now, before, step]
    out[:, ANSWER:] += half
    return out + 4


@functools.cache
def _keep() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="surgeon-trained-experts-")


@functools.cache
def trained_folder(steps: int = 300) -> Path:
    """Return a folder with a trained model: 2 layers, 8 experts, top-2, hidden size 48, experts of 12 channels."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12, intermediate_size=48,
        moe_intermediate_size=WIDTH, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, vocab_size=VOCABULARY,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-2, total_steps=steps)
    data = torch.from_numpy(text(32 * 64, 1))
    for step in range(steps):
        batch = data[(step * 32) % len(data) :][:32]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.config.output_router_logits = False
    folder = Path(_keep().name, str(steps))
    model.eval().save_pretrained(folder, save_original_format=True)
    return folder
