"""What a run says in words: the same in the terminal, the report, the card and a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headstart.data.documents import Fit
from headstart.display import in_bytes, in_time
from headstart.evaluate.compare import MIN_ROWS
from headstart.evaluate.guard import FEW
from headstart.evaluate.measure import LABELS
from headstart.evaluate.surprise import in_bits
from headstart.report.watched import sign_facts

FILES = 20  # that are listed
ROWS_MOST = 100_000  # more are no help to anyone
SHARE = "+.1%"
VERDICTS = {
    "better": "better",
    "worse": "worse",
    "no_gain": "no clear gain",
    "not_measured": "not measured",
}


def clearness(told: Mapping[str, Any]) -> str:
    """Say how sure a difference is, of which its bounds, its direction and what it is over are told.

    Rows that are few can all change in one way by chance, with no zero in the interval.
    """
    if told["rows"] < MIN_ROWS:
        return f"needs {MIN_ROWS} {unit(told)}"
    if told["direction"]:
        return "better" if told["direction"] > 0 else "worse"
    return "may be chance" if told["low"] > 0 or told["high"] < 0 else "unclear"


def unit(told: Mapping[str, Any]) -> str:
    """Name what a metric is over: rows, or groups of rows that stand or fall together."""
    return "groups" if told.get("grouped") else "rows"


def over(told: Mapping[str, Any]) -> str:
    """Say over how many rows, or groups of rows, a metric is."""
    return f"{told['rows']:,} {unit(told)}".removesuffix("s" * (told["rows"] == 1))


def bounds(side: Mapping[str, Any], form: str = ".3f", between: str = ", ") -> str:
    """Say the bounds of an interval; of a single row, or group, none are known."""
    low, high = side["low"], side["high"]
    return "not known" if low is None or high is None else f"{low:{form}}{between}{high:{form}}"


def shift(gap: Mapping[str, Any]) -> str:
    """Say a difference with its interval, as tables have it."""
    return f"{gap['value']:+.3f} [{bounds(gap, '+.3f')}]"


def named(metric: str) -> str:
    """Return what people call a metric, with the data set that it is of where that was mixed in."""
    name, of, part = metric.partition(" of ")
    return f"{LABELS.get(name, name)}{of}{part}"


def sentence(result: Mapping[str, Any]) -> str:
    """Say the verdict with the figure that it rests on; where the guard made it, with what was lost too."""
    metric = result["difference"]["metric"]
    rows = f"on {over(result['differences'][metric])} that it never saw"
    rows += ", before with a new head that gives 0 to all" * bool(result.get("new_head"))
    lost = guard_words(result["guard"]) if _guard_verdict(result) == "lost" else ""
    said = f"{VERDICTS[result['verdict']]}: {score_words(result, metric, rows)}"
    return "; ".join(filter(None, (said, old_words(result.get("old")), lost, needed_words(result))))


def score_words(result: Mapping[str, Any], metric: str, rows: str = "") -> str:
    """Say a metric before and after, with the interval of its difference."""
    before, after = result["before"][metric]["value"], result["after"][metric]["value"]
    gap = result["differences"][metric] if metric in result["differences"] else result["difference"]
    return " ".join(filter(None, (f"{named(metric)} {before:.3f} -> {after:.3f}", rows))) + _bounds(gap)


def _guard_verdict(result: Mapping[str, Any]) -> str:
    guard = result.get("guard", "")
    return "" if isinstance(guard, str) else str(guard["verdict"])


GUARD_VERDICTS = {
    "kept": "what it knew is kept",
    "lost": "what it knew is lost",
    "unclear": "it can't be told whether what it knew is kept",
    "too few rows": "too few rows to tell whether what it knew is kept",
}


def guard_words(guard: Mapping[str, Any]) -> str:
    """Say what became of what the model knew."""
    parts = [f"{name} {_share(part['loss']['value'])} loss" for name, part in guard["parts"].items()]
    return f"{GUARD_VERDICTS[guard['verdict']]}: {', '.join(parts)} (the bound is {_share(guard['bound'])})"


def cures(result: Mapping[str, Any], run: str) -> list[str]:
    """Say what can be done about what was lost, a line each; `run` is how a command names it. Nothing where nothing was lost."""
    found = []
    if _guard_verdict(result) == "lost":
        if result["method"] == "lora":
            found.append(f"headstart strength {run}: how much of what was learned can stay, so that what it knew does")
        if result["task"] in ("chat", "causal"):
            found.append(
                "-s data.mix=GENERAL.jsonl=0.2 in a new run: 20 rows of a general kind are learned beside each 100"
            )
    old = result.get("old")
    if isinstance(old, Mapping) and old["verdict"] == "lost":
        found.append("a larger --replay in a new update: more old rows are learned again beside each new one")
    return found


OLD_VERDICTS = {
    "kept": "what it learned before is kept",
    "lost": "what it learned before fell",
    "unclear": "it can't be told whether what it learned before is kept",
    FEW: "too few {unit} of old rows to tell whether what it learned before is kept",
}


def old_words(old: Mapping[str, Any] | str | None) -> str:
    """Say what became of the rows that were held out of the runs that a model comes from; nothing where it comes from none."""
    if not old:
        return ""
    if isinstance(old, str):
        return "old rows were not measured"
    parts = [
        f"{named(part['metric'])} {part['before']['value']:.3f} -> {part['after']['value']:.3f} on {over(part)} of {name}"
        for name, part in old["parts"].items()
    ]
    few: Mapping[str, Any] = next((part for part in old["parts"].values() if part["verdict"] == FEW), {})
    return f"{OLD_VERDICTS[old['verdict']].format(unit=unit(few))}: {', '.join(parts)}"


def few_words(part: Mapping[str, Any]) -> str:
    """Say the verdict on a part, and where it is over too few of what."""
    return f"too few {unit(part)}" if part["verdict"] == FEW else str(part["verdict"])


def old_lines(old: Mapping[str, Any] | str | None) -> list[tuple[str, ...]]:
    """Return a line for each run whose rows were to be kept: name, metric, over what, before, after, difference, bound, verdict."""
    if not old or isinstance(old, str):
        return []
    lines: list[tuple[str, ...]] = []
    for name, part in old["parts"].items():
        sides = (f"{part['before']['value']:.3f}", f"{part['after']['value']:.3f}")
        facts = (name, named(part["metric"]), over(part))
        lines.append((*facts, *sides, shift(part["difference"]), f"{part['bound']:.3g}", few_words(part)))
    return lines


def lineage_facts(lineage: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return from which run a model comes, as names and values."""
    if not lineage:
        return []
    facts = [("goes on from", lineage["run"]), ("whose result.json has SHA-256", lineage["result_sha256"][:16])]
    facts += [("learned from", f"{file['name']}, SHA-256 {file['sha256'][:16]}") for file in lineage["data"][:FILES]]
    if lineage["replay"] is not None:
        facts.append(("learned again", f"{lineage['replay']:g} old rows beside each new one"))
    return facts


