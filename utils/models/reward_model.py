"""Reward models: heads, start, save, and `RewardModel`, which scores conversations.

A head has one output (a scalar), ten (logits over the grades 1 to 10) or five (the attributes of HelpSteer2). The
reward is always outputs . weights. For a distribution the outputs pass through a softmax first and the weights are the
grades, so the reward is the expected grade.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from utils.data.preferences import RATINGS, Message
from utils.data.processed import prompt_of
from utils.data.sources import ATTRIBUTES, HIGHEST_ATTRIBUTE
from utils.data.tokens import chat_template_sha256, encode_answers, from_tokenizer_json, load_tokenizer
from utils.models.loading import (
    PROOF_ROWS,
    autocast,
    body_of,
    choose_device,
    load,
    load_classifier,
    plain,
    save_with_proof,
)
from utils.models.shared_prompt import PairCollator, batches_by_length, hidden_states, padded, row_multiple
from utils.runs import read_json, write_json
from utils.script import bar_off, explain_missing, say, stop

GRADES = 10
CONFIG_FILE = "reward_config.json"
REMOVED = ("length_penalty", "answers_only")  # settings of older versions that changed the scores
MIN_PROMPTS = 6  # prompts needed to show that a model is worse than a coin: 5 of 5 wrong is p = 0.06
HUB_WINDOW = 4096  # largest window, prompt and answer, for a reward model from the hub


@dataclass(frozen=True)
class HeadKind:
    """A kind of head: the names of its outputs in the model's config, and how transformers' pipeline treats them."""

    names: tuple[str, ...]
    problem_type: Literal[
        "regression", "single_label_classification"
    ]  # the pipeline applies a softmax to "single_label_classification", nothing to "regression"

    @property
    def outputs(self) -> int:
        return len(self.names)


HEADS = {  # values of HEAD
    "scalar": HeadKind(("reward",), "regression"),
    "distribution": HeadKind(tuple(str(grade) for grade in range(1, GRADES + 1)), "single_label_classification"),
    "attributes": HeadKind(ATTRIBUTES, "regression"),
}


@dataclass
class RewardHead:
    """From the outputs of a model to rewards; saved with the model in reward_config.json.

    kind: a key of HEADS. weights: of the outputs in the reward (for a distribution: of the grades' probabilities).
    means: of the attributes in the training rows; the head predicts the difference from them.
    lowest_rating, highest_rating: the ratings of grades 1 and 10; the map between them is linear.
    win_scale: P(a beats b) = sigma(win_scale * (reward a - reward b)); a distribution does not need it.
    """

    kind: str
    weights: list[float] = field(default_factory=lambda: [1.0])
    means: list[float] | None = None
    lowest_rating: float = 0.0
    highest_rating: float = 1.0
    win_scale: float = 1.0

    def as_json(self) -> dict[str, Any]:
        """Return the entries for reward_config.json: `kind` is called `head` there, and `grades` repeats weights."""
        entries = asdict(self)
        grades = [int(weight) for weight in self.weights] if self.kind == "distribution" else None
        return {"head": entries.pop("kind"), **entries, "grades": grades}

    @classmethod
    def of_json(cls, config: dict[str, Any]) -> "RewardHead":
        """Return the head from the entries of a reward_config.json; ignore other entries."""
        config = config | {"kind": config["head"]}
        return cls(**{entry.name: config[entry.name] for entry in fields(cls) if entry.name in config})

    def probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return P(grade) [..., 10] for outputs of a distribution head."""
        assert self.kind == "distribution", self.kind
        return functional.softmax(outputs.float(), dim=-1)

    def rewards(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the rewards [...] of outputs [..., n]."""
        values = self.probabilities(outputs) if self.kind == "distribution" else outputs.float()
        values = values + torch.tensor(self.means, device=outputs.device) if self.means else values
        return values @ torch.tensor(self.weights, device=outputs.device)

    def spread(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation of the grade [...] under a distribution."""
        p, grades = self.probabilities(outputs), torch.tensor(self.weights, device=outputs.device)
        expected = (p @ grades)[..., None]
        return (p * (grades - expected) ** 2).sum(dim=-1).sqrt()

    def entropy(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the entropy of the grade [...] in nats; ln 10 at uniform."""
        return torch.special.entr(self.probabilities(outputs)).sum(dim=-1)

    def win(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return P(one beats other) [...] for two outputs [..., n]; a tie of grades counts half to each."""
        if self.kind == "distribution":
            one, other = one.float(), other.float()
            return log_win(one, other).exp() + 0.5 * log_tie(one, other).exp()
        return torch.sigmoid(self.win_scale * (self.rewards(one) - self.rewards(other)))

    def grade(self, rating: torch.Tensor) -> torch.Tensor:
        """Return the grade from 1 to 10 of a rating."""
        share = (rating - self.lowest_rating) / (self.highest_rating - self.lowest_rating)
        return 1 + (GRADES - 1) * share.clamp(0, 1)


def new_reward_head(kind: str, rating: str, ratings: list[float], means: list[float] | None) -> RewardHead:
    """Return a new head of a kind.

    rating: a key of RATINGS, for the weights of the attributes. ratings: of the training rows, [] if they have none.
    means: of the attributes in the training rows, None if they have none. Grades 1 to 10 cover the possible range of
    the rating if there are attributes, otherwise the range of `ratings`.
    """
    weights, divisor = RATINGS.get(rating, RATINGS["average"])
    shares = [weight / divisor for weight in weights]
    lowest = HIGHEST_ATTRIBUTE * sum(min(share, 0) for share in shares)
    highest = HIGHEST_ATTRIBUTE * sum(max(share, 0) for share in shares)
    if means is None:
        lowest, highest = min(ratings, default=0.0), max(ratings, default=1.0)
    highest = max(highest, lowest + 1e-6)  # if all ratings are equal, any line will do
    grades = [float(grade) for grade in range(1, GRADES + 1)]
    output_weights = {"scalar": [1.0], "distribution": grades, "attributes": shares}[kind]
    return RewardHead(kind, output_weights, means if kind == "attributes" else None, lowest, highest)


def log_win(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Return log P(grade of `better` > grade of `worse`) [...] for logits over grades [..., grades].

    P = sum over i of p_better(i) * sum over j < i of p_worse(j). In log space, sharp distributions neither underflow
    nor lose their gradient.
    """
    better, worse = functional.log_softmax(better, dim=-1), functional.log_softmax(worse, dim=-1)
    below = worse.logcumsumexp(dim=-1)[..., :-1]  # log P(worse < i) for i = 2 .. grades
    return (better[..., 1:] + below).logsumexp(dim=-1)


def log_tie(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return log P(both have the same grade) [...] for logits over grades [..., grades]."""
    return (functional.log_softmax(one, dim=-1) + functional.log_softmax(other, dim=-1)).logsumexp(dim=-1)


class RewardPairs(nn.Module):
    """A classifier as the trainer calls it: from shared rows to the head's outputs for both answers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, ends: torch.Tensor, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"outputs": [batch, 2, n]}, float32, chosen first, pooled at the last token of each answer."""
        hidden = hidden_states(self.model, batch)
        last = hidden.gather(1, ends[:, :, None].expand(-1, -1, hidden.shape[-1]))  # [batch, 2, hidden]
        return {"outputs": apply_head(self.model, last)}


def apply_head(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Apply the head in float32: bfloat16 rewards have steps of 0.03, so that close rewards become ties."""
    classifier: Any = plain(model)
    with torch.autocast(hidden.device.type, enabled=False):
        return classifier.score(hidden.float())


def start_model(name: str, tokenizer: PreTrainedTokenizerBase, head: RewardHead) -> PreTrainedModel:
    """Return a model with `head`, from a language model or an earlier reward model.

    A new head starts at zero, so that no steps go into undoing random rewards. A trained head of the same kind is
    kept. An attributes head becomes a scalar head by its weights (the warm start of https://arxiv.org/abs/2410.01257).
    """
    config = read_json(Path(name) / CONFIG_FILE)
    kind = config.get("head", head.kind)
    options = {"num_labels": HEADS[kind].outputs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load(AutoModelForSequenceClassification, "MODEL", name, **options)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        stop(f"MODEL = {name!r} is not a decoder with a linear head called `score`, which a reward model needs here")
    new = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    trained = model.score.weight.data
    if kind != head.kind:
        model.score = nn.Linear(trained.shape[1], HEADS[head.kind].outputs, bias=False)
    if kind != head.kind or "score.weight" in new:
        nn.init.zeros_(model.score.weight)
    if (kind, head.kind) == ("attributes", "scalar"):
        model.score.weight.data = torch.tensor([config["weights"]]) @ trained
    return configure_head(model, tokenizer, head)


def configure_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: RewardHead) -> PreTrainedModel:
    """Name the model's outputs, and set a pad token other than the end of turn if the tokenizer has an unk token.

    transformers pools a classifier at the last token that is not padding. With pad = end of turn it would pool one
    token too early.
    """
    kind = HEADS[head.kind]
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.problem_type = kind.problem_type
    model.config.id2label = dict(enumerate(kind.names))
    model.config.label2id = {name: i for i, name in enumerate(kind.names)}
    return model


def random_head_model(name: str, head: RewardHead, device: torch.device, seed: int) -> nn.Module:
    """Return the model as it was before training, with a random head: a baseline."""
    before = HEADS[read_json(Path(name) / CONFIG_FILE).get("head", head.kind)]
    model: Any = load_classifier(name, before.outputs, ignore_mismatched_sizes=True)
    torch.manual_seed(seed)
    model.score = nn.Linear(model.score.weight.shape[1], HEADS[head.kind].outputs, bias=False)
    nn.init.normal_(model.score.weight, std=model.config.initializer_range)
    return model.to(device).eval()


def save_reward_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    head: RewardHead,
    rows: Dataset,
    collator: PairCollator,
    **facts: Any,
) -> None:
    """Save a plain model folder with reward_config.json (the head and `facts`), and prove that it reloads.

    facts: at least max_length, which RewardModel needs.
    """
    batch = collator([rows[i] for i in range(min(PROOF_ROWS, len(rows)))])

    def score(model: Any) -> torch.Tensor:
        return RewardPairs(model)(**{name: value.to(model.device) for name, value in batch.items()})["outputs"].cpu()

    reload = partial(load_classifier, labels=HEADS[head.kind].outputs, constant="OUTPUT_DIR")
    save_with_proof(model, tokenizer, folder, reload, score)
    config = head.as_json() | {"chat_template_sha256": chat_template_sha256(tokenizer)} | facts
    write_json(folder / CONFIG_FILE, config)


@dataclass
class RewardModel:
    """A trained reward model; scores conversations whose last turn is the answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: RewardHead
    max_length: int
    precision: str = "fp32"
    config: dict[str, Any] = field(default_factory=dict)  # content of reward_config.json, {} for a hub model

    @classmethod
    def load(
        cls, name: str, device: str = "", precision: str = "fp32", constant: str = "REWARD_MODEL"
    ) -> "RewardModel":
        """Load a run folder of train_reward_model.py, or a classifier with one output (folder or hub name).

        precision: fp32 gives the same scores as transformers; see choose_precision for faster ones. Stop if there is
        no such model, or if its chat template is not the one of its training.
        """
        config = read_json(Path(name) / CONFIG_FILE)
        if config:
            tokenizer = load_tokenizer(str(name), constant=constant)
            if chat_template_sha256(tokenizer) != config["chat_template_sha256"]:
                stop(f"{constant} = {str(name)!r}: its chat template is not the one it was trained with")
            for setting in filter(config.get, REMOVED):
                stop(f"{constant} = {str(name)!r} needs {setting.upper()}, which no longer exists: train it again")
            head, window = RewardHead.of_json(config), config["max_length"]
        else:
            tokenizer, head, window = load_hub_model(str(name), constant)
        model = load_classifier(str(name), HEADS[head.kind].outputs, constant)
        model.to(choose_device(device)).eval()  # type: ignore[arg-type]
        return cls(model, tokenizer, head, window, precision, config)

    def score(self, conversations: list[list[Message]], batch_size: int = 8) -> torch.Tensor:
        """Return the rewards [conversations], float32 on the CPU, in the window of the training.

        Batches hold conversations of similar length. A score does not depend on padding or on the rest of its batch.
        """
        prompts = [messages[:-1] for messages in conversations]
        answers: list[tuple[str, ...]] = [(messages[-1]["content"],) for messages in conversations]
        return self.head.rewards(self.read(prompts, answers, batch_size)[:, 0])

    def read(self, prompts: list[list[Message]], answers: list[tuple[str, ...]], batch_size: int = 8) -> torch.Tensor:
        """Return the head's outputs [prompts, answers, n], float32 on the CPU.

        All prompts have the same number of answers, which share one window, like the answers of a pair in training.
        Pass the outputs to `head` for rewards, probabilities, spread, entropy, and P(one beats the other).
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

    @torch.no_grad()
    def outputs_of_ids(self, ids: list[list[int]], batch_size: int) -> torch.Tensor:
        """Return the head's outputs [rows, n] on the CPU; pooled by length, not by pad ids."""
        device, outputs = self.model.device, torch.zeros(len(ids), HEADS[self.head.kind].outputs)
        batches = batches_by_length(list(map(len, ids)), math.inf, batch_size)
        for places in tqdm(batches, desc="scoring", leave=False, disable=bar_off(len(batches) > 4)):
            sides = padded([ids[i] for i in places], self.tokenizer.pad_token_id, row_multiple(device))
            batch, mask = (side.to(device) for side in sides)
            if not hasattr(self.model, "score"):  # an encoder from the hub, which pools in its own way, in float32
                outputs[places] = self.model(batch, attention_mask=mask).logits.float().cpu()
                continue
            with autocast(device, self.precision):
                hidden = body_of(self.model)(batch, attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(places), device=device), mask.sum(1) - 1]  # [rows, hidden]
            outputs[places] = apply_head(self.model, last).cpu()
        if not outputs.isfinite().all():
            stop("rewards are not finite: set PRECISION = fp32, or use another reward model")
        return outputs


def load_hub_model(name: str, constant: str) -> tuple[PreTrainedTokenizerBase, RewardHead, int]:
    """Return (tokenizer, head, window) of a reward model that was not trained here."""
    expected = "a run folder of train_reward_model.py or a reward model from the hub with one output"
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        stop(f"{constant} = {name!r} is not there: run `python train_reward_model.py` first, or name {expected}")
    architectures = getattr(config, "architectures", None) or []
    if config.num_labels != 1 or not any("SequenceClassification" in one for one in architectures):
        stop(f"{constant} = {name!r} is no reward model with one output: name {expected}")
    try:
        template = from_tokenizer_json(name).chat_template
    except (OSError, ValueError) as error:
        explain_missing(constant, name, OSError(error))
    if not template:
        say(f"{name} has no chat template: using `User: ...` and `Assistant: ...`")
    tokenizer = load_tokenizer(name, "" if template else "plain", constant)
    window = min(HUB_WINDOW, getattr(config, "max_position_embeddings", HUB_WINDOW), tokenizer.model_max_length)
    return tokenizer, RewardHead("scalar"), window


def load_judges(reward_model: str, judge_model: str, device: str, precision: str) -> dict[str, RewardModel]:
    """Return {"reward": the model that a policy is trained on, "judge": JUDGE_MODEL if it is set}."""
    if judge_model and Path(judge_model).resolve() == Path(reward_model).resolve():
        stop(f"JUDGE_MODEL = {judge_model!r} is REWARD_MODEL itself: name one that the policy is not trained on")
    judges = {"reward": RewardModel.load(reward_model, device, precision)}
    check_better_than_chance(reward_model)
    if judge_model:
        judges["judge"] = RewardModel.load(judge_model, device, precision, constant="JUDGE_MODEL")
        check_better_than_chance(judge_model, "JUDGE_MODEL")
    return judges


def check_better_than_chance(folder: str, constant: str = "REWARD_MODEL") -> None:
    """Refuse a reward model that is worse than a coin; warn if it beats no shortcut."""
    result = read_json(Path(folder) / "eval.json")
    if not result:
        say(f"WARNING: {folder} has no eval.json, so it is not known to be better than a coin")
    elif result["accuracy_high"] < 0.5 and result.get("prompts", result["pairs"]) >= MIN_PROMPTS:
        stop(
            f"{constant} = {folder!r} is worse than a coin: {result['accuracy']:.3f} of its {result['pairs']} "
            f"pairs, 95 % interval up to {result['accuracy_high']:.3f}. Do not train or judge by it"
        )
    elif not result["verdict"].startswith("better"):
        say(
            f"WARNING: {folder} is {result['verdict']}.\nWARNING: its rewards may measure that shortcut and nothing "
            "else: look at lengths and samples too"
        )
