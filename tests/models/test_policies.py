"""Policies and references: unsupported architectures, adapters, vectors, dropout."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from utils.data.processed import load_pairs
from utils.models.generation import Answer, batch_of, logps_of
from utils.models.loading import add_lora, without_dropout
from utils.models.policies import PolicyPairs, check_architecture, reference_of
from utils.models.shared_prompt import PairCollator, Prompt
from utils.training.reinforce import Actor, Policy


def test_a_model_that_scales_its_logits_is_refused(model, sample_folder):

    rows = load_pairs(sample_folder, "train", 2)
    check_architecture(model, rows)
    forward = model.forward

    def scaled(*arguments, **options):
        result = forward(*arguments, **options)
        result.logits = 3 * result.logits
        return result

    model.forward = scaled
    with pytest.raises(SystemExit, match="changes its logits after the head"):
        check_architecture(model, rows)


def test_the_reference_uses_the_first_vectors(model):
    vectors = torch.randn(3, 32)
    module = PolicyPairs(model, vectors, True, reference=model)
    batch = PairCollator(2, 8).shared_rows([Prompt([4, 0, 0, 0, 9], vectors_at=1)], [([5, 6], [7])])
    before = module(**batch)
    torch.testing.assert_close(before["logps"], before["reference"])
    module.vectors.data += 1.0
    after = module(**batch)
    torch.testing.assert_close(after["reference"], before["reference"])
    assert not torch.allclose(after["logps"], before["logps"], atol=1e-4)


def test_the_reference_of_an_adapter_is_the_model_without_it(model_folder, tokenizer):

    model = add_lora(AutoModelForCausalLM.from_pretrained(model_folder), "CAUSAL_LM", 4, 8, 0.0, ("q_proj", "v_proj"))
    answers = [Answer(Prompt([1, 4, 5]), [9, 8], "", True)]
    start = logps_of(model, answers)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data += 0.5
    moved = logps_of(model, answers)
    with Actor(model, reference_of(model, True), tokenizer, 64, "fp32").as_reference() as reference:
        torch.testing.assert_close(logps_of(reference, answers), start)
    assert not torch.allclose(moved, start) and torch.equal(logps_of(model, answers), moved)


def test_dropout_is_off_in_policy_and_reference(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, attention_dropout=0.5).train()
    answers = [Answer(Prompt([1, 4, 5]), [9, 8, 7, 6], "", True)]
    ids = batch_of(answers)
    policy = Policy(model, 1.0)
    assert not torch.equal(policy(**ids), policy(**ids)), "the config has dropout"
    without_dropout(model)
    torch.testing.assert_close(policy(**ids).detach(), logps_of(model, answers))
