"""Streamed passes against the stock model: hidden states, logits, losses and the inputs of every module."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "architectures"))
from tiny_models import DECODER, FAMILIES, LATENT
from walk_models import LENGTHS, Keeper, Nothing, Sums, base_of, model_folder, stock, texts

from surgeon.calibrate import head as head_module
from surgeon.calibrate import skeleton as skeleton_module
from surgeon.calibrate.batches import plan_batches
from surgeon.calibrate.head import Head, token_losses
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, Interrupted

ONE = Settings(threads=1, batch_tokens=64)

LIKE_OTHERS = ("qwen3_5_moe_text", "kimi_k2", "granitemoeshared", "minimax_m2")
"""Families that differ little from others; the full run tests them."""

VARIANTS = [
    *((family, (), "") for family in FAMILIES if family not in LIKE_OTHERS),
    ("mistral", (("sliding_window", 6),), ""),
    ("gemma2", (("sliding_window", 6), ("final_logit_softcapping", 2.0), ("attn_logit_softcapping", 3.0)), ""),
    ("gemma3_text", (("sliding_window", 6), ("tie_word_embeddings", False)), ""),
    ("gpt_oss", (("sliding_window", 6),), ""),
    ("qwen2", (("use_sliding_window", True), ("sliding_window", 6), ("max_window_layers", 1)), ""),
    ("phi", (("qk_layernorm", True),), ""),
    ("llama", (("tie_word_embeddings", True), ("attention_bias", True)), ""),
    ("llama", (), "LlamaModel"),
    ("llama", (("rope_parameters", (("rope_type", "dynamic"), ("factor", 2.0), ("rope_theta", 10000.0))),
               ("max_position_embeddings", 8)), ""),
    ("granitemoe", (("embedding_multiplier", 2.0), ("logits_scaling", 3.0), ("residual_multiplier", 0.5)), ""),
    ("bert", (), "BertModel"),
    ("gpt2", (), "GPT2Model"),
    ("deepseek_v3", (("q_lora_rank", None), ("first_k_dense_replace", 2)), ""),
]  # fmt: skip


GRANITE = (("block_sparse_moe.router", "block_sparse_moe.router.layer"),)
MIXTRAL = ((".mlp.gate", ".block_sparse_moe.gate"),)
RENAMED = {
    "mixtral": MIXTRAL,
    "minimax": MIXTRAL,
    "minimax_m2": MIXTRAL,
    "phimoe": ((".mlp.router", ".block_sparse_moe.gate"),),
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "granitemoehybrid": GRANITE,
    "kimi_linear": ((".mlp.", ".block_sparse_moe."), (".forget_gate", "")),
    "nemotron_h": (("model.", "backbone."),),
}
"""What modules are called in memory, and in the files."""


SLOW = [
    *((family, (), "") for family in LIKE_OTHERS),
    ("granitemoeshared", (("embedding_multiplier", 2.0), ("logits_scaling", 3.0), ("residual_multiplier", 0.5)), ""),
    ("granitemoehybrid", (("position_embedding_type", "rope"), ("logits_scaling", 3.0), ("residual_multiplier", 0.5)), ""),
    ("granitemoehybrid", (("num_local_experts", 0),), ""),
    ("glm4_moe", (("use_qk_norm", True), ("routed_scaling_factor", 2.5), ("first_k_dense_replace", 0)), ""),
    ("nemotron_h", (("moe_latent_size", 16), ("mlp_bias", True), ("use_bias", True)), ""),
    ("minimax", (("num_hidden_layers", 4), ("layer_types", None)), "MiniMaxModel"),
    ("jamba", (("mamba_proj_bias", True), ("num_hidden_layers", 4)), ""),
]  # fmt: skip


def name_of(variant):
    return "-".join([variant[0], variant[2], *(key for key, _ in variant[1])])


def close(found, wanted, tolerance=2e-5):
    assert found.shape == wanted.shape
    scale = wanted.abs().max().clamp(min=1e-6)
    assert float((found - wanted).abs().max() / scale) < tolerance


def checkpoint_name(family, path):
    """Return the checkpoint's name of a module of the stock model."""
    for inside, stored in RENAMED.get(family, ()):
        path = path.replace(inside, stored)
    return path