def guard_lines(guard: Mapping[str, Any] | str) -> list[tuple[str, str, str, str, str]]:
    """Return a line for each part of the guard: name, before, after, how much its loss grew with the interval, what that means."""
    if isinstance(guard, str):
        return []
    lines = []
    for name, part in guard["parts"].items():
        loss = part["loss"]
        grown = f"{_share(loss['value'])} [{bounds(loss, SHARE)}]"
        lines.append((name, f"{part['before']['value']:.3f}", f"{part['after']['value']:.3f}", grown, part["verdict"]))
    return lines


def robust_words(robust: Mapping[str, Any] | str) -> str:
    """Say how it fares where inputs vary: the way that costs most, and whether it is still better than the untouched model.

    Of text that is predicted itself: the way in which least is gained over the untouched model.
    """
    if isinstance(robust, str):
        return ""
    said = []
    varied = robust["varied"]
    parts = {name: part for name, part in varied.items() if part["rows"] >= MIN_ROWS}
    if varied and not parts:
        said.append(
            f"too few {unit(next(iter(varied.values())))} to tell what it loses where inputs are written otherwise"
        )
    if parts:
        fell = {name: part for name, part in parts.items() if part["direction"] < 0}
        if is_predicted(robust):
            least = max(parts, key=lambda name: parts[name]["gain"]["value"])
            said.append(f"least is gained with {least}: {_change(parts[least], 'untouched', 'gain')}")
        elif fell:
            most = max(fell, key=lambda name: abs(fell[name]["difference"]["value"]))
            said.append(f"most is lost with {most}: {_change(fell[most], 'clean', 'difference')}")
        else:
            ways = f"in none of {len(parts)} ways of writing" if len(parts) > 1 else f"not with {next(iter(parts))}"
            said.append(f"{ways} is it clearly worse than on the rows as they are")
        better = sum(part["gain_direction"] > 0 for part in parts.values())
        where = f"in {better} of {len(parts)} ways of writing" if len(parts) > 1 else "there"
        said.append(f"{'not clearly ' * (len(parts) == 1 and not better)}better than the untouched model {where}")
    return "; ".join(filter(None, (*said, outside_words(robust))))


