"""Which matrices of a GGUF file are quantized and how, from ``--gguf-type`` and ``--gguf-override``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.patterns import select
from surgeon.deploy.gguf_tensors import GgufLayout
from surgeon.errors import EnvironmentFault, UsageError, close_matches
from surgeon.formats import gguf_blocks
from surgeon.formats.gguf_blocks import QUANTIZED
from surgeon.traits import part_of

KEEP = "keep"
"""In an override: the matrix stays in the type of the file's plain ones."""


def parse_type(text: str, option: str) -> str:
    """Return ggml's name of a type.

    Raises:
        UsageError: E285 there is no such type.
    """
    name = text.upper()
    if name in QUANTIZED:
        return name
    names = [kind.lower() for kind in QUANTIZED]
    raise UsageError("E285", f'{option}: there is no type "{printable(text)[:60]}"',
                     help=close_matches(text.lower(), names) or "types are " + ", ".join(names))  # fmt: skip


def parse_override(text: str) -> tuple[str, str]:
    """Return (pattern, type or `KEEP`) of ``PATTERN=TYPE``.

    Raises:
        UsageError: E285 it is not of that form, or there is no such type.
    """
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError("E285", f'--gguf-override: "{printable(text)[:60]}" is not PATTERN=TYPE',
                         help="--gguf-override 're:.*down_proj.weight=q8_0'; TYPE keep leaves a matrix as it is")  # fmt: skip
    return pattern, KEEP if kind == KEEP else parse_type(kind, "--gguf-override")


def chosen(
    checkpoint: Checkpoint, layout: GgufLayout, kind: str | None, overrides: Sequence[str]
) -> dict[str, str]:
    """Return matrix of the checkpoint -> type.

    Args:
        checkpoint: what is written.
        layout: of the file.
        kind: type of all linear matrices; embedding, head and routers stay. None quantizes nothing but overrides.
        overrides: ``PATTERN=TYPE`` over the checkpoint's names; later ones win; embedding and head may be named.

    Raises:
        UsageError: E285 an unknown type, E218 a pattern that matches nothing.
        InputError: E466 rows that blocks do not divide: another type is never taken in silence.
        EnvironmentFault: E512 what rounds to a type is not installed.
    """
    able = {
        str(piece.source): tensor.columns
        for tensor in layout.tensors if len(tensor.shape) > 1 and not tensor.exact
        for piece in tensor.pieces if piece.source is not None
    }  # fmt: skip
    found: dict[str, str] = {}
    if kind is not None:
        wanted = parse_type(kind, "--gguf-type")
        found = {name: wanted for name in able if part_of(name) not in ("embedding", "head")}
    for override in overrides:
        pattern, other = parse_override(override)
        for name in select(pattern, checkpoint.tensors, "--gguf-override"):
            if other == KEEP:
                found.pop(name, None)
            else:
                found[name] = other
    _check_rows(found, able)
    for name in sorted(set(found.values())):
        if not gguf_blocks.can_quantize(name):
            raise EnvironmentFault("E512", f"only ggml itself rounds to {name}, and xllamacpp, which brings it, is not installed",
                                   help='pip install "model-surgeon[gguf]", or use q4_0, q4_1, q5_0, q5_1, q8_0')  # fmt: skip
    return found


def _check_rows(found: Mapping[str, str], able: Mapping[str, int]) -> None:
    for name, kind in found.items():
        if name not in able:
            raise gguf_blocks.refusal(
                name, kind, "it is no matrix that llama.cpp multiplies with", "name matrices only"
            )
    odd = {name: kind for name, kind in found.items() if able[name] % gguf_blocks.TYPES[kind].values}
    if not odd:
        return
    name, kind = next(iter(odd.items()))
    reason = f"blocks of {gguf_blocks.TYPES[kind].values} do not divide its {able[name]} inputs"
    if len(odd) > 1:
        reason += f"; so it is with {len(odd) - 1} more"
    last = ".".join(name.split(".")[-2:])
    other = "q8_0" if able[name] % gguf_blocks.GROUP == 0 else KEEP
    raise gguf_blocks.refusal(name, kind, reason, f"--gguf-override 're:.*{last}={other}'")
