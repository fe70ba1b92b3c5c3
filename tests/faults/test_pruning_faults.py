"""E5, E6, G2, J5, J6, J7: what pruning, measuring and exporting must survive, through the real command line."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))

import pruning_runs as runs
import torch
from structure_models import DENSE, LATENT, ROUTED, STOCK_HEADS, groups_cut, opened

from surgeon.calibrate.damping import dead_inputs
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.walk import Walk
from surgeon.deploy import per_layer, runtimes
from surgeon.errors import InputError, UsageError
from surgeon.measure.workload import Workload
from surgeon.prune import database
from surgeon.prune.closed_form import solve
from surgeon.prune.obs import removal_order
from surgeon.structure.check import check
from surgeon.structure.cut import Cut, LayerCut

SHORT = ("--samples", 4, "--sequence-length", 32)

LOADER = """
import json, sys
import torch, transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
for line in sys.stdin:
    asked = json.loads(line)
    folder, trust = asked["folder"], asked["trust"]
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    names = json.load(open(folder + "/config.json"))["architectures"]
    kind = transformers.AutoModelForCausalLM if trust else getattr(transformers, names[0])
    model, report = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=trust)
    with torch.no_grad():
        output = model(input_ids=torch.arange(3, 9)[None])
    first = output[0]
    print(json.dumps({
        "report": {key: sorted(map(str, value)) for key, value in report.items() if key.endswith("_keys")},
        "finite": bool(torch.isfinite(first).all()), "layer_types": getattr(config, "layer_types", None),
        "ours": [name for name in sys.modules if name.split(".")[0] == "surgeon"],
    }), flush=True)
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Load folders in a process of its own that has transformers and nothing of ours."""
    place = tmp_path_factory.mktemp("loader")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HOME": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    errors = (place / "stderr").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", LOADER], cwd=place, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def load(folder: Path, trust: bool = False) -> dict[str, Any]:
        stdin.write(json.dumps({"folder": str(folder), "trust": trust}) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, (place / "stderr").read_text()[-2000:]
        found = json.loads(line)
        assert not found["ours"] and found["finite"]
        assert not any(found["report"].values()), found["report"]
        return found

    yield load
    stdin.close()
    process.wait(30)
    stdout.close()
    errors.close()


@pytest.fixture
def text(scratch):
    return runs.text(scratch / "cal.jsonl", 20)


@pytest.fixture
def prune(capsys, text):
    def run(*arguments):
        return runs.command(capsys, "prune", *arguments, *SHORT, "--calibration", text)

    return run


@pytest.fixture
def machine(monkeypatch):
    return runs.install(monkeypatch, runs.Machine())


@contextmanager
def model_stays_still(monkeypatch) -> Iterator[None]:
    """Fail when anything of the model is run."""

    def ran(*_: object, **__: object) -> None:
        raise AssertionError("the model was run before the refusal")

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "__init__", ran)
        patch.setattr(Skeleton, "__init__", ran)
        yield


# ---- E5: sizes in config.json ------------------------------------------------------------------------

SIZES = {
    "hidden": ("hidden_size", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "groups": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner"),
    "vocabulary": ("vocab_size",),
}
"""What a shape tells -> the keys of config.json that say it."""
PER_LAYER = ("layer_types", "max_window_layers", "mlp_only_layers", "first_k_dense_replace")
"""Keys about layers: what they mean is compared, not their value."""
NAMES = {
    "embedding": r"(embed_tokens|wte|word_embeddings)\.weight$",
    "query": r"(q_proj|qkv_proj|attention\.self\.query|c_attn)\.weight$",
    "key": r"(k_proj|attention\.self\.key)\.weight$",
    "ffn": r"(mlp\.(gate_proj|fc1|gate_up_proj|c_fc)|(?<!attention\.)\bintermediate\.dense)\.weight$",
}


def header(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor names and shapes, by the format's definition alone."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    assert len(data) == 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def measured(folder: Path, family: str, head_dim: int) -> dict[str, int]:
    """Return the sizes that the tensors of a uniform model show."""
    found: dict[str, set[Any]] = {part: set() for part in (*NAMES, "layer")}
    for name, shape in header(folder).items():
        number = re.search(r"(?:layers|layer|h)\.(\d+)\.", name)
        if number:
            found["layer"].add(int(number[1]))
        for part, pattern in NAMES.items():
            if re.search(pattern, name):
                found[part].add(shape[::-1] if family == "gpt2" and part != "embedding" else shape)
    assert found["layer"] == set(range(len(found["layer"]))), "layers are numbered from 0 without a hole"
    assert all(len(found[part]) == 1 for part in ("embedding", "query", "ffn")), found
    (vocabulary, hidden), (query, _), (ffn, _) = (found[part].pop() for part in ("embedding", "query", "ffn"))
    sizes = {"hidden": hidden, "vocabulary": vocabulary, "layers": len(found["layer"]), "head_dim": head_dim}
    sizes["ffn"] = ffn // 2 if family == "phi3" else ffn
    if family == "phi3":  # queries, keys and values in one matrix; its output matrix tells the queries
        inner = next(
            s[1] for n, s in header(folder).items() if n.endswith("layers.0.self_attn.o_proj.weight")
        )
        return {**sizes, "heads": inner // head_dim, "groups": (query - inner) // (2 * head_dim)}
    if family == "gpt2":
        return {**sizes, "heads": query // (3 * head_dim), "groups": query // (3 * head_dim)}
    return {**sizes, "heads": query // head_dim, "groups": found["key"].pop()[0] // head_dim}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def kept_layers(folder: Path) -> list[int]:
    layers = json.loads((folder / "pruning.json").read_text())["layers"]
    return [number for number, layer in enumerate(layers) if layer is not None]


def head_dim_of(config: dict[str, Any]) -> int:
    heads = config.get("num_attention_heads") or config["n_head"]
    return config.get("head_dim") or (config.get("hidden_size") or config["n_embd"]) // heads


def compare(folder: Path, source: Path, family: str) -> dict[str, int]:
    """Compare every key of config.json: sizes with the shapes, everything else with the source."""
    config, before = config_of(folder), config_of(source)
    sizes = measured(folder, family, head_dim_of(before))
    size_keys = {key: sizes[what] for what, keys in SIZES.items() for key in keys}
    for key, value in config.items():
        if key in size_keys and value is not None:
            assert value == size_keys[key], key
        elif key not in (*PER_LAYER, "architectures", "model_type"):
            assert value == before[key], key
    assert not before.keys() - config.keys() - {"attention_bias", "mlp_bias", "pretraining_tp"}
    if sizes["heads"] * sizes["head_dim"] != sizes["hidden"]:
        assert config["head_dim"] == sizes["head_dim"], "the class would divide hidden_size by the heads"
    assert sizes["heads"] % sizes["groups"] == 0
    return sizes


WIDTH = ("--method", "width", "--criterion", "magnitude", "--sparsity", 0.34)


@pytest.mark.parametrize("family", DENSE)
def test_E5_heads_and_channels_of_every_family(family, scratch, prune, stock):
    source = runs.tiny(family, scratch / "model")
    cut = "heads,ffn" if family in STOCK_HEADS else "ffn"
    ran = prune(source, *WIDTH, "--structures", cut, "-o", scratch / "out")
    assert ran.code == 0, ran.err
    stock(scratch / "out")
    sizes = compare(scratch / "out", source, family)
    before = measured(source, family, head_dim_of(config_of(source)))
    assert sizes["ffn"] == (128 if before["ffn"] > 128 else 32) and sizes["ffn"] % 8 == 0
    if family in STOCK_HEADS:
        assert (sizes["heads"], sizes["groups"]) == (4, 2)


TWINS = ("mixtral", "qwen2_moe", "olmoe", "granitemoe", "deepseek_v2")
"""Families whose layers are described as those of another one here."""


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in TWINS else f for f in (*DENSE, *ROUTED, *LATENT)]
)  # fmt: skip
def test_E5_layers_of_every_family(family, scratch, prune, stock):
    source = runs.tiny(family, scratch / "model")
    before = config_of(source)
    count = before.get("num_hidden_layers") or before["n_layer"]
    ran = prune(source, "--method", "depth", "--criterion", "uniform", "--keep-layers", count - 1, "-o", scratch / "out")  # fmt: skip
    assert ran.code == 0, ran.err
    out, kept = scratch / "out", kept_layers(scratch / "out")
    assert len(kept) == count - 1
    found = stock(out)
    if before.get("layer_types"):
        assert found["layer_types"] == [before["layer_types"][layer] for layer in kept]
    if family in DENSE:
        assert compare(out, source, family)["layers"] == count - 1
    if "mlp_only_layers" in before:
        dense = [at for at, layer in enumerate(kept) if layer in before["mlp_only_layers"]]
        assert config_of(out)["mlp_only_layers"] == dense
    # Whatever kept its number of layers in step: every kept layer is the source's, under its new number.
    old, new = header(source), header(out)
    pattern = re.compile(r"((?:layers|layer|h)\.)(\d+)\.")
    renumbered = {}
    for name, shape in old.items():
        number = pattern.search(name)
        if number is None or int(number[2]) in kept:
            at = "" if number is None else f"{number[1]}{kept.index(int(number[2]))}."
            renumbered[name if number is None else pattern.sub(lambda _, at=at: at, name, count=1)] = shape
    assert new == renumbered


MIXED = {
    # The class's own default for three layers is another list; the middle layer goes.
    "gemma3_text": ({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, ()),
    # As on the hub: no list, but a rule that layers from this number on have a window.
    "qwen2": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, ("layer_types",)),
}


def mixed(family: str, folder: Path) -> tuple[Path, list[str]]:
    """Return a model whose layers differ in their windows, and what each layer is."""
    source = runs.tiny(family, folder)
    added, gone = MIXED[family]
    config = {k: v for k, v in config_of(source).items() if k not in gone} | added
    (source / "config.json").write_text(json.dumps(config))
    kinds = config.get("layer_types") or ["full_attention"] * 2 + ["sliding_attention"]
    return source, kinds


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("cut", ["heads", "ffn", "layers"])
def test_E5_lists_by_layer_are_cut_in_step(family, cut, scratch, prune, stock):
    source, kinds = mixed(family, scratch / "model")
    how = ("--method", "depth", "--criterion", "uniform", "--keep-layers", 2) if cut == "layers" else (*WIDTH, "--structures", cut)  # fmt: skip
    ran = prune(source, *how, "-o", scratch / "out")
    assert ran.code == 0, ran.err
    kept = kept_layers(scratch / "out")
    assert kept == ([0, 2] if cut == "layers" else [0, 1, 2])
    found = stock(scratch / "out")
    assert found["layer_types"] == [kinds[layer] for layer in kept]
    compare(scratch / "out", source, family)


@pytest.mark.parametrize("family", MIXED)
def test_E5_sizes_by_layer_and_lists_agree_with_the_shapes(family, scratch, prune, stock):
    source, kinds = mixed(family, scratch / "model")
    ran = prune(source, "--sparsity", 0.4, "--layout", "per-layer", "--search", "dp", "-o", scratch / "out")  # fmt: skip
    assert ran.code == 0, ran.err
    out, before = scratch / "out", config_of(source)
    config, shapes = config_of(out), header(out)
    size = head_dim_of(before)
    kept = kept_layers(out)
    assert config["num_hidden_layers"] == len(config["block_configs"]) == len(kept)
    for layer, block in enumerate(config["block_configs"]):
        prefix = f"model.layers.{layer}."
        attention, ffn = block["attention"], block["ffn"]
        for name, key in (
            ("q", "num_attention_heads"),
            ("k", "num_key_value_heads"),
            ("v", "num_key_value_heads"),
        ):
            rows = shapes.get(f"{prefix}self_attn.{name}_proj.weight", (0,))[0]
            assert rows == (0 if attention["no_op"] else attention[key] * size), (layer, name)
        width = 0 if ffn["no_op"] else ffn["intermediate_size"]
        assert shapes.get(f"{prefix}mlp.gate_proj.weight", (0,))[0] == width
    assert len({json.dumps(block) for block in config["block_configs"]}) > 1, "all layers came out alike"
    assert config["head_dim"] == size
    assert stock(out, trust=True)["layer_types"] == [kinds[layer] for layer in kept]


def test_D8_a_pruned_file_holds_the_slices_alone(scratch, prune):
    source = runs.tiny("llama", scratch / "model")
    assert prune(source, *WIDTH, "-o", scratch / "out").code == 0
    stored = sum(4 * torch.Size(shape).numel() for shape in header(scratch / "out").values())
    file = scratch / "out" / "model.safetensors"
    assert file.stat().st_size - stored < 8192 and stored < (source / "model.safetensors").stat().st_size


# ---- E6: layers of different sizes -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phi", "gpt2", "bert", "mixtral"])
def test_E6_a_family_without_a_per_layer_reader_is_refused_before_any_work(family, scratch, prune, monkeypatch):  # fmt: skip
    source = runs.tiny(family, scratch / "model")
    with model_stays_still(monkeypatch):
        ran = prune(
            source, "--method", "ziplm", "--sparsity", 0.4, "--layout", "per-layer", "-o", scratch / "out"
        )
    assert ran.code == 3 and "error[E327]" in ran.err, ran.err
    assert f"no program loads {family} models with layers of different sizes" in ran.err
    assert "--layout uniform" in ran.err and ", ".join(per_layer.FAMILIES) in ran.err
    assert not (scratch / "out").exists() and not (scratch / "out.work").exists()


def test_E6_a_cut_that_is_not_uniform_is_refused_where_stock_is_asked_for():
    checkpoint, structure = opened("llama")
    uneven = Cut((LayerCut(None, tuple(range(20))), LayerCut(), LayerCut()))
    with pytest.raises(UsageError) as refused:
        check(uneven, structure, checkpoint.config or {}, for_stock=True)
    assert refused.value.code == "E263" and refused.value.exit_code == 2
    assert "no stock llama class can hold" in refused.value.message
    assert "--layout per-layer" in (refused.value.help or "")
    check(
        groups_cut(structure), structure, checkpoint.config or {}, for_stock=True
    )  # alike: nothing to refuse


def test_E6_what_loads_a_per_layer_result_is_named_and_the_result_is_marked(scratch, prune, monkeypatch):
    source = runs.tiny("llama", scratch / "model")
    given = ("--sparsity", 0.3, "--protect-layers", 0, "--search", "dp")
    with model_stays_still(monkeypatch):
        refused = prune(source, *given, "-o", scratch / "out")
    assert (
        refused.code == 2 and "all layers shrink alike" in refused.err and "--layout per-layer" in refused.err
    )
    ran = prune(source, *given, "--layout", "per-layer", "-o", scratch / "out")
    assert ran.code == 0, ran.err
    config = config_of(scratch / "out")
    assert config["model_type"] == "surgeon_llama" and config["architectures"] == ["SurgeonLlamaForCausalLM"]
    (line,) = [line for line in ran.out.splitlines() if "loads in" in line]
    verdicts = {one.runtime: one for one in runtimes.readers(config)}
    assert set(verdicts) == set(runtimes.RUNTIMES)
    for name, one in verdicts.items():
        assert (name in line) == one.loads, line
        assert one.loads or one.reason
    assert "transformers (folder with code)" in line
    assert "trust_remote_code=True" in (scratch / "out" / "README.md").read_text()


# ---- G2: code beside a model -------------------------------------------------------------------------


@pytest.fixture
def trapped(scratch) -> tuple[Path, Path]:
    """Return a model whose code writes a file when it is imported, and that file."""
    folder, marker = runs.small(scratch / "model"), scratch / "executed"
    code = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "auto_map": code}))
    file = folder / "tokenizer_config.json"
    own = {**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["modeling_x.T", None]}}
    file.write_text(json.dumps(own))
    (folder / "modeling_x.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    return folder, marker


COMMANDS = {
    "prune by depth": ("prune", "MODEL", "--method", "depth", "--criterion", "uniform", "--keep-layers", 3, *SHORT, "--calibration", "TEXT", "-o", "OUT"),
    "prune by ziplm": ("prune", "MODEL", "--sparsity", 0.3, "--structures", "heads,ffn", "--search", "dp",
                       *SHORT, "--calibration", "TEXT", "-o", "OUT"),
    "prune weights": ("prune", "MODEL", "--method", "wanda", "--sparsity", 0.5, *SHORT, "--calibration", "TEXT", "-o", "OUT"),
    "measure": ("measure", "MODEL", "--mode", "prefill", "--context", 8, "--repeat", 3, "--threads", 1),
    "measure memory": ("measure", "MODEL", "--mode", "memory", "--workload", "prefill", "--context", 8, "--threads", 1),
    "measure a table": ("measure", "MODEL", "--mode", "table", "--workload", "prefill", "--context", 8, "--repeat", 3,
                        "--round-to", 432, "--threads", 1),
    "export": ("export", "MODEL", "-o", "OUT"),
    "export gguf": ("export", "MODEL", "--to", "gguf", "--no-check", "-o", "OUT.gguf"),
    "verify": ("verify", "MODEL"),
    "verify by loading": ("verify", "MODEL", "--load", "--generate"),
    "eval": ("eval", "MODEL", "--perplexity", "TEXT"),
    "inspect": ("inspect", "MODEL"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("measure memory", "verify by loading") else n
        for n in COMMANDS
    ],
)
def test_G2_code_beside_a_model_is_not_run(name, trapped, scratch, text, capsys):
    folder, marker = trapped
    places = {"MODEL": folder, "TEXT": text, "OUT": scratch / "out", "OUT.gguf": scratch / "out.gguf"}
    ran = runs.command(capsys, *(places.get(word, word) for word in COMMANDS[name]))
    assert not marker.exists()
    assert ran.code in (0, 3), ran.err
    if ran.code == 3:
        assert "which is not run" in ran.err


def test_G2_the_trap_works(trapped):
    folder, marker = trapped
    transformers = pytest.importorskip("transformers")
    with pytest.raises(AttributeError):  # it has no class C, which shows only after it was run
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


# ---- J5: Hessians that cannot be inverted ------------------------------------------------------------


def singular(columns: int = 24, tokens: int = 7) -> torch.Tensor:
    """Return the mean of x x' over fewer tokens than columns."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3))
    return (x.T @ x / tokens).to(torch.float32)


