"""A Checkpoint over a plan: blocks of its result, computed whenever they are read, as they would be stored.

They are computed by the engine's own code in the plan's own blocks and rounded to the stored type, so that the bytes are
those of the file. Memory is bounded: blocks that were just computed and what reduce passes gave are kept up to a limit each.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon import engine
from surgeon.checkpoint.checkpoint import recheck
from surgeon.checkpoint.digests import InputDigester
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import Header, TensorInfo, header_of_unwritten, printable
from surgeon.checkpoint.index import INDEX_NAME
from surgeon.errors import InputError, Where
from surgeon.kernels import fused
from surgeon.output.layout import lay_out
from surgeon.plan import Plan, WorkItem, blocks_of, item_bytes_per_element

RECENT_BYTES = 64 << 20
"""Computed blocks that are kept: readers of rows and of the stretches a walk reads come back for the same ones."""
FACTS_BYTES = 64 << 20
"""Results of reduce passes that are kept. Thresholds and norms of all tensors take kilobytes, low-rank factors more."""


class Unwritten:
    """A Checkpoint over the only output model of a plan.

    Args:
        plan: what would be written.
        folder: where the weights would lie, and the companions do.
        threads: that compute one read of several blocks.
        stop: set to end a read early.

    Attributes:
        headers: of the weight files as they would be; none until `described`.
    """

    def __init__(
        self, plan: Plan, folder: Path, *, threads: int = 1, stop: threading.Event | None = None
    ) -> None:
        self.plan, self.label, self._place = plan, str(folder), folder
        self.folder: Path | None = folder
        # As it will be read by whoever opens the written model.
        self.config: dict[str, Any] | None = json.loads(json.dumps(plan.models[""].config))
        self.layout = lay_out(plan.outputs()[""], plan.max_shard_bytes)
        self.notes: tuple[str, ...] = ()
        self.index_file = folder / INDEX_NAME if self.layout.index is not None else None
        self.headers: tuple[Header, ...] = ()
        self.tensors: dict[str, TensorInfo] = {
            tensor.name: TensorInfo(
                tensor.name, tensor.dtype, tensor.shape, folder / shard.name,
                self.layout.places[tensor.name].offset, tensor.nbytes,
            )
            for shard in self.layout.shards for tensor in shard.tensors
        }  # fmt: skip
        self._makers = {
            output.name: (number, t, o)
            for number, item in enumerate(plan.items) for t, task in enumerate(item.tasks)
            for o, output in enumerate(task.outputs)
        }  # fmt: skip
        self._groups: dict[str, list[tuple[int, WorkItem]]] = {}
        for number, item in enumerate(plan.items):
            if item.group:
                self._groups.setdefault(item.group, []).append((number, item))
        self._blocks: dict[int, list[tuple[int, int]]] = {}
        self._recent, self._facts = _Recent(RECENT_BYTES), _Recent(FACTS_BYTES)
        self._reducing = threading.Lock()
        self._arithmetic = engine.arithmetic_bytes(plan, list(enumerate(plan.items)))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="unwritten")
        self._state = engine.State(
            plan, {}, engine.NoJournal(), _silent(), pool, threads, stop or threading.Event(), None, 0
        )

    def described(self, digests: Mapping[str, str]) -> Unwritten:
        """Return this, with headers of its files, once their digests are known."""
        behind = _headers_of(self.plan)
        self.headers = tuple(
            header_of_unwritten(
                self._place / shard.name, shard.header, shard.size, digests[shard.name], behind
            )
            for shard in self.layout.shards
        )
        return self

    # ---- reading -----------------------------------------------------------------------------------

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        info = self.tensors[name]
        carrier = DTYPES[info.dtype].carrier
        if carrier is None:
            raise InputError(
                "E307", f"{info.dtype} values cannot be read one by one", where=Where(str(info.file), tensor=printable(name)),
                help="use the checkpoint it was quantized from",
            )  # fmt: skip
        return self.read_bytes(name, start * carrier.itemsize, stop * carrier.itemsize).view(carrier)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return stored bytes [start, stop) of a tensor."""
        out = np.empty(stop - start, dtype=np.uint8)
        if not out.nbytes:
            return out
        begins = self._begins(name)
        first, last = bisect.bisect_right(begins, start) - 1, bisect.bisect_left(begins, stop)
        found = {ordinal: self._recent.get((name, ordinal)) for ordinal in range(first, last)}
        lacking = [ordinal for ordinal, data in found.items() if data is None]
        for ordinal, data in found.items():
            if data is not None:
                _put(out, start, data, begins[ordinal])
        for ordinal, (data, _) in zip(lacking, self._computed(name, lacking), strict=True):
            _put(out, start, data, begins[ordinal])
        return out

    def granularity(self, name: str) -> int:
        return 1  # as of a file: blocks of the next plan must not depend on how this one is computed

    def memory(self, name: str) -> int:
        """Return the bytes held beside a reader's blocks while a tensor is computed."""
        number = self._makers[name][0]
        longest = max(stop - start for start, stop in self._ranges(number))
        refs = self.plan.items[number].inputs
        views = [(getattr(self.plan.inputs[ref.model], "memory", None), ref.name) for ref in refs]
        inner = max((memory(name) for memory, name in views if memory is not None), default=0)
        return inner + self._state.threads * longest * item_bytes_per_element(
            self.plan, self.plan.items[number]
        )

    def kept_bytes(self, name: str) -> int:
        """Return the bytes that stay in memory after a tensor was read."""
        return RECENT_BYTES + FACTS_BYTES

    def close(self) -> None:
        """End the threads; nothing is read afterwards."""
        self._state.pool.shutdown(wait=True)
        self._recent.clear()
        self._facts.clear()

    # ---- computing ---------------------------------------------------------------------------------

    def seal(self, progress: engine.Progress | None = None) -> engine.RunResult:
        """Compute everything once, front to back; return what a run that wrote it would return.

        Raises:
            InputError: E321 non-finite input, E322 non-finite result, E334 an input changed.
            Interrupted: `stop` was set.
        """
        began = time.perf_counter()
        headers = _headers_of(self.plan)
        digester = self._state.digester = InputDigester(list(headers))
        digests: dict[str, str] = {}
        summaries: dict[str, Any] = {}
        done, total = 0, sum(info.nbytes for info in self.tensors.values())
        try:
            for shard in self.layout.shards:
                digest = hashlib.sha256(shard.header)
                for tensor in shard.tensors:
                    for data in self._sealed(tensor.name, summaries):
                        digest.update(data.data)
                        done += data.nbytes
                        if progress is not None:
                            progress(done, total)
                digests[shard.name] = digest.hexdigest()
            inputs = digester.finish()
            recheck(headers)  # last: the digests are of what was read, or the run has failed
        except BaseException:
            digester.stop()
            raise
        finally:
            self._state.digester = _silent()
        timing = self._state.timing
        timing.total = time.perf_counter() - began
        return engine.RunResult(
            {"": digests}, {str(p): d for p, d in inputs.items()}, {"": summaries}, timing
        )

    def _sealed(self, name: str, summaries: dict[str, Any]) -> Iterator[np.ndarray]:
        """Yield all blocks of a tensor, inputs checked; note what its task measured, under its first output."""
        number, t, o = self._makers[name]
        task = self.plan.items[number].tasks[t]
        measured: Any = None
        for data, part in self._computed(name, range(len(self._ranges(number))), check=True):
            if part is not None:
                measured = part if measured is None else measured + part
            yield data
        if o == 0:
            summary = task.operation.summary(self._reduced(number)[0][t], measured)
            if summary:
                summaries[name] = summary

    def _computed(
        self, name: str, ordinals: Sequence[int], *, check: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield the stored bytes of blocks of a tensor in order, each with what its task measured on it."""
        if not ordinals:
            return
        fused.prepare(self._arithmetic)  # the plan that reads may have little arithmetic of its own
        number, t, o = self._makers[name]
        item = self.plan.items[number]
        task, ranges = item.tasks[t], self._ranges(number)
        carried, checked = self._reduced(number)
        position = next((p for p, (n, _) in enumerate(self._groups.get(item.group, ())) if n == number), 0)

        def work(ordinal: int) -> tuple[np.ndarray, np.ndarray | None]:
            start, stop = ranges[ordinal]
            block = engine.load_block(
                self._state, item, start, stop, ordinal, position, check=check and not checked
            )
            encoded, part = engine.map_task(self._state, task, block, carried[t])
            flat = [np.ascontiguousarray(one).reshape(-1).view(np.uint8) for one in encoded]
            for output, data in zip(task.outputs, flat, strict=True):
                self._recent.put((output.name, ordinal), data, data.nbytes)
            return flat[o], part

        yield from engine.in_order(self._state, work, ordinals, inline=len(ordinals) == 1)

    def _reduced(self, number: int) -> tuple[list[Any], bool]:
        """Return what the reduce passes of an item, or of its group, gave; see `engine.reduce_unit`."""
        item = self.plan.items[number]
        unit = self._groups.get(item.group) or [(number, item)]
        if not any(task.operation.reduces() for _, one in unit for task in one.tasks):
            return [None] * max(len(one.tasks) for _, one in unit), False
        key = item.group or number
        with self._reducing:
            found = self._facts.get(key)
            if found is None:
                ranges = [self._ranges(n) for n, _ in unit]
                few = sum(map(len, ranges)) == 1
                found = engine.reduce_unit(self._state, unit, ranges, inline=few)
                self._facts.put(key, found, _held_bytes(found))
            return found

    def _ranges(self, number: int) -> list[tuple[int, int]]:
        found = self._blocks.get(number)
        if found is None:
            found = self._blocks[number] = blocks_of(self.plan, self.plan.items[number])
        return found

    def _begins(self, name: str) -> list[int]:
        """Return the first byte of every block of a tensor."""
        number, t, _ = self._makers[name]
        info = self.tensors[name]
        copies = self.plan.items[number].tasks[t].operation.copies
        width = 1 if copies else max(1, info.nbytes // max(1, info.elements))
        return [start * width for start, _ in self._ranges(number)]


def _put(out: np.ndarray, start: int, data: np.ndarray, begin: int) -> None:
    """Copy what overlaps of a block that begins at ``begin`` into the bytes from ``start`` on."""
    low, high = max(start, begin), min(start + out.nbytes, begin + data.nbytes)
    out[low - start : high - start] = data[low - begin : high - begin]


class _Recent:
    """What was used last, up to a number of bytes; the newest entry stays however large it is."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        with self._lock:
            old = self._entries.pop(key, None)
            self._held += size - (old[1] if old is not None else 0)
            self._entries[key] = (value, size)
            while self._held > self._limit and len(self._entries) > 1:
                self._held -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._held = 0


def _held_bytes(value: Any) -> int:
    """Return about how many bytes a result of reduce passes holds: its arrays."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_held_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_held_bytes, value))
    if is_dataclass(value):
        return sum(_held_bytes(getattr(value, field.name)) for field in fields(value))
    return 64


def _silent() -> InputDigester:
    """Return a digester of no files, its threads ended."""
    found = InputDigester([])
    found.stop()
    return found


def _headers_of(plan: Plan) -> tuple[Header, ...]:
    found: list[Header] = []
    for checkpoint in plan.inputs.values():
        found.extend(header for header in checkpoint.headers if header not in found)
    return tuple(found)
