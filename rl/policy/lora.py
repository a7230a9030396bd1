"""Low-rank adapters by peft: a frozen model with a few trained weights beside its linear layers (arXiv 2106.09685).

    y = W x + (alpha / rank) * B A x,    A [rank, in] random, B [out, rank] zero at first

Weights go by the names that `rl.policy.model.TreePolicy` gives them, whole tensors, as a sharded policy gathers them;
so the live model is never changed to publish or save it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import cast

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from conf.errors import CheckpointError, ConfigError
from conf.schema import LoraConfig

ALL_LINEAR = "all-linear"
PREFIX = "model.base_model.model."
"""Before the Hugging Face name of every weight of a model with adapters, in a TreePolicy."""
ADAPTER_WEIGHT = re.compile(r"\.lora_([AB])\.default\.weight$")
ADAPTER_FILE = "adapter_model.safetensors"


def with_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """The model with fresh adapters, which alone are trained; at first it computes exactly what it did without them.

    Adapters are float32 where the model is bfloat16 or float16, because their small updates would be rounded away; the
    frozen weights keep their dtype.

    Args:
        model: changed in place: adapted layers are wrapped, all else is frozen.
        lora: rank above 0.
        seed: of the adapters' first weights; the global generators are left as they were.
    Raises: ConfigError for targets that match no linear layer, or that could not be merged for the engines.
    """
    assert lora.rank > 0, "rank 0 trains the whole model"
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),  # peft divides it by the rank, whatever number it is
        target_modules=_target_layers(model, lora.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # new layers are drawn on the CPU, wherever the model is
        adapted = peft.get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def base_causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal LM itself, its adapters in place: it has `base_model`, `config` and `save_pretrained`."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


@contextmanager
def without_adapters(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, the model computes what it did before training: the frozen reference of the KL, without a second copy."""
    assert isinstance(model, PeftModel), "without adapters it would be its own reference, and the KL always 0"
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    # Not by model.disable_adapter(): it also turns requires_grad off and on, and FSDP2 then fails in the next backward.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_weights(weights: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Weights of the plain model that computes what the adapted one does, by Hugging Face name.

    W + (alpha / rank) * B A is added up in float32 (float64 where the adapter is) and then rounded once to W's dtype.

    Args:
        weights: whole tensors by their names in a TreePolicy; a value head is left out.
        lora: what the adapters were made by.
    """
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not name.startswith(PREFIX) or ADAPTER_WEIGHT.search(name):
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            a_RI, b_OR = (weights[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            wide = torch.promote_types(a_RI.dtype, torch.float32)
            update_OI = (lora.alpha / lora.rank) * (b_OR.to(wide) @ a_RI.to(wide))
            weight = (weight.to(wide) + update_OI).to(weight.dtype)
        merged[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = weight
    return merged


def save_adapter(model: PreTrainedModel | PeftModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapters as a folder that `PeftModel.from_pretrained` loads.

    Args:
        model: with the adapters; only its description is read.
        weights: whole tensors by their names in a TreePolicy.
        folder: made where it is missing.
    """
    assert isinstance(model, PeftModel), "only adapters are saved as adapters"
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        ADAPTER_WEIGHT.sub(r".lora_\1.weight", name).removeprefix("model."): weight.contiguous()
        for name, weight in weights.items()
        if ADAPTER_WEIGHT.search(name)
    }
    save_file(named, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = copy(model.peft_config["default"])
    config.inference_mode = True  # as peft writes it: who loads it trains nothing unless asked to
    config.save_pretrained(str(folder))


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapters that `save_adapter` wrote, by their names in a TreePolicy.

    Raises: CheckpointError where the file is missing.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, so there are no adapters to continue from: the run was trained with "
            "model.lora.rank=0, or the checkpoint is not whole. Resume with the settings of the run, or from an older "
            "checkpoint."
        )
    return {
        "model." + re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name): weight
        for name, weight in load_file(path).items()
    }


def _target_layers(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Full names of the linear layers that the targets mean."""
    name_of_model, output = type(model).__name__, model.get_output_embeddings()
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    attention = {name for name in linear if "Attention" in type(model.get_submodule(name.rpartition(".")[0])).__name__}
    found: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            matching = {name for name, layer in linear.items() if layer is not output}
        else:
            matching = {name for name in linear if f".{name}".endswith(f".{target}")}
        if not matching:
            last_names = _last_names(linear)
            near = get_close_matches(target, last_names, n=3, cutoff=0.4) or last_names
            raise ConfigError(
                f"model.lora.targets names {target!r}, but {name_of_model} has no such linear layer, so nothing would "
                f"be trained there. Linear layers it has: {', '.join(near)}. Where that is the output layer alone, as "
                "in GPT-2, train the whole model by model.lora.rank=0."
            )
        found |= matching
    has_fused_experts = any("experts" in name and weight.ndim == 3 for name, weight in model.named_parameters())
    if has_fused_experts and (ALL_LINEAR in targets or not found <= attention):
        raise ConfigError(
            f"model.lora.targets={targets} on {name_of_model}, whose experts are fused tensors, not linear layers: "
            "they would stay frozen unnoticed, or get adapters that cannot be merged for the engines. Name layers of "
            f"its attention ({', '.join(_last_names(attention))}), or train the whole model by model.lora.rank=0."
        )
    is_tied = output is not None and output.weight is model.get_input_embeddings().weight
    if is_tied and any(linear[name] is output for name in found):
        raise ConfigError(
            f"model.lora.targets={targets} includes the output layer of {name_of_model}, which shares its weight with "
            "the input embedding: engines hold both as one, so merging the adapter would change the inputs too. Leave "
            "it out."
        )
    return sorted(found)


def _last_names(full_names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in full_names})
