"""The rules that span a configuration. All run before any process starts, and all problems are shown together."""

from __future__ import annotations

import logging
from collections.abc import Callable

from conf import (
    check_cluster,
    check_credit,
    check_evaluation,
    check_expanders,
    check_launch,
    check_learner,
    check_machine,
    check_rewards,
    check_select,
    check_sweep,
    check_task,
    check_world,
)
from conf.compose import numbered
from conf.errors import ConfigError
from conf.problem import Problem, value_of
from conf.schema import Config, ExpanderKind, LossKind

logger = logging.getLogger(__name__)

Rule = Callable[[Config], list[Problem]]

AT_LEAST_ONE = (
    "run.num_steps",
    "run.keep_checkpoints",
    "run.eval_samples",
    "rollout.num_workers",
    "rollout.prompts_per_step",
    "rollout.num_leaves",
    "rollout.max_forks",
    "rollout.num_trees",
    "rollout.expand_nodes",
    "rollout.max_steps",
    "rollout.max_turn_tokens",
    "rollout.max_context_tokens",
    "rollout.max_running_requests",
    "rollout.kv_cache_mib",
    "rollout.tensor_parallel_size",
    "rewards.num_processes",
    "learner.mini_batches",
    "learner.epochs",
    "prm.mini_batches",
    "prm.epochs",
    "learner.num_processes",
    "learner.pack_tokens",
    "learner.num_threads",
    "cluster.object_store_mib",
    "launch.slurm.nodes",
    "launch.slurm.time_limit_minutes",
    "launch.kuberay.head_cpus",
    "launch.kuberay.head_memory_gib",
    "launch.kuberay.worker_cpus",
    "launch.kuberay.worker_memory_gib",
    "launch.kuberay.shared_memory_gib",
    "task.max_calls",
    "task.hop_search.num_tools",
    "task.hop_search.num_relations",
    "task.hop_search.num_worlds",
    "task.world.max_sessions",
    "task.textworld.num_games",
    "task.textworld.num_rooms",
    "task.textworld.num_objects",
    "task.textworld.num_quests",
    "task.textworld.quest_length",
    "task.reasoning_gym.num_tries",
    "model.warm_start.batch_size",
    "model.warm_start.num_demonstrations",
    "model.warm_start.num_threads",
    "model.tiny.hidden_size",
    "model.tiny.num_layers",
    "model.tiny.num_heads",
    "model.tiny.num_kv_heads",
    "model.tiny.head_dim",
    "model.tiny.intermediate_size",
    "model.tiny.max_position_embeddings",
)
ABOVE_ZERO = (
    "run.eval_top_p",
    "run.checkpoint_timeout_s",
    "rollout.temperature",
    "rollout.turn_timeout_s",
    "rollout.tree_timeout_s",
    "rollout.start_timeout_s",
    "rollout.gpu_memory_share",
    "rewards.setup_timeout_s",
    "task.tool_timeout_s",
    "learner.learning_rate",
    "learner.max_grad_norm",
    "learner.update_timeout_s",
    "loss.critic.learning_rate",
    "loss.critic.max_grad_norm",
    "loss.correction_max",
    "model.lora.alpha",
    "prm.beta",
    "prm.learning_rate",
    "prm.head_learning_rate",
    "prm.max_grad_norm",
    "learner.canary_max_logprob_gap",
    "model.warm_start.learning_rate",
    "launch.answer_limit_s",
    "launch.ray.max_file_mib",
    "launch.ray.max_upload_mib",
    "model.tiny.initializer_range",
)
NOT_NEGATIVE = (
    "seed",
    "run.max_generated_tokens",
    "run.eval_every_steps",
    "run.eval_prompts",
    "run.eval_temperature",
    "run.checkpoint_every_steps",
    "run.keep_best",
    "run.record_every_steps",
    "run.max_restarts",
    "rollout.expand_rounds",
    "rollout.keep_leaves",
    "rollout.max_worker_restarts",
    "rollout.max_staleness",
    "rollout.batch_timeout_s",
    "rewards.memory_limit_mib",
    "prm.warmup_steps",
    "task.train.max_rows",
    "task.eval.max_rows",
    "task.hop_search.spare_calls",
    "task.hop_search.tool_delay_s",
    "task.world.num_processes",
    "task.world.memory_limit_mib",
    "loss.clip_low",
    "loss.clip_high",
    "loss.dual_clip",
    "loss.kl_coef",
    "loss.entropy_coef",
    "loss.horizon_tokens",
    "loss.correction_min",
    "loss.critic.warmup_steps",
    "loss.critic.value_coef",
    "loss.critic.clip",
    "model.lora.rank",
    "learner.warmup_steps",
    "learner.weight_decay",
    "learner.canary_samples",
    "cluster.num_cpus",
    "launch.stop_limit_s",
    "launch.slurm.gpus_per_node",
    "launch.slurm.cpus_per_node",
    "launch.slurm.memory_gib_per_node",
    "launch.slurm.notice_s",
    "launch.kuberay.workers",
    "launch.kuberay.worker_gpus",
    "launch.kuberay.retries",
    "launch.kuberay.linger_s",
    "cluster.learner_nodes",
    "model.warm_start.num_steps",
)
SHARES = (
    "credit.gae.gamma",
    "credit.gae.lam",
    "rewards.max_failed_share",
    "task.max_tool_crashes_share",
    "rollout.gpu_memory_share",
    "rollout.min_batch_share",
    "run.eval_top_p",
    "model.warm_start.first_try_share",
)
MAX_TEMPERATURE = 5.0
"""Beyond it a policy draws nearly at random, and a slip like 10 for 1.0 is more likely than a wish."""


