"""quality.py: Gopher's, C4's, Dolma's rules on hand-made cases; figures equal brute force and DataTrove's."""
import random
from collections import Counter

import pytest
from datatrove.pipeline.filters import gopher_repetition_filter as datatrove
from hypothesis import given, settings
from hypothesis import strategies as st

import quality
from config import UserError
from quality import (CODE, ENCYCLOPEDIA, FORUM, TABLES, WEB, Rule, Text, adjusted, kept_lines,
                     quality_problems, repeated, repeated_ngrams, top_ngram)
from support import in_process

SENTENCES = ["The harbour of the old town lies between two hills.",
             "Ships have come here with wine and grain since 1200.",
             "A lighthouse was built to keep them off the rocks.",
             "Its keeper had eleven children and a boat!",
             "Who would want to be alone in a storm that long?",
             "Today a small museum shows letters from that time.",
             "Visitors climb ninety steps and look over the bay.",
             "On clear days one sees the islands in the west."]
GOOD = "\n".join(SENTENCES)


def problem(name, text, rules=WEB, **keys):
    """The figure and bound of the named rule, None where the text passes it."""
    found = dict(line.split(": ", 1) for line in quality_problems(text, rules, {"text": text, **keys}))
    return found.get(name)


def names(text, rules=WEB):
    return {line.partition(":")[0] for line in quality_problems(text, rules)}


# ---- What passes, and how a problem reads


def test_prose_passes_every_rule():
    assert quality_problems(GOOD) == []


def test_a_problem_names_the_rule_the_figure_and_the_bound():
    assert quality_problems("one two three", {"words": WEB["words"]}) == ["words: 3, at least 50"]
    assert quality_problems("#" * 7 + " " + "word " * 64, {"hashes": WEB["hashes"]}) == [
        "hashes: 0.108, at most 0.1"]


def test_a_figure_near_its_bound_has_the_digits_that_tell_them_apart():
    assert quality.in_figures(0.30004, 0.3) == "0.30004" and quality.in_figures(0.31, 0.3) == "0.31"


def test_every_reason_is_named_not_only_the_first():
    assert {"words", "sentences", "stop_words", "letter_words", "hashes"} <= names("# 1 # 2")


@pytest.mark.parametrize("text", ["", " \n\t ", "\n" * 1000, "x", "。", "\0", "\ud800", "🙂" * 60,
                                  "a" * 200_000])
@pytest.mark.parametrize("table", TABLES)
def test_no_text_is_too_odd_to_judge(text, table):
    quality_problems(text, TABLES[table])


# ---- Gopher's rules, at their bounds


@pytest.mark.parametrize("name, inside, outside", [
    ("words", "w " * 50, "w " * 49), ("words", "w " * 100_000, "w " * 100_001),
    ("word_length", "abc " * 9, "ab " * 9), ("word_length", "a" * 10, "a" * 11),
    ("hashes", "#" + " w" * 10, "# #" + " w" * 10), ("ellipses", "w… " + "w " * 9, "w… w... " + "w " * 9),
    ("bullet_lines", "- a\n" * 9 + "b", "- a\n" * 10 + "b"), ("bullet_lines", "• a\n" * 9 + "b", "• a\n• b"),
    ("ellipsis_lines", "a...\n" * 3 + "b\n" * 7, "a…\n" * 4 + "b\n" * 7),
    ("letter_words", "a1 " * 8 + "1 " * 2, "a1 " * 7 + "1 " * 3),
    ("stop_words", "The cat, with whiskers", "The the the"), ("stop_words", "to BE.", "together behave")])
def test_gophers_bounds_are_those_of_the_paper(name, inside, outside):
    assert problem(name, inside) is None and problem(name, outside) is not None


def test_gophers_table_of_repetition_is_the_papers():
    table = {name: rule.high for name, rule in quality.GOPHER_REPETITION.items()}
    assert table == {"repeated_lines": .30, "repeated_paragraphs": .30, "repeated_line_characters": .20,
                     "repeated_paragraph_characters": .20, "top_2_gram": .20, "top_3_gram": .18,
                     "top_4_gram": .16, "repeated_5_grams": .15, "repeated_6_grams": .14,
                     "repeated_7_grams": .13, "repeated_8_grams": .12, "repeated_9_grams": .11,
                     "repeated_10_grams": .10}


def test_repeated_lines_count_from_their_second_place_on():
    text = Text("a\nb\na\na\n\nlong line", {})
    assert repeated("lines", "number", text) == 2 / 5
    assert repeated("lines", "characters", text) == 2 / 18
    assert repeated("paragraphs", "number", Text("a b\n\na b\n \nc", {})) == 1 / 3


