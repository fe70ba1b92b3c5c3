"""Faults B6-B10, C1-C9, D1-D7, D9, E2, E7-E11, F7, F9, G1, G5, G7: one hostile folder each, refused by name.

Every folder is made by code. Each case goes through the library and through the command line: the
code, the words that must be in the message, exit code 3, no traceback, nothing written.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checker
import forge
import kit
import numpy as np
import pytest

from surgeon import api
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.index import read_folder
from surgeon.cli import app
from surgeon.errors import InputError, SurgeonError, UsageError
from surgeon.execute import execute
from surgeon.verify.static import verify_path


@dataclass
class Case:
    """A way to spoil a folder; ``words`` must be in the message or help."""

    spoil: Callable[[Path], None]
    code: str
    words: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(name: str, code: str, *words: str):
    def add(spoil):
        CASES[name] = Case(spoil, code, words)
        return spoil

    return add


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"model-{number:05d}-of-00002.safetensors"


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    forge.write_shards(folder, forge.split(forge.llama_tensors(1), 2))


def retyped(folder: Path, name: str, tensor: forge.Tensor | None) -> None:
    tensors = forge.llama_tensors(1)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    forge.write(folder / "model.safetensors", tensors)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


UP = "model.layers.0.mlp.up_proj.weight"

# --- C: index and folder ------------------------------------------------------------------------

for number, value in enumerate(
    [
        "../secret/x.safetensors", "/etc/passwd", "C:\\x.safetensors", "C:x.safetensors", "a\\b.safetensors",
        "\\\\host\\share\\x.safetensors", "x\0.safetensors", "sub/x.safetensors", ".", "..", "", 7, None, ["x"], "x\x1b[2J",
    ]
):  # fmt: skip

    @case(f"C1 {number}", "E309", "outside its folder or at no file name")
    def _(folder, value=value):
        sharded(folder)
        secret = folder.parent / "secret"
        secret.mkdir(exist_ok=True)
        forge.write(secret / "x.safetensors", forge.llama_tensors(1))
        forge.edit_index(folder, lambda c: c["weight_map"].update({UP: value}))


@case("C2 single file", "E336", "leaves the model folder")
def _(folder):
    outside = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


@case("C2 shard", "E336", "model-00001-of-00002.safetensors", "leaves the model folder")
def _(folder):
    sharded(folder)
    outside = folder.parent / "elsewhere.safetensors"
    shard(folder).rename(outside)
    shard(folder).symlink_to(outside)


@case("C3 missing shard", "E302", "model-00001-of-00002.safetensors is missing", "tensors)", "hf download")
def _(folder):
    sharded(folder)
    shard(folder).unlink()


@case("C3 tensor absent from its shard", "E309", "does not hold it", UP)
def _(folder):
    sharded(folder)
    part = forge.split(forge.llama_tensors(1), 2)[0]
    del part[UP]
    forge.write(shard(folder), part)


@case("C3 tensor in another shard", "E309", "it is in")
def _(folder):
    sharded(folder)
    forge.edit_index(folder, lambda c: c["weight_map"].update({UP: shard(folder, 2).name}))


@case("C4 unlisted tensor", "E309", "does not list", "--ignore-unlisted")
def _(folder):
    sharded(folder)
    forge.edit_index(folder, lambda c: c["weight_map"].pop(UP))


@case("C4 tensor in two shards", "E309", "two shards hold")
def _(folder):
    sharded(folder)
    part = forge.split(forge.llama_tensors(1), 2)[1]
    forge.write(shard(folder, 2), {**part, UP: forge.llama_tensors(3)[UP]})


@case("C5 single file beside an index", "E310", "model.safetensors", "--weights")
def _(folder):
    sharded(folder)
    forge.write(folder / "model.safetensors", forge.llama_tensors(2))


@case("C5 shards without an index", "E310", "shards without an index")
def _(folder):
    forge.write(shard(folder), forge.llama_tensors(2))


@case("C5 two unrelated weight files", "E302", "2 weight files")
def _(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


@case("C5 two indices", "E310", "several indices")
def _(folder):
    sharded(folder)
    index = folder / "model.safetensors.index.json"
    index.rename(folder / "a.safetensors.index.json")
    shutil.copy(folder / "a.safetensors.index.json", folder / "b.safetensors.index.json")


for number, text in enumerate(["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}']):

    @case(f"C5 index without a map {number}", "E309", "no weight_map")
    def _(folder, text=text):
        sharded(folder)
        (folder / "model.safetensors.index.json").write_text(text)


@case("C7 missing", "E308", "no config.json", "--config")
def _(folder):
    (folder / "config.json").unlink()


for number, content in enumerate(
    [
        b"", b"  \n", b"[]", b"1", b'"x"', b"{", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1, "a": 1}', b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00", b'{"a":' * 100_000, b'{"a": "\xff"}', b"{'a': 1}",
    ]
):  # fmt: skip

    @case(f"C7 config {number}", "E308", "config.json")
    def _(folder, content=content):
        (folder / "config.json").write_bytes(content)


@case("C7 config of 100 MB", "E308", "config.json", "100,000,000 bytes")
def _(folder):
    with open(folder / "config.json", "wb") as stream:
        stream.truncate(100_000_000)


@case("C8 pickle only", "E331", "pytorch_model.bin", "run code")
def _(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


@case("C9 adapter", "E332", "LoRA adapter", "+")
def _(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "config.json").unlink()


@case("C9 gguf", "E333", "GGUF", "model-Q4.gguf")
def _(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model-Q4.gguf").write_bytes(b"GGUF" + bytes(64))


@case("C9 no weights", "E301", "no safetensors weights")
def _(folder):
    (folder / "model.safetensors").unlink()


@case("C9 quantized folder", "E311", "gptq", "plain weights")
def _(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


# --- B: what lies behind the names ----------------------------------------------------------------


@case("B1 truncated shard", "E303", "model-00002-of-00002.safetensors is truncated", "fetch it again")
def _(folder):
    sharded(folder)
    content = shard(folder, 2).read_bytes()
    shard(folder, 2).write_bytes(content[:-100])


@case("B1 git lfs pointer", "E303", "Git LFS", "git lfs pull")
def _(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


@case("B6 unknown type", "E307", "F128", "supported")
def _(folder):
    retyped(folder, UP, ("F128", (24, 16), bytes(24 * 16 * 16)))


@case("B10 a folder named like a weight file", "E306", "is a folder")
def _(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@case("B10 a pipe", "E306", "special file")
def _(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


@case("B10 config is a pipe", "E306", "special file")
def _(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@case("B10 link loop", "E306", "model.safetensors")
def _(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")


@case("B7 G7 escape in a tensor name", "E304", "control characters", "\\x1b[2J")
def _(folder):
    retyped(folder, "a\x1b[2J", forge.bf16(np.ones(2, np.float32)))


# --- D: values and types ------------------------------------------------------------------------


def with_values(folder: Path, index, value: float) -> None:
    values = np.zeros((24, 16), np.float32)
    values[index] = value
    retyped(folder, UP, forge.bf16(values))


@case("D1 one NaN", "E321", "1 NaN", UP, "[3, 5]", "--ignore")
def _(folder):
    with_values(folder, (3, 5), np.nan)


@case("D1 infinities", "E321", "16 Inf", UP, "[7, 0]")
def _(folder):
    with_values(folder, 7, -np.inf)


for code in ("F8_E4M3", "F8_E5M2", "F4", "F6_E3M2", "F8_E8M0"):

    @case(f"D3 bare {code}", "E311", code, "plain weights")
    def _(folder, code=code):
        retyped(folder, UP, (code, (24, 16), bytes(24 * 16 * forge.WIDTH[code] // 8)))


for suffix in ("weight_scale", "weight_scale_inv", "input_scale", "weight_zero_point"):

    @case(f"D3 companion {suffix}", "E311", suffix)
    def _(folder, suffix=suffix):
        retyped(folder, UP.removesuffix("weight") + suffix, np.ones(24, np.float32))


for suffix, code in (
    ("qweight", "I32"), ("qzeros", "I32"), ("g_idx", "I32"), ("weight_packed", "I32"), ("weight.absmax", "U8"),
    ("weight.quant_map", "F32"), ("SCB", "F32"), ("weight.quant_state.bitsandbytes__nf4", "U8"),
):  # fmt: skip

    @case(f"D4 {suffix}", "E311", suffix)
    def _(folder, suffix=suffix, code=code):
        retyped(folder, UP.removesuffix("weight") + suffix, (code, (4,), bytes(forge.WIDTH[code] // 2)))


@case("D4 integers where weights are expected", "E323", UP, "I8")
def _(folder):
    retyped(folder, UP, ("I8", (24, 16), bytes(24 * 16)))


@case("D6 complex values", "E323", UP, "C64")
def _(folder):
    retyped(folder, UP, np.ones((24, 16), np.complex64))


@case("D7 tied by config, two different copies", "E346", "two different copies")
def _(folder):
    edit_config(folder, tie_word_embeddings=True)


# --- E: architecture ----------------------------------------------------------------------------


@case("E3 a missing tensor", "E343", UP)
def _(folder):
    retyped(folder, UP, None)


@case("E4 more layers in the config than in the file", "E343", "num_hidden_layers = 3", "holds 2 layers")
def _(folder):
    edit_config(folder, num_hidden_layers=3)


@case("E4 fewer layers in the config than in the file", "E343", "num_hidden_layers")
def _(folder):
    edit_config(folder, num_hidden_layers=1)


@case("E11 another width", "E344", "hidden_size 16 / 32", "intermediate_size", "num_hidden_layers")
def _(folder):
    shutil.rmtree(folder)
    forge.model_folder(folder, 1, hidden_size=32, intermediate_size=40, num_hidden_layers=3)


@case("E11 another family", "E344", "model_type llama / mistral")
def _(folder):
    edit_config(folder, model_type="mistral", architectures=["MistralForCausalLM"], num_attention_heads=4)


@case("E7 permuted vocabulary", "E305", "vocabular")
def _(folder):
    tokenizer = forge.tokenizer_json()
    words = tokenizer["model"]["vocab"]
    names = list(words)
    names[5], names[6] = names[6], names[5]
    tokenizer["model"]["vocab"] = {n: i for i, n in enumerate(names)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@case("E7 more rows", "E305", "--vocab")
def _(folder):
    shutil.rmtree(folder)
    forge.model_folder(folder, 1, vocab_size=30)


@case("E8 an end token outside the vocabulary", "E337", "eos_token_id", "generation_config.json")
def _(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [900]}')


@pytest.fixture
def hostile(scratch, request) -> tuple[Path, Path, Case]:
    spoiled = forge.model_folder(scratch / "long", 1)
    CASES[request.param].spoil(spoiled)
    return spoiled, forge.model_folder(scratch / "short", 2), CASES[request.param]


@pytest.mark.parametrize("hostile", CASES, indirect=True, ids=[f"{n.replace(' ', '_')}" for n in CASES])
def test_BCDE_hostile_folders_are_refused_by_name(hostile, scratch, capsys):
    long, short, wanted = hostile
    out = scratch / "out"
    before = kit.snapshot([short])
    with kit.time_limit(20):
        with pytest.raises(SurgeonError) as caught:
            execute(kit.plan([long, short]), out, threads=1)
        error = caught.value
        findings = [error, *error.others]
        match = [e for e in findings if e.code == wanted.code]
        assert match, [str(e) for e in findings]
        assert error.exit_code == 3
        text = "\n".join(f"{e} {e.help}" for e in findings)
        assert all(word in text for word in wanted.words), text
        assert all(str(e).isprintable() for e in findings)
        assert len(str(error)) < 2000

        code = app.run("merge", [str(long), str(short), "--method", "ties", "-o", str(out), "--no-progress"])
    printed = capsys.readouterr()
    assert code == 3
    assert printed.out == "" or error.code == "E321"  # values are seen after the plan was shown
    shown = printed.err
    assert "Traceback" not in shown and "E001" not in shown and "\x1b" not in shown
    assert f"error[{error.code}]" in shown
    assert len(shown.splitlines()) <= 20
    assert not out.exists() and not kit.leftovers(out) and kit.snapshot([short]) == before


# --- combinations that are fine ------------------------------------------------------------------


def test_C1_nothing_outside_is_read(scratch):
    folder = forge.model_folder(scratch / "long", 1)
    CASES["C1 0"].spoil(folder)
    secret = scratch / "secret" / "x.safetensors"
    os.utime(secret, (1, 1))
    secret.unlink()
    os.mkfifo(secret)  # reading it would hang
    with kit.time_limit(5), pytest.raises(InputError):
        read_folder(folder)


@pytest.mark.parametrize(
    "stray",
    [
        "consolidated.00.safetensors",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "model.gguf",
    ],
)
def test_C5_the_choice_beside_stray_weights_is_said(scratch, stray):
    for sharding in (False, True):
        folder = forge.model_folder(scratch / f"long{sharding}", 1)
        if sharding:
            sharded(folder)
        wanted = open_path(folder).tensors.keys()
        forge.write(folder / stray, {"other": np.ones(3, np.float32)})
        found = open_path(folder)
        assert found.tensors.keys() == wanted
        assert any(stray in note for note in found.notes), found.notes


def test_C5_the_choice_can_be_made(scratch):
    folder = forge.model_folder(scratch / "long", 1)
    CASES["C5 single file beside an index"].spoil(folder)
    assert len(read_folder(folder, weights="index").headers) == 2
    chosen = read_folder(folder, weights="single")
    assert [h.file.name for h in chosen.headers] == ["model.safetensors"] and chosen.notes


def test_C4_unlisted_tensors_can_be_left_out(scratch):
    folder = forge.model_folder(scratch / "long", 1)
    CASES["C4 unlisted tensor"].spoil(folder)
    assert UP not in read_folder(folder, ignore_unlisted=True).tensors


def test_C3_every_missing_tensor_is_listed(scratch):
    folder = forge.model_folder(scratch / "long", 1)
    sharded(folder)
    parts = forge.split(forge.llama_tensors(1), 2)
    lost = list(parts[0])[:4]
    forge.write(shard(folder), {n: t for n, t in parts[0].items() if n not in lost})
    with pytest.raises(InputError) as caught:
        read_folder(folder)
    assert len([caught.value, *caught.value.others]) == 4


def test_C2_links_within_a_hub_cache_are_read_and_never_written_through(scratch):
    cache = scratch / "models--org--name"
    snapshot = forge.model_folder(cache / "snapshots" / "abc", 1)
    blobs = cache / "blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        target = blobs / file.name.encode().hex()
        file.rename(target)
        file.symlink_to(Path("..") / ".." / "blobs" / target.name)
    short = forge.model_folder(scratch / "short", 2)
    before = kit.snapshot([cache])
    out = scratch / "out"
    execute(kit.plan([snapshot, short]), out, threads=1)
    checker.check(out)
    assert kit.snapshot([cache]) == before


def test_C6_the_index_has_what_readers_need(long_short, scratch):
    out = scratch / "out"
    execute(kit.plan(list(long_short), max_shard_size=600), out, threads=1)
    checker.check(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    largest = max(len(t[2]) for t in checker.model_tensors(out).values())
    assert largest > 600 and index["metadata"]["total_size"] > 0
    names = sorted(set(index["weight_map"].values()))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"


def test_C7_bare_files_need_no_config(long_short, scratch):
    out = scratch / "out.safetensors"
    execute(kit.plan([m / "model.safetensors" for m in long_short]), out, threads=1)
    checker.check(out)


def changed_during(scratch, long_short, change) -> SurgeonError:
    class Meddling(kit.FaultyDisk):
        def _step(self, action, path):
            super()._step(action, path)
            if len(self.calls) == 12:
                change(long_short[0] / "model.safetensors")

    with pytest.raises(SurgeonError) as caught:
        execute(kit.plan(list(long_short)), scratch / "out", threads=1, disk=Meddling())
    assert not (scratch / "out").exists()
    return caught.value


def test_B8_an_input_that_shrinks_grows_or_is_rewritten(scratch, long_short):
    def shrink(file):
        with open(file, "r+b") as stream:
            stream.truncate(3000)

    def grow(file):
        with open(file, "ab") as stream:
            stream.write(b"x")

    def rewrite(file):
        content = file.read_bytes()
        with open(file, "r+b") as stream:
            stream.write(content)

    def replace(file):
        other = file.with_name("new")
        other.write_bytes(file.read_bytes())
        os.replace(other, file)

    def remove(file):
        file.unlink()

    for change in (shrink, grow, rewrite, replace, remove):
        error = changed_during(scratch, long_short, change)
        assert error.exit_code == 3 and error.code in {"E334", "E303"}, (change.__name__, str(error))
        assert "model.safetensors" in error.message
        assert not kit.leftovers(scratch / "out")
        forge.model_folder(long_short[0], 1)


def test_B9_a_flipped_bit_is_found_where_hashes_are_known(long_short, scratch):
    out = scratch / "out"
    execute(kit.plan(list(long_short)), out, threads=1)
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    errors = verify_path(out).errors
    assert len(errors) == 1 and "model.safetensors" in errors[0].message
    report = verify_path(long_short[0])
    assert not report.errors and any("bit rot cannot be detected" in n for n in report.notes)


# --- D: what is allowed ---------------------------------------------------------------------------


def test_D1_nonfinite_values_may_be_copied_on_request_only(long_short, scratch):
    with_values(long_short[1], (0, 0), np.nan)
    options = {"ignore": (UP,)}
    with pytest.raises(InputError) as caught:
        execute(kit.plan(list(long_short), **options), scratch / "out", threads=1)
    assert caught.value.code == "E321"
    execute(kit.plan(list(long_short), **options, allow_nonfinite=True), scratch / "out", threads=1)
    stored = checker.model_tensors(scratch / "out")[UP]
    assert stored == checker.model_tensors(long_short[1])[UP]
    assert json.loads((scratch / "out" / "surgeon.json").read_text())["permissions"] == ["allow-nonfinite"]


def test_D1_nonfinite_values_cannot_take_part_in_arithmetic_even_on_request(long_short, scratch):
    with_values(long_short[0], (0, 0), np.nan)
    with pytest.raises(InputError) as caught:
        execute(kit.plan(list(long_short), allow_nonfinite=True), scratch / "out", threads=1)
    assert caught.value.code == "E321"


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "task_arithmetic"])
def test_D1_negative_zeros_and_subnormals_are_values(scratch, method):
    special = np.array([-0.0, 0.0, 1e-40, -1e-40, 1.5, 3e38 / 4], np.float32)
    files = [forge.write(scratch / f"{n}.safetensors", {"w": special}) for n in "ab"]
    execute(kit.plan(files, method=method), scratch / "out.safetensors", threads=1)
    ((code, _, data),) = checker.model_tensors(scratch / "out.safetensors").values()
    found = np.frombuffer(data, np.float32)
    assert code == "F32" and np.isfinite(found).all()
    np.testing.assert_allclose(found, special, rtol=1e-6, atol=1e-44)


def test_D2_an_overflow_on_storing_names_tensor_and_way_out(scratch):
    files = [
        forge.write(scratch / f"{n}.safetensors", {"w": np.full(4, 60000 - i, "<f4")})
        for i, n in enumerate("ab")
    ]
    for options, words in (
        ({"method": "task_arithmetic", "lambda_": 9000.0, "dtype": "float16"}, ("F16", "bfloat16")),
        (
            {"method": "linear", "dtype": "float16", "weight": (1.0, 1.0), "normalize": False},
            ("F16", "bfloat16"),
        ),
    ):
        with pytest.raises(InputError) as caught:
            execute(kit.plan(files, **options), scratch / "out.safetensors", threads=1)
        error = caught.value
        assert error.code == "E322" and "w" in error.message and error.exit_code == 3
        assert all(word in f"{error} {error.help}" for word in words)
        assert not (scratch / "out.safetensors").exists()


def test_D2_weights_that_sum_to_zero(scratch):
    files = [
        forge.write(scratch / f"{n}.safetensors", {"w": np.full(4, i + 1, "<f4")}) for i, n in enumerate("ab")
    ]
    with pytest.raises(SurgeonError) as caught:
        execute(kit.plan(files, method="linear", weight=(1.0, -1.0)), scratch / "out.safetensors", threads=1)
    assert caught.value.exit_code in {2, 3}


@pytest.mark.parametrize("base", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("other", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_D5_mixed_types_follow_the_base_or_the_request(scratch, base, other, dtype):
    values = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)

    def stored(code):
        return (
            forge.bf16(values)
            if code == "BF16"
            else values.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[code])
        )

    a = forge.write(scratch / "a.safetensors", {"w": stored(other)})
    b = forge.write(scratch / "b.safetensors", {"w": stored(base)})
    execute(
        kit.plan([a, b], method="ties", density=(1.0,), lambda_=0.5, dtype=dtype),
        scratch / "out.safetensors",
        threads=1,
    )
    (code, shape, _) = checker.model_tensors(scratch / "out.safetensors")["w"]
    assert code == {None: base, "float32": "F32", "bfloat16": "BF16"}[dtype] and shape == (3, 4)


def test_D5_integer_and_bool_buffers_are_copied_only_if_equal(scratch):
    def files(value):
        made = []
        for n, v in (("a", 3), ("b", value)):
            table = {"w": np.ones(4, "<f4"), "ids": np.array([1, v], "<i8"), "mask": np.array([True, v == 3])}
            made.append(forge.write(scratch / f"{n}{value}.safetensors", table))
        return made

    execute(kit.plan(files(3)), scratch / "out.safetensors", threads=1)
    found = checker.model_tensors(scratch / "out.safetensors")
    assert found["ids"][0] == "I64" and found["mask"][2] == b"\1\1"
    with pytest.raises(InputError) as caught:
        execute(kit.plan(files(4)), scratch / "other.safetensors", threads=1)
    assert caught.value.exit_code == 3 and "ids" in str(caught.value)


@pytest.mark.parametrize(
    "method", ["linear", "ties", "slerp", "dare_linear", "task_arithmetic", "sce", "nuslerp"]
)
def test_D6_scalars_empty_tensors_and_doubles(scratch, method):
    table = {"scalar": np.float32(2.0).reshape(()), "empty": np.ones((0, 5), "<f4"), "double": np.full(3, 0.1, "<f8"),
             "one": np.ones((1, 1), "<f4")}  # fmt: skip
    files = []
    for i, n in enumerate("ab"):
        files.append(forge.write(scratch / f"{n}.safetensors", {k: v * (1 + i) for k, v in table.items()}))
    execute(kit.plan(files, method=method), scratch / "out.safetensors", threads=2)
    checker.check(scratch / "out.safetensors")
    found = checker.model_tensors(scratch / "out.safetensors")
    assert {n: (c, s) for n, (c, s, _) in found.items()} == {
        "scalar": ("F32", ()), "empty": ("F32", (0, 5)), "double": ("F64", (3,)), "one": ("F32", (1, 1)),
    }  # fmt: skip


TIES = {
    "stored once, both tied": ((True, True, False), (True, True, False)),
    "stored twice equal": ((True, True, True), (True, True, True)),
    "untied and tied": ((False, False, True), (True, True, False)),
    "tied and untied": ((True, True, False), (False, False, True)),
}


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_D7_tie_semantics_are_kept(scratch, name, method):
    models = []
    for number, (tied, equal, head) in enumerate(TIES[name]):
        tensors = forge.llama_tensors(number + 1)
        if equal:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        if not head:
            del tensors["lm_head.weight"]
        models.append(forge.model_folder(scratch / f"m{number}", tensors=tensors, tie_word_embeddings=tied))
    out = scratch / "out"
    execute(kit.plan(models, method=method), out, threads=1)
    checker.check(out)
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    stored = checker.model_tensors(out)
    assert tied == all(t for t, _, _ in TIES[name])
    assert ("lm_head.weight" in stored) == (not tied)
    assert not verify_path(out).errors


@pytest.mark.parametrize(
    "method", ["linear", "slerp", "ties", "task_arithmetic", "sce", "dare_ties", "breadcrumbs", "nuslerp"]
)
def test_D9_degenerate_tensors_give_finite_repeatable_results(scratch, method):
    table = {
        "zeros": np.zeros((4, 4), "<f4"), "constant": np.full((4, 4), 0.5, "<f4"), "ties": np.tile([1.0, -1.0], 8).astype("<f4"),
        "zero_row": np.vstack([np.zeros(4), np.arange(12).reshape(3, 4)]).astype("<f4"), "single": np.ones(1, "<f4"),
    }  # fmt: skip
    a = forge.write(scratch / "a.safetensors", {k: v + np.float32(k == "ties") for k, v in table.items()})
    b = forge.write(scratch / "b.safetensors", table)
    results = []
    for n in range(2):
        out = scratch / str(n) / "out.safetensors"
        out.parent.mkdir()
        execute(kit.plan([a, b], method=method), out, threads=1 + n)
        results.append(checker.tree(out))
        for name, (_, _, data) in checker.model_tensors(out).items():
            assert np.isfinite(np.frombuffer(data, np.float32)).all(), name
    assert results[0] == results[1]


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties", "task_arithmetic", "della"])
def test_D9_identical_models_come_out_unchanged(scratch, method):
    folders = [forge.model_folder(scratch / n, 1) for n in ("a", "b")]
    execute(kit.plan(folders, method=method), scratch / "out", threads=1)
    assert checker.model_tensors(scratch / "out") == checker.model_tensors(folders[0])


# --- E, F, G ------------------------------------------------------------------------------------


def test_E2_a_tensor_only_one_model_has_is_copied_and_said(scratch):
    extra = {"model.extra_buffer": forge.bf16(np.ones(4, np.float32))}
    long = forge.model_folder(scratch / "long", tensors={**forge.llama_tensors(1), **extra})
    short = forge.model_folder(scratch / "short", 2)
    plan = kit.plan([long, short])
    execute(plan, scratch / "out", threads=1)
    assert (
        checker.model_tensors(scratch / "out")["model.extra_buffer"]
        == checker.model_tensors(long)["model.extra_buffer"]
    )
    assert any("model.extra_buffer" in n for n in plan.notes)


def test_E8_companions_of_the_output_are_complete(long_short, scratch):
    out = scratch / "out"
    execute(kit.plan(list(long_short)), out, threads=1)
    names = set(checker.tree(out))
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "README.md",
    } <= names
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    config = json.loads((out / "config.json").read_text())
    assert "_name_or_path" not in config and config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("span", "words"),
    [
        ([0, 3], "exceeds the 2 layers"),
        ([1, 1], "no layer"),
        ([2, 1], "no layer"),
        ([-1, 2], None),
        ([2, 4], "exceeds"),
    ],
)
def test_E10_layer_ranges_outside_the_model(long_short, scratch, span, words):
    recipe = scratch / "m.yml"
    recipe.write_text(
        f"merge_method: passthrough\nslices:\n  - sources:\n      - model: {long_short[0]}\n        layer_range: {span}\n"
    )
    done = kit.surgeon("merge", recipe, "-o", scratch / "out")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "m.yml:5:22" in done.stderr
    assert words is None or words in done.stderr
    assert words is None or "the upper end is exclusive" in done.stderr


def test_E11_all_differing_keys_in_one_message(scratch):
    models = [forge.model_folder(scratch / "a", 1), forge.model_folder(scratch / "b", 2, hidden_size=32, num_attention_heads=8, num_hidden_layers=4)]  # fmt: skip
    with pytest.raises(InputError) as caught:
        kit.plan(models)
    for key in ("hidden_size 32 / 16", "num_attention_heads 8 / 4", "num_hidden_layers 4 / 2"):
        assert key in caught.value.message


def test_E11_differing_tensors_of_bare_files_are_all_listed(scratch):
    tables = [{f"t{i}": np.ones(2 + n * (i % 2), "<f4") for i in range(20)} for n in (0, 1)]
    files = [forge.write(scratch / f"{n}.safetensors", t) for n, t in enumerate(tables)]
    with pytest.raises(InputError) as caught:
        kit.plan(files)
    assert len([caught.value, *caught.value.others]) == 10


def test_F7_every_missing_model_is_named_before_any_work(scratch):
    short = forge.model_folder(scratch / "short", 2)
    with pytest.raises(SurgeonError) as caught:
        kit.plan([scratch / "lnog", scratch / "absent.safetensors", short], method="linear")
    found = [caught.value, *caught.value.others]
    assert len(found) == 2 and {e.code for e in found} == {"E301"}
    assert "lnog" in str(found[0])


def test_F7_a_missing_path_is_never_sent_to_the_hub(scratch, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    for path in ("./no/such", "/no/such", "~/no-such-model", "no-such.safetensors", "a/b/c"):
        with pytest.raises(SurgeonError) as caught:
            kit.plan([path, scratch], method="linear")
        assert caught.value.code in {"E301", "E204"}


@pytest.mark.parametrize(
    "name", ["-model", "--help", "a@b", "a+b", "*", "[x]", "a b", "n\nl", "a\x1b[31m", "é"]
)
def test_F9_G7_models_with_odd_names(scratch, name):
    odd = forge.model_folder(scratch / name, 1)
    short = forge.model_folder(scratch / "short", 2)
    out = scratch / "out"
    execute(kit.plan([odd, short]), out, threads=1)
    checker.check(out)
    text = (out / "README.md").read_text() + (out / "surgeon.json").read_text()
    assert "\x1b" not in text


def test_F11_tokens_appear_in_no_output(long_short, scratch):
    secret = "hf_" + "S3cretS3cretS3cret"
    environment = {"HF_TOKEN": secret, "HUGGING_FACE_HUB_TOKEN": secret, "HF_HUB_OFFLINE": "1"}
    done = kit.surgeon("merge", *long_short, "-o", scratch / "out", "-v", environment=environment)
    failed = kit.surgeon(
        "merge", "org/absent", long_short[1], "-o", scratch / "no", "--json", environment=environment
    )
    assert done.returncode == 0 and failed.returncode == 5
    for text in (done.stdout, done.stderr, failed.stdout, failed.stderr):
        assert secret not in text
    assert not [n for n, c in checker.tree(scratch / "out").items() if secret.encode() in c]


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.safetensors", "adapter_model.bin", "training_args.bin"]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_G1_a_malicious_pickle_leaves_no_trace(scratch, name, zipped):
    trace = scratch / "executed"
    folder = forge.model_folder(scratch / "long", 1)
    short = forge.model_folder(scratch / "short", 2)
    if name not in {"training_args.bin", "adapter_model.bin"}:
        (folder / "model.safetensors").unlink()
    payload = pickle.dumps(Bomb(trace))
    if zipped:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
    else:
        (folder / name).write_bytes(payload)
    for reference in (folder, folder / name):
        try:
            execute(kit.plan([reference, short]), scratch / "out", threads=1)
        except SurgeonError as error:
            assert error.exit_code in {2, 3}
            assert "pickle" in str(error) or error.code in {"E303", "E304", "E342", "E341"}, str(error)
        assert not trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin"])
def test_G1_even_with_permission_nothing_is_imported_by_name(scratch, name):
    pytest.importorskip("torch")
    trace = scratch / "executed"
    folder = forge.model_folder(scratch / "long", 1)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(SurgeonError) as caught:
        kit.plan([folder, forge.model_folder(scratch / "short", 2)], allow_pickle=True)
    assert caught.value.exit_code == 3 and not trace.exists()


def test_G2_code_beside_a_model_is_carried_but_not_run(scratch):
    trace = scratch / "executed"
    folder = forge.model_folder(
        scratch / "long", 1, auto_map={"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}
    )
    short = forge.model_folder(
        scratch / "short", 2, auto_map={"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}
    )
    for place in (folder, short):
        (place / "modeling_x.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    execute(kit.plan([folder, short]), scratch / "out", threads=1)
    assert not trace.exists()


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{% for x in range(10**9) %}{{ x }}{% endfor %}"]
)
def test_G3_chat_templates_are_text(scratch, template):
    models = [forge.model_folder(scratch / n, s) for n, s in (("long", 1), ("short", 2))]
    for folder in models:
        (folder / "chat_template.jinja").write_text(template)
        file = folder / "tokenizer_config.json"
        file.write_text(
            json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"})
        )
    with kit.time_limit(10):
        execute(kit.plan(models), scratch / "out", threads=1)
    assert (scratch / "out" / "chat_template.jinja").read_text() == template


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "os.system",
        "ties.__class__",
        "__init__",
        "",
        "ti es",
        "ties/../linear",
        "TIES\x1b",
        "a" * 10_000,
        "ties\n",
        "..",
        "ｔｉｅｓ",
    ],
)
def test_G5_method_names_are_looked_up_not_imported(long_short, name):
    with pytest.raises(UsageError) as caught:
        kit.plan(list(long_short), method=name)
    assert caught.value.code == "E201" and caught.value.exit_code == 2
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_G5_dashes_and_case_follow_one_rule(long_short):
    assert kit.plan(list(long_short), method="task-arithmetic").items
    with pytest.raises(UsageError):
        api.build_request(models=(), method="ties", desnity=0.2)


def test_G7_names_of_files_and_models_are_escaped_on_the_terminal(scratch, capsys):
    long = forge.model_folder(scratch / "lo\x1b[31mng", 1)
    short = forge.model_folder(scratch / "short", 2)
    code = app.run(
        "merge",
        [str(long), str(short), "--method", "ties", "-o", str(scratch / "ou\x1b[2Jt"), "--no-progress"],
    )
    printed = capsys.readouterr()
    assert code == 0
    assert "\x1b" not in printed.err + printed.out
    spoiled = long / "model.safetensors"
    spoiled.write_bytes(b"short")
    code = app.run(
        "merge", [str(long), str(short), "--method", "ties", "-o", str(scratch / "o2"), "--no-progress"]
    )
    printed = capsys.readouterr()
    assert code == 3 and "\x1b" not in printed.err + printed.out
