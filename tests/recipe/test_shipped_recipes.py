"""Every recipe that comes with surgeon is valid, stands in the index, and does what it says on small models.

The runs set what people set (models and texts), and what small models force: fewer and shorter texts, sizes in place of
gigabytes, widths in steps of 8. Times of the quick run and of the family come from a made-up machine, whose speedups are exact;
one recipe is timed for real, where either verdict of its gates is right.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import catalogue_models as small
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))
import pruning_runs

from surgeon.checkpoint.checkpoint import open_path
from surgeon.kernels.cast import widen
from surgeon.pipeline.digests import intact
from surgeon.pipeline.run import run
from surgeon.recipe import native
from surgeon.recipe.shipped import GOALS, shipped
from surgeon.verify.static import verify_path

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = {one.name: one for one in shipped() if one.kind != "long-to-short"}
LONG, SHORT = small.MODELS / "long", small.MODELS / "short"

Document = dict[str, Any]


# ---- what the recipes say about themselves ------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_recipe_is_valid_and_explains_itself(name):
    one = CATALOGUE[name]
    recipe = native.read(one.file)
    assert recipe.name == name and one.goal == GOALS[one.kind]
    assert recipe.description == one.summary and not recipe.warnings
    assert recipe.gates and recipe.publish is not None
    text = one.file.read_text()
    assert f"#   surgeon recipe copy {name} my.yaml\n#   surgeon run my.yaml -o " in text
    assert all(f"--set models.{model}=" in text for model in recipe.models)
    assert max(map(len, text.splitlines())) <= 130


def test_names_are_unique_and_folders_have_a_goal():
    found = shipped()
    assert len({one.name for one in found}) == len(found)
    assert list(dict.fromkeys(one.kind for one in found)) == list(GOALS)


def test_the_index_has_every_recipe_with_its_own_words():
    text = (ROOT / "recipes" / "README.md").read_text()
    rows = re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \| (.+?) \|", text, re.MULTILINE)
    told = {name: (place, said) for name, place, said in rows if not place.startswith("long-to-short/")}
    assert told == {one.name: (f"{one.kind}/{one.name}.yaml", one.summary) for one in CATALOGUE.values()}
    assert [name for name, *_ in rows if name in CATALOGUE] == list(CATALOGUE), "in the order of the list"


# ---- what runs need -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Texts: worked.jsonl and plain.jsonl for two domains, each with held-out ones beside it; questions."""
    folder = tmp_path_factory.mktemp("catalogue")
    for name, style in small.STYLES.items():
        small.exchanges(folder / f"{name}.jsonl", 24, style)
        small.exchanges(folder / f"{name}-held.jsonl", 8, style, split="test")
    small.questions(folder / "questions.jsonl", 16)
    return folder


@pytest.fixture(scope="module")
def mixture(place) -> Path:
    return small.mixture(place / "mixture")


@pytest.fixture(scope="module")
def even(place) -> Path:
    return small.even(place / "even")


@dataclass(frozen=True)
class Case:
    """How a recipe is run and what its result must be.

    Attributes:
        model: which models take the place of the recipe's.
        set: further values; {place} is the folder of texts.
        check: looks at the published model and the document.
        machine: times come from a made-up machine.
        either: the gates may fail, for times of a model this small are noise; everything else may not.
    """

    model: str
    set: tuple[str, ...]
    check: Callable[[Path, Document], None]
    machine: bool = False
    either: bool = False


def texts(step: str, verb: str) -> tuple[str, ...]:
    """Return settings of a step that calibrates."""
    return (f"steps.{step}.{verb}.calibration={{place}}/worked.jsonl", *short(step, verb))


def short(step: str, verb: str) -> tuple[str, ...]:
    return f"steps.{step}.{verb}.samples=8", f"steps.{step}.{verb}.sequence_length=96"


PRUNED, QUANTIZED = texts("pruned", "prune"), texts("quantized", "quantize")
SCORES = ("steps.scores.eval.perplexity={place}/worked-held.jsonl", "steps.scores.eval.sequence_length=256")
AGAINST = (*SCORES, "steps.scores.eval.text={place}/worked-held.jsonl")
FINE = ("steps.pruned.prune.round_to=8",)
TIMED = (
    *FINE,
    "steps.pruned.prune.context=32",
    "steps.pruned.prune.generate=4",
    "steps.pruned.prune.tolerance=0.3",
)


