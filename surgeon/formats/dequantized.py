"""A quantized model as a Checkpoint of plain numbers, decoded while it is read.

    for a pass over layers, a comparison, statistics:    runnable(checkpoint)
    for a command that was given --dequantize, or not:   permitted(checkpoint, dequantize)

Every quantized matrix appears under its plain name and in its plain shape, rounded to the 16-bit type its readers
compute with, which is what the stock library holds in memory after dequantizing; scales and packed values are gone,
everything else is as stored. Ranges are decoded on their own: no matrix is held as a whole. Names that auto-round's readers
want are those of the hub again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from surgeon import architectures
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import CONFIG_NAMES, DTYPES
from surgeon.checkpoint.header import TensorInfo, printable
from surgeon.errors import InputError, Where
from surgeon.formats import (
    auto_round,
    awq,
    bnb_stored,
    compressed_integers,
    float4_packed,
    fp8_block,
    gptq,
    mxfp4,
)
from surgeon.formats.encoded import Config, Encoded, Format, unreadable
from surgeon.traits import quantized, text_section

FORMATS: tuple[Format, ...] = (
    fp8_block.FORMAT,
    mxfp4.FORMAT,
    gptq.FORMAT,
    awq.FORMAT,
    bnb_stored.FORMAT,
    compressed_integers.FORMAT,
    float4_packed.FORMAT,
)
SECTIONS = ("quantization_config", "compression_config")

_ACTIVATIONS = re.compile(
    r"(\.|_)(input_scale|input_zero_point|input_global_scale|output_scale|activation_scale|[qkv]_scale|[kv]_zero_point|kv_scale)$"
)
"""Names of what quantizes activations and caches, which a plain model does not."""


def runnable(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as it can be run: itself when it holds plain numbers, else what `dequantized` gives.

    Raises:
        InputError: as `dequantized`.
    """
    return checkpoint if quantized(checkpoint) is None else dequantized(checkpoint)


def permitted(checkpoint: Checkpoint, dequantize: bool) -> Checkpoint:
    """Return a model as a command works on it: as it is, or as plain numbers where that was asked for.

    Args:
        checkpoint: as opened.
        dequantize: whether the user permits it (``--dequantize``); plain models are returned as they are.

    Raises:
        InputError: as `dequantized`.
    """
    return runnable(checkpoint) if dequantize else checkpoint


def plain_needed(checkpoint: Checkpoint, why: str) -> InputError:
    """Return the refusal of a quantized model by a command that needs plain numbers: E311.

    Args:
        checkpoint: a quantized model.
        why: "merging needs plain weights".
    """
    name = quantized(checkpoint)
    try:
        view = dequantized(checkpoint)
    except InputError as error:
        return InputError(
            "E311", f"{checkpoint.label} is quantized ({name}); {why}", where=Where(checkpoint.label),
            help=f"use the model it was made from; it cannot be dequantized here: {error.message}",
        )  # fmt: skip
    beside = max(encoded.beside for encoded in view.matrices.values())
    counted = " and ".join(f"{number:,} matrices" for _, number in sorted(view.formats.items()))
    return InputError(
        "E311", f"{checkpoint.label} is quantized ({name}, {counted}); {why}", where=Where(checkpoint.label),
        help=f"--dequantize converts while reading (+{max(1, round(beside / 1e6)):,} MB memory a thread); "
        "or use the model it was made from",
    )  # fmt: skip


