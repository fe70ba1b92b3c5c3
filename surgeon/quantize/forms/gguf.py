"""``--format gguf``: one file for llama.cpp, integers of 4, 5 and 8 bits in groups of 32, and MXFP4.

What lies in the files of layers are the blocks of each matrix, under its name and the type's
(`surgeon.formats.gguf_blocks`); `surgeon.deploy.export_gguf.write_gguf` puts them in their places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.deploy.gguf_layout import FAMILIES
from surgeon.deploy.per_layer import base_type
from surgeon.errors import InputError, SurgeonError, Where
from surgeon.formats import float4, gguf_blocks
from surgeon.formats.compressed_groups import EXPERT
from surgeon.formats.compressed_runtimes import Choice, Reader
from surgeon.formats.scheme import Codes, Scheme
from surgeon.formats.told_once import told_once
from surgeon.quantize.forms import Parts, Shape
from surgeon.traits import part_of

_ATTENTION = re.compile(r"(.*\.self_attn)\.[qkv]_proj$")


class Gguf:
    """See `surgeon.quantize.forms.Form`."""

    name = "gguf"
    folder = False
    scale_dtype = "GGML"
    widths = (4, 5, 8)
    kinds = ("int", "mxfp4")
    package = "gguf"

    def __init__(self, reader: Reader, model_type: str | None) -> None:
        self.reader = reader
        self.model_type = model_type

    def layout(self, name: str, shape: Shape, scheme: Scheme) -> list[tuple[str, str, Shape]]:
        return gguf_blocks.layout(name, shape, scheme)

    def pack(self, name: str, codes: Codes) -> Parts:
        ((place, code, _),) = self.layout(name, codes.codes.shape, codes.scheme)
        return {place: (code, gguf_blocks.pack(codes, name))}

    def encode(
        self, name: str, weight: np.ndarray, scheme: Scheme, shared: np.float32 | None = None
    ) -> tuple[Parts, np.ndarray]:
        ((place, code, _),) = self.layout(name, weight.shape, scheme)
        four = float4.quantize(weight, scheme)
        return {place: (code, gguf_blocks.pack_mxfp4(four))}, four.values()

    def renamed(self, name: str) -> str:
        return name

    def config(self, modules: Mapping[str, Scheme | None]) -> dict[str, Any]:
        return {}  # every tensor of the file says its own type

    def choices(self, shapes: Mapping[str, Shape], menu: Sequence[Scheme | None]) -> list[list[Choice]]:
        found = []
        for group in self._ties(shapes):
            fits = [s for s in menu if s is None or all(self._reason(n, shapes[n], s) is None for n in group)]
            found.append(Choice(group, tuple(fits)))
        return [found]

    def refusals(self, matrices: Mapping[str, tuple[Shape, Scheme | None]]) -> list[SurgeonError]:
        found: list[SurgeonError] = []
        family = base_type({"model_type": self.model_type or ""})
        if family not in FAMILIES:
            found.append(InputError(
                "E468", f"{printable(family or 'this')} models are not written as GGUF here", where=Where(file="config.json"),
                help="--format compressed-tensors gives a folder; GGUF is written for " + ", ".join(FAMILIES),
            ))  # fmt: skip
        single = (
            (name, (scheme.name, reason))
            for name, (shape, scheme) in matrices.items()
            if scheme and (reason := self._reason(name, shape, scheme))
        )
        for name, more, (what, reason) in told_once(single):
            found.append(gguf_blocks.refusal(name, what, reason, alike=more))
        tied = []
        for group in self._ties(matrices):
            said = sorted({scheme.name if (scheme := matrices[n][1]) else "plain" for n in group})
            if len(said) > 1:
                tied.append((group[0], (len(group) - 1, " and ".join(said))))
        for name, more, (beside, what) in told_once(tied):
            found.append(InputError(
                "E467", f"{printable(name)} and {beside} more cannot be {what}: llama.cpp has them in one tensor"
                f"{more and f'; so it is with {more}'}",
                where=Where(tensor=printable(name)), help="give them one scheme",
            ))  # fmt: skip
        return found

    def _reason(self, name: str, shape: Shape, scheme: Scheme) -> str | None:
        """Return why a matrix is not stored by a scheme, whatever others have; None when it is."""
        if not name.endswith(".weight"):
            return "it is a stack of matrices; start from a checkpoint that stores each expert by itself"
        part = part_of(name)
        if part in ("router", "norm"):
            return f"llama.cpp wants a {part} in float32"
        return gguf_blocks.unstorable(shape, scheme)

    def _ties(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Return all matrices in groups that lie in one tensor of the file, single ones too, in the order of their first."""
        groups: dict[str, list[str]] = {}
        for name in names:
            module = name.removesuffix(".weight")
            match, attention = EXPERT.match(module), _ATTENTION.match(module)
            key = name
            if match is not None:
                key = f"{match['stack']}.{match['matrix']}"
            elif (
                attention is not None and self.model_type == "surgeon_qwen3"
            ):  # openelm has one tensor for the three
                key = attention[1]
            groups.setdefault(key, []).append(name)
        return [tuple(group) for group in groups.values()]


FORM = Gguf
