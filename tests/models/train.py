"""Train the base, long and short test models: ``python tests/models/train.py``.

The base is trained from scratch on answers of mixed verbosity; long and short
are fine-tuned from the *saved* bf16 base, so their differences to it are true
task vectors.  Everything is seeded and runs on one CPU thread.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import task

HERE = Path(__file__).parent
IGNORED = -100


@dataclass(frozen=True)
class Stage:
    """How one of the models is trained."""

    start: str | None
    tokens: int
    rate: float
    seed: int


STAGES = {
    "base": Stage(None, 7_500_000, 3e-3, 1),
    "long": Stage("base", 400_000, 5e-4, 2),
    "short": Stage("base", 400_000, 5e-4, 3),
}


def build_model(tokenizer) -> Qwen2ForCausalLM:
    """A fresh model of about 1.2 million parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def batches(
    tokenizer, style: float, seed: int, tokens_per_batch: int = 8192, pool: int = 1024
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless right-padded batches of input ids and labels, grouped by length."""
    rng = random.Random(seed)
    stream = task.questions("train", seed)
    while True:
        chosen = list(itertools.islice(stream, pool))
        asks = tokenizer([task.prompt(tokenizer, q) for q in chosen]).input_ids
        replies = tokenizer([task.solve(q, style, rng) for q in chosen]).input_ids
        rows = [(ask, [*reply, tokenizer.eos_token_id]) for ask, reply in zip(asks, replies, strict=True)]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        groups, group = [], []
        for row in rows:
            if group and (len(group) + 1) * (len(row[0]) + len(row[1])) > tokens_per_batch:
                groups.append(group)
                group = []
            group.append(row)
        rng.shuffle(groups)
        for group in groups:
            width = len(group[-1][0]) + len(group[-1][1])
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            labels = torch.full((len(group), width), IGNORED)
            for row, (ask, reply) in enumerate(group):
                end = len(ask) + len(reply)
                ids[row, :end] = torch.tensor(ask + reply)
                labels[row, len(ask) : end] = torch.tensor(reply)
            yield ids, labels


def build_optimizer(model: Qwen2ForCausalLM, fresh: bool, rate: float) -> list:
    """Muon for the hidden matrices of a fresh model and AdamW for all else."""
    hidden = [p for n, p in model.named_parameters() if fresh and p.ndim == 2 and "layers" in n]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(rest, rate, betas=(0.9, 0.98), weight_decay=0.0)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def fit(model: Qwen2ForCausalLM, tokenizer, style: float, stage: Stage, log=None) -> None:
    """Train in place until the token budget is used up, with a linear decay."""
    optimizers = build_optimizer(model, stage.start is None, stage.rate)
    seen, started = 0, time.time()
    for step, (ids, labels) in enumerate(batches(tokenizer, style, stage.seed), 1):
        scale = min(1.0, step / 50) * max(0.02, 1 - seen / stage.tokens)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += ids.numel()
        if log and step % 20 == 0:
            log(f"step {step} tokens {seen} loss {loss.item():.4f} {time.time() - started:.0f}s")
        if seen >= stage.tokens:
            return


def save(model: Qwen2ForCausalLM, tokenizer, name: str, folder: Path) -> None:
    """Write a complete hub-style bf16 folder; the long model in two shards."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder, max_shard_size="1300KB" if name == "long" else "1GB")
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(task.model_card(name), encoding="utf-8")


def train(name: str, root: Path, tokens: int | None = None, log=None) -> Path:
    """Train and save one of the three models; returns its folder."""
    stage = STAGES[name]
    if tokens:
        stage = Stage(stage.start, tokens, stage.rate, stage.seed)
    torch.set_num_threads(1)
    torch.manual_seed(stage.seed)
    tokenizer = task.build_tokenizer()
    if stage.start is None:
        model = build_model(tokenizer)
    else:
        model = Qwen2ForCausalLM.from_pretrained(root / stage.start, dtype=torch.float32)
    fit(model, tokenizer, task.STYLES[name], stage, log)
    save(model, tokenizer, name, root / name)
    return root / name


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(STAGES), help="base, long, short")
    parser.add_argument("--root", type=Path, default=HERE, help="where the folders go")
    parser.add_argument("--tokens", type=int, help="override the token budget")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    for name in arguments.names:
        started = time.time()
        folder = train(name, arguments.root, arguments.tokens, lambda line: print(line, flush=True))
        print(f"{folder}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
