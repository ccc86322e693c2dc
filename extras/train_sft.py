"""Fine-tune a policy on single answers (SFT): the chosen ones of processed pairs, sft rows, or prompt and completion.

Reads  : processed_helpsteer/ or processed_oasst/ (made by the loaders), or a file or hub dataset
Writes : outputs/sft/ (the model, eval.json, metrics.jsonl, run.json, training_curves.png, README.md)

python -m extras.train_sft
python -m extras.train_sft --data_dir processed_oasst --model Qwen/Qwen2.5-0.5B-Instruct --min_rating 0
python -m extras.train_sft --dataset my_answers.jsonl --max_length 512
python train_dpo.py --model outputs/sft    # the folder is a start, and a reference
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Run, read_json
from utils.script import check, first_process, needs, processes, say, script, stop

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# data
DATA_DIR = "processed_helpsteer"  # rows made by a loader: of pairs the chosen answers, of sft rows all
DATASET = ""  # in place of DATA_DIR: file, folder or hub name of rows with prompt and completion, or messages
MAX_ROWS = 0  # use the first so many rows of train and of validation only, 0 = all of them
MIN_RATING = ""  # answers rated lower, or not rated, are left out: such as 3.5, or 0 for the best of ranked; "" = none
MAX_LENGTH = 256  # tokens of prompt and answer together, for DATASET; rows of DATA_DIR have their window
CHAT_TEMPLATE = ""  # for DATASET: "" = the tokenizer's own, "plain" = User: ... Assistant: ... for one without
VALIDATION_SHARE = 0.2  # of the rows of a DATASET without a held-out split, by prompt
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder
USE_LORA = False  # train low-rank adapters instead of all weights
LORA_RANK = 16  # of the adapters
LORA_ALPHA = 32  # adapters count alpha / rank
LORA_DROPOUT = 0.05  # on the input of the adapters
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers that get one
GRADIENT_CHECKPOINTING = False  # compute activations twice: slower, for long windows in little memory
# training
EPOCHS = 1  # passes over the training rows
MAX_STEPS = 0  # optimizer steps, 0 = as many as EPOCHS make
BATCH_SIZE = 4  # rows in memory at once
ACCUMULATION = 1  # batches per optimizer step; the loss is the mean over all answer tokens of a step
LEARNING_RATE = 2e-5  # learning rate at its highest, after the warm-up
SCHEDULE = "cosine"  # cosine | linear | constant
WARMUP_SHARE = 0.1  # of the steps, in which the rate grows from 0
WEIGHT_DECAY = 0.0  # of AdamW
SEED = 42  # of the adapters' start, the order of rows, and the split of DATASET
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# output
OUTPUT_DIR = "outputs/sft"  # the run folder
LOG_EVERY_STEPS = 10  # a line of metrics.jsonl
EVAL_EVERY_STEPS = 0  # perplexity on validation while training, 0 = before and after only
SAVE_EVERY_STEPS = 200  # a checkpoint to resume from, 0 = none
RESUME = True  # resume an unfinished run of the same settings
REPORT_TO = "none"  # none | tensorboard | trackio | wandb


def load() -> tuple[PreTrainedTokenizerBase, Dataset, Dataset, dict]:
    """Return (tokenizer, training rows, validation rows, facts for run.json)."""
    from extras.lib import sft
    from utils.data import processed, tokens

    least = sft.least_rating(MIN_RATING)
    if DATASET:
        tokenizer = tokens.load_tokenizer(MODEL, CHAT_TEMPLATE, "MODEL")
        tokens.check_window(tokenizer, MAX_LENGTH, "")
        found, ledger = sft.answers_of_source(DATASET, tokenizer, MAX_LENGTH, VALIDATION_SHARE, SEED, MAX_ROWS)
        facts = {"dataset_name": DATASET, "max_length": MAX_LENGTH, "counts": ledger.totals() | ledger.counts()}
        facts["data_fingerprint"] = processed.fingerprint(found)
    else:
        tokenizer, metadata = processed.matching_tokenizer(DATA_DIR, "MODEL", MODEL)
        found = {name: sft.load_answers(DATA_DIR, name, MAX_ROWS) for name in ("train", "validation")}
        facts = {"dataset_name": metadata["dataset_name"], "max_length": metadata["max_length"]}
        facts["data_fingerprint"] = metadata["fingerprint"]
    origin = DATASET or DATA_DIR
    rows, left_out = sft.learnable(found["train"], least, f"{origin}, train")
    validation, _ = sft.learnable(found["validation"], least, f"{origin}, validation")
    return tokenizer, rows, validation, facts | {"train_rows": len(rows), "left_out": left_out}


def build_model(rows: Dataset, settings: dict) -> tuple[nn.Module, str]:
    """Return (the model to train, digest of the weights that it starts from)."""
    from utils.models import loading, policies

    model = loading.load_causal(MODEL)
    policies.check_architecture(model, rows)
    digest = policies.weights_digest(model)
    return loading.prepare_model(model, "CAUSAL_LM", settings), digest


@script
def main(settings: dict) -> None:
    # 1. check
    check(settings)
    if not 0 < VALIDATION_SHARE < 1:
        stop(f"VALIDATION_SHARE = {VALIDATION_SHARE}: expected more than 0 and less than 1")
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

    def scored(what: str) -> dict:
        return shared_prompt.forward_pairs(module, validation, collator, 2 * BATCH_SIZE, trainer.accelerator, what)

    def figures() -> dict[str, float]:
        return {"loss": sft.mean_nll(scored("scoring validation"))}

    trainer = sft.answer_trainer(model, rows, tokenizer, run, figures)
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