def watched(model, family):
    """Return the inputs of all modules with a weight while the stock model runs, filled by hooks."""
    found: dict[str, torch.Tensor] = {}

    def hook(path):
        def keep(module, args, kwargs):
            value = args[0] if args else next(iter(kwargs.values()))
            found[checkpoint_name(family, path)] = value.reshape(-1, value.shape[-1])

        return keep

    for path, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and not isinstance(
            module, (nn.Embedding, nn.Conv1d)
        ):
            module.register_forward_pre_hook(hook(path), with_kwargs=True)
    return found


@pytest.mark.parametrize(
    "variant", [*VARIANTS, *(pytest.param(variant, marks=pytest.mark.slow) for variant in SLOW)], ids=name_of
)
def test_equals_the_stock_model(variant):
    family, extra, class_name = variant
    folder = model_folder(family, extra, class_name=class_name)
    checkpoint, samples = open_path(folder), texts()
    together, alone = Sums(), Keeper()
    with Walk(checkpoint, samples, ONE) as walk:
        dynamic = any("dynamic" in str(value) for _, value in extra)
        assert any(batch.padded for batch in walk.batches) == (not dynamic)
        walk.run(together)
        hidden = dict(walk.hidden())
    with Walk(checkpoint, samples, ONE, per_sample=True) as walk:
        walk.run(alone)
        single = dict(walk.hidden())
    reference = stock(folder)
    has_head = reference.get_output_embeddings() is not None
    head = Head(checkpoint, ONE) if has_head else None
    sums: dict[str, torch.Tensor] = {}
    for number, sample in enumerate(samples):
        model = stock(folder) if dynamic else reference  # its rotary table remembers longer texts
        found = watched(model, family)
        with torch.no_grad():
            ids = torch.from_numpy(sample)[None]
            wanted = base_of(model)(ids).last_hidden_state[0]
            close(hidden[number], wanted)
            close(single[number], wanted)
            if head is not None:
                logits = model(ids).logits[0]
                close(head.logits(hidden[number]), logits)
                if family != "bert":
                    losses = -logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
                    close(token_losses(checkpoint, hidden[number], ids[0], ONE, head=head), losses)
        for module, value in found.items():
            close(alone.inputs[module, number], value)
            sums[module] = sums.get(module, 0) + value.abs().sum(dim=0)
    for module, total in sums.items():
        close(together.sums[module], total)
    unexpected = {module for module in together.sums if module not in sums and ".experts." not in module}
    assert not unexpected
    assert len(sums) >= 3 * 5


FURTHER = [family for family in FAMILIES if list(FAMILIES).index(family) >= list(FAMILIES).index("phimoe")]
CORE = ("hunyuan_v1_moe", "lfm2_moe", "nemotron_h")


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in CORE else pytest.mark.slow) for family in FURTHER]
)
def test_sixteen_bits_are_loaded_as_the_library_loads_them(family):
    """The same precision for every tensor: routers, corrections and decays stay in float32 where the library says so."""
    widths = {"moe_intermediate_size": 24} if "moe_intermediate_size" in FAMILIES[family] else {}
    folder = model_folder(family, tuple((widths or {"intermediate_size": 24}).items()))
    model = stock(folder, dtype=torch.bfloat16)
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    skeleton = Skeleton(open_path(folder), Settings(dtype="bfloat16", threads=1))
    for layer in range(skeleton.layers):
        with skeleton.loaded(layer) as module:
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                there = wanted[f"{skeleton.stack}.{layer}.{name}"]
                assert value.dtype == there.dtype and torch.equal(value, there), name
    ids = torch.from_numpy(np.stack(texts((24, 24))))
    with Walk(open_path(folder), texts((24, 24)), Settings(dtype="bfloat16", threads=1)) as walk:
        walk.run(Nothing())
        found = torch.stack([states for _, states in walk.hidden()])
    with torch.no_grad():
        half = base_of(model)(ids).last_hidden_state.float()
        exact = base_of(stock(folder))(ids).last_hidden_state
    noise = (half - exact).norm() / exact.norm()
    assert (found.float() - exact).norm() / exact.norm() < 1.5 * noise


