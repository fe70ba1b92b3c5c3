"""Running recipes: steps, what is not done twice, gates, publication, sweeps."""

from __future__ import annotations

import errno
import json
import shutil
import threading

import pytest
from recipe_runs import EXPORT, MODELS, SCORES, recipe, texts

from surgeon import api
from surgeon.errors import EnvironmentFault, Interrupted, OutputConflict, UsageError
from surgeon.output.disk import Disk
from surgeon.pipeline import publication, verbs
from surgeon.pipeline.run import Run, run
from surgeon.recipe import native
from surgeon.verify.static import verify_path


def statuses(document) -> dict[str, str]:
    return {step["id"]: step["status"] for step in document["steps"]}


def everything(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def go(path, out, **options):
    return run(path, out, threads=1, **options)


@pytest.fixture
def calls(monkeypatch):
    """Count which verbs really run."""
    seen: list[str] = []
    for name, function in list(verbs._VERBS.items()):

        def counted(options, output, machine, dry, resume, *, name=name, function=function):
            if not dry:
                seen.append(name)
            return function(options, output, machine, dry, resume)

        monkeypatch.setitem(verbs._VERBS, name, counted)
    return seen


def test_the_output_is_exactly_the_published_model(scratch):
    document = go(recipe(scratch, EXPORT), scratch / "out")
    assert document["status"] == "ok" and document["published"] and document["exit_code"] == 0
    assert statuses(document) == {"merged": "done", "wide": "done"}
    assert not verify_path(scratch / "out").errors
    # The same by hand, under the same names.
    (scratch / "by").mkdir()
    api.merge([str(MODELS / "long")], method="ties", base=str(MODELS / "short"), weight=(1.0,), density=(0.5,),
              output=scratch / "by" / "merged", threads=1)  # fmt: skip
    api.export(scratch / "by" / "merged", scratch / "by" / "out", dtype="float32", threads=1)
    assert everything(scratch / "out") == everything(scratch / "by" / "out")
    work = scratch / "out.work"
    assert not (work / "steps").exists() and not (work / "publish").exists(), (
        "models of steps go once one is published"
    )
    assert json.loads((work / "result.json").read_text())["steps"][1]["document"]["command"] == "export"
    assert (
        json.loads((work / "results" / "merged.json").read_text())["output"]["parameters"]
        == document["results"]["merged"]["parameters"]
    )
    assert sorted(p.name for p in scratch.iterdir() if p.name.startswith(".")) == []


def test_a_finished_run_does_nothing_and_a_changed_one_only_what_changed(scratch, calls):
    texts(scratch)
    path = recipe(scratch, SCORES, "gates: [perplexity <= 100 * baseline]\n")
    go(path, scratch / "out")
    assert calls == ["merge", "eval"]
    before = everything(scratch / "out")
    again = go(path, scratch / "out")
    assert calls == ["merge", "eval"] and again["unchanged"] and again["published"]
    assert set(statuses(again).values()) == {"unchanged"} and again["gates"][0]["passed"]
    path.write_text(path.read_text().replace("texts.jsonl", "texts.jsonl, sequence_length: 64"))
    third = go(path, scratch / "out")
    assert calls == ["merge", "eval", "eval"], "the model is there, verified, under its final name"
    assert statuses(third) == {"merged": "unchanged", "scores": "done"} and third["published"]
    assert everything(scratch / "out") == before


def test_other_inputs_and_options_are_noticed(scratch, calls):
    long = shutil.copytree(MODELS / "long", scratch / "mine")
    path = recipe(scratch)
    options = {"set": [f"models.long={long}"]}
    go(path, scratch / "out", **options)
    config = json.loads((long / "generation_config.json").read_text())
    (long / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.5}))
    with pytest.raises(OutputConflict) as caught:
        go(path, scratch / "out", **options)
    assert caught.value.code == "E601" and calls == ["merge"], "what is in the way is known before any work"
    document = go(path, scratch / "out", overwrite=True, **options)
    assert calls == ["merge", "merge"] and document["published"]
    flipped = scratch / "out" / "model.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    go(path, scratch / "out", overwrite=True, **options)
    assert calls == ["merge"] * 3 and not verify_path(scratch / "out").errors, (
        "a damaged result does not count"
    )


