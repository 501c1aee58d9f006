"""languages.py: scripts against Unicode's own names, languages of one script by their n-grams."""
import math
import unicodedata

import numpy as np
import pytest

import languages
from config import UserError
from languages import LANGUAGE_OF, RANGES, Languages, dominant_script, script_counts
from ngrams import character_ngrams
from support import in_process

TEXTS = {  # the last two of each are held out
    "en": ["the ship came into the harbour before the storm and nobody saw it",
           "we have always lived in this house with a view of the hills",
           "she asked whether there would be enough bread for the children",
           "this is what they were told when they went to school",
           "where have you been all day, and what did you see there?",
           "he thought that nothing could have been done about it"],
    "de": ["das schiff kam vor dem sturm in den hafen und niemand hat es gesehen",
           "wir haben immer in diesem haus mit blick auf die hügel gewohnt",
           "sie fragte, ob es genug brot für die kinder geben würde",
           "das ist es, was man ihnen sagte, als sie zur schule gingen",
           "wo bist du den ganzen tag gewesen und was hast du dort gesehen?",
           "er dachte, dass man nichts dagegen hätte tun können"],
    "fr": ["le bateau est entré dans le port avant la tempête et personne ne l'a vu",
           "nous avons toujours habité dans cette maison avec vue sur les collines",
           "elle a demandé s'il y aurait assez de pain pour les enfants",
           "voilà ce qu'on leur a dit quand ils sont allés à l'école",
           "où as-tu été toute la journée et qu'est-ce que tu as vu là-bas ?",
           "il pensait que l'on n'aurait rien pu y faire"],
    "es": ["el barco entró en el puerto antes de la tormenta y nadie lo vio",
           "siempre hemos vivido en esta casa con vistas a las colinas",
           "ella preguntó si habría bastante pan para los niños",
           "esto es lo que les dijeron cuando fueron a la escuela",
           "¿dónde has estado todo el día y qué has visto allí?",
           "pensaba que no se podía haber hecho nada"]}


@pytest.fixture(scope="module")
def model():
    return Languages.train({label: texts[:-2] for label, texts in TEXTS.items()})


def script(text):
    return dominant_script(script_counts(text))


@pytest.mark.parametrize("text, name", [
    ("Hello, world", "Latin"), ("Größe, naïve", "Latin"), ("Привет, мир", "Cyrillic"), ("Γειά σου", "Greek"),
    ("שלום", "Hebrew"), ("مرحبا", "Arabic"), ("नमस्ते", "Devanagari"), ("สวัสดี", "Thai"),
    ("안녕하세요", "Hangul"), ("你好，世界", "Han"), ("東京の天気は晴れです", "Kana"), ("カタカナ", "Kana"),
    ("1234 !? 🙂", ""), ("", ""), ("see 你好 for more", "Latin"), ("\ud800", "")])
def test_the_script_is_that_of_most_letters(text, name):
    assert script(text) == name


def test_scripts_are_those_of_unicodes_names():
    """Each letter in a range has a name that begins with its script, but for a few signs of old alphabets."""
    names = {"Han": ("CJK",), "Kana": ("HIRAGANA", "KATAKANA"), "Latin": ("LATIN", "FULLWIDTH LATIN")}
    for first, last, its_script in RANGES:
        assert first <= last
        letters = [chr(code) for code in range(first, last + 1) if unicodedata.category(chr(code))[0] == "L"]
        begins = names.get(its_script, (its_script.upper(), "COPTIC"))
        right = sum(unicodedata.name(letter, "").startswith(begins) for letter in letters)
        assert right > 0.9 * len(letters), (hex(first), its_script)
    firsts = [bounds[0] for bounds in RANGES]
    assert firsts == sorted(firsts) and all(a[1] < b[0] for a, b in zip(RANGES, RANGES[1:])), (
        "searchsorted needs order")


