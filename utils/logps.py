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
    head = plain(model).get_output_embeddings()

    def chunk(some: torch.Tensor, these: torch.Tensor) -> torch.Tensor:
        with torch.autocast(some.device.type, enabled=False):
            logits = head(some.float()) / temperature
            return logits.gather(1, these[:, None])[:, 0] - logits.logsumexp(dim=1)

    parts = zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, some, these, use_reentrant=False) for some, these in parts])
    return torch.cat([chunk(some, these) for some, these in parts])


def answer_logps(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    vectors: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums of log pi over the tokens of both answers [batch, 2], numbers of tokens [batch, 2]), float32.

    batch: of PairCollator. The first token of each answer is predicted by the last one of the prompt, also that of
    the rejected answer, which stands behind the chosen one. vectors: see `hidden_states`.
    """
    segments, ids = batch["segments"], batch["input_ids"]
    row, place = torch.nonzero(segments >= CHOSEN, as_tuple=True)  # [tokens] each
    which = segments[row, place]
    prompt = (segments == PROMPT).sum(dim=1)  # [batch]
    first = (which == REJECTED) & (segments[row, place - 1] != REJECTED)
    source = torch.where(first, prompt[row] - 1, place - 1)
    hidden = hidden_states(model, batch, vectors)
    logps = token_logps(model, hidden[row, source], ids[row, place], temperature)
    answer = 2 * row + (which == REJECTED)
    sums = torch.zeros(2 * len(ids), device=logps.device).index_add(0, answer, logps)
    tokens = torch.zeros_like(sums).index_add(0, answer, torch.ones_like(logps))
    return sums.view(-1, 2), tokens.view(-1, 2)


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
