"""When a kept measurement is used again: only if nothing that decides its numbers has changed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgeon.api import build_request
from surgeon.merge import measure
from surgeon.merge.adjustments import Adjustments, CalibrationSource
from surgeon.merge.layer_groups import MeasuredScores
from surgeon.merge.layer_scores import LayerScores
from surgeon.merge.prepare import Opening, open_models
from surgeon.merge.request import resolve

MODELS = Path(__file__).resolve().parents[1] / "models"
ADJUST = {
    "aim": Adjustments(aim=0.4), "acm": Adjustments(acm=0.7), "sens": Adjustments(sens=2.0), "fim": Adjustments(fim=True),
}  # fmt: skip


@dataclass
class Bench:
    """Two models, a text and a folder of measurements; ``calls`` and ``given`` say what was really measured, and on what."""

    folder: Path
    calls: list[str]
    given: list[tuple]

    def run(self, adjust: Adjustments, *, seed: int = 3, memory_limit: int | None = None, **calibration: Any):
        models = [str(self.folder / n) for n in ("long", "short")]
        spec = resolve(build_request(models=models, method="ties", base=models[1])).spec
        text = CalibrationSource(**{"sources": (str(self.folder / "text.jsonl"),), "samples": 6, "device": "cpu", **calibration})  # fmt: skip
        spec = replace(spec, adjust=adjust, calibration=text)
        opened = open_models(spec.models(), Opening())
        return measure.measure(spec, opened, self.folder / "work", seed=seed, memory_limit=memory_limit)

    def again(self, adjust: Adjustments, **changes: Any) -> bool:
        """Run once more; say whether it measured."""
        before = len(self.calls)
        self.run(adjust, **changes)
        return len(self.calls) > before

    def edit_config(self, model: str, **values: Any) -> None:
        file = self.folder / model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def edit_weights(self, model: str) -> None:
        file = min((self.folder / model).glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(0, 0))  # a clock too coarse to tell the two versions apart must not fail the test

    def write_text(self, count: int = 9, word: str = "add") -> None:
        records = [
            {"prompt": f"{word} {i} and {i + 1}", "short": f"{i}+1", "long": f"wait {i} + {i}, so {i}"}
            for i in range(count)
        ]
        (self.folder / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    """Measuring itself is replaced: what is tested is when it happens."""
    from surgeon.calibrate import statistics
    from surgeon.merge import acm, fim, sens

    made = Bench(tmp_path, [], [])
    for name in ("long", "short"):
        shutil.copytree(MODELS / name, tmp_path / name)
    made.write_text()
    scores = LayerScores({0: 0.5})

    def noted(name, result):
        def stand_in(*arguments, **options):
            made.calls.append(name)
            made.given.append(arguments)
            return result

        return stand_in

    module = "model.layers.0.self_attn.q_proj"
    found = statistics.Statistics("mean_absolute", {module: np.arange(160.0)}, {module: 10})
    monkeypatch.setattr(statistics, "collect", noted("aim", found))
    monkeypatch.setattr(acm, "measure", noted("acm", (scores, {})))
    monkeypatch.setattr(sens, "measure", noted("sens", MeasuredScores({"long": scores, "short": scores}, {})))
    monkeypatch.setattr(fim, "measure", noted("fim", MeasuredScores({"long": scores}, {})))
    return made


@pytest.mark.parametrize("name", ADJUST)
def test_the_same_run_measures_once(bench, name):
    first = bench.run(ADJUST[name])
    second = bench.run(ADJUST[name], memory_limit=1 << 40)  # where things lie does not change them
    assert bench.calls == [name]
    assert second.scores == first.scores
    if name == "aim":
        assert first.importance and all(
            np.array_equal(second.importance[n], v) for n, v in first.importance.items()
        )


@pytest.mark.parametrize("name", ADJUST)
def test_another_base_or_precision_is_measured_again(bench, name):
    bench.run(ADJUST[name])
    assert bench.again(ADJUST[name], dtype="bfloat16")
    bench.edit_weights("short")
    assert bench.again(ADJUST[name])
    bench.edit_config("short", rms_norm_eps=1e-3)
    assert bench.again(ADJUST[name])
    bench.edit_config("short", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert bench.again(ADJUST[name])
    assert not bench.again(ADJUST[name])


@pytest.mark.parametrize("name", ADJUST)
def test_the_other_model_counts_where_it_is_measured(bench, name):
    bench.run(ADJUST[name])
    bench.edit_weights("long")
    assert bench.again(ADJUST[name]) is (name != "aim")  # AIM looks at the base alone
    bench.edit_config("long", rms_norm_eps=1e-3)
    assert bench.again(ADJUST[name]) is (name != "aim")


@pytest.mark.parametrize(
    "change", [{"samples": 5}, {"sequence_length": 30}, {"template": False}, {"seed": 4}], ids=str
)
@pytest.mark.parametrize("name", ["aim", "acm", "sens"])
def test_other_tokens_are_measured_again(bench, name, change):
    plain = {"sequence_length": 40}  # a prompt and something of its answer
    bench.run(ADJUST[name], **plain)
    assert bench.again(ADJUST[name], **{**plain, **change})
    assert not bench.again(ADJUST[name], **plain)


@pytest.mark.parametrize("name", ["aim", "acm"])
def test_packed_text_is_other_text(bench, name):
    bench.run(ADJUST[name], sequence_length=16)
    assert bench.again(ADJUST[name], sequence_length=16, pack=True)


@pytest.mark.parametrize("name", ["aim", "acm", "sens"])
def test_a_text_of_the_same_name_with_other_words_is_measured_again(bench, name):
    bench.run(ADJUST[name])
    bench.write_text(word="sum")
    assert bench.again(ADJUST[name])


@pytest.mark.parametrize(
    ("first", "second", "measures"),
    [
        (Adjustments(aim=0.4), Adjustments(aim=0.2), False),  # omega comes after the measurement
        (Adjustments(acm=0.7), Adjustments(acm=1.2), True),
        (Adjustments(acm=0.7), Adjustments(acm=0.7, acm_estimator="binned"), True),
        (Adjustments(sens=2.0), Adjustments(sens=3.0), True),
        (Adjustments(sens=2.0), Adjustments(sens=2.0, delta_rank=0.5), False),
    ],
)
def test_a_setting_counts_where_it_changes_numbers(bench, first, second, measures):
    bench.run(first)
    assert bench.again(second) is measures


def test_the_seed_counts_for_random_tokens_and_text_does_not(bench):
    bench.run(ADJUST["fim"])
    bench.write_text(word="sum")
    assert not bench.again(ADJUST["fim"], samples=2)
    assert bench.again(ADJUST["fim"], seed=4)


def test_sens_of_a_pair_is_crossed(bench):
    """The long model reads the short answers, the short model the long ones (arXiv 2503.20641)."""
    from transformers import AutoTokenizer

    bench.run(ADJUST["sens"])
    experts, texts, *_ = bench.given[0]
    assert set(experts) == set(texts) == {"long", "short"}
    for model, word in (("long", "+1"), ("short", "wait")):
        tokenizer = AutoTokenizer.from_pretrained(bench.folder / model)
        assert experts[model].folder == bench.folder / model and len(texts[model].samples) == 6
        for sample in texts[model].samples:
            answer = tokenizer.decode(sample.ids[sample.answer_start :])
            assert (word in answer) and ("wait" in answer) is (model == "short"), answer
