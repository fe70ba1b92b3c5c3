"""Runs a merge method over arrays in memory, pass by pass as the engine does."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgeon import plan
from surgeon.kernels import cast
from surgeon.merge.method import Binding
from surgeon.merge.methods import catalogue
from surgeon.plan import Block, Operation

Arrays = Sequence[np.ndarray]


def raw_of(values: np.ndarray, code: str) -> np.ndarray:
    """Return values in the carrier type of a storage code (bfloat16 as uint16)."""
    wide = np.asarray(values, dtype=np.float64 if code == "F64" else np.float32)
    return cast.narrow(wide.reshape(-1), code).reshape(wide.shape)  # kernels see 1-D blocks


def values_of(raw: np.ndarray, code: str) -> np.ndarray:
    return cast.widen(raw, code)


def bind(
    method: str,
    shape: tuple[int, ...],
    count: int,
    *,
    base: int | None = 0,
    shared: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    work: str = "F32",
    seed: int = 0,
    native: bool = True,
    stored: str | None = None,
    name: str = "model.layers.0.mlp.up_proj.weight",
) -> Operation:
    """Bind a method with its mergekit defaults filled in, and prove that the operation pickles."""
    found = catalogue(method)
    filled = {p.name: p.default for p in found.parameters if not p.per_model}
    filled.update(shared or {})
    per_model: list[dict[str, Any]] = []
    given = iter(each or [{}] * count)
    for i in range(count):
        values = {
            p.name: p.default
            for p in found.parameters
            if p.per_model and (p.every_input or i != base) and p.default is not None
        }
        if i != base or any(p.every_input for p in found.parameters):
            values.update(next(given, {}))
        per_model.append(values)
    for parameter in found.parameters:
        parameter.check(filled.get(parameter.name), method)
    operation = found.bind(
        Binding(
            name=name,
            shape=shape,
            count=count,
            base=base,
            shared=filled,
            each=tuple(per_model),
            work=work,
            ordinals=tuple(range(count)),
            input_names=(name,) * count,
            seed=seed,
            native=native,
            stored=stored or work,
        )
    )
    return pickle.loads(pickle.dumps(operation))


def execute(
    operation: Operation,
    tensors: Sequence[Arrays],
    code: str,
    *,
    out: str | None = None,
    block: int | None = None,
) -> tuple[list[np.ndarray], list[dict[str, Any] | None]]:
    """Run one operation over a reduction group: ``tensors[position][input]``, carrier arrays of one type.

    Returns:
        One carrier array of type ``out`` for each tensor, and the summaries.
    """
    out = out or code
    before = plan.BLOCK_ELEMENTS
    plan.BLOCK_ELEMENTS = block or before
    try:
        spans = [plan.partition(inputs[0].shape, operation.unit, 1) for inputs in tensors]
    finally:
        plan.BLOCK_ELEMENTS = before

    def load(position: int, ordinal: int) -> Block:
        start, stop = spans[position][ordinal]
        inputs = tensors[position]
        raw = [x.reshape(-1)[start:stop] for x in inputs]
        for part in raw:
            part.flags.writeable = False
        return Block("t", inputs[0].shape, raw, [code] * len(inputs), start, stop, ordinal, position)

    carried: Any = None
    elements = sum(math.prod(inputs[0].shape) for inputs in tensors)
    for step in range(operation.reduces()):
        merged: Any = None
        for position in range(len(tensors)):
            for ordinal in range(len(spans[position])):
                state = pickle.loads(pickle.dumps(operation.reduce(step, load(position, ordinal), carried)))
                merged = state if merged is None else operation.merge(step, merged, state)
        carried = operation.finish(step, merged, carried, elements)
    results, summaries = [], []
    for position, inputs in enumerate(tensors):
        parts, measured = [], None
        for ordinal in range(len(spans[position])):
            loaded = load(position, ordinal)
            (result,) = operation.map(loaded, carried)
            encoded = result if operation.copies or result.dtype.kind in "uib" else cast.narrow(result, out)
            assert encoded.shape == loaded.raw[0].shape
            parts.append(encoded)
            sums = operation.measure(loaded, [encoded], carried)
            measured = sums if measured is None else measured + sums
        summaries.append(operation.summary(carried, measured))
        results.append(np.concatenate(parts).reshape(inputs[0].shape))
    return results, summaries


def merge(
    method: str,
    inputs: Arrays,
    code: str = "F32",
    *,
    out: str | None = None,
    block: int | None = None,
    work: str | None = None,
    **binding: Any,
) -> np.ndarray:
    """Merge one tensor given as carrier arrays; returns a carrier array of type ``out`` (default: the input's)."""
    operation = bind(method, inputs[0].shape, len(inputs), work=work or code, stored=out or code, **binding)
    return execute(operation, [inputs], code, out=out, block=block)[0][0]