def published(family, tmp_path):
    """Write a tiny model under the names and keys that its hub files have and the library does not write."""
    from safetensors.torch import load_file, save_file

    folder = model_folder(family)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if family == "kimi_linear":
        for name in [name for name in tensors if re.search(r"block_sparse_moe\.(gate|up|down)_proj", name)]:
            tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)
        for key in (
            "layer_types",
            "mlp_layer_types",
            "linear_head_dim",
            "linear_num_heads",
            "linear_conv_kernel_dim",
        ):
            del config[key]
        config["first_k_dense_replace"] = 1
        config["linear_attn_config"] = {"kda_layers": [1, 3], "full_attn_layers": [2], "head_dim": 6, "num_heads": 4, "short_conv_kernel_size": 4}  # fmt: skip
    else:
        del config["layers_block_type"], config["time_step_limit"]
        config |= {
            "num_hidden_layers": 5,
            "hybrid_override_pattern": "ME*-E",
            "mamba_d_conv": config.pop("conv_kernel"),
        }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("family", ["kimi_linear", "nemotron_h"])
def test_published_names_and_keys_give_the_same_model(family, tmp_path):
    runs = []
    for folder in (model_folder(family), published(family, tmp_path)):
        with Walk(open_path(folder), texts(), ONE) as walk:
            walk.run(Nothing())
            runs.append(torch.cat([states for _, states in walk.hidden()]))
    assert torch.equal(*runs)


def test_a_missing_part_of_a_joined_parameter_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = model_folder("kimi_linear")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_conv1d.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(InputError) as caught:
        Skeleton(open_path(tmp_path), ONE)
    assert caught.value.code == "E382" and "model.layers.2.self_attn.conv1d" in caught.value.message


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "gpt_oss"])
def test_bfloat16_follows_the_stock_model(family):
    folder = model_folder(family, (("moe_intermediate_size", 24),) if family == "deepseek_v3" else ())
    samples = texts((24, 24))
    with Walk(open_path(folder), samples, Settings(dtype="bfloat16", threads=1)) as walk:
        walk.run(Nothing())
        found = torch.stack([states for _, states in walk.hidden()])
    assert found.dtype == torch.bfloat16
    ids = torch.from_numpy(np.stack(samples))
    with torch.no_grad():
        half = stock(folder, dtype=torch.bfloat16).base_model(ids).last_hidden_state.float()
        exact = stock(folder).base_model(ids).last_hidden_state
    noise = (
        half - exact
    ).norm() / exact.norm()  # rounding; a changed expert or a wrong table would be far more
    assert (found.float() - exact).norm() / exact.norm() < 2 * noise


def test_correction_bias_stays_in_float32():
    skeleton = Skeleton(open_path(model_folder("deepseek_v3")), Settings(dtype="bfloat16"))
    with skeleton.loaded(1) as layer:
        assert layer.mlp.gate.e_score_correction_bias.dtype == torch.float32
        assert layer.mlp.gate.weight.dtype == torch.bfloat16
    assert all(p.is_meta for p in layer.parameters())


def test_batching_does_not_change_results():
    checkpoint = open_path(model_folder("bert"))
    runs = []
    for batch_tokens in (1, 36, 4096):
        with Walk(checkpoint, texts(), Settings(threads=1, batch_tokens=batch_tokens)) as walk:
            walk.run(Nothing())
            runs.append([states for _, states in walk.hidden()])
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            close(second, first)


def test_spilling_to_disk_changes_no_bit(tmp_path):
    checkpoint = open_path(model_folder("qwen3_moe"))
    found = []
    plain = Walk(checkpoint, texts(), ONE)
    needed = max(plain.skeleton.bytes_of_layer(n) for n in range(plain.layers))
    small = needed + 64 * plain.skeleton.widest * 16 + plain.skeleton.bytes_outside() + 4096
    for settings in (ONE, Settings(threads=1, batch_tokens=64, memory_limit=small, stream_experts=False),
                     Settings(threads=1, batch_tokens=64, spill=tmp_path)):  # fmt: skip
        with Walk(checkpoint, texts(), settings) as walk:
            sums = Sums()
            walk.run(sums)
            found.append((walk._memory.spill, sums, [states for _, states in walk.hidden()]))
    assert [spilled for spilled, _, _ in found] == [False, True, False]
    for _, sums, hidden in found[1:]:
        assert sums.equal(found[0][1])
        assert all(torch.equal(a, b) for a, b in zip(hidden, found[0][2], strict=True))


