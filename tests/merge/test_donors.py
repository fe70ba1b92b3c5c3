"""A long/short pair on the command line: who gives context, tokenizer and rows, what is refused, what is said.

`surgeon merge LONG SHORT --method ties` adds the long model's largest differences to the short one. Structure
comes from the short one (the last), everything about text from the long one (the first).
"""

from __future__ import annotations

import json
from pathlib import Path

import merge_models as mm
import pytest
import torch

DENSITY = 0.2
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

FULL = ("full_attention",) * 3


@pytest.fixture
def models():
    _, long, short, other = mm.family("qwen2", "bfloat16")
    return long, short, other


def ok(result):
    assert result.code == 0, result.err
    return result


def ties(surgeon, long: Path, short: Path, out: Path, *options: object):
    return surgeon("merge", long, short, "--method", "ties", "--density", str(DENSITY), *options, "-o", out)


def settings(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def write(folder: Path, name: str, content: dict | str) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def trimmed(delta: torch.Tensor) -> torch.Tensor:
    """Return the largest fifth of a difference; ties at the threshold are NaN, either choice is right."""
    size = delta.abs().flatten()
    bound = size.sort().values[-max(1, int(DENSITY * size.numel()))]
    kept = torch.where(delta.abs() > bound, delta, 0)
    return torch.where((delta.abs() == bound) & (bound > 0), torch.nan, kept)


def agree(found: torch.Tensor, base: torch.Tensor, other: torch.Tensor) -> None:
    """Compare with TIES of one difference, all in float32, and one rounding to bfloat16."""
    change = trimmed(other.float() - base.float())
    known = ~change.isnan()
    expected = (base.float() + change).to(torch.bfloat16)
    assert torch.equal(found[known], expected[known])


# ---- text comes from the long model ---------------------------------------------------------------


def dressed(models, place: Path, long_context: int = 131072, short_context: int = 4096) -> tuple[Path, Path]:
    """Return a pair whose every text-side file differs."""
    long = mm.clone(models[0], place / "long", max_position_embeddings=long_context)
    short = mm.clone(models[1], place / "short", max_position_embeddings=short_context)
    for folder, context, mark in ((long, long_context, "LONG"), (short, short_context, "SHORT")):
        mm.save_tokenizer(folder, template=f"{mark} {{{{ messages }}}}" + "<think>" * (mark == "LONG"))
        write(
            folder,
            "generation_config.json",
            {"temperature": 0.6 if mark == "LONG" else 0.9, "eos_token_id": mm.ROWS - 1},
        )
        config = settings(folder, "tokenizer_config.json")
        write(folder, "tokenizer_config.json", {**config, "model_max_length": context})
    return long, short


@pytest.mark.parametrize(("long_context", "short_context"), [(131072, 4096), (4096, 131072)])
def test_context_generation_template_and_tokenizer_are_the_long_models(
    long_context, short_context, models, tmp_path, surgeon
):
    long, short = dressed(models, tmp_path, long_context, short_context)
    result = ok(ties(surgeon, long, short, tmp_path / "out"))
    out = tmp_path / "out"
    assert mm.config_of(out)["max_position_embeddings"] == long_context
    assert f"max_position_embeddings {long_context}" in result.err
    assert settings(out, "generation_config.json")["temperature"] == 0.6
    assert (out / "chat_template.jinja").read_text().startswith("LONG")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (long / name).read_bytes(), name
    assert settings(out, "tokenizer_config.json")["model_max_length"] == long_context
    state, x, y = (mm.tensors(m) for m in (out, long, short))
    for name, found in state.items():
        agree(found, y[name], x[name])
    mm.load_strict(out)


def test_a_yaml_does_the_same_with_text_from(models, tmp_path, surgeon):
    long, short = dressed(models, tmp_path)
    ok(ties(surgeon, long, short, tmp_path / "cli"))
    recipe = (
        f"merge_method: ties\nbase_model: {short}\nmodels: [{{model: {long}, parameters: {{density: {DENSITY}, weight: 1}}}}]\n"
        f"dtype: float32\nout_dtype: bfloat16\n"
    )
    for name, extra in (("with", f"surgeon: {{text_from: {long}}}\n"), ("without", "")):
        (tmp_path / f"{name}.yml").write_text(recipe + extra)
        ok(surgeon("merge", tmp_path / f"{name}.yml", "-o", tmp_path / name))
    same = (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    )
    for name in same:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "cli" / name).read_bytes(), name
    assert mm.config_of(tmp_path / "without")["max_position_embeddings"] == 4096
    assert (tmp_path / "without" / "chat_template.jinja").read_text().startswith("SHORT")


