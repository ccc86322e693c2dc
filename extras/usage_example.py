"""Use the results of the steps: rows in a DataLoader, rewards of answers, an answer of a policy.

Reads  : processed_helpsteer/, a reward model, a policy (by default those of `make quickstart`)
Writes : nothing

python -m extras.usage_example
python -m extras.usage_example --question "How do I boil an egg?" --answers "In water.","Ask a cook."
"""

from __future__ import annotations

from utils.config import override_constants
from utils.data.preferences import with_persona
from utils.data.processed import refuse_sft_rows
from utils.runs import read_json
from utils.script import check, needs, say, script, stop

DATA_DIR = "outputs/quickstart/data"  # rows made by load_helpsteer_dataset.py
MIN_RATING_GAP = 1.0  # leave out pairs whose ratings differ by less
BATCH_SIZE = 4  # rows in a batch of the DataLoader
REWARD_MODEL = "outputs/quickstart/reward_model"  # run folder of train_reward_model.py, or a hub reward model
QUESTION = "What is the capital of France?"  # question for the policy
ANSWERS = ("The capital of France is Paris.", "I do not feel like answering that.")  # scored beside the policy's answer
POLICY = "outputs/quickstart/dpo"  # causal model that answers: a run folder or a hub name
SYSTEM_PROMPT = ""  # persona of the policy, "" = none
MAX_NEW_TOKENS = 60  # longest answer of the policy
TEMPERATURE = 0.7  # of the sampling, 0 = greedy
SEED = 42  # of the sampling
DEVICE = ""  # cuda | mps | cpu, "" = best available


def show_rows() -> None:
    """Filter the pairs by their rating gap and print the shape of one batch."""
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    refuse_sft_rows(DATA_DIR, read_json(f"{DATA_DIR}/metadata.json"))
    rows = load_from_disk(f"{DATA_DIR}/train")
    ratings = enumerate(zip(rows["chosen_rating"], rows["rejected_rating"], strict=True))
    kept = [i for i, pair in ratings if None not in pair and round(pair[0] - pair[1], 2) >= MIN_RATING_GAP]
    say(f"{len(kept)} of {len(rows)} pairs of {DATA_DIR}/train have ratings that differ by {MIN_RATING_GAP} or more")
    if not kept:
        stop("lower MIN_RATING_GAP")
    prompts = rows.select(kept).select_columns(["input_ids", "attention_mask"]).with_format("torch")
    batch = next(iter(DataLoader(prompts, batch_size=BATCH_SIZE, shuffle=True)))
    lengths = batch["attention_mask"].sum(1).tolist()
    say(f"a batch: prompts {tuple(batch['input_ids'].shape)}, tokens in each: {lengths}")


def answer_of_policy(conversation: list[dict]) -> str:
    """Return the policy's answer to a conversation."""
    from utils.data import tokens
    from utils.models import generation, loading

    tokenizer, model = tokens.load_tokenizer(POLICY, constant="POLICY"), loading.load_causal(POLICY, "POLICY")
    window = model.config.max_position_embeddings - MAX_NEW_TOKENS
    prompts = generation.prompts_of(tokenizer, [conversation], window)
    model = model.to(loading.choose_device(DEVICE))
    return generation.generate(model, tokenizer, prompts, MAX_NEW_TOKENS, TEMPERATURE, SEED)[0].text


@script
def main(settings: dict) -> None:
    check(settings)
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    from utils.models.reward_model import RewardModel

    show_rows()
    question = [{"role": "user", "content": QUESTION}]
    answers = [*ANSWERS, answer_of_policy(with_persona(question, SYSTEM_PROMPT))]
    model = RewardModel.load(REWARD_MODEL, DEVICE)
    rewards = model.score([[*question, {"role": "assistant", "content": text}] for text in answers]).tolist()
    sources = [*["given"] * len(ANSWERS), POLICY]
    for text, reward, source in zip(answers, rewards, sources, strict=True):
        say(f"{reward:8.3f}  {text}   ({source})")
    say(f"best answer to {QUESTION!r} by {REWARD_MODEL}: {answers[rewards.index(max(rewards))]}")


if __name__ == "__main__":
    main(override_constants(globals()))
