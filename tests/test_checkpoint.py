"""checkpoint.py, tensor_files.py: against safetensors and transformers; damaged and killed."""
import builtins
import errno
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import checkpoint
import families
from bpe import Tokenizer
from checkpoint import load_model, load_state, read_chat_template, save_model, save_state
from config import UserError
from model import ModelConfig, Transformer
from tensor_files import DTYPES, read_header, read_tensors, write_tensors

SAFE_NAMES = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}


def bits(tensors):
    """The bytes of tensors: what must be equal, for nan and -0.0 too."""
    return {name: (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
            for name, tensor in tensors.items()}


def some_tensor(dtype, shape):
    size = math.prod(shape) * dtype.itemsize
    generator, high = torch.Generator().manual_seed(0), 2 if dtype is torch.bool else 256
    data = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def zoo():
    """Every type in the shapes that go wrong: no dimension, no element, odd sizes, ones."""
    return {f"{name} {list(shape)} 张量": some_tensor(dtype, shape) for name, dtype in DTYPES.items()
            for shape in ((), (0,), (3, 0, 2), (1,), (3, 5), (2, 1, 3))}


# Tensors


def test_a_file_is_eight_bytes_of_length_a_json_header_and_raw_bytes(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.tensor([1.0, -2.0])})
    content = (tmp_path / "x").read_bytes()
    length, = struct.unpack("<Q", content[:8])
    assert json.loads(content[8:8 + length]) == {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    assert content[8 + length:] == struct.pack("<ff", 1.0, -2.0)
    assert length % 8 == 0, "the data must begin at a multiple of 8"


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    write_tensors(tmp_path / "x", zoo(), metadata={"format": "pt", "为": "什么"})
    read = read_tensors(tmp_path / "x")
    assert bits(read) == bits(zoo())
    assert read_header(tmp_path / "x")[1] == {"format": "pt", "为": "什么"}


def test_the_safetensors_package_reads_what_we_write(tmp_path):
    write_tensors(tmp_path / "x", zoo(), metadata={"format": "pt"})
    wanted = {name: tensor for name, tensor in zoo().items() if tensor.dtype in SAFE_NAMES}
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        assert set(file.keys()) == set(zoo()) and file.metadata() == {"format": "pt"}
        assert bits({name: file.get_tensor(name) for name in wanted}) == bits(wanted)


def test_we_read_what_the_safetensors_package_writes(tmp_path):
    tensors = {name: tensor for name, tensor in zoo().items() if tensor.dtype in SAFE_NAMES}
    safetensors.torch.save_file(tensors, tmp_path / "x", metadata={"a": "b"})
    read = read_tensors(tmp_path / "x")
    assert bits(read) == bits(tensors)
    assert read_header(tmp_path / "x")[1] == {"a": "b"}


def test_every_type_of_the_safetensors_package_is_known():
    assert safetensors.torch._TYPES.items() <= DTYPES.items()


def test_views_transposed_strided_and_with_gradients_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.t(), "s": base[1:, ::2], "e": torch.ones(1).expand(3, 2),
               "p": torch.nn.Parameter(base), "c": torch.tensor([1 + 2j], dtype=torch.complex64).conj()}
    write_tensors(tmp_path / "x", tensors)
    for name, tensor in read_tensors(tmp_path / "x").items():
        assert torch.equal(tensor, tensors[name]), name


def test_no_tensors_at_all_is_a_file_too(tmp_path):
    write_tensors(tmp_path / "x", {})
    assert read_tensors(tmp_path / "x") == {} == safetensors.torch.load_file(tmp_path / "x")


def test_each_tensor_lies_at_a_multiple_of_its_width(tmp_path):
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(2, dtype=torch.float64)}
    write_tensors(tmp_path / "x", tensors)
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in read_header(tmp_path / "x")[0].values())


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """Values are asked for only when their turn comes; before that, shape and type must do."""
    alive = []

    class Lazy:
        dtype, shape = torch.float32, (2,)

        def detach(self):
            assert not any(tensor() is not None for tensor in alive), "an earlier tensor is still held"
            tensor = torch.ones(2)
            alive.append(weakref.ref(tensor))
            return tensor
    write_tensors(tmp_path / "x", {"a": Lazy(), "b": Lazy()})
    assert torch.equal(read_tensors(tmp_path / "x")["b"], torch.ones(2))


