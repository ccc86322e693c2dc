"""extras/usage_example.py runs on the folders of the steps."""

from extras import usage_example
from tests.conftest import error_of, run_script


def test_the_example_filters_rows_and_scores_answers(sample_folder, model_folder, judges, capsys):
    where = {"DATA_DIR": sample_folder, "POLICY": model_folder, "REWARD_MODEL": judges["scalar"]}
    run_script(usage_example, **where, MAX_NEW_TOKENS=4, DEVICE="cpu")
    printed = capsys.readouterr().out
    assert "pairs of" in printed and "a batch: prompts (4, 128)" in printed
    scored = [line for line in printed.splitlines() if line.endswith(")") and "   (" in line]
    rewards = {float(line.split()[0]): line[10:].rpartition("   (")[0] for line in scored}
    assert len(rewards) == 3 and scored[-1].endswith(f"({model_folder})")
    assert printed.rstrip().endswith(f"by {judges['scalar']}: {rewards[max(rewards)]}")


def test_user_errors_stop_with_one_message(sample_folder, judges):
    assert "lower MIN_RATING_GAP" in error_of(usage_example, DATA_DIR=sample_folder, MIN_RATING_GAP=9.0)
    message = error_of(usage_example, DATA_DIR="nowhere", REWARD_MODEL=judges["scalar"])
    assert "nowhere is not there yet: run `python load_helpsteer_dataset.py` first" in message
