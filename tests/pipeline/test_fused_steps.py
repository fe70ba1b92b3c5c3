"""Steps that hand their model on unwritten: the same bytes as written ones, nothing on disk, interruption, rules."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import threading

import numpy as np
import pytest
from recipe_runs import MODELS, TESTS

from surgeon.deploy import quantized_check
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.output.disk import Disk
from surgeon.pipeline.fusing import fusion
from surgeon.pipeline.run import Run, run
from surgeon.pipeline.verbs import Machine
from surgeon.recipe import native
from surgeon.unwritten.view import Unwritten
from surgeon.verify.static import verify_path

HEAD = """\
version: 1
name: demo
models:
  long: {models}/long
  short: {models}/short
  base: {models}/base
steps:
"""
TIES = "  - id: merged\n    merge: {method: ties, base: short, models: [{model: long, weight: 1.0, density: 0.5}]}\n"
SHARDED = TIES.replace("method: ties,", "method: ties, max_shard_size: 700KB,")
LINEAR = "  - id: merged\n    merge: {method: linear, models: [{model: long, weight: 0.3}, {model: short, weight: 0.7}]}\n"
SLERP = "  - id: merged\n    merge: {method: slerp, base: short, models: [long], dtype: float16}\n"
FEW = "samples: 4, sequence_length: 64"
DEPTH = f"  - id: shallow\n    prune: {{method: depth, target: {{keep_layers: 2}}, {FEW}}}\n"
ZIPLM = f"  - id: narrow\n    prune: {{method: ziplm, target: {{sparsity: 0.3}}, round_to: 8, {FEW}}}\n"
RTN = f"  - id: packed\n    quantize: {{schemes: W8A16, method: rtn, group_size: 8, {FEW}}}\n"
GPTQ = f"  - id: packed\n    quantize: {{schemes: W4A16, method: gptq, group_size: 8, {FEW}}}\n"


def recipe(folder, *steps: str, name: str = "recipe.yaml", models=MODELS):
    path = folder / name
    path.write_text(HEAD.format(models=models) + "".join(steps))
    return path


def everything(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fused(document) -> list[str]:
    return [step["id"] for step in document["steps"] if step.get("fused")]


def go(path, out, **options):
    out.parent.mkdir(exist_ok=True)
    return run(path, out, threads=1, **options)


@pytest.fixture
def unread(monkeypatch):
    """Leave out the child process that loads a quantized result; slow tests have it."""
    monkeypatch.setattr(
        quantized_check, "check", lambda *a, **k: {"reader": "transformers", "notice": "left out"}
    )


@pytest.fixture
def weight_files(monkeypatch):
    """Note every weight file of a model that is created, in staging folders too."""
    seen: list[str] = []
    create = Disk.create

    def noted(self, path, size=0):
        if path.suffix == ".safetensors":
            seen.append(str(path))
        return create(self, path, size)

    monkeypatch.setattr(Disk, "create", noted)
    return seen


@pytest.fixture
def seals(monkeypatch):
    """Count how often a model is computed as a whole for its digests."""
    seen: list[str] = []
    seal = Unwritten.seal

    def counted(self, progress=None):
        seen.append(self.folder.name)
        return seal(self, progress)

    monkeypatch.setattr(Unwritten, "seal", counted)
    return seen


CHAINS = {
    "sharded ties, ziplm": ((SHARDED, ZIPLM), ["merged"]),
    "slerp, rtn": ((SLERP, RTN), ["merged"]),
    "linear, depth, gptq": ((LINEAR, DEPTH, GPTQ), ["merged", "shallow"]),
}
SLOW = {
    "ties, depth": ((TIES, DEPTH), ["merged"]),
    "ties, wanda": ((TIES, ZIPLM.replace("method: ziplm", "method: wanda").replace("round_to: 8, ", "")), ["merged"]),
    "ziplm, gptq": ((TIES, ZIPLM.replace("method:", "model: short, method:"), GPTQ), ["narrow"]),
    "sharded ties, wanda, rtn": ((SHARDED, ZIPLM.replace("method: ziplm", "method: wanda").replace("round_to: 8, ", ""), RTN), ["merged", "narrow"]),
    "dare-ties, width, awq": (
        (TIES.replace("ties", "dare-ties"), ZIPLM.replace("ziplm", "width, criterion: magnitude"), GPTQ.replace("gptq", "awq")), ["merged", "narrow"]),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CHAINS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_fused_and_written_steps_give_the_same_bytes(scratch, unread, weight_files, name):
    parts, expected = {**CHAINS, **SLOW}[name]
    path = recipe(scratch, *parts)
    written = go(path, scratch / "written" / "out", fuse=False)
    between = [file for file in weight_files if re.search(r"/steps/[^/]*(merged|shallow|narrow)", file)]
    assert between and not fused(written)
    weight_files.clear()
    document = go(path, scratch / "fused" / "out", fuse=True)
    assert fused(document) == expected and document["published"]
    assert everything(scratch / "fused" / "out") == everything(scratch / "written" / "out")
    assert not verify_path(scratch / "fused" / "out").errors
    for step in expected:
        assert not [file for file in weight_files if re.search(rf"/steps/\.?{step}[./]", file)], weight_files
    assert weight_files  # the published model's own
    for one, other in zip(written["steps"], document["steps"], strict=True):
        for key in ("bytes", "parameters", "sha256"):
            assert one["document"]["output"].get(key) == other["document"]["output"].get(key)
        assert one["document"]["metrics"] == other["document"]["metrics"]


def test_what_lies_between_is_all_but_the_weights(scratch, unread):
    path = recipe(scratch, SHARDED, DEPTH, "gates: [bytes <= 1]\n")
    kept = go(path, scratch / "written" / "out", fuse=False)
    document = go(path, scratch / "fused" / "out", fuse=True)
    assert not document["published"] and not kept["published"]
    whole = everything(scratch / "written" / "out.work" / "steps" / "merged")
    shell = everything(scratch / "fused" / "out.work" / "steps" / "merged")
    missing = whole.keys() - shell.keys()
    assert len(missing) == 4 and all(name.endswith(".safetensors") for name in missing)
    assert shell == {name: content for name, content in whole.items() if name not in missing}
    assert [p for p in (scratch / "fused" / "out.work" / "steps").iterdir() if p.name != "merged"] == []
    state = [
        json.loads((scratch / how / "out.work" / "state" / "merged.json").read_bytes())
        for how in ("written", "fused")
    ]
    assert state[0]["digest"] == state[1]["digest"] and state[0]["fingerprint"] == state[1]["fingerprint"]


def test_reading_gives_the_bytes_of_the_file(scratch, long_short, monkeypatch):
    """Any stretch of any tensor, whatever is kept, from several threads."""
    from surgeon import api
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.unwritten import view as module

    monkeypatch.setattr("surgeon.plan.BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(module, "RECENT_BYTES", 300)
    monkeypatch.setattr(module, "FACTS_BYTES", 200)
    long, short = map(str, long_short)
    for number, options in enumerate([
        {"method": "ties", "base": short, "density": (0.3,)},
        {"method": "slerp", "t": "0.4", "dtype": "float32"},
        {"method": "linear"},
        {"method": "dare-ties", "base": short, "density": (0.5,), "seed": 3},
    ]):  # fmt: skip
        models = (long,) if options.get("base") else (short, long)
        planned = api.plan_merge(api.build_request(models=models, max_shard_size=2000, **options))
        place = scratch / f"out{number}"
        planned.run(place, threads=1)
        stored, view = open_path(place), Unwritten(planned.plan, place, threads=2)
        digests = view.seal()
        manifest = json.loads((place / "surgeon.json").read_bytes())
        assert digests.file_digests[""] == {
            n: d for n, d in manifest["files"].items() if n.endswith(".safetensors")
        }
        assert json.loads(json.dumps(digests.summaries[""])) == manifest["measured"]
        view.described(digests.file_digests[""])
        assert list(view.tensors) == list(stored.tensors) and dict(view.tensors) == stored.tensors
        assert [h.sha256 for h in view.headers] == [
            h.sha256 for h in stored.headers
        ] and view.config == stored.config
        assert [h.file.name for h in view.headers] == [h.file.name for h in stored.headers]
        drawn, wrong = np.random.default_rng(1), []

        def read(seed, view=view, stored=stored, wrong=wrong):
            drawn = np.random.default_rng(seed)
            for name, info in stored.tensors.items():
                start, stop = sorted(int(i) for i in drawn.integers(0, info.elements + 1, 2))
                found, expected = view.read(name, start, stop), stored.read(name, start, stop)
                if found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
                    wrong.append((name, start, stop))
                found[:] = 0  # what is kept must not be what was given away

        threads = [threading.Thread(target=read, args=(int(seed),)) for seed in drawn.integers(0, 99, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        name = next(iter(stored.tensors))
        assert view.read_bytes(name, 3, 9).tobytes() == stored.read_bytes(name, 3, 9).tobytes()
        assert view.read(name, 5, 5).size == 0 and view.granularity(name) == 1
        assert view._recent._held <= 300 or len(view._recent._entries) == 1
        view.close()


def interrupted(path, out, when: str, **options):
    """Run until the work named ``when`` begins."""
    stop = threading.Event()

    def tell(what, done, total):
        if what.startswith(when):
            stop.set()

    out.parent.mkdir(exist_ok=True)
    job = Run(native.read(path), out, machine=Machine(threads=1, progress=tell, stop=stop), **options)
    with pytest.raises(Interrupted):
        job.execute()
    return job


def test_an_interrupted_run_goes_on(scratch, unread, seals):
    path = recipe(scratch, TIES, DEPTH, RTN)
    go(path, scratch / "whole" / "out", fuse=True)
    expected = everything(scratch / "whole" / "out")
    assert seals == ["merged", "shallow"]
    seals.clear()
    out = scratch / "cut" / "out"
    interrupted(path, out, "merged: merging", fuse=True)
    assert not (out.with_name("out.work") / "steps" / "merged").exists()
    interrupted(path, out, "packed: measuring quality", fuse=True)
    assert seals == ["merged", "merged", "shallow"]
    document = go(path, out, fuse=True)
    assert seals == ["merged", "merged", "shallow"], (
        "what was computed for its digests is not computed for them again"
    )
    assert {step["id"]: step["status"] for step in document["steps"]} == {
        "merged": "unchanged", "shallow": "unchanged", "packed": "done",
    }  # fmt: skip
    assert everything(out) == expected and fused(document) == ["merged", "shallow"]


def test_a_run_begun_one_way_ends_the_other(scratch, unread, seals):
    path = recipe(scratch, TIES, RTN)
    for name, first in (("a", True), ("b", False)):
        out = scratch / name / "out"
        interrupted(path, out, "packed: measuring quality", fuse=first)
        document = go(path, out, fuse=not first)
        assert document["published"] and fused(document) == []
    assert seals == ["merged"], "what is written is read where it lies"
    assert everything(scratch / "a" / "out") == everything(scratch / "b" / "out")


def test_a_damaged_rest_is_made_anew(scratch, unread, seals):
    path = recipe(scratch, TIES, DEPTH, RTN)
    out = scratch / "out"
    interrupted(path, out, "packed: measuring quality", fuse=True)
    config = scratch / "out.work" / "steps" / "merged" / "config.json"
    config.write_text(config.read_text() + " ")
    document = go(path, out, fuse=True)
    assert seals == ["merged", "shallow", "merged"], "the step behind the damaged one is taken up"
    assert [step["status"] for step in document["steps"]] == ["done", "unchanged", "done"]
    assert go(path, out, fuse=True)["unchanged"], "a finished run does nothing, fused or not"


def test_inputs_that_change_or_are_wrong_end_the_run(scratch, unread):
    models = scratch / "models"
    for name in ("long", "short", "base"):
        shutil.copytree(MODELS / name, models / name)
    path = recipe(scratch, TIES, RTN, models=models)
    file = models / "long" / "model-00002-of-00002.safetensors"

    def tell(what, done, total):
        if what == "packed: measuring quality":
            file.touch()

    job = Run(native.read(path), scratch / "out", machine=Machine(threads=1, progress=tell), fuse=True)
    with pytest.raises(InputError) as caught:
        job.execute()
    assert caught.value.code == "E334" and not (scratch / "out").exists()
    content = bytearray(file.read_bytes())
    content[-2:] = b"\xc0\x7f"  # NaN
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        go(path, scratch / "out", fuse=True)
    assert caught.value.code == "E321" and caught.value.message.startswith("step merged:")


def rules(tmp, *parts: str, chosen=None, keep=False):
    found = native.read(recipe(tmp, *parts))
    return fusion(found, chosen or [step.id for step in found.steps], keep=keep)


def test_what_is_fused_and_why_the_rest_is_written(tmp_path):
    assert dict(rules(tmp_path, TIES, DEPTH, RTN).readers) == {"merged": "shallow", "shallow": "packed"}
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    scores = "  - id: scores\n    eval: {model: merged, perplexity: ./texts.jsonl}\n"
    speed = "  - id: fast\n    prune: {target: {speedup: 1.5}}\n"
    for parts, options, step, said in [
        ((TIES, DEPTH), {"keep": True}, "merged", "--keep-intermediate asks for it"),
        ((TIES, DEPTH, scores), {}, "merged", "shallow and scores read it"),
        ((TIES, scores.replace("scores", "wide", 1).replace("eval: {model: merged, perplexity: ./texts.jsonl}", "export: {dtype: float32}")),
         {}, "merged", "wide (export) reads it from disk"),
        ((TIES, "  - id: wide\n    export: {dtype: float32}\n", RTN), {}, "wide", "export writes its model"),
        ((TIES, speed), {}, "merged", "fast times models"),
        ((TIES, speed, RTN), {}, "fast", "fast times models"),
        ((TIES, DEPTH.replace("{method", "{distill: true, method")), {}, "merged", "shallow trains"),
        ((TIES, ZIPLM.replace("{method", "{layout: per-layer, method"), RTN), {}, "narrow",
         "narrow makes layers that differ, which are only read as a whole"),
        ((TIES, DEPTH), {"chosen": ["merged"]}, "merged", "shallow does not run with it now"),
    ]:  # fmt: skip
        found = rules(tmp_path, *parts, **options)
        assert found.written.get(step) == said and step not in found.readers
    # per-layer sizes are no hindrance to reading an unwritten model
    assert "merged" in rules(tmp_path, TIES, ZIPLM.replace("{method", "{layout: per-layer, method")).readers
    # A published model is written whoever reads it, and nothing needs to be said of it.
    found = rules(tmp_path, TIES, RTN, "publish: {step: merged}\n")
    assert not found.readers and not found.written


def test_parts_of_a_run_find_what_they_need(scratch):
    path = recipe(scratch, TIES, DEPTH)
    first = go(path, scratch / "out", fuse=True, until="merged")
    assert not fused(first) and not verify_path(scratch / "out.work" / "steps" / "merged").errors
    assert fused(go(path, scratch / "out", fuse=True, start="shallow")) == []
    kept = go(path, scratch / "kept", fuse=True, keep_intermediate=True)
    assert not fused(kept) and not verify_path(scratch / "kept.work" / "steps" / "merged").errors


def test_only_after_a_fused_run_says_what_lacks(scratch, unread):
    path = recipe(scratch, TIES, RTN)
    interrupted(path, scratch / "out", "packed: measuring quality", fuse=True)
    with pytest.raises(UsageError) as caught:
        go(path, scratch / "out", fuse=True, only=["packed"])
    assert caught.value.code == "E2010" and "merged" in caught.value.message


def test_the_key_of_a_recipe_and_a_dry_run(scratch):
    path = recipe(scratch, TIES, DEPTH, "fuse: true\n")
    said: list[str] = []
    document = go(path, scratch / "out", dry_run=True, say=said.append)
    assert fused(document) == ["merged"] and document["steps"][0]["document"]["output"]["bytes"] > 1e6
    assert "step merged: merge, handed to shallow unwritten" in said and not (scratch / "out.work").exists()
    assert fused(go(path, scratch / "plain", fuse=False, dry_run=True)) == []
    from surgeon.recipe.json_schema import json_schema

    assert json_schema()["properties"]["fuse"]["type"] == "boolean"
    assert (
        native.read(path).plain()["fuse"] is True and "fuse" not in native.read(recipe(scratch, TIES)).plain()
    )
    with pytest.raises(UsageError) as caught:
        native.read(recipe(scratch, TIES, "fuse: sometimes\n"))
    assert caught.value.code == "E224" and caught.value.where.line == 10


@pytest.mark.slow
def test_points_of_a_sweep_share_an_unwritten_model(scratch, seals):
    sweep = "sweep:\n  steps.shallow.prune.target.keep_layers: [2, 3]\n"
    path = recipe(scratch, TIES, DEPTH, sweep)
    document = go(path, scratch / "fused" / "out", fuse=True)
    go(path, scratch / "written" / "out", fuse=False)
    assert seals == ["merged"] and [fused(point) for point in document["points"]] == [["merged"], ["merged"]]
    assert everything(scratch / "fused" / "out") == everything(scratch / "written" / "out")


# ---- the real readers, mixtures of experts, GGUF, memory -------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(TIES, GPTQ), (LINEAR, ZIPLM, RTN), (SLERP, DEPTH, GPTQ)])
def test_real_readers_load_what_fused_steps_give(scratch, parts):
    """While it runs nobody sees a weight file of a model between steps, sixteen looks a second and more."""
    path = recipe(scratch, *parts)
    go(path, scratch / "written" / "out", fuse=False)
    done, found = threading.Event(), set()

    def watch():
        place = scratch / "fused" / "out.work" / "steps"
        while not done.wait(0.01):
            # Solved matrices of pruning lie in ID.work; whole models would lie in ID, a candidate, or beside in staging.
            with contextlib.suppress(FileNotFoundError):  # folders come and go while they are listed
                for file in place.rglob("*.safetensors"):
                    if "solved" not in file.parts and "database" not in file.parts:
                        found.add(str(file))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        document = go(path, scratch / "fused" / "out", fuse=True)
    finally:
        done.set()
        watcher.join()
    assert not found and len(fused(document)) == len(parts) - 1
    assert everything(scratch / "fused" / "out") == everything(scratch / "written" / "out")
    assert document["steps"][-1]["document"]["reading"]["reader"] == "transformers"


@pytest.mark.slow
def test_experts_are_dropped_and_the_rest_quantized(scratch, unread):
    sys.path[:0] = [str(TESTS / "structure"), str(TESTS / "prune")]
    import pruning_runs
    from expert_models import moe_folder

    family = moe_folder(
        "qwen3_moe",
        vocab_size=281,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        head_dim=32,
    )
    model = shutil.copytree(family, scratch / "model")
    for name in pruning_runs.TOKENIZER:
        shutil.copy(pruning_runs.LONG / name, model)
    path = scratch / "recipe.yaml"
    path.write_text(
        f"version: 1\nmodels: {{mixture: {model}}}\nsteps:\n"
        f"  - id: fewer\n    prune: {{method: reap, target: {{keep_experts: 0.75}}, {FEW}}}\n{GPTQ}"
    )
    go(path, scratch / "written" / "out", fuse=False)
    document = go(path, scratch / "fused" / "out", fuse=True)
    assert fused(document) == ["fewer"]
    assert everything(scratch / "fused" / "out") == everything(scratch / "written" / "out")


@pytest.mark.slow
def test_a_gguf_file_is_the_same_one(scratch):
    sys.path[:0] = [str(TESTS / "prune")]
    import pruning_runs

    models = [
        pruning_runs.tiny("llama", scratch / name, hidden_size=192, intermediate_size=256, head_dim=32) for name in ("a", "b")
    ]  # fmt: skip
    path = scratch / "recipe.yaml"
    path.write_text(
        f"version: 1\nmodels: {{a: {models[0]}, b: {models[1]}}}\nsteps:\n"
        "  - id: merged\n    merge: {method: linear, models: [{model: a, weight: 0.3}, {model: b, weight: 0.7}]}\n"
        f"  - id: packed\n    quantize: {{schemes: W4A16, format: gguf, {FEW}}}\n"
    )
    go(path, scratch / "written" / "out.gguf", fuse=False)
    document = go(path, scratch / "fused" / "out.gguf", fuse=True)
    assert fused(document) == ["merged"]
    assert (scratch / "fused" / "out.gguf").read_bytes() == (scratch / "written" / "out.gguf").read_bytes()
    sidecars = [(scratch / how / "out.gguf.surgeon.json").read_bytes() for how in ("fused", "written")]
    assert sidecars[0] == sidecars[1]


@pytest.mark.slow
def test_memory_is_bounded_however_large_the_model_is(scratch):
    """A merge of 240 MB read twice, whole tensors in stretches and single rows: caches and some blocks, nothing more."""
    import tracemalloc

    import forge

    from surgeon import api
    from surgeon.plan import BLOCK_ELEMENTS
    from surgeon.unwritten.view import FACTS_BYTES, RECENT_BYTES

    folders = []
    for seed in (1, 2):
        folder = forge.model_folder(scratch / str(seed), seed)
        rows = np.random.default_rng(seed).integers(0x3C00, 0x3F00, (60_000_000,), np.uint16)
        config = json.loads((folder / "config.json").read_text())
        hidden = config["hidden_size"]
        shapes = {"big.weight": (60_000_000 // hidden, hidden)}
        tensors = {name: ("BF16", shape, rows.tobytes()) for name, shape in shapes.items()}
        forge.write(folder / "extra.safetensors", tensors)
        folders.append(folder / "extra.safetensors")
    planned = api.plan_merge(
        api.build_request(models=(str(folders[1]),), base=str(folders[0]), method="ties", density=(0.3,))
    )
    from dataclasses import replace

    plan = replace(planned.plan, models={"": replace(planned.plan.models[""], config={})})
    view = Unwritten(plan, scratch / "none", threads=2)
    tracemalloc.start()
    view.seal()
    for start in range(0, 60_000_000, 8 << 20):
        view.read("big.weight", start, min(start + (8 << 20), 60_000_000))
    for row in range(0, 60_000_000 // hidden, 40_000):
        view.read("big.weight", row * hidden, (row + 1) * hidden)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    view.close()
    assert view.tensors["big.weight"].nbytes == 120_000_000
    assert peak < RECENT_BYTES + (8 << 21) + 40 * BLOCK_ELEMENTS and RECENT_BYTES + FACTS_BYTES < 140_000_000
