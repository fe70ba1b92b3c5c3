"""The page that `compare.py` writes: RESULTS.md from rows.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LAYOUTS = {"uniform": "uniform", "ragged": "global"}


def number(found: Mapping[str, float], signed: bool = False) -> str:
    """Return "mean [low, high]"."""
    sign = "+" if signed else ""
    return f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(rows: Mapping[str, Any]) -> str:
    """Return the whole page."""
    parts = [_model(rows), _mixed(rows), _domains(rows), _localisation(rows), _channels(rows), _supers(rows), _written(rows)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _model(rows: Mapping[str, Any]) -> str:
    training, routing = rows["training"], rows["training"]["routing"]
    recipe = training["recipe"]
    losses = ", ".join(f"{name} {value:.3f}" for name, value in rows["parent"]["loss"].items())
    blocks = next(iter(rows["blocks"].values()))
    return f"""# Experts: what pruning keeps

`python benchmarks/experts/compare.py MODEL --output OUT`, {rows["versions"]["machine"]}, torch {rows["versions"]["torch"]},
transformers {rows["versions"]["transformers"]}, one core. The model is a Qwen3-MoE of {training["parameters"] / 1e6:.2f} million
parameters trained by `train.py` for {training["steps"]} steps ({training["tokens"]["seen"] / 1e6:.1f} million tokens, {training["seconds"] / 60:.0f} minutes): {recipe["layers"]} layers of {recipe["experts"]} experts
of width {recipe["width"]}, {recipe["per_token"]} a token. Loss is nats per token on {blocks} blocks of {recipe["context"]} tokens a domain, of documents that neither
training nor calibration saw; the model's own: {losses}. Calibration: {rows["calibration"]["samples"]} passages,
{rows["calibration"]["tokens"]:,} tokens, of other documents; one pass for all criteria that score experts.

Routing has specialised: {routing["specialised"]:.0%} of the {routing["experts"]} experts have a domain distribution at least 0.25 (total variation) from
uniform, {routing["one domain"]:.0%} get three quarters of their load from one domain, {routing["unused"]:.0%} are nearly unused; two domains' loads differ by
{", ".join(f"{value:.2f}" for value in routing["distance"])} (total variation, by layer).

All intervals are 95 %. Those of losses are bootstrap over blocks; where random draws are involved, over blocks and draws. A small
model: these figures check the methods and say nothing about what large models lose."""


def _mixed(rows: Mapping[str, Any]) -> str:
    domains = list(rows["parent"]["loss"])
    found = []
    for share in sorted({row["share"] for row in rows["mixed"]}, reverse=True):
        group = sorted((row for row in rows["mixed"] if row["share"] == share), key=lambda row: row["mean increase"]["mean"])  # fmt: skip
        for row in group:
            chance = row["criterion"] == "random"
            best = (
                ""
                if chance
                else "best"
                if row["best"]
                else "as good"
                if row["against best"]["low"] <= 0
                else ""
            )
            found.append([
                f"{share:.0%}", "**random, mean of 20**" if chance else row["criterion"],
                *(f"{row['loss'][domain]:.3f}" for domain in domains), number(row["mean increase"], True),
                f"draws {number(row['draws'])}" if chance else number(row["against random"], True), best,
            ])  # fmt: skip
    clear, worse = _against_random(rows["mixed"])
    return f"""## Whole experts, calibrated on all domains

