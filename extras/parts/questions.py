"""Drafted answers to the five questions of the assignment, made of measured figures only; what is missing is named.

They are about REINFORCE (https://arxiv.org/abs/2402.14740) against a reward model that gives a number, then against one
that gives a distribution over grades. A question without its runs is answered by the command that makes them.
"""

from pathlib import Path

RLOO = (
    "TRL's RLOOTrainer was not used: its baseline is the mean of the other answers to the same prompt, so it needs "
    "at least two answers a prompt and refuses one; the baseline of the assignment is a moving average over steps. "
    "It also clips a ratio of new and old probabilities, as PPO does, for the case of several passes over the same "
    "samples. Here every sample is used once, by the policy that wrote it."
)


def questions(runs: list[dict]) -> list[tuple[str, list[str]]]:
    """[(question, paragraphs)] from the run folders of a report, [] where no run used REINFORCE.

    runs: name, kind, record (run.json) and result (eval.json) of each.
    """
    trained = [run for run in runs if run["kind"] == "reinforce" and run["result"]]
    if not trained:
        return []
    by_head = {head: [run for run in trained if run["record"]["reward_head"] == head] for head in HEADS}
    models = {head: reward_model_of(found, runs) for head, found in by_head.items()}
    compared = latest_comparison(runs)
    return [
        ("1. Did the mean reward on held-out prompts grow against the SFT model?", grew(by_head["scalar"], "scalar")),
        ("2. What more can be used when there is a distribution?", more(models)),
        ("3. How is it read?", how_it_is_read(models["distribution"])),
        ("4. Did alignment improve?", improved(by_head, compared)),
        ("5. Why?", why(by_head, models)),
        ("Why not TRL's RLOOTrainer?", [RLOO]),
    ]


HEADS = ("scalar", "distribution")


def latest_comparison(runs: list[dict]) -> dict | None:
    """The comparison of policies that was started last, None without one."""
    found = [run for run in runs if run["kind"] == "comparison" and run["result"]]
    return max(found, key=lambda run: run["record"]["started"], default=None)


def reward_model_of(trained: list[dict], runs: list[dict]) -> dict | None:
    """The run of the reward model that the first of `trained` used, None where it is not in the report."""
    for run in trained[:1]:
        wanted = Path(run["record"]["settings"]["REWARD_MODEL"]).resolve()
        found = (other for other in runs if other["kind"] == "reward" and Path(other["name"]).resolve() == wanted)
        return next(found, None)
    return None


def missing(head: str) -> list[str]:
    return [f"No run was trained against a reward model with HEAD = {head}: run train_reinforce.py with one."]


def told(found: dict) -> str:
    """A comparison in one clause."""
    return (
        f"{found['mean_reward_before']:.3f} before, {found['mean_reward_after']:.3f} after, difference "
        f"{found['difference']:+.3f} (95 % interval {found['difference_low']:+.3f} to "
        f"{found['difference_high']:+.3f}, p = {found['p_value']:.2g}), wins on {found['win_rate']:.2f} of "
        f"{found['prompts']} prompts: {found['verdict']}"
    )


def grew(trained: list[dict], head: str) -> list[str]:
    """One sentence a run, and how many of the runs grew."""
    if not trained:
        return missing(head)
    count = sum(run["result"]["verdict"] == "grew" for run in trained)
    lines = [f"In {count} of {len(trained)} runs it grew by more than chance allows (permutation test, p < 0.05)."]
    for run in trained:
        result = run["result"]
        line = f"{run['name']} (seed {run['record']['seed']}): {told(result)}; KL {result['kl']:.2f} nats an answer."
        if "judge" in result:
            line += f" By a judge that it was not trained against: {told(result['judge'])}."
        lines.append(line)
    return lines


def more(models: dict[str, dict | None]) -> list[str]:
    """What the distribution offered, and what that was worth on the pairs."""
    lines = [
        "Its spread and entropy say how sure the model is of an answer by itself: a policy can be rewarded with the "
        "expected grade minus RISK times the spread, and a judge can abstain. Two distributions give P(a beats b), "
        "ties included. A number has no spread, and its P(a beats b) is a function of the difference of two rewards "
        "alone."
    ]
    if not models["distribution"]:
        return [
            *lines,
            "The report of the distribution model is not among the runs, so nothing is quoted on its worth.",
        ]
    result = models["distribution"]["result"]
    by = {name: result[f"coverage_by_{name}"] for name in ("margin", "spread") if f"coverage_by_{name}" in result}
    for name, curve in by.items():
        half = next(entry["accuracy"] for entry in curve if entry["coverage"] == 0.5)
        lines.append(
            f"Abstaining on the half that it is least sure of, by {name}: {half:.3f} right, "
            f"against {result['accuracy']:.3f} on all {result['pairs']} pairs."
        )
    if models["scalar"]:
        other = models["scalar"]["result"]
        same = all(result.get(name) == other.get(name) for name in ("pairs", "measured_on", "length_baseline"))
        lines.append(
            f"Calibration of P(chosen wins): {calibrated(result)}; with a number {calibrated(other)} (a coin: 0.25)."
            + ("" if same else " The two were not measured on the same pairs, so this compares nothing.")
        )
    return lines


