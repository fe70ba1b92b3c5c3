"""``--format bitsandbytes``: NF4, FP4 or INT8 blocks for transformers, one kind a model, no mixtures of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgeon.checkpoint.memory import MemoryCheckpoint
from surgeon.errors import SurgeonError
from surgeon.formats import bnb, bnb_stored
from surgeon.formats.compressed_runtimes import Choice, Reader
from surgeon.formats.scheme import Codes, Scheme
from surgeon.kernels.cast import widen
from surgeon.quantize.forms import Parts, Shape


class BitsAndBytes:
    """See `surgeon.quantize.forms.Form`."""

    name = "bitsandbytes"
    folder = True
    scale_dtype = "F32"
    widths = ()
    kinds = ("nf4", "fp4", "int8")
    package = "bitsandbytes"

    def __init__(self, reader: Reader, model_type: str | None, double: bool = False) -> None:
        self.reader = reader
        self.model_type = model_type
        self.double = double

    def layout(self, name: str, shape: Shape, scheme: Scheme) -> list[tuple[str, str, Shape]]:
        return bnb.layout(name, shape, scheme, self.reader.dtype, self.double)

    def pack(self, name: str, codes: Codes) -> Parts:
        raise AssertionError(
            f"bitsandbytes has kinds of its own, not {codes.scheme.name}"
        )  # refusals say so before

    def encode(
        self, name: str, weight: np.ndarray, scheme: Scheme, shared: np.float32 | None = None
    ) -> tuple[Parts, np.ndarray]:
        stored = bnb.pack(weight, scheme, self.reader.dtype, self.double)
        stem = name.removesuffix("weight")
        types = {place: code for place, code, _ in self.layout(name, weight.shape, scheme)}
        parts = {f"{stem}{end}": (types[f"{stem}{end}"], array) for end, array in stored.items()}
        return parts, self._values(name, parts, weight.shape)

    def _values(self, name: str, parts: Parts, shape: Shape) -> np.ndarray:
        """Return what a reader makes of stored tensors: float32 [out, in]."""
        held = MemoryCheckpoint("a quantized matrix", {place: array for place, (_, array) in parts.items()})
        encoded = next(iter(bnb_stored.FORMAT.find(held, {})))
        assert encoded.name == name and encoded.shape == shape
        return widen(encoded.read(0, math.prod(shape)), encoded.dtype).reshape(shape)

    def renamed(self, name: str) -> str:
        return name

    def config(self, modules: Mapping[str, Scheme | None]) -> dict[str, Any]:
        return bnb.quantization_config(modules, self.double, self.reader.dtype)

    def choices(self, shapes: Mapping[str, Shape], menu: Sequence[Scheme | None]) -> list[list[Choice]]:
        return bnb.choices(shapes, menu, self.reader)

    def refusals(self, matrices: Mapping[str, tuple[Shape, Scheme | None]]) -> list[SurgeonError]:
        return bnb.refusals(matrices, self.reader)


FORM = BitsAndBytes