def test_a_failed_gate_withholds_the_model_and_says_where_it_is(scratch, calls):
    texts(scratch)
    path = recipe(scratch, SCORES, "gates: [perplexity <= 0.01 * baseline, bytes <= 1GB]\n")
    document = go(path, scratch / "out")
    assert (document["status"], document["exit_code"], document["published"]) == ("gate-failed", 4, False)
    failed, passed = document["gates"]
    assert not failed["passed"] and passed["passed"] and failed["step"] == "scores"
    assert (
        failed["threshold"] == pytest.approx(0.01 * failed["baseline"])
        and failed["value"] > failed["threshold"]
    )
    assert (
        document["error"]["code"] == "E401"
        and str(scratch / "out.work" / "publish" / "out") in document["error"]["help"]
    )
    assert not (scratch / "out").exists() and not verify_path(scratch / "out.work" / "publish" / "out").errors
    assert json.loads((scratch / "out.work" / "result.json").read_text())["gates"] == document["gates"]
    always = go(path, scratch / "out", publish="always")
    assert (
        calls == ["merge", "eval"]
        and always["published"]
        and always["exit_code"] == 4
        and (scratch / "out").is_dir()
    )


def test_without_gates_everything_is_published(scratch):
    document = go(recipe(scratch, "gates: [bytes <= 1]\n"), scratch / "out", gates=False)
    assert document["published"] and not document["gates"] and document["exit_code"] == 0


def test_a_warning_ends_a_strict_run(scratch):
    path = recipe(scratch, "data: {unused: x.jsonl}\n")
    with pytest.raises(UsageError) as caught:
        go(path, scratch / "out", strict=True)
    assert (
        caught.value.code == "E220" and not (scratch / "out").exists() and not (scratch / "out.work").exists()
    )


def test_one_step_at_a_time(scratch, calls):
    path = recipe(scratch, EXPORT)
    with pytest.raises(UsageError) as caught:
        go(path, scratch / "out", start="wide")
    assert caught.value.code == "E2010" and "merged" in caught.value.message
    first = go(path, scratch / "out", until="merged")
    assert (
        statuses(first) == {"merged": "done", "wide": "skipped"}
        and not first["published"]
        and not (scratch / "out").exists()
    )
    second = go(path, scratch / "out", only=["wide"])
    assert statuses(second) == {"merged": "unchanged", "wide": "done"} and second["published"]
    assert calls == ["merge", "export"]
    for wrong in (
        {"only": ["wdie"]},
        {"start": "wide", "until": "merged"},
        {"only": ["wide"], "until": "wide"},
    ):
        with pytest.raises(UsageError) as caught:
            go(path, scratch / "out", **wrong)
        assert caught.value.code == "E2010"


def test_a_work_folder_elsewhere_keeps_what_is_asked_for(scratch):
    document = go(
        recipe(scratch, EXPORT), scratch / "out", work=scratch / "elsewhere", keep_intermediate=True
    )
    assert document["steps"][0]["path"] == str(scratch / "elsewhere" / "steps" / "merged")
    assert (
        not verify_path(scratch / "elsewhere" / "steps" / "merged").errors
        and not (scratch / "out.work").exists()
    )


def test_a_dry_run_writes_nothing(scratch):
    path = recipe(scratch, EXPORT, SCORES)
    texts(scratch)
    before = sorted(p.name for p in scratch.iterdir())
    document = go(path, scratch / "out", dry_run=True)
    assert document["status"] == "dry-run" and sorted(p.name for p in scratch.iterdir()) == before
    merged, wide, scores = document["steps"]
    assert merged["status"] == "planned" and merged["document"]["output"]["bytes"] > 1e6
    assert merged["path"] is None and wide["waits_for"] == ["merged"] and scores["waits_for"] == ["merged"]
    go(path, scratch / "out")
    again = go(path, scratch / "out", dry_run=True)
    assert set(statuses(again).values()) == {"unchanged"}


@pytest.mark.parametrize("wrong", ["out is an input", "work in an input", "output in work"])
def test_places_that_collide_are_refused(scratch, wrong):
    long = shutil.copytree(MODELS / "long", scratch / "mine")
    path = recipe(scratch)
    options = {"set": [f"models.long={long}"]}
    places = {
        "out is an input": (long, {}), "work in an input": (scratch / "out", {"work": long / "work"}),
        "output in work": (scratch / "w" / "out", {"work": scratch / "w"}),
    }  # fmt: skip
    (scratch / "w").mkdir()
    out, more = places[wrong]
    before = everything(long)
    with pytest.raises(OutputConflict) as caught:
        go(path, out, overwrite=True, **options, **more)
    assert caught.value.code == "E602" and everything(long) == before