def test_the_top_ngram_is_the_most_frequent_with_the_spaces_in_it():
    text = Text("to be or not to be", {})
    assert top_ngram(2, text) == 2 * len("to be") / 18
    assert top_ngram(3, text) == 0, "what stands once is no repetition"
    assert top_ngram(7, text) is None


def test_a_word_in_two_repeated_ngrams_counts_once():
    text = Text("a b c d e f x a b c d e f", {})  # 5-grams at 7 and 8 stood earlier; six words in all
    assert repeated_ngrams(5, text) == 6 / 25
    assert repeated_ngrams(7, text) == 0


def brute_force(words, n, length):
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i:i + n])
        covered |= set(range(i, i + n)) if gram in seen else set()
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / length


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=10, max_size=60))
@settings(max_examples=100, deadline=None)
def test_ngram_figures_are_those_of_brute_force_and_of_datatrove(words):
    text = " ".join(words)
    view = Text(text, {})
    for n in (2, 3, 4):
        grams = datatrove.get_n_grams(words, n)
        once = max(Counter(grams).values()) == 1
        assert top_ngram(n, view) == (0 if once else datatrove.find_top_duplicate(grams) / len(text))
    for n in range(5, 11):
        ours = repeated_ngrams(n, view)
        assert ours == brute_force(words, n, len(text))
        # DataTrove skips over a repeated n-gram, so what overlaps it is missed: never more than ours
        assert ours >= datatrove.find_all_duplicate(words, n) / len(text)


@given(st.lists(st.sampled_from(["a", "bb", "ccc", ""]), min_size=1, max_size=30).filter(any))
@settings(max_examples=100, deadline=None)
def test_line_figures_are_datatroves(lines):
    lines = list(filter(None, lines))
    text = "\n".join(lines)
    number, characters = datatrove.find_duplicates(lines)
    assert repeated("lines", "number", Text(text, {})) == number / len(lines)
    assert repeated("lines", "characters", Text(text, {})) == characters / len(text)


def test_a_page_of_one_sentence_over_and_over_breaks_the_rules_of_repetition():
    found = names("The museum opens at ten and closes with the harbour gates. " * 30)
    assert {"top_4_gram", *(f"repeated_{n}_grams" for n in range(5, 11))} <= found
    found = names((GOOD + "\n\n") * 3)
    assert {"repeated_lines", "repeated_paragraphs", "repeated_line_characters"} <= found


def test_a_word_that_stands_once_more_than_a_hundred_times_in_a_row_is_a_problem():
    words = GOOD.split()
    assert problem("word_run", " ".join(words + ["buy"] * 100 + words)) is None
    assert problem("word_run", " ".join(words + ["buy"] * 101 + words)) == "101, at most 100"
    assert problem("word_run", " ".join(["buy", "now"] * 101)) is None
    assert problem("same_sentence", "Buy now. " * 101) == "101, at most 100"
    assert problem("same_sentence", "Buy now\n" * 101) == "101, at most 100"


# ---- C4's rules, leftovers of HTML


def test_c4_wants_five_sentences_and_no_curly_brackets_nor_lorem_ipsum():
    assert problem("sentences", "A b. C d! E f? “G h.” I j.") is None
    assert problem("sentences", "A b. C d! E f? G h.") == "4, at least 5"
    assert problem("sentences", "See www.example.com and 3.14") == "0, at least 5"
    assert problem("curly_brackets", "if (x) { y }") == "1, at most 0"
    assert problem("lorem_ipsum", "Lorem Ipsum dolor") == "1, at most 0"


@pytest.mark.parametrize("line, kept", [
    ("The cat sat on the mat.", True), ("Is it so?", True), ('He said "no"', True), ("这是一个很长的句子。", True),
    ("Home News Contact", False), ("The story goes on...", False), ("Too short.", False),
    ("Please enable Javascript to see this page.", False),
    ("By using this you accept the Terms of Use.", False),
    ("This site uses cookies to work.", False), ("x" * 1001 + " is a long word.", False)])
def test_c4_keeps_lines_that_end_as_sentences_do(line, kept):
    assert kept_lines(line) == ((line, 0) if kept else ("", 1))


def test_c4_takes_marks_of_citation_out_and_counts_lines_that_go():
    assert kept_lines("It was built in 1200.[3][citation needed]\n\nMenu\nIt stands still.") == (
        "It was built in 1200.\nIt stands still.", 1)


@pytest.mark.parametrize("left", ["<div>", "</p>", "<br/>", '<a href="x">', "&nbsp;", "&#8217;", "<!-- x -->",
                                  "<H1>"])
def test_leftover_html_is_a_problem(left):
    assert problem("html", GOOD + left) == "1, at most 0"


