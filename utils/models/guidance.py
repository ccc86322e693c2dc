"""A preference in the prompt: a text at the end of the last user turn, or trained vectors in its place."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.data.preferences import Message
from utils.data.tokens import encode_answers, ids_of, prompt_ids
from utils.script import say, stop

VECTORS_FILE = "prompt_embedding.safetensors"
VECTORS_NAMES = ("prompt_embeddings", "embeddings")  # entries of a file that may hold the vectors


@dataclass
class Guidance:
    """What is added to a prompt: `text` at the end of the last user turn; for vectors a mark, `count` tokens long.

    Where there are vectors [count, hidden], they take the place of the embeddings of the mark.
    """

    text: str = ""
    mark: int = -1  # id of the token that the mark repeats
    vectors: torch.Tensor | None = None

    def with_vectors(self, vectors: torch.Tensor | None) -> "Guidance":
        """The same with other vectors, such as those after the training."""
        return self if vectors is None else replace(self, vectors=vectors.detach())

    def add(self, messages: list[Message]) -> list[Message]:
        """The messages with the preference in the last user turn; without guidance the messages themselves."""
        if not self.text:
            return messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        guided = {"role": "user", "content": messages[last]["content"] + self.text}
        return [*messages[:last], guided, *messages[last + 1 :]]

    def find(self, ids: list[int]) -> int:
        """Where the vectors begin in the ids of a prompt, -1 without vectors.

        The last run of marks; what follows it, such as an end of turn that is the same token, is not counted in.
        """
        if self.vectors is None:
            return -1
        count = len(self.vectors)
        end = max(i for i in range(count, len(ids) + 1) if ids[i - count : i] == [self.mark] * count)
        while end > count and ids[end - count - 1] == self.mark:
            end -= 1
        return end - count


def text_guidance(text: str) -> Guidance:
    """The preference as a paragraph of its own."""
    if not text.strip():
        stop("PREFERENCE_TEXT is empty: write a preference, or set GUIDANCE = none")
    return Guidance(text=f"\n\n{text.strip()}")


def vector_guidance(tokenizer: PreTrainedTokenizerBase, vectors: torch.Tensor) -> Guidance:
    """The preference as vectors [count, hidden]; their place in the ids is kept by a special token, repeated."""
    names = (tokenizer.unk_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token)
    for name in filter(None, names):
        (ids,) = ids_of(tokenizer, [name * len(vectors)])
        if len(ids) == len(vectors) and len(set(ids)) == 1:
            return Guidance(text=name * len(vectors), mark=ids[0], vectors=vectors)
    stop("GUIDANCE = 'embedding' needs a tokenizer with a special token (unknown, padding, begin or end)")


def with_room(tokenizer: PreTrainedTokenizerBase, guidance: Guidance, max_length: int, rows: Dataset) -> Dataset:
    """The rows whose system turn leaves room for the preference; an end to the script where it has none by itself.

    rows: with token columns. A prompt gets what its answers leave, half of the window at least.
    """
    half = max_length // 2

    @cache
    def needed(system: str) -> int:
        turns = [{"role": "system", "content": system}] if system else []
        return len(prompt_ids(tokenizer, guidance.add([*turns, {"role": "user", "content": "Hi"}])))

    def fits(row: dict) -> bool:
        first = row["chosen"][0]
        tokens = needed(first["content"] if first["role"] == "system" else "")
        whole = not (row["chosen_cut"] or row["rejected_cut"])
        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return tokens <= half or (whole and tokens <= max_length - longest)

    kept = [i for i, row in enumerate(rows) if fits(row)]
    if needed("") > half or not kept:
        what = "PREFERENCE_TEXT" if guidance.vectors is None else f"a preference of {len(guidance.vectors)} vectors"
        beside = "" if needed("") > half else " beside the system turn of any row"
        stop(f"{what} does not fit{beside}: a short prompt with it takes {needed('')} tokens, and prompts get {half}")
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} of {len(rows)} pairs have no room for the preference beside their system turn")
    return rows.select(kept)


def load_vectors(path: str, hidden: int) -> torch.Tensor:
    """Vectors [n, hidden], float32, of a .pt or .safetensors file; one line where it holds none of this width.

    The file holds a tensor [n, hidden] or [hidden], or a dict with it under one of VECTORS_NAMES.
    """
    if not Path(path).is_file():
        stop(f"PROMPT_EMBEDDING_PATH = {path!r} is not there")
    try:
        is_safe = Path(path).suffix == ".safetensors"
        found = load_file(path) if is_safe else torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a file of another kind can break these readers in many ways
        reason = str(error).splitlines()[0][:100]
        stop(f"PROMPT_EMBEDDING_PATH = {path!r} cannot be read as tensors: {type(error).__name__}, {reason}")
    if isinstance(found, dict):
        found = next((found[name] for name in VECTORS_NAMES if name in found), found)
    if not isinstance(found, torch.Tensor):
        stop(f"PROMPT_EMBEDDING_PATH = {path!r} holds no tensor, nor a dict with {' or '.join(VECTORS_NAMES)}")
    vectors = found.float().reshape(1, -1) if found.ndim == 1 else found.float()
    if vectors.ndim != 2 or vectors.shape[1] != hidden or not len(vectors):
        stop(
            f"PROMPT_EMBEDDING_PATH = {path!r} has the shape {list(found.shape)}, "
            f"and this model takes vectors of width {hidden}"
        )
    if not torch.isfinite(vectors).all():
        stop(f"PROMPT_EMBEDDING_PATH = {path!r} holds values that are not finite")
    return vectors


def start_vectors(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return the token embeddings of a text [tokens, hidden]: the start of the vectors."""
    (ids,) = ids_of(tokenizer, [text])
    if not ids:
        stop("PREFERENCE_TEXT is empty: the vectors start from the embeddings of its tokens")
    with torch.no_grad():  # through the layer: some scale what is in their weights
        return model.get_input_embeddings()(torch.tensor(ids)).float().clone()


