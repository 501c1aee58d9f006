"""tests/torture.py, in small: kills at random moments lose nothing, no damage goes unnoticed."""
import os

import pytest

import torture


def test_a_hundred_corruptions_of_states_and_shards_are_all_noticed(tmp_path):
    assert "every one noticed" in torture.corrupt_often(tmp_path, 100, seed=1)


@pytest.mark.slow
def test_a_dozen_kills_at_random_moments_change_nothing(tmp_path):
    if os.name == "nt":
        pytest.skip("Windows has no SIGKILL")
    assert "byte-identical" in torture.kill_often(tmp_path, 12, seed=1)
