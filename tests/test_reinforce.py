"""REINFORCE itself: the gradient, the baselines, rewards and alarms, on problems whose answer is known."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from train_reinforce import advantages, rewards, rollout, update
from utils.engine import start_engine
from utils.heads import Reading
from utils.logps import answer_logps_and_entropies
from utils.models import without_dropout
from utils.policies import reference_of
from utils.reinforce import (
    Baseline,
    Opponents,
    Policy,
    Sample,
    Scoring,
    alarm,
    as_reference,
    figures_of,
    normalised,
    prompt_of,
)  # fmt: skip
from utils.runs import Run
from utils.sampling import Answer, batch_of, generate, logps_and_entropies_of, logps_of, parts_of

HOW = {"max_new_tokens": 1, "temperature": 1.0, "batch_size": 8, "precision": "fp32"}
ALL = torch.tensor([True] * 4)


def engine_of(model, folder, rate=1e-2, steps=100):
    return start_engine(
        Policy(model, 1.0), torch.device("cpu"), "fp32", (rate, 0.0, "constant", 0.0, steps), "none", Run(folder, {})
    )


def sample_of(ids, number=0, ended=True, **more):
    return Sample(
        number, [{"role": "user", "content": "Hi"}], Answer([1, 4, 5], ids, "text", ended), 0.0, 0.0, 0.0, **more
    )


# the gradient


def test_the_gradient_equals_a_numerical_one_on_a_bandit_with_two_arms(tmp_path):
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, initializer_range=0.5, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    arms, prompt = (2.0, -1.0), torch.tensor([[0, 1, 0]])

    def expected_reward() -> float:
        with torch.no_grad():
            return float(model(prompt).logits[0, -1].double().softmax(-1) @ torch.tensor(arms).double())

    p = model(prompt).logits[0, -1].softmax(-1).tolist()
    # both arms once, weighted by how often they would be drawn: the mean over draws, without their noise
    samples = [Sample(arm, [], Answer([0, 1, 0], [arm], "", True), 0.0, 0.0, 0.0) for arm in (0, 1)]
    weights = [2 * p[arm] * (arms[arm] - 0.7) for arm in (0, 1)]
    engine = engine_of(model, tmp_path / "run")
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    update(engine, samples, weights, longest=1e9, tokens=1)
    gradients = {name: before[name] - value.detach() for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        value.data.copy_(before[name])
    checked = 0
    for name, value in model.named_parameters():
        place = gradients[name].abs().flatten().argmax().item()  # the largest entry of each weight
        up_and_down = []
        for step in (1e-2, -1e-2):
            value.data.view(-1)[place] += step
            up_and_down.append(expected_reward())
            value.data.view(-1)[place] -= step
        slope = (up_and_down[0] - up_and_down[1]) / 2e-2
        assert -gradients[name].flatten()[place].item() == pytest.approx(slope, rel=0.02, abs=2e-4), name
        checked += abs(slope) > 1e-3
    assert checked > 4


def test_micro_batches_do_not_change_the_step(model_folder, tmp_path):
    answers = [[9, 8, 2], [7], [20, 21, 22, 23], [30, 2]]
    found = []
    for size in (1, 20, 1000):  # positions: each answer alone, two parts, one part
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        engine = engine_of(model, tmp_path / f"{size}")
        engine.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss, norm = update(engine, [sample_of(ids) for ids in answers], [1.0, -2.0, 0.5, 3.0], 1e9, size)
        found.append((loss, norm, model.model.layers[0].mlp.up_proj.weight.detach().clone()))
    sums = logps_of(AutoModelForCausalLM.from_pretrained(model_folder), [sample_of(ids).answer for ids in answers])
    assert found[0][0] == pytest.approx(-(sums @ torch.tensor([1.0, -2.0, 0.5, 3.0])).item() / 4, rel=1e-4)
    for loss, norm, weight in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4) and norm == pytest.approx(found[0][1], rel=1e-3)
        torch.testing.assert_close(weight, found[0][2], atol=1e-5, rtol=1e-3)


def test_a_gradient_that_is_not_finite_moves_nothing(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, norm = update(engine_of(model, tmp_path / "run"), [sample_of([5])], [float("nan")], 1.0)
    assert loss != loss and norm != norm
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_entropies_and_log_probs_equal_a_plain_loop(model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    answers = generate(model, tokenizer, [[1, 4, 5], [1, 4, 5, 6, 7, 8]], 6, 0.8, seed=0)
    answers[0].ids = [5, 2, 2]
    logps, entropies = logps_and_entropies_of(model, answers, 0.8, "fp32")
    torch.testing.assert_close(logps, logps_of(model, answers, 0.8))
    for answer, found in zip(answers, entropies.tolist(), strict=True):
        with torch.no_grad():
            p = (model(torch.tensor([answer.prompt_ids + answer.ids])).logits[0] / 0.8).softmax(-1)
        start = len(answer.prompt_ids) - 1
        expected = -sum((row * row.log()).sum().item() for row in p[start : start + len(answer.ids)])
        assert found == pytest.approx(expected, rel=1e-4)
    sums, _ = answer_logps_and_entropies(model, batch_of(answers), 0.8)
    assert not sums.requires_grad


# baselines


def test_a_moving_average_begins_at_the_first_step_and_moves_after_it_was_used():
    baseline = Baseline("moving_average", decay=0.9)
    first = baseline.advantages(torch.tensor([1.0, 3.0]), ALL[:2])
    assert first.tolist() == [-1.0, 1.0] and baseline.value == baseline.used == 2.0
    second = baseline.advantages(torch.tensor([10.0, 12.0]), ALL[:2])
    assert second.tolist() == [8.0, 10.0], "its own reward is not in it yet"
    assert baseline.value == pytest.approx(0.9 * 2.0 + 0.1 * 11.0) and baseline.seen == 4 and baseline.used == 2.0
    baseline.advantages(torch.tensor([float("nan"), 1.0]), ALL[:2])
    assert baseline.value == pytest.approx(2.9), "a bad step leaves a state to go on from"


def test_a_running_mean_is_that_of_all_rewards_before():
    baseline, past = Baseline("running_mean"), []
    for step, values in enumerate(([1.0, 3.0], [10.0], [4.0, 4.0, 7.0])):
        found = baseline.advantages(torch.tensor(values), torch.tensor([True] * len(values)))
        mean = sum(past) / len(past) if step else sum(values) / len(values)
        assert found.tolist() == pytest.approx([value - mean for value in values])
        past += values
    assert baseline.value == pytest.approx(sum(past) / len(past))


def test_leave_one_out_is_its_formula_and_none_takes_nothing_off():
    values = [1.0, 2.0, 6.0, 4.0, 4.0, 5.0]
    found = Baseline("leave_one_out").advantages(torch.tensor(values), torch.tensor([True] * 6), 3).tolist()
    for i, value in enumerate(values):
        group = values[i // 3 * 3 : i // 3 * 3 + 3]
        assert found[i] == pytest.approx(value - (sum(group) - value) / 2)
    assert Baseline("none").advantages(torch.tensor(values), torch.tensor([True] * 6)).tolist() == values


@pytest.mark.parametrize("kind", ["moving_average", "running_mean", "leave_one_out", "none"])
def test_masked_answers_are_in_no_baseline(kind):
    values, kept = torch.tensor([1.0, 3.0, 100.0, 5.0]), torch.tensor([True, True, False, True])
    baseline = Baseline(kind)
    found = baseline.advantages(values, kept, 4)
    assert found[2] == 0.0 and baseline.value < 50
    expected = {"none": [1.0, 3.0, 5.0], "leave_one_out": [-3.0, 0.0, 3.0]}.get(kind, [-2.0, 0.0, 2.0])
    assert found[kept].tolist() == pytest.approx(expected)
    before = baseline.value, baseline.seen
    assert baseline.advantages(values, ~ALL, 4).tolist() == [0.0] * 4 and (baseline.value, baseline.seen) == before
    alone = baseline.advantages(values, torch.tensor([True, False, False, False]), 4)
    assert alone[0] == 0.0 or kind != "leave_one_out", "nothing to be compared with"


def test_leave_one_out_equals_the_advantages_of_rloo_trainer(model_folder, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    def lengths(completions, **_):
        return [float(len(text) % 7) for text in completions]

    args = RLOOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        max_steps=1, beta=0.0, normalize_advantages=False, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": text} for text in ("Hi", "Why?")])
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = RLOOTrainer(model_folder, lengths, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    scores = torch.tensor(list(trainer._logs["rewards"]["lengths"]))
    theirs = list(trainer._logs["advantages"])
    ours = Baseline("leave_one_out").advantages(scores, torch.ones(8, dtype=torch.bool), 4)
    assert len(theirs) == 8 and scores.std() > 0 and ours.tolist() == pytest.approx(theirs, abs=1e-5)


def test_normalised_advantages_have_unit_spread_and_equal_ones_stay_zero():
    values, kept = torch.tensor([1.0, -1.0, 3.0, 9.0]), torch.tensor([True, True, True, False])
    found = normalised(values, kept, "std")
    assert found[kept].std().item() == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(normalised(values, kept, "none"), values)
    assert normalised(torch.zeros(4), ALL, "std").tolist() == [0.0] * 4


# learning


def learned(model_folder, tokenizer, folder, kind, kl_beta=0.0, steps=40):
    """(share of rewarded answers in the first and the last three steps, KL at the end): ids below 300 are rewarded."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    reference, engine, baseline = reference_of(model, True), engine_of(model, folder, 1e-2), Baseline(kind)
    frozen = {name: value.clone() for name, value in reference.state_dict().items()}

    def scoring(prompts, answers, opponents):
        return torch.tensor([float(answer.ids[0] < 300) for answer in answers])

    shares = []
    for step in range(steps):
        prompts = {16 * step + i: [{"role": "user", "content": "Hi"}] for i in range(16)}
        samples = rollout(model, reference, tokenizer, prompts, 64, 0, HOW)
        rewards(samples, scoring, None)
        weights = advantages(samples, baseline, kl_beta, 4, "none", False)
        update(engine, samples, weights.tolist(), 1.0)
        shares.append(sum(sample.reward for sample in samples) / 16)
    for name, value in reference.state_dict().items():
        assert torch.equal(value, frozen[name]), "the reference moved"
    return sum(shares[:3]) / 3, sum(shares[-3:]) / 3, sum(sample.kl for sample in samples) / 16


