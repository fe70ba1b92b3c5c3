"""``--format auto-round``: integers in the tensors of GPTQ files, a width of its own for every matrix of every expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgeon.errors import SurgeonError
from surgeon.formats import auto_round
from surgeon.formats.compressed_runtimes import Choice, Reader
from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize.forms import Parts, Shape


class AutoRound:
    """See `surgeon.quantize.forms.Form`."""

    name = "auto-round"
    folder = True
    scale_dtype = "F16"
    kinds = ("int",)
    package = "auto-round"

    def __init__(self, reader: Reader, model_type: str | None) -> None:
        self.reader = reader
        self.model_type = model_type
        self.widths = auto_round.BITS[reader.runtime]

    def layout(self, name: str, shape: Shape, scheme: Scheme) -> list[tuple[str, str, Shape]]:
        return auto_round.layout(name, shape, scheme, self.model_type)

    def pack(self, name: str, codes: Codes) -> Parts:
        stem = self.renamed(name).removesuffix("weight")
        types = {place: code for place, code, _ in self.layout(name, codes.codes.shape, codes.scheme)}
        return {
            f"{stem}{end}": (types[f"{stem}{end}"], array) for end, array in auto_round.pack(codes).items()
        }

    def encode(
        self, name: str, weight: np.ndarray, scheme: Scheme, shared: np.float32 | None = None
    ) -> tuple[Parts, np.ndarray]:
        raise AssertionError(f"auto-round stores integers alone, not {scheme.name}")  # refusals say so before

    def renamed(self, name: str) -> str:
        return auto_round.stored_name(name, self.model_type)

    def config(self, modules: Mapping[str, Scheme | None]) -> dict[str, Any]:
        return auto_round.quantization_config(modules, self.model_type)

    def choices(self, shapes: Mapping[str, Shape], menu: Sequence[Scheme | None]) -> list[list[Choice]]:
        return auto_round.choices(shapes, menu, self.reader, self.model_type)

    def refusals(self, matrices: Mapping[str, tuple[Shape, Scheme | None]]) -> list[SurgeonError]:
        return auto_round.refusals(matrices, self.reader, self.model_type)


FORM = AutoRound