def file_of(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("header, data, message", [
    ({"a": entry()}, b"123", "its header speaks of"),
    ({"a": entry()}, b"12345", "its header speaks of"),
    ({"a": entry(), "b": entry()}, b"1234", "tensor b begins at byte"),
    ({"a": entry(offsets=(4, 8))}, b"12345678", "tensor a begins at byte"),
    ({"a": entry(offsets=(0, 8))}, b"12345678", r"tensor a, F32 \[1\], cannot take bytes 0 to 8"),
    ({"a": entry(offsets=(4, 0))}, b"1234", "cannot take bytes 4 to 0"),
    ({"a": entry(offsets=(-4, 0))}, b"", "cannot take bytes -4 to 0"),
    ({"a": entry(shape=(2**62,), offsets=(0, 2**64))}, b"", "its header speaks of"),
    ({"a": entry(shape=(2**62, 4), offsets=(0, 4))}, b"1234", "tensor a cannot have the shape"),
    ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, b"", "tensor a cannot have the shape"),
    ({"a": entry(shape=(-1,), offsets=(0, -4))}, b"", "tensor a cannot have the shape"),
    ({"a": entry(shape=(1.0,))}, b"1234", "tensor a cannot have the shape"),
    ({"a": entry(shape=[1] * 65)}, b"1234", "tensor a cannot have the shape"),
    ({"a": entry(dtype="F31")}, b"1234", "tensor a is of type F31, which is none of F64 F32"),
    ({"a": {"dtype": "F32"}}, b"", "the header's entry for tensor a is {'dtype': 'F32'}"),
    ({"a": [1]}, b"", r"the header's entry for tensor a is \[1\]"),
    ({"a": entry(offsets=("0", "4"))}, b"1234", "the header's entry for tensor a"),
    (b'{"a": 1, "a": 2}', b"", "'a' stands twice in one object"),
    (b"[]", b"", "its header is not a JSON object"),
    (b'{"a"', b"", "is damaged: "),
    (b"\xff\xff", b"", "is damaged: "),
    (b"[" * 100_000, b"", "is damaged: "),
])
def test_a_header_that_does_not_fit_its_file_is_refused_by_name(tmp_path, header, data, message):
    path = file_of(tmp_path / "a file", header, data)
    with pytest.raises(UserError, match=message) as error:
        read_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("length", [2, 2**32, 2**63, 2**64 - 1])
def test_a_huge_header_length_takes_no_memory(tmp_path, length):
    path = file_of(tmp_path / "x", b"{}", b"", length)
    if length == 2:
        assert read_tensors(path) == {}
    else:
        with pytest.raises(UserError, match=f"a header of {length} bytes in a file of 10"):
            read_tensors(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int8)})
    content = (tmp_path / "x").read_bytes()
    for size in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(UserError, match="cut"):
            read_tensors(tmp_path / "cut")


def test_any_flipped_bit_of_a_header_gives_an_error_or_tensors_never_a_crash(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int8)})
    content = (tmp_path / "x").read_bytes()
    length, = struct.unpack("<Q", content[:8])
    for position in range(0, (8 + length) * 8, 3):  # 3 and 8 share no factor: every bit occurs
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        (tmp_path / "flipped").write_bytes(flipped)
        try:
            read_tensors(tmp_path / "flipped")
        except UserError:
            pass


# Models


