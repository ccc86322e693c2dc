"""Reward models: start, save, load, and score conversations."""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerBase

from utils.data.preferences import Message
from utils.data.processed import prompt_of
from utils.data.tokens import chat_template_sha256, encode_answers, from_tokenizer_json, load_tokenizer
from utils.heads import HEADS, Reading
from utils.hidden import hidden_states
from utils.models import PROOF_ROWS, autocast, choose_device, load_classifier, plain, save_with_proof
from utils.pairs import PairCollator, like_length, row_multiple
from utils.runs import read_json, write_json
from utils.script import bar_off, explain_missing, say, stop

CONFIG_FILE = "reward_config.json"
REMOVED = ("LENGTH_PENALTY", "ANSWERS_ONLY")  # options of older versions: their models would score differently now
FEWEST = 6  # prompts needed to show that a model is worse than a coin: 5 of 5 wrong is p = 0.06
HUB_WINDOW = 4096  # largest window, prompt and answer, for a reward model of the hub


class RewardPairs(nn.Module):
    """A classification model for the trainer: from shared-prompt rows to the head's outputs for both answers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def config(self) -> object:
        return self.model.config

    def last_hidden(self, ends: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [batch, 2, hidden] at the last real token of each answer."""
        hidden = hidden_states(self.model, batch)
        return hidden.gather(1, ends[:, :, None].expand(-1, -1, hidden.shape[-1]))

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"outputs": [batch, 2, n]}, float32, chosen first."""
        return {"outputs": apply_head(self.model, self.last_hidden(**batch))}


def apply_head(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Apply the head in float32: in bfloat16 rewards have steps of 0.03, and near values become ties."""
    with torch.autocast(hidden.device.type, enabled=False):
        return plain(model).score(hidden.float())


