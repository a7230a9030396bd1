"""Where a tree branches: which expander a config names.

An expander is a pure policy over the tree so far (`rollout.expanders`). It is asked again each time something has
finished: it sees the tree, the rows nobody has continued yet and how much is still growing, and answers what to do now.
When nothing is growing and it asks for nothing, the tree is finished.
"""

from __future__ import annotations

from conf.errors import ConfigError
from conf.schema import ExpanderKind, RolloutConfig, Survivors
from rollout.expanders.base import Expander
from rollout.expanders.beams import BeamForks, ScoredBeam
from rollout.expanders.chains import Chains, RandomExpand
from rollout.expanders.comb import Comb
from rollout.expanders.entropy import Decode, EntropyExpand
from rollout.expanders.search import BestFirst, Budget, Mcts
from rollout.expanders.segments import Segments, SegmentsTo


def build_expander(cfg: RolloutConfig, seed: int, decode: Decode | None = None) -> Expander:
    """The expander that `cfg.expander` names.

    Args:
        seed: drives its draws, for this tree alone.
        decode: text of token ids, for entropy_expand to find `cfg.answer_markers`.
    Raises: ConfigError for markers without `decode`.
    """
    match cfg.expander:
        case ExpanderKind.chains:
            return Chains(cfg.num_leaves)
        case ExpanderKind.beam_forks:
            if cfg.survivors is Survivors.scored:
                return ScoredBeam(cfg.num_leaves, cfg.max_forks, first=cfg.num_leaves)
            return BeamForks(cfg.num_leaves, cfg.max_forks, seed)
        case ExpanderKind.beam:
            return ScoredBeam(cfg.num_leaves, cfg.max_forks, first=cfg.num_leaves * cfg.max_forks)
        case ExpanderKind.random_expand:
            return RandomExpand(cfg.num_trees, cfg.expand_nodes, cfg.expand_rounds, cfg.keep_leaves, seed)
        case ExpanderKind.entropy_expand:
            return _entropy_expand(cfg, seed, decode)
        case ExpanderKind.segments:
            if not cfg.segment_leaves:
                return Segments(cfg.segment_branches, cfg.segment_tokens)
            return SegmentsTo(cfg.segment_branches, cfg.segment_tokens, cfg.segment_leaves, cfg.segment_first_max, seed)
        case ExpanderKind.comb:
            return Comb(cfg.num_candidates, cfg.choice_temperature, seed)
        case ExpanderKind.best_first:
            return BestFirst(cfg.num_leaves, cfg.max_forks, _budget(cfg))
        case ExpanderKind.mcts:
            return Mcts(cfg.search_simulations, cfg.max_forks, cfg.search_c, _budget(cfg))


def _entropy_expand(cfg: RolloutConfig, seed: int, decode: Decode | None) -> EntropyExpand:
    if cfg.answer_markers and decode is None:
        raise ConfigError(
            f"rollout.answer_markers={cfg.answer_markers} are found in text, and there is no tokenizer here to decode "
            f"with: tokens behind them would be chosen. Give build_expander its decode, or leave the markers out."
        )
    return EntropyExpand(
        trees=cfg.num_trees,
        tokens=cfg.expand_nodes,
        rounds=cfg.expand_rounds,
        forks=cfg.token_forks,
        keep=cfg.keep_leaves,
        seed=seed,
        answer_markers=cfg.answer_markers,
        decode=decode,
    )


def _budget(cfg: RolloutConfig) -> Budget:
    return Budget(cfg.max_nodes, cfg.max_tree_tokens, cfg.max_turn_tokens)
