"""Tiny random model families with tokenizers, built once per run, and both mergers side by side.

A family is a base and its fine-tunes: same architecture, every tensor of a fine-tune differs from the
base's by a small amount. `run_both` merges one YAML with mergekit 0.1.5 and with surgeon.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import io
import json
import logging
import shutil
import string
import tempfile
import warnings
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(tempfile.mkdtemp(prefix="surgeon-conformance-"))
atexit.register(shutil.rmtree, ROOT, True)

SPECIAL = ("<pad>", "<bos>", "<eos>")
WORDS = ("hello", "world")
ROWS = 256 + 8 + len(SPECIAL)
"""256 bytes, the pieces of the words, and the special tokens."""

DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": ROWS,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict] = {
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": {**DECODER, "head_dim": 8},
    "mixtral": {**DECODER, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **DECODER,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": ROWS, "n_positions": 40},
    "bert": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": ROWS,
        "max_position_embeddings": 40,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPT = torch.arange(3, 19).reshape(2, 8)


# ---- building ----------------------------------------------------------------------------------


def save_tokenizer(folder: Path, words=WORDS, special=SPECIAL, template: str | None = None) -> int:
    """Write a byte-level BPE tokenizer; return its size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in names:
                names.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    roles = {"<pad>": "pad_token", "<bos>": "bos_token", "<eos>": "eos_token"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{roles[t]: t for t in special if t in roles}
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return len(fast)


def new_model(kind: str, seed: int = 0, **extra) -> torch.nn.Module:
    ids = {"pad_token_id": ROWS - 3, "bos_token_id": ROWS - 2, "eos_token_id": ROWS - 1}
    config = transformers.AutoConfig.for_model(kind, **{**FAMILIES[kind], **ids, **extra})
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
    return model


def fine_tune(model: torch.nn.Module, seed: int, spread: float = 0.02) -> torch.nn.Module:
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape) * spread)
    return other


def write(model: torch.nn.Module, folder: Path, dtype: str = "float32", **tokenizer) -> Path:
    """Save a model as the library does (hub names), with tokenizer and generation config."""
    model = copy.deepcopy(model).to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    with quiet():
        model.save_pretrained(folder)
        save_tokenizer(folder, **tokenizer)
    if not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ROWS - 1}))
    return folder


@functools.cache
def _family(kind: str, dtype: str, extra: str) -> tuple[Path, ...]:
    base = new_model(kind, **json.loads(extra))
    place = ROOT / f"{kind}-{dtype}-{abs(hash(extra)) % 10**8}"
    models = [base, *(fine_tune(base, seed) for seed in (1, 2, 3))]
    return tuple(
        write(m, place / name, dtype) for m, name in zip(models, ("base", "a", "b", "c"), strict=True)
    )


def family(kind: str, dtype: str = "float32", **extra) -> tuple[Path, ...]:
    """Return base, a, b, c: folders of a tiny family."""
    return _family(kind, dtype, json.dumps(extra, sort_keys=True))


def clone(source: Path, target: Path, tensors=None, drop=(), **config) -> Path:
    """Copy a model folder with tensors added or replaced, dropped, and config keys edited."""
    shutil.copytree(source, target)
    state = load_file(source / "model.safetensors")
    state.update(tensors or {})
    for name in drop:
        del state[name]
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    if config:
        content = json.loads((target / "config.json").read_text())
        content.update(config)
        (target / "config.json").write_text(json.dumps(content))
    return target