def calibrated(result: dict) -> str:
    """Expected error of calibration, what chance alone would make of it on so few pairs, and Brier score."""
    chance = result.get("ece_of_chance")  # runs of older versions have none
    by_chance = f" (in 95 % of such samples a perfectly calibrated model stays below {chance:.3f})" if chance else ""
    return f"expected error {result['ece']:.3f}{by_chance}, Brier score {result['brier']:.3f}"


def how_it_is_read(model: dict | None) -> list[str]:
    """The expected grade, and what it does not mean."""
    lines = [
        "The reward is the expected grade, the sum of k P(k) over the grades 1 to 10. The training maximises P(grade "
        "of chosen > grade of rejected), which knows the order of the grades and no distance between them. That they "
        "are equal steps apart is our convention: an expected grade of 7 is not the 7 of a person, and two answers "
        "whose distributions are wide may change places under other steps."
    ]
    weight = model["record"]["settings"]["RATING_WEIGHT"] if model else None
    if weight:
        lines.append(f"Here the ratings anchor the grades with a weight of {weight} (RATING_WEIGHT).")
    elif weight is not None:
        lines.append("Here no ratings anchor the grades (RATING_WEIGHT = 0); with them, they would have a meaning.")
    return lines


def improved(by_head: dict[str, list[dict]], compared: dict | None) -> list[str]:
    """Both recipes by one judge, from seed to seed and against each other."""
    lines = [] if by_head["distribution"] else missing("distribution")
    if not compared:
        how = "Run extras.evaluate with POLICIES and a JUDGE_MODEL that no policy was trained against."
        return [*lines, f"Two reward models are two scales, so they cannot answer this. {how}"]
    result = compared["result"]
    name = "judge" if "judge" in result["over_seeds"] else "reward"
    if name == "reward":
        lines.append("No JUDGE_MODEL was given, so this is by the reward model that some were trained against.")
    found = result["over_seeds"][name]
    for gain in found["gains"].values():
        values = ", ".join(f"{value:+.3f}" for value in gain["values"])
        single = " (one run, so nothing is known of another seed)"
        spread = single if gain["std"] is None else f" +- {gain['std']:.3f} from seed to seed"
        alone = ", ".join(result["policies"]["sampled"][run][name]["verdict"] for run in gain["runs"])
        lines.append(
            f"{', '.join(gain['runs'])}: by the {name} a mean difference to the start of {gain['mean']:+.3f}{spread} "
            f"({values}) on {result['prompts']} prompts; each run by itself: {alone}."
        )
    for pair in found["between"]:
        lines.append(
            f"{pair['one']} and {pair['other']}, means over their runs, {apart(pair)}: {pair['difference']:+.3f} "
            f"(95 % interval over prompts {pair['low']:+.3f} to {pair['high']:+.3f}, p = {pair['p_value']:.2g})."
        )
    if found["between"]:
        lines.append("Behind the runs of a head stands one reward model: what another one would do is not known.")
    best = next((found for name, found in result["policies"]["sampled"].items() if name.startswith("best of")), None)
    if best:
        lines.append(
            f"Beside them, the best of several answers of the start, chosen by the reward model: {told(best[name])}."
        )
    return lines


def apart(pair: dict) -> str:
    """Whether two recipes differ: on these prompts, and by more than other seeds would do."""
    if pair["p_value"] >= 0.05:
        return "are not shown to differ"
    seeds = pair.get("p_over_seeds")  # comparisons of older versions have none
    if seeds is None:
        return "differ on these prompts, in these runs; what other seeds would do is not known"
    if seeds >= 0.05:
        return f"differ on these prompts, but from seed to seed they vary as much (Welch's test: p = {seeds:.2g})"
    return f"differ, on these prompts and from seed to seed (Welch's test: p = {seeds:.2g})"


def why(by_head: dict[str, list[dict]], models: dict[str, dict | None]) -> list[str]:
    """What the reward models knew, and what the policies did with it."""
    lines = []
    for head, model in models.items():
        if model:
            result = model["result"]
            line = (
                f"The {head} reward model ranks {result['accuracy']:.3f} of {result['pairs']} held-out pairs right and "
                f"is {result['verdict']}. Its rewards have a standard deviation of {result['reward_std']:.2f}, which "
                "KL_BETA has to hold."
            )
            length = result["length_correlation"]  # None where all rewards are equal
            known = f" Its reward and log length correlate at {length:.2f}." if length is not None else ""
            chosen = " Its epoch was chosen on these same pairs, so this is a little too good."
            lines.append(line + known + (chosen if result.get("selection_shares_rows") else ""))
    for run in (run for runs in by_head.values() for run in runs):
        result = run["result"]
        line = (
            f"{run['name']}: answers of {result['length_before']:.0f} tokens before, {result['length_after']:.0f} "
            f"after; shares that came to an end {result['ended_before']:.2f} and {result['ended_after']:.2f}; "
            f"repetition {result['repetition_before']:.3f} and {result['repetition_after']:.3f}"
        )
        equal = result["difference_at_equal_length"]
        if equal:
            line += (
                f". At equal length the reward differs by {equal['difference']:+.3f} "
                f"({equal['low']:+.3f} to {equal['high']:+.3f})"
            )
        lines.append(line + ".")
    return [*lines, "Read the answers below before believing any of it: a reward can grow while the answers do not."]
