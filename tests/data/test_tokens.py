"""The ids of a pair equal those of its rendered conversation, and cuts follow the rules of the window."""

import json
import shutil

import pytest

from tests.conftest import TEMPLATE
from tests.source_rows import dialogue
from utils.data.tokens import (
    PLAIN_TEMPLATE,
    chat_template_sha256,
    check_window,
    encode_answers,
    end_of_turn,
    load_tokenizer,
    render,
    tokenizer_sha256,
)

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
LONG = " ".join(f"{word}{i}" for i in range(30) for word in WORDS)
STRICT = (  # refuses system turns and repeated roles, strips texts, and ends without a line break
    "{% for m in messages %}"
    "{% if m['role'] == 'system' or (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must take turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # its generation prompt has an open tag that finished turns do not keep
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def encode(tokenizer, prompt, chosen, rejected, window):
    (pair,) = encode_answers(tokenizer, [prompt], [(chosen, rejected)], window)
    assert len(pair.prompt_ids) + max(len(pair.answer_ids[0]), len(pair.answer_ids[1])) <= window
    return pair


@pytest.fixture
def other(tokenizer_folder):
    """Return a function that loads the tokenizer with another template."""

    def with_template(template):
        tokenizer = load_tokenizer(tokenizer_folder)
        tokenizer.chat_template = template
        return tokenizer

    return with_template


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN_TEMPLATE, STRICT])
@pytest.mark.parametrize("prompt", [dialogue("What is two plus two?"), dialogue("Hi", "Hello!", "And now? Привет 🙂")])
def test_ids_equal_those_of_the_whole_conversation(other, template, prompt):
    tokenizer = other(template)
    pair = encode(tokenizer, prompt, "Four.", "It is five,\n\n1. of course", 512)
    for ids, answer in ((pair.answer_ids[0], "Four."), (pair.answer_ids[1], "It is five,\n\n1. of course")):
        whole = render(tokenizer, [*prompt, {"role": "assistant", "content": answer}], ask=False)
        assert pair.prompt_ids + ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(pair.prompt_ids) == render(tokenizer, prompt, ask=True)
        assert tokenizer.eos_token_id in ids[-2:]
    assert not (pair.prompt_cut or pair.answer_cut[0] or pair.answer_cut[1])


def test_an_open_tag_in_the_generation_prompt_is_left_out(other):
    pair = encode(other(THINKING), dialogue("Q"), "<b>yes</b>", "<b>no</b>", 256)
    tokenizer = other(THINKING)
    assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair.answer_ids[0]) == "<b>yes</b><|im_end|>\n"


def test_a_batch_encodes_each_pair_as_it_is_encoded_alone(tokenizer):
    prompts = [dialogue("Hi"), dialogue(LONG), dialogue("Q1", LONG, "Q2"), dialogue("Hi", system="Be brief")]
    answers = [("a", "b"), (LONG, "no"), ("no", LONG), (LONG, LONG)]
    together = encode_answers(tokenizer, prompts, answers, 96)
    assert together == [encode(tokenizer, prompt, *pair, 96) for prompt, pair in zip(prompts, answers, strict=True)]


def test_a_prompt_is_cut_no_more_than_needed(tokenizer):
    """Beside a short answer the prompt keeps more than half of the window."""
    pair = encode(tokenizer, dialogue(LONG), "yes", "no", 200)
    answer = max(len(pair.answer_ids[0]), len(pair.answer_ids[1]))
    assert pair.prompt_cut and not pair.answer_cut[0] and not pair.answer_cut[1]
    assert 200 - answer - 4 <= len(pair.prompt_ids) <= 200 - answer
    for answers in (("yes", WORDS[0] * 40), (WORDS[0] * 40, "yes")):
        pair = encode(tokenizer, dialogue(LONG), *answers, 200)
        assert not pair.answer_cut[0] and not pair.answer_cut[1], "the longer side counts"


@pytest.mark.parametrize("window", [64, 65, 100, 256])
def test_a_prompt_is_cut_down_to_half_the_window_before_answers_are_cut(tokenizer, window):
    pair = encode(tokenizer, dialogue(LONG), LONG, "no", window)
    assert pair.prompt_cut and pair.answer_cut[0] and not pair.answer_cut[1]
    assert window // 2 - 4 <= len(pair.prompt_ids) <= window // 2
    assert len(pair.answer_ids[0]) == window - len(pair.prompt_ids)