def test_two_runs_do_not_share_a_work_folder(scratch):
    from surgeon.output.staging import DestinationLock

    lock = DestinationLock.acquire(scratch / "out.work")
    try:
        with pytest.raises(OutputConflict) as caught:
            go(recipe(scratch), scratch / "out")
        assert caught.value.code == "E603"
    finally:
        lock.release()


class Failing(Disk):
    """Raises at the n-th change of the file system."""

    def __init__(self, at: int, number: int = errno.EIO) -> None:
        self.at, self.count, self.number = at, 0, number

    def _step(self, action, path):
        self.count += 1
        if self.count == self.at:
            raise OSError(self.number, action)


def test_publication_goes_on_after_a_failure_at_any_call(scratch):
    """P1: the destination is absent or complete, and the next run finishes, whatever call failed."""
    path = recipe(scratch)
    go(path, scratch / "out", publish="on_pass", set=["gates=[bytes <= 1]"])
    kept = scratch / "out.work"
    wanted = everything(kept / "publish" / "out")
    for n in range(1, 60):
        place = scratch / f"{n}"
        place.mkdir()
        shutil.copytree(kept, place / "out.work")
        out, failed = place / "out", False
        try:
            publication.publish(
                {"": place / "out.work" / "publish" / "out"}, out, overwrite=False, disk=Failing(n)
            )
        except OSError:
            failed = True
            if out.exists():
                assert everything(out) == wanted
        if not failed:
            assert n > 5
            break
        document = go(path, out)
        assert (
            document["published"]
            and everything(out) == wanted
            and set(statuses(document).values()) == {"unchanged"}
        ), n
        assert [p.name for p in place.iterdir() if p.name.startswith(".")] == [], n
        shutil.rmtree(place)
    else:
        raise AssertionError("publication never finished")


def test_publication_to_another_file_system_copies_and_verifies(scratch, monkeypatch):
    go(recipe(scratch), scratch / "out", set=["gates=[bytes <= 1]"])
    candidate = scratch / "out.work" / "publish" / "out"
    wanted = everything(candidate)
    (scratch / "other").mkdir()

    class Far(Disk):
        def rename(self, source, target):
            if "publish" in source.parts:
                raise OSError(errno.EXDEV, "another file system")
            super().rename(source, target)

    publication.publish({"": candidate}, scratch / "other" / "out", overwrite=False, disk=Far())
    assert everything(scratch / "other" / "out") == wanted


def test_a_sweep_publishes_the_points_that_pass(scratch, calls):
    path = recipe(
        scratch, EXPORT, "gates: [bytes <= 3MB]\nsweep: {steps.wide.export.dtype: [float32, bfloat16]}\n"
    )
    document = go(path, scratch / "out")
    assert [(point["name"], point["passed"], point["published"]) for point in document["points"]] == [
        ("dtype=float32", False, False), ("dtype=bfloat16", True, True),
    ]  # fmt: skip
    assert calls == ["merge", "export", "export"], "what the points have in common is made once"
    assert document["exit_code"] == 0 and document["status"] == "ok" and document["published"]
    assert [p.name for p in (scratch / "out").iterdir()] == ["dtype=bfloat16"]
    assert not verify_path(scratch / "out" / "dtype=bfloat16").errors
    assert document["points"][0]["results"]["wide"]["bytes"] > 2 * 2e6
    again = go(path, scratch / "out")
    assert again["unchanged"] and len(calls) == 3


@pytest.mark.slow
def test_the_baseline_of_a_sweep_is_measured_once(scratch, calls):
    texts(scratch)
    questions = scratch / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"question": f"Add {n}+2.", "answer": n + 2}) + "\n" for n in range(3))
    )
    scores = (
        "  - id: scores\n    eval: {model: merged, baseline: long, questions: ./questions.jsonl, max_new_tokens: 8,"
        " perplexity: ./texts.jsonl, metrics: [kl, accuracy, answer_length]}\n"
    )
    gates = "gates: [answer_length <= 2 * baseline, bytes <= 2 * baseline, perplexity <= 2 * baseline]\n"
    alone = go(recipe(scratch, scores, gates, name="alone.yaml"), scratch / "alone")
    assert alone["gates"] and alone["published"] and calls == ["merge", "eval"]
    sweep = "sweep: {steps.merged.merge.models.0.weight: [0.4, 1.0]}\n"
    document = go(recipe(scratch, scores, gates, sweep), scratch / "out")
    assert calls[2:] == ["merge", "eval", "eval", "merge", "eval"]
    (kept,) = (scratch / "out.work" / "baselines").glob("*.json")
    assert json.loads(kept.read_bytes())["model"]["name"] == "long"
    own = document["points"][1]
    measured = {gate["gate"]: (gate["value"], gate["baseline"], gate["passed"]) for gate in own["gates"]}
    # The recipe without a sweep has weight 1 as well, and measured its baseline beside the model.
    assert measured == {
        gate["gate"]: (gate["value"], gate["baseline"], gate["passed"]) for gate in alone["gates"]
    }
    assert all(passed and baseline > 0 for _, baseline, passed in measured.values())


