"""Experts one by one: what observers see against routing computed by brute force from the files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from walk_models import Keeper, Sums, base_of, model_folder, stock, texts

from surgeon.calibrate.experts import usual_rows
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.checkpoint import open_path

ONE = Settings(threads=1, batch_tokens=64)
FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "granitemoe",
    "gpt_oss",
]
FURTHER = [
    "phimoe",
    "glm4_moe",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "minimax_m2",
    "minimax",
    "qwen3_next",
    "qwen3_5_moe_text",
    "lfm2_moe",
    "jamba",
    "llama4_text",
    "granitemoeshared",
    "granitemoehybrid",
    "kimi_linear",
    "kimi_k2",
    "nemotron_h",
]
"""Families of which the default run does less."""

ALL = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in FURTHER)]
PARTS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("block_sparse_moe", ("w1", "w3", "w2"), "mlp")
PLACES = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2", "phimoe", "kimi_linear"), MIXTRAL),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), ("block_sparse_moe", PARTS, "block_sparse_moe")),
    "lfm2_moe": ("feed_forward", ("w1", "w3", "w2"), "feed_forward"),
    "jamba": ("feed_forward", PARTS, "feed_forward"),
    "llama4_text": ("feed_forward", PARTS, "feed_forward"),
    "nemotron_h": ("mixer", ("up_proj", "up_proj", "down_proj"), "mixer"),
}  # fmt: skip
"""Block in the files, names of gate, up and down there, block in memory; Nemotron-H has no gate."""


def place_of(family, hub, layer):
    block, parts, memory = PLACES.get(family, ("mlp", PARTS, "mlp"))
    prefix = "backbone" if family == "nemotron_h" and hub else "model"
    return (
        f"{prefix}.layers.{layer}.{block if hub else memory}",
        parts if hub or family == "nemotron_h" else PARTS,
    )


def weights_of(tensors, family, hub, layer, expert):
    """Return gate, up, down [out, in] and their biases of one expert, straight from the file."""
    place, parts = place_of(family, hub, layer)
    stacked = {
        part: tensors[f"{place}.experts.{part}"][expert]
        for part in ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
        if f"{place}.experts.{part}" in tensors
    }
    if family == "gpt_oss":
        both, bias = stacked["gate_up_proj"], stacked["gate_up_proj_bias"]
        return (both[:, ::2].T, both[:, 1::2].T, stacked["down_proj"].T), (bias[::2], bias[1::2], stacked["down_proj_bias"])  # fmt: skip
    if family == "llama4_text":
        return (*(half.T for half in stacked["gate_up_proj"].chunk(2, dim=1)), stacked["down_proj"].T), (
            0,
            0,
            0,
        )
    if f"{place}.input_linear.weight" in tensors:
        both = tensors[f"{place}.input_linear.weight"][expert]
        return (*both.chunk(2), tensors[f"{place}.output_linear.weight"][expert]), (0, 0, 0)
    if family == "nemotron_h" and stacked:
        return (stacked["up_proj"], stacked["up_proj"], stacked["down_proj"]), (0, 0, 0)
    if stacked:
        return (*stacked["gate_up_proj"].chunk(2), stacked["down_proj"]), (0, 0, 0)
    return tuple(tensors[f"{place}.experts.{expert}.{part}.weight"] for part in parts), (0, 0, 0)


def names_of(family, hub, layer, expert):
    place, parts = place_of(family, hub, layer)
    return [f"{place}.experts.{expert}.{part}" for part in parts]


def routes(model, ids):
    """Return layer -> (hidden, chosen experts, weights on the way in) as the stock model's experts get them."""
    found = {}
    for path, module in model.named_modules():
        layer = int((re.search(r"layers\.(\d+)", path) or [0, 0])[1])
        if path.endswith(".experts") and not hasattr(module, "has_gate"):  # Llama 4: the block decides
            block = model.get_submodule(path.rpartition(".")[0])

            def scores(block, args, layer=layer):
                hidden = args[0].reshape(-1, args[0].shape[-1])
                given = block.router(hidden)[0]
                top = given.topk(block.top_k, dim=1)
                found[layer] = (hidden, top.indices, top.values)

            block.register_forward_pre_hook(scores)
        elif path.endswith(".experts"):

            def keep(module, args, kwargs, layer=layer):
                values = [*args, *kwargs.values()]
                found[layer] = (values[0], values[1], torch.ones(values[1].shape))

            module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        base_of(model)(ids)
    return found


def gated(family, a, b):
    """Return what an expert's activation function makes of gate and up."""
    if family == "gpt_oss":
        a, b = a.clamp(max=7.0), b.clamp(-7.0, 7.0)
        return (b + 1) * a * torch.sigmoid(1.702 * a)
    return torch.relu(b) ** 2 if family == "nemotron_h" else torch.nn.functional.silu(a) * b