def test_long_answers_do_not_cut_a_short_prompt(tokenizer):
    pair = encode(tokenizer, dialogue("Hi"), LONG, LONG + "!", 64)
    assert not pair.prompt_cut and pair.answer_cut[0] and pair.answer_cut[1]
    assert len(pair.answer_ids[0]) == len(pair.answer_ids[1]) == 64 - len(pair.prompt_ids)
    assert pair.answer_ids[0] == pair.answer_ids[1], "the difference lay behind the cut"


def test_a_cut_prompt_keeps_its_end_and_the_template(tokenizer):
    pair = encode(tokenizer, dialogue(LONG + " END"), LONG, "no", 100)
    text = tokenizer.decode(pair.prompt_ids)
    assert text.startswith("<|im_start|>user\n") and text.endswith(" END<|im_end|>\n<|im_start|>assistant\n")
    kept = text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    assert (LONG + " END").endswith(kept)


def test_characters_of_several_bytes_are_never_split(tokenizer):
    for window in range(60, 76):
        pair = encode(tokenizer, dialogue("🙂Ж語" * 100), "да " * 100, "нет", window)
        assert "\ufffd" not in tokenizer.decode(pair.prompt_ids)


@pytest.mark.parametrize("text", ["a" * 5000, " " * 4000 + "x", "\n" * 3000 + "end", "语" * 2000, "🙂" * 1000])
def test_texts_without_words_fit_the_window(tokenizer, text):
    pair = encode(tokenizer, dialogue(text), text, "no", 96)
    assert pair.prompt_cut and len(pair.prompt_ids) > 12


def test_the_oldest_turns_are_dropped_whole_before_a_text_is_cut(tokenizer):
    turns = dialogue("Q1 " + "old " * 40, "A1 " + "old " * 40, "Q2 " + "mid " * 10, "A2 " + "mid " * 10, "Q3 new")

    def length(kept):
        return len(tokenizer(render(tokenizer, kept, ask=True), add_special_tokens=False)["input_ids"])

    for kept in (turns[2:], turns[4:]):
        for window in (2 * length(kept), 2 * length(kept) + 20):
            pair = encode(tokenizer, turns, LONG, "no", window)
            assert pair.prompt_cut and tokenizer.decode(pair.prompt_ids) == render(tokenizer, kept, ask=True)
    assert not encode(tokenizer, turns, LONG, "no", 2 * length(turns)).prompt_cut
    text = tokenizer.decode(encode(tokenizer, dialogue("Q1", "A1", LONG + " END"), LONG, "no", 100).prompt_ids)
    assert "Q1" not in text and "A1" not in text and text.endswith(" END<|im_end|>\n<|im_start|>assistant\n")


def test_the_system_turn_is_kept(tokenizer):
    turns = dialogue("Q1 " + "old " * 60, "A1", LONG, system="You are a pirate.")
    text = tokenizer.decode(encode(tokenizer, turns, LONG, "no", 120).prompt_ids)
    assert text.startswith("<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\n")
    assert "Q1" not in text and "twelve29<|im_end|>" in text
    turns = dialogue("Q1 " + "old " * 60, "A1", "Q2", system="You are a pirate.")
    pair = encode(tokenizer, turns, LONG, "no", 120)
    assert tokenizer.decode(pair.prompt_ids) == render(tokenizer, [turns[0], turns[3]], ask=True)


def test_a_cut_answer_has_no_end_of_turn(tokenizer):
    """Even an answer that fits whole has no end of turn if the line break after it does not fit."""
    text = WORDS[0] * 40
    whole = encode(tokenizer, dialogue("Hi"), text, "no", 400)
    full = len(whole.prompt_ids) + len(whole.answer_ids[0])
    closing = end_of_turn(tokenizer)
    assert len(closing) == 2 and whole.answer_ids[0][-2:] == closing
    for missing in (1, 2, 3, 5):
        pair = encode(tokenizer, dialogue("Hi"), text, "no", full - missing)
        assert pair.answer_cut[0] and tokenizer.eos_token_id not in pair.answer_ids[0]
        assert pair.answer_ids[0] == whole.answer_ids[0][: -max(2, missing)]
        assert pair.answer_ids[1] == whole.answer_ids[1], "the other side is not touched"
    assert not encode(tokenizer, dialogue("Hi"), text, "no", full).answer_cut[0]


