"""Which structures of a model may be cut under a request, decided before anything is calibrated."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from surgeon.derive import Source
from surgeon.errors import InputError, SurgeonError, Where
from surgeon.prune.levels import useful_modes
from surgeon.prune.request import PruneRequest
from surgeon.structure.check import check, is_uniform
from surgeon.structure.config import pruned_config
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.parts import Structure


class Permitted:
    """What may be cut.

    Args:
        source, structure, request: the model and what is asked for.
        decoder: whether it predicts next tokens.
        say: told what stays although it is usually cut.
    """

    def __init__(
        self,
        source: Source,
        structure: Structure,
        request: PruneRequest,
        decoder: bool,
        say: Callable[[str], None],
    ) -> None:
        self.source, self.structure, self.request = source, structure, request
        self._decoder, self._say = decoder, say

    @cached_property
    def structures(self) -> tuple[str, ...]:
        """The structures in force: those asked for, else the usual ones that this model can lose.

        Raises:
            UsageError, InputError: E262, E367 heads were asked for that no permitted class can lose; E317 nothing
                is left to cut.
        """
        request, given = self.request, self.request.structures
        usual = ("heads", "ffn") if self._decoder else ("ffn",)
        wanted = given or (*usual, *(("layers",) if request.method == "ziplm" else ()))
        if request.method == "depth":
            return wanted
        found = []
        for name in wanted:
            reason = self._immovable(name, "hidden" in wanted)
            if reason is None:
                found.append(name)
            elif given is not None:
                raise reason
            else:
                self._say(f"{'FFNs' if name == 'ffn' else name} stay as they are: {reason.message}")
        if not set(found) & {"heads", "ffn", "hidden"}:
            raise InputError("E317", f"neither heads nor FFN channels of this {self.structure.model_type} model can be cut",
                             where=Where(self.source.path), help="--method depth drops whole layers")  # fmt: skip
        return tuple(found)

    @cached_property
    def modes(self) -> tuple[str, ...]:
        """Kinds of attention units that may go."""
        if "heads" not in self.structures:
            return ()
        free = self.request.layout == "per-layer" or "hidden" in self.structures
        return tuple(mode for mode in useful_modes(self.structure) if free or self.unit_counts(mode))

    def unit_counts(self, mode: str) -> tuple[int, ...]:
        """Return how many units every attention may be left with in the requested layout, fewer than all, descending."""
        first = next(part for part in self.structure.attention if part is not None)
        units = first.groups if mode == "groups" else first.per_group
        counts = range(units - 1, 0, -1)
        return tuple(count for count in counts if self.allows(self.fewer_heads(mode, count)))

    def fewer_heads(self, mode: str, count: int) -> Cut:
        """Return the cut that leaves every attention its first units."""
        layers = []
        for part in self.structure.attention:
            heads = None
            if part is not None:
                heads = tuple(
                    head
                    for head in range(part.heads)
                    if (head // part.per_group if mode == "groups" else head % part.per_group) < count
                )
            layers.append(LayerCut(heads))
        return Cut(tuple(layers))

    def allows(self, cut: Cut) -> bool:
        """Say whether a cut can be written in the requested layout."""
        try:
            self.check(cut)
        except SurgeonError:
            return False
        return True

    def writable(self, cut: Cut) -> bool:
        """Say whether a stock class holds a cut."""
        return is_uniform(cut, self.structure) and self.allows(cut)

    def check(self, cut: Cut) -> None:
        """Refuse a cut that cannot be written in the requested layout; raises as `surgeon.structure.check.check`."""
        config, stock = self.source.checkpoint.config or {}, self.request.layout == "uniform"
        check(cut, self.structure, config, for_stock=stock, allow_norm_approx=self.request.allow_norm_approx)
        if not (stock and self.request.distill):
            return
        if pruned_config(config, self.structure, cut).get("model_type") != config.get("model_type"):
            raise InputError("E367", "only a Mistral class holds this number of heads, and a Llama cannot teach it",
                             help="leave out --distill, or heads from --structures")  # fmt: skip

    def _immovable(self, name: str, hidden: bool) -> SurgeonError | None:
        """Return why a kind of structure cannot be cut in this model and layout, None where it can."""
        parts = {"heads": self.structure.attention, "ffn": self.structure.ffn}.get(name)
        if parts is None:
            return None
        if not any(part is not None for part in parts):
            kind = "attention" if name == "heads" else "ffn"
            reasons = (text for _, text in self.structure.reasons if text.startswith(kind))
            return InputError("E317", f"this {self.structure.model_type} model has none that can be cut; {next(reasons, kind)}",
                              where=Where(self.source.path), help=f"leave {name} out of --structures")  # fmt: skip
        if name == "ffn" or hidden or any(self.unit_counts(mode) for mode in useful_modes(self.structure)):
            return None
        over_heads = any(part is not None and part.norms for part in self.structure.attention)
        if self.request.layout == "per-layer" and not over_heads:
            return None  # an attention may still go altogether
        try:
            self.check(self.fewer_heads(useful_modes(self.structure)[0], 1))
        except SurgeonError as reason:
            return reason
        return None