def test_a_sweep_of_which_no_point_passes(scratch):
    path = recipe(scratch, "gates: [bytes <= 1]\nsweep: {steps.merged.merge.models.0.weight: [0.5, 1.0]}\n")
    document = go(path, scratch / "out")
    assert (
        document["exit_code"] == 4 and document["error"]["code"] == "E4001" and not (scratch / "out").exists()
    )


def test_an_interrupted_step_is_continued(scratch, calls):
    stop = threading.Event()
    path = recipe(scratch, EXPORT)

    def tell(what, done, total):
        if what.startswith("wide"):
            stop.set()

    with pytest.raises(Interrupted):
        go(path, scratch / "out", stop=stop, progress=tell)
    left = json.loads((scratch / "out.work" / "result.json").read_text())
    assert (
        statuses(left) == {"merged": "done", "wide": "failed"}
        and left["status"] == "failed"
        and left["exit_code"] == 130
    )
    document = go(path, scratch / "out")
    assert statuses(document) == {"merged": "unchanged", "wide": "done"} and calls == [
        "merge",
        "export",
        "export",
    ]


@pytest.mark.slow
def test_a_step_that_was_changed_after_an_interruption_begins_anew(scratch, monkeypatch):
    path = recipe(scratch, EXPORT)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        go(
            path,
            scratch / "out",
            stop=stop,
            progress=lambda what, *_: stop.set() if what.startswith("wide") else None,
        )
    document = go(path, scratch / "out", set=["steps.wide.export.dtype=float16"])
    assert (
        document["published"]
        and json.loads((scratch / "out" / "config.json").read_text())["dtype"] == "float16"
    )


def test_no_resume_begins_from_the_first_step(scratch, calls):
    path = recipe(scratch, EXPORT)
    go(path, scratch / "out", until="merged")
    go(path, scratch / "out", resume=False)
    assert calls == ["merge", "merge", "export"]


@pytest.mark.slow
def test_a_gguf_file_is_published_with_its_manifest(scratch):
    pytest.importorskip("gguf")
    path = recipe(scratch, "  - id: file\n    export: {to: gguf, check: false}\n")
    document = go(path, scratch / "small.gguf")
    assert (
        document["published"]
        and (scratch / "small.gguf").is_file()
        and (scratch / "small.gguf.surgeon.json").is_file()
    )
    assert go(path, scratch / "small.gguf")["unchanged"]


@pytest.mark.slow
def test_the_same_recipe_without_a_model_keeps_only_results(scratch):
    texts(scratch)
    path = scratch / "eval.yaml"
    path.write_text(
        f"version: 1\nname: judged\nmodels: {{long: {MODELS}/long}}\nsteps:\n  - id: scores\n    eval: {{perplexity: texts.jsonl}}\n"
    )
    document = go(path, scratch / "out")
    assert (
        document["results"]["scores"]["perplexity"] > 1
        and not document["published"]
        and not (scratch / "out").exists()
    )


def test_a_full_disk_keeps_the_finished_steps(scratch, monkeypatch):
    path = recipe(scratch, EXPORT)
    real = verbs._VERBS["export"]

    def full(*given):
        raise EnvironmentFault("E505", "the disk is full")

    monkeypatch.setitem(verbs._VERBS, "export", full)
    with pytest.raises(EnvironmentFault) as caught:
        go(path, scratch / "out")
    assert caught.value.message == "step wide: the disk is full"
    monkeypatch.setitem(verbs._VERBS, "export", real)
    assert statuses(go(path, scratch / "out")) == {"merged": "unchanged", "wide": "done"}


@pytest.mark.slow
def test_what_is_not_measured_never_passes(scratch):
    """A gate over a metric that a step turns out not to have fails with a reason (fault J8)."""
    texts(scratch)
    job = Run(native.read(recipe(scratch, SCORES, "gates: [perplexity <= 1e9]\n")), scratch / "out")
    job.execute()
    document = job.runs[""].made["scores"].document
    assert document is not None
    document["metrics"]["perplexity"]["value"] = float("nan")
    job._decide()
    refusal = job.refusal()
    assert refusal is not None and refusal.code == "E402" and refusal.exit_code == 4
