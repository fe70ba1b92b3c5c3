"""``--format compressed-tensors``: packed integers, eight-bit floats, four-bit floats; read by vLLM and by transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgeon.errors import SurgeonError
from surgeon.formats import compressed_groups, compressed_runtimes, float4, float8_dynamic, pack_quantized
from surgeon.formats.compressed_runtimes import Choice, Reader
from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize.forms import Parts, Shape

_LAYOUTS = {
    "int": pack_quantized.layout,
    "float8": float8_dynamic.layout,
    "nvfp4": float4.layout,
    "mxfp4": float4.layout,
}


class CompressedTensors:
    """See `surgeon.quantize.forms.Form`."""

    name = "compressed-tensors"
    folder = True
    widths = (2, 3, 4, 5, 6, 7, 8)
    kinds = ("int", "float8", "nvfp4", "mxfp4")
    package = "compressed-tensors"

    def __init__(self, reader: Reader, model_type: str | None) -> None:
        self.reader = reader
        self.model_type = model_type
        self.scale_dtype = reader.dtype

    def layout(self, name: str, shape: Shape, scheme: Scheme) -> list[tuple[str, str, Shape]]:
        return _LAYOUTS.get(scheme.kind, pack_quantized.layout)(name, shape, scheme, self.scale_dtype)

    def pack(self, name: str, codes: Codes) -> Parts:
        return self._typed(
            name, codes.codes.shape, codes.scheme, pack_quantized.pack(codes, self.scale_dtype)
        )

    def encode(
        self, name: str, weight: np.ndarray, scheme: Scheme, shared: np.float32 | None = None
    ) -> tuple[Parts, np.ndarray]:
        if scheme.kind == "float8":
            eight = float8_dynamic.quantize(weight, self.scale_dtype)
            stored, values = float8_dynamic.pack(eight, self.scale_dtype), eight.values()
        else:
            four = float4.quantize(weight, scheme, shared)
            stored, values = float4.pack(four), four.values()
        return self._typed(name, weight.shape, scheme, stored), values

    def _typed(self, name: str, shape: Shape, scheme: Scheme, stored: Mapping[str, np.ndarray]) -> Parts:
        codes = {place: code for place, code, _ in self.layout(name, shape, scheme)}
        return {f"{name}{ending}": (codes[f"{name}{ending}"], array) for ending, array in stored.items()}

    def renamed(self, name: str) -> str:
        return name

    def config(self, modules: Mapping[str, Scheme | None]) -> dict[str, Any]:
        integers = any(scheme is not None and scheme.kind == "int" for scheme in modules.values())
        return compressed_groups.quantization_config(modules, actorder="static" if integers else None)

    def choices(self, shapes: Mapping[str, Shape], menu: Sequence[Scheme | None]) -> list[list[Choice]]:
        return compressed_runtimes.choices(shapes, menu, self.reader)

    def refusals(self, matrices: Mapping[str, tuple[Shape, Scheme | None]]) -> list[SurgeonError]:
        return compressed_runtimes.refusals(matrices, self.reader)


FORM = CompressedTensors
