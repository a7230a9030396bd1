"""A tiny model in the place of the real one: the same architecture and vocabulary, a few small layers, fresh weights.

Fresh weights say nothing that a tool or a reward could be tried on. So the stand-in is taught for a few seconds to
write what a policy writes: calls of the user's tools, and answers, right ones and wrong ones.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conf.errors import ConfigError
from conf.schema import Config, TaskConfig, ToolFormat
from rl.tiny import write_weights
from rollout.environment import Environment
from rollout.seeds import derive_seed
from rollout.tools import Tool, ToolReply
from rollout.types import Prompt, StopReason

HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, HEAD_DIM = 64, 2, 2, 32
"""vLLM on CPU refuses heads of 16."""
INTERMEDIATE_SIZE = 128
SMALL = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "head_dim": HEAD_DIM,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_window_layers": NUM_LAYERS,
}
"""Sizes by the names that configs give them; those a config lacks, or has none of, are left out."""
CONFIG_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
"""What is fetched of a hub model: everything but its weights."""
TEACHING_STEPS, TEACHING_BATCH, TEACHING_CONTEXT = 150, 4, 512
TEACHING_RATE = 1e-2
FIRST_LOSS, SMOOTH_STEPS = 4.0, 5
"""Of the running mean that says when to stop."""
GOOD_LOSS = 0.3
"""Nats a token at which teaching ends: turns are then mostly well-formed and still differ."""
NEGATIVES = 2048
"""Words of the vocabulary that a teaching step compares with; all of a large one would take most of a minute."""
INITIAL_STD = 0.06
"""The usual 0.02 learns far slower at this size."""
WORDS_SHOWN = 6
BROKEN_CALL = "<tool_call> {"
"""No call in any format; in a format of words and in Llama's it is something else that is wrong, or an answer."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One demonstration: tokens, and which of them are the policy's own."""

    token_ids: list[int]
    is_action: list[bool]


@dataclass(frozen=True, slots=True)
class Tried:
    """One call of a tool with arguments made up from its schema."""

    tool: str
    arguments: dict[str, Any]
    reply: ToolReply


def config_folder(path: str, scratch: Path) -> Path:
    """Folder with the config and the tokenizer of a model, without its weights.

    Args:
        path: model.path, a folder or a hub name; what the hub's cache lacks is fetched into `scratch`.
    Raises: ConfigError for a name that cannot be fetched.
    """
    if Path(path).is_dir():
        return Path(path).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(path, allow_patterns=CONFIG_FILES, local_files_only=True))
        if (cached / "config.json").is_file():
            return cached
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    try:
        return Path(snapshot_download(path, allow_patterns=CONFIG_FILES, cache_dir=scratch / "hub"))
    except Exception as error:
        raise ConfigError(
            f'model.path="{path}" is neither a folder on this machine nor a model whose config the hub gives out '
            f"({type(error).__name__}: {error}). Check the name, log in with `hf auth login` for a gated model, or "
            "give the path of a folder with config.json and the tokenizer."
        ) from error


def small_config(config: Any) -> Any:
    """The same kind of config with a few small layers; its vocabulary and its positions stay.

    Args:
        config: a transformers config of a causal LM; not changed.
    """
    small = type(config)(**config.to_dict())
    text = small.get_text_config()
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    for name, value in SMALL.items():
        if getattr(text, name, None):
            setattr(text, name, min(value, getattr(text, name)) if name != "hidden_size" else value)
    if kv_heads:
        text.num_key_value_heads = max(1, text.num_attention_heads * kv_heads // heads)
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types[: text.num_hidden_layers])
    if getattr(text, "initializer_range", None):
        text.initializer_range = INITIAL_STD
    if getattr(small, "quantization_config", None) is not None:
        del small.quantization_config
    small.dtype = "float32"
    return small


def write_stand_in(source: Path, folder: Path, seed: int) -> Any:
    """Write a fresh stand-in for the model whose config and tokenizer lie in `source`; returns the model.

    Raises: ConfigError where transformers can make no small model of this kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = small_config(AutoConfig.from_pretrained(source))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("stand-in", seed))
            model = AutoModelForCausalLM.from_config(config).float()
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"no tiny stand-in can be made of the model in {source} ({type(error).__name__}: {error}): Grove trains "
            "causal language models that transformers knows by their config.json. Check the file, or give such a model."
        ) from error
    write_weights(model, folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    if (source / "generation_config.json").is_file():  # names tokens that end a turn
        shutil.copy(source / "generation_config.json", folder)
    return model


def made_up_arguments(tool: Tool, question: str) -> dict[str, Any]:
    """Arguments that fit a tool's schema: its own choices and defaults, else words of the question, 1, true ..."""
    words = question.split()[:WORDS_SHOWN]
    return {name: _made_up(schema, words) for name, schema in tool.parameters.items()}


def _made_up(schema: dict[str, Any], words: Sequence[str]) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    if "default" in schema:
        return schema["default"]
    kind = schema.get("type", "string")
    kind = kind[0] if isinstance(kind, list) else kind
    match kind:
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case "array":
            return [_made_up(schema.get("items", {}), words)]
        case "object":
            return {name: _made_up(each, words) for name, each in schema.get("properties", {}).items()}
        case "null":
            return None
    return " ".join(words) or "text"


def call_text(tool: Tool, arguments: dict[str, Any], tool_format: ToolFormat) -> str:
    """A call as the policy would write it."""
    if tool_format is ToolFormat.words:
        return f"<call> {tool.name} {' '.join(map(str, arguments.values()))} </call>"
    if tool_format is ToolFormat.llama:
        return json.dumps({"name": tool.name, "parameters": arguments})
    return f"<tool_call>\n{json.dumps({'name': tool.name, 'arguments': arguments})}\n</tool_call>"


def answer_texts(answer: str, task: TaskConfig) -> list[str]:
    """Turns that answer: the reference twice, as it stands and behind the mark of worked solutions, and a wrong one."""
    texts = [answer or "yes", f"#### {answer or 'yes'}", "I do not know"]
    if task.tool_format is ToolFormat.words:
        return [f"<answer> {text} </answer>" for text in (texts[0], texts[2])]
    return texts


async def try_tools(tools: Sequence[Tool], prompt: Prompt, timeout_s: float) -> list[Tried]:
    """Call each tool once with made-up arguments."""
    tried = []
    for tool in tools:
        arguments = made_up_arguments(tool, prompt.question)
        tried.append(Tried(tool.name, arguments, await tool.call(arguments, prompt.data, timeout_s)))
    return tried


async def odd_turns(environment: Environment, tokenizer: Any, prompt: Prompt) -> None:
    """What a policy writes sooner or later: a call that cannot be read, and a turn that its token limit cuts."""
    for text, stopped in ((BROKEN_CALL, True), ("a turn without an end", False)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        await environment.act(environment.reset(prompt), [*ids, environment.stop_token_ids[0]], stopped=stopped)


async def demonstrations(
    cfg: Config, tokenizer: Any, environment: Environment, tools: Sequence[Tool], prompts: Sequence[Prompt]
) -> list[Shown]:
    """What the stand-in is taught: each prompt answered at once, and after a call of each tool in turn."""
    shown = []
    stop = [] if cfg.task.tool_format is ToolFormat.words else [environment.stop_token_ids[0]]

    def ids_of(text: str) -> list[int]:
        room = cfg.rollout.max_turn_tokens - len(stop)
        return tokenizer(text, add_special_tokens=False)["input_ids"][:room] + stop

    for number, prompt in enumerate(prompts):
        answers = answer_texts(prompt.answer, cfg.task)
        for place, answer in enumerate(answers):
            turns = [ids_of(answer)]
            if tools:
                tool = tools[(number + place) % len(tools)]
                call = call_text(tool, made_up_arguments(tool, prompt.question), cfg.task.tool_format)
                shown.append(await _played(environment, prompt, [ids_of(call), turns[0]]))
            shown.append(await _played(environment, prompt, turns))
    return shown


async def _played(environment: Environment, prompt: Prompt, turns: Sequence[list[int]]) -> Shown:
    """The tokens of a conversation in which the policy says these turns, as far as the environment goes on."""
    state, token_ids = environment.reset(prompt), list(prompt.token_ids)
    is_action = [False] * len(token_ids)
    for action_ids in turns:
        turn = await environment.act(state, action_ids, stopped=action_ids[-1] in environment.stop_token_ids)
        token_ids += action_ids + turn.observation_ids
        is_action += [True] * len(action_ids) + [False] * len(turn.observation_ids)
        if turn.stop is not StopReason.continues:
            break
        state = turn.state
    return Shown(token_ids, is_action)


def teach(model: Any, shown: Sequence[Shown], seed: int) -> float:
    """Train a stand-in on demonstrations; returns the loss it came to, in nats a token.

    A step compares the words that are said with a few thousand others, weighted to stand for all of the vocabulary.
    """
    draw = random.Random(derive_seed("teaching", seed))
    head = model.get_output_embeddings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHING_RATE, weight_decay=0.0, fused=True)
    smooth = FIRST_LOSS
    for _ in range(TEACHING_STEPS):
        batch = [_tail(each) for each in draw.sample(shown, min(TEACHING_BATCH, len(shown)))]
        ids_BT = pad_sequence([torch.tensor(each.token_ids) for each in batch], batch_first=True)
        is_action_BT = pad_sequence([torch.tensor(each.is_action) for each in batch], batch_first=True)[:, 1:]
        length_B = torch.tensor([len(each.token_ids) for each in batch])
        mask_BT = (torch.arange(ids_BT.shape[1]) < length_B[:, None]).long()
        hidden_BTD = model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        loss = _sampled_loss(hidden_BTD[:, :-1][is_action_BT], head.weight, ids_BT[:, 1:][is_action_BT], draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smooth += (loss.item() - smooth) / SMOOTH_STEPS
        if smooth < GOOD_LOSS:
            break
    return smooth


def _tail(shown: Shown) -> Shown:
    """Without the beginning of a long prompt: what is learnt here hangs on the last few words."""
    start = max(0, shown.is_action.index(True) - TEACHING_CONTEXT)
    return Shown(shown.token_ids[start:], shown.is_action[start:])


def _sampled_loss(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, draw: random.Random) -> Tensor:
    """Cross entropy over the words that are said and some of the others, each of which stands for its share of them."""
    said_S, place_R = target_R.unique(return_inverse=True)
    said = set(said_S.tolist())
    found = sorted(set(draw.sample(range(len(weight_VD)), min(NEGATIVES, len(weight_VD)))) - said)
    said_RS = hidden_RD @ weight_VD[said_S].T
    if not found:
        return torch.nn.functional.cross_entropy(said_RS, place_R)
    share = torch.tensor((len(weight_VD) - len(said)) / len(found))
    other_RO = hidden_RD @ weight_VD[torch.tensor(found)].T + share.log()
    return torch.nn.functional.cross_entropy(torch.cat([said_RS, other_RO], 1), place_R)