OF_THIS_MACHINE: tuple[Rule, ...] = (
    check_machine.cores_and_gpus_suffice,
    check_machine.engine_is_installed,
    check_machine.cache_holds_a_path,
    check_machine.tracker_can_log_in,
    check_learner.layout_fits_the_device,
    check_learner.processes_have_devices,
    check_learner.offload_has_a_gpu,
)
"""Rules that look at the cores, GPUs, packages and keys of this machine."""


def problems(cfg: Config, *, elsewhere: bool = False) -> list[Problem]:
    """Everything that is wrong with a configuration, in the order of the rules.

    Args:
        elsewhere: the run goes to other machines, so nothing is asked of this one.
    """
    return [problem for rule in rules() if not (elsewhere and rule in OF_THIS_MACHINE) for problem in rule(cfg)]


def require_runnable(cfg: Config, warn: Callable[[str], None] = logger.warning, *, elsewhere: bool = False) -> None:
    """Tell every warning, and refuse a configuration that cannot run.

    Args:
        cfg: a composed configuration.
        warn: told each warning; logs it unless said otherwise.
        elsewhere: as for `problems`.
    Raises: ConfigError that lists all fatal problems.
    """
    found = problems(cfg, elsewhere=elsewhere)
    for problem in found:
        if not problem.fatal:
            warn(problem.text)
    fatal = [problem.text for problem in found if problem.fatal]
    if fatal:
        raise ConfigError(numbered(fatal))


def rules() -> list[Rule]:
    """Every rule; each looks at one matter and knows nothing of the others."""
    own: list[Rule] = [
        numbers_are_in_range,
        source_timeouts,
        names_a_run,
        traces_steps_that_are_run,
        tree_has_leaves_to_keep,
        forks_fit_the_leaves,
        prompts_fill_mini_batches,
        turn_fits_the_context,
        samples_what_it_trains,
        clips_are_sane,
        betas_are_two,
        hops_can_be_walked,
        hop_tools_are_there,
        tiny_heads_fit,
        term_numbers,
    ]
    modules = (
        check_launch,
        check_cluster,
        check_machine,
        check_evaluation,
        check_expanders,
        check_learner,
        check_rewards,
        check_credit,
        check_select,
        check_sweep,
        check_task,
        check_world,
    )
    return [*own, *(rule for module in modules for rule in module.rules())]


