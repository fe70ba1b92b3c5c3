"""Train the small decoders that the pruning benchmarks cut: ``python benchmarks/pruning/decoders/train.py OUT``.

Text: the sources of the Python standard library of this interpreter, without tests and bundled packages,
sorted by path; a file is held out when the sha256 of its path says so (about one in twelve). Everything
follows from the interpreter's version, the options and the seed; the recipe written beside the model has
the digests. One core, about ten minutes for the default.

A dense model of the size of a pruned one, trained as long as its parent was:

    python benchmarks/pruning/decoders/train.py OUT --ffn 256 --heads 4 --kv-heads 2

What is written to OUT: a stock transformers folder (llama) with its tokenizer; ``tokens.npz`` with
``train`` [blocks, context] in the order of training, ``held_out`` [blocks, context] (int32);
``training.json``, the recipe and the losses (nats per token).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
HELD_OUT_OF = 12
HELD_OUT_BLOCKS = 400


@dataclass(frozen=True)
class Recipe:
    """Shape of the model and how it is trained; one step sees ``batch`` blocks of ``context`` tokens."""

    vocabulary: int = 2048
    context: int = 256
    hidden: int = 192
    layers: int = 8
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 32
    ffn: int = 512
    steps: int = 2200
    batch: int = 4
    rate: float = 2e-3
    warm_up: int = 100
    decay: float = 0.1
    seed: int = 0


def sources() -> tuple[list[Path], Path]:
    """Return the files of the standard library that are read, in order, and the folder they lie in."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [file for file in root.rglob("*.py") if not LEFT_OUT & set(file.relative_to(root).parts)]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix()), root


def split() -> tuple[list[str], list[str], dict]:
    """Return texts to train on and to hold out, and what is recorded about them."""
    files, root = sources()
    kept: dict[bool, list[str]] = {False: [], True: []}
    digest = hashlib.sha256()
    names: dict[bool, int] = {False: 0, True: 0}
    for file in files:
        name, raw = file.relative_to(root).as_posix(), file.read_bytes()
        digest.update(f"{name}\0{hashlib.sha256(raw).hexdigest()}\n".encode())
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_OF == 0
        kept[held_out].append(raw.decode("utf-8", errors="replace"))
        names[held_out] += 1
    record = {
        "python": platform.python_version(), "files": names[False], "files_held_out": names[True],
        "bytes": sum(len(t.encode()) for t in kept[False]), "bytes_held_out": sum(len(t.encode()) for t in kept[True]),
        "sha256": digest.hexdigest(),
    }  # fmt: skip
    return kept[False], kept[True], record


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE of so many tokens; token 0 ends a file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def blocks(texts: list[str], tokenizer: Tokenizer, context: int) -> np.ndarray:
    """Return int32 [blocks, context]: the texts, each ended by token 0, one behind the other."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    stream = np.concatenate([np.asarray([*one.ids, 0], dtype=np.int32) for one in encoded])
    count = len(stream) // context
    return stream[: count * context].reshape(count, context)


@torch.inference_mode()
def loss_of(model: torch.nn.Module, held_out: np.ndarray) -> float:
    """Return the mean negative log-likelihood of all tokens but each block's first, nats."""
    model.eval()
    total = 0.0
    for rows in np.array_split(held_out, math.ceil(len(held_out) / 16)):
        ids = torch.from_numpy(rows.astype(np.int64))
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (held_out.shape[0] * (held_out.shape[1] - 1))


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Return the held-out loss of predicting every token by its frequency in training, nats."""
    counts = np.bincount(train.ravel(), minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[held_out[:, 1:]].mean())


def build(recipe: Recipe) -> LlamaForCausalLM:
    """Return the untrained model; equal recipes give equal weights."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary, hidden_size=recipe.hidden, intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_dim, max_position_embeddings=4 * recipe.context, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def fit(model: LlamaForCausalLM, recipe: Recipe, train: np.ndarray, say) -> list[dict]:
    """Train with AdamW, warm-up and a cosine to a tenth of the rate; return the loss every 100 steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    order = np.random.default_rng(recipe.seed).permutation(len(train))
    history, recent = [], []
    begun = time.perf_counter()
    for step in range(recipe.steps):
        warm = min(1.0, (step + 1) / recipe.warm_up)
        gone = max(0.0, (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * warm * (0.55 + 0.45 * math.cos(math.pi * gone))
        rows = [order[(step * recipe.batch + k) % len(order)] for k in range(recipe.batch)]
        ids = torch.from_numpy(train[rows].astype(np.int64))
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            seconds = time.perf_counter() - begun
            tokens = (step + 1) * recipe.batch * recipe.context
            history.append({"step": step + 1, "loss": sum(recent) / len(recent)})
            say(f"step {step + 1}: loss {history[-1]['loss']:.3f}, {tokens / seconds:,.0f} tokens/s")
            recent = []
    return history


def run(out: Path, recipe: Recipe, say=print) -> dict:
    """Train one decoder into ``out`` and return its record."""
    torch.use_deterministic_algorithms(True)
    texts, held_texts, text_record = split()
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    train, held_out = blocks(texts, tokenizer, recipe.context), blocks(held_texts, tokenizer, recipe.context)
    spread = np.linspace(0, len(held_out) - 1, min(HELD_OUT_BLOCKS, len(held_out))).astype(int)
    held_out = held_out[spread]
    model = build(recipe)
    begun = time.perf_counter()
    history = fit(model, recipe, train, say)
    record = {
        "recipe": asdict(recipe), "text": text_record,
        "tokens": {"train": train.size, "held_out": held_out.size, "seen": recipe.steps * recipe.batch * recipe.context,
                   "sha256": hashlib.sha256(train.tobytes() + held_out.tobytes()).hexdigest()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_held_out": loss_of(model, held_out), "loss_unigram": unigram_loss(train, held_out, recipe.vocabulary),
        "loss_training": history, "seconds": time.perf_counter() - begun,
        "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END,
                            model_max_length=4 * recipe.context).save_pretrained(out)  # fmt: skip
    np.savez_compressed(out / "tokens.npz", train=train, held_out=held_out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small decoder on the Python standard library.")
    parser.add_argument("out", type=Path, help="folder for the model, its tokenizer and its tokens")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(Recipe()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    given = vars(parser.parse_args())
    out = given.pop("out")
    torch.set_num_threads(given.pop("threads"))
    record = run(out, Recipe(**given), say=lambda line: print(line, flush=True))
    print(f"held-out loss {record['loss_held_out']:.3f} nats per token, unigram {record['loss_unigram']:.3f}, "
          f"{record['parameters']:,} parameters, {record['seconds']:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
