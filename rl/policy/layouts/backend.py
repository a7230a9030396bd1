"""Which attention function a model's layers call: ours, or transformers' own."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rl.policy.layouts.attention import ATTENTION_NAME, register_tree_attention


def use_tree_attention(backbone: nn.Module) -> None:
    """From now on the layers call `tree_attention`; a layout that passes a plan says so before each forward pass."""
    register_tree_attention()
    _hugging_face(backbone).config._attn_implementation = ATTENTION_NAME


def use_plain_attention(backbone: nn.Module) -> None:
    """From now on the layers call transformers' own attention, with the masks that the model itself asks for.

    It stays so until another layout asks for the other kind: checkpointed layers look the function up in backward.
    """
    model = _hugging_face(backbone)
    # Transformers' sdpa drops the cap of the scores without a word; eager knows it.
    is_capped = getattr(text_config(backbone), "attn_logit_softcapping", None) is not None
    model.config._attn_implementation = "sdpa" if model._supports_sdpa and not is_capped else "eager"


def text_config(backbone: nn.Module) -> PretrainedConfig:
    """The config of the language model, which models of several kinds of input keep beside others."""
    return _hugging_face(backbone).config.get_text_config()


def _hugging_face(backbone: nn.Module) -> PreTrainedModel:
    assert isinstance(backbone.config, PretrainedConfig), "a backbone is a model of transformers"
    return cast(PreTrainedModel, backbone)
