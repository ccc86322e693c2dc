"""Tokenizers and chat templates: turn prompts and answers into ids, and cut them to the window."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from utils.data.preferences import Message
from utils.script import explain_missing, stop

if TYPE_CHECKING:
    from datasets import Dataset

Texts = tuple[str, list[str]]  # a prompt, and the text that follows it for each answer
STARTS = ("Yes", "1. No", "“Да”", "(def", "你好")  # beginnings of answers
PLAIN_TEMPLATE = (  # CHAT_TEMPLATE = "plain", for tokenizers without a template
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PROBES = (  # tokenizers that give these texts equal ids count as the same
    "Hello, world! It's 2024; 3.14 is pi.",
    "\n\n1. First\n\n\n2. Second\t\ttab   spaces",
    "def f(x):\n    return x ** 2  # comment",
    "Привет, мир! Как дела? 你好 🙂 naïve café",
)
ROWS_IN_MEMORY = 256  # rows tokenised at once
LETTERS_PER_TOKEN = 16  # a token has at most about so many; earlier letters of a prompt are not tokenised


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], ask: bool) -> str:
    """Return the conversation as text in the chat template; `ask` adds the generation prompt."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        name = tokenizer.name_or_path
        stop(f"the chat template of {name} refuses the turns {roles}: {error}; they begin {start_of(messages)}")


def start_of(messages: list[Message]) -> str:
    """Return the first words of a conversation, for messages."""
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    return repr(" ".join(text[:200].split())[:60])


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts from the template, which has added the special tokens already."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def answer_texts(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], answers: list[str]) -> Texts:
    """Return (prompt text, for each answer the text that follows: the answer, end of turn, line break).

    Templates of some reasoning models end the generation prompt with a tag that finished turns do not have; then the
    prompt ends before the tag.
    """

    def answered(answer: str) -> str:
        return render(tokenizer, [*prompt, {"role": "assistant", "content": answer}], ask=False)

    asked = render(tokenizer, prompt, ask=True)
    full = [answered(answer) for answer in answers]
    if not all(text.startswith(asked) for text in full):
        asked = os.path.commonprefix([asked, answered("Yes")])  # a real answer may begin with "<", like the tag
    return asked, [text[len(asked) :] for text in full]


def written_ids(tokenizer: PreTrainedTokenizerBase, texts: list[Texts]) -> list[tuple[list[int], list[list[int]]]]:
    """Return (ids of the prompt, ids of each answer) of the results of `answer_texts`: together, the whole text's.

    SentencePiece tokenizers put a "▁" before each text, so the ids of an answer come from the whole text there. Other
    tokenizers give an answer the same ids on its own, in a third of the time.
    """
    prompts = ids_of(tokenizer, [asked for asked, _ in texts])
    answers = [ids_of(tokenizer, written) for _, written in texts]
    asked, starts = answer_texts(tokenizer, [{"role": "user", "content": "Hi"}], list(STARTS))
    (prompt,) = ids_of(tokenizer, [asked])
    if ids_of(tokenizer, [asked + start for start in starts]) != [prompt + ids for ids in ids_of(tokenizer, starts)]:
        for (asked, written), prompt, ids_of_answers in zip(texts, prompts, answers, strict=True):
            whole_texts = ids_of(tokenizer, [asked + text for text in written])
            pairs = zip(whole_texts, ids_of_answers, strict=True)
            ids_of_answers[:] = [suffix_after(prompt, whole) or ids for whole, ids in pairs]
    return list(zip(prompts, answers, strict=True))


def suffix_after(start: list[int], whole: list[int]) -> list[int]:
    """Return the ids of `whole` after `start`, [] if `whole` does not begin with `start`."""
    return whole[len(start) :] if whole[: len(start)] == start else []


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the template adds to an answer (end-of-turn token, line break), perhaps []."""
    asked, (written,) = answer_texts(tokenizer, [{"role": "user", "content": "Hi"}], ["Yes"])
    before, answer, closing = (asked + written).rpartition("Yes")
    open_ended, whole = ids_of(tokenizer, [before + answer, before + answer + closing])
    return suffix_after(open_ended, whole) or ids_of(tokenizer, [closing])[0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Return the ids of a prompt with its generation prompt."""
    return ids_of(tokenizer, [answer_texts(tokenizer, messages, ["Yes"])[0]])[0]


@dataclass
class Encoded:
    """A prompt and its answers in the window, as ids; the *_cut flags mark what did not fit."""

    prompt_ids: list[int]
    answer_ids: list[list[int]]
    prompt_cut: bool
    answer_cut: list[bool]


