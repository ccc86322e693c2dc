"""Train a policy with REINFORCE against a reward model: it answers, is scored, and does more of what beat a baseline.

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
DATA_DIR = "processed_helpsteer"  # its prompts, made by load_helpsteer_dataset.py
MAX_ROWS = 0  # use the first so many prompts of train only, 0 = all of them
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder: the start, and the reference of the KL
REWARD_MODEL = "outputs/reward_model"  # run folder of train_reward_model.py, or a hub reward model with one output
USE_LORA = False  # train low-rank adapters instead of all weights
LORA_RANK = 16  # of the adapters
LORA_ALPHA = 32  # adapters count alpha / rank
LORA_DROPOUT = 0.0  # on the input of the adapters; above 0 the log-probs of sampling and training differ
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers that get one
GRADIENT_CHECKPOINTING = False  # compute activations twice: slower, for long windows in little memory
# rollout
BATCH_SIZE = 4  # prompts a step, on all devices together
ANSWERS_PER_PROMPT = 1  # answers to each of them
MAX_NEW_TOKENS = 50  # of an answer
TEMPERATURE = 1.0  # of the sampling and of the log-probs
GENERATION_BATCH = 16  # answers that are sampled at once, on each device
# reward
KL_BETA = 0.05  # of log pi - log ref of an answer, taken off its reward
RISK = 0.0  # expected grade minus RISK x spread, for a reward model with a distribution
CUT_PENALTY = 0.0  # taken off the reward of an answer that was cut at MAX_NEW_TOKENS
# algorithm
BASELINE = "moving_average"  # moving_average | running_mean | leave_one_out | none
BASELINE_DECAY = 0.9  # share of the past in the moving average
ADVANTAGE_NORM = "none"  # none | std: divide by the size (root mean square) of the step's advantages
MAX_STEPS = 30  # optimizer steps
LEARNING_RATE = 1e-5  # learning rate at its highest, after the warm-up
SCHEDULE = "constant"  # cosine | linear | constant
WARMUP_SHARE = 0.0  # of the steps, in which the rate grows from 0
WEIGHT_DECAY = 0.0  # of AdamW
MAX_GRAD_NORM = 1.0  # longer gradients are cut to this length, 0 = never
KL_LIMIT = 50.0  # mean nats an answer above which the run saves its state and stops, 0 = never
SEED = 42  # of the order of prompts and of the samples
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# evaluation
EVAL_PROMPTS = 64  # prompts of validation that are answered before and after, 0 = all
JUDGE_MODEL = ""  # a second reward model that the policy is not trained on, "" = none
# output
OUTPUT_DIR = "outputs/reinforce"  # the run folder
SAMPLE_EVERY_STEPS = 5  # a line of samples.jsonl, 0 = none
SAVE_EVERY_STEPS = 10  # a checkpoint to go on from, 0 = none
RESUME = True  # go on with an unfinished run of the same settings
REPORT_TO = "none"  # none | tensorboard | trackio | wandb


def rollout(actor: Actor, prompts: dict[int, list[Message]]) -> list[Sample]:
    """Return one sampled answer to each of `prompts` {number of the answer: messages}.

    The number and SEED decide its random numbers. Log-probs come from a separate pass without gradient.
    """
    from utils.models.generation import generate, logps_and_entropies_of, logps_of
    from utils.training.reinforce import Sample

    ids, numbers, precision = actor.prompt_ids(list(prompts.values())), list(prompts), actor.precision
    how = {"batch_size": GENERATION_BATCH, "precision": precision, "numbers": numbers}
    answers = generate(actor.model, actor.tokenizer, ids, MAX_NEW_TOKENS, TEMPERATURE, SEED, **how)
    logps, entropies = logps_and_entropies_of(actor.model, answers, TEMPERATURE, precision)
    with actor.as_reference() as reference:
        references = logps_of(reference, answers, TEMPERATURE, precision)
    figures = zip(logps.tolist(), references.tolist(), entropies.tolist(), strict=True)
    return [Sample(*asked, *of) for *asked, of in zip(numbers, prompts.values(), answers, figures, strict=True)]


def rewards(samples: list[Sample], scoring: Scoring) -> None:
    """Give each sample its reward."""
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
    """Take one step on the loss -mean(A log pi) over all answers; return that loss and the length of its gradient.

    samples: this process's share of the answers, equally many on all processes. weights: their advantages. The mean is
    over answers: divided by an answer's own length, a long bad answer would be pushed away less than a short one.
    If the gradient is not finite, nothing moves.
    """
    import torch

    loss = torch.zeros((), device=engine.accelerator.device)
    for places, batch in engine.batches([sample.answer for sample in samples]):
        advantage = torch.tensor([weights[i] for i in places], device=loss.device)
        share = -(advantage * engine.policy(**batch)).sum() / len(samples)
        engine.accelerator.backward(share)
        loss += share.detach()
    return engine.accelerator.reduce(loss, reduction="mean").item(), engine.step(MAX_GRAD_NORM)


def train_policy(
    run: Run, engine: Engine, actor: Actor, baseline: Baseline, prompts: list[list[Message]], scoring: Scoring
) -> None:
    """Take the steps up to MAX_STEPS that `run` has not taken yet, on `prompts`, those of all training rows."""
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from utils.training import reinforce

    accelerator = engine.accelerator
    accelerator.wait_for_everyone()  # the first process may just have moved an older run aside
    first, answers = engine.resume(run, baseline), BATCH_SIZE * ANSWERS_PER_PROMPT
    share = answers // accelerator.num_processes
    own = slice(share * accelerator.process_index, share * (accelerator.process_index + 1))
    bar = tqdm(range(first, MAX_STEPS), "training", MAX_STEPS, initial=first, disable=bar_off())
    with Interrupt() as interrupt:
        for step in bar:
            began = time.monotonic()
            numbers = range(step * answers, (step + 1) * answers)[own]
            asked = {n: prompts[reinforce.prompt_of(n, ANSWERS_PER_PROMPT, len(prompts), SEED)] for n in numbers}
            samples = rollout(actor, asked)
            rewards(samples, scoring)
            everyone = gather_object(samples)
            weights = advantages(everyone, baseline)
            loss, norm = update(engine, samples, weights[own].tolist())
            figures = reinforce.step_metrics(everyone, weights, baseline, loss, norm, time.monotonic() - began)
            figures["learning_rate"] = engine.next_rate()
            run.log(step + 1, **figures)
            accelerator.log(figures, step=step + 1)
            bar.set_postfix({name: f"{figures[name]:.3f}" for name in ("reward", "kl")})
            if SAMPLE_EVERY_STEPS and step % SAMPLE_EVERY_STEPS == 0:
                run.append("samples.jsonl", reinforce.sample_line(everyone[0], step + 1, weights[0].item()))
            due = SAVE_EVERY_STEPS and ((step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == MAX_STEPS)
            engine.save_or_stop(
                run, step + 1, baseline, due, reinforce.divergence_alarm(figures, KL_LIMIT), interrupt.asked
            )
    run.note(baseline=baseline.value)


def check_algorithm() -> None:
    """Stop where the constants of the algorithm contradict each other."""
    from utils.training.reinforce import BASELINES, NORMS

    pick(BASELINES, "BASELINE", BASELINE)
    pick(NORMS, "ADVANTAGE_NORM", ADVANTAGE_NORM)
    if MAX_STEPS < 1 or MAX_NEW_TOKENS < 2:
        stop(f"MAX_STEPS = {MAX_STEPS}, MAX_NEW_TOKENS = {MAX_NEW_TOKENS}: expected at least 1 step and 2 tokens")
    if TEMPERATURE <= 0:
        stop(f"TEMPERATURE = {TEMPERATURE}: expected more than 0, since greedy answers have no log-probs to push")
    if BATCH_SIZE * ANSWERS_PER_PROMPT % processes():
        stop(f"BATCH_SIZE x ANSWERS_PER_PROMPT must be a multiple of the {processes()} processes")
    if BASELINE == "leave_one_out" and ANSWERS_PER_PROMPT < 2:
        stop("BASELINE = 'leave_one_out' compares the answers to one prompt: set ANSWERS_PER_PROMPT to 2 or more")


def compare_answers(actor: Actor, rows: Dataset, judges: dict[str, RewardModel]) -> tuple[list[dict], dict]:
    """Sample answers to the prompts of `rows` before and after training; return them and the content of eval.json."""
    from utils.evaluation.policy_report import Sampler, compare_before_and_after
    from utils.models.loading import load_causal

    start = actor.reference
    if start == "adapter":
        start = load_causal(MODEL).to(actor.model.device)
    how = MAX_NEW_TOKENS, TEMPERATURE, SEED, actor.precision, GENERATION_BATCH
    sampler = Sampler(actor.tokenizer, actor.window, *how)
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
    from utils.training import reinforce
    from utils.training import trainer as training

    training.check_training(settings)
    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION, deepspeed=False)
    judges = reward_model.load_judges(REWARD_MODEL, JUDGE_MODEL, DEVICE, precision)
    scorer = judges["reward"]
    reinforce.check_risk(scorer.reading, RISK, REWARD_MODEL)
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
    facts |= {"train_prompts": len(rows), "reward_head": scorer.reading.head}
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
    training.close(run, engine.accelerator)
    engine.accelerator.end_training()  # trackers are closed, and processes no longer wait for each other
    # 7. say where it is and what to run next
    say(f"{policy_report.format_summary(result)}\nwritten: {run.folder}")
    say(f"next: python -m extras.make_report --runs {run.folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