def permissions(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Return what a manifest records of a model that is read dequantized, None of one that is read as it is.

    Returns:
        Format -> matrices, of the view itself or of one it lies under (an adapter).
    """
    found = getattr(checkpoint, "base", checkpoint)
    return dict(found.formats) if isinstance(found, DequantizedView) else None


def is_dequantizable(checkpoint: Checkpoint) -> str | None:
    """Return the name of the format a checkpoint is quantized in, None when it is plain or in a form that is not read.

    Only names, types and shapes are looked at, and the shapes that packed matrices store as data.
    """
    if quantized(checkpoint) is None:
        return None
    try:
        return " and ".join(sorted(dequantized(checkpoint).formats))
    except InputError:
        return None


def dequantized(checkpoint: Checkpoint) -> DequantizedView:
    """Return a quantized checkpoint as plain numbers.

    Args:
        checkpoint: any view of a model that is stored quantized; a cut of experts on stored bytes is one.

    Raises:
        InputError: E445 it is not quantized, or in a form that is not read here; E446 parts of a quantized tensor are
            missing or do not fit each other; E447 a tensor is there both plain and quantized.
    """
    return DequantizedView(checkpoint)


class DequantizedView:
    """A Checkpoint of plain numbers over a quantized one.

    Attributes:
        config: the source's without what speaks of quantization, and with the type of the decoded matrices.
        tensors: name -> TensorInfo of the plain model.
        formats: name of the format -> matrices decoded from it.
        matrices: name -> the matrix as it is stored.
        dropped: names of tensors about activations, which a plain model does not have.
        notes: sentences on what is done.
        identity: digest of how the source is read, for ids of plans and passes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.source = checkpoint
        self.label, self.folder = checkpoint.label, checkpoint.folder
        self.adapter_folder: Path | None = getattr(checkpoint, "adapter_folder", None)
        self.headers = checkpoint.headers
        scheme = scheme_of(checkpoint.config)
        self.matrices: dict[str, Encoded] = {}
        self.formats: dict[str, int] = {}
        self._stored: dict[str, str] = {}
        kinds = _formats(checkpoint, scheme)
        self._hub = hub_names(checkpoint, scheme)
        for kind in kinds:
            for encoded in kind.find(checkpoint, scheme):
                self._add(kind, encoded)
        self.tensors: dict[str, TensorInfo] = {}
        self.dropped: tuple[str, ...] = tuple(self._lay_out())
        types = {encoded.dtype for encoded in self.matrices.values()}
        dtype = types.pop() if len(types) == 1 else "BF16"
        self.config = plain_config(checkpoint.config, CONFIG_NAMES[dtype])
        _check_rest(self, self.matrices)
        counted = ", ".join(f"{number:,} as {name}" for name, number in sorted(self.formats.items()))
        self.notes: list[str] = [
            *getattr(checkpoint, "notes", ()),
            f"{len(self.matrices):,} quantized matrices are read as {CONFIG_NAMES[dtype]} numbers ({counted})",
        ]
        if self.dropped:
            self.notes.append(
                f"{len(self.dropped):,} scales of activations are not used: only weights are quantized here"
            )
        if self._stored:
            self.notes.append(f"{len(self._stored):,} tensors have the names of the hub again")
        digest = hashlib.sha256(b"dequantized 1\0")
        digest.update(f"{getattr(checkpoint, 'identity', '')}\0".encode())
        digest.update(json.dumps(scheme, sort_keys=True, default=str).encode())
        self.identity = digest.hexdigest()

    def _named(self, stored: str) -> str:
        """Return the name of a plain tensor, from that in the files."""
        name = self._hub.get(stored, stored)
        if name != stored:
            self._stored[name] = stored
        return name

    def _add(self, kind: Format, encoded: Encoded) -> None:
        name = self._named(encoded.name)
        if name in self.matrices or (
            encoded.name in self.source.tensors and encoded.name not in encoded.parts
        ):
            raise InputError(
                "E447", f"{self.label} holds {printable(name)} both plain and quantized, or quantized twice",
                where=Where(self.label, tensor=printable(name)), help="a conversion left both behind; remove one of them",
            )  # fmt: skip
        self.matrices[name] = encoded
        self.formats[kind.name] = self.formats.get(kind.name, 0) + 1

    def _lay_out(self) -> Iterator[str]:
        """Fill ``tensors`` in the source's order; yield the tensors about activations, which are left out."""
        payloads = {encoded.parts[0]: (name, encoded) for name, encoded in self.matrices.items()}
        parts = {part for encoded in self.matrices.values() for part in encoded.parts}
        for name, info in self.source.tensors.items():
            if name in payloads:
                plain, encoded = payloads[name]
                info = replace(info, name=plain, dtype=encoded.dtype, shape=encoded.shape)
                size = info.elements * DTYPES[info.dtype].bits // 8
                self.tensors[info.name] = replace(info, nbytes=size)
            elif name in parts:
                continue
            elif _ACTIVATIONS.search(name):
                yield name
            else:
                plain = self._named(name)
                self.tensors[plain] = replace(info, name=plain)

    def computed(self, name: str) -> bool:
        """Say whether values are decoded or computed, so that a byte copy is impossible."""
        inner = getattr(self.source, "computed", None)
        return name in self.matrices or (inner is not None and inner(self._stored.get(name, name)))

    def stored_dtype(self, name: str) -> str:
        """Return the storage type a tensor is written in."""
        inner = getattr(self.source, "stored_dtype", None)
        if inner is None or name in self.matrices:
            return self.tensors[name].dtype
        return inner(self._stored.get(name, name))

    def granularity(self, name: str) -> int:
        """Elements that are cheapest to read together: a row, or the columns of whole packed blocks."""
        encoded = self.matrices.get(name)
        stored = self._stored.get(name, name)
        return self.source.granularity(stored) if encoded is None else encoded.granularity

    def memory(self, name: str) -> int:
        """Return the bytes held beside the blocks while a tensor is worked on."""
        inner = getattr(self.source, "memory", lambda name: 0)
        encoded = self.matrices.get(name)
        stored = self._stored.get(name, name)
        return inner(stored) if encoded is None else encoded.beside + sum(map(inner, encoded.parts))

    def kept_bytes(self, name: str) -> int:
        """Return the bytes that stay in memory after a tensor was read."""
        inner = getattr(self.source, "kept_bytes", lambda name: 0)
        encoded = self.matrices.get(name)
        stored = self._stored.get(name, name)
        return inner(stored) if encoded is None else sum(map(inner, encoded.parts))

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened tensor: decoded values in their 16-bit type, or the source's."""
        encoded = self.matrices.get(name)
        stored = self._stored.get(name, name)
        return self.source.read(stored, start, stop) if encoded is None else encoded.read(start, stop)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return stored bytes of a tensor that is not quantized."""
        if self.computed(name):
            raise AssertionError(f"{name} is decoded; it has no stored bytes")
        return self.source.read_bytes(self._stored.get(name, name), start, stop)

    def close(self) -> None:
        """Close the files behind it."""
        close = getattr(self.source, "close", None)
        if close is not None:
            close()


def hub_names(checkpoint: Checkpoint, config: Config) -> dict[str, str]:
    """Return name in the files -> name on the hub, of what was renamed for the readers of auto-round's models."""
    whole = checkpoint.config or {}
    family = text_section(whole).get("model_type") or whole.get("model_type")
    record = architectures.get(whole.get("model_type"))
    if config.get("quant_method") != "auto-round" or family not in auto_round.NAMES or record is None:
        return {}
    held = {re.sub(r"\.(qweight|qzeros|scales|g_idx)$", ".weight", name) for name in checkpoint.tensors}
    best: dict[str, str] = {}
    for layout in record.layouts(whole):
        renamed = {auto_round.stored_name(name, family): name for name in layout.tensors}
        found = {stored: name for stored, name in renamed.items() if stored != name and stored in held}
        best = found if len(found) > len(best) else best
    return best


def scheme_of(config: Mapping[str, Any] | None) -> Config:
    """Return what config.json says of quantization, {} when it says nothing."""
    whole = config or {}
    for section in (whole, text_section(whole)):
        for key in SECTIONS:
            if isinstance(section.get(key), dict):
                return section[key]
    return {}


def plain_config(config: Mapping[str, Any] | None, dtype: str) -> dict[str, Any] | None:
    """Return config.json of the plain model: without quantization, its weights of type ``dtype``."""
    if config is None:
        return None
    plain = copy.deepcopy(dict(config))
    sections = [section for section in (plain, text_section(plain)) if isinstance(section, dict)]
    named = False
    for section in sections:
        for key in SECTIONS:
            section.pop(key, None)
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key], named = dtype, True
    if not named:
        plain["torch_dtype"] = dtype
    return plain


