"""The one place that turns a conversation into token ids, and fits a pair into the window."""

import hashlib
import os
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.rows import Message
from utils.runs import stop

PLAIN_TEMPLATE = (  # CHAT_TEMPLATE = "plain": for tokenizers that have no template of their own
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PROBES = (  # texts on which tokenizers differ: two that agree here on every id are taken as the same
    "Hello, world! It's 2024; 3.14 is pi.",
    "\n\n1. First\n\n\n2. Second\t\ttab   spaces",
    "def f(x):\n    return x ** 2  # comment",
    "Привет, мир! Как дела? 你好 🙂 naïve café",
)


@dataclass
class Encoded:
    """A pair in the window. Lists of token ids; the *_cut flags say what did not fit."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_cut: bool
    chosen_cut: bool
    rejected_cut: bool


def load_tokenizer(name: str, chat_template: str = "", constant: str = "TOKENIZER") -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or folder, with a pad token and a chat template, or an end to the script.

    chat_template: "" = the tokenizer's own, "plain" = `User: ...` / `Assistant: ...`.
    """
    from utils.models import explain_missing

    if chat_template not in ("", "plain"):
        stop(f'CHAT_TEMPLATE = {chat_template!r} is not known: "" (the tokenizer\'s own) or "plain"')
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        explain_missing(constant, name, error)
    if chat_template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    if not tokenizer.chat_template:
        stop(f'{constant} = {name!r} has no chat template: set CHAT_TEMPLATE = "plain" when you load the data')
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what the tokenizer does (vocabulary, ids of PROBES, end token), whatever it is called."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    return hashlib.sha256(repr((vocabulary, ids, tokenizer.eos_token_id)).encode()).hexdigest()


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the chat template; line breaks count the same written out and as backslash-n."""
    return hashlib.sha256(tokenizer.chat_template.replace("\\n", "\n").strip().encode()).hexdigest()


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], ask: bool) -> str:
    """The conversation as text in the tokenizer's chat template; `ask` adds the generation prompt."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        stop(f"the chat template of {tokenizer.name_or_path} refuses the turns {roles}: {error}")


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that the template wrote: it has put in the special tokens itself."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def answer_texts(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], answers: list[str]
) -> tuple[str, list[str]]:
    """(prompt text, what the template writes after it for each answer: the answer, end of turn, line break).

    A few templates (reasoning models) end the generation prompt in a tag that they do not keep in a finished
    turn; the prompt then ends where the two part.
    """
    asked = render(tokenizer, prompt, ask=True)
    full = [render(tokenizer, [*prompt, {"role": "assistant", "content": answer}], ask=False) for answer in answers]
    shared = os.path.commonprefix([asked, *full]) if not all(text.startswith(asked) for text in full) else asked
    return shared, [text[len(shared) :] for text in full]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the template writes after an answer's text (end-of-turn token, line break): may be empty."""
    _, (written,) = answer_texts(tokenizer, [{"role": "user", "content": "Hi"}], ["Yes"])
    return ids_of(tokenizer, [written.rpartition("Yes")[2]])[0]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    answers: list[tuple[str, str]],
    max_length: int,
) -> list[Encoded]:
    """Pairs of (chosen, rejected) answers to prompts, as ids that fit `max_length` together with the prompt.

    If a pair does not fit, the prompt gives way first, down to half of the window: the oldest turns go, then the
    start of the text of the first one left; the template's scaffold stays whole. Then the ends of the answers are
    cut, and a cut answer has no end of turn: it would teach the model to stop in mid-sentence.
    """
    texts = [answer_texts(tokenizer, prompt, list(pair)) for prompt, pair in zip(prompts, answers, strict=True)]
    prompt_ids = ids_of(tokenizer, [prompt for prompt, _ in texts])
    chosen_ids = ids_of(tokenizer, [written[0] for _, written in texts])
    rejected_ids = ids_of(tokenizer, [written[1] for _, written in texts])
    closing = len(end_of_turn(tokenizer))
    encoded = []
    for messages, prompt, chosen, rejected in zip(prompts, prompt_ids, chosen_ids, rejected_ids, strict=True):
        limit = max(max_length - max(len(chosen), len(rejected)), max_length // 2)
        prompt_cut = len(prompt) > limit
        if prompt_cut:
            prompt = fit_prompt(tokenizer, messages, limit)
        room = max_length - len(prompt)
        encoded.append(
            Encoded(
                prompt_ids=prompt,
                chosen_ids=cut_answer(chosen, room, closing),
                rejected_ids=cut_answer(rejected, room, closing),
                prompt_cut=prompt_cut,
                chosen_cut=len(chosen) > room,
                rejected_cut=len(rejected) > room,
            )
        )
    return encoded


def cut_answer(ids: list[int], room: int, closing: int) -> list[int]:
    """The first `room` ids of an answer; where it is cut, none of its last `closing` ids (the end of turn)."""
    return ids if len(ids) <= room else ids[: min(room, len(ids) - closing)]


def fit_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], limit: int) -> list[int]:
    """Prompt ids of at most `limit`: without the oldest exchanges, then without the start of the first text left.

    The system turn is kept. Ends the script where not even the template's scaffold fits.
    """
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]

    def ids(kept: list[Message]) -> list[int]:
        return ids_of(tokenizer, [answer_texts(tokenizer, [*system, *kept], ["Yes"])[0]])[0]

    found = ids(turns)
    while len(found) > limit:
        later = next((i for i, turn in enumerate(turns) if i > 0 and turn["role"] == "user"), 0)
        if later == 0:
            break
        turns = turns[later:]
        found = ids(turns)
    text = turns[0]["content"]
    starts = [
        start for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ]
    first = 0
    while len(found) > limit:
        first += len(found) - limit  # each id given up makes room for one; merging at the new start may need another
        if first >= len(starts):
            scaffold = len(ids([{**turns[0], "content": ""}]))
            stop(f"MAX_LENGTH is too small: the chat template alone needs {scaffold} tokens in half of the window")
        found = ids([{**turns[0], "content": text[starts[first] :]}, *turns[1:]])
    return found
