"""Compare training steps of a tiny model on a device with the CPU in float32."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

from utils.script import say

if TYPE_CHECKING:
    import torch
    from torch import nn

    Step = tuple[float, dict[str, torch.Tensor]]  # loss, and the gradient of each parameter (float32, on the CPU)

# largest relative difference from the CPU in fp32 that rounding explains
LIMITS = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}


def row(name: str, *cells: str) -> None:
    say(f"  {name:<17}" + "  ".join(f"{cell:<14}" for cell in cells).rstrip())


def tiny_model(seed: int) -> nn.Module:
    """A random 2-layer Llama (float32, on the CPU) with the vocabulary of SmolLM2: MPS has been wrong at that size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, use_cache=False))


def one_step(model: nn.Module, ids: torch.Tensor, device: torch.device, precision: str) -> Step:
    """Forward and backward of a copy of the model on ids [rows, tokens], as the trainers do it in this precision."""
    import torch

    from utils.models.loading import PRECISIONS

    model, ids = copy.deepcopy(model).to(device).train(), ids.to(device)
    scale = 1024.0 if precision == "fp16" else 1.0  # what a GradScaler is for: small gradients are 0 in fp16
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
    """Relative differences of loss and gradient, and in words: what exceeds `limit`, is not finite, got no gradient."""
    (loss, gradients), (right_loss, right) = step, reference
    apart = norm({name: gradients[name] - right[name] for name in right})
    off = {"loss": abs(loss - right_loss) / abs(right_loss), "gradient": apart / (norm(right) or 1.0)}
    faults = [f"the {name} is off by {value:.1e} (relative)" for name, value in off.items() if not value <= limit]
    zero = [name for name, gradient in gradients.items() if not gradient.any()]
    return off, faults + [f"the gradient of {name} is zero" for name in zero[:1]]


def prove(model: nn.Module, device: torch.device, precision: str, seed: int) -> list[str]:
    """Print steps of the model on the device beside the CPU in fp32; returns what is wrong, [] if nothing is."""
    import torch

    say("proof: forward and backward of a tiny Llama (off by: relative difference from fp32 on the CPU)")
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(seed)
    left, right = torch.randn(256, 576, generator=generator), torch.randn(576, 1536, generator=generator)
    apart = (left.to(device) @ right.to(device)).cpu() - left @ right
    matmul = (apart.norm() / (left @ right).norm()).item()
    row("fp32 matmul", f"off by {matmul:.1e}")
    faults = [] if matmul <= LIMITS["fp32"] else [f"an fp32 matmul is off by {matmul:.1e} (relative)"]
    for rows, tokens in ((4, 64), (2, 128)):  # two shapes, since gradients on MPS have been wrong after a change
        ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)
        step, reference = one_step(model, ids, device, precision), one_step(model, ids, cpu, "fp32")
        off, wrong = compare(step, reference, LIMITS[precision])
        values = {"loss": step[0], "gradient": norm(step[1])}
        row(f"{rows} x {tokens} tokens", *(f"{name} {values[name]:.4f} (off by {off[name]:.1e})" for name in values))
        faults += wrong
    row("verdict", "MISMATCH: do not train like this" if faults else "ok")
    return faults
