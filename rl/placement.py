"""Which process of a run goes to which node, with which cores and GPUs: a plain value, made before anything starts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from conf.check_machine import num_cores, num_gpus
from conf.errors import ConfigError
from conf.schema import Config, ModelKind, Placement
from rl.prm import has_prm


class Role(Enum):
    """What a process is."""

    rewards = "reward service"
    learner = "learner"
    prm = "process reward model"
    model = "reward model"
    worker = "rollout worker"


LEARNING = frozenset({Role.learner, Role.prm})
"""Roles of who learns: nobody has them in what only samples."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine, or a Ray node, and what of it is free."""

    id: str
    address: str
    num_cpus: float
    num_gpus: int = 0
    is_driver: bool = False
    """The command runs here."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process and its place."""

    role: Role
    name: str
    """Rank of a learner process, number of a worker, name under rewards.models."""
    cpus: float
    gpus: float
    """Whole ones are its own; a share is of the GPU of its `seat`."""
    node: str = ""
    """Id of the node."""
    seat: int | None = None
    """Number of a GPU that it shares with the other processes of the same seat."""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.role.value, self.name)))


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every process of a run goes."""

    placement: Placement
    nodes: tuple[Node, ...]
    """The driver's first."""
    processes: tuple[Process, ...]
    engine_memory_share: float
    """Share of its GPU's memory that one engine may take."""
    engines_sleep: bool
    """Engines give their GPU to the learner while it updates."""

    def of(self, role: Role) -> list[Process]:
        """The processes of a role, in their order."""
        return [process for process in self.processes if process.role is role]

    def process(self, role: Role, name: str = "") -> Process:
        """One process."""
        return next(process for process in self.of(role) if process.name == name)

    def node(self, process: Process) -> Node:
        """Where a process goes."""
        return next(node for node in self.nodes if node.id == process.node)

    def learner_address(self) -> str:
        """Address at which the learner's processes meet: "" where all are on one node."""
        ranks = self.of(Role.learner)
        return self.node(ranks[0]).address if len({rank.node for rank in ranks}) > 1 else ""

    def table(self) -> str:
        """The plan for people, a line for each process."""
        rows = [("process", "node", "cores", "GPUs")]
        for process in self.processes:
            node = self.node(process)
            shared = "" if process.seat is None else f" of GPU {process.seat}"
            gpus = f"{process.gpus:.3g}{shared}" if process.gpus else "-"
            where = f"{node.address} (here)" if node.is_driver else node.address
            rows.append((str(process), where, f"{process.cpus:g}" if process.cpus else "-", gpus))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.engines_sleep:
            lines.append("engines sleep while the learner updates")
        return "\n".join(lines)


def node_here(cfg: Config) -> Node:
    """This machine as Ray will offer it, before it is started."""
    return Node("here", "127.0.0.1", cfg.cluster.num_cpus or num_cores(), num_gpus(), is_driver=True)


def plan(cfg: Config, nodes: Sequence[Node], *, without: Collection[Role] = ()) -> Plan:
    """The place of every process.

    Workers are spread over all nodes that have room, one after the other; the learner's processes are kept together,
    on the driver's node first, since rank 0 writes the checkpoints there. Without GPUs a worker takes a core and all
    else takes none: in a synchronous step engines and learner work in turn (with placement=split the learner's threads
    have cores of their own).

    Args:
        nodes: what is free; one of them is the driver's.
        without: roles that nobody has, such as the learner's in what only samples.
    Raises: ConfigError where something has no room, with what is there and what is needed.
    """
    nodes = sorted(nodes, key=lambda node: not node.is_driver)
    on_gpus = any(node.num_gpus for node in nodes)
    wanted = [each for each in _processes(cfg, on_gpus=on_gpus) if each.role not in without]
    placement = cfg.cluster.placement
    sleeps = placement is Placement.time_share and Role.learner not in without
    share = cfg.rollout.gpu_memory_share
    if not on_gpus:
        placed, parts = _apart(cfg, nodes, wanted), 1
    elif placement is Placement.time_share:
        placed, parts = _seated(cfg, nodes, wanted)
    else:
        try:
            placed, parts = _apart(cfg, nodes, wanted), 1
        except ConfigError:
            spanning = any(process.gpus > 1 for process in wanted) or cfg.learner.num_processes > 1
            if placement is Placement.split or spanning or cfg.cluster.learner_nodes:
                raise
            placed, parts = _dealt(cfg, nodes, wanted)
    return Plan(placement, tuple(nodes), tuple(placed), share / parts, sleeps)