@pytest.mark.parametrize("kind", ["moving_average", "running_mean", "leave_one_out", "none"])
def test_each_baseline_makes_what_is_rewarded_more_likely(model_folder, tokenizer, tmp_path, kind):
    first, last, kl = learned(model_folder, tokenizer, tmp_path / "run", kind)
    assert first < 0.75 and last > 0.85 and kl > 0.5


def test_the_kl_keeps_the_policy_near_its_start(model_folder, tokenizer, tmp_path):
    *_, free = learned(model_folder, tokenizer, tmp_path / "free", "moving_average")
    *_, held = learned(model_folder, tokenizer, tmp_path / "held", "moving_average", kl_beta=20.0)
    assert abs(held) < 0.3 * free


# rewards


class Judge:
    """A reward model whose output is the number of characters, or logits that put all on one grade."""

    def __init__(self, head="scalar"):
        self.reading = Reading(head, [1.0] if head == "scalar" else [float(grade) for grade in range(1, 11)])

    def read(self, prompts, answers):
        lengths = torch.tensor([[float(len(text)) for text in side] for side in answers])
        if self.reading.head == "scalar":
            return lengths[:, :, None], lengths
        grades = torch.nn.functional.one_hot(lengths.long().clamp(1, 10) - 1, 10).float()
        return 50 * grades, lengths