Loss by domain; the mean increase over domains; the difference of that to the mean of 20 random draws (negative: better than chance; for
random itself: where 95 % of the draws' mean losses lie). "as good": the paired interval of the difference to the best of that share
includes zero. Domains are mixed as `surgeon.prune` does it: means over
tokens (reap, reap-l2, man, msan) score all text as one, the others are normalised within each domain and averaged; "(by domain)" and "(pooled)" are the other way. stun, hc-smoe and m-smoe are measured on written models, everything else under masks. naee
searches greedily, on {rows["naee"]["tokens"]:,} evenly spaced tokens of the text.

{table(["kept", "criterion", *domains, "mean increase", "against random", ""], found)}

Better than the random mean beyond the interval: {clear}.
Worse than the random mean beyond the interval: {worse}."""


def _against_random(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Say which criteria are better, and which worse, than chance, by share."""
    better, worse = [], []
    for share in sorted({row["share"] for row in rows}, reverse=True):
        group = [row for row in rows if row["share"] == share and "against random" in row]
        low = [row["criterion"] for row in group if row["against random"]["high"] < 0]
        high = [row["criterion"] for row in group if row["against random"]["low"] > 0]
        better.append(f"at {share:.0%} {', '.join(low) or 'none'}")
        worse.append(f"at {share:.0%} {', '.join(high) or 'none'}")
    return "; ".join(better), "; ".join(worse)


def _domains(rows: Mapping[str, Any]) -> str:
    domains = list(rows["parent"]["loss"])
    found = []
    for share in sorted({row["share"] for row in rows["one domain"]}, reverse=True):
        for row in sorted(
            (one for one in rows["one domain"] if one["share"] == share), key=lambda one: one["own"]["mean"]
        ):
            best = "best" if row["best"] else "as good" if row["against best"]["low"] <= 0 else ""
            found.append([
                f"{share:.0%}", row["criterion"], *(f"{row['increase'][domain]:+.3f}" for domain in domains), number(row["own"], True),
                number(row["own against random"], True), best, number(row["others"], True), number(row["others against random"], True),
            ])  # fmt: skip
    damage = [
        [f"{row['share']:.0%}", row["domain"], *(number(row["increase"][domain], True) for domain in domains)]
        for row in rows["one domain, each"] if row["criterion"] == "easy-ep"
    ]  # fmt: skip
    return f"""## Whole experts, calibrated on one domain

One choice for each domain. Increase of each domain's loss under the choice made for it, the mean of these ("own"), and the mean increase under the
choices made for the other three ("others"): what specialising costs.

{table(["kept", "criterion", *domains, "own", "own, against random", "", "others", "others, against random"], found)}

EASY-EP's damage, domain by domain (row: chosen for; column: measured on):

{table(["kept", "chosen for", *domains], damage)}"""


def _localisation(rows: Mapping[str, Any]) -> str:
    found = [
        [row["domain"], str(row["demonstrations"]), f"{row['tokens']:,.0f}", number(row["overlap"]),
         ", ".join(f"{value:.2f}" for value in row["by layer"]), number(row["increase"], True), number(row["increase of all"], True),
         number(row["increase of random"], True)]
        for row in rows["localisation"]
    ]  # fmt: skip
    across = [[one, *(f"{value:.2f}" for value in others.values())] for one, others in rows["overlap of domains"].items()]  # fmt: skip
    return f"""## EASY-EP: how few demonstrations localise the experts

Half of the experts, chosen from 5, 10 and 25 demonstrations of a domain ({rows["localisation"][0]["of"]} in all, each of about 124 tokens). Overlap: share of kept
experts in common with the choice from all of them; mean and where 95 % of 200 draws lie; by chance it would be 0.50. The increase of the
loss on that domain is the mean of 5 of these draws.

{table(["domain", "demonstrations", "tokens", "overlap with all", "by layer", "increase", "increase, all demonstrations", "increase, random experts"], found)}

Overlap of the halves chosen for two domains:

{table(["", *rows["overlap of domains"]], across)}"""


def _channels(rows: Mapping[str, Any]) -> str:
    found = []
    for row in rows["channels"]:
        found.append([
            f"{row['sparsity']:.0%}", LAYOUTS[row["layout"]], row["criterion"], *(f"{value:.3f}" for value in row["loss"].values()),
            number(row["mean increase"], True), number(row["against random"], True) if "against random" in row else "",
            number(row["against magnitude"], True) if "against magnitude" in row else "",
        ])  # fmt: skip
    domains = list(rows["parent"]["loss"])
    return f"""## Channels of experts

HEAPr's scores on the same calibration text, against the magnitude criterion and random channels (mean of {rows["random channel draws"]} draws). "uniform": every
expert keeps equally many channels, which stock readers load; "global": one ranking over all layers and experts (the paper's), evaluated with
the channels that go set to zero (only there does heapr-all, the score times the expert's share of tokens, differ from heapr). Exact shares, without rounding widths for kernels.

{table(["removed", "layout", "criterion", *domains, "mean increase", "against random", "against magnitude"], found)}"""


def _supers(rows: Mapping[str, Any]) -> str:
    found = rows["super experts"]
    if not found:
        said = "None found: no expert's largest output stands out by the rule."
    else:
        said = "; ".join(f"layer {one['layer']} expert {one['expert']}, largest output {one['peak']:.1f}, "
                         f"{'certain' if one['certain'] else 'a candidate'}" for one in found) + "."  # fmt: skip
    layers = "; ".join(
        f"layer {number} {one['largest']:.1f} ({one['median']:.1f})"
        for number, one in enumerate(rows["peaks"]["layers"])
    )
    return f"""## Super experts

{said} Largest output of any expert, and the median over a layer's experts: {layers}. Comparisons above are without protection."""


def _written(rows: Mapping[str, Any]) -> str:
    found = [[row["criterion"], f"{row['largest difference']:.1e}"] for row in rows["written"]]
    return f"""## Masks against written models

For every criterion a model with half of the experts (for HEAPr, of the channels) was also written by `surgeon.prune` and read back by
transformers. Largest difference of a block's loss to that under masks:

{table(["criterion", "nats per token"], found)}"""