def test_only_rows_of_tokens_are_read(monkeypatch):
    monkeypatch.setattr(skeleton_module, "GAP", 1)
    checkpoint = open_path(model_folder("llama"))
    asked: dict[str, int] = {}
    read = checkpoint.read

    def counting(name, start, stop):
        asked[name] = asked.get(name, 0) + stop - start
        return read(name, start, stop)

    monkeypatch.setattr(checkpoint, "read", counting)
    samples = [np.array([5, 9, 5, 30]), np.array([9, 9, 30, 31])]
    with Walk(checkpoint, samples, ONE) as walk:
        walk.run(Nothing())
    assert asked["model.embed_tokens.weight"] == 4 * 32  # 5, 9, 30, 31
    assert "lm_head.weight" not in asked
    assert (
        asked["model.layers.2.mlp.down_proj.weight"]
        == checkpoint.tensors["model.layers.2.mlp.down_proj.weight"].elements
    )


def test_the_head_is_read_in_blocks(monkeypatch):
    monkeypatch.setattr(head_module, "BLOCK_BYTES", 32 * 4 * 10)  # ten rows
    folder = model_folder("gemma2")
    checkpoint = open_path(folder)
    largest = []
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda n, a, b: largest.append(b - a) or read(n, a, b))
    head = Head(checkpoint, ONE)
    hidden = torch.randn(9, 32)
    with torch.no_grad():
        wanted = stock(folder).lm_head(hidden)
        cap = stock(folder).config.final_logit_softcapping
        close(head.logits(hidden), torch.tanh(wanted / cap) * cap)
    assert max(largest) <= 32 * 10


def test_steps_run_two_models_side_by_side():
    samples = texts()
    first = Walk(open_path(model_folder("llama")), samples, ONE)
    second = Walk(open_path(model_folder("qwen2")), samples, ONE)
    a, b = Keeper(), Keeper()
    pairs = list(zip(first.steps(a), second.steps(b), strict=True))
    assert [one for one, _ in pairs] == ["embedding", "layer 0", "layer 1", "layer 2", "final"]
    assert pairs == [(one, one) for one, _ in pairs]
    assert len(list(first.hidden())) == len(list(second.hidden())) == len(LENGTHS)
    first.close()
    second.close()


def test_a_caller_may_stop_between_steps():
    walk = Walk(open_path(model_folder("llama")), texts(), ONE)
    steps = walk.steps(Nothing())
    assert [next(steps), next(steps)] == ["embedding", "layer 0"]
    steps.close()
    with pytest.raises(RuntimeError):
        next(walk.hidden())
    assert all(p.is_meta for p in walk.skeleton.model.model.layers.parameters())


def test_stop_and_threads():
    before = torch.get_num_threads()
    walk = Walk(open_path(model_folder("llama")), texts(), Settings(threads=before + 3))
    stop, seen = threading.Event(), []

    def progress(done, total):
        seen.append((done, total))
        if done == 2:
            stop.set()

    class Looks(Nothing):
        def wants(self, module):
            assert torch.get_num_threads() == before + 3
            return False

    with pytest.raises(Interrupted):
        walk.run(Looks(), progress=progress, stop=stop)
    assert seen == [(1, 5), (2, 5)]
    assert torch.get_num_threads() == before


def test_values_that_are_not_finite_name_the_layer(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = model_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError) as caught:
        Walk(open_path(tmp_path), texts(), ONE).run(Nothing())
    assert caught.value.code == "E384" and "layer 1 " in caught.value.message


class Scaled:
    """A view: another checkpoint with one tensor doubled, computed in float32."""

    identity = "doubled"

    def __init__(self, inner, name):
        self._inner, self._name = inner, name
        for key in ("label", "folder", "config", "tensors", "headers", "granularity", "read_bytes"):
            setattr(self, key, getattr(inner, key))

    def read(self, name, start, stop):
        value = self._inner.read(name, start, stop)
        return value.astype(np.float32) * 2 if name == self._name else value


def test_views_run_like_models():
    folder = model_folder("gpt2")
    sample = texts((20,))
    name = "transformer.h.1.mlp.c_fc.weight"
    with Walk(Scaled(open_path(folder), name), sample, ONE) as walk:
        walk.run(Nothing())
        found = next(walk.hidden())[1]
    model = stock(folder)
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
        close(found, model.base_model(torch.from_numpy(sample[0])[None]).last_hidden_state[0])