def test_a_long_model_without_generation_settings_is_not_given_the_short_ones(models, tmp_path, surgeon):
    """The short model's end and length of answers are not the long one's."""
    long, short = dressed(models, tmp_path)
    (long / "generation_config.json").unlink()
    write(short, "generation_config.json", {"max_new_tokens": 64, "eos_token_id": mm.ROWS - 1})
    result = ok(ties(surgeon, long, short, tmp_path / "out"))
    out = tmp_path / "out" / "generation_config.json"
    assert not out.exists() or "generation_config.json" in result.err, (
        "taken from the short model, in silence"
    )


# ---- tokens -----------------------------------------------------------------------------------------


def test_renamed_special_tokens_take_the_long_models_rows(models, tmp_path, surgeon):
    long, short = (mm.clone(m, tmp_path / n) for m, n in zip(models[:2], ("long", "short"), strict=True))
    mm.save_tokenizer(long, special=("<pad>", "<bos>", "<eos>"))
    mm.save_tokenizer(short, special=("<pad>", "<|im_start|>", "<|im_end|>"))
    for folder, eos in ((long, mm.ROWS - 1), (short, mm.ROWS - 3)):
        config = mm.config_of(folder)
        write(folder, "config.json", {**config, "eos_token_id": eos})
        write(folder, "generation_config.json", {"eos_token_id": eos})
    result = ok(ties(surgeon, long, short, tmp_path / "out"))
    assert "2 special or added tokens" in result.err and "rows are taken from" in result.err
    assert '"<eos>" / "<|im_end|>"' in result.err
    state, x, y = (mm.tensors(m) for m in (tmp_path / "out", long, short))
    renamed = [mm.ROWS - 2, mm.ROWS - 1]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert not torch.equal(x[name][renamed], y[name][renamed])
        assert torch.equal(state[name][renamed], x[name][renamed]), name
        aligned = y[name].clone()
        aligned[renamed] = x[name][renamed]
        agree(state[name], aligned, x[name])
    assert settings(tmp_path / "out", "generation_config.json")["eos_token_id"] == mm.ROWS - 1
    assert mm.config_of(tmp_path / "out")["eos_token_id"] == mm.ROWS - 1


def test_ordinary_tokens_that_differ_are_refused_with_the_ways_out(models, tmp_path, surgeon):
    long, short = (mm.clone(m, tmp_path / n) for m, n in zip(models[:2], ("long", "short"), strict=True))
    mm.save_tokenizer(long, words=("hello", "world"))
    mm.save_tokenizer(short, words=("hellx", "world"))
    result = ties(surgeon, long, short, tmp_path / "out")
    assert result.code == 3 and "tokens differ" in result.err, result.err
    assert "--vocab base" in result.err and "--vocab union" in result.err
    assert not (tmp_path / "out").exists()


def padded(source: Path, place: Path, rows: int) -> Path:
    """Copy a model with rows appended to embedding and head, as for a multiple of 128."""
    state = mm.tensors(source)
    generator = torch.Generator().manual_seed(rows)
    more = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = torch.randn(rows - state[name].shape[0], state[name].shape[1], generator=generator)
        more[name] = torch.cat([state[name], extra.to(state[name].dtype)])
    return mm.clone(source, place, more, vocab_size=rows)


@pytest.mark.parametrize("wide", ["long", "short"])
def test_padding_to_different_sizes_is_refused_or_aligned(wide, models, tmp_path, surgeon):
    """151,936 and 152,064 rows for the same tokens: never cut or stretched in silence."""
    rows = {"long": mm.ROWS + 1, "short": mm.ROWS + 1, wide: mm.ROWS + 9}
    long, short = (
        padded(m, tmp_path / n, rows[n]) for m, n in zip(models[:2], ("long", "short"), strict=True)
    )
    refused = ties(surgeon, long, short, tmp_path / "no")
    assert refused.code == 3 and "row counts differ" in refused.err
    assert "--vocab" in refused.err and "look like padding" in refused.err
    for choice, kept in (("base", rows["short"]), (long, rows["long"]), ("truncate", mm.ROWS + 1)):
        out = tmp_path / f"out-{kept}-{Path(choice).name}"
        ok(ties(surgeon, long, short, out, "--vocab", choice))
        state, x, y = (mm.tensors(m) for m in (out, long, short))
        assert mm.config_of(out)["vocab_size"] == kept
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert state[name].shape[0] == kept
            common = min(kept, *rows.values())
            # rows that only one model has are its own; a difference of 0 does not compete for the trim
            pair = [torch.zeros(kept, s[name].shape[1], dtype=s[name].dtype) for s in (x, y)]
            for i, s in enumerate((x, y)):
                pair[i][:common] = s[name][:common]
                source = x if wide == "long" else y
                pair[i][common:] = source[name][common:kept]
            agree(state[name], pair[1], pair[0])
        mm.load_strict(out)