def weight(columns: int = 24) -> torch.Tensor:
    return torch.randn(10, columns, generator=torch.Generator().manual_seed(4))


def schedule(damp: float) -> list[float]:
    """Return the dampings that may be tried: as given, then ten times more, four times, from 1e-5 at least."""
    return [damp, *(max(damp, 1e-5) * 10**step for step in range(1, 5))]


def test_J5_damping_escalates_on_a_fixed_schedule_and_is_recorded():
    fine = removal_order(weight(), singular(), damp=1e-2)
    assert (fine.damp, fine.escalated) == (1e-2, False)
    bad = singular() - 1e-3 * torch.eye(24)  # eigenvalues of -1e-3: a float32 sum can come out like that
    assert torch.linalg.eigvalsh(bad.double()).min() < -9e-4
    raised = removal_order(weight(), bad, damp=1e-5)
    assert raised.escalated and raised.damp in schedule(1e-5)
    smallest = float(torch.linalg.eigvalsh(bad.double()).min())
    mean = float(bad.diagonal().mean())
    assert raised.damp * mean > -smallest, "this much is needed"
    before = schedule(1e-5)[schedule(1e-5).index(raised.damp) - 1]
    assert before * mean < -smallest, "and the step before was not enough"
    assert sorted(raised.order.tolist()) == list(range(24))
    assert torch.isfinite(torch.from_numpy(raised.errors)).all()


