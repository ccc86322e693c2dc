"""The precision is native to the device, and weights, heads and rewards are always float32."""

import pytest
import torch
from safetensors.torch import load_file

import train_reward_model
from tests.conftest import run_script
from tests.scripts.test_train_reward_model import SMALL
from utils.models.loading import choose_precision, load_classifier
from utils.models.reward_model import RewardHead, RewardModel, apply_head
from utils.training import trainer as training


@pytest.mark.parametrize(
    "device, capability, result",
    [("cuda", (9, 0), "bf16"), ("cuda", (8, 0), "bf16"), ("cuda", (7, 5), "fp16"), ("mps", None, "fp32")],
)
def test_the_precision_is_native_to_the_device(monkeypatch, device, capability, result):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision("", torch.device(device))[0] == result
    assert choose_precision("fp32", torch.device(device))[0] == "fp32"


def test_heads_and_rewards_are_float32_under_autocast(model_folder):
    """A head in bfloat16 gives rewards in steps of 0.03, so that many answers tie."""
    model = load_classifier(model_folder, 1)
    torch.nn.init.normal_(model.score.weight)
    hidden = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        result = apply_head(model, hidden)
    assert result.dtype == torch.float32 and len(result.unique()) > 490
    torch.testing.assert_close(result, model.score(hidden))


@pytest.mark.parametrize("lora", [False, True])
def test_weights_stay_float32_in_a_bf16_training(model_folder, sample_folder, tmp_path, lora, monkeypatch):
    kinds, real = [], training.StepCallback.on_step_end

    def on_step_end(self, *arguments, **named):
        kinds.extend(value.dtype for value in self.trainer.model.parameters())
        return real(self, *arguments, **named)

    monkeypatch.setattr(training.StepCallback, "on_step_end", on_step_end)
    options = SMALL | {"PRECISION": "bf16", "MAX_STEPS": 2, "CONTROL_PAIRS": 0, "USE_LORA": lora}
    folder = tmp_path / "run"
    run_script(train_reward_model, **options, DATA_DIR=sample_folder, MODEL=model_folder, OUTPUT_DIR=folder)
    kinds.extend(value.dtype for value in load_file(folder / "model.safetensors").values())
    assert set(kinds) == {torch.float32}


def test_encoders_score_in_float32(tokenizer, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)).eval()
    judge = RewardModel(model, tokenizer, RewardHead("scalar"), 64, precision="bf16")
    rows = [[3 + i, 4, 5] for i in range(60)]
    plain_precision = RewardModel(model, tokenizer, RewardHead("scalar"), 64).outputs_of_ids(rows, 60)
    torch.testing.assert_close(judge.outputs_of_ids(rows, 60), plain_precision)
