"""The forms a quantized model is written in: what each stores, what its readers demand, how one matrix becomes tensors.

A form is an adapter between the methods of quantization, which speak of schemes and codes, and the writers in
`surgeon.formats`, each of which has its own names. ``--format`` names one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from surgeon.errors import SurgeonError, UsageError, close_matches
from surgeon.formats.compressed_runtimes import Choice, Reader
from surgeon.formats.scheme import Codes, Scheme

NAMES = ("compressed-tensors", "auto-round", "bitsandbytes", "gguf")

Shape = tuple[int, ...]
Parts = dict[str, tuple[str, np.ndarray]]
"""Stored name -> (storage code, array in the carrier type of the code)."""


class Form(Protocol):
    """One way of storing a quantized model, for one model and one reader.

    Names of matrices are those of the source's tensors, ending in ".weight"; names of modules lack that ending.

    Attributes:
        name: of ``--format``.
        folder: whether the result is a folder of safetensors; False for one GGUF file.
        reader: what reads the result.
        model_type: of config.json.
        scale_dtype: what scales of integers are stored in, of `surgeon.quantize.grids.STORED`.
        widths: integers it stores, in bits.
        kinds: kinds of schemes it stores.
        package: what has to be installed for stock transformers to read it; None when nothing more.
    """

    name: str
    folder: bool
    reader: Reader
    model_type: str | None
    scale_dtype: str
    widths: tuple[int, ...]
    kinds: tuple[str, ...]
    package: str | None

    def layout(self, name: str, shape: Shape, scheme: Scheme) -> list[tuple[str, str, Shape]]:
        """Return (stored name, storage code, shape) of what a matrix becomes; the only source of sizes."""
        ...

    def pack(self, name: str, codes: Codes) -> Parts:
        """Return the stored tensors of a matrix of integers."""
        ...

    def encode(
        self, name: str, weight: np.ndarray, scheme: Scheme, shared: np.float32 | None = None
    ) -> tuple[Parts, np.ndarray]:
        """Return the stored tensors of a matrix that is no matrix of integers, and the values they stand for.

        Args:
            weight: float32 [out, in].
            scheme: of a kind other than "int".
            shared: of NVFP4: one scale for matrices that are loaded as one, see `shared_scales`.
        """
        ...

    def renamed(self, name: str) -> str:
        """Return the stored name of a tensor that is not quantized."""
        ...

    def config(self, modules: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """Return ``quantization_config`` of config.json for EVERY linear module, None as it was."""
        ...

    def choices(self, shapes: Mapping[str, Shape], menu: Sequence[Scheme | None]) -> list[list[Choice]]:
        """Return alternatives an allocator may choose from, each with every matrix: solve each, keep the best."""
        ...

    def refusals(self, matrices: Mapping[str, tuple[Shape, Scheme | None]]) -> list[SurgeonError]:
        """Return everything that speaks against an assignment; nothing when its reader reads what is meant."""
        ...


def get(name: str, reader: Reader, model_type: str | None) -> Form:
    """Return a form for a model and its reader.

    Raises:
        UsageError: E221 there is no such form.
    """
    if name not in NAMES:
        raise UsageError("E221", f'there is no format "{name[:60]}" to quantize to',
                         help=close_matches(name, NAMES) or "formats are " + ", ".join(NAMES))  # fmt: skip
    module = importlib.import_module(f"surgeon.quantize.forms.{name.replace('-', '_')}")
    return module.FORM(reader, model_type)