# ---- what results are ---------------------------------------------------------------------------------


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def expert_count(folder: Path) -> int:
    said = config(folder)
    return int(said.get("num_experts") or said["num_local_experts"])


def schemes(folder: Path) -> dict[str, str]:
    return json.loads((folder / "plan.json").read_bytes())["matrices"]


def value(document: Document, step: str, metric: str) -> float:
    return document["results"][step][metric]


def tensors(folder: Path) -> int:
    return sum(info.nbytes for info in open_path(folder).tensors.values())


def faster(least: float) -> Callable[[Path, Document], None]:
    def check(out: Path, document: Document) -> None:
        assert value(document, "pruned", "speedup") >= least
        narrow, wide = config(out), config(LONG)
        assert narrow["model_type"] == wide["model_type"]
        assert (narrow["intermediate_size"], narrow["num_attention_heads"], narrow["num_hidden_layers"]) != (
            wide["intermediate_size"], wide["num_attention_heads"], wide["num_hidden_layers"],
        )  # fmt: skip

    return check


def family(out: Path, document: Document) -> None:
    speeds = [point["results"]["pruned"]["speedup"] for point in document["points"]]
    assert speeds == pytest.approx([1.3, 1.5, 2.0], rel=0.04)
    sizes = [pruning_runs.parameters_in(out / point["name"]) for point in document["points"]]
    assert [point["name"] for point in document["points"]] == ["speedup=1.3", "speedup=1.5", "speedup=2"]
    assert sizes[0] > sizes[1] > sizes[2]


def shallow(out: Path, document: Document) -> None:
    assert config(out)["num_hidden_layers"] == 3 and config(LONG)["num_hidden_layers"] == 4


def of_parameters(out: Path, document: Document) -> None:
    assert 950_000 < pruning_runs.parameters_in(out) <= 1_000_000


def of_size(out: Path, document: Document) -> None:
    assert 1_900_000 < tensors(out) <= 2_000_000


def two_of_four(out: Path, document: Document) -> None:
    pruned, dense = open_path(out), open_path(LONG)
    for name, info in pruned.tensors.items():
        values = widen(pruned.read(name, 0, info.elements), info.dtype)
        assert info.shape == dense.tensors[name].shape
        if "_proj.weight" in name:
            assert ((values.reshape(-1, 4) != 0).sum(1) <= 2).all(), name
            assert np.mean(values != 0) > 0.45, name


def experts(kept: int, width: int = 64) -> Callable[[Path, Document], None]:
    def check(out: Path, document: Document) -> None:
        assert expert_count(out) == kept
        found = {int(n) for name in open_path(out).tensors for n in re.findall(r"experts\.(\d+)\.", name)}
        assert found == set(range(kept)) and config(out)["moe_intermediate_size"] == width

    return check


def four_bits(out: Path, document: Document) -> None:
    found = schemes(out)
    assert found and {scheme[:4] for scheme in found.values()} == {"int4"}
    assert config(out)["quantization_config"]["quant_method"] == "compressed-tensors"
    assert 4 < value(document, "quantized", "bits") < 4.6


def floats(out: Path, document: Document) -> None:
    assert set(schemes(out).values()) == {"float8"}
    stored = {info.dtype for info in open_path(out).tensors.values()}
    assert "F8_E4M3" in stored


