"""Train a reward model on the pairs of step 1, and say whether it has learned more than the length of an answer.

Reads  : processed_helpsteer/ (made by load_helpsteer_dataset.py)
Writes : outputs/reward_model/ (the model, eval.json, predictions.jsonl, metrics.jsonl, run.json, plots, README.md)

python train_reward_model.py
python train_reward_model.py --max_rows 32 --max_steps 4    # a quick look; any constant below, in lower case
python train_reward_model.py --use_lora --learning_rate 2e-4
accelerate launch train_reward_model.py                    # on several GPUs
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Run, at_least, first_process, needs, pick, say, script, write_json, write_text

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer

# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
MAX_ROWS = 0  # use the first so many rows of train and of validation only, 0 = all of them
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder
HEAD = "scalar"  # what the model says of an answer, see HEADS in utils/rewards.py
USE_LORA = False  # train low-rank adapters and the head instead of all weights
LORA_RANK = 16  # of the adapters
LORA_ALPHA = 32  # adapters count alpha / rank
LORA_DROPOUT = 0.05  # on the input of the adapters
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers that get one
GRADIENT_CHECKPOINTING = False  # compute activations twice: slower, for long windows in little memory
# training
PAIR_LOSS = "bradley_terry"  # see PAIR_LOSSES in utils/losses.py
ENGINE = "pairs"  # pairs = shared-prompt batches | trl = trl.RewardTrainer on the same rows
EPOCHS = 1  # passes over the training rows
MAX_STEPS = 0  # optimizer steps, 0 = as many as EPOCHS make
BATCH_SIZE = 4  # pairs in memory at once
ACCUMULATION = 1  # batches a step
LEARNING_RATE = 5e-5  # at its highest
SCHEDULE = "cosine"  # cosine | linear | constant
WARMUP_SHARE = 0.1  # of the steps, in which the rate grows from 0
WEIGHT_DECAY = 0.0  # of AdamW
SEED = 42  # of the head's start and of the order of rows
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# output
OUTPUT_DIR = "outputs/reward_model"  # the run folder
LOG_EVERY_STEPS = 10  # a line of metrics.jsonl
EVAL_EVERY_STEPS = 0  # pair accuracy on validation while training, 0 = at the end only
SAVE_EVERY_STEPS = 200  # a checkpoint to go on from, 0 = none
RESUME = True  # go on with an unfinished run of the same settings
REPORT_TO = "none"  # none | tensorboard | trackio | wandb

ENGINES = {"pairs": "ours, shared-prompt batches", "trl": "trl.RewardTrainer"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def evaluate(outputs: np.ndarray, rows: Dataset) -> tuple[dict, list[dict]]:
    """(figures of eval.json, lines of predictions.jsonl) for head outputs [rows, 2, 1]."""
    import numpy as np

    from utils.evaluation import pair_report

    lengths = np.array(
        [[len(row["chosen"][-1]["content"]), len(row["rejected"][-1]["content"])] for row in rows], dtype=float
    )
    rewards = outputs[..., 0].astype(float)
    predictions = [
        {
            "row": row["row"],
            "prompt": row["prompt"][:200],
            "chosen": pair[0],
            "rejected": pair[1],
            "chosen_rating": row["chosen_rating"],
            "rejected_rating": row["rejected_rating"],
            "chosen_characters": int(length[0]),
            "rejected_characters": int(length[1]),
        }
        for row, pair, length in zip(rows, rewards.tolist(), lengths, strict=True)
    ]
    return pair_report(rewards[:, 0], rewards[:, 1], lengths), predictions


def write_results(folder: Path, result: dict, predictions: list[dict], record: dict) -> None:
    """eval.json, predictions.jsonl, the curves and the model card."""
    import json

    from utils.curves import training_curves

    write_json(folder / "eval.json", result)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)
    write_text(folder / "predictions.jsonl", lines)
    baselines = {"loss": (0.6931, "a coin:"), "accuracy": (result["length_baseline"], "the longer answer wins:")}
    title = f"Reward model: {result['accuracy']:.1%} of {result['pairs']} validation pairs are ranked right"
    training_curves(folder, ("loss", "accuracy"), baselines, title)
    settings = record["settings"]
    write_text(
        folder / "README.md",
        f"# Reward model\n\n`{settings['MODEL']}` with a {settings['HEAD']} head, trained on "
        f"{record['train_pairs']} pairs of `{record['dataset_name']}` ({settings['PAIR_LOSS']} loss, learning rate "
        f"{settings['LEARNING_RATE']}, window {record['max_length']} tokens).\n\n"
        f"Pair accuracy on {result['pairs']} validation pairs: **{result['accuracy']:.3f}** "
        f"(95 % interval {result['accuracy_low']:.3f} to {result['accuracy_high']:.3f}); "
        f"'the longer answer wins' alone: {result['length_baseline']:.3f}. {result['verdict'].capitalize()}.\n\n"
        "Load it with `AutoModelForSequenceClassification.from_pretrained` or `utils.rewards.RewardModel.load`.\n",
    )


def build_trainer(
    engine: str,
    model: torch.nn.Module,
    rows: Dataset,
    collator: object,
    losses: object,
    run: Run,
    evaluation: object,
    tokenizer: PreTrainedTokenizerBase,
    arguments: partial,
) -> Trainer:
    """The trainer of the chosen engine; both train `model` on the same rows and leave the same records."""
    from transformers import TrainingArguments
    from trl import RewardConfig, RewardTrainer

    from utils import pairs, rewards, training

    if engine == "trl":
        args = arguments(RewardConfig, max_length=None, disable_dropout=False, gradient_checkpointing=False)
        whole = pairs.whole_rows(rows)
        trainer = RewardTrainer(model=model, args=args, train_dataset=whole, processing_class=tokenizer)
        training.attach(trainer, run)
        return trainer
    module = rewards.RewardPairs(model)
    return training.PairTrainer(module, arguments(TrainingArguments), rows, collator, losses, run, evaluation)


@script
def main(settings: dict) -> None:
    # 1. check
    pick(ENGINES, "ENGINE", ENGINE)
    at_least(1, BATCH_SIZE=BATCH_SIZE, ACCUMULATION=ACCUMULATION, LORA_RANK=LORA_RANK, LOG_EVERY_STEPS=LOG_EVERY_STEPS)
    at_least(0, MAX_ROWS=MAX_ROWS, MAX_STEPS=MAX_STEPS, EPOCHS=EPOCHS, WARMUP_SHARE=WARMUP_SHARE)
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from transformers import set_seed

    from utils import models, pairs, rewards, training
    from utils.losses import PAIR_LOSSES

    pair_loss, head = pick(PAIR_LOSSES, "PAIR_LOSS", PAIR_LOSS), pick(rewards.HEADS, "HEAD", HEAD)
    training.check_tracker(REPORT_TO)
    device, precision = models.choose_machine(DEVICE, PRECISION)
    # 2. load
    tokenizer, metadata = pairs.matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    rows, validation = (pairs.load_pairs(DATA_DIR, split, MAX_ROWS) for split in ("train", "validation"))
    set_seed(SEED)
    model = rewards.prepare(models.load_classifier(MODEL, head.outputs), tokenizer, head)
    if USE_LORA:
        model = models.add_lora(model, "SEQ_CLS", LORA_RANK, LORA_ALPHA, LORA_DROPOUT, LORA_TARGETS, head="score")
    if GRADIENT_CHECKPOINTING:
        training.use_gradient_checkpointing(model)
    say(f"{MODEL}: {models.count_parameters(model)}, on {len(rows)} pairs, {len(validation)} for validation")
    # 3. build
    facts = {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"]}
    facts |= {"max_length": metadata["max_length"], "train_pairs": len(rows), "precision": precision}
    run = Run(OUTPUT_DIR, settings, RESUME, device=str(device), **facts)
    collator = pairs.PairCollator(tokenizer.pad_token_id, pairs.row_multiple(device))
    arguments = partial(
        training.training_arguments,
        folder=run.folder,
        device=device,
        precision=precision,
        num_train_epochs=EPOCHS,
        max_steps=MAX_STEPS or -1,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type=pick(SCHEDULES, "SCHEDULE", SCHEDULE),
        warmup_steps=WARMUP_SHARE,
        weight_decay=WEIGHT_DECAY,
        logging_steps=LOG_EVERY_STEPS,
        eval_steps=EVAL_EVERY_STEPS,
        save_steps=SAVE_EVERY_STEPS,
        report_to=REPORT_TO,
        run_name=run.folder.name,
        seed=SEED,
    )

    def outputs_on_validation() -> np.ndarray:
        module = trainer.model_wrapped if ENGINE == "pairs" else rewards.RewardPairs(model)
        return pairs.forward_pairs(module, validation, collator, 2 * BATCH_SIZE, trainer.accelerator)["outputs"]

    def accuracy() -> dict[str, float]:
        return {"accuracy": evaluate(outputs_on_validation(), validation)[0]["accuracy"]}

    losses = partial(rewards.pair_losses, pair_loss=pair_loss)
    trainer = build_trainer(ENGINE, model, rows, collator, losses, run, accuracy, tokenizer, arguments)
    # 4. train
    began = time.monotonic()
    training.train(trainer, run)
    run.note(train_seconds=round(time.monotonic() - began, 2))
    # 5. evaluate
    result, predictions = evaluate(outputs_on_validation(), validation)
    # 6. save
    if first_process():
        rewards.save(model, tokenizer, run.folder, HEAD, metadata["max_length"], rows, collator)
        write_results(run.folder, result, predictions, run.record)
    trainer.accelerator.wait_for_everyone()
    training.remove_checkpoints(run.folder)
    run.finish()
    # 7. say where it is
    say(
        f"pair accuracy {result['accuracy']:.3f} [{result['accuracy_low']:.3f}, {result['accuracy_high']:.3f}] on "
        f"{result['pairs']} pairs; 'the longer answer wins' alone: {result['length_baseline']:.3f}"
    )
    say(f"{result['verdict']}\nwritten: {run.folder}")
    say("next: score answers with it, as README.md shows under 'What lies between the steps'")


if __name__ == "__main__":
    main(override_constants(globals()))
