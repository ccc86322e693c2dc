"""Train a policy on preference pairs with DPO or a related loss, optionally guided by a preference in the prompt.

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
from utils.runs import MODES, Run, run_names, short_model
from utils.script import check, first_process, needs, pick, processes, say, script, stop

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from utils.models.guidance import Guidance
    from utils.models.policies import PolicyPairs
    from utils.models.shared_prompt import PairCollator
    from utils.training.losses import PolicyLoss
    from utils.training.trainer import PairTrainer

# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
MAX_ROWS = 0  # use only the first MAX_ROWS rows of train and of validation, 0 = all
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder; its start is also the reference
MODEL_SHORT_NAME = ""  # for the name of the run, "" = from MODEL
TRAIN_POLICY = True  # False: train only the vectors of GUIDANCE = embedding
USE_LORA = False  # train low-rank adapters instead of all weights
LORA_RANK = 16  # rank of the adapters
LORA_ALPHA = 32  # adapters are scaled by alpha / rank
LORA_DROPOUT = 0.05  # on the input of the adapters
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers with adapters
GRADIENT_CHECKPOINTING = False  # recompute activations: less memory, slower
# loss
LOSS = "dpo"  # dpo | ipo | hinge | sipa | orpo | simpo | new_pref_po
BETA = 0.0  # meaning and default (0) depend on LOSS, see POLICY_LOSSES in utils/training/losses.py
LABEL_SMOOTHING = 0.0  # assumed share of wrong labels; dpo, sipa, simpo
GAMMA = 0.5  # target margin of simpo
ALPHA = 0.1  # weight of the pull to the guided margin in new_pref_po
LAMBDA_KL = 0.1  # weight of the two KL terms in new_pref_po
SFT_WEIGHT = 0.0  # weight of the NLL per chosen token, added to any loss
REFERENCE_CACHE = "outputs/reference_cache"  # folder for the log-probs of the reference, "" = compute them in each step
# guidance
GUIDANCE = "none"  # none | text | embedding: add a preference to the last user turn
PREFERENCE_TEXT = "Please provide a helpful, honest, harmless, and concise response."  # text, or start of vectors
PROMPT_EMBEDDING_PATH = ""  # .pt or .safetensors with fixed vectors [n, hidden], "" = train new ones
PROMPT_LEARNING_RATE = 1e-3  # learning rate of the trained vectors
# training
EPOCHS = 1  # passes over the training rows
MAX_STEPS = 0  # optimizer steps, 0 = by EPOCHS
BATCH_SIZE = 4  # pairs per batch on each device
ACCUMULATION = 1  # batches per optimizer step
LEARNING_RATE = 1e-5  # peak learning rate
SCHEDULE = "cosine"  # cosine | linear | constant
WARMUP_SHARE = 0.1  # share of the steps in which the rate rises from 0
SEED = 42  # of new adapters, the order of rows, and the samples
DEVICE = ""  # cuda | mps | cpu, "" = best available
PRECISION = ""  # fp32 | bf16 | fp16, "" = by device
# evaluation
SAMPLE_PROMPTS = 16  # validation prompts to answer before and after training, 0 = none
MAX_NEW_TOKENS = 100  # length limit of an answer
TEMPERATURE = 0.7  # of sampling
REWARD_MODEL = ""  # scores these answers: a run folder or a hub reward model, "" = none
# output
OUTPUT_DIR = ""  # run folder, "" = model_output/{project}/{run}
LOG_EVERY_STEPS = 10  # steps between lines of metrics.jsonl
EVAL_EVERY_STEPS = 0  # steps between evaluations on validation, 0 = only at the end
SAVE_EVERY_STEPS = 200  # steps between checkpoints, 0 = none
RESUME = True  # resume an unfinished run with the same settings
REPORT_TO = "none"  # none | tensorboard | trackio | wandb


def check_loss(loss: PolicyLoss) -> None:
    """Stop if constants contradict each other or LOSS."""
    pick(MODES, "GUIDANCE", GUIDANCE)
    if LOSS == "new_pref_po" and GUIDANCE == "none":
        stop("LOSS = 'new_pref_po' needs a preference in the prompt: set GUIDANCE = text or embedding")
    if LABEL_SMOOTHING and "LABEL_SMOOTHING" not in loss.uses:
        stop(f"LABEL_SMOOTHING = {LABEL_SMOOTHING} has no effect with LOSS = {LOSS!r}: set it to 0")
    if PROMPT_EMBEDDING_PATH and GUIDANCE != "embedding":
        stop("PROMPT_EMBEDDING_PATH needs GUIDANCE = embedding: set that, or remove the path")
    if not TRAIN_POLICY and (GUIDANCE != "embedding" or PROMPT_EMBEDDING_PATH or USE_LORA):
        stop("TRAIN_POLICY = False trains the vectors only: set GUIDANCE = embedding, no path, and USE_LORA = False")


def load_preference(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Guidance:
    """Return the preference for the prompts: none, a text, or vectors from a file or from the text."""
    from utils.models import guidance

    if GUIDANCE != "embedding":
        return guidance.text_guidance(PREFERENCE_TEXT) if GUIDANCE == "text" else guidance.Guidance()
    if PROMPT_EMBEDDING_PATH:
        vectors = guidance.load_vectors(PROMPT_EMBEDDING_PATH, model.config.hidden_size)
        return guidance.vector_guidance(tokenizer, vectors)
    return guidance.vector_guidance(tokenizer, guidance.start_vectors(model, tokenizer, PREFERENCE_TEXT))


def load_rows(tokenizer: PreTrainedTokenizerBase, preference: Guidance, window: int) -> dict:
    """Return the pairs of "train" and "validation", with the preference in their prompts."""
    from utils.data.processed import load_pairs
    from utils.models import guidance

    rows = {split: load_pairs(DATA_DIR, split, MAX_ROWS) for split in ("train", "validation")}
    if GUIDANCE == "none":
        return rows
    rows = {split: guidance.with_room(tokenizer, preference, window, pairs) for split, pairs in rows.items()}
    rewrite = partial(guidance.guided_rows, both=LOSS == "new_pref_po")
    return {split: rewrite(pairs, tokenizer, window, preference) for split, pairs in rows.items()}


def start_run(settings: dict, metadata: dict, loss: PolicyLoss, **facts: object) -> Run:
    """Open the run folder, named after the data, GUIDANCE, MODEL, LOSS, beta and ALPHA."""
    beta, model = BETA or loss.beta, MODEL_SHORT_NAME or short_model(MODEL)
    say(f"LOSS = {LOSS!r}, BETA = {beta}: {loss.beta_is}")
    project, name = run_names(metadata["dataset_name"], MODES[GUIDANCE], model, LOSS, beta, ALPHA)
    facts |= {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"], "beta": beta}
    facts |= {"max_length": metadata["max_length"], "project": project, "run_name": name}
    return Run(OUTPUT_DIR or f"model_output/{project}/{name}", settings, RESUME, **facts)


def build_policy(model: nn.Module, preference: Guidance, loss: PolicyLoss, settings: dict) -> PolicyPairs:
    """Return the policy with its adapters, its vectors and, without a cache, its reference."""
    from utils.models import loading, policies

    model = loading.prepare_model(model if TRAIN_POLICY else model.requires_grad_(False), "CAUSAL_LM", settings)
    reference = policies.reference_of(model, TRAIN_POLICY) if loss.reference and not REFERENCE_CACHE else None
    return policies.PolicyPairs(model, preference.vectors, not PROMPT_EMBEDDING_PATH, reference)


def build_trainer(policy: PolicyPairs, rows: dict, collator: PairCollator, loss: PolicyLoss, run: Run) -> PairTrainer:
    """Return the trainer for the policy on the pairs of `rows`."""
    from utils.evaluation.policy_report import pair_metrics
    from utils.training.losses import LossConstants, PolicyPairLoss
    from utils.training.trainer import PairTrainer, last_checkpoint

    constants = LossConstants(run.record["beta"], LABEL_SMOOTHING, GAMMA, ALPHA, LAMBDA_KL)
    precision, fresh = run.record["precision"], last_checkpoint(run.folder) is None
    pair_loss = PolicyPairLoss(policy, loss, constants, SFT_WEIGHT, precision, fresh)
    metrics, rates = partial(pair_metrics, loss=pair_loss), {"vectors": PROMPT_LEARNING_RATE}
    return PairTrainer(policy, rows, collator, pair_loss, run, metrics, rates)


def sample_answers(trainer: PairTrainer, added: Guidance, tokenizer: PreTrainedTokenizerBase, judges: dict) -> tuple:
    """Answer SAMPLE_PROMPTS validation prompts before and after training. Return the answers and their metrics."""
    from utils.data.processed import unique_prompts
    from utils.evaluation.policy_report import Sampler, compare_before_and_after
    from utils.models.loading import load_causal

    policy, record, start = trainer.model, trainer.run.record, load_causal(MODEL).to(trainer.accelerator.device)
    sampler = Sampler(tokenizer, record["max_length"], MAX_NEW_TOKENS, TEMPERATURE, SEED, record["precision"])
    guidances = added, added.with_vectors(policy.vectors)
    if LOSS == "new_pref_po":  # it learns to answer plain prompts
        guidances = type(added)(), type(added)()
    rows = unique_prompts(trainer.validation, SAMPLE_PROMPTS)
    samples, metrics = compare_before_and_after(start, policy.model, rows, sampler, judges, guidances)
    if judges:
        metrics["comparison"] = metrics.pop("reward")
    return samples, metrics


@script
def main(settings: dict) -> None:
    # 1. check
    check(settings)
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from transformers import set_seed

    from utils.data.processed import matching_tokenizer
    from utils.evaluation import policy_report
    from utils.models import guidance, loading, policies, reward_model, shared_prompt
    from utils.training import trainer as training
    from utils.training.losses import POLICY_LOSSES

    loss = pick(POLICY_LOSSES, "LOSS", LOSS)
    check_loss(loss)
    training.check_training(settings)
    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    judges = reward_model.load_judges(REWARD_MODEL, "", DEVICE, precision) if REWARD_MODEL else {}
    # 2. load
    tokenizer, metadata = matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    set_seed(SEED)
    model = loading.without_dropout(loading.load_causal(MODEL))
    preference = load_preference(model, tokenizer)
    rows = load_rows(tokenizer, preference, metadata["max_length"])
    collator = shared_prompt.collator_for(tokenizer, device)
    policies.check_architecture(model, rows["train"])
    shared_prompt.check_shared_rows(model, rows["train"][0], collator)
    # 3. build
    weights = policies.weights_digest(model)
    start = policies.cache_key(rows["train"], preference.vectors, weights, "")  # independent of the precision
    policy = build_policy(model, preference, loss, settings).to(device)
    facts = {"start": start, "train_pairs": len(rows["train"]), "device": str(device), "precision": precision}
    facts["rows_per_step"] = BATCH_SIZE * ACCUMULATION * processes()
    run = start_run(settings, metadata, loss, **facts)
    trainer = build_trainer(policy, rows, collator, loss, run)
    if loss.reference and REFERENCE_CACHE:
        training.cache_reference(trainer, REFERENCE_CACHE, weights)
    say(f"{MODEL}: {loading.count_parameters(policy)}, on {len(rows['train'])} pairs")
    # 4. train
    training.train(trainer, run)
    # 5. evaluate
    result, samples = trainer.validate(), []
    if SAMPLE_PROMPTS and first_process():
        samples, metrics = sample_answers(trainer, preference, tokenizer, judges)
        result |= metrics
    # 6. save
    if first_process():
        if policy.trains_vectors:
            guidance.save_vectors(policy.vectors, run.folder)
        policies.save_policy(policy.model, tokenizer, run.folder, rows["train"], collator)
        policy_report.write_dpo_report(run.folder, result, samples, run.record)
    training.close(run, trainer.accelerator)
    # 7. print where it is and what to run next
    say(f"{policy_report.format_summary(result)}\nwritten: {run.folder}")
    say(f"next: python -m extras.make_report --runs {run.folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
