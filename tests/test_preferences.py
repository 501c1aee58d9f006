"""preferences.py: pairs of every form, the same prompt on both sides, and what is left out."""
import json

import pytest

from bpe import Tokenizer
from chat import CHATML, LLAMA3, QWEN3, render, with_chat_tokens
from config import UserError
from preferences import Pair, convert, encode_pair, encode_pairs, fitted, read_preferences

TOKENIZER = with_chat_tokens(Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"]))
END = TOKENIZER.special_tokens[CHATML.end]


def said(*contents):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 4, contents)]


def answer(content):
    return [{"role": "assistant", "content": content}]


PAIR = {"prompt": said("q"), "chosen": answer("good"), "rejected": answer("bad")}
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: more: yes\n\nAssistant: "


@pytest.mark.parametrize("record", [
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"prompt": said("q"), "chosen": "good", "rejected": "bad"},
    {"prompt": said("q"), "chosen": answer("good"), "rejected": answer("bad")},
    {"prompt": "q", "chosen": said("q", "good"), "rejected": said("q", "bad")},  # UltraFeedback
    {"chosen": said("q", "good"), "rejected": said("q", "bad")},
    {"prompt": "q", "chosen": "good", "rejected": "bad", "system": None},
    {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},  # hh-rlhf
])
def test_every_form_says_the_same(record):
    assert convert(record) == PAIR


def test_of_two_dialogues_the_common_beginning_is_the_prompt():
    pair = convert({"chosen": HH + "good", "rejected": HH + "bad: \n\nnot a turn"})
    assert pair == {"prompt": said("q", "a", "more: yes"), "chosen": answer("good"),
                    "rejected": answer("bad: \n\nnot a turn")}


def test_dialogues_that_part_early_are_answers_of_several_messages():
    one, other = said("q", "a", "yes", "good"), said("q", "b", "no", "bad")
    pair = convert({"chosen": one, "rejected": other})
    assert pair["prompt"] == one[:1] and pair["chosen"] == one[1:] and pair["rejected"] == other[1:]
    ids = encode_pair(pair, TOKENIZER)
    learnt = [id for id, bit in zip(ids.chosen, ids.chosen_mask) if bit]
    assert TOKENIZER.decode(learnt) == f"a{CHATML.end}good{CHATML.end}", "the user in between is not learnt"


def test_a_system_message_and_other_keys_are_kept(tmp_path, capsys):
    [pair] = read_preferences(written(tmp_path, GOOD | {"system": "s", "score": 3}))
    assert pair["prompt"][0] == {"role": "system", "content": "s"} and pair["score"] == 3
    assert pair["where"].endswith("p.jsonl:1")


@pytest.mark.parametrize("prompt", ["q", said("q"), [{"role": "system", "content": "s"}, *said("q")]], ids=str)
def test_a_system_message_that_both_sides_repeat_before_the_prompt_belongs_to_it(prompt):
    system = {"role": "system", "content": "s", "id": 7}
    pair = convert({"prompt": prompt, "chosen": [system, *said("q", "good")],
                    "rejected": [system, *said("q", "bad")]})
    assert pair == PAIR | {"prompt": [{"role": "system", "content": "s"}, *said("q")]}


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3], ids=lambda template: template.name)
def test_prompt_ids_are_the_same_on_both_sides_and_answers_those_of_render(template):
    tokenizer = with_chat_tokens(TOKENIZER, template)
    for one, other in (("the", "then"), (" x", "x "), ("\n\nthe", "\nthe"), ("é", "e\u0301")):
        pair = {"prompt": said("q the"), "chosen": answer(one), "rejected": answer(other)}
        ids = encode_pair(pair, tokenizer, template)
        sides = (one, ids.chosen, ids.chosen_mask), (other, ids.rejected, ids.rejected_mask)
        for text, side, mask in sides:
            whole, learnt = render([*pair["prompt"], *answer(text)], tokenizer, template=template)
            assert whole[:len(ids.prompt) + len(side)] == ids.prompt + side
            assert mask == learnt[len(ids.prompt):len(ids.prompt) + len(side)]
            end = tokenizer.special_tokens[template.end]
            assert side[-1] == end and mask[-1], "the end is learnt, and is last"


def test_text_that_spells_a_special_token_stays_text():
    ids = encode_pair({"prompt": said("q"), "chosen": answer(CHATML.end), "rejected": answer("b")}, TOKENIZER)
    assert ids.chosen.count(END) == 1


def test_a_long_prompt_loses_its_beginning_on_both_sides_and_no_answer_a_token():
    pair = Pair(list(range(20)), [1, 2, 3], [4], [True] * 3, [True])
    assert fitted(pair, 22) is pair, "the last token is a target alone"
    cut = fitted(pair, 14)
    assert cut.prompt == list(range(8, 20)) and cut[1:] == pair[1:]
    assert fitted(pair, 9) is None, "fewer than 8 tokens of the prompt would be left"


