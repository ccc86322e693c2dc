"""Hidden states of shared rows: both answers behind one prompt, neither of which sees the other."""

import torch
from torch import nn

from utils.models import plain

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