@pytest.mark.parametrize("text", ["a < b and c > d", "R&D; AT&T", "<john@mail.org>", "vector<int>",
                                  "<T> <K, V>", "?a=1&copy=2", "&unknown;"])
def test_what_only_looks_like_html_is_none(text):
    assert problem("html", text) is None


# ---- Chinese, forums, encyclopedias, code


CHINESE = "海港位于两座山之间，船只自古以来就带着酒和粮食来到这里。灯塔是为了让船远离礁石而建的。守塔人有十一个孩子和一条船！" \
          "谁愿意在那么长的暴风雨中独自一人？今天有一座小博物馆展出那个时代的信件。"


def test_chinese_is_counted_in_characters_and_spared_what_means_nothing_there():
    assert quality_problems(CHINESE) == []
    assert Text("你好，世界！ ok", {}).words == ["你", "好", "世", "界", "ok"]
    assert problem("words", CHINESE[:30]) is not None
    assert {"top_2_gram", "repeated_5_grams"} <= names("欢迎光临本店" * 30)
    assert problem("stop_words", "买买买") is None and problem("word_length", "买买买") is None


def test_a_forums_score_comes_from_the_documents_keys():
    assert problem("score", GOOD, FORUM, score=2) == "2, at least 3"
    assert problem("score", GOOD, FORUM, score="-1") == "-1, at least 3"
    for fine in (3, 3.5, None, "none", True, []):
        assert problem("score", GOOD, FORUM, score=fine) is None
    assert quality_problems(GOOD, FORUM) == []


def test_an_article_of_an_encyclopedia_has_25_words():
    assert problem("words", "w " * 25, ENCYCLOPEDIA) is None
    assert problem("words", "w " * 24, ENCYCLOPEDIA) == "24, at least 25"


def test_code_is_judged_by_its_lines_letters_and_marks_of_generation():
    code = '"""Docstring."""\nimport os\n\n\ndef main():\n    return os.name  # why\n'
    assert quality_problems(code, CODE) == []
    assert names("x = 1\n" + "y" * 1001, CODE) == {"longest_line", "mean_line"}
    assert (names("1, 2, 3, 4, 5,\n" * 9, CODE) == {"letters"}
            and names("@ + - / {}\n" * 9, CODE) >= {"alphanumeric"})
    for mark in ("# Generated by protoc. DO NOT EDIT!", "// Code auto-generated", "/* @generated */"):
        assert names(f"{mark}\n{code}", CODE) == {"generated"}
    assert quality_problems("x = 'do not edit'\n" + code * 2
                            + "# generated by hand, said in line 14\n", CODE) == []
    assert (quality.letters(Text("ab 1é\n", {})) == 3 / 4
            and quality.alphanumeric(Text("ab 1é_\n", {})) == 4 / 5)


# ---- Rules as data


def test_bounds_are_set_and_rules_switched_off():
    rules = adjusted(WEB, ["words=3:5", "html=off", "stop_words=:1"])
    assert rules["words"] == Rule(quality.words, 3, 5) and "html" not in rules
    assert rules["stop_words"][1:] == (None, 1) and WEB["words"].low == 50, "the table itself must not change"
    assert "words" not in names("one two three", rules)
    assert "words" not in names("one two three", WEB | {"words": Rule(quality.words, 3)})


@pytest.mark.parametrize("change, message", [
    ("wrods=1:2", "'wrods' is not one of words, word_length"), ("words", "'words' is not NAME=LOW:HIGH"),
    ("words=20", "NAME=LOW:HIGH, either of which may be empty, or NAME=off"),
    ("words=a:b", "'words=a:b' is not"), ("words=nan:", "is not NAME=LOW:HIGH")])
def test_a_change_that_makes_no_sense_is_refused_in_a_line(change, message):
    with pytest.raises(UserError, match=message):
        adjusted(WEB, [change])


def test_the_command_names_reasons_with_examples(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(GOOD, encoding="utf-8")
    (tmp_path / "b.txt").write_text("one two three", encoding="utf-8")
    run = lambda *more: in_process(monkeypatch, capsys, quality.main, "--input", tmp_path,
                                   "--rules", "web", *more)
    code, out, _ = run()
    assert code == 0 and "b.txt (3, at least 50)" in out and "1 of 2 documents" in out
    code, _, err = run("--change", "wrods=3:")
    assert code == 2 and err.startswith("error: rule 'wrods'") and err.count("\n") == 1


def test_long_texts_take_time_in_proportion():
    """300,000 words: a quadratic step would take hours, a linear one seconds."""
    words = random.Random(0).choices([f"w{i}" for i in range(5000)], k=300_000)
    assert "words" in names(" ".join(words))
