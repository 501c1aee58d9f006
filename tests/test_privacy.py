"""privacy.py: what is found and what is spared, against `ipaddress`, and on the lines of pii_cases.txt."""
import ipaddress
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import privacy
from privacy import (LETTERS, find_pii, is_identity_number, labelled_cases, measured, pii_problem, redact_pii)
from support import in_process

CASES = labelled_cases(Path(__file__).with_name("pii_cases.txt"))


def found(text, **options):
    return [(text[start:end], kind) for start, end, kind in find_pii(text, **options)]


# ---- Replacing


def test_each_kind_has_its_placeholder_and_its_count():
    text, counts = redact_pii("Ask ann@mail.org or bob@mail.org, +44 20 7946 0958, 192.168.1.1, 2001:db8::1, "
                              "11010519491231002X.")
    assert text == ("Ask [EMAIL_ADDRESS] or [EMAIL_ADDRESS], [PHONE_NUMBER], [IP_ADDRESS], [IP_ADDRESS], "
                    "[ID_NUMBER].")
    assert counts == {"EMAIL_ADDRESS": 2, "PHONE_NUMBER": 1, "IP_ADDRESS": 2, "ID_NUMBER": 1}
    assert redact_pii("nothing here") == ("nothing here", {})


def test_up_to_five_finds_stay_and_six_drop_the_document():
    mails = [f"user{i}@mail.org" for i in range(6)]
    assert pii_problem(redact_pii(" ".join(mails[:5]))[1]) is None
    assert pii_problem(redact_pii(" ".join(mails))[1]) == "pii: 6 found, at most 5"
    assert pii_problem({"EMAIL_ADDRESS": 1}, most=0) == "pii: 1 found, at most 0"
    assert pii_problem({"EMAIL_ADDRESS": 3, "IP_ADDRESS": 3}) == "pii: 6 found, at most 5", (
        "all kinds together")


PARTS = [text[start:end] for text, spans in CASES for start, end, _ in spans] + \
    [" ", "", ".", ":", "+", "-", "@", "1", "a", "电话", "version ", "\n", "[", "/", "tel. ", "[IP_ADDRESS]"]


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join)
       | st.text("0123456789.:+-@ abcf()[]/电", max_size=40))
@settings(max_examples=300, deadline=None)
def test_masking_twice_equals_masking_once(text):
    once, counts = redact_pii(text)
    assert redact_pii(once) == (once, {})
    spans = find_pii(text)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:])), "finds overlap"
    if not re.search(r"\[[A-Z_]+\]", text):
        assert sum(counts.values()) == len(re.findall(rf"\[({'|'.join(LETTERS.values())})\]", once))


def test_overlapping_finds_count_once():
    assert found("13812345678@qq.com") == [("13812345678@qq.com", "EMAIL_ADDRESS")]
    assert found("admin@192.168.1.1") == [("192.168.1.1", "IP_ADDRESS")]
    assert found("::ffff:192.0.2.128") == [("::ffff:192.0.2.128", "IP_ADDRESS")]
    assert found("tel:+8613812345678") == [("+8613812345678", "PHONE_NUMBER")]


# ---- Against the references


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6)
       | st.ip_addresses(v=6).map(lambda address: address.exploded))
@settings(max_examples=300, deadline=None)
def test_each_address_of_ipaddress_is_found_whole(address):
    text = str(address)
    is_plain = any(map(str.isdigit, text)) and (text == "::1" or not re.fullmatch(r"\d{0,2}::\d{0,2}", text))
    for before, after in (("", ""), ("from ", " to"), ("(", ")"), ("地址", "，"), ('"', '"')):
        assert found(before + text + after) == ([(text, "IP_ADDRESS")] if is_plain else [])


@given(st.lists(st.integers(0, 300).map(str) | st.sampled_from(["00", "01", "007"]), min_size=4, max_size=4)
       .map(".".join) | st.text("0123456789abcdef:.", min_size=3, max_size=20))
@settings(max_examples=300, deadline=None)
def test_what_is_found_as_an_address_ipaddress_accepts(text):
    for address, kind in found(f" {text} "):
        if kind == "IP_ADDRESS":
            ipaddress.ip_address(address)
    if (text.count(".") == 3 and ":" not in text and re.fullmatch(r"[\d.]+", text)
            and "" not in text.split(".")):
        try:
            ipaddress.ip_address(text)
            assert (text, "IP_ADDRESS") in found(f" {text} ")
        except ValueError:
            assert (text, "IP_ADDRESS") not in found(f" {text} ")


