"""A low-rank path beside an FFN while thresholds are learned, and what becomes of it afterwards.

    y = FFN(x) + x A B        A [d, r], B [r, d] = 0 at the start

It keeps information flowing past an FFN that becomes very narrow (arXiv 2309.14157). A stock model has no
place for it, and no FFN with a nonlinearity can hold it exactly. So it is either dropped, which is refused when it
contributes more than 1 %, or absorbed: the kept columns of the output matrix are solved again so that they give
y as well as they can, and what is left is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import InputError, UsageError
from surgeon.seeds import stream_key
from surgeon.train.gates import Gate

EXPORTS = ("drop", "absorb")
NEGLIGIBLE = 0.01
"""Largest share of an FFN's output that may be dropped with the bypass."""


class Bypass(nn.Module):
    """The path beside one FFN.

    Args:
        entry: the module whose input is the FFN's.
        output: the module whose output the path is added to: the one behind the gate.
        rank: r.
        seed: of A, together with ``layer``.
        layer: its number.
    """

    def __init__(self, entry: nn.Module, output: nn.Module, rank: int, seed: int, layer: int) -> None:
        super().__init__()
        weight: Any = output.weight
        hidden = weight.shape[0] if isinstance(output, nn.Linear) else weight.shape[1]
        generator = torch.Generator().manual_seed(stream_key(seed, layer, "bypass") >> 1)
        start = torch.randn(hidden, rank, generator=generator) / hidden**0.5
        self.first = nn.Parameter(start.to(weight.device))
        self.second = nn.Parameter(torch.zeros(rank, hidden, device=weight.device))
        self.enabled = True
        self._inputs: Tensor | None = None
        self.statistics: Statistics | None = None
        self._handles = [entry.register_forward_pre_hook(self._note), output.register_forward_hook(self._add)]

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inputs = args[0] if self.enabled else None

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._inputs is None:
            return output
        added = ((self._inputs.float() @ self.first) @ self.second).to(output.dtype)
        self._inputs = None
        if self.statistics is not None:
            self.statistics.add(args[0], output, added, getattr(module, "bias", None))
        return output + added

    def remove(self) -> None:
        """Take the path off."""
        for handle in self._handles:
            handle.remove()


@dataclass
class Statistics:
    """Sums over tokens that tell what a bypass contributes and what absorbs it, float64.

    Attributes:
        kept: kept channels, ascending.
        valid: bool [samples, tokens] of the present batch; None counts all.
    """

    kept: Tensor
    valid: Tensor | None = None
    gram: Tensor | None = None
    cross: Tensor | None = None
    outputs: float = 0.0
    added: float = 0.0

    @torch.no_grad()
    def add(self, inputs: Tensor, output: Tensor, added: Tensor, bias: Tensor | None) -> None:
        """Add a batch: inputs of the output matrix, its output, what the bypass adds, its bias."""

        def rows(values: Tensor) -> Tensor:
            flat = values.detach().reshape(-1, values.shape[-1]).double()
            return flat if self.valid is None else flat[self.valid.reshape(-1)]

        whole = rows(output) + rows(added)
        self.outputs += float(whole.square().sum())
        self.added += float(rows(added).square().sum())
        wanted = whole if bias is None else whole - bias.detach().double()
        seen = rows(inputs)[:, self.kept]
        gram, cross = seen.T @ seen, wanted.T @ seen
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross

    @property
    def share(self) -> float:
        """||x A B|| / ||y||."""
        return (self.added / self.outputs) ** 0.5 if self.outputs else 0.0

    def absorbed(self, weight: Tensor, damping: float = 1e-6) -> tuple[Tensor, float]:
        """Return the solved columns [out, kept] and the residual ||y - W x|| / ||x A B||.

        Ridge towards the present columns W_0: W = W_0 + (Y X' - W_0 X X') (X X' + lambda I)^-1, lambda
        ``damping`` times the mean of the diagonal. The residual is 1 when nothing was absorbed.

        Args:
            weight: present columns of the kept channels, float64 [out, kept].
            damping: relative.
        """
        assert self.gram is not None and self.cross is not None
        lam = damping * float(self.gram.diagonal().mean()) or 1.0
        missing = self.cross - weight @ self.gram
        step = torch.linalg.solve(
            self.gram + lam * torch.eye(len(self.gram), dtype=torch.float64).to(self.gram), missing.T
        ).T
        # ||xAB - D x||^2 with D the step: the present columns give everything but the bypass exactly
        left = self.added - 2 * float((step * missing).sum()) + float(((step @ self.gram) * step).sum())
        residual = (max(left, 0.0) / self.added) ** 0.5 if self.added else 0.0
        return weight + step, residual


def end(
    bypasses: Mapping[int, Bypass], gates: Mapping[int, Gate], names: Mapping[int, str], export: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return solved output matrices by checkpoint name, and what happened to each layer's bypass.

    Args:
        bypasses: by layer, with full statistics.
        gates: of the FFNs, for the output matrices.
        names: the output matrix's name in the checkpoint, by layer.
        export: "drop" or "absorb".

    Raises:
        InputError: E413 a bypass contributes too much to be dropped.
        UsageError: E294 another way.
    """
    if export not in EXPORTS:
        raise UsageError(
            "E294", f"a bypass cannot be exported with {export!r}", help="use " + ", ".join(EXPORTS)
        )
    solved: dict[str, Tensor] = {}
    record: dict[str, Any] = {}
    for layer, bypass in bypasses.items():
        statistics = bypass.statistics
        assert statistics is not None
        entry: dict[str, Any] = {"share": statistics.share}
        if export == "drop" and statistics.share >= NEGLIGIBLE:
            raise InputError("E413", f"the bypass of layer {layer} makes {statistics.share:.1%} of the FFN's output and cannot be dropped",
                             help='let the output matrix absorb it, or learn without a bypass')  # fmt: skip
        if export == "absorb" and statistics.added:
            module: Any = gates[layer].behind[0]
            axis = gates[layer].input_axis
            columns = module.weight.detach().double()
            columns = (columns.T if axis == 0 else columns)[:, statistics.kept]
            found, entry["residual"] = statistics.absorbed(columns)
            solved[names[layer]] = (found.T if axis == 0 else found).float().contiguous().cpu()
        record[str(layer)] = entry
    return solved, record