def answered(*texts, ended=True, tokens=10):
    return [Answer([1], [5] * tokens, text, ended) for text in texts]


def test_rewards_are_clipped_first_and_penalties_come_after():
    prompts = [[{"role": "user", "content": "Hi"}]] * 2
    cut = [*answered("abc", tokens=50), *answered("a" * 9, ended=False, tokens=200)]
    assert Scoring(Judge())(prompts, cut).tolist() == [3.0, 9.0]
    found = Scoring(Judge(), clip=4.0, length_penalty=1.0, cut_penalty=0.25)(prompts, cut)
    assert found.tolist() == pytest.approx([3.0 - 0.5, 4.0 - 2.0 - 0.25])


def test_risk_takes_the_spread_off_and_a_win_is_counted_against_the_start():
    prompts = [[{"role": "user", "content": "Hi"}]] * 2
    texts = answered("abc", "abcdef")
    assert Scoring(Judge("distribution"))(prompts, texts).tolist() == pytest.approx([3.0, 6.0], abs=1e-3)
    both = Scoring(Judge("distribution"), win=True)(prompts, texts, ["abcd", "abcd"])
    assert both.tolist() == pytest.approx([0.0, 1.0], abs=1e-3)

    class Unsure(Judge):
        def read(self, prompts, answers):
            return torch.zeros(len(prompts), 1, 10), torch.ones(len(prompts), 1)

    spread = sum((grade - 5.5) ** 2 / 10 for grade in range(1, 11)) ** 0.5
    found = Scoring(Unsure("distribution"), risk=0.5)(prompts, texts)
    assert found.tolist() == pytest.approx([5.5 - 0.5 * spread] * 2, abs=1e-4)


def test_the_start_answers_each_prompt_once():
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return [f"to {prompt[0]['content']}" for prompt in prompts]

    opponents = Opponents(write)
    prompts = [[{"role": "user", "content": word}] for word in ("a", "b", "a")]
    assert opponents.of([0, 1, 0], prompts) == ["to a", "to b", "to a"]
    assert opponents.of([1], prompts[1:2]) == ["to b"] and len(asked) == 2


