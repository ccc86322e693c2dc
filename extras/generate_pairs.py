"""Make pairs from a policy's own answers: the human answer against the model's, or the best of N against the worst.

Reads  : processed_helpsteer/ or processed_oasst/ (pairs or sft rows), and for ranked a reward model
Writes : processed_generated/ (train, validation, metadata.json, dropped.jsonl), which train_dpo.py reads;
         outputs/processed_generated/ (answers.jsonl: every answer as it comes; eval.json, run.json)

python -m extras.generate_pairs --data_dir processed_oasst --model outputs/sft
python -m extras.generate_pairs --mode ranked --reward_model outputs/reward_model --answers_per_prompt 8
python train_dpo.py --data_dir processed_generated    # repeat both with the new policy for iterated DPO
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import override_constants
from utils.runs import Run, write_json
from utils.script import Interrupt, bar_off, check, needs, pick, say, script, stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from extras.lib.generated import Answers, PromptRow
    from utils.data.preferences import Ledger
    from utils.models.reward_model import RewardModel

# data
DATA_DIR = "processed_helpsteer"  # source of the prompts and, for self_align, of the (chosen) human answers
MAX_ROWS = 0  # use only the first rows of each split, 0 = all
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # policy that answers: hub name or folder
MODE = "self_align"  # self_align: human answer against the model's | ranked: best of N against the worst
REWARD_MODEL = "outputs/reward_model"  # ranks the answers in ranked: run folder or hub reward model
ANSWERS_PER_PROMPT = 4  # N of ranked; self_align uses one answer
# sampling
TEMPERATURE = 0.7  # of the sampling, 0 = greedy
MAX_NEW_TOKENS = 150  # longest answer; a longer one is cut and marked in its pair
BATCH_SIZE = 16  # answers generated at once
SEED = 42  # of the sampling; the batch size does not change the samples
DEVICE = ""  # cuda | mps | cpu, "" = best available
PRECISION = ""  # fp32 | bf16 | fp16, "" = native precision of the device
# output
OUTPUT_DIR = "processed_generated"  # replaced only once the new rows are complete
RESUME = True  # resume an unfinished run with the same settings, model and data

SAMPLING = {"top_k": 60, "top_p": 0.9}  # draw from the 60 likeliest tokens, of these from 90 % of the probability


def answers_per_prompt() -> int:
    return ANSWERS_PER_PROMPT if MODE == "ranked" else 1


def answer_batch(
    batch: list[PromptRow],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    judge: RewardModel | None,
    precision: str,
) -> list[Answers]:
    """Return the answers to each prompt of the batch, with rewards if there is a judge."""
    from extras.lib.generated import Answers, whole_characters
    from utils.models.generation import generate
    from utils.models.shared_prompt import Prompt

    count = answers_per_prompt()
    repeated = [prompt for prompt in batch for _ in range(count)]
    numbers = [prompt.number * count + i for prompt in batch for i in range(count)]
    options = {"temperature": TEMPERATURE, "seed": SEED, "numbers": numbers, **SAMPLING}
    options |= {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": BATCH_SIZE, "precision": precision}
    answers = generate(model, tokenizer, [Prompt(row.ids) for row in repeated], **options)
    ended = [answer.ended for answer in answers]
    texts = [whole_characters(answer.text, answer.ended) for answer in answers]
    pairs = zip(repeated, texts, strict=True)
    talks = [[*prompt.turns, {"role": "assistant", "content": text}] for prompt, text in pairs]
    rewards = judge.score(talks).tolist() if judge else []
    slices = [slice(i * count, (i + 1) * count) for i in range(len(batch))]
    return [Answers(prompt.number, texts[s], ended[s], rewards[s]) for prompt, s in zip(batch, slices, strict=True)]


def answer_all(
    batches: list[list[PromptRow]], path: Path, answer: Callable[[list[PromptRow]], list[Answers]]
) -> dict[int, Answers]:
    """Return {number of the prompt: answers}. Keep those already in the file `path`, and append the rest to it."""
    from tqdm import tqdm

    from extras.lib.generated import append_answers, read_answers

    answers = read_answers(path, batches)
    total = sum(map(len, batches))
    if answers:
        say(f"{len(answers)} of {total} prompts are answered already: {path}")
    bar = tqdm(total=total, initial=len(answers), desc="answering", unit=" prompts", disable=bar_off())
    with Interrupt() as interrupt, bar:
        for batch in batches:
            if batch[0].number in answers:
                continue
            new = answer(batch)
            append_answers(path, new)
            answers |= {entry.number: entry for entry in new}
            bar.update(len(batch))
            if interrupt.asked and len(answers) < total:
                say(f"stopped after {len(answers)} of {total} prompts: run the same command to resume")
                sys.exit(130)
    return answers


def write_pairs(
    pairs: dict, ledger: Ledger, tokenizer: PreTrainedTokenizerBase, source: dict, settings: dict, figures: dict
) -> dict[str, Any]:
    """Tokenise the pairs, replace OUTPUT_DIR with them and return their metadata.

    pairs: from `generated.pairs_of`. source: metadata of DATA_DIR. figures: from `generated.figures_of`.
    """
    from extras.lib.generated import remove_end_of_cut_answers
    from utils.data import processed, tokens
    from utils.data.sources import Source

    folder = Path(OUTPUT_DIR).expanduser().resolve()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        splits, new = {}, Path(work) / "new"
        for name, (rows, ended) in pairs.items():
            plain = processed.write_rows(rows, processed.row_features(), f"{work}/{name}.arrow")
            rows = tokens.tokenised(plain, tokenizer, source["max_length"])
            splits[name] = remove_end_of_cut_answers(rows, ended, tokenizer)
        processed.save_parts(splits, new)
        origin = Source(source["dataset_name"], source["revision"], {}, source["split_used"])
        origin.rating = "reward" if MODE == "ranked" else ""
        inherited = {"MAX_LENGTH": source["max_length"], "TOKENIZER": source["tokenizer"]}
        inherited["CHAT_TEMPLATE"] = source["settings"].get("CHAT_TEMPLATE", "")
        inherited["VALIDATION_SHARE"] = source["split_ratio"]
        metadata = processed.describe(splits, origin, ledger, tokenizer, settings | inherited)
        metadata |= {"rows": "pairs", "generated": figures | {"mode": MODE, "model": MODEL}}
        metadata["made_by"] = "-m extras.generate_pairs"
        write_json(new / "metadata.json", metadata)
        ledger.write(new / "dropped.jsonl")
        del splits, plain, rows  # closes their files: Windows cannot delete an open file
        processed.replace_folder(folder, new)
    return metadata


@script
def main(settings: dict) -> None:
    # 1. check
    check(settings)
    if MODE == "ranked" and (ANSWERS_PER_PROMPT < 2 or not TEMPERATURE):
        stop("MODE = 'ranked' needs different answers: set ANSWERS_PER_PROMPT to 2 or more, TEMPERATURE to more than 0")
    from extras.lib import generated
    from utils.data import processed
    from utils.data.preferences import Ledger
    from utils.models import loading, policies, reward_model

    pick(generated.MODES, "MODE", MODE)
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    folder = Path(OUTPUT_DIR).expanduser().resolve()
    processed.check_folder(folder, DATA_DIR, "DATA_DIR")
    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    judge = reward_model.load_judges(REWARD_MODEL, "", DEVICE, precision)["reward"] if MODE == "ranked" else None
    # 2. load
    tokenizer, metadata = processed.matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    ledger, window = Ledger(), metadata["max_length"]
    room = max(window - MAX_NEW_TOKENS, window // 2)  # for a prompt, as in a pair with such an answer
    prompts = generated.load_prompts(DATA_DIR, MAX_ROWS, tokenizer, room, ledger)
    model = loading.load_causal(MODEL).to(device).eval()
    count = answers_per_prompt()
    say(f"{MODEL} answers {len(prompts)} prompts of {DATA_DIR} {count} times, {MAX_NEW_TOKENS} tokens at most")
    # 3. answer; a run resumes only with the same weights, rows and sampling
    inputs = {"WEIGHTS": policies.weights_digest(model), "DATA": metadata["fingerprint"], "SAMPLING": SAMPLING}
    inputs |= {"JUDGE": policies.weights_digest(judge.model)} if judge else {}
    facts = {"dataset_name": metadata["dataset_name"], "data_fingerprint": metadata["fingerprint"]}
    run = Run(Path("outputs", folder.name), settings | inputs, RESUME, device=str(device), precision=precision, **facts)
    batches = generated.make_batches(prompts, max(1, BATCH_SIZE // count))
    answer = partial(answer_batch, model=model, tokenizer=tokenizer, judge=judge, precision=precision)
    answers = answer_all(batches, run.folder / "answers.jsonl", answer)
    # 4. make pairs and save them
    pairs = generated.pairs_of(prompts, answers, MODE, ledger)
    if not pairs.get("train", ([],))[0]:
        stop(f"no training pair is left of {len(prompts)} prompts, left out: {ledger.counts()}")
    figures = generated.figures_of(answers)
    metadata = write_pairs(pairs, ledger, tokenizer, metadata, settings, figures)
    write_json(run.folder / "eval.json", metadata["generated"])
    run.finish()
    # 5. print where it is
    processed.print_summary(metadata, Path(OUTPUT_DIR), f"python train_dpo.py --data_dir {OUTPUT_DIR} --model {MODEL}")
    say(f"      {figures['cut_share']:.0%} of {figures['answers']} answers were cut at MAX_NEW_TOKENS")


if __name__ == "__main__":
    main(override_constants(globals()))
