"""extras/evaluate.py compares policies, and the report averages runs over seeds and drafts answers."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_ind

from extras import evaluate, make_report
from extras.lib.frontier import names_of, over_seeds, p_over_seeds, recipes, spread
from extras.lib.questions import questions, reward_model_of
from tests.conftest import error_of, run_script
from tests.extras.browser import Browser
from utils.runs import write_json

SMALL = {"PROMPTS": 6, "MAX_NEW_TOKENS": 6, "DEVICE": "cpu", "PRECISION": "fp32", "BEST_OF_N": 3}


def test_policies_are_named_after_their_folders():
    assert names_of(("outputs/a", "outputs/b/")) == {"a": "outputs/a", "b": "outputs/b"}
    assert list(names_of(("one/run", "two/run"))) == ["one/run", "two/run"]
    for wrong in (("a", "a"), ("start",)):
        with pytest.raises(SystemExit, match="POLICIES = "):
            names_of(wrong)


def test_runs_that_differ_only_in_the_seed_are_one_recipe(tmp_path):
    for name, settings in {
        "a1": {"SEED": 1, "KL_BETA": 0.1, "OUTPUT_DIR": "a1"},
        "a2": {"SEED": 2, "KL_BETA": 0.1, "OUTPUT_DIR": "a2"},
        "b1": {"SEED": 1, "KL_BETA": 0.2, "OUTPUT_DIR": "b1"},
        "again": {"SEED": 2, "KL_BETA": 0.1, "OUTPUT_DIR": "again"},
    }.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", {"settings": settings})
    policies = {name: str(tmp_path / name) for name in ("a1", "b1", "a2", "again")}
    groups = recipes(policies | {"hub": "owner/name", "other": "owner/other"})
    assert groups == {"a1": ["a1", "a2"], "b1": ["b1"], "again": ["again"], "hub": ["hub"], "other": ["other"]}
    random = np.random.default_rng(0)
    start = random.normal(size=50)
    rewards = {"start": start, "a1": start + 1.0, "a2": start + 2.0, "b1": start + 0.1 * random.normal(size=50)}
    result = over_seeds({"a1": ["a1", "a2"], "b1": ["b1"]}, {"judge": rewards})["judge"]
    gains = result["gains"]
    assert gains["a1"]["mean"] == pytest.approx(1.5) and gains["a1"]["std"] == pytest.approx(0.5**0.5)
    assert gains["b1"]["std"] is None
    (between,) = result["between"]
    assert between["difference"] == pytest.approx(1.5, abs=0.1) and between["p_value"] < 0.01
    assert between["p_over_seeds"] is None, "one run of b1"
    rewards |= {"b2": start + 0.5}
    (between,) = over_seeds({"a1": ["a1", "a2"], "b1": ["b1", "b2"]}, {"judge": rewards})["judge"]["between"]
    gains = [[1.0, 2.0], [float((rewards["b1"] - start).mean()), 0.5]]
    assert between["p_over_seeds"] == pytest.approx(ttest_ind(*gains, equal_var=False).pvalue)
    assert p_over_seeds([1.0, 1.0], [2.0, 2.0]) is None, "without spread there is no test"


def seed_run(folder, seed, accuracy, script="train_reward_model.py", rows="a", **settings):
    """Write the files of a finished run with a seed."""
    folder.mkdir()
    settings |= {"SEED": seed, "OUTPUT_DIR": str(folder), "USE_LORA": False}
    record = {"script": script, "started": "2026-03-01 10:00:00", "commit": "none", "versions": {}, "command": "python"}
    write_json(folder / "run.json", record | {"seed": seed, "settings": settings, "data_fingerprint": rows})
    result = {"accuracy": accuracy, "length_matched_accuracy": None, "length_correlation": accuracy / 2}
    write_json(folder / "eval.json", result)


def test_the_report_averages_runs_over_seeds(tmp_path):
    for seed, accuracy in ((1, 0.5), (2, 0.6), (3, 0.8)):
        seed_run(tmp_path / f"reward_{seed}", seed, accuracy, RATING="")
        seed_run(tmp_path / f"dpo_{seed}", seed, accuracy / 2, "train_dpo.py", MODEL_SHORT_NAME=str(seed))
    seed_run(tmp_path / "other_rows", 4, 0.1, rows="b", RATING="")
    seed_run(tmp_path / "other_setting", 5, 0.1, RATING="goodness")
    seed_run(tmp_path / "other_script", 6, 0.1, "evaluate.py", RATING="")
    seed_run(tmp_path / "same_seed", 3, 0.1, RATING="")
    runs = [make_report.read_run(folder) for folder in make_report.find_runs((), (str(tmp_path),))]
    reward, dpo = make_report.over_seeds(runs)
    assert reward["runs"] == [str(tmp_path / f"reward_{seed}") for seed in (1, 2, 3)] and reward["seeds"] == [1, 2, 3]
    assert set(reward["metrics"]) == {"accuracy", "length_correlation"}, "no pair is of equal length"
    result = reward["metrics"]["accuracy"]
    assert result["values"] == [0.5, 0.6, 0.8] and result["mean"] == pytest.approx(np.mean(result["values"]))
    assert result["std"] == pytest.approx(np.std(result["values"], ddof=1))
    assert dpo["metrics"]["accuracy"]["values"] == [0.25, 0.3, 0.4] and list(dpo["metrics"]) == ["accuracy"]
    assert spread([0.5])["std"] is None
    page = make_report.page(runs, [reward, dpo], [], [])
    assert "seeds 1, 2, 3" in page and f"{result['mean']:.3f}" in page and f"{result['std']:.3f}" in page


@pytest.fixture(scope="module")
def compared(tmp_path_factory, model_folder, sample_folder, judges):
    """Compare a copy of the start and a policy with noise on its weights, and return the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    work = tmp_path_factory.mktemp("compared")
    shutil.copytree(model_folder, work / "same")
    shutil.copytree(model_folder, work / "pushed")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(0)
    for value in model.parameters():
        value.data += 0.2 * torch.randn_like(value)
    model.save_pretrained(work / "pushed")
    where = {"MODEL": model_folder, "DATA_DIR": sample_folder, "OUTPUT_DIR": work / "comparison"}
    judged = {"REWARD_MODEL": judges["scalar"], "JUDGE_MODEL": judges["distribution"]}
    run_script(evaluate, **SMALL | where | judged | {"POLICIES": f"{work}/same,{work}/pushed"})
    return work / "comparison"


