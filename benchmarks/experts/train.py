"""Train the small mixture of experts that the expert benchmarks cut: ``python benchmarks/experts/train.py OUT``.

A stock Qwen3-MoE on four domains (see ``domains.py``): code, headers, prose, mathematics. Every batch has as many
blocks of each. A light load-balancing loss keeps experts alive and leaves routing free to specialise; how far it
did is measured on held-out text and recorded. Everything follows from the versions of Python and torch, the
options and the seed. One core, about twenty minutes for the default.

What is written to OUT, anew at every checkpoint so that a shorter training is usable:

- a stock transformers folder with its tokenizer;
- ``held_out.npz``: per domain int32 [blocks, context], of documents the model never saw;
- ``calibration.jsonl``: records with ``text`` and ``domain``, of other documents the model never saw;
- ``training.json``: the recipe, digests, losses (nats per token) and what routing looks like.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from domains import DOMAINS, documents, part_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END = "<|end|>"


@dataclass(frozen=True)
class Recipe:
    """Shape of the model and how it is trained; one step sees ``batch`` blocks of every domain."""

    vocabulary: int = 1536
    context: int = 128
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    per_token: int = 4
    width: int = 64
    balance: float = 0.01
    steps: int = 3600
    batch: int = 4
    rate: float = 3e-3
    warm_up: int = 100
    decay: float = 0.1
    seed: int = 0
    held_out_blocks: int = 128
    calibration_records: int = 256
    every: int = 600


def texts_of(recipe: Recipe) -> tuple[dict[str, dict[str, list[str]]], dict]:
    """Return the texts as part -> domain -> texts, and what is recorded about them."""
    found: dict[str, dict[str, list[str]]] = {part: {name: [] for name in DOMAINS} for part in ("train", "calibration", "held_out")}  # fmt: skip
    digest = hashlib.sha256()
    for domain in DOMAINS:
        for name, text in documents(domain):
            found[part_of(domain, name)][domain].append(text)
            digest.update(f"{domain}\0{name}\0{hashlib.sha256(text.encode()).hexdigest()}\n".encode())
    counts = {part: {name: {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
                     for name, texts in by.items()} for part, by in found.items()}  # fmt: skip
    return found, {"python": platform.python_version(), "parts": counts, "sha256": digest.hexdigest()}


def train_tokenizer(texts: dict[str, list[str]], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE of so many tokens, made from equally much of every domain; token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    share = min(sum(map(len, texts[domain])) for domain in DOMAINS)
    portions = []
    for domain in DOMAINS:
        left = share
        for text in texts[domain]:
            portions.append(text[:left])
            left -= len(portions[-1])
            if left <= 0:
                break
    tokenizer.train_from_iterator(portions, trainer)
    return tokenizer


def blocks(texts: list[str], tokenizer: Tokenizer, context: int) -> np.ndarray:
    """Return int32 [blocks, context]: the texts, each ended by token 0, one behind the other."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    stream = np.concatenate([np.asarray([*one.ids, 0], dtype=np.int32) for one in encoded])
    count = len(stream) // context
    return stream[: count * context].reshape(count, context)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Return so many rows, evenly from everywhere."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def build(recipe: Recipe) -> Qwen3MoeForCausalLM:
    """Return the untrained model; equal recipes give equal weights."""
    torch.manual_seed(recipe.seed)
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocabulary, hidden_size=recipe.hidden, intermediate_size=recipe.width * recipe.per_token,
        moe_intermediate_size=recipe.width, num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads, head_dim=recipe.head_dim, num_experts=recipe.experts,
        num_experts_per_tok=recipe.per_token, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        max_position_embeddings=4 * recipe.context, tie_word_embeddings=True, router_aux_loss_coef=recipe.balance,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


@torch.inference_mode()
def loss_of(model: torch.nn.Module, rows: np.ndarray) -> float:
    """Return the mean negative log-likelihood of all tokens but each block's first, nats."""
    total = 0.0
    for part in np.array_split(rows, math.ceil(len(rows) / 16)):
        ids = torch.from_numpy(part.astype(np.int64))
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / (rows.shape[0] * (rows.shape[1] - 1))


@torch.inference_mode()
def loads(model: Qwen3MoeForCausalLM, held_out: dict[str, np.ndarray]) -> np.ndarray:
    """Return how often every expert is chosen, as a share of all choices: [domains, layers, experts]."""
    config = model.config
    found = np.zeros((len(held_out), config.num_hidden_layers, config.num_experts))
    for row, blocks_ in enumerate(held_out.values()):
        for part in np.array_split(blocks_, math.ceil(len(blocks_) / 16)):
            ids = torch.from_numpy(part.astype(np.int64))
            for layer, logits in enumerate(model(input_ids=ids, output_router_logits=True).router_logits):
                chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices
                found[row, layer] += torch.bincount(chosen.flatten(), minlength=config.num_experts).numpy()
    return found / found.sum(-1, keepdims=True)


def specialisation(share: np.ndarray) -> dict:
    """Say how far routing depends on the domain.

    An expert's domain distribution is its load in every domain over the sum of these (equally many tokens of each).
    ``specialised`` is the share of experts whose distribution is at least 0.25 in total variation from uniform (of
    four domains: one domain has half or more), ``one domain`` of those with three quarters in one domain, and
    ``unused`` of those with less than a tenth of an even load. ``distance`` is the mean total-variation distance
    between two domains' loads, per layer.
    """
    domains, layers, experts = share.shape
    total = share.sum(0)
    distribution = share / np.maximum(total, 1e-12)
    far = 0.5 * np.abs(distribution - 1 / domains).sum(0)
    used = total >= 0.1 * domains / experts
    pairs = [(a, b) for a in range(domains) for b in range(a)]
    apart = [float(np.mean([0.5 * np.abs(share[a, layer] - share[b, layer]).sum() for a, b in pairs])) for layer in range(layers)]  # fmt: skip
    return {
        "experts": layers * experts,
        "specialised": float((used & (far >= 0.25)).mean()),
        "one domain": float((used & (distribution.max(0) >= 0.75)).mean()),
        "unused": float((~used).mean()),
        "distance": apart,
    }


