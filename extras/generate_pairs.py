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
from utils.files import write_json
from utils.runs import Interrupt, Run, at_least, bar_off, needs, pick, say, script, stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from extras.parts.generated import Asked, Written
    from utils.rewards import RewardModel

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
MAX_NEW_TOKENS = 150  # of an answer; a longer one is cut, and its pair says so
BATCH_SIZE = 16  # answers in memory at once
SEED = 42  # of the samples: each answer has luck of its own, whatever its batch
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# output
OUTPUT_DIR = "processed_generated"  # written beside its name and renamed when whole
ANSWERS_DIR = "outputs/generated_answers"  # the run folder, in which an unfinished run goes on
RESUME = True  # go on with an unfinished run of the same settings, model and data


def check(mode: str, splits: tuple[str, ...], count: int, temperature: float, top_p: float) -> None:
    """End the script where constants do not go together."""
    if "train" not in splits or set(splits) - {"train", "validation", "test"}:
        stop(f"SPLITS = {','.join(splits)!r}: expected train, and perhaps validation and test")
    if not 0 < top_p <= 1:
        stop(f"TOP_P = {top_p}: expected more than 0, and 1 at most")
    if mode == "ranked" and (count < 2 or not temperature):
        stop(
            f"MODE = 'ranked' compares different answers to a prompt: ANSWERS_PER_PROMPT = {count} must be 2 or more, "
            f"TEMPERATURE = {temperature} more than 0"
        )


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Asked],
    prompts: dict[int, list[int]],
    count: int,
    sampling: dict[str, object],
    judge: RewardModel | None,
) -> list[Written]:
    """`count` answers to each prompt of the batch, with their rewards where there is a judge.

    prompts: {number: ids}. sampling: what `generate` takes beside them.
    """
    from extras.parts.generated import Written, whole_letters
    from utils.sampling import generate

    ids = [prompts[one.number] for one in batch for _ in range(count)]
    numbers = [one.number * count + i for one in batch for i in range(count)]
    answers = generate(model, tokenizer, ids, numbers=numbers, **sampling)
    texts, ended = [whole_letters(a.text, a.ended) for a in answers], [a.ended for a in answers]
    turns = [one.turns for one in batch for _ in range(count)]
    said = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(turns, texts, strict=True)]
    rewards = judge.score(said).tolist() if judge else []
    own = [slice(i * count, (i + 1) * count) for i in range(len(batch))]
    return [Written(one.number, texts[s], ended[s], rewards[s]) for one, s in zip(batch, own, strict=True)]


def answer_all(
    batches: list[list[Asked]], path: Path, answer_batch: Callable[[list[Asked]], list[Written]]
) -> dict[int, Written]:
    """{number: answers} of all batches; what an earlier start has written is read, all else is written to `path`."""
    from tqdm import tqdm

    from extras.parts.generated import append_written, read_written

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
                say(f"stopped after {len(written)} of {total} prompts: start the same command again to go on")
                sys.exit(130)
    return written


@script
def main(settings: dict) -> None:
    # 1. check
    at_least(1, ANSWERS_PER_PROMPT=ANSWERS_PER_PROMPT, MAX_NEW_TOKENS=MAX_NEW_TOKENS, BATCH_SIZE=BATCH_SIZE)
    at_least(0, MAX_ROWS=MAX_ROWS, TEMPERATURE=TEMPERATURE, TOP_K=TOP_K)
    check(MODE, SPLITS, ANSWERS_PER_PROMPT, TEMPERATURE, TOP_P)
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from extras.parts import generated
    from utils import models, pairs, processed, references, rewards, tokens
    from utils.rows import Ledger
    from utils.sources import Source

    pick(generated.MODES, "MODE", MODE)
    folder = Path(OUTPUT_DIR).expanduser().resolve()
    processed.check_folder(folder, DATA_DIR, "DATA_DIR")
    device, precision = models.choose_machine(DEVICE, PRECISION)
    judge = rewards.load_judges(REWARD_MODEL, "", DEVICE, precision)["reward"] if MODE == "ranked" else None
    # 2. load
    tokenizer, metadata = pairs.matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    window, ledger = metadata["max_length"], Ledger()
    asked = generated.asked_of(DATA_DIR, SPLITS, MAX_ROWS, ledger)
    room = max(window - MAX_NEW_TOKENS, window // 2)  # of a prompt, as in a pair with such an answer
    prompts = {one.number: tokens.fitted_prompt(tokenizer, one.turns, room) for one in asked}
    model = models.load_causal(MODEL).to(device).eval()
    count = ANSWERS_PER_PROMPT if MODE == "ranked" else 1
    say(f"{MODEL} answers {len(asked)} prompts of {DATA_DIR} {count} times, {MAX_NEW_TOKENS} tokens at most")
    # 3. answer; a run goes on only with the same weights and rows
    same = {"WEIGHTS": references.weights_digest(model), "DATA": metadata["fingerprint"]}
    same |= {"JUDGE": references.weights_digest(judge.model)} if judge else {}
    facts = {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"]}
    facts |= {"device": str(device), "precision": precision}
    run = Run(ANSWERS_DIR, settings | same, RESUME, **facts)
    sampling = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
    sampling |= {"seed": SEED, "batch_size": BATCH_SIZE, "precision": precision}
    batches = generated.in_batches(asked, [len(prompts[one.number]) for one in asked], max(1, BATCH_SIZE // count))
    written = answer_all(
        batches,
        run.folder / "answers.jsonl",
        lambda batch: answer(model, tokenizer, batch, prompts, count, sampling, judge),
    )
    # 4. make pairs and tokenise them
    made = generated.pairs_of(asked, written, MODE, ledger)
    if not made.get("train", ([],))[0]:
        stop(f"no pair is left for training of {len(asked)} prompts, left out: {ledger.counts()}")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        parts = {}
        for name, (rows, ended) in made.items():
            plain = processed.write_rows(rows, processed.row_features(), f"{work}/{name}.arrow")
            parts[name] = generated.left_open(tokens.tokenised(plain, tokenizer, window), ended, tokenizer)
        # 5. save beside the old folder, then take its place
        whole = Path(work) / "whole"
        processed.save_parts(parts, whole)
        template = metadata["settings"].get("CHAT_TEMPLATE", "")
        known = {"MAX_LENGTH": window, "TOKENIZER": metadata["tokenizer"], "CHAT_TEMPLATE": template}
        source = Source(metadata["dataset_name"], metadata["revision"], {}, metadata["split_used"])
        source.rating = "reward" if judge else ""
        known |= {"VALIDATION_SHARE": metadata["split_ratio"], "SEED": SEED}
        found = processed.describe(parts, source, ledger, tokenizer, settings | known)
        found |= {"rows": "pairs", "generated": generated.figures_of(written) | {"mode": MODE, "model": MODEL}}
        found["made_by"] = "-m extras.generate_pairs"
        write_json(whole / "metadata.json", found)
        ledger.write(whole / "dropped.jsonl")
        del parts, plain  # closes their files: Windows deletes none that is open
        processed.replace_folder(folder, whole)
    write_json(run.folder / "eval.json", found["generated"])
    run.finish()
    # 6. say where it is
    processed.report(found, Path(OUTPUT_DIR), f"python train_dpo.py --data_dir {OUTPUT_DIR} --model {MODEL}")
    cut = found["generated"]["cut_share"]
    say(f"      {cut:.0%} of {found['generated']['answers']} answers were cut at MAX_NEW_TOKENS")


if __name__ == "__main__":
    main(override_constants(globals()))
