"""Tiny models with weights far from their initial ones, and observers that keep what they see."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "architectures"))
from tiny_models import LIBRARY, build, save

LENGTHS = (13, 17, 17, 18, 5)
"""Two equal, two nearly equal (padded together), two others."""


def texts(lengths=LENGTHS, vocabulary=67, seed=0):
    drawn = np.random.default_rng(seed)
    return [drawn.integers(3, vocabulary, length) for length in lengths]


@functools.cache
def _keep() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="surgeon-walk-models-")


@functools.cache
def model_folder(family: str, extra: tuple = (), hub_names: bool = True, class_name: str = "") -> Path:
    """Save a random model and return its folder; one per family and variant for the whole test run."""
    transformers.utils.logging.disable_progress_bar()
    folder = Path(_keep().name, f"{family}-{abs(hash((extra, hub_names, class_name)))}")
    torch.manual_seed(1)
    special = {"bos_token_id": 1, "eos_token_id": 2} if family == "gpt2" else {}
    model = build(
        family, class_name, **{**special, **{k: dict(v) if isinstance(v, tuple) else v for k, v in extra}}
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        corrections = (b for n, b in model.named_buffers() if "correction" in n or n.endswith("expert_bias"))
        for parameter in [*model.parameters(), *corrections]:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.25 * noise)
    model.tie_weights()
    save(model, family, folder, hub_names)
    return folder


def stock(folder: Path, **options):
    """Load a folder the way everybody does."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    if config["model_type"] in LIBRARY:
        library = {**config, "model_type": LIBRARY[config["model_type"]]}
        options["config"] = kind.config_class.from_dict(library)
    return kind.from_pretrained(folder, **options).eval()


def base_of(model):
    """Return the part of a stock model without its head; Llama 4 names another part than it has."""
    return model.model if type(model).__name__ == "Llama4ForCausalLM" else model.base_model


class Keeper:
    """Keeps every row, by module and sample."""

    def __init__(self, wanted=lambda module: True):
        self.wanted = wanted
        self.inputs: dict[tuple[str, int | None], torch.Tensor] = {}
        self.outputs: dict[tuple[str, int | None], torch.Tensor | None] = {}

    def wants(self, module):
        return self.wanted(module)

    def observe(self, module, inputs, outputs, sample):
        key = (module, sample)
        assert inputs.ndim == 2 and not inputs.requires_grad
        if outputs is not None:
            assert outputs.ndim == 2 and len(outputs) == len(inputs), module
        assert key not in self.inputs or sample is None, f"{key} came twice"
        self.inputs[key] = inputs.clone() if key not in self.inputs else torch.cat([self.inputs[key], inputs])
        self.outputs[key] = outputs if outputs is None else outputs.clone()


class Sums:
    """Sum of |x| and number of rows of every module; can be saved and restored."""

    def __init__(self, at=None, error=KeyboardInterrupt):
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self._at, self._error = at, error

    def wants(self, module):
        return True

    def observe(self, module, inputs, outputs, sample):
        if self._at is not None and module == self._at:
            raise self._error
        found = inputs.abs().sum(dim=0).float()
        self.sums[module] = self.sums[module] + found if module in self.sums else found
        self.rows[module] = self.rows.get(module, 0) + len(inputs)

    def state(self):
        return {
            f"{k} {module}": np.asarray(v)
            for k, table in (("sums", self.sums), ("rows", self.rows))
            for module, v in table.items()
        }

    def restore(self, state):
        self.sums = {k[5:]: torch.from_numpy(v.copy()) for k, v in state.items() if k.startswith("sums ")}
        self.rows = {k[5:]: int(v) for k, v in state.items() if k.startswith("rows ")}

    def equal(self, other):
        return (
            self.rows == other.rows
            and self.sums.keys() == other.sums.keys()
            and all(torch.equal(self.sums[module], other.sums[module]) for module in self.sums)
        )


class Nothing:
    def wants(self, module):
        return False

    def observe(self, module, inputs, outputs, sample):
        raise AssertionError("nothing was wanted")
