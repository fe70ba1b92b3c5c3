"""Integers with scales as auto-round stores them: the tensors of GPTQ files, and a scheme for every module on its own.

    value = (code - 2**(bits - 1)) * scale

``qweight`` int32 [in * bits / 32, out]: down a column, the codes of one output as one stream of bits, the lowest first; a
code of three bits may reach into the next word. ``qzeros`` int32 [groups, out * bits / 32]: the zero points less one (the
first version of GPTQ files), as a stream along the outputs. ``scales`` float16 [groups, out]. Experts are stored one by
one, so each of their matrices may have its own width: no other format that plain transformers loads allows that.
Layout and config: auto-round 0.16 with ``packing_format`` "auto_round:auto_gptq"; Frantar et al. 2022, 2210.17323.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, SurgeonError, Where
from surgeon.formats import compressed_runtimes
from surgeon.formats.compressed_runtimes import ACROSS, STOCK, Choice, Reader, Runtime, Shape
from surgeon.formats.scheme import Codes, Scheme
from surgeon.formats.told_once import told_once
from surgeon.traits import part_of

VERSION = "0.16.1"
"""The auto-round whose reading the layout and the rules here were checked against."""

BITS: dict[str, tuple[int, ...]] = {"transformers": (2, 3, 4, 5, 6, 7, 8), "vllm": (4, 8)}
"""Reader -> widths it takes."""

LANES = 32
"""Inputs and outputs come in multiples of this: then a stream of any width ends with a word."""

RUN_DTYPES = ("F16", "BF16")
"""Types of the plain rest: readers turn a model of another type into float16 by themselves."""

_BLOCK_SPARSE = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts\.\d+)\.w1(?=\.|$)"), r"\1.gate_proj"),
    (re.compile(r"(\.experts\.\d+)\.w3(?=\.|$)"), r"\1.up_proj"),
    (re.compile(r"(\.experts\.\d+)\.w2(?=\.|$)"), r"\1.down_proj"),
)
NAMES: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = dict.fromkeys(
    ("mixtral", "phimoe", "minimax", "minimax_m2", "lfm2_moe"), _BLOCK_SPARSE
)
"""model_type -> replacements, in order, that turn a hub name into the one the reader's own modules have.

Without them the experts are missing to the reader, which reports it and computes NaN, but does not fail.
"""

EXPERTS = frozenset(NAMES) | {
    "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "hunyuan_v1_moe", "jamba", "olmoe",
    "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
}  # fmt: skip
"""Families whose experts were seen to load, each with the width it was given."""

_BLOCK = re.compile(r"^(.*?)\.\d+\.")


def stored_name(name: str, model_type: str | None) -> str:
    """Return the name of a module or tensor in the stored model, as the family's reader wants it."""
    for pattern, replacement in NAMES.get(model_type or "", ()):
        name = pattern.sub(replacement, name)
    return name


def name_map(names: Iterable[str], model_type: str | None) -> dict[str, str]:
    """Return source name -> stored name, only of what is renamed."""
    pairs = ((name, stored_name(name, model_type)) for name in names)
    return {name: stored for name, stored in pairs if name != stored}


