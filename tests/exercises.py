"""The course's exercises: functions of the product, with the tests that grade each and what they tell.

exercise.py reads this table; tests/wrong_answers.py holds the mistakes that each must find.
"""
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Exercise:
    name: str  # what a command takes: "rotate", "dpo-loss"
    file: str
    function: str  # "apply_rope" or "Class.method"
    learns: str  # what is learned, one line
    minutes: int
    level: Literal["easy", "middle", "hard"]
    tests: dict[str, str]  # {"test_positions.py::test_name": what its failure suggests}, the most telling first
    hints: tuple[str, ...]  # of exercise.py hint: from vague to nearly the answer


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "merge", "bpe.py", "merge", "how byte-pair encoding replaces a pair by its new token", 10, "easy",
        {"test_bpe.py::test_merging_goes_from_left_to_right_without_overlap":
             "in a run of equal ids, `aaa` must become `X a`: do you merge from the left, and go on behind a merge?",
         },
        ("Walk through the ids with an index, and write what you find to a new list.",
         "Where the id and the next one are the pair, write the new id and go on two ids later.")),
)