def close(found, wanted):
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 2e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("family", "hub"),
    [
        *((family, True) for family in FAMILIES),
        ("mixtral", False),
        ("qwen3_moe", False),
        ("granitemoe", False),
        *(pytest.param(family, hub, marks=pytest.mark.slow) for family in FURTHER for hub in (True, False)),
    ],
)
def test_every_expert_shows_its_own_tokens(family, hub, stream):
    folder = model_folder(family, (), hub)
    samples = texts((19, 11))
    keeper = Keeper()
    settings = Settings(threads=1, batch_tokens=64, stream_experts=stream)
    with Walk(open_path(folder), samples, settings, per_sample=True) as walk:
        walk.run(keeper)
    tensors = load_file(folder / "model.safetensors")
    model = stock(folder)
    checked = set()
    for number, sample in enumerate(samples):
        for layer, (hidden, chosen, scales) in routes(model, torch.from_numpy(sample)[None]).items():
            for expert in range(int(chosen.max()) + 1):
                rows = (chosen == expert).any(dim=1)
                names = names_of(family, hub, layer, expert)
                if not rows.any():
                    assert all((name, number) not in keeper.inputs for name in names)
                    continue
                (gate, up, down), (gate_bias, up_bias, down_bias) = weights_of(
                    tensors, family, hub, layer, expert
                )
                x = hidden[rows] * scales[chosen == expert][:, None]
                a, b = x @ gate.T + gate_bias, x @ up.T + up_bias
                for name, wanted in zip(names, (a, b), strict=False):
                    close(keeper.inputs[name, number], x)
                    close(keeper.outputs[name, number], wanted)
                entering = keeper.inputs[names[2], number]
                close(keeper.outputs[names[2], number], entering @ down.T + down_bias)
                close(entering, gated(family, a, b))
                checked.update(names)
    shown = {module for module, _ in keeper.inputs if ".experts." in module}
    assert shown == checked and len(checked) >= 3 * 4 - (family == "nemotron_h") * 4


@pytest.mark.parametrize(
    "family",
    [
        *FAMILIES,
        *(
            pytest.param(family, marks=() if family in ("llama4_text", "nemotron_h") else pytest.mark.slow)
            for family in FURTHER
        ),
    ],
)
def test_streaming_experts_changes_no_bit(family):
    checkpoint = open_path(model_folder(family))
    found = []
    for stream, tokens in ((False, None), (True, None), (True, 64)):
        settings = Settings(threads=1, batch_tokens=32, stream_experts=stream)
        with Walk(checkpoint, texts((19, 11, 11, 18, 30)), settings) as walk:
            if tokens:  # several groups
                object.__setattr__(walk._memory, "group_tokens", tokens)
                assert len(list(walk._memory.groups(walk.batches))) > 1
            sums = Sums()
            walk.run(sums)
            found.append((sums, torch.cat([states for _, states in walk.hidden()])))
    assert (
        found[0][0].sums and torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][1], found[2][1])
    )
    assert found[0][0].rows == found[1][0].rows == found[2][0].rows
    assert found[0][0].equal(found[1][0])


@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        "qwen3_moe",
        "gpt_oss",
        *(pytest.param(family, marks=pytest.mark.slow) for family in FURTHER),
    ],
)
def test_both_storages_give_the_same_result(family):
    runs = []
    for hub in (True, False):
        with Walk(open_path(model_folder(family, (), hub)), texts(), ONE) as walk:
            walk.run(Sums())
            runs.append(torch.cat([states for _, states in walk.hidden()]))
    assert torch.equal(*runs)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("hub", [True, False])
def test_pieces_put_the_file_together_again(family, hub):
    """Every element of a layer's parameters belongs to exactly one piece, and equals the file there."""
    checkpoint = open_path(model_folder(family, (), hub))
    tensors = load_file(model_folder(family, (), hub) / "model.safetensors")
    skeleton = Skeleton(checkpoint, ONE)
    for layer in range(skeleton.layers):
        pieces = skeleton.pieces(layer)
        with skeleton.loaded(layer) as module:
            for name, parameter in module.named_parameters():
                seen = torch.zeros(parameter.shape)
                for piece in pieces[name]:
                    stored = tensors[piece.tensor][piece.stored] if piece.stored else tensors[piece.tensor]
                    place = piece.index or ...
                    assert torch.equal(parameter[place], stored), (name, piece)
                    seen[place] += 1
                assert (seen == 1).all(), name
        names = [piece.name for listed in pieces.values() for piece in listed]
        assert len(set(names)) == len(names)


def test_large_layers_are_streamed_without_being_asked():
    checkpoint = open_path(model_folder("qwen3_moe"))
    plain = Walk(checkpoint, texts(), ONE)
    assert not plain._memory.streamed
    whole = [plain.skeleton.bytes_of_layer(n) for n in range(3)]
    outside = plain.skeleton.bytes_outside() + 64 * plain.skeleton.widest * 16
    tight = Walk(
        checkpoint, texts(), Settings(threads=1, batch_tokens=64, memory_limit=outside + 2 * max(whole))
    )
    assert tight._memory.streamed == {0, 2}  # layer 1 is dense


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_padding_is_routed_but_never_shown(family, stream):
    """Rows that fill a batch go through the experts like others; no expert's statistics may hold them."""
    found = []
    for batched in (True, False):
        settings = Settings(threads=1, batch_tokens=64, stream_experts=stream)
        walk = Walk(open_path(model_folder(family)), texts(), settings, per_sample=not batched)
        assert any(batch.padded for batch in walk.batches) is batched
        sums = Sums()
        with walk:
            walk.run(sums)
        found.append(sums)
    together, alone = found
    assert together.rows == alone.rows and any(".experts." in name for name in alone.rows)
    for name, wanted in alone.sums.items():
        close(together.sums[name], wanted)


def test_sizes_of_padded_multiplications():
    sizes = [usual_rows(rows) for rows in range(1, 5000)]
    assert all(
        rows <= size <= max(rows + 15, rows * 1.26) for rows, size in zip(range(1, 5000), sizes, strict=True)
    )
    assert len(set(sizes)) < 40
