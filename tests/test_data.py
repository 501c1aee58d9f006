"""data.py: what is read, what is dropped, where a document goes, what the shards hold, what a step serves."""
import contextlib
import copy
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from bpe import Tokenizer
from config import UserError
from data import Batches, Replay, Settings, prepare, read_documents, write_documents

ROOT = Path(data.__file__).parent


def texts(paths, **options):
    return [document["text"] for document in read_documents([paths], **options)]


def corpus(folder, count=60, seed=0):
    """Write `count` short texts, each of its own words."""
    folder.mkdir(parents=True, exist_ok=True)
    words = "river mountain winter lantern paper morning silver garden letter window".split()
    generator = random.Random(seed)
    for number in range(count):
        text = f"Text {number}. " + " ".join(generator.choices(words, k=60)) + ".\n"
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


def run_prepare(folder, out, **settings):
    settings = {"vocab_size": 300, "workers": 1} | settings
    return prepare(Settings(input=(str(folder),), out=str(out), **settings))


def stored(out, split):
    return list(read_documents([out / f"{split}.jsonl"]))


def shard(out, split):
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    return np.fromfile(out / f"{split}.bin", {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])


# ---- 1. Reading --------------------------------------------------------------------------------------------


def test_each_kind_of_file_is_read_plain_and_gzipped(tmp_path):
    line = json.dumps({"text": "a line", "stars": 5}).encode()
    contents = {"a.jsonl": line + b"\n\n" + line, "b.json": line, "c.txt": "tëxt".encode(),
                "d.md": b"# title", "e.py": b"# -*- coding: latin-1 -*-\nname = '\xe9'\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    found = list(read_documents([tmp_path]))
    python = "# -*- coding: latin-1 -*-\nname = 'é'\n"
    assert [document["text"] for document in found] == [
        "a line", "a line", "a line", "a line", "a line", "a line", "tëxt", "tëxt", "# title", "# title",
        python, python], "PEP 263: the coding line of a Python source decides how it is decoded"
    assert found[0] == {"text": "a line", "stars": 5, "source": "a.jsonl:1"}
    assert found[1]["source"] == "a.jsonl:3", "blank lines count too: the number is the editor's"


def test_folders_are_searched_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a.txt", "b/c/深 度.txt",
                 ".hidden/x.txt", ".x.txt", "__pycache__/x.py", "b/x.bin"):
        path = tmp_path / "我的 文本" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    found = list(read_documents([tmp_path / "我的 文本"]))
    assert [document["source"] for document in found] == ["a.txt", "b/1.txt", "b/2.txt", "b/c/深 度.txt"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_that_form_a_loop_end_and_a_dangling_link_is_passed_over(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("one", encoding="utf-8")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "up too").symlink_to(tmp_path)         # to follow both would never end
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert texts(tmp_path) == ["one"]


@pytest.mark.parametrize("line, complaint", [
    ('{"text": "cut', "not JSON"), ('["text"]', "not list"), ('{"txt": "a"}', "'txt'"),
    ('{"text": 5}', "'int'"), ('{"text": "half a pair: \\ud83d"}', "surrogate"), ("[" * 10**5, "recursion")])
def test_a_bad_line_stops_with_its_file_and_number_or_is_skipped(tmp_path, capsys, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + '\n{"text": "also good"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*--on_bad_line skip") as error:
        texts(path)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert texts(path, on_bad_line="skip") == ["good", "also good"]
    assert "skipped: 1;" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, complaint", [
    ("a.txt", b"good \xff bad", "position 5"), ("a.md", "größe".encode("latin-1"), "position 2"),
    ("a.py", b"x = '\xe9'\n", "position 5"), ("a.py", b"# coding: uft-8\n", "unknown encoding"),
    ("a.py", b"# coding: rot13\n", "text encoding"), ("a.py", b"# coding: utf-7\nx = '+2AA-'", "surrogate"),
    ("a.txt", "UTF-16".encode("utf-16"), "byte 3 is NUL"), ("a.txt", b"\x7fELF\0\0", "binary"),
    ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1"),
    ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "gzip"),
    ("a.jsonl.gz", b"no gzip at all", "gzip")])