def start_model(name: str, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> nn.Module:
    """Return a model with the head of `reading`, from a language model or an earlier reward model.

    A new head starts at zero, so that the first steps are not spent on undoing random rewards. A trained head of the
    same kind is kept. An attributes head becomes a scalar head by its weights (the warm start of
    https://arxiv.org/abs/2410.01257).
    """
    head, old = HEADS[reading.head], read_json(Path(name) / CONFIG_FILE)
    before = HEADS[old["head"]] if old else head
    model, info = load_classifier(name, before.outputs, output_loading_info=True, ignore_mismatched_sizes=True)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        stop(f"MODEL = {name!r} is no decoder with a linear head called `score`, which a reward model needs here")
    new = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    if before != head:
        trained = model.score.weight.data
        model.score = nn.Linear(trained.shape[1], head.outputs, bias=False)
        nn.init.zeros_(model.score.weight)
        if (old["head"], reading.head) == ("attributes", "scalar"):
            model.score.weight.data = torch.tensor([old["weights"]]) @ trained
    elif "score.weight" in new:
        nn.init.zeros_(model.score.weight)
    return prepare(model, tokenizer, reading)


def prepare(model: nn.Module, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> nn.Module:
    """Name the model's outputs, and set a pad token other than the end of turn if the tokenizer has an unk token.

    transformers pools a classification model at the last token that is not padding. With pad = end of turn it would
    read the token before the end of turn.
    """
    head = HEADS[reading.head]
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.problem_type = head.problem_type
    model.config.id2label = dict(enumerate(head.names))
    model.config.label2id = {name: i for i, name in enumerate(head.names)}
    return model


def untrained(name: str, reading: Reading, device: torch.device, seed: int) -> nn.Module:
    """Return the model as it was before the training, with a random head: a baseline."""
    before = HEADS[read_json(Path(name) / CONFIG_FILE).get("head", reading.head)]
    model = load_classifier(name, before.outputs, ignore_mismatched_sizes=True)
    torch.manual_seed(seed)
    model.score = nn.Linear(model.score.weight.shape[1], HEADS[reading.head].outputs, bias=False)
    nn.init.normal_(model.score.weight, std=model.config.initializer_range)
    return model.to(device).eval()


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    reading: Reading,
    rows: Dataset,
    collator: PairCollator,
    **facts: object,
) -> None:
    """Save a plain model folder with reward_config.json (the reading and `facts`); reload it and compare some scores.

    facts: at least max_length, which RewardModel needs.
    """
    few = collator([rows[i] for i in range(min(PROOF_ROWS, len(rows)))])

    def score(model: nn.Module) -> torch.Tensor:
        batch = {name: value.to(model.device) for name, value in few.items()}
        return RewardPairs(model)(**batch)["outputs"].cpu()

    reload = partial(load_classifier, labels=HEADS[reading.head].outputs, constant="OUTPUT_DIR")
    save_with_proof(model, tokenizer, folder, reload, score)
    config = reading.as_json() | {"chat_template_sha256": chat_template_sha256(tokenizer)} | facts
    write_json(folder / CONFIG_FILE, config)


@dataclass
class RewardModel:
    """A trained reward model; scores conversations whose last turn is the answer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    reading: Reading
    max_length: int
    precision: str = "fp32"
    config: dict = field(default_factory=dict)  # content of reward_config.json, {} for a model of the hub

    @classmethod
    def load(cls, name: str, device: str = "", precision: str = "fp32", constant: str = "REWARD_MODEL"):
        """Load a run folder of train_reward_model.py, or a classification model with one output (folder or hub name).

        precision: fp32 gives the same scores as transformers; see choose_precision for faster ones. Ends the script
        if there is no such model, or if its chat template is not that of its training.
        """
        config = read_json(Path(name) / CONFIG_FILE)
        if config:
            tokenizer = load_tokenizer(str(name), constant=constant)
            if chat_template_sha256(tokenizer) != config["chat_template_sha256"]:
                stop(f"{constant} = {str(name)!r}: its chat template is not the one it was trained with")
            for option in REMOVED:
                if config.get(option.lower()):
                    stop(f"{constant} = {str(name)!r} needs {option}, which no longer exists: train it again")
            reading, window = Reading.of_json(config), config["max_length"]
        else:
            tokenizer, reading, window = foreign(str(name), constant)
        model = load_classifier(str(name), HEADS[reading.head].outputs, constant).to(choose_device(device)).eval()
        return cls(model, tokenizer, reading, window, precision, config)

    def score(self, conversations: list[list[Message]], batch_size: int = 8) -> torch.Tensor:
        """Return the rewards [conversations], float32 on the CPU, in the window of the training.

        Batches hold conversations of similar length; padding and the rest of the batch do not change a score.
        """
        prompts = [messages[:-1] for messages in conversations]
        answers = [(messages[-1]["content"],) for messages in conversations]
        return self.reading.rewards(self.read(prompts, answers, batch_size)[:, 0])

    def read(self, prompts: list[list[Message]], answers: list[tuple[str, ...]], batch_size: int = 8) -> torch.Tensor:
        """Return the head's outputs [prompts, answers, n], float32 on the CPU.

        Give each prompt the same number of answers. They share one window, as the answers of a pair do in training.
        `reading` turns outputs into rewards, probabilities, spread, entropy, and P(one beats the other).
        """
        encoded = encode_answers(self.tokenizer, prompts, answers, self.max_length, close=True)
        ids = [pair.prompt_ids + answer for pair in encoded for answer in pair.answer_ids]
        return self.outputs_of_ids(ids, batch_size).view(len(prompts), len(answers[0]), -1)

    def pair_outputs(self, rows: Dataset, batch_size: int = 8) -> np.ndarray:
        """Return the head's outputs [pairs, 2, n], chosen first, for rows with token columns and closed answers."""
        prompts = [prompt_of(row) for row in rows]
        sides = zip(prompts, rows["chosen_ids"], rows["rejected_ids"], strict=True)
        ids = [prompt + answer for prompt, *answers in sides for answer in answers]
        return self.outputs_of_ids(ids, batch_size).view(len(rows), 2, -1).numpy()

    def outputs_of_ids(self, ids: list[list[int]], batch_size: int) -> torch.Tensor:
        """Return the head's outputs [rows, n] on the CPU, from batches of similar length, the longest first."""
        outputs = torch.zeros(len(ids), HEADS[self.reading.head].outputs)
        batches = like_length(list(map(len, ids)), math.inf, batch_size)
        for mine in tqdm(batches, desc="scoring", leave=False, disable=bar_off(len(batches) > 4)):
            outputs[mine] = self.outputs([ids[i] for i in mine]).cpu()
        if not outputs.isfinite().all():
            stop("rewards are not finite: set PRECISION = fp32, or use a reward model that is whole")
        return outputs

    @torch.no_grad()
    def outputs(self, rows: list[list[int]]) -> torch.Tensor:
        """Return the head's outputs [rows, n] for one batch of ids; pooled by length, not by pad ids."""
        device = self.model.device
        multiple = row_multiple(device)
        length = -(-max(map(len, rows)) // multiple) * multiple
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        ids, mask = ids.to(device), mask.to(device)
        if not hasattr(self.model, "score"):  # an encoder of the hub, which pools in its own way, in float32
            return self.model(ids, attention_mask=mask).logits.float()
        with autocast(device, self.precision):
            body = getattr(self.model, self.model.base_model_prefix)
            hidden = body(ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows), device=device), mask.sum(1) - 1]  # [rows, hidden]
        return apply_head(self.model, last)


