"""sample.py as its user meets it: a folder, a prompt, text as it comes, one line for each mistake.

Two models: one with random weights; and a parrot, whose every token has one successor, so its text is known.
"""
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
import sample
from bpe import Tokenizer
from checkpoint import save_model
from model import ModelConfig, Transformer

SCRIPT = Path(sample.__file__).resolve()
TEXT = "the cat sat on the mat; 天地玄黄，宇宙洪荒。 " * 5
SAYING = "é😀\n"  # two, four and one bytes, no byte twice


def tiny_model(vocab_size, dim=32):
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size, dim=dim, n_layers=1, n_heads=2, ffn_dim=32, max_seq_len=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, in a folder with a space and Chinese characters in its name."""
    tokenizer = Tokenizer.train([TEXT], 280, ["<|endoftext|>"], workers=1)
    model = tiny_model(280)
    torch.nn.init.normal_(model.lm_head.weight)
    path = tmp_path_factory.mktemp("models") / "a model 模型"
    save_model(model, tokenizer, path)
    return path


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A model that says SAYING, byte by byte, after the end-of-text token, and then end-of-text again.

    An untrained block changes nothing, so the head sees the embedding, and answers the next of the cycle.
    """
    tokenizer = Tokenizer([], ["<|endoftext|>"])
    cycle = [256, *SAYING.encode()]
    model = tiny_model(257, dim=128)
    with torch.no_grad():
        for token, successor in zip(cycle, cycle[1:] + cycle[:1]):
            model.lm_head.weight[successor] = model.model.embed_tokens.weight[token]
    path = tmp_path_factory.mktemp("models") / "parrot"
    save_model(model, tokenizer, path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of sample.py, in this process: importing torch is slow.

    In fp32, of which nothing is said, unless the arguments say otherwise."""
    def run(*arguments):
        precision = [] if "--precision" in arguments else ["--precision", "fp32"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments), *precision])
        code = 0
        try:
            config.run(sample.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


def start(*arguments, **settings):
    """sample.py as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", **settings}
    command = [sys.executable, SCRIPT, *map(str, arguments), "--precision", "fp32"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def copy_with(folder, target, **files):
    """A copy of a model folder in which some JSON files hold something else. None: the file is missing."""
    shutil.copytree(folder, target)
    for name, content in files.items():
        path = target / f"{name}.json"
        path.unlink()
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return target


# As a user


def test_a_user_gets_the_prompt_and_its_continuation_from_any_place_and_into_a_pipe(folder, tmp_path):
    prompt_file = tmp_path / "提示 file.txt"
    prompt_file.write_text("天地\nthe ", encoding="utf-8")
    process = start("--model", folder, "--prompt_file", prompt_file, "--max_new_tokens", 10)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.decode("utf-8").replace("\r\n", "\n").startswith("天地\nthe ")
    assert len(out) > len("天地\nthe \n".encode())


def test_who_reads_no_further_sees_no_traceback(folder):
    """As in `python sample.py … | head -c 1`."""
    process = start("--model", folder, "--prompt", "the", "--num_samples", 200)
    assert process.stdout.read(1) == b"-"
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 2
    assert "Traceback" not in err and "Exception" not in err and err.count("\n") == 1


def test_a_terminal_that_cannot_show_a_character_gets_its_escape(monkeypatch, run, parrot):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run("--model", parrot, "--temperature", 0)[0] == 0
    assert terminal.buffer.getvalue() == rb"\xe9\U0001f600" + b"\n\n"


# What is said


def test_an_empty_prompt_begins_a_document_and_the_end_of_text_ends_it(run, parrot):
    assert run("--model", parrot, "--temperature", 0) == (0, SAYING + "\n", "")


def test_a_prompt_is_continued(run, parrot):
    assert run("--model", parrot, "--temperature", 0, "--prompt", "é") == (0, SAYING + "\n", "")


def test_a_prompt_may_come_from_a_file_with_the_mark_and_line_ends_of_windows(run, parrot, tmp_path):
    path = tmp_path / "prompt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\xc3\xa9")
    code, out, err = run("--model", parrot, "--temperature", 0, "--prompt_file", path)
    assert (code, out, err) == (0, "one\n" + SAYING + "\n", "")


def test_an_empty_file_is_an_empty_prompt(run, parrot, tmp_path):
    path = tmp_path / "prompt"
    path.touch()
    assert run("--model", parrot, "--temperature", 0, "--prompt_file", path) == (0, SAYING + "\n", "")


def test_the_number_of_new_tokens_is_bounded_by_the_setting_and_by_the_context(run, parrot):
    _, out, _ = run("--model", parrot, "--temperature", 0, "--max_new_tokens", 2)
    assert out == "é\n"
    prompt = "é😀" * 10 + "é"  # 62 tokens of the context's 64
    _, out, _ = run("--model", parrot, "--temperature", 0, "--max_new_tokens", 10 ** 9, "--prompt", prompt)
    assert out == prompt + "\ufffd\n", "two tokens have room beside the 62, and are half of the smiley"


def test_the_same_seed_gives_the_same_text_and_another_seed_another(run, folder):
    first, again, other = (run("--model", folder, "--prompt", "the", "--seed", seed) for seed in (1, 1, 2))
    assert first == again and first[0] == 0
    assert first != other


def test_samples_are_numbered_and_differ_unless_the_temperature_is_zero(run, folder):
    def samples(temperature):
        _, out, _ = run("--model", folder, "--prompt", "cat", "--temperature", temperature, "--num_samples", 2)
        first, second = out.removeprefix("--- sample 1\n").split("--- sample 2\n")
        assert first.startswith("cat") and second.startswith("cat")
        return first, second
    first, second = samples(1)
    assert first != second
    first, second = samples(0)
    assert first == second


@pytest.mark.parametrize("files", [
    dict(generation_config={"eos_token_id": 0xF0}),  # first byte of the smiley
    dict(generation_config={"eos_token_id": [256, 0xF0]}),
    dict(generation_config={}, config={"eos_token_id": 0xF0}),  # no word there: config.json's counts
    dict(generation_config=None, config={"eos_token_id": [0xF0, 256]}),
    dict(generation_config={"eos_token_id": 0xF0}, config={"eos_token_id": 256}),  # it goes first
], ids=str)
def test_generation_stops_at_each_end_token_that_the_folder_names(run, parrot, tmp_path, files):
    if "config" in files:
        content = json.loads((parrot / "config.json").read_text(encoding="utf-8"))
        files = {**files, "config": {**content, **files["config"]}}
    model = copy_with(parrot, tmp_path / "copy", **files)
    assert run("--model", model, "--temperature", 0, "--prompt", "é") == (0, "é\n", "")


def test_no_prompt_is_the_end_of_text_token_but_a_prompt_that_spells_it_is_ordinary_text(monkeypatch, run, parrot):
    prompts = []
    monkeypatch.setattr(sample, "new_ids", lambda _, draft, prompt, *rest: prompts.append(prompt) or iter([]))
    assert run("--model", parrot) == (0, "\n", "")
    assert run("--model", parrot, "--prompt", "<|endoftext|>") == (0, "<|endoftext|>\n", "")
    assert prompts == [[256], list(b"<|endoftext|>")]


# Precision, the first token, windows and guesses


def test_precision_auto_is_as_training_chooses_and_is_said_once(monkeypatch, run, parrot):
    def new_ids(model, *_):
        seen.append(model.lm_head.weight.dtype)
        return iter([])
    monkeypatch.setattr(sample, "new_ids", new_ids)
    for chosen, dtype, said in ((("bf16", "the CPU has it"), torch.bfloat16, "cpu, bf16: the CPU has it\n"),
                                (("fp16", "scaled"), torch.float32, "cpu, fp32: bf16 does not pay here\n"),
                                (("fp32", "so"), torch.float32, "cpu, fp32: bf16 does not pay here\n")):
        monkeypatch.setattr(sample, "choose_precision", lambda wanted, device: chosen)
        seen = []
        _, _, err = run("--model", parrot, "--device", "cpu", "--precision", "auto", "--num_samples", 2)
        assert (seen, err) == ([dtype] * 2, said)


def test_a_bf16_model_says_the_same(run, parrot):
    assert run("--model", parrot, "--temperature", 0, "--precision", "bf16") == (0, SAYING + "\n", "")


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                                                     {"Sequence": {"id": "A", "type_id": 0}}]}
NO_TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}


