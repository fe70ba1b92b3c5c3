"""Model folders and weight files made by code, well-formed or hostile; no surgeon code, no torch.

Nothing here is stored in the repository: every hostile file is built where a test needs it.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

WIDTH = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_NUMPY = {
    "f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u8": "U64", "u4": "U32",
    "u2": "U16", "u1": "U8", "b1": "BOOL", "c8": "C64",
}  # fmt: skip

Tensor = np.ndarray | tuple[str, tuple[int, ...], bytes]
"""An array, or (code, shape, stored bytes) for what NumPy cannot say."""


def raw_file(header: bytes | str | dict, payload: bytes = b"", length: int | None = None) -> bytes:
    """Return a file of any header text and payload; ``length`` lies about the header's size."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode("utf-8", "surrogatepass")
    size = len(header) if length is None else length
    return struct.pack("<Q", size % 2**64) + header + payload


def bf16(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """Return values cut to bfloat16 (towards zero: any bfloat16 value will do in a test)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> np.uint32(16)
    return "BF16", values.shape, bits.astype("<u2").tobytes()


def describe(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    if isinstance(tensor, tuple):
        return tensor
    return _NUMPY[tensor.dtype.str[1:]], tensor.shape, np.ascontiguousarray(tensor).tobytes()


def entries_of(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """Return header entries and the data of tensors, packed in the given order."""
    entries: dict[str, Any] = {}
    data = bytearray()
    for name, tensor in tensors.items():
        code, shape, content = describe(tensor)
        entries[name] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return entries, bytes(data)


def weight_file(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return a well-formed safetensors file."""
    entries, data = entries_of(tensors)
    text = json.dumps(
        {"__metadata__": {"format": "pt"} if metadata is None else metadata, **entries}
    ).encode()
    return raw_file(text + b" " * (-len(text) % 8), data)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(weight_file(tensors, metadata))
    return path


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a llama checkpoint, in the order a hub file has them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    narrow = head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (hidden, hidden),
            at + "self_attn.k_proj.weight": (narrow, hidden),
            at + "self_attn.v_proj.weight": (narrow, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def llama_tensors(seed: int = 0, dtype: str = "BF16", **config: Any) -> dict[str, Tensor]:
    """Return random weights of a tiny llama; models of different seeds are fine-tunes of seed-free weights."""
    shapes = llama_shapes({**CONFIG, **config})
    shared, own = np.random.default_rng(7), np.random.default_rng(1000 + seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        values = shared.standard_normal(shape, dtype=np.float32) * 0.1
        values = values + own.standard_normal(shape, dtype=np.float32) * 0.01 * (seed > 0)
        tensors[name] = (
            bf16(values) if dtype == "BF16" else values.astype({"F32": "<f4", "F16": "<f2"}[dtype])
        )
    return tensors


def tokenizer_json(size: int = 24, special: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> dict[str, Any]:
    words = [*special, *(f"w{i}" for i in range(size - len(special)))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": special[0]},
    }


def model_folder(
    path: Path,
    seed: int = 0,
    *,
    dtype: str = "BF16",
    shards: int = 1,
    tokenizer: bool = True,
    tensors: dict[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write a complete tiny llama folder, as one downloads it; ``config`` overrides config.json keys."""
    path.mkdir(parents=True, exist_ok=True)
    settings = {**CONFIG, **config}
    tensors = llama_tensors(seed, dtype, **config) if tensors is None else tensors
    if shards == 1:
        write(path / "model.safetensors", tensors)
    else:
        write_shards(path, split(tensors, shards))
    (path / "config.json").write_text(json.dumps(settings, indent=2))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    if tokenizer:
        (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(settings["vocab_size"])))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>",
                        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
        )  # fmt: skip
    return path


def split(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    names = list(tensors)
    size = math.ceil(len(names) / count)
    return [{n: tensors[n] for n in names[i * size : (i + 1) * size]} for i in range(count)]


def write_shards(path: Path, parts: list[dict[str, Tensor]]) -> Path:
    """Write shards and their index; return the index."""
    weight_map, total = {}, 0
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        write(path / name, part)
        weight_map |= dict.fromkeys(part, name)
        total += sum(len(describe(t)[2]) for t in part.values())
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return index


def edit_index(folder: Path, change) -> None:
    """Let ``change`` modify the parsed index of a folder in place."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


# --- strategies -------------------------------------------------------------------------------

_NAMES = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["a", "model.layers.0.w", "../x", "/etc/passwd", "a\x1b[31m", "a/../b", "__metadata__", "C:\\x", "é"]
)
_SIZES = st.integers(0, 6) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, 10**30, True, 1.0, "1", None])
_CODES = st.sampled_from([*WIDTH, "F128", "", "f32", "bf16"]) | st.text(max_size=4)


@st.composite
def tensor_tables(draw) -> dict[str, Tensor]:
    """A few small well-formed tensors of any whole-byte type."""
    codes = [c for c, bits in WIDTH.items() if bits % 8 == 0]
    names = draw(st.lists(st.text("abc.0_", min_size=1, max_size=10), max_size=5, unique=True))
    table: dict[str, Tensor] = {}
    for name in names:
        code = draw(st.sampled_from(codes))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        table[name] = (code, shape, bytes(math.prod(shape) * WIDTH[code] // 8))
    return table


@st.composite
def damaged_files(draw) -> bytes:
    """A well-formed file with one to three things wrong with it (or, rarely, nothing)."""
    entries, data = entries_of(draw(tensor_tables()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}, **entries}
    for _ in range(draw(st.integers(0, 3))):
        names = [n for n in header if n != "__metadata__"]
        kind = draw(st.sampled_from(["name", "field", "offset", "shape", "dtype", "drop", "meta", "extra"]))
        if kind == "meta":
            header["__metadata__"] = draw(
                st.sampled_from([None, [], {"a": 1}, {"a": None}, {}, "x", {"a": {}}])
            )
        elif not names or kind == "extra":
            header[draw(_NAMES)] = draw(st.sampled_from([None, 1, [], {}, "x", {"dtype": "F32"}]))
        else:
            name = draw(st.sampled_from(names))
            entry = header[name]
            if not isinstance(entry, dict) or not {"shape", "data_offsets", "dtype"} <= set(entry):
                continue
            if kind == "name":
                header[draw(_NAMES)] = header.pop(name)
            elif kind == "field":
                entry[draw(st.text(max_size=5))] = 1
            elif kind == "offset":
                entry["data_offsets"] = draw(st.lists(_SIZES, max_size=3))
            elif kind == "shape":
                entry["shape"] = draw(st.lists(_SIZES, max_size=4))
            elif kind == "dtype":
                entry["dtype"] = draw(_CODES)
            else:
                entry.pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])))
    text = json.dumps(header).encode()
    action = draw(
        st.sampled_from(["none", "none", "cut", "flip", "insert", "pad", "length", "extend", "blank"])
    )
    length = None
    if action == "pad":
        text += b" " * draw(st.integers(0, 9))
    elif action == "blank":
        text = draw(st.sampled_from([b" ", b"\n", b"\t"])) + text
    elif action == "insert":
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.binary(max_size=6)) + text[place:]
    elif action == "length":
        length = draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(text)))
    content = raw_file(text, data, length)
    if action == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if action == "extend":
        return content + draw(st.binary(min_size=1, max_size=9))
    if action == "flip" and content:
        place = draw(st.integers(0, len(content) - 1))
        return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    return content