def foreign(name: str, constant: str) -> tuple[PreTrainedTokenizerBase, Reading, int]:
    """Return (tokenizer, reading, window) of a reward model that was not trained here."""
    made = "a run folder of train_reward_model.py or a reward model of the hub with one output"
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        stop(f"{constant} = {name!r} is not there: run `python train_reward_model.py` first, or name {made}")
    kinds = getattr(config, "architectures", None) or []
    if config.num_labels != 1 or not any("SequenceClassification" in kind for kind in kinds):
        stop(f"{constant} = {name!r} is no reward model with one output: name {made}")
    try:
        template = from_tokenizer_json(name).chat_template
    except (OSError, ValueError) as error:
        explain_missing(constant, name, error)
    if not template:
        say(f"{name} has no chat template: it reads `User: ...` and `Assistant: ...`")
    tokenizer = load_tokenizer(name, "" if template else "plain", constant)
    window = min(HUB_WINDOW, getattr(config, "max_position_embeddings", HUB_WINDOW), tokenizer.model_max_length)
    return tokenizer, Reading("scalar"), window


def load_judges(reward_model: str, judge_model: str, device: str, precision: str) -> dict[str, RewardModel]:
    """Return {"reward": the model that a policy is trained on, "judge": JUDGE_MODEL if it is set}."""
    if judge_model and Path(judge_model).resolve() == Path(reward_model).resolve():
        stop(f"JUDGE_MODEL = {judge_model!r} is REWARD_MODEL itself: name a reward model that no policy was trained on")
    judges = {"reward": RewardModel.load(reward_model, device, precision)}
    require_worth(reward_model)
    if judge_model:
        judges["judge"] = RewardModel.load(judge_model, device, precision, constant="JUDGE_MODEL")
        require_worth(judge_model, "JUDGE_MODEL")
    return judges


def require_worth(folder: str, constant: str = "REWARD_MODEL") -> None:
    """Refuse a reward model that is worse than a coin; warn if it beats no shortcut."""
    result = read_json(Path(folder) / "eval.json")
    if not result:
        say(f"WARNING: {folder} has no eval.json, so nobody knows whether it is better than a coin")
    elif result["accuracy_high"] < 0.5 and result.get("prompts", result["pairs"]) >= FEWEST:
        stop(
            f"{constant} = {folder!r} is worse than a coin: {result['accuracy']:.3f} of its {result['pairs']} "
            f"pairs, 95 % interval up to {result['accuracy_high']:.3f}. Neither train nor judge by it"
        )
    elif not result["verdict"].startswith("better"):
        say(
            f"WARNING: {folder} is {result['verdict']}.\nWARNING: what it likes may be that shortcut and nothing "
            "else: look at length and at samples, not at its rewards alone"
        )