def test_the_check_of_an_identity_number_finds_each_wrong_digit_and_each_swap():
    """The worked example of GB 11643; ISO 7064 MOD 11-2 finds each single error and swap of neighbours."""
    number = "11010519491231002X"
    assert is_identity_number(number) and is_identity_number(number.lower())
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]  # as the standard prints them
    assert privacy.WEIGHTS == weights
    check = "10X98765432"[sum(w * int(d) for w, d in zip(weights, number)) % 11]
    assert check == "X"
    for i in range(17):
        for digit in set("0123456789") - {number[i]}:
            assert not is_identity_number(number[:i] + digit + number[i + 1:])
        if i < 16 and number[i] != number[i + 1]:
            assert not is_identity_number(number[:i] + number[i + 1] + number[i] + number[i + 2:])


def test_each_country_code_of_e164_is_known_and_an_unassigned_one_is_not():
    for code in ("1", "7", "20", "33", "44", "49", "86", "91", "351", "420", "852", "886", "971", "998"):
        digits = "2025550143" if code == "1" else "13812345678" if code == "86" else "301234567"
        assert found(f"+{code} {digits}") == [(f"+{code} {digits}", "PHONE_NUMBER")]
    for code in ("0", "210", "429", "289", "1 1"):
        assert not found(f"x: +{code}1234567")


# ---- The surroundings decide


@pytest.mark.parametrize("text", ["version 1.2.3.4", "Version: 1.2.3.4", "v1.2.3.4", "release 1.2.3.4",
                                  "§ 1.2.3.4", "foo==1.2.3.4", "Chrome/120.0.0.0", "pkg-1.2.3.4.tar.gz",
                                  "版本1.2.3.4", "version 1.2.3.4 or 1.2.3.5", "2024-01-15", "15.01.2024",
                                  "2024/01/15 12:30:45"])
def test_versions_and_dates_are_no_addresses_and_no_numbers(text):
    assert not found(text)


def test_the_nearer_word_decides_between_a_version_and_a_host():
    assert found("version 2, server at 10.2.3.4") == [("10.2.3.4", "IP_ADDRESS")]
    assert not found("server version 10.2.3.4")
    assert found("version 3\n10.2.3.4") == [("10.2.3.4", "IP_ADDRESS")], "another line"


def test_what_belongs_to_nobody_is_spared_on_demand():
    text = ("127.0.0.1 192.168.0.1 ::1 2001:db8::1 me@example.com you@mail.test +1 202 555 0143"
            " me@localhost.local")
    assert len(find_pii(text)) == 8 and find_pii(text, reserved=False) == []
    assert len(find_pii("8.8.8.8 ann@mail.org +1 202 456 1414", reserved=False)) == 3


# ---- Measured on the labelled lines


def test_the_labelled_lines_are_many_and_half_of_them_are_false_friends():
    assert len(CASES) >= 200 and sum(not spans for _, spans in CASES) >= 100
    assert {kind for _, spans in CASES for *_, kind in spans} == set(LETTERS.values())


@pytest.mark.parametrize("kind, precision, recall", [
    ("EMAIL_ADDRESS", 0.95, 0.93), ("IP_ADDRESS", 0.95, 0.97), ("PHONE_NUMBER", 0.95, 0.93),
    ("ID_NUMBER", 1, 1), ("SECRET_KEY", 1, 1)])
def test_precision_and_recall_by_kind_are_at_least(kind, precision, recall):
    right, finds, labelled = measured(CASES)[kind]
    assert right / finds >= precision and right / labelled >= recall


def test_precision_and_recall_count_spans_not_lines():
    text = "a@mail.org and b@mail.org"
    assert measured([(text, [(0, 10, "EMAIL_ADDRESS"), (11, 14, "PHONE_NUMBER")])])["EMAIL_ADDRESS"] == (
        1, 2, 1)
    assert measured([(text, [(11, 14, "PHONE_NUMBER")])])["PHONE_NUMBER"] == (0, 0, 1)


def test_long_texts_without_data_take_time_in_proportion():
    rng = random.Random(0)
    for alphabet in ("a@", "1.", ":a", "+1 ", "(1)", "1-", "eyJ.", "xox-"):
        find_pii("".join(rng.choices(alphabet, k=100_000)))
        find_pii(alphabet * 30_000)


def test_the_command_prints_precision_and_recall_or_what_a_corpus_holds(tmp_path, monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, privacy.main)
    assert code == 0 and re.search(r"ID_NUMBER +\d+ +\d+ +1\.000 +1\.000", out)
    (tmp_path / "a.txt").write_text("ann@mail.org " * 6, encoding="utf-8")
    code, out, _ = in_process(monkeypatch, capsys, privacy.main, "--input", tmp_path)
    assert code == 0 and "EMAIL_ADDRESS          6   ann@mail.org" in out and "more than 5: 1 of 1" in out
    for words, message in ((["--most", 3], "--most 3 is for --input"),
                           (["--input", tmp_path, "--cases", "x"], "--cases x is measured without --input")):
        code, _, err = in_process(monkeypatch, capsys, privacy.main, *words)
        assert code == 2 and message in err