def load_tokenizer(name: str, chat_template: str = "", constant: str = "TOKENIZER") -> PreTrainedTokenizerBase:
    """Return the tokenizer of a hub name or folder, with a pad token and a chat template. Stop if it lacks them.

    chat_template: "" = the tokenizer's own, "plain" = `User: ...` / `Assistant: ...`.
    """
    if chat_template not in ("", "plain"):
        stop(f'CHAT_TEMPLATE = {chat_template!r} is not known: "" (the tokenizer\'s own) or "plain"')
    try:
        tokenizer = from_tokenizer_json(name)
    except (OSError, ValueError) as error:
        explain_missing(constant, name, error)
    if chat_template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    if not tokenizer.chat_template:
        stop(f'{constant} = {name!r} has no chat template: set CHAT_TEMPLATE = "plain" when you load the data')
    if not tokenizer.is_fast:
        stop(f"{constant} = {name!r} has no fast version (tokenizer.json), which cutting a prompt needs")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        stop(f"{constant} = {name!r} has neither a pad token nor an end token")
    return tokenizer


def from_tokenizer_json(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of tokenizer.json, or the one of AutoTokenizer if there is no such file.

    AutoTokenizer follows the class in tokenizer_config.json. For GPT2Tokenizer (SmolLM2), transformers 5 builds its
    own pre-tokenizer, which splits digits and line breaks differently from the training of the model
    (https://github.com/huggingface/transformers/issues/45920).
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(name)
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(name)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what the tokenizer does (vocabulary, ids of PROBES, end token), independent of its name."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ids = ids_of(tokenizer, list(PROBES))
    first, second, both = ids_of(tokenizer, ["Hi\n", "Yes", "Hi\nYes"])
    ids += [] if first + second == both else [both]  # older versions cut the rows of such a tokenizer differently
    return hashlib.sha256(repr((vocabulary, ids, tokenizer.eos_token_id)).encode()).hexdigest()


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the chat template; a line break and backslash-n count as equal."""
    return hashlib.sha256(tokenizer.get_chat_template().replace("\\n", "\n").strip().encode()).hexdigest()


def check_window(tokenizer: PreTrainedTokenizerBase, max_length: int, system_prompt: str) -> None:
    """Stop if the shortest prompt in the template takes more than half of the window."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    needed = len(prompt_ids(tokenizer, [*system, {"role": "user", "content": "Hi"}]))
    if needed > max_length // 2:
        stop(
            f"MAX_LENGTH = {max_length} is too small: the shortest prompt in the chat template takes {needed} tokens, "
            f"and prompts may take half of the window: {2 * needed} or more"
        )


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    answers: Sequence[tuple[str, ...]],
    max_length: int,
    close: bool = False,
) -> list[Encoded]:
    """Return prompts and their answers (a pair has two) as ids; a prompt fits max_length with each of its answers.

    If the longest answer does not fit, the prompt is cut first, down to half of the window: the oldest turns go, then
    the start of the text of the first turn that remains; the rest of the template stays. Then the ends of the answers
    are cut. A cut answer has no end of turn, which would teach the model to stop in mid-sentence, unless `close` is
    set (see `closed`).
    """
    texts = [answer_texts(tokenizer, prompt, list(group)) for prompt, group in zip(prompts, answers, strict=True)]
    closing = end_of_turn(tokenizer)
    encoded = []
    for messages, (prompt, ids) in zip(prompts, written_ids(tokenizer, texts), strict=True):
        limit = prompt_limit(ids, max_length)
        prompt_cut = len(prompt) > limit
        if prompt_cut:
            prompt = fit_prompt(tokenizer, messages, prompt, limit)
        room = max_length - len(prompt)
        cut = [len(answer) > room for answer in ids]
        kept = [cut_answer(answer, room, len(closing)) for answer in ids]
        if close:
            kept = [closed(answer, closing) if was_cut else answer for answer, was_cut in zip(kept, cut, strict=True)]
        encoded.append(Encoded(prompt, kept, prompt_cut, cut))
    return encoded


def prompt_limit(answer_ids: list[list[int]], max_length: int) -> int:
    """Return the ids that a prompt may have: what its longest answer leaves, and at least half of the window."""
    return max(max_length - max(map(len, answer_ids)), max_length // 2)


def unfit(turns: list[Message], answers: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """Return why no cut can bring a prompt and its answers into the window, "" if one can."""
    try:
        tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answers[0]}], tokenize=False)
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return "refused_by_template"
    system = [message for message in turns if message["role"] == "system"]
    scaffold = len(prompt_ids(tokenizer, [*system, {"role": "user", "content": ""}])) if system else 0
    if scaffold < max_length // 2:
        return ""
    ((prompt, ids),) = written_ids(tokenizer, [answer_texts(tokenizer, turns, list(answers))])
    return "long_system_turn" if scaffold >= prompt_limit(ids, max_length) < len(prompt) else ""


def cut_answer(ids: list[int], room: int, closing: int) -> list[int]:
    """Return the first `room` ids of an answer; a cut one loses its last `closing` ids (the end of turn)."""
    return ids if len(ids) <= room else ids[: min(room, len(ids) - closing)]


def closed(ids: list[int], closing: list[int]) -> list[int]:
    """Return a cut answer with the end of turn in place of its last ids.

    Reward models read an answer at its last token. If only complete answers ended with an end of turn, that token
    would show which answers are long, and the model would learn just that.
    """
    return ids[: max(0, len(ids) - len(closing))] + closing


