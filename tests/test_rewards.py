"""rewards.py: each function by hand and against those who would cheat it, and their sum."""
import math

import pytest
import torch

import rejection
import rewards
from config import UserError
from rewards import MAX_CHARS, REWARDS, Reply, Reward, Rewards
from sft import f1

BODY = {"task": "write", "code": 'def f(a, b):\n    "doc"'}
TAGGED = "<think>17+58=75 75+23=98</think><answer>98</answer>"


def asked(said, question="17+58+23", **known):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}],
            **known}


def reply(text, ended=True, length=10):
    return Reply(text, ended, length)


def worth(name, question, text, ended=True):
    return REWARDS[name].function(question, reply(text, ended))


# ---- the exact answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    (TAGGED, 1),
    ("<answer>98</answer>", 1),
    ("<answer> 98\n</answer> I am sure", 1),  # what stands around is the format's matter
    ("<think>99</think><answer>98</answer>", 1),
    ("<answer>89</answer>", 0),
    ("<answer>98.0</answer>", 0),  # as text
    ("<answer>098</answer>", 0),
    ("<answer>9 8</answer>", 0),
    ("98", 0),  # the author's answer has tags
    ("<answer>98", 0),
    ("98</answer>", 0),
    ("</answer>98<answer>", 0),
    ("<answer></answer>", 0),
    ("", 0),
    ("<ANSWER>98</ANSWER>", 0),
])
def test_the_answer_is_what_stands_in_its_tags(text, expected):
    assert worth("exact", asked(TAGGED), text) == expected
    assert worth("exact", asked(TAGGED, answer="98"), text) == expected
    assert worth("exact", asked(TAGGED, answer=98), text) == expected


@pytest.mark.parametrize("text", [
    "<answer>97</answer><answer>98</answer>", "<answer>98</answer><answer>97</answer>",
    "<answer><answer>98</answer></answer>", "<answer>98</answer></answer>", "<answer><answer>98</answer>",
    "<answer>98</answer><answer>", "<answer>98</answer>" * 2, "<answer>97<answer>98</answer>",
])
def test_who_gives_two_answers_has_given_none(text):
    assert worth("exact", asked(TAGGED), text) == 0
    assert worth("exact", asked("98"), text) == 0, "and is not read as a bare reply either"
    assert worth("exact", asked(text), text) == 0, "not even where the author's own tags are as bad"
    assert worth("format", asked(TAGGED), f"<think>t</think>{text}") == 0


def test_a_bare_reply_counts_where_the_author_wrote_no_tags_and_only_if_it_ended():
    assert worth("exact", asked("98"), " 98 ") == 1
    assert worth("exact", asked("so it is 98", answer="98"), "98") == 1
    assert worth("exact", asked("98"), "98", ended=False) == 0, "it might have gone on: 980"
    assert worth("exact", asked("98"), "<answer>98</answer>") == 1
    assert worth("exact", asked("98"), "It is 98") == 0
    assert worth("exact", asked("98"), "<answer>98") == 0


def test_an_empty_truth_is_met_by_nothing():
    for text in ("", " ", "<answer></answer>", "<answer> </answer>"):
        assert worth("exact", asked("<answer> </answer>"), text) == 0
        assert worth("exact", asked("x", answer=""), text) == 0


@pytest.mark.parametrize("answer", [98.0, True, ["98"], {"value": 98}])
def test_a_truth_that_is_neither_text_nor_a_whole_number_is_told(answer):
    with pytest.raises(ValueError, match="text or a whole number is expected"):
        worth("exact", asked(TAGGED, answer=answer), TAGGED)


# ---- the format --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    (TAGGED, 1),
    ("<think>\nno idea\n</think>\n<answer>\n7\n</answer>\n", 1),  # as open-r1 asks for it; wrong
    ("<think>a < b</think><answer>98</answer>", 1),
    ("<answer>98</answer>", 0),
    ("<answer>98</answer><think>t</think>", 0),
    ("<think>t<answer>98</answer></think>", 0),
    ("<think>t<answer>98</think></answer>", 0),
    ("<think>t</think><think>t</think><answer>98</answer>", 0),  # accepted by ^<think>.*</answer>$
    ("<think><think>t</think></think><answer>98</answer>", 0),
    ("<think>t</think>so<answer>98</answer>", 0),
    ("So: " + TAGGED, 0),
    (TAGGED + " I am sure", 0),
    ("<think></think><answer>98</answer>", 0),
    ("<think>t</think><answer> </answer>", 0),
    ("</think>t<think><answer>98</answer>", 0),
    ("<think>t</think><answer>98", 0),
    ("", 0),
])
def test_the_format_is_each_part_once_in_order_and_nothing_around(text, expected):
    assert worth("format", asked(TAGGED), text) == expected
    assert worth("format", asked("98"), text) == expected, "asked for, say, by a system message"


def test_an_author_who_answers_without_thoughts_asks_for_no_thoughts():
    question = asked("<answer>98</answer>")
    assert worth("format", question, "<answer>1</answer>") == 1
    assert worth("format", question, TAGGED) == 0
    assert worth("format", question, "<answer>1</answer>!") == 0
    assert worth("format", question, "98") == 0


