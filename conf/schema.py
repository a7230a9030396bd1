"""The records a run is configured by. Every default lives here, once; YAML files say only what differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class EngineKind(Enum):
    """Which inference engine samples."""

    vllm = "vllm"
    transformers = "transformers"


class ExpanderKind(Enum):
    """Where a tree branches."""

    chains = "chains"
    random_expand = "random_expand"
    beam_forks = "beam_forks"
    beam = "beam"
    """The best num_leaves of num_leaves x max_forks candidates go on, by the judge."""
    entropy_expand = "entropy_expand"
    """Branches inside turns, at the most surprising tokens."""
    segments = "segments"
    """Branches every so many tokens."""
    comb = "comb"
    """Candidates of each step, judged before one of them acts."""
    best_first = "best_first"
    mcts = "mcts"


class Survivors(Enum):
    """Who goes on where more candidates are than places."""

    uniform = "uniform"
    """Drawn before they are generated."""
    scored = "scored"
    """All candidates are generated, and the judge's best go on."""


class ToolFormat(Enum):
    """How a call is written in a turn."""

    words = "words"
    """<call> tool arg arg </call> and <answer> ... </answer>, for word-level vocabularies."""
    hermes = "hermes"
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Qwen and Hermes models write it."""
    llama = "llama"
    """{"name": ..., "parameters": {...}}, with `;` between several, as Llama 3.1 and later write it."""


class ToolSandbox(Enum):
    """Where the tools of a user's file run."""

    none = "none"
    """In threads of the rollout worker: fast, with its memory and environment; one that hangs cannot be killed."""
    process = "process"
    """In processes of their own, killed when they hang or take too much, without secrets of the environment."""


class Isolation(Enum):
    """How much of the machine a program that the policy wrote may see."""

    required = "required"
    """Namespaces of its own, or it is not run."""
    preferred = "preferred"
    """Namespaces where the kernel lets us have them, else limits alone."""
    off = "off"
    """Limits alone: it can read our files and use the network."""


class OnMalformed(Enum):
    """What follows a turn that is neither a call nor an answer."""

    end = "end"
    reply = "reply"


class Level(Enum):
    """What a source scores, or what a credit term compares."""

    step = "step"
    trajectory = "trajectory"


class Read(Enum):
    """What of a step's scores a term uses."""

    score = "score"
    """The score itself."""
    difference = "difference"
    """Its change since the step before; at a first step since the prompt's own score, or, where a source gives none,
    since the mean of the prompt's first steps."""
    lookahead = "lookahead"
    """difference; where that is 0, the first change among the next four steps, at 0.7 a step (VSRM)."""
    soft_min = "soft_min"
    """Weighted by softmax(-score / 0.1) over the trajectory's steps, so that its sum is about the lowest (PURE)."""
    max_return = "max_return"
    """Divided by the largest sum of scores that is still to come anywhere in the batch (PRIME's batch_norm)."""


class Combine(Enum):
    """How a term's step signals and trajectory signals become the reward of a step."""

    sum = "sum"
    """A step earns its step signals; the last step of a trajectory earns its trajectory signals too."""
    overwrite = "overwrite"
    """The last step earns its trajectory signals alone."""
    renorm = "renorm"
    """overwrite, and every scored step before the last earns the trajectory signals as well (PPR's ReNorm)."""
    gate = "gate"
    """sum, with the step signals of trajectories whose trajectory signals are above 0 alone."""
    four_cases = "four_cases"
    """TP-GRPO: the compared outcome; a bad step of a right trajectory loses |step signal| * share of right ones, a good
    step of a wrong one gets 0. Step signals below 0 are bad, trajectories above 0 are right."""


class Backup(Enum):
    """How the trajectories through a step speak for it."""

    none = "none"
    """Each for itself: a step has a value, and an advantage, for every trajectory through it."""
    leaf_mean = "leaf_mean"
    child_mean = "child_mean"
    """Mean over the steps that continue it, each as much as another, however many trajectories pass there."""
    max = "max"
    any = "any"
    """1 where one of them is above 0, else 0."""


class Return(Enum):
    """Which of a trajectory's rewards a value is made of."""

    immediate = "immediate"
    """Step term: the step's own reward, and what its trajectories earn at their ends. Trajectory term: the latter."""
    to_go = "to_go"
    """Step term: the sum of this and all later rewards, decayed by gamma a step."""
    broadcast = "broadcast"
    """Trajectory term: the sum of all its rewards, those of its steps too."""
    broadcast_mean = "broadcast_mean"
    """Trajectory term: its trajectory signals and the mean of its steps' rewards."""


class Compare(Enum):
    """What is compared within the scope."""

    returns = "returns"
    rewards = "rewards"
    """Each step's reward; the return is then taken of what was compared (returns=to_go)."""


class Scope(Enum):
    """The set a value is compared within."""

    prompt = "prompt"
    """Trajectories of one prompt; for a step term, all its steps pooled, each once."""
    tree = "tree"
    """As `prompt`, within one of the prompt's M trees (`Node.branch`)."""
    siblings = "siblings"
    """Steps that continue the same step."""
    ancestors = "ancestors"
    """Trajectory term: those through each of its steps and those of its prompt; mean over these groups (TreePO)."""
    ancestors_by_size = "ancestors_by_size"
    """The same, each group weighted by its number of trajectories."""
    turn_index = "turn_index"
    """Steps of a prompt at the same depth. Biased where the policy decides when to stop (docs/credit.md)."""
    turn_index_padded = "turn_index_padded"
    """The same, and 0 for every trajectory that ended before: free of that bias."""
    state_key = "state_key"
    """Steps of a prompt behind the same observation (GiGPO's anchor states)."""
    parent_value = "parent_value"
    """The value of the step before, or of the prompt."""
    root_value = "root_value"
    """The value of the prompt."""
    critic = "critic"
    """What the critic said of the state before the step; it learns this term's values."""
    batch = "batch"
    """As `prompt`, within all prompts of the step's batch."""


class Normalizer(Enum):
    """How a value is compared with its scope."""

    none = "none"
    center = "center"
    zscore = "zscore"
    leave_one_out = "leave_one_out"
    """Less the mean of the others (RLOO)."""
    rank = "rank"
    """The z-score of its place, from 1 for the best to 0 for the worst (ArenaRL)."""
    whiten = "whiten"
    """As zscore, with 1e-8 added to the variance instead of `eps` to the deviation."""
    center_batch_std = "center_batch_std"
    """Less the mean of its scope, over the deviation of the batch (TRL's scale_rewards=batch)."""
    max_return = "max_return"
    """Over the largest size in its scope; nothing is subtracted."""
    running = "running"
    """The z-score among all values of the term so far in the run."""
    token_leave_one_out = "token_leave_one_out"
    """compare=rewards: less, for each token, the mean over the other trajectories of their mean reward per token
    (PRIME)."""
    token_leave_one_out_released = "token_leave_one_out_released"
    """The same as PRIME's released code has it, which counts the trajectory's own mean too."""


