"""Printing what is known about experts: the document of `surgeon.experts.analysis`, and a proposed record.

`show` takes the document as plain data, so that a saved one prints the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from surgeon.cli.output import Output, number

Windows = Annotated[
    list[int] | None,
    typer.Option("--window", min=1, help="Tokens of the stretches locality is measured on; repeat [16, 64]."),
]
CacheRatios = Annotated[
    list[float] | None,
    typer.Option(
        "--cache-ratio",
        help="Size of simulated expert caches, in multiples of the experts a token uses; repeat [2].",
    ),
]
CompareKeep = Annotated[
    int | None,
    typer.Option("--keep-experts", help="Experts a layer for which domains are compared [half of them]."),
]
CRITERION = "easy-ep"
"""Criterion by which domains are compared when none is named."""
Criterion = Annotated[str, typer.Option("--criterion", help="Criterion by which domains are compared.")]
Logits = Annotated[
    bool, typer.Option("--router-logits", help="Also margins of the choice, and top-p routing simulated.")
]
Markers = Annotated[
    list[str] | None,
    typer.Option(
        "--marker", help="Find experts tied to this text, such as '<think>' (see edit --method rice); repeat."
    ),
]
Scores = Annotated[
    str | None,
    typer.Option(
        "--scores", help="Keep the statistics of the pass in this file; surgeon prune --scores reads it."
    ),
]
Guess = Annotated[
    bool,
    typer.Option("--guess", help="Propose a record of where an unknown family keeps its experts."),
]

SHOWN = 6
"""Experts, pairs and criteria printed of many; --json has all."""


def show(out: Output, document: Mapping[str, Any]) -> None:
    """Print the document of `surgeon.experts.analysis.Analysis`."""
    _architecture(out, document["architecture"])
    if document["data"] is not None:
        _data(out, document["data"])
        _layers(out, document["layers"])
        _model(out, document["model"])
        _pairs(out, document["layers"])
        _top_p(out, document["layers"])
        _super(out, document["super_experts"])
        _criteria(out, document["criteria"])
        _overlaps(out, document)
        _cognitive(out, document["cognitive"])
    if document["weights"] is not None:
        _weights(out, document["weights"])
    out.line()
    out.line(f"risk      {document['risk']}")
    for text in document["warnings"]:
        out.warning(text)


def guess_document(record: Any, notes: Sequence[str]) -> dict[str, Any]:
    """Return a proposed record (`surgeon.structure.experts.guess.propose`) as plain data."""
    from surgeon.architectures.expert_records import to_yaml

    return {"expert_record": to_yaml(record), "notes": list(notes)}


def show_guess(out: Output, document: Mapping[str, Any]) -> None:
    """Print a proposed record as the YAML file that --expert-record takes, with what is to be checked as comments."""
    for note in document["notes"]:
        out.line(f"# check: {note}")
    out.line(document["expert_record"].rstrip("\n"))
    out.note("this is a guess from names and shapes: compare every line with the model's code, then give it with --expert-record FILE")  # fmt: skip


# ---- the model ---------------------------------------------------------------------------------------


def _architecture(out: Output, a: Mapping[str, Any]) -> None:
    layers = a["layers"]
    place = f"layers {layers[0]} to {layers[-1]}" if _adjacent(layers) else f"{len(layers)} layers"
    if a["layers_not_run"]:
        place += f", and {len(a['layers_not_run'])} for predicting further tokens"
    out.line(
        f"experts   {a['family']}: {a['experts']} of {a['width']} channels in {place}, {a['top_k']} a token"
        + (f" from {a['topk_group']} of {a['groups']} groups" if a["groups"] > 1 else "")
        + (", shared ones beside them" if a["shared"] else "")
    )
    sort = [
        a["router"],
        "renormalised" if a["renormalised"] else "not renormalised",
        *(["a correction bias chooses"] if a["correction_bias"] else []),
        *(["weights multiply the experts' inputs"] if a["gate_on"] == "input" else []),
    ]
    out.line(f"router    {', '.join(sort)}")
    share = a["expert_parameters"] / a["parameters"]
    stored = {"per expert": "one tensor per expert", "fused": "all experts in one tensor"}[a["storage"]]
    out.line(
        f"stored    {stored}{', ' + a['quantized'] if a['quantized'] else ''}   {number(a['expert_parameters'])} parameters, "
        f"{share:.0%} of the model"
    )


def _data(out: Output, data: Mapping[str, Any]) -> None:
    domains = "   ".join(f"{name} {count}" for name, count in data["domains"].items())
    out.line(
        f"text      {data['samples']:,} samples, {data['tokens']:,} tokens{'   ' + domains if domains else ''}"
    )


def _layers(out: Output, layers: Sequence[Mapping[str, Any]]) -> None:
    windows = [s["window"] for s in layers[0]["segments"]]
    sizes = [c["size"] for c in layers[0]["caches"]]
    header = ["layer", "CV", "/chance", "effective", "dead", "rare", "largest", "80 % in", "top-1"]
    for window in windows:
        header += [f"SRP {window}", "chance"]
    for size in sizes:
        header += [f"SCH {size}", "LRU", "best"]
    margins = any(layer["margin"] for layer in layers)
    if margins:
        header.append("margin")
    rows = []
    for layer in layers:
        load = layer["load"]
        row: list[object] = [
            layer["layer"], _f(load["cv"], ".2f"), _f(load["cv_ratio"], ".1f"), _f(load["effective"], ".1f"),
            len(load["dead"]), len(load["rare"]), _f(load["max_share"], ".1%"), _f(load["covering"]["0.8"], "d"),
            _f(layer["top1_weight"], ".2f"),
        ]  # fmt: skip
        for found in layer["segments"]:
            row += [f"{found['value']:.2f}", f"{found['random']:.2f}"]
        for found in layer["caches"]:
            row += [f"{found['sch']:.2f}", f"{found['lru']:.2f}", f"{found['belady']:.2f}"]
        if margins:
            row.append(_f((layer["margin"] or {}).get("mean"), ".2f"))
        rows.append(row)
    out.line()
    out.table(header, rows)
    out.line("CV: spread of the load, /chance: over what even routing of so few tokens shows (1 is none). effective: equally loaded experts.")  # fmt: skip
    out.line("SRP: how well one set of experts serves so many tokens; SCH: hits of a cache that knows the near future, best: none can have more.")  # fmt: skip


def _model(out: Output, model: Mapping[str, Any]) -> None:
    for window, found in model["segments"].items():
        out.line(f"locality  SRP {window}: mean {found['mean']:.2f}, lowest layer {found['min']:.2f}, chance {found['random']:.2f}")  # fmt: skip
    for size, found in model["caches"].items():
        out.line(
            f"caching   {size} experts: mean hit rate {found['mean']:.0%}, lowest layer {found['min']:.0%}"
        )


def _pairs(out: Output, layers: Sequence[Mapping[str, Any]]) -> None:
    pairs = [(layer["layer"], pair) for layer in layers for pair in layer["pairs"] if pair["lift"] > 1]
    best = sorted(pairs, key=lambda entry: (-entry[1]["jaccard"], entry[0]))[:SHOWN]
    if best:
        out.line()
        rows = [[layer, *p["experts"], p["tokens"], f"{p['jaccard']:.2f}", f"{p['lift']:.1f}"] for layer, p in best]  # fmt: skip
        out.line("experts that work on the same tokens")
        out.table(["layer", "expert", "expert", "tokens", "Jaccard", "lift"], rows)


def _top_p(out: Output, layers: Sequence[Mapping[str, Any]]) -> None:
    found = [layer["top_p"] for layer in layers if layer["top_p"]]
    if not found:
        return
    means = {p: sum(f["experts"][p] for f in found) / len(found) for p in found[0]["experts"]}
    held = sum(f["held_by_top_k"] for f in found) / len(found)
    out.line()
    out.line(
        "top-p     experts a token until probability p: "
        + "   ".join(f"{p}: {n:.1f}" for p, n in means.items())
    )
    out.line(f"          the fixed number holds {held:.0%} of the probability; top-p itself needs code in the runtime")  # fmt: skip


def _super(out: Output, found: Sequence[Mapping[str, Any]]) -> None:
    out.line()
    certain = [s for s in found if s["certain"]]
    out.line(
        f"super     {len(certain)} super experts" + (", never dropped by surgeon prune" if certain else "")
        + (f", {len(found) - len(certain)} candidates" if len(found) > len(certain) else "")
    )  # fmt: skip
    if found:
        rows = [
            [
                s["layer"],
                s["expert"],
                f"{s['peak']:.4g}",
                _f(s["of_median"], ".3g"),
                "yes" if s["certain"] else "candidate",
            ]
            for s in found
        ]
        out.table(["layer", "expert", "largest output", "times median", "super"], rows)


def _criteria(out: Output, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Print, for every criterion, the experts it would drop first in the first, middle and last layer."""
    layers = list(next(iter(scores.values())))
    chosen = list(dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]))
    rows: list[list[object]] = []
    for name, found in scores.items():
        rows.append([name.replace("_", "-"), *(_lowest(found[layer]) for layer in chosen)])
    out.line()
    out.line("experts each criterion would drop first (all scores: --json)")
    out.table(["criterion", *(f"layer {layer}" for layer in chosen)], rows)