def test_what_has_not_ended_is_not_whole():
    assert worth("format", asked(TAGGED), TAGGED, ended=False) == 0
    assert worth("exact", asked(TAGGED), TAGGED, ended=False) == 1, "this answer is given; `ends` is for that"


# ---- code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("    return a + b", 1),
    ("return a", 1),  # its indentation comes back
    ("    pass", 1),  # not seen
    ("    # a sum\n    return a", 1),
    ("    return (", 0),
    ("", 0),
    (" \n ", 0),
    ("    # nothing to do", 0),  # compiles, as the docstring is a body
    ("    return a\n  b", 0),
    ("\0", 0),
    ("    return '\ud800'", 0),  # half a character
])
def test_a_body_compiles_or_not(text, expected):
    assert worth("compiles", asked("    pass", **BODY), text) == expected


def test_the_quality_is_that_of_rejection_sampling_but_for_bodies_that_are_none():
    question, other = asked("    pass", **BODY), asked("b c")
    for text in ("    return a", "    return (", "", "a b b"):
        for ended in (True, False):
            assert worth("quality", question, text, ended) == rejection.quality(question, text, ended)
            assert worth("quality", other, text, ended) == rejection.quality(other, text, ended)
    assert worth("quality", question, "    # a + b") == 1 / 3, "a comment ends, and is no body"


def test_code_is_compiled_and_never_run(tmp_path):
    trace = tmp_path / "trace"
    assert worth("compiles", asked("    pass", **BODY), f"    pass\nopen({str(trace)!r}, 'w')") == 1
    assert not trace.exists()


def test_where_no_body_is_asked_for_nothing_compiles():
    assert worth("compiles", asked("x = 1"), "x = 1") == 0
    assert worth("compiles", asked("x", task="write", code="def f("), "x = 1") == 0
    assert worth("compiles", asked("x", task="write", code=7), "x = 1") == 0


