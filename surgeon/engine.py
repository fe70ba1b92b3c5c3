"""The one loop that touches weights: executes any Plan into a staging folder.

For every item: its reduce passes over all blocks (states merged in block order), then one map
pass whose blocks are checked, encoded and written. Blocks of one item run on a pool of
threads; small items are batched; two coordinators keep the pool busy across items. Results do
not depend on any of that: the partition and the merge order belong to the plan.

`run` leaves a staged, verified-by-reading model; `surgeon.output.staging.publish` moves it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import recheck
from surgeon.checkpoint.digests import InputDigester
from surgeon.checkpoint.header import Header, printable
from surgeon.errors import InputError, Interrupted, Where
from surgeon.kernels import cast, fused
from surgeon.output.journal import Journal
from surgeon.output.writer import ModelWriter
from surgeon.plan import BLOCK_ELEMENTS, Block, Plan, Task, WorkItem, blocks_of, is_byte_copy

Progress = Callable[[int, int], None]


@dataclass
class Timing:
    """Where the time goes, in seconds summed over threads (they overlap)."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    read_back: float = 0.0
    final_sync: float = 0.0
    total: float = 0.0


@dataclass
class RunResult:
    """What a run produced, before publication."""

    file_digests: dict[str, dict[str, str]]
    input_digests: dict[str, str]
    summaries: dict[str, dict[str, Any]]
    timing: Timing
    resumed_items: int = 0


@dataclass
class State:
    """Shared by the threads of one run, or by those who ask for single blocks of a plan's outputs."""

    plan: Plan
    writers: dict[str, ModelWriter]
    journal: Journal
    digester: InputDigester
    pool: ThreadPoolExecutor
    threads: int
    stop: threading.Event
    progress: Progress | None
    total_bytes: int
    failure: list[BaseException] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)
    lock: threading.Lock = field(default_factory=threading.Lock)
    done_bytes: int = 0
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    headers: dict[str, dict[Any, Header]] = field(default_factory=dict)

    def spend(self, what: str, seconds: float) -> None:
        with self.lock:
            setattr(self.timing, what, getattr(self.timing, what) + seconds)

    def advance(self, nbytes: int) -> None:
        if self.progress is None:
            return
        with self.lock:
            self.done_bytes += nbytes
            done = self.done_bytes
        self.progress(done, self.total_bytes)

    def check_stop(self) -> None:
        if self.failure:
            raise _Abandon
        if self.stop.is_set():
            raise Interrupted("E130", "interrupted; finished work is kept")


class _Abandon(BaseException):
    """Another thread failed; unwind quietly."""


