"""A loaded model with gates on its structures: its losses with and without masks, the freeze, the end of bypasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.calibrate.answers import TokenSample
from surgeon.errors import InputError, UsageError
from surgeon.structure.parts import Structure
from surgeon.train import losses
from surgeon.train.batches import Batch, Order, batch_of, set_aside
from surgeon.train.bypass import Bypass, Statistics, end
from surgeon.train.cost import Cost, Key
from surgeon.train.freeze import Learned
from surgeon.train.gates import Control, Gate, Gates
from surgeon.train.running import Outputs, Runner
from surgeon.train.threshold_options import Options
from surgeon.train.threshold_task import ThresholdTask
from surgeon.train.trained_folder import TrainedFolder


class GatedModel:
    """A model with gates, and its losses."""

    def __init__(
        self,
        runner: Runner,
        structure: Structure,
        trained: TrainedFolder,
        samples: Sequence[TokenSample],
        options: Options,
    ) -> None:
        self.runner, self.options = runner, options
        train, held_out = set_aside(len(samples), options.held_out, options.seed)
        self.samples, self.held_out = [samples[n] for n in train], [samples[n] for n in held_out]
        self.order = Order(len(self.samples), options.batch, options.accumulation, options.seed)
        self.gates = Gates(Control())
        self.left_out: list[str] = [text for _, text in structure.reasons]
        self.outputs: dict[int, str] = {}
        self.bypasses: dict[int, Bypass] = {}
        runner.model.requires_grad_(options.train == "full")
        self._modules = {
            piece.tensor: runner.model.get_submodule(name.rpartition(".")[0])
            for name, pieces in trained.pieces.items() for piece in pieces if not piece.stored
        }  # fmt: skip
        self._attach(structure)
        if not self.gates.all():
            raise InputError(
                "E414",
                "the model has no structure to learn a threshold for",
                help="; ".join(self.left_out) or "surgeon inspect MODEL shows what it has",
            )
        if options.bypass_rank and not self.bypasses:
            raise UsageError(
                "E294",
                "a bypass goes beside an FFN, and no FFN has a threshold",
                help="learn thresholds for ffn too",
            )

    def _attach(self, structure: Structure) -> None:
        options, control = self.options, self.gates.control
        for layer in range(structure.layers):
            attention, ffn = structure.attention[layer], structure.ffn[layer]
            if attention is not None and "attention" in options.structures:
                if attention.norms:
                    self.left_out.append(
                        f"layer {layer}: attention stays whole, a norm over all heads would change"
                    )
                else:
                    out = attention.output
                    self.gates.attention[layer] = Gate(self._modules[out.weight], attention.groups, control,
                                                       input_axis=out.input_axis, min_keep=options.min_groups)  # fmt: skip
            if ffn is not None and "ffn" in options.structures:
                out = ffn.output
                module = self._modules[out.weight]
                self.gates.ffn[layer] = Gate(
                    module, ffn.width, control, input_axis=out.input_axis, min_keep=options.min_channels
                )
                self.outputs[layer] = out.weight
                if options.bypass_rank:
                    entry = next(self._modules[s.tensor] for s in ffn.inputs if s.tensor.endswith(".weight"))
                    self.bypasses[layer] = Bypass(entry, module, options.bypass_rank, options.seed, layer)

    def remove(self) -> None:
        self.gates.remove()
        for bypass in self.bypasses.values():
            bypass.remove()

    # ---- losses --------------------------------------------------------------------------------

    def task(self, cost: Cost) -> ThresholdTask:
        """Return what the loop learns."""
        others = []
        paths = [p for bypass in self.bypasses.values() for p in (bypass.first, bypass.second)]
        weights = [p for p in self.runner.model.parameters() if p.requires_grad]
        if paths or weights:
            others.append({"params": [*paths, *weights], "lr": self.options.rate, "weight_decay": 0.0})
        modules: dict[str, nn.Module] = {f"bypass {layer}": bypass for layer, bypass in self.bypasses.items()}
        if weights:
            modules["model"] = self.runner.model
        options = self.options
        return ThresholdTask(self.gates, cost, options.budget, options.steps, self.data_loss,
                             rate=options.threshold_rate, parts=options.accumulation, others=others, modules=modules)  # fmt: skip

    def data_loss(self, step: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        """Return a part's share of the loss on data."""
        batch = batch_of([self.samples[n] for n in self.order.rows(step, part)], self.runner.device)
        rows = [n for p in range(self.options.accumulation) for n in self.order.rows(step, p)]
        places = sum(len(s.ids) - max(s.answer_start, 1) for s in (self.samples[n] for n in rows))
        terms = self.terms(batch, all_terms=False)
        scale = 1 / places if self.runner.causal else 1 / self.options.accumulation
        total = torch.zeros((), device=self.runner.device)
        for name, term in terms.items():
            total = total + getattr(self.options, name) * term * scale
        return total, {name: float(term.detach()) * scale for name, term in terms.items()}

    def terms(self, batch: Batch, *, all_terms: bool) -> dict[str, Tensor]:
        """Return the terms of the loss, sums over predicted tokens; an encoder's is a mean over tokens."""
        terms: dict[str, Tensor] = {}
        masked = self._run(batch, self.gates.control.mode)
        if masked.logits is not None and (self.options.task or all_terms):
            terms["task"] = losses.cross_entropy(masked.logits, batch.targets)
        if self.options.divergence or all_terms:
            with torch.no_grad():
                whole_ = self._run(batch, "off")
            if masked.logits is not None:
                assert whole_.logits is not None
                terms["divergence"] = losses.divergence(
                    masked.logits, whole_.logits, self.options.temperature
                )
            else:
                assert masked.last is not None and whole_.last is not None
                terms["divergence"] = losses.square_head(masked.last, whole_.last, batch.valid)
        return terms

    def _run(self, batch: Batch, mode: str) -> Outputs:
        """Run a batch with the gates in one mode; without masks there is no bypass either."""
        control = self.gates.control
        before, control.mode, control.valid = control.mode, mode, batch.valid
        for bypass in self.bypasses.values():
            bypass.enabled = mode in ("learn", "fixed")
        try:
            return self.runner.run(batch)
        finally:
            control.mode = before

    # ---- the freeze ----------------------------------------------------------------------------

    def learned(self, scores: Callable[[int], np.ndarray] | None = None) -> dict[Key, Learned]:
        """Return scores and thresholds as the freeze wants them; with ``scores`` before anything is learned."""
        options = self.options
        found: dict[Key, Learned] = {}
        for layer, kind, gate in self.gates.all():
            values = gate.scores().double().cpu().numpy() if scores is None else scores(gate.units)
            grid = options.group_grid if kind == "attention" else options.ffn_grid
            found[layer, kind] = Learned(values, float(gate.tau.detach()), grid, gate.min_keep)
        return found

    @torch.no_grad()
    def fix(self, kept: Mapping[Key, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Set the masks for good, and end the bypasses; returns solved matrices and what to record."""
        self.gates.control.mode = "fixed"
        for layer, kind, gate in self.gates.all():
            mask = torch.zeros(gate.units, dtype=gate.tau.dtype, device=gate.tau.device)
            mask[list(kept[layer, kind])] = 1
            gate.fixed = mask
        if not self.bypasses:
            return {}, None
        for layer, bypass in self.bypasses.items():
            bypass.statistics = Statistics(torch.tensor(kept[layer, "ffn"], device=self.runner.device))
        for first in range(0, len(self.samples), self.options.batch):
            batch = batch_of(self.samples[first : first + self.options.batch], self.runner.device)
            for bypass in self.bypasses.values():
                assert bypass.statistics is not None
                bypass.statistics.valid = batch.valid
            self._run(batch, "fixed")
        solved, record = end(self.bypasses, self.gates.ffn, self.outputs, self.options.bypass_export)
        self._put(kept, solved)
        return solved, record

    def _put(self, kept: Mapping[Key, tuple[int, ...]], solved: Mapping[str, Tensor]) -> None:
        """Take the bypasses off and put what absorbed them in place: what is measured is what is exported."""
        for layer, bypass in self.bypasses.items():
            bypass.remove()
            if self.outputs[layer] in solved:
                gate, columns = self.gates.ffn[layer], list(kept[layer, "ffn"])
                weight: Any = gate.behind[0].weight
                place = (slice(None), columns) if gate.input_axis == 1 else columns
                weight[place] = solved[self.outputs[layer]].to(weight)
        self.bypasses = {}

    @torch.no_grad()
    def measure(self, mode: str) -> dict[str, float]:
        """Return the mean of every term on held-out samples with the gates in one mode; {} without samples."""
        totals: dict[str, float] = {}
        count = 0
        for first in range(0, len(self.held_out), self.options.batch):
            batch = batch_of(self.held_out[first : first + self.options.batch], self.runner.device)
            self.gates.control.mode = mode
            here = int(batch.predicts.sum()) if self.runner.causal else int(batch.valid.sum())
            count += here
            for term, value in self.terms(batch, all_terms=True).items():
                totals[term] = totals.get(term, 0.0) + float(value) * (1 if self.runner.causal else here)
        return {term: total / count for term, total in totals.items()}
