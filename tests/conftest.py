"""Make the tokenizer of 600 tokens, the 2-layer Llama and the rows that the tests share. Nothing is downloaded."""

import os

# before the libraries are imported; on toy models a second thread only costs time
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
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
    """Return the prompts and answers of the sample rows."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    return [row[key] for row in rows for key in ("prompt", "response")]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, texts):
    """Save a byte-level BPE with the template of ChatML. Its pad token is the end of turn, as in SmolLM2."""
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


@pytest.fixture
def tokenizer(tokenizer_folder):
    """Load a tokenizer for one test: reward models change the padding of theirs."""
    from utils.data.tokens import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_folder):
    """Save a random 2-layer Llama with tied embeddings and its tokenizer, like a model from the hub."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
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
    """Run a script in this process with some constants replaced, as the command line does, and restore them."""
    from utils.config import override_constants

    before = dict(vars(module))
    argv = [f"--{name.lower()}={value}" for name, value in constants.items()]
    try:
        module.main(override_constants(vars(module), argv))
    finally:
        vars(module).update(before)


def run_process(script, constants, *launcher):
    """Run a script in a process of its own, which must succeed."""
    options = [f"--{name.lower()}={value}" for name, value in constants.items()]
    done = subprocess.run([sys.executable, *launcher, script, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def error_of(module, **constants):
    """Run a script that must stop with a message to the user, and return this message: one line, exit code 1."""
    with pytest.raises(SystemExit) as stop:
        run_script(module, **constants)
    message = stop.value.code
    assert isinstance(message, str) and "\n" not in message, message
    return message


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory, tokenizer_folder):
    """Load the sample rows with the small tokenizer in a window of 128 tokens."""
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
def reward_models(tmp_path_factory, model_folder, sample_folder):
    """Train a reward model with each head, and return {head: run folder}; the distribution is trained with LoRA."""
    import train_reward_model
    from utils.models.reward_model import HEADS

    options = {"MAX_STEPS": 6, "LOG_EVERY_STEPS": 2, "MAX_ROWS": 40, "PRECISION": "fp32", "DEVICE": "cpu"}
    options |= {"LEARNING_RATE": 1e-2, "CONTROL_PAIRS": 6, "DATA_DIR": sample_folder, "MODEL": model_folder}
    root = tmp_path_factory.mktemp("reward_models")
    for head in HEADS:
        more = {"USE_LORA": "true", "LORA_RANK": 4, "RATING_WEIGHT": 0.3} if head == "distribution" else {}
        run_script(train_reward_model, **options | more, HEAD=head, OUTPUT_DIR=root / head)
    return {head: root / head for head in HEADS}


@pytest.fixture(scope="session")
def judges(reward_models):
    """Return {head: folder of a reward model} for policies."""
    return {head: str(reward_models[head]) for head in ("scalar", "distribution")}
