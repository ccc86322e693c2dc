"""Compare training steps of a tiny model on a device with the CPU in float32."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from utils.script import say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Step = tuple[float, dict[str, torch.Tensor]]  # loss, and the gradient of each parameter (float32, on the CPU)

# largest relative difference from the CPU in fp32 that rounding explains
LIMITS = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}
VOCABULARY = 49152  # as SmolLM2: errors of MPS have depended on it
SHAPES = ((4, 64), (2, 128))  # rows, tokens: on MPS, gradients have been wrong after a change of shape


def row(name: str, *cells: str) -> None:
    say(f"  {name:<17}" + "  ".join(f"{cell:<14}" for cell in cells).rstrip())


def tiny_model(seed: int) -> PreTrainedModel:
    """Return a random 2-layer Llama (float32, on the CPU)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False))


def one_step(model: PreTrainedModel, ids: torch.Tensor, device: torch.device, precision: str) -> Step:
    """Return loss and gradients of a copy of the model on ids [rows, tokens], computed as the trainers do."""
    import torch

    from utils.models.loading import PRECISIONS

    model, ids = copy.deepcopy(model).to(device).train(), ids.to(device)  # type: ignore[arg-type]
    scale = 1024.0 if precision == "fp16" else 1.0  # like a GradScaler: small gradients are 0 in fp16
    with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        loss = model(input_ids=ids, labels=ids).loss.float()
    (loss * scale).backward()
    gradients = {
        name: torch.zeros(1) if parameter.grad is None else parameter.grad.float().cpu() / scale
        for name, parameter in model.named_parameters()
    }
    return loss.item(), gradients


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.hypot(*(gradient.norm().item() for gradient in gradients.values()))


def compare(step: Step, reference: Step, limit: float) -> tuple[dict[str, float], list[str]]:
    """Return (relative differences of loss and gradient, faults: differences above `limit`, nan, zero gradients)."""
    (loss, gradients), (right_loss, right) = step, reference
    difference = norm({name: gradients[name] - right[name] for name in right})
    off = {"loss": abs(loss - right_loss) / abs(right_loss), "gradient": difference / (norm(right) or 1.0)}
    faults = [f"the {name} is off by {value:.1e} (relative)" for name, value in off.items() if not value <= limit]
    zero = [name for name, gradient in gradients.items() if not gradient.any()]
    return off, faults + [f"the gradient of {name} is zero" for name in zero[:1]]


def prove(model: PreTrainedModel, device: torch.device, precision: str, seed: int) -> list[str]:
    """Print how far steps on the device are from the CPU in fp32, and return the faults."""
    import torch

    say("proof: forward and backward of a tiny Llama (off by: relative difference from fp32 on the CPU)")
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(seed)
    left, right = torch.randn(256, 576, generator=generator), torch.randn(576, 1536, generator=generator)
    difference = (left.to(device) @ right.to(device)).cpu() - left @ right
    matmul = (difference.norm() / (left @ right).norm()).item()
    row("fp32 matmul", f"off by {matmul:.1e}")
    faults = [] if matmul <= LIMITS["fp32"] else [f"an fp32 matmul is off by {matmul:.1e} (relative)"]
    for rows, tokens in SHAPES:
        ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
        step, reference = one_step(model, ids, device, precision), one_step(model, ids, cpu, "fp32")
        off, new_faults = compare(step, reference, LIMITS[precision])
        values = {"loss": step[0], "gradient": norm(step[1])}
        row(f"{rows} x {tokens} tokens", *(f"{name} {values[name]:.4f} (off by {off[name]:.1e})" for name in values))
        faults += new_faults
    row("verdict", "MISMATCH: do not train like this" if faults else "ok")
    return faults
