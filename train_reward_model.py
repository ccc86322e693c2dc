"""Train a reward model on the pairs of step 1 and test whether it has learned more than a shortcut.

Reads  : processed_helpsteer/ (made by load_helpsteer_dataset.py)
Writes : outputs/reward_model/ (the model, eval.json, predictions.jsonl, metrics.jsonl, run.json, plots, README.md)

python train_reward_model.py
python train_reward_model.py --head distribution           # P(grade) for 1 to 10 in place of a number
python train_reward_model.py --max_rows 32 --max_steps 4    # a quick look; any constant below, in lower case
python train_reward_model.py --seed 1 --output_dir outputs/reward_model_1    # extras.make_report averages over seeds
accelerate launch train_reward_model.py                    # on several GPUs
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Run
from utils.script import at_least, first_process, needs, pick, processes, say, script, shares, stop

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset


# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
MAX_ROWS = 0  # use the first so many rows of train and of validation only, 0 = all of them
HALF = ""  # even | odd: train on every second prompt only, so that a judge can be trained on the others, "" = on all
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder, also that of an earlier reward model
HEAD = "scalar"  # scalar = a number | distribution = P(grade) for 1 to 10 | attributes = the five ratings
RATING = ""  # of HEAD = attributes: their weights, see RATINGS in utils/rows.py; "" = as the data were rated
USE_LORA = False  # train low-rank adapters and the head instead of all weights
LORA_RANK = 16  # of the adapters
LORA_ALPHA = 32  # adapters count alpha / rank
LORA_DROPOUT = 0.05  # on the input of the adapters
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers that get one
GRADIENT_CHECKPOINTING = False  # compute activations twice: slower, for long windows in little memory
# training
PAIR_LOSS = ""  # "" = the first for HEAD: bradley_terry | margin | scaled; win_probability | scaled; squared_error
LABEL_SMOOTHING = 0.0  # assumed share of wrong labels
CENTRING = 0.0  # weight of (reward of chosen + reward of rejected)^2, HEAD = scalar
RATING_WEIGHT = 0.0  # share of the loss that ties the grades to the ratings, HEAD = distribution
EPOCHS = 1  # passes over the training rows; of more than one, the best on validation is kept
MAX_STEPS = 0  # optimizer steps, 0 = as many as EPOCHS make
BATCH_SIZE = 4  # pairs in memory at once
ACCUMULATION = 1  # batches per optimizer step
LEARNING_RATE = 5e-5  # learning rate at its highest, after the warm-up
HEAD_LEARNING_RATE = 1e-3  # the same of a new head, which starts at zero; 0 = LEARNING_RATE, as a trained head has
SCHEDULE = "cosine"  # cosine | linear | constant
WARMUP_SHARE = 0.1  # of the steps, in which the rate grows from 0
WEIGHT_DECAY = 0.0  # of AdamW
SEED = 42  # of the adapters' start and of the order of rows
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# evaluation
CONTROL_PAIRS = 500  # pairs on which it is also tried untrained, without the prompts and with wrong ones, 0 = none
# output
OUTPUT_DIR = "outputs/reward_model"  # the run folder
LOG_EVERY_STEPS = 10  # a line of metrics.jsonl
EVAL_EVERY_STEPS = 0  # pair accuracy on validation while training, 0 = at the end only
SAVE_EVERY_STEPS = 200  # a checkpoint to go on from, 0 = none
RESUME = True  # go on with an unfinished run of the same settings
REPORT_TO = "none"  # none | tensorboard | trackio | wandb


def check_loss(head: str, loss: str, rated: bool, attributed: bool, **options: float) -> None:
    """End the script if the options of the loss do not fit the head or the rows."""
    from utils.training.losses import NEED_RATINGS

    fits = {"LABEL_SMOOTHING": ("scalar", "distribution"), "CENTRING": ("scalar",), "RATING_WEIGHT": ("distribution",)}
    for name, value in options.items():
        if value and head not in fits[name]:
            stop(f"{name} = {value} is for HEAD = {' or '.join(fits[name])}, not for {head}: set it to 0")
    shares(**options)
    if (loss in NEED_RATINGS or options["RATING_WEIGHT"]) and not rated:
        stop(f"not all of these rows have ratings, which PAIR_LOSS = {loss!r} or RATING_WEIGHT needs: leave both out")
    if head == "attributes" and not attributed:
        stop("these rows have no attributes, which HEAD = attributes learns: load nvidia/HelpSteer2, or use scalar")


@script
def main(settings: dict) -> None:
    # 1. check
    at_least(1, BATCH_SIZE=BATCH_SIZE, ACCUMULATION=ACCUMULATION, LORA_RANK=LORA_RANK, LOG_EVERY_STEPS=LOG_EVERY_STEPS)
    at_least(0, MAX_ROWS=MAX_ROWS, MAX_STEPS=MAX_STEPS, EPOCHS=EPOCHS, SEED=SEED)
    at_least(0, LEARNING_RATE=LEARNING_RATE, WEIGHT_DECAY=WEIGHT_DECAY)
    shares(WARMUP_SHARE=WARMUP_SHARE, LORA_DROPOUT=LORA_DROPOUT)
    at_least(0, CONTROL_PAIRS=CONTROL_PAIRS, HEAD_LEARNING_RATE=HEAD_LEARNING_RATE)
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from transformers import TrainingArguments, set_seed

    from utils.data import processed
    from utils.data.preferences import RATINGS
    from utils.evaluation import predictions, reward_report
    from utils.models import loading, policies, reward_model, shared_prompt
    from utils.training import losses
    from utils.training import trainer as training
    from utils.training.losses import PAIR_LOSSES

    named = pick(PAIR_LOSSES, "HEAD", HEAD)
    pair_loss = PAIR_LOSS or next(iter(named))
    pick(named, "PAIR_LOSS", pair_loss)
    if HALF:
        pick(processed.HALVES, "HALF", HALF)
    if RATING:
        pick(RATINGS, "RATING", RATING)
        if HEAD != "attributes":
            stop(f"RATING = {RATING!r} is for HEAD = attributes: for {HEAD}, load the rows with that rating")
    schedule = pick(training.SCHEDULES, "SCHEDULE", SCHEDULE)
    training.check_tracker(REPORT_TO)
    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    # 2. load
    tokenizer, metadata = processed.matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    rows, validation = (processed.load_pairs(DATA_DIR, split, MAX_ROWS) for split in ("train", "validation"))
    rows = processed.half(rows, HALF) if HALF else rows
    judged, measured_on = validation, "validation"
    if EPOCHS > 1 and metadata["test_size"]:  # the epoch is chosen on validation, so it cannot measure too
        judged, measured_on = processed.load_pairs(DATA_DIR, "test", MAX_ROWS), "test"
    rows, judged, validation = (processed.closed_answers(some, tokenizer) for some in (rows, judged, validation))
    ratings, means = processed.ratings_of(rows)
    reading = reward_model.new_reward_head(HEAD, RATING or metadata["rating"], ratings, means)
    check_loss(
        HEAD,
        pair_loss,
        len(ratings) == 2 * len(rows),
        means is not None,
        LABEL_SMOOTHING=LABEL_SMOOTHING,
        CENTRING=CENTRING,
        RATING_WEIGHT=RATING_WEIGHT,
    )
    collator = shared_prompt.PairCollator(tokenizer.pad_token_id, shared_prompt.row_multiple(device))
    set_seed(SEED)
    model = reward_model.start_model(MODEL, tokenizer, reading)
    shared_prompt.check_shared_rows(model, rows[0], collator)
    start = policies.weights_digest(model)
    head_rate = LEARNING_RATE if model.score.weight.any() else HEAD_LEARNING_RATE or LEARNING_RATE
    if USE_LORA:
        model = loading.add_lora(model, "SEQ_CLS", LORA_RANK, LORA_ALPHA, LORA_DROPOUT, LORA_TARGETS, "score")
    if GRADIENT_CHECKPOINTING:
        loading.use_gradient_checkpointing(model)
    say(f"{MODEL}: {loading.count_parameters(model)}, on {len(rows)} pairs, {len(validation)} for validation")
    # 3. build
    facts = {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"]}
    facts |= {"max_length": metadata["max_length"], "train_pairs": len(rows), "pair_loss": pair_loss, "start": start}
    facts["rows_per_step"] = BATCH_SIZE * ACCUMULATION * processes()
    run = Run(OUTPUT_DIR, settings, RESUME, device=str(device), precision=precision, **facts)
    args = training.training_arguments(
        TrainingArguments,
        run.folder,
        device,
        precision,
        num_train_epochs=EPOCHS,
        max_steps=MAX_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type=schedule,
        warmup_steps=WARMUP_SHARE,
        weight_decay=WEIGHT_DECAY,
        logging_steps=LOG_EVERY_STEPS,
        eval_steps=EVAL_EVERY_STEPS,
        save_steps=SAVE_EVERY_STEPS,
        report_to=REPORT_TO,
        run_name=run.folder.name,
        seed=SEED,
    )

    def outputs_of(some: Dataset, other: torch.nn.Module | None = None) -> np.ndarray:
        module = reward_model.RewardPairs(other) if other else trainer.model_wrapped
        return shared_prompt.forward_pairs(module, some, collator, 2 * BATCH_SIZE, trainer.accelerator)["outputs"]

    def accuracy() -> dict[str, float]:
        return {"accuracy": float(predictions.pairs_right(outputs_of(validation), reading).mean())}

    loss = losses.PairLoss(reading, pair_loss, LABEL_SMOOTHING, CENTRING, RATING_WEIGHT)
    module, rates = reward_model.RewardPairs(model), {"score": head_rate}
    trainer = training.PairTrainer(module, args, rows, collator, loss, run, accuracy, rates)
    best = training.BestEpoch(trainer, run.folder, accuracy) if EPOCHS > 1 else None
    # 4. train
    training.train(trainer, run)
    epochs = best.restore() if best else {}
    # 5. evaluate
    unused = rows if measured_on == "validation" else validation  # rewards of training pairs are too sure
    if HEAD == "attributes":  # the other heads learn the size of a difference from their pairs
        predictions.fit_win_scale(reading, unused, outputs_of)
    weights = predictions.surface_weights(rows)
    untrained = partial(reward_model.random_head_model, MODEL, reading, device, SEED)
    lines = predictions.predict_pairs(outputs_of, judged, tokenizer, reading, weights, CONTROL_PAIRS, untrained)
    result = reward_report.report(lines) | {"measured_on": measured_on, "epochs": epochs}
    result["selection_shares_rows"] = bool(epochs) and measured_on == "validation"
    # 6. save
    if first_process():
        facts = {"max_length": metadata["max_length"], "surface_weights": weights.tolist()}
        facts |= {n: result[n] for n in ("reward_mean", "reward_std")}
        reward_model.save_reward_model(model, tokenizer, run.folder, reading, rows, collator, **facts)
        reward_report.write_results(run.folder, result, lines, run.record)
    training.close(run, trainer.accelerator)
    # 7. say where it is
    say(reward_report.format_summary(result))
    say(f"written: {run.folder}")
    say(f"next: python -m extras.make_report --runs {run.folder}    # the whole report as one page")
    policy = f"python train_dpo.py --reward_model {run.folder}"
    say(f"      {processed.next_command(policy, DATA_DIR, MODEL, metadata['tokenizer'])}")


if __name__ == "__main__":
    main(override_constants(globals()))
