"""What the chat template writes for a conversation, as text and as token ids."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from utils.rows import Message
from utils.script import stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = tuple[str, list[str]]  # a prompt, and what the template writes after it for each answer

STARTS = ("Yes", "1. No", "“Да”", "(def", "你好")  # beginnings of answers


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], ask: bool) -> str:
    """The conversation as text in the tokenizer's chat template; `ask` adds the generation prompt."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        name = tokenizer.name_or_path
        stop(f"the chat template of {name} refuses the turns {roles}: {error}; they begin {start_of(messages)}")


def start_of(messages: list[Message]) -> str:
    """The first words of a conversation, by which a message names it."""
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    return repr(" ".join(text[:200].split())[:60])


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that the template wrote: it has put in the special tokens itself."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def answer_texts(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], answers: list[str]) -> Texts:
    """(prompt text, what the template writes after it for each answer: the answer, end of turn, line break).

    A few templates (reasoning models) end the generation prompt in a tag that they do not keep in a finished
    turn; the prompt then ends where the two part.
    """

    def answered(answer: str) -> str:
        return render(tokenizer, [*prompt, {"role": "assistant", "content": answer}], ask=False)

    asked = render(tokenizer, prompt, ask=True)
    full = [answered(answer) for answer in answers]
    if not all(text.startswith(asked) for text in full):
        asked = os.path.commonprefix([asked, answered("Yes")])  # not of the answers: both may begin with "<" too
    return asked, [text[len(asked) :] for text in full]


def written_ids(tokenizer: PreTrainedTokenizerBase, texts: list[Texts]) -> list[tuple[list[int], list[list[int]]]]:
    """(ids of the prompt, ids of each answer) of what `answer_texts` gives: together those of the whole text.

    Some tokenizers (SentencePiece's) put a "▁" before every text, which an answer within a text has not: its ids are
    then what follows the prompt's. Others give it the same ids by itself, which takes a third of the time.
    """
    prompts = ids_of(tokenizer, [asked for asked, _ in texts])
    answers = [ids_of(tokenizer, written) for _, written in texts]
    said = [{"role": "user", "content": "Hi"}]
    asked, starts = answer_texts(tokenizer, said, list(STARTS))
    (prompt,) = ids_of(tokenizer, [asked])
    if ids_of(tokenizer, [asked + start for start in starts]) != [prompt + ids for ids in ids_of(tokenizer, starts)]:
        for (asked, written), prompt, found in zip(texts, prompts, answers, strict=True):
            wholes = ids_of(tokenizer, [asked + text for text in written])
            found[:] = [behind(prompt, whole) or ids for whole, ids in zip(wholes, found, strict=True)]
    return list(zip(prompts, answers, strict=True))


def behind(start: list[int], whole: list[int]) -> list[int]:
    """What follows `start` in ids that begin with it, [] where they do not."""
    return whole[len(start) :] if whole[: len(start)] == start else []


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the template writes after an answer's text (end-of-turn token, line break): may be empty."""
    asked, (written,) = answer_texts(tokenizer, [{"role": "user", "content": "Hi"}], ["Yes"])
    before, sign, closing = (asked + written).rpartition("Yes")
    open_ended, whole = ids_of(tokenizer, [before + sign, before + sign + closing])
    return behind(open_ended, whole) or ids_of(tokenizer, [closing])[0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Ids of a prompt with its generation prompt."""
    return ids_of(tokenizer, [answer_texts(tokenizer, messages, ["Yes"])[0]])[0]
