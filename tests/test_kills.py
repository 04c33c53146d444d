"kills: a recipe and a method, killed at random places and started again, end as if nothing had happened"
from kills import kills


def test_runs_that_were_killed_end_as_those_that_were_not():
    table, wrong = kills(6, seed=2, names=("semanticgan", "temporal"))
    assert not wrong, wrong
    assert [sum(row.values()) for row in table.values()] == [3, 3]
