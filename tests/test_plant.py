"""plant.py: the junk is what it says, and cleaning finds it."""
import plant
import pytest
from test_pipeline import run, sentences


@pytest.fixture(scope="module")
def documents():
    good = [{"text": sentences(n), "source": f"{n}.py"} for n in range(40)]
    return plant.planted(good, 0.3, seed=0)


def size(documents, *kinds):
    return sum(len(document["text"].encode("utf-8")) for document in documents
               if document["planted"] in kinds)


def test_the_share_of_junk_is_kept_and_each_kind_has_a_third_of_it(documents):
    assert size(documents, "good") == sum(len(sentences(n)) for n in range(40)), "all good text is there"
    longest = max(len(document["text"]) for document in documents)
    for kind in plant.KINDS:
        wanted = 0.3 / 0.7 * size(documents, "good") / 3
        assert wanted <= size(documents, kind) < wanted + longest, "a document more than needed, at most"
    assert plant.planted([{"text": "a b", "source": "x"}], 0, seed=0) == [
        {"text": "a b", "source": "x", "planted": "good"}]


def test_near_duplicates_and_boilerplate_are_found_and_good_text_stays(documents, tmp_path):
    run(tmp_path, documents, near=0.8, lines=60)
    left = plant.what_is_left(str(tmp_path / "out"))
    assert left["duplicate"] + left["good"] <= size(documents, "good") + 0.1 * size(documents, "duplicate"), \
        "of a text and its copy one stays, whichever comes first"
    assert left["boilerplate"] < 0.5 * size(documents, "boilerplate")
    assert left["good"] + left["duplicate"] > 0.95 * size(documents, "good")


def test_the_commands_train_both_kinds_on_the_same_steps_and_seeds():
    lines = plant.commands(plant.Settings(steps=300, seeds=3)).split("\n")
    trained = [line for line in lines if line.startswith("python train.py")]
    assert len(trained) == 6 and all("--steps 300" in line for line in trained)
    assert sum("held_out=runs/data" in line for line in lines) == 2, "held-out text is the same for both"
