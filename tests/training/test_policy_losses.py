"""Policy losses equal plain Python and TRL, and each solves the toy problem with each guidance."""

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from transformers import set_seed

from benchmarks.stock_trl import DPO_LOSSES, dpo_trainer
from tests.toys import MARKS, toy_rows, toy_run, toy_trainer
from utils.models.loading import add_lora, load_causal
from utils.models.policies import PolicyPairs, reference_of
from utils.models.shared_prompt import PairCollator, forward_pairs
from utils.training.losses import POLICY_LOSSES, LogProbs, LossConstants, PolicyPairLoss, two_way_kl
from utils.training.trainer import training_arguments

POLICY = [[-40.0, -55.0], [-30.0, -21.0], [-8.0, -8.0]]  # sums of log-probs, chosen first
REFERENCE = [[-42.0, -50.0], [-28.0, -25.0], [-9.0, -7.5]]
GUIDED, GUIDED_REFERENCE = (
    [[-38.0, -57.0], [-29.0, -24.0], [-7.0, -9.0]],
    [[-41.0, -52.0], [-27.0, -26.0], [-8.5, -8.0]],
)
TOKENS = [[10, 20], [12, 7], [4, 4]]


def sigma(x):
    return 1 / (1 + math.exp(-x))


def plain_loss(name, i, beta, smoothing, gamma, alpha, lambda_kl):
    """Each loss of one pair in scalar arithmetic, straight from its formula."""
    (sw, sl), (rw, rl), (tw, tl) = POLICY[i], REFERENCE[i], TOKENS[i]
    d, m = (sw - rw) - (sl - rl), (sw - rw) / tw - (sl - rl) / tl
    nll = -sw / tw
    if name == "dpo":
        return -(1 - smoothing) * math.log(sigma(beta * d)) - smoothing * math.log(sigma(-beta * d))
    if name == "ipo":
        return (m - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return max(0.0, 1 - beta * d)
    if name == "sipa":
        return -(1 - smoothing) * math.log(sigma(beta * m)) - smoothing * math.log(sigma(-beta * m)) + 0.05 * nll
    if name == "orpo":
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (sw / tw, sl / tl)]
        return nll - beta * math.log(sigma(math.log(odds[0] / odds[1])))
    if name == "simpo":
        z = beta * (sw / tw - sl / tl) - gamma
        return -(1 - smoothing) * math.log(sigma(z)) - smoothing * math.log(sigma(-z))
    r, rp = sw / tw - sl / tl, GUIDED[i][0] / tw - GUIDED[i][1] / tl
    kl = 0.0
    for policy, reference in ((POLICY[i], REFERENCE[i]), (GUIDED[i], GUIDED_REFERENCE[i])):
        p, q = ([math.exp(x[0] / tw), math.exp(x[1] / tl)] for x in (reference, policy))
        kl += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return -math.log(sigma(beta * r)) + alpha * max(0.0, rp - r) + lambda_kl / 2 * kl


def inputs(loss, requires_grad=False):
    divide = torch.tensor(TOKENS) if loss.reduction == "mean" else 1.0
    policy, reference, guided, guided_reference = (
        torch.tensor(x, requires_grad=requires_grad) for x in (POLICY, REFERENCE, GUIDED, GUIDED_REFERENCE)
    )
    x = LogProbs(
        policy / divide, policy[:, 0] / torch.tensor(TOKENS)[:, 0], reference / divide, guided / divide,
        guided_reference / divide,
    )  # fmt: skip
    return x, (policy, reference, guided, guided_reference)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_loss_equals_its_formula(name, smoothing):
    loss = POLICY_LOSSES[name]
    constants = LossConstants(0.3, smoothing, 0.5, 0.4, 0.2)
    expected = [plain_loss(name, i, 0.3, smoothing, 0.5, 0.4, 0.2) for i in range(3)]
    assert loss.function(inputs(loss)[0], constants).tolist() == pytest.approx(expected, rel=1e-4)


