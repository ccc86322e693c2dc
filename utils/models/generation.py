"""Sample answers of a policy in batches, and compute the log-probs of what was sampled."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from utils.data.preferences import Message
from utils.data.tokens import end_of_turn, fitted_prompt
from utils.models.loading import autocast, plain
from utils.models.shared_prompt import (
    TOKENS_AT_ONCE,
    PairCollator,
    Prompt,
    answer_logps,
    answer_logps_and_entropies,
    batches_by_length,
    row_multiple,
    with_vectors,
)
from utils.script import bar_off

NGRAM = 3  # repetition counts runs of so many tokens


@dataclass
class Answer:
    """A generated answer: its prompt, its ids (the end of turn among them, if it came to one), its text."""

    prompt: Prompt
    ids: list[int]
    text: str
    ended: bool


class SeededGumbel(LogitsProcessor):
    """Gumbel noise on logits / temperature: the largest sum is a sample of the softmax, so that greedy search samples.

    https://arxiv.org/abs/1411.0030 (section 2). Each row draws from a generator of its own.
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
    """What makes greedy search sample: temperature, then top_k, then top_p, then the luck of each row.

    What top_k and top_p leave out is -inf before the noise is added: no luck can bring it back. Temperature 0 is
    greedy, and neither matters then.
    """
    if not temperature:
        return LogitsProcessorList()
    if not top_k and top_p >= 1:
        return LogitsProcessorList([SeededGumbel(temperature, seeds)])
    kept = [TopKLogitsWarper(top_k)] if top_k else []
    kept += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), *kept, SeededGumbel(1.0, seeds)])


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's end token, and the special token that its template closes a turn with."""
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
    """One answer to each prompt, in their order; temperature 0 is greedy.

    Samples from the whole distribution, in left-padded batches of prompts of like length; top_k above 0 keeps the
    likeliest so many tokens, top_p below 1 the likeliest of them that make up this share.
    Each prompt has random numbers of its own, by `seed` and its number (by default its place in the list): an answer
    does not depend on its batch or process, and two policies with the same seed answer with the same luck.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    model, stops = plain(model), stop_ids(tokenizer)
    was, answers = model.training, {}
    model.eval()
    batches = batches_by_length([len(prompt.ids) for prompt in prompts], math.inf, batch_size)
    for mine in tqdm(batches, desc=progress, leave=False, disable=bar_off(len(batches) > 1)):
        given, width = left_padded(model, [prompts[i] for i in mine], tokenizer.pad_token_id, vectors)
        luck = sampling_processors(temperature, [(seed, numbers[i]) for i in mine], top_k, top_p)
        with autocast(model.device, precision), float32_head(model):
            written = model.generate(
                **given,
                max_new_tokens=max_new_tokens,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
                do_sample=False,
                repetition_penalty=1.0,
                logits_processor=luck,
            )
        for i, ids in zip(mine, written[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(ids) if token in stops), None)
            ids = ids if end is None else ids[: end + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers[i] = Answer(prompts[i], ids, text, end is not None)
    model.train(was)
    return [answers[i] for i in range(len(prompts))]


@contextmanager
def float32_head(model: nn.Module) -> Iterator[None]:
    """The head in float32 whatever the precision of the body: answers are then drawn from what `logps_of` reads.

    In bfloat16 the logits of a large vocabulary lie in steps of 0.06 and more, which ties the likeliest tokens.
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
        del head.forward  # the method of its class again


def left_padded(
    model: nn.Module, prompts: list[Prompt], pad_id: int, vectors: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], int]:
    """(what generate() takes, number of its output's columns that are prompt) for one batch of prompts."""
    multiple = row_multiple(model.device)
    width = -(-max(len(prompt.ids) for prompt in prompts) // multiple) * multiple
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt.ids) :], mask[i, width - len(prompt.ids) :] = torch.tensor(prompt.ids), 1
    given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    if vectors is None:
        return given, width
    at = torch.tensor([width - len(prompt.ids) + prompt.vectors_at for prompt in prompts], device=model.device)
    body = getattr(model, model.base_model_prefix)
    embedded = with_vectors(body, given.pop("input_ids"), at, vectors.to(model.device))
    return {"inputs_embeds": embedded, **given}, 0


@torch.no_grad()
def logps_of(
    model: nn.Module,
    answers: list[Answer],
    temperature: float = 1.0,
    precision: str = "fp32",
    vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """log pi(answer | prompt) [answers] at a temperature, summed over the tokens, the end of turn among them."""
    vectors = vectors.to(plain(model).device) if vectors is not None else None

    def read(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return answer_logps(model, batch, vectors, temperature)[0]

    return read_answers(model, answers, read, precision)


@torch.no_grad()
def logps_and_entropies_of(
    model: nn.Module, answers: list[Answer], temperature: float, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log pi(answer | prompt), entropy of the next token summed over the answer's tokens) [answers], nats."""

    def read(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([sums[:, 0] for sums in answer_logps_and_entropies(model, batch, temperature)], dim=1)

    return read_answers(model, answers, read, precision, columns=2).unbind(1)


def read_answers(
    model: nn.Module,
    answers: list[Answer],
    read: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    precision: str,
    columns: int = 1,
) -> torch.Tensor:
    """What `read` finds in batches of answers of like length [answers] (or [answers, columns]), on the CPU."""
    device = plain(model).device
    was, found = model.training, torch.zeros(len(answers), columns)
    model.eval()
    for mine in parts_of(answers, TOKENS_AT_ONCE[device.type]):
        batch = batch_of([answers[i] for i in mine], row_multiple(device))
        with autocast(device, precision):
            found[mine] = read({name: value.to(device) for name, value in batch.items()})[:, :columns].cpu()
    model.train(was)
    return found if columns > 1 else found[:, 0]


def parts_of(answers: list[Answer], tokens: int) -> list[list[int]]:
    """Places in `answers`, in parts of at most `tokens` positions; see `like_length`."""
    return batches_by_length([len(answer.prompt.ids) + len(answer.ids) for answer in answers], tokens)


def batch_of(answers: list[Answer], multiple: int = 1) -> dict[str, torch.Tensor]:
    """Return answers behind their prompts as shared rows without a second answer, for `answer_logps`."""
    return PairCollator(0, multiple).shared_rows([a.prompt for a in answers], [(a.ids, []) for a in answers])


def repetition(ids: list[int]) -> float:
    """Share of the runs of NGRAM tokens in an answer that stood in it before; 0 where it is shorter."""
    runs = Counter(tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1))
    return 1 - len(runs) / runs.total() if runs else 0.0