@pytest.mark.parametrize("settings, post_processor, first", [
    (None, None, False),
    ({}, None, False),
    ({"add_bos_token": True, "bos_token": "<|endoftext|>"}, None, True),
    ({"add_bos_token": True, "bos_token": {"content": "<|endoftext|>"}}, None, True),
    ({"add_bos_token": True, "bos_token": None}, None, False),
    (None, TEMPLATE, True),
    ({"add_bos_token": None}, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}, True),
    ({"add_bos_token": False, "bos_token": "<|endoftext|>"}, TEMPLATE, False),  # what is said goes first
    ({}, NO_TEMPLATE, False),
    ({}, {"type": "ByteLevel"}, False),
], ids=str)
def test_the_first_token_that_the_folder_asks_for_stands_before_the_prompt(monkeypatch, run, parrot, tmp_path,
                                                                            settings, post_processor, first):
    model = shutil.copytree(parrot, tmp_path / "copy")
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = post_processor
    (model / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (model / "tokenizer_config.json").unlink(missing_ok=True)
    if settings is not None:
        (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    prompts = []
    monkeypatch.setattr(sample, "new_ids", lambda _, draft, prompt, *rest: prompts.append(prompt) or iter([]))
    said = f"<|endoftext|> stands before the prompt, as {model} has it\n" if first else ""
    for text in ("ab", ""):
        assert run("--model", model, "--prompt", text) == (0, text + "\n", said)
    assert prompts == ([[256, 97, 98], [256]] if first else [[97, 98], [256]])


def test_a_first_token_that_the_tokenizer_does_not_know_is_refused(run, parrot, tmp_path):
    model = copy_with(parrot, tmp_path / "copy")
    content = {"add_bos_token": True, "bos_token": "<s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    code, out, err = run("--model", model, "--prompt", "a")
    assert (code, out, err.count("\n")) == (2, "", 1) and "puts '<s>' before every text, but its" in err


def test_with_a_window_a_text_outgrows_the_context(run, parrot):
    arguments = ("--model", parrot, "--temperature", 0, "--window", 16, "--max_new_tokens", 300)
    code, out, err = run(*arguments, "--prompt", "a " * 50 + "é")  # 102 tokens; the context has 64
    assert (code, out, err) == (0, "a " * 50 + SAYING + "\n", "")
    model, drawn = tiny_model(10), 0
    model.config.sliding_window, model.config.attention_sinks = 16, 4
    for _ in sample.new_ids(model, None, [1], set(), sample.Settings(max_new_tokens=300), torch.Generator()):
        drawn += 1
    assert drawn == 300


def test_guesses_change_nothing_that_is_said(run, parrot, folder):
    greedy = ("--model", folder, "--prompt", "the", "--temperature", 0)
    plain = run(*greedy)
    assert plain[0] == 0
    for draft in ([], ["--draft", folder]):
        assert run(*greedy, "--speculate", 3, *draft) == plain
    code, out, err = run("--model", folder, "--prompt", "the", "--speculate", 3, "--draft", parrot)
    assert (code, out, err.count("\n")) == (2, "", 1) and "has another tokenizer than" in err


# As it comes


def test_each_character_is_shown_as_soon_as_its_last_byte_is_drawn_and_never_broken(monkeypatch, run, parrot):
    class Terminal(io.StringIO):
        shown = ""

        def flush(self):
            self.shown = self.getvalue()
    terminal, seen = Terminal(), []

    def stream(*_, **__):
        for byte in "é😀天a".encode():
            yield torch.tensor([byte]), None
            seen.append(terminal.shown)  # what the reader sees by the time the next token is asked for
    monkeypatch.setattr(sample, "generate_stream", stream)
    monkeypatch.setattr(sys, "stdout", terminal)
    run("--model", parrot, "--prompt", "> ")
    assert seen == ["> ", "> é", "> é", "> é", "> é", "> é😀", "> é😀", "> é😀", "> é😀天", "> é😀天a"]
    assert "\ufffd" not in terminal.getvalue()


def test_new_ids_come_one_by_one_without_the_one_that_ends_them(monkeypatch):
    drawn = []

    def stream(model, prompts, length, *_, **__):
        assert (prompts, length) == ([[1, 2]], 62)
        for token in (5, 6, 7, 8):
            drawn.append(token)
            yield torch.tensor([token]), None
    monkeypatch.setattr(sample, "generate_stream", stream)
    ids = sample.new_ids(tiny_model(10), None, [1, 2], {7}, sample.Settings(), None)
    assert next(ids) == 5 and drawn == [5], "tokens must not be drawn before they are asked for"
    assert list(ids) == [6] and drawn == [5, 6, 7]


# Mistakes: one line, exit code 2, and nothing printed before it


@pytest.mark.parametrize("arguments, message", [
    (["--temperature", "-1"], "temperature -1.0 is out of range; 0 is greedy"),
    (["--temperature", "nan"], "is not a finite number"),
    (["--temperature", "hot"], "--temperature: 'hot' is not a number"),
    (["--top_k", "0"], "top_k 0 is out of range"),
    (["--top_p", "0"], "top_p 0.0 is out of range"),
    (["--top_p", "1.1"], "top_p 1.1 is out of range"),
    (["--min_p", "1.1"], "min_p 1.1 is out of range"),
    (["--repetition_penalty", "0"], "repetition_penalty 0.0 is out of range"),
    (["--speculate", "-1"], "--speculate -1 is out of range"),
    (["--draft", "a"], "--draft is to guess, but --speculate is 0"),
    (["--window", "0"], "--window 0 is out of range"),
    (["--sinks", "-1"], "--sinks -1 is out of range"),
    (["--window", "61", "--prompt", "x" * 64], "the prompt has 64 tokens, but this model reads at most 64"),
    (["--window", "16", "--speculate", "2", "--prompt", "a"], "be taken back from a window of 16 tokens"),
    (["--max_new_tokens", "0"], "--max_new_tokens 0 is out of range"),
    (["--num_samples", "0"], "--num_samples 0 is out of range"),
    (["--seed", "99999999999999999999"], "--seed 99999999999999999999 is out of range"),
    (["--seed", "-1"], "--seed -1 is out of range"),
    (["--prompt", "a", "--prompt_file", "b"], "--prompt and --prompt_file are both given"),
    (["--prompt", "two", "words"], "unexpected word 'words' after --prompt two"),
    (["--promt", "a"], "unknown flag --promt; did you mean --prompt?"),
    (["--device", "abacus"], "is not one of auto, cpu, cuda, mps"),
    (["--prompt", "word " * 100], "tokens, but this model reads at most 64 with the new ones; shorten it"),
    (["--prompt", "x" * 64], "the prompt has 64 tokens, but this model reads at most 64"),
    (["--prompt_file", "no such file"], "error: no such file: "),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_mistake_ends_in_one_line(run, parrot, arguments, message):
    code, out, err = run("--model", parrot, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_prompt_file_that_is_no_text_or_a_folder_is_refused(run, parrot, tmp_path):
    (tmp_path / "latin").write_bytes("Zürich".encode("latin-1"))
    for path, message in ((tmp_path / "latin", "latin is not UTF-8 at byte 1"), (tmp_path, str(tmp_path))):
        code, out, err = run("--model", parrot, "--prompt_file", path)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and message in err


@pytest.mark.parametrize("missing, message", [
    ("", "there is no model folder"),
    ("config.json", "has no config.json"),
    ("model.safetensors", "has no model.safetensors"),
    ("tokenizer.json", "has no tokenizer.json"),
])
def test_a_folder_that_lacks_something_is_refused(run, parrot, tmp_path, missing, message):
    model = shutil.copytree(parrot, tmp_path / "模型 copy")
    shutil.rmtree(model) if missing == "" else (model / missing).unlink()
    code, out, err = run("--model", model, "--prompt", "a")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err and str(model) in err


@pytest.mark.parametrize("content, message", [
    ("{", "generation_config.json is damaged"),
    ("[]", "generation_config.json is damaged"),
    ({"eos_token_id": "<|endoftext|>"}, "eos_token_id '<|endoftext|>' is not of this model's ids, 0 to 256"),
    ({"eos_token_id": [256, 257]}, "eos_token_id [256, 257] is not of this model's ids, 0 to 256"),
    ({"eos_token_id": []}, "names no end-of-text token to begin a document with; pass --prompt"),
], ids=str)
def test_a_folder_that_names_no_good_end_token_is_refused(run, parrot, tmp_path, content, message):
    code, out, err = run("--model", copy_with(parrot, tmp_path / "copy", generation_config=content))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