def test_a_table_holds_the_log_probabilities_of_counting():
    model = Languages.train({"x": ["aaa"], "y": ["b"]})
    grams, prior, buckets = character_ngrams("aaa"), languages.PRIOR, 1 << languages.BITS
    a = character_ngrams("a", (1,))[1]  # between two spaces
    expected = math.log((np.count_nonzero(grams == a) + prior) / (len(grams) + prior * buckets))
    assert model.table[a, 0] == pytest.approx(expected, rel=1e-6)  # float32
    assert np.allclose(np.exp(model.table.astype(float)).sum(axis=0), 1, atol=1e-4)  # 2^18 float32 terms


def test_languages_of_one_script_are_told_apart(model):
    for label, texts in TEXTS.items():
        for text in texts[-2:]:
            assert model.identify(text)[0] == label


def test_a_script_of_one_language_needs_no_model(model):
    for text, label in (("안녕하세요", "ko"), ("東京の天気は晴れです", "ja"), ("你好世界再见", "zh"), ("γειά σου", "el")):
        assert model.identify(text) == (label, math.inf)
    named = Languages.train({"english": ["the cat"], "poems": ["秦川雄帝宅"]})
    assert named.identify("飛觀迥凌虛") == ("poems", math.inf), "a label of the user's comes before ours"
    assert set(LANGUAGE_OF) <= {its_script for *_, its_script in RANGES}


@pytest.mark.parametrize("text", ["", "12:30", "a", "?!", "Привет всем"])
def test_what_cannot_be_told_is_unknown(model, text):
    assert model.identify(text)[0] == "unknown"


def test_equal_languages_are_unknown():
    twice = Languages.train({"a": TEXTS["en"], "b": TEXTS["en"]})
    assert twice.identify(TEXTS["en"][0]) == ("unknown", 0.0)


def test_a_saved_model_answers_the_same(model, tmp_path):
    model.save(tmp_path / "m.npz")
    again = Languages.load(tmp_path / "m.npz")
    assert [again.identify(text) for text in TEXTS["fr"]] == [model.identify(text) for text in TEXTS["fr"]]


def test_texts_without_letters_are_refused():
    with pytest.raises(UserError, match="no letters in the texts of x"):
        Languages.train({"x": ["123"]})


def test_the_command_learns_from_named_files_and_identifies(tmp_path, monkeypatch, capsys):
    for label, texts in TEXTS.items():
        folder = tmp_path / label
        folder.mkdir()
        for i, text in enumerate(texts * 2):
            (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    run = lambda *words: in_process(monkeypatch, capsys, languages.main, *words)
    pairs = [f"{label}={tmp_path / label}" for label in TEXTS]
    code, out, err = run("--out", tmp_path / "m.npz", "--train", *pairs)
    assert code == 0 and "de                2 held-out pieces of 200 characters: de 100.0%" in out, err
    code, out, _ = run("--model", tmp_path / "m.npz", "--input", tmp_path / "es")
    assert code == 0 and "es                  12 documents" in out
    assert run("--out", tmp_path / "m.npz")[0] == 2
    code, _, err = run("--out", tmp_path / "n.npz", "--train", "english")
    assert code == 2 and "--train 'english' is not LABEL=PATH" in err
    code, _, err = run("--input", tmp_path)
    assert code == 2 and "is what a --model is to identify, and none is named; leave it out" in err
    code, _, err = run("--model", tmp_path / "m.npz", "--train", *pairs)
    assert code == 2 and "is of a model that is learned, and --model" in err


@pytest.mark.slow
def test_docstrings_and_code_of_the_library_are_told_apart():
    texts = languages.default_texts()
    model = Languages.train({label: [text for i, text in enumerate(its) if i % 10]
                             for label, its in texts.items()})
    for label, its_texts in texts.items():
        right = [model.identify(text[:200])[0] == label for text in its_texts[::10]]
        assert np.mean(right) > 0.97
