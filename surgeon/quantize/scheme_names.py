"""Names of schemes: W4A16, FP8, NVFP4, NF4, Q4_0, and the short ones of results (int4g128)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from surgeon.errors import UsageError, close_matches
from surgeon.formats import scheme as schemes
from surgeon.formats.scheme import Scheme

KEEP = ("none", "keep", "bf16", "fp16", "f16", "f32", "16")
"""Words for leaving matrices as they are."""

FIXED = {
    "fp8": Scheme("float8", 8, -1), "fp8_dynamic": Scheme("float8", 8, -1), "float8": Scheme("float8", 8, -1),
    "nvfp4": Scheme("nvfp4", 4, 0), "nvfp4a16": Scheme("nvfp4", 4, 0), "mxfp4": Scheme("mxfp4", 4, 0),
    "mxfp4a16": Scheme("mxfp4", 4, 0), "nf4": Scheme("nf4", 4, 0), "fp4": Scheme("fp4", 4, 0),
    "int8": Scheme("int8", 8, 0),
}  # fmt: skip
"""Name -> a scheme without anything to choose."""

BLOCKS = {
    "q4_0": Scheme("int", 4, 32), "q4_1": Scheme("int", 4, 32, False), "q5_0": Scheme("int", 5, 32),
    "q5_1": Scheme("int", 5, 32, False), "q8_0": Scheme("int", 8, 32),
}  # fmt: skip
"""Types of llama.cpp that hold whole numbers."""

_WIDTH = re.compile(r"w(\d)a16(_asym)?(?:[-_]?g(\d+))?")
_SHORT = re.compile(r"int(\d)(?:g(\d+)|(c))?(a)?")


@dataclass(frozen=True)
class Wanted:
    """A scheme as it was asked for.

    Attributes:
        scheme: None leaves a matrix as it is.
        grouped: the group size was said; otherwise the largest that divides the inputs is taken.
    """

    scheme: Scheme | None
    grouped: bool = True


def parse(text: str, form: str, *, group_size: int | None, symmetric: bool) -> Wanted:
    """Return the scheme a name stands for.

    Args:
        text: the name, in any case.
        form: of ``--format``; "int8" is a number with a scale a row for bitsandbytes, elsewhere a width.
        group_size: of ``--group-size``; -1 is a whole row, None is left open.
        symmetric: of ``--symmetric/--asymmetric``.

    Raises:
        UsageError: E231 not a name of a scheme.
    """
    name = text.strip().lower()
    if name in KEEP:
        return Wanted(None)
    if name in FIXED and (name != "int8" or form == "bitsandbytes"):
        return Wanted(FIXED[name])
    if name in BLOCKS:
        return Wanted(BLOCKS[name])
    if found := _WIDTH.fullmatch(name):
        size = int(found[3]) if found[3] else group_size
        return _integers(int(found[1]), size, symmetric and not found[2], text)
    if found := _SHORT.fullmatch(name):
        size = int(found[2]) if found[2] else -1 if found[3] else group_size
        return _integers(int(found[1]), size, symmetric and not found[4], text)
    if name == "w8a8":
        raise UsageError("E231", "W8A8 quantizes activations to whole numbers, which is not offered",
                         help="FP8 quantizes weights and activations to eight-bit floats; W8A16 the weights alone")  # fmt: skip
    known = ["W4A16", "W8A16", "W3A16", "W2A16", "FP8", "NVFP4", "MXFP4", "NF4", "FP4", "INT8", *map(str.upper, BLOCKS), "none"]  # fmt: skip
    raise UsageError("E231", f'"{text[:40]}" is no scheme',
                     help=(f"{near} " if (near := close_matches(text.upper(), known)) else "") + "one of: " + ", ".join(known))  # fmt: skip


def _integers(bits: int, group: int | None, symmetric: bool, text: str) -> Wanted:
    if not 2 <= bits <= 8 or (group is not None and group < -1) or group == 0:
        raise UsageError("E231", f'"{text[:40]}": whole numbers have 2 to 8 bits, groups of at least one input', help="such as W4A16, or W4A16-g64")  # fmt: skip
    return Wanted(Scheme("int", bits, 128 if group is None else group, symmetric), group is not None)


def candidates(wanted: Wanted) -> list[Scheme | None]:
    """Return the schemes a wish may mean, the preferred first: groups of 128, 64, 32, whole rows."""
    if wanted.scheme is None or wanted.grouped or wanted.scheme.kind != "int":
        return [wanted.scheme]
    return [replace(wanted.scheme, group=size) for size in (128, 64, 32, -1)]


def by_name(name: str) -> Scheme:
    """Return the scheme whose `Scheme.name` is given, for plans that were saved.

    Raises:
        UsageError: E231.
    """
    kinds = schemes.Kind.__args__  # type: ignore[attr-defined]
    if name in kinds and name != "int":
        return next(one for one in FIXED.values() if one.kind == name)
    found = _SHORT.fullmatch(name)
    if found is None:
        raise UsageError("E231", f'"{name[:40]}" is no scheme of a plan', help="such as int4g128")
    return Scheme("int", int(found[1]), int(found[2]) if found[2] else -1, not found[4])
