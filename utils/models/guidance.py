"""A preference in the prompt: a text at the end of the last user turn, or trained vectors in its place."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from utils.data.preferences import Message
from utils.data.processed import prompt_of
from utils.data.tokens import fitted_prompt, ids_of, prompt_ids, token_columns
from utils.models.shared_prompt import Prompt
from utils.script import say, stop

VECTORS_FILE = "prompt_embedding.safetensors"
VECTORS_NAMES = ("prompt_embeddings", "embeddings")  # entries of a file that may hold the vectors


@dataclass
class Guidance:
    """What a prompt gets: `text` at the end of the last user turn.

    With vectors [n, hidden], the text is a special token repeated n times. The vectors replace its embeddings.
    """

    text: str = ""
    mark: int = -1  # id of the repeated token
    vectors: torch.Tensor | None = None

    def with_vectors(self, vectors: torch.Tensor | None) -> "Guidance":
        """Return the same guidance with other vectors, such as those after training."""
        return self if vectors is None else replace(self, vectors=vectors.detach())

    def add(self, messages: list[Message]) -> list[Message]:
        """Return the messages with the preference in the last user turn; without guidance the messages themselves."""
        if not self.text:
            return messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        guided: Message = {"role": "user", "content": messages[last]["content"] + self.text}
        return [*messages[:last], guided, *messages[last + 1 :]]

    def prompts(
        self, tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], max_length: int
    ) -> list[Prompt]:
        """Return guided prompts of at most `max_length` tokens; see `fitted_prompt`."""
        ids = [fitted_prompt(tokenizer, self.add(messages), max_length) for messages in conversations]
        return [Prompt(prompt, self.find(prompt)) for prompt in ids]

    def find(self, ids: list[int]) -> int:
        """Return where the vectors begin in the ids of a prompt, -1 without vectors.

        That is the start of the last run of marks: the same token may follow it as an end of turn.
        """
        if self.vectors is None:
            return -1
        count = len(self.vectors)
        end = max(i for i in range(count, len(ids) + 1) if ids[i - count : i] == [self.mark] * count)
        while end > count and ids[end - count - 1] == self.mark:
            end -= 1
        return end - count


def text_guidance(text: str) -> Guidance:
    """Return the preference as a paragraph of its own."""
    if not text.strip():
        stop("PREFERENCE_TEXT is empty: write a preference, or set GUIDANCE = none")
    return Guidance(text=f"\n\n{text.strip()}")


def vector_guidance(tokenizer: PreTrainedTokenizerBase, vectors: torch.Tensor) -> Guidance:
    """Return the preference as vectors [n, hidden]; a special token, repeated, keeps their place in the ids."""
    for token in (tokenizer.unk_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token):
        if token:
            text = str(token) * len(vectors)
            (ids,) = ids_of(tokenizer, [text])
            if len(ids) == len(vectors) and len(set(ids)) == 1:
                return Guidance(text, ids[0], vectors)
    stop("GUIDANCE = 'embedding' needs a tokenizer with a special token (unknown, padding, begin or end)")


def with_room(tokenizer: PreTrainedTokenizerBase, guidance: Guidance, max_length: int, rows: Dataset) -> Dataset:
    """Return the rows whose system turn leaves room for the preference; stop if no row does.

    rows: with token columns. A prompt gets what its answers leave, half of the window at least.
    """
    half = max_length // 2

    @cache
    def needed(system: str) -> int:
        turns: list[Message] = [{"role": "system", "content": system}] if system else []
        return len(prompt_ids(tokenizer, guidance.add([*turns, {"role": "user", "content": "Hi"}])))

    def fits(row: dict[str, Any]) -> bool:
        first = row["chosen"][0]
        tokens = needed(first["content"] if first["role"] == "system" else "")
        whole = not (row["chosen_cut"] or row["rejected_cut"])
        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return tokens <= half or (whole and tokens <= max_length - longest)

    kept = [i for i, row in enumerate(rows) if fits(row)]
    if needed("") > half or not kept:
        setting = "PREFERENCE_TEXT" if guidance.vectors is None else f"a preference of {len(guidance.vectors)} vectors"
        beside = "" if needed("") > half else " beside the system turn of any row"
        stop(
            f"{setting} does not fit{beside}: a short prompt with it takes {needed('')} tokens, and prompts get {half}"
        )
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} of {len(rows)} pairs have no room for the preference beside their system turn")
    return rows.select(kept)


def load_vectors(path: str, hidden: int) -> torch.Tensor:
    """Return vectors [n, hidden], float32, from a .pt or .safetensors file; stop if it holds none of this width.

    The file holds a tensor [n, hidden] or [hidden], or a dict with it under one of VECTORS_NAMES.
    """
    if not Path(path).is_file():
        stop(f"PROMPT_EMBEDDING_PATH = {path!r} is not a file")
    try:
        is_safe = Path(path).suffix == ".safetensors"
        content = load_file(path) if is_safe else torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # files of other kinds break these readers in many ways
        reason = str(error).splitlines()[0][:100]
        stop(f"PROMPT_EMBEDDING_PATH = {path!r} cannot be read as tensors: {type(error).__name__}, {reason}")
    if isinstance(content, dict):
        content = next((content[name] for name in VECTORS_NAMES if name in content), None)
    expected = f"PROMPT_EMBEDDING_PATH = {path!r}: expected finite vectors [n, {hidden}]"
    if not isinstance(content, torch.Tensor):
        stop(f"{expected}, got no tensor, nor a dict with {' or '.join(VECTORS_NAMES)}")
    vectors = content.float().reshape(1, -1) if content.ndim == 1 else content.float()
    if vectors.ndim != 2 or vectors.shape[1] != hidden or not len(vectors) or not torch.isfinite(vectors).all():
        stop(f"{expected}, got {list(content.shape)}{'' if torch.isfinite(vectors).all() else ' with NaN or infinity'}")
    return vectors


def start_vectors(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return the token embeddings of a text [tokens, hidden]: the start of the vectors."""
    (ids,) = ids_of(tokenizer, [text])
    if not ids:
        stop("PREFERENCE_TEXT is empty: the vectors start from the embeddings of its tokens")
    with torch.no_grad():  # through the layer, since some layers scale their weights
        return model.get_input_embeddings()(torch.tensor(ids)).float().clone()