def moved(found: Plan, process: Process, nodes: Sequence[Node]) -> Plan | None:
    """The plan with a lost process on a node that lives: its own, else the one with the most room.

    Args:
        nodes: those that live, with what others leave of them; what this plan's own processes take is counted here.
    Returns: None while there is no room. One that shared a GPU has room on its own node alone.
    """
    others = [each for each in found.processes if each is not process]
    if process.node not in {node.id for node in nodes}:
        if process.seat is not None:
            return None
        room = _Room(nodes, [each for each in others if each.node in {node.id for node in nodes}])
        set_aside = {each.node for each in found.of(Role.learner)} - {each.node for each in found.of(Role.worker)}
        free = [node for node in nodes if found.placement is not Placement.split or node.id not in set_aside]
        node = room.roomiest(process, free)
        if node is None:
            return None
        process = replace(process, node=node.id)
    known = {node.id: node for node in (*found.nodes, *nodes)}
    kept = [process if each.role is process.role and each.name == process.name else each for each in found.processes]
    return replace(found, nodes=tuple(known.values()), processes=tuple(kept))


def _processes(cfg: Config, *, on_gpus: bool) -> list[Process]:
    """Every process with what it needs for itself, in the order they are given their place."""
    asked = {source.model for source in cfg.rewards.sources.values()}
    models = {
        name: model
        for name, model in cfg.rewards.models.items()
        if model.kind is not ModelKind.endpoint and name in asked
    }
    threads = 0 if on_gpus or cfg.cluster.placement is not Placement.split else cfg.learner.num_threads
    return [
        Process(Role.rewards, "", 0, 0),
        *(Process(Role.learner, str(rank), threads, on_gpus) for rank in range(cfg.learner.num_processes)),
        *([Process(Role.prm, "", 0, on_gpus)] if has_prm(cfg) else []),
        *(Process(Role.model, name, 0, on_gpus * model.tensor_parallel_size) for name, model in models.items()),
        *(
            Process(Role.worker, str(number), 1, on_gpus * cfg.rollout.tensor_parallel_size)
            for number in range(cfg.rollout.num_workers)
        ),
    ]


class _Room:
    """What is left of each node."""

    def __init__(self, nodes: Sequence[Node], placed: Sequence[Process] = ()) -> None:
        self.nodes = list(nodes)
        self.cpus = {node.id: node.num_cpus for node in nodes}
        self.gpus: dict[str, float] = {node.id: node.num_gpus for node in nodes}
        self.workers = dict.fromkeys(self.cpus, 0)
        for process in placed:
            self.take(process)

    def take(self, process: Process) -> None:
        self.cpus[process.node] -= process.cpus
        self.gpus[process.node] -= process.gpus
        self.workers[process.node] += process.role is Role.worker

    def fits(self, process: Process, node: Node) -> bool:
        return process.cpus <= self.cpus[node.id] and process.gpus <= self.gpus[node.id] + 1e-9

    def roomiest(self, process: Process, among: Sequence[Node] | None = None) -> Node | None:
        """Where fewest workers are, and of these where most is free; the first of equals."""
        fitting = [node for node in self.nodes if among is None or node in among if self.fits(process, node)]
        key = {node.id: (self.workers[node.id], -self.gpus[node.id], -self.cpus[node.id]) for node in fitting}
        return min(fitting, key=lambda node: key[node.id], default=None)