def _lowest(scores: Sequence[float]) -> str:
    order = sorted(range(len(scores)), key=lambda e: (scores[e], -e))
    return " ".join(map(str, order[: min(SHOWN, max(1, len(scores) // 2))]))


def _overlaps(out: Output, document: Mapping[str, Any]) -> None:
    overlaps, stability = document["overlaps"], document["stability"]
    kept, experts = document["settings"]["keep"], document["architecture"]["experts"]
    if overlaps:
        bands = list(overlaps[0]["bands"])
        rows: list[list[object]] = [
            [f"{o['first']} - {o['second']}", *(f"{o['bands'][b]:.0%}" for b in bands), f"{o['mean']:.0%}"]
            for o in overlaps
        ]
        out.line()
        out.line(
            f"shared among the {kept} of {experts} best experts of two domains ({document['settings']['criterion'].replace('_', '-')}; "
            f"chance {kept / experts:.0%})"
        )
        out.table(["domains", *(_third(b) for b in bands), "mean"], rows)
    if stability:
        counts = list(dict.fromkeys(c for s in stability.values() for c in s["agreement"]))
        rows = [
            [name or "all", s["samples"], *(_f(s["agreement"].get(c), ".0%") for c in counts), _f(s["halves"], ".0%"),
             _f(None if s["worst"] is None else s["worst"]["layer"], "d")]
            for name, s in stability.items()
        ]  # fmt: skip
        out.line()
        out.line(
            f"how stable the choice of {kept} of {experts} experts is (easy-ep; chance {kept / experts:.0%})"
        )
        out.table(["domain", "samples", *(f"{c} v. all" for c in counts), "halves", "worst layer"], rows)


def _third(band: str) -> str:
    return band if band == "all" else f"{band} third"


def _cognitive(out: Output, found: Sequence[Mapping[str, Any]] | None) -> None:
    if not found:
        return
    markers = list(found[0]["markers"])
    rows = [
        [
            e["layer"],
            e["expert"],
            f"{e['npmi']:.3f}",
            *(f"{e['markers'][m]:.3f}" for m in markers),
            e["tokens"],
        ]
        for e in found
    ]
    out.line()
    out.line("experts tied to markers (nPMI; 1: exactly at them, 0: independent)")
    out.table(["layer", "expert", "mean", *markers, "tokens"], rows)


def _weights(out: Output, layers: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for layer in layers:
        norms, rows_ = layer["norms"], layer["router_norms"]
        rows.append([
            layer["layer"], *_spread(norms), *_spread(rows_), _f(layer["router_cosine"], "+.2f"),
            *_pair(layer["router_closest"], "+.2f"), *_pair(layer["closest"], ".2f"),
            *_spread([-s for s in layer["criteria"]["aimer"]] if layer["criteria"] else None, ".3f"),
            sum(len(group) - 1 for group in layer["duplicates"]),
        ])  # fmt: skip
    out.line()
    out.table(
        ["layer", "norm", "from", "to", "router row", "from", "to", "cosine", "closest rows", "", "closest experts", "",
         "AIMER", "from", "to", "copies"],
        rows,
    )  # fmt: skip
    out.line("closest experts: distance over their norm, 1.41 for unrelated ones. AIMER: mean over root mean square of weights, 0.80 for Gaussian ones.")  # fmt: skip


# ---- words -----------------------------------------------------------------------------------------


def _spread(values: Iterable[float] | None, form: str = ".3g") -> tuple[str, str, str]:
    found = sorted(values) if values is not None else []
    if not found:
        return "", "", ""
    return format(sum(found) / len(found), form), format(found[0], form), format(found[-1], form)


def _pair(found: Mapping[str, Any] | None, form: str) -> tuple[str, str]:
    if found is None:
        return "", ""
    return format(found["value"], form), "{}, {}".format(*found["experts"])


def _f(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _adjacent(layers: Sequence[int]) -> bool:
    return len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1))
