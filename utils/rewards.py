"""Reward heads and the one scorer: from pairs of ids in training, from conversations everywhere else."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.models import PROOF_ROWS, choose_device, load_classifier, plain, save_with_proof
from utils.pairs import PairCollator, hidden_states
from utils.rows import Message
from utils.runs import needs, read_json, stop, write_json
from utils.tokens import chat_template_sha256, encode_pairs, load_tokenizer

PairLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # rewards [pairs] of both sides to losses [pairs]
CONFIG_FILE = "reward_config.json"


@dataclass(frozen=True)
class Head:
    """A kind of reward head: how many outputs it has, and what they are called in the model's config."""

    outputs: int
    names: tuple[str, ...]


HEADS = {"scalar": Head(1, ("reward",))}  # what HEAD may name


class RewardPairs(nn.Module):
    """A classification model as the trainer calls it: shared rows in, the head's outputs for both answers out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def config(self) -> object:
        return self.model.config

    def forward(self, ends: torch.Tensor, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"outputs": [batch, 2, head outputs]} float32, chosen first; taken at the last real token of each answer."""
        hidden = hidden_states(self.model, batch)
        last = hidden.gather(1, ends[:, :, None].expand(-1, -1, hidden.shape[-1]))  # [batch, 2, hidden]
        return {"outputs": apply_head(self.model, last)}


def apply_head(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The head in float32: a bfloat16 head would quantise rewards to steps of 0.03 and make ties of near values."""
    with torch.autocast(hidden.device.type, enabled=False):
        return plain(model).score(hidden.float())


def pair_losses(outputs: dict, batch: dict, pair_loss: PairLoss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of each pair [pairs], and what is logged of it, from the outputs of RewardPairs."""
    chosen, rejected = outputs["outputs"][..., 0].unbind(1)
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    logged = {"accuracy": right, "margin": chosen - rejected, "rewards/chosen": chosen, "rewards/rejected": rejected}
    return pair_loss(chosen, rejected), logged


def prepare(model: nn.Module, tokenizer: PreTrainedTokenizerBase, head: Head) -> nn.Module:
    """The model with names for its outputs, and a pad token that is not the end of turn, where there is one.

    transformers pools a classification model at the last token that is not padding: with pad = end of turn it would
    read the token before the end of turn. "regression" keeps its pipeline from putting a sigmoid on top.
    """
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.problem_type = "regression"
    model.config.id2label = dict(enumerate(head.names))
    model.config.label2id = {name: i for i, name in enumerate(head.names)}
    return model


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    head: str,
    max_length: int,
    rows: Dataset,
    collator: PairCollator,
) -> None:
    """The reward model as a plain folder with reward_config.json, proved on the first rows."""
    few = collator([rows[i] for i in range(min(PROOF_ROWS, len(rows)))])

    def score(model: nn.Module) -> torch.Tensor:
        batch = {name: value.to(model.device) for name, value in few.items()}
        return RewardPairs(model)(**batch)["outputs"].cpu()

    save_with_proof(
        model, tokenizer, folder, partial(load_classifier, labels=HEADS[head].outputs, constant="OUTPUT_DIR"), score
    )
    config = {"head": head, "chat_template_sha256": chat_template_sha256(tokenizer), "max_length": max_length}
    write_json(folder / CONFIG_FILE, config)


class RewardModel:
    """A trained reward model that scores conversations."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.model, self.tokenizer, self.max_length = model.eval(), tokenizer, max_length

    @classmethod
    def load(cls, folder: str, device: str = "") -> "RewardModel":
        """The reward model in a run folder of train_reward_model.py; ends the script with one line if it is none."""
        config = read_json(needs(Path(folder) / CONFIG_FILE, made_by="train_reward_model.py"))
        tokenizer = load_tokenizer(folder, constant="REWARD_MODEL")
        if chat_template_sha256(tokenizer) != config["chat_template_sha256"]:
            stop(f"REWARD_MODEL = {folder!r}: its chat template is not the one it was trained with")
        model = load_classifier(folder, HEADS[config["head"]].outputs, "REWARD_MODEL").to(choose_device(device))
        return cls(model, tokenizer, config["max_length"])

    @torch.no_grad()
    def score(self, conversations: list[list[Message]], batch_size: int = 8) -> torch.Tensor:
        """Rewards [conversations], float32 on the CPU; each conversation ends in the answer to be scored.

        The window is that of the training. Batches are made of conversations of like length; neither padding nor
        batch mates change a score.
        """
        answers = [(messages[-1]["content"],) * 2 for messages in conversations]
        prompts = [messages[:-1] for messages in conversations]
        encoded = encode_pairs(self.tokenizer, prompts, answers, self.max_length)
        ids = [pair.prompt_ids + pair.chosen_ids for pair in encoded]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        rewards = torch.zeros(len(ids))
        for start in range(0, len(order), batch_size):
            mine = order[start : start + batch_size]
            rewards[mine] = self.outputs([ids[i] for i in mine])[:, 0].cpu()
        return rewards

    def outputs(self, rows: list[list[int]]) -> torch.Tensor:
        """The head's outputs [rows, outputs] for rows of ids, right-padded; pooled by length, not by pad ids."""
        device = self.model.device
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        body = getattr(self.model, self.model.base_model_prefix)
        hidden = body(ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows), device=device), mask.sum(1).to(device) - 1]  # [rows, hidden]
        return apply_head(self.model, last)
