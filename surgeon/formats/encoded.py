"""What every quantized way of storing a matrix offers: its plain name and shape, and its values, range by range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.formats.scheme import Scheme
from surgeon.kernels.cast import narrow, round_to, widen
from surgeon.traits import text_section

CHUNK = 1 << 18
"""Values worked on at once, so that intermediate float32 stays in a core's cache."""

BLOCK = 1 << 22
"""Values a read should have where every read has to pass over all packed bytes."""

STRIP = 1 << 20
"""Packed bytes read at once by such a pass."""

BIAS = 127
"""Of an exponent stored in a byte of its own (E8M0 in the OCP microscaling formats 1.0): 2**(byte - 127)."""


class Encoded(Protocol):
    """A matrix, or a stack of them, that is stored quantized.

    Attributes:
        name: what a plain model calls it.
        shape: what a plain model gives it.
        dtype: storage type its values are rounded to, which is what readers of the format compute with.
        parts: the stored tensors it is made of, the payload first.
        granularity: elements that are cheapest to read together.
        beside: bytes held while a range is read, beside what is returned.
        scheme: how its numbers are stored.
        words: the same for a reader of tables.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def granularity(self) -> int: ...
    @property
    def beside(self) -> int: ...
    @property
    def scheme(self) -> Scheme: ...
    @property
    def words(self) -> str: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened tensor, in the carrier type of ``dtype``."""
        ...


Config = Mapping[str, Any]
"""quantization_config of config.json, empty when there is none."""


@dataclass(frozen=True)
class Format:
    """One quantized way of storing weights.

    Attributes:
        name: for messages and notes.
        methods: values of ``quant_method`` in config.json under which it is found.
        find: yields everything of a checkpoint that is stored this way, recognised by names and types.
    """

    name: str
    methods: frozenset[str]
    find: Callable[[Checkpoint, Config], Iterator[Encoded]]


def plain_dtype(checkpoint: Checkpoint, scales: str) -> str:
    """Return the type that values take which are multiplied by some scales: theirs if it has 16 bits, else bfloat16.

    Scales of float32 alone do not tell: FP8 blocks of bfloat16 models have them. A model that says it is float32 has its
    values so, too; one that says nothing is what its other tensors are.
    """
    held = checkpoint.tensors[scales].dtype
    if held != "F32":
        return "F16" if held == "F16" else "BF16"
    config = checkpoint.config or {}
    said = {
        section.get(key) for section in (config, text_section(config)) for key in ("dtype", "torch_dtype")
    }
    if said - {None}:
        return "F32" if said - {None} == {"float32"} else "BF16"
    plain = {
        info.dtype for name, info in checkpoint.tensors.items() if "scale" not in name.rpartition(".")[2]
    }
    return "F32" if "F32" in plain and not plain & {"BF16", "F16"} else "BF16"


