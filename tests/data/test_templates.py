"""Answer ids equal those in the whole conversation, whatever the tokenizer puts before a text."""

import pytest

from tests.conftest import TEMPLATE
from tests.data.test_tokens import LONG, encode
from tests.source_rows import dialogue
from utils.data.tokens import PLAIN_TEMPLATE, end_of_turn, render

LLAMA = (  # the template of Llama 2
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def sentencepiece(texts):
    """Return a function that makes a SentencePiece tokenizer, which writes "▁" for a space and before a text.

    prepend: "normalizer" also writes it after each special token (Llama 2, converted), "first" only at the start.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def made(template, prepend):
        bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        if prepend == "normalizer":
            bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        words = {word for text in texts[:100] for word in text.split()}
        bpe.train_from_iterator(
            [word for text in sorted(words) for word in (text, " " + text)],
            trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False),
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        tokenizer.chat_template = template
        return tokenizer

    return made


@pytest.mark.parametrize("prepend", ["normalizer", "first"])
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, LLAMA, TEMPLATE.replace("<|im_end|>", "</s>")])
def test_answers_do_not_begin_with_a_prefix_space(sentencepiece, template, prepend):
    """Tokenised alone, an answer would begin with a "▁" that the whole conversation does not have there."""
    tokenizer, prompt = sentencepiece(template, prepend), dialogue("Hi", "Hello!", "What is two plus two?")
    answers = ("Four.", "It is five,\n\n1. of course")
    pair = encode(tokenizer, prompt, *answers, 400)
    for ids, answer in zip(pair.answer_ids, answers, strict=True):
        whole = render(tokenizer, [*prompt, {"role": "assistant", "content": answer}], ask=False)
        assert pair.prompt_ids + ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
        closing = end_of_turn(tokenizer)
        assert closing and ids[-len(closing) :] == closing
    for window in (90, 140):
        cut = encode(tokenizer, dialogue(LONG), LONG, "Four.", window)
        whole = render(tokenizer, [*dialogue("Hi"), {"role": "assistant", "content": LONG}], ask=False)
        rendered = render(tokenizer, dialogue("Hi"), ask=True)
        ids = tokenizer([rendered, whole], add_special_tokens=False)["input_ids"]
        kept = cut.answer_ids[0]
        assert cut.prompt_cut and cut.answer_cut[0] and kept == ids[1][len(ids[0]) :][: len(kept)]
        assert len(cut.prompt_ids) >= window // 2 - 8 and len(kept) == window - len(cut.prompt_ids)
