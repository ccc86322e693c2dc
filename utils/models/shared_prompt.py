"""One prompt, two answers, one row: both answers of a pair are computed behind a single copy of their prompt.

    tokens      p p p p  c c c  r r  .
    segments    1 1 1 1  2 2 2  3 3  0     prompt, chosen, rejected, padding
    positions   0 1 2 3  4 5 6  4 5  0     the rejected answer starts at the end of the prompt again

The attention mask hides the chosen answer from the rejected one. Each answer is therefore computed as if it stood
alone behind the prompt (equal to two separate rows to 1e-6), but the prompt is computed once. This file has, in
order: the rows, the mask, the forward pass, the log-probs; then a pass over a whole dataset, and two checks of a model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from utils.data.processed import prompt_of
from utils.models.loading import body_of, evaluating, plain
from utils.script import bar_off, stop

PADDING, PROMPT, CHOSEN, REJECTED = 0, 1, 2, 3  # the segments of a row
TOKENS_AT_ONCE = {"cpu": 1024, "mps": 2048, "cuda": 8192}  # positions in one pass: enough to keep the device busy
ROWS_AT_ONCE = 512  # answer tokens with logits in memory at once: 512 x 49,152 in float32 are 100 MB
SIDES = ("chosen", "rejected")
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prompt:
    """The ids of a prompt; vectors_at: where vectors replace the embeddings of its tokens, -1 = nowhere."""

    ids: list[int]
    vectors_at: int = -1


class PairCollator:
    """Collate rows of a processed folder into shared rows, right-padded to a multiple of `multiple`.

    Return int64 tensors: input_ids, segments and position_ids [batch, length], ends [batch, 2] (index of the last
    token of chosen and rejected), vectors_at [batch], row [batch]; and float32 tensors: ratings [batch, 2] and
    attributes [batch, 2, 5], NaN if the source has none, and gap [batch], the difference of the ratings or 0. Rows
    with a second prompt (`guided_ids`) add the first five under guided_*, rows with `reference` columns add those.
    """

    def __init__(self, pad_id: int, multiple: int = 64):
        self.pad_id, self.multiple = pad_id, multiple

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        answers = [(row["chosen_ids"], row["rejected_ids"]) for row in rows]
        batch = self.shared_rows([Prompt(prompt_of(row), row.get("vectors_at", -1)) for row in rows], answers)
        if "guided_ids" in rows[0]:
            guided = self.shared_rows([Prompt(row["guided_ids"], row["guided_at"]) for row in rows], answers)
            batch |= {f"guided_{name}": value for name, value in guided.items()}
        for name in ("reference", "guided_reference"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        ratings = torch.tensor([[nan_if_none(row[f"{side}_rating"]) for side in SIDES] for row in rows])
        attributes = [[row.get(f"{side}_attributes") or [None] * 5 for side in SIDES] for row in rows]
        attributes = [[[nan_if_none(value) for value in values] for values in pair] for pair in attributes]
        return batch | {
            "row": torch.tensor([row["row"] for row in rows]),
            "ratings": ratings.float(),
            "gap": (ratings[:, 0].nan_to_num() - ratings[:, 1].nan_to_num()).float(),
            "attributes": torch.tensor(attributes, dtype=torch.float32),
        }

    def shared_rows(self, prompts: list[Prompt], answers: list[tuple[list[int], list[int]]]) -> Batch:
        """Return the first five tensors of a batch: a row for each prompt with the ids of its two answers."""
        pairs = [(prompt.ids, *pair) for prompt, pair in zip(prompts, answers, strict=True)]
        input_ids, _ = padded(
            [[*prompt, *chosen, *rejected] for prompt, chosen, rejected in pairs], self.pad_id, self.multiple
        )
        segments, position_ids = torch.full_like(input_ids, PADDING), torch.zeros_like(input_ids)
        ends = torch.zeros((len(pairs), 2), dtype=torch.int64)
        for i, (prompt, chosen, rejected) in enumerate(pairs):
            p, c, r = len(prompt), len(prompt) + len(chosen), len(prompt) + len(chosen) + len(rejected)
            segments[i, :p], segments[i, p:c], segments[i, c:r] = PROMPT, CHOSEN, REJECTED
            position_ids[i, :c] = torch.arange(c)
            position_ids[i, c:r] = torch.arange(p, p + len(rejected))
            ends[i] = torch.tensor([c - 1, r - 1])
        batch = {"input_ids": input_ids, "segments": segments, "position_ids": position_ids, "ends": ends}
        return batch | {"vectors_at": torch.tensor([prompt.vectors_at for prompt in prompts])}


def collator_for(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PairCollator:
    """Return the collator for the pad token of a tokenizer and the row lengths that suit a device."""
    return PairCollator(tokenizer.pad_token_id, row_multiple(device))


def row_multiple(device: torch.device) -> int:
    """Return the multiple that rows are padded to: GPUs run best on few round lengths, a CPU on short rows."""
    return 1 if device.type == "cpu" else 64


def padded(rows: list[list[int]], pad_id: int, multiple: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, attention mask) [rows, length], int64, padded to a multiple of `multiple`."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def nan_if_none(value: float | None) -> float:
    """Return NaN in place of None."""
    return float("nan") if value is None else value


def shared_prompt_mask(segments: torch.Tensor) -> torch.Tensor:
    """Return the attention mask [batch, 1, length, length] for segments [batch, length]; True = query sees key.

    Each position sees the prompt and its own segment up to itself. Padding sees itself: a row of the mask without any
    True would be NaN after the softmax.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    visible = (index[:, None] >= index[None, :]) & ((key == PROMPT) | (key == query)) & (key != PADDING)
    return (visible | (index[:, None] == index[None, :]))[:, None]


