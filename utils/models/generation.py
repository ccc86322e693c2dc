"""Sample answers of a policy in batches, and compute the log-probs of the sampled answers."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from utils.data.preferences import Message
from utils.data.tokens import end_of_turn, fitted_prompt
from utils.models.loading import autocast, body_of, evaluating, plain
from utils.models.shared_prompt import (
    TOKENS_AT_ONCE,
    Batch,
    PairCollator,
    Prompt,
    answer_logps,
    answer_logps_and_entropies,
    batches_by_length,
    padded,
    row_multiple,
    with_vectors,
)
from utils.script import bar_off

NGRAM = 3  # tokens in a run that counts as repeated


@dataclass
class Answer:
    """A generated answer: its prompt, its ids (including the end of turn if it got there), its text."""

    prompt: Prompt
    ids: list[int]
    text: str
    ended: bool


class SeededGumbel(LogitsProcessor):
    """Add Gumbel noise to logits / temperature: the largest sum is a sample of the softmax, so greedy search samples.

    https://arxiv.org/abs/1411.0030 (section 2). Each row has its own random generator.
    """

    def __init__(self, temperature: float, seeds: list[tuple[int, int]]):
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(hash(seed) % 2**63) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
        return scores.float() / self.temperature - noise.log().to(scores.device)


def sampling_processors(
    temperature: float, seeds: list[tuple[int, int]], top_k: int = 0, top_p: float = 1.0
) -> LogitsProcessorList:
    """Return what makes greedy search sample: temperature, then top_k, then top_p, then noise for each row.

    Tokens outside top_k and top_p are at -inf before the noise, so it cannot bring them back. Temperature 0 is greedy,
    whatever top_k and top_p are.
    """
    if not temperature:
        return LogitsProcessorList()
    if not top_k and top_p >= 1:
        return LogitsProcessorList([SeededGumbel(temperature, seeds)])
    cuts: list[LogitsProcessor] = [TopKLogitsWarper(top_k)] if top_k else []
    cuts += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), *cuts, SeededGumbel(1.0, seeds)])


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the end token, and the special token that closes a turn in the template."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing = [i for i in end_of_turn(tokenizer) if i in special]
    return sorted({*closing[:1], *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})


def prompts_of(tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], max_length: int) -> list[Prompt]:
    """Return prompts of at most `max_length` tokens; a longer one loses its oldest turns, then its start."""
    return [Prompt(fitted_prompt(tokenizer, messages, max_length)) for messages in conversations]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 8,
    precision: str = "fp32",
    vectors: torch.Tensor | None = None,
    progress: str = "sampling",
    numbers: Sequence[int] | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[Answer]:
    """Return one answer to each prompt, in their order; temperature 0 is greedy.

    Sample from the whole distribution, or from the `top_k` likeliest tokens, or from the likeliest tokens that sum to
    `top_p`. vectors [n, hidden]: replace the embeddings at the prompts' `vectors_at`.
    The random numbers of a prompt depend on `seed` and its number only (default: its index). An answer is therefore
    the same in any batch and on any process, and two policies with one seed draw the same random numbers.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    lm: Any = plain(model)
    stops, pad_id = stop_ids(tokenizer), tokenizer.pad_token_id
    answers: dict[int, Answer] = {}
    batches = batches_by_length([len(prompt.ids) for prompt in prompts], math.inf, batch_size)
    for places in tqdm(batches, desc=progress, leave=False, disable=bar_off(len(batches) > 1)):
        inputs, width = left_padded(lm, [prompts[i] for i in places], pad_id, vectors)
        sampling = sampling_processors(temperature, [(seed, numbers[i]) for i in places], top_k, top_p)
        with evaluating(lm), autocast(lm.device, precision), float32_head(lm):
            written = lm.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                eos_token_id=stops,
                pad_token_id=pad_id,
                do_sample=False,
                repetition_penalty=1.0,
                logits_processor=sampling,
            )
        for i, ids in zip(places, written[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(ids) if token in stops), None)
            ids = ids if end is None else ids[: end + 1]
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            answers[i] = Answer(prompts[i], ids, text, end is not None)
    return [answers[i] for i in range(len(prompts))]


