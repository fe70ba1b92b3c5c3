"""The tensors that a module has to have in the files, from what config.json says of it and the shape of its matrix.

    parts("model.layers.0.mlp.up_proj", Storage("pack-quantized", 4, 128), (11008, 4096))

Written from the formats' descriptions, not from the readers here, so that one checks the other: compressed-tensors 0.20,
GPTQ and AWQ as AutoGPTQ and AutoAWQ write them, DeepSeek-AI 2024 (2412.19437, section 3.3), bitsandbytes 0.50.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from surgeon.formats.storage import Shape, Storage

FLOATS = frozenset({"F16", "BF16", "F32"})
EXPONENTS = frozenset({"U8", "F8_E8M0"})

PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>weight_packed|weight_scale|weight_scale_inv|weight_shape|weight_zero_point|weight_g_idx|"
    r"weight_global_scale|qweight|qzeros|scales|g_idx|weight\.absmax|weight\.quant_map|weight\.nested_absmax|"
    r"weight\.nested_quant_map|weight\.quant_state\.bitsandbytes__\w+|SCB|weight_format)$"
)
"""Names of tensors that only quantized modules have."""


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized module.

    Attributes:
        name: in the files.
        dtypes: storage types it may have.
        shapes: shapes it may have; none when the shape says nothing.
        optional: whether it may be absent.
    """

    name: str
    dtypes: frozenset[str]
    shapes: tuple[Shape, ...]
    optional: bool = False


def parts(module: str, storage: Storage, shape: Shape) -> list[Part] | None:
    """Return the tensors of a module, its bias aside; None for a form that nothing is known of.

    Args:
        module: name in the files.
        storage: what config.json says.
        shape: [out, in] of the plain matrix.
    """
    known = FORMS.get(storage.form)
    return None if known is None else known(module, storage, shape)


def _only(dtype: str) -> frozenset[str]:
    return frozenset({dtype})