def run(
    plan: Plan,
    writers: dict[str, ModelWriter],
    journal: Journal,
    records: list[dict[str, Any]],
    *,
    threads: int,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> RunResult:
    """Execute a plan into the writers' files and read everything back.

    Args:
        plan: what to do.
        writers: one per output model key, laid out for exactly the plan's outputs.
        journal: finished items are appended here.
        records: journal records of an earlier run of the same plan; their claims are
            re-hashed, not believed.
        threads: workers.
        progress: called with (bytes done, bytes total) from any thread.
        stop: set it to stop after the blocks in progress.

    Raises:
        InputError: E321 non-finite input, E322 non-finite result, E334 an input changed.
        Interrupted: ``stop`` was set; the journal holds what is finished.
    """
    begin = time.perf_counter()
    _keep_freed_memory()
    done, summaries = _claim_finished(plan, writers, records)
    headers: list[Header] = []
    for checkpoint in plan.inputs.values():
        headers.extend(h for h in checkpoint.headers if h not in headers)
    digester = InputDigester(headers)
    pending = _in_file_order(plan, writers, done)
    fused.prepare(arithmetic_bytes(plan, pending))
    total = sum(_item_bytes(plan, item) for _, item in pending)
    with ThreadPoolExecutor(threads, thread_name_prefix="block") as pool:
        state = State(
            plan, writers, journal, digester, pool, threads, stop or threading.Event(), progress, total,
            summaries=summaries,
        )  # fmt: skip
        background = _Background(writers, state)
        try:
            _run_items(state, pending)
            inputs = digester.finish()
            recheck(tuple(headers))  # last: the digests are of what was read, or the run has failed
        except BaseException:
            state.failure.append(_Abandon())
            digester.stop()
            background.stop()
            raise
        background.stop()
        if background.failure is not None:
            raise background.failure
        started = time.perf_counter()
        digests = {key: writer.finish() for key, writer in writers.items()}
        state.timing.final_sync = time.perf_counter() - started
    state.timing.total = time.perf_counter() - begin
    return RunResult(
        digests,
        {str(p): d for p, d in inputs.items()},
        state.summaries,
        state.timing,
        len(done),
    )


def compute(
    plan: Plan,
    writers: Any,
    *,
    threads: int,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Execute a plan whose inputs and outputs lie in memory: nothing is journalled, hashed or read back.

    Args:
        writers: output model key -> an object with ``write(name, byte offset, array)``.

    Raises:
        InputError, Interrupted: as `run`.
    """
    pending = list(enumerate(plan.items))
    fused.prepare(arithmetic_bytes(plan, pending))
    total = sum(_item_bytes(plan, item) for _, item in pending)
    digester = InputDigester([])
    with ThreadPoolExecutor(threads, thread_name_prefix="block") as pool:
        state = State(
            plan, writers, NoJournal(), digester, pool, threads, stop or threading.Event(), progress, total,
        )  # fmt: skip
        try:
            _run_items(state, pending)
        finally:
            digester.stop()


class NoJournal(Journal):
    """Takes the place of a journal where a run cannot be resumed."""

    def __init__(self) -> None:
        pass

    def append(self, record: dict[str, Any], sync: bool = False) -> None:
        pass


def _keep_freed_memory() -> None:
    """Let glibc reuse freed blocks: by default each array of megabytes is mapped, faulted in and unmapped anew.

    That costs a light merge a tenth of its time. Elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 64 << 20)


def _in_file_order(plan: Plan, writers: dict[str, ModelWriter], done: set[int]) -> list[tuple[int, WorkItem]]:
    """Return the items to do in the order of their first output's place.

    Files then fill from front to back, so that reading back can follow, and inputs, which lie in the
    same order as a rule, are read from front to back, too.
    """

    def place(entry: tuple[int, WorkItem]) -> tuple[int, int, int]:
        number, item = entry
        output = item.tasks[0].outputs[0]
        found = writers[output.model].layout.places[output.name]
        return found.shard, found.offset, number

    pending = [(number, item) for number, item in enumerate(plan.items) if number not in done]
    return sorted(pending, key=place)


def arithmetic_bytes(plan: Plan, pending: list[tuple[int, WorkItem]]) -> int:
    """Return the bytes read for arithmetic over all passes; plain copies need none."""
    return sum(
        _item_bytes(plan, item) * (1 + max(task.operation.reduces() for task in item.tasks))
        for _, item in pending
        if not is_byte_copy(item)
    )


def _item_bytes(plan: Plan, item: WorkItem) -> int:
    return max(1, sum(plan.inputs[r.model].tensors[r.name].nbytes for r in item.inputs))


def _claim_finished(
    plan: Plan, writers: dict[str, ModelWriter], records: list[dict[str, Any]]
) -> tuple[set[int], dict[str, dict[str, Any]]]:
    """Return the items whose bytes are on disk as the journal says, and what was measured on them.

    Their stretches are claimed at the writers.
    """
    done: set[int] = set()
    summaries: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()
    for record in records:
        number = record.get("item")
        if not isinstance(number, int) or not 0 <= number < len(plan.items):
            continue
        claims = [(o[0], o[1], o[2], o[3], o[4]) for o in record["blocks"]]
        if all(writers[m].holds(name, offset, size, crc) for m, name, offset, size, crc in claims):
            for model, name, offset, size, crc in claims:
                writers[model].claim(name, offset, size, crc)
            done.add(number)
            _keep_summaries(summaries, plan.items[number], record["summaries"], lock)
    return done, summaries


class _Background:
    """Reads finished stretches back and pushes dirty pages out, beside the computation."""

    def __init__(self, writers: dict[str, ModelWriter], state: State) -> None:
        self._writers = writers
        self._state = state
        self._wake = threading.Event()
        self._stop = False
        self.failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._loop, args=(action, pause), name=name, daemon=True)
            for action, pause, name in ((self._read_back, 0.02, "read-back"), (self._push, 0.25, "write-out"))
        ]
        for thread in self._threads:
            thread.start()

    def _read_back(self) -> None:
        started = time.perf_counter()
        for writer in self._writers.values():
            writer.read_back()
        self._state.spend("read_back", time.perf_counter() - started)

    def _push(self) -> None:
        for writer in self._writers.values():
            writer.push()

    def _loop(self, action: Callable[[], None], pause: float) -> None:
        try:
            while not self._stop:
                action()
                self._wake.wait(pause)
        except BaseException as error:
            self.failure = error
            self._state.failure.append(error)

    def stop(self) -> None:
        self._stop = True
        self._wake.set()
        for thread in self._threads:
            thread.join()


