"""Directions against the library's hidden states, the files they lie in, and the sets they come from."""

from __future__ import annotations

import json
from pathlib import Path

import edit_models as em
import numpy as np
import pytest
import torch

from surgeon.calibrate.settings import Settings
from surgeon.calibrate.tokens import load_encoder
from surgeon.edit import direction_file
from surgeon.edit import directions as d
from surgeon.edit.examples import Example, Sets, read_sets
from surgeon.errors import InputError, UsageError

MODELS = Path(__file__).resolve().parents[1] / "models"


def sets(long=12, short=14, seed=0):
    drawn = np.random.default_rng(seed)

    def examples(count, longest):
        lengths = drawn.integers(6, longest, count)
        return tuple(
            Example(drawn.integers(3, 67, n), int(drawn.integers(1, n - 1)), i) for i, n in enumerate(lengths)
        )

    return Sets(examples(long, 30), examples(short, 12), {"name": "test"})


def stream_after_attention(model, ids, family):
    """The library's own residual stream between attention and FFN, by hooks on the norm that reads it."""
    found = []
    name = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}.get(family, "post_attention_layernorm")
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    handles = [
        getattr(layer, name).register_forward_pre_hook(lambda module, args: found.append(args[0][0]))
        for layer in layers
    ]
    with torch.no_grad():
        model(torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("window", d.WINDOWS)
def test_directions_equal_the_library(family, window):
    checkpoint, stream = em.opened(family)
    groups = sets()
    found = d.extract(checkpoint, stream, groups, Settings(batch_tokens=64), window=window)
    model = em.stock(checkpoint.folder)
    means = {"long": [], "short": []}
    for name, examples in (("long", groups.long), ("short", groups.short)):
        for e in examples:
            place = (
                slice(len(e.ids) - 1, None) if window == "last" else slice(e.answer_start - 1, len(e.ids) - 1)
            )
            means[name].append(
                [h[place].double().mean(0).numpy() for h in stream_after_attention(model, e.ids, family)]
            )
    for layer in range(3):
        a, b = (np.array([m[layer] for m in means[name]]) for name in ("long", "short"))
        np.testing.assert_allclose(found.vectors[layer], a.mean(0) - b.mean(0), atol=2e-5 * np.abs(a).max())
        assert found.separated[layer] == d.separability(a.astype(np.float32), b.astype(np.float32), 0)
    assert found.examples == (12, 14)


def test_layer_site_is_the_layer_output_and_inputs_are_those_of_short():
    checkpoint, stream = em.opened("qwen3")
    groups = sets()
    found = d.extract(checkpoint, stream, groups, Settings(), site="layer", window="last")
    model = em.stock(checkpoint.folder)
    seen, last = [], []
    model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0][0, -1]))
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0][0, -1].double())
    )
    hidden = {"long": [], "short": []}
    with torch.no_grad():
        for name, group in (("long", groups.long), ("short", groups.short)):
            seen.clear()
            for e in group:
                states = model(torch.from_numpy(e.ids)[None], output_hidden_states=True).hidden_states
                hidden[name].append(torch.stack([states[1][0, -1], states[2][0, -1], last.pop()]).double())
    expected = torch.stack(hidden["long"]).mean(0) - torch.stack(hidden["short"]).mean(0)
    for layer in range(3):
        np.testing.assert_allclose(found.vectors[layer], expected[layer].numpy(), atol=1e-4)
    np.testing.assert_allclose(found.inputs[1], torch.stack(seen).mean(0).numpy(), atol=1e-5)


def test_every_example_counts_once():
    """One example of many tokens and one of few: the mean of their means, not of their tokens."""
    observer = d.ExampleMeans(["m"], [Example(np.arange(101), 1), Example(np.arange(3), 1)], "response")
    observer.observe("m", torch.ones(101, 2), None, 0)
    observer.observe("m", torch.full((3, 2), 5.0), None, 1)
    assert observer.means["m"].mean(0).tolist() == [3.0, 3.0]


def test_separability_of_clusters_and_of_noise():
    drawn = np.random.default_rng(0)
    noise = drawn.normal(size=(2, 90, 8))
    shift = np.array([4.0] + [0.0] * 7)
    assert d.separability(noise[0] + shift, noise[1] - shift, 0) == 1.0
    assert 0.2 < d.separability(noise[0], noise[1], 0) < 0.8