def test_equal_tokens_at_other_ids_are_aligned_by_token_not_by_position(models, tmp_path, surgeon):
    """The long model has two more special tokens in the middle: <eos> moves from id 266 to 268."""
    short = mm.clone(models[1], tmp_path / "short")
    long = padded(models[0], tmp_path / "long", mm.ROWS + 5)
    mm.save_tokenizer(long, special=("<pad>", "<bos>", "<think>", "</think>", "<eos>"))
    write(long, "generation_config.json", {"eos_token_id": mm.ROWS + 1})
    config = mm.config_of(long)
    write(long, "config.json", {**config, "eos_token_id": mm.ROWS + 1})
    refused = ties(surgeon, long, short, tmp_path / "no")
    assert refused.code == 3 and "--vocab" in refused.err
    out = tmp_path / "out"
    ok(ties(surgeon, long, short, out, "--vocab", long))
    state, x, y = (mm.tensors(m) for m in (out, long, short))
    rows = [*range(mm.ROWS - 1), mm.ROWS + 1]  # where the short model's tokens lie in the long one
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        aligned = x[name].clone()
        aligned[rows] = y[name]
        agree(state[name], aligned, x[name])
        only_long = [mm.ROWS - 1, mm.ROWS]
        assert torch.equal(state[name][only_long], x[name][only_long])
    assert mm.config_of(out)["eos_token_id"] == mm.ROWS + 1
    assert settings(out, "generation_config.json")["eos_token_id"] == mm.ROWS + 1


# ---- tied embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", ["short", "long"])
def test_a_tied_and_an_untied_model_make_an_untied_one(tied, tmp_path, surgeon):
    """The tied model's head is its embedding; a reader that ties would throw the other's head away."""
    one = mm.write(mm.new_model("qwen2", 1, tie_word_embeddings=True), tmp_path / "tied", "bfloat16")
    two = mm.write(mm.new_model("qwen2", 2, tie_word_embeddings=False), tmp_path / "untied", "bfloat16")
    long, short = (two, one) if tied == "short" else (one, two)
    result = ok(ties(surgeon, long, short, tmp_path / "out"))
    assert "tied" in result.err and "untied" in result.err
    state, x, y = (mm.tensors(m) for m in (tmp_path / "out", long, short))
    assert ("lm_head.weight" in y) is (tied == "long")
    assert mm.config_of(tmp_path / "out")["tie_word_embeddings"] is False
    for pair in (x, y):
        pair.setdefault("lm_head.weight", pair["model.embed_tokens.weight"])
    assert sorted(state) == sorted(x)
    expected = {}
    for name, found in state.items():
        agree(found, y[name], x[name])
        expected[name] = found
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    built = mm.independent("qwen2", expected, tie_word_embeddings=False)
    torch.testing.assert_close(
        mm.logits(mm.load_strict(tmp_path / "out")), mm.logits(built), rtol=1e-4, atol=2e-5
    )


# ---- positions ----------------------------------------------------------------------------------------


def spelled(folder: Path, spelling: str, theta: float, **more) -> Path:
    """Write rope_theta as transformers 4 ("old") or 5 ("new") does."""
    config = mm.config_of(folder)
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(key, None)
    if spelling == "old":
        config["rope_theta"] = theta
    else:
        config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    write(folder, "config.json", {**config, **more})
    return folder


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("other", ["old", "new"])
def test_another_rope_base_is_refused_in_every_spelling(spelling, other, models, tmp_path, surgeon):
    long, short = (mm.clone(m, tmp_path / n) for m, n in zip(models[:2], ("long", "short"), strict=True))
    spelled(long, spelling, 1e6)
    spelled(short, other, 1e4)
    result = ties(surgeon, long, short, tmp_path / "out")
    assert result.code == 3 and "rope_theta" in result.err and "E345" in result.err, result.err
    assert not (tmp_path / "out").exists()
    spelled(short, other, 1e6)
    ok(ties(surgeon, long, short, tmp_path / "out"))