def _formats(checkpoint: Checkpoint, config: Config) -> tuple[Format, ...]:
    """Return the formats to look for: those of the method config.json names, all of them when it names none."""
    method = config.get("quant_method")
    if quantized(checkpoint) is None:
        raise InputError("E445", f"{checkpoint.label} is not quantized", where=Where(checkpoint.label),
                         help="it can be run as it is")  # fmt: skip
    found = tuple(kind for kind in FORMATS if method is None or method in kind.methods)
    if not found:
        raise unreadable(checkpoint, None, f"quant_method {printable(str(method))[:60]!r} in config.json")
    return found


def _check_rest(view: DequantizedView, encoded: Mapping[str, Encoded]) -> None:
    """Refuse a model of which something is left that belongs to a quantized matrix, or in which nothing was found."""
    if not encoded:
        raise unreadable(view.source, None, "config.json speaks of quantization, but no tensor is stored in a form known here")  # fmt: skip
    rest = quantized(view)
    if rest is not None:
        raise unreadable(view.source, None, f"{rest} belongs to nothing that was read")
    for name, info in view.tensors.items():  # packed values under a plain name
        if info.dtype in ("I8", "U8") and len(info.shape) > 1:
            raise unreadable(view.source, name, f"{printable(name)} holds {info.dtype} values")
