"""DeciLM directories: the arithmetic of their configuration, what they refuse, and that transformers computes the same from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from deploy_models import config_of, logits, opened, stock_folder, write

from surgeon.deploy import decilm, per_layer
from surgeon.deploy.build import load
from surgeon.errors import InputError, UsageError
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.views import MaskedView, PrunedView


def test_the_multiplier_rounds_back_to_every_width():
    """Both engines compute int(2 * m * hidden / 3) and round up to 256; no width may drift to a neighbour."""
    for hidden in (2048, 3584, 4096, 5120, 8192):
        for width in range(256, 32769, 256):
            product = int(2 * decilm.multiplier(width, hidden) * hidden / 3)
            rounded = product if product % 256 == 0 else product + 256 - product % 256
            assert rounded == width == decilm.rounded_width(decilm.multiplier(width, hidden), hidden)


def keep_groups(*groups: int) -> tuple[int, ...]:
    return tuple(head for group in groups for head in (2 * group, 2 * group + 1))


def shaped(config: dict, shapes) -> dict:
    blocks = [
        {"attention": {"no_op": not q, "num_attention_heads": q, "num_key_value_heads": k}, "ffn": {"no_op": not f, "intermediate_size": f}}
        for q, k, f in shapes
    ]  # fmt: skip
    return {**config, "num_hidden_layers": len(shapes), "block_configs": blocks}


def test_transformers_computes_the_same_from_a_decilm_directory(scratch):
    checkpoint, structure = opened(stock_folder("llama", scratch / "source", intermediate_size=768))
    cut = Cut(
        (
            LayerCut(None, tuple(range(512))),
            LayerCut(()),
            LayerCut(None, tuple(range(256, 512))),
            LayerCut(None, ()),
            None,
        )
    )
    masked = load(write(MaskedView(checkpoint, structure, cut), scratch / "masked"))
    view = PrunedView(checkpoint, structure, cut)
    folder = write(view, scratch / "decilm", finish=False)
    config, companions = decilm.finish(view.config)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in companions:
        (folder / name).write_bytes(content)
    model = load(folder)
    assert type(model).__name__ == "DeciLMForCausalLM"
    assert float((logits(model) - logits(masked)).abs().max()) <= 1e-5
    # Engines read by attribute, and the library must be able to write what it read.
    blocks = model.config.block_configs
    assert blocks[0].attention.n_heads_in_group == 2 and blocks[1].attention.no_op and blocks[3].ffn.no_op
    assert not hasattr(blocks[3].ffn, "ffn_mult") and decilm.rounded_width(blocks[0].ffn.ffn_mult, 64) == 512
    model.save_pretrained(scratch / "saved")
    assert (
        json.loads((scratch / "saved" / "config.json").read_text())["block_configs"]
        == config["block_configs"]
    )
    assert torch.equal(logits(load(scratch / "saved")), logits(model))
    (folder / "configuration_decilm.py").write_text("raise SystemExit")
    with pytest.raises(InputError) as refused:
        load(folder)
    assert refused.value.code == "E326"


def test_groups_are_said_by_their_size():
    config = shaped(config_of("llama", hidden_size=512), ((8, 4, 256), (8, 2, 512), (8, 1, 768), (0, 0, 256)))
    result, companions = decilm.finish(config)
    assert [block["attention"].get("n_heads_in_group") for block in result["block_configs"]] == [
        2,
        4,
        8,
        None,
    ]
    assert result["architectures"] == ["DeciLMForCausalLM"] and result["model_type"] == "nemotron-nas"
    assert result["head_dim"] == 16 and result["num_attention_heads"] == 8 and "sliding_window" not in result
    assert [name for name, _ in companions] == list(decilm.CODE_FILES)


REFUSED = [
    ("llama", {}, ((8, 4, 256), (6, 3, 256), (4, 2, 256)), "layer 1 has 6, layer 2 has 4"),
    ("llama", {}, ((8, 4, 256), (8, 4, 300)), "multiples of 256; layer 1 has 300"),
    ("llama", {}, ((0, 0, 256), (8, 4, 256)), "first layer"),
    ("llama", {"attention_bias": True}, ((8, 4, 256), (8, 2, 256)), "biases"),
    ("llama", {"hidden_act": "gelu"}, ((8, 4, 256), (8, 2, 256)), "SiLU"),
    ("mistral", {"sliding_window": 16}, ((8, 4, 256), (8, 2, 256)), "sliding"),
    ("qwen2", {}, ((8, 4, 256), (8, 2, 256)), "qwen2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "extra", "shapes", "words"), REFUSED, ids=[words for *_, words in REFUSED]
)
def test_what_decilm_cannot_say_is_refused_with_its_layers(family, extra, shapes, words):
    with pytest.raises(UsageError, match=words) as refused:
        decilm.finish(shaped(config_of(family, **extra), shapes))
    assert refused.value.code == "E286"


def test_every_obstacle_is_named():
    config = shaped(config_of("llama", attention_bias=True), ((8, 4, 256), (6, 3, 300)))
    with pytest.raises(UsageError) as refused:
        decilm.finish(config)
    assert len(refused.value.others) == 2 and len(decilm.obstacles(config)) == 3
    assert per_layer.block_shapes(config)[1].ffn == 300
