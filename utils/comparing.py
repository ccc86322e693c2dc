"""Policies side by side: the same prompts, the same luck, rewards, KL, lengths, repetition, best of n."""

import math
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.data.preferences import Message
from utils.evaluation import at_equal_length, comparison
from utils.models.generation import Answer, generate, logps_of, prompt_ids_of, repetition
from utils.models.guidance import Guidance
from utils.models.reward_model import RewardModel

# Numbers of compared answers count from here, those of training from 0: a policy that met the random numbers of its
# training again would be pushed towards and away from just the tokens that they favour, and seem to have learned more
FIRST_NUMBER = 2**40


@dataclass
class Answers:
    """What a policy answered to some prompts, in their order.

    kl [prompts]: log pi - log start of each answer; None where its mean would be no KL: for greedy answers, and for
    the best of several, of which only a bound of the KL is known (kl_bound, nats an answer).
    """

    answers: list[Answer]
    kl: np.ndarray | None
    kl_bound: float | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer [prompts]."""
        return np.array([len(answer.ids) for answer in self.answers], dtype=float)

    def figures(self) -> dict[str, float]:
        """Means over the answers.

        length: tokens. ended: share that came to an end of turn. repetition: share of the runs of three tokens that
        stood in the same answer before.
        """
        return {
            "length": float(self.lengths.mean()),
            "ended": float(np.mean([answer.ended for answer in self.answers])),
            "repetition": float(np.mean([repetition(answer.ids) for answer in self.answers])),
        }


@dataclass
class Sampler:
    """How policies answer, the same for all of them."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens of a prompt; a longer one loses its start
    max_new_tokens: int
    temperature: float  # 0 = greedy, without log-probs
    seed: int  # the luck is another one than that of a training with this seed
    precision: str
    batch_size: int = 8

    def answers(
        self,
        policy: nn.Module,
        start: nn.Module,
        prompts: list[list[Message]],
        guidances: tuple[Guidance, Guidance] = (Guidance(), Guidance()),
        progress: str = "answers",
        seen: list[list[Message]] | None = None,
    ) -> Answers:
        """The policy's answers, and their log-probs against those of the start.

        guidances: of start and policy. seen: the prompts as the policy sees them, where the start sees others.
        """
        if policy is start and seen is None:
            written = self.write(start, prompts, guidances[0], progress)
            return Answers(written, np.zeros(len(prompts)) if self.temperature else None)
        written = self.write(policy, prompts if seen is None else seen, guidances[1], progress)
        if not self.temperature:
            return Answers(written, None)
        asked = self.ids(prompts, guidances[0])
        sides = [
            logps_of(model, said, self.temperature, self.precision, guidance).double().numpy()
            for model, said, guidance in (
                (policy, written, guidances[1]),
                (start, same_answers(written, asked), guidances[0]),
            )
        ]
        return Answers(written, sides[0] - sides[1])

    def ids(self, prompts: list[list[Message]], guidance: Guidance) -> list[list[int]]:
        return prompt_ids_of(self.tokenizer, prompts, self.max_length, guidance)

    def write(
        self,
        policy: nn.Module,
        prompts: list[list[Message]],
        guidance: Guidance,
        progress: str,
        seed: int | None = None,
    ) -> list[Answer]:
        return generate(
            policy,
            self.tokenizer,
            self.ids(prompts, guidance),
            self.max_new_tokens,
            self.temperature,
            self.seed if seed is None else seed,
            self.batch_size,
            self.precision,
            guidance,
            progress,
            range(FIRST_NUMBER, FIRST_NUMBER + len(prompts)),
        )

    def best_of(self, count: int, start: nn.Module, prompts: list[list[Message]], judge: RewardModel) -> Answers:
        """Of `count` answers of the start to each prompt that with the highest reward, with a bound of the KL.

        ln n - (n - 1) / n bounds the KL of best of n from above (https://arxiv.org/abs/2401.01879). The first answers
        are the start's own in this comparison, so that best of 1 is the start.
        """
        tries = [
            self.write(start, prompts, Guidance(), f"best of {count}: {i + 1}", self.seed + i) for i in range(count)
        ]
        scores = np.stack([rewards_of(judge, prompts, answers) for answers in tries])  # [count, prompts]
        best = [tries[i][place] for place, i in enumerate(scores.argmax(axis=0))]
        return Answers(best, None, math.log(count) - (count - 1) / count)


def same_answers(answers: list[Answer], prompts: list[list[int]]) -> list[Answer]:
    """The answers behind other prompts (ids)."""
    return [Answer(ids, a.ids, a.text, a.ended) for a, ids in zip(answers, prompts, strict=True)]


def rewards_of(judge: RewardModel, prompts: list[list[Message]], answers: list[Answer]) -> np.ndarray:
    """Rewards [prompts] of answers, on the prompts without guidance."""
    said = [[*prompt, {"role": "assistant", "content": a.text}] for prompt, a in zip(prompts, answers, strict=True)]
    return judge.score(said).double().numpy()


def compared(before: Answers, after: Answers, rewards: tuple[np.ndarray, np.ndarray]) -> dict[str, object]:
    """Return the fields of a comparison in eval.json: `evaluation.comparison`, and the figures of both sides' answers.

    difference_at_equal_length: the difference of rewards that remains for two answers of equal length.
    """
    found = comparison(*rewards, after.kl)
    for side, which in (("before", before), ("after", after)):
        found |= {f"{name}_{side}": value for name, value in which.figures().items()}
    longer = np.log(after.lengths) - np.log(before.lengths)
    return found | {"difference_at_equal_length": at_equal_length(rewards[1] - rewards[0], longer)}