def test_a_file_that_is_not_text_is_named_with_the_place(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        texts(tmp_path)
    assert complaint in str(error.value)
    assert texts(tmp_path, on_bad_line="skip") == []


def test_missing_and_unreadable_inputs_are_errors(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    for path, complaint in ((tmp_path / "none", "no such file"), (tmp_path / "a.pdf", "not a kind"),
                            (tmp_path, "no text")):
        with pytest.raises(UserError, match=complaint):
            texts(path)


def test_documents_survive_writing_and_reading(tmp_path):
    strange = ["", "\0", "a\r\nb\rc\n", "line\u2028separator\x85\x0b\x0c", "中文 👩‍👩‍👧 e\u0301", " trailing  ",
               "\ufeffmark"]
    documents = [{"text": text, "source": "here", "more": [1, None]} for text in strange]
    for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.gz"):
        write_documents(tmp_path / name, documents)
        assert list(read_documents([tmp_path / name])) == documents
    twice = [(tmp_path / name).read_bytes() for name in ("a.jsonl.gz", "b.jsonl.gz")]
    assert twice[0] == twice[1], "does the gzip file hold its own name?"
    assert twice[0][4:8] == bytes(4), "does the gzip file hold the time? RFC 1952, MTIME"


def test_a_file_of_documents_is_written_whole_or_not_at_all(tmp_path):
    def failing():
        yield {"text": "first"}
        raise OSError("disk full")

    write_documents(tmp_path / "a.jsonl", [{"text": "old"}])
    with pytest.raises(OSError, match="disk full"):
        write_documents(tmp_path / "a.jsonl", failing())
    assert texts(tmp_path / "a.jsonl") == ["old"]
    assert os.listdir(tmp_path) == ["a.jsonl"]


# ---- 2. Cleaning, dropping, splitting ----------------------------------------------------------------------


def test_cleaning_normalises_newlines_and_nothing_else():
    assert data.clean("\ufeffa\r\nb\rc\n\n \t d \0 é e\u0301 ") == "a\nb\nc\n\n \t d \0 é e\u0301 "


def kept(folder, documents, **settings):
    """(the texts that the pipeline keeps, its funnel) of documents in a file of JSON Lines."""
    write_documents(folder / "in.jsonl", [{"source": "a.txt"} | document for document in documents])
    meta = run_prepare(folder / "in.jsonl", folder / "out", overwrite=True, **settings)
    found = {document["text"]: None for split in data.SPLITS for document in stored(folder / "out", split)}
    return [text for text in dict.fromkeys(data.clean(document["text"]) for document in documents)
            if text in found], meta["funnel"]


def test_empty_and_repeated_documents_are_dropped_and_the_funnel_adds_up(tmp_path):
    texts = ("a", " \n\t", "b", "a", "", "é\r\n", "é\n", "a ")
    found, funnel = kept(tmp_path, [{"text": text} for text in texts], vocab_size=257)
    assert found == ["a", "b", "é\n", "a "], "what is equal after cleaning is a duplicate; 'a ' is not 'a'"
    assert funnel == {"read": [8, 14], "kept": [4, 1 + 1 + 3 + 2], "empty": [2, 3], "duplicate": [2, 1 + 3]}


def test_generated_tables_are_dropped_and_code_with_tables_is_kept(tmp_path):
    rows = "".join(f"    0x{i:04x}: 0x{i + 7:04x},  # LETTER {i}\n" for i in range(400))
    table = "decoding_map = {\n" + rows + "}\n"
    code = "".join(f"def f{i}(x):\n    '''Add {i}.'''\n    return x + {i}\n" for i in range(300))
    documents = [{"text": table, "source": "encodings/cp0.py"}, {"text": table, "source": "numbers.txt"},
                 {"text": table + code, "source": "a.py"}, {"text": table[:4000], "source": "small.py"}]
    found, funnel = kept(tmp_path, documents)
    assert funnel["table"] == [1, len(table)] and len(found) == 3, "only large Python that is mostly table"


def test_the_table_rule_finds_tables_and_no_code_in_the_standard_library():
    dropped = {document["source"] for document in data.read_files(data.standard_library())
               if isinstance(document, dict) and data.is_table(document["text"])}
    assert {"encodings/cp1252.py", "encodings/mac_roman.py", "html/entities.py", "stringprep.py"} <= dropped
    assert not dropped & {"locale.py", "opcode.py", "token.py", "mimetypes.py", "turtle.py", "keyword.py"}


def test_the_default_corpus_is_importable_modules_of_the_standard_library_alone():
    sources = [source for _, source in data.standard_library()]
    assert {"this.py", "json/__init__.py", "asyncio/base_events.py"} <= set(sources)
    assert not [source for source in sources if "-" in source or "__pycache__" in source]


def split_of(folder, documents, val_fraction=0.2):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{split}.jsonl" for split in data.SPLITS]
    data.write_splits(paths, documents, int(val_fraction * 2**128))
    return {document["text"]: split for split in data.SPLITS for document in stored(folder, split)}


def test_the_split_depends_on_the_content_alone(tmp_path):
    documents = [{"text": f"text {number}"} for number in range(1000)]
    whole = split_of(tmp_path, documents)
    assert split_of(tmp_path, documents[::-1]) == whole, "the order of the documents changed the split"
    half = split_of(tmp_path, documents[::2])
    assert half == {text: whole[text] for text in half}, "other documents changed the split of this one"
    # Binomial: 200 expected of 1000, standard deviation 12.6; five of them never happen by chance.
    assert abs(list(whole.values()).count("val") - 200) < 63


@pytest.mark.parametrize("val_fraction", [1e-6, 0.5])
def test_neither_split_is_empty_however_few_documents_there_are(tmp_path, capsys, val_fraction):
    for count in (1, 2, 3, 5):
        out = tmp_path / f"out{count}"
        meta = run_prepare(corpus(tmp_path / f"in{count}", count), out, val_fraction=val_fraction)
        assert meta["train"]["tokens"] > 0 and meta["val"]["tokens"] > 0
        together = [document["text"] for split in data.SPLITS for document in stored(out, split)]
        original = [path.read_text(encoding="utf-8") for path in (tmp_path / f"in{count}").iterdir()]
        assert "".join(together) == original[0] if count == 1 else sorted(together) == sorted(original)
    assert "a single document" in capsys.readouterr().out, "what was done to the split is said"


def test_a_single_document_is_cut_at_a_line_near_the_end(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(1000)), encoding="utf-8")
    run_prepare(tmp_path / "a.txt", tmp_path / "out", val_fraction=0.1)
    (train,), (val,) = stored(tmp_path / "out", "train"), stored(tmp_path / "out", "val")
    assert train["text"] + val["text"] == (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert val["text"].startswith("line ") and 80 < val["text"].count("\n") < 120


@pytest.mark.parametrize("content, complaint", [("", "1 empty"), (" \n", "1 empty"), ("x", "single")])
def test_an_input_without_text_is_an_error_and_leaves_nothing(tmp_path, content, complaint):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        run_prepare(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


# ---- 3. Tokens ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    corpus(folder / "in")
    (folder / "in" / "special.txt").write_text("This <|endoftext|> is text.", encoding="utf-8")
    (folder / "in" / "again.txt").write_text("This <|endoftext|> is text.", encoding="utf-8")
    return folder / "out", run_prepare(folder / "in", folder / "out", val_fraction=0.2, workers=2)


def test_the_shards_hold_every_document_followed_by_end_of_text(prepared):
    out, meta = prepared
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    for split in data.SPLITS:
        expected = []
        for document in stored(out, split):
            expected += [*tokenizer.encode(document["text"]), meta["end_of_text"]]
        assert shard(out, split).tolist() == expected


def test_text_that_spells_a_special_token_stays_text(prepared):
    out, meta = prepared
    ends = sum(int((shard(out, split) == meta["end_of_text"]).sum()) for split in data.SPLITS)
    assert ends == meta["funnel"]["kept"][0], "one end-of-text a document: did the text of a user become one?"


def test_the_meta_counts_and_checksums_what_is_there(prepared):
    out, meta = prepared
    written = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(meta)), "what prepare returns is what it wrote"
    assert meta["tokenizer"] == Tokenizer.load(out / "tokenizer.json").fingerprint
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 300
    for split in data.SPLITS:
        content, entry = (out / f"{split}.bin").read_bytes(), meta[split]
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert (entry["documents"], entry["tokens"]) == (len(stored(out, split)), len(content) // 2)
        assert entry["text_bytes"] == sum(len(document["text"].encode()) for document in stored(out, split))
    funnel = meta["funnel"]
    assert funnel["read"] == [62, funnel["kept"][1] + funnel["duplicate"][1]]
    assert funnel["kept"] == [meta["train"][key] + meta["val"][key] for key in ("documents", "text_bytes")]
    assert funnel["duplicate"] == [1, 27]


def test_the_compressors_figures_are_those_of_the_whole_val_text(prepared):
    out, meta = prepared
    text = "".join(document["text"] for document in stored(out, "val")).encode()
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    gz = 8 * len(gzip.compress(text, 9)) / len(text)
    # Feeding a compressor in pieces may move the end of a block: some bytes.
    assert meta["compressors"] == {"xz": pytest.approx(xz, rel=0.01), "gzip": pytest.approx(gz, rel=0.01),
                                   "text_bytes": len(text)}
    capped = data.compressed_bits_per_byte(out / "val.jsonl", limit=1000)
    assert capped["text_bytes"] == 1000
    assert capped["gzip"] == pytest.approx(8 * len(gzip.compress(text[:1000], 9)) / 1000, rel=0.01)


class FakeTokenizer:
    """Two ids a text: 0 and the highest."""
    fingerprint = "fake"

    def __init__(self, vocab_size):
        self.vocab_size, self.special_tokens = vocab_size, {"</s>": 1}
        bytes_and_one = {id: bytes([id]) for id in range(256)} | {vocab_size - 1: b"##"}
        self.dtype = Tokenizer([], vocab=bytes_and_one).dtype

    def _encode_texts(self, texts):
        return [np.array([0, self.vocab_size - 1], self.dtype) for _ in texts]


@pytest.mark.parametrize("vocab_size, dtype, width", [(65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_ids_are_stored_in_16_bits_up_to_a_vocabulary_of_65536(tmp_path, vocab_size, dtype, width):
    for split in data.SPLITS:
        write_documents(tmp_path / f"{split}.jsonl", [{"text": "a"}, {"text": "b"}])
    meta = data.write_shards(tmp_path, FakeTokenizer(vocab_size), workers=1)
    assert meta["dtype"] == dtype and meta["train"]["bytes"] == 6 * width
    assert np.fromfile(tmp_path / "val.bin", f"<u{width}").tolist() == [0, vocab_size - 1, 1] * 2


def test_a_given_tokenizer_is_used_and_one_without_end_of_text_is_refused(prepared, tmp_path):
    out, meta = prepared
    corpus(tmp_path / "in", 5, seed=1)
    for path in (out, out / "tokenizer.json"):
        again = run_prepare(tmp_path / "in", tmp_path / "out", tokenizer=str(path), overwrite=True)
        assert again["tokenizer"] == meta["tokenizer"]
    Tokenizer([]).save(tmp_path / "bare.json")
    with pytest.raises(UserError, match="no end-of-text token"):
        run_prepare(tmp_path / "in", tmp_path / "new", tokenizer=str(tmp_path / "bare.json"))
    assert not (tmp_path / "new").exists()


def test_the_same_command_gives_the_same_bytes_for_any_number_of_workers(tmp_path):
    corpus(tmp_path / "in")
    contents = []
    for workers in (1, 2):
        run_prepare(tmp_path / "in", tmp_path / "out", workers=workers, overwrite=True)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
        for name in ("meta.json", "report.json", "report.html"):
            contents[-1].pop(name)                           # these hold the settings, workers too, and times
    assert contents[0] == contents[1]


def test_preparing_its_own_output_again_changes_nothing(prepared, tmp_path):
    out, meta = prepared
    files = tuple(str(out / f"{split}.jsonl") for split in data.SPLITS)
    again = prepare(Settings(input=files, out=str(tmp_path / "out"), vocab_size=300, val_fraction=0.2))
    assert [again[split] for split in data.SPLITS] == [meta[split] for split in data.SPLITS]


# ---- whole or absent


def test_an_existing_output_is_refused_and_replaced_only_when_asked(tmp_path):
    corpus(tmp_path / "in", 5)
    meta = run_prepare(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="exists; pass --overwrite"):
        run_prepare(tmp_path / "in", tmp_path / "out")
    shutil.rmtree(tmp_path / "in")
    corpus(tmp_path / "in", 6)
    assert run_prepare(tmp_path / "in", tmp_path / "out", overwrite=True)["train"] != meta["train"]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_run_that_fails_leaves_the_old_output_and_nothing_else(tmp_path):
    corpus(tmp_path / "in", 5)
    run_prepare(tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out" / "meta.json").read_bytes()
    with pytest.raises(UserError):
        run_prepare(tmp_path / "in", tmp_path / "out", overwrite=True, vocab_size=10**6)
    assert (tmp_path / "out" / "meta.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_folder_with_files_of_others_is_never_replaced(tmp_path):
    corpus(tmp_path / "in", 5)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work", encoding="utf-8")
    for out in ("thesis", "in/000.txt"):
        with pytest.raises(UserError, match="is not data.py's"):
            run_prepare(tmp_path / "in", tmp_path / out, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text(encoding="utf-8") == "years of work"


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    corpus(tmp_path / "in", 5)
    run_prepare(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.old.tmp")      # killed between the two renames …
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "train.bin.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="no such file"):     # … and the next run fails as well
        run_prepare(tmp_path / "none", tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"], "the old output is put back"
    assert Batches(tmp_path / "out", "train", 1, 8).tokens


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.slow
@pytest.mark.parametrize("kill, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_killed_in_the_middle_leaves_no_output_and_no_process(tmp_path, kill, code):
    for seconds in (0.5, 1.5, 2.5):                          # while reading, training the tokenizer, encoding
        run = subprocess.Popen([sys.executable, ROOT / "data.py", "--out", tmp_path / "out"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
        assert run.stdout.readline(), "the first line: the program is at work, no longer importing"
        time.sleep(seconds)
        os.kill(run.pid, kill)
        try:
            _, errors = run.communicate(timeout=20)          # ends when the last process has closed its end
        except subprocess.TimeoutExpired:
            pytest.fail("a worker process outlived its killed parent")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)           # the group of this run alone: start_new_session
        assert run.returncode == code and "Traceback" not in errors and not (tmp_path / "out").exists()
        assert set(os.listdir(tmp_path)) <= {"out.tmp"}, "where finished shards wait to be gone on from"


# ---- as a command


def command(*arguments):
    return subprocess.run([sys.executable, ROOT / "data.py", *map(str, arguments)], capture_output=True,
                          encoding="utf-8", timeout=60)


def test_the_command_prints_the_funnel_and_errors_in_one_line(tmp_path):
    folder = corpus(tmp_path / "我的 文本", 30)
    run = command("--input", folder, "--out", tmp_path / "输 出", "--vocab_size", 300, "--workers", 2)
    assert run.returncode == 0, run.stderr
    assert "read" in run.stdout and "kept" in run.stdout and "xz -9e" in run.stdout
    assert (tmp_path / "输 出" / "meta.json").is_file()
    for arguments in (["--input", folder, "--out", tmp_path / "输 出"], ["--input", tmp_path / "none"],
                      ["--vocab_size", 100], ["--val_fraction", 0.9], ["--on_bad_line", "shrug"],
                      ["--input", folder, "--out", tmp_path / "new", "--vocab_size", 100_000]):
        run = command("--out", tmp_path / "other", *arguments)
        assert run.returncode == 2, run.stderr
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert sorted(os.listdir(tmp_path)) == ["我的 文本", "输 出"]


def test_importing_this_file_does_not_import_torch():
    script = "import sys, data; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == 0, "is torch imported at the top? worker processes would start slowly"


# ---- 4. Batches --------------------------------------------------------------------------------------------


def write_shard(folder, count, split="train", dtype="uint16"):
    """Write a shard of the tokens 0, 1, … count - 1: a token is its own position. End of text is 9999."""
    content = np.arange(count).astype(dtype).tobytes()
    (folder / f"{split}.bin").write_bytes(content)
    entry = {"tokens": count, "bytes": len(content), "text_bytes": 77,
             "sha256": hashlib.sha256(content).hexdigest()}
    meta = {"dtype": dtype, "vocab_size": 10_000, "end_of_text": 9999, split: entry}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def targets_of(batches, steps, serve="at"):
    found = torch.cat([getattr(batches, serve)(step)[1].flatten() for step in range(steps)])
    return found[found != -100].tolist()


def test_windows_of_four_from_ten_tokens_by_hand(tmp_path):
    batches = Batches(write_shard(tmp_path, 10), "train", batch_size=2, seq_len=4)
    assert (batches.windows, batches.steps, batches.tokens, batches.text_bytes) == (3, 2, 10, 77)
    inputs, targets = batches.in_order(0)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]], "a target is the token one further on"
    inputs, targets = batches.in_order(1)
    assert inputs.tolist() == [[8, 9999, 9999, 9999], [9999] * 4], "the rest is filled up with end of text"
    assert targets.tolist() == [[9, -100, -100, -100], [-100] * 4], "and what fills it up has no target"


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("count, seq_len, batch_size",
                         [(100, 7, 4), (99, 7, 5), (101, 10, 1), (11, 10, 3), (64, 1, 8)])
def test_every_token_but_the_first_is_a_target_once_an_epoch(tmp_path, count, seq_len, batch_size, dtype):
    batches = Batches(write_shard(tmp_path, count, dtype=dtype), "train", batch_size, seq_len)
    epochs = batch_size                                      # after B epochs, an epoch ends with a step
    steps = epochs * batches.windows // batch_size
    assert sorted(targets_of(batches, steps)) == sorted(list(range(1, count)) * epochs)
    assert targets_of(batches, batches.steps, "in_order") == list(range(1, count))


def test_targets_are_inputs_shifted_by_one(tmp_path):
    batches = Batches(write_shard(tmp_path, 1000), "train", 16, 32)
    for step in range(batches.steps):
        inputs, targets = batches.at(step)
        real = targets != -100
        assert torch.equal((inputs + 1)[real], targets[real])
        assert torch.equal(inputs[:, 1:][real[:, 1:]], targets[:, :-1][real[:, 1:]])


def test_a_batch_is_a_function_of_seed_and_step_alone(tmp_path):
    write_shard(tmp_path, 1000)
    one, other = (Batches(tmp_path, "train", 4, 10, seed=7) for _ in range(2))
    in_sequence = [one.at(step)[0] for step in range(60)]
    for step in random.Random(0).sample(range(60), 60):
        assert torch.equal(other.at(step)[0], in_sequence[step]), "a call changed what a later one returns"
    assert not torch.equal(Batches(tmp_path, "train", 4, 10, seed=8).at(0)[0], in_sequence[0])
    epoch = torch.cat(in_sequence[:25])                      # 100 windows
    assert not torch.equal(epoch, torch.cat(in_sequence[25:50])), "each epoch has an order of its own"
    assert not torch.equal(epoch.flatten(), epoch.flatten().sort().values), "the file's order is no shuffle"


def test_no_epoch_of_one_seed_has_the_order_of_an_epoch_of_another(tmp_path):
    write_shard(tmp_path, 1000)
    orders = {tuple(Batches(tmp_path, "train", 4, 10, seed=seed).order(epoch).tolist())
              for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9, "are seed and epoch added? Then runs of seeds 0, 1 and 2 are not independent"


def test_two_ranks_of_four_see_at_each_step_what_one_rank_of_eight_sees(tmp_path):
    write_shard(tmp_path, 1000)
    alone = Batches(tmp_path, "train", 8, 10)
    ranks = [Batches(tmp_path, "train", 4, 10, rank=rank, world_size=2) for rank in range(2)]
    for serve in ("at", "in_order"):
        for step in range(30):                               # over the end of an epoch, which has 100 windows
            for part in range(2):
                together = torch.cat([getattr(batches, serve)(step)[part] for batches in ranks])
                assert torch.equal(getattr(alone, serve)(step)[part], together)
    assert [batches.steps for batches in (alone, *ranks)] == [13, 13, 13], "every rank makes as many steps"


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_are_disjoint_and_cover_the_epoch(tmp_path, world_size):
    write_shard(tmp_path, 12 * 10 + 1)                       # 12 windows
    seen = [targets_of(Batches(tmp_path, "train", 1, 10, rank=rank, world_size=world_size), 12 // world_size)
            for rank in range(world_size)]
    assert sorted(sum(seen, [])) == list(range(1, 121))


def test_a_split_shorter_than_a_window_is_an_error_for_training_alone(tmp_path):
    with pytest.raises(UserError, match=r"10 tokens, --seq_len 10 needs 11.*smaller --seq_len"):
        Batches(write_shard(tmp_path, 10), "train", 1, 10)
    Batches(write_shard(tmp_path, 11), "train", 1, 10)
    assert targets_of(Batches(write_shard(tmp_path, 2, "val"), "val", 1, 10), 1) == [1]
    for count in (0, 1):
        with pytest.raises(UserError, match=f"{count} tokens"):
            Batches(write_shard(tmp_path, count, "val"), "val", 1, 10)


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name, change, complaint", [
    ("train.bin", lambda content: content[:-1], "199 bytes, but meta.json says 200"),
    ("train.bin", lambda content: content + b"\0\0", "202 bytes"),
    ("train.bin", lambda content: content[:50] + bytes([content[50] ^ 1]) + content[51:], "sha256"),
    ("meta.json", lambda content: content[:40], "meta.json is damaged"),
    ("meta.json", lambda content: b"[]", "meta.json is damaged"),
    ("meta.json", lambda content: content.replace(b"uint16", b"uint32"), "100 tokens of uint32"),
    ("meta.json", lambda content: content.replace(b"uint16", b"int8"), "int8")])
def test_a_damaged_shard_is_refused_with_its_name(tmp_path, name, change, complaint):
    damage(write_shard(tmp_path, 100), name, change)
    with pytest.raises(UserError, match=name) as error:
        Batches(tmp_path, "train", 1, 10)
    assert complaint in str(error.value) and "--overwrite" in str(error.value)


def test_a_missing_shard_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"python data\.py --out .*none"):
        Batches(tmp_path / "none", "train", 1, 10)
    write_shard(tmp_path, 100)
    (tmp_path / "train.bin").unlink()
    with pytest.raises(UserError, match=r"train\.bin is missing"):
        Batches(tmp_path, "train", 1, 10)


def test_the_checksum_can_be_left_to_another_process(tmp_path):
    damage(write_shard(tmp_path, 100), "train.bin", lambda content: content[:-2] + b"\7\0")
    assert Batches(tmp_path, "train", 1, 10, verify=False).tokens == 100


@pytest.mark.parametrize("stride", [1, 3, 7, 16])
def test_overlapping_windows_make_every_token_a_target_once_after_enough_others(tmp_path, stride):
    out = tmp_path / "shards"
    data.prepare(data.Settings(input=(write_texts(tmp_path),), out=str(out), vocab_size=260,
                               val_fraction=0.3, workers=1))
    batches = data.Batches(out, "val", 3, 16, stride=stride)
    seen = []
    for step in range(batches.steps):
        for inputs, targets in zip(*batches.in_order(step)):
            for t in (targets != data.IGNORE).nonzero().flatten().tolist():
                assert inputs[t] == batches.data[len(seen)] and targets[t] == batches.data[len(seen) + 1]
                assert t >= min(len(seen), 16 - stride), "a target with less context than promised"
                seen.append(int(targets[t]))
    assert seen == batches.data[1:].tolist()


def write_texts(folder):
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"text {number} " * 5, encoding="utf-8")
    return str(folder)


# ---- 5. Replay: the shard of the new corpus counts from 0, that of the old one from 5000


def write_corpora(folder, new=1000, old=400):
    """Folders of a new and an old corpus, whose tokens tell which it is: from 5000 on it is old."""
    for name, count in (("new", new), ("old", old)):
        (folder / name).mkdir()
        write_shard(folder / name, count)
    content = np.arange(5000, 5000 + old).astype("uint16").tobytes()
    (folder / "old" / "train.bin").write_bytes(content)
    meta = json.loads((folder / "old" / "meta.json").read_text(encoding="utf-8"))
    meta["train"]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "old" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def replay(folder, share, batch_size=4, seq_len=9, rank=0, world_size=1):
    return Replay(*(Batches(folder / name, "train", batch_size, seq_len, 0, rank, world_size)
                    for name in ("new", "old")), share)


def first_tokens(batches, steps):
    return torch.cat([batches.at(step)[0][:, 0] for step in range(steps)])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.29, 1 / 3, 0.5, 0.95])
def test_of_the_first_n_windows_the_share_is_old_for_every_n(tmp_path, share):
    is_old = first_tokens(replay(write_corpora(tmp_path), share), 200) >= 5000
    for n, count in enumerate(is_old.cumsum(0).tolist(), start=1):
        assert -1e-9 < n * share - count < 1 + 1e-9, f"{count} of {n} at share {share}"  # n * share rounds
    assert is_old.sum() == int(800 * share + 1e-9)


def test_which_windows_are_old_by_hand(tmp_path):
    is_old = first_tokens(replay(write_corpora(tmp_path), 0.4), 3) >= 5000
    # floor(0.4 n) for n = 0, 1, …: 0 0 0 1 1 2 | 2 2 3 3 4 …; a window is old where it rises
    assert is_old.tolist() == [False, False, True, False, True, False, False, True, False, True, False, False]


def test_both_corpora_come_in_their_own_order_without_gaps(tmp_path):
    mixed = replay(write_corpora(tmp_path), 0.3)
    new, old = mixed.batches, mixed.old
    windows = [row for step in range(200) for row in zip(*mixed.at(step))]
    is_old = [bool(inputs[0] >= 5000) for inputs, _ in windows]
    for batches, expected in ((new, False), (old, True)):
        own = [row for row, from_old in zip(windows, is_old) if from_old == expected]
        plain = [row for step in range(200) for row in zip(*batches.at(step))]
        assert len(own) in (240, 560)
        for (inputs, targets), (same_inputs, same_targets) in zip(own, plain):
            assert torch.equal(inputs, same_inputs) and torch.equal(targets, same_targets)
    for batches, expected in ((new, False), (old, True)):
        starts = [int(inputs[0]) for (inputs, _), from_old in zip(windows, is_old) if from_old == expected]
        for epoch in range(len(starts) // batches.windows):
            part = starts[epoch * batches.windows:(epoch + 1) * batches.windows]
            assert len(set(part)) == batches.windows, "a window came twice in an epoch"


def test_a_share_of_0_is_the_new_corpus_alone(tmp_path):
    mixed = replay(write_corpora(tmp_path), 0.0)
    for step in range(60):
        for part, same in zip(mixed.at(step), mixed.batches.at(step)):
            assert torch.equal(part, same) and part.dtype == torch.int64


def test_two_ranks_of_four_see_the_mixture_that_one_rank_of_eight_sees(tmp_path):
    write_corpora(tmp_path)
    alone, ranks = replay(tmp_path, 0.3, 8), [replay(tmp_path, 0.3, 4, 9, rank, 2) for rank in range(2)]
    for step in random.Random(0).sample(range(60), 60):
        for part in range(2):
            assert torch.equal(alone.at(step)[part], torch.cat([rank.at(step)[part] for rank in ranks]))


def test_what_is_known_of_the_batches_is_known_of_the_mixture(tmp_path):
    mixed = replay(write_corpora(tmp_path), 0.3)
    for name in ("tokens", "text_bytes", "windows", "meta", "data", "seq_len"):
        assert getattr(mixed, name) is getattr(mixed.batches, name)
    assert not hasattr(mixed, "no_such_thing")
    assert torch.equal(copy.copy(mixed).at(3)[0], mixed.at(3)[0])


def test_corpora_of_different_tokenizers_are_refused(tmp_path):
    write_corpora(tmp_path)
    for name in ("new", "old"):
        damage(tmp_path / name, "meta.json",
               lambda content: content[:-1] + f', "tokenizer": "{name}"}}'.encode())
    with pytest.raises(UserError, match=r"new and .*old were .* python data\.py --tokenizer .*old$"):
        replay(tmp_path, 0.1)