@contextmanager
def float32_head(model: Any) -> Iterator[None]:
    """Compute the head in float32 whatever the precision of the body, as `logps_of` does.

    In bfloat16 the logits of a large vocabulary have steps of 0.06 and more, which ties the likeliest tokens.
    """
    head = model.get_output_embeddings()
    forward = head.forward

    def exact(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden.float())

    head.forward = exact
    try:
        yield
    finally:
        del head.forward  # back to the method of its class


def left_padded(
    model: Any, prompts: list[Prompt], pad_id: int, vectors: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], int]:
    """Return (inputs of model.generate() for a batch, number of prompt columns in its output)."""
    rows = [prompt.ids for prompt in prompts]
    ids, mask = (side.to(model.device) for side in padded(rows, pad_id, row_multiple(model.device), left=True))
    width = ids.shape[1]
    if vectors is None:
        return {"input_ids": ids, "attention_mask": mask}, width
    at = torch.tensor([width - len(prompt.ids) + prompt.vectors_at for prompt in prompts], device=model.device)
    embedded = with_vectors(body_of(model), ids, at, vectors.to(model.device))
    return {"inputs_embeds": embedded, "attention_mask": mask}, 0


def logps_of(
    model: nn.Module,
    answers: list[Answer],
    temperature: float = 1.0,
    precision: str = "fp32",
    vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return log pi(answer | prompt) [answers] at a temperature, summed over tokens including the end of turn."""
    vectors = vectors.to(plain(model).device) if vectors is not None else None
    return over_answers(model, answers, precision, lambda batch: answer_logps(model, batch, vectors, temperature)[:1])[
        0
    ]


def logps_and_entropies_of(
    model: nn.Module, answers: list[Answer], temperature: float, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log pi(answer | prompt), entropy of the next token summed over the answer) [answers], in nats."""
    logps, entropies = over_answers(
        model, answers, precision, lambda batch: answer_logps_and_entropies(model, batch, temperature)
    )
    return logps, entropies


@torch.no_grad()
def over_answers(
    model: nn.Module, answers: list[Answer], precision: str, compute: Callable[[Batch], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """Return each result of `compute` [answers] on the CPU, from batches of answers of similar length.

    compute: from a batch of shared rows to tensors [batch, 2]; the first column belongs to the answer.
    """
    device = plain(model).device
    batches = parts_of(answers, TOKENS_AT_ONCE[device.type])
    results = []
    with evaluating(model):
        for places in batches:
            batch = batch_of([answers[i] for i in places], row_multiple(device))
            with autocast(device, precision):
                values = compute({name: value.to(device) for name, value in batch.items()})
            results.append([value[:, 0].cpu() for value in values])
    order = torch.tensor([i for places in batches for i in places]).argsort()
    return [torch.cat(values)[order] for values in zip(*results, strict=True)]


def parts_of(answers: list[Answer], tokens: int) -> list[list[int]]:
    """Return the indices of `answers` in batches of at most `tokens` positions; see `batches_by_length`."""
    return batches_by_length([len(answer.prompt.ids) + len(answer.ids) for answer in answers], tokens)


def batch_of(answers: list[Answer], multiple: int = 1) -> Batch:
    """Return answers behind their prompts as shared rows without a second answer, for `answer_logps`."""
    return PairCollator(0, multiple).shared_rows([a.prompt for a in answers], [(a.ids, []) for a in answers])


def repetition(ids: list[int]) -> float:
    """Return the share of runs of NGRAM tokens that occurred earlier in the answer; 0 if it is shorter than a run."""
    runs = Counter(tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1))
    return 1 - len(runs) / runs.total() if runs else 0.0