# ---- refusals -------------------------------------------------------------------------------------


def edited(tmp_path, family, **changes):
    folder = model_folder(family)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    shutil.copy(folder / "model.safetensors", tmp_path)
    return open_path(tmp_path)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"model_type": "mamba"}, "E380", "mamba"),
        ({"model_type": "../../etc"}, "E380", "etc"),
        ({"model_type": None}, "E380", "None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "E381", "quantized"),
        ({"num_hidden_layers": 4}, "E382", "no weights for model.layers.3"),
        ({"intermediate_size": 40}, "E382", "shape"),
        ({"hidden_act": "no_such_function"}, "E380", "cannot build"),
    ],
)
def test_refusals_of_models(tmp_path, changes, code, text):
    with pytest.raises(InputError) as caught:
        Skeleton(edited(tmp_path, "llama", **changes), ONE)
    assert caught.value.code == code and text in caught.value.message
    if "model_type" in changes:
        assert "llama" in caught.value.help


def test_a_missing_expert_is_named(tmp_path):
    with pytest.raises(InputError) as caught:
        Skeleton(edited(tmp_path, "qwen3_moe", num_experts=5, num_local_experts=5), ONE)
    assert caught.value.code == "E382" and "expert 4" in caught.value.message


@pytest.mark.parametrize(
    ("samples", "code"),
    [
        ([], "E385"),
        ([np.array([], dtype=np.int64)], "E385"),
        ([np.array([1, 67])], "E383"),
        ([np.array([-1, 3])], "E383"),
    ],
)
def test_refusals_of_samples(samples, code):
    with pytest.raises(InputError) as caught:
        Walk(open_path(model_folder("llama")), samples, ONE).run(Nothing())
    assert caught.value.code == code


def test_learned_positions_limit_the_length():
    with pytest.raises(InputError) as caught:
        Walk(open_path(model_folder("gpt2")), texts((41,)), ONE)
    assert caught.value.code == "E385" and "41 tokens" in caught.value.message


def test_buffers_nobody_computes_are_refused(monkeypatch):
    skeleton = Skeleton(open_path(model_folder("llama")), ONE)
    monkeypatch.setattr(type(skeleton.model), "_init_weights", lambda self, module: None)
    with pytest.raises(InputError) as caught:
        skeleton.record(torch.tensor([[4, 5]]))
    assert caught.value.code == "E380" and "inv_freq" in caught.value.message


def test_a_base_model_has_no_head():
    with pytest.raises(InputError) as caught:
        Head(open_path(model_folder("llama", class_name="LlamaModel")), ONE)
    assert caught.value.code == "E386"


# ---- batches --------------------------------------------------------------------------------------


def test_batches_hold_every_sample_once_and_little_padding():
    drawn = np.random.default_rng(0)
    lengths = [int(n) for n in drawn.integers(1, 300, 200)]
    batches = plan_batches(lengths, 1000)
    assert sorted(s for batch in batches for s in batch.samples) == list(range(200))
    for batch in batches:
        assert batch.lengths == tuple(lengths[s] for s in batch.samples)
        assert len(batch.samples) * batch.length <= 1000
        assert min(batch.lengths) * 8 >= batch.length * 7
    assert len(batches) < 60
    assert all(not batch.padded for batch in plan_batches(lengths, 1000, equal=True))
    assert all(batch.sample is not None for batch in plan_batches(lengths, 1000, alone=True))
    assert [batch.samples for batch in plan_batches([7, 8], 100, unpadded={8})] == [(1,), (0,)]
    assert plan_batches([5000], 100)[0].samples == (0,)


def test_settings_of_the_tiny_models_reach_sliding_windows():
    """The variants above must differ from the plain ones, or they would test nothing."""
    sample = torch.from_numpy(texts((18,))[0])[None]
    with torch.no_grad():
        for family in ("mistral", "gemma2", "gpt_oss"):
            extra = next(extra for name, extra, _ in VARIANTS if name == family and extra)
            a, b = stock(model_folder(family)), stock(model_folder(family, extra))
            assert not torch.allclose(a.base_model(sample)[0], b.base_model(sample)[0], atol=1e-3)
    assert DECODER["vocab_size"] == LATENT["vocab_size"] == 67
