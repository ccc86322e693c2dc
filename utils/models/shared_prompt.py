"""One prompt, two answers, one row: batches, attention mask, forward pass and log-probs.

A row is `prompt + chosen + rejected`. The rejected answer does not see the chosen one and its positions start again
after the prompt, so both answers are computed as if each stood alone (equal to two rows to 1e-6), while the prompt is
computed once.
"""

from collections.abc import Sequence

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
from utils.models.loading import plain
from utils.script import bar_off, stop

PADDING, PROMPT, CHOSEN, REJECTED = 0, 1, 2, 3  # what a position of a shared row belongs to
TOKENS_AT_ONCE = {"cpu": 1024, "mps": 2048, "cuda": 8192}  # positions in one pass: what keeps the device busy
ROWS_AT_ONCE = 512  # answer tokens whose logits are in memory at once: 512 x 49,152 in float32 are 100 MB


def shared_prompt_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom [batch, 1, length, length], bool, of segments [batch, length].

    Each position sees the prompt and its own segment up to itself; padding sees itself, since a row that sees
    nothing is NaN after the softmax.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    seen = (index[:, None] >= index[None, :]) & ((key == PROMPT) | (key == query)) & (key != PADDING)
    return (seen | (index[:, None] == index[None, :]))[:, None]


def hidden_states(
    model: nn.Module, batch: dict[str, torch.Tensor], vectors: torch.Tensor | None = None
) -> torch.Tensor:
    """Last hidden states [batch, length, hidden] of shared rows, from a causal or classification model.

    vectors [n, hidden] take the place of the embeddings of n tokens from batch["vectors_at"] [batch] on, -1 = nowhere.
    """
    model = plain(model)
    body = getattr(model, model.base_model_prefix)
    mask = shared_prompt_mask(batch["segments"])
    if model.config._attn_implementation == "eager":  # it adds the mask to the scores, sdpa takes booleans
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    read = {"input_ids": batch["input_ids"]}
    if vectors is not None:
        read = {"inputs_embeds": with_vectors(body, batch["input_ids"], batch["vectors_at"], vectors)}
    return body(**read, attention_mask=mask, position_ids=batch["position_ids"], use_cache=False).last_hidden_state