def test_losses_have_known_values_at_the_reference():
    sums = torch.tensor(REFERENCE)
    means = sums / torch.tensor(TOKENS)
    at = {"sum": LogProbs(sums, means[:, 0], sums), "mean": LogProbs(means, means[:, 0], means, means, means)}
    nll, r = -means[:, 0], means[:, 0] - means[:, 1]
    expected = {
        "dpo": torch.full((3,), math.log(2)), "ipo": torch.full((3,), (1 / 0.2) ** 2), "hinge": torch.ones(3),
        "sipa": math.log(2) + 0.05 * nll, "new_pref_po": -torch.nn.functional.logsigmoid(0.1 * r),
    }  # fmt: skip
    for name, value in expected.items():
        loss = POLICY_LOSSES[name]
        torch.testing.assert_close(
            loss.function(at[loss.reduction], LossConstants(0.1, alpha=0.1, lambda_kl=0.1)), value
        )


def test_only_the_kl_of_new_pref_po_has_a_gradient_through_the_guided_side():
    loss = POLICY_LOSSES["new_pref_po"]
    for lambda_kl, moves in ((0.0, False), (0.1, True)):
        x, (policy, reference, guided, guided_reference) = inputs(loss, requires_grad=True)
        loss.function(x, LossConstants(0.05, alpha=0.1, lambda_kl=lambda_kl)).sum().backward()
        assert (guided.grad is not None and bool(guided.grad.any())) == moves and policy.grad.any()
    same = torch.tensor(POLICY)
    assert two_way_kl(same, same).abs().max() == 0 and (two_way_kl(same, torch.tensor(REFERENCE)) >= 0).all()


def make(model_folder, name, guidance="none", lora=False, reference=True, beta=0.0, train_policy=True, fresh=True):
    """(module, loss of a pair) for toy rows."""
    set_seed(0)
    model = load_causal(model_folder)
    if lora:
        model = add_lora(model, "CAUSAL_LM", 4, 8, 0.0, ("q_proj", "v_proj", "up_proj"))
    model.requires_grad_(train_policy) if not lora else None
    vectors = torch.randn(len(MARKS), 32) * 0.1 if guidance == "embedding" else None
    held = reference_of(model, train_policy) if reference and POLICY_LOSSES[name].reference else None
    module = PolicyPairs(model, vectors, vectors is not None, held)
    constants = LossConstants(beta or POLICY_LOSSES[name].beta, 0.0, 0.5, 0.1, 0.1)
    return module, PolicyPairLoss(module, POLICY_LOSSES[name], constants, 0.0, "fp32", fresh)


CASES = [(name, guidance) for name in POLICY_LOSSES for guidance in ("none", "text", "embedding")]


@pytest.mark.parametrize("name, guidance", [case for case in CASES if case != ("new_pref_po", "none")])
def test_every_loss_with_every_guidance_solves_the_toy_problem(model_folder, tmp_path, name, guidance):
    both = name == "new_pref_po"
    module, loss = make(model_folder, name, guidance)
    before = copy.deepcopy(module.state_dict())
    held = [copy.deepcopy(model.state_dict()) for model in module.frozen]
    rows = toy_rows(96, guidance=guidance, both=both)
    options = {"batch_size": 8, "max_steps": 80 if both else 50, "learning_rate": 1e-2}
    trainer = toy_trainer(module, loss, rows, tmp_path / "run", {"vectors": 1e-2}, **options)
    trainer.train()
    held_out = toy_rows(64, seed=1, guidance=guidance, both=both)
    outputs = forward_pairs(module, held_out, PairCollator(2, 8), 16, trainer.accelerator)
    batch = {}
    _, logged = loss({key: torch.tensor(value) for key, value in outputs.items()}, batch)
    assert logged["rewards/accuracies"].mean().item() > 0.9
    after = module.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before), "every trained weight moved"
    for model, state in zip(module.frozen, held, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "the reference moved"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


@pytest.mark.parametrize("name", ["dpo", "new_pref_po"])
def test_only_the_vectors_move_if_the_policy_is_frozen(model_folder, tmp_path, name):
    both = name == "new_pref_po"
    module, loss = make(model_folder, name, "embedding", train_policy=False, beta=1.0)
    before = copy.deepcopy(module.state_dict())
    rows = toy_rows(32, guidance="embedding", both=both)
    trainer = toy_trainer(module, loss, rows, tmp_path / "run", {"vectors": 5e-2}, batch_size=8, max_steps=60)

    def guided_loss():
        outputs = forward_pairs(module, rows, PairCollator(2, 8), 16, trainer.accelerator)
        logps = outputs["guided_logps" if both else "logps"] / outputs["tokens"]
        return float(np.logaddexp(0, -(logps[:, 0] - logps[:, 1])).mean())

    start = guided_loss()
    trainer.train()
    after = module.state_dict()
    assert {key for key in before if not torch.equal(after[key], before[key])} == {"vectors"}
    assert torch.equal(module.start, before["vectors"]), "the reference keeps the first vectors"
    assert guided_loss() < start - 0.01


def test_the_loss_of_the_vectors_gives_the_policy_no_gradient(model_folder):
    gradients = []
    for train_vectors in (True, False):
        module, loss = make(model_folder, "new_pref_po", "embedding")
        module.vectors.requires_grad_(train_vectors)
        batch = PairCollator(2, 8)(list(toy_rows(4, guidance="embedding", both=True)))
        losses, _ = loss(module(**batch), batch)
        losses.sum().backward()
        gradients.append({key: value.grad for key, value in module.named_parameters() if key != "vectors"})
        assert (module.vectors.grad is not None) == train_vectors
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", DPO_LOSSES)
def test_losses_and_weights_equal_those_of_trl(model_folder, tokenizer, tmp_path, name, lora):
    rows = toy_rows(1 if name == "sipa" else 6)
    results = []
    for engine in ("ours", "trl"):
        module, loss = make(model_folder, name, lora=lora, reference=engine == "ours")
        folder = tmp_path / engine
        if engine == "ours":
            trainer = toy_trainer(module, loss, rows, folder, batch_size=len(rows))
        else:
            run = toy_run(folder, batch_size=len(rows), epochs=5)
            arguments = partial(training_arguments, run)
            trainer = dpo_trainer(module.model, rows, tokenizer, run, arguments, name, 0.1)
        trainer.train()
        logged = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        trained = {key: value.detach() for key, value in module.named_parameters() if value.requires_grad}
        results.append((logged, trained))
    assert len(results[0][0]) == 5 and results[0][0] == pytest.approx(results[1][0], abs=1e-4)
    assert results[0][1].keys() == results[1][1].keys()
    for key, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][key], atol=1e-3, rtol=0, msg=key)