def test_parallel_layers_have_no_place_between():
    _, stream = em.opened("phi")
    with pytest.raises(UsageError, match="read the stream at the same place"):
        stream.site("attn")
    assert set(stream.site("layer")) == {0, 1, 2}


def test_file_round_trip_and_damage(scratch):
    checkpoint, stream = em.opened("qwen3")
    made = em.directions_for(checkpoint, stream)
    path = scratch / "d.safetensors"
    made.save(path)
    first = path.read_bytes()
    found = direction_file.load(path)
    assert found.digest == made.digest and found.record() == made.record()
    assert all(np.array_equal(found.vectors[n], made.vectors[n]) for n in made.vectors)
    found.save(path)
    assert path.read_bytes() == first
    from safetensors.numpy import load_file  # another reader of the same format

    assert np.array_equal(load_file(path)["direction.1"], made.vectors[1])
    assert direction_file.check_belongs(found, checkpoint, stream.hidden, force=False) == []
    broken = bytearray(first)
    broken[-3] ^= 0x40
    path.write_bytes(bytes(broken))
    with pytest.raises(InputError, match="is damaged"):
        direction_file.load(path)
    with pytest.raises(InputError, match="holds no directions"):
        direction_file.load(checkpoint.headers[0].file)


def test_directions_of_another_model_or_width(scratch):
    checkpoint, stream = em.opened("qwen3")
    other, _ = em.opened("llama")
    made = em.directions_for(checkpoint, stream)
    with pytest.raises(InputError, match="from another model"):
        direction_file.check_belongs(made, other, stream.hidden, force=False)
    assert direction_file.check_belongs(made, other, stream.hidden, force=True)
    with pytest.raises(InputError, match="have 32 channels"):
        direction_file.check_belongs(made, other, 64, force=True)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def thinking(digits):
    return {"prompt": "Add 347+258.", "thinking": "1" * digits, "response": "answer:605"}


def test_one_file_is_split_by_its_thinking(scratch):
    encoder = load_encoder(MODELS / "base")
    rows = [thinking(n) for n in [*range(1, 16), *range(60, 75), 30, 31]]
    rows[0] = {"prompt": "Add 347+258.", "response": "<think>1</think>answer:605"}
    found = read_sets(encoder, responses=write(scratch / "r.jsonl", rows), thresholds=(50, 20))
    assert (len(found.long), len(found.short)) == (15, 15) and found.record["between"] == 2
    assert min(e.thinking for e in found.long) >= 60 and max(e.thinking for e in found.short) <= 15
    assert all(0 < e.answer_start < len(e.ids) for e in found.long)
    assert len(found.warnings) == 2 and "uncertain" in found.warnings[0]


def test_too_few_examples_and_wrong_sources(scratch):
    encoder = load_encoder(MODELS / "base")
    few = write(scratch / "few.jsonl", [thinking(n) for n in [*range(1, 16), 60, 61]])
    with pytest.raises(InputError, match="2 examples with long thinking") as caught:
        read_sets(encoder, responses=few, thresholds=(50, 20))
    assert caught.value.code == "E415"
    plain = write(scratch / "plain.jsonl", [{"prompt": "Add 1+2.", "response": "answer:3"}])
    with pytest.raises(InputError, match="neither thinking nor <think>"):
        read_sets(encoder, responses=plain)
    with pytest.raises(InputError, match="are the same file"):
        read_sets(encoder, long=few, short=few)
    with pytest.raises(UsageError, match="both sets"):
        read_sets(encoder, long=few)
    with pytest.raises(UsageError, match="thresholds"):
        read_sets(encoder, responses=few, thresholds=(10, 20))


def test_equal_activations_are_refused():
    checkpoint, stream = em.opened("llama")
    same = tuple(Example(np.arange(3, 12), 2, i) for i in range(10))
    with pytest.raises(InputError, match="no direction"):
        d.extract(checkpoint, stream, Sets(same, same, {}), Settings())


def test_remarks_about_directions_that_say_little():
    checkpoint, stream = em.opened("llama")
    made = em.directions_for(checkpoint, stream)
    made.vectors[1][:] = 1e-4
    made.separated.update(dict.fromkeys(made.separated, 0.5))
    found = d.remarks(made)
    assert "layers 1:" in found[0] and "50%" in found[1]
