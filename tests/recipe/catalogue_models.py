"""What tests of the shipped recipes run on: the trained dense pair, a mixture trained in seconds, and texts of their task."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MODELS = TESTS / "models"
sys.path.insert(0, str(MODELS))

import task  # noqa: E402

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
STYLES = {"plain": -4.0, "worked": 4.0}
"""Two domains of the task: answers at once, and answers worked out column by column."""


def exchanges(path: Path, records: int, style: float = 4.0, *, split: str = "train", seed: int = 0) -> Path:
    """Write questions with an answer in a style."""
    drawn = random.Random(seed)
    with open(path, "w") as stream:
        for question in itertools.islice(task.questions(split, seed), records):
            answer = task.solve(question, style, drawn)
            stream.write(json.dumps({"prompt": question.text, "response": answer}) + "\n")
    return path


def questions(path: Path, records: int) -> Path:
    """Write held-out questions with the answer to compare with."""
    with open(path, "w") as stream:
        for question in itertools.islice(task.questions("test", 0, (3, 3)), records):
            stream.write(json.dumps({"prompt": question.text, "answer": str(question.answer)}) + "\n")
    return path


SMALL = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


def mixture(folder: Path, steps: int = 80) -> Path:
    """Write a small Qwen3-MoE: 3 layers, 8 experts of 64 channels, 2 of them for a token."""
    import transformers

    return _written(folder, steps, transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=3, intermediate_size=64, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, vocab_size=281, output_router_logits=True, router_aux_loss_coef=0.01, **SMALL,
    ))  # fmt: skip


def even(folder: Path, steps: int = 60) -> Path:
    """Write a small Qwen3 whose widths fill the blocks of GGUF and bitsandbytes, as the trained pair's do not."""
    import transformers

    return _written(folder, steps, transformers.Qwen3ForCausalLM, transformers.Qwen3Config(
        hidden_size=128, num_hidden_layers=2, intermediate_size=256, vocab_size=281, **SMALL,
    ))  # fmt: skip


def _written(folder: Path, steps: int, kind, config) -> Path:
    import torch

    torch.manual_seed(0)
    model = kind(config).train()
    _train(model, steps)
    model.config.output_router_logits = False
    model.eval().to(torch.bfloat16).save_pretrained(folder, save_original_format=True)
    for name in TOKENIZER:
        shutil.copy(MODELS / "long" / name, folder)
    return folder


def _train(model, steps: int) -> None:
    """Train on both domains, until answers are clearly better than chance."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / "long")
    drawn, asked = random.Random(0), task.questions("train", 7, (3, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = []
        for question in itertools.islice(asked, 8):
            text = task.solve(question, drawn.choice(tuple(STYLES.values())), drawn)
            rows.append(tokenizer(task.prompt(tokenizer, question) + text).input_ids[:96])
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = ids.masked_fill(ids == 0, -100)
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
