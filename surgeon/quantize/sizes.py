"""Bytes and bits of a quantized model, exactly: laid out as it will be written, without a value being known."""

from __future__ import annotations

import json

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.formats import gguf_blocks
from surgeon.formats.scheme import Scheme
from surgeon.output.layout import lay_out
from surgeon.plan import OutputTensor
from surgeon.quantize.allocation.menus import KEPT
from surgeon.quantize.session import Schemes, Session
from surgeon.quantize.view import QuantizedView


def outline(session: Session, schemes: Schemes) -> QuantizedView:
    """Return the model as it will lie on disk, without values of what is quantized."""
    code = session.dtype if session.request.dtype else None
    return QuantizedView(session.checkpoint, (), schemes, others(session, schemes), session.form, code)


def others(session: Session, schemes: Schemes) -> tuple[str, ...]:
    """Return linear modules that no scheme is about: routers, the head where it stays."""
    linear = session.linear
    own = {m.tensor for m in linear.matrices} | ({linear.head.tensor} if linear.head else set())
    return (*linear.others, *(name.removesuffix(".weight") for name in sorted(own - schemes.keys())))


def outputs_of(view: Checkpoint) -> list[OutputTensor]:
    """Return the tensors a view is written as, in its order."""
    stored = getattr(view, "stored_dtype", lambda name: view.tensors[name].dtype)
    return [OutputTensor(name, stored(name), tuple(info.shape)) for name, info in view.tensors.items()]


def file_bytes(session: Session, schemes: Schemes) -> int:
    """Return the bytes of all weight files, headers included."""
    if not session.form.folder:
        return session.gguf_sizes.of(gguf_types(schemes))
    view = outline(session, schemes)
    return sum(shard.size for shard in lay_out(outputs_of(view), session.request.max_shard_size).shards)


def gguf_types(schemes: Schemes) -> dict[str, str]:
    """Return the types of llama.cpp that stand for schemes, of what is quantized."""
    kinds = {name: gguf_blocks.type_of(scheme) for name, scheme in schemes.items() if scheme is not None}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def matrix_bytes(
    session: Session, name: str, shape: tuple[int, ...], scheme: Scheme | None
) -> tuple[int, int]:
    """Return (bytes of a matrix, bytes of its entries in a header at most)."""
    if scheme is None:
        code, size = session.stored(name)
        return size, _entry(session.form.renamed(name), code, shape)
    parts = [
        OutputTensor(place, code, size) for place, code, size in session.form.layout(name, shape, scheme)
    ]
    return sum(o.nbytes for o in parts), sum(_entry(o.name, o.dtype, o.shape) for o in parts)


def word(scheme: Scheme | None) -> str:
    """Return the name of a scheme in menus."""
    return KEPT if scheme is None else scheme.name


def fixed_bytes(session: Session, counted: set[str]) -> int:
    """Return the bytes of all tensors no menu counts, an upper bound of their part in headers included."""
    if not session.form.folder:
        tensors = session.checkpoint.tensors
        return session.gguf_sizes.of() - sum(session.stored(name)[1] for name in counted if name in tensors)
    total = 0
    for name, info in session.checkpoint.tensors.items():
        if name not in counted:
            code, size = session.stored(name)
            total += size + _entry(session.form.renamed(name), code, tuple(info.shape))
    return total + 64 * (1 + total // session.request.max_shard_size)


def bits_of(session: Session, schemes: Schemes) -> float:
    """Return the bits per parameter of all matrices that may be quantized: codes, scales and those that stay."""
    size = parameters = 0
    for name, scheme in schemes.items():
        info = session.checkpoint.tensors[name]
        size += matrix_bytes(session, name, tuple(info.shape), scheme)[0]
        parameters += info.elements
    return 8 * size / parameters


def _entry(name: str, code: str, shape: tuple[int, ...]) -> int:
    """Return what a tensor takes in the header of a file at most: offsets have 20 digits at most."""
    body = {name: {"dtype": code, "shape": list(shape), "data_offsets": [10**15, 10**15]}}
    return len(json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()) + 1
