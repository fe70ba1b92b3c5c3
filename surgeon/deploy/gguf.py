"""Writing a checkpoint as one GGUF file, tensor by tensor, published by a rename.

    written = write(checkpoint, Path("model.gguf"), dtype="bfloat16")

What goes where is decided in `gguf_layout`; the tokenizer in `gguf_tokenizer`. The file is laid out from
the header alone, then filled in blocks of rows, so memory stays small whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from surgeon import __version__
from surgeon.checkpoint.checkpoint import Checkpoint, recheck
from surgeon.checkpoint.digests import InputDigester
from surgeon.checkpoint.header import printable
from surgeon.deploy import gguf_layout
from surgeon.deploy.gguf_rows import Rows
from surgeon.deploy.gguf_tensors import GgufLayout, GgufTensor, Piece, padded, tensor_bytes, types_of
from surgeon.deploy.gguf_tokenizer import GgufTokenizer, read_tokenizer
from surgeon.errors import EnvironmentFault, InputError, Interrupted, UsageError, Where
from surgeon.formats import gguf_blocks
from surgeon.kernels.cast import bf16_bits, widen
from surgeon.output.disk import Disk
from surgeon.output.manifest import MANIFEST, SCHEMA, seal
from surgeon.output.staging import DestinationLock, check_destination, staging_prefix

BLOCK = 1 << 22
"""Elements read and converted together: 16 MB of float32."""

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Written:
    """A finished file: where, llama.cpp's architecture, sha256, bytes, and what the user should know."""

    path: Path
    architecture: str
    sha256: str
    bytes: int
    notes: tuple[str, ...]


def write(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    dtype: str = "bfloat16",
    tokenizer: Path | None = None,
    name: str = "model",
    quantized: Mapping[str, Rows] = EMPTY,
    verb: str = "export",
    overwrite: bool = False,
    recipe: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
    disk: Disk | None = None,
) -> Written:
    """Write a GGUF file, and NAME.gguf.surgeon.json beside it with the digests of inputs, tensors and file.

    Args:
        checkpoint: a model of one of `gguf_layout.FAMILIES`, uniform or with ``block_configs``.
        destination: the file.
        dtype: type of matrices: float32, float16 or bfloat16. Norms, biases and routers are float32 always.
        tokenizer: folder with the tokenizer; the checkpoint's own by default.
        name: the model's name in the file.
        quantized: matrix of the checkpoint -> its blocks, from `surgeon.deploy.gguf_rows`.
        verb: of the command that writes, for the manifest.
        overwrite: replace a file that exists.
        recipe: what made the model, for the manifest.
        progress: called with (bytes done, bytes).
        stop: set it to stop; nothing is left at the destination.

    Raises:
        UsageError: E285 an unknown type.
        InputError: E328 no graph of llama.cpp computes the model, or a value does not fit float16;
            E329 the tokenizer cannot be written; E466, E467 a matrix cannot have its type.
        OutputConflict, EnvironmentFault: the destination; E512 gguf is not installed.
    """
    disk = disk or Disk()
    if dtype not in TYPES:
        raise UsageError(
            "E285",
            f"{printable(dtype)!r} is not a type to write GGUF matrices in",
            help="use " + ", ".join(TYPES),
        )
    layout = gguf_layout.plan(checkpoint)
    types = types_of(layout, TYPES[dtype], {matrix: rows.kind for matrix, rows in quantized.items()})
    notes = () if quantized else layout.notes
    assert checkpoint.config is not None
    folder = tokenizer or checkpoint.folder
    if folder is None:
        raise InputError("E329", f"{checkpoint.label} has no folder with a tokenizer", where=Where(checkpoint.label),
                         help="name one: a GGUF file holds its tokenizer")  # fmt: skip
    words = read_tokenizer(folder, int(checkpoint.config["vocab_size"]))
    check_destination(
        destination, [header.file for header in checkpoint.headers], overwrite=overwrite, is_file=True
    )
    lock = DestinationLock.acquire(destination)
    staging = destination.with_name(f"{staging_prefix(destination)}{secrets.token_hex(6)}")
    digester = InputDigester(list(checkpoint.headers))
    try:
        disk.make_folder(staging)
        path = staging / destination.name
        _header(path, layout, words, types, name, file_type(layout, types, TYPES[dtype]))
        tensors = _fill(path, checkpoint, layout, types, quantized, disk, progress, stop)
        recheck(checkpoint.headers)
        digest, size = _digest(path)
        body = {
            "schema": SCHEMA, "program": {"name": "surgeon", "version": __version__}, "verb": verb, "format": "gguf",
            "architecture": layout.architecture, "dtype": dtype, "types": counted(types), "recipe": dict(recipe or {}),
            "inputs": {file.name: {"sha256": value} for file, value in sorted(digester.finish().items())},
            "tensors": tensors, "notes": [*notes, *words.notes], "files": {destination.name: digest},
        }  # fmt: skip
        disk.write_file(
            staging / f"{destination.name}.{MANIFEST}", seal((json.dumps(body, indent=2) + "\n").encode())
        )
        disk.sync_folder(staging)
        for file in (
            f"{destination.name}.{MANIFEST}",
            destination.name,
        ):  # the model last: its arrival is the commit
            disk.rename(staging / file, destination.parent / file)
        disk.sync_folder(destination.parent)
    finally:
        digester.stop()
        if staging.exists():
            disk.remove_tree(staging)
        lock.release()
    return Written(destination, layout.architecture, digest, size, (*notes, *words.notes))


