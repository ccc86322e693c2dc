"""Train a policy with REINFORCE: sample answers, score them with a reward model, reinforce those above a baseline.

Reads  : processed_helpsteer/ (prompts) and outputs/reward_model/ (made by train_reward_model.py)
Writes : outputs/reinforce/ (the model, eval.json, predictions.jsonl, samples.jsonl, metrics.jsonl, run.json, plots)

python train_reinforce.py
python train_reinforce.py --baseline leave_one_out --answers_per_prompt 4
python train_reinforce.py --max_steps 3 --eval_prompts 8    # a quick look; any constant below, in lower case
accelerate launch train_reinforce.py                       # on several GPUs
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Run
from utils.script import Interrupt, bar_off, check, first_process, needs, pick, processes, say, script, stop

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from utils.data.preferences import Message
    from utils.models.reward_model import RewardModel
    from utils.training.reinforce import Actor, Baseline, Engine, Sample, Scoring

# data
DATA_DIR = "processed_helpsteer"  # prompts, made by load_helpsteer_dataset.py
MAX_ROWS = 0  # use only the first MAX_ROWS prompts of train, 0 = all
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder: start of the policy, reference of the KL
REWARD_MODEL = "outputs/reward_model"  # run folder of train_reward_model.py, or hub name of a reward model
USE_LORA = False  # train low-rank adapters instead of all weights
LORA_RANK = 16  # rank of the adapters
LORA_ALPHA = 32  # adapters are scaled by alpha / rank
LORA_DROPOUT = 0.0  # on the input of the adapters; above 0, log-probs in sampling and training differ
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers with adapters
GRADIENT_CHECKPOINTING = False  # recompute activations: less memory, slower
# rollout
BATCH_SIZE = 4  # prompts per step, over all devices
ANSWERS_PER_PROMPT = 1  # answers to each prompt
MAX_NEW_TOKENS = 50  # length limit of an answer
TEMPERATURE = 1.0  # of sampling and log-probs
GENERATION_BATCH = 16  # answers sampled at once, per device
# reward
KL_BETA = 0.05  # weight of log pi - log ref of an answer, subtracted from its reward
RISK = 0.0  # reward = expected grade - RISK x spread, for a reward model with a distribution
CUT_PENALTY = 0.0  # subtracted from the reward of an answer cut at MAX_NEW_TOKENS
# algorithm
BASELINE = "moving_average"  # moving_average | running_mean | leave_one_out | none
BASELINE_DECAY = 0.9  # share of the past in the moving average
ADVANTAGE_NORM = "none"  # none | std: divide by the root mean square of the advantages of a step
MAX_STEPS = 30  # optimizer steps
LEARNING_RATE = 1e-5  # peak learning rate
SCHEDULE = "constant"  # cosine | linear | constant
WARMUP_SHARE = 0.0  # share of the steps in which the rate rises from 0
KL_LIMIT = 50.0  # nats per answer; above it the run saves and stops, 0 = no limit
SEED = 42  # of the order of prompts and the samples
DEVICE = ""  # cuda | mps | cpu, "" = best available
PRECISION = ""  # fp32 | bf16 | fp16, "" = by device
# evaluation
EVAL_PROMPTS = 64  # validation prompts to answer before and after training, 0 = all
JUDGE_MODEL = ""  # a second reward model that the policy is not trained on, "" = none
# output
OUTPUT_DIR = "outputs/reinforce"  # run folder
SAVE_EVERY_STEPS = 10  # steps between checkpoints, 0 = none
RESUME = True  # resume an unfinished run with the same settings
REPORT_TO = "none"  # none | tensorboard | trackio | wandb


def rollout(actor: Actor, prompts: dict[int, list[Message]]) -> list[Sample]:
    """Sample one answer to each of `prompts` {number of the answer: messages}.

    The number of an answer and SEED fix its random numbers. Log-probs come from a separate pass without gradient.
    """
    from utils.models.generation import generate, logps_and_entropies_of, logps_of
    from utils.training.reinforce import Sample

    asked, numbers, precision = actor.prompts(list(prompts.values())), list(prompts), actor.precision
    how = {"batch_size": GENERATION_BATCH, "precision": precision, "numbers": numbers}
    answers = generate(actor.model, actor.tokenizer, asked, MAX_NEW_TOKENS, TEMPERATURE, SEED, **how)
    logps, entropies = logps_and_entropies_of(actor.model, answers, TEMPERATURE, precision)
    with actor.as_reference() as reference:
        references = logps_of(reference, answers, TEMPERATURE, precision)
    figures = zip(logps.tolist(), references.tolist(), entropies.tolist(), strict=True)
    return [Sample(*fields, *of) for *fields, of in zip(numbers, prompts.values(), answers, figures, strict=True)]


def rewards(samples: list[Sample], scoring: Scoring) -> None:
    """Set the reward of each sample."""
    scores = scoring([sample.prompt for sample in samples], [sample.answer for sample in samples])
    for sample, score in zip(samples, scores.tolist(), strict=True):
        sample.reward = score


def advantages(samples: list[Sample], baseline: Baseline) -> torch.Tensor:
    """Return A [answers] = reward - KL_BETA (log pi - log ref) - baseline, for all answers of all processes."""
    import torch

    from utils.training.reinforce import normalised

    returns = torch.tensor([sample.reward - KL_BETA * sample.kl for sample in samples])
    return normalised(baseline.advantages(returns, ANSWERS_PER_PROMPT), ADVANTAGE_NORM)


def update(engine: Engine, samples: list[Sample], weights: list[float]) -> tuple[float, float]:
    """Take one step on the loss -mean(A log pi) over all answers. Return the loss and the gradient norm.

    samples: those of this process. weights: their advantages. The loss is not divided by the length of an answer:
    a long bad answer would be pushed away less than a short one.
    """
    loss = 0.0
    for advantage, batch in engine.batches([sample.answer for sample in samples], weights):
        share = -(advantage * engine.policy(**batch)).sum() / len(samples)
        engine.accelerator.backward(share)
        loss = loss + share.detach()
    return engine.accelerator.reduce(loss, reduction="mean").item(), engine.step()


def train_policy(run: Run, engine: Engine, actor: Actor, baseline: Baseline, prompts: list, scoring: Scoring) -> None:
    """Take the remaining steps of `run` up to MAX_STEPS. prompts: the messages of each training row."""
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from utils.training import reinforce

    first, answers = engine.resume(run, baseline), BATCH_SIZE * ANSWERS_PER_PROMPT
    own = engine.own_share(answers)
    bar = tqdm(range(first, MAX_STEPS), "training", MAX_STEPS, initial=first, disable=bar_off())
    with Interrupt() as interrupt:
        for step in bar:
            began = time.monotonic()
            numbers = range(step * answers, (step + 1) * answers)[own]
            chosen = {n: prompts[reinforce.prompt_of(n, ANSWERS_PER_PROMPT, len(prompts), SEED)] for n in numbers}
            samples = rollout(actor, chosen)
            rewards(samples, scoring)
            everyone = gather_object(samples)
            weights = advantages(everyone, baseline)
            loss, norm = update(engine, samples, weights[own].tolist())
            metrics = reinforce.step_metrics(everyone, weights, baseline, loss, norm, time.monotonic() - began)
            engine.log(run, step, metrics, everyone[0], weights[0].item())
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "kl")})
            due = SAVE_EVERY_STEPS > 0 and ((step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == MAX_STEPS)
            alarm = reinforce.divergence_alarm(metrics, KL_LIMIT)
            engine.save_or_stop(run, step + 1, baseline, due, alarm, interrupt.asked)
    run.note(baseline=baseline.value)


def check_algorithm() -> None:
    """Stop if the constants of the algorithm contradict each other."""
    if MAX_STEPS < 1 or MAX_NEW_TOKENS < 2:
        stop(f"MAX_STEPS = {MAX_STEPS}, MAX_NEW_TOKENS = {MAX_NEW_TOKENS}: expected at least 1 step and 2 tokens")
    if TEMPERATURE <= 0:
        stop(f"TEMPERATURE = {TEMPERATURE}: expected more than 0: REINFORCE learns from sampled answers")
    if BATCH_SIZE * ANSWERS_PER_PROMPT % processes():
        stop(f"BATCH_SIZE x ANSWERS_PER_PROMPT must be a multiple of the {processes()} processes")
    if BASELINE == "leave_one_out" and ANSWERS_PER_PROMPT < 2:
        stop("BASELINE = 'leave_one_out' compares the answers to one prompt: set ANSWERS_PER_PROMPT to 2 or more")


def compare_answers(actor: Actor, rows: Dataset, judges: dict[str, RewardModel]) -> tuple[list[dict], dict]:
    """Answer the prompts of `rows` before and after training. Return the answers and the content of eval.json."""
    from utils.evaluation.policy_report import Sampler, compare_before_and_after
    from utils.models.loading import load_causal

    start = load_causal(MODEL).to(actor.model.device) if USE_LORA else actor.reference
    limits = MAX_NEW_TOKENS, TEMPERATURE, SEED, actor.precision, GENERATION_BATCH
    sampler = Sampler(actor.tokenizer, actor.window, *limits)
    lines, result = compare_before_and_after(start, actor.model, rows, sampler, judges)
    return lines, result | result.pop("reward")


@script
def main(settings: dict) -> None:
    # 1. check
    check(settings)
    check_algorithm()
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from transformers import set_seed

    from utils.data.processed import load_pairs, matching_tokenizer, unique_prompts
    from utils.evaluation import policy_report
    from utils.models import loading, policies, reward_model, shared_prompt
    from utils.training import reinforce, trainer

    trainer.check_training(settings)
    pick(reinforce.BASELINES, "BASELINE", BASELINE)
    pick(reinforce.NORMS, "ADVANTAGE_NORM", ADVANTAGE_NORM)
    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION, deepspeed=False)
    judges = reward_model.load_judges(REWARD_MODEL, JUDGE_MODEL, DEVICE, precision)
    scorer = judges["reward"]
    reinforce.check_risk(scorer.head, RISK, REWARD_MODEL)
    # 2. load
    tokenizer, metadata = matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    rows = load_pairs(DATA_DIR, "train", MAX_ROWS)
    held_out = unique_prompts(load_pairs(DATA_DIR, "validation"), EVAL_PROMPTS)
    set_seed(SEED)
    model = loading.without_dropout(loading.load_causal(MODEL))
    policies.check_architecture(model, rows)
    # 3. build
    model = loading.prepare_model(model, "CAUSAL_LM", settings)
    reference = policies.reference_of(model, trained=True)
    facts = {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"]}
    facts |= {"train_prompts": len(rows), "reward_head": scorer.head.kind}
    facts |= {"start": policies.weights_digest(model), "reward_weights": policies.weights_digest(scorer.model)}
    run = Run(OUTPUT_DIR, settings, RESUME, device=str(device), precision=precision, **facts)
    engine = reinforce.start_engine(reinforce.Policy(model, TEMPERATURE), run)
    actor = reinforce.Actor(model, reference, tokenizer, metadata["max_length"], precision)
    baseline, scoring = reinforce.Baseline(BASELINE, BASELINE_DECAY), reinforce.Scoring(scorer, RISK, CUT_PENALTY)
    say(f"{MODEL}: {loading.count_parameters(model)}, on {len(rows)} prompts; {len(held_out)} held out for evaluation")
    # 4. train
    train_policy(run, engine, actor, baseline, [messages[:-1] for messages in rows["chosen"]], scoring)
    result = {}
    if first_process():
        # 5. evaluate
        lines, result = compare_answers(actor, held_out, judges)
        # 6. save
        policies.save_policy(model, tokenizer, run.folder, rows, shared_prompt.collator_for(tokenizer, device))
        policy_report.write_reinforce_report(run.folder, result, lines, run.record)
    trainer.close(run, engine.accelerator)
    engine.accelerator.end_training()  # closes trackers and the process group
    # 7. print where it is and what to run next
    say(f"{policy_report.format_summary(result)}\nwritten: {run.folder}")
    say(f"next: python -m extras.make_report --runs {run.folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