def test_a_small_window_is_refused(tokenizer):
    with pytest.raises(SystemExit, match="MAX_LENGTH = 8 is too small: .* takes 1[0-9] tokens, .* 2[0-9] or more"):
        check_window(tokenizer, 8, "")
    check_window(tokenizer, 40, "")
    with pytest.raises(SystemExit, match="MAX_LENGTH = 40 is too small"):
        check_window(tokenizer, 40, "You are a pirate who answers in the words of the sea.")
    with pytest.raises(SystemExit, match="MAX_LENGTH is too small: chat template and system turn alone need"):
        encode(tokenizer, dialogue("Q", system=LONG), LONG, "no", 100)
    with pytest.raises(SystemExit, match=r"the prompt begins 'Why not\?'\)$"):
        encode(tokenizer, dialogue("Why\nnot?", system=LONG), LONG, "no", 100)


def test_a_template_that_refuses_the_roles_is_reported(other):
    with pytest.raises(SystemExit, match="refuses the turns user, user: Roles must take turns; they begin 'a'"):
        encode(other(STRICT), [*dialogue("a"), *dialogue("b")], "x", "y", 99)


def test_plain_template(other):
    tokenizer = other("")
    tokenizer.chat_template = PLAIN_TEMPLATE
    turns = dialogue("Q1", "A1", "Q2", system="Be brief.")
    assert render(tokenizer, turns, ask=True) == ("Be brief.\nUser: Q1\nAssistant: A1<|im_end|>\nUser: Q2\nAssistant:")


@pytest.fixture
def without(tokenizer_folder, tmp_path):
    """Return a function that copies the tokenizer's folder without some keys of its configuration."""

    def copy(name, *keys):
        folder = tmp_path / name
        shutil.copytree(tokenizer_folder, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        for key in keys:
            config.pop(key, None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if "chat_template" in keys:
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        return folder

    return copy


def test_a_missing_chat_template_is_reported_with_the_remedy(without):
    folder = str(without("bare", "chat_template"))
    with pytest.raises(SystemExit, match='TOKENIZER = .*bare.* has no chat template: set CHAT_TEMPLATE = "plain"'):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "plain").chat_template == PLAIN_TEMPLATE
    with pytest.raises(SystemExit, match="CHAT_TEMPLATE = 'chatml' is not known"):
        load_tokenizer(folder, "chatml")


def test_the_end_token_replaces_a_missing_pad_token(without):
    assert load_tokenizer(str(without("padless", "pad_token"))).pad_token == "<|im_end|>"
    with pytest.raises(SystemExit, match="neither a pad token nor an end token"):
        load_tokenizer(str(without("endless", "pad_token", "eos_token")))


def test_a_folder_without_a_tokenizer_is_reported(without, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    broken = without("broken")
    (broken / "tokenizer.json").write_text('{"version": ')
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "no/such_folder"):
        with pytest.raises(SystemExit, match=f"TOKENIZER = '{name}'") as stop:
            load_tokenizer(name)
        assert "\n" not in str(stop.value)


def test_the_hash_depends_on_behaviour_and_not_on_the_name(tokenizer, without):
    same = load_tokenizer(str(without("under_another_name")))
    assert tokenizer_sha256(same) == tokenizer_sha256(tokenizer) and len(tokenizer_sha256(same)) == 64
    assert chat_template_sha256(same) == chat_template_sha256(tokenizer)
    same.add_tokens(["<new>"])
    assert tokenizer_sha256(same) != tokenizer_sha256(tokenizer)
    from tokenizers import pre_tokenizers

    splits = load_tokenizer(str(without("splits_otherwise")))
    splits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert tokenizer_sha256(splits) != tokenizer_sha256(tokenizer)


def test_the_hash_of_a_template_ignores_how_a_line_break_is_written(other):
    written, escaped = TEMPLATE, TEMPLATE.replace("\n", "\\n")
    assert chat_template_sha256(other(written)) == chat_template_sha256(other(escaped + "\n"))
    assert chat_template_sha256(other(written)) != chat_template_sha256(other(THINKING))
    several = other({"default": written, "tool_use": THINKING})
    assert chat_template_sha256(several) == chat_template_sha256(other(written))