def counted(types: Mapping[str, str]) -> dict[str, int]:
    """Return type -> tensors."""
    kinds = list(types.values())
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


class Sizes:
    """Bytes of a file before it is written, to the byte, for any choice of types.

    Args:
        layout: of the model.
        words: its tokenizer.
        dtype: type of matrices that stay plain.
        name: the model's name in the file.
    """

    def __init__(self, layout: GgufLayout, words: GgufTokenizer, dtype: str, name: str) -> None:
        self._layout, self._dtype = layout, dtype
        with tempfile.TemporaryDirectory() as folder:  # what is before the data has one size for all types
            path = Path(folder) / "header"
            _header(path, layout, words, types_of(layout, TYPES[dtype], {}), name)
            self.header = padded(path.stat().st_size)

    def of(self, quantized: Mapping[str, str] = EMPTY) -> int:
        """Return the size of the file when matrices of the checkpoint have these types, as `write` makes it."""
        kinds = types_of(self._layout, TYPES[self._dtype], quantized)
        return self.header + sum(
            padded(tensor_bytes(tensor, kinds[tensor.name])) for tensor in self._layout.tensors
        )


def file_type(layout: GgufLayout, types: Mapping[str, str], plain: str) -> int:
    """Return ``general.file_type``: the quantized type most weights have, else that of plain matrices."""
    counts: dict[str, int] = {}
    for tensor in layout.tensors:
        if types[tensor.name] in gguf_blocks.QUANTIZED:
            counts[types[tensor.name]] = counts.get(types[tensor.name], 0) + math.prod(tensor.shape)
    return gguf_blocks.TYPES[max(sorted(counts), key=counts.__getitem__, default=plain)].file_type


