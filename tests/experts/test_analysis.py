"""The analysis of routing as a whole: against routers written as plain loops, and under every way of running it."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import threading
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prune"))
from expert_folders import EXPERTS, edited, moe_folder, opened
from routing_oracle import routing

from surgeon.calibrate.data import Sample
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.experts.analysis import analyse, analyse_texts, analyse_weights, risk
from surgeon.experts.cognitive import Marker
from surgeon.experts.locality import Trace, cache_hits, segment_routing
from surgeon.experts.measures import MeasureSettings

LENGTHS = (37, 40, 21, 40, 9)
SAMPLES = [
    Sample(np.random.default_rng(seed).integers(3, 67, length), 0, "ab"[seed % 2])
    for seed, length in enumerate(LENGTHS)
]
IDS = [sample.ids for sample in SAMPLES]
MARKER = Marker("x", ((int(IDS[0][5]),),), -1)
LOOK = MeasureSettings(windows=(4, 16), cache_ratios=(1.0, 2.0), pairs=1000, logits=True)


def analysed(family, settings=None, **options):
    checkpoint, experts = opened(moe_folder(family, **options.pop("folder", {})))
    return analyse(checkpoint, experts, SAMPLES, settings or Settings(), measure=LOOK, **options)


@functools.cache
def everything(family):
    return analysed(family, weights=True, markers=[MARKER])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe"])
def test_figures_equal_those_of_a_router_in_plain_loops(family):
    oracle = routing(family, IDS)
    found = everything(family)
    assert json.loads(json.dumps(found.document)) == found.document  # plain data
    for layer in found.document["layers"]:
        choices = [sample[layer["layer"]] for sample in oracle]
        tokens = [choice for sample in choices for choice in sample]
        used = Counter(expert for choice in tokens for expert in choice.chosen)
        assert layer["load"]["counts"] == [used[e] for e in range(EXPERTS)]
        assert layer["load"]["tokens"] == sum(LENGTHS) == len(tokens)
        pairs = Counter(frozenset(p) for choice in tokens for p in combinations(choice.chosen, 2))
        assert {frozenset(p["experts"]): p["tokens"] for p in layer["pairs"]} == pairs
        assert found.pairs[layer["layer"]].sum() == 2 * sum(pairs.values())
        top = np.mean([max(choice.chosen.values()) for choice in tokens])
        assert layer["top1_weight"] == pytest.approx(top, rel=1e-5)
        mass = sum(sum(choice.chosen.values()) for choice in tokens)
        share = [sum(c.chosen.get(e, 0.0) for c in tokens) / mass for e in range(EXPERTS)]
        np.testing.assert_allclose(layer["load"]["gate_share"], share, rtol=1e-4, atol=1e-7)
        index = np.concatenate([[list(c.chosen) for c in sample] for sample in choices])
        trace = Trace(index, np.concatenate([[0], np.cumsum(LENGTHS)]), EXPERTS)
        for one in layer["segments"]:
            wanted = segment_routing(trace, one["window"])
            assert one == wanted.document()
            assert one["excluded"] == sum(length < one["window"] for length in LENGTHS)
        for one in layer["caches"]:
            for policy in ("sch", "lru", "lfu", "belady"):
                hits, lookups = cache_hits(trace, one["size"], policy, window=16)
                assert one[policy] == pytest.approx(np.mean(hits / lookups), rel=1e-12)
        norms = [n for c in tokens for n in c.norms.values()]
        first = [n for sample in choices for c in sample[1:] for n in c.norms.values()]
        assert layer["norms"]["mean"] == pytest.approx(np.mean(norms), rel=1e-4)
        assert layer["norms"]["mean_without_first"] == pytest.approx(np.mean(first), rel=1e-4)
        peaks = [p for sample in choices for c in sample[1:] for p in c.peaks.values()]
        assert layer["norms"]["peak_without_first"] == pytest.approx(max(peaks), rel=1e-4)
        if family in ("qwen3_moe", "gpt_oss"):
            ordered = -np.sort(-np.array([c.logits for c in tokens]), axis=1)
            assert layer["margin"]["mean"] == pytest.approx((ordered[:, 1] - ordered[:, 2]).mean(), rel=1e-4)
            shares = np.exp(np.array([c.logits for c in tokens]))
            shares = -np.sort(-shares / shares.sum(axis=1, keepdims=True), axis=1)
            needed = [next(n for n in range(1, 9) if row[:n].sum() >= 0.8 - 1e-9) for row in shares]
            assert layer["top_p"]["experts"]["0.8"] == pytest.approx(np.mean(needed), abs=1e-9)
            assert layer["top_p"]["held_by_top_k"] == pytest.approx(
                shares[:, :2].sum(axis=1).mean(), rel=1e-5
            )
        else:
            assert layer["margin"] is None  # logits alone do not decide there


def figures(found):
    """What must not depend on how a pass is run: whole numbers and measures of choices."""
    return [
        (layer["layer"], layer["load"]["counts"], layer["pairs"], layer["segments"], layer["caches"])
        for layer in found.document["layers"]
    ]


def test_batches_storage_and_streamed_experts_change_nothing():
    whole = analysed("mixtral")
    assert figures(analysed("mixtral", Settings(batch_tokens=1))) == figures(whole)
    assert figures(analysed("mixtral", Settings(batch_tokens=120))) == figures(whole)  # padded
    assert figures(analysed("mixtral", Settings(stream_experts=True))) == figures(whole)
    assert figures(analysed("mixtral", folder={"storage": "fused"})) == figures(whole)


def test_a_pass_is_taken_up_where_it_was_stopped(scratch):
    whole = everything("qwen3_moe")
    settings = Settings(spill=scratch / "pass")
    stop = threading.Event()
    seen = []

    def halt(done, total):
        seen.append(done)
        if done == 3:  # embedding and two layers
            stop.set()

    checkpoint, experts = opened(moe_folder("qwen3_moe"))
    about = {"measure": LOOK, "markers": [MARKER], "weights": True}
    with pytest.raises(Interrupted):
        analyse(checkpoint, experts, SAMPLES, settings, progress=halt, stop=stop, **about)
    seen.clear()
    found = analyse(checkpoint, experts, SAMPLES, settings, progress=lambda d, t: seen.append(d), resume=True, **about)  # fmt: skip
    assert min(seen) == 4  # nothing of what was done is done again
    assert found.document == whole.document
    assert all((found.pairs[layer] == whole.pairs[layer]).all() for layer in whole.pairs)


def test_statistics_of_the_pass_can_be_kept(scratch):
    from surgeon.experts.statistics import RoutingStatistics

    found = everything("gpt_oss")
    found.statistics.save(scratch / "routing.safetensors")
    again = RoutingStatistics.load(scratch / "routing.safetensors", opened(moe_folder("gpt_oss"))[0])
    assert set(found.document["criteria"]) >= {"reap", "easy_ep", "frequency", "ean"}
    for layer, scores in found.document["criteria"]["frequency"].items():
        assert scores == again.total(int(layer)).tokens.tolist()


def test_domains_and_demonstrations_are_compared():
    found = analysed("qwen3_moe", keep=3).document
    (pair,) = found["overlaps"]
    assert (pair["first"], pair["second"], pair["kept"], pair["expected"]) == ("a", "b", 3, 3 / 8)
    assert set(found["stability"]) == {"a", "b"} and found["stability"]["a"]["samples"] == 3
    assert any("too few demonstrations" in text for text in found["warnings"])
    whole = analysed("qwen3_moe", keep=8).document
    assert whole["overlaps"] == [] and whole["stability"] == {}
    with pytest.raises(UsageError, match="9 of 8") as error:
        analysed("qwen3_moe", keep=9)
    assert error.value.code == "E246"
    with pytest.raises(UsageError) as error:
        analysed("deepseek_v3", keep=5)
    assert error.value.help == "use 4 or 6"  # two groups
    with pytest.raises(UsageError, match="aimer, which does not look at text"):
        analysed("qwen3_moe", criterion="aimer")


def test_dead_experts_and_little_text_are_said(scratch):
    def correct(state):  # expert 5 of layer 1 loses whatever the token
        state["model.layers.1.mlp.gate.e_score_correction_bias"][5] = -100

    checkpoint, experts = opened(edited(moe_folder("deepseek_v3"), scratch / "dead", correct))
    found = analyse(checkpoint, experts, SAMPLES, Settings(), measure=LOOK).document
    layer = found["layers"][0]
    assert layer["layer"] == 1 and layer["load"]["dead"] == [5] and found["model"]["dead"] >= 1
    said = " ".join(found["warnings"])
    assert "147 tokens in all" in said and "layer 1 has 1: 5" in said
    few = analyse(checkpoint, experts, SAMPLES[-1:], Settings(), measure=LOOK).document
    assert any("tokens an expert on average" in text for text in few["warnings"])
    assert all(
        np.isfinite(score) for rows in found["criteria"].values() for each in rows.values() for score in each
    )


def test_super_experts_and_markers(scratch):
    def swell(state):
        state["model.layers.0.mlp.experts.3.down_proj.weight"] *= 1000

    checkpoint, experts = opened(edited(moe_folder("qwen3_moe"), scratch / "super", swell))
    token = int(IDS[1][7])
    found = analyse(checkpoint, experts, SAMPLES, Settings(), measure=LOOK, markers=[Marker("it", ((token,),), -1)])  # fmt: skip
    (best,) = found.document["super_experts"]
    assert (best["layer"], best["expert"]) == (0, 3) and best["of_median"] > 100
    tied = found.document["cognitive"]
    assert len(tied) == 10 and [e["npmi"] for e in tied] == sorted((e["npmi"] for e in tied), reverse=True)
    with pytest.raises(InputError) as error:
        analyse(checkpoint, experts, SAMPLES, Settings(), markers=[Marker("never", ((66, 66, 66),), -1)])
    assert error.value.code == "E439"


def test_texts_are_domains_and_markers_are_words(scratch):
    models = Path(__file__).resolve().parents[1] / "models"
    folder = Path(shutil.copytree(moe_folder("qwen3_moe", vocab_size=281, max_position_embeddings=256), scratch / "moe"))  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(models / "base" / name, folder / name)
    for name, text in (("sums", "Add {0}+{0}.\nso answer:{1}"), ("words", "The {0} so sees {1} more.")):
        lines = [json.dumps({"text": text.format(n, 2 * n)}) + "\n" for n in range(60)]
        (scratch / f"{name}.jsonl").write_text("".join(lines))
    checkpoint, experts = opened(folder)
    source = [(name, str(scratch / f"{name}.jsonl")) for name in ("sums", "words")]
    found = analyse_texts(
        checkpoint, experts, source, Settings(), samples=40, markers=["so"], measure=LOOK
    ).document
    assert found["data"]["domains"] == {"sums": 20, "words": 20} and found["data"]["record"]["samples"] == 40
    assert str(scratch) not in json.dumps(found)
    assert len(found["overlaps"]) == 1 and found["cognitive"][0]["markers"].keys() == {"so"}
    assert found["stability"]["sums"]["agreement"].keys() == {"5", "10"}
    with pytest.raises(InputError) as error:
        analyse_texts(open_path(folder / "model.safetensors"), experts, source, Settings())
    assert error.value.code == "E440"


def test_windows_that_no_sample_holds():
    checkpoint, experts = opened(moe_folder("olmoe"))
    usual = analyse(checkpoint, experts, SAMPLES, Settings()).document  # 64 fits no sample: left out
    assert [s["window"] for s in usual["layers"][0]["segments"]] == [16]
    with pytest.raises(InputError, match="41 tokens; the longest has 40") as error:
        analysed("olmoe", windows=(16, 41))
    assert error.value.code == "E438"
    assert [s["window"] for s in analysed("olmoe", windows=(8,)).document["layers"][0]["segments"]] == [8]


def test_settings_that_cannot_be_are_refused_before_the_model_runs():
    checkpoint, experts = opened(moe_folder("olmoe"))
    for wrong in (MeasureSettings(cache_ratios=(0.5,)), MeasureSettings(cache_window=0)):
        with pytest.raises(UsageError) as error:
            analyse(
                checkpoint, experts, SAMPLES, Settings(), measure=wrong, progress=lambda d, t: pytest.fail()
            )
        assert error.value.code == "E246"


def test_without_text():
    checkpoint, experts = opened(moe_folder("gpt_oss"))
    document = analyse_weights(checkpoint, experts).document
    assert json.loads(json.dumps(document)) == document and document["data"] is None
    assert document["architecture"]["storage"] == "fused" and len(document["weights"]) == 3
    assert any("give --calibration" in text for text in document["warnings"])
    assert everything("gpt_oss").document["weights"] == document["weights"]


def test_the_architecture_is_described():
    checkpoint, experts = opened(moe_folder("deepseek_v3"))
    found = analyse_weights(checkpoint, experts).document["architecture"]
    assert (found["experts"], found["top_k"], found["groups"], found["topk_group"]) == (8, 2, 2, 1)
    assert (
        found["layers"] == [1, 2] and found["shared"] and found["correction_bias"] and found["renormalised"]
    )
    assert found["router"] == "sigmoid" and found["quantized"] is None
    own = sum(i.elements for n, i in checkpoint.tensors.items() if ".mlp.experts." in n or ".mlp.gate." in n)
    assert found["expert_parameters"] == own


def test_the_risk_follows_size():
    _, experts = opened(moe_folder("olmoe"))
    assert "25 %" in risk(experts, 7_000_000_000) and "7.0 billion" in risk(experts, 7_000_000_000)

    class Many:
        count = 128

    assert "50 %" in risk(Many, 30_000_000_000) and "16.0 billion" in risk(Many, 16_000_000_000)  # type: ignore[arg-type]


# ---- on the screen ------------------------------------------------------------------------------------


def printed(document, capsys, json_mode=False):
    from surgeon.cli.inspect_experts import show
    from surgeon.cli.output import Output

    show(Output(json_mode), json.loads(json.dumps(document)))
    return capsys.readouterr()


def test_documents_print_as_tables(capsys):
    found = everything("qwen3_moe").document
    shown = printed(found, capsys)
    assert "qwen3_moe: 8 of 24 channels in layers 0 to 2, 2 a token" in shown.out
    assert "SRP 16" in shown.out and "SCH 4" in shown.out and "margin" in shown.out and "top-p" in shown.out
    for name in found["criteria"]:
        assert name.replace("_", "-") in shown.out
    for text in found["warnings"]:
        assert f"warning: {text}" in shown.err
    layer = found["layers"][1]
    row = next(
        line for line in shown.out.splitlines() if line.split()[:2] == ["1", f"{layer['load']['cv']:.2f}"]
    )
    assert f"{layer['load']['max_share']:.1%}" in row and f"{layer['segments'][1]['value']:.2f}" in row
    assert max(map(len, shown.out.splitlines())) < 200
    assert printed(analyse_weights(*opened(moe_folder("gpt_oss"))).document, capsys).out.count("\n") > 6
    assert printed(found, capsys, json_mode=True).out == ""


def test_a_proposed_record_can_be_given_back(capsys, scratch):
    from surgeon.architectures import expert_records
    from surgeon.cli.inspect_experts import guess_document, show_guess
    from surgeon.cli.output import Output
    from surgeon.structure.experts.find import experts_of
    from surgeon.structure.experts.guess import propose

    checkpoint, experts = opened(moe_folder("mixtral"))
    record, notes = propose(checkpoint)
    show_guess(Output(), guess_document(record, notes))
    file = scratch / "record.yaml"
    file.write_text(capsys.readouterr().out)
    assert notes and all(f"# check: {note}" in file.read_text() for note in notes)
    again = experts_of(checkpoint, expert_records.load(file))
    assert [layer.tensors for layer in again.layers] == [layer.tensors for layer in experts.layers]