def fit_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: list[int], limit: int) -> list[int]:
    """Return at most `limit` ids of a prompt, without its oldest turns and the start of the first remaining text.

    prompt: the ids of all messages. The system turn stays. Stops if the template and the system turn leave no room
    for text.
    """
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    while len(prompt) > limit:
        later = next((i for i, turn in enumerate(turns) if i > 0 and turn["role"] == "user"), 0)
        if later == 0:
            break
        turns = turns[later:]
        prompt = prompt_ids(tokenizer, [*system, *turns])
    if len(prompt) <= limit:
        return prompt
    scaffold = len(prompt_ids(tokenizer, [*system, {**turns[0], "content": ""}, *turns[1:]]))
    if scaffold >= limit:
        stop(
            f"MAX_LENGTH is too small: chat template and system turn alone need {scaffold} tokens, and a prompt may "
            f"take {limit}; raise it, or set a short SYSTEM_PROMPT in place of the source's system turns "
            f"(the prompt begins {start_of(turns)})"
        )
    text = turns[0]["content"][-LETTERS_PER_TOKEN * limit :]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    first = max(0, len(offsets) - (limit - scaffold))
    while True:
        rest = text[offsets[first][0] :] if first < len(offsets) else ""
        prompt = prompt_ids(tokenizer, [*system, {**turns[0], "content": rest}, *turns[1:]])
        if len(prompt) <= limit:
            return prompt
        first += len(prompt) - limit  # at the new start, letters may form other tokens, and more of them


def fitted_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], max_length: int) -> list[int]:
    """Return the ids of a prompt with its generation prompt, cut to max_length as in a pair."""
    ids = prompt_ids(tokenizer, messages)
    return ids if len(ids) <= max_length else fit_prompt(tokenizer, messages, ids, max_length)


def tokenised(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Return pairs or sft rows with token columns."""
    from datasets import Dataset, Features

    columns_of = sft_columns if "messages" in rows.column_names else token_columns
    features = Features({**rows.features, **token_features(columns_of)})
    if not len(rows):  # map() adds no columns then
        return Dataset.from_dict({name: [] for name in features}, features=features)
    return rows.map(
        partial(columns_of, tokenizer=tokenizer, max_length=max_length),
        batched=True,
        batch_size=ROWS_IN_MEMORY,
        features=features,
        load_from_cache_file=False,  # the cache does not notice changes of this file
        desc="tokenising",
    )


def token_columns(batch: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
    """Return input_ids, attention_mask (the prompt, padded to max_length), chosen_ids, rejected_ids, *_cut flags."""
    answers = [
        (chosen[-1]["content"], rejected[-1]["content"])
        for chosen, rejected in zip(batch["chosen"], batch["rejected"], strict=True)
    ]
    encoded = encode_answers(tokenizer, [chosen[:-1] for chosen in batch["chosen"]], answers, max_length)
    padding = [max_length - len(pair.prompt_ids) for pair in encoded]
    pad = tokenizer.pad_token_id
    return {
        "input_ids": [pair.prompt_ids + [pad] * count for pair, count in zip(encoded, padding, strict=True)],
        "attention_mask": [[1] * (max_length - count) + [0] * count for count in padding],
        "chosen_ids": [pair.answer_ids[0] for pair in encoded],
        "rejected_ids": [pair.answer_ids[1] for pair in encoded],
        "prompt_cut": [pair.prompt_cut for pair in encoded],
        "chosen_cut": [pair.answer_cut[0] for pair in encoded],
        "rejected_cut": [pair.answer_cut[1] for pair in encoded],
        "equal_after_cut": [pair.answer_ids[0] == pair.answer_ids[1] for pair in encoded],
    }


def sft_columns(batch: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
    """Return input_ids (prompt and answer), completion_mask (1 on the answer, for trl.SFTTrainer) and *_cut flags."""
    prompts = [messages[:-1] for messages in batch["messages"]]
    answers = [(messages[-1]["content"],) for messages in batch["messages"]]
    encoded = encode_answers(tokenizer, prompts, answers, max_length)
    return {
        "input_ids": [row.prompt_ids + row.answer_ids[0] for row in encoded],
        "completion_mask": [[0] * len(row.prompt_ids) + [1] * len(row.answer_ids[0]) for row in encoded],
        "prompt_cut": [row.prompt_cut for row in encoded],
        "answer_cut": [row.answer_cut[0] for row in encoded],
    }


def token_features(columns_of: Callable) -> dict[str, Any]:
    """Return the types of the token columns; small integers, since ids are most of the file."""
    from datasets import List, Value

    ids, flags = List(Value("int32")), List(Value("int8"))
    if columns_of is sft_columns:
        return {"input_ids": ids, "completion_mask": flags} | dict.fromkeys(("prompt_cut", "answer_cut"), Value("bool"))
    columns = {"input_ids": ids, "attention_mask": flags, "chosen_ids": ids, "rejected_ids": ids}
    return columns | dict.fromkeys(("prompt_cut", "chosen_cut", "rejected_cut", "equal_after_cut"), Value("bool"))