def _apart(cfg: Config, nodes: list[Node], wanted: list[Process]) -> list[Process]:
    """Everybody with whole devices of their own."""
    room = _Room(nodes)
    on_gpus = any(process.gpus for process in wanted)
    ranks = [process for process in wanted if process.role is Role.learner]
    # Stable, so that the driver's node comes first of those that can compute at all.
    able = sorted(nodes, key=lambda node: not (node.num_gpus if on_gpus else node.num_cpus))
    learner_nodes = able[: cfg.cluster.learner_nodes or len(able)]
    if len(learner_nodes) < cfg.cluster.learner_nodes:
        raise _refused(cfg, nodes, wanted, f"cluster.learner_nodes={cfg.cluster.learner_nodes} are not there")
    apart = cfg.cluster.placement is Placement.split and cfg.cluster.learner_nodes and ranks
    for_others = [node for node in nodes if node not in learner_nodes] if apart else nodes
    placed: list[Process] = []
    for process in wanted:
        if process.role is Role.learner and cfg.cluster.learner_nodes:
            block = learner_nodes[int(process.name) * len(learner_nodes) // len(ranks)]
            node = block if room.fits(process, block) else None
        elif process.role is Role.worker or (process.role is Role.model and process.gpus):
            node = room.roomiest(process, for_others)
        elif process.role is Role.prm and apart:
            node = next((node for node in learner_nodes if room.fits(process, node)), None)
        else:
            order = able if process.role in (Role.learner, Role.prm) else nodes
            node = next((node for node in order if room.fits(process, node)), None)
        if node is None:
            raise _refused(cfg, nodes, wanted, f"no node has room left for {process}")
        placed.append(replace(process, node=node.id))
        room.take(placed[-1])
    return placed


def _dealt(cfg: Config, nodes: list[Node], wanted: list[Process]) -> tuple[list[Process], int]:
    """Fewer GPUs than processes: dealt out in equal shares. Returns the parts that a GPU is cut into, too."""
    seats = _seats(nodes)
    sharing = [process for process in wanted if process.gpus]
    parts = -(-len(sharing) // len(seats))
    seat_of = {id(process): number % len(seats) for number, process in enumerate(sharing)}
    return _sitting(cfg, nodes, wanted, seats, seat_of, parts), parts


def _seated(cfg: Config, nodes: list[Node], wanted: list[Process]) -> tuple[list[Process], int]:
    """Taking turns: a GPU for each learner process, and the engines on these and all others.

    Returns: the processes, and how many engines share the memory of the fullest GPU.
    """
    seats = _seats(nodes)
    learners = [process for process in wanted if process.role is Role.learner]
    if len(learners) > len(seats):
        raise _refused(cfg, nodes, wanted, f"{len(learners)} learner processes cannot share {len(seats)} GPUs")
    seat_of = {id(process): number for number, process in enumerate(learners)}
    engines = [process for process in wanted if process.role in (Role.worker, Role.model)]
    seat_of |= {id(process): number % len(seats) for number, process in enumerate(engines)}
    seat_of |= {id(process): len(seats) - 1 for process in wanted if process.role is Role.prm}
    fullest = max(list(seat_of.values()).count(seat) for seat in range(len(seats)))
    return _sitting(cfg, nodes, wanted, seats, seat_of, fullest), -(-len(engines) // len(seats))


def _seats(nodes: list[Node]) -> list[Node]:
    """The node of each GPU."""
    return [node for node in nodes for _ in range(node.num_gpus)]


def _sitting(
    cfg: Config, nodes: list[Node], wanted: list[Process], seats: list[Node], seat_of: dict[int, int], parts: int
) -> list[Process]:
    here = nodes[0].id
    placed = [
        replace(process, gpus=1 / parts, seat=seat_of[id(process)], node=seats[seat_of[id(process)]].id)
        if id(process) in seat_of
        else replace(process, node=here)
        for process in wanted
    ]
    for node in nodes:
        cores = sum(process.cpus for process in placed if process.node == node.id)
        if cores > node.num_cpus:
            raise _refused(cfg, nodes, wanted, f"{node.address} would need {cores:g} cores beside its GPUs")
    return placed


def _refused(cfg: Config, nodes: Sequence[Node], wanted: Sequence[Process], why: str) -> ConfigError:
    there = "; ".join(f"{node.address}: {node.num_cpus:g} cores, {node.num_gpus} GPUs" for node in nodes)
    counts: dict[tuple[str, float, float], int] = {}
    for process in wanted:
        if process.cpus or process.gpus:
            key = (process.role.value, process.cpus, process.gpus)
            counts[key] = counts.get(key, 0) + 1
    needed = "; ".join(f"{number} x {role} of {_amount(cpus, gpus)}" for (role, cpus, gpus), number in counts.items())
    return ConfigError(
        f"cluster.placement={cfg.cluster.placement.value} is impossible here: {why}. Free: {there}. Needed: {needed}. "
        "Nothing was started. Lower rollout.num_workers, rollout.tensor_parallel_size or learner.num_processes, choose "
        "another cluster=, or add nodes."
    )


def _amount(cpus: float, gpus: float) -> str:
    named = [(cpus, "core"), (gpus, "GPU")]
    return " and ".join(f"{amount:g} {unit}{'s' if amount > 1 else ''}" for amount, unit in named if amount)
