"""Vocabulary comparison, plans, aligned rows and rewritten tokenizers, against mergekit 0.1.5."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from surgeon.checkpoint.companions import TOKENIZER_FILES
from surgeon.errors import InputError, UsageError
from surgeon.merge.aligned_rows import MEAN, fill_rows
from surgeon.merge.spec import ModelRef, TokenizerSpec, TokenSource
from surgeon.merge.vocabulary import (
    AlignedRows,
    Participant,
    apply_config_edits,
    compare,
    plan_vocabulary,
    read_vocabulary,
)

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

COLS = 6


# ---- tiny tokenizers ---------------------------------------------------------------------------


def byte_level(words, *, permute=None):
    """Byte-level BPE over the 256 bytes plus the given words, built by left-to-right merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names, merges = list(alphabet), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in names:
                names.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    if permute is not None:
        names = [names[i] for i in permute(len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_level(words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_piece(words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def unigram(words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def save(folder: Path, tokenizer, special=("<eos>", "<pad>"), added=(), rows=None, **named) -> Path:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in added])
    named = named or {"eos_token": special[0], "pad_token": special[-1]}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.save_pretrained(folder)
    size = rows or len(fast)
    eos = fast.convert_tokens_to_ids(named.get("eos_token", special[0]))
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=COLS,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=eos,
        bos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, len(fast) - 1]}))
    return folder


def participant(folder: Path, *, key=None, rows=None, merged=True) -> Participant:
    config = json.loads((folder / "config.json").read_text())
    return Participant(
        key=key or folder.name,
        label=folder.name,
        rows=rows or config["vocab_size"],
        vocabulary=read_vocabulary(folder),
        ref=ModelRef(str(folder)),
        config=config,
        generation_config=json.loads((folder / "generation_config.json").read_text()),
        merged=merged,
    )


@pytest.fixture
def pair(tmp_path):
    """Two byte-level models: shared and own ordinary words, shared and own added tokens, padding rows."""
    a = save(tmp_path / "a", byte_level(["hello", "help"]), added=("<think>", "<only_a>"), rows=280)
    b = save(tmp_path / "b", byte_level(["help", "hero"]), added=("<only_b>", "<think>"), rows=272)
    return a, b


@pytest.fixture
def triple(tmp_path, pair):
    c = save(
        tmp_path / "c",
        byte_level(["hero"]),
        special=("<pad>", "<eos>"),
        added=("<only_c>", "<only_b>"),
        eos_token="<eos>",
        pad_token="<pad>",
    )
    return (*pair, c)


# ---- weights and the two ways to align them ------------------------------------------------------


