"""Results of ratings: mean grades, win rates, agreement of raters and of a reward model with them, preference rows.

The unit is the prompt: ratings of one prompt are averaged first, so intervals and p-values are over prompts.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations

import numpy as np

from extras.lib.ratings import CRITERIA, PREFERENCES, is_complete, visible
from utils.data.preferences import prompt_turns
from utils.data.sources import Record
from utils.evaluation.statistics import interval, paired_difference, share_right, verdict, wins

SIDE_KEYS = ("name", "answer", "reward", "grade")  # of each side of a duel


def duels_of(items: dict[str, dict], ratings: list[dict], conditions: list[str]) -> list[dict]:
    """Return one entry for each pair of answers and rater, with its two sides in the order of `conditions`.

    An entry has prompt, turns, rater, names, answers, rewards, grades (mean grade of each answer, None if some are
    missing) and outcome: 1 if the second side is preferred, 0.5 for a tie. The outcome of two answers in one item is
    the preference. Without a preference, and for single answers to one prompt, it comes from the grades.
    """
    sides: dict[tuple, list[dict]] = defaultdict(list)
    for rating in ratings:
        item = items[rating["item"]]
        single = len(item["answers"]) == 1
        preference = None if single else PREFERENCES.get(rating["preference"])
        shares = (None, None) if preference is None else (1 - preference, preference)
        for i, name in enumerate(item["conditions"]):
            grades = list(rating["grades"][i].values())
            grade = sum(grades) / len(grades) if len(grades) == len(CRITERIA) else None
            side = {"name": name, "answer": item["answers"][i], "reward": item["rewards"][i], "grade": grade}
            side |= {"turns": item["turns"], "share": shares[i]}
            sides[rating["rater"], item["prompt"], "" if single else item["id"]].append(side)
    duels = []
    for (rater, prompt, _), answers in sides.items():
        answers.sort(key=lambda side: conditions.index(side["name"]))
        for pair in combinations(answers, 2):
            outcome = outcome_of(*pair)
            if outcome is not None and pair[0]["name"] != pair[1]["name"]:
                duel = {"prompt": prompt, "turns": pair[0]["turns"], "rater": rater, "outcome": outcome}
                duels.append(duel | {f"{key}s": tuple(side[key] for side in pair) for key in SIDE_KEYS})
    return duels


def outcome_of(first: dict, second: dict) -> float | None:
    """Return 1 if the second side is preferred, 0.5 for a tie, None if the answers are not rated."""
    if second["share"] is not None:
        return second["share"]
    grades = (second["grade"], first["grade"])
    return None if None in grades else float(wins(*map(np.array, grades)))


def over_raters(duels: list[dict]) -> list[dict]:
    """Return one entry for each pair of answers; its outcome and grades are means over the raters."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for duel in duels:
        groups[duel["prompt"], duel["names"], duel["answers"]].append(duel)
    averaged = []
    for group in groups.values():
        sides = list(zip(*(duel["grades"] for duel in group), strict=True))
        grades = tuple(None if None in side else sum(side) / len(side) for side in sides)
        outcome = sum(duel["outcome"] for duel in group) / len(group)
        averaged.append(group[0] | {"rater": "", "outcome": outcome, "grades": grades})
    return averaged


def by_prompt(values: Iterable[tuple[str, float]]) -> np.ndarray:
    """Return the mean value of each prompt [prompts]. values: (prompt, value)."""
    groups: dict[str, list[float]] = defaultdict(list)
    for prompt, value in values:
        groups[prompt].append(value)
    return np.array([np.mean(group) for group in groups.values()])


def grade_means(items: dict[str, dict], ratings: list[dict], conditions: list[str]) -> dict[str, dict]:
    """Return {condition: {criterion: mean, low, high, prompts}}, only those that have grades."""
    grades: dict[tuple, list[tuple[str, int]]] = defaultdict(list)
    for rating in ratings:
        item = items[rating["item"]]
        for name, side in zip(item["conditions"], rating["grades"], strict=True):
            for criterion, grade in side.items():
                grades[name, criterion].append((item["prompt"], grade))
    means: dict[str, dict] = {}
    for name in conditions:
        for criterion in CRITERIA:
            if (name, criterion) in grades:
                values = by_prompt(grades[name, criterion])
                low, high = interval(values)
                row = {"mean": float(values.mean()), "low": low, "high": high, "prompts": len(values)}
                means.setdefault(name, {})[criterion] = row
    return means


