"""Hidden states of shared rows: both answers behind one prompt, neither of which sees the other."""

import torch
from torch import nn

from utils.models import plain
from utils.script import stop

PADDING, PROMPT, CHOSEN, REJECTED = 0, 1, 2, 3  # what a position of a shared row belongs to


def shared_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom [batch, 1, length, length], bool, of segments [batch, length].

    Each position sees the prompt and its own segment up to itself; padding sees itself, since a row that sees
    nothing is NaN after the softmax.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    seen = (index[:, None] >= index[None, :]) & ((key == PROMPT) | (key == query)) & (key != PADDING)
    return (seen | (index[:, None] == index[None, :]))[:, None]


def hidden_states(
    model: nn.Module, batch: dict[str, torch.Tensor], vectors: torch.Tensor | None = None
) -> torch.Tensor:
    """Last hidden states [batch, length, hidden] of shared rows, from a causal or classification model.

    vectors [n, hidden] take the place of the embeddings of n tokens from batch["vectors_at"] [batch] on, -1 = nowhere.
    """
    model = plain(model)
    body = getattr(model, model.base_model_prefix)
    mask = shared_mask(batch["segments"])
    if model.config._attn_implementation == "eager":  # it adds the mask to the scores, sdpa takes booleans
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    read = {"input_ids": batch["input_ids"]}
    if vectors is not None:
        read = {"inputs_embeds": with_vectors(body, batch["input_ids"], batch["vectors_at"], vectors)}
    return body(**read, attention_mask=mask, position_ids=batch["position_ids"], use_cache=False).last_hidden_state


def with_vectors(body: nn.Module, ids: torch.Tensor, at: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Embeddings [batch, length, hidden] of ids [batch, length], with vectors [n, hidden] from `at` [batch] on."""
    embedded = body.get_input_embeddings()(ids)
    place = torch.arange(ids.shape[1], device=ids.device) - at[:, None]  # [batch, length], 0 at the first vector
    here = (place >= 0) & (place < len(vectors)) & (at[:, None] >= 0)
    put = vectors[place.clamp(0, len(vectors) - 1)].to(embedded.dtype)  # [batch, length, hidden]
    return torch.where(here[..., None], put, embedded)


@torch.no_grad()
def check_shared_rows(model: nn.Module, row: dict, collator: object) -> None:
    """End the script where the rejected answer of a shared row would see the chosen one.

    Attention obeys the mask of a shared row; convolutions and linear attention, which some architectures have, do not.
    row: of a processed folder. collator: a PairCollator.
    """
    was, prompt = model.training, row["input_ids"][: sum(row["attention_mask"])]
    alone = row | {"chosen_ids": row["rejected_ids"], "rejected_ids": []}
    model.eval()
    found = []
    for one, side in ((row, 1), (alone, 0)):
        batch = collator.shared_rows([prompt], [one], "none")
        found.append(hidden_states(model, batch)[0, batch["ends"][0, side]])
    model.train(was)
    difference = ((found[0] - found[1]).abs().max() / found[1].abs().max()).item()
    if not difference <= 1e-2:  # NaN too
        stop(
            f"in this architecture an answer sees the other one of its pair (states differ by {difference:.2g}): pairs "
            "share a row here, and only attention can be told not to look"
        )