N = MAX_CHARS // 2
DEEP = {"parentheses": "return " + "(" * N + ")" * N, "minus": "return " + "-" * N + "a",
        "sum": "return a" + "+a" * N, "calls": "return a" + "()" * N, "dots": "return a" + ".a" * N,
        "lambdas": "return " + "lambda:" * (N // 4) + "a",
        "branches": "return " + "a if a else " * (N // 7) + "a",
        "f-strings": "return " + "f'{" * 80 + "a" + "}'" * 80, "number": "return " + "9" * N,
        "power": "return 9**9**9**9", "repetition": "return 'a' * 10**10",
        "blocks": "if a: pass\n" + "    elif a: pass\n" * (N // 9)}


@pytest.mark.parametrize("name", DEEP)
def test_deeply_nested_code_gets_a_figure_and_the_process_lives(name):
    assert len(DEEP[name]) < MAX_CHARS + 20
    assert worth("compiles", asked("    pass", **BODY), "    " + DEEP[name]) in (0, 1)


def test_megabytes_of_text_are_read_once():
    question, size = asked("    pass", **BODY), 200_000
    for text in ("    a\n" * size, "(" * size, "<answer>" * size, "<think>" + "x" * size, " " * size):
        for name in REWARDS:
            value = worth(name, question, text)
            assert 0 <= value <= 1, f"{name} of {text[:10]!r}…"
        assert worth("compiles", question, text) == 0, "too long to be compiled"
        assert worth("exact", asked(TAGGED), text) == worth("format", asked(TAGGED), text) == 0


# ---- the simple ones ---------------------------------------------------------------------------------------


def test_f1_length_and_ends_by_hand():
    assert worth("f1", asked("b c"), "a b b") == pytest.approx(2 / 5)
    assert worth("f1", asked("b c"), "a b b", ended=False) == pytest.approx(2 / 5)
    assert REWARDS["length"].function(asked("x"), Reply("y", True, 25)) == 0.25
    assert worth("ends", asked("x"), "y") == 1 and worth("ends", asked("x"), "y", ended=False) == 0


@pytest.mark.parametrize("name", REWARDS)
def test_no_reward_of_the_table_gives_less_than_its_floor_to_any_rubbish(name):
    texts = ["", " ", "\0", "\ud800", "<answer>", "</think><think>", "𝟗𝟖", "<answer>98</answer>\u202e", "def",
             "'''", "\\", "a" * 1000]
    for question in (asked(TAGGED), asked("98"), asked("    pass", **BODY),
                     asked("x", answer="98", task=None)):
        for text in texts:
            for ended in (True, False):
                value = worth(name, question, text, ended)
                assert math.isfinite(value) and value >= REWARDS[name].floor


# ---- the sum -----------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_of_the_parts():
    questions = [asked(TAGGED), asked(TAGGED)]
    replies = [reply(TAGGED, length=20), reply("<answer>98</answer>", length=50)]
    totals, parts = Rewards(("exact", "format=0.5", "length=-0.2"))(questions, replies)
    assert list(parts) == ["exact", "format", "length"]
    torch.testing.assert_close(parts["length"], torch.tensor([0.2, 0.5]))
    torch.testing.assert_close(totals, torch.tensor([1 + 0.5 - 0.04, 1 + 0 - 0.1]))
    assert totals.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())


def test_a_weight_of_zero_follows_a_reward_and_teaches_nothing():
    totals, parts = Rewards(("ends", "f1=0"))([asked("b c")], [reply("b c")])
    assert totals.item() == 1.0 and parts["f1"].item() == f1("b c", "b c") == 1.0


def test_the_reward_model_is_one_of_them_and_is_given_ids():
    def model(prompts, answers):
        return torch.tensor([len(prompt) + 10.0 * len(answer) for prompt, answer in zip(prompts, answers)],
                            dtype=torch.float64, requires_grad=True)
    sums = Rewards(("model=0.1", "ends"), model)
    replies, ids = [reply("y"), reply("z", ended=False)], ([[1, 2], [3]], [[4], [5, 6]])
    totals, parts = sums([asked("x")] * 2, replies, ids)
    torch.testing.assert_close(parts["model"], torch.tensor([12.0, 21.0]))
    torch.testing.assert_close(totals, torch.tensor([2.2, 2.1]))
    assert not totals.requires_grad


def test_one_of_the_users_own_is_a_function_and_a_line(monkeypatch):
    monkeypatch.setitem(REWARDS, "brief", Reward(lambda question, reply: reply.length <= 20, 0.0, "short"))
    totals, _ = Rewards(("brief=2",))([asked("x")] * 2, [reply("y", length=20), reply("y", length=21)])
    assert totals.tolist() == [2.0, 0.0]


def fails(question, reply):
    if reply.text == "zero":
        return 1 / 0
    return {"nan": math.nan, "inf": -math.inf, "none": None, "fine": 5.0}[reply.text]


def test_a_reward_that_fails_counts_its_floor_and_each_kind_is_shown_once(monkeypatch):
    monkeypatch.setitem(REWARDS, "odd", Reward(fails, -3.0, "odd"))
    said = []
    sums = Rewards(("odd",), say=said.append)
    texts = ["fine", "nan", "inf", "nan", "none", "zero", "zero", "fine"]
    totals, _ = sums([asked("x", "what?\n")] * 8, [reply(text) for text in texts])
    assert totals.tolist() == [5, -3, -3, -3, -3, -3, -3, 5] and sums.failures == 6
    assert len(said) == 3, "not finite, TypeError, ZeroDivisionError"
    assert said[0] == ("the reward odd gives nan, on the reply 'nan' to 'what?\\n'; it counts as its floor")
    assert "ZeroDivisionError: division by zero" in said[2]


def test_a_sample_that_is_shown_is_shortened(monkeypatch):
    monkeypatch.setitem(REWARDS, "odd", Reward(lambda question, reply: int("x" * 10_000), 0.0, "odd"))
    said = []
    Rewards(("odd",), say=said.append)([asked("x", "q" * 10_000)], [reply("r" * 10_000)])
    assert len(said) == 1 and len(said[0]) < 800 and "\n" not in said[0]


def test_after_the_bound_it_ends_in_one_line(monkeypatch):
    monkeypatch.setitem(REWARDS, "odd", Reward(fails, 0.0, "odd"))
    sums = Rewards(("odd",), bound=2, say=lambda line: None)
    sums([asked("x")] * 2, [reply("nan")] * 2)
    with pytest.raises(UserError, match="the reward odd gives nan: that is failure 3 of rewards, and 2 are"):
        sums([asked("x")], [reply("nan")])


def test_a_score_of_the_reward_model_that_is_not_finite_counts_as_the_least_of_its_batch():
    said = []
    sums = Rewards(("model",), lambda prompts, answers: torch.tensor([2.0, math.nan, -1.0, math.inf]),
                   say=said.append)
    totals, _ = sums([asked("x")] * 4, [reply("y")] * 4, ([[1]] * 4, [[1]] * 4))
    assert totals.tolist() == [2, -1, -1, -1] and sums.failures == 2 and len(said) == 1
    sums.model = lambda prompts, answers: torch.tensor([math.nan])
    assert sums([asked("x")], [reply("y")], ([[1]], [[1]]))[0].tolist() == [0.0]


@pytest.mark.parametrize("spec, words", [
    (("exakt",), "unknown reward 'exakt'; there are model, exact, format, compiles, f1"),
    (("",), "unknown reward ''"),
    (("exact=much",), "'exact=much' has a weight that is no finite number; write exact=0.5"),
    (("exact=",), "no finite number"),
    (("exact=nan",), "no finite number"),
    (("exact=inf",), "no finite number"),
    (("exact", "exact=2"), "exact is given twice"),
    (("exact=0",), "no reward has a weight"),
    ((), "no reward has a weight"),
    (("model",), "there is none; name its folder"),
])
def test_a_spec_that_is_none_is_told(spec, words):
    with pytest.raises(UserError, match=words):
        Rewards(spec)


def test_the_table_says_what_each_is():
    for name, reward in rewards.REWARDS.items():
        assert reward.words and "=" not in name, "a name ends where its weight begins"
