"""Batched generation in which rows come and go: finished replies leave, waiting questions join.

One running batch holds up to ``rows`` replies. When enough of them have finished, their places are
given to the next questions: the prompts are prefilled together (once per question, shared by its
samples) and their keys and values are put into the running cache. Models whose layers do not all
attend to everything (sliding windows, recurrent states) use transformers' own cache and fixed
batches, from which finished rows are dropped.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from surgeon.errors import EnvironmentFault, InputError, Interrupted
from surgeon.evaluate.kv_cache import packable, packed_cache, padding_allowed
from surgeon.evaluate.sampling import Draws, choose

PREFILL_TOKENS = 8192
"""Most prompt tokens, padding included, that are run through the model at once."""
_TRIM = 64


@dataclass(frozen=True)
class Job:
    """One reply to make: the question's key (for its random numbers), its prompt, its sample number."""

    question: str
    prompt: tuple[int, ...]
    sample: int
    index: int = 0


@dataclass(frozen=True)
class Reply:
    """Generated token ids, the end-of-sequence token included; ``finished`` is False at the length limit."""

    job: Job
    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; temperature 0 is greedy."""

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    context: int = 0
    """Most tokens the model takes, prompt included; 0 = no limit known."""

    def limit(self, prompt: int) -> int:
        """Return how many tokens a reply to a prompt of this length may have."""
        return min(self.max_new_tokens, self.context - prompt) if self.context else self.max_new_tokens


@torch.inference_mode()
def generate(
    model: Any,
    jobs: Sequence[Job],
    decoding: Decoding,
    *,
    rows: int,
    receive: Callable[[Reply], None],
    stop: threading.Event | None = None,
) -> None:
    """Make all replies; ``receive`` gets each as soon as it is complete.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        jobs: in any order; long prompts go first.
        rows: most replies in progress at once.

    Raises:
        InputError: E392 the model has no key-value cache, E394 it gave a NaN or infinite logit.
        EnvironmentFault: E504 the device's memory is used up, also with half as many rows.
        Interrupted: ``stop`` was set; what was received so far is complete.
    """
    made: set[Job] = set()

    def keep(reply: Reply) -> None:
        made.add(reply.job)
        receive(reply)

    try:
        _generate(model, jobs, decoding, rows, keep, stop)
    except torch.OutOfMemoryError:
        half = rows // 2
        try:
            if not half:
                raise
            # What is lost are tokens of unfinished replies; each draws the same random numbers in any batch.
            rest = [job for job in jobs if job not in made]
            _generate(model, rest, decoding, half, keep, stop)
        except torch.OutOfMemoryError:
            raise EnvironmentFault("E504", f"the memory of {model.device} is used up with {half or 1} replies at once",
                                   help="give a smaller --batch-size; finished replies are kept") from None  # fmt: skip


def _generate(
    model: Any, jobs: Sequence[Job], decoding: Decoding, rows: int, receive: Callable[[Reply], None],
    stop: threading.Event | None,
) -> None:  # fmt: skip
    waiting = sorted(jobs, key=lambda j: (-len(j.prompt), j.index, j.sample))
    waiting.reverse()  # popped from the end
    longest = max((len(j.prompt) + decoding.limit(len(j.prompt)) for j in jobs), default=0)
    batch = _Batch(model, decoding, rows, packable(model.config, longest), receive)
    while waiting or batch.active:
        if stop is not None and stop.is_set():
            raise Interrupted("E130", "interrupted while replies were generated")
        if waiting and batch.wants():
            batch.admit(waiting)
        batch.advance()


class _Batch:
    """The running batch.

    Attributes:
        slots: the reply in each row; None where it has finished and the row waits to be reused.
        mask: [rows, columns] attention mask, 1 from each row's first token on.
        starts: first column of each row.
    """

    def __init__(self, model: Any, decoding: Decoding, rows: int, packed: bool, receive: Callable[[Reply], None]) -> None:  # fmt: skip
        self.model, self.decoding, self.rows, self.packed, self.receive = (
            model,
            decoding,
            rows,
            packed,
            receive,
        )
        self.padding = packed or padding_allowed(model.config)
        self.device = model.get_input_embeddings().weight.device
        self.stop_ids = torch.tensor(decoding.stop_ids, device=self.device)
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise InputError("E392", f"{type(model).__name__} keeps no keys and values; its replies cannot be generated here",
                             help="--perplexity, --kl and --tasks work without")  # fmt: skip
        self.positions = "position_ids" in accepted
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.slots: list[_Running | None] = []
        self.cache: Any = None
        self.mask = torch.empty(0)
        self.active = 0

    def wants(self) -> bool:
        """Say whether enough rows are free to be worth a prefill."""
        if not self.active:
            return True
        return self.packed and self.rows - self.active >= max(1, self.rows // 8)

    def admit(self, waiting: list[Job]) -> None:
        """Prefill the next prompts and give them rows; ``waiting`` is popped from its end."""
        if not self.active:
            self.slots, self.cache = [], None
        free = self.rows - self.active
        while free and waiting:
            jobs = self._take(waiting, free)
            self._prefill(jobs)
            free -= len(jobs)
            if not self.packed:
                return

    def _take(self, waiting: list[Job], most: int) -> list[Job]:
        """Pop the jobs of the next prefill: bounded tokens, equal lengths where padding would be seen."""
        width = len(waiting[-1].prompt)
        chosen: list[Job] = []
        prompts: set[int] = set()
        while waiting and len(chosen) < most:
            job = waiting[-1]
            if not self.padding and len(job.prompt) != width:
                break
            new = job.index not in prompts or not self.packed
            if chosen and new and (len(prompts) + 1) * width > PREFILL_TOKENS and self.packed:
                break
            prompts.add(job.index)
            chosen.append(waiting.pop())
        return chosen

    def _prefill(self, jobs: list[Job]) -> None:
        """Run prompts through the model, choose each reply's first token, put the rows into the batch."""
        distinct = {j.index: j for j in jobs} if self.packed else dict(enumerate(jobs))
        order = {index: row for row, index in enumerate(distinct)}
        source = torch.tensor([order[j.index] for j in jobs] if self.packed else range(len(jobs)))
        prompts = [j.prompt for j in distinct.values()]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        cache: Any = (packed_cache if self.packed else _own_cache)(self.model.config)
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), cache)[source.to(self.device)]
        running = [_Running(job, self.decoding) for job in jobs]
        if self.cache is None:
            self.slots = list(running)
            self.mask = mask[source.to(self.device)]
            self.cache = cache
            if self.packed and len(jobs) != len(prompts):
                for layer in cache.layers:
                    layer.keep_rows(source)
            rows = list(range(len(jobs)))
        else:
            rows = self._place(running, cache, mask, source, width)
        self.active += len(jobs)
        self._choose(rows, logits)

    def _place(self, running: list[_Running], cache: Any, mask: torch.Tensor, source: torch.Tensor, width: int) -> list[int]:  # fmt: skip
        """Give prefilled prompts rows of the running batch."""
        # Long prompts go first: every row in use has at least as many columns as any prompt still waiting.
        assert width <= self.mask.shape[1]
        missing = len(running) - self.slots.count(None)
        if missing > 0:
            for layer in self.cache.layers:
                layer.append_rows(missing)
            self.slots.extend([None] * missing)
            self.mask = torch.nn.functional.pad(self.mask, (0, 0, 0, missing))
        rows = [i for i, slot in enumerate(self.slots) if slot is None][: len(running)]
        where = torch.tensor(rows)
        for layer, filled in zip(self.cache.layers, cache.layers, strict=True):
            layer.place(where, filled.keys, filled.values, source)
        self.mask[where.to(self.device)] = 0
        self.mask[where.to(self.device), -width:] = mask[source.to(self.device)]
        for row, reply in zip(rows, running, strict=True):
            self.slots[row] = reply
        return rows

    def advance(self) -> None:
        """Run the last tokens through the model and choose the next ones."""
        self._compact()
        if not self.active:
            return
        ids = torch.tensor([[slot.ids[-1] if slot else 0] for slot in self.slots], device=self.device)
        position = torch.tensor([[slot.position if slot else 0] for slot in self.slots], device=self.device)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        logits = self._forward(ids, self.mask, position, self.cache)
        self._choose(range(len(self.slots)), logits)

    def _compact(self) -> None:
        """Drop finished rows and columns nobody needs, when that saves more than the copy costs."""
        gone = len(self.slots) - self.active
        if self.active and gone * 8 >= len(self.slots):
            keep = [i for i, slot in enumerate(self.slots) if slot is not None]
            if self._keep_rows(torch.tensor(keep)):
                self.slots = [self.slots[i] for i in keep]
                self.mask = self.mask[torch.tensor(keep, device=self.device)]
        if self.packed and self.active:
            live = torch.tensor([slot is not None for slot in self.slots], device=self.device)
            unused = int((self.mask[live].sum(0) == 0).sum()) if self.mask.shape[1] % _TRIM == 0 else 0
            if unused * 4 >= self.mask.shape[1]:
                for layer in self.cache.layers:
                    layer.shift_left(unused)
                self.mask = self.mask[:, unused:]

    def _keep_rows(self, rows: torch.Tensor) -> bool:
        if self.packed:
            for layer in self.cache.layers:
                layer.keep_rows(rows)
            return True
        if all(hasattr(layer, "batch_select_indices") for layer in getattr(self.cache, "layers", [None])):
            self.cache.batch_select_indices(rows.to(self.device))
            return True
        return False

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:  # fmt: skip
        """Return the logits of the last column [rows, vocabulary]."""
        more = {"position_ids": positions} if self.positions else {}
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more, **self.last_only)  # fmt: skip
        return output.logits[:, -1].to(self.device)

    def _choose(self, rows: Sequence[int], logits: torch.Tensor) -> None:
        """Append the next token to the replies in ``rows``; hand over those that are complete."""
        replies = [self.slots[row] for row in rows]
        draws = None
        if self.decoding.temperature > 0:
            draws = torch.tensor([r.draws.at(len(r.ids)) if r else 0.0 for r in replies], dtype=torch.float64)
        tokens = choose(logits, draws, self.decoding.temperature, self.decoding.top_p, self.decoding.top_k)
        ended = torch.isin(tokens, self.stop_ids)
        finite = logits.amax(dim=-1).isfinite() & ~logits.isnan().any(dim=-1)
        for row, reply, token, last, sound in zip(rows, replies, *(t.tolist() for t in (tokens, ended, finite)), strict=True):  # fmt: skip
            if reply is None:
                continue
            if not sound:
                raise InputError("E394", f"the model gives non-finite logits at token {len(reply.ids) + 1} of a reply",
                                 help="the weights or the type are damaged: surgeon verify MODEL, or --dtype float32")  # fmt: skip
            reply.ids.append(token)
            if last or len(reply.ids) >= reply.limit:
                self.slots[row] = None
                self.active -= 1
                self.receive(Reply(reply.job, tuple(reply.ids), bool(last)))


class _Running:
    """A reply in progress."""

    __slots__ = ("draws", "ids", "job", "limit")

    def __init__(self, job: Job, decoding: Decoding) -> None:
        self.job = job
        self.ids: list[int] = []
        self.draws = Draws(decoding.seed, job.question, job.sample)
        self.limit = decoding.limit(len(job.prompt))

    @property
    def position(self) -> int:
        """Position of the newest token, which is run next."""
        return len(self.job.prompt) + len(self.ids) - 1


def _own_cache(config: Any) -> Any:
    try:
        return DynamicCache(config=config)
    except TypeError:  # transformers before 4.56
        return DynamicCache()