def win_rates(duels: list[dict]) -> list[dict]:
    """Return for each pair of conditions: first, second, prompts, win_rate of second over first, low, high, p_value.

    A tie counts half. p is from a permutation test that swaps winner and loser of each prompt.
    """
    rates = []
    for names in sorted({duel["names"] for duel in duels}):
        won = by_prompt((duel["prompt"], duel["outcome"]) for duel in duels if duel["names"] == names)
        share, p_value = share_right(won), paired_difference(won, np.full(len(won), 0.5))["p_value"]
        rate = {"first": names[0], "second": names[1], "prompts": share["pairs"], "win_rate": share["accuracy"]}
        rates.append(rate | {"low": share["low"], "high": share["high"], "p_value": p_value})
    return rates


def quadratic_kappa(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Cohen's kappa with quadratic weights of two raters' grades [grades]: 1 = equal, 0 = as by chance.

    1 - (mean squared difference) / (mean squared difference over all pairs of a grade of one and a grade of the other).
    https://doi.org/10.1037/h0026256. None if both raters gave the same single grade throughout.
    """
    expected = np.square(np.subtract.outer(one, other)).mean()
    return float(1 - np.square(one - other).mean() / expected) if expected else None


def rater_agreement(ratings: list[dict]) -> list[dict]:
    """Return for each two raters with common items: raters, items, preferences, equal_preferences, grades, kappa."""
    by_rater: dict[str, dict[str, dict]] = defaultdict(dict)
    for rating in ratings:
        by_rater[rating["rater"]][rating["item"]] = rating
    rows = []
    for one, other in combinations(sorted(by_rater), 2):
        both = [(by_rater[one][i], by_rater[other][i]) for i in by_rater[one] if i in by_rater[other]]
        if not both:
            continue
        preferences = [(a["preference"], b["preference"]) for a, b in both if a["preference"] and b["preference"]]
        sides = [pair for a, b in both for pair in zip(a["grades"], b["grades"], strict=True)]
        grades = np.array([(a[c], b[c]) for a, b in sides for c in CRITERIA if c in a and c in b], float).reshape(-1, 2)
        equal = float(np.mean([a == b for a, b in preferences])) if preferences else None
        row = {"raters": [one, other], "items": len(both), "preferences": len(preferences)}
        row |= {"equal_preferences": equal, "grades": len(grades)}
        rows.append(row | {"kappa": quadratic_kappa(*grades.T) if len(grades) else None})
    return rows


def reward_agreement(duels: list[dict]) -> dict[str, object]:
    """Return how often the reward model prefers the answer that people prefer, {} if no pair has rewards.

    accuracy, low, high are over prompts; a tie of either counts half. length: accuracy of the longer answer on the same
    pairs. verdict: whether the reward model is better than the longer answer.
    """
    scored = [duel for duel in duels if None not in duel["rewards"]]
    if not scored:
        return {}

    def agreement(duel: dict, values: tuple[float, ...]) -> tuple[str, float]:
        model = float(wins(*map(np.array, values[::-1])))
        return duel["prompt"], duel["outcome"] * model + (1 - duel["outcome"]) * (1 - model)

    rewards = by_prompt(agreement(duel, duel["rewards"]) for duel in scored)
    lengths = by_prompt(agreement(duel, tuple(map(len, duel["answers"]))) for duel in scored)
    share, length = share_right(rewards), float(lengths.mean())
    result = {"prompts": share["pairs"], "pairs": len(scored), "accuracy": share["accuracy"]}
    result |= {"low": share["low"], "high": share["high"], "length": length}
    return result | {"verdict": verdict(paired_difference(rewards, lengths), "'the longer answer wins'")}


def preference_rows(duels: list[dict]) -> tuple[list[Record], dict[str, int]]:
    """Return (rows, {reason: pairs left out}); a row has prompt, chosen, rejected, chosen_rating, rejected_rating.

    duels: the result of `over_raters`. The ratings are mean grades if every decided pair has all grades and
    they differ within it, else the shares of the raters. Pairs whose grades contradict the preference are left out.
    """
    decided = [duel for duel in duels if duel["outcome"] != 0.5 and len(set(duel["answers"])) > 1]
    graded = all(None not in duel["grades"] and len(set(duel["grades"])) > 1 for duel in decided)
    plain = all(prompt_turns(duel["prompt"]) == duel["turns"] for duel in duels)
    rows, dropped = [], {"tie": 0, "grades_disagree": 0, "equal_answers": 0}
    for duel in duels:
        ratings = duel["grades"] if graded else (1 - duel["outcome"], duel["outcome"])
        better = int(duel["outcome"] > 0.5)
        if duel["answers"][0] == duel["answers"][1]:
            dropped["equal_answers"] += 1
        elif duel["outcome"] == 0.5:
            dropped["tie"] += 1
        elif None not in duel["grades"] and duel["grades"][better] < duel["grades"][1 - better]:
            dropped["grades_disagree"] += 1
        else:
            row = {"prompt": duel["prompt"] if plain else duel["turns"]}
            row |= {"chosen": duel["answers"][better], "rejected": duel["answers"][1 - better]}
            rows.append(row | {"chosen_rating": ratings[better], "rejected_rating": ratings[1 - better]})
    return rows, {reason: count for reason, count in dropped.items() if count}


def summary(items: dict[str, dict], ratings: list[dict], conditions: list[str], duels: list[dict]) -> dict[str, object]:
    """Return the content of ratings.json. items: by id. duels: the result of `over_raters`."""
    return {
        "items": len(items),
        "items_rated": len({rating["item"] for rating in ratings}),
        "ratings": len(ratings),
        "incomplete": sum(not is_complete(rating) for rating in ratings),
        "raters": sorted({rating["rater"] for rating in ratings}),
        "means": grade_means(items, ratings, conditions),
        "win_rates": win_rates(duels),
        "agreement": rater_agreement(ratings),
        "reward_model": reward_agreement(duels),
    }


def format_summary(summary: dict) -> str:
    """Return the summary as text."""
    names = {name: " ".join(visible(name).split()) for name in summary["raters"]}
    lines = [f"{summary['items_rated']} of {summary['items']} items rated by {', '.join(names.values())}"]
    if summary["incomplete"]:
        lines[0] += f"; {summary['incomplete']} of {summary['ratings']} ratings are incomplete"
    for condition, means in summary["means"].items():
        lines.append(f"{condition}, mean grades (1 to 5) with 95 % intervals:")
        for name, m in means.items():
            lines.append(f"  {name:<13}{m['mean']:.2f} [{m['low']:.2f}, {m['high']:.2f}], {m['prompts']} prompts")
    for rate in summary["win_rates"]:
        lines.append(
            f"{rate['second']} is preferred to {rate['first']} on {rate['win_rate']:.2f} of {rate['prompts']} prompts "
            f"[{rate['low']:.2f}, {rate['high']:.2f}], ties half, p = {rate['p_value']:.2g}"
        )
    for row in summary["agreement"]:
        line = f"{' and '.join(names[name] for name in row['raters'])} on {row['items']} items"
        if row["preferences"]:
            line += f", {row['equal_preferences']:.2f} of {row['preferences']} preferences equal"
        kappa = "undefined" if row["kappa"] is None else f"{row['kappa']:.2f}"
        lines.append(f"{line}, quadratic kappa of {row['grades']} grades {kappa}")
    model = summary["reward_model"]
    if model:
        lines.append(
            f"the reward model agrees with the people on {model['accuracy']:.2f} of the pairs, mean over "
            f"{model['prompts']} prompts ({model['pairs']} pairs) [{model['low']:.2f}, {model['high']:.2f}]; "
            f"people prefer the longer answer on {model['length']:.2f}; the model is {model['verdict']}"
        )
    elif summary["win_rates"]:
        lines.append("set REWARD_MODEL to compare a reward model with the people")
    return "\n".join(lines)