def hidden_states(model: nn.Module, batch: Batch, vectors: torch.Tensor | None = None) -> torch.Tensor:
    """Return the last hidden states [batch, length, hidden] of shared rows, from a causal model or a classifier.

    vectors [n, hidden] replace the embeddings of n tokens from batch["vectors_at"] [batch] on.
    """
    body, mask = body_of(model), shared_prompt_mask(batch["segments"])
    if plain(model).config._attn_implementation == "eager":  # adds the mask to the scores; sdpa takes booleans
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    inputs = {"input_ids": batch["input_ids"]}
    if vectors is not None:
        inputs = {"inputs_embeds": with_vectors(body, batch["input_ids"], batch["vectors_at"], vectors)}
    return body(**inputs, attention_mask=mask, position_ids=batch["position_ids"], use_cache=False).last_hidden_state


def with_vectors(body: Any, ids: torch.Tensor, at: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the embeddings [batch, length, hidden] of ids, with vectors [n, hidden] from `at` [batch] on."""
    embedded = body.get_input_embeddings()(ids)
    place = torch.arange(ids.shape[1], device=ids.device) - at[:, None]  # [batch, length], 0 at the first vector
    replaced = (place >= 0) & (place < len(vectors)) & (at[:, None] >= 0)
    put = vectors[place.clamp(0, len(vectors) - 1)].to(embedded.dtype)  # [batch, length, hidden]
    return torch.where(replaced[..., None], put, embedded)


def answer_logps(
    model: nn.Module, batch: Batch, vectors: torch.Tensor | None = None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sums of log pi over the tokens of each answer, numbers of tokens) [batch, 2], float32.

    batch: of PairCollator. vectors: see `hidden_states`.
    """
    hidden, targets, answer = answer_hidden(model, batch, vectors)
    logps, rows = token_logps(model, hidden, targets, temperature), len(batch["input_ids"])
    return sum_by(answer, logps, rows), sum_by(answer, torch.ones_like(logps), rows)


@torch.no_grad()
def answer_logps_and_entropies(
    model: nn.Module, batch: Batch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sums of log pi, sums of the next token's entropy in nats) [batch, 2], float32, without gradient."""
    hidden, targets, answer = answer_hidden(model, batch, None)
    logps, entropies = [], []
    for states, tokens in chunks(hidden, targets):
        distribution = logits_of(model, states, temperature).log_softmax(dim=1)
        logps.append(distribution.gather(1, tokens[:, None])[:, 0])
        entropies.append(torch.special.entr(distribution.exp()).sum(dim=1))
    rows = len(batch["input_ids"])
    return sum_by(answer, torch.cat(logps), rows), sum_by(answer, torch.cat(entropies), rows)


def answer_hidden(
    model: nn.Module, batch: Batch, vectors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (hidden states [tokens, hidden] that predict the answers' tokens, those tokens, their answer) [tokens].

    The last token of the prompt predicts the first token of both answers. An answer's number is 2 row for the chosen
    one and 2 row + 1 for the rejected one.
    """
    segments, ids = batch["segments"], batch["input_ids"]
    row, place = torch.nonzero(segments >= CHOSEN, as_tuple=True)  # [tokens] each
    segment = segments[row, place]
    prompt = (segments == PROMPT).sum(dim=1)  # [batch]
    first = (segment == REJECTED) & (segments[row, place - 1] != REJECTED)
    source = torch.where(first, prompt[row] - 1, place - 1)
    return hidden_states(model, batch, vectors)[row, source], ids[row, place], 2 * row + (segment == REJECTED)


def token_logps(
    model: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Return log pi(target) [tokens], float32, from hidden states [tokens, hidden] that predict targets [tokens].

    The backward pass computes the logits again, chunk by chunk, so that they are never in memory all at once.
    """

    def chunk(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = logits_of(model, states, temperature)
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)

    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, *pair, use_reentrant=False) for pair in chunks(hidden, targets)])
    return torch.cat([chunk(*pair) for pair in chunks(hidden, targets)])


def chunks(hidden: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return hidden states and targets in chunks of ROWS_AT_ONCE tokens."""
    return zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)


def logits_of(model: nn.Module, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return logits [tokens, vocabulary] at a temperature, in float32 whatever the precision of the body."""
    with torch.autocast(hidden.device.type, enabled=False):
        return plain(model).get_output_embeddings()(hidden.float()) / temperature


def sum_by(answer: torch.Tensor, values: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the sums [rows, 2] of values [tokens] over the tokens of each answer."""
    return torch.zeros(2 * rows, device=values.device).index_add(0, answer, values).view(-1, 2)


@torch.no_grad()
def forward_pairs(
    model: nn.Module,
    rows: Dataset,
    collator: PairCollator,
    batch_size: int,
    accelerator: Accelerator,
    progress: str = "scoring pairs",
) -> dict[str, np.ndarray]:
    """Return the model's outputs for all rows as float32 arrays [rows, ...], in row order, on any number of processes.

    model: a module whose forward takes a batch of PairCollator and returns {name: tensor [batch, ...]}.
    accelerator: its autocast is used.
    """
    batches = batches_by_length(pair_lengths(rows).tolist(), 2 * TOKENS_AT_ONCE[accelerator.device.type], batch_size)
    world, rank = accelerator.num_processes, accelerator.process_index
    results = []
    with evaluating(model):
        for first in tqdm(range(0, len(batches), world), desc=progress, disable=bar_off(), leave=False):
            numbers = batches[min(first + rank, len(batches) - 1)]  # sharded models need every process in every round
            batch = collator([rows[i] for i in numbers])
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            with accelerator.autocast():
                outputs = model(**batch)
            if first + rank < len(batches):
                results.append((numbers, {name: value.float().cpu().numpy() for name, value in outputs.items()}))
    return in_row_order(gather_object(results), len(rows))


def in_row_order(results: list[tuple[list[int], dict[str, np.ndarray]]], count: int) -> dict[str, np.ndarray]:
    """Return arrays [count, ...] from batches of (row numbers, values); stop if a value is not finite."""
    arrays = {name: np.full((count, *value.shape[1:]), np.nan, np.float32) for name, value in results[0][1].items()}
    for numbers, values in results:
        for name, value in values.items():
            arrays[name][numbers] = value
    assert {i for numbers, _ in results for i in numbers} == set(range(count)), "rows lost"
    if not all(np.isfinite(array).all() for array in arrays.values()):
        stop("the model's outputs are not finite: set PRECISION = fp32, or lower LEARNING_RATE in the training")
    return arrays


def pair_lengths(rows: Dataset) -> np.ndarray:
    """Return the tokens of each shared row [rows]: prompt + chosen + rejected."""
    lengths = np.zeros(len(rows), dtype=np.int64)
    for start, batch in zip(range(0, len(rows), 1000), rows.iter(1000), strict=True):
        for column in ("chosen_ids", "rejected_ids"):
            lengths[start : start + 1000] += [len(ids) for ids in batch[column]]
        lengths[start : start + 1000] += [sum(mask) for mask in batch["attention_mask"]]
    return lengths


def batches_by_length(lengths: Sequence[int], tokens: float, count: int = 0) -> list[list[int]]:
    """Return the indices of `lengths` in batches of similar length, the longest first.

    A batch has at most `tokens` positions, padding included, and at most `count` rows (0 = any number). A row longer
    than `tokens` is a batch of its own.
    """
    batches: list[list[int]] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        fits = batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens
        if fits and (not count or len(batches[-1]) < count):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.no_grad()
def check_shared_rows(model: nn.Module, row: dict[str, Any], collator: PairCollator) -> None:
    """Stop if the rejected answer of a shared row sees the chosen one.

    Attention obeys the mask of a shared row. Convolutions and linear attention, which some architectures have, do not.
    row: of a processed folder.
    """
    prompt, chosen, rejected = Prompt(prompt_of(row)), row["chosen_ids"], row["rejected_ids"]
    states = []
    with evaluating(model):
        for answers, side in (((chosen, rejected), 1), ((rejected, []), 0)):
            batch = collator.shared_rows([prompt], [answers])
            states.append(hidden_states(model, batch)[0, batch["ends"][0, side]])
    difference = ((states[0] - states[1]).abs().max() / states[1].abs().max()).item()
    if not difference <= 1e-2:  # NaN too
        stop(
            "this architecture is not supported: both answers of a pair share a row, and one of them can see the other "
            f"(hidden states differ by {difference:.2g})"
        )


@torch.no_grad()
def check_head(model: nn.Module, ids: torch.Tensor) -> float:
    """Return the largest difference between `token_logps` and the model's own log-softmax on ids [1, length].

    It exceeds rounding if the architecture changes its logits after the head (caps, scales).
    """
    hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    ours = token_logps(model, hidden[0, :-1], ids[0, 1:])
    theirs = torch.log_softmax(plain(model)(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
    return (ours - theirs.gather(1, ids[0, 1:, None])[:, 0]).abs().max().item()


def split_batch(batch: dict[str, torch.Tensor], tokens: int, multiple: int) -> list[dict[str, torch.Tensor]]:
    """Split a batch into micro-batches of at most `tokens` positions, one row at least, padded to a multiple.

    The gradient of the batch is the sum of theirs, in the memory of one of them.
    """
    ends = [name for name in ("ends", "guided_ends") if name in batch]
    row_lengths = torch.stack([batch[name].amax(dim=1) + 1 for name in ends]).tolist()  # one transfer from the device
    lengths = dict(zip(ends, row_lengths, strict=True))
    micro_batches, first = [], 0
    count = len(batch["row"])
    for i in range(1, count + 1):
        if i < count and (i + 1 - first) * sum(max(side[first : i + 1]) for side in lengths.values()) <= tokens:
            continue
        micro_batch = {name: value[first:i] for name, value in batch.items()}
        for name, side in lengths.items():
            longest = -(-max(side[first:i]) // multiple) * multiple
            for column in ("input_ids", "segments", "position_ids"):
                column = name.replace("ends", column)
                micro_batch[column] = micro_batch[column][:, :longest]
        micro_batches.append(micro_batch)
        first = i
    return micro_batches