def save_vectors(vectors: torch.Tensor, folder: Path) -> None:
    """Write the vectors where another run's PROMPT_EMBEDDING_PATH can name them."""
    save_file({VECTORS_NAMES[0]: vectors.detach().float().cpu().contiguous()}, folder / VECTORS_FILE)


def guided_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, guidance: Guidance, both: bool
) -> Dataset:
    """The rows with guided prompts in the same window; a cut takes the start of a prompt, so the preference stays.

    both: keep the plain prompt too, and put the guided one into `guided_ids` and `guided_at`; both sides then see
    the same answer tokens. Else the guided prompt takes the place of the plain one, with `vectors_at`. Pairs that
    are equal in the smaller room are left out.
    """

    def guide(batch: dict) -> dict:
        prompts = [guidance.add(messages[:-1]) for messages in batch["chosen"]]
        answers = [
            (chosen[-1]["content"], rejected[-1]["content"])
            for chosen, rejected in zip(batch["chosen"], batch["rejected"], strict=True)
        ]
        encoded = encode_answers(tokenizer, prompts, answers, max_length)
        kept = [
            [min(ids, before, key=len) for ids, before in zip(pair.answer_ids, old, strict=True)]
            for pair, *old in zip(encoded, batch["chosen_ids"], batch["rejected_ids"], strict=True)
        ]
        changed = {"chosen_ids": [pair[0] for pair in kept], "rejected_ids": [pair[1] for pair in kept]}
        ids, at = [pair.prompt_ids for pair in encoded], [guidance.find(pair.prompt_ids) for pair in encoded]
        if both:
            return changed | {"guided_ids": ids, "guided_at": at}
        padding = [max_length - len(prompt) for prompt in ids]
        padded = [prompt + [tokenizer.pad_token_id] * pad for prompt, pad in zip(ids, padding, strict=True)]
        masks = [[1] * len(prompt) + [0] * pad for prompt, pad in zip(ids, padding, strict=True)]
        return changed | {"input_ids": padded, "attention_mask": masks, "vectors_at": at}

    rows = rows.map(guide, batched=True, batch_size=256, load_from_cache_file=False, desc="guiding prompts")
    different = [i for i, row in enumerate(rows) if row["chosen_ids"] != row["rejected_ids"]]
    if len(different) < len(rows):
        say(f"{len(rows) - len(different)} of {len(rows)} pairs are equal beside the preference and are left out")
    return rows.select(different)
