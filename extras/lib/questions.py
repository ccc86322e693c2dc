"""Draft answers to the five questions on REINFORCE (https://arxiv.org/abs/2402.14740), from measured numbers only."""

from pathlib import Path
from typing import Any

HEADS = ("scalar", "distribution")
MISSING = "No run was trained against a reward model with HEAD = {}: run train_reinforce.py with one."
NOT_COMPARED = "Two reward models have two scales: run extras.evaluate with POLICIES and a separate JUDGE_MODEL."
MORE = (
    "Its spread shows how sure the model is of one answer: the reward can subtract it, and a judge can abstain. "
    "Two distributions give P(a beats b) with ties; for two scalars it depends on their difference alone."
)
AT_EQUAL = "; reward at equal length {difference:+.3f} ({low:+.3f} to {high:+.3f})."
READING = (
    "The reward is the expected grade, the sum of k P(k) over the grades 1 to 10. Training uses the order of the "
    "grades, not their distances, so equal steps are our convention and a 7 is not a person's 7."
)
RLOO = "Its baseline is the mean of the other answers to a prompt; the assignment asks for a moving average over steps."
COMPARED = (
    "{mean_reward_before:.3f} before, {mean_reward_after:.3f} after, {difference:+.3f} [{difference_low:+.3f}, "
    "{difference_high:+.3f}], p = {p_value:.2g}, wins on {win_rate:.2f} of {prompts} prompts: {verdict}"
)
CHANGED = (
    "{name}: answers of {length_before:.0f} tokens before, {length_after:.0f} after; finished {ended_before:.2f} and "
    "{ended_after:.2f}; repetition {repetition_before:.3f} and {repetition_after:.3f}"
)


def questions(runs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return [(question, paragraphs)], [] without a REINFORCE run. runs: of make_report.read_run."""
    runs = [run for run in runs if run["result"]]
    trained = [run for run in runs if run["kind"] == "reinforce"]
    by_head = {head: [run for run in trained if run["record"]["reward_head"] == head] for head in HEADS}
    models = {head: model for head, group in by_head.items() if (model := reward_model_of(group, runs))}
    comparisons = [run for run in runs if run["kind"] == "comparison"]
    latest = max(comparisons, key=lambda run: run["record"]["started"], default=None)
    answers = [
        ("1. Did the mean reward on held-out prompts grow against the SFT model?", grew(by_head["scalar"])),
        ("2. What more can be used when there is a distribution?", [MORE, *measured(models)]),
        ("3. How is it read?", [READING]),
        ("4. Did alignment improve?", improved(latest["result"]) if latest else [NOT_COMPARED]),
        ("5. Why?", why(trained, models)),
        ("Why not TRL's RLOOTrainer?", [RLOO]),
    ]
    return answers if trained else []


def reward_model_of(trained: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the run that made the REWARD_MODEL of the first trained policy, None if it is not among `runs`."""
    folders = {Path(run["record"]["settings"]["REWARD_MODEL"]).resolve() for run in trained[:1]}
    return next((run for run in runs if run["kind"] == "reward" and Path(run["name"]).resolve() in folders), None)


def grew(trained: list[dict[str, Any]]) -> list[str]:
    """Quote the rewards before and after each training."""
    count = sum(run["result"]["verdict"] == "grew" for run in trained)
    lines = [f"It grew in {count} of {len(trained)} runs (p < 0.05)." if trained else MISSING.format("scalar")]
    for run in trained:
        result, judge = run["result"], run["result"].get("judge")
        lines.append(
            f"{run['name']} (seed {run['record']['seed']}): {COMPARED.format(**result)}; KL {result['kl']:.2f}."
        )
        lines += [f"By a judge that it was not trained against: {COMPARED.format(**judge)}."] if judge else []
    return lines


def measured(models: dict[str, dict[str, Any]]) -> list[str]:
    """Quote the reward models on held-out pairs: all pairs, the half they are surest of, calibration."""
    lines = [] if "distribution" in models else [MISSING.format("distribution")]
    for head, model in models.items():
        result = model["result"]
        line = f"{head}: {result['accuracy']:.3f} of {result['pairs']} pairs right"
        for name in ("margin", "spread"):
            half = (entry["accuracy"] for entry in result.get(f"coverage_by_{name}", ()) if entry["coverage"] == 0.5)
            line += "".join(f", {value:.3f} on the half it is surest of by {name}" for value in half)
        lines.append(f"{line}; calibration error {result['ece']:.3f}, Brier score {result['brier']:.3f}.")
    rows = {(model["result"]["pairs"], model["result"].get("measured_on")) for model in models.values()}
    return lines + ["They were not measured on the same pairs, so do not compare them."] * (len(rows) > 1)


def improved(result: dict[str, Any]) -> list[str]:
    """Compare the recipes by one judge, over seeds and with each other. result: eval.json of a comparison."""
    lines, name = [], "judge" if "judge" in result["over_seeds"] else "reward"
    for gain in result["over_seeds"][name]["gains"].values():
        spread = " (one run)" if gain["std"] is None else f" +- {gain['std']:.3f} from seed to seed"
        verdicts = ", ".join(result["policies"]["sampled"][run][name]["verdict"] for run in gain["runs"])
        runs = ", ".join(gain["runs"])
        lines.append(f"{runs}: by the {name} {gain['mean']:+.3f}{spread} against the start; by themselves {verdicts}.")
    for pair in result["over_seeds"][name]["between"]:
        values = f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}], p = {pair['p_value']:.2g}"
        seeds = "not known" if pair["p_over_seeds"] is None else f"p = {pair['p_over_seeds']:.2g}"
        lines.append(f"{pair['one']} and {pair['other']}: difference {values} over prompts; over seeds {seeds}.")
    return lines


def why(trained: list[dict[str, Any]], models: dict[str, dict[str, Any]]) -> list[str]:
    """Quote what the reward models learned and how the answers changed."""
    lines = []
    for head, model in models.items():
        r = model["result"]["length_correlation"]  # None if all rewards are equal
        correlation = "" if r is None else f"; its reward and log length correlate at {r:.2f}"
        lines.append(f"The {head} reward model is {model['result']['verdict']}{correlation}.")
    for run in trained:
        equal = run["result"]["difference_at_equal_length"]
        lines.append(CHANGED.format(**run["result"], name=run["name"]) + (AT_EQUAL.format(**equal) if equal else "."))
    return [*lines, "Read the answers below before you trust these numbers: a reward can grow while answers do not."]
