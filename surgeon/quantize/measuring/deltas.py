"""The errors D = Q(W) - W that the quantizer makes in matrices that share their inputs, scheme by scheme.

A Hessian is factorised once for all widths. Where few tokens reached a matrix it is drawn to its diagonal first, by a share that
is chosen for each scheme (`surgeon.quantize.shrinkage`), as when the matrix is really quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.matrices import Matrix, read_matrix
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError
from surgeon.formats import float4
from surgeon.formats.compressed_runtimes import fused
from surgeon.formats.scheme import Scheme
from surgeon.quantize import rtn
from surgeon.quantize.factor import Factor, factorise
from surgeon.quantize.forms import Form
from surgeon.quantize.gptq import quantize_with
from surgeon.quantize.grids import group_of
from surgeon.quantize.observing import Inputs
from surgeon.quantize.shrinkage import choose
from surgeon.quantize.solving import WORKED_ON, Options


def fitting(matrix: Matrix, menu: Sequence[Scheme], form: Form) -> list[Scheme]:
    """Return the schemes that can store a matrix of this shape."""
    found = []
    for scheme in menu:
        try:
            form.layout(name_of(matrix), (matrix.rows, matrix.columns), scheme)
            if scheme.kind == "int":
                group_of(matrix.columns, scheme, matrix.label)
        except InputError:
            continue
        found.append(scheme)
    return found


def name_of(matrix: Matrix) -> str:
    """Return the name under which a form stores a matrix."""
    return matrix.tensor if matrix.expert is None else f"{matrix.module}.weight"


class Quantizer:
    """Quantizes matrices as the model's will be.

    Args:
        form: says how schemes are stored.
        menu: schemes.
        options: method, order, damp, block, clip.
    """

    def __init__(self, form: Form, menu: Sequence[Scheme], options: Options) -> None:
        self._form, self._menu, self._options = form, tuple(menu), options

    def shared_scales(self, checkpoint: Checkpoint, matrices: Sequence[Matrix]) -> dict[str, np.float32]:
        """Return, by label, the one scale of NVFP4 of matrices that are loaded as one; nothing without NVFP4."""
        if all(scheme.kind != "nvfp4" for scheme in self._menu):
            return {}
        by_name = {name_of(matrix): matrix for matrix in matrices}
        found: dict[str, np.float32] = {}
        for group in fused(by_name):
            scale = float4.shared_scale(read_matrix(checkpoint, by_name[name]).numpy() for name in group)
            found |= {by_name[name].label: scale for name in group}
        return found

    def deltas(
        self, weights: Mapping[Matrix, Tensor], inputs: Inputs | None, shared: Mapping[str, np.float32]
    ) -> Iterator[tuple[Matrix, int, Tensor]]:
        """Yield (matrix, place of the scheme in the menu, D [out, in] in float32).

        Args:
            weights: matrices with the same inputs -> W [out, in], float32.
            inputs: sums over these inputs; None: integers are rounded to nearest.
            shared: see `shared_scales`.
        """
        fits = {matrix: fitting(matrix, self._menu, self._form) for matrix in weights}
        solver = None
        if self._options.method == "gptq" and inputs is not None:
            solver = _Solver(inputs, next(iter(weights)), self._form.scale_dtype, self._options)
        for place, scheme in enumerate(self._menu):
            members = [matrix for matrix in weights if scheme in fits[matrix]]
            k = None
            if members and solver is not None and scheme.kind == "int":
                k = solver.shrinkage([weights[matrix] for matrix in members], scheme)
            for matrix in members:
                yield (
                    matrix,
                    place,
                    self._delta(matrix, weights[matrix], scheme, solver, k, shared.get(matrix.label)),
                )

    def _delta(
        self, matrix: Matrix, weight: Tensor, scheme: Scheme, solver: _Solver | None, k: float | None,
        shared: np.float32 | None,
    ) -> Tensor:  # fmt: skip
        if scheme.kind != "int":
            values = self._form.encode(name_of(matrix), weight.cpu().numpy(), scheme, shared)[1]
            return torch.from_numpy(np.array(values, dtype=np.float32)).to(weight) - weight
        if solver is not None and k is not None:
            return solver.values(weight, scheme, k) - weight
        # Where GPTQ has nothing to go by, the range is searched whatever the width.
        clip = True if solver is not None else self._options.clip
        codes = rtn.quantize(
            weight, scheme, scale_dtype=self._form.scale_dtype, clip=clip, module=matrix.label
        )
        return torch.from_numpy(codes.values()).to(weight) - weight


class _Solver:
    """GPTQ for matrices that share their inputs, at any width."""

    def __init__(self, inputs: Inputs, first: Matrix, scale_dtype: str, options: Options) -> None:
        self._options, self._scale_dtype, self._label = options, scale_dtype, first.label
        self._moments = inputs.moments(first.module)
        self._whole = inputs.whole(first.module).hessian
        self._divided = inputs.divided(first.module)
        self._reached = bool(inputs.tokens(first.module)) and bool(
            self._whole.diagonal().any() or not first.routed
        )
        self._factors: dict[tuple[float, int], Factor] = {}

    def shrinkage(self, weights: Sequence[Tensor], scheme: Scheme) -> float | None:
        """Return how far to draw the Hessian to its diagonal for a scheme, or None where there is nothing to go by."""
        options = self._options
        if not self._reached:
            return None
        if not self._divided:
            return 0.0
        return choose(
            weights, *self._moments, scheme, scale_dtype=self._scale_dtype, order=options.order, damp=options.damp,
            block=options.block, clip=options.clip, module=self._label,
        ).k  # fmt: skip

    def values(self, weight: Tensor, scheme: Scheme, k: float) -> Tensor:
        """Return what the codes of a matrix stand for, a range of outputs after the other where it is very large."""
        group = group_of(weight.shape[1], scheme, self._label)
        options = self._options
        key = (k, group if options.order == "group-aware" else 0)
        if key not in self._factors:
            self._factors.clear()  # each is as large as the Hessian
            self._factors[key] = factorise(
                self._whole,
                k=k,
                order=options.order,
                group=group,
                damp=options.damp,
                module=self._label,
            )
        step = max(1, WORKED_ON // weight.shape[1])
        parts = [
            quantize_with(
                weight[start : start + step], self._factors[key], scheme, scale_dtype=self._scale_dtype, block=options.block,
                clip=options.clip, known_energy=math.nan, module=self._label,
            )[0]
            for start in range(0, len(weight), step)
        ]  # fmt: skip
        return torch.from_numpy(np.concatenate([codes.values() for codes in parts])).to(weight)