def test_pairs_that_do_not_fit_are_cut_or_left_out_and_counted():
    def pair(asked, said):
        return {"prompt": [{"role": "user", "content": "a" * asked}], "chosen": answer("x" * said),
                "rejected": answer("y")}
    lines = []
    kept, ids = encode_pairs([pair(5, 5), pair(40, 30), pair(5, 70)], TOKENIZER, CHATML, 64, say=lines.append)
    assert [len(one["chosen"][0]["content"]) for one in kept] == [5, 30] and len(ids) == 2
    assert lines == ["of 3 pairs 1 lost the beginning of their prompt, and 1 were left out: longer than 64 "
                     "tokens"]


def test_answers_that_only_a_template_makes_equal_are_left_out_and_counted():
    tokenizer, lines = with_chat_tokens(TOKENIZER, LLAMA3), []  # it strips what is said
    equal = {"prompt": said("q"), "chosen": answer("x"), "rejected": answer("x ")}
    kept, _ = encode_pairs([PAIR, equal], tokenizer, LLAMA3, 64, say=lines.append)
    assert kept == [PAIR] and lines == ["left out: 1 pairs with equal answers, as llama3 writes them"]
    with pytest.raises(UserError, match="no pair to learn from: 1 with equal answers"):
        encode_pairs([equal], tokenizer, LLAMA3, 64, say=lines.append)


# ---- when something is wrong -------------------------------------------------------------------------------

GOOD = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def written(tmp_path, *records):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records), "utf-8")
    return path


@pytest.mark.parametrize("record, words", [
    ({"prompt": "q", "chosen": "a"}, "that is no preference; expected are"),
    ([1], "a value of type list"),
    ({"chosen": [1], "rejected": [2]}, '"chosen" holds a value of type int; messages are expected'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "system": 7}, '"system" is of type int'),
    ({"prompt": 7, "chosen": "a", "rejected": "b"}, '"prompt" is of type int'),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, '"chosen" is missing'),
    ({"prompt": "q", "chosen": said("other", "a"), "rejected": "b"}, "neither begins with the messages"),
    ({"chosen": "text", "rejected": "text 2"}, "is a text without a prompt"),
    ({"chosen": said("p", "a"), "rejected": said("q", "a")}, "no question in common"),
    ({"prompt": said("q", "a"), "chosen": "x", "rejected": "y"}, "is of the assistant, not of the user"),
    ({"chosen": said("q", "a", "more"), "rejected": said("q", "b")}, '"chosen" does not end with a message'),
    ({"prompt": [{"role": "robot", "content": "q"}], "chosen": "a", "rejected": "b"}, "no question in comm"),
])
def test_a_line_that_is_no_pair_is_named_with_its_place_or_skipped(tmp_path, capsys, record, words):
    path = written(tmp_path, GOOD, record, GOOD)
    with pytest.raises(UserError, match="p.jsonl:2: ") as error:
        list(read_preferences(path))
    assert words in str(error.value) and "--on_bad_line skip" in str(error.value)
    assert len(list(read_preferences(path, "skip"))) == 2
    assert "skipped: 1" in capsys.readouterr().out


def test_equal_and_empty_answers_are_left_out_and_counted(tmp_path, capsys):
    changes = {}, {"chosen": "bad"}, {"rejected": " \n"}, {"chosen": ""}
    path = written(tmp_path, *(GOOD | change for change in changes))
    assert len(list(read_preferences(path))) == 1
    assert "1 pairs; left out: 1 with equal answers, 2 with an empty answer" in capsys.readouterr().out


@pytest.mark.parametrize("records, words", [
    ([GOOD | {"chosen": "bad"}] * 2, "no pair to learn from: 2 with equal"), ([], "no pair to learn from")])
def test_a_file_without_a_pair_is_refused(tmp_path, records, words):
    with pytest.raises(UserError, match=words):
        list(read_preferences(written(tmp_path, *records)))


def test_a_prompt_as_long_as_the_window_is_named_or_left_out():
    long = {"prompt": said("a" * 64), "chosen": answer("x"), "rejected": answer("y"), "where": "p.jsonl:3"}
    with pytest.raises(UserError, match="p.jsonl:3: its prompt has .* tokens, and the window --seq_len 64"):
        encode_pairs([PAIR, long], TOKENIZER, CHATML, 64)
    assert len(encode_pairs([PAIR, long], TOKENIZER, CHATML, 64, "skip", say=lambda line: None)[0]) == 1
    with pytest.raises(UserError, match="none of the 1 pairs fits"):
        encode_pairs([long], TOKENIZER, CHATML, 64, "skip")
