"""GGUF files against transformers: llama.cpp must compute the same next-token probabilities, and bad files never come about.

Probabilities are compared with a float32 cache and without flash attention; both sides compute in float32.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from deploy_models import (
    VOCABULARY,
    config_of,
    ids,
    logits,
    opened,
    randomise,
    stock_folder,
    with_tokenizer,
    write,
)

from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import gguf, gguf_layout
from surgeon.deploy.build import build, load
from surgeon.deploy.gguf_check import check
from surgeon.deploy.gguf_tokenizer import read_tokenizer
from surgeon.deploy.llama_cpp import LlamaCpp
from surgeon.errors import InputError, Interrupted, OutputConflict, UsageError
from surgeon.output.manifest import seal_holds
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.views import MaskedView, PrunedView

reader = pytest.importorskip("gguf")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
VARIED = ((8, 4, 256), (4, 2, 96), (4, 4, 160), (2, 1, 64))
NO_ATTENTION = ((8, 4, 96), (0, 0, 96), (3, 3, 64), (6, 2, 40))
NO_BRANCH = ((8, 4, 96), (0, 0, 0), (8, 2, 32))
NO_FFN = ((8, 4, 96), (8, 4, 0), (6, 3, 64))
NO_FIRST_ATTENTION = ((0, 0, 96), (8, 4, 32))
NO_LAST_FFN = ((8, 4, 96), (8, 4, 0))
NOTHING_LAST = ((8, 4, 96), (0, 0, 0))

PARITY = [
    ("llama", None, {}, "llama"),
    ("llama", None, {"rope_parameters": LLAMA3}, "llama"),
    ("llama", None, {"attention_bias": True, "mlp_bias": True}, "llama"),
    ("llama", VARIED, {}, "deci"),
    ("llama", VARIED, {"tie_word_embeddings": True}, "deci"),
    ("llama", VARIED, {"rope_parameters": LLAMA3}, "deci"),
    ("llama", VARIED, {"rope_parameters": LINEAR}, "deci"),
    ("llama", VARIED, {"attention_bias": True, "mlp_bias": True}, "deci"),
    ("llama", NO_ATTENTION, {}, "deci"),
    ("llama", NO_BRANCH, {}, "deci"),
    ("llama", NO_FFN, {}, "deci"),
    ("llama", NO_FIRST_ATTENTION, {}, "deci"),
    ("llama", NO_LAST_FFN, {}, "deci"),
    ("llama", NOTHING_LAST, {}, "deci"),
    ("mistral", None, {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 128}, "llama"),
    ("mistral", VARIED, {}, "deci"),
    ("qwen2", None, {"head_dim": 8}, "qwen2"),
    ("qwen2", None, {"num_attention_heads": 6, "num_key_value_heads": 3}, "deci"),
    ("qwen2", VARIED, {}, "deci"),
    ("qwen2", NO_FFN, {}, "deci"),
    ("qwen3", None, {"tie_word_embeddings": False}, "qwen3"),
    ("qwen3", VARIED, {}, "openelm"),
    ("qwen3", NO_ATTENTION, {}, "openelm"),
    ("qwen3", NO_FFN, {}, "openelm"),
    ("qwen3", NO_FIRST_ATTENTION, {}, "openelm"),
]


def saved(family: str, shapes, folder: Path, **extra):
    """Return (folder, model) of a random model with the given (heads, groups, ffn) of every layer."""
    if shapes is None:
        stock_folder(family, folder, num_hidden_layers=2, **extra)
        return folder, load(folder)
    config = config_of(family, num_hidden_layers=len(shapes), **extra)
    config["block_configs"] = [
        {"attention": {"no_op": not q, "num_attention_heads": q, "num_key_value_heads": k}, "ffn": {"no_op": not f, "intermediate_size": f}}
        for q, k, f in shapes
    ]  # fmt: skip
    model = randomise(build(config, dtype=torch.float32))
    model.save_pretrained(folder)
    return with_tokenizer(folder), model


def difference(file: Path, model, prompts: torch.Tensor | None = None) -> float:
    """Return the largest difference of next-token log-probabilities between llama.cpp and torch."""
    prompts = ids(2, 40) if prompts is None else prompts
    wanted = torch.log_softmax(logits(model, prompts)[:, -1].double(), -1).numpy()
    with LlamaCpp(file) as runtime:
        found = [runtime.logprobs(prompt.tolist(), VOCABULARY, sampled=24) for prompt in prompts]
    return float(np.abs(np.array(found) - wanted).max())


@pytest.mark.parametrize(
    ("family", "shapes", "extra", "architecture"),
    PARITY,
    ids=[f"{f}-{a}-{n}" for n, (f, _, _, a) in enumerate(PARITY)],
)
def test_llama_cpp_computes_what_transformers_computes(family, shapes, extra, architecture, scratch):
    pytest.importorskip("xllamacpp")
    folder, model = saved(family, shapes, scratch / "model", **extra)
    written = gguf.write(open_path(folder), scratch / "model.gguf", dtype="float32")
    assert written.architecture == architecture
    assert difference(written.path, model) < 2e-5


def test_a_pruned_model_equals_its_masked_source_in_llama_cpp(scratch):
    """The whole way: cut, slice, export without a folder in between, against the stock model with zeros."""
    pytest.importorskip("xllamacpp")
    checkpoint, structure = opened(stock_folder("qwen2", scratch / "source"))
    cut = Cut(
        (
            LayerCut(tuple(range(4))),
            LayerCut(None, tuple(range(64))),
            None,
            LayerCut((0, 2, 4, 6)),
            LayerCut(None, ()),
        )
    )
    masked = load(write(MaskedView(checkpoint, structure, cut), scratch / "masked"))
    written = gguf.write(PrunedView(checkpoint, structure, cut), scratch / "pruned.gguf", dtype="float32")
    assert difference(written.path, masked) < 2e-5
    source = load(scratch / "source")
    assert difference(written.path, source) > 1e-2  # the cut matters


# ---- the rules of the export: without them llama.cpp is wrong, silently or loudly -----------------


def naive(monkeypatch):
    monkeypatch.setattr(gguf_layout, "_written", lambda arch, shapes, head: list(shapes))


def test_without_the_zero_ffn_the_attention_is_lost(scratch, monkeypatch):
    """The rule is still needed: if this fails, llama.cpp was repaired and the rule can go."""
    pytest.importorskip("xllamacpp")
    folder, model = saved("llama", NO_FFN, scratch / "model")
    naive(monkeypatch)
    wrong = gguf.write(open_path(folder), scratch / "wrong.gguf", dtype="float32")
    assert difference(wrong.path, model) > 1e-2


@pytest.mark.parametrize("shapes", [NO_LAST_FFN, NO_FIRST_ATTENTION], ids=["last ffn", "first attention"])
def test_without_its_rules_llama_cpp_dies_or_refuses(shapes, scratch, monkeypatch):
    pytest.importorskip("xllamacpp")
    folder, model = saved("llama", shapes, scratch / "model")
    naive(monkeypatch)
    written = gguf.write(open_path(folder), scratch / "wrong.gguf", dtype="float32")
    with pytest.raises(InputError, match=r"llama\.cpp cannot use") as refused:
        difference(written.path, model)
    assert refused.value.code == "E328"


def test_arrays_in_architecture_llama_are_rejected(scratch, monkeypatch):
    pytest.importorskip("xllamacpp")
    folder, model = saved("llama", VARIED, scratch / "model")
    monkeypatch.setattr(gguf_layout, "architecture", lambda config: ("llama", ""))
    monkeypatch.setattr(gguf_layout, "is_uniform", lambda shapes: False)
    written = gguf.write(open_path(folder), scratch / "wrong.gguf", dtype="float32")
    with pytest.raises(InputError, match="wrong shape"):
        difference(written.path, model)


@pytest.mark.parametrize("part", ["bias", "weight"])
def test_biases_and_weights_are_both_reordered(part, scratch, monkeypatch):
    """Leaving out the reordering of either is seen: parity is no accident of small biases."""
    pytest.importorskip("xllamacpp")
    folder, model = saved("qwen2", VARIED, scratch / "model")
    plan = gguf_layout.plan

    def partly(checkpoint):
        layout = plan(checkpoint)
        tensors = tuple(
            gguf_layout.GgufTensor(
                t.name, t.shape, tuple(gguf_layout.Piece(p.source, p.rows) for p in t.pieces)
            )
            if t.name.endswith((f"attn_q.{part}", f"attn_k.{part}"))
            else t
            for t in layout.tensors
        )
        return gguf_layout.GgufLayout(layout.architecture, layout.keys, tensors)

    monkeypatch.setattr(gguf_layout, "plan", partly)
    written = gguf.write(open_path(folder), scratch / "wrong.gguf", dtype="float32")
    assert difference(written.path, model) > 1e-3


# ---- the check that an export runs ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_trained_model_agrees_in_every_type(dtype, scratch):
    pytest.importorskip("xllamacpp")
    folder = Path(__file__).resolve().parents[1] / "models" / "base"
    written = gguf.write(open_path(folder), scratch / "m.gguf", dtype=dtype)
    found = check(written.path, folder, dtype=dtype)
    assert found.texts == 50 and found.same_choice == found.prompts == 4
    assert found.difference < {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.5}[dtype]


def test_a_file_of_another_model_does_not_pass(scratch):
    pytest.importorskip("xllamacpp")
    models = Path(__file__).resolve().parents[1] / "models"
    written = gguf.write(open_path(models / "base"), scratch / "m.gguf", dtype="bfloat16")
    with pytest.raises(InputError, match="other probabilities") as refused:
        check(written.path, models / "long", dtype="bfloat16")
    assert refused.value.code == "E328"


# ---- what is in the file ---------------------------------------------------------------------------


def contents(file: Path):
    found = reader.GGUFReader(file)
    return found, {tensor.name: tensor for tensor in found.tensors}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_values_are_the_sources_rounded_once(dtype, scratch, monkeypatch):
    folder, model = saved("qwen2", VARIED, scratch / "model")
    monkeypatch.setattr(gguf, "BLOCK", 300)  # less than a head: blocks still hold whole heads
    written = gguf.write(open_path(folder), scratch / "m.gguf", dtype=dtype)
    found, tensors = contents(written.path)
    state = model.state_dict()
    kind = {"float32": 0, "float16": 1, "bfloat16": 30}[dtype]
    down = tensors["blk.2.ffn_down.weight"]
    assert int(down.tensor_type) == kind
    wanted = state["model.layers.2.mlp.down_proj.weight"].to(getattr(torch, dtype)).float().numpy()
    stored = reader.quants.dequantize(down.data, down.tensor_type).reshape(wanted.shape)
    assert np.array_equal(stored, wanted)
    norm = tensors["blk.0.attn_norm.weight"]
    assert int(norm.tensor_type) == 0
    assert np.array_equal(norm.data, state["model.layers.0.input_layernorm.weight"].numpy())
    # Rows of a head: first the pair (0, half), then (1, half + 1), ...; llama.cpp's own rule for Llama.
    query = state["model.layers.1.self_attn.q_proj.weight"]
    turned = (
        query.reshape(4, 2, 8, 64).transpose(1, 2).reshape(64, 64).to(getattr(torch, dtype)).float().numpy()
    )
    held = tensors["blk.1.attn_q.weight"]
    assert np.array_equal(reader.quants.dequantize(held.data, held.tensor_type).reshape(64, 64), turned)
    assert found.fields["deci.attention.head_count"].contents() == [8, 4, 4, 2]
    assert found.fields["deci.attention.head_count_kv"].contents() == [4, 2, 4, 1]
    assert found.fields["deci.feed_forward_length"].contents() == [256, 96, 160, 64]
    assert [found.fields[f"deci.{key}"].contents() for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")] == [16] * 3  # fmt: skip


def test_removed_branches_become_zeros(scratch):
    folder, _ = saved("llama", NO_LAST_FFN, scratch / "model")
    found, tensors = contents(gguf.write(open_path(folder), scratch / "m.gguf", dtype="float32").path)
    assert found.fields["deci.feed_forward_length"].contents() == [96, 32]
    assert all(not tensors[f"blk.1.ffn_{part}.weight"].data.any() for part in ("gate", "up", "down"))
    assert (tensors["blk.1.ffn_norm.weight"].data == 1).all()


def test_half_precision_overflow_is_refused_not_written_as_infinity(scratch):
    folder, model = saved("llama", None, scratch / "model")
    state = model.state_dict()
    with torch.no_grad():
        state["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="float16") as refused:
        gguf.write(open_path(folder), scratch / "m.gguf", dtype="float16")
    assert refused.value.code == "E328" and sorted(p.name for p in scratch.iterdir()) == ["model"]


def test_the_manifest_vouches_for_file_tensors_and_inputs(scratch):
    folder, _ = saved("llama", VARIED, scratch / "model")
    first = gguf.write(open_path(folder), scratch / "a.gguf", dtype="bfloat16", recipe={"method": "ziplm"})
    second = gguf.write(open_path(folder), scratch / "b.gguf", dtype="bfloat16")
    assert first.path.read_bytes() == second.path.read_bytes()
    body = (scratch / "a.gguf.surgeon.json").read_bytes()
    assert seal_holds(body)
    manifest = json.loads(body)
    assert (
        manifest["files"]
        == {"a.gguf": hashlib.sha256(first.path.read_bytes()).hexdigest()}
        == {"a.gguf": first.sha256}
    )
    assert manifest["inputs"] == {
        "model.safetensors": {
            "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        }
    }
    assert manifest["recipe"] == {"method": "ziplm"} and manifest["architecture"] == "deci"
    _, tensors = contents(first.path)
    assert {n: hashlib.sha256(t.data.tobytes()).hexdigest() for n, t in tensors.items()} == manifest[
        "tensors"
    ]
    assert str(scratch) not in body.decode()
    assert first.bytes == first.path.stat().st_size
    layout = gguf_layout.plan(open_path(folder))
    words = read_tokenizer(folder, VOCABULARY)
    assert gguf.Sizes(layout, words, "bfloat16", "model").of() == first.bytes


def test_an_interrupted_export_publishes_nothing(scratch):
    folder, _ = saved("llama", None, scratch / "model")
    stop = threading.Event()
    seen = []

    def progress(done, total):
        seen.append((done, total))
        stop.set()

    with pytest.raises(Interrupted):
        gguf.write(open_path(folder), scratch / "m.gguf", progress=progress, stop=stop)
    assert len(seen) == 1 and sorted(p.name for p in scratch.iterdir()) == ["model"]
    written = gguf.write(open_path(folder), scratch / "m.gguf", dtype="float32")
    with pytest.raises(OutputConflict) as refused:
        gguf.write(open_path(folder), scratch / "m.gguf", dtype="bfloat16")
    assert refused.value.code == "E601"
    assert hashlib.sha256(written.path.read_bytes()).hexdigest() == written.sha256
    again = gguf.write(open_path(folder), scratch / "m.gguf", dtype="bfloat16", overwrite=True)
    assert hashlib.sha256((scratch / "m.gguf").read_bytes()).hexdigest() == again.sha256 != written.sha256


# ---- refusals, before anything is written ----------------------------------------------------------

REFUSED = [
    ("gemma2", {}, "GELU"),
    ("phi3", {}, "phi3"),
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("mistral", {"sliding_window": 64}, "slides"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "layer_types": ["sliding_attention"] * 5}, "slides"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}}, "yarn"),
    ("qwen2", {"rope_parameters": LLAMA3, "head_dim": 8}, "llama3"),
    ("qwen3", {"attention_bias": True}, "biases"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "extra", "word"), REFUSED, ids=[f"{f}-{w}" for f, _, w in REFUSED])
def test_what_llama_cpp_computes_differently_is_refused(family, extra, word, scratch):
    folder = stock_folder(family, scratch / "model", **extra)
    with pytest.raises(InputError, match=word) as refused:
        gguf.write(open_path(folder), scratch / "m.gguf")
    assert refused.value.code == "E328" and not (scratch / "m.gguf").exists()


@pytest.mark.parametrize(
    ("family", "word"), [("smollm3", "rotary"), ("qwen2_moe", "experts"), ("bert", "bert")]
)
def test_other_families_are_refused_by_name(family, word):
    arch, reason = gguf_layout.architecture({**config_of("llama"), "model_type": family})
    assert arch is None and word in reason


def test_untied_qwen3_with_layers_of_different_sizes_is_refused(scratch):
    folder, _ = saved("qwen3", VARIED, scratch / "model", tie_word_embeddings=False)
    with pytest.raises(InputError, match="ties"):
        gguf.write(open_path(folder), scratch / "m.gguf")


def test_a_tensor_without_a_place_is_refused(scratch):
    from safetensors.torch import load_file, save_file

    folder, _ = saved("llama", None, scratch / "model")
    state = load_file(folder / "model.safetensors")
    save_file(
        {**state, "model.layers.0.self_attn.sinks": torch.zeros(8)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match="sinks") as refused:
        gguf.write(open_path(folder), scratch / "m.gguf")
    assert refused.value.code == "E328"
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is missing") as refused:
        gguf.write(open_path(folder), scratch / "m.gguf")
    assert refused.value.code == "E365"


def test_an_unknown_type_is_a_usage_error(scratch):
    folder, _ = saved("llama", None, scratch / "model")
    with pytest.raises(UsageError, match="int4") as refused:
        gguf.write(open_path(folder), scratch / "m.gguf", dtype="int4")
    assert refused.value.code == "E285"


def test_llama3_frequencies_follow_the_library():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = build(config_of("llama", rope_parameters=LLAMA3), dtype=torch.float32).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    assert np.allclose(gguf_layout.llama3_factors(16, LLAMA3), (plain / scaled).numpy(), rtol=1e-6)
