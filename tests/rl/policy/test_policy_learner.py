from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from policy_trees import VOCABULARY, grown, paired, save_whole, tiny
from published import arrived, of_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.errors import ConfigError
from conf.schema import (
    Aggregation,
    Config,
    Correction,
    CriticConfig,
    CriticKind,
    Layout,
    LearnerConfig,
    LoraConfig,
    LossConfig,
    LossKind,
    ModelConfig,
    OldLogprobs,
)
from rewards.drawn import parse_tree
from rl.credit.measured import Needs
from rl.policy.layouts.segments import SegmentPlan
from rl.policy.learner import Learner
from rl.policy.pack import PathCredit, TokenCredit, TreeCredit
from rl.policy.ranks import Ranks
from rl.policy.trained import NonFiniteGradient
from rollout.tree import ROOT, Tree

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


def config(
    *,
    dtype: str = "float32",
    lora: LoraConfig | None = None,
    learner: dict | None = None,
    loss: dict | None = None,
) -> Config:
    weights_dtype = "float64" if dtype == "float64" else "float32"
    settings = {
        "num_threads": 1,
        "weights_dtype": weights_dtype,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        **(learner or {}),
    }
    model = ModelConfig(dtype=dtype, lora=lora or LoraConfig())
    return Config(model=model, learner=LearnerConfig(**settings), loss=LossConfig(**(loss or {})))


def batch(num_prompts: int = 5, seed: int = 0) -> list[TreeCredit]:
    rng = random.Random(seed)
    trees = [grown(SHAPE, [(rng.randint(1, 4), 2) for _ in SHAPE], rng, name=f"test/{i}") for i in range(num_prompts)]
    return [paired(tree, rng).credit() for tree in trees]


def learner_of(cfg: Config, path: str) -> Learner:
    return Learner(cfg, path, Ranks.alone(torch.device("cpu")))


def published(learner: Learner) -> dict[str, torch.Tensor]:
    """What engines get."""
    return arrived(of_ranks([learner.pieces()]))


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in learner.policy.module.named_parameters()}


def one_score(learner: Learner, context_ids: list[int], action_ids: list[int]) -> list[float]:
    (logprobs,) = learner.score([(context_ids, action_ids)])
    return logprobs


def largest_change(learner: Learner, before: dict[str, torch.Tensor]) -> float:
    return max((weight - before[name]).abs().max().item() for name, weight in weights(learner).items())


def with_path(credit: TreeCredit) -> TreeCredit:
    """Its first trajectory alone, as one."""
    tree = credit.tree
    steps = len(tree.path(tree.leaves()[0]))
    return credit.only_paths([PathCredit(leaf=tree.leaves()[0], advantage=[1.0] * steps, weight=[1.0] * steps)])


def with_values(trees: list[TreeCredit], target: float = 1.0) -> list[TreeCredit]:
    """Each with its first trajectory, advantage 1, and with what a critic should have said."""

    def each_token(tree: Tree, value: float) -> list[list[float]]:
        return [[value] * len(node.action_ids) for node in tree.nodes]

    def tokens(tree: Tree) -> TokenCredit:
        return TokenCredit(
            advantage=each_token(tree, 0.0), value=each_token(tree, 0.0), target=each_token(tree, target)
        )

    return [replace(with_path(credit), tokens=tokens(credit.tree)) for credit in trees]