def test_policies_are_compared_by_reward_judge_and_kl(compared):
    result = json.loads((compared / "eval.json").read_text())
    for way in ("sampled", "greedy"):
        measured = result["policies"][way]
        assert {"start", "same", "pushed"} <= set(measured)
        for judge in ("reward", "judge"):
            same, pushed = measured["same"][judge], measured["pushed"][judge]
            assert same["verdict"] == "not shown" and same["win_rate"] == 0.5 and same["difference"] == 0.0
            assert pushed["difference"] == pytest.approx(pushed["mean"] - measured["start"][judge]["mean"])
        if way == "greedy":
            assert measured["pushed"]["kl"] is None, "greedy answers have no KL"
            continue
        assert abs(measured["same"]["kl"]) < 1e-3 and measured["pushed"]["kl"] > 0.5
    sampled = result["policies"]["sampled"]
    assert sampled["best of 3"]["reward"]["difference"] > 0 and "best of 3" not in result["policies"]["greedy"]
    assert {path.name for path in compared.glob("*.png")} == {"frontier_reward.png", "frontier_judge.png"}
    lines = [json.loads(line) for line in (compared / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and {line["way"] for line in lines} == {"sampled", "greedy"}
    mean = np.mean([line["judge"]["pushed"] for line in lines if line["way"] == "sampled"])
    assert sampled["pushed"]["judge"]["mean"] == pytest.approx(mean)


@pytest.mark.parametrize(
    "constants, message",
    [
        ({"POLICIES": "nowhere"}, "POLICIES = 'nowhere' cannot be loaded"),
        ({"POLICIES": "x", "TEMPERATURE": 0.0}, "TEMPERATURE = 0.0: expected more than 0"),
        ({"POLICIES": "x", "PROMPTS": -1}, "PROMPTS = -1: expected 0 or more"),
        ({"POLICIES": "x", "JUDGE_MODEL": "nowhere"}, "JUDGE_MODEL = 'nowhere' is not there"),
    ],
)
def test_user_errors_stop_with_one_message(constants, message, model_folder, sample_folder, judges, tmp_path):
    where = {"MODEL": model_folder, "DATA_DIR": sample_folder, "OUTPUT_DIR": tmp_path / "run"}
    options = SMALL | where | {"REWARD_MODEL": judges["scalar"]} | constants
    assert message in error_of(evaluate, **options) and not (tmp_path / "run").exists()


# the drafted answers

GREW = {
    "prompts": 60, "mean_reward_before": 1.0, "mean_reward_after": 1.5, "difference": 0.5, "difference_low": 0.3,
    "difference_high": 0.7, "p_value": 0.001, "win_rate": 0.7, "verdict": "grew", "kl": 3.0, "length_before": 40.0,
    "length_after": 50.0, "ended_before": 0.5, "ended_after": 0.2, "repetition_before": 0.01, "repetition_after": 0.02,
    "difference_at_equal_length": {"difference": 0.1, "low": -0.1, "high": 0.3},
}  # fmt: skip
FELL = GREW | {"verdict": "not shown", "p_value": 0.4, "difference_at_equal_length": None, "judge": GREW}
MODEL = {
    "accuracy": 0.58, "pairs": 80, "verdict": "not shown to be better than 'longer wins'", "length_correlation": 0.6,
    "reward_std": 0.4, "ece": 0.07, "brier": 0.24, "coverage_by_margin": [{"coverage": 0.5, "accuracy": 0.65}],
    "coverage_by_spread": [{"coverage": 0.5, "accuracy": 0.61}],
}  # fmt: skip


def trained(name, head, result):
    settings = {"REWARD_MODEL": f"outputs/{head}", "SEED": 1}
    record = {"reward_head": head, "seed": 1, "settings": settings}
    return {"name": name, "kind": "reinforce", "record": record, "result": result}


def reward_model(head):
    record = {"settings": {"RATING_WEIGHT": 0.0}}
    return {"name": f"outputs/{head}", "kind": "reward", "record": record, "result": MODEL}


def comparison(started, verdict):
    gain = {"runs": ["a"], "values": [0.2], "mean": 0.2, "std": None}
    result = {"over_seeds": {"reward": {"gains": {"a": gain}, "between": []}}, "prompts": 9}
    result["policies"] = {"sampled": {"a": {"reward": {"verdict": verdict}}}}
    return {"name": started, "kind": "comparison", "record": {"started": started}, "result": result}


def test_the_draft_quotes_the_measured_numbers():
    runs = [trained("a", "scalar", GREW), trained("b", "scalar", FELL), trained("c", "distribution", GREW)]
    result = questions([*runs, reward_model("scalar"), reward_model("distribution")])
    first, more, read, improved, why, _ = (" ".join(paragraphs) for _, paragraphs in result)
    assert "It grew in 1 of 2 runs" in first and "+0.500 [+0.300, +0.700], p = 0.001, wins on 0.70" in first
    assert "By a judge that it was not trained against" in first
    assert "0.580 of 80 pairs right, 0.650 on the half it is surest of by margin, 0.610 on" in more
    assert "equal steps are our convention" in read and "not measured on the same pairs" not in more
    assert "run extras.evaluate with POLICIES" in improved, "two scales cannot be compared"
    assert "not shown to be better than 'longer wins'" in why and "+0.100 (-0.100 to +0.300)" in why
    elsewhere = reward_model("distribution") | {"result": MODEL | {"pairs": 70}}
    comparisons = [comparison("2026-02", "grew"), comparison("2026-01", "")]
    result = questions([*runs, reward_model("scalar"), elsewhere, *comparisons])
    assert "were not measured on the same pairs" in result[1][1][-1]
    assert result[3][1] == ["a: by the reward +0.200 (one run) against the start; by themselves grew."], "the later one"


def test_a_reward_model_is_found_by_another_path_of_its_folder():
    run = {"record": {"settings": {"REWARD_MODEL": "outputs/../outputs/reward_model"}}}
    other = {"name": str(Path("outputs/reward_model").resolve()), "kind": "reward"}
    assert reward_model_of([run], [run | {"name": "a", "kind": "reinforce"}, other]) is other
    assert reward_model_of([run], [other | {"kind": "policy"}]) is None


def test_the_draft_names_missing_runs():
    assert questions([reward_model("scalar")]) == []
    texts = [" ".join(paragraphs) for _, paragraphs in questions([trained("a", "distribution", FELL)])]
    assert "No run was trained against a reward model with HEAD = scalar" in texts[0]
    assert "No run was trained against a reward model with HEAD = distribution" in texts[1]


def test_the_page_shows_a_comparison(compared, tmp_path):
    """In a browser, nothing is downloaded, a sample opens at a click, and the page fits a phone."""
    run_script(make_report, OUTPUT=tmp_path / "all.html", LOOK_IN=compared)
    everything = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert "Not here: a run of python train_reward_model.py" in everything and "Greedy answers" in everything
    run_script(make_report, RUNS=compared, OUTPUT=tmp_path / "page.html", LOOK_IN=tmp_path)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "best of 3" in page and "Greedy answers" in page and page.count("data:image/png;base64,") == 2
    assert "Not here:" not in page, "a report on one run names no missing runs"
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html")
        assert browser.texts("h3")[:2] == ["Sampled answers", "Greedy answers"]
        assert browser.value("document.querySelectorAll('details[open]').length") == 0
        loaded = "[...document.images].every((image) => image.complete && image.naturalWidth > 0)"
        browser.value("[...document.images].forEach((image) => { image.loading = 'eager'; })")  # else the page moves
        assert any(browser.value(loaded) or time.sleep(0.1) for _ in range(100))
        browser.click("details summary")
        assert browser.value("document.querySelectorAll('details[open]').length") == 1
        sent = [event["params"] for event in browser.events if "requestWillBeSent" in event["method"]]
        assert all(params["request"]["url"].startswith(("file:", "data:")) for params in sent)
        browser.screenshot(tmp_path / "phone.png", 390, 800, dark=True)
        assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