def is_predicted(robust: Mapping[str, Any]) -> bool:
    """Tell whether what is written otherwise is predicted itself: then it is another text, which has a price of its own."""
    return any(part["metric"] == "bits_per_byte" for part in robust["varied"].values())


def _change(part: Mapping[str, Any], side: str, difference: str) -> str:
    """Say what became of rows written otherwise, from a `side` on, with the `difference` to that."""
    sides = f"{part[side]['value']:.3f} -> {part['varied']['value']:.3f}"
    return f"{named(part['metric'])} {sides}{_bounds(part[difference])} on {over(part)}"


def outside_words(robust: Mapping[str, Any]) -> str:
    """Say how well confidence tells the job's rows from other text; nothing where that wasn't measured."""
    outside = robust["outside_auroc"]
    if isinstance(outside, str):
        return ""
    sides = f"{outside['before']['value']:.3f} -> {outside['after']['value']:.3f}"
    sure = f"95% interval {bounds(outside['after'], between=' to ')}"
    return f"its confidence tells text from outside the job with an AUROC of {sides} ({sure}; 0.5 is chance)"


def robust_lines(robust: Mapping[str, Any] | str) -> list[tuple[str, ...]]:
    """Return a line a way of writing: name, over what, untouched, tuned, the tuned model's rows as they are, difference to these, how sure.

    Of text that is predicted itself it is the difference to the untouched model.
    """
    if isinstance(robust, str):
        return []
    lines: list[tuple[str, ...]] = []
    for name, part in robust["varied"].items():
        gap, direction = part["difference"], part["direction"]
        if is_predicted(robust):
            gap, direction = part["gain"], part["gain_direction"]
        values = (f"{part[side]['value']:.3f}" for side in ("untouched", "varied", "clean"))
        lines.append((name, over(part), *values, shift(gap), clearness({**part, **gap, "direction": direction})))
    return lines


