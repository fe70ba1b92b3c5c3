"""Records of mixtures of experts against the library: which tensors depend on experts, how they lie, what runs where."""

from __future__ import annotations

import re
from pathlib import Path

import expert_models
import pytest
import torch
import transformers
from expert_models import EXPERTS, HIDDEN, WIDTH, moe_folder
from safetensors import safe_open

from surgeon.architectures.expert_records import known, load, parse, record_of, to_yaml
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import UsageError
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.parts import ExpertTensor

CONFIGS = {**expert_models.CONFIGS, **expert_models.MORE}
FAMILIES = (
    *expert_models.FAMILIES,
    *(pytest.param(family, marks=pytest.mark.slow) for family in expert_models.MORE_FAMILIES),
)
BOTH = ("hub", "fused")
SAME_AS_ANOTHER = {"kimi_k2": "deepseek_v3"}
"""Types without a class of their own."""


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found


def found_tensors(folder: Path) -> dict[str, ExpertTensor]:
    return {tensor.name: tensor for layer in experts_of(open_path(folder)).layers for tensor in layer.tensors}


def width_key(family: str) -> str:
    values = CONFIGS[family][1]
    values = values.get("text_config", values)
    return "moe_intermediate_size" if "moe_intermediate_size" in values else "intermediate_size"


