"""Log-probabilities of answers: only answer tokens meet the vocabulary, a few hundred at a time."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.hidden import CHOSEN, PROMPT, REJECTED, hidden_states
from utils.models import plain

ROWS_AT_ONCE = 512  # answer tokens whose logits are in memory at once: 512 x 49,152 in float32 are 100 MB


def token_logps(
    model: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log pi(target) [tokens], float32, of hidden states [tokens, hidden] that predict targets [tokens].

    The logits are computed again in the backward pass, so that they never are in memory all at once.
    """

    def chunk(some: torch.Tensor, these: torch.Tensor) -> torch.Tensor:
        logits = logits_of(model, some, temperature)
        return logits.gather(1, these[:, None])[:, 0] - logits.logsumexp(dim=1)

    parts = zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, some, these, use_reentrant=False) for some, these in parts])
    return torch.cat([chunk(some, these) for some, these in parts])


def logits_of(model: nn.Module, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits [tokens, vocabulary] at a temperature, in float32 whatever the precision of the body."""
    with torch.autocast(hidden.device.type, enabled=False):
        return plain(model).get_output_embeddings()(hidden.float()) / temperature


def answer_logps(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    vectors: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums of log pi over the tokens of both answers [batch, 2], numbers of tokens [batch, 2]), float32.

    batch: of PairCollator. vectors: see `hidden_states`.
    """
    hidden, targets, answer = answer_hidden(model, batch, vectors)
    logps, rows = token_logps(model, hidden, targets, temperature), len(batch["input_ids"])
    return sum_by(answer, logps, rows), sum_by(answer, torch.ones_like(logps), rows)


@torch.no_grad()
def answer_logps_and_entropies(
    model: nn.Module, batch: dict[str, torch.Tensor], temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums of log pi, sums of the entropy of each token's distribution in nats) [batch, 2], float32, no gradient."""
    hidden, targets, answer = answer_hidden(model, batch, None)
    logps, entropies = [], []
    for some, these in zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        distribution = logits_of(model, some, temperature).log_softmax(dim=1)
        logps.append(distribution.gather(1, these[:, None])[:, 0])
        entropies.append(torch.special.entr(distribution.exp()).sum(dim=1))
    rows = len(batch["input_ids"])
    return sum_by(answer, torch.cat(logps), rows), sum_by(answer, torch.cat(entropies), rows)


def answer_hidden(
    model: nn.Module, batch: dict[str, torch.Tensor], vectors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states that predict the answers' tokens [tokens, hidden], those tokens [tokens], their answer [tokens]).

    The first token of each answer is predicted by the last one of the prompt, also that of the rejected answer, which
    stands behind the chosen one. Answers count 2 row for the chosen and 2 row + 1 for the rejected one.
    """
    segments, ids = batch["segments"], batch["input_ids"]
    row, place = torch.nonzero(segments >= CHOSEN, as_tuple=True)  # [tokens] each
    which = segments[row, place]
    prompt = (segments == PROMPT).sum(dim=1)  # [batch]
    first = (which == REJECTED) & (segments[row, place - 1] != REJECTED)
    source = torch.where(first, prompt[row] - 1, place - 1)
    return hidden_states(model, batch, vectors)[row, source], ids[row, place], 2 * row + (which == REJECTED)


def sum_by(answer: torch.Tensor, values: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums of values [tokens] over the tokens of each answer [rows, 2]."""
    return torch.zeros(2 * rows, device=values.device).index_add(0, answer, values).view(-1, 2)


def check_head(model: nn.Module, ids: torch.Tensor) -> float:
    """Largest difference between `token_logps` and the log-softmax of the model's own logits on ids [1, length].

    Above rounding where an architecture does something to its logits after the head (caps, scales).
    """
    model = plain(model)
    with torch.no_grad():
        body = getattr(model, model.base_model_prefix)
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        ours = token_logps(model, hidden[0, :-1], ids[0, 1:])
        theirs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
    return (ours - theirs.gather(1, ids[0, 1:, None])[:, 0]).abs().max().item()