def numbers_are_in_range(cfg: Config) -> list[Problem]:
    """Counts, times and shares."""
    found = []
    for keys, is_right, wanted in (
        (AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
        (ABOVE_ZERO, lambda value: value > 0, "above 0"),
        (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (SHARES, lambda value: value <= 1, "a share of at most 1"),
        (SHARES, lambda value: value >= 0, "a share of at least 0"),
    ):
        for key in keys:
            value = value_of(cfg, key)
            # Written this way round, NaN is wrong everywhere.
            if not is_right(value):
                found.append(Problem(f"{key}={value} cannot be: it must be {wanted}."))
    return list(dict.fromkeys(found))


def source_timeouts(cfg: Config) -> list[Problem]:
    """A source needs time to answer."""
    return [
        Problem(f"rewards.sources.{name}.timeout_s={source.timeout_s} leaves no time to score: give seconds, or 0.")
        for name, source in cfg.rewards.sources.items()
        if not source.timeout_s >= 0
    ]


def names_a_run(cfg: Config) -> list[Problem]:
    """The run folder must not be the working folder by accident."""
    if cfg.run.name and cfg.run.dir:
        return []
    key, example = ("run.dir", "runs/mine") if cfg.run.name else ("run.name", "mine")
    return [Problem(f"{key} is empty: a run writes a folder of its own. Use e.g. {key}={example}.")]


def traces_steps_that_are_run(cfg: Config) -> list[Problem]:
    """Steps are counted from 1."""
    return [
        Problem(
            f"run.profile_steps holds {step}, and the run has steps 1 to {cfg.run.num_steps}: nothing is traced then."
        )
        for step in cfg.run.profile_steps
        if not 1 <= step <= cfg.run.num_steps
    ]


def tree_has_leaves_to_keep(cfg: Config) -> list[Problem]:
    """random_expand: a tree has its first chain's leaf and one more for each expansion."""
    rollout = cfg.rollout
    if rollout.expander is not ExpanderKind.random_expand:
        return []
    leaves = 1 + rollout.expand_rounds * rollout.expand_nodes
    if rollout.keep_leaves <= leaves:
        return []
    return [
        Problem(
            f"rollout.keep_leaves={rollout.keep_leaves}, but a tree grows {leaves} trajectories only (1 + "
            f"rollout.expand_rounds={rollout.expand_rounds} x rollout.expand_nodes={rollout.expand_nodes}). "
            f"Use rollout.keep_leaves={leaves}, 0 to keep all, or more rounds or nodes."
        )
    ]


def forks_fit_the_leaves(cfg: Config) -> list[Problem]:
    """beam_forks: more slots than places are never filled; one slot never forks."""
    rollout = cfg.rollout
    if rollout.expander is not ExpanderKind.beam_forks or 1 < rollout.max_forks <= max(rollout.num_leaves, 2):
        return []
    if rollout.max_forks == 1:
        text = "no step below the prompt ever forks: these are chains. Use rollout.max_forks=2, or rollout=chains."
    else:
        text = (
            f"no step can have more continuations than the rollout.num_leaves={rollout.num_leaves} trajectories of the "
            f"tree. Use rollout.max_forks={rollout.num_leaves} or fewer."
        )
    return [Problem(f"rollout.max_forks={rollout.max_forks}: {text}", fatal=False)]


def prompts_fill_mini_batches(cfg: Config) -> list[Problem]:
    """Prompts are cut whole."""
    prompts, batches = cfg.rollout.prompts_per_step, cfg.learner.mini_batches
    if prompts >= batches:
        return []
    return [
        Problem(
            f"learner.mini_batches={batches} is more than rollout.prompts_per_step={prompts}: prompts are never cut, "
            f"so some mini-batches would be empty. Use learner.mini_batches={max(prompts, 1)} or fewer."
        )
    ]


def turn_fits_the_context(cfg: Config) -> list[Problem]:
    """A path holds the prompt and at least one turn."""
    context, turn = cfg.rollout.max_context_tokens, cfg.rollout.max_turn_tokens
    if context > turn:
        return []
    return [
        Problem(
            f"rollout.max_context_tokens={context} leaves no room for a prompt beside one turn of "
            f"rollout.max_turn_tokens={turn}: every trajectory would end at once. Use rollout.max_context_tokens="
            f"{turn * 4} or a shorter turn."
        )
    ]


def samples_what_it_trains(cfg: Config) -> list[Problem]:
    """The learner's log-probs are those of the whole vocabulary at the sampling temperature."""
    found = []
    if cfg.rollout.temperature > MAX_TEMPERATURE:
        found.append(
            Problem(
                f"rollout.temperature={cfg.rollout.temperature} is above {MAX_TEMPERATURE}: the policy would draw "
                f"nearly at random and learn from noise. Use rollout.temperature=1."
            )
        )
    if cfg.rollout.top_p != 1:
        found.append(
            Problem(
                f"rollout.top_p={cfg.rollout.top_p}: the engine would draw from a part of the vocabulary, and its "
                f"log-probs would not match those the learner computes over all of it, so every ratio of the loss "
                f"would be wrong. Use rollout.top_p=1."
            )
        )
    return found


def clips_are_sane(cfg: Config) -> list[Problem]:
    """A ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    loss, found = cfg.loss, []
    if loss.clip_low >= 1 and loss.kind is not LossKind.cispo:  # whose weights need no lower bound
        found.append(
            Problem(
                f"loss.clip_low={loss.clip_low} puts the lower bound of the ratio, 1 - clip_low, at 0 or below, where "
                f"it never clips. Use a value below 1, e.g. loss.clip_low=0.2."
            )
        )
    if 0 < loss.dual_clip <= 1 + loss.clip_high:
        found.append(
            Problem(
                f"loss.dual_clip={loss.dual_clip} must lie above the usual clip 1 + loss.clip_high="
                f"{1 + loss.clip_high:g}, else it cuts steps that did not move. Use loss.dual_clip=3, or 0 for none."
            )
        )
    return found


def betas_are_two(cfg: Config) -> list[Problem]:
    """AdamW has two."""
    betas = cfg.learner.betas
    if len(betas) == 2 and all(0 <= beta < 1 for beta in betas):
        return []
    return [Problem(f"learner.betas={betas} must be two numbers in [0, 1), e.g. learner.betas=[0.9,0.95].")]


def hops_can_be_walked(cfg: Config) -> list[Problem]:
    """hop_search: a call for each hop, the spare calls, and the answer are steps."""
    task, max_steps = cfg.task.hop_search, cfg.rollout.max_steps
    if cfg.task.generator != "hop_search":
        return []
    if not task.hops or min(task.hops) < 1:
        return [Problem(f"task.hop_search.hops={task.hops} must name chain lengths of 1 or more, e.g. [3].")]
    longest = max(task.hops)
    useful = longest + task.spare_calls + 1
    if max_steps >= useful:
        return []
    fatal = max_steps <= longest
    why = (
        "such a question can never be answered"
        if fatal
        else f"some of the {task.spare_calls} spare calls cannot be used"
    )
    return [
        Problem(
            f"rollout.max_steps={max_steps}, but {longest} hops, {task.spare_calls} spare calls and the answer are "
            f"{useful} steps: {why}. Use rollout.max_steps={useful + 1}.",
            fatal=fatal,
        )
    ]


def hop_tools_are_there(cfg: Config) -> list[Problem]:
    """hop_search: each relation is served by one of num_tools tools, and the policy must have them all."""
    tools, wanted = cfg.task.tools, cfg.task.hop_search.num_tools
    if cfg.task.generator != "hop_search" or len(tools) == wanted:
        return []
    return [
        Problem(
            f"task.tools names {len(tools)} tools, but task.hop_search.num_tools={wanted} deal out the relations: "
            f"{'some could never be asked for' if len(tools) < wanted else 'the others would serve none'}. "
            f"Make the two agree."
        )
    ]


def tiny_heads_fit(cfg: Config) -> list[Problem]:
    """Grouped-query attention shares each key-value head among equally many heads."""
    tiny = cfg.model.tiny
    if cfg.model.path or tiny.num_kv_heads < 1 or tiny.num_heads % tiny.num_kv_heads == 0:
        return []
    return [
        Problem(
            f"model.tiny.num_heads={tiny.num_heads} is not a multiple of model.tiny.num_kv_heads={tiny.num_kv_heads}: "
            f"each key-value head serves equally many heads. Use model.tiny.num_heads="
            f"{tiny.num_kv_heads * max(1, tiny.num_heads // tiny.num_kv_heads)}."
        )
    ]


def term_numbers(cfg: Config) -> list[Problem]:
    """A deviation has ddof 0 or 1, nothing negative is added to it, and credit does not grow with distance."""
    found = []
    for name, term in cfg.credit.terms.items():
        key = f"credit.terms.{name}"
        if term.ddof not in (0, 1):
            found.append(Problem(f"{key}.ddof={term.ddof} must be 1 (unbiased) or 0 (of the population)."))
        if not 0 <= term.gamma <= 1:
            found.append(Problem(f"{key}.gamma={term.gamma} must lie in [0, 1]: above 1 far rewards would count more."))
        for part in ("eps", "min_std"):
            if not getattr(term, part) >= 0:
                found.append(
                    Problem(f"{key}.{part}={getattr(term, part)} must be 0 or more: a deviation is not negative.")
                )
    return found
