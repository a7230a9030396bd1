from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import torch
from policy_trees import VOCABULARY, grown, paired, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trees import parse_tree

from conf.errors import ConfigError
from conf.schema import Config, LearnerConfig, LossConfig, ModelConfig
from rl.policy.learner import Learner, NonFiniteGradient, require_tree_exact
from rl.policy.pack import TreeCredit
from rollout.tree import ROOT

SHAPE = [ROOT, 0, 0, 1, 1, 2, 2, ROOT]
"""One fork at the root and binary forks below it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3 folder with a word tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("policy")
    tiny("qwen3").save_pretrained(folder)
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    tokenizer.save_pretrained(folder)
    return str(folder)


def config(*, dtype: str = "float32", learner: dict | None = None, loss: dict | None = None) -> Config:
    settings = {"num_threads": 1, "warmup_steps": 0, "learning_rate": 1e-3, **(learner or {})}
    return Config(model=ModelConfig(dtype=dtype), learner=LearnerConfig(**settings), loss=LossConfig(**(loss or {})))


def batch(num_prompts: int = 5, seed: int = 0) -> list[TreeCredit]:
    rng = random.Random(seed)
    trees = [grown(SHAPE, [(rng.randint(1, 4), 2) for _ in SHAPE], rng, name=f"test/{i}") for i in range(num_prompts)]
    return [paired(tree, rng).credit() for tree in trees]


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in learner.model.named_parameters()}


def largest_change(learner: Learner, before: dict[str, torch.Tensor]) -> float:
    return max((weight - before[name]).abs().max().item() for name, weight in weights(learner).items())


def rewarded_token(token: int) -> TreeCredit:
    """One prompt, one step of one token, advantage +1."""
    tree = parse_tree("q -> a", logprob=-3.0)
    tree.nodes[0].action_ids = [token]
    return TreeCredit(tree=tree, w_pos=[1.0], w_neg=[0.0], w0=[1.0])


def test_a_rewarded_token_becomes_likelier(checkpoint: str):
    learner = Learner(config(learner={"mini_batches": 1}), checkpoint)
    before = learner.score([1], [7])[0]
    for step in range(5):
        credit = rewarded_token(7)
        credit.tree.nodes[0].action_logprobs = learner.score([1], [7])
        metrics = learner.update([credit], step)
        assert metrics["loss/logprob_gap_nats"] < 1e-5
        assert metrics["loss/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert learner.score([1], [7])[0] > before + 0.5


def test_a_blamed_token_becomes_rarer(checkpoint: str):
    learner = Learner(config(learner={"mini_batches": 1}), checkpoint)
    before = learner.score([1], [7])
    credit = rewarded_token(7)
    credit.tree.nodes[0].action_logprobs = before
    learner.update([TreeCredit(tree=credit.tree, w_pos=[0.0], w_neg=[-1.0], w0=[1.0])], 0)
    assert learner.score([1], [7])[0] < before[0]


def test_counts_and_loss_of_one_token(checkpoint: str):
    learner = Learner(config(learner={"mini_batches": 1}), checkpoint)
    tree = parse_tree("q -> a -> (a1, a2)")
    for row, context_ids in [(0, [1]), (1, [1, 10]), (2, [1, 10])]:
        tree.nodes[row].action_logprobs = learner.score(context_ids, tree.nodes[row].action_ids)
    metrics = learner.update([TreeCredit(tree=tree, w_pos=[1.0, 1, 0], w_neg=[-0.5, 0, -1], w0=[2.0, 1, 1])], 0)
    counts = [metrics[f"learner/{name}_tokens"] for name in ("trained", "packed", "path")]
    assert counts == [3, 4, 6]  # a a1 a2; q a a1 a2; q a a1 and q a a2
    # At ratio 1 the loss is minus the mean advantage: -(0.5 + 1 - 1) / 4
    assert metrics["loss/policy"] == pytest.approx(-0.125, abs=1e-5)
    assert metrics["loss/total"] == metrics["loss/policy"]
    assert metrics["loss/clip_share"] == 0.0
    assert "loss/kl" not in metrics


def test_every_metric_is_declared(checkpoint: str):
    from rl.metrics import declared

    learner = Learner(config(loss={"kl_coef": 0.1, "entropy_coef": 0.01}), checkpoint)
    metrics = learner.update(batch(), 0)
    assert [name for name in metrics if declared(name) is None] == []
    expected = {
        "total",
        "policy",
        "kl",
        "entropy_nats",
        "clip_share",
        "approx_kl_nats",
        "ratio_max",
        "logprob_gap_nats",
    }
    assert {name.removeprefix("loss/") for name in metrics if name.startswith("loss/")} == expected


@pytest.mark.parametrize("pack_tokens", [1, 25, 60])
def test_packing_changes_neither_loss_nor_gradient(checkpoint: str, pack_tokens: int):
    results = []
    for tokens in (pack_tokens, 100_000):
        loss = {"kl_coef": 0.1, "entropy_coef": 0.01}
        learner = Learner(config(dtype="float64", learner={"pack_tokens": tokens}, loss=loss), checkpoint)
        results.append(learner.update(batch(), 0))
    for name in ("loss/total", "loss/policy", "loss/kl", "loss/entropy_nats", "loss/clip_share", "learner/grad_norm"):
        # Transformers' norms work in float32 inside, so the gradient agrees to float32.
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5, abs=1e-9), name
    assert results[0]["learner/path_tokens"] == results[1]["learner/path_tokens"]


def test_an_update_resumed_from_a_checkpoint_is_the_same_to_the_last_bit(checkpoint: str, tmp_path: Path):
    cfg = config(learner={"warmup_steps": 3})
    straight = Learner(cfg, checkpoint)
    straight.update(batch(seed=1), 0)
    straight.update(batch(seed=2), 1)

    first = Learner(cfg, checkpoint)
    first.update(batch(seed=1), 0)
    first.save_model(tmp_path)
    file = io.BytesIO()
    torch.save(first.optimizer_state(), file)
    resumed = Learner(cfg, checkpoint)
    resumed.load_model(tmp_path)
    resumed.load_optimizer_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    resumed.update(batch(seed=2), 1)
    assert largest_change(resumed, weights(straight)) == 0.0


def test_mini_batches_depend_on_seed_and_step_alone(checkpoint: str):
    runs = [Learner(config(learner={"mini_batches": 3}), checkpoint) for _ in range(3)]
    for run, step in zip(runs, (0, 0, 1), strict=True):
        run.update(batch(), step)
    assert largest_change(runs[1], weights(runs[0])) == 0.0
    assert largest_change(runs[2], weights(runs[0])) > 0.0


def test_learning_rate_warms_up_over_steps(checkpoint: str):
    learner = Learner(config(learner={"warmup_steps": 4, "learning_rate": 0.4}), checkpoint)
    rates = [learner.update([], step)["learner/learning_rate"] for step in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_nothing_to_train_moves_nothing_and_claims_no_loss(checkpoint: str):
    learner = Learner(config(), checkpoint)
    learner.update(batch(), 0)
    before = weights(learner)
    tree = parse_tree("q -> a")
    metrics = learner.update([TreeCredit(tree=tree, w_pos=[0.0], w_neg=[0.0], w0=[0.0])], 1)
    assert largest_change(learner, before) == 0.0
    assert metrics["learner/trained_tokens"] == 0
    assert not [name for name in metrics if name.startswith("loss/")]


def test_momentum_does_not_move_a_policy_that_learns_nothing(checkpoint: str):
    learner = Learner(config(), checkpoint)
    learner.update(batch(), 0)
    before = weights(learner)
    tree = parse_tree("q -> a")
    metrics = learner.update([TreeCredit(tree=tree, w_pos=[0.0], w_neg=[0.0], w0=[1.0])], 1)
    assert largest_change(learner, before) == 0.0
    assert metrics["loss/policy"] == 0.0
    assert metrics["loss/entropy_nats"] > 0.0
    assert "learner/grad_norm" not in metrics


def test_the_reference_holds_the_policy_back(checkpoint: str):
    gaps = {}
    for kl_coef in (0.0, 100.0):
        learner = Learner(config(learner={"mini_batches": 1}, loss={"kl_coef": kl_coef}), checkpoint)
        before = weights(learner)
        for step in range(6):
            metrics = learner.update([rewarded_token(7)], step)
        gaps[kl_coef] = abs(learner.score([1], [7])[0] - Learner(config(), checkpoint).score([1], [7])[0])
        assert largest_change(learner, before) > 0.0
    assert metrics["loss/kl"] > 0.0
    assert gaps[100.0] < 0.5 * gaps[0.0]


def test_a_gradient_that_is_not_finite_is_refused_before_it_spreads(checkpoint: str):
    learner = Learner(config(), checkpoint)
    before = weights(learner)
    credit = rewarded_token(7)
    credit.w_pos = [float("nan")]
    with pytest.raises(NonFiniteGradient, match="the gradient norm is nan"):
        learner.update([credit], 0)
    assert largest_change(learner, before) == 0.0
    assert learner.optimizer_state()["state"] == {}


def test_scores_are_those_of_the_plain_model(checkpoint: str):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    context_ids, action_ids = [1, 5, 9], [4, 4, 2]
    logp = plain(input_ids=torch.tensor([context_ids + action_ids])).logits[0].log_softmax(-1)
    expected = [logp[2, 4].item(), logp[3, 4].item(), logp[4, 2].item()]
    assert Learner(config(), checkpoint).score(context_ids, action_ids) == pytest.approx(expected, abs=1e-5)


def test_weights_are_written_whole_under_their_names_with_the_tied_head_left_out(checkpoint: str, tmp_path: Path):
    learner = Learner(config(), checkpoint)
    learner.update(batch(), 0)
    learner.save_weights(tmp_path / "weights.safetensors")
    learner.save_model(tmp_path / "model")
    written = load_file(tmp_path / "weights.safetensors")
    assert sorted(written) == sorted(load_file(tmp_path / "model" / "model.safetensors"))
    assert "lm_head.weight" not in written
    assert largest_change(learner, written) == 0.0
    assert [file.name for file in tmp_path.glob("weights*")] == ["weights.safetensors"]


def test_a_saved_model_is_a_plain_hugging_face_folder(checkpoint: str, tmp_path: Path):
    learner = Learner(config(), checkpoint)
    learner.save_model(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "grove" not in (tmp_path / "config.json").read_text()
    assert torch.equal(loaded.get_input_embeddings().weight, learner.model.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab()["w7"] == 7


def test_gradient_checkpointing_trains_the_same(checkpoint: str):
    stored, plain = (Learner(config(learner={"gradient_checkpointing": on}), checkpoint) for on in (True, False))
    assert stored.update(batch(), 0) == pytest.approx(plain.update(batch(), 0), rel=1e-5)


def test_half_precision_trains(checkpoint: str):
    learner = Learner(config(dtype="bfloat16"), checkpoint)
    before = weights(learner)
    learner.update(batch(), 0)
    assert largest_change(learner, before) > 0.0


def test_norms_are_not_decayed(checkpoint: str):
    groups = Learner(config(learner={"weight_decay": 0.1}), checkpoint).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {weight.ndim for weight in groups[0]["params"]} == {2}
    assert {weight.ndim for weight in groups[1]["params"]} == {1}


def test_models_that_a_tree_would_train_inexactly_are_refused():
    with pytest.raises(ConfigError, match=r"dropout \(\{'attention_dropout': 0.1\}\)"):
        require_tree_exact(tiny("qwen3", attention_dropout=0.1))
    windows = ["full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match="sliding_attention"):
        require_tree_exact(tiny("qwen3", layer_types=windows, use_sliding_window=True, sliding_window=8))


def test_a_model_that_ignores_the_packing_is_found_out_by_trying():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ConfigError, match="its attention ignores the packing"):
        require_tree_exact(model)
