"""Round to nearest: every weight to the next value of its grid. No data; what every other method is compared with."""

from __future__ import annotations

from torch import Tensor

from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize.grids import clips, grid, round_to_grid, working


def quantize(
    weight: Tensor, scheme: Scheme, *, scale_dtype: str, clip: bool | None = None, importance: Tensor | None = None,
    module: str = "the matrix",
) -> Codes:  # fmt: skip
    """Return a matrix [out, in] rounded to its grid; arguments as of `surgeon.quantize.grids.grid`.

    ``clip`` None means up to 3 bits. The loss is not known here: see `surgeon.quantize.output_error.relative`.
    """
    weight = working(weight, module)
    scales, zeros = grid(
        weight,
        scheme,
        clip=clips(scheme, clip),
        scale_dtype=scale_dtype,
        importance=importance,
        module=module,
    )
    return round_to_grid(weight, scales, zeros, scheme)
