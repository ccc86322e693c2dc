"""How to use what the steps leave behind: rows in a DataLoader, a reward model as a scorer, a policy to talk to.

Reads  : processed_helpsteer/, a reward model, a policy (by default those of `make quickstart`)
Writes : nothing

python -m extras.usage_example
python -m extras.usage_example --question "How do I boil an egg?"
python -m extras.usage_example --chat true    # and then go on talking; an empty line ends it
"""

from __future__ import annotations

from collections.abc import Callable

from utils.config import override_constants
from utils.files import read_json
from utils.processed import refuse_sft_rows
from utils.rows import hundredths
from utils.runs import at_least, needs, say, script, stop

DATA_DIR = "outputs/quickstart/data"  # rows made by load_helpsteer_dataset.py
REWARD_MODEL = "outputs/quickstart/reward_model"  # run folder of train_reward_model.py, or a hub reward model
POLICY = "outputs/quickstart/dpo"  # any causal model: a run folder or a hub name
MIN_RATING_GAP = 1.0  # pairs whose ratings differ by less are filtered out
BATCH_SIZE = 4  # rows of the DataLoader
QUESTION = "What is the capital of France?"  # is answered by the policy, and by ANSWERS
ANSWERS = ("The capital of France is Paris.", "I do not feel like answering that.")  # are scored beside it
SYSTEM_PROMPT = ""  # a persona for the policy, "" = none
MAX_NEW_TOKENS = 60  # of an answer of the policy
TEMPERATURE = 0.7  # of its sampling, 0 = greedy
CHAT = False  # go on talking in the terminal
SEED = 42  # of its sampling
DEVICE = ""  # cuda | mps | cpu, "" = the best one here


def show_rows(data_dir: str, gap: float, batch_size: int) -> None:
    """Rows that are far enough apart, one batch of them as tensors."""
    import torch
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    rows = load_from_disk(f"{data_dir}/train")
    refuse_sft_rows(data_dir, read_json(f"{data_dir}/metadata.json"))
    rated = zip(rows["chosen_rating"], rows["rejected_rating"], strict=True)
    far = [
        i
        for i, (one, other) in enumerate(rated)
        if None not in (one, other) and hundredths(one - other) >= hundredths(gap)
    ]
    apart = rows.select(far)
    if not far:
        stop(f"no pair of {data_dir}/train has ratings that differ by {gap} or more: lower MIN_RATING_GAP")
    say(f"{len(apart)} of {len(rows)} pairs of {data_dir}/train have ratings that differ by {gap} or more")

    def collate(batch: list[dict]) -> dict:
        found = {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "attention_mask")}
        return found | {"chosen": [row["chosen"][-1]["content"] for row in batch]}

    for batch in DataLoader(apart, batch_size=batch_size, shuffle=True, collate_fn=collate):
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        say(f"a batch: prompts {tuple(batch['input_ids'].shape)}, {lengths} tokens of them real")
        say(f"first chosen answer: {batch['chosen'][0][:100]}")
        break


def answerer(policy: str, device: str, max_new_tokens: int, temperature: float, seed: int) -> Callable:
    """A function from a conversation to the policy's answer."""
    from utils import models
    from utils.guidance import Guidance
    from utils.sampling import generate, prompt_ids_of
    from utils.tokens import load_tokenizer

    tokenizer, model = load_tokenizer(policy, constant="POLICY"), models.load_causal(policy, "POLICY")
    model = model.to(models.choose_device(device))

    def answer(conversation: list[dict]) -> str:
        window = model.config.max_position_embeddings - max_new_tokens
        ids = prompt_ids_of(tokenizer, [conversation], window, Guidance())
        return generate(model, tokenizer, ids, max_new_tokens, temperature, seed + len(conversation))[0].text

    return answer


def asked() -> str:
    """What the person says next, "" at an empty line or the end of the input."""
    try:
        return input("\nyou: ").strip()
    except EOFError:
        return ""


@script
def main(settings: dict) -> None:
    # 1. check
    at_least(1, BATCH_SIZE=BATCH_SIZE, MAX_NEW_TOKENS=MAX_NEW_TOKENS)
    at_least(0, TEMPERATURE=TEMPERATURE, MIN_RATING_GAP=MIN_RATING_GAP)
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from utils.rewards import RewardModel
    from utils.rows import with_persona

    # 2. rows
    show_rows(DATA_DIR, MIN_RATING_GAP, BATCH_SIZE)
    # 3. a policy answers
    answer = answerer(POLICY, DEVICE, MAX_NEW_TOKENS, TEMPERATURE, SEED)
    said = [{"role": "user", "content": QUESTION}]
    answers = [*ANSWERS, answer(with_persona(said, SYSTEM_PROMPT))]
    # 4. a reward model scores
    judge = RewardModel.load(REWARD_MODEL, DEVICE)
    scores = judge.score([[*said, {"role": "assistant", "content": text}] for text in answers]).tolist()
    say(f"\n{QUESTION}")
    for text, score, who in zip(answers, scores, [*("given" for _ in ANSWERS), POLICY], strict=True):
        say(f"{score:8.3f}  {text}   ({who})")
    # 5. and on, as long as there is something to say
    said = with_persona([*said, {"role": "assistant", "content": answers[-1]}], SYSTEM_PROMPT)
    while CHAT and (line := asked()):
        said.append({"role": "user", "content": line})
        said.append({"role": "assistant", "content": answer(said)})
        print(f"policy: {said[-1]['content']}", flush=True)


if __name__ == "__main__":
    main(override_constants(globals()))