def layout(
    name: str, shape: tuple[int, ...], scheme: Scheme, model_type: str | None = None
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (stored name, dtype code, shape) of the tensors that hold one matrix; sizes come from here alone.

    Args:
        name: of the plain matrix, ending in ".weight".
        shape: (out, in).
        scheme: one that `storable` has no reason against.
    """
    outputs, inputs = shape
    groups = inputs // scheme.group if scheme.group > 0 else 1
    stem = stored_name(name, model_type).removesuffix("weight")
    return [
        (f"{stem}qweight", "I32", (inputs * scheme.bits // 32, outputs)),
        (f"{stem}qzeros", "I32", (groups, outputs * scheme.bits // 32)),
        (f"{stem}scales", "F16", (groups, outputs)),
    ]


def pack(codes: Codes) -> dict[str, np.ndarray]:
    """Return the tensors of a matrix by what is put for "weight" in its name: "qweight", "qzeros", "scales".

    Args:
        codes: symmetric, with scales that float16 holds exactly.

    Raises:
        InputError: E458 a scale that float16 does not reach.
    """
    bits = codes.scheme.bits
    with np.errstate(over="ignore"):
        scales = codes.scales.astype(np.float16)
    if not np.isfinite(scales).all():
        raise InputError("E458", "a scale is beyond float16, the type the auto-round format stores scales in",
                         help="keep the matrix in 16 bits, or look for the damage with: surgeon inspect MODEL --stats")  # fmt: skip
    if not np.array_equal(scales.astype(np.float32), codes.scales):
        raise AssertionError("scales are not rounded to float16, the type they are stored in")
    if not codes.scheme.symmetric or (codes.zeros != 1 << (bits - 1)).any():
        raise AssertionError("zero points are not in the middle of the codes")
    return {
        "qweight": packed(codes.codes.T, bits),
        "qzeros": np.ascontiguousarray(packed(codes.zeros.T - np.uint8(1), bits, along_rows=True)),
        "scales": np.ascontiguousarray(scales.T),
    }


def packed(codes: np.ndarray, bits: int, along_rows: bool = False) -> np.ndarray:
    """Return the words of a stream of codes down each column, or along each row: int32.

    Args:
        codes: uint8 [n, m], below 2**bits; n (or m) is a multiple of `LANES`.
        bits: 1 to 8.

    Returns:
        [n * bits / 32, m], or [n, m * bits / 32].
    """
    if along_rows:
        return packed(codes.T, bits).T
    lanes = np.ascontiguousarray(codes).reshape(-1, LANES, codes.shape[1])
    words = np.zeros((len(lanes), bits, codes.shape[1]), np.uint32)
    for lane in range(LANES):  # 32 codes fill `bits` words, whatever the width
        word, shift = divmod(lane * bits, 32)
        code = lanes[:, lane].astype(np.uint32)
        words[:, word] |= code << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= code >> np.uint32(32 - shift)
    return words.reshape(-1, codes.shape[1]).view(np.int32)


def quantization_config(
    modules: Mapping[str, Scheme | None], model_type: str | None = None
) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json.

    Args:
        modules: every linear module of the model under its source name (without ".weight"), routers included -> how it
            is stored, None in 16 bits. One that is left out is taken for quantized by readers.

    Raises:
        InputError: E460 no module is quantized.
    """
    stored = {stored_name(name, model_type): scheme for name, scheme in modules.items()}
    counted = Counter(scheme for scheme in stored.values() if scheme is not None)
    if not counted:
        raise InputError(
            "E460", "no module is quantized", help="a model of plain numbers needs no quantization_config"
        )
    usual = min(counted, key=lambda scheme: (-counted[scheme], scheme))
    blocks = sorted({m[1] for name, scheme in stored.items() if scheme and (m := _BLOCK.match(name))})
    inside = tuple(f"{block}." for block in blocks)
    extra = {
        name: _entry(scheme)
        for name, scheme in stored.items()
        if scheme != usual or not name.startswith(inside)
    }
    for name in _caught(extra, stored):
        extra[name] = _entry(stored[name])
    config: dict[str, Any] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": usual.bits,
        "group_size": usual.group,
        "sym": True,
        "data_type": "int",
        "autoround_version": VERSION,
        "block_name_to_quantize": ",".join(blocks),
    }
    return config | (
        {"extra_config": {name: extra[name] for name in stored if name in extra}} if extra else {}
    )


def _entry(scheme: Scheme | None) -> dict[str, Any]:
    if scheme is None:
        return {"bits": 16, "data_type": "float"}
    return {"bits": scheme.bits, "group_size": scheme.group, "sym": True, "data_type": "int"}


