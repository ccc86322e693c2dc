"""Statistics of ratings: means with intervals, win rates, agreement of raters and of a reward model with them.

The unit is the prompt: ratings of one prompt are averaged first, so that intervals and p-values cover other prompts.
"""

from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np

from extras.lib.ratings import CRITERIA, PREFERENCES, is_complete, shown
from utils.evaluation.statistics import interval, paired_difference, share_right, verdict, wins


def duels_of(items: dict[str, dict], ratings: list[dict], conditions: list[str]) -> list[dict]:
    """Who beat whom, one entry for each pair of answers and rater: both names in the order of `conditions`.

    An entry has prompt, turns, rater, names, answers, rewards, grades (mean of an answer's grades, None where some are
    missing) and outcome: 1 where the second name is preferred, 0.5 at a tie. Two answers of one item are compared by
    the preference, or where there is none by the grades, as single answers to one prompt always are.
    """
    sides: dict[tuple, list[dict]] = {}
    for rating in ratings:
        item = items[rating["item"]]
        alone = len(item["answers"]) == 1
        key = (rating["rater"], item["prompt"], "" if alone else item["id"])
        for i, name in enumerate(item["conditions"]):
            grades = rating["grades"][i]
            mean = sum(grades.values()) / len(CRITERIA) if len(grades) == len(CRITERIA) else None
            side = {"name": name, "grade": mean, "answer": item["answers"][i], "reward": item["rewards"][i]}
            preferred = PREFERENCES.get(rating["preference"]) if not alone else None
            side |= {"turns": item["turns"], "share": None if preferred is None else (1 - preferred, preferred)[i]}
            sides.setdefault(key, []).append(side)
    found = []
    for (rater, prompt, _), answers in sides.items():
        answers = sorted(answers, key=lambda side: conditions.index(side["name"]))
        for pair in combinations(answers, 2):
            outcome = outcome_of(*pair)
            if outcome is not None and pair[0]["name"] != pair[1]["name"]:
                entry = {"prompt": prompt, "turns": pair[0]["turns"], "rater": rater, "outcome": outcome}
                plural = (("name", "names"), ("answer", "answers"), ("reward", "rewards"), ("grade", "grades"))
                found.append(entry | {many: tuple(side[one] for side in pair) for one, many in plural})
    return found


def outcome_of(first: dict, second: dict) -> float | None:
    """1 where the second side is preferred, 0.5 at a tie, None where neither is rated."""
    if second["share"] is not None:
        return second["share"]
    if first["grade"] is None or second["grade"] is None:
        return None
    return float(wins(np.array(second["grade"]), np.array(first["grade"])))


def over_raters(duels: list[dict]) -> list[dict]:
    """One entry for each pair of answers: outcome and grades are the means over its raters."""
    groups: dict[tuple, list[dict]] = {}
    for duel in duels:
        groups.setdefault((duel["prompt"], duel["names"], duel["answers"]), []).append(duel)
    found = []
    for group in groups.values():
        means = tuple(mean_or_none([duel["grades"][side] for duel in group]) for side in (0, 1))
        outcome = sum(duel["outcome"] for duel in group) / len(group)
        found.append(group[0] | {"rater": "", "outcome": outcome, "grades": means})
    return found


