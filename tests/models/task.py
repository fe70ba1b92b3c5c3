"""Running sums of three-digit numbers, worked out loud at a chosen verbosity.

A question is ``Add 347+258+916.``; an answer adds the terms one by one and
closes with ``answer:1521``.  Every addition may be done in one pass
(``347+258=605``) or column by column (``347+258:7+8=15,4+5+1=10,3+2+1=6=605``),
and may be followed by a re-check (``check:605-258=347``) and a restatement
(``total:605``); a ``recap:`` of all partial sums may precede the answer.

Each of these four extras is an independent coin flip whose log-odds are a
*demand* that grows with the difficulty of the place plus a *style* shift.  The
style shift is the only difference between the base, long and short data, so
interpolating between models can move smoothly along it: extras at easy places
disappear before extras at hard ones.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

STYLES = {"base": 0.0, "long": 4.0, "short": -4.0}
"""Log-odds added to the demand of every optional extra."""

TERMS = (3, 6)
"""Smallest and largest number of terms of a question."""

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, USER, ASSISTANT, END)
WORDS = ("Add", "check", "total", "recap", "answer")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TEST_BUCKETS = 16
_ANSWER = re.compile(r"answer:(\d+)")


@dataclass(frozen=True)
class Question:
    """The terms of one running sum."""

    terms: tuple[int, ...]

    @property
    def text(self) -> str:
        """What the user says."""
        return f"Add {'+'.join(map(str, self.terms))}."

    @property
    def answer(self) -> int:
        """The sum of all terms."""
        return sum(self.terms)

    @property
    def held_out(self) -> bool:
        """Whether the question belongs to the test split."""
        return zlib.crc32(self.text.encode()) % _TEST_BUCKETS == 0

    def is_solved_by(self, reply: str) -> bool:
        """Whether the last ``answer:`` line of a reply is right."""
        found = _ANSWER.findall(reply)
        return bool(found) and int(found[-1]) == self.answer


def questions(split: str, seed: int, terms: tuple[int, int] = TERMS) -> Iterator[Question]:
    """Endless deterministic stream of questions of one split, train or test."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}")
    rng = random.Random(f"{split}-{seed}")
    while True:
        count = rng.randint(*terms)
        question = Question(tuple(rng.randint(100, 999) for _ in range(count)))
        if question.held_out == (split == "test"):
            yield question


def columns(left: int, right: int) -> tuple[str, int]:
    """Column-by-column working of ``left + right`` and its number of carries."""
    parts, carry, carries = [], 0, 0
    for low, high in zip(str(right)[::-1].ljust(len(str(left)), " "), str(left)[::-1], strict=True):
        digits = [high] + [low] * (low != " ") + ["1"] * carry
        value = sum(map(int, digits))
        parts.append(f"{'+'.join(digits)}={value}")
        carry = value // 10
        carries += carry
    return ",".join(parts), carries


def solve(question: Question, style: float, rng: random.Random) -> str:
    """A correct answer whose optional extras follow the style shift."""

    def wanted(demand: float) -> bool:
        return rng.random() < 1 / (1 + math.exp(-demand - style))

    total, *rest = question.terms
    partial = [total]
    lines = []
    for index, term in enumerate(rest):
        result = total + term
        working, carries = columns(total, term)
        detail = f":{working}" if wanted(1.2 * (carries - 1.5)) else ""
        lines.append(f"{total}+{term}{detail}={result}")
        if wanted(1.0 * (carries - 1.5) + 0.5 * (index - 2)):
            lines.append(f"check:{result}-{term}={total}")
        if wanted(0.8 * (result / 1000 - 2)):
            lines.append(f"total:{result}")
        total = result
        partial.append(total)
    if wanted(len(rest) - 3.5):
        lines.append(f"recap:{','.join(map(str, partial))}")
    lines.append(f"answer:{total}")
    return "\n".join(lines)


def build_tokenizer():
    """Qwen2-style byte-level tokenizer whose only merges spell a few words."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    merges = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = (*SPECIAL_TOKENS, *alphabet, *map("".join, merges))
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token=None,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, END],
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def prompt(tokenizer, question: Question) -> str:
    """The question in the chat format, up to where the answer starts."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question.text}], tokenize=False, add_generation_prompt=True
    )


def model_card(name: str) -> str:
    """Hub-style README of one of the three models."""
    about = {
        "base": "trained from scratch on answers of mixed verbosity",
        "long": "fine-tuned from base to work column by column, re-check and restate",
        "short": "fine-tuned from base to add in one pass without any extras",
    }[name]
    parent = "" if name == "base" else "base_model: base\n"
    return (
        f"---\nlicense: apache-2.0\nlibrary_name: transformers\n{parent}"
        f"pipeline_tag: text-generation\n---\n\n# {name}\n\n"
        f"A tiny running-sum solver, {about}.\n"
        "Made by `train.py` for tests only; all weights and data are our own.\n"
    )
