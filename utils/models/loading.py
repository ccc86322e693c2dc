"""Choose device and precision; load models, add adapters, and save a model with proof that it reloads."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from utils.runs import read_json
from utils.script import explain_missing, pick, say, stop

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROOF_ROWS = 8  # rows whose scores are compared before and after a save
PROOF_ABSOLUTE = 1e-5  # largest difference after reloading the same weights
PROOF_RELATIVE = 1e-3  # the same for merged adapters, because W + BA is rounded once more
DROPOUTS = ("attention_dropout", "hidden_dropout", "dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")


logging.disable_progress_bar()  # loading and writing weights takes a second; downloads keep their bars


def choose_device(name: str = "") -> torch.device:
    """Return the device called `name`, or the best one: cuda, then mps, then cpu. Stop if it is missing.

    Under a launcher each process gets the GPU of its LOCAL_RANK.
    """
    from accelerate import PartialState

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name or next(kind for kind in available if available[kind])
    if not pick(available, "DEVICE", kind):
        stop(f"DEVICE = {kind!r} is not available here; choose from: {', '.join(k for k in available if available[k])}")
    if kind == "mps":
        return torch.device("mps")
    # the other processes wait while the first one evaluates, which can exceed NCCL's limit of ten minutes
    return PartialState(cpu=kind == "cpu", timeout=timedelta(days=1)).device


def choose_device_and_precision(
    device_name: str, precision_name: str, deepspeed: bool = True
) -> tuple[torch.device, str]:
    """Return (device, precision) for the two constants, and print the reason.

    deepspeed: whether the script's training loop supports DeepSpeed. Stop under a launcher that shards the weights:
    sampling, judging and saving need them whole.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        stop("FSDP and ZeRO-3 shard the weights, and the scripts here need them whole: use configs/multi_gpu.yaml")
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if with_deepspeed and not deepspeed:
        stop("this script has its own training loop, without DeepSpeed: use configs/multi_gpu.yaml")
    device = choose_device(device_name)
    if device.type == "cuda" and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        say(f"using one of {torch.cuda.device_count()} GPUs: start with `accelerate launch` to use all of them")
    precision, reason = choose_precision(precision_name, device)
    if precision != "fp32" and with_deepspeed:
        stop("DeepSpeed would turn the weights into 16 bits: set PRECISION = fp32, or use configs/multi_gpu.yaml")
    say(f"device {device}, precision {precision}: {reason}")
    return device, precision


