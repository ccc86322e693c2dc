"""A row with a shared prompt gives the numbers of two rows, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification

from utils.data.processed import load_pairs
from utils.models import shared_prompt
from utils.models.reward_model import RewardPairs
from utils.models.shared_prompt import (
    CHOSEN,
    REJECTED,
    PairCollator,
    check_head,
    check_shared_rows,
    forward_pairs,
    pair_lengths,
    token_logps,
)
from utils.training.trainer import LengthSampler


def load(model_folder, attention="sdpa"):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_folder, num_labels=1, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def row(number, prompt, chosen, rejected, padded_to=64):
    mask = [1] * len(prompt) + [0] * (padded_to - len(prompt))
    ids = prompt + [2] * (padded_to - len(prompt))
    made = {"row": number, "input_ids": ids, "attention_mask": mask, "chosen_ids": chosen, "rejected_ids": rejected}
    return made | {"chosen_rating": 3.0, "rejected_rating": None if number == 0 else 1.5}


ROWS = [
    row(0, [1, 40, 41, 2], [50, 51, 52, 2, 60], [70, 2, 60]),
    row(1, [1, 42, 43, 44, 45, 46], [53], [71, 72, 73, 74, 75, 76, 77, 2]),
    row(2, [1, 47], [54, 2, 55, 56], [2, 2, 2]),  # 2, the pad token and the end of turn, may be anywhere in an answer
]


def one_row_reward(model, ids):
    """Return the reward of ids alone, without padding or masks."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        return model.score(hidden[0, -1]).item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_row_equals_two_rows(model_folder, attention):
    model = load(model_folder, attention)
    with torch.no_grad():
        outputs = RewardPairs(model)(**PairCollator(2, 8)(ROWS))["outputs"][..., 0]
    for i, r in enumerate(ROWS):
        prompt = r["input_ids"][: sum(r["attention_mask"])]
        for side, ids in enumerate((r["chosen_ids"], r["rejected_ids"])):
            assert outputs[i, side].item() == pytest.approx(one_row_reward(model, prompt + ids), abs=1e-5)


def test_the_rejected_answer_does_not_see_the_chosen_one(model_folder):
    module = RewardPairs(load(model_folder))
    changed = [{**ROWS[0], "chosen_ids": [90, 91, 92, 93, 94]}]
    with torch.no_grad():
        before = module(**PairCollator(2, 8)(ROWS[:1]))["outputs"][0, :, 0]
        after = module(**PairCollator(2, 8)(changed))["outputs"][0, :, 0]
    assert before[1] == after[1] and before[0] != after[0]


def test_the_collator_sets_positions_segments_ends_and_gaps():
    batch = PairCollator(2, 8)(ROWS[:2])
    assert batch["input_ids"].shape == (2, 16) and batch["ends"].tolist() == [[8, 11], [6, 14]]
    assert batch["position_ids"][0, :12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6]
    assert (batch["segments"] == CHOSEN).sum(1).tolist() == [5, 1]
    assert (batch["segments"] == REJECTED).sum(1).tolist() == [3, 8]
    assert batch["gap"].tolist() == [3.0, 1.5] and batch["row"].tolist() == [0, 1]


def test_the_order_is_complete_and_reproducible_with_the_longest_first():
    lengths = np.random.default_rng(0).integers(5, 90, size=103)
    sampler = LengthSampler(lengths, 4, seed=7, steps_sorted_together=3)
    first = list(sampler)
    assert sorted(first) == list(range(103)) and first == list(LengthSampler(lengths, 4, 7, 3))
    steps = [first[i : i + 4] for i in range(0, 100, 4)]
    assert lengths[steps[0]].sum() == max(lengths[step].sum() for step in steps)
    sampler.set_epoch(1)
    assert list(sampler) != first
    spread = np.mean([np.ptp(lengths[step]) for step in steps])
    assert spread < np.ptp(lengths) / 2, "rows of a step have similar lengths"


def test_every_row_is_scored_once_and_in_order(model_folder, sample_folder, tokenizer):
    rows = load_pairs(sample_folder, "train")
    module = RewardPairs(load(model_folder))
    outputs = forward_pairs(module, rows, PairCollator(2, 8), 5, Accelerator(cpu=True))["outputs"]
    assert outputs.shape == (len(rows), 2, 1) and np.isfinite(outputs).all()
    for i in (0, len(rows) - 1):
        with torch.no_grad():
            alone = module(**PairCollator(2, 8)([rows[i]]))["outputs"][0].numpy()
        np.testing.assert_allclose(outputs[i], alone, atol=1e-5)


def test_a_model_in_which_answers_see_each_other_is_refused(model_folder, sample_folder):
    row, model = load_pairs(sample_folder, "train")[0], load(model_folder)
    check_shared_rows(model, row, PairCollator(2, 8))
    leaks = model.model.layers[0].mlp.register_forward_hook(lambda layer, given, result: result + result.cumsum(dim=1))
    with pytest.raises(SystemExit, match="one of them can see the other"):
        check_shared_rows(model, row, PairCollator(2, 8))
    leaks.remove()
    check_shared_rows(model, row, PairCollator(2, 8))


def test_lengths_count_tokens_without_padding(sample_folder):
    rows = load_pairs(sample_folder, "train", 20)
    expected = [sum(r["attention_mask"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows]
    assert pair_lengths(rows).tolist() == expected and len(rows) == 20


def test_log_probs_in_chunks_equal_those_of_the_model(model, monkeypatch):
    ids = torch.randint(3, 600, (1, 40))
    assert check_head(model, ids) < 1e-4
    monkeypatch.setattr(shared_prompt, "ROWS_AT_ONCE", 7)
    assert check_head(model, ids) < 1e-4
    hidden, targets = torch.randn(20, 32, requires_grad=True), torch.randint(0, 600, (20,))
    gradients = []
    for temperature in (1.0, 0.7):
        chunked = token_logps(model, hidden, targets, temperature)
        whole = (model.lm_head(hidden) / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
        gradients.append([torch.autograd.grad(x.sum(), [hidden, model.lm_head.weight]) for x in (chunked, whole)])
    for ours, theirs in gradients:
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
