"""Experts one by one: what observers see against routing computed by brute force from the files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from walk_models import Keeper, Sums, model_folder, stock, texts

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
NAMES = {"mixtral": ("w1", "w3", "w2")}


def weights_of(tensors, family, hub, layer, expert):
    """Return gate, up, down [out, in] and their biases of one expert, straight from the file."""
    block = f"model.layers.{layer}."
    if family == "gpt_oss":
        both, down = (
            tensors[f"{block}mlp.experts.gate_up_proj"][expert],
            tensors[f"{block}mlp.experts.down_proj"][expert],
        )
        bias = tensors[f"{block}mlp.experts.gate_up_proj_bias"][expert]
        return (both[:, ::2].T, both[:, 1::2].T, down.T), (bias[::2], bias[1::2], tensors[f"{block}mlp.experts.down_proj_bias"][expert])  # fmt: skip
    if family == "granitemoe" and hub:
        both = tensors[f"{block}block_sparse_moe.input_linear.weight"][expert]
        return (*both.chunk(2), tensors[f"{block}block_sparse_moe.output_linear.weight"][expert]), (0, 0, 0)
    if not hub:
        inside = "block_sparse_moe" if family == "granitemoe" else "mlp"
        both = tensors[f"{block}{inside}.experts.gate_up_proj"][expert]
        return (*both.chunk(2), tensors[f"{block}{inside}.experts.down_proj"][expert]), (0, 0, 0)
    inside = "block_sparse_moe" if family == "mixtral" else "mlp"
    parts = NAMES.get(family, ("gate_proj", "up_proj", "down_proj"))
    return tuple(tensors[f"{block}{inside}.experts.{expert}.{part}.weight"] for part in parts), (0, 0, 0)


def names_of(family, hub, layer, expert):
    inside = "block_sparse_moe" if family == "granitemoe" or (family == "mixtral" and hub) else "mlp"
    parts = NAMES[family] if family in NAMES and hub else ("gate_proj", "up_proj", "down_proj")
    return [f"model.layers.{layer}.{inside}.experts.{expert}.{part}" for part in parts]


def routes(model, ids):
    """Return layer -> (hidden, chosen experts) as the stock model's expert modules get them."""
    found = {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            layer = int(re.search(r"layers\.(\d+)", path)[1])

            def keep(module, args, kwargs, layer=layer):
                values = [*args, *kwargs.values()]
                found[layer] = (values[0], values[1])

            module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model.base_model(ids)
    return found


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
        for layer, (hidden, chosen) in routes(model, torch.from_numpy(sample)[None]).items():
            for expert in range(int(chosen.max()) + 1):
                rows = (chosen == expert).any(dim=1)
                names = names_of(family, hub, layer, expert)
                if not rows.any():
                    assert all((name, number) not in keeper.inputs for name in names)
                    continue
                (gate, up, down), (gate_bias, up_bias, down_bias) = weights_of(
                    tensors, family, hub, layer, expert
                )
                x = hidden[rows]
                a, b = x @ gate.T + gate_bias, x @ up.T + up_bias
                for name, wanted in zip(names, (a, b), strict=False):
                    close(keeper.inputs[name, number], x)
                    close(keeper.outputs[name, number], wanted)
                entering = keeper.inputs[names[2], number]
                close(keeper.outputs[names[2], number], entering @ down.T + down_bias)
                if family == "gpt_oss":
                    a, b = a.clamp(max=7.0), b.clamp(-7.0, 7.0)
                    close(entering, (b + 1) * a * torch.sigmoid(1.702 * a))
                else:
                    close(entering, torch.nn.functional.silu(a) * b)
                checked.update(names)
    shown = {module for module, _ in keeper.inputs if ".experts." in module}
    assert shown == checked and len(checked) >= 3 * 4


@pytest.mark.parametrize("family", FAMILIES)
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
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][1], found[2][1])
    assert found[0][0].rows == found[1][0].rows == found[2][0].rows
    assert found[0][0].equal(found[1][0])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_both_storages_give_the_same_result(family):
    runs = []
    for hub in (True, False):
        with Walk(open_path(model_folder(family, (), hub)), texts(), ONE) as walk:
            walk.run(Sums())
            runs.append(torch.cat([states for _, states in walk.hidden()]))
    assert torch.equal(*runs)


@pytest.mark.parametrize("family", FAMILIES)
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