class Degenerate(Enum):
    """What becomes of a value that nothing can be said of: alone in its scope, or the same as all others in it."""

    zero = "zero"
    raw = "raw"
    """It stays as it is."""
    drop = "drop"
    """The term says nothing of it, as if it had not been scored."""


class Keep(Enum):
    """Which of a prompt's trajectories stay when select.num_kept of them are to train."""

    all = "all"
    """Every one."""
    balanced = "balanced"
    """As many right as wrong where that can be; which of them is drawn by lot."""
    prof = "prof"
    """The same counts, and those whose steps' scores agree best with their outcome (PROF, arXiv 2509.03403)."""
    prof_correct = "prof_correct"
    """prof among the right ones, a lot among the wrong: for scores that are not to be trusted on wrong ones."""
    prof_ratio = "prof_ratio"
    """prof with right and wrong in the proportion they were sampled in."""


class TokenWeight(Enum):
    """How often a step shared by k trajectories counts."""

    per_leaf = "per_leaf"
    sqrt_leaf = "sqrt_leaf"
    unique = "unique"


class Layout(Enum):
    """How a micro-batch of trees goes through the model. All compute the same log-probs and gradients."""

    auto = "auto"
    """flex on a GPU, segments on a CPU; trajectories for a model that a packed tree cannot train exactly."""
    flex = "flex"
    """Packed, FlexAttention with a block table: the fastest on a GPU; has no backward on a CPU."""
    segments = "segments"
    """Packed, one attention call for each group of forkless runs over their ancestors and themselves: any device."""
    varlen = "varlen"
    """Packed, variable-length flash attention over gathered keys: a GPU without a compiler."""
    mask = "mask"
    """Packed, with the whole mask written out: a reference, its cost grows with the square of the pack."""
    trajectories = "trajectories"
    """Every trajectory a sequence of its own: the reference, and for models that no packed tree can train exactly."""
    depth_first = "depth_first"
    """One step at a time, activations computed again on the way back: least memory; one process only."""


class LossKind(Enum):
    """The policy loss."""

    ppo_clip = "ppo_clip"
    """PPO with separate clips below and above, and optional dual clip (arXiv 1707.06347, 2503.14476, 1912.09729)."""
    cispo = "cispo"
    """REINFORCE weighted by the clipped ratio, which carries no gradient (arXiv 2506.13585)."""
    gspo = "gspo"
    """PPO with one ratio per trajectory, the geometric mean of its tokens' (arXiv 2507.18071)."""
    reinforce = "reinforce"
    """-advantage * log-probability, without any ratio."""
    custom = "custom"
    """A function of yours, named by loss.fn, on the log-probabilities of each trajectory."""


class Aggregation(Enum):
    """How the tokens' losses of a mini-batch become one number."""

    token_mean = "token_mean"
    """Mean over trained tokens (DAPO)."""
    seq_mean_token_mean = "seq_mean_token_mean"
    """Mean over trajectories of the mean over their tokens (GRPO, GSPO)."""
    seq_mean_token_sum = "seq_mean_token_sum"
    """Mean over trajectories of the sum over their tokens."""
    seq_mean_token_sum_norm = "seq_mean_token_sum_norm"
    """The same, divided by loss.horizon_tokens (Dr.GRPO)."""


class KlEstimator(Enum):
    """How KL(policy || reference) is estimated in the loss, from d = log policy - log reference."""

    k1 = "k1"
    """d: unbiased as a value; its gradient is 0 in expectation."""
    k2 = "k2"
    """d^2 / 2: its gradient is that of the reverse KL."""
    k3 = "k3"
    """exp(-d) + d - 1: unbiased and never negative."""
    abs = "abs"
    """|d|."""
    k1_plus = "k1_plus"
    """The value of k1 with the gradient of k2."""
    k3_plus = "k3_plus"
    """The value of k3 with the gradient of k2."""


class OldLogprobs(Enum):
    """What the ratio of the policy loss is taken against."""

    engine = "engine"
    """What the engine said when it sampled. The ratio then holds the mismatch of engine and learner too."""
    recompute = "recompute"
    """The learner's own, one more forward pass before the first update of a step."""


class Correction(Enum):
    """Importance weight exp(learner - engine) of the sampled tokens, against the mismatch of the two."""

    none = "none"
    token_truncate = "token_truncate"
    """Each token's weight, cut to [min, max] (TIS)."""
    token_mask = "token_mask"
    """Each token's weight, 0 outside [min, max] (MIS, IcePop)."""
    sequence_truncate = "sequence_truncate"
    """One weight for a trajectory, the product over its tokens, cut to [min, max]."""
    sequence_mask = "sequence_mask"
    """One weight for a trajectory, 0 outside [min, max]."""


class CriticKind(Enum):
    """What predicts the value of a state."""

    none = "none"
    value_head = "value_head"
    """A linear layer on the policy's own last hidden state."""
    model = "model"
    """A model of its own, with its own optimiser."""


class PrmKind(Enum):
    """A process reward model that the run itself trains, beside the policy."""

    none = "none"
    implicit = "implicit"
    """beta * log(model / reference), summed over a step's tokens; learns which trajectories end well, by cross entropy
    (PRIME, arXiv 2502.01456)."""
    progress = "progress"
    """What each step adds to the outcome; learns contributions that sum to it (SPA-RL, arXiv 2505.20732)."""


class PrmOrder(Enum):
    """When the process reward model learns from a batch."""

    score_then_update = "score_then_update"
    """After it has scored it: its scores know nothing of these outcomes."""
    update_then_score = "update_then_score"
    """Before."""
    frozen = "frozen"
    """Never; for one that was trained elsewhere."""


class GaeLevel(Enum):
    """What one step of generalised advantage estimation is."""

    off = "off"
    step = "step"
    token = "token"


class OptimizerKind(Enum):
    """Which optimiser."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    """Moments in 8 bits, a quarter of the memory."""


class ModelKind(Enum):
    """Who answers for a model that rewards ask."""

    endpoint = "endpoint"
    """A server that speaks OpenAI's chat protocol: a provider's, `vllm serve`, ..."""
    vllm = "vllm"
    """A vLLM engine of this run's own."""
    transformers = "transformers"
    """Plain transformers: slow and exact, the reference for the others."""