def test_the_reference_of_an_adapter_is_the_model_without_it(model_folder):
    from utils.models import add_lora

    model = add_lora(AutoModelForCausalLM.from_pretrained(model_folder), "CAUSAL_LM", 4, 8, 0.0, ("q_proj", "v_proj"))
    answers = [Answer([1, 4, 5], [9, 8], "", True)]
    start = logps_of(model, answers)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data += 0.5
    moved = logps_of(model, answers)
    with as_reference(model, reference_of(model, True)) as reference:
        torch.testing.assert_close(logps_of(reference, answers), start)
    assert not torch.allclose(moved, start) and torch.equal(logps_of(model, answers), moved)


# the order of prompts, figures, alarms


def test_each_prompt_comes_once_an_epoch_in_an_order_of_its_own():
    epochs = [[prompt_of(number, 2, 7, seed=3) for number in range(14 * e, 14 * e + 14, 2)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert prompt_of(0, 2, 7, 3) == prompt_of(1, 2, 7, 3), "both answers of a prompt"
    assert [prompt_of(number, 1, 7, 4) for number in range(7)] != epochs[0], "the seed decides"


def test_figures_of_a_step():
    samples = [sample_of([5, 6], reward=1.0), sample_of([5] * 6, ended=False, reward=3.0)]
    samples[0].logp, samples[0].reference, samples[0].entropy, samples[1].entropy = -3.0, -5.0, 4.0, 12.0
    found = figures_of(samples, torch.tensor([-1.0, 1.0]), Baseline("none"), 0.5, 2.0, seconds=2.0)
    assert found["reward"] == 2.0 and found["reward_std"] == 1.0 and found["kl"] == 1.0 and found["entropy"] == 2.0
    assert found["completions/mean_length"] == 4.0 and found["completions/ended"] == found["completions/clipped_ratio"]
    assert found["completions/repetition"] == pytest.approx((0 + 3 / 4) / 2) and found["tokens_per_second"] == 4.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, ""),
        ({"kl": 51.0}, "KL 51.0 is over KL_LIMIT = 50.0"),
        ({"loss": float("nan")}, "loss of this step is not finite"),
        ({"completions/mean_length": 1.0}, "collapsed to 1.0 tokens"),
        ({"entropy": 0.01}, "entropy has collapsed to 0.010 nats"),
    ],
)
def test_alarms(change, message):
    healthy = {"loss": 1.0, "grad_norm": 1.0, "reward": 1.0, "kl": 3.0, "entropy": 1.0, "completions/mean_length": 30.0}
    reason = alarm(healthy | change, 50.0, 2.0, 0.05)
    assert message in reason and bool(reason) == bool(message)
    assert alarm(healthy | {"kl": 1e9}, 0.0, 2.0, 0.05) == "", "0 = no limit"


def test_a_length_of_0_cuts_no_gradient(model_folder, tmp_path):
    lengths = []
    for longest in (0.0, 1e9, 0.01):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        engine, before = engine_of(model, tmp_path / f"{longest}"), model.lm_head.weight.detach().clone()
        engine.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        update(engine, [sample_of([9, 8, 2])], [1.0], longest)
        lengths.append((model.lm_head.weight - before).norm().item())
    assert lengths[0] == pytest.approx(lengths[1]) and 0 < lengths[2] < 0.011 < lengths[0]


def test_a_policy_and_its_reference_have_no_dropout_wherever_the_rate_is_kept(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, attention_dropout=0.5).train()
    answers, ids = [Answer([1, 4, 5], [9, 8, 7, 6], "", True)], batch_of([Answer([1, 4, 5], [9, 8, 7, 6], "", True)])
    policy = Policy(model, 1.0)
    assert not torch.equal(policy(**ids), policy(**ids)), "the rate of the config is in use"
    without_dropout(model)
    torch.testing.assert_close(policy(**ids).detach(), logps_of(model, answers))


def test_a_grad_scaler_may_skip_a_step(model_folder, tmp_path):
    engine = engine_of(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "run")
    engine.accelerator = SimpleNamespace(scaler=object(), clip_grad_norm_=lambda *_: float("inf"))
    assert engine.step(1.0) == 0.0


def test_parts_hold_so_many_positions_and_every_answer_once():
    lengths = ((3, 2), (10, 10), (1, 1), (4, 3), (30, 9))  # of prompt and answer
    answers = [Answer([1] * prompt, [5] * answer, "", True) for prompt, answer in lengths]
    assert parts_of(answers, 14) == [[4], [1], [3, 0], [2]]
    assert parts_of(answers, 1000) == [[4, 1, 3, 0, 2]] and parts_of([], 10) == []
