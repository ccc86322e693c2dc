"""A tokenizer of 600 tokens and a 2-layer Llama, made in memory: no test needs a download."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1", TQDM_DISABLE="1", HF_HUB_DISABLE_TELEMETRY="1"
)  # before the libraries are imported

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_data" / "helpsteer_sample.jsonl"

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Forget accelerate's process-wide state after each test: it keeps the precision of the first Accelerator."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def texts():
    """Prompts and answers of the sample rows."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    return [row[key] for row in rows for key in ("prompt", "response")]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, texts):
    """A byte-level BPE with the special tokens and the template of ChatML; pad is the end of turn, as in SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=special[0], bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from utils.data.tokens import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A random 2-layer Llama with tied embeddings, saved with its tokenizer like a model of the hub."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_script(module, **constants):
    """Run a script in this process with constants replaced as the command line would, and put them back after."""
    from utils.config import override_constants

    before = dict(vars(module))
    argv = [f"--{name.lower()}={value}" for name, value in constants.items()]
    try:
        module.main(override_constants(vars(module), argv))
    finally:
        vars(module).update(before)


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory, tokenizer_folder):
    """The sample rows as load_helpsteer_dataset.py leaves them: a window of 128 tokens of the small tokenizer."""
    import load_helpsteer_dataset

    folder = tmp_path_factory.mktemp("data") / "processed"
    run_script(
        load_helpsteer_dataset,
        DATASET=SAMPLE,
        TOKENIZER=tokenizer_folder,
        MAX_LENGTH=128,
        MAX_ROWS=160,
        OUTPUT_DIR=folder,
    )
    return str(folder)


@pytest.fixture(scope="session")
def judges(tmp_path_factory, model_folder, sample_folder):
    """{head: folder of a reward model with a random head}."""
    import torch

    from utils.data.processed import load_pairs
    from utils.data.tokens import load_tokenizer
    from utils.models import reward_model
    from utils.models.reward_model import new_reward_head
    from utils.models.shared_prompt import PairCollator

    tokenizer = load_tokenizer(model_folder)  # of its own: a reward model changes the padding
    folders, rows = {}, load_pairs(sample_folder, "train", 8)
    for head in ("scalar", "distribution"):
        reading, folder = new_reward_head(head, "average", [], None), tmp_path_factory.mktemp("judge") / head
        torch.manual_seed(1)
        model = reward_model.start_model(model_folder, tokenizer, reading)
        torch.nn.init.normal_(model.score.weight, std=0.3)
        reward_model.save_reward_model(model, tokenizer, folder, reading, rows, PairCollator(2, 8), max_length=128)
        folders[head] = str(folder)
    return folders