class Cache(Enum):
    """Whether answers of a source are kept by the content they were given for."""

    auto = "auto"
    """on for a source that asks a model, else off."""
    on = "on"
    """The answer may depend on texts, tokens, facts and columns alone: on no log-probs, no clock, no row numbers."""
    off = "off"


class StepFold(Enum):
    """A trajectory's score from the scores of its steps, to choose among trajectories."""

    min = "min"
    """Its weakest step's."""
    mean = "mean"
    product = "product"
    """For scores that are chances; long trajectories lose."""
    last = "last"
    sum = "sum"


class TrackerMode(Enum):
    """Where wandb writes."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


class SearchKind(Enum):
    """How the members of a sweep are chosen."""

    grid = "grid"
    """Every combination of what varies."""
    optuna = "optuna"
    """Trial by trial, by what earlier trials came to (Optuna)."""


class Inapplicable(Enum):
    """What becomes of a member of a sweep that cannot run, as one that sets the weight of a term its recipe lacks."""

    refuse = "refuse"
    """Nothing starts."""
    skip = "skip"
    """It is reported and not trained."""
    drop = "drop"
    """What varies of a part that the member lacks is left out, and members that become equal are one. Those that cannot
    run for another reason are skipped."""


class Pruner(Enum):
    """When a trial of a search is given up."""

    none = "none"
    median = "median"
    """When it is below the median of the earlier trials at the same point."""
    asha = "asha"
    """When it is not among the best third of those at the same point (asynchronous successive halving, 1810.05934)."""


class LaunchKind(Enum):
    """Where `grove launch` starts a run."""

    local = "local"
    """A process of this machine that outlives the terminal."""
    ray = "ray"
    """A job of a Ray cluster that is already up, handed to its job server."""
    slurm = "slurm"
    """A batch job whose nodes form a Ray cluster of their own."""
    kuberay = "kuberay"
    """A RayJob of Kubernetes, whose pods form a Ray cluster of their own."""


class Placement(Enum):
    """How rollout and learner share the machines (`rl.placement`)."""

    auto = "auto"
    """Whole GPUs for everybody where there are enough; else all share what there is."""
    time_share = "time_share"
    """Rollout and learner take turns on the same GPUs: engines sleep while the learner updates."""
    split = "split"
    """Nothing is shared: GPUs, or cores without GPUs, belong to the rollout or to the learner."""


class WeightPath(Enum):
    """How new weights get from the learner to the engines (`rl.policy.weights`)."""

    object_store = "object_store"
    """By Ray's store in the memory of each node: for any plan, and for engines that come and go."""
    broadcast = "broadcast"
    """Straight between the processes: NCCL from GPU to GPU, gloo between CPUs."""
    ipc = "ipc"
    """By memory that both processes map: CUDA IPC where engine and learner share a GPU, shared memory on a CPU node."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """How long a run is and where it writes."""

    name: str = "run"
    """Name of the run folder and of the run at the tracker."""
    dir: str = "runs/${run.name}-seed${seed}"
    """Folder of everything the run writes; an existing run there is resumed only with run.resume=true."""
    num_steps: int = 60
    """Optimiser steps (one batch of prompts each)."""
    max_generated_tokens: int = 0
    """Stop once this many tokens were sampled in training; 0 for no limit."""
    eval_every_steps: int = 10
    """Held-out evaluation each so many steps, and always before the first and after the last; 0 for only those two."""
    eval_prompts: int = 256
    """Held-out prompts in one evaluation; 0 for no evaluation."""
    eval_samples: int = 1
    """Trajectories of each held-out prompt; from 2 on there are pass@k, pass^k and votes (docs/evaluation.md)."""
    eval_k: list[int] = field(default_factory=list)
    """The k of pass@k, pass^k and best of k; empty for 1, 2, 4 ... and eval_samples itself."""
    eval_score: str = ""
    """Source under rewards.sources that best of k and the weighted vote go by; "" for neither."""
    eval_score_fold: StepFold = StepFold.min
    """Where eval_score is a source of steps."""
    eval_temperature: float = 1.0
    """Sampling temperature of the evaluation; 0 always takes the likeliest token."""
    eval_top_p: float = 1.0
    """The evaluation samples from the likeliest tokens that together have this chance."""
    checkpoint_every_steps: int = 20
    """Checkpoint each so many steps, and always at the end; 0 for only the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk."""
    keep_best: int = 1
    """Checkpoints kept beside them, those with the highest held-out success at their own step; 0 for none."""
    checkpoint_in_background: bool = True
    """Train on while a checkpoint's files are written; false stands still until they are on the disk."""
    checkpoint_timeout_s: float = 1800.0
    """Longest wait for a checkpoint to be copied, and again for its files to be written."""
    disk_wait_s: float = 600.0
    """Longest wait for room on a full disk before the run ends; 0 ends it at once. One checkpoint that finds no room is
    left out meanwhile."""
    record_every_steps: int = 1
    """Write the scored trees of each so many steps to trees/; 0 to write none."""
    profile_steps: list[int] = field(default_factory=list)
    """Steps, from 1, of which profile/ gets traces: each operator of the learner, each stage of the driver, and what
    every Ray process did. A traced update takes longer."""
    resume: bool = False
    """Continue the run in run.dir from its newest intact checkpoint."""
    max_restarts: int = 3
    """How often the run is started again from its last checkpoint after its process was killed or a part was lost that
    it cannot replace (a learner process, Ray); 0 trains in the process you start."""