def _run_items(state: State, pending: list[tuple[int, WorkItem]]) -> None:
    """Run all items: groups of several items first reduce together, everything else is independent."""
    units = _units(state.plan, pending)
    if state.threads == 1:
        for unit in units:
            _run_unit(state, unit)
        return
    with ThreadPoolExecutor(2, thread_name_prefix="item") as coordinators:
        running: deque[Future] = deque()
        try:
            for unit in units:
                while len(running) >= 4:
                    running.popleft().result()
                running.append(coordinators.submit(_guarded, state, unit))
            while running:
                running.popleft().result()
        except BaseException as error:
            state.failure.append(error)
            for future in running:
                future.cancel()
            real = next((e for e in state.failure if not isinstance(e, _Abandon)), error)
            raise real from None


def _guarded(state: State, unit: list[tuple[int, WorkItem]]) -> None:
    try:
        _run_unit(state, unit)
    except BaseException as error:
        state.failure.append(error)
        raise


def _units(plan: Plan, pending: list[tuple[int, WorkItem]]) -> Iterator[list[tuple[int, WorkItem]]]:
    """Cut the work into units: a reduction group, one large item, or a batch of small ones."""
    groups: dict[str, list[tuple[int, WorkItem]]] = {}
    for number, item in enumerate(plan.items):
        if item.group:
            groups.setdefault(item.group, []).append((number, item))
    wanted = {item.group for _, item in pending if item.group}
    batch: list[tuple[int, WorkItem]] = []
    size = 0
    for number, item in pending:
        if item.group:
            if item.group in wanted:
                wanted.discard(item.group)
                # Finished members are reduced again: their statistics belong to the group.
                yield groups[item.group]
            continue
        elements = item.tasks[0].outputs[0].elements
        if elements >= BLOCK_ELEMENTS:
            yield [(number, item)]
            continue
        batch.append((number, item))
        size += elements
        if size >= BLOCK_ELEMENTS or len(batch) >= 256:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _run_unit(state: State, unit: list[tuple[int, WorkItem]]) -> None:
    state.check_stop()
    if unit[0][1].group or len(unit) == 1:
        _run_group(state, unit)
    else:
        # Small items: one worker does all passes of each, without hand-overs.
        state.pool.submit(_run_small, state, unit).result()


def _run_small(state: State, unit: list[tuple[int, WorkItem]]) -> None:
    for number, item in unit:
        state.check_stop()
        _run_group(state, [(number, item)], inline=True)


def _run_group(state: State, unit: list[tuple[int, WorkItem]], inline: bool = False) -> None:
    """Run items that share reductions (usually one item)."""
    ranges = [blocks_of(state.plan, item) for _, item in unit]
    carried, checked = reduce_unit(state, unit, ranges, inline)
    for position, (number, item) in enumerate(unit):
        _map_item(state, number, item, ranges[position], position, carried, inline, check=not checked)