def one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the packed layout: the first token behind each branch still sees the branch."""
    right = SegmentPlan.__init__

    def wrong(self: SegmentPlan, end_T: torch.Tensor) -> None:
        right(self, (end_T + 1).clamp(max=len(end_T)))

    monkeypatch.setattr(SegmentPlan, "__init__", wrong)


def rewarded_token(token: int) -> TreeCredit:
    """One prompt, one step of one token, advantage +1."""
    tree = parse_tree("q -> a", logprob=-3.0)
    tree.nodes[0].action_ids = [token]
    return TreeCredit(tree=tree, w_pos=[1.0], w_neg=[0.0], w0=[1.0])


def test_a_rewarded_token_becomes_likelier(checkpoint: str):
    learner = learner_of(config(learner={"mini_batches": 1}), checkpoint)
    before = one_score(learner, [1], [7])[0]
    for step in range(5):
        credit = rewarded_token(7)
        credit.tree.nodes[0].action_logprobs = one_score(learner, [1], [7])
        metrics = learner.update([credit], step)
        assert metrics["loss/logprob_gap_nats"] < 1e-5
        assert metrics["loss/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert one_score(learner, [1], [7])[0] > before + 0.5


def test_a_blamed_token_becomes_rarer(checkpoint: str):
    learner = learner_of(config(learner={"mini_batches": 1}), checkpoint)
    before = one_score(learner, [1], [7])
    credit = rewarded_token(7)
    credit.tree.nodes[0].action_logprobs = before
    learner.update([TreeCredit(tree=credit.tree, w_pos=[0.0], w_neg=[-1.0], w0=[1.0])], 0)
    assert one_score(learner, [1], [7])[0] < before[0]


def test_counts_and_loss_of_one_token(checkpoint: str):
    learner = learner_of(config(learner={"mini_batches": 1}), checkpoint)
    tree = parse_tree("q -> a -> (a1, a2)")
    for row, context_ids in [(0, [1]), (1, [1, 10]), (2, [1, 10])]:
        tree.nodes[row].action_logprobs = one_score(learner, context_ids, tree.nodes[row].action_ids)
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

    learner = learner_of(config(loss={"kl_coef": 0.1, "entropy_coef": 0.01}), checkpoint)
    metrics = learner.update(batch(), 0)
    assert [name for name in metrics if declared(name) is None] == []
    expected = {
        "total",
        "policy",
        "kl",
        "entropy_nats",
        "clip_share",
        *(f"clip_share_depth_{depth}" for depth in (1, 2, 3)),
        "approx_kl_nats",
        "ratio_max",
        "logprob_gap_nats",
        "clip_low_share",
        "mismatch_kl_nats",
        "mismatch_ratio_max",
        "mismatch_effective_share",
    }
    assert {name.removeprefix("loss/") for name in metrics if name.startswith("loss/")} == expected


@pytest.mark.parametrize("pack_tokens", [1, 25, 60])
def test_packing_changes_neither_loss_nor_gradient(checkpoint: str, pack_tokens: int):
    results = []
    for tokens in (pack_tokens, 100_000):
        loss = {"kl_coef": 0.1, "entropy_coef": 0.01}
        learner = learner_of(config(dtype="float64", learner={"pack_tokens": tokens}, loss=loss), checkpoint)
        results.append(learner.update(batch(), 0))
    for name in ("loss/total", "loss/policy", "loss/kl", "loss/entropy_nats", "loss/clip_share", "learner/grad_norm"):
        # Transformers' norms work in float32 inside, so the gradient agrees to float32.
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5, abs=1e-9), name
    assert results[0]["learner/path_tokens"] == results[1]["learner/path_tokens"]


RESUMED = {
    "plain": {},
    "value_head": {"loss": {"critic": CriticConfig(kind=CriticKind.value_head)}},
    "critic": {"loss": {"critic": CriticConfig(kind=CriticKind.model)}},
    "adapters": {"lora": LoraConfig(rank=2)},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_an_update_resumed_from_a_checkpoint_is_the_same_to_the_last_bit(kind: str, checkpoint: str, tmp_path: Path):
    cfg = config(learner={"warmup_steps": 3}, **RESUMED[kind])
    straight = learner_of(cfg, checkpoint)
    straight.update(with_values(batch(seed=1)), 0)
    save_whole(straight, tmp_path)
    straight.update(with_values(batch(seed=2)), 1)

    resumed = learner_of(cfg, checkpoint)
    resumed.load(tmp_path)
    resumed.update(with_values(batch(seed=2)), 1)
    assert largest_change(resumed, weights(straight)) == 0.0
    if straight.critic is not None and resumed.critic is not None:
        for ours, theirs in zip(resumed.critic.module.parameters(), straight.critic.module.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_mini_batches_depend_on_seed_and_step_alone(checkpoint: str):
    runs = [learner_of(config(learner={"mini_batches": 3}), checkpoint) for _ in range(3)]
    for run, step in zip(runs, (0, 0, 1), strict=True):
        run.update(batch(), step)
    assert largest_change(runs[1], weights(runs[0])) == 0.0
    assert largest_change(runs[2], weights(runs[0])) > 0.0


def test_learning_rate_warms_up_over_steps(checkpoint: str):
    learner = learner_of(config(learner={"warmup_steps": 4, "learning_rate": 0.4}), checkpoint)
    rates = [learner.update([], step)["learner/learning_rate"] for step in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_nothing_to_train_moves_nothing_and_claims_no_loss(checkpoint: str):
    learner = learner_of(config(), checkpoint)
    learner.update(batch(), 0)
    before = weights(learner)
    tree = parse_tree("q -> a")
    metrics = learner.update([TreeCredit(tree=tree, w_pos=[0.0], w_neg=[0.0], w0=[0.0])], 1)
    assert largest_change(learner, before) == 0.0
    assert metrics["learner/trained_tokens"] == 0
    assert not [name for name in metrics if name.startswith("loss/")]


def test_momentum_does_not_move_a_policy_that_learns_nothing(checkpoint: str):
    learner = learner_of(config(), checkpoint)
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
        learner = learner_of(config(learner={"mini_batches": 1}, loss={"kl_coef": kl_coef}), checkpoint)
        before = weights(learner)
        for step in range(6):
            metrics = learner.update([rewarded_token(7)], step)
        gaps[kl_coef] = abs(one_score(learner, [1], [7])[0] - one_score(learner_of(config(), checkpoint), [1], [7])[0])
        assert largest_change(learner, before) > 0.0
    assert metrics["loss/kl"] > 0.0
    assert gaps[100.0] < 0.5 * gaps[0.0]


def test_a_gradient_that_is_not_finite_is_refused_before_it_spreads(checkpoint: str):
    learner = learner_of(config(), checkpoint)
    before = weights(learner)
    credit = rewarded_token(7)
    credit.w_pos = [float("nan")]
    with pytest.raises(NonFiniteGradient, match="the gradient norm is nan"):
        learner.update([credit], 0)
    assert largest_change(learner, before) == 0.0
    assert not learner.policy.optimizer.state


def test_scores_are_those_of_the_plain_model(checkpoint: str):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    context_ids, action_ids = [1, 5, 9], [4, 4, 2]
    logp = plain(input_ids=torch.tensor([context_ids + action_ids])).logits[0].log_softmax(-1)
    expected = [logp[2, 4].item(), logp[3, 4].item(), logp[4, 2].item()]
    assert one_score(learner_of(config(), checkpoint), context_ids, action_ids) == pytest.approx(expected, abs=1e-5)


def test_engines_get_whole_weights_under_their_names_with_the_tied_head_left_out(checkpoint: str, tmp_path: Path):
    learner = learner_of(config(), checkpoint)
    learner.update(batch(), 0)
    save_whole(learner, tmp_path)
    written = published(learner)
    assert sorted(written) == sorted(load_file(tmp_path / "model" / "model.safetensors"))
    assert "lm_head.weight" not in written
    assert all(torch.equal(weight, written[name.removeprefix("model.")]) for name, weight in weights(learner).items())


def test_a_saved_model_is_a_plain_hugging_face_folder(checkpoint: str, tmp_path: Path):
    learner = learner_of(config(), checkpoint)
    save_whole(learner, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "grove" not in (tmp_path / "model" / "config.json").read_text()
    assert torch.equal(loaded.get_input_embeddings().weight, learner.policy.module.model.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()["w7"] == 7


def test_a_checkpoint_of_adapters_holds_them_alone_and_merged(checkpoint: str, tmp_path: Path):
    learner = learner_of(config(lora=LoraConfig(rank=2), learner={"learning_rate": 0.1}), checkpoint)
    learner.update(batch(), 0)
    save_whole(learner, tmp_path)
    merged, engines = load_file(tmp_path / "model" / "model.safetensors"), published(learner)
    assert merged.keys() == engines.keys() and all(torch.equal(merged[name], engines[name]) for name in merged)
    before = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(tmp_path / "adapter"))
    tokens = torch.tensor([[1, 5, 9]])
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(tokens).logits
    assert (logits - before(tokens).logits).abs().max() > 1e-3
    torch.testing.assert_close(adapted(tokens).logits, logits, rtol=0, atol=1e-5)
    kept = load_file(tmp_path / "training" / "rank0.safetensors")
    assert all("lora_" in name for name in kept if name.startswith(("weights/", "moments/")))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter", "training"}


def test_gradient_checkpointing_trains_the_same(checkpoint: str):
    stored, plain = (learner_of(config(learner={"gradient_checkpointing": on}), checkpoint) for on in (True, False))
    assert stored.update(batch(), 0) == pytest.approx(plain.update(batch(), 0), rel=1e-5)


def test_half_precision_trains(checkpoint: str):
    learner = learner_of(config(dtype="bfloat16"), checkpoint)
    before = weights(learner)
    learner.update(batch(), 0)
    assert largest_change(learner, before) > 0.0


@pytest.mark.parametrize("kind", [kind for kind in LossKind if kind is not LossKind.custom])
@pytest.mark.parametrize("aggregation", [Aggregation.token_mean, Aggregation.seq_mean_token_mean])
def test_every_loss_pushes_up_what_is_rewarded(checkpoint: str, kind: LossKind, aggregation: Aggregation):
    learner = learner_of(
        config(learner={"mini_batches": 1}, loss={"kind": kind, "aggregation": aggregation}), checkpoint
    )
    before = one_score(learner, [1], [7])
    credit = rewarded_token(7)
    credit.tree.nodes[0].action_logprobs = before
    credit.paths = [PathCredit(leaf=0, advantage=[1.0], weight=[1.0])]
    learner.update([credit], 0)
    assert one_score(learner, [1], [7])[0] > before[0]


def test_a_custom_loss_is_named_by_its_file(checkpoint: str, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def reinforce(view):\n    return -(view.weight_M * view.advantage_M * view.logprob_M).sum()\n"
    )
    ours = config(loss={"kind": LossKind.reinforce})
    theirs = config(loss={"kind": LossKind.custom, "fn": f"{tmp_path}/mine.py:reinforce"})
    trained = []
    for cfg in (ours, theirs):
        learner = learner_of(cfg, checkpoint)
        learner.update([with_path(credit) for credit in batch()], 0)
        trained.append(learner)
    assert largest_change(trained[1], weights(trained[0])) < 1e-6


def test_several_epochs_move_the_policy_away_from_where_it_sampled(checkpoint: str):
    shares = []
    for epochs in (1, 4):
        learner = learner_of(config(learner={"epochs": epochs, "mini_batches": 1, "learning_rate": 1e-2}), checkpoint)
        credit = rewarded_token(7)
        credit.tree.nodes[0].action_logprobs = one_score(learner, [1], [7])
        metrics = learner.update([credit], 0)
        assert metrics["learner/trained_tokens"] == 1  # however often it was gone through
        shares.append(metrics["loss/ratio_max"])
    assert shares[0] == pytest.approx(1.0, abs=1e-5)
    assert shares[1] > 1.05


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_recomputed_log_probabilities_take_the_mismatch_out_of_the_ratio(checkpoint: str, mini_batches: int):
    learning = {"mini_batches": mini_batches, "learning_rate": 1e-6}
    recomputed = config(learner=learning, loss={"old_logprobs": OldLogprobs.recompute})
    learner = learner_of(recomputed, checkpoint)
    metrics = learner.update(batch(), 0)  # whose engine says something else than this model
    assert metrics["loss/ratio_max"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["loss/logprob_gap_nats"] > 0.1
    assert metrics["loss/mismatch_ratio_max"] > 1.2


def test_a_correction_cuts_the_weight_of_tokens_the_learner_finds_likelier(checkpoint: str):
    corrected = {"old_logprobs": OldLogprobs.recompute, "correction": Correction.token_truncate, "correction_max": 1.1}
    metrics = learner_of(config(loss=corrected), checkpoint).update(batch(), 0)
    assert metrics["loss/correction_cut_share"] > 0.1


@pytest.mark.parametrize("kind", [CriticKind.value_head, CriticKind.model])
def test_a_critic_learns_its_targets(checkpoint: str, kind: CriticKind):
    critic = CriticConfig(kind=kind, learning_rate=1e-2, clip=0.0)
    learner = learner_of(config(learner={"mini_batches": 1}, loss={"critic": critic}), checkpoint)
    trees = with_values(batch(), target=2.0)
    losses = [learner.update(trees, step)["loss/value"] for step in range(8)]
    assert losses[0] == pytest.approx(2.0, rel=1e-4)  # a new critic says 0: (0 - 2)^2 / 2
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", [CriticKind.value_head, CriticKind.model])
def test_a_critic_warms_up_alone(checkpoint: str, kind: CriticKind):
    critic = CriticConfig(kind=kind, learning_rate=1e-2, warmup_steps=1)
    learner = learner_of(config(loss={"critic": critic}), checkpoint)
    before = {name: weight for name, weight in weights(learner).items() if not name.startswith("value_head")}
    metrics = learner.update(with_values(batch()), 0)
    assert "loss/policy" not in metrics
    after = {name: weight for name, weight in weights(learner).items() if not name.startswith("value_head")}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert "loss/policy" in learner.update(with_values(batch()), 1)


def test_values_and_kl_are_measured_at_every_trained_step(checkpoint: str):
    critic = CriticConfig(kind=CriticKind.value_head)
    cfg = config(loss={"critic": critic, "kl_coef": 0.1}, learner={"pack_tokens": 30})
    learner = learner_of(cfg, checkpoint)
    trees = [credit.tree for credit in batch()]
    measured = learner.measure(trees, Needs(kl=True, value=True))
    for tree, found in zip(trees, measured, strict=True):
        assert found.value is not None and found.kl is not None
        assert [len(values) for values in found.value] == [len(node.action_ids) for node in tree.nodes]
        assert all(value == 0.0 for values in found.value for value in values)  # a new head
        assert found.kl == pytest.approx([0.0] * len(tree.nodes), abs=1e-6)  # the policy is its own reference
    learner.update(with_values(batch()), 0)
    kl = learner.measure(trees, Needs(kl=True, value=False))[0].kl
    row = 0
    node, context = trees[0].nodes[row], list(trees[0].prompt.token_ids)
    plain = learner_of(config(), checkpoint)
    gap = sum(one_score(learner, context, node.action_ids)) - sum(one_score(plain, context, node.action_ids))
    assert kl is not None and kl[row] == pytest.approx(gap, abs=1e-4)


def test_adapters_alone_are_trained_and_engines_get_them_merged(checkpoint: str):
    learner = learner_of(config(lora=LoraConfig(rank=2), loss={"kl_coef": 0.1}), checkpoint)
    before = weights(learner)
    learner.update(batch(), 0)
    moved = {name for name, weight in weights(learner).items() if not torch.equal(weight, before[name])}
    assert moved and all("lora_" in name for name in moved)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    merged = published(learner)
    assert set(merged) == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(merged, strict=False)
    logp = plain(input_ids=torch.tensor([[1, 5, 9, 4]])).logits[0].log_softmax(-1)
    assert one_score(learner, [1, 5, 9], [4]) == pytest.approx([logp[2, 4].item()], abs=1e-5)


def test_a_model_that_no_packed_tree_can_train_is_trained_by_its_trajectories(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tiny("qwen3", attention_dropout=0.1).save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        learner = learner_of(config(), str(tmp_path))
    assert "layout trajectories (it has dropout" in caplog.text
    before = weights(learner)
    learner.update(batch(), 0)
    assert largest_change(learner, before) > 0.0


def test_a_layout_that_disagrees_with_plain_trajectories_is_left(
    checkpoint: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    one_too_many(monkeypatch)
    learner = learner_of(config(), checkpoint)
    with caplog.at_level("WARNING"):
        learner.update(batch(), 0)
    assert learner.layout is Layout.trajectories
    assert "goes on by layout trajectories" in caplog.text


def test_a_forced_layout_that_disagrees_with_plain_trajectories_is_refused(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
):
    one_too_many(monkeypatch)
    learner = learner_of(config(learner={"layout": Layout.segments}), checkpoint)
    with pytest.raises(ConfigError, match=r"Use learner\.layout=trajectories"):
        learner.update(batch(), 0)


def test_every_layout_of_this_device_trains_the_same(checkpoint: str):
    changed = []
    for layout in (Layout.trajectories, Layout.segments, Layout.mask, Layout.depth_first):
        learner = learner_of(config(learner={"layout": layout}), checkpoint)
        changed.append(learner.update(batch(), 0))
    for found in changed[1:]:
        assert found == pytest.approx(changed[0], rel=1e-4, abs=1e-6)


def test_norms_are_not_decayed(checkpoint: str):
    groups = learner_of(config(learner={"weight_decay": 0.1}), checkpoint).policy.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {weight.ndim for weight in groups[0]["params"]} == {2}
    assert {weight.ndim for weight in groups[1]["params"]} == {1}