@dataclass(kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised warm start of the tiny policy by TRL's SFTTrainer, on demonstrations that the task makes itself."""

    num_steps: int = 600
    batch_size: int = 32
    learning_rate: float = 2e-3
    num_demonstrations: int = 4000
    first_try_share: float = 0.25
    """Chance that a decision of a demonstration (the tool tried first at a hop, a command of a game) is the right one
    and not drawn by lot: below 1 the demonstrations are of mixed quality."""
    num_threads: int = 2
    """Torch threads of the warm start."""
    cache_dir: str = "runs/warm_start"
    """Where the warm-started checkpoint is kept, one folder for each distinct setting."""


@dataclass(kw_only=True, slots=True)
class TinyModelConfig:
    """Sizes of the policy that Grove makes itself when model.path is empty (Qwen3 architecture)."""

    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    """vLLM on CPU refuses 16."""
    intermediate_size: int = 288
    initializer_range: float = 0.06
    """The usual 0.02 learns far slower at this size."""
    max_position_embeddings: int = 512


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters instead of the whole model (arXiv 2106.09685), by peft. Engines get the merged weights."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole model."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers that get adapters, e.g. [q_proj, v_proj]; all-linear is every linear layer but the output."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The policy."""

    path: str = ""
    """Folder or hub name of a Hugging Face causal LM; "" makes and warm-starts the task's tiny model."""
    dtype: str = "float32"
    """What engine and learner compute in: float32, bfloat16 or float16."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    tiny: TinyModelConfig = field(default_factory=TinyModelConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where a split's rows come from."""

    path: str = ""
    """A .jsonl, .json or .parquet file, or the name of a dataset for `datasets.load_dataset`."""
    split: str = ""
    """Split of a named dataset; "" for a file."""
    max_rows: int = 0
    """Use only the first so many rows; 0 for all."""


@dataclass(kw_only=True, slots=True)
class ColumnsConfig:
    """Which columns of a row mean what."""

    question: str = "question"
    answer: str = "answer"
    """Column with the reference answer; "" when there is none."""
    max_calls: str = ""
    """Column with the row's own call budget; "" to use task.max_calls for all."""


@dataclass(kw_only=True, slots=True)
class HopSearchConfig:
    """The embedded task: walk a chain of relations with tools that serve one relation each."""

    hops: list[int] = field(default_factory=lambda: [3])
    """Chain lengths that questions are drawn from."""
    num_tools: int = 4
    num_relations: int = 12
    num_worlds: int = 64
    """Training worlds; held-out questions use another world and names never seen in training."""
    spare_calls: int = 2
    """Tool calls allowed beyond the number of hops."""
    tool_delay_s: float = 0.0
    """Seconds that every call sleeps: a slow world, to measure what overlaps with it."""


@dataclass(kw_only=True, slots=True)
class WorldConfig:
    """A world with a state of its own behind the chat."""

    fn: str = ""
    """A class as `rollout.world.World` describes it, as "file.py:Class" or "package.module:Class"; "" for tools."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of fn."""
    num_processes: int = 0
    """Processes in which each rollout worker holds the world's sessions; one that hangs or crashes is killed and
    replaced. 0 holds them in the worker and acts in threads, which cannot be killed."""
    memory_limit_mib: int = 4096
    """num_processes > 0: memory each may allocate; 0 for no limit."""
    max_sessions: int = 64
    """Sessions that each worker keeps for later steps; those beyond are closed and, where needed, made again by acting
    the same actions."""


@dataclass(kw_only=True, slots=True)
class TextWorldConfig:
    """Text games that are generated and scored by the package TextWorld."""

    num_games: int = 256
    """Training games; held-out games are others."""
    num_rooms: int = 3
    num_objects: int = 5
    num_quests: int = 2
    """Independent quests of one game; each gives a point, and all together win."""
    quest_length: int = 3
    """Commands that a quest takes at least."""
    show_commands: bool = True
    """Tell the policy with every observation which commands are possible."""
    words: bool = False
    """Names, goals and observations in few words of a closed vocabulary, for a policy that Grove makes itself."""
    cache_dir: str = "runs/textworld"
    """Where generated games are kept."""


@dataclass(kw_only=True, slots=True)
class ReasoningGymConfig:
    """Questions that the package reasoning-gym makes and scores."""

    dataset: str = "chain_sum"
    """Name of the dataset, e.g. chain_sum, countdown, mini_sudoku."""
    args: dict[str, Any] = field(default_factory=dict)
    """Parameters of the dataset, e.g. {min_terms: 3, max_terms: 5}; its size and seed are Grove's to give."""
    num_tries: int = 1
    """Answers the policy may give; after one that is not fully right it is told so and may try again."""


@dataclass(kw_only=True, slots=True)
class VerifiersConfig:
    """Tasks and rewards of a taskset written for the package verifiers."""

    taskset: str = ""
    """The taskset's class, as "file.py:Class" or "package.module:Class"."""
    args: dict[str, Any] = field(default_factory=dict)
    """Fields of the taskset's config."""
    held_out_every: int = 10
    """One task in so many is kept for held-out questions."""


@dataclass(kw_only=True, slots=True)
class PythonToolConfig:
    """The tool rollout.envs.python_tool:python, which runs programs of the policy in a jail."""

    isolation: Isolation = Isolation.required
    cpu_s: float = 5.0
    """Processor time of a program; the policy is told when it is used up."""
    wall_s: float = 8.0
    """Longest run of a program, below task.tool_timeout_s."""
    memory_mib: int = 512
    """Memory of a program with all that it starts."""
    disk_mib: int = 16
    """Files of a program."""
    max_output_chars: int = 4000
    """Characters shown of what it printed; the middle of more is left out."""


@dataclass(kw_only=True, slots=True)
class CorpusConfig:
    """Passages that the tool rollout.envs.retrieval:search finds by their words (BM25)."""

    path: str = ""
    """A .jsonl file with one passage in each line."""
    text_column: str = "text"
    title_column: str = "title"
    """Shown and searched with the text; "" when there is none."""
    top_k: int = 3
    """Passages shown for a query."""
    max_passage_chars: int = 1000
    """Characters shown of one passage."""
    k1: float = 1.5
    """BM25: how soon further occurrences of a word count no more."""
    b: float = 0.75
    """BM25: how much long passages are held back, 0 to 1."""
    cache_dir: str = "runs/corpora"
    """Where the index is kept, one folder for each corpus and setting; workers of a machine share its memory."""


@dataclass(kw_only=True, slots=True)
class McpServerConfig:
    """A server of the Model Context Protocol, whose tools the policy may call."""

    command: list[str] = field(default_factory=list)
    """Program and arguments; each rollout worker starts one of its own."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the program; of ours it sees HOME, PATH and the like alone."""
    url: str = ""
    """Address of a server that runs already, instead of a command."""
    tools: list[str] = field(default_factory=list)
    """Names of the tools to offer; [] offers all."""
    start_timeout_s: float = 60.0
    """Longest wait for it to start and to list its tools."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """What the policy is asked and what it may use."""

    name: str = "hop_search"
    generator: str = ""
    """Task that makes its own questions (hop_search, textworld, reasoning_gym, verifiers); "" reads task.train and
    task.eval."""
    hop_search: HopSearchConfig = field(default_factory=HopSearchConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    textworld: TextWorldConfig = field(default_factory=TextWorldConfig)
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)
    verifiers: VerifiersConfig = field(default_factory=VerifiersConfig)
    train: DataConfig = field(default_factory=DataConfig)
    eval: DataConfig = field(default_factory=DataConfig)
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    answer_pattern: str = ""
    """Regular expression; the first group of its last match in the answer column is the answer. "" takes all of it."""
    system_prompt: str = ""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, e.g. {enable_thinking: false} or, for Llama, {date_string: 26 Jul 2024},
    without which some of its templates write today's date and a run does not repeat tomorrow."""
    tools: list[str] = field(default_factory=list)
    """Plain typed Python functions, as "file.py:function" or "package.module:function"."""
    tool_format: ToolFormat = ToolFormat.hermes
    on_malformed: OnMalformed = OnMalformed.reply
    max_calls: int = 8
    """Tool calls in one episode."""
    tool_timeout_s: float = 10.0
    """Longest one tool call may take; a slower one ends its trajectory untrained."""
    tool_sandbox: ToolSandbox = ToolSandbox.none
    tool_processes: int = 4
    """process: calls of one worker that run at a time; others wait, and their time limit with them."""
    tool_memory_limit_mib: int = 2048
    """process: memory each may allocate; 0 for no limit."""
    tool_pass_env: list[str] = field(default_factory=list)
    """process: environment variables that tools see although their names look like secrets."""
    python: PythonToolConfig = field(default_factory=PythonToolConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    mcp_servers: dict[str, McpServerConfig] = field(default_factory=dict)
    """Servers whose tools are added to task.tools, by a name of yours; needs the package mcp."""
    max_tool_crashes_share: float = 0.05
    """Share of tool calls in a step's batch that may crash or hang before the run stops."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """How trees grow."""

    engine: EngineKind = EngineKind.vllm
    num_workers: int = 2
    """Rollout workers, one engine each."""
    prompts_per_step: int = 16
    expander: ExpanderKind = ExpanderKind.beam_forks
    num_leaves: int = 8
    """Trajectories of one prompt: n of chains, beam_forks and beam; as many end best_first's search."""
    max_forks: int = 2
    """beam_forks: most continuations of one step (PORTool's f). beam, best_first, mcts: candidates of one step."""
    survivors: Survivors = Survivors.uniform
    """beam_forks: who goes on; scored needs a judge."""
    num_trees: int = 2
    """random_expand, entropy_expand: independent chains that start a prompt (Tree-GRPO's and TreeRL's M)."""
    expand_nodes: int = 2
    """random_expand: steps re-expanded per tree and round; entropy_expand: tokens (N)."""
    expand_rounds: int = 1
    """random_expand, entropy_expand: rounds (L)."""
    keep_leaves: int = 3
    """random_expand, entropy_expand: trajectories kept per tree (k); 0 keeps all."""
    token_forks: int = 2
    """entropy_expand: new branches at each chosen token (TreeRL's T)."""
    answer_markers: list[str] = field(default_factory=list)
    """entropy_expand: what follows one of these texts in a turn is never chosen, e.g. [answer, conclusion]."""
    segment_branches: list[int] = field(default_factory=lambda: [2, 2])
    """segments: branches at each depth, the prompt's first; the last of them run to the end."""
    segment_tokens: int = 4
    """segments: tokens between two forks; a turn that ends earlier ends its segment."""
    segment_leaves: int = 0
    """segments: trajectories to come to and not to pass, forking at random steps in the end where branches ended early
    (TreePO); 0 for as many as the branches give."""
    segment_first_max: int = 0
    """segments: the prompt has between segment_branches[0] and so many branches, drawn anew for each tree; 0 for
    exactly segment_branches[0]."""
    num_candidates: int = 5
    """comb: candidates of each step (SLATE's k)."""
    choice_temperature: float = 0.7
    """comb: one candidate is drawn from softmax(z-score / this) (eta); 0 takes the best."""
    search_simulations: int = 40
    """mcts: walks from the prompt down to a step that nobody has continued."""
    search_c: float = 1.25
    """mcts: weight of what was seldom tried in PUCT."""
    max_nodes: int = 0
    """best_first, mcts: most steps of a tree; 0 for no limit."""
    max_tree_tokens: int = 0
    """best_first, mcts: most sampled tokens of a tree; 0 for no limit."""
    judge: str = ""
    """Step source under rewards.sources that scores candidates while a tree grows: for comb, beam, best_first, mcts and
    survivors=scored; "" to choose uniformly, which only comb can."""
    max_steps: int = 8
    """Depth limit of a tree, in steps (whole turns)."""
    max_turn_tokens: int = 8
    """Tokens of one step."""
    max_context_tokens: int = 512
    """Tokens of one path, prompt included."""
    temperature: float = 1.0
    top_p: float = 1.0
    turn_timeout_s: float = 120.0
    """Longest one turn may take, its sampling and the environment's answer together; it alone is then cut with
    StopReason.deadline, and trajectories beside it go on."""
    tree_timeout_s: float = 300.0
    """Longest one tree may take; its open trajectories are then cut with StopReason.deadline."""
    batch_timeout_s: float = 0.0
    """After so many seconds a batch closes with the trees it has, where these are enough; 0 waits for all. What it
    closes with hangs on the clock, so such a run does not repeat."""
    min_batch_share: float = 0.9
    """Share of a batch's trees that are enough for batch_timeout_s."""
    max_worker_restarts: int = 3
    """Dead workers replaced in one run; after that it goes on with those that are left, and stops with the last."""
    max_staleness: int = 0
    """Versions that the weights which sampled a step may be behind those that learn from it; 0 is strictly on policy
    and repeats to the last bit, above it so many batches grow while the learner is at an earlier one."""
    start_timeout_s: float = 600.0
    """Longest wait for the engines to load."""
    engine_processes: bool = False
    """On CPU too, give vLLM processes of its own (AsyncLLM), as it always has on a GPU."""
    max_running_requests: int = 256
    """Requests one engine runs at once."""
    kv_cache_mib: int = 256
    """Key-value cache of one CPU engine, in MiB."""
    gpu_memory_share: float = 0.85
    """Share of a GPU's memory one engine may take."""
    tensor_parallel_size: int = 1
    """GPUs of one engine."""


@dataclass(kw_only=True, slots=True)
class RewardModelConfig:
    """A model that reward sources ask: a judge, or a process reward model."""

    kind: ModelKind = ModelKind.endpoint
    path: str = ""
    """endpoint: the model's name there; else a folder or hub name."""
    url: str = ""
    """endpoint: base address, e.g. https://api.openai.com/v1."""
    api_key_env: str = ""
    """endpoint: environment variable that holds the key; "" for a server that wants none."""
    timeout_s: float = 60.0
    """Longest wait for one reply, each try by itself."""
    max_concurrent: int = 32
    """Requests on their way at once."""
    requests_per_minute: int = 0
    """endpoint: most requests started in a minute, tries included; 0 for no limit."""
    max_retries: int = 4
    """endpoint: tries after the first, with growing pauses, where the server was busy, broken or not reached."""
    breaker_failures: int = 8
    """endpoint: after so many requests in a row were lost, the next ones fail at once ..."""
    breaker_rest_s: float = 30.0
    """... for so long; then one is tried."""
    temperature: float = 0.0
    sends_temperature: bool = True
    """endpoint: false for models that take none but their own."""
    max_tokens: int = 1024
    """Tokens of one reply."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """endpoint: further fields of every request, e.g. {reasoning_effort: low} or, for vLLM,
    {chat_template_kwargs: {enable_thinking: false}}."""
    structured: bool = True
    """Ask for replies in the form of the source's JSON schema; false for servers that do not know response_format.
    Replies are held against the schema either way."""
    usd_per_million_prompt_tokens: float = 0.0
    usd_per_million_reply_tokens: float = 0.0
    """Prices, for the metrics."""
    family: str = ""
    """Process reward models: how steps are marked and scores are read; docs/rewards.md lists the families."""
    dtype: str = "float32"
    """vllm, transformers: float32, bfloat16 or float16."""
    max_context_tokens: int = 4096
    """vllm, transformers."""
    kv_cache_mib: int = 256
    """vllm on CPU: key-value cache, in MiB."""
    gpu_memory_share: float = 0.3
    """vllm: share of a GPU's memory it may take."""
    tensor_parallel_size: int = 1
    """vllm: GPUs of the engine."""


@dataclass(kw_only=True, slots=True)
class PartConfig:
    """One named part of what a source returns."""

    weight: float = 1.0
    """Factor beside the source's own weight."""
    signal: str = ""
    """Signal the part adds to; "" for the source's."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One reward source."""

    fn: str = ""
    """A function or class: "file.py:name" or "package.module:name"."""
    target: str = ""
    """The same as a dotted path ("package.module.name"), in YAML written `_target_`."""
    prm: bool = False
    """True for the source whose scores are those of the run's own process reward model (`prm.kind`); it has no fn."""
    level: str = ""
    """"step", "trajectory", "pair" or "tree"; "" reads it from the arguments: a function that asks for `step` scores
    steps, one that asks for `other` or `other_trajectory` compares two."""
    model: str = ""
    """Name under rewards.models, for a function that asks for `model`."""
    parts: dict[str, PartConfig] = field(default_factory=dict)
    """Weights and signals of named parts, for a function that returns them; a part not named here has weight 1."""
    cache: Cache = Cache.auto
    weight: float = 1.0
    """Factor of this source in its signal; 0 records the score and trains nothing."""
    signal: str = ""
    """Signal the score adds to; "" is "step" for steps and "outcome" for trajectories."""
    timeout_s: float = 0.0
    """Longest scoring one tree may take; later answers are timed out, not 0. 0 is 10 s, and 600 s for a function that
    asks for `model` or `engine`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Extra keyword arguments by name."""


@dataclass(kw_only=True, slots=True)
class RewardsConfig:
    """Who scores, and how much may fail."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    models: dict[str, RewardModelConfig] = field(default_factory=dict)
    """What sources may ask: rewards.sources.NAME.model names one."""
    max_failed_share: float = 0.05
    """Share of one source's scores in a step's batch that may fail or time out before the run stops."""
    num_processes: int = 2
    """Processes that run functions from a user's file, one tree at a time; async ones share another for each source."""
    memory_limit_mib: int = 4096
    """Memory that one of these processes may take, on top of what it shares; 0 for no limit."""
    cache_path: str = ""
    """SQLite file of cached scores, which runs may share; "" for one in the run folder."""
    setup_timeout_s: float = 120.0
    """Longest one source may take to import its file and make its class, in each process that runs it."""
    pass_env: list[str] = field(default_factory=list)
    """Environment variables that these processes see although their names look like secrets, e.g. OPENAI_API_KEY."""


@dataclass(kw_only=True, slots=True)
class SignalUse:
    """How a credit term reads one signal."""

    scale: float = 1.0
    shift: float = 0.0
    """The term uses scale * signal + shift, e.g. 2 and -1 to read {0, 1} as {-1, +1}."""
    read: Read = Read.score
    """What of the signal is scaled; only signals of steps have more than their score."""
    best_of: int = 1
    """Read a chance of success x as that of the best of so many tries, 1 - (1 - x)^best_of (PAV's prover)."""
    bound: bool = False
    """PORTool: multiply by gamma^max_steps / 2, so that [-1, +1] never outranks a decayed outcome of +-1."""


@dataclass(kw_only=True, slots=True)
class TermConfig:
    """One advantage: a value, the scope it is compared within, a normaliser, and a weight."""

    level: Level = Level.trajectory
    """trajectory: one value per leaf, given to every step of its path; step: one value per step."""
    signals: dict[str, SignalUse] = field(default_factory=dict)
    """Signals the value is made of. In a step term trajectory signals are backed up from the leaves."""
    fn: str = ""
    """A function of yours that gives the values in place of combine, returns and backup, as "file.py:name" or
    "package.module:name"; `signals` name what it reads. See docs/new_method.md."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of fn."""
    combine: Combine = Combine.sum
    returns: Return = Return.immediate
    backup: Backup = Backup.leaf_mean
    gamma: float = 1.0
    """Decay per step between a step and a reward behind it."""
    compare: Compare = Compare.returns
    scope: Scope = Scope.prompt
    normalizer: Normalizer = Normalizer.zscore
    ddof: int = 1
    """1 for the unbiased deviation, 0 for the population's."""
    eps: float = 1e-6
    """Added to the deviation."""
    min_std: float = 0.0
    """Floor of the deviation, so that a tiny difference is not blown up to a unit advantage."""
    token_weighted: bool = False
    """In the mean and deviation of its scope a value counts once for each sampled token, not once."""
    singleton: Degenerate = Degenerate.zero
    """A value alone in its scope."""
    zero_variance: Degenerate = Degenerate.zero
    """Values that are all equal in their scope, or equal to what they are compared with."""
    weight: float = 1.0


@dataclass(kw_only=True, slots=True)
class GaeConfig:
    """Generalised advantage estimation on the tree, with a critic (arXiv 1506.02438)."""

    level: GaeLevel = GaeLevel.off
    """step: one value per step; token: one per sampled token."""
    signals: dict[str, SignalUse] = field(default_factory=dict)
    """Rewards: step signals count at the end of their step, trajectory signals at the end of the trajectory."""
    combine: Combine = Combine.sum
    gamma: float = 1.0
    """Discount per step or token."""
    lam: float = 0.95
    """1 is Monte-Carlo, 0 trusts the critic alone."""
    whiten: bool = True
    """Advantages of the batch to mean 0 and deviation 1, each token once."""


@dataclass(kw_only=True, slots=True)
class CreditConfig:
    """How scores become advantages: the sum of the terms, plus what generalised advantage estimation gives."""

    name: str = ""
    terms: dict[str, TermConfig] = field(default_factory=dict)
    whiten: bool = False
    """The terms' sum to mean 0 and deviation 1 over the batch's tokens, each as often as it counts in the loss."""
    gae: GaeConfig = field(default_factory=GaeConfig)
    shared_token_weight: TokenWeight = TokenWeight.per_leaf


@dataclass(kw_only=True, slots=True)
class SelectConfig:
    """Which scored trajectories train. The others stay in the record and enter no statistic of credit.

    A trajectory is right when the first trajectory source says more than a half, as in rollout/success_share.
    """

    min_success_share: float = 0.0
    """Prompts with a smaller share of right trajectories are left out."""
    max_success_share: float = 1.0
    """Prompts with a larger share of right trajectories are left out."""
    ends_pass: bool = True
    """Whether a share equal to one of the two passes: yes in PRIME's code, no in its paper (arXiv 2502.01456)."""
    keep: Keep = Keep.all
    num_kept: int = 4
    """Trajectories of one prompt that `keep` lets train; smaller groups stay whole."""
    step_source: str = ""
    """The prof choices: source of step scores in [0, 1]. With weight 0 it selects and is no reward, as in the paper."""
    min_steps: int = 2
    """The prof choices: a shorter trajectory pays step_count_penalty."""
    max_steps: int = 30
    """The prof choices: a longer trajectory pays step_count_penalty."""
    step_count_penalty: float = 10.0
    """Taken from an agreement that lies in [-1, 1], so that 2 or more puts such trajectories last."""
    drop_silent_prompts: bool = False
    """Leave out prompts in which no step has an advantage (DAPO's dynamic sampling, on the blended advantage)."""
    max_refills: int = 0
    """How often a step draws as many more prompts as there are of which nothing is left to train."""


@dataclass(kw_only=True, slots=True)
class CriticConfig:
    """The value function of PPO."""

    kind: CriticKind = CriticKind.none
    path: str = ""
    """kind=model: folder or hub name it starts from; "" for the policy's own first weights."""
    learning_rate: float = 1e-5
    """kind=model, and the value head of kind=value_head."""
    warmup_steps: int = 0
    """First steps of the run in which the critic alone learns."""
    value_coef: float = 0.5
    """kind=value_head: weight of the value loss beside the policy loss."""
    clip: float = 0.2
    """The value loss earns nothing by moving further than this from the old value; 0 for none."""
    max_grad_norm: float = 1.0
    """kind=model."""


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """What is minimised."""

    kind: LossKind = LossKind.ppo_clip
    fn: str = ""
    """kind=custom: the function, as "file.py:name" or "package.module:name"."""
    aggregation: Aggregation = Aggregation.token_mean
    horizon_tokens: int = 0
    """aggregation=seq_mean_token_sum_norm: the constant that sums are divided by; 0 is rollout.max_context_tokens."""
    clip_low: float = 0.2
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: float = 0.28
    """Upper clip of the ratio: 1 + clip_high."""
    dual_clip: float = 0.0
    """Upper bound of the ratio where the advantage is negative; 0 for none."""
    kl_coef: float = 0.0
    """Weight of the KL to the first weights, in the loss; 0 for none."""
    kl_estimator: KlEstimator = KlEstimator.k3
    entropy_coef: float = 0.0
    old_logprobs: OldLogprobs = OldLogprobs.engine
    correction: Correction = Correction.none
    """Needs old_logprobs=recompute: against the engine's log-probs the ratio itself holds the mismatch."""
    corrects_stale: bool = True
    """With rollout.max_staleness above 0, and old_logprobs and correction as they are: recompute, token_truncate."""
    correction_min: float = 0.0
    correction_max: float = 2.0
    critic: CriticConfig = field(default_factory=CriticConfig)


@dataclass(kw_only=True, slots=True)
class LearnerConfig:
    """The optimiser, how batches are cut, and over how many processes."""

    learning_rate: float = 5e-4
    warmup_steps: int = 10
    optimizer: OptimizerKind = OptimizerKind.adamw
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mini_batches: int = 2
    """Optimiser updates in one pass over a step's prompts, which are cut whole."""
    epochs: int = 1
    """Passes over the same trees."""
    pack_tokens: int = 8192
    """Unique tokens of one forward pass."""
    layout: Layout = Layout.auto
    gradient_checkpointing: bool = False
    num_processes: int = 1
    """Processes that share the model by FSDP2, each with its own packs; one GPU each where there are GPUs."""
    weights_dtype: str = "float32"
    """Weights and moments of the optimiser; float32 keeps small updates that bfloat16 would round away."""
    offload: bool = False
    """Weights, gradients and moments wait in the host's memory (GPU only)."""
    num_threads: int = 2
    """Torch threads of each learner process on CPU."""
    update_timeout_s: float = 3600.0
    """Longest one update may take."""
    canary_samples: int = 4
    """Sampled steps that are scored again by each engine and by the learner after every weight update; 0 to skip."""
    canary_max_logprob_gap: float = 0.05
    """Largest mean gap, in nats, that the canary accepts; float32 agrees to 1e-5, bfloat16 to about 0.03."""


@dataclass(kw_only=True, slots=True)
class PrmConfig:
    """The process reward model that the run trains; the source with `prm: true` carries its scores."""

    kind: PrmKind = PrmKind.none
    path: str = ""
    """Folder or hub name it starts from, a causal LM; "" for the policy's own first weights."""
    reference_path: str = ""
    """kind=implicit: the frozen reference; "" for what the model starts from."""
    order: PrmOrder = PrmOrder.score_then_update
    beta: float = 0.05
    """kind=implicit: factor of the log-ratio."""
    learning_rate: float = 1e-6
    head_learning_rate: float = 1e-4
    """kind=progress: of the layer that reads a step's contribution."""
    warmup_steps: int = 0
    max_grad_norm: float = 10.0
    mini_batches: int = 1
    """Optimiser steps in one pass over a batch's prompts."""
    epochs: int = 1


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where the actors run."""

    address: str = ""
    """Address of a running Ray cluster; "" starts one on this machine and stops it at the end."""
    placement: Placement = Placement.auto
    learner_nodes: int = 0
    """Nodes that the learner's processes are spread over, this one first; with split nobody else works there. 0 takes
    as few as hold them, and sets none aside."""
    num_cpus: int = 0
    """Cores offered to Ray; 0 for all."""
    nodes_timeout_s: float = 600.0
    """How long a run that goes on (run.resume=true, or started again by itself) waits for room on a joined cluster, for
    one of its nodes may be coming back."""
    object_store_mib: int = 256
    """Shared memory of a Ray started here, beside two versions of the weights."""
    weights: WeightPath = WeightPath.object_store
    """How new weights get to the engines. broadcast and ipc never ran on a GPU yet."""
    weights_delta: bool = False
    """broadcast: send what an update has changed, where that is less than half. Costs a copy of the weights at both
    ends; pays between nodes with a slow network, at small learning rates and 16 bits."""
    weights_timeout_s: float = 60.0
    """broadcast and ipc: longest wait for an engine or a learner process that says nothing; then this version goes by
    the object store."""


@dataclass(kw_only=True, slots=True)
class RayJobsConfig:
    """launch.kind=ray: the cluster's job server, and which files of this folder it is given."""

    address: str = "http://127.0.0.1:8265"
    """Of the cluster's dashboard, which is its job server too."""
    excludes: list[str] = field(
        default_factory=lambda: [
            *(".*", "runs", "wandb", "outputs", "models", "node_modules", "__pycache__", "*.egg-info"),
            *("*.pyc", "*.log", "*.safetensors", "*.pt", "*.pem", "*.key"),
        ]
    )
    """Names of files and folders that are not uploaded, with * and ?; hidden ones may hold keys."""
    max_file_mib: float = 10.0
    """Larger files are left out, and named."""
    max_upload_mib: float = 100.0
    """Refuse to upload more than this; large data belongs on a disk that the nodes share."""


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """launch.kind=slurm: what the batch job asks for. This folder and run.dir lie on a disk that all nodes share."""

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int = 0
    """0 for whole nodes."""
    memory_gib_per_node: int = 0
    """0 for what the partition gives by default."""
    time_limit_minutes: int = 1440
    partition: str = ""
    account: str = ""
    notice_s: int = 180
    """Seconds before its end, or a preemption's, at which the job is told; the run then saves and is queued again."""
    port: int = 6379
    """Of Ray on the first node."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, e.g. ["--qos=high","--constraint=h100"]."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run first, e.g. ["module load cuda"]."""
    template: str = ""
    """A file to fill instead of Grove's own (rl/jobs/templates/slurm.sh.jinja)."""


@dataclass(kw_only=True, slots=True)
class KubeRayConfig:
    """launch.kind=kuberay: the pods. Each runs one Ray node; the head has no GPU and carries the run's own process."""

    namespace: str = "default"
    image: str = ""
    """With Grove and its pinned dependencies installed."""
    working_dir: str = ""
    """Address of a zip of your own files (https://, s3://, gs://), unpacked before the start; "" for none."""
    head_cpus: int = 4
    head_memory_gib: int = 16
    workers: int = 1
    """Worker pods."""
    worker_cpus: int = 8
    worker_memory_gib: int = 32
    worker_gpus: int = 0
    shared_memory_gib: int = 8
    """/dev/shm of each pod, part of its memory: where Ray keeps its objects."""
    volume_claim: str = ""
    """PersistentVolumeClaim that every pod mounts; run folders lie on it and outlive the pods."""
    mount_path: str = "/grove"
    """Where; launch.run_root lies below it."""
    secret_name: str = ""
    """Secret that holds the variables of launch.environment under their own names."""
    retries: int = 3
    """New clusters after one that failed; each goes on from the newest checkpoint."""
    linger_s: int = 600
    """How long pods stay after the end, so that logs can be read."""
    template: str = ""
    """A file to fill instead of Grove's own (rl/jobs/templates/rayjob.yaml.jinja)."""


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """Where `grove launch` starts a run; nothing else reads it."""

    kind: LaunchKind = LaunchKind.local
    run_root: str = ""
    """Folder, as the run's nodes see it, that a relative run.dir lies in; "" for the working folder of this machine,
    which they must then see too."""
    python: str = "python"
    """Python of the environment that Grove is installed in there. kind=local takes this one."""
    environment: list[str] = field(default_factory=list)
    """Names of the environment variables that the run is given, e.g. [WANDB_API_KEY]; their values are never written
    to a file or log of Grove's or Ray's. kind=local inherits all."""
    stop_limit_s: int = 120
    """How long a run that is stopped may take to save before it is killed."""
    answer_limit_s: float = 20.0
    """Longest wait for an answer of a job server, Slurm or Kubernetes."""
    ray: RayJobsConfig = field(default_factory=RayJobsConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kuberay: KubeRayConfig = field(default_factory=KubeRayConfig)


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """Who is shown the metrics beside metrics.jsonl: wandb, Prometheus."""

    mode: TrackerMode = TrackerMode.offline
    """Of wandb."""
    project: str = "grove"
    entity: str = ""
    metrics_port: int = 0
    """Port of a page for Prometheus (OpenMetrics), http://127.0.0.1:PORT/metrics; 0 for none."""
    metrics_host: str = "127.0.0.1"
    """Address that the page is served at; 0.0.0.0 lets other machines read it, and everybody there."""
    metrics_file: str = ""
    """The same as a file, written anew each step, for node_exporter's textfile collector: NAME.prom; "" for none."""


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """Several runs by one command, `grove train -m`. What varies stands on the command line: seed=1,2,3."""

    vary: dict[str, str] = field(default_factory=dict)
    """Setting to its values, as on the command line, e.g. {seed: "0,1,2"}; for presets. The command line wins."""
    dir: str = ""
    """Folder of the sweep, with a run folder for each member; "" is runs/sweeps/ and run.name with what varies."""
    parallel: int = 1
    """Members that run at once. Each is a process with a Ray of its own, or a driver that joins cluster.address."""
    max_retries: int = 1
    """Times that a member which failed goes on from its checkpoint. A wrong configuration is not tried again."""
    retry_failed: bool = False
    """Try members again that failed when the same sweep ran before."""
    inapplicable: Inapplicable = Inapplicable.refuse
    max_silent_s: float = 7200.0
    """Longest time that a member may say nothing, in its log or its metrics, before it is stopped and has failed."""
    stop_timeout_s: float = 120.0
    """Longest wait for a member that was stopped to write its checkpoint; then it is killed."""
    search: SearchKind = SearchKind.grid
    num_trials: int = 20
    """Combinations that a search tries; each is trained with every seed of seed=..."""
    metric: str = "eval/success_share"
    """Metric that a search improves, in the direction that the metric declares: its value after
    run.max_generated_tokens, between two evaluations by a straight line, or the last one without such a limit."""
    pruner: Pruner = Pruner.median
    num_checks: int = 4
    """Points at which a search asks whether to give a trial up, equally far apart in generated tokens, or in steps
    without run.max_generated_tokens. A trial is judged by its first seed."""
    startup_trials: int = 5
    """Trials that a search draws at random, and that are not given up, before it has seen enough to compare."""


@dataclass(kw_only=True, slots=True)
class Config:
    """One run."""

    seed: int = 0
    """Seed of everything random; the same seed gives the same run."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    prm: PrmConfig = field(default_factory=PrmConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