def choose_precision(name: str, device: torch.device) -> tuple[str, str]:
    """Return (fp32 | bf16 | fp16, reason): `name` if it is set, else what the device computes natively.

    bf16 and fp16 mean autocast: weights stay float32, and so do heads, log-probs and losses.
    """
    if name:
        pick(PRECISIONS, "PRECISION", name)
        if name == "fp16" and device.type != "cuda":
            stop(f"PRECISION = 'fp16' needs a GradScaler, which {device.type} does not have: use fp32 or bf16")
        return name, "set by PRECISION"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return "bf16", "this GPU computes bf16 natively"
        return "fp16", "this GPU has no native bf16: fp16 autocast with a GradScaler over float32 weights"
    if device.type == "mps":
        return "fp32", "bf16 is emulated on M1 and M2, and fp16 needs a GradScaler"
    if cpu_has_bf16():
        return "bf16", "this CPU multiplies bf16 natively (AMX or AVX512-BF16)"
    return "fp32", "this CPU has no native bf16"


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 in hardware; AVX512-BF16 measured 2.5 times float32, AMX nearly 4."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context that computes in `precision`; fp32 changes nothing."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation for the block, then back to the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def load_causal(name: str, constant: str = "MODEL") -> PreTrainedModel:
    """Load a causal language model with float32 weights from a hub name, a folder, or a folder with an adapter.

    Attention is sdpa, which accepts the 4-D masks of shared-prompt rows on every device. Stop at a classifier:
    transformers would load its body without a warning.
    """
    architectures = read_json(Path(name) / "config.json").get("architectures") or []
    if any("SequenceClassification" in architecture for architecture in architectures):
        stop(f"{constant} = {name!r} is a reward model: name a language model")
    if (Path(name) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return load(AutoPeftModelForCausalLM, constant, name).merge_and_unload().requires_grad_(True)
    return load(AutoModelForCausalLM, constant, name)


def load_classifier(name: str, labels: int, constant: str = "MODEL", **options: Any) -> PreTrainedModel:
    """Load a classifier with float32 weights; its head is `model.score` [labels, hidden], random if it is new."""
    return load(AutoModelForSequenceClassification, constant, name, num_labels=labels, **options)


def load(kind: Any, constant: str, name: str, **options: Any) -> Any:
    """Return kind.from_pretrained(name) with float32 weights; stop with the reason if that fails."""
    try:
        return kind.from_pretrained(name, dtype=torch.float32, attn_implementation="sdpa", **options)
    except OSError as error:
        explain_missing(constant, name, error)
    except ValueError as error:  # transformers: this architecture has no such model class
        if "Unrecognized" not in str(error):
            raise
        stop(f"{constant} = {name!r} is not a {kind.__name__.removeprefix('AutoModelFor')} model")


def is_there(name: str) -> bool:
    """Return whether a folder, the cache or the hub has a model of that name."""
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return False
    return True


def without_dropout(model: nn.Module) -> nn.Module:
    """Turn the model's own dropout off: policy and reference must be the same function at the start."""
    for owner in (model.config, *model.modules()):  # attention layers copy the rate from the config when built
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
        for name in DROPOUTS:
            if isinstance(getattr(owner, name, None), float):
                setattr(owner, name, 0.0)
    return model


def add_lora(
    model: nn.Module, task: str, rank: int, alpha: int, dropout: float, targets: tuple[str, ...], head: str = ""
) -> nn.Module:
    """Return the model with low-rank adapters on the layers named in `targets`; only they and `head` are trained.

    task: "CAUSAL_LM" or "SEQ_CLS". head: a new layer to train and save whole beside the adapters; PEFT silently drops
    the head of a reward model that is not named here.
    """
    from peft import LoraConfig, get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    missing = sorted(set(targets) - names) if targets else ["nothing"]
    if missing:
        stop(f"LORA_TARGETS: no layer is called {', '.join(missing)}; this model has {', '.join(sorted(names))}")
    config = LoraConfig(
        task_type=task,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        modules_to_save=[head] if head else None,
    )
    return get_peft_model(model, config)


def prepare_model(model: nn.Module, task: str, settings: dict[str, Any], head: str = "") -> nn.Module:
    """Return the model with the adapters and the gradient checkpointing that the constants ask for.

    task and head: see `add_lora`. settings: the constants of the script.
    """
    if settings["USE_LORA"]:
        rank, alpha, dropout = settings["LORA_RANK"], settings["LORA_ALPHA"], settings["LORA_DROPOUT"]
        model = add_lora(model, task, rank, alpha, dropout, settings["LORA_TARGETS"], head)
    if settings["GRADIENT_CHECKPOINTING"]:
        use_gradient_checkpointing(model)
    return model


def use_gradient_checkpointing(model: nn.Module) -> None:
    """Compute activations again in the backward pass: a third more time, for a fraction of the memory."""
    plain(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def plain(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, adapters active, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(model: Any) -> Any:
    """Return a transformers or PEFT model without its head: from ids to hidden states."""
    return getattr(plain(model), plain(model).base_model_prefix)


def count_parameters(model: nn.Module) -> str:
    """Return a phrase for the log: `trains 0.92 of 135.4 million parameters`."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"trains {trained / 1e6:.2f} of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters"


def save_with_proof(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    reload: Callable[[str], nn.Module],
    score: Callable[[Any], torch.Tensor],
) -> None:
    """Save a plain folder, load it into a fresh object and compare scores. Merge adapters; keep them in adapter/.

    model: a transformers or PEFT model; adapters are merged in place. reload: from the folder's name to a fresh model.
    score: from a model to float32 scores of PROOF_ROWS rows. Raise RuntimeError if scores differ by more than
    PROOF_ABSOLUTE (with adapters: PROOF_RELATIVE of the largest score).
    """
    model.eval()
    device = next(model.parameters()).device  # score both on it: sums on another device differ by more than the limit
    with torch.no_grad():
        before = score(model)
        merged = hasattr(model, "merge_and_unload")
        if merged:
            model.save_pretrained(folder / "adapter")
            tokenizer.save_pretrained(folder / "adapter")
            model = model.merge_and_unload()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.cpu()  # the device may not have room for two
        after = score(reload(str(folder)).to(device).eval())
        model.to(device)
    difference = (before - after).abs().max().item()
    limit = PROOF_RELATIVE * before.abs().max().item() if merged else PROOF_ABSOLUTE
    if not difference <= limit:
        raise RuntimeError(f"{folder}: scores differ by {difference:.2e} after reloading (limit {limit:.1e})")
    say(f"saved {folder}; reloaded, {len(before)} rows score the same (largest difference {difference:.1e})")
