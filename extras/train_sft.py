"""Fine-tune a policy on single answers (SFT): chosen answers of pairs, sft rows, or prompts with completions.

Reads  : processed_helpsteer/ or processed_oasst/ (made by the loaders), or a file or hub dataset
Writes : outputs/sft/ (the model, eval.json, metrics.jsonl, run.json, training_curves.png, README.md)

python -m extras.train_sft
python -m extras.train_sft --data_dir processed_oasst --model Qwen/Qwen2.5-0.5B-Instruct --min_rating 0
python -m extras.train_sft --dataset my_answers.jsonl --max_length 512
python train_dpo.py --model outputs/sft    # start and reference of DPO
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Run, read_json
from utils.script import check, first_process, needs, processes, say, script

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# data
DATA_DIR = "processed_helpsteer"  # rows made by a loader: chosen answers of pairs, or sft rows
DATASET = ""  # instead of DATA_DIR: file, folder or hub name of rows with prompt and completion, or messages
MAX_ROWS = 0  # use only the first MAX_ROWS rows of train and of validation, 0 = all
MIN_RATING = ""  # leave out answers rated lower or not at all: 3.5, or 0 for the best of ranked; "" = keep all
MAX_LENGTH = 256  # tokens of prompt + answer, for DATASET; rows of DATA_DIR have their own window
CHAT_TEMPLATE = ""  # for DATASET: "" = of the tokenizer, "plain" = User: ... Assistant: ...
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder
USE_LORA = False  # train low-rank adapters instead of all weights
LORA_RANK = 16  # rank of the adapters
LORA_ALPHA = 32  # adapters are scaled by alpha / rank
LORA_DROPOUT = 0.05  # on the input of the adapters
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers with adapters
GRADIENT_CHECKPOINTING = False  # recompute activations: less memory, slower
# training
EPOCHS = 1  # passes over the training rows
MAX_STEPS = 0  # optimizer steps, 0 = by EPOCHS
BATCH_SIZE = 4  # rows per batch on each device
ACCUMULATION = 1  # batches per optimizer step; the loss is the mean over the answer tokens of a step
LEARNING_RATE = 2e-5  # peak learning rate
SCHEDULE = "cosine"  # cosine | linear | constant
WARMUP_SHARE = 0.1  # share of the steps in which the rate rises from 0
SEED = 42  # of new adapters, the order of rows, and the split of DATASET
DEVICE = ""  # cuda | mps | cpu, "" = best available
PRECISION = ""  # fp32 | bf16 | fp16, "" = by device
# output
OUTPUT_DIR = "outputs/sft"  # run folder
LOG_EVERY_STEPS = 10  # steps between lines of metrics.jsonl
EVAL_EVERY_STEPS = 0  # steps between evaluations on validation, 0 = only before and after
SAVE_EVERY_STEPS = 200  # steps between checkpoints, 0 = none
RESUME = True  # resume an unfinished run with the same settings
REPORT_TO = "none"  # none | tensorboard | trackio | wandb


def load() -> tuple[PreTrainedTokenizerBase, Dataset, Dataset, dict]:
    """Return (tokenizer, training rows, validation rows, facts for run.json)."""
    from extras.lib import sft
    from utils.data import processed, tokens

    least = sft.least_rating(MIN_RATING)
    if DATASET:
        tokenizer = tokens.load_tokenizer(MODEL, CHAT_TEMPLATE, "MODEL")
        tokens.check_window(tokenizer, MAX_LENGTH, "")
        parts, ledger = sft.answers_of_source(DATASET, tokenizer, MAX_LENGTH, SEED, MAX_ROWS)
        facts = {"dataset_name": DATASET, "max_length": MAX_LENGTH, "counts": ledger.totals() | ledger.counts()}
        facts["data_fingerprint"] = processed.fingerprint(parts)
    else:
        tokenizer, metadata = processed.matching_tokenizer(DATA_DIR, "MODEL", MODEL)
        parts = {name: sft.load_answers(DATA_DIR, name, MAX_ROWS) for name in ("train", "validation")}
        facts = {"dataset_name": metadata["dataset_name"], "max_length": metadata["max_length"]}
        facts["data_fingerprint"] = metadata["fingerprint"]
    origin = DATASET or DATA_DIR
    rows, left_out = sft.learnable(parts["train"], least, f"{origin}, train")
    validation, _ = sft.learnable(parts["validation"], least, f"{origin}, validation")
    return tokenizer, rows, validation, facts | {"train_rows": len(rows), "left_out": left_out}


def build_model(rows: Dataset, settings: dict) -> tuple[nn.Module, str]:
    """Return (the model to train, the digest of its weights)."""
    from utils.models import loading, policies

    model = loading.load_causal(MODEL)
    policies.check_architecture(model, rows)
    digest = policies.weights_digest(model)
    return loading.prepare_model(model, "CAUSAL_LM", settings), digest


@script
def main(settings: dict) -> None:
    # 1. check
    check(settings)
    if not DATASET:
        needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from transformers import set_seed

    from extras.lib import sft
    from utils.data import processed
    from utils.models import loading, policies, shared_prompt
    from utils.training import trainer as training

    training.check_training(settings)
    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    # 2. load
    tokenizer, rows, validation, facts = load()
    set_seed(SEED)
    model, facts["start"] = build_model(rows, settings)
    say(f"{MODEL}: {loading.count_parameters(model)}, on {len(rows)} answers, {len(validation)} for validation")
    # 3. build
    facts |= {"device": str(device), "precision": precision, "rows_per_step": BATCH_SIZE * ACCUMULATION * processes()}
    run = Run(OUTPUT_DIR, settings, RESUME, **facts)
    collator = shared_prompt.collator_for(tokenizer, device)
    module = policies.PolicyPairs(model)

    def scored(progress: str) -> dict:
        return shared_prompt.forward_pairs(module, validation, collator, 2 * BATCH_SIZE, trainer.accelerator, progress)

    def evaluation() -> dict[str, float]:
        return {"loss": sft.mean_nll(scored("scoring validation"))}

    trainer = sft.answer_trainer(model, rows, tokenizer, run, evaluation)
    module.to(trainer.accelerator.device)
    before = scored("perplexity before")
    # 4. train
    training.train(trainer, run)
    # 5. evaluate
    result = sft.perplexity_figures(before, scored("perplexity after"))
    # 6. save
    if first_process():
        policies.save_policy(model, tokenizer, run.folder, rows, collator)
        sft.write_results(run.folder, result, run.record)
    training.close(run, trainer.accelerator)
    # 7. print where it is
    say(sft.format_result(result))
    of_pairs = not DATASET and read_json(f"{DATA_DIR}/metadata.json").get("rows") != "sft"
    names = DATA_DIR if of_pairs else processed.READ_BY_DEFAULT, str(run.folder)
    say(f"written: {run.folder}\nnext: {processed.next_command('python train_dpo.py', *names)}")
    say(f"      {processed.next_command('python train_reinforce.py', *names)}")


if __name__ == "__main__":
    main(override_constants(globals()))