def save_vectors(vectors: torch.Tensor, folder: Path) -> None:
    """Write the vectors to a file that PROMPT_EMBEDDING_PATH can name."""
    save_file({VECTORS_NAMES[0]: vectors.detach().float().cpu().contiguous()}, folder / VECTORS_FILE)


def guided_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, guidance: Guidance, both: bool
) -> Dataset:
    """Return the rows with guided prompts in the same window; a cut removes the start of a prompt, not the preference.

    both: keep the plain prompt and put the guided one into `guided_ids` and `guided_at`, with the same answer tokens
    on both sides. Otherwise the guided prompt replaces the plain one, with `vectors_at`. Pairs whose answers are equal
    in the smaller room are left out.
    """

    def guide(batch: dict[str, Any]) -> dict[str, Any]:
        chosen = [[*guidance.add(messages[:-1]), messages[-1]] for messages in batch["chosen"]]
        guided = token_columns({"chosen": chosen, "rejected": batch["rejected"]}, tokenizer, max_length)
        columns: dict[str, Any] = {
            name: [min(pair, key=len) for pair in zip(guided[name], batch[name], strict=True)]
            for name in ("chosen_ids", "rejected_ids")
        }
        prompts = {name: guided[name] for name in ("input_ids", "attention_mask")}
        ids = [prompt_of({name: prompts[name][i] for name in prompts}) for i in range(len(chosen))]
        at = [guidance.find(prompt) for prompt in ids]
        return columns | ({"guided_ids": ids, "guided_at": at} if both else {**prompts, "vectors_at": at})

    rows = rows.map(guide, batched=True, batch_size=256, load_from_cache_file=False, desc="guiding prompts")
    different = [i for i, row in enumerate(rows) if row["chosen_ids"] != row["rejected_ids"]]
    if len(different) < len(rows):
        say(f"{len(rows) - len(different)} of {len(rows)} pairs left out: equal answers beside the preference")
    return rows.select(different)
