"""Make pairs of a policy's own answers: the human answer against the model's, or the best of N against the worst.

Reads  : processed_helpsteer/ or processed_oasst/ (made by the loaders; pairs or sft rows), a reward model for ranked
Writes : processed_generated/ (train, validation, metadata.json, dropped.jsonl), as the loaders do, for train_dpo;
         outputs/generated_answers/ (answers.jsonl: every answer as it comes; eval.json, run.json)

python -m extras.generate_pairs --data_dir processed_oasst --model outputs/sft
python -m extras.generate_pairs --mode ranked --reward_model outputs/reward_model --answers_per_prompt 8
python train_dpo.py --data_dir processed_generated    # and again: generate with that policy, train on the pairs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Run, write_json
from utils.script import Interrupt, bar_off, check, needs, pick, say, script, stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from extras.lib.generated import Asked, Written
    from utils.data.preferences import Ledger
    from utils.models.reward_model import RewardModel

# data
DATA_DIR = "processed_helpsteer"  # its prompts and, for self_align, its answers: of pairs the chosen ones
SPLITS = ("train", "validation")  # of DATA_DIR; pairs stay in the split of their prompt
MAX_ROWS = 0  # the first so many rows of each split only, 0 = all of them
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the policy that answers: hub name or folder
MODE = "self_align"  # self_align: the answer in the data against the model's | ranked: best of N against the worst
REWARD_MODEL = "outputs/reward_model"  # ranks the answers: a run folder or a hub reward model; for ranked only
ANSWERS_PER_PROMPT = 4  # N of ranked; self_align takes one answer
# sampling
TEMPERATURE = 0.7  # of the answers, 0 = greedy
TOP_P = 0.9  # the likeliest tokens that make up this share of the probability, 1 = all
TOP_K = 60  # so many of the likeliest tokens, 0 = all
MAX_NEW_TOKENS = 150  # of an answer; a longer one is cut and marked in its pair
BATCH_SIZE = 16  # answers in memory at once
SEED = 42  # of the samples; each answer has its own random numbers, whatever its batch
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# output
OUTPUT_DIR = "processed_generated"  # written beside its name and renamed when whole
ANSWERS_DIR = "outputs/generated_answers"  # the run folder; an unfinished run resumes there
RESUME = True  # resume an unfinished run of the same settings, model and data


def check_sampling() -> None:
    """Stop where the constants of the sampling contradict each other."""
    if "train" not in SPLITS or set(SPLITS) - {"train", "validation", "test"}:
        stop(f"SPLITS = {','.join(SPLITS)!r}: expected train, and perhaps validation and test")
    if not 0 < TOP_P <= 1:
        stop(f"TOP_P = {TOP_P}: expected more than 0, and 1 at most")
    if MODE == "ranked" and (ANSWERS_PER_PROMPT < 2 or not TEMPERATURE):
        stop(
            "MODE = 'ranked' compares different answers to a prompt: "
            f"ANSWERS_PER_PROMPT = {ANSWERS_PER_PROMPT} must be 2 or more, TEMPERATURE = {TEMPERATURE} more than 0"
        )
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Asked],
    prompts: dict[int, list[int]],
    judge: RewardModel | None,
    precision: str,
) -> list[Written]:
    """Return the answers to each prompt of the batch, with their rewards where there is a judge.

    prompts: {number: ids}.
    """
    from extras.lib.generated import Written, whole_letters
    from utils.models.generation import generate

    count = ANSWERS_PER_PROMPT if judge else 1
    ids = [prompts[one.number] for one in batch for _ in range(count)]
    numbers = [one.number * count + i for one in batch for i in range(count)]
    sampling = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P, "seed": SEED, "numbers": numbers}
    sampling |= {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": BATCH_SIZE, "precision": precision}
    answers = generate(model, tokenizer, ids, **sampling)
    texts, ended = [whole_letters(a.text, a.ended) for a in answers], [a.ended for a in answers]
    turns = [one.turns for one in batch for _ in range(count)]
    talks = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(turns, texts, strict=True)]
    rewards = judge.score(talks).tolist() if judge else []
    own = [slice(i * count, (i + 1) * count) for i in range(len(batch))]
    return [Written(one.number, texts[s], ended[s], rewards[s]) for one, s in zip(batch, own, strict=True)]


def answer_all(
    batches: list[list[Asked]], path: Path, answer_batch: Callable[[list[Asked]], list[Written]]
) -> dict[int, Written]:
    """Return {number: answers} of all batches; read what an earlier start has written, write the rest to `path`."""
    from tqdm import tqdm

    from extras.lib.generated import append_written, read_written

    written = read_written(path, batches)
    total = sum(map(len, batches))
    if written:
        say(f"{len(written)} of {total} prompts are answered already: {path}")
    bar = tqdm(total=total, initial=len(written), desc="answering", unit=" prompts", disable=bar_off())
    with Interrupt() as interrupt, bar:
        for batch in batches:
            if batch[0].number in written:
                continue
            found = answer_batch(batch)
            append_written(path, found)
            written |= {one.number: one for one in found}
            bar.update(len(batch))
            if interrupt.asked and len(written) < total:
                say(f"stopped after {len(written)} of {total} prompts: run the same command to resume")
                sys.exit(130)
    return written


def write_pairs(
    made: dict, ledger: Ledger, tokenizer: PreTrainedTokenizerBase, source: dict, settings: dict, figures: dict
) -> dict:
    """Tokenise the pairs, save them in place of OUTPUT_DIR and return their metadata.

    made: see generated.pairs_of. source: metadata of DATA_DIR. figures: see generated.figures_of.
    """
    from extras.lib.generated import left_open
    from utils.data import processed, tokens
    from utils.data.sources import Source

    folder = Path(OUTPUT_DIR).expanduser().resolve()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        parts, whole = {}, Path(work) / "whole"
        for name, (rows, ended) in made.items():
            plain = processed.write_rows(rows, processed.row_features(), f"{work}/{name}.arrow")
            parts[name] = left_open(tokens.tokenised(plain, tokenizer, source["max_length"]), ended, tokenizer)
        processed.save_parts(parts, whole)
        origin = Source(source["dataset_name"], source["revision"], {}, source["split_used"])
        origin.rating = "reward" if MODE == "ranked" else ""
        known = {"MAX_LENGTH": source["max_length"], "TOKENIZER": source["tokenizer"], "SEED": SEED}
        known["CHAT_TEMPLATE"] = source["settings"].get("CHAT_TEMPLATE", "")
        known["VALIDATION_SHARE"] = source["split_ratio"]
        metadata = processed.describe(parts, origin, ledger, tokenizer, settings | known)
        metadata |= {"rows": "pairs", "generated": figures | {"mode": MODE, "model": MODEL}}
        metadata["made_by"] = "-m extras.generate_pairs"
        write_json(whole / "metadata.json", metadata)
        ledger.write(whole / "dropped.jsonl")
        del parts, plain  # closes their files: Windows deletes none that is open
        processed.replace_folder(folder, whole)
    return metadata


@script
def main(settings: dict) -> None:
    # 1. check
    check(settings)
    check_sampling()
    from extras.lib import generated
    from utils.data import processed, tokens
    from utils.data.preferences import Ledger
    from utils.models import loading, policies, reward_model

    pick(generated.MODES, "MODE", MODE)
    processed.check_folder(Path(OUTPUT_DIR).expanduser().resolve(), DATA_DIR, "DATA_DIR")
    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    judge = reward_model.load_judges(REWARD_MODEL, "", DEVICE, precision)["reward"] if MODE == "ranked" else None
    # 2. load
    tokenizer, metadata = processed.matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    window, ledger = metadata["max_length"], Ledger()
    asked = generated.asked_of(DATA_DIR, SPLITS, MAX_ROWS, ledger)
    room = max(window - MAX_NEW_TOKENS, window // 2)  # of a prompt, as in a pair with such an answer
    prompts = {one.number: tokens.fitted_prompt(tokenizer, one.turns, room) for one in asked}
    model = loading.load_causal(MODEL).to(device).eval()
    count = ANSWERS_PER_PROMPT if judge else 1
    say(f"{MODEL} answers {len(asked)} prompts of {DATA_DIR} {count} times, {MAX_NEW_TOKENS} tokens at most")
    # 3. answer; a run resumes only with the same weights and rows
    same = {"WEIGHTS": policies.weights_digest(model), "DATA": metadata["fingerprint"]}
    same |= {"JUDGE": policies.weights_digest(judge.model)} if judge else {}
    facts = {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"]}
    run = Run(ANSWERS_DIR, settings | same, RESUME, device=str(device), precision=precision, **facts)
    batches = generated.in_batches(asked, [len(prompts[one.number]) for one in asked], max(1, BATCH_SIZE // count))
    written = answer_all(
        batches,
        run.folder / "answers.jsonl",
        lambda batch: answer(model, tokenizer, batch, prompts, judge, precision),
    )
    # 4. make pairs and save them
    made = generated.pairs_of(asked, written, MODE, ledger)
    if not made.get("train", ([],))[0]:
        stop(f"no pair is left for training of {len(asked)} prompts, left out: {ledger.counts()}")
    figures = generated.figures_of(written)
    found = write_pairs(made, ledger, tokenizer, metadata, settings, figures)
    write_json(run.folder / "eval.json", found["generated"])
    run.finish()
    # 5. print where it is
    processed.print_summary(found, Path(OUTPUT_DIR), f"python train_dpo.py --data_dir {OUTPUT_DIR} --model {MODEL}")
    say(f"      {figures['cut_share']:.0%} of {figures['answers']} answers were cut at MAX_NEW_TOKENS")


if __name__ == "__main__":
    main(override_constants(globals()))