def _groups(storage: Storage, shape: Shape) -> int:
    return -(-shape[1] // storage.group) if storage.group > 0 else 1


def _scales(storage: Storage, shape: Shape) -> tuple[Shape, ...]:
    """Return the shapes that scales along the inputs may have: one a matrix and one a row are written in two ways."""
    if storage.block is not None:
        return ((-(-shape[0] // storage.block[0]), -(-shape[1] // storage.block[1])),)
    if storage.group == 0:
        return ((1,), (), (1, 1))
    if storage.group < 0:
        return ((shape[0], 1), (shape[0],))
    return ((shape[0], _groups(storage, shape)),)


def _zero_points(module: str, storage: Storage, shape: Shape, packed: bool) -> list[Part]:
    if storage.symmetric:
        return []
    plain = Part(f"{module}.weight_zero_point", _only("I8"), _scales(storage, shape))
    if not packed or storage.group == 0:
        return [plain]
    words = (-(-shape[0] * storage.bits // 32), _groups(storage, shape))
    return [Part(plain.name, frozenset({"I32", "I8"}), (words, *plain.shapes))]


def _pack_quantized(module: str, storage: Storage, shape: Shape) -> list[Part]:
    order = (
        [Part(f"{module}.weight_g_idx", frozenset({"I32", "I64"}), ((shape[1],),))]
        if storage.reordered
        else []
    )
    return [
        Part(f"{module}.weight_packed", _only("I32"), ((shape[0], -(-shape[1] * storage.bits // 32)),)),
        Part(f"{module}.weight_scale", FLOATS, _scales(storage, shape)),
        Part(f"{module}.weight_shape", frozenset({"I64", "I32"}), ((2,),)),
        *_zero_points(module, storage, shape, True),
        *order,
    ]


def _int_quantized(module: str, storage: Storage, shape: Shape) -> list[Part]:
    scales = Part(f"{module}.weight_scale", FLOATS, _scales(storage, shape))
    return [
        Part(f"{module}.weight", _only("I8"), (shape,)),
        scales,
        *_zero_points(module, storage, shape, False),
    ]


def _float_quantized(module: str, storage: Storage, shape: Shape) -> list[Part]:
    scales = Part(f"{module}.weight_scale", FLOATS, _scales(storage, shape))
    return [Part(f"{module}.weight", _only("F8_E4M3"), (shape,)), scales]


def _mxfp8(module: str, storage: Storage, shape: Shape) -> list[Part]:
    scales = Part(f"{module}.weight_scale", EXPONENTS, _scales(storage, shape))
    return [Part(f"{module}.weight", _only("F8_E4M3"), (shape,)), scales]


def _nvfp4(module: str, storage: Storage, shape: Shape) -> list[Part]:
    return [
        Part(f"{module}.weight_packed", _only("U8"), ((shape[0], -(-shape[1] // 2)),)),
        Part(f"{module}.weight_scale", _only("F8_E4M3"), ((shape[0], -(-shape[1] // 16)),)),
        Part(f"{module}.weight_global_scale", _only("F32"), ((1,), ())),
    ]


def _mxfp4(module: str, storage: Storage, shape: Shape) -> list[Part]:
    return [
        Part(f"{module}.weight_packed", _only("U8"), ((shape[0], -(-shape[1] // 2)),)),
        Part(f"{module}.weight_scale", EXPONENTS, ((shape[0], -(-shape[1] // 32)),)),
    ]


def _gptq(module: str, storage: Storage, shape: Shape) -> list[Part]:
    outputs, inputs = shape
    groups = _groups(storage, shape)
    return [
        Part(f"{module}.qweight", _only("I32"), ((inputs * storage.bits // 32, outputs),)),
        Part(f"{module}.qzeros", _only("I32"), ((groups, outputs * storage.bits // 32),)),
        Part(f"{module}.scales", FLOATS, ((groups, outputs),)),
        Part(f"{module}.g_idx", _only("I32"), ((inputs,),), optional=True),
    ]


def _awq(module: str, storage: Storage, shape: Shape) -> list[Part]:
    outputs, inputs = shape
    groups, words = _groups(storage, shape), outputs * storage.bits // 32
    return [
        Part(f"{module}.qweight", _only("I32"), ((inputs, words),)),
        Part(f"{module}.qzeros", _only("I32"), ((groups, words),)),
        Part(f"{module}.scales", FLOATS, ((groups, outputs),)),
    ]


def _fp8(module: str, storage: Storage, shape: Shape) -> list[Part]:
    scales = frozenset({"F32", "BF16", "F16", *EXPONENTS})
    return [
        Part(f"{module}.weight", _only("F8_E4M3"), (shape,)),
        Part(f"{module}.weight_scale_inv", scales, _scales(storage, shape)),
    ]


def _four_bits(module: str, storage: Storage, shape: Shape) -> list[Part]:
    # Sizes depend on the block and on the type bytes are stored as, which stand in quant_state: its reader compares them.
    weight = f"{module}.weight"
    found = [
        Part(weight, frozenset({"U8", *FLOATS}), ()),
        Part(f"{weight}.absmax", _only("U8" if storage.nested else "F32"), ()),
        Part(f"{weight}.quant_map", _only("F32"), ((16,),)),
        Part(f"{weight}.quant_state.bitsandbytes__{storage.kind}", _only("U8"), ()),
    ]
    if storage.nested:
        found += [
            Part(f"{weight}.nested_absmax", _only("F32"), ()),
            Part(f"{weight}.nested_quant_map", _only("F32"), ((256,),)),
        ]
    return found


def _eight_bits(module: str, storage: Storage, shape: Shape) -> list[Part]:
    return [
        Part(f"{module}.weight", _only("I8"), (shape,)),
        Part(f"{module}.SCB", _only("F32"), ((shape[0],),)),
        Part(f"{module}.weight_format", _only("U8"), ((), (1,)), optional=True),
    ]


FORMS: dict[str, Callable[[str, Storage, Shape], list[Part]]] = {
    "pack-quantized": _pack_quantized,
    "int-quantized": _int_quantized,
    "float-quantized": _float_quantized,
    "mxfp8-quantized": _mxfp8,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "bnb-4bit": _four_bits,
    "bnb-8bit": _eight_bits,
}