def _caught(extra: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Return names without an entry that begin with one that has: readers take an entry of no linear module (a router is
    none in transformers 5) for a pattern, and ``mlp.gate`` would turn ``mlp.gate_proj`` into 16 bits."""
    names = sorted(stored)
    found = []
    for key in extra:
        place = bisect_left(names, key)
        while place < len(names) and names[place].startswith(key):
            if names[place] not in extra:
                found.append(names[place])
            place += 1
    return found


def ties(names: Iterable[str], runtime: Runtime = "transformers") -> list[tuple[str, ...]]:
    """Return all matrices in groups that have to share a scheme: single ones, but for vLLM, which runs some as one."""
    return (
        [(name,) for name in names] if runtime == "transformers" else compressed_runtimes.ties(names, runtime)
    )


def storable(
    name: str, shape: Shape, scheme: Scheme, reader: Reader = STOCK, model_type: str | None = None
) -> str | None:
    """Return why a matrix cannot be stored this way, None when it can.

    Args:
        name: of the plain matrix in the source, ending in ".weight".
        shape: (out, in).
        reader: what reads the model.
        model_type: of config.json; decides on experts.
    """
    part = part_of(name)
    if part in ("embedding", "router", "norm"):
        return f"readers want {'an' if part[0] in 'aeiou' else 'a'} {part} in 16 bits"
    if part == "head" and reader.tied:
        return "it is the embedding, which readers want in 16 bits"
    if len(shape) != 2:
        return f"it has {len(shape)} axes; linear modules have 2, experts are stored one by one"
    if scheme.kind != "int":
        return f"{scheme.name} is not made of integers"
    if scheme.bits not in BITS[reader.runtime]:
        widths = ", ".join(map(str, BITS[reader.runtime]))
        return f"{scheme.bits} bits are not read by {reader.runtime}, which takes {widths}"
    if not scheme.symmetric:
        return "zero points are stored less one, so a zero point of 0 has no place; only symmetric codes are written"
    if part == "expert" and model_type not in EXPERTS:
        return (
            f"experts of {model_type} have not been seen to load; those of {', '.join(sorted(EXPERTS))} have"
        )
    if reader.runtime == "vllm" and part == "expert" and model_type in NAMES:
        return f"vllm reads experts of {model_type} under their old names, transformers under new ones"
    outputs, inputs = shape
    if reader.runtime == "vllm" and reader.devices > 1:
        across = name.removesuffix(".weight").rpartition(".")[2] in ACROSS
        if shape[across] % reader.devices:
            return f"{reader.devices} devices do not divide its {shape[across]} {'inputs' if across else 'outputs'}"
        outputs, inputs = (
            (outputs, inputs // reader.devices) if across else (outputs // reader.devices, inputs)
        )
    if inputs % LANES or outputs % LANES:
        return (
            f"its {outputs} x {inputs} values do not fill words: readers want multiples of {LANES} both ways"
        )
    if scheme.group > 0 and inputs % scheme.group:
        return f"groups of {scheme.group} do not divide its {inputs} inputs"
    if scheme.group == 0 or scheme.group < -1:
        return f"{scheme.group} is no size of a group"
    return None


def refusals(
    matrices: Mapping[str, tuple[Shape, Scheme | None]], reader: Reader = STOCK, model_type: str | None = None
) -> list[SurgeonError]:
    """Return everything that speaks against a whole model, E458 for a matrix, E459 for matrices that must be alike.

    Args:
        matrices: name of every plain matrix of a linear module -> (shape, how it is stored; None in 16 bits).
    """
    found: list[SurgeonError] = []
    single = (
        (name, (scheme.name, reason))
        for name, (shape, scheme) in matrices.items()
        if scheme and (reason := storable(name, shape, scheme, reader, model_type))
    )
    for name, more, (what, reason) in told_once(single):
        found.append(InputError(
            "E458", f"{printable(name)}{more and f' and {more}'} cannot be stored as {what} for auto-round: {reason}",
            where=Where(tensor=printable(name)), help="choose another width or group size for it, or keep it in 16 bits",
        ))  # fmt: skip
    tied = []
    for group in ties(matrices, reader.runtime):
        said = sorted({scheme.name if (scheme := matrices[name][1]) else "16 bits" for name in group})
        if len(said) > 1:
            tied.append((group[0], (len(group) - 1, " and ".join(said))))
    for name, more, (beside, what) in told_once(tied):
        found.append(InputError(
            "E459", f"{reader.runtime} runs {printable(name)} and {beside} more as one, but they are stored as {what}"
            f"{more and f'; so it is with {more}'}",
            where=Where(tensor=printable(name)), help="store them alike, or write the model for transformers",
        ))  # fmt: skip
    return found


def choices(
    shapes: Mapping[str, Shape],
    menu: Sequence[Scheme | None],
    reader: Reader = STOCK,
    model_type: str | None = None,
) -> list[list[Choice]]:
    """Return what an allocator may choose from, as one list: any combination of it is without `refusals`.

    Args:
        shapes: name of every plain matrix of a linear module -> shape.
        menu: schemes to choose from, and None.
    """
    found = []
    for group in ties(shapes, reader.runtime):
        fits = (
            scheme
            for scheme in menu
            if scheme is None
            or all(storable(name, shapes[name], scheme, reader, model_type) is None for name in group)
        )
        found.append(Choice(group, tuple(fits)))
    return [found]
