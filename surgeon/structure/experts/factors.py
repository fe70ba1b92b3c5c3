"""Factors on an expert's contribution, baked into what is stored of it.

Multiplying an expert's routing weight by beta is multiplying its down projection and that one's bias by beta. A power
of two is exact in every float type; of quantized experts the scales are multiplied, which is exact, too: MXFP4 has
exponents, to which log2(beta) is added.
"""

from __future__ import annotations

import re

from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.structure.experts.parts import ExpertLayer, ExpertTensor
from surgeon.structure.experts.slices import AddExponent, Change, Multiply, power_of_two

_SCALES = re.compile(r"[._](weight_scale_inv|weight_scale|scale_inv|scales?)$")
_OF_INPUTS = re.compile(r"[._](input|activation)_scale$")


def takes_factor(layer: ExpertLayer, tensor: ExpertTensor, expert: int) -> bool:
    """Say whether a factor on an expert is applied to this tensor: down, its bias, or the scales of down.

    Raises:
        InputError: E425 the expert is stored in a form that cannot be multiplied.
    """
    if tensor.role == "down_bias":
        return True
    if tensor.role != "down":
        return False
    down = [other for other in layer.of("down") if other.expert == tensor.expert]
    scales = [other.name for other in down if _is_scale(other)]
    if len(scales) > 1 or (not scales and any(other.companion for other in down)):
        raise _cannot(
            tensor,
            f"expert {expert} of layer {layer.index} is stored as {layer.quantized or 'packed numbers'}, which cannot be multiplied",
        )
    return tensor.name in scales if scales else True


def factor_on(
    layer: ExpertLayer, tensor: ExpertTensor, factor: float, code: str, *, as_numbers: bool
) -> tuple[float, Change | None]:
    """Return (factor on values, change of stored bits) for a tensor that `takes_factor`; one of them does nothing.

    Args:
        code: storage type of the tensor.
        as_numbers: its values are computed anyway.

    Raises:
        InputError: E425 the storage cannot hold the product.
    """
    exact = power_of_two(factor) is not None
    if DTYPES[code].family == "float":
        as_bits = exact and not as_numbers
        return (1.0, Multiply(tensor.name, code, factor)) if as_bits else (factor, None)
    exponents = code == "F8_E8M0" or (code == "U8" and layer.quantized == "mxfp4")
    if exponents and exact:
        return 1.0, AddExponent(tensor.name, factor)
    raise _cannot(tensor, f"{printable(tensor.name)} holds scales as {code}, which cannot be multiplied by {factor:g}",
                  "use a power of two" if exponents else None)  # fmt: skip


def _is_scale(tensor: ExpertTensor) -> bool:
    return tensor.companion and bool(_SCALES.search(tensor.name)) and not _OF_INPUTS.search(tensor.name)


def _cannot(tensor: ExpertTensor, message: str, help: str | None = None) -> InputError:
    return InputError("E425", message, where=Where(tensor=printable(tensor.name)),
                      help=help or "bake the factor into the model it was quantized from")  # fmt: skip