def imbalance(router_logits: tuple[torch.Tensor, ...], per_token: int) -> torch.Tensor:
    """Return the mean over layers of E sum_i (share of choices of i) (mean probability of i); 1 is an even load.

    The load-balancing loss of Switch Transformers (arXiv 2101.03961, section 2.2), a layer at a time: the one that
    transformers computes pools equal expert numbers of all layers, which lets half of a layer's experts die.
    """
    found = []
    for logits in router_logits:
        chosen = logits.topk(per_token, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=logits.shape[-1]) / len(chosen)
        found.append(logits.shape[-1] * (share * logits.softmax(-1).mean(0)).sum())
    return torch.stack(found).mean()


def fit(model, recipe: Recipe, train: dict[str, np.ndarray], save, say) -> None:
    """Train with AdamW, warm-up and a cosine to a tenth of the rate; call ``save`` at every checkpoint."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.rate,
        betas=(0.9, 0.95),
    )
    draw = np.random.default_rng(recipe.seed)
    orders = {domain: draw.permutation(len(train[domain])) for domain in DOMAINS}
    history, recent = [], []
    begun = time.perf_counter()
    for step in range(recipe.steps):
        warm = min(1.0, (step + 1) / recipe.warm_up)
        gone = max(0.0, (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * warm * (0.55 + 0.45 * math.cos(math.pi * gone))
        rows = [train[domain][orders[domain][(step * recipe.batch + k) % len(orders[domain])]]
                for domain in DOMAINS for k in range(recipe.batch)]  # fmt: skip
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        seen = model(input_ids=ids, output_router_logits=True)
        loss = functional.cross_entropy(seen.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        balance = imbalance(seen.router_logits, recipe.per_token)
        optimizer.zero_grad(set_to_none=True)
        (loss + recipe.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append((loss.item(), balance.item()))
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            mean, uneven = np.mean(recent, axis=0)
            seconds = time.perf_counter() - begun
            history.append({"step": step + 1, "loss": float(mean), "imbalance": float(uneven)})
            say(f"step {step + 1}: loss {mean:.3f}, imbalance {uneven:.2f}, {(step + 1) * ids.numel() / seconds:,.0f} tokens/s")  # fmt: skip
            recent = []
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            save(step + 1, history, time.perf_counter() - begun)


def calibration_records(texts: dict[str, list[str]], tokenizer: Tokenizer, recipe: Recipe) -> str:
    """Return the calibration file: passages of a little under ``context`` tokens, evenly from every domain."""
    lines = []
    for domain in DOMAINS:
        rows = spread(blocks(texts[domain], tokenizer, recipe.context - 4), recipe.calibration_records)
        lines += [json.dumps({"text": tokenizer.decode(row.tolist(), skip_special_tokens=True), "domain": domain}) for row in rows]  # fmt: skip
    return "\n".join(lines) + "\n"


def run(out: Path, recipe: Recipe, say=print) -> dict:
    """Train the model into ``out`` and return its record."""
    torch.use_deterministic_algorithms(True)
    texts, text_record = texts_of(recipe)
    tokenizer = train_tokenizer(texts["train"], recipe.vocabulary)
    train = {domain: blocks(texts["train"][domain], tokenizer, recipe.context) for domain in DOMAINS}
    held_out = {domain: spread(blocks(texts["held_out"][domain], tokenizer, recipe.context), recipe.held_out_blocks)
                for domain in DOMAINS}  # fmt: skip
    say("tokens to train on: " + ", ".join(f"{name} {rows.size:,}" for name, rows in train.items()))
    model = build(recipe)
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "held_out.npz", **held_out)
    (out / "calibration.jsonl").write_text(calibration_records(texts["calibration"], tokenizer, recipe))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=4 * recipe.context
    ).save_pretrained(out)
    digest = hashlib.sha256(b"".join(rows.tobytes() for rows in (*train.values(), *held_out.values())))
    record: dict = {}

    def save(step: int, history: list[dict], seconds: float) -> None:
        model.eval()
        record.update({
            "recipe": asdict(recipe), "text": text_record,
            "tokens": {"train": {name: int(rows.size) for name, rows in train.items()},
                       "held_out": {name: int(rows.size) for name, rows in held_out.items()},
                       "seen": step * recipe.batch * len(DOMAINS) * recipe.context, "sha256": digest.hexdigest()},
            "steps": step, "parameters": sum(p.numel() for p in model.parameters()),
            "loss_held_out": {name: loss_of(model, rows) for name, rows in held_out.items()},
            "routing": specialisation(loads(model, held_out)),
            "loss_training": history, "seconds": seconds,
            "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        })  # fmt: skip
        model.train()
        model.save_pretrained(out)
        (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        losses = ", ".join(f"{name} {value:.3f}" for name, value in record["loss_held_out"].items())
        say(f"checkpoint {step}: held out {losses}; {record['routing']}")

    fit(model, recipe, train, save, say)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small mixture of experts on four domains.")
    parser.add_argument("out", type=Path, help="folder for the model, its tokenizer and its texts")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(Recipe()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    given = vars(parser.parse_args())
    out = given.pop("out")
    torch.set_num_threads(given.pop("threads"))
    record = run(out, Recipe(**given), say=lambda line: print(line, flush=True))
    print(f"{record['parameters']:,} parameters, {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
