"""Train a reward model on preference pairs and test whether it learned more than a shortcut.

Reads  : processed_helpsteer/ (made by load_helpsteer_dataset.py)
Writes : outputs/reward_model/ (the model, eval.json, predictions.jsonl, metrics.jsonl, run.json, plots, README.md)

python train_reward_model.py
python train_reward_model.py --head distribution           # P(grade) for 1 to 10 instead of a number
python train_reward_model.py --max_rows 32 --max_steps 4    # a quick look; any constant below, in lower case
python train_reward_model.py --seed 1 --output_dir outputs/reward_model_1    # extras.make_report averages over seeds
accelerate launch train_reward_model.py                    # on several GPUs
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Run
from utils.script import check, first_process, needs, pick, processes, say, script, stop

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from utils.models.reward_model import RewardHead
    from utils.models.shared_prompt import PairCollator
    from utils.training.trainer import PairTrainer

# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
MAX_ROWS = 0  # use only the first MAX_ROWS rows of train and of validation, 0 = all
HALF = ""  # even | odd: train on every other prompt and leave the rest for a judge, "" = all
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder, also of a reward model
HEAD = "scalar"  # scalar = a number | distribution = P(grade) for 1 to 10 | attributes = the five ratings
RATING = ""  # attribute weights for HEAD = attributes, see docs/data.md; "" = those of the data
USE_LORA = False  # train low-rank adapters and the head instead of all weights
LORA_RANK = 16  # rank of the adapters
LORA_ALPHA = 32  # adapters are scaled by alpha / rank
LORA_DROPOUT = 0.05  # on the input of the adapters
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers with adapters
GRADIENT_CHECKPOINTING = False  # recompute activations: less memory, slower
# training
PAIR_LOSS = ""  # "" = first one of HEAD: bradley_terry | margin | scaled; win_probability | scaled; squared_error
LABEL_SMOOTHING = 0.0  # assumed share of wrong labels
RATING_WEIGHT = 0.0  # share of the loss that fits the grades to the ratings, HEAD = distribution
EPOCHS = 1  # passes over the training rows; the best epoch on validation is kept
MAX_STEPS = 0  # optimizer steps, 0 = by EPOCHS
BATCH_SIZE = 4  # pairs per batch on each device
ACCUMULATION = 1  # batches per optimizer step
LEARNING_RATE = 5e-5  # peak learning rate
HEAD_LEARNING_RATE = 1e-3  # peak learning rate of a new head, 0 = LEARNING_RATE
SCHEDULE = "cosine"  # cosine | linear | constant
WARMUP_SHARE = 0.1  # share of the steps in which the rate rises from 0
SEED = 42  # seeds new adapters and the order of rows
DEVICE = ""  # cuda | mps | cpu, "" = best available
PRECISION = ""  # fp32 | bf16 | fp16, "" = by device
# evaluation
CONTROL_PAIRS = 500  # pairs for the controls: untrained model, no prompts, wrong prompts; 0 = none
# output
OUTPUT_DIR = "outputs/reward_model"  # run folder
LOG_EVERY_STEPS = 10  # steps between lines of metrics.jsonl
EVAL_EVERY_STEPS = 0  # steps between evaluations on validation, 0 = only at the end
SAVE_EVERY_STEPS = 200  # steps between checkpoints, 0 = none
RESUME = True  # resume an unfinished run with the same settings
REPORT_TO = "none"  # none | tensorboard | trackio | wandb


def check_head() -> str:
    """Return the name of the loss. Stop if HEAD, PAIR_LOSS and RATING contradict each other."""
    from utils.data.preferences import RATINGS
    from utils.training.losses import PAIR_LOSSES

    losses = pick(PAIR_LOSSES, "HEAD", HEAD)
    pair_loss = PAIR_LOSS or next(iter(losses))
    pick(losses, "PAIR_LOSS", pair_loss)
    if RATING:
        pick(RATINGS, "RATING", RATING)
        if HEAD != "attributes":
            stop(f"RATING = {RATING!r} is for HEAD = attributes: for {HEAD}, load the rows with that rating")
    if LABEL_SMOOTHING and HEAD == "attributes":
        stop(f"LABEL_SMOOTHING = {LABEL_SMOOTHING} has no effect with HEAD = attributes: set it to 0")
    if RATING_WEIGHT and HEAD != "distribution":
        stop(f"RATING_WEIGHT = {RATING_WEIGHT} needs HEAD = distribution: set it to 0, or change HEAD")
    return pair_loss


def load_rows(tokenizer: PreTrainedTokenizerBase, metadata: dict) -> dict[str, Dataset]:
    """Return the pairs of "train" and "validation"; for several epochs also "test", if there is one."""
    from utils.data.processed import HALVES, closed_answers, half, load_pairs

    splits = ["train", "validation"]
    if EPOCHS > 1 and metadata["test_size"]:  # validation selects the epoch, so test measures it
        splits.append("test")
    rows = {split: load_pairs(DATA_DIR, split, MAX_ROWS) for split in splits}
    if HALF:
        pick(HALVES, "HALF", HALF)
        rows["train"] = half(rows["train"], HALF)
    return {split: closed_answers(pairs, tokenizer) for split, pairs in rows.items()}


def new_head(rows: Dataset, rating: str, pair_loss: str) -> RewardHead:
    """Return a new head. Stop if the training rows lack the ratings or attributes that it needs."""
    from utils.data.processed import ratings_of
    from utils.models.reward_model import new_reward_head
    from utils.training.losses import NEED_RATINGS

    ratings, means = ratings_of(rows)
    if (pair_loss in NEED_RATINGS or RATING_WEIGHT) and len(ratings) < 2 * len(rows):
        stop(f"some rows have no ratings, which PAIR_LOSS = {pair_loss!r} or RATING_WEIGHT needs")
    if HEAD == "attributes" and means is None:
        stop("the rows have no attributes, which HEAD = attributes needs: load nvidia/HelpSteer2, or use scalar")
    return new_reward_head(HEAD, RATING or rating, ratings, means)


def build_trainer(
    model: nn.Module, head_rate: float, rows: dict, collator: PairCollator, head: RewardHead, run: Run
) -> PairTrainer:
    """Return the trainer. head_rate: learning rate of the head."""
    from utils.evaluation.predictions import pairs_right
    from utils.models.reward_model import RewardPairs
    from utils.training.losses import RewardPairLoss
    from utils.training.trainer import PairTrainer

    def accuracy(outputs: dict[str, np.ndarray], _: Dataset) -> dict[str, float]:
        return {"accuracy": float(pairs_right(outputs["outputs"], head).mean())}

    loss = RewardPairLoss(head, run.record["pair_loss"], LABEL_SMOOTHING, RATING_WEIGHT)
    return PairTrainer(RewardPairs(model), rows, collator, loss, run, accuracy, {"score": head_rate})


def predict(trainer: PairTrainer, rows: dict, tokenizer: PreTrainedTokenizerBase, head: RewardHead) -> tuple:
    """Return (lines of predictions.jsonl for the held-out pairs, weights of the surface features)."""
    from utils.evaluation import baselines, predictions
    from utils.models.reward_model import RewardPairs, random_head_model

    def outputs_of(pairs: Dataset, model: nn.Module | None = None) -> np.ndarray:
        return trainer.outputs_on(pairs, RewardPairs(model) if model else None)["outputs"]

    held_out = rows.get("test", rows["validation"])
    if HEAD == "attributes":  # the other heads learn the scale from their pairs
        predictions.fit_win_scale(head, rows["validation" if "test" in rows else "train"], outputs_of)
    weights = baselines.surface_weights(rows["train"])
    untrained = partial(random_head_model, MODEL, head, trainer.accelerator.device, SEED)
    return predictions.predict_pairs(
        outputs_of, held_out, tokenizer, head, weights, CONTROL_PAIRS, untrained
    ), weights.tolist()


@script
def main(settings: dict) -> None:
    # 1. check
    check(settings)
    pair_loss = check_head()
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from transformers import set_seed

    from utils.data.processed import matching_tokenizer, next_command
    from utils.evaluation import reward_report
    from utils.models import loading, policies, reward_model, shared_prompt
    from utils.training import trainer as training

    training.check_training(settings)
    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    # 2. load
    tokenizer, metadata = matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    rows = load_rows(tokenizer, metadata)
    head = new_head(rows["train"], metadata["rating"], pair_loss)
    set_seed(SEED)
    model = reward_model.start_model(MODEL, tokenizer, head)
    collator = shared_prompt.collator_for(tokenizer, device)
    shared_prompt.check_shared_rows(model, rows["train"][0], collator)
    # 3. build
    facts = {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"]}
    facts |= {"max_length": metadata["max_length"], "train_pairs": len(rows["train"]), "pair_loss": pair_loss}
    facts |= {"start": policies.weights_digest(model), "rows_per_step": BATCH_SIZE * ACCUMULATION * processes()}
    head_rate = LEARNING_RATE if model.score.weight.any() else HEAD_LEARNING_RATE or LEARNING_RATE
    model = loading.prepare_model(model, "SEQ_CLS", settings, head="score")
    run = Run(OUTPUT_DIR, settings, RESUME, device=str(device), precision=precision, **facts)
    trainer = build_trainer(model, head_rate, rows, collator, head, run)
    best = training.BestEpoch(trainer, run.folder) if EPOCHS > 1 else None
    say(f"{MODEL}: {loading.count_parameters(model)}, on {len(rows['train'])} pairs")
    # 4. train
    training.train(trainer, run)
    epochs = best.restore() if best else {}
    # 5. evaluate
    lines, weights = predict(trainer, rows, tokenizer, head)
    measured_on = "test" if "test" in rows else "validation"
    result = reward_report.report(lines) | {"measured_on": measured_on, "epochs": epochs}
    result["selection_shares_rows"] = bool(epochs) and measured_on == "validation"
    # 6. save
    if first_process():
        facts = {"max_length": metadata["max_length"], "surface_weights": weights}
        facts |= {name: result[name] for name in ("reward_mean", "reward_std")}
        reward_model.save_reward_model(model, tokenizer, run.folder, head, rows["train"], collator, **facts)
        reward_report.write_report(run.folder, result, lines, run.record)
    training.close(run, trainer.accelerator)
    # 7. print where it is and what to run next
    say(f"{reward_report.format_summary(result)}\nwritten: {run.folder}")
    say(f"next: python -m extras.make_report --runs {run.folder}    # the whole report as one page")
    policy = f"python train_dpo.py --reward_model {run.folder}"
    say(f"      {next_command(policy, DATA_DIR, MODEL, metadata['tokenizer'])}")


if __name__ == "__main__":
    main(override_constants(globals()))
