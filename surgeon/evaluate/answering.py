"""Asking one model all questions: replies that are known are read, the others made, all are judged."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, Where
from surgeon.evaluate import metrics
from surgeon.evaluate.generate import Decoding, Job, Reply, generate
from surgeon.evaluate.metrics import Outcomes
from surgeon.evaluate.model import Described, Loaded
from surgeon.evaluate.questions import Question
from surgeon.evaluate.replies import ReplyFile, Written
from surgeon.evaluate.request import EvalRequest
from surgeon.system import memory_budget

MOST_ROWS = 256
"""Beyond this a step's time grows as fast as its rows, on CPUs and GPUs alike."""


@dataclass(frozen=True)
class Asked:
    """What came of all questions, how many replies were made at once, and remarks."""

    outcomes: Outcomes
    rows: int
    notes: tuple[str, ...]


def ask(
    request: EvalRequest, model: Described, loaded: Loaded, questions: Sequence[Question], *, role: str, device: str, dtype: str,
    tell: Callable[[int, int], None], stop: threading.Event | None,
) -> Asked:  # fmt: skip
    """Return every question's outcomes.

    Args:
        role: "" for the model, "baseline" for the baseline: their replies are kept in files of their own.
        tell: called with (replies there, all replies).
        stop: set it to stop; what is complete is kept.

    Raises:
        OutputConflict: E601, E603, E605. InputError: E392 to E395. EnvironmentFault: E502, E504. Interrupted.
    """
    decoding = decoding_of(request, loaded)
    prompts = [loaded.prompt(q.chat, Where(q.file or None, q.line)) for q in questions]
    notes = []
    longest = max(map(len, prompts))
    if loaded.context and longest + request.max_new_tokens > loaded.context:
        notes.append(f"{model.name} takes {loaded.context:,} tokens: the longest question leaves {decoding.limit(longest):,} for its reply")  # fmt: skip
    count = len(prompts) * request.samples
    rows = rows_at_once(request, loaded, max(len(p) + decoding.limit(len(p)) for p in prompts), device, dtype)
    with _reply_file(request, role, identity(request, model, decoding, dtype)) as file:
        jobs = [
            Job(q.key, ids, sample, index)
            for index, (q, ids) in enumerate(zip(questions, prompts, strict=True))
            for sample in range(request.samples)
            if file.find(q.key, sample, ids) is None
        ]
        done = count - len(jobs)
        if done:
            notes.append(f"{done:,} of {count:,} replies were there already: {file.path}")

        def receive(reply: Reply) -> None:
            nonlocal done
            question = questions[reply.job.index]
            written = Written(loaded.text(reply.ids), len(reply.ids), reply.finished)
            file.add(
                question.key, reply.job.sample, reply.job.prompt, question.chat, question.domain, written
            )
            done += 1
            tell(done, count)

        if jobs:
            generate(loaded.model, jobs, decoding, rows=rows, receive=receive, stop=stop)
        replies = []
        for q, ids in zip(questions, prompts, strict=True):
            found = (file.find(q.key, s, ids) for s in range(request.samples))
            replies.append([r for r in found if r is not None])
    thinking = [loaded.opens_thinking(ids) for ids in prompts]
    return Asked(_outcomes(request, questions, replies, thinking), rows, tuple(notes))


def decoding_of(request: EvalRequest, loaded: Loaded) -> Decoding:
    """Return how tokens are chosen."""
    chosen = request.sampling
    return Decoding(
        request.max_new_tokens, float(chosen["temperature"]), float(chosen["top_p"]), int(chosen["top_k"]), request.seed,
        loaded.stop_ids, loaded.context,
    )  # fmt: skip


def identity(request: EvalRequest, model: Described, decoding: Decoding, dtype: str) -> dict[str, Any]:
    """Return what decides a reply, beside its question; greedy ones do not depend on the seed."""
    sampled = {"seed": decoding.seed} if decoding.temperature > 0 else {}
    return {
        "model": model.sha256, "dtype": dtype, "max_new_tokens": decoding.max_new_tokens, "template": request.template,
        "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k, **sampled,
    }  # fmt: skip


def _outcomes(
    request: EvalRequest, questions: Sequence[Question], replies: list[list[Written]], thinking: list[bool]
) -> Outcomes:
    reflective = metrics.reflection_pattern(request.reflection_words or metrics.REFLECTION_WORDS)
    correct = None
    if not request.length:
        correct = np.array(
            [
                # Where the prompt opened the reasoning, the reply only closes it.
                [q.rule is not None and q.rule.judges(f"<think>{r.text}" if opened else r.text) for r in row]
                for q, row, opened in zip(questions, replies, thinking, strict=True)
            ]
        )
    return Outcomes(
        tuple(q.key for q in questions), tuple(q.domain for q in questions), correct,
        np.array([[r.tokens for r in row] for row in replies]),
        np.array([[r.finished for r in row] for row in replies]),
        np.array([[reflective.search(r.text) is not None for r in row] for row in replies]),
    )  # fmt: skip


def rows_at_once(request: EvalRequest, loaded: Loaded, longest: int, device: str, dtype: str) -> int:
    """Return how many replies may be in progress at once: what was asked for, or what surely fits the memory.

    Args:
        longest: tokens of the longest question with a reply of full length.
    """
    if request.batch_size != "auto":
        return int(request.batch_size)
    row = cache_bytes(loaded.model.config, 4 if dtype == "float32" else 2) * longest
    # 1.4: buffers grow by a quarter, and one layer's are there twice while they do.
    return max(1, min(MOST_ROWS, int(_free_memory(request, device) / max(row, 1) / 1.4)))


def cache_bytes(config: Any, width: int) -> int:
    """Return the bytes of keys and values per token; ``width`` bytes a number."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    dim = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, "num_attention_heads", 1)
    return 2 * text.num_hidden_layers * heads * dim * width


def _free_memory(request: EvalRequest, device: str) -> float:
    if device == "cpu":
        return 0.5 * (request.memory_limit or memory_budget())
    import torch

    devices = range(torch.cuda.device_count()) if device == "cuda" else [int(device.partition(":")[2])]
    return 0.8 * sum(torch.cuda.mem_get_info(d)[0] for d in devices)


@contextlib.contextmanager
def _reply_file(request: EvalRequest, role: str, run: dict[str, Any]) -> Iterator[ReplyFile]:
    path = request.reply_file(role)
    try:
        file = ReplyFile(path, run, resume=request.resume)
        try:
            yield file
        finally:
            file.close()
    except OSError as error:
        raise EnvironmentFault(
            "E502",
            f"cannot write {printable(str(path))}: {error.strerror or error}",
            help="give a folder this user can write, with free space",
        ) from error
