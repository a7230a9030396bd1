"""Tournaments: places of trajectories from games between two of them, as ArenaRL (arXiv 2601.06487) ranks them.

A place is 0 for the best; equal places are ties. A tournament yields all games of a round at once, so that a judge can
answer them together, and is sent the points that each side of each game gets: `played` and `played_async` see to that.
Which games are played, and that the first of two equal sides goes on, is as in the authors' code; how a whole bracket
is drawn is our reading.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import TypeVar

from conf.errors import DataError

Game = tuple[int, int]
Points = tuple[float, float]
Play = Callable[[Sequence[Game]], Sequence[Points]]
"""Points of both sides of each game, in the order of the games; higher is better."""
Tournament = Generator[Sequence[Game], Sequence[Points], list[int]]
"""Yields the games of a round, is sent their points, and returns the place of each player."""


def played(tournament: Tournament, play: Play) -> list[int]:
    """Places, with games played by a function."""
    try:
        games = next(tournament)
        while True:
            games = tournament.send(play(games))
    except StopIteration as end:
        return end.value


async def played_async(
    tournament: Tournament, play: Callable[[Sequence[Game]], Awaitable[Sequence[Points]]]
) -> list[int]:
    """Places, with games that are waited for."""
    try:
        games = next(tournament)
        while True:
            games = tournament.send(await play(games))
    except StopIteration as end:
        return end.value


def round_robin(num_players: int) -> Tournament:
    """Everyone against everyone, n (n - 1) / 2 games; places by the sum of points, ties stay ties."""
    _require_two(num_players)
    games = [(one, two) for one in range(num_players) for two in range(one + 1, num_players)]
    return places_of(_totals(num_players, games, (yield games)))


def anchored(num_players: int, anchor: int = 0) -> Tournament:
    """Everyone against one anchor, n - 1 games; places by points, the anchor's are the mean of what it got.

    ArenaRL's anchor is a trajectory decoded greedily.
    """
    return places_of((yield from _seed_points(num_players, anchor)))


def single_elimination(num_players: int, anchor: int = 0) -> Tournament:
    """Games against the anchor give the seeds, then the loser of each game is out; 2 (n - 1) games, no ties.

    High seeds meet late, and the highest have no game in the first round where n is no power of two. Those who lose in
    the same round are placed by their mean points over all games so far.

    Returns: place of each player, 0 to n - 1.
    Raises: DataError for fewer than two players.
    """
    total = yield from _seed_points(num_players, anchor)
    points = [[each] for each in total]
    standing = sorted(range(num_players), key=lambda player: (-total[player], player))
    bracket = _bracket(standing)
    out: list[list[int]] = []
    while len(bracket) > 1:
        pairs = [(bracket[place], bracket[place + 1]) for place in range(0, len(bracket), 2)]
        games = [(one, two) for one, two in pairs if one is not None and two is not None]
        winner, losers = _winners(games, (yield games), points)
        bracket = [one if two is None else two if one is None else winner[one, two] for one, two in pairs]
        out.append(losers)
    champion = bracket[0]
    assert champion is not None, "someone is left"
    return _placed([[champion], *reversed(out)], points)


def double_elimination(num_players: int, anchor: int = 0) -> Tournament:
    """As `single_elimination`, but out is who has lost twice; at the end the one unbeaten plays the one beaten once.

    Those who lost once play on among themselves, in the order in which they came down; between 3 (n - 1) and
    3 (n - 1) + 1 games, seeding included, for the last may have to be played again.
    """
    total = yield from _seed_points(num_players, anchor)
    points = [[each] for each in total]
    unbeaten = sorted(range(num_players), key=lambda player: (-total[player], player))
    beaten_once: list[int] = []
    out: list[list[int]] = []
    while len(unbeaten) > 1 or len(beaten_once) > 1:
        upper, lower = _round_of(unbeaten), _round_of(beaten_once)
        results = yield [*upper, *lower]
        winners, fallen = _winners(upper, results[: len(upper)], points)
        lower_winners, losers = _winners(lower, results[len(upper) :], points)
        if losers:
            out.append(losers)
        unbeaten = _left(unbeaten, upper, winners)
        beaten_once = [*_left(beaten_once, lower, lower_winners), *fallen]
    finalists = [(unbeaten[0], beaten_once[0])]
    _, losers = _winners(finalists, (yield finalists), points)
    if losers == [unbeaten[0]]:  # both have lost once now
        _, losers = _winners(finalists, (yield finalists), points)
    champion = unbeaten[0] if losers != [unbeaten[0]] else beaten_once[0]
    return _placed([[champion], losers, *reversed(out)], points)


def swiss(num_players: int, num_rounds: int) -> Tournament:
    """In every round neighbours in the standing play, who have not met yet if that can be; nobody is out.

    Places by games won (half for a draw; a round without an opponent counts as won), then by Buchholz, the sum of the
    opponents' won games, then by points; n / 2 games a round.

    Raises: DataError for fewer than two players.
    """
    _require_two(num_players)
    won, total = [0.0] * num_players, [0.0] * num_players
    opponents: list[list[int]] = [[] for _ in range(num_players)]
    had_bye: set[int] = set()
    for _ in range(num_rounds):
        standing = sorted(range(num_players), key=lambda player: (-won[player], -total[player], player))
        if num_players % 2:
            bye = next(player for player in reversed(standing) if player not in had_bye or len(had_bye) == num_players)
            standing.remove(bye)
            had_bye.add(bye)
            won[bye] += 1
        games = _neighbours(standing, opponents)
        for (one, two), (points_one, points_two) in zip(games, (yield games), strict=True):
            opponents[one].append(two)
            opponents[two].append(one)
            total[one] += points_one
            total[two] += points_two
            share = 0.5 if points_one == points_two else float(points_one > points_two)
            won[one] += share
            won[two] += 1 - share
    buchholz = [sum(won[other] for other in opponents[player]) for player in range(num_players)]
    return places_of([(won[player], buchholz[player], total[player]) for player in range(num_players)])


Score = TypeVar("Score", float, tuple[float, float, float])


def places_of(scores: Sequence[Score]) -> list[int]:
    """0 for the highest score; equal scores share the better place."""
    return [sum(other > score for other in scores) for score in scores]


def reward_of_places(places: Sequence[int]) -> list[float]:
    """From 1 for the best place to 0 for the worst: 1 - place / worst place; 0 where all are tied.

    What Normalizer.rank makes of these is what it makes of the places themselves, negated.
    """
    worst = max(places)
    return [1 - place / worst if worst else 0.0 for place in places]


def play_by_table(quality: Sequence[float]) -> Play:
    """Games decided by a number for each player: what each side gets is its own."""
    return lambda games: [(quality[one], quality[two]) for one, two in games]


def _require_two(num_players: int) -> None:
    if num_players < 2:
        raise DataError(
            f"a tournament of {num_players} has no game, so nothing could be said of the place. Sample 2 trajectories "
            f"of a prompt or more."
        )


def _totals(num_players: int, games: Sequence[Game], results: Sequence[Points]) -> list[float]:
    total = [0.0] * num_players
    for (one, two), (points_one, points_two) in zip(games, results, strict=True):
        total[one] += points_one
        total[two] += points_two
    return total


def _seed_points(num_players: int, anchor: int) -> Generator[Sequence[Game], Sequence[Points], list[float]]:
    _require_two(num_players)
    games = [(anchor, player) for player in range(num_players) if player != anchor]
    total = _totals(num_players, games, (yield games))
    total[anchor] /= num_players - 1
    return total


def _bracket(standing: Sequence[int]) -> list[int | None]:
    """Players in the order of a standard bracket, None for a place without one: 1-8, 4-5, 2-7, 3-6."""
    order = [0]
    while len(order) < len(standing):
        order = [seed for first in order for seed in (first, 2 * len(order) - 1 - first)]
    return [standing[seed] if seed < len(standing) else None for seed in order]


def _winners(
    games: Sequence[Game], results: Sequence[Points], points: list[list[float]]
) -> tuple[dict[Game, int], list[int]]:
    """Winner of each game, the first of equals, and the losers; every side's points are noted."""
    winner: dict[Game, int] = {}
    losers: list[int] = []
    for game, (points_one, points_two) in zip(games, results, strict=True):
        points[game[0]].append(points_one)
        points[game[1]].append(points_two)
        first_wins = points_one >= points_two
        winner[game] = game[0] if first_wins else game[1]
        losers.append(game[1] if first_wins else game[0])
    return winner, losers


def _round_of(players: Sequence[int]) -> list[Game]:
    """First against last, second against last but one; of an odd number the middle one rests."""
    half = len(players) // 2
    return [(players[place], players[-1 - place]) for place in range(half)]


def _left(players: Sequence[int], games: Sequence[Game], winner: dict[Game, int]) -> list[int]:
    """Who is still in, in the old order."""
    out = {player for game in games for player in game if player != winner[game]}
    return [player for player in players if player not in out]


def _neighbours(standing: Sequence[int], opponents: Sequence[Sequence[int]]) -> list[Game]:
    waiting, games = list(standing), []
    while waiting:
        one = waiting.pop(0)
        fresh = [two for two in waiting if two not in opponents[one]]
        two = (fresh or waiting)[0]
        waiting.remove(two)
        games.append((one, two))
    return games


def _placed(classes: Sequence[Sequence[int]], points: Sequence[Sequence[float]]) -> list[int]:
    """Place of each player: class after class, within one by mean points, then by number."""
    order = [
        player
        for members in classes
        for player in sorted(members, key=lambda player: (-sum(points[player]) / len(points[player]), player))
    ]
    places = [0] * len(order)
    for place, player in enumerate(order):
        places[player] = place
    return places