def test_J5_constant_and_dead_channels_are_ranked_and_solved():
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(5))
    x[:, 3], x[:, 8], x[:, 9] = 0, 2.0, 2.0  # one is never active, two are constant and equal
    hessian = x.T @ x / 200
    found = removal_order(weight(), hessian)
    assert found.dead == 1 and found.order[0] == 3 and found.errors[1] == 0
    assert sorted(found.order.tolist()) == list(range(24))
    kept = [column for column in range(24) if column not in (3, 8)]
    solved = solve(weight(), hessian, kept)
    # The twin takes over: what is lost is next to nothing.
    lost = x[:, kept] @ solved.T - x @ weight().T
    assert float(lost.norm() / (x @ weight().T).norm()) < 0.02
    assert dead_inputs(hessian).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("step", ["ranking", "solving"])
def test_J5_the_final_failure_names_the_module_and_the_way_out(step):
    hopeless = singular() - 1e3 * torch.ones(24, 24)
    hopeless.fill_diagonal_(1.0)
    with pytest.raises(InputError) as refused:
        if step == "ranking":
            removal_order(weight(), hopeless, module="model.layers.7.mlp.down_proj")
        else:
            solve(weight(), hopeless, range(0, 24, 2), module="model.layers.7.mlp.down_proj")
    error = refused.value
    assert error.code == "E314" and error.exit_code == 3
    assert (
        "model.layers.7.mlp.down_proj" in error.message and f"damping {schedule(1e-2)[-1]:g}" in error.message
    )
    assert "more" in (error.help or "") and "calibration samples" in (error.help or "")