def gguf_file(out: Path, document: Document) -> None:
    gguf = pytest.importorskip("gguf")
    found = {str(t.name): t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    linear = {name: kind for name, kind in found.items() if re.search(r"(attn_[qkv]|attn_output|ffn_\w+)\.weight", name) and "norm" not in name}  # fmt: skip
    assert len(linear) == 14 and set(linear.values()) == {"Q4_0"}
    assert out.with_name(f"{out.name}.surgeon.json").is_file()


def nf4(out: Path, document: Document) -> None:
    said = config(out)["quantization_config"]
    assert said["load_in_4bit"] and said["bnb_4bit_quant_type"] == "nf4" and said["bnb_4bit_use_double_quant"]


def fits(size: int, share: float) -> Callable[[Path, Document], None]:
    def check(out: Path, document: Document) -> None:
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert share * size < written <= size

    return check


def mixed_to_size(out: Path, document: Document) -> None:
    fits(800_000, 0.97)(out, document)
    assert len(set(schemes(out).values())) > 1


def mixed_bits(out: Path, document: Document) -> None:
    assert 4.1 < value(document, "quantized", "bits") <= 4.25 and len(set(schemes(out).values())) > 1


def close(out: Path, document: Document) -> None:
    assert value(document, "quantized", "kl") < 0.02 and value(document, "quantized", "bits") < 8


def by_expert(out: Path, document: Document) -> None:
    found: dict[int, list[int]] = {}
    for name, scheme in schemes(out).items():
        layer = re.search(r"layers\.(\d+)\..*experts\.", name)
        if layer:
            found.setdefault(int(layer[1]), []).append(int(scheme[3]))
    assert sorted(found) == [0, 1, 2]
    for widths in found.values():
        assert 2.3 < np.mean(widths) <= 2.5 and len(set(widths)) > 1


def fewer_with_fewer(out: Path, document: Document) -> None:
    fits(220_000, 0.8)(out, document)
    assert 2 <= expert_count(out) < 8


def merged_small(out: Path, document: Document) -> None:
    four_bits(out, document)
    names = set(open_path(out).tensors)
    assert any(name.endswith("weight_packed") for name in names)
    template = "chat_template.jinja"
    assert (out / template).read_text() == (LONG / template).read_text()


def pruned_small(out: Path, document: Document) -> None:
    four_bits(out, document)
    assert config(out)["intermediate_size"] < config(LONG)["intermediate_size"] or (
        config(out)["num_hidden_layers"] < config(LONG)["num_hidden_layers"]
    )


def experts_small(out: Path, document: Document) -> None:
    four_bits(out, document)
    experts(6)(out, document)


def three_steps(out: Path, document: Document) -> None:
    four_bits(out, document)
    assert value(document, "pruned", "parameters") < value(document, "merged", "parameters")


def shorter(out: Path, document: Document) -> None:
    """Of six points some pass; each one's answers are known, and the report marks the Pareto front."""
    assert len(document["points"]) == 6
    for point in document["points"]:
        assert point["published"] == point["passed"] == (out / point["name"]).is_dir()
        scores = point["results"]["scores"]
        before = next(gate for gate in point["gates"] if gate["metric"] == "tokens_mean")["baseline"]
        wanted = scores["accuracy"] >= 1 - 0.02 and scores["tokens_mean"] <= 0.9 * before
        assert point["passed"] == wanted, point["name"]
    assert any(point["passed"] for point in document["points"])
    told = (out.with_name(f"{out.name}.work") / "report.html").read_text()
    for point in document["points"]:
        assert point["name"] in told
    assert "On the Pareto front" in told


CASES = {
    "prune-decode-1.5x": Case("dense", (*PRUNED, *FINE), faster(1.45), machine=True),
    "prune-family-of-speedups": Case("dense", (*PRUNED, *FINE), family, machine=True),
    "prune-drop-layers": Case("dense", PRUNED, shallow),
    "prune-to-parameters": Case("dense", (*PRUNED, "steps.pruned.prune.target.params=1M"), of_parameters),
    "prune-to-size": Case("dense", (*PRUNED, "steps.pruned.prune.target.size=2MB"), of_size),
    "sparse-2-of-4": Case("dense", PRUNED, two_of_four),
    "experts-half-for-one-domain": Case("mixture", (
        "data.demonstrations.file={place}/plain.jsonl", "data.demonstrations.samples=8", "data.held-out.file={place}/plain-held.jsonl",
    ), experts(4)),
    "experts-75-percent-over-domains": Case("mixture", (
        "steps.pruned.prune.calibration=[plain={place}/plain.jsonl, worked={place}/worked.jsonl]", *short("pruned", "prune"), *SCORES,
    ), experts(6)),
    "experts-narrower": Case("mixture", (*PRUNED, *SCORES), experts(8, 48)),
    "experts-fewer-with-fewer-bits": Case("mixture", (*texts("small", "quantize"), "steps.small.quantize.target.size=220kB"), fewer_with_fewer),
    "quantize-w4a16-gptq": Case("dense", (*QUANTIZED, *AGAINST), four_bits),
    "quantize-fp8-without-data": Case("dense", (*QUANTIZED, *AGAINST), floats),
    "quantize-gguf-q4": Case("even", texts("file", "quantize"), gguf_file),
    "quantize-nf4-bitsandbytes": Case("even", (*QUANTIZED, *AGAINST), nf4),
    "mixed-to-size": Case("dense", (*QUANTIZED, *AGAINST, "steps.quantized.quantize.target.size=800kB"), mixed_to_size),
    "mixed-to-average-bits": Case("dense", (*QUANTIZED, *AGAINST), mixed_bits),
    "mixed-to-divergence": Case("dense", (*QUANTIZED, *AGAINST), close),
    "mixed-experts-pmq": Case("mixture", QUANTIZED, by_expert),
    "merge-then-quantize": Case("pair", (*QUANTIZED, *SCORES), merged_small),
    "prune-then-quantize": Case("dense", (*PRUNED, *TIMED, *QUANTIZED, *SCORES), pruned_small, either=True),
    "prune-experts-then-quantize": Case("mixture", (*PRUNED, *QUANTIZED, *SCORES), experts_small),
    "merge-prune-quantize": Case("pair", (*PRUNED, *QUANTIZED, *AGAINST), three_steps),
    "long-to-short-sweep": Case("pair", ("steps.scores.eval.questions={place}/questions.jsonl", "steps.scores.eval.max_new_tokens=200"), shorter),
}  # fmt: skip

QUICK = ("prune-decode-1.5x", "experts-half-for-one-domain", "quantize-gguf-q4")
NEEDS = {"quantize-nf4-bitsandbytes": "bitsandbytes", "quantize-gguf-q4": "gguf", "mixed-experts-pmq": "auto_round",
         "experts-fewer-with-fewer-bits": "auto_round"}  # fmt: skip
"""Recipe -> package its reader needs."""


def models(case: Case, request: pytest.FixtureRequest) -> list[str]:
    if case.model == "pair":
        return [f"models.long={LONG}", f"models.short={SHORT}"]
    if case.model == "mixture":
        return [f"models.mixture={request.getfixturevalue('mixture')}"]
    return [f"models.model={LONG if case.model == 'dense' else request.getfixturevalue('even')}"]


def test_every_recipe_has_a_run():
    assert set(CASES) == set(CATALOGUE) and set(QUICK) < set(CASES)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_recipe_does_what_it_says(name, place, scratch, request, monkeypatch):
    case = CASES[name]
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if case.machine:
        pruning_runs.install(monkeypatch, pruning_runs.Machine())
    file = shutil.copy(CATALOGUE[name].file, scratch / "my.yaml")
    out = scratch / ("out.gguf" if "gguf" in name else "out")
    settings = [*models(case, request), *(text.replace("{place}", str(place)) for text in case.set)]
    document = run(file, out, set=settings, threads=1)
    points = document["points"] or [document]
    for point in points:
        assert len(point["gates"]) == len(native.read(file).gates)
        for gate in point["gates"]:
            assert gate["value"] is not None and gate["threshold"] is not None, gate
    if case.either and document["status"] == "gate-failed":
        failed = [gate["gate"] for gate in document["gates"] if not gate["passed"]]
        assert document["exit_code"] == 4 and not document["published"] and not out.exists()
        assert {gate.partition(" ")[0] for gate in failed} <= {"pruned.speedup", "scores.perplexity", "bytes"}
        case.check(Path(document["steps"][1]["path"]), document)
        return
    assert document["status"] == "ok" and document["exit_code"] == 0, document["error"] or document["gates"]
    published = (
        [out / point["name"] for point in points if point["published"]] if document["points"] else [out]
    )
    assert published and document["published"]
    for folder in published:
        assert intact(folder) if folder.is_file() else verify_path(folder, hashes=True).errors == []
    case.check(out, document)
