"""What a native recipe may hold: its keys, and for every verb the options of its request model.

The request models are the ones of the command line, so a recipe step takes what the command takes. Left out is what
belongs to the machine or to the person who runs the recipe (threads, device, where things are written) and what
could reach beyond the recipe (E2008): a recipe is data, from wherever it comes.

The module can be called: ``surgeon.recipe.schema()`` is `surgeon.recipe.json_schema.json_schema`.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from typing import Any

from surgeon.callable_package import make_callable

make_callable(__name__, "surgeon.recipe.json_schema:json_schema")

VERSION = 1

TOP = (
    "version",
    "name",
    "description",
    "seed",
    "defaults",
    "extends",
    "models",
    "data",
    "steps",
    "gates",
    "publish",
    "fuse",
    "sweep",
)
DATA = ("dataset", "file", "config", "split", "samples", "sequence_length")
PUBLISH = ("step", "when")
WHEN = ("on_pass", "always")

MACHINE = {
    "threads": "--threads", "memory_limit": "--memory-limit", "device": "--device", "offline": "--offline", "work": "--work",
    "resume": "--resume", "overwrite": "--overwrite", "strict": "--strict",
}  # fmt: skip
"""Options of the run, not of the recipe -> how they are given."""

WRITES = "a recipe cannot say where things are written: results lie in OUT.work"

OUTPUTS = ("output", "out", "report", "samples_out", "save_direction")
"""Options of commands that say where something is written."""

REFUSED: dict[str, dict[str, str]] = {
    "merge": {"sweep": "the recipe's own sweep: varies any value", "allow_pickle": "pickles are a permission of whoever runs them: convert the model once with surgeon export --allow-pickle"},
    "prune": {"scores": WRITES, "nested": "a nested family is several models; surgeon prune makes it"},
    "edit": {"save_direction": WRITES, "control_vector": WRITES},
    "quantize": {},
    "measure": {"output": WRITES},
    "eval": {
        "output": WRITES, "samples_out": WRITES, "gate": "gates: of the recipe decides over all steps",
        "include_path": "task files of lm-eval can run code: surgeon eval --include-path is for your own",
    },
    "export": {"allow_pickle": "pickles are a permission of whoever runs them: convert the model once with surgeon export --allow-pickle"},
}  # fmt: skip
"""Verb -> option that its command has and a recipe has not -> why."""

FILES = frozenset({"latency_table", "from_report", "plan", "sensitivities", "direction", "long", "short", "layer_scores", "config",
                   "expert_record", "chat_template"})  # fmt: skip
"""Options that name a file."""
TEXTS = frozenset({"calibration", "responses", "questions", "perplexity", "text"})
"""Options that name data: a data set of the recipe, a file, or a dataset id."""
SIZES = frozenset({"max_shard_size", "target_size"})
COUNTS = frozenset({"target_params"})


@dataclass(frozen=True)
class Verb:
    """One kind of step.

    Attributes:
        models: modules and classes of the request models; prune has two.
        references: options that name a model or a step.
        shapes: keys that are not options of the request model.
        writes: the step makes a model.
    """

    name: str
    models: tuple[tuple[str, str], ...]
    references: frozenset[str] = frozenset()
    shapes: tuple[str, ...] = ()
    writes: bool = True
    replaced: frozenset[str] = field(default_factory=frozenset)

    @functools.cached_property
    def classes(self) -> tuple[Any, ...]:
        return tuple(getattr(importlib.import_module(module), name) for module, name in self.models)

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Option -> field of the request model, of what a recipe may set."""
        found: dict[str, Any] = {}
        for model in self.classes:
            for name, info in model.model_fields.items():
                found.setdefault(info.alias or name, info)
        closed = {*MACHINE, *REFUSED[self.name], *self.replaced}
        return {name: info for name, info in found.items() if name not in closed}

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.shapes, *self.options)))


VERBS = {
    verb.name: verb
    for verb in (
        Verb("merge", (("surgeon.merge.request", "MergeRequest"),), frozenset({"base", "text_from", "tokenizer", "vocab"}),
             ("method", "base", "models", "parameters", "overrides"), replaced=frozenset({"param", "lambda", "t", "normalize"})),
        Verb("prune", (("surgeon.prune.request", "PruneRequest"), ("surgeon.prune.experts.request", "ExpertRequest")),
             frozenset({"model"}), ("model", "method", "target")),
        Verb("edit", (("surgeon.edit.request", "EditRequest"),), frozenset({"model"}), ("model", "method")),
        Verb("quantize", (("surgeon.quantize.request", "QuantizeRequest"),), frozenset({"model"}), ("model", "target", "schemes"),
             replaced=frozenset({"scheme"})),
        Verb("measure", (("surgeon.measure.request", "MeasureRequest"),), frozenset({"model", "baseline"}), ("model", "baseline"),
             writes=False),
        Verb("eval", (("surgeon.evaluate.request", "EvalRequest"),), frozenset({"model", "baseline", "kl"}),
             ("model", "baseline", "tasks", "metrics"), writes=False),
        Verb("export", (("surgeon.deploy.export_request", "ExportRequest"),), frozenset({"model"}), ("model", "to")),
    )
}  # fmt: skip
"""Verb -> what its step takes."""

TARGETS = {
    "prune": {
        "speedup": "target_speedup", "params": "target_params", "size": "target_size", "sparsity": "sparsity",
        "keep_layers": "keep_layers", "keep_experts": "keep_experts",
    },
    "quantize": {"bits": "target_bits", "size": "target_size", "kl": "target_kl"},
}  # fmt: skip
"""Verb -> word under ``target:`` -> option."""

METRICS = ("perplexity", "kl", "answer_length", "accuracy")
"""Words under ``metrics:`` of an eval step."""
