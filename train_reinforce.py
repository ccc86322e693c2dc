"""Train a policy with REINFORCE against a reward model: it answers, is scored, and does more of what beat a baseline.

Reads  : processed_helpsteer/ (prompts) and outputs/reward_model/ (made by train_reward_model.py)
Writes : outputs/reinforce/ (the model, eval.json, predictions.jsonl, samples.jsonl, metrics.jsonl, run.json, plots)

python train_reinforce.py
python train_reinforce.py --baseline leave_one_out --answers_per_prompt 4
python train_reinforce.py --max_steps 3 --eval_prompts 8    # a quick look; any constant below, in lower case
accelerate launch train_reinforce.py                       # on several GPUs
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Interrupt, Run, at_least, bar_off, first_process, needs, pick, say, script, shares, stop

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from utils.engine import Engine
    from utils.reinforce import Baseline, Sample, Scoring
    from utils.rows import Message

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


def rollout(
    model: nn.Module,
    reference: nn.Module | str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[int, list[Message]],
    window: int,
    seed: int,
    how: dict[str, object],
) -> list[Sample]:
    """One sampled answer to each of `prompts` {number of the answer: messages}, by random numbers of its own.

    how: max_new_tokens, temperature, batch_size, precision. Log-probs come from a pass of their own, without gradient.
    """
    from utils.guidance import Guidance
    from utils.reinforce import Sample, as_reference
    from utils.sampling import generate, logps_and_entropies_of, logps_of, prompt_ids_of

    ids = prompt_ids_of(tokenizer, list(prompts.values()), window, Guidance())
    answers = generate(model, tokenizer, ids, **how, seed=seed, numbers=list(prompts))
    at = (how["temperature"], how["precision"])
    logps, entropies = logps_and_entropies_of(model, answers, *at)
    with as_reference(model, reference) as before:
        references = logps_of(before, answers, *at)
    figures = zip(logps.tolist(), references.tolist(), entropies.tolist(), strict=True)
    return [Sample(*it, *of) for *it, of in zip(prompts, prompts.values(), answers, figures, strict=True)]


def rewards(samples: list[Sample], scoring: Scoring) -> None:
    """Give each sample its reward."""
    scores = scoring([sample.prompt for sample in samples], [sample.answer for sample in samples])
    for sample, score in zip(samples, scores.tolist(), strict=True):
        sample.reward = score


def advantages(
    samples: list[Sample], baseline: Baseline, kl_beta: float, answers_per_prompt: int, norm: str
) -> torch.Tensor:
    """A [answers] = reward - kl_beta (log pi - log ref) - baseline, for all answers of a step, of all processes."""
    import torch

    from utils.reinforce import normalised

    returns = torch.tensor([sample.reward - kl_beta * sample.kl for sample in samples])
    return normalised(baseline.advantages(returns, answers_per_prompt), norm)


def update(
    engine: Engine, samples: list[Sample], weights: list[float], longest: float, tokens: int = 0
) -> tuple[float, float]:
    """One step on the loss -mean(A log pi) over all answers of the step; (that loss, the length of its gradient).

    samples: this process's share of the answers, of one size on all processes. weights: their advantages. The mean is
    over answers: divided by an answer's own length, a long bad answer would be pushed away less than a short one.
    Gradients longer than `longest` are cut to it (0: never); where the gradient is not finite, nothing moves. Computed
    in parts of `tokens` positions (0: as many as keep the device busy), so memory does not grow with the answers.
    """
    import contextlib

    import torch

    from utils.pairs import TOKENS_AT_ONCE, row_multiple
    from utils.sampling import batch_of, parts_of

    policy, device = engine.policy.train(), engine.accelerator.device
    parts = parts_of([sample.answer for sample in samples], tokens or TOKENS_AT_ONCE[device.type])
    loss = torch.zeros((), device=device)
    for part in parts:
        batch = batch_of([samples[i].answer for i in part], multiple=row_multiple(device))
        batch = {name: value.to(device) for name, value in batch.items()}
        advantage = torch.tensor([weights[i] for i in part], device=device)
        with contextlib.nullcontext() if part is parts[-1] else engine.accelerator.no_sync(policy):
            share = -(advantage * policy(**batch)).sum() / len(samples)
            engine.accelerator.backward(share)
        loss += share.detach()
    return engine.accelerator.reduce(loss, reduction="mean").item(), engine.step(longest)


def check(batch: int, per_prompt: int, baseline: str, temperature: float) -> None:
    """End the script where constants do not go together."""
    from utils.machine import processes

    world = processes()
    if batch * per_prompt % world:
        stop(f"BATCH_SIZE x ANSWERS_PER_PROMPT = {batch * per_prompt}: {world} processes cannot share that equally")
    if baseline == "leave_one_out" and per_prompt < 2:
        stop("BASELINE = 'leave_one_out' compares the answers to one prompt: set ANSWERS_PER_PROMPT to 2 or more")
    if temperature <= 0:
        stop(f"TEMPERATURE = {temperature}: expected more than 0, since greedy answers have no log-probs to push")


@script
def main(settings: dict) -> None:
    # 1. check
    at_least(1, BATCH_SIZE=BATCH_SIZE, ANSWERS_PER_PROMPT=ANSWERS_PER_PROMPT, GENERATION_BATCH=GENERATION_BATCH)
    at_least(1, MAX_STEPS=MAX_STEPS, LORA_RANK=LORA_RANK)
    at_least(0, MAX_ROWS=MAX_ROWS, EVAL_PROMPTS=EVAL_PROMPTS, KL_BETA=KL_BETA, KL_LIMIT=KL_LIMIT, SEED=SEED)
    at_least(0, LEARNING_RATE=LEARNING_RATE, WEIGHT_DECAY=WEIGHT_DECAY)
    at_least(0, MAX_GRAD_NORM=MAX_GRAD_NORM, SAVE_EVERY_STEPS=SAVE_EVERY_STEPS, SAMPLE_EVERY_STEPS=SAMPLE_EVERY_STEPS)
    at_least(2, MAX_NEW_TOKENS=MAX_NEW_TOKENS)  # answers of one token would stop the run: reinforce.MIN_MEAN_LENGTH
    shares(BASELINE_DECAY=BASELINE_DECAY, WARMUP_SHARE=WARMUP_SHARE, LORA_DROPOUT=LORA_DROPOUT)
    check(BATCH_SIZE, ANSWERS_PER_PROMPT, BASELINE, TEMPERATURE)
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    import torch
    from accelerate.utils import gather_object
    from tqdm import tqdm
    from transformers import set_seed

    from utils import comparing, engine, models, pairs, policies, policy_report, references, reinforce, training
    from utils import rewards as reward_models
    from utils.controls import different_prompts

    pick(reinforce.BASELINES, "BASELINE", BASELINE)
    pick(reinforce.NORMS, "ADVANTAGE_NORM", ADVANTAGE_NORM)
    schedule = pick(training.SCHEDULES, "SCHEDULE", SCHEDULE)
    training.check_tracker(REPORT_TO)
    device, precision = models.choose_machine(DEVICE, PRECISION, deepspeed=False)
    judges = reward_models.load_judges(REWARD_MODEL, JUDGE_MODEL, DEVICE, precision)
    scorer = judges["reward"]
    reinforce.check_risk(scorer.reading, RISK, REWARD_MODEL)
    # 2. load
    tokenizer, metadata = pairs.matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    rows = pairs.load_pairs(DATA_DIR, "train", MAX_ROWS)
    held_out = different_prompts(pairs.load_pairs(DATA_DIR, "validation"), EVAL_PROMPTS)
    conversations = [messages[:-1] for messages in rows["chosen"]]
    set_seed(SEED)
    model = models.without_dropout(models.load_causal(MODEL))
    policies.check_architecture(model, rows)
    if USE_LORA:
        model = models.add_lora(model, "CAUSAL_LM", LORA_RANK, LORA_ALPHA, LORA_DROPOUT, LORA_TARGETS)
    reference = policies.reference_of(model, trained=True)
    if GRADIENT_CHECKPOINTING:
        models.use_gradient_checkpointing(model)
    say(f"{MODEL}: {models.count_parameters(model)}, on {len(rows)} prompts; {len(held_out)} held out for evaluation")
    # 3. build
    facts = {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"]}
    facts |= {"train_prompts": len(rows), "reward_head": scorer.reading.head, "device": str(device)}
    facts |= {"start": references.weights_digest(model), "reward_weights": references.weights_digest(scorer.model)}
    run = Run(OUTPUT_DIR, settings, RESUME, **facts, precision=precision)
    rates = {"rate": LEARNING_RATE, "decay": WEIGHT_DECAY, "schedule": schedule, "warmup_share": WARMUP_SHARE}
    policy = reinforce.Policy(model, TEMPERATURE)
    trainer = engine.start_engine(policy, device, precision, run, **rates, steps=MAX_STEPS, tracker=REPORT_TO)
    accelerator, baseline = trainer.accelerator, reinforce.Baseline(BASELINE, BASELINE_DECAY)
    if reference != "adapter":
        reference.to(device)
    how = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": TEMPERATURE, "batch_size": GENERATION_BATCH}
    how["precision"] = precision
    window, answers = metadata["max_length"], BATCH_SIZE * ANSWERS_PER_PROMPT
    scoring = reinforce.Scoring(scorer, RISK, CUT_PENALTY)
    # 4. train
    accelerator.wait_for_everyone()  # the first process may just have moved an older run aside
    first = trainer.resume(run, baseline)
    share = answers // accelerator.num_processes
    own = slice(share * accelerator.process_index, share * (accelerator.process_index + 1))
    bar = tqdm(range(first, MAX_STEPS), "training", MAX_STEPS, initial=first, disable=bar_off())
    with Interrupt() as interrupt:
        for step in bar:
            began = time.monotonic()
            numbers = range(step * answers, (step + 1) * answers)[own]
            chosen = {n: reinforce.prompt_of(n, ANSWERS_PER_PROMPT, len(rows), SEED) for n in numbers}
            prompts = {n: conversations[row] for n, row in chosen.items()}
            samples = rollout(model, reference, tokenizer, prompts, window, SEED, how)
            rewards(samples, scoring)
            everyone = gather_object(samples)
            found = advantages(everyone, baseline, KL_BETA, ANSWERS_PER_PROMPT, ADVANTAGE_NORM)
            loss, norm = update(trainer, samples, found[own].tolist(), MAX_GRAD_NORM)
            figures = reinforce.figures_of(everyone, found, baseline, loss, norm, time.monotonic() - began)
            figures["learning_rate"] = trainer.next_rate()
            run.log(step + 1, **figures)
            accelerator.log(figures, step=step + 1)
            bar.set_postfix({name: f"{figures[name]:.3f}" for name in ("reward", "kl")})
            if SAMPLE_EVERY_STEPS and step % SAMPLE_EVERY_STEPS == 0:
                run.append("samples.jsonl", reinforce.line_of(everyone[0], step + 1, found[0].item()))
            reason = reinforce.alarm(figures, KL_LIMIT)
            asked = accelerator.reduce(torch.tensor(float(interrupt.asked), device=device)).item() > 0
            due = SAVE_EVERY_STEPS and ((step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == MAX_STEPS)
            if first_process() and (reason or asked or due):
                trainer.save(run, step + 1, baseline)
            if reason or asked:
                accelerator.wait_for_everyone()  # a launcher kills the process that saves once another one has ended
            if reason:
                stop(f"stopped at step {step + 1}, saved to be gone on with or started anew: {reason}")
            if asked:
                say(f"stopped and saved at step {step + 1}: start the same command again to go on")
                sys.exit(130)
    run.note(baseline=baseline.value)
    # 5. evaluate
    result = {}
    if first_process():
        start = models.load_causal(MODEL).to(device) if reference == "adapter" else reference
        sampler = comparing.Sampler(tokenizer, window, seed=SEED, **how)
        lines, result = policy_report.before_and_after(start, model, held_out, sampler, judges)
        result |= result.pop("reward")
        # 6. save
        policy_report.save(model, tokenizer, run.folder, rows, pairs.PairCollator(tokenizer.pad_token_id))
        policy_report.write_reinforce_results(run.folder, result, lines, run.record)
    training.close(run, accelerator)
    accelerator.end_training()  # trackers are closed, and processes no longer wait for each other
    # 7. say where it is
    say(f"{policy_report.told(result)}\nwritten: {run.folder}")
    say(f"next: python -m extras.make_report --runs {run.folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