def with_vectors(body: nn.Module, ids: torch.Tensor, at: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Embeddings [batch, length, hidden] of ids [batch, length], with vectors [n, hidden] from `at` [batch] on."""
    embedded = body.get_input_embeddings()(ids)
    place = torch.arange(ids.shape[1], device=ids.device) - at[:, None]  # [batch, length], 0 at the first vector
    here = (place >= 0) & (place < len(vectors)) & (at[:, None] >= 0)
    put = vectors[place.clamp(0, len(vectors) - 1)].to(embedded.dtype)  # [batch, length, hidden]
    return torch.where(here[..., None], put, embedded)


@torch.no_grad()
def check_shared_rows(model: nn.Module, row: dict, collator: object) -> None:
    """End the script where the rejected answer of a shared row would see the chosen one.

    Attention obeys the mask of a shared row; convolutions and linear attention, which some architectures have, do not.
    row: of a processed folder. collator: a PairCollator.
    """
    was, prompt = model.training, row["input_ids"][: sum(row["attention_mask"])]
    alone = row | {"chosen_ids": row["rejected_ids"], "rejected_ids": []}
    model.eval()
    found = []
    for one, side in ((row, 1), (alone, 0)):
        batch = collator.shared_rows([prompt], [one], "none")
        found.append(hidden_states(model, batch)[0, batch["ends"][0, side]])
    model.train(was)
    difference = ((found[0] - found[1]).abs().max() / found[1].abs().max()).item()
    if not difference <= 1e-2:  # NaN too
        stop(
            f"in this architecture an answer sees the other one of its pair (states differ by {difference:.2g}): pairs "
            "share a row here, and only attention can be told not to look"
        )


def row_multiple(device: torch.device) -> int:
    """Rows are padded to a multiple of this: GPUs want few shapes and round ones, a CPU pays for each token."""
    return 1 if device.type == "cpu" else 64


def pair_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each shared row [rows]: prompt + chosen + rejected."""
    lengths = np.zeros(len(rows), dtype=np.int64)
    for start, batch in zip(range(0, len(rows), 1000), rows.iter(1000), strict=True):
        for column in ("chosen_ids", "rejected_ids"):
            lengths[start : start + 1000] += [len(ids) for ids in batch[column]]
        lengths[start : start + 1000] += [sum(mask) for mask in batch["attention_mask"]]
    return lengths


class PairCollator:
    """Rows of a processed folder to one batch of shared rows, right-padded to a multiple of `multiple`.

    Returns int64 tensors: input_ids, segments (PADDING, PROMPT, CHOSEN or REJECTED) and position_ids [batch, length],
    ends [batch, 2] (index of the last token of chosen and rejected), vectors_at [batch] (where vectors take the place
    of embeddings, -1 = nowhere), row [batch]; float32 ratings [batch, 2] and attributes [batch, 2, 5], NaN where the
    source has none, and gap [batch], the difference of the ratings or 0. Rows with a second prompt (`guided_ids`) also
    give the first five under guided_*, rows with `reference` columns those. A bounded set of shapes keeps kernels
    cached.
    """

    def __init__(self, pad_id: int, multiple: int = 64):
        self.pad_id, self.multiple = pad_id, multiple

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [prompt_of(row) for row in rows]
        batch = self.shared_rows(prompts, rows, "vectors_at")
        if "guided_ids" in rows[0]:
            guided = self.shared_rows([row["guided_ids"] for row in rows], rows, "guided_at")
            batch |= {f"guided_{name}": value for name, value in guided.items()}
        for name in ("reference", "guided_reference"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        sides = ("chosen", "rejected")
        ratings = torch.tensor([[nan_if_none(row[f"{side}_rating"]) for side in sides] for row in rows])
        attributes = [[row.get(f"{side}_attributes") or [None] * 5 for side in sides] for row in rows]
        attributes = [[[nan_if_none(value) for value in side] for side in both] for both in attributes]
        return batch | {
            "row": torch.tensor([row["row"] for row in rows]),
            "ratings": ratings.float(),
            "gap": (ratings[:, 0].nan_to_num() - ratings[:, 1].nan_to_num()).float(),
            "attributes": torch.tensor(attributes, dtype=torch.float32),
        }

    def shared_rows(self, prompts: list[list[int]], rows: list[dict], at: str) -> dict[str, torch.Tensor]:
        """The tensors of one prompt a row with both of its answers; at: the column for vectors_at."""
        parts = [(prompt, row["chosen_ids"], row["rejected_ids"]) for prompt, row in zip(prompts, rows, strict=True)]
        longest = max(sum(map(len, part)) for part in parts)
        length = -(-longest // self.multiple) * self.multiple
        input_ids = torch.full((len(rows), length), self.pad_id)
        segments = torch.full((len(rows), length), PADDING)
        position_ids = torch.zeros((len(rows), length), dtype=torch.int64)
        ends = torch.zeros((len(rows), 2), dtype=torch.int64)
        for i, (prompt, chosen, rejected) in enumerate(parts):
            p, c, r = len(prompt), len(prompt) + len(chosen), len(prompt) + len(chosen) + len(rejected)
            input_ids[i, :r] = torch.tensor([*prompt, *chosen, *rejected])
            segments[i, :p], segments[i, p:c], segments[i, c:r] = PROMPT, CHOSEN, REJECTED
            position_ids[i, :c] = torch.arange(c)
            position_ids[i, c:r] = torch.arange(p, p + len(rejected))
            ends[i] = torch.tensor([c - 1, r - 1])
        named = {"input_ids": input_ids, "segments": segments, "position_ids": position_ids, "ends": ends}
        return named | {"vectors_at": torch.tensor([row.get(at, -1) for row in rows])}


def collator_for(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PairCollator:
    """Return the collator for the pad token of a tokenizer and the row lengths that suit a device."""
    return PairCollator(tokenizer.pad_token_id, row_multiple(device))


def nan_if_none(value: float | None) -> float:
    """NaN in place of None."""
    return float("nan") if value is None else value


@torch.no_grad()
def forward_pairs(
    model: nn.Module,
    rows: Dataset,
    collator: PairCollator,
    batch_size: int,
    accelerator: Accelerator,
    progress: str = "scoring pairs",
) -> dict[str, np.ndarray]:
    """What the model says of every row, in the order of the rows, each exactly once on any number of processes.

    model: a module whose forward takes a batch of PairCollator and returns {name: tensor [batch, ...]}.
    accelerator: its autocast is used. Returns float32 arrays [rows, ...].
    """
    batches = batches_by_length(pair_lengths(rows), 2 * TOKENS_AT_ONCE[accelerator.device.type], batch_size)
    world, me = accelerator.num_processes, accelerator.process_index
    found = []
    was_training = model.training
    model.eval()
    for first in tqdm(range(0, len(batches), world), desc=progress, disable=bar_off(), leave=False):
        mine = min(first + me, len(batches) - 1)  # all processes take part in each round: sharded models need it
        batch = collator([rows[int(i)] for i in batches[mine]])
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with accelerator.autocast():
            output = model(**batch)
        if first + me < len(batches):
            found.append((batches[mine], {name: value.float().cpu().numpy() for name, value in output.items()}))
    model.train(was_training)
    return in_row_order(gather_object(found), len(rows))


def batches_by_length(lengths: Sequence[int], tokens: float, count: int = 0) -> list[list[int]]:
    """Places in `lengths`, in parts of like length, the longest first: at most `tokens` positions with the padding.

    count: at most so many in a part, 0 = any number. What is longer than `tokens` is a part of its own.
    """
    parts: list[list[int]] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        room = parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= tokens
        if room and (not count or len(parts[-1]) < count):
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def in_row_order(found: list[tuple[np.ndarray, dict]], count: int) -> dict[str, np.ndarray]:
    """Arrays [count, ...] from batches of (row numbers, values); an end to the script where a value is not finite."""
    arrays = {name: np.full((count, *value.shape[1:]), np.nan, np.float32) for name, value in found[0][1].items()}
    seen = np.zeros(count, bool)
    for numbers, values in found:
        seen[numbers] = True
        for name, value in values.items():
            arrays[name][numbers] = value
    assert seen.all(), "rows lost"
    if not all(np.isfinite(array).all() for array in arrays.values()):
        stop("the model's outputs are not finite: set PRECISION = fp32, or LEARNING_RATE lower where it was trained")
    return arrays


def token_logps(
    model: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log pi(target) [tokens], float32, of hidden states [tokens, hidden] that predict targets [tokens].

    The logits are computed again in the backward pass, so that they never are in memory all at once.
    """

    def chunk(some: torch.Tensor, these: torch.Tensor) -> torch.Tensor:
        logits = logits_of(model, some, temperature)
        return logits.gather(1, these[:, None])[:, 0] - logits.logsumexp(dim=1)

    parts = zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, some, these, use_reentrant=False) for some, these in parts])
    return torch.cat([chunk(some, these) for some, these in parts])


def logits_of(model: nn.Module, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits [tokens, vocabulary] at a temperature, in float32 whatever the precision of the body."""
    with torch.autocast(hidden.device.type, enabled=False):
        return plain(model).get_output_embeddings()(hidden.float()) / temperature


def answer_logps(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    vectors: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums of log pi over the tokens of both answers [batch, 2], numbers of tokens [batch, 2]), float32.

    batch: of PairCollator. vectors: see `hidden_states`.
    """
    hidden, targets, answer = answer_hidden(model, batch, vectors)
    logps, rows = token_logps(model, hidden, targets, temperature), len(batch["input_ids"])
    return sum_by(answer, logps, rows), sum_by(answer, torch.ones_like(logps), rows)


@torch.no_grad()
def answer_logps_and_entropies(
    model: nn.Module, batch: dict[str, torch.Tensor], temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums of log pi, sums of the entropy of each token's distribution in nats) [batch, 2], float32, no gradient."""
    hidden, targets, answer = answer_hidden(model, batch, None)
    logps, entropies = [], []
    for some, these in zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        distribution = logits_of(model, some, temperature).log_softmax(dim=1)
        logps.append(distribution.gather(1, these[:, None])[:, 0])
        entropies.append(torch.special.entr(distribution.exp()).sum(dim=1))
    rows = len(batch["input_ids"])
    return sum_by(answer, torch.cat(logps), rows), sum_by(answer, torch.cat(entropies), rows)


def answer_hidden(
    model: nn.Module, batch: dict[str, torch.Tensor], vectors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states that predict the answers' tokens [tokens, hidden], those tokens [tokens], their answer [tokens]).

    The first token of each answer is predicted by the last one of the prompt, also that of the rejected answer, which
    stands behind the chosen one. Answers count 2 row for the chosen and 2 row + 1 for the rejected one.
    """
    segments, ids = batch["segments"], batch["input_ids"]
    row, place = torch.nonzero(segments >= CHOSEN, as_tuple=True)  # [tokens] each
    which = segments[row, place]
    prompt = (segments == PROMPT).sum(dim=1)  # [batch]
    first = (which == REJECTED) & (segments[row, place - 1] != REJECTED)
    source = torch.where(first, prompt[row] - 1, place - 1)
    return hidden_states(model, batch, vectors)[row, source], ids[row, place], 2 * row + (which == REJECTED)


def sum_by(answer: torch.Tensor, values: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums of values [tokens] over the tokens of each answer [rows, 2]."""
    return torch.zeros(2 * rows, device=values.device).index_add(0, answer, values).view(-1, 2)


def check_head(model: nn.Module, ids: torch.Tensor) -> float:
    """Largest difference between `token_logps` and the log-softmax of the model's own logits on ids [1, length].

    Above rounding where an architecture does something to its logits after the head (caps, scales).
    """
    model = plain(model)
    with torch.no_grad():
        body = getattr(model, model.base_model_prefix)
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        ours = token_logps(model, hidden[0, :-1], ids[0, 1:])
        theirs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
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
