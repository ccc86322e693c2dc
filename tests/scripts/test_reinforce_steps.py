"""The steps of train_reinforce.py have the right gradient, learn, and leave the reference as it is."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

import train_reinforce
from tests.toys import sample_of, toy_run
from train_reinforce import advantages, rewards, rollout, update
from utils.models.generation import Answer, batch_of, logps_of
from utils.models.loading import add_lora, use_gradient_checkpointing
from utils.models.policies import reference_of
from utils.models.shared_prompt import TOKENS_AT_ONCE, Prompt, answer_logps
from utils.training import reinforce
from utils.training.reinforce import Actor, Baseline, Policy, Sample, start_engine


def engine_of(model, folder, rate=1e-2, steps=100):
    run = toy_run(folder, learning_rate=rate, max_steps=steps, schedule="constant")
    return start_engine(Policy(model, 1.0), run)


def test_the_gradient_equals_a_numerical_one_on_a_two_armed_bandit(tmp_path, monkeypatch):
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
    # both arms once, weighted by their probability: the mean over samples without noise
    samples = [Sample(arm, [], Answer(Prompt([0, 1, 0]), [arm], "", True), 0.0, 0.0, 0.0) for arm in (0, 1)]
    weights = [2 * p[arm] * (arms[arm] - 0.7) for arm in (0, 1)]
    engine = engine_of(model, tmp_path / "run")
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    monkeypatch.setattr(reinforce, "MAX_GRAD_NORM", 1e9)
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 1)
    update(engine, samples, weights)
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


def test_micro_batches_do_not_change_the_step(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reinforce, "MAX_GRAD_NORM", 1e9)
    answers = [[9, 8, 2], [7], [20, 21, 22, 23], [30, 2]]
    result = []
    for size in (1, 20, 1000):  # positions: each answer alone, two parts, one part
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        engine = engine_of(model, tmp_path / f"{size}")
        engine.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", size)
        loss, norm = update(engine, [sample_of(ids) for ids in answers], [1.0, -2.0, 0.5, 3.0])
        result.append((loss, norm, model.model.layers[0].mlp.up_proj.weight.detach().clone()))
    sums = logps_of(AutoModelForCausalLM.from_pretrained(model_folder), [sample_of(ids).answer for ids in answers])
    assert result[0][0] == pytest.approx(-(sums @ torch.tensor([1.0, -2.0, 0.5, 3.0])).item() / 4, rel=1e-4)
    for loss, norm, weight in result[1:]:
        assert loss == pytest.approx(result[0][0], rel=1e-4) and norm == pytest.approx(result[0][1], rel=1e-3)
        torch.testing.assert_close(weight, result[0][2], atol=1e-5, rtol=1e-3)


def test_a_gradient_that_is_not_finite_moves_nothing(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, norm = update(engine_of(model, tmp_path / "run"), [sample_of([5])], [float("nan")])
    assert loss != loss and norm != norm
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model_folder, lora):
    answers = [Answer(Prompt([1, 4, 5]), [6, 7, 8, 9], "", True), Answer(Prompt([1, 5]), [7, 2], "", True)]
    result = {}
    for again in (False, True):
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model = add_lora(model, "CAUSAL_LM", 4, 8, 0.0, ("q_proj",)) if lora else model
        if again:
            use_gradient_checkpointing(model)
        answer_logps(model.train(), batch_of(answers))[0].sum().backward()
        result[again] = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert len(calls) == 1 + again, "again in the backward pass"
    assert result[False] and result[True].keys() == result[False].keys()
    torch.testing.assert_close(result[True], result[False])


@pytest.fixture
def small_rollouts(monkeypatch):
    """Sample four answers of one token to each prompt, with no penalty on the KL."""
    small = {"MAX_NEW_TOKENS": 1, "GENERATION_BATCH": 8, "SEED": 0, "ANSWERS_PER_PROMPT": 4, "KL_BETA": 0.0}
    for name, value in small.items():
        monkeypatch.setattr(train_reinforce, name, value)
    return monkeypatch


def learned(model_folder, tokenizer, folder, kind, steps=40):
    """Reward ids below 300, and return (rewarded share in the first three steps, in the last three, final KL)."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    reference, engine, baseline = reference_of(model, True), engine_of(model, folder, 1e-2), Baseline(kind)
    actor = Actor(model, reference, tokenizer, 64, "fp32")
    frozen = {name: value.clone() for name, value in reference.state_dict().items()}

    def scoring(prompts, answers):
        return torch.tensor([float(answer.ids[0] < 300) for answer in answers])

    shares = []
    for step in range(steps):
        prompts = {16 * step + i: [{"role": "user", "content": "Hi"}] for i in range(16)}
        samples = rollout(actor, prompts)
        rewards(samples, scoring)
        weights = advantages(samples, baseline)
        update(engine, samples, weights.tolist())
        shares.append(sum(sample.reward for sample in samples) / 16)
    for name, value in reference.state_dict().items():
        assert torch.equal(value, frozen[name]), "the reference moved"
    return sum(shares[:3]) / 3, sum(shares[-3:]) / 3, sum(sample.kl for sample in samples) / 16


@pytest.mark.parametrize("kind", ["moving_average", "running_mean", "leave_one_out", "none"])
def test_rewarded_answers_become_likelier_with_each_baseline(model_folder, tokenizer, tmp_path, small_rollouts, kind):
    first, last, kl = learned(model_folder, tokenizer, tmp_path / "run", kind)
    assert first < 0.75 and last > 0.85 and kl > 0.5


def test_the_kl_keeps_the_policy_near_its_start(model_folder, tokenizer, tmp_path, small_rollouts):
    *_, free = learned(model_folder, tokenizer, tmp_path / "free", "moving_average")
    small_rollouts.setattr(train_reinforce, "KL_BETA", 20.0)
    *_, held = learned(model_folder, tokenizer, tmp_path / "held", "moving_average")
    assert abs(held) < 0.3 * free


def test_a_grad_scaler_may_skip_a_step(model_folder, tmp_path):
    engine = engine_of(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "run")
    engine.accelerator = SimpleNamespace(scaler=object(), clip_grad_norm_=lambda *_: float("inf"))
    assert engine.step() == 0.0