def reduce_unit(
    state: State, unit: list[tuple[int, WorkItem]], ranges: list[list[tuple[int, int]]], inline: bool
) -> tuple[list[Any], bool]:
    """Do all reduce passes over items that share them.

    Args:
        ranges: of each item its blocks, see `surgeon.plan.blocks_of`.
        inline: in this thread alone.

    Returns:
        Of each task what mapping its blocks needs; and whether the inputs were checked, which the first pass does.
    """
    tasks = max(len(item.tasks) for _, item in unit)
    carried: list[Any] = [None] * tasks
    steps = max(task.operation.reduces() for _, item in unit for task in item.tasks)
    elements = sum(item.tasks[0].outputs[0].elements for _, item in unit)
    checked = False
    for step in range(steps):
        merged: list[Any] = [None] * tasks
        jobs = (
            (position, ordinal, start, stop)
            for position, spans in enumerate(ranges)
            for ordinal, (start, stop) in enumerate(spans)
        )

        def work(job, step=step, first=not checked):
            position, ordinal, start, stop = job
            item = unit[position][1]
            block = load_block(state, item, start, stop, ordinal, position, check=first)
            began = time.perf_counter()
            states = [
                task.operation.reduce(step, block, carried[t]) if step < task.operation.reduces() else None
                for t, task in enumerate(item.tasks)
            ]
            state.spend("compute", time.perf_counter() - began)
            return item, states

        for item, states in in_order(state, work, jobs, inline):
            for t, part in enumerate(states):
                if part is not None:
                    operation = item.tasks[t].operation
                    merged[t] = part if merged[t] is None else operation.merge(step, merged[t], part)
        for t, task in enumerate(unit[0][1].tasks):
            if step < task.operation.reduces():
                carried[t] = task.operation.finish(step, merged[t], carried[t], elements)
        checked = True
    return carried, checked