def test_the_reference_of_trl_is_the_given_model(model_folder, tokenizer, tmp_path):
    """TRL would load the reference from disk, where other weights may be."""
    module, _ = make(model_folder, "dpo", reference=False)
    with torch.no_grad():
        module.model.model.norm.weight += 0.5
    run = toy_run(tmp_path / "run", batch_size=2, epochs=1)
    arguments = partial(training_arguments, run)
    trainer = dpo_trainer(module.model, toy_rows(2), tokenizer, run, arguments, "dpo", 0.1)
    assert trainer.ref_model is not module.model
    torch.testing.assert_close(trainer.ref_model.state_dict(), module.model.state_dict())
    trainer.train()
    logged = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert logged[0] == pytest.approx(math.log(2), abs=1e-5), "policy and reference are the same at the start"


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_losses_without_a_reference_equal_a_plain_loop(model_folder, name):
    """The plain version uses two rows for each pair, full logits and log_softmax."""
    rows = list(toy_rows(5))
    module, loss = make(model_folder, name, fresh=False)
    losses, _ = loss(module(**PairCollator(2, 8)(rows)), {})
    for row, result in zip(rows, losses.tolist(), strict=True):
        prompt, means = row["input_ids"][: sum(row["attention_mask"])], []
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            logits = module.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            means.append(float(np.mean([logits[p, token].item() for p, token in zip(places, answer, strict=True)])))
        if name == "simpo":
            expected = -math.log(sigma(2.0 * (means[0] - means[1]) - 0.5))
        else:
            odds = [math.exp(m) / (1 - math.exp(m)) for m in means]
            expected = -means[0] - 0.1 * math.log(sigma(math.log(odds[0] / odds[1])))
        assert result == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_a_policy_that_does_not_start_at_its_reference_is_refused(model_folder, name):
    module, loss = make(model_folder, name)
    batch = PairCollator(2, 8)(list(toy_rows(4)))
    loss(module(**batch), batch)  # as it should be
    module, loss = make(model_folder, name)
    if name == "simpo":
        layer = module.model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda layer, _, out: out * (1 + 9 * layer.training))
        module.train()
    else:
        module.frozen[0].model.norm.weight.data *= 3.0
    with pytest.raises(SystemExit, match=r"the first loss is \d.*they are not the same model"):
        loss(module(**batch), batch)
