"mutations: whatever is done to a file, reading it ends in one sentence or in the right numbers"
from mutate import mutations


def test_sixty_broken_files_end_in_a_sentence_or_in_the_right_numbers():
    table, wrong = mutations(64, seed=1)
    assert not wrong, wrong
    assert all(sum(row.values()) == 8 for row in table.values()) and len(table) == 8