def map_task(
    state: State, task: Task, block: Block, carried: Any
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Return one block of each output of a task as it is stored, and what the task measured on it."""
    began = time.perf_counter()
    results = task.operation.map(block, carried)
    encoded = [
        _encode(result, output, block, task.operation)
        for result, output in zip(results, task.outputs, strict=True)
    ]
    part = task.operation.measure(block, encoded, carried)
    state.spend("compute", time.perf_counter() - began)
    return encoded, part


def _map_item(state, number, item, ranges, position, carried, inline, check) -> None:
    """Map all blocks of one item and journal it with what its tasks measured."""
    sums: list[Any] = [None] * len(item.tasks)
    jobs = ((position, ordinal, start, stop) for ordinal, (start, stop) in enumerate(ranges))
    claims: list[list[Any]] = []

    def work(job):
        _, ordinal, start, stop = job
        block = load_block(state, item, start, stop, ordinal, position, check=check)
        written, parts = [], []
        for t, task in enumerate(item.tasks):
            encoded, part = map_task(state, task, block, carried[t])
            parts.append(part)
            began = time.perf_counter()
            for output, data in zip(task.outputs, encoded, strict=True):
                offset = start if task.operation.copies else start * data.itemsize
                crc = state.writers[output.model].write(output.name, offset, data)
                written.append([output.model, output.name, offset, data.nbytes, crc])
            state.spend("write", time.perf_counter() - began)
        state.advance(sum(r.nbytes for r in block.raw))
        return written, parts

    for written, parts in in_order(state, work, jobs, inline):
        claims.extend(written)
        for t, part in enumerate(parts):
            if part is not None:
                sums[t] = part if sums[t] is None else sums[t] + part
    summaries = [task.operation.summary(carried[t], sums[t]) for t, task in enumerate(item.tasks)]
    _keep_summaries(state.summaries, item, summaries, state.lock)
    # The summaries belong to the record: a resumed run must write the same manifest.
    state.journal.append({"item": number, "blocks": claims, "summaries": summaries})


def _keep_summaries(found: dict[str, dict[str, Any]], item: WorkItem, summaries: list[Any], lock) -> None:
    for task, summary in zip(item.tasks, summaries, strict=True):
        if summary:
            output = task.outputs[0]
            with lock:
                found.setdefault(output.model, {})[output.name] = summary


def in_order(state: State, work: Callable, jobs: Iterable[Any], inline: bool) -> Iterator[Any]:
    """Yield results in job order with a bounded number of jobs in flight."""
    if inline or state.threads == 1:
        for job in jobs:
            state.check_stop()
            yield work(job)
        return
    window: deque[Future] = deque()
    try:
        for job in jobs:
            state.check_stop()
            window.append(state.pool.submit(work, job))
            if len(window) > state.threads:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        for future in window:
            future.cancel()
        for future in window:
            if not future.cancelled():
                future.exception()


def load_block(
    state: State, item: WorkItem, start: int, stop: int, ordinal: int, position: int, check: bool
) -> Block:
    """Return one block of an item's inputs; ``check``: refuse NaN and infinities in them."""
    began = time.perf_counter()
    output = item.tasks[0].outputs[0]
    raw: list[np.ndarray] = []
    codes: list[str] = []
    copy = is_byte_copy(item)
    for ref in item.inputs:
        checkpoint = state.plan.inputs[ref.model]
        info = checkpoint.tensors[ref.name]
        data = (
            checkpoint.read_bytes(ref.name, start, stop) if copy else checkpoint.read(ref.name, start, stop)
        )
        raw.append(data)
        codes.append(info.dtype)
        width = 1 if copy else max(1, info.nbytes // max(1, info.elements))
        state.digester.advance(info.file, info.offset + stop * width)
    state.spend("read", time.perf_counter() - began)
    targets = {o.dtype for task in item.tasks for o in task.outputs}
    target = output.dtype if len(targets) == 1 else ""
    block = Block(output.name, output.shape, raw, codes, start, stop, ordinal, position, target)
    if check:
        _check_inputs(state, item, block, copy)
    return block


_FLOATS = {"F64", "F32", "F16", "BF16"}
_CARRIERS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def _check_inputs(state: State, item: WorkItem, block: Block, copy: bool) -> None:
    for ref, data, code in zip(item.inputs, block.raw, block.codes, strict=True):
        if code not in _FLOATS:
            continue
        values = data
        if copy:
            if state.plan.allow_nonfinite or data.nbytes % np.dtype(_CARRIERS[code]).itemsize:
                continue
            values = data.view(_CARRIERS[code])
        if _nonfinite(values, code) is not None:
            raise _bad_input(state.plan, ref)


def _nonfinite(values: np.ndarray, code: str) -> np.ndarray | None:
    """Return what `cast.nonfinite` does; a block without such entries, the rule, is passed quickly."""
    return None if fused.nonfinite(values, code) is False else cast.nonfinite(values, code)


def _bad_input(plan: Plan, ref) -> InputError:
    """Count the whole tensor's non-finite entries for the message; the run has already failed."""
    checkpoint = plan.inputs[ref.model]
    info = checkpoint.tensors[ref.name]
    count, first, kinds = 0, None, set()
    for start in range(0, info.elements, BLOCK_ELEMENTS):
        stop = min(start + BLOCK_ELEMENTS, info.elements)
        data = checkpoint.read(ref.name, start, stop)
        mask = cast.nonfinite(data, info.dtype)
        if mask is not None:
            values = cast.widen(data, info.dtype)[mask]
            kinds.update(
                {"NaN"} if np.isnan(values).any() else set(), {"Inf"} if np.isinf(values).any() else set()
            )
            if first is None:
                first = start + int(np.flatnonzero(mask)[0])
            count += int(mask.sum())
    place = [int(i) for i in np.unravel_index(first or 0, info.shape)] if info.shape else []
    name = printable(ref.name)
    return InputError(
        "E321", f"{checkpoint.label} has {count:,} {' and '.join(sorted(kinds)) or 'non-finite value'} in {name}, first at {place}",
        where=Where(str(info.file), tensor=name),
        help=f"the file is damaged or the training diverged; --ignore '{name}' copies the base's tensor instead"
        " (with --allow-nonfinite if that one is affected, too)",
    )  # fmt: skip


def _encode(result: np.ndarray, output, block: Block, operation) -> np.ndarray:
    if operation.copies:
        return result
    encoded = result if result.dtype.kind in "uib" else cast.narrow(result, output.dtype)
    mask = _nonfinite(encoded, output.dtype) if output.dtype in _FLOATS else None
    if mask is None:
        return encoded
    bad = np.flatnonzero(mask)
    value = float(result[bad[0]]) if result.dtype.kind == "f" else float("nan")
    overflow = bool(np.isfinite(value))
    reason = f"{value:.6g} does not fit {output.dtype}" if overflow else "overflow, or a division by zero"
    place = (
        [int(i) for i in np.unravel_index(block.start + int(bad[0]), output.shape)] if output.shape else []
    )
    raise InputError(
        "E322", f"{operation.name} gave a non-finite value in {printable(output.name)} at {place}: {reason}",
        where=Where(tensor=printable(output.name)),
        help="--dtype bfloat16 or float32 has the range" if output.dtype == "F16" else
        "check the method's parameters: a zero sum of weights or a zero norm gives this",
    )  # fmt: skip
