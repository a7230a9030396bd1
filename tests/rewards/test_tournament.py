import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from rewards.tournament import (
    Game,
    anchored,
    double_elimination,
    places_of,
    play_by_table,
    played,
    played_async,
    reward_of_places,
    round_robin,
    single_elimination,
    swiss,
)

TOURNAMENTS = {
    "round_robin": round_robin,
    "anchored": anchored,
    "single_elimination": single_elimination,
    "double_elimination": double_elimination,
    "swiss": lambda num_players: swiss(num_players, num_rounds=num_players),
}


class Counting:
    """Plays by a table of qualities and counts."""

    def __init__(self, quality):
        self.games: list[Game] = []
        self._play = play_by_table(quality)

    def __call__(self, games):
        self.games += games
        return self._play(games)


def test_seeded_single_elimination_of_four():
    assert played(single_elimination(4), play_by_table([7, 5, 6, 3])) == [0, 2, 1, 3]


def test_anchor_ranks_by_points_and_ties_share_a_place():
    # the anchor gets 14 in each game
    assert played(anchored(4), play_by_table([14, 10, 12, 10])) == [0, 2, 1, 2]
    assert reward_of_places([0, 2, 1, 2]) == [1, 0, 0.5, 0]


def test_anchor_is_worth_the_mean_of_what_it_got_in_its_games():
    given_points = {(0, 1): (8.0, 3.0), (0, 2): (2.0, 4.0)}
    assert played(anchored(3), lambda games: [given_points[game] for game in games]) == [0, 2, 1]  # 5, 3, 4


@pytest.mark.parametrize("num_players", [2, 3, 4, 5, 8, 13])
def test_single_elimination_costs_twice_n_less_one_games(num_players):
    play = Counting(list(range(num_players)))
    played(single_elimination(num_players), play)
    assert len(play.games) == 2 * (num_players - 1)


@pytest.mark.parametrize("num_players", [2, 3, 4, 5, 8, 13])
def test_double_elimination_costs_thrice_n_less_one_games_and_perhaps_one_more(num_players):
    play = Counting(list(range(num_players)))
    played(double_elimination(num_players), play)
    assert len(play.games) - 3 * (num_players - 1) in (0, 1)


def test_high_seeds_meet_late():
    play = Counting([8, 7, 6, 5, 4, 3, 2, 1])
    played(single_elimination(8), play)
    bracket = play.games[7:]
    assert [{a + 1, b + 1} for a, b in bracket] == [
        {1, 8}, {4, 5}, {2, 7}, {3, 6}, {1, 4}, {2, 3}, {1, 2}
    ]  # fmt: skip


def test_losers_of_one_round_are_placed_by_their_mean_points():
    # against 0 the others got 3, 2 and 1; then 3 loses to 0 with 2 points and 2 to 1 with 9; means 1.5 and 5.5
    rounds = iter(
        [
            {(0, 1): (9.0, 3.0), (0, 2): (9.0, 2.0), (0, 3): (9.0, 1.0)},
            {(0, 3): (9.0, 2.0), (1, 2): (9.5, 9.0)},
            {(0, 1): (9.0, 1.0)},
        ]
    )

    def play(games):
        points = next(rounds)
        return [points[game] for game in games]

    assert played(single_elimination(4), play) == [0, 1, 2, 3]


@settings(max_examples=20, deadline=None)
@given(st.permutations(list(range(7))), st.integers(2, 7))
def test_a_judge_who_never_errs_has_the_best_first_in_every_tournament(order, num_players):
    quality = order[:num_players]
    for name, tournament in TOURNAMENTS.items():
        places = played(tournament(num_players), play_by_table(quality))
        assert places[quality.index(max(quality))] == 0, name
        if name in ("round_robin", "anchored"):
            assert places == places_of(quality)
        if name.endswith("elimination"):
            assert sorted(places) == list(range(num_players))


def test_who_lost_once_can_still_win_a_double_elimination():
    # 1 beats 0 the first time they meet, and 0 wins every other game
    met: list[Game] = []

    def play(games):
        results = []
        for one, two in games:
            met.append((one, two))
            upset = {one, two} == {0, 1} and sum({a, b} == {0, 1} for a, b in met) == 2  # the first was for the seeds
            strong = 0 if not upset else 1
            results.append((float(one == strong or (strong not in (one, two) and one < two)), float(two == strong)))
        return results

    assert played(double_elimination(4), play)[0] == 0


def test_swiss_pairs_nobody_twice_while_it_can_be_helped():
    play = Counting([3, 2, 1, 0])
    played(swiss(4, num_rounds=3), play)
    assert len({frozenset(game) for game in play.games}) == 6


def test_swiss_rests_everyone_once_before_anyone_twice():
    play = Counting([2, 1, 0])
    played(swiss(3, num_rounds=3), play)
    assert sorted(sum(player in game for game in play.games) for player in range(3)) == [2, 2, 2]


@pytest.mark.parametrize("name", TOURNAMENTS)
def test_a_tournament_of_one_is_refused(name):
    with pytest.raises(DataError, match="a tournament of 1 has no game"):
        played(TOURNAMENTS[name](1), play_by_table([1.0]))


def test_all_tied_is_worth_nothing():
    assert reward_of_places(played(round_robin(3), play_by_table([1, 1, 1]))) == [0, 0, 0]


@pytest.mark.parametrize("name", TOURNAMENTS)
def test_games_that_are_waited_for_give_the_same_places(name):
    play = play_by_table([3, 1, 4, 1, 5])

    async def play_later(games):
        await asyncio.sleep(0)
        return play(games)

    places = asyncio.run(played_async(TOURNAMENTS[name](5), play_later))
    assert places == played(TOURNAMENTS[name](5), play)


def test_a_judge_that_fails_ends_the_tournament():
    async def fail(games):
        raise TimeoutError("late")

    with pytest.raises(TimeoutError, match="late"):
        asyncio.run(played_async(single_elimination(4), fail))
