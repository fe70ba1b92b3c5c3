"""Is a GGUF file the model it was written from? llama.cpp and transformers are asked the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgeon.checkpoint.header import printable
from surgeon.deploy.build import load
from surgeon.deploy.ggml_activations import Rounding
from surgeon.deploy.gguf import TYPES
from surgeon.deploy.gguf_rows import Rows
from surgeon.deploy.gguf_tokenizer import read_tokenizer
from surgeon.deploy.llama_cpp import LlamaCpp, differing_texts
from surgeon.errors import InputError, Where

TEXTS = (
    "Hello, world!", "The quick brown fox jumps over the lazy dog.", "2 + 2 = 4, and 3 * 7 = 21.", "1234567890",
    "def add(a, b):\n    return a + b\n", "  leading and trailing blanks  ", "tabs\tand\nnew lines", "a\n\n\nb", "\n", " ",
    "   ", "UPPER lower MiXeD CamelCase snake_case", "don't stop; it's \"quoted\", we'LL see I'M", "price: $1,234.56 (20% off)",
    "https://example.org/path?query=1&other=2#part", "naïve café über straße", "Привет, мир", "你好，世界", "こんにちは",
    "مرحبا", "🙂 🚀", "\\frac{a}{b} \\times \\sqrt{x^2}", '{"key": [1, 2, {"nested": null}]}', "a", "word " * 20,
    "x=1;y=22;z=333;w=4444", "...", "!!!???", "(a)(b)(c)", "<html><body>text</body></html>", "e-mail: me@here.net",
    "one\r\ntwo\r\n", "tab\t\ttab", "trailing newline\n\n", "mixed 中文 and English 123", "ΑΒΓ αβγ", "½ ⅓ ²", "a_b-c+d",
    "'s 't 're", "It's 5 o'clock", "    indented\n        more", "C++ and C#", "\u00a0non-breaking", "emoji👩‍👩‍👧family",
    "0x1F 1e-9 3.14159", "#include <stdio.h>", "A" * 40, "ab" * 30, "/* comment */", "the the the",
)  # fmt: skip
"""Fifty texts on which the splitting rules of known tokenizers differ."""

PROMPTS, LENGTH = 4, 40
DIVERGENCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
"""Largest KL divergence (nats) of a next-token distribution from transformers' in float32, by type of the file.

With 16-bit matrices llama.cpp also rounds what they are multiplied with; a wrong graph is off by far more."""


QUANTIZED_DIVERGENCE = 0.05
"""Largest KL divergence (nats) of most prompts with quantized matrices. The reference rounds inputs as ggml does, but one that is
rounded the other way moves all that follow, and may send a token to other experts; a wrong file is off everywhere, by whole nats."""


@dataclass(frozen=True)
class Agreement:
    """What a comparison found: largest difference of log-probabilities, largest KL (nats), equal first choices, texts."""

    difference: float
    divergence: float
    same_choice: int
    prompts: int
    texts: int


def check(
    file: Path, folder: Path, *, dtype: str, quantized: Mapping[str, Rows] | None = None, tokenizer: Path | None = None, seed: int = 0
) -> Agreement:  # fmt: skip
    """Compare a GGUF file with the folder of the same model: token ids of fifty texts, and probabilities after random prompts.

    Args:
        file: the GGUF file.
        folder: the model as transformers loads it, stock or ours.
        dtype: type of the file's plain matrices.
        quantized: its quantized matrices; the folder then holds the values their blocks stand for.
        tokenizer: folder of the tokenizer, ``folder`` by default.
        seed: of the prompts.

    Raises:
        InputError: E328 llama.cpp refuses the file or computes something else, E329 it reads texts differently.
        EnvironmentFault: E512 xllamacpp is not installed.
    """
    model: Any = load(folder, dtype=torch.float32)
    rows = int(model.get_input_embeddings().weight.shape[0])
    words = read_tokenizer(tokenizer or folder, rows)
    plain = [number for number, kind in enumerate(words.keys["tokenizer.ggml.token_type"]) if kind == 1]
    draws = np.random.default_rng(seed).choice(plain, (PROMPTS, LENGTH))
    rounding = Rounding(model, quantized, TYPES[dtype]) if quantized else nullcontext()
    with torch.no_grad(), rounding:
        logits = model(input_ids=torch.from_numpy(draws)).logits[:, -1].double()
    wanted = torch.log_softmax(logits, -1).numpy()
    del model
    letter = words.tokenizer.encode("a", add_special_tokens=False)[0]
    with LlamaCpp(file, context=max(512, *(2 * len(text.encode()) for text in TEXTS))) as runtime:
        odd = differing_texts(runtime, words.tokenizer, TEXTS)
        found = np.stack([runtime.logprobs(prompt.tolist(), rows, sampled=letter) for prompt in draws])
    where = Where(str(file))
    if odd:
        raise InputError("E329", f"llama.cpp turns {len(odd)} of {len(TEXTS)} texts into other tokens, the first is {printable(odd[0])!r}",
                         where=where, help="the file's tokenizer is not the model's; do not use the file")  # fmt: skip
    divergences = (np.exp(wanted) * (wanted - found)).sum(-1)
    divergence = float(divergences.max())
    judged = float(np.median(divergences)) if quantized else divergence
    limit = QUANTIZED_DIVERGENCE if quantized else DIVERGENCE[dtype]
    if not judged <= limit:
        raise InputError("E328", f"llama.cpp computes other probabilities: KL {judged:.3g}, at most {limit:.0e} was expected",
                         where=where, help="do not use the file; report the model's family and shapes")  # fmt: skip
    same = int((wanted.argmax(-1) == found.argmax(-1)).sum())
    return Agreement(float(np.abs(wanted - found).max()), divergence, same, PROMPTS, len(TEXTS))