# ---- reading -----------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet():
    """Silence progress bars, log lines and warnings of the libraries the tests compare with."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return found


def config_of(folder: Path) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def load_strict(folder: Path, dtype=torch.float32) -> torch.nn.Module:
    """Load with transformers and insist that every tensor was found, used and had the right shape."""
    kind = config_of(folder)["model_type"]
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    with quiet():
        model, info = auto.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    for key, value in info.items():
        assert not value, f"{key}: {value}"
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(PROMPT).logits.float()


def independent(kind: str, state: dict[str, torch.Tensor], **extra) -> torch.nn.Module:
    """Build a model from expected tensors alone, without reading any merged file."""
    model = new_model(kind, **extra).to(torch.float32)
    missing, unexpected = model.load_state_dict(
        {k: v.to(torch.float32) for k, v in state.items()}, strict=False
    )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(missing) <= tied, missing
    assert not unexpected, unexpected
    return model.eval()


def unfused(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Split mergekit's fused expert tensors into one tensor per expert under the hub's names."""
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".experts.")
        if last not in {"gate_up_proj", "down_proj"}:
            renamed = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if kind == "mixtral" else name
            found[renamed] = tensor
            continue
        if kind == "mixtral":
            stem = stem.replace(".mlp", ".block_sparse_moe")
        for number, expert in enumerate(tensor):
            prefix = f"{stem}.experts.{number}"
            if last == "down_proj":
                found[f"{prefix}.{down}.weight"] = expert
            else:
                half = expert.shape[0] // 2
                found[f"{prefix}.{gate}.weight"] = expert[:half]
                found[f"{prefix}.{up}.weight"] = expert[half:]
    return found


# ---- both mergers ------------------------------------------------------------------------------


def fill(text: str, **folders) -> str:
    return string.Template(text).substitute({k: str(v) for k, v in folders.items()})


def run_mergekit(text: str, out: Path, **options) -> Path:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    with quiet():
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(text)),
            str(out),
            MergeOptions(random_seed=0, quiet=True, **options),
            config_source=text,
        )
    return out


def plan(text: str, **common):
    """Plan a mergekit YAML as the command does."""
    from surgeon import api
    from surgeon.recipe import mergekit_yaml

    specs, _ = mergekit_yaml.parse(text, "config.yml")
    assert len(specs) == 1
    return api.plan_spec(specs[0], api.build_request(models=(), **common))


def run_surgeon(text: str, out: Path, **common) -> Path:
    plan(text, **common).run(out, threads=1)
    return out


@dataclass(frozen=True)
class Results:
    ours: Path
    theirs: Path


def run_both(text: str, place: Path, common: dict | None = None, **options) -> Results:
    place.mkdir(parents=True, exist_ok=True)
    return Results(
        run_surgeon(text, place / "ours", **(common or {})), run_mergekit(text, place / "theirs", **options)
    )


@dataclass(frozen=True)
class Deviation:
    """How far two results are apart; the worst tensor counts.

    Attributes:
        unequal: share of unequal entries.
        ulps: difference in units of the last place of the largest magnitude among result and inputs there.
        relative: difference relative to the tensor's largest magnitude.
        loose: share of entries more than four such units apart.
        outside: unequal entries where no magnitude ties with a threshold.
    """

    unequal: float = 0.0
    ulps: float = 0.0
    relative: float = 0.0
    loose: float = 0.0
    outside: int = 0


def deviation(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], inputs=(), tied=None
) -> Deviation:
    """Compare names, shapes and types exactly; return how far the values are apart.

    Args:
        inputs: state dicts of the merged models, for the scale of units.
        tied: function of a tensor's name that returns a mask of entries that may differ.
    """
    assert sorted(ours) == sorted(theirs)
    found = []
    for name, mine in ours.items():
        other = theirs[name]
        assert mine.shape == other.shape, name
        assert mine.dtype == other.dtype, (name, mine.dtype, other.dtype)
        if not mine.is_floating_point():
            assert torch.equal(mine, other), name
            continue
        gap = (mine.double() - other.double()).abs()
        assert torch.isfinite(gap).all(), name
        if not gap.any():
            continue
        largest = other.double().abs()
        for state in inputs:
            if name in state and state[name].shape == largest.shape:
                largest = torch.maximum(largest, state[name].double().abs())
        unit = torch.finfo(mine.dtype).eps * torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-30))))
        outside = 0 if tied is None else int(((gap > 0) & ~tied(name)).sum())
        found.append(
            Deviation(
                float((gap > 0).double().mean()),
                float((gap / unit).max()),
                float(gap.max() / largest.max()),
                float((gap > 4 * unit).double().mean()),
                outside,
            )
        )
    return Deviation(*map(max, zip(*map(astuple, found), strict=True))) if found else Deviation()
