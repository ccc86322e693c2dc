"""Train a policy on the pairs of step 1 with DPO or one of its kin, plain or guided by a preference in the prompt.

Reads  : processed_helpsteer/ (made by load_helpsteer_dataset.py)
Writes : model_output/{project}/{run}/ (the model, eval.json, samples.jsonl, metrics.jsonl, run.json, plots, README.md)

python train_dpo.py
python train_dpo.py --loss sipa --use_lora --learning_rate 1e-4
python train_dpo.py --loss new_pref_po --guidance text
python train_dpo.py --max_rows 32 --max_steps 4    # a quick look; any constant below, in lower case
accelerate launch train_dpo.py                    # on several GPUs
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Run
from utils.script import at_least, first_process, needs, pick, processes, say, script, shares, stop

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from utils.models.guidance import Guidance

# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
MAX_ROWS = 0  # use the first so many rows of train and of validation only, 0 = all of them
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder; also the reference, as it is at the start
MODEL_SHORT_NAME = ""  # in the name of the run, "" = made of MODEL
TRAIN_POLICY = True  # False: train the vectors of GUIDANCE = embedding only
USE_LORA = False  # train low-rank adapters instead of all weights
LORA_RANK = 16  # of the adapters
LORA_ALPHA = 32  # adapters count alpha / rank
LORA_DROPOUT = 0.05  # on the input of the adapters
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers that get one
GRADIENT_CHECKPOINTING = False  # compute activations twice: slower, for long windows in little memory
# loss
LOSS = "dpo"  # dpo | ipo | hinge | sipa | orpo | simpo | new_pref_po
BETA = 0.0  # what it means is up to LOSS, see POLICY_LOSSES in utils/losses.py; 0 = the loss's own default
LABEL_SMOOTHING = 0.0  # assumed share of wrong labels; dpo, sipa, simpo
GAMMA = 0.5  # margin that simpo aims at
ALPHA = 0.1  # weight of the pull to the guided margin in new_pref_po
LAMBDA_KL = 0.1  # weight of the two KL terms in new_pref_po
SFT_WEIGHT = 0.0  # of the NLL of a chosen token, beside any loss
REFERENCE_CACHE = "outputs/reference_cache"  # folder for the reference's log-probs, "" = compute them in each step
# guidance
GUIDANCE = "none"  # none | text | embedding: a preference at the end of the last user turn
PREFERENCE_TEXT = "Please provide a helpful, honest, harmless, and concise response."  # said, or start of the vectors
PROMPT_EMBEDDING_PATH = ""  # .pt or .safetensors with vectors [n, hidden], which stay as they are; "" = train new ones
PROMPT_EMBEDDING_TOKENS = 0  # number of trained vectors, 0 = as many as PREFERENCE_TEXT has tokens
PROMPT_LEARNING_RATE = 1e-3  # of the trained vectors
# training
EPOCHS = 1  # passes over the training rows
MAX_STEPS = 0  # optimizer steps, 0 = as many as EPOCHS make
BATCH_SIZE = 4  # pairs in memory at once
ACCUMULATION = 1  # batches per optimizer step
LEARNING_RATE = 1e-5  # learning rate at its highest, after the warm-up
SCHEDULE = "cosine"  # cosine | linear | constant
WARMUP_SHARE = 0.1  # of the steps, in which the rate grows from 0
WEIGHT_DECAY = 0.0  # of AdamW
SEED = 42  # of the adapters' start, the order of rows, and the samples
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# evaluation
SAMPLE_PROMPTS = 16  # prompts of validation that are answered before and after, 0 = none
MAX_NEW_TOKENS = 100  # of each answer
TEMPERATURE = 0.7  # of the answers
REWARD_MODEL = ""  # judges the answers before and after: a run folder or a hub reward model, "" = none
# output
OUTPUT_DIR = ""  # the run folder, "" = model_output/{project}/{run}
LOG_EVERY_STEPS = 10  # a line of metrics.jsonl
EVAL_EVERY_STEPS = 0  # pair accuracy on validation while training, 0 = at the end only
SAVE_EVERY_STEPS = 200  # a checkpoint to go on from, 0 = none
RESUME = True  # go on with an unfinished run of the same settings
REPORT_TO = "none"  # none | tensorboard | trackio | wandb


def check_loss(name: str, guidance: str, train_policy: bool, path: str, smoothing: float) -> None:
    """Stop the script if constants contradict each other, or if one that changes the loss would be ignored."""
    from utils.training.losses import POLICY_LOSSES

    if name == "new_pref_po" and guidance == "none":
        stop("LOSS = 'new_pref_po' learns from a preference in the prompt: set GUIDANCE = text or embedding")
    if not 0 <= smoothing < 0.5:
        stop(f"LABEL_SMOOTHING = {smoothing}: expected a share from 0 to below 0.5")
    if smoothing and "LABEL_SMOOTHING" not in POLICY_LOSSES[name].uses:
        users = ", ".join(other for other, it in POLICY_LOSSES.items() if "LABEL_SMOOTHING" in it.uses)
        stop(f"LABEL_SMOOTHING = {smoothing} is for {users}, not for LOSS = {name!r}: set it to 0")
    if not train_policy and (guidance != "embedding" or path):
        stop("TRAIN_POLICY = False leaves nothing to train: set GUIDANCE = embedding without PROMPT_EMBEDDING_PATH")
    if path and guidance != "embedding":
        stop("PROMPT_EMBEDDING_PATH is for GUIDANCE = embedding: set that, or leave the path out")


def start_guidance(
    kind: str, text: str, path: str, count: int, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> Guidance:
    """The preference as GUIDANCE wants it: nothing, a text, or vectors that are loaded or start from the text."""
    from utils.models import guidance

    if kind == "none":
        return guidance.Guidance()
    if kind == "text":
        return guidance.text_guidance(text)
    if path:
        return guidance.vector_guidance(tokenizer, guidance.load_vectors(path, model.config.hidden_size))
    return guidance.vector_guidance(tokenizer, guidance.start_vectors(model, tokenizer, text, count))


@script
def main(settings: dict) -> None:
    # 1. check
    at_least(1, BATCH_SIZE=BATCH_SIZE, ACCUMULATION=ACCUMULATION, LORA_RANK=LORA_RANK, LOG_EVERY_STEPS=LOG_EVERY_STEPS)
    at_least(0, MAX_ROWS=MAX_ROWS, MAX_STEPS=MAX_STEPS, EPOCHS=EPOCHS, SEED=SEED)
    at_least(0, LEARNING_RATE=LEARNING_RATE, WEIGHT_DECAY=WEIGHT_DECAY, BETA=BETA, SFT_WEIGHT=SFT_WEIGHT)
    shares(WARMUP_SHARE=WARMUP_SHARE, LORA_DROPOUT=LORA_DROPOUT)
    at_least(0, SAMPLE_PROMPTS=SAMPLE_PROMPTS, TEMPERATURE=TEMPERATURE, PROMPT_EMBEDDING_TOKENS=PROMPT_EMBEDDING_TOKENS)
    at_least(1, MAX_NEW_TOKENS=MAX_NEW_TOKENS)
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from transformers import TrainingArguments, set_seed

    from utils import runs
    from utils.data import processed
    from utils.evaluation import policy_report
    from utils.models import guidance, loading, policies, reward_model, shared_prompt
    from utils.training import losses
    from utils.training import trainer as training
    from utils.training.losses import POLICY_LOSSES, Knobs

    loss, mode = pick(POLICY_LOSSES, "LOSS", LOSS), pick(runs.MODES, "GUIDANCE", GUIDANCE)
    check_loss(LOSS, GUIDANCE, TRAIN_POLICY, PROMPT_EMBEDDING_PATH, LABEL_SMOOTHING)
    schedule = pick(training.SCHEDULES, "SCHEDULE", SCHEDULE)
    training.check_tracker(REPORT_TO)
    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    judges = reward_model.load_judges(REWARD_MODEL, "", DEVICE, precision) if REWARD_MODEL else {}
    # 2. load
    tokenizer, metadata = processed.matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    window, both = metadata["max_length"], LOSS == "new_pref_po"
    set_seed(SEED)
    model = loading.without_dropout(loading.load_causal(MODEL))
    said = start_guidance(GUIDANCE, PREFERENCE_TEXT, PROMPT_EMBEDDING_PATH, PROMPT_EMBEDDING_TOKENS, model, tokenizer)
    rows, validation = (processed.load_pairs(DATA_DIR, split, MAX_ROWS) for split in ("train", "validation"))
    if GUIDANCE != "none":
        rows, validation = (guidance.with_room(tokenizer, said, window, some) for some in (rows, validation))
        rows, validation = (guidance.guided_rows(some, tokenizer, window, said, both) for some in (rows, validation))
    weights = policies.weights_digest(model)
    keys = [policies.cache_key(some, said.vectors, weights, precision) for some in (rows, validation)]
    policies.check_architecture(model, rows)
    collator = shared_prompt.PairCollator(tokenizer.pad_token_id, shared_prompt.row_multiple(device))
    shared_prompt.check_shared_rows(model, rows[0], collator)
    if USE_LORA and TRAIN_POLICY:
        model = loading.add_lora(model, "CAUSAL_LM", LORA_RANK, LORA_ALPHA, LORA_DROPOUT, LORA_TARGETS)
    if not TRAIN_POLICY:
        model.requires_grad_(False)
    if GRADIENT_CHECKPOINTING:
        loading.use_gradient_checkpointing(model)
    say(f"{MODEL}: {loading.count_parameters(model)}, on {len(rows)} pairs, {len(validation)} for validation")
    # 3. build
    beta = BETA or loss.beta
    say(f"LOSS = {LOSS!r}, BETA = {beta}: {loss.beta_is}")
    project, name = runs.run_names(
        metadata["dataset_name"], mode, MODEL_SHORT_NAME or runs.short_model(MODEL), LOSS, beta, ALPHA
    )
    facts = {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"], "beta": beta}
    facts |= {"max_length": window, "train_pairs": len(rows), "project": project, "run_name": name}
    facts["start"] = policies.cache_key(rows, said.vectors, weights, "")  # in any precision, as on another GPU
    facts["rows_per_step"] = BATCH_SIZE * ACCUMULATION * processes()
    facts |= {"device": str(device), "precision": precision}
    run = Run(OUTPUT_DIR or f"model_output/{project}/{name}", settings, RESUME, **facts)
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
        project=project,
        run_name=name,
        seed=SEED,
    )
    trains_vectors = said.vectors is not None and not PROMPT_EMBEDDING_PATH
    on_the_fly = loss.reference and not REFERENCE_CACHE
    reference = policies.reference_of(model, TRAIN_POLICY) if on_the_fly else None
    module = policies.PolicyPairs(model, said.vectors, trains_vectors, reference)
    knobs = Knobs(beta, LABEL_SMOOTHING, GAMMA, ALPHA, LAMBDA_KL)
    fresh = training.last_checkpoint(run.folder) is None
    pair_loss = losses.PolicyPairLoss(module, loss, knobs, SFT_WEIGHT, precision, fresh)

    def figures() -> dict:
        outputs = shared_prompt.forward_pairs(
            trainer.model_wrapped, validation, collator, 2 * BATCH_SIZE, trainer.accelerator
        )
        return policy_report.pair_figures(outputs, validation, pair_loss)

    rates = {"vectors": PROMPT_LEARNING_RATE}
    trainer = training.PairTrainer(module, args, rows, collator, pair_loss, run, figures, rates)
    if loss.reference and REFERENCE_CACHE:
        where = {"accelerator": trainer.accelerator, "cache": REFERENCE_CACHE, "batch_size": 2 * BATCH_SIZE}
        keep = partial(policies.add_reference_logps, module=module.to(device), collator=collator, **where)
        validation, trainer.train_dataset = keep(validation, key=keys[1]), keep(rows, key=keys[0])
    # 4. train
    training.train(trainer, run)
    # 5. evaluate
    result = figures()
    # 6. save
    if first_process():
        samples = []
        if SAMPLE_PROMPTS:
            start = loading.load_causal(MODEL).to(device)
            spoken = (guidance.Guidance(),) * 2 if both else (said, said.with_vectors(module.vectors))
            few = processed.unique_prompts(validation, SAMPLE_PROMPTS)
            sampler = policy_report.Sampler(tokenizer, window, MAX_NEW_TOKENS, TEMPERATURE, SEED, precision)
            samples, compared = policy_report.compare_before_and_after(start, model, few, sampler, judges, spoken)
            if judges:
                compared["comparison"] = compared.pop("reward")
            result |= compared
        if trains_vectors:
            guidance.save_vectors(module.vectors, run.folder)
        policy_report.save_policy(model, tokenizer, run.folder, rows, collator)
        policy_report.write_pair_results(run.folder, result, samples, run.record)
    training.close(run, trainer.accelerator)
    # 7. say where it is
    say(policy_report.format_summary(result))
    say(f"written: {run.folder}")
    say(f"next: python -m extras.make_report --runs {run.folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