@pytest.mark.parametrize("storage", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_tensors_that_grow_with_experts_are_found(family: str, storage: str) -> None:
    more = EXPERTS + 4
    few = shapes(moe_folder(family, storage=storage))
    many_folder = moe_folder(family, storage=storage, **{CONFIGS[family][0]: more})
    many = shapes(many_folder)
    found = found_tensors(many_folder)
    attention = {name for name in many if "self_attention.experts" in name}  # a mixture of another kind

    grown = {name for name in few if few[name] != many[name]} - attention
    added = set(many) - set(few)
    assert grown  # there is a router, at least
    assert {name for name, tensor in found.items() if tensor.expert is None} == grown
    assert {name for name, tensor in found.items() if (tensor.expert or 0) >= EXPERTS} == added
    for name in grown:
        axis = found[name].expert_axis
        expected = list(few[name])
        assert axis is not None
        expected[axis] = more
        assert tuple(expected) == many[name]
    if added:  # experts 0-7 are described like experts 8-11
        roles = {e: sorted(t.role for t in found.values() if t.expert == e) for e in range(more)}
        assert all(roles[e] == roles[0] for e in range(more))
        last = more - 1
        for name, tensor in found.items():
            if tensor.expert == last:
                match = re.fullmatch(rf"(.*)\.{last}\.(.*)", name)
                assert match is not None
                assert found[f"{match[1]}.0.{match[2]}"].role == tensor.role


@pytest.mark.parametrize("storage", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_lie_where_the_record_says(family: str, storage: str) -> None:
    wide = WIDTH + 8
    before = shapes(moe_folder(family, storage=storage))
    after = shapes(moe_folder(family, storage=storage, **{width_key(family): wide}))
    found = found_tensors(moe_folder(family, storage=storage))
    assert any(tensor.channel_axis is not None for tensor in found.values())
    for name, tensor in found.items():
        changed = [axis for axis in range(len(before[name])) if before[name][axis] != after[name][axis]]
        assert changed == ([] if tensor.channel_axis is None else [tensor.channel_axis]), name
        if tensor.channel_axis is not None:
            times = 1 if tensor.order == "plain" else 2
            assert before[name][tensor.channel_axis] == times * WIDTH
            assert after[name][tensor.channel_axis] == times * wide


@pytest.mark.parametrize("storage", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_and_layers_are_those_of_the_built_model(family: str, storage: str) -> None:
    few = shapes(moe_folder(family, storage="fused"))
    many = shapes(moe_folder(family, storage="fused", **{CONFIGS[family][0]: 12}))
    grown = [name for name in few if few[name] != many[name]]
    layers = {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in grown}  # type: ignore[index]
    experts = experts_of(open_path(moe_folder(family, storage=storage)))
    config = expert_models.config_of(family).get_text_config()
    assert {layer.index for layer in experts.layers} == layers
    assert all(layer.runs for layer in experts.layers)
    assert all(layer.count == EXPERTS for layer in experts.layers)
    assert all(layer.quantized is None for layer in experts.layers)
    top_k = 1 if family.startswith("llama4") else expert_models.TOP_K
    grouped = getattr(config, "n_group", None) or 1
    assert (experts.count, experts.top_k, experts.width, experts.hidden) == (EXPERTS, top_k, WIDTH, HIDDEN)
    assert (experts.groups, experts.topk_group) == (grouped, 1)
    assert experts.section == ("text_config" if "text_config" in CONFIGS[family][1] else "")
    shared = {name for layer in experts.layers for name in layer.shared}
    on_disk = shapes(moe_folder(family, storage=storage))
    extra = {name for name in on_disk if re.search(r"\.mlp\.bias$", name)} if family == "jetmoe" else set()
    assert shared == {name for name in on_disk if "shared" in name} | extra


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_on_the_hub_are_those_of_the_library(family: str) -> None:
    """The library stacks gate over up when it loads: the same weights under both names tell the roles apart."""
    hub = experts_of(open_path(moe_folder(family, storage="hub")))
    if hub.layers[0].storage == "fused":
        pytest.skip("published fused")
    fused = experts_of(open_path(moe_folder(family, storage="fused")))
    one, two = values(moe_folder(family, storage="hub")), values(moe_folder(family, storage="fused"))
    for numbered, stacked in zip(hub.layers, fused.layers, strict=True):
        assert stacked.storage == "fused"
        parts = {(t.role, t.expert): one[t.name] for t in numbered.tensors}
        for tensor in stacked.tensors:
            held = two[tensor.name]
            if tensor.role == "gate_up":
                assert tensor.order == "concatenated"
                for e in range(EXPERTS):
                    assert torch.equal(held[e], torch.cat([parts["gate", e], parts["up", e]]))
            elif tensor.role in ("up", "down"):
                for e in range(EXPERTS):
                    assert torch.equal(held[e], parts[tensor.role, e])
            else:
                assert torch.equal(held, parts[tensor.role, None])


def values(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_and_up_of_one_channel_are_where_the_order_says(family: str) -> None:
    """Zero a channel's gate and up rows: exactly that channel of the library's activation becomes zero."""
    model = expert_models.build(family)
    modules = [
        module
        for module in model.modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "down_proj")
    ]
    if not modules:
        pytest.skip("the library's experts have no separate gate function")
    experts = experts_of(open_path(moe_folder(family, storage="fused")))
    tensors = [t for t in experts.layers[0].tensors if t.role in ("gate_up", "gate_up_bias")]
    if not tensors:
        assert not modules[0].has_gate
        pytest.skip("experts without a gate")
    channel = 5
    rows = (
        [channel, channel + WIDTH] if tensors[0].order == "concatenated" else [2 * channel, 2 * channel + 1]
    )
    inner = torch.randn(3, 2 * WIDTH, generator=torch.Generator().manual_seed(0))
    full = modules[0]._apply_gate(inner)
    inner[:, rows] = 0
    cut = modules[0]._apply_gate(inner)
    assert full.shape == cut.shape == (3, WIDTH)
    assert torch.count_nonzero(full[:, channel]) == 3
    assert torch.count_nonzero(cut[:, channel]) == 0
    rest = [c for c in range(WIDTH) if c != channel]
    assert torch.equal(full[:, rest], cut[:, rest])
    assert len({t.order for t in tensors}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_before_and_after_the_experts_is_where_the_taps_say(family: str) -> None:
    """Layer output = scale x stream + scale x block (+ an expert every token goes to that lies outside of it)."""
    model = expert_models.build(family)
    experts = experts_of(open_path(moe_folder(family)))
    taps = experts.record.taps
    config = model.config.get_text_config()
    index = experts.layers[-1].index
    layer = layers_of(model)[index]
    seen: dict[str, torch.Tensor] = {}
    layer.get_submodule(taps.router)  # exists
    norm, block = layer.get_submodule(taps.norm), layer.get_submodule(taps.block)
    norm.register_forward_hook(lambda m, args, out: seen.update(input=args[0], output=out))
    block.register_forward_hook(
        lambda m, args, out: seen.update(block=out[0] if isinstance(out, tuple) else out)
    )
    outside = layer.get_submodule("shared_mlp") if hasattr(layer, "shared_mlp") else None
    if outside is not None:
        outside.register_forward_hook(lambda m, args, out: seen.update(shared=out))
    layer.register_forward_hook(
        lambda m, args, out: seen.update(layer=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=torch.arange(1, 17)[None])
    if taps.stream == "several":
        assert seen["layer"].dim() == 4  # [batch, tokens, streams, hidden]
        return
    stream = seen[taps.stream].reshape(-1, HIDDEN)
    branch = seen["block"].reshape(-1, HIDDEN)
    if outside is not None:
        branch = branch + seen["shared"].reshape(-1, HIDDEN)
    keep = float(getattr(config, taps.stream_scale)) if taps.stream_scale else 1.0
    add = float(getattr(config, taps.branch_scale)) if taps.branch_scale else 1.0
    total = keep * stream + add * branch
    layer_out = seen["layer"].reshape(-1, HIDDEN)
    if taps.normalised:
        assert not torch.allclose(layer_out, total, atol=1e-3)
        return
    torch.testing.assert_close(layer_out, total, rtol=1e-5, atol=1e-5)
    other = seen["output" if taps.stream == "input" else "input"].reshape(-1, HIDDEN)
    assert not torch.allclose(layer_out, keep * other + add * branch, atol=1e-3)


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    found = [
        module for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.endswith("layers") and "vision" not in name and "visual" not in name
    ]  # fmt: skip
    return max(found, key=len)


@pytest.mark.parametrize("family", FAMILIES)
def test_choice_and_weights_are_as_the_router_is_described(family: str) -> None:
    """Recompute a router by the record's words alone and compare with the library's choice and weights."""
    model = expert_models.build(family)
    record = experts_of(open_path(moe_folder(family))).record
    config = model.config.get_text_config()
    index = experts_of(open_path(moe_folder(family))).layers[-1].index
    layer = layers_of(model)[index]
    router = layer.get_submodule(record.taps.router)
    if record.router.score == "sparsemixer" or family in ("jetmoe", "llama4", "llama4_text"):
        pytest.skip("returns something else than logits, weights and choice")
    seen: dict[str, tuple] = {}
    router.register_forward_hook(lambda m, args, out: seen.update(out=out))
    with torch.no_grad():
        model(input_ids=torch.arange(1, 33)[None])
    logits, weights, choice = seen["out"]
    logits, weights, choice = logits.reshape(-1, EXPERTS).float(), weights.float(), choice
    described = record.router
    score = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "softmax of selected": lambda x: x,
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    }[described.score](logits)
    bias = correction_of(model, layer)
    assert (bias is not None) == bool(described.correction)
    ranked = score + (bias if bias is not None else 0)
    if described.groups != "none":
        groups = ranked.view(-1, 2, EXPERTS // 2)
        best = groups.max(-1).values if described.groups == "max" else groups.topk(2, -1).values.sum(-1)
        allowed = (
            torch.zeros_like(best).scatter_(1, best.topk(1, -1).indices, 1).repeat_interleave(EXPERTS // 2, 1)
        )
        ranked = ranked.masked_fill(allowed == 0, 0.0 if described.groups == "max" else -torch.inf)
    chosen = ranked.topk(expert_models.TOP_K, -1).indices
    taken = score.gather(1, chosen)
    if described.score == "softmax of selected":
        taken = taken.softmax(-1)
    always = described.renormalised
    if always is True or (isinstance(always, str) and getattr(config, always)):
        taken = taken / taken.sum(-1, keepdim=True)
    if described.scale:
        taken = taken * getattr(config, described.scale)
    order = choice.argsort(-1)
    torch.testing.assert_close(choice.gather(1, order), chosen.sort(-1).values)
    if weights.shape[-1] == EXPERTS:  # gpt-oss of older versions scattered them
        weights = weights.gather(1, choice)
    torch.testing.assert_close(
        weights.gather(1, order), taken.gather(1, chosen.argsort(-1)), rtol=1e-4, atol=1e-5
    )
    assert chosen.unique().numel() > 2  # routing is not degenerate


def correction_of(model: torch.nn.Module, layer: torch.nn.Module) -> torch.Tensor | None:
    found = [
        tensor for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
        if re.search(r"correction_bias|expert_bias", name)
    ]  # fmt: skip
    return found[0].reshape(-1) if found else None


def test_every_record_is_tested() -> None:
    tested = {
        section.get("model_type") for family in CONFIGS for section in config_sections(moe_folder(family))
    }
    for record in known():
        for model_type in record.model_types:
            assert model_type in tested or SAME_AS_ANOTHER.get(model_type) in tested, model_type


def config_sections(folder: Path) -> list[dict]:
    config = open_path(folder).config
    assert config is not None
    return [config, config.get("text_config") or {}]


@pytest.mark.parametrize("record", known(), ids=lambda record: record.family)
def test_defaults_are_the_librarys(record) -> None:
    for model_type in record.model_types:
        if model_type in SAME_AS_ANOTHER:
            continue
        written = transformers.AutoConfig.for_model(model_type).get_text_config()
        for key, value in record.defaults.items():
            if hasattr(written, key) and key != "moe_layer_end_index":  # -1 is replaced by the last layer
                assert getattr(written, key) == value, key


@pytest.mark.parametrize("record", known(), ids=lambda record: record.family)
def test_a_record_written_as_yaml_reads_back_equal(record, tmp_path: Path) -> None:
    file = tmp_path / "record.yaml"
    file.write_text(to_yaml(record))
    assert load(file) == record
    assert hash(load(file)) == hash(record)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}}, "deepseek_v3"),
        ({"model_type": "some_vision_model", "text_config": {"model_type": "qwen3_moe"}}, "qwen3_moe"),
        ({"model_type": "llama"}, None),
        ({"model_type": "../families/mixtral"}, None),
        ({"model_type": ["mixtral"]}, None),
        ({"model_type": None, "text_config": "mixtral"}, None),
        ({}, None),
    ],
)
def test_a_configuration_leads_to_its_record(config: dict, family: str | None) -> None:
    record = record_of(config)
    assert (record.family if record else None) == family


GOOD = """family: mine
model_types: [mine]
counts: {experts: n, top_k: k, width: w}
moe_layers:
  - {rule: all}
storages:
  - storage: per expert
    up: "mlp.experts.{expert}.up"
    down: "mlp.experts.{expert}.down"
gated: false
router:
  weight: mlp.gate.weight
  score: softmax
"""


def test_a_short_record_is_enough() -> None:
    record = parse(GOOD, "mine.yaml")
    assert record.counts.experts == ("n",)
    assert record.layers[0] == "model.layers.{layer}."


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("score: softmax", "score: softmaxx", 13, "router.score"),
        ("gated: false", "gated: true", None, "gated is true, but a storage says otherwise"),
        ("gated: false", "gatted: false", 10, "gatted: there is no such key"),
        ("model_types: [mine]", "model_types: [mine, 3]", 2, "model_types.1"),
        ("  weight: mlp.gate.weight\n", "", 12, "router.weight: it is missing"),
        ('"mlp.experts.{expert}.up"', '"mlp.experts.up"', 7, 'needs "{expert}" once'),
        ("{rule: all}", "{rule: every_other}", 5, "moe_layers.0"),
        ("family: mine", "family: mine\nfamily: yours", 2, '"family" stands twice'),
        ("family: mine", "family: [mine", 2, "not valid YAML"),
        ("family: mine", "family: !!python/object/apply:os.getcwd []", 1, "not valid YAML"),
        ("family: mine", "family: 2024-01-01", None, "record of experts"),
        ("[mine]", "&a [mine]\nshared: *a", None, "no YAML aliases"),
        ("family: mine", "family: " + "[" * 3000 + "]" * 3000, None, "nested too deeply"),
    ],
)
def test_mistakes_in_a_record_are_shown_with_their_line(old: str, new: str, line, says: str) -> None:
    assert old in GOOD
    with pytest.raises(UsageError) as caught:
        parse(GOOD.replace(old, new), "mine.yaml")
    assert caught.value.code == "E240"
    assert says in caught.value.message
    assert caught.value.where is not None and caught.value.where.file == "mine.yaml"
    assert all(one.help for one in (caught.value, *caught.value.others))
    if line is not None:
        assert caught.value.where.line == line


def test_several_mistakes_are_all_shown() -> None:
    with pytest.raises(UsageError) as caught:
        parse(GOOD.replace("softmax", "hard").replace("gated: false", "gates: 1"), "mine.yaml")
    assert len(caught.value.others) >= 1


def test_a_record_that_cannot_be_read_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("#" * (1 << 20) + "##")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name, says in (
        ("none.yaml", "No such file"),
        ("bytes.yaml", "not UTF-8"),
        ("large.yaml", "too large"),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            load(tmp_path / name)
        assert caught.value.code == "E240" and "--experts --guess" in (caught.value.help or "")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="YAML mapping"):
        parse(text, "mine.yaml")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "missing.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        load(binary)
    large = tmp_path / "large.yaml"
    large.write_text("#" * (2 << 20))
    with pytest.raises(UsageError, match="too large"):
        load(large)
