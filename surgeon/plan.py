"""Plan: everything a run will do, known before a weight is read.

A family (merge, prune, quantize) ends its job by returning a Plan; `surgeon.engine` executes
any Plan. Names, types and shapes of every output tensor are in it, so files can be laid out,
disk and memory estimated, and a dry run answered from headers alone.

An Operation is a named function with picklable parameters: zero or more reduce passes over
blocks (mergeable state, merged in block order) and one map over blocks. The partition into
blocks is part of the plan, so threads, memory limits and resumption cannot change a bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.kernels import cast

BLOCK_ELEMENTS = 1 << 20
"""Elements per block. Part of every plan's identity: sums are merged in block order."""


@dataclass(frozen=True)
class TensorRef:
    """One tensor of one input: ``model`` is a key of `Plan.inputs`."""

    model: str
    name: str


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written. ``model`` addresses one of several output models ("" = the only one)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    model: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPES[self.dtype].bits // 8


class Block:
    """What an operation sees of its inputs at once.

    Attributes:
        raw: carrier arrays, one per input, all of the same elements [start, stop).
        codes: storage codes of ``raw``.
        start, stop: element range in the flattened tensor.
        ordinal: number of this block in the tensor.
        position: number of the tensor in its reduction group.
        shape: shape of the (first) output tensor.
        target: storage code of all outputs, "" when they differ; `Operation.map` may encode for it.
    """

    __slots__ = ("_values", "codes", "name", "ordinal", "position", "raw", "shape", "start", "stop", "target")

    def __init__(self, name, shape, raw, codes, start, stop, ordinal, position, target=""):
        self.name = name
        self.shape = shape
        self.raw = raw
        self.codes = codes
        self.start = start
        self.stop = stop
        self.ordinal = ordinal
        self.position = position
        self.target = target
        self._values: dict[tuple[int, str], np.ndarray] = {}

    @property
    def columns(self) -> int:
        """Length of one row; a 1-D tensor is one row."""
        return self.shape[-1] if self.shape else 1

    def value(self, index: int, work: str) -> np.ndarray:
        """Return input ``index`` rounded to working type ``work``, in its arithmetic type. Do not modify."""
        key = (index, work)
        cached = self._values.get(key)
        if cached is None:
            code = self.codes[index]
            cached = cast.widen(self.raw[index], code)
            if work == "F64":
                cached = cached.astype(np.float64, copy=False)
            elif code != work and work != "F32":
                cached = cast.round_to(cached, work)
            elif cached.dtype != np.float32:
                cached = cached.astype(np.float32)
            self._values[key] = cached
        return cached

    def values(self, work: str) -> list[np.ndarray]:
        return [self.value(i, work) for i in range(len(self.raw))]


class Operation(Protocol):
    """The arithmetic of one work item.

    Class attributes:
        name, version: identity; the version changes whenever results change for equal input.
        unit: "element" (any block), "row" (blocks hold whole rows), "whole" (one block).
        scratch: extra bytes per element per thread beyond raw inputs and the output.
        copies: True when stored bytes are passed on untouched (any type allowed).
    """

    name: str = ""
    version: int = 1
    unit: str = "element"
    scratch: int = 16
    copies: bool = False

    def reduces(self) -> int:
        """Number of reduce passes."""
        return 0

    def reduce(self, step: int, block: Block, carried: Any) -> Any:
        """Return this block's state of pass ``step``; ``carried`` is what the pass before gave."""
        raise AssertionError("an operation without reduce passes was reduced")

    def merge(self, step: int, left: Any, right: Any) -> Any:
        """Merge two states; ``left`` comes before ``right``."""
        return left + right

    def finish(self, step: int, state: Any, carried: Any, elements: int) -> Any:
        """Turn the merged state of a pass over ``elements`` elements into what later passes need."""
        return state

    def map(self, block: Block, carried: Any) -> list[np.ndarray]:
        """Return one array per output: float values, or carrier values when already encoded."""
        ...

    def measure(self, block: Block, results: list[np.ndarray], carried: Any) -> np.ndarray | None:
        """Return float64 sums over what ``map`` just made, for `summary`; never influences results."""
        return None

    def summary(self, carried: Any, measured: np.ndarray | None) -> dict[str, Any] | None:
        """Return facts about the finished item for reports, or None. ``measured`` is summed over blocks."""
        return None


@dataclass(frozen=True)
class Task:
    """One operation and the outputs it makes. Several tasks of an item share one read of its inputs."""

    operation: Operation
    outputs: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class WorkItem:
    """Smallest unit of work: inputs read together, and what is made of them.

    ``group``: items of one group share each reduce pass (``scope: layer`` or ``global``).
    Empty = the item is its own group.
    """

    inputs: tuple[TensorRef, ...]
    tasks: tuple[Task, ...]
    group: str = ""


@dataclass(frozen=True)
class Companion:
    """A file beside the weights: its final content."""

    name: str
    content: bytes


