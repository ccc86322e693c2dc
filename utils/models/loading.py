"""Choose device and precision; load models, give them adapters, save them with proof."""

import os
import platform
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging

from utils.runs import read_json
from utils.script import explain_missing, pick, say, stop

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROOF_ROWS = 8  # a saved model is proved on so many rows
PROOF_ABSOLUTE = 1e-5  # largest difference after reloading the same weights
PROOF_RELATIVE = 1e-3  # the same for merged adapters, where W + BA is rounded once more


logging.disable_progress_bar()  # of loading and writing weights, which take a second; downloads keep theirs


def choose_device(name: str = "") -> torch.device:
    """The device called `name`, or the best one that is there: cuda, then mps, then cpu.

    Under a launcher each process gets the GPU of its LOCAL_RANK. Ends the script if the named device is not there.
    """
    from accelerate import PartialState

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name or next(kind for kind, is_there in there.items() if is_there)
    if not pick(there, "DEVICE", kind):
        stop(f"DEVICE = {kind!r} is not there on this machine, here: {', '.join(k for k in there if there[k])}")
    if kind == "mps":
        return torch.device("mps")
    # the others wait while the first process evaluates, which may take longer than the ten minutes NCCL allows
    return PartialState(cpu=kind == "cpu", timeout=timedelta(days=1)).device


def choose_device_and_precision(
    device_name: str, precision_name: str, deepspeed: bool = True
) -> tuple[torch.device, str]:
    """(device, precision) by the two constants, printed with the reason.

    deepspeed: whether the script's loop is one that DeepSpeed knows. Ends the script under a launcher that takes the
    weights apart: sampling, judging and saving need them whole.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        stop("FSDP and ZeRO-3 take the weights apart, and the scripts here need them whole: use configs/multi_gpu.yaml")
    if not deepspeed and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stop("this script has a loop of its own, which DeepSpeed does not know: use configs/multi_gpu.yaml")
    device = choose_device(device_name)
    if device.type == "cuda" and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        say(f"one of {torch.cuda.device_count()} GPUs is used: for all of them, start with `accelerate launch`")
    precision, reason = choose_precision(precision_name, device)
    if precision != "fp32" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stop("DeepSpeed would turn the weights into 16 bits: set PRECISION = fp32, or use configs/multi_gpu.yaml")
    say(f"device {device}, precision {precision}: {reason}")
    return device, precision


def choose_precision(name: str, device: torch.device) -> tuple[str, str]:
    """(fp32 | bf16 | fp16, the reason): what the device does natively, unless `name` says otherwise.

    bf16 and fp16 mean autocast: the weights stay float32, and heads, log-probs and losses are float32 too.
    """
    if name:
        pick(PRECISIONS, "PRECISION", name)
        if name == "fp16" and device.type != "cuda":
            stop(f"PRECISION = 'fp16' needs a GradScaler, which {device.type} has not: use fp32 or bf16")
        return name, "as asked for"
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
    """Whether the CPU multiplies bf16 in hardware; AVX512-BF16 measured 2.5 times float32, AMX nearly 4 times."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context that computes in `precision`; with fp32 it changes nothing."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def load_causal(name: str, constant: str = "MODEL") -> nn.Module:
    """A causal language model with float32 weights; `name` is a hub name, a folder, or a folder with an adapter.

    Attention is sdpa, which takes the 4-D masks of shared-prompt rows on every device. A classifier is refused:
    transformers would load its body and say nothing.
    """
    kinds = read_json(Path(name) / "config.json").get("architectures") or []
    if any("SequenceClassification" in kind for kind in kinds):
        stop(f"{constant} = {name!r} is a reward model: name a language model")
    if (Path(name) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return load(AutoPeftModelForCausalLM, constant, name).merge_and_unload().requires_grad_(True)
    return load(AutoModelForCausalLM, constant, name)


def load_classifier(name: str, labels: int, constant: str = "MODEL", **options: object) -> nn.Module:
    """A model with a linear head of `labels` outputs, float32; a head that is not in the files is random.

    Returns an AutoModelForSequenceClassification; its head is `model.score` [labels, hidden].
    """
    return load(AutoModelForSequenceClassification, constant, name, num_labels=labels, **options)


def load(kind: type, constant: str, name: str, **options: object) -> nn.Module:
    try:
        return kind.from_pretrained(name, dtype=torch.float32, attn_implementation="sdpa", **options)
    except OSError as error:
        explain_missing(constant, name, error)
    except ValueError as error:  # transformers: a model class that this architecture does not have
        if "Unrecognized" not in str(error):
            raise
        stop(f"{constant} = {name!r} is not a {kind.__name__.removeprefix('AutoModelFor')} model")


def is_there(name: str) -> bool:
    """Whether a model of that name can be had: a folder, the cache or the hub."""
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return False
    return True


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with its own dropout off: a policy and its reference are to be the same function at the start."""
    names = ("attention_dropout", "hidden_dropout", "dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name in names:  # attention layers copy the rate from the config when they are made
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)
    for name in names:
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model


def add_lora(
    model: nn.Module,
    task: str,
    rank: int,
    alpha: int,
    dropout: float,
    targets: tuple[str, ...],
    head: str = "",
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


def prepare_model(model: nn.Module, task: str, settings: dict, head: str = "") -> nn.Module:
    """Return the model with the adapters and the gradient checkpointing that the constants ask for.

    task and head: see `add_lora`. settings: the constants of the script.
    """
    if settings["USE_LORA"]:
        names = ("LORA_RANK", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGETS")
        model = add_lora(model, task, *(settings[name] for name in names), head)
    if settings["GRADIENT_CHECKPOINTING"]:
        use_gradient_checkpointing(model)
    return model


def use_gradient_checkpointing(model: nn.Module) -> None:
    """Compute activations again in the backward pass: about a third more time for a fraction of the memory."""
    plain(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def plain(model: nn.Module) -> nn.Module:
    """The transformers model itself, adapters active: what PEFT wraps, or the model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_parameters(model: nn.Module) -> str:
    """For the log: `trains 0.92 of 135.4 million parameters`."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"trains {trained / 1e6:.2f} of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters"


def save_with_proof(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    reload: Callable[[str], nn.Module],
    score: Callable[[nn.Module], torch.Tensor],
) -> None:
    """Save a plain folder, load it in a fresh object, and compare scores; adapters are merged and kept beside it.

    model: a transformers or PEFT model; merged in place if it has adapters.
    reload: from the folder's name to a fresh model. score: from a model to float32 scores of PROOF_ROWS rows.
    Raises RuntimeError where the difference exceeds PROOF_ABSOLUTE (adapters: PROOF_RELATIVE, relative to the
    largest score).
    """
    model.eval()
    device = next(model.parameters()).device  # two devices add up in two orders, which PROOF_ABSOLUTE does not forgive
    with torch.no_grad():
        before = score(model)
        merged = hasattr(model, "merge_and_unload")
        if merged:
            model.save_pretrained(folder / "adapter")
            tokenizer.save_pretrained(folder / "adapter")
            model = model.merge_and_unload()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.cpu()  # what fits the device once may not fit twice
        after = score(reload(str(folder)).to(device).eval())
        model.to(device)
    difference = (before - after).abs().max().item()
    limit = PROOF_RELATIVE * before.abs().max().item() if merged else PROOF_ABSOLUTE
    if not difference <= limit:
        raise RuntimeError(f"{folder}: scores differ by {difference:.2e} after reloading (limit {limit:.1e})")
    say(f"saved {folder}; reloaded, {len(before)} rows score the same (largest difference {difference:.1e})")
