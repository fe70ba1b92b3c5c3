"""Writing a checkpoint as one GGUF file, tensor by tensor, published by a rename.

    written = write(checkpoint, Path("model.gguf"), dtype="bfloat16")

What goes where is decided in `gguf_layout`; the tokenizer in `gguf_tokenizer`. The file is laid out from
the header alone, then filled in blocks of rows, so memory stays small whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon import __version__
from surgeon.checkpoint.checkpoint import Checkpoint, recheck
from surgeon.checkpoint.digests import InputDigester
from surgeon.checkpoint.header import printable
from surgeon.deploy import gguf_layout
from surgeon.deploy.gguf_layout import GgufLayout, GgufTensor, Piece
from surgeon.deploy.gguf_tokenizer import GgufTokenizer, read_tokenizer
from surgeon.errors import EnvironmentFault, InputError, Interrupted, UsageError, Where
from surgeon.kernels.cast import bf16_bits, widen
from surgeon.output.disk import Disk
from surgeon.output.manifest import MANIFEST, SCHEMA, seal
from surgeon.output.staging import DestinationLock, check_destination, staging_prefix

ALIGNMENT = 32
BLOCK = 1 << 22
"""Elements read and converted together: 16 MB of float32."""

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2}


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
        dtype: type of matrices: float32, float16 or bfloat16. Norms and biases are float32 always.
        tokenizer: folder with the tokenizer; the checkpoint's own by default.
        name: the model's name in the file.
        overwrite: replace a file that exists.
        recipe: what made the model, for the manifest.
        progress: called with (bytes done, bytes).
        stop: set it to stop; nothing is left at the destination.

    Raises:
        UsageError: E285 an unknown type.
        InputError: E328 no graph of llama.cpp computes the model, or a value does not fit float16;
            E329 the tokenizer cannot be written.
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
        _header(path, layout, words, TYPES[dtype], name)
        tensors = _fill(path, checkpoint, layout, TYPES[dtype], disk, progress, stop)
        recheck(checkpoint.headers)
        digest, size = _digest(path)
        body = {
            "schema": SCHEMA, "program": {"name": "surgeon", "version": __version__}, "verb": "export", "format": "gguf",
            "architecture": layout.architecture, "dtype": dtype, "recipe": dict(recipe or {}),
            "inputs": {file.name: {"sha256": value} for file, value in sorted(digester.finish().items())},
            "tensors": tensors, "notes": [*layout.notes, *words.notes], "files": {destination.name: digest},
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
    return Written(destination, layout.architecture, digest, size, (*layout.notes, *words.notes))


def stored_bytes(layout: GgufLayout, dtype: str) -> int:
    """Return the bytes of all tensors of a file, padding included, for disk estimates."""
    return sum(_padded(_bytes(tensor, TYPES[dtype])) for tensor in layout.tensors)


def _type(tensor: GgufTensor, code: str) -> str:
    return (
        code if len(tensor.shape) > 1 else "F32"
    )  # llama.cpp multiplies norms and adds biases in float32 only


def _bytes(tensor: GgufTensor, code: str) -> int:
    return int(np.prod(tensor.shape)) * _WIDTH[_type(tensor, code)]


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _header(path: Path, layout: GgufLayout, words: GgufTokenizer, code: str, name: str) -> None:
    """Write everything before the first tensor's data."""
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentFault("E512", "gguf is not installed; it writes GGUF headers",
                               help='pip install "model-surgeon[gguf]"') from error  # fmt: skip
    writer = gguf.GGUFWriter(None, layout.architecture)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[code])
    for key, value in (*layout.keys.items(), *words.keys.items()):
        _add(writer, key, value)
    for tensor in layout.tensors:
        kind = getattr(gguf.GGMLQuantizationType, _type(tensor, code))
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), _bytes(tensor, code), raw_dtype=kind
        )
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
    path: Path, checkpoint: Checkpoint, layout: GgufLayout, code: str, disk: Disk,
    progress: Callable[[int, int], None] | None, stop: threading.Event | None,
) -> dict[str, str]:  # fmt: skip
    """Append the data of all tensors and sync; return sha256 by tensor."""
    total = sum(_padded(_bytes(tensor, code)) for tensor in layout.tensors)
    digests: dict[str, str] = {}
    place, done = _padded(path.stat().st_size), 0
    descriptor = disk.reopen(path)
    try:
        os.ftruncate(descriptor, place + total)
        for tensor in layout.tensors:
            digest = hashlib.sha256()
            start = place
            for values in _blocks(checkpoint, tensor):
                if stop is not None and stop.is_set():
                    raise Interrupted("E130", "stopped", help="run again; nothing was published")
                data = _encoded(values, _type(tensor, code), tensor.name)
                disk.write_at(descriptor, data, place)
                digest.update(data)
                place += len(data)
                done += len(data)
                if progress is not None:
                    progress(done, total)
            digests[tensor.name] = digest.hexdigest()
            place = start + _padded(place - start)
        disk.sync(descriptor)
    except OSError as error:
        raise EnvironmentFault(
            "E505", f"cannot write {printable(path.name)}: {error.strerror or error}", where=Where(str(path))
        ) from error
    finally:
        os.close(descriptor)
    return digests


def _blocks(checkpoint: Checkpoint, tensor: GgufTensor) -> Iterator[np.ndarray]:
    """Yield a tensor's values as float32, in order, a limited number at a time."""
    if tensor.values:
        yield np.asarray(tensor.values, dtype=np.float32)
    width = int(np.prod(tensor.shape[1:]))
    for piece in tensor.pieces:
        unit = piece.head_dim or 1
        rows = max(1, BLOCK // (width * unit)) * unit
        for first in range(0, piece.rows, rows):
            count = min(rows, piece.rows - first)
            if piece.source is None:
                yield np.full(count * width, piece.value, dtype=np.float32)
                continue
            code = checkpoint.tensors[piece.source].dtype
            raw = checkpoint.read(piece.source, first * width, (first + count) * width)
            values = widen(raw, code).astype(np.float32, copy=False)
            yield _turned(values, piece, width) if piece.head_dim else values


def _turned(values: np.ndarray, piece: Piece, width: int) -> np.ndarray:
    """Reorder whole heads from (first halves, second halves) of rotary pairs to neighbouring pairs."""
    return np.ascontiguousarray(values.reshape(-1, 2, piece.head_dim // 2, width).swapaxes(1, 2)).reshape(-1)


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