@dataclass(frozen=True)
class OutputModel:
    """One model folder or file to be written."""

    key: str
    config: dict[str, Any] | None
    companions: tuple[Companion, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A complete run.

    Attributes:
        verb: "merge", "prune", ...
        inputs: key -> Checkpoint, in a fixed order.
        items: in execution order.
        models: output models by key.
        recipe: the resolved request as plain data; enters the plan id.
        seed: seed of random methods.
        notes, warnings: sentences for the user.
    """

    verb: str
    inputs: Mapping[str, Checkpoint]
    items: tuple[WorkItem, ...]
    models: Mapping[str, OutputModel]
    recipe: dict[str, Any]
    seed: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    max_shard_bytes: int = 5_000_000_000
    allow_nonfinite: bool = False

    def outputs(self) -> dict[str, list[OutputTensor]]:
        """Return output tensors by model key, in item order."""
        found: dict[str, list[OutputTensor]] = {key: [] for key in self.models}
        for item in self.items:
            for task in item.tasks:
                for output in task.outputs:
                    found[output.model].append(output)
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the plan, by part, so that a mismatch can be named (ruling: plan id)."""
        operations = hashlib.sha256()
        for item in self.items:
            operations.update(_canonical(item).encode())
        return {
            "verb": self.verb,
            "recipe": _digest(self.recipe),
            "inputs": {k: [h.sha256 for h in c.headers] for k, c in self.inputs.items()},
            # What a view computes with beside its files: an adapter's scale, the rows of a vocabulary.
            "views": {k: getattr(c, "identity", "") for k, c in self.inputs.items()},
            "operations": operations.hexdigest(),
            "models": {
                key: _digest(
                    [
                        model.config,
                        [(c.name, hashlib.sha256(c.content).hexdigest()) for c in model.companions],
                    ]
                )
                for key, model in self.models.items()
            },
            "seed": self.seed,
            "max_shard_bytes": self.max_shard_bytes,
            "block_elements": BLOCK_ELEMENTS,
        }

    def plan_id(self) -> str:
        """Return the sha256 over the fingerprint."""
        return _digest(self.fingerprint())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _canonical(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        body = ",".join(f"{f.name}={_canonical(getattr(value, f.name))}" for f in fields(value))
        version = getattr(value, "version", "")
        return f"{type(value).__name__}{version}({body})"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_canonical(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_canonical(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)


def partition(shape: tuple[int, ...], unit: str, granularity: int) -> list[tuple[int, int]]:
    """Cut a tensor into element ranges; borders respect the unit and the inputs' granularity."""
    elements = math.prod(shape)
    if elements == 0 or unit == "whole":
        return [(0, elements)]
    align = max(1, granularity)
    if unit == "row":
        align = math.lcm(align, shape[-1] if shape else 1)
    step = max(align, BLOCK_ELEMENTS // align * align)
    return [(start, min(start + step, elements)) for start in range(0, elements, step)]


def is_byte_copy(item: WorkItem) -> bool:
    """Return True when an item passes stored bytes on; its ranges then count bytes."""
    return all(task.operation.copies for task in item.tasks)


def blocks_of(plan: Plan, item: WorkItem) -> list[tuple[int, int]]:
    """Return the ranges an item is worked in: elements, or bytes for a byte copy."""
    if is_byte_copy(item):
        return partition((item.tasks[0].outputs[0].nbytes,), "element", 8 * BLOCK_ELEMENTS)
    units = {task.operation.unit for task in item.tasks}
    unit = "whole" if "whole" in units else "row" if "row" in units else "element"
    granularity = 1
    for ref in item.inputs:
        granularity = math.lcm(granularity, plan.inputs[ref.model].granularity(ref.name))
    return partition(item.tasks[0].outputs[0].shape, unit, granularity)


@dataclass(frozen=True)
class Estimate:
    """What a run will need, from headers alone."""

    read_bytes: int
    write_bytes: int
    disk_bytes: int
    memory_bytes: int
    largest_item: str
    passes: int


BASELINE_BYTES = 160_000_000
"""Interpreter, NumPy and compiled kernels, measured on Linux x86-64 (docs/explanation)."""


def estimate(plan: Plan, threads: int) -> Estimate:
    """Return bytes to read (all passes), to write, and the peak memory with ``threads`` workers."""
    read = write = 0
    worst = 0
    worst_name = ""
    passes = 1
    beside = kept = 0  # what views hold while they compute a tensor (low-rank factors), and afterwards
    for item in plan.items:
        steps = 1 + max(task.operation.reduces() for task in item.tasks)
        passes = max(passes, steps)
        for ref in item.inputs:
            read += steps * plan.inputs[ref.model].tensors[ref.name].nbytes
        views: list[tuple[Any, str]] = [
            (v, r.name) for r in item.inputs if hasattr(v := plan.inputs[r.model], "memory")
        ]
        beside = max(beside, sum(v.memory(name) for v, name in views))
        kept = max(kept, sum(v.kept_bytes(name) for v, name in views))
        for task in item.tasks:
            write += sum(o.nbytes for o in task.outputs)
        ranges = blocks_of(plan, item)
        longest = max(stop - start for start, stop in ranges)
        need = longest * item_bytes_per_element(plan, item)
        if need > worst:
            worst, worst_name = need, item.tasks[0].outputs[0].name
    extras = sum(len(c.content) for model in plan.models.values() for c in model.companions)
    disk = int((write + extras) * 1.02) + 8_000_000
    memory = BASELINE_BYTES + worst * threads + beside * min(threads, 2) + kept
    return Estimate(read, write, disk, memory, worst_name, passes)


def item_bytes_per_element(plan: Plan, item: WorkItem) -> int:
    """Return bytes per element one worker holds: raw inputs, their float copies, scratch, outputs."""
    raw = sum(DTYPES[plan.inputs[r.model].tensors[r.name].dtype].bits // 8 or 1 for r in item.inputs)
    if is_byte_copy(item):
        return 2
    wide = 4 * len(item.inputs)
    return raw + wide + max(task.operation.scratch for task in item.tasks) + 8 * len(item.tasks)