def surprise_lines(words: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return a line a word: itself, its times, and the bits that it cost before and after."""
    return [(item["word"], f"{item['times']:,}", in_bits(item["before"]), in_bits(item["after"])) for item in words]


def flips_words(flips: Mapping[str, Any] | None) -> str:
    """Say how many rows were put right and how many were put wrong."""
    if not flips:
        return ""
    if flips["metric"] == "loss":
        return f"the loss fell on {flips['fixed']:,} rows and rose on {flips['broken']:,}"
    rows = "row" if flips["fixed"] == 1 else "rows"
    chance = f"{chance_words(grouped=flips.get('grouped', False))} " + (
        f"{flips['p']:.3g}" if flips["p"] >= 0.001 else "below 0.001"
    )
    return f"{flips['fixed']:,} {rows} fixed and {flips['broken']:,} broken of {flips['rows']:,} ({chance})"


def wins_words(wins: Mapping[str, Any], side: str = "its answers", other: str = "the untouched model's") -> str:
    """Say how often the answers of one side beat those of the other."""
    rate = f"{wins['value']:.0%} (95% interval {bounds(wins, '.0%', ' to ')})"
    counts = f"{wins['wins']:,} won, {wins['losses']:,} lost, {wins['ties']:,} ties"
    return f"{side} win {rate} against {other}, by {wins['by']}: {counts} ({chance_words('sign test p', grouped=wins.get('grouped', False))} {wins['p']:.2g})"


def chance_words(test: str = "McNemar's exact p", *, grouped: bool) -> str:
    """Name the chance of so uneven a count: that of a `test` of rows, or of rows in groups, which aren't independent."""
    return "p by swaps of whole groups" if grouped else test


def needed_words(result: Mapping[str, Any]) -> str:
    """Say how many rows would decide, where these are too few."""
    needed = result.get("rows_needed")
    if not needed:
        return ""
    what = unit(result["differences"][result["difference"]["metric"]])
    if needed > ROWS_MOST:
        return "if there is a difference, it is too small to be seen in any number of rows that is at hand"
    if result["verdict"] == "not_measured":
        return f"too small to decide: at least {needed:,} {what} are needed"
    return f"too small to decide: if the difference is what it seems, about {needed:,} {what} would be needed"


def _bounds(gap: Mapping[str, float]) -> str:
    return f" ({gap['value']:+.3f}, 95% interval {bounds(gap, '+.3f', ' to ')})"


def _share(part: float) -> str:
    return f"{part:{SHARE}}"


def score_table(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Return a line a metric: its name, before, after, the difference with its interval, how sure it is, and what it is over."""
    lines = []
    for name, difference in result["differences"].items():
        before, after = result["before"][name]["value"], result["after"][name]["value"]
        sides = (f"{before:.3f}", f"{after:.3f}")
        lines.append((named(name), *sides, shift(difference), clearness(difference), over(difference)))
    return lines


PHASE_NAMES = {
    "data_s": "building packs",
    "forward_s": "forward",
    "backward_s": "backward",
    "optimizer_s": "optimizer",
}


def speed_facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return where the time of a run went, as names and values."""
    speed = result["speed"]
    train_s = max(speed["train_s"], 1e-9)
    phases = [
        (name, f"{in_time(speed[key])} ({speed[key] / train_s:.0%} of training)") for key, name in PHASE_NAMES.items()
    ]
    share = speed["product_rate_frac"]
    shared = speed["shared_tokens"]
    reached = (
        f"{share:.0%} of the {speed['product_rate'] / 1e9:,.0f} GFLOP/s that its products reach alone"
        if share is not None
        else "not measured"
    )
    return [
        ("real tokens", f"{speed['real_tokens_per_s']:,.0f} a second"),
        ("padding", "none: packs hold real tokens only"),
        ("shared", f"{shared:,} of {result['tokens']['rows']:,} tokens were not computed, since rows share them"),
        ("training", in_time(speed["train_s"])),
        *phases,
        ("scoring", in_time(speed["eval_s"])),
        ("saving", in_time(speed["save_s"])),
        ("of this machine", reached),
    ]


def trouble_facts(
    result: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], data: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return what went otherwise than planned on the way, as names and values; empty where nothing did."""
    memory = result["memory"]
    facts = [(f"step {line['step']}", f"left out: {line['not_finite']}") for line in metrics if "not_finite" in line]
    facts += [
        (f"step {line['step']}", f"a spike: loss {line['loss']:.3f}") for line in metrics if line.get("spike") is True
    ]
    if memory["out_of_memory_steps"]:
        steps = ", ".join(map(str, memory["out_of_memory_steps"]))
        facts.append(("out of memory", f"at step {steps}; then packs of {memory['tokens_per_pack']:,} tokens"))
    facts += sign_facts(result["watch"])
    facts += [("chosen answers", told) for told in fallen(result)]
    for once in data.get("allowed", []):
        facts += [(f"allowed on {once['date']}", change) for change in once["changes"]]
    return facts


def fallen(result: Mapping[str, Any]) -> list[str]:
    """Say that the chosen answers themselves became less likely, where they clearly did; else nothing."""
    difference = result["differences"].get("chosen_logprob")
    if difference is None or difference["direction"] >= 0:
        return []
    what = f"they became less likely, by {-difference['value']:.1f} nats an answer"
    return [f"{what}: what replaces them may be neither side; raise preference.likelihood or beta, or lower optim.lr"]


def plan_facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a plan says, as names and values."""
    saved = f", {plan['shared_frac']:.0%} of them shared and computed once" if plan["shared_frac"] >= 0.005 else ""
    packs = f"{plan['packs']:,} packs of at most {plan['tokens_per_pack']:,}, no padding"
    return [
        ("model", f"{plan['model']}, {plan['parameters'] / 1e6:,.0f}M parameters"),
        *([("begins with", plan["start"])] if plan.get("start") else []),
        ("method", f"{plan['method']}, {plan['trainable'] / 1e6:,.2f}M parameters trained{plan['modules']}"),
        (
            "rows",
            f"{plan['train_rows']:,} to train on, {plan['watch_rows']:,} to watch, {plan['proof_rows']:,} kept for the proof",
        ),
        (
            "steps",
            f"{plan['steps']:,} of {plan['batch_size']} rows ({plan['epochs']:g} epochs), lr {plan['lr']:g} {plan['schedule']}",
        ),
        *([("objective", plan["objective"])] if plan.get("objective") else []),
        ("tokens", f"{plan['row_tokens']:,}" + f", {plan['targets']:,} trained" * bool(plan["targets"]) + saved),
        ("packs", packs),
        ("engine", plan["engine"]),
        ("memory", f"{in_bytes(plan['memory_bytes'])} of {in_bytes(plan['memory_free_bytes'])} free"),
        (
            "time",
            f"about {in_time(plan['total_s'])} ({in_time(plan['train_s'])} training, {in_time(plan['eval_s'])} scoring, {in_time(plan['save_s'])} saving)",
        ),
        ("disk", in_bytes(plan["disk_bytes"])),
    ]


def data_lines(prepared: Any) -> list[str]:
    """Return what was found in the data, a line each."""
    lines = []
    for formed in prepared.formed:
        names = ", ".join(file.name for file in formed.files[:3])
        more = f" and {len(formed.files) - 3} more" if len(formed.files) > 3 else ""
        lines += [f"{names}{more}: {formed.detection}", *(f"  {note}" for note in formed.notes)]
    parts = prepared.parts
    if parts.duplicates:
        lines.append(f"{parts.duplicates:,} rows stand more than once")
    if parts.leaked:
        lines.append(f"{parts.leaked:,} rows to score on also stood in the training data; they are not trained on")
    if parts.held_before:
        lines.append(f"{parts.held_before:,} rows were held out before; they are not trained on")
    if parts.trained_before:
        lines.append(f"{parts.trained_before:,} rows were trained on before; they are not held out")
    if parts.near:
        what = f"{len(parts.near):,} rows to train on say nearly what a row to score on says; they are not trained on"
        lines.append(f"{what}; first {parts.near[0].where}, like {parts.near[0].like}")
    if parts.alike:
        lines.append(
            f"{parts.alike:,} rows to train on say nearly what a row to score on says: so many that they stay; what is gained "
            "on rows that are really new may be less (-s data.leaks=near takes them out)"
        )
    for name, part in (("train on", prepared.train), ("watch", prepared.watch), ("prove with", prepared.proof)):
        if part.dropped:
            longest = max(length for _, length in part.dropped)
            lines.append(f"{len(part.dropped):,} rows to {name} dropped whole: too long (up to {longest:,} tokens)")
        if part.cut:
            lines.append(f"{part.cut:,} rows to {name} were cut to the length")
    if prepared.fit:
        lines.append(f"the tokenizer on this text: {prepared.fit}")
    if prepared.problems:
        lines.append(f"{len(prepared.problems):,} rows can't be used")
    return lines


def data_facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a run's data record says, as names and values."""
    rows, tokens, targets = data["rows"], data["tokens"], data["targets"]
    facts = [
        (
            file["name"],
            f"{file['bytes']:,} bytes, SHA-256 {file['sha256'][:16]}{', ' + file['revision'] if file['revision'] else ''}",
        )
        for file in data["files"][:FILES]
    ]
    if len(data["files"]) > FILES:
        facts.append((f"and {len(data['files']) - FILES:,} more files", "with their hashes in data.json"))
    facts += [("format", f"{found['format']} ({found['certainty']}), {found['reads']}") for found in data["formats"]]
    names = {"train": "trained on", "watch": "watched", "proof": "kept for the proof"}
    facts += [
        (
            label,
            f"{rows[name]:,} rows, {tokens[name]:,} tokens"
            + f", {targets[name]:,} of them predicted" * bool(targets[name]),
        )
        for name, label in names.items()
    ]
    if data.get("fit"):
        facts.append(("tokenizer fit", str(Fit(**data["fit"]))))
    if data["duplicates"]:
        facts.append(("duplicates", f"{data['duplicates']:,} rows stand more than once"))
    if data["dropped"]["in_both"]:
        facts.append(
            ("in both", f"{data['dropped']['in_both']:,} rows to score on were taken out of the training data")
        )
    for key, what in (
        ("held_before", "held out before, and not trained on"),
        ("trained_before", "trained on before, and not held out"),
    ):
        if count := data["dropped"].get(key):
            facts.append(("old rows among the new", f"{count:,} rows were {what}"))
    if alike := data.get("alike"):
        facts.append(("nearly in both", f"{alike:,} rows nearly say what a row to score on says, and were trained on"))
    if near := data["dropped"].get("nearly_in_both"):
        what = f"{len(near):,} rows that say nearly what a row to score on says were taken out of the training data"
        facts.append(("nearly in both", what))
    return [*facts, *(("note", note) for note in data["notes"])]