def weights(participants, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {p.key: torch.randn(p.rows, COLS, generator=generator).to(dtype) for p in participants}


def raw(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16).reshape(-1)
    return tensor.numpy().reshape(-1)


def reader(tensors, largest=None):
    def read(model, name, start, stop):
        assert name == "embed"
        data = raw(tensors[model])
        assert 0 <= start < stop <= data.size
        if largest is not None:
            largest.append(stop - start)
        return data[start:stop]

    return read


def aligned(plan, tensors, rounding="F32", models=None):
    rows = AlignedRows(plan, reader(tensors), COLS, rounding=rounding, models=models)
    whole = plan.rows * COLS
    return {key: rows.elements(key, "embed", 0, whole).reshape(-1, COLS) for key in rows.filling.models}


def oracle(folders, tensors, *, source, base=None, tokens=None, pad=None):
    """mergekit's own tokenizer build and embedding permutation."""
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.io.tasks import GatherTensors
    from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
    from mergekit.tokenizer.build import build_tokenizer
    from mergekit.tokenizer.config import TokenizerConfig

    refs = {f.name: ModelReference.parse(str(f)) for f in folders}
    parsed = TokenizerConfig(
        source=source if source in ("base", "union") else refs[source], tokens=tokens or {}
    )
    base_ref = refs[base] if base else None
    info = build_tokenizer(base_ref, list(refs.values()), parsed.source, False, list((tokens or {}).keys()))
    gather = GatherTensors(weight_info=ImmutableMap(data={}))
    task = BuildTokenizer(
        base_model=base_ref,
        referenced_models=tuple(refs.values()),
        tokenizer_source=parsed.source,
        add_tokens=None,
    )
    permuted = PermutedVocabulary(
        gather_tensors=gather,
        tokenizer_task=task,
        tokens=ImmutableMap(data=dict(parsed.tokens)),
        pad_to_multiple_of=pad,
        base_model=base_ref,
        vocabulary_axis=0,
    )
    result = permuted.execute(info, {refs[k]: t for k, t in tensors.items()})
    return info.tokenizer, {k: result[refs[k]] for k in tensors}


def assert_same_rows(plan, ours, tokenizer, theirs, *, exact=True):
    """Equal rows for equal tokens; ids of newly added tokens may differ (mergekit's vary between runs)."""
    vocab = tokenizer.get_vocab()
    assert set(vocab) == set(plan.tokens)
    mine = np.array([plan.tokens[t] for t in vocab])
    other = np.array(list(vocab.values()))
    for key, tensor in theirs.items():
        expected = tensor.float().numpy()
        if exact:
            np.testing.assert_array_equal(ours[key][mine], expected[other], err_msg=key)
        else:
            np.testing.assert_allclose(ours[key][mine], expected[other], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype,rounding", [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
@pytest.mark.parametrize("base", [None, "a", "c"])
@pytest.mark.parametrize("source", ["union", "base", "b"])
def test_rows_equal_mergekits(triple, source, base, dtype, rounding):
    participants = [participant(f) for f in triple]
    tensors = weights(participants, getattr(torch, dtype))
    spec = TokenizerSpec(source if source in ("union", "base") else ModelRef(str(triple[1])))
    plan = plan_vocabulary(participants, spec, base=base)
    tokenizer, theirs = oracle(triple, tensors, source=source, base=base)
    ours = aligned(plan, tensors, rounding)
    assert_same_rows(plan, ours, tokenizer, theirs)


@pytest.mark.parametrize("seed", range(8))
def test_random_vocabularies_equal_mergekits(tmp_path, seed):
    rng = np.random.default_rng(seed)
    folders = []
    for name in ("m0", "m1", "m2", "m3")[: int(rng.integers(2, 5))]:
        words = ["<unk>", *(f"w{i}" for i in rng.permutation(12)[: rng.integers(3, 12)])]
        added = [f"<t{i}>" for i in rng.permutation(5)[: rng.integers(0, 5)]]
        special = [f"<s{i}>" for i in rng.permutation(3)[: rng.integers(1, 4)]]
        size = len(words) + len(added) + len(special)
        rows = size + int(rng.integers(0, 6))
        folders.append(save(tmp_path / name, word_level(words), tuple(special), tuple(added), rows=rows))
    participants = [participant(f) for f in folders]
    tensors = weights(participants, torch.bfloat16, seed)
    for source in ("union", "base", folders[-1].name):
        for base in (None, folders[int(rng.integers(len(folders)))].name):
            spec = TokenizerSpec(source if source in ("union", "base") else ModelRef(str(folders[-1])))
            plan = plan_vocabulary(participants, spec, base=base)
            tokenizer, theirs = oracle(folders, tensors, source=source, base=base)
            assert_same_rows(plan, aligned(plan, tensors, "BF16"), tokenizer, theirs)


@pytest.mark.parametrize("dtype,rounding", [("bfloat16", "BF16"), ("float16", "F16")])
def test_means_of_three_round_after_every_addition_like_mergekits(tmp_path, triple, dtype, rounding):
    d = save(tmp_path / "d", byte_level([]), special=("<eos>",))
    c = save(tmp_path / "c2", byte_level(["hero"]), added=("<think>", "<only_b>"))
    folders = (triple[0], c, triple[1], d)
    participants = [participant(f) for f in folders]
    tensors = weights(participants, getattr(torch, dtype), seed=3)
    plan = plan_vocabulary(participants, TokenizerSpec("union"))
    tokenizer, theirs = oracle(folders, tensors, source="union")
    assert_same_rows(plan, aligned(plan, tensors, rounding), tokenizer, theirs)
    filling = fill_rows(plan)
    assert len(filling.contributions("d", plan.tokens["<think>"])) == 3


def test_means_over_owners_are_marked_and_listed(triple):
    participants = [participant(f) for f in triple]
    plan = plan_vocabulary(participants, TokenizerSpec("union"))
    filling = fill_rows(plan)
    row = plan.tokens["<think>"]  # a and b have it, c does not, there is no base
    assert filling.owner["c"][row] == MEAN
    assert filling.contributions("c", row) == tuple(
        (p.key, p.vocabulary.tokens["<think>"]) for p in participants[:2]
    )
    assert filling.contributions("a", row) == (("a", participants[0].vocabulary.tokens["<think>"]),)
    only = plan.tokens["<only_c>"]
    assert filling.contributions("a", only) == (("c", participants[2].vocabulary.tokens["<only_c>"]),)


def token_cases(folders):
    a, b, _ = (str(f) for f in folders)
    ra, rb, _ = (ModelRef(str(f)) for f in folders)
    return {
        "model": ({"<only_b>": {"source": b}}, {"<only_b>": TokenSource("model", rb)}),
        "force": (
            {"<think>": {"source": a, "force": True}},
            {"<think>": TokenSource("model", ra, force=True)},
        ),
        "not_forced": ({"<eos>": {"source": a}}, {"<eos>": TokenSource("model", ra)}),
        "model_token": (
            {"<new>": {"source": {"kind": "model_token", "model": b, "token": "<only_b>"}}},
            {"<new>": TokenSource("model_token", rb, token="<only_b>")},
        ),
        "token_id": (
            {"<eos>": {"source": {"kind": "model_token", "model": a, "token_id": 7}, "force": True}},
            {"<eos>": TokenSource("model_token", ra, token_id=7, force=True)},
        ),
        "zero": (
            {"<new>": {"source": {"kind": "zero"}}, "<think>": {"source": {"kind": "zero"}, "force": True}},
            {"<new>": TokenSource("zero"), "<think>": TokenSource("zero", force=True)},
        ),
    }


@pytest.mark.parametrize("source", ["union", "base"])
@pytest.mark.parametrize("case", ["model", "force", "not_forced", "model_token", "token_id", "zero"])
def test_single_tokens_equal_mergekits(triple, case, source):
    theirs_tokens, our_tokens = token_cases(triple)[case]
    participants = [participant(f) for f in triple]
    tensors = weights(participants, torch.bfloat16)
    plan = plan_vocabulary(participants, TokenizerSpec(source, our_tokens), base="a", quirks=source == "base")
    tokenizer, theirs = oracle(triple, tensors, source=source, base="a", tokens=theirs_tokens)
    assert_same_rows(plan, aligned(plan, tensors, "BF16"), tokenizer, theirs)


def test_a_new_tokens_source_also_counts_for_the_padded_base(triple):
    """mergekit leaves the base a padding row here; without quirks the recipe's source is used."""
    _, tokens = token_cases(triple)["model_token"]
    participants = [participant(f) for f in triple]
    tensors = weights(participants, torch.float32)
    plan = plan_vocabulary(participants, TokenizerSpec("base", tokens), base="a")
    ours, row = aligned(plan, tensors), plan.tokens["<new>"]
    expected = tensors["b"][participants[1].vocabulary.tokens["<only_b>"]].numpy()
    for key in "abc":
        np.testing.assert_array_equal(ours[key][row], expected)


@pytest.mark.parametrize("dtype,rounding", [("float32", "F32"), ("bfloat16", "BF16")])
def test_padding_rows_are_means_like_mergekits(pair, dtype, rounding):
    participants = [participant(f) for f in pair]
    tensors = weights(participants, getattr(torch, dtype))
    plan = plan_vocabulary(participants, TokenizerSpec("union", pad_to_multiple_of=64), base="a")
    tokenizer, theirs = oracle(pair, tensors, source="union", base="a", pad=64)
    assert plan.rows == 320 == len(theirs["a"])
    assert plan.config_edits["vocab_size"] == 320
    ours = aligned(plan, tensors, rounding)
    assert_same_rows(plan, ours, tokenizer, theirs)
    count = len(tokenizer.get_vocab())
    for key in ("a", "b"):
        tolerance = 1e-6 if dtype == "float32" else 1e-3
        np.testing.assert_allclose(ours[key][count:], theirs[key][count:].float().numpy(), atol=tolerance)


def test_donor_padding_is_kept_unless_quirks(pair):
    participants = [participant(f) for f in pair]
    plan = plan_vocabulary(participants, TokenizerSpec("base"), base="a")
    used = len(plan.tokens)
    assert plan.rows == 280 > used
    assert any("padding rows" in n for n in plan.notices)
    ours = aligned(plan, weights(participants, torch.float32))
    first = weights(participants, torch.float32)
    np.testing.assert_array_equal(ours["a"][used:], first["a"][used:].numpy())
    np.testing.assert_array_equal(
        ours["b"][275:], first["a"][275:].numpy()
    )  # b has 272 rows: a's rows fill in
    quirky = plan_vocabulary(participants, TokenizerSpec("base"), base="a", quirks=True)
    assert quirky.rows == used == quirky.config_edits["vocab_size"]


# ---- bounded, element-exact reading --------------------------------------------------------------


def test_any_range_of_elements_equals_the_whole(triple):
    participants = [participant(f) for f in triple]
    tensors = weights(participants, torch.bfloat16)
    plan = plan_vocabulary(participants, TokenizerSpec("union", pad_to_multiple_of=32))
    rows = AlignedRows(plan, reader(tensors), COLS)
    whole = rows.elements("b", "embed", 0, plan.rows * COLS)
    generator = np.random.default_rng(0)
    for _ in range(60):
        start, stop = sorted(generator.integers(0, whole.size + 1, 2).tolist())
        np.testing.assert_array_equal(rows.elements("b", "embed", start, stop), whole[start:stop])
    assert rows.elements("b", "embed", 5, 5).size == 0


def test_reads_are_contiguous_runs(pair):
    participants = [participant(f) for f in pair]
    reads: list[int] = []
    plan = plan_vocabulary(participants, TokenizerSpec("base"), base="a")
    rows = AlignedRows(plan, reader(weights(participants, torch.float32), reads), COLS)
    rows.elements("a", "embed", 0, plan.rows * COLS)
    assert reads == [plan.rows * COLS]


def test_a_bias_has_one_element_per_row(pair):
    participants = [participant(f) for f in pair]
    plan = plan_vocabulary(participants, TokenizerSpec("union"), base="a")
    tensors = {p.key: torch.arange(p.rows, dtype=torch.float32) for p in participants}
    rows = AlignedRows(plan, reader(tensors), 1)
    values = rows.elements("b", "embed", 0, plan.rows)
    assert values[plan.tokens["<only_b>"]] == participants[1].vocabulary.tokens["<only_b>"]
    assert values[plan.tokens["<only_a>"]] == participants[0].vocabulary.tokens["<only_a>"]


def test_a_tensor_with_fewer_models_uses_only_theirs(triple):
    participants = [participant(f) for f in triple]
    tensors = weights(participants, torch.float32)
    plan = plan_vocabulary(participants, TokenizerSpec("union"), base="a")
    ours = aligned(plan, tensors, models=("b", "c"))
    row = plan.tokens["<only_a>"]
    assert not ours["b"][row].any() and not ours["c"][row].any()


# ---- comparison ----------------------------------------------------------------------------------


def test_E7_equal_size_permuted_vocabulary_is_detected_and_refused(tmp_path):
    words = ["hello", "hero"]
    a = participant(save(tmp_path / "a", byte_level(words)))
    swapped = byte_level(words, permute=lambda n: [1, 0, *range(2, n)])
    b = participant(save(tmp_path / "b", swapped))
    assert a.rows == b.rows and len(a.vocabulary) == len(b.vocabulary)
    found = compare(a.vocabulary, b.vocabulary)
    assert found.verdict == "ordinary" and found.ids == (0, 1)
    assert found.first == ((0, "!", '"'), (1, '"', "!"))
    with pytest.raises(InputError) as caught:
        plan_vocabulary([a, b])
    assert caught.value.code == "E305" and caught.value.exit_code == 3
    for way in ("--vocab base", "--vocab union", "--vocab truncate"):
        assert way in caught.value.help
    plan = plan_vocabulary([a, b], TokenizerSpec("base"), base="a")
    tensors = weights([a, b], torch.float32)
    ours = aligned(plan, tensors)
    np.testing.assert_array_equal(ours["b"][:2], tensors["b"][[1, 0]].numpy())


def test_E7_different_row_counts_are_refused_even_with_equal_tokens(tmp_path):
    a = participant(save(tmp_path / "a", word_level(["<unk>", "x", "y"])), rows=64)
    b = participant(save(tmp_path / "b", word_level(["<unk>", "x", "y"])), rows=5)
    with pytest.raises(InputError, match="a 5 tokens in 64 rows, b 5 tokens in 5 rows") as caught:
        plan_vocabulary([a, b])
    assert caught.value.code == "E305" and "look like padding" in caught.value.help


def test_E7_bare_files_of_different_size_are_refused():
    a = Participant("a", "a", 8, None)
    b = Participant("b", "b", 9, None)
    with pytest.raises(InputError, match="a 8 rows, b 9 rows"):
        plan_vocabulary([a, b])
    plan = plan_vocabulary([a, Participant("b", "b", 8, None)])
    assert plan.is_identity() and plan.donor is None and plan.config_edits == {}
    assert "no tokenizer" in plan.warnings[0]


@pytest.mark.parametrize("build", [byte_level, word_level, word_piece, unigram])
def test_equal_vocabularies_need_nothing(tmp_path, build):
    words = ["<unk>", "ab", "abc", "d"]
    a = participant(save(tmp_path / "a", build(words)))
    b = participant(save(tmp_path / "b", build(words)))
    assert compare(a.vocabulary, b.vocabulary).verdict == "equal"
    plan = plan_vocabulary([a, b], base="b")
    assert plan.is_identity() and not plan.files and not plan.notices and not plan.warnings
    assert plan.donor == "b"
    fast = transformers.AutoTokenizer.from_pretrained(a.vocabulary.folder)
    assert a.vocabulary.tokens == fast.get_vocab()


def test_E7_renamed_special_tokens_take_the_donors_rows(tmp_path):
    words = ["<unk>", "x", "y"]
    a = participant(save(tmp_path / "a", word_level(words), special=("<eos>", "<pad>"), added=("<tool>",)))
    b = participant(save(tmp_path / "b", word_level(words), special=("<end>", "<pad>"), added=("<tool>",)))
    found = compare(a.vocabulary, b.vocabulary)
    assert found.verdict == "special" and found.ids == (3,)
    plan = plan_vocabulary([a, b], base="b", donor="a")
    assert not plan.is_identity() and plan.donor == "a"
    assert 'id 3: "<eos>" / "<end>"' in plan.notices[0] and "rows are taken from a" in plan.notices[0]
    tensors = weights([a, b], torch.float32)
    ours = aligned(plan, tensors)
    np.testing.assert_array_equal(ours["b"][3], tensors["a"][3].numpy())
    keep = [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(ours["b"][keep], tensors["b"][keep].numpy())


def test_merges_that_differ_are_noticed(tmp_path):
    a = participant(save(tmp_path / "a", byte_level(["abc", "bc"])))
    document = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    document["model"]["merges"].reverse()
    b = save(tmp_path / "b", byte_level(["abc", "bc"]))
    (b / "tokenizer.json").write_text(json.dumps(document))
    plan = plan_vocabulary([a, participant(b)])
    assert plan.is_identity() and "different merges" in plan.warnings[0]


# ---- truncate --------------------------------------------------------------------------------------


def test_E7_truncation_is_explicit_and_edits_the_tokenizer(tmp_path):
    a = save(tmp_path / "a", word_level(["<unk>", "x", "y"]), special=("<eos>",), added=("<t1>", "<t2>"))
    b = save(tmp_path / "b", word_level(["<unk>", "x", "y"]), special=("<eos>",), added=("<t1>",))
    (a / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    participants = [participant(a), participant(b)]
    plan = plan_vocabulary(participants, TokenizerSpec("truncate"), base="a")
    assert plan.rows == 5 and plan.config_edits["vocab_size"] == 5
    assert "<t2>" not in plan.tokens and "rows lost: a 1" in plan.notices[0]
    assert plan.generation_edits == {"eos_token_id": [3]}
    assert any("eos_token_id 5" in w for w in plan.warnings)
    out = write(plan, a, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(out).get_vocab() == plan.tokens
    tensors = weights(participants, torch.float32)
    np.testing.assert_array_equal(aligned(plan, tensors)["a"], tensors["a"][:5].numpy())


def test_E8_truncation_may_not_remove_the_end_token(tmp_path):
    words = ["<unk>", "x", "y"]
    a = participant(save(tmp_path / "a", word_level(words), special=("<eos>",)))
    short = Participant("b", "b", 3, None)
    with pytest.raises(InputError, match="end-of-sequence token") as caught:
        plan_vocabulary([a, short], TokenizerSpec("truncate"), donor="a")
    assert caught.value.code == "E337"


def test_stripping_removes_merges_of_lost_tokens(tmp_path):
    tokenizer = byte_level(["hello"])
    a = save(tmp_path / "a", tokenizer)
    vocabulary = read_vocabulary(a)
    from surgeon.merge.tokenizer_files import edit_tokenizer

    with pytest.raises(InputError, match="end-of-sequence"):
        edit_tokenizer(vocabulary, rows=258)
    document = json.loads((a / "tokenizer.json").read_text())
    document["added_tokens"] = []
    (a / "tokenizer.json").write_text(json.dumps(document))
    (a / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    edit = edit_tokenizer(read_vocabulary(a), rows=258)
    loaded = tokenizers.Tokenizer.from_str(edit.files["tokenizer.json"].decode())
    assert loaded.get_vocab() == edit.tokens and len(edit.tokens) == 258
    assert loaded.encode("hello").tokens == ["hel", "l", "o"]


# ---- the produced tokenizer ------------------------------------------------------------------------


def write(plan, donor: Path, out: Path) -> Path:
    out.mkdir()
    for name in TOKENIZER_FILES:
        if (donor / name).exists() and name not in plan.drop_files:
            (out / name).write_bytes((donor / name).read_bytes())
    for name, content in plan.files.items():
        (out / name).write_bytes(content)
    config = apply_config_edits(json.loads((donor / "config.json").read_text()), plan.config_edits)
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("declared", [False, True])
def test_union_tokenizer_loads_and_encodes_to_the_right_ids(tmp_path, pair, declared):
    a, b = pair
    if declared:  # the form transformers 4 writes
        config = json.loads((a / "tokenizer_config.json").read_text())
        entries = json.loads((a / "tokenizer.json").read_text())["added_tokens"]
        config["added_tokens_decoder"] = {str(e.pop("id")): e for e in entries}
        (a / "tokenizer_config.json").write_text(json.dumps(config))
        (a / "added_tokens.json").write_text(json.dumps({"<think>": 264, "<only_a>": 265}))
    participants = [participant(a), participant(b)]
    plan = plan_vocabulary(participants, TokenizerSpec("union"), base="a")
    out = write(plan, a, tmp_path / "out")
    merged = transformers.AutoTokenizer.from_pretrained(out)
    assert merged.get_vocab() == plan.tokens
    assert len(merged) <= plan.rows == 280
    first = transformers.AutoTokenizer.from_pretrained(a)
    for text in ("hello help", "say hello\n", "<think>hello<only_a>", "<eos>"):
        assert merged.encode(text) == first.encode(text)
    assert merged.encode("hi<only_b>!") == [
        *first.encode("hi"),
        plan.tokens["<only_b>"],
        *first.encode("!"),
    ]
    assert merged.convert_tokens_to_ids("hero") == plan.tokens["hero"]
    assert merged.eos_token == "<eos>" and merged.pad_token == "<pad>"
    assert merged.decode(merged.encode("<only_b>hello")) == "<only_b>hello"
    assert any("ordinary tokens that a lacks" in n for n in plan.notices)
    if declared:
        assert json.loads(plan.files["added_tokens.json"])["<only_b>"] == plan.tokens["<only_b>"]
        decoder = json.loads(plan.files["tokenizer_config.json"])["added_tokens_decoder"]
        assert decoder[str(plan.tokens["<only_b>"])]["content"] == "<only_b>"


@pytest.mark.parametrize("build", [word_level, word_piece, unigram])
def test_union_works_for_other_tokenizer_types(tmp_path, build):
    a = save(tmp_path / "a", build(["<unk>", "x", "y"]))
    b = save(tmp_path / "b", build(["<unk>", "y", "z"]), added=("<b>",))
    participants = [participant(a), participant(b)]
    plan = plan_vocabulary(participants, TokenizerSpec("union"), base="a")
    merged = transformers.AutoTokenizer.from_pretrained(write(plan, a, tmp_path / "out"))
    assert merged.get_vocab() == plan.tokens and {"z", "<b>"} <= set(plan.tokens)
    assert plan.tokens["<b>"] in merged.encode("x <b> y")


def test_union_of_equal_vocabularies_copies_the_files(tmp_path):
    a = participant(save(tmp_path / "a", word_level(["<unk>", "x"])))
    b = participant(save(tmp_path / "b", word_level(["<unk>", "x"])))
    plan = plan_vocabulary([a, b], TokenizerSpec("union"))
    assert plan.files == {} and plan.is_identity()


def test_union_is_deterministic(triple):
    plans = [plan_vocabulary([participant(f) for f in triple], TokenizerSpec("union")) for _ in range(2)]
    assert plans[0].files == plans[1].files and plans[0].files


def test_special_ids_are_found_again_by_token(triple):
    a, _, c = triple
    participants = [participant(a), participant(c)]
    eos = participants[1].vocabulary.tokens["<eos>"]
    plan = plan_vocabulary(participants, TokenizerSpec(ModelRef(str(c))), base="a")
    assert plan.config_edits["eos_token_id"] == eos == plan.tokens["<eos>"]
    assert plan.config_edits["vocab_size"] == participants[1].rows
    assert plan.generation_edits["eos_token_id"][0] == eos


def test_nested_text_config_is_edited(pair):
    participants = [participant(f) for f in pair]
    config = {"text_config": {"vocab_size": 280, "eos_token_id": 262, "x": 1}, "model_type": "gemma3"}
    donor = Participant(
        "a", "a", 280, participants[0].vocabulary, participants[0].ref, config, {"eos_token_id": None}
    )
    plan = plan_vocabulary([donor, participants[1]], TokenizerSpec("union", pad_to_multiple_of=64), base="a")
    assert plan.config_edits["text_config.vocab_size"] == 320
    edited = apply_config_edits(config, plan.config_edits)
    assert edited["text_config"]["vocab_size"] == 320 and edited["text_config"]["x"] == 1
    assert config["text_config"]["vocab_size"] == 280 and "vocab_size" not in edited


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source,match",
    [
        (TokenSource("model", ModelRef("elsewhere")), "not one of the models"),
        (TokenSource("model", None, force=True), "has no source"),
        (TokenSource("model_token", None, token="x"), "has no source"),
    ],
)
def test_token_sources_are_checked(pair, source, match):
    participants = [participant(f) for f in pair]
    with pytest.raises(UsageError, match=match) as caught:
        plan_vocabulary(participants, TokenizerSpec("union", {"<new>": source}))
    assert caught.value.code == "E241"


def test_token_sources_must_exist(pair):
    participants = [participant(f) for f in pair]
    ref = participants[0].ref
    for source, match in (
        (TokenSource("model", ref), "no such token"),
        (TokenSource("model_token", ref, token="nope"), "no such token"),
        (TokenSource("model_token", ref, token_id=280), "outside the 280 rows"),
    ):
        with pytest.raises(UsageError, match=match):
            plan_vocabulary(participants, TokenizerSpec("union", {"<new>": source}))
    with pytest.raises(UsageError, match="unknown tokenizer source"):
        plan_vocabulary(participants, TokenizerSpec("smallest"))


def test_a_token_may_be_added_without_a_source(pair):
    participants = [participant(f) for f in pair]
    plan = plan_vocabulary(participants, TokenizerSpec("base", {"<new>": TokenSource("model")}), base="a")
    assert plan.tokens["<new>"] == 265 and any('"<new>"' in w and "zero" in w for w in plan.warnings)


def test_a_model_without_tokenizer_is_taken_to_have_the_bases(pair):
    a, b = (participant(f) for f in pair)
    bare = Participant("n", "n", 280, None)
    plan = plan_vocabulary([a, bare, b], TokenizerSpec("union"), base="a")
    assert any("n has no tokenizer" in w for w in plan.warnings)
    assert (plan.row_maps["n"].source[:262] == np.arange(262)).all()


def test_gaps_in_added_ids_are_not_rewritten_silently(tmp_path):
    a = save(tmp_path / "a", word_level(["<unk>", "x"]))
    document = json.loads((a / "tokenizer.json").read_text())
    document["added_tokens"][-1]["id"] = 9
    (a / "tokenizer.json").write_text(json.dumps(document))
    b = save(tmp_path / "b", word_level(["<unk>", "x"]), added=("<b>",))
    vocabulary = read_vocabulary(a)
    assert "loads as 3" in vocabulary.notices[0]
    first = Participant("a", "a", 10, vocabulary, ModelRef(str(a)), {"vocab_size": 10})
    with pytest.raises(InputError, match="gaps"):
        plan_vocabulary([first, participant(b)], TokenizerSpec("union"), base="a")


# ---- reading other files ----------------------------------------------------------------------------


def test_vocab_json_and_vocab_txt_are_read(tmp_path):
    a = tmp_path / "a"
    a.mkdir()
    (a / "vocab.json").write_text(json.dumps({"x": 1, "<unk>": 0}))
    (a / "merges.txt").write_text("#version: 0.2\n")
    (a / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    found = read_vocabulary(a)
    assert found.tokens == {"<unk>": 0, "x": 1, "<eos>": 2} and found.kind == "BPE"
    assert not found.is_ordinary("<eos>") and found.is_ordinary("x") and not found.rewritable
    b = tmp_path / "b"
    b.mkdir()
    (b / "vocab.txt").write_text("[PAD]\n[UNK]\nword\n##s\n")
    assert read_vocabulary(b).tokens == {"[PAD]": 0, "[UNK]": 1, "word": 2, "##s": 3}


def test_sentencepiece_models_are_read_without_the_library(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "text"
    corpus.write_text("hello world\nhelp the hero\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=16, minloglevel=2
    )
    processor = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    expected = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    found = read_vocabulary(tmp_path)
    assert found.tokens == expected and found.kind == "sentencepiece"
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(
        InputError, match=r"cannot be read from tokenizer_config.json, tokenizer.model"
    ) as caught:
        read_vocabulary(tmp_path)
    assert caught.value.code == "E335" and "save_pretrained" in caught.value.help


def test_tiktoken_ranks_are_read(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\naGVsbG8= 2\n")
    assert read_vocabulary(tmp_path).tokens == {"!": 0, '"': 1, "hello": 2}


def test_a_folder_without_tokenizer_is_told_so(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"model": 3}',
        '{"model": {"vocab": {"a": "b"}}}',
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [3]}',
        "[]",
        "{",
    ],
)
def test_malformed_tokenizer_json_is_an_input_error(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError):
        read_vocabulary(tmp_path)


def test_C2_a_tokenizer_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError) as caught:
        read_vocabulary(model)
    assert caught.value.code == "E336"


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("mergekit").setLevel(logging.CRITICAL)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