@pytest.mark.parametrize(
    ("long_has", "short_has", "name"),
    [
        ({"use_sliding_window": True, "sliding_window": 16}, {"use_sliding_window": False}, "sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 16}, {"use_sliding_window": True, "sliding_window": 8}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor"),
        ({"head_dim": 4}, {"head_dim": 8}, "head_dim"),
        ({"layer_types": ["sliding_attention", *FULL]}, {"layer_types": ["full_attention", *FULL]}, "layer_types"),
    ],
)  # fmt: skip
def test_what_gives_weights_another_meaning_is_refused(long_has, short_has, name, models, tmp_path, surgeon):
    long = mm.clone(models[0], tmp_path / "long", **long_has)
    short = mm.clone(models[1], tmp_path / "short", **short_has)
    result = ties(surgeon, long, short, tmp_path / "out")
    assert result.code == 3 and name in result.err, result.err
    assert not (tmp_path / "out").exists()


def test_sliding_windows_that_are_switched_off_do_not_matter(models, tmp_path, surgeon):
    """Qwen2.5-Math-7B and R1-Distill-Qwen-7B hold different numbers for a window that neither uses."""
    long = mm.clone(models[0], tmp_path / "long", use_sliding_window=False, sliding_window=16)
    short = mm.clone(models[1], tmp_path / "short", use_sliding_window=False, sliding_window=8)
    ok(ties(surgeon, long, short, tmp_path / "out"))


def test_rope_scaling_comes_with_the_context_length(models, tmp_path, surgeon):
    """R1-0528-Qwen3-8B reaches 131,072 positions by YaRN, Qwen3-8B has 40,960 without: a published pair."""
    long, short = (mm.clone(m, tmp_path / n) for m, n in zip(models[:2], ("long", "short"), strict=True))
    spelled(long, "old", 1e6, rope_scaling=YARN, max_position_embeddings=131072)
    spelled(short, "new", 1e6, max_position_embeddings=40960)
    result = ok(ties(surgeon, long, short, tmp_path / "out"))
    config = mm.config_of(tmp_path / "out")
    assert config["max_position_embeddings"] == 131072
    assert config["rope_parameters"] == {"rope_theta": 1e6, **YARN}
    assert "scale positions differently" in result.err and "rope_parameters" in result.err


# ---- what is said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 1e-5),
        ("attention_dropout", 0.1),
        ("initializer_range", 0.7),
        ("max_window_layers", 3),
        ("use_mrope", True),
        ("eos_token_id", mm.ROWS - 2),
        ("mlp_only_layers", [1, 2]),
    ],
)
def test_every_config_field_that_differs_is_printed(key, value, models, tmp_path, surgeon):
    long = mm.clone(models[0], tmp_path / "long", **{key: value})
    result = ok(ties(surgeon, long, models[1], tmp_path / "out", "--dry-run"))
    assert key in result.err, result.err


def test_fields_that_only_name_things_are_not(models, tmp_path, surgeon):
    long = mm.clone(
        models[0], tmp_path / "long", _name_or_path="x/y", transformers_version="4.0", use_cache=False
    )
    result = ok(ties(surgeon, long, models[1], tmp_path / "out", "--dry-run"))
    assert not any(word in result.err for word in ("_name_or_path", "transformers_version", "use_cache"))


def test_swapped_roles_are_said(models, tmp_path, surgeon):
    long, short = dressed(models, tmp_path)
    result = ok(ties(surgeon, short, long, tmp_path / "out", "--dry-run"))
    assert "may be swapped" in result.err and "131,072" in result.err and "<think>" in result.err
    assert "may be swapped" not in ok(ties(surgeon, long, short, tmp_path / "out", "--dry-run")).err
    named = surgeon(
        "merge", short, "--base", long, "--method", "task-arithmetic", "-o", tmp_path / "out", "--dry-run"
    )
    assert "may be swapped" in ok(named).err


def test_a_base_that_was_made_from_the_other_model_is_said(models, tmp_path, surgeon):
    long, short = (mm.clone(m, tmp_path / n) for m, n in zip(models[:2], ("long", "short"), strict=True))
    write(long, "README.md", f"---\nbase_model: {short}\n---\n")
    assert "made from" in ok(ties(surgeon, short, long, tmp_path / "out", "--dry-run")).err
    assert "made from" not in ok(ties(surgeon, long, short, tmp_path / "out", "--dry-run")).err


def test_methods_without_a_base_have_no_roles(models, tmp_path, surgeon):
    long, short = dressed(models, tmp_path)
    for options in (("linear",), ("slerp",)):
        result = ok(surgeon("merge", short, long, "--method", *options, "-o", tmp_path / "out", "--dry-run"))
        assert "may be swapped" not in result.err
