"""Layers looked at several times, and the stream of the model without replacements, against plain passes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from walk_models import Keeper, Sums, model_folder, texts

from surgeon.calibrate.matrices import matrices_of
from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import EnvironmentFault

ONE = Settings(threads=1, batch_tokens=64)
STREAMED = Settings(threads=1, batch_tokens=64, stream_experts=True)


class Repeated(Sums):
    """Asks for every layer three times and keeps the sums of each time."""

    def __init__(self):
        super().__init__()
        self.times = {}

    def again(self, layer):
        self.times.setdefault(layer, []).append((self.sums, self.rows))
        self.sums, self.rows = {}, {}
        return len(self.times[layer]) < 3


def hidden(walk):
    return torch.cat([states for _, states in walk.hidden()])


@pytest.mark.parametrize("settings", [ONE, STREAMED], ids=["whole", "streamed"])
def test_a_layer_is_shown_again_without_changing_the_next(settings):
    checkpoint = open_path(model_folder("qwen3_moe"))
    plain, repeated = Sums(), Repeated()
    with Walk(checkpoint, texts(), settings) as walk:
        walk.run(plain)
        wanted = hidden(walk)
    with Walk(checkpoint, texts(), settings) as walk:
        walk.run(repeated)
        assert torch.equal(hidden(walk), wanted)
        layers = walk.layers
    assert sorted(repeated.times) == list(range(layers))
    for times in repeated.times.values():
        assert len(times) == 3
        for sums, rows in times[1:]:
            assert rows == times[0][1] and all(torch.equal(sums[name], times[0][0][name]) for name in sums)
    # The embedding is shown before the first layer, and what follows the last is kept apart.
    seen = {name: value for times in repeated.times.values() for name, value in times[0][0].items()}
    seen |= repeated.sums
    assert seen.keys() == plain.sums.keys() and all(
        torch.equal(seen[name], plain.sums[name]) for name in seen
    )


class Beside(Keeper):
    """Keeps also what the model without replacements feeds each module."""

    def __init__(self):
        super().__init__()
        self.originals = {}

    def observe_original(self, module, inputs):
        held = self.originals.get(module)
        self.originals[module] = inputs.clone() if held is None else torch.cat([held, inputs])


@pytest.mark.parametrize("memory", [None, "little"])
def test_the_original_model_runs_beside_the_replaced_one(memory, tmp_path):
    checkpoint = open_path(model_folder("llama"))
    samples = texts((13, 17, 5))
    settings = Settings(threads=1, batch_tokens=20)
    with Walk(checkpoint, samples, settings) as walk:
        plain = Keeper()
        walk.run(plain)
        layers = matrices_of(checkpoint, walk.skeleton)

    def halved(layer):
        names = [matrix.tensor for matrix in layers[layer]] if layer == 0 else []
        return {name: torch.from_numpy(checkpoint.read(name, 0, checkpoint.tensors[name].elements).copy())
                .reshape(checkpoint.tensors[name].shape) / 2 for name in names}  # fmt: skip

    with Walk(checkpoint, samples, settings) as walk:
        changed = Keeper()
        walk.run(changed, replace=halved)
    with Walk(checkpoint, samples, settings, original=True) as walk:
        if memory:
            object.__setattr__(walk._memory, "spill", True)
        found = Beside()
        walk.run(found, replace=halved)
    assert found.inputs.keys() == changed.inputs.keys()
    assert all(torch.equal(found.inputs[key], changed.inputs[key]) for key in found.inputs)
    for module in (matrix.module for layer in layers for matrix in layer):
        wanted = torch.cat([rows for (name, _), rows in plain.inputs.items() if name == module])
        assert torch.equal(found.originals[module], wanted)
    later = layers[1][0].module
    assert any(
        not torch.equal(plain.inputs[key], changed.inputs[key]) for key in plain.inputs if key[0] == later
    )


def test_what_does_not_fit_in_memory_is_refused_where_it_cannot_be_read_piece_by_piece():
    checkpoint = open_path(model_folder("qwen3_moe"))
    with pytest.raises(EnvironmentFault, match="beside the original model"):
        Walk(checkpoint, texts(), STREAMED, original=True)
    with Walk(checkpoint, texts(), STREAMED) as walk, pytest.raises(EnvironmentFault, match="layer by layer"):
        walk.run(Sums(), replace=lambda layer: {})