def mean_or_none(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def by_prompt(duels: Iterable[dict], value: Callable[[dict], float]) -> np.ndarray:
    """The mean of value(duel) over the duels of each prompt [prompts]."""
    found: dict[str, list[float]] = {}
    for duel in duels:
        found.setdefault(duel["prompt"], []).append(value(duel))
    return np.array([np.mean(values) for values in found.values()])


def grade_means(items: dict[str, dict], ratings: list[dict], conditions: list[str]) -> dict[str, dict]:
    """{condition: {criterion: mean, low, high, prompts}}; what has no grade is not there."""
    grades: dict[tuple, dict[str, list[int]]] = {}
    for rating in ratings:
        item = items[rating["item"]]
        for name, given in zip(item["conditions"], rating["grades"], strict=True):
            for criterion, grade in given.items():
                grades.setdefault((name, criterion), {}).setdefault(item["prompt"], []).append(grade)
    found = {}
    for key, prompts in grades.items():
        values = np.array([np.mean(given) for given in prompts.values()])
        low, high = interval(values)
        found[key] = {"mean": float(values.mean()), "low": low, "high": high, "prompts": len(values)}
    names = [name for name in conditions if any(name == key[0] for key in found)]
    return {name: {c: found[name, c] for c in CRITERIA if (name, c) in found} for name in names}


def win_rates(duels: list[dict]) -> list[dict]:
    """For each two conditions: second, first, prompts, win_rate of second over first with low, high, and p_value.

    A tie counts half; p from a permutation test that swaps winner and loser of each prompt.
    """
    found = []
    for names in sorted({duel["names"] for duel in duels}):
        won = by_prompt((duel for duel in duels if duel["names"] == names), lambda duel: duel["outcome"])
        share, p_value = share_right(won), paired_difference(won, np.full(len(won), 0.5))["p_value"]
        entry = {"first": names[0], "second": names[1], "prompts": share["pairs"], "win_rate": share["accuracy"]}
        found.append(entry | {"low": share["low"], "high": share["high"], "p_value": p_value})
    return found


def quadratic_kappa(one: np.ndarray, other: np.ndarray) -> float | None:
    """Cohen's kappa with quadratic weights of two raters' grades [grades]: 1 = equal, 0 = as chance would have it.

    1 - (mean squared difference) / (the same over all pairs of a grade of one and a grade of the other).
    https://doi.org/10.1037/h0026256. None where both raters gave one and the same grade throughout.
    """
    expected = np.square(np.subtract.outer(one, other)).mean()
    return float(1 - np.square(one - other).mean() / expected) if expected else None


def rater_agreement(ratings: list[dict]) -> list[dict]:
    """For each two raters with items in common: raters, items, preferences, equal_preferences, grades, kappa."""
    by_rater: dict[str, dict[str, dict]] = {}
    for rating in ratings:
        by_rater.setdefault(rating["rater"], {})[rating["item"]] = rating
    found = []
    for one, other in combinations(sorted(by_rater), 2):
        both = [(by_rater[one][i], by_rater[other][i]) for i in by_rater[one] if i in by_rater[other]]
        if not both:
            continue
        preferences = [(a["preference"], b["preference"]) for a, b in both if a["preference"] and b["preference"]]
        sides = [pair for a, b in both for pair in zip(a["grades"], b["grades"], strict=True)]
        grades = np.array([(a[c], b[c]) for a, b in sides for c in CRITERIA if c in a and c in b], float).reshape(-1, 2)
        equal = float(np.mean([a == b for a, b in preferences])) if preferences else None
        entry = {"raters": [one, other], "items": len(both), "preferences": len(preferences)}
        entry |= {"equal_preferences": equal, "grades": len(grades)}
        found.append(entry | {"kappa": quadratic_kappa(*grades.T) if len(grades) else None})
    return found


def reward_agreement(duels: list[dict]) -> dict[str, object]:
    """How often the reward model prefers the answer that the person prefers, beside 'the longer answer wins'; {} if
    no pair of answers has rewards.

    accuracy, low, high over prompts; a tie of either counts half. length: accuracy of the longer answer on the same
    pairs; verdict: whether the reward model is better than that.
    """
    known = [duel for duel in duels if None not in duel["rewards"]]
    if not known:
        return {}

    def agrees(duel: dict, measure: tuple[float, float]) -> float:
        model = float(wins(np.array(measure[1]), np.array(measure[0])))
        return duel["outcome"] * model + (1 - duel["outcome"]) * (1 - model)

    rewards = by_prompt(known, lambda duel: agrees(duel, duel["rewards"]))
    lengths = by_prompt(known, lambda duel: agrees(duel, tuple(map(len, duel["answers"]))))
    share = share_right(rewards)
    against = verdict(paired_difference(rewards, lengths), "'the longer answer wins'")
    found = {"prompts": share["pairs"], "pairs": len(known), "accuracy": share["accuracy"]}
    return found | {"low": share["low"], "high": share["high"], "length": float(lengths.mean()), "verdict": against}


def summary(items: dict[str, dict], ratings: list[dict], conditions: list[str]) -> dict[str, object]:
    """The content of ratings.json. items: by id. conditions: in the order in which they are compared."""
    duels = over_raters(duels_of(items, ratings, conditions))
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


def one_line(name: str) -> str:
    """A rater's name as a line may have it."""
    return " ".join(shown(name).split())


def format_summary(found: dict) -> str:
    """Return the summary in a few lines."""
    who = ", ".join(map(one_line, found["raters"]))
    lines = [f"{found['items_rated']} of {found['items']} items rated by {who}"]
    if found["incomplete"]:
        lines[0] += f"; {found['incomplete']} of {found['ratings']} ratings are not complete"
    for name, means in found["means"].items():
        lines.append(f"{name}, mean grades (1 to 5) with 95 % intervals:")
        lines += [
            f"  {c:<13}{m['mean']:.2f} [{m['low']:.2f}, {m['high']:.2f}], {m['prompts']} prompts"
            for c, m in means.items()
        ]
    for entry in found["win_rates"]:
        lines.append(
            f"{entry['second']} is preferred to {entry['first']} on {entry['win_rate']:.2f} of {entry['prompts']} "
            f"prompts [{entry['low']:.2f}, {entry['high']:.2f}], ties half, p = {entry['p_value']:.2g}"
        )
    for entry in found["agreement"]:
        parts = [f"{' and '.join(map(one_line, entry['raters']))} on {entry['items']} items"]
        if entry["preferences"]:
            parts.append(f"{entry['equal_preferences']:.2f} of {entry['preferences']} preferences equal")
        kappa = "undefined" if entry["kappa"] is None else f"{entry['kappa']:.2f}"
        parts.append(f"quadratic kappa of {entry['grades']} grades {kappa}")
        lines.append(", ".join(parts))
    model = found["reward_model"]
    if model:
        lines.append(
            f"the reward model prefers what the person prefers in {model['accuracy']:.2f} of the pairs, mean over "
            f"{model['prompts']} prompts ({model['pairs']} pairs) [{model['low']:.2f}, {model['high']:.2f}], "
            f"the longer answer in {model['length']:.2f}: {model['verdict']}"
        )
    elif found["win_rates"]:
        lines.append("agreement with a reward model: name REWARD_MODEL to see it")
    return "\n".join(lines)