def test_J5_what_was_raised_is_recorded_by_module(scratch):
    checkpoint, structure = opened("llama")
    samples = [torch.arange(3 + n, 8 + n).numpy() for n in range(2)]  # 10 tokens, 48 columns
    found = database.build(checkpoint, structure, samples, Settings(), folder=scratch / "work", structures=("ffn",), damp=1e-12)  # fmt: skip
    modules = found.record["modules"]
    raised = {name: entry["channels"] for name, entry in modules.items() if "channels" in entry}
    assert len(raised) == 3 and all(entry["tokens"] == 10 for entry in modules.values())
    for entry in raised.values():
        assert entry["escalated"] and entry["damp"] in schedule(1e-12)
    assert any(note.startswith("damping had to be raised in ") for note in found.notes)


# ---- J6: targets out of reach ------------------------------------------------------------------------

UNREACHABLE = {
    "speedup": ("--target-speedup", 50),
    "speedup per layer": ("--target-speedup", 50, "--layout", "per-layer"),
    "one of several": ("--target-speedup", "1.3,50"),
    "params": ("--target-params", "1K"),
    "size": ("--target-size", "1KB"),
    "sparsity": ("--sparsity", 0.999),
    "width": ("--method", "width", "--criterion", "magnitude", "--target-params", "1K"),
    "depth in speed": ("--method", "depth", "--target-speedup", 50),
    "depth in params": ("--method", "depth", "--target-params", "1K"),
    "too few layers": ("--method", "depth", "--keep-layers", 1),
    "too large a share of layers": ("--method", "depth", "--sparsity", 0.9),
    "more than there is": ("--target-params", "3B"),
    "no fewer layers": ("--method", "depth", "--keep-layers", 4),
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_J6_a_target_out_of_reach_is_refused_before_the_model_is_run(name, scratch, prune, machine, monkeypatch):  # fmt: skip
    source = runs.small(scratch / "model")
    with model_stays_still(monkeypatch):
        ran = prune(source, *UNREACHABLE[name], "-o", scratch / "out")
    assert ran.code == 2 and "error[E264]" in ran.err, ran.err
    assert re.search(
        r"(between \S+.* and \S+|\d to \d|a share from [\d.]+ to [\d.]+|down to [\d.]+)", ran.err
    ), ran.err
    assert not machine.timed and not (scratch / "out").exists()


@pytest.mark.parametrize(
    ("option", "layout"),
    [*((f"--{name}", layout) for name in ("target-speedup", "target-params", "target-size") for layout in ("uniform", "per-layer")),
     ("--sparsity", "uniform")],  # per layer every attention and FFN may go
)  # fmt: skip
def test_J6_the_end_of_the_range_can_be_asked_for(option, layout, scratch, prune, machine, monkeypatch):
    source = runs.small(scratch / "model")
    beyond = {"--target-speedup": 50, "--target-params": "1K", "--target-size": "1KB", "--sparsity": 0.9999}
    with model_stays_still(monkeypatch):
        ran = prune(source, option, beyond[option], "--layout", layout, "-o", scratch / "out", "--work", scratch / "work")  # fmt: skip
        end = re.search(r"(?:at most|at least) ([\d.,]+)(x|%| parameters| MB)", ran.err)
        assert ran.code == 2 and end, ran.err
        number, unit = float(end[1].replace(",", "")), end[2]
        asked = f"{number + 0.05:.2f}MB" if unit == " MB" else str(number / 100 if unit == "%" else number)
        ran = prune(source, option, asked, "--layout", layout, "-o", scratch / "out", "--work", scratch / "work", "--dry-run")  # fmt: skip
    assert ran.code == 0, ran.err


# ---- J7: latency tables of elsewhere -----------------------------------------------------------------

EDITS = {
    "another device": (
        {"device_name": "Another processor"},
        "device name Another processor there, Made up here",
    ),
    "another kind of device": ({"device": "cuda"}, "device cuda there, cpu here"),
    "another torch": ({"torch": "1.13.1"}, "torch version 1.13.1 there, 2.13 here"),
    "another transformers": ({"transformers": "4.0"}, "transformers version 4.0 there, 5.23 here"),
    "more threads": ({"threads": 64}, "threads 64 there, 1 here"),
}


def table_file(source: Path, path: Path, machine: runs.Machine, **environment: Any) -> Path:
    """Write a latency table of the made-up machine, its environment edited."""
    from surgeon.checkpoint.checkpoint import open_path
    from surgeon.measure.differencing import Levels
    from surgeon.structure.find import structure_of

    structure = structure_of(open_path(source))
    levels = Levels.of(structure, attention="groups", multiple=8)
    table = machine.measure_table(config_of(source), structure, Workload("mix"), levels, None)
    machine.tables = 0
    document = table.document()
    document["environment"] |= environment
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("name", EDITS)
def test_J7_a_table_of_another_environment_is_refused(name, scratch, prune, machine, monkeypatch):
    source = runs.small(scratch / "model")
    changed, said = EDITS[name]
    table = table_file(source, scratch / "table.json", machine, **changed)
    with model_stays_still(monkeypatch):
        ran = prune(source, "--target-speedup", 1.3, "--latency-table", table, "-o", scratch / "out")
    assert ran.code == 5 and "error[E516]" in ran.err, ran.err
    assert said in ran.err and str(table) in ran.err and "--table-anyway" in ran.err
    assert not (scratch / "out").exists() and machine.tables == 0


def test_J7_a_table_of_elsewhere_is_used_on_request_and_noted(scratch, prune, machine):
    source = runs.small(scratch / "model")
    table = table_file(source, scratch / "table.json", machine, torch="1.13.1")
    ran = prune(source, "--target-speedup", 1.3, "--latency-table", table, "--table-anyway",
                "--structures", "heads,ffn", "--search", "dp", "--json", "-o", scratch / "out")  # fmt: skip
    assert ran.code == 0, ran.err
    assert machine.tables == 0, "nothing was measured in its place"
    (note,) = [n for n in ran.document["table"]["notes"] if n.endswith("used anyway")]
    assert "torch version 1.13.1 there, 2.13 here" in note
    recipe = json.loads((scratch / "out" / "surgeon.json").read_text())["recipe"]
    assert recipe["request"]["table_anyway"] is True
    # What counts was still measured, on the saved and reloaded model.
    assert ran.document["members"][0]["speedup"]["measured"] == pytest.approx(machine.timed[-1][1])


def test_J7_a_table_kept_in_the_work_folder_is_measured_again_elsewhere(scratch, prune, machine):
    source, work = runs.small(scratch / "model"), scratch / "work"
    given = (source, "--target-speedup", 50, "--work", work, "-o", scratch / "out")
    assert prune(*given).code == 2 and machine.tables == 1
    assert prune(*given).code == 2 and machine.tables == 1, "the table is kept"
    (kept,) = (work / "prune").glob("table-*.json")
    document = json.loads(kept.read_text())
    document["environment"]["torch"] = "1.13.1"
    kept.write_text(json.dumps(document))
    assert prune(*given).code == 2 and machine.tables == 2
    assert json.loads(kept.read_text())["environment"]["torch"] == "2.13"