def numbers(checkpoint: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
    """Return elements [start, stop) of a tensor of scales as float32; single bytes are exponents (E8M0).

    A view that computes hands over values that were not rounded yet: they are rounded as a written model's would be.
    """
    code = checkpoint.tensors[name].dtype
    raw = checkpoint.read(name, start, stop)
    if code in ("U8", "F8_E8M0"):
        return exponents(raw)
    return round_to(widen(raw, code), code).astype(np.float32, copy=False)


def exponents(raw: np.ndarray) -> np.ndarray:
    """Return 2**(byte - 127) for bytes, float32; 255 stands for no number."""
    powers = np.ldexp(np.ones(256, np.float64), np.arange(256) - BIAS)
    powers[255] = np.nan
    return powers.astype(np.float32)[raw]


def row_chunks(
    shape: tuple[int, ...], dtype: str, start: int, stop: int, rows: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """Return elements [start, stop) of a tensor, made from whole rows, a few at a time.

    Args:
        shape: of the tensor; rows run along the last axis.
        rows: (first, last) -> float32 [last - first, columns] of the tensor flattened to two axes.
    """
    width = shape[-1]
    out = np.empty(stop - start, dtype=DTYPES[dtype].carrier)
    first, end = start // width, -(-stop // width)
    step = max(1, CHUNK // width)
    for row in range(first, end, step):
        last = min(row + step, end)
        low, high = max(start, row * width), min(stop, last * width)
        values = rows(row, last).reshape(-1)[low - row * width : high - row * width]
        out[low - start : high - start] = narrow(values, dtype)
    return out


def strips(
    checkpoint: Checkpoint, name: str, offset: int, rows: int, width: int, whole: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, [some rows, width]) over a part of a stored tensor, `STRIP` bytes at a time.

    For formats that store a matrix the other way round than a plain model: every read needs some columns of all rows.

    Args:
        offset: elements before the part.
        rows, width: of the part.
        whole: rows that belong together; strips begin at a multiple of it.
    """
    carrier = DTYPES[checkpoint.tensors[name].dtype].carrier
    assert carrier is not None
    step = max(whole, STRIP // (width * carrier.itemsize) // whole * whole)
    for row in range(0, rows, step):
        last = min(row + step, rows)
        yield row, checkpoint.read(name, offset + row * width, offset + last * width).reshape(-1, width)


def group_sizes(config: Config, inputs: int, groups: int) -> int | None:
    """Return how many inputs share a scale, None when no size gives that many groups.

    A size that config.json names and that fits wins, because a last group may be smaller than the others.
    """
    entries = [config.get("group_size")]
    tables = config.get("config_groups")
    for table in tables.values() if isinstance(tables, dict) else ():
        weights = table.get("weights") if isinstance(table, dict) else None
        entries.append(weights.get("group_size") if isinstance(weights, dict) else None)
    for size in entries:
        if isinstance(size, int) and size > 0 and -(-inputs // size) == groups:
            return size
    return inputs // groups if groups and inputs % groups == 0 else None


def groups_of(checkpoint: Checkpoint, order: str | None, inputs: int, groups: int, size: int) -> np.ndarray:
    """Return the group of every input, int64 [inputs]: as stored, or by their size.

    Raises:
        InputError: E446 a stored number of no group.
    """
    if order is None:
        return np.arange(inputs) // size
    found = checkpoint.read(order, 0, inputs).astype(np.int64)
    if inputs and not (found.min() >= 0 and found.max() < groups):
        raise InputError(
            "E446", f"{printable(order)} of {checkpoint.label} speaks of group {int(found.max())}; there are {groups}",
            where=Where(checkpoint.label, tensor=printable(order)), help="the model is damaged",
        )  # fmt: skip
    return found


def misfit(checkpoint: Checkpoint, name: str, other: str) -> NoReturn:
    """Refuse a part of a quantized tensor whose shape does not fit another part.

    Raises:
        InputError: E446.
    """
    one, two = checkpoint.tensors[name], checkpoint.tensors[other]
    raise InputError(
        "E446", f"{printable(other)} of {checkpoint.label} ({two.dtype}, {list(two.shape)}) does not fit {printable(name)} "
        f"({one.dtype}, {list(one.shape)})",
        where=Where(checkpoint.label, tensor=printable(other)),
        help="the model is damaged, or its quantization_config belongs to another",
    )  # fmt: skip


def missing(checkpoint: Checkpoint, name: str, other: str) -> NoReturn:
    """Refuse a quantized tensor that lacks a part.

    Raises:
        InputError: E446.
    """
    raise InputError(
        "E446", f"{checkpoint.label} stores {printable(name)} quantized, without {printable(other)}",
        where=Where(checkpoint.label, tensor=printable(name)), help="a shard is missing, or a conversion left it out",
    )  # fmt: skip


def unreadable(checkpoint: Checkpoint, name: str | None, why: str) -> InputError:
    """Return the refusal of a quantized model in a form that is not read here: E445."""
    return InputError(
        "E445", f"{checkpoint.label} is quantized in a form that cannot be read as plain numbers here: {why}",
        where=Where(checkpoint.label, tensor=printable(name) if name else None),
        help="use the model it was made from, or one stored as FP8, NVFP4, MXFP4, GPTQ, auto-round, AWQ, bitsandbytes or compressed-tensors integers",
    )  # fmt: skip