def _header(
    path: Path, layout: GgufLayout, words: GgufTokenizer, types: Mapping[str, str], name: str, file: int = 0
) -> None:
    """Write everything before the first tensor's data."""
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentFault("E512", "gguf is not installed; it writes GGUF headers",
                               help='pip install "model-surgeon[gguf]"') from error  # fmt: skip
    writer = gguf.GGUFWriter(None, layout.architecture)
    writer.add_name(name)
    writer.add_file_type(file)
    writer.add_quantization_version(gguf_blocks.QUANTIZATION_VERSION)
    for key, value in (*layout.keys.items(), *words.keys.items()):
        _add(writer, key, value)
    for tensor in layout.tensors:
        kind = getattr(gguf.GGMLQuantizationType, types[tensor.name])
        size = tensor_bytes(tensor, types[tensor.name])
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.flush()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _fill(
    path: Path, checkpoint: Checkpoint, layout: GgufLayout, types: Mapping[str, str], quantized: Mapping[str, Rows],
    disk: Disk, progress: Callable[[int, int], None] | None, stop: threading.Event | None,
) -> dict[str, str]:  # fmt: skip
    """Append the data of all tensors and sync; return sha256 by tensor."""
    total = sum(padded(tensor_bytes(tensor, types[tensor.name])) for tensor in layout.tensors)
    digests: dict[str, str] = {}
    place, done = padded(path.stat().st_size), 0
    descriptor = disk.reopen(path)
    try:
        os.ftruncate(descriptor, place + total)
        for tensor in layout.tensors:
            digest = hashlib.sha256()
            start = place
            for data in _blocks(checkpoint, tensor, types[tensor.name], quantized):
                if stop is not None and stop.is_set():
                    raise Interrupted("E130", "stopped", help="run again; nothing was published")
                disk.write_at(descriptor, data, place)
                digest.update(data)
                place += len(data)
                done += len(data)
                if progress is not None:
                    progress(done, total)
            if place - start != tensor_bytes(tensor, types[tensor.name]):
                raise AssertionError(f"{place - start} bytes of {tensor.name}")
            digests[tensor.name] = digest.hexdigest()
            place = start + padded(place - start)
        disk.sync(descriptor)
    except OSError as error:
        raise EnvironmentFault(
            "E505",
            f"cannot write {printable(path.name)}: {error.strerror or error}",
            where=Where(str(path)),
            help="free disk space, or choose another -o",
        ) from error
    finally:
        os.close(descriptor)
    return digests


def _blocks(
    checkpoint: Checkpoint, tensor: GgufTensor, kind: str, quantized: Mapping[str, Rows]
) -> Iterator[bytes]:
    """Yield a tensor's data, in order, a limited number of rows at a time."""
    if tensor.values:
        yield _encoded(np.asarray(tensor.values, dtype=np.float32), kind, tensor.name)
    width = tensor.columns
    for piece in tensor.pieces:
        unit = piece.head_dim or 1
        rows = max(1, BLOCK // (width * unit)) * unit
        for first in range(0, piece.rows, rows):
            last = min(first + rows, piece.rows)
            blocks = quantized.get(piece.source or "")
            if blocks is not None:
                data = blocks.read(first, last)
                yield (_turned(data, piece) if piece.head_dim else data).tobytes()
                continue
            if piece.source is None:
                values = np.full((last - first, width), piece.value, dtype=np.float32)
            else:
                code = checkpoint.tensors[piece.source].dtype
                raw = checkpoint.read(piece.source, first * width, last * width)
                values = widen(raw, code).astype(np.float32, copy=False).reshape(-1, width)
            yield _encoded(_turned(values, piece) if piece.head_dim else values, kind, tensor.name)


def _turned(rows: np.ndarray, piece: Piece) -> np.ndarray:
    """Reorder rows of whole heads, values or blocks, from (first halves, second halves) of rotary pairs to neighbouring pairs."""
    heads = rows.reshape(-1, 2, piece.head_dim // 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def _encoded(values: np.ndarray, code: str, name: str) -> bytes:
    if code == "BF16":
        bits: np.ndarray = bf16_bits(values)
    elif code == "F16":
        with np.errstate(over="ignore"):
            bits = values.astype(np.float16)
        if np.isinf(bits).any() and not np.isinf(values).any():
            raise InputError("E328", f"{name} holds values beyond the range of float16", where=Where(tensor=name),
                             help="write bfloat16 or float32")  # fmt: skip
    else:
        bits = values
    return bits.tobytes()


def _digest(path: Path) -> tuple[str, int]:
    """Read the file back and return its sha256 and size."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(BLOCK):
            digest.update(chunk)
        return digest.hexdigest(), stream.tell()