def random_model(**settings):
    """A small model with no zeros where training starts with zeros: each weight must matter to the logits."""
    small = {"vocab_size": 320, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48,
             "max_seq_len": 64}
    model = Transformer(ModelConfig(**{**small, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    text = "def hello(name):\n    return 'hello ' + name  # größer 大\n" * 5
    return Tokenizer.train([text], 290, special_tokens=("<|endoftext|>",))


IDS = torch.arange(40).reshape(2, 20) * 7 % 320
KINDS = [{}, {"tie_embeddings": True}, {"qk_norm": True},
         {"qk_norm": True, "tie_embeddings": True, "head_dim": 16},
         {"attention_bias": True, "rope_theta": 500000.0, "norm_eps": 1e-5}, {"n_kv_heads": None}]


@torch.no_grad()
def difference(ours, theirs):
    return (ours(IDS) - theirs(IDS).logits).abs().max().item()


@pytest.mark.parametrize("settings", KINDS)
def test_transformers_opens_what_we_save_with_equal_logits_and_ids(tmp_path, tokenizer, settings):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = random_model(**settings)
    save_model(model, tokenizer, tmp_path / "模型 1")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "模型 1", output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if settings.get("qk_norm") else "LlamaForCausalLM")
    # 1e-5: float32 rounds at 1e-7 of logits of size ~10, the sums are taken in another order
    assert difference(model, theirs.eval()) < 1e-5
    assert theirs.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    end = tokenizer.special_tokens["<|endoftext|>"]
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == end
    opened = AutoTokenizer.from_pretrained(tmp_path / "模型 1")
    for text in ("def hello(x): return 'größer 大'", "  \n\n a", "", "naïve 😀 ~"):
        assert opened(text)["input_ids"] == tokenizer.encode(text)
        assert opened.decode(tokenizer.encode(text)) == text
    assert opened.eos_token == "<|endoftext|>" and opened.model_max_length == 64


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("settings", KINDS)
def test_we_open_what_transformers_saves_with_equal_logits(tmp_path, settings, shards):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    llama, qwen = (LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
    Config, Model = qwen if settings.get("qk_norm") else llama
    ours = random_model(**settings)
    content = families.to_hugging_face(ours.config)
    del content["rope_theta"], content["rope_scaling"]  # as transformers 5 does
    theirs = Model(Config(**content)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path / "m", **({"max_shard_size": "20KB"} if shards else {}))
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == shards
    model, tokenizer = load_model(tmp_path / "m")
    assert tokenizer is None and not model.training
    assert difference(model, theirs) < 1e-5
    assert model.config == ours.config


@pytest.mark.parametrize("settings", KINDS)
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path, tokenizer, settings):
    model = random_model(**settings)
    save_model(model, tokenizer, tmp_path)
    loaded, tokenizer_again = load_model(tmp_path)
    assert loaded.config == model.config and tokenizer_again.fingerprint == tokenizer.fingerprint
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_tied_head_is_written_once_and_is_one_parameter_after_loading(tmp_path):
    save_model(random_model(tie_embeddings=True), None, tmp_path)
    assert "lm_head.weight" not in read_tensors(tmp_path / "model.safetensors")
    model, _ = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_type_is_the_readers_choice_and_recorded(tmp_path):
    from transformers import AutoModelForCausalLM
    save_model(random_model().to(torch.bfloat16), None, tmp_path)
    stored = read_tensors(tmp_path / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}
    assert next(load_model(tmp_path)[0].parameters()).dtype is torch.float32
    assert next(load_model(tmp_path, dtype=torch.bfloat16)[0].parameters()).dtype is torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype is torch.bfloat16


def test_what_an_old_llama_folder_holds_besides_is_passed_over(tmp_path):
    model = random_model()
    save_model(model, None, tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_tensors(tmp_path / "model.safetensors", tensors)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)[0](IDS), model(IDS))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize("changes, message", [
    ({"architectures": ["GPT2LMHeadModel"]}, "config.json: architecture 'GPT2LMHeadModel' is not supported"),
    ({"hidden_size": 0}, "config.json: hidden_size 0 is out of range"),
    ({"num_hidden_layers": 2 ** 26}, "has 21 tensors, too few for the 67108864 layers"),
    ({"vocab_size": 2 ** 26, "hidden_size": 2 ** 26}, r"config.json implies \[67108864, 67108864\]"),
    ({"intermediate_size": 50},
     r"model.layers.0.mlp.gate_proj.weight has shape \[48, 32\], but its config.json implies \[50, 32\]"),
    ({"num_hidden_layers": 3}, "lacks model.layers.2.*, .* and 6 more, which its config.json implies"),
    ({"num_hidden_layers": 1}, "has model.layers.1.* and 6 more, which its config.json does not imply"),
    ({"tie_word_embeddings": True}, "ties head and embedding, but those stored differ"),
])
def test_a_model_that_is_not_what_config_json_says_or_not_ours_is_one_line(tmp_path, changes, message):
    save_model(random_model(), None, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_from_a_model_folder_is_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match="there is no model folder .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no config.json"):
        load_model(tmp_path)
    save_model(random_model(), tokenizer, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        load_model(tmp_path)
    save_model(random_model(), tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        load_model(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="only as a pickle, pytorch_model.bin, .* get its model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match="lacks model-1.safetensors, which model.safetensors.index"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match="has no weight_map"):
        load_model(tmp_path)


def test_the_command_that_the_refusal_of_a_pickle_names_makes_the_folder_one_that_opens(tmp_path):
    """Run here without a shell: the code between its quotes."""
    model, folder = random_model(), tmp_path / "it's old"
    save_model(model, None, folder)
    os.remove(folder / "model.safetensors")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match='transformers is installed: python -c ".*"$') as error:
        load_model(folder)
    exec(str(error.value).split('python -c "')[1][:-1])
    with torch.no_grad():
        assert torch.equal(load_model(folder)[0](IDS), model(IDS))


def shards(folder):
    """A model in two files and an index; its tensors."""
    save_model(random_model(), None, folder)
    tensors = read_tensors(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    parts, index = [dict(list(tensors.items())[i::2]) for i in (0, 1)], {}
    for i, part in enumerate(parts):
        write_tensors(folder / f"model-{i}.safetensors", part)
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    return tensors, index


def write_index(folder, index):
    text = index if isinstance(index, str) else json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


HEAD = "lm_head.weight"


@pytest.mark.parametrize("change, message", [
    (lambda index: {**index, HEAD: "model-9.safetensors"}, "lacks model-9.safetensors, which model.safe"),
    (lambda index: {**index, HEAD: f"model-{1 - int(index[HEAD][6])}.safetensors"},
     "says that model-[01].safetensors holds lm_head.weight, but it does not"),
    (lambda index: {**index, "extra": "model-0.safetensors"}, "says that model-0.safetensors holds extra"),
    (lambda index: {}, "has no weight_map of tensors"), (lambda index: [1], "has no weight_map of tensors"),
    (lambda index: {**index, HEAD: 3}, "has no weight_map of tensors"),
    (lambda index: {**index, HEAD: "../model-0.safetensors"}, "lists '../model-0.safetensors', which is no"),
    (lambda index: {**index, HEAD: "/etc/model-0.safetensors"}, "lists '/etc/model-0.safetensors', which"),
    (lambda index: {**index, HEAD: "..\\model-0.safetensors"}, "which is no safetensors file of this folder"),
    (lambda index: {**index, HEAD: "C:model-0.safetensors"}, "which is no safetensors file of this folder"),
    (lambda index: {**index, HEAD: ".."}, "lists '..', which is no safetensors file of this folder"),
    (lambda index: {**index, HEAD: "model.bin"}, "lists 'model.bin', which is no safetensors file"),
    (lambda index: json.dumps({"weight_map": index}).replace('{"model', '{"lm_head.weight": "a", "model', 1),
     "'lm_head.weight' stands twice in one object"),
    (lambda index: "[]", "it is not a JSON object"), (lambda index: "{", "damaged")])
def test_an_index_that_is_not_of_its_folder_is_one_line(tmp_path, change, message):
    _, index = shards(tmp_path)
    write_index(tmp_path, index)
    assert load_model(tmp_path)[0].config.dim == 32, "the folder is in order before"
    write_index(tmp_path, change(index))
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_that_stands_in_two_files_is_refused(tmp_path):
    tensors, index = shards(tmp_path)
    write_index(tmp_path, index)
    for i in (0, 1):
        write_tensors(tmp_path / f"model-{i}.safetensors", tensors)
    with pytest.raises(UserError, match="twice, in model-0.safetensors and in model-1.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("how", ["cut", "longer", "empty"])
def test_a_model_file_cut_short_is_one_line_that_names_it(tmp_path, how):
    save_model(random_model(), None, tmp_path)
    damage(tmp_path / "model.safetensors", how)
    with pytest.raises(UserError, match="model.safetensors is (damaged|no safetensors file)") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [
    "[]", "null", "3", "{", "", '{"architectures": NaN}', "\ufeff{}", "[" * 10 ** 5,
    '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"])
def test_a_config_json_that_is_rubbish_is_one_line(tmp_path, content):
    save_model(random_model(), None, tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="config.json") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_a_bad_folder_ends_the_command_in_one_line_with_code_2(tmp_path):
    save_model(random_model(), None, tmp_path)
    edit(tmp_path, architectures=["GPT2LMHeadModel"])
    script = Path(checkpoint.__file__).with_name("sample.py")
    done = subprocess.run([sys.executable, script, "--model", tmp_path, "--device", "cpu"],
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]  # before it stands which device was chosen
    assert last.startswith("error: ") and "architecture 'GPT2LMHeadModel'" in last


PEAK = """
import resource, sys
import torch
import checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model, _ = checkpoint.load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes here only")
@pytest.mark.parametrize("stored, wanted", [("float32", "float32"), ("bfloat16", "float32")])
def test_loading_takes_the_memory_of_the_model_and_one_tensor(tmp_path, stored, wanted):
    config = ModelConfig(vocab_size=8192, dim=512, n_layers=8, n_heads=8, ffn_dim=2048, tie_embeddings=True)
    model = checkpoint.empty_model(config)
    checkpoint.write_json(tmp_path / "config.json", families.to_hugging_face(config))
    write_tensors(tmp_path / "model.safetensors", {  # the tied head, too
        name: torch.zeros(tensor.shape, dtype=getattr(torch, stored)) for name, tensor in
        model.state_dict().items()})
    numbers, largest = (f([p.numel() for p in model.parameters()]) for f in (sum, max))
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path, wanted], capture_output=True, text=True,
                          env=environment, check=True)
    sizes = [getattr(torch, name).itemsize for name in (stored, wanted)]
    # 8 MB: the allocator's remains, and modules imported late; there are 76 or 150 MB too many if pages of
    # the whole file stay
    assert int(done.stdout) < numbers * sizes[1] + largest * sum(sizes) + 8e6, "more than model and tensor"


# What belongs to a model's tokenizer


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}  \n{% endfor %}größer\n"


def test_a_chat_template_is_written_for_transformers_4_and_5_and_read_again(tmp_path, tokenizer):
    from transformers import AutoTokenizer
    save_model(random_model(), tokenizer, tmp_path, chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "größer?"}]
    expected = "<|user|>\ngrößer?  \ngrößer\n"
    chat = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert chat.rstrip("\n") == expected.rstrip("\n")  # Jinja takes the last end of line away
    content = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert content["chat_template"] == TEMPLATE
    assert read_chat_template(tmp_path) == TEMPLATE
    (tmp_path / "chat_template.jinja").unlink()
    assert read_chat_template(tmp_path) == TEMPLATE, "where only transformers 4 wrote it"


@pytest.mark.parametrize("content, template", [
    ({}, None), ({"chat_template": None}, None), ({"chat_template": "a"}, "a"),
    ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
    ({"chat_template": [{"name": "tool_use", "template": "t"}, 3]}, None)])
def test_a_chat_template_is_found_where_older_folders_keep_it(tmp_path, content, template):
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    assert read_chat_template(tmp_path) == template


def test_a_chat_template_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(UserError, match="chat_template.jinja is not UTF-8 at byte 0"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize("how", ["template", "flag"])
def test_what_a_folder_says_of_first_and_last_tokens_outlives_loading_and_saving(tmp_path, tokenizer, how):
    """Llama 3's: a first token before every text, an end of replies, and another stop beside it."""
    from transformers import AutoTokenizer
    special = tokenizer.with_special_tokens(["<|bos|>", "<|eot|>"])
    special.bos_token, special.eos_token = "<|bos|>", "<|eot|>"
    model, first, second = random_model(vocab_size=special.vocab_size), tmp_path / "a", tmp_path / "b"
    save_model(model, special, first)
    stops = [special.special_tokens[text] for text in ("<|eot|>", "<|endoftext|>")]
    (first / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    if how == "template":  # transformers 5 says it in tokenizer.json alone
        settings = json.loads((first / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings.pop("add_bos_token")
        (first / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded, read = load_model(first)
    assert (read.bos_token, read.eos_token, list(read.stop_ids)) == ("<|bos|>", "<|eot|>", stops)
    save_model(loaded, read, second)
    again = load_model(second)[1]
    assert (again.bos_token, again.eos_token, list(again.stop_ids)) == ("<|bos|>", "<|eot|>", stops)
    theirs = AutoTokenizer.from_pretrained(second)
    assert theirs("hello").input_ids == [special.special_tokens["<|bos|>"], *special.encode("hello")]
    assert theirs.eos_token == "<|eot|>" and special.encode("hello") == read.encode("hello")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_of_16_bits_or_more_are_refused(tmp_path, dtype):
    model = random_model()
    save_model(model, None, tmp_path)
    tensors = {name: x.to(dtype) if "up_proj" in name else x for name, x in model.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="up_proj.weight is of type .*; weights are F64, F32, F16 or BF16"):
        load_model(tmp_path)


def test_a_name_from_a_file_is_shown_in_one_line_and_without_escape_codes(tmp_path):
    model = random_model()
    save_model(model, None, tmp_path)
    tensors = {**model.state_dict(), "x\n\x1b[31m": torch.ones(1)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    assert str(error.value).isprintable() and r"x\n\x1b[31m" in str(error.value)


def test_a_chat_template_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(UserError, match="chat_template 3 is not a text"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"sliding_window": 8},
                                      {"attention_bias": True, "output_bias": False}])
def test_the_tokenizer_beside_any_family_opens_without_a_warning(tmp_path, tokenizer, settings, caplog):
    from transformers import AutoTokenizer
    from transformers.utils import logging
    if "sliding_window" in settings:  # a Mistral's tokenizer is looked at closely from 100,000 tokens on
        tokens = [bytes([i]) for i in range(256)] + [i.to_bytes(3, "big") for i in range(100_000)]
        tokenizer = Tokenizer([], ["<|endoftext|>"], vocab=dict(enumerate(tokens)))
        settings = {**settings, "vocab_size": tokenizer.vocab_size}
    save_model(random_model(**settings), tokenizer, tmp_path)
    logging.enable_propagation()
    opened = AutoTokenizer.from_pretrained(tmp_path)
    logging.disable_propagation()
    assert opened("größer 大 12345")["input_ids"] == tokenizer.encode("größer 大 12345")
    assert not caplog.records, caplog.text


def test_a_tokenizer_of_a_kind_that_cannot_be_read_is_none_and_a_line_says_why(tmp_path, capsys, tokenizer):
    save_model(random_model(), tokenizer, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["type"] = "Unigram"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert load_model(tmp_path)[1] is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "its model is Unigram" in said and "without a tokenizer" in said
    path.write_text("{")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        load_model(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tokenizer):
    save_model(random_model(vocab_size=280), tokenizer, tmp_path)
    with pytest.raises(UserError, match=f"tokenizer has {tokenizer.vocab_size} tokens, the model knows 280"):
        load_model(tmp_path)


def test_a_model_inside_something_else_or_with_something_else_inside_is_not_saved(tmp_path):
    model = random_model()
    with pytest.raises(AssertionError, match="save the Transformer, not the DataParallel"):
        save_model(torch.nn.DataParallel(model), None, tmp_path)
    model.lm_head.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match=r"the model has been changed \(lm_head.extra\)"):
        save_model(model, None, tmp_path)
    assert os.listdir(tmp_path) == []


# State

STATE = {"model": {"w": torch.arange(6.0).reshape(2, 3), "empty": torch.zeros(0)},
         "optimizer": {"w.m": torch.full((2, 3), 0.5), "step": torch.tensor(7)}}


def state_at(step):
    """Tensors and extra that tell which step they are of."""
    tensors = {"model": {"w": torch.full((4,), float(step))}, "optimizer": {"m": torch.tensor(step)}}
    return tensors, {"loss": step / 3}


def save_at(folder, step, **options):
    save_state(folder, step, *state_at(step), **options)


def check(result, step):
    tensors, extra = state_at(step)
    assert result is not None and result[0] == step and result[2] == extra
    for group in tensors:
        for name in tensors[group]:
            assert torch.equal(result[1][group][name], tensors[group][name])


def names(folder):
    return sorted(os.listdir(folder))


def test_a_state_comes_back_equal(tmp_path):
    extra = {"seed": 2**62, "lr": 1 / 3, "rng": [1, 2], "路径": "a b", "none": None, "inf": math.inf}
    save_state(tmp_path / "my run" / "state", 12, STATE, extra)
    step, tensors, extra_again = load_state(tmp_path / "my run" / "state")
    assert step == 12 and extra_again == extra
    assert {group: bits(named) for group, named in tensors.items()} == \
        {group: bits(named) for group, named in STATE.items()}


def test_where_no_state_is_none_is_loaded(tmp_path):
    assert load_state(tmp_path / "nowhere") is None and load_state(tmp_path) is None


def test_the_newest_state_is_loaded_and_the_last_two_are_kept(tmp_path):
    for step in (9, 10, 100):
        save_at(tmp_path, step)
    assert names(tmp_path) == ["step_00000010", "step_00000100"]
    check(load_state(tmp_path), 100)
    save_at(tmp_path, 10**8, keep=1)
    assert names(tmp_path) == ["step_100000000"]
    check(load_state(tmp_path), 10**8)
    os.rename(tmp_path / "step_100000000", tmp_path / "step_5")
    save_at(tmp_path, 7)
    assert names(tmp_path) == ["step_00000007", "step_5"], "steps are numbers, not text"


def test_the_same_step_can_be_saved_again(tmp_path):
    save_at(tmp_path, 1)
    save_at(tmp_path, 2)
    save_state(tmp_path, 2, *state_at(3))
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert load_state(tmp_path)[2] == {"loss": 1.0}


def test_who_goes_back_leaves_no_later_step_behind(tmp_path):
    for step in (1, 2, 3):
        save_at(tmp_path, step)
    save_at(tmp_path, 2, keep=2)
    check(load_state(tmp_path), 2)


def test_sha256sum_can_check_a_state_too(tmp_path):
    save_at(tmp_path, 1)
    lines = (tmp_path / "step_00000001" / "SHA256SUMS").read_text().splitlines()
    assert [line[64:] for line in lines] == ["  model.safetensors", "  optimizer.safetensors", "  state.json"]


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"]


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[:-5])
    elif how == "longer":
        path.write_bytes(content + b"\n1")
    elif how == "first line cut":
        path.write_bytes(content.partition(b"\n")[2] or b"\0" * len(content))
    else:
        content[int(len(content) * how)] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "longer", "first line cut", 0.0, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_is_passed_over_for_the_one_before_it_and_that_is_said(tmp_path, capsys, name, how):
    save_at(tmp_path, 1)
    save_at(tmp_path, 2)
    damage(tmp_path / "step_00000002" / name, how)
    check(load_state(tmp_path), 1)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.endswith("; step_00000001 is used instead\n")
    assert f"state {tmp_path / 'step_00000002'} is damaged (" in said


def test_every_flipped_bit_of_a_state_is_noticed(tmp_path):
    save_at(tmp_path, 1)
    state = tmp_path / "step_00000001"
    for name in FILES:
        content = (state / name).read_bytes()
        for position in range(0, len(content) * 8, 11):  # 11 and 8 share no factor: every bit occurs
            flipped = bytearray(content)
            flipped[position // 8] ^= 1 << position % 8
            (state / name).write_bytes(flipped)
            with pytest.raises(UserError, match="damaged"):
                load_state(tmp_path)
        (state / name).write_bytes(content)
    check(load_state(tmp_path), 1)


def test_where_all_states_are_damaged_nothing_is_made_up(tmp_path):
    for step in (1, 2):
        save_at(tmp_path, step)
        damage(tmp_path / f"step_{step:08d}" / "model.safetensors", 0.5)
    message = "step_00000002 is damaged .*step_00000001 is damaged .*there is no other"
    with pytest.raises(UserError, match=message) as error:
        load_state(tmp_path)
    assert "\n" not in str(error.value)


class Killed(BaseException):
    """Like kill -9: nothing after it may be counted on, so nothing on disk is done after it either."""


def dying_at(monkeypatch, n, error):
    """Let the n-th change to the disk (open, fsync, rename, remove …) raise; if killed, all later ones."""
    calls = 0

    def wrap(function, changes_disk=lambda *args, **kwargs: True):
        def wrapped(*args, **kwargs):
            nonlocal calls
            if changes_disk(*args, **kwargs):
                calls += 1
                if calls == n or calls > n and isinstance(error, Killed):
                    raise error
            return function(*args, **kwargs)
        return wrapped
    for name in ("replace", "mkdir", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    monkeypatch.setattr(builtins, "open", wrap(open, lambda path, mode="r", **_: "w" in mode))
    return lambda: calls


def each_death(tmp_path, monkeypatch, prepare, act, survives, error):
    """Run act(folder), dying at its 1st change to the disk, its 2nd, …, until it lives; checks each time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # power stays on here; waiting for disks is slow
    for n in range(1, 500):
        folder = tmp_path / str(n)
        prepare(folder)
        with pytest.MonkeyPatch.context() as patch:
            calls = dying_at(patch, n, error)
            try:
                act(folder)
            except type(error):
                pass
            died = calls() >= n
        survives(folder, died)
        shutil.rmtree(folder)
        if not died:
            assert n > 10, "the changes to the disk were not seen: has the code another way to make them?"
            return
    raise AssertionError("it never lives")


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [Killed(), FULL])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("before, step", [((), 1), ((1, 2), 3), ((1, 2), 2), ((1,), 1), ((2, 3), 1)])
def test_killed_or_full_at_any_moment_a_whole_state_is_left(tmp_path, monkeypatch, before, step, keep, error):
    def prepare(folder):
        for earlier in before:
            save_at(folder, earlier)

    def survives(folder, died):
        result = load_state(folder)
        if result is None:
            assert died and not before
        else:
            assert result[0] in (step, *before)
            check(result, result[0])
            assert died or result[0] == step
        save_at(folder, step, keep=keep)  # as the run does after it was started again
        check(load_state(folder), step)
        assert len(names(folder)) <= keep and all(name[-4:].isdigit() for name in names(folder))

    def act(folder):
        save_at(folder, step, keep=keep)
    each_death(tmp_path, monkeypatch, prepare, act, survives, error)


@pytest.mark.parametrize("error", [Killed(), FULL])
def test_a_model_killed_or_full_at_any_moment_is_whole_or_absent(tmp_path, monkeypatch, tokenizer, error):
    """A folder that loads is the old model or the new, never a mixture; a full disk leaves the old one."""
    old, new, widths = random_model(), random_model(dim=16), []

    def survives(folder, died):
        try:
            width = load_model(folder)[0].config.dim
        except UserError as problem:
            assert died and "has no config.json" in str(problem)
        else:
            assert width == 16 if not died else width in (16, 32)
            widths.append(width)
        save_model(new, tokenizer, folder)
        assert load_model(folder)[0].config.dim == 16
        assert not any(name.endswith(".tmp") for name in names(folder))
    each_death(tmp_path, monkeypatch, lambda folder: save_model(old, tokenizer, folder),
               lambda folder: save_model(new, tokenizer, folder), survives, error)
    assert widths.count(32) > 10, "the old model must live through all of the writing"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    save_at(tmp_path, 1)
    real = open

    def redirected(path, mode="r", **options):
        full = "model.safetensors" in str(path) and "w" in mode
        return real("/dev/full" if full else path, mode, **options)
    monkeypatch.setattr(builtins, "open", redirected)
    with pytest.raises(OSError) as error:
        save_at(tmp_path, 2)
    assert error.value.errno == errno.ENOSPC and "model.safetensors" in error.value.filename
    assert names(tmp_path) == ["step_00000001"]
    monkeypatch.undo()
    check(load_state(tmp_path), 1)


def test_a_state_with_what_json_cannot_hold_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        save_state(tmp_path, 1, STATE, {"generator": object()})
    assert names(tmp_path) == []
