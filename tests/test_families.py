"""families.py: folders of each family as transformers writes and reads them, with equal logits."""
import json
import math

import pytest
import torch

import families
from checkpoint import load_model, model_config, save_model
from config import UserError
from model import ModelConfig, generate
from support import TINY, random_ids, random_model, seeded
from tensor_files import read_tensors, write_tensors

SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
FAMILIES = {  # what sets each apart, small: the class of transformers, and settings beyond SMALL
    "Llama 2": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "Llama 3.1": ("Llama", dict(rms_norm_eps=1e-5, rope_parameters=LLAMA3)),
    "Llama 3.2": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "Llama, linear": ("Llama", dict(rope_parameters={**PLAIN, "rope_type": "linear", "factor": 4.0})),
    "Llama, dynamic": ("Llama", dict(max_position_embeddings=16, rope_parameters={
        **PLAIN, "rope_type": "dynamic", "factor": 7.0})),
    "Llama, biases": ("Llama", dict(attention_bias=True)),
    "SmolLM2": ("Llama", dict(tie_word_embeddings=True, num_attention_heads=2, num_key_value_heads=2,
                              rope_parameters={**PLAIN, "rope_theta": 130000.0})),
    "TinyLlama": ("Llama", dict(num_key_value_heads=1, rms_norm_eps=1e-5)),
    "Mistral": ("Mistral", dict(sliding_window=8)),
    "Mistral 0.2": ("Mistral", dict(sliding_window=None, head_dim=12)),
    "Qwen2": ("Qwen2", dict()),
    "Qwen2.5": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "Qwen2, window": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)),
    "Qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "Qwen3, window": ("Qwen3", dict(head_dim=6, use_sliding_window=True, sliding_window=5,
                                    max_window_layers=0)),
}
IDS = random_ids(2, 40, seed=3)


def theirs_of(family):
    """A model of the family in transformers, each of whose weights matters to the logits."""
    import transformers
    name, settings = FAMILIES[family]
    settings = {**SMALL, "rope_parameters": PLAIN, **settings,
                "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.dim() == 1 else 0.0, std=0.2, generator=seeded(sum(p.shape)))
    return model.eval()


@torch.no_grad()
def difference(ours, theirs):
    return (ours(IDS) - theirs(IDS).logits).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_gives_equal_logits_and_64_equal_choices(tmp_path, family):
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path)
    # 1e-4: float32 rounds at 1e-7 of logits of size ~10, and sums are taken in another order. 40 tokens: the
    # windows are 8 and 5
    assert difference(ours, theirs) < 1e-4
    expected = theirs.generate(IDS, max_new_tokens=64, do_sample=False)[:, IDS.size(1):]
    assert generate(ours, IDS, 64, temperature=0.0).ids.tolist() == expected.tolist()


def old_spelling(content: dict) -> dict:
    """The config.json of transformers 4 for one of transformers 5."""
    rope = dict(content.pop("rope_parameters"))
    content["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    content["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    content["torch_dtype"] = content.pop("dtype")
    if content["head_dim"] == content["hidden_size"] // content["num_attention_heads"]:
        del content["head_dim"]
    content.pop("layer_types", None)
    return content


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_in_the_spelling_of_transformers_4_means_the_same(tmp_path, family):
    theirs_of(family).save_pretrained(tmp_path)
    new, path = model_config(tmp_path / "config.json"), tmp_path / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content.setdefault("head_dim", 8)
    path.write_text(json.dumps(old_spelling(content)), encoding="utf-8")
    assert "rope_parameters" not in path.read_text(encoding="utf-8")
    assert model_config(path) == new
    assert (new.rope_scaling or {}).get("rope_type") == (content["rope_scaling"] or {}).get("type")


@pytest.mark.parametrize("architecture", families.DEFAULTS)
def test_what_a_config_json_leaves_out_is_as_in_transformers(architecture):
    import transformers
    full = getattr(transformers, architecture.replace("ForCausalLM", "Config"))().to_dict()
    silent = families.from_hugging_face({"architectures": [architecture]})
    assert silent == families.from_hugging_face({**full, "architectures": [architecture]})
    assert silent == families.from_hugging_face({"model_type": full["model_type"]}), "by its model_type alone"
    assert silent.sliding_window == (4096 if architecture == "MistralForCausalLM" else None)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama 3.1", "Llama 3.2", "Qwen2"])
def test_one_file_or_shards_of_any_precision_come_bit_for_bit(tmp_path, family, dtype, shards):
    theirs = theirs_of(family).to(dtype)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "10KB"} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    for wanted in (torch.float32, torch.bfloat16):
        ours, _ = load_model(tmp_path, dtype=wanted)
        assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor.to(wanted)), name


def test_a_tied_head_that_is_stored_although_tied_is_not_a_second_parameter(tmp_path):
    theirs_of("SmolLM2").save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(tmp_path / "model.safetensors", tensors)
    ours, _ = load_model(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    tensors["lm_head.weight"][3, 4] += 1
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match="ties head and embedding, but those stored differ"):
        load_model(tmp_path)


# Written


YARN4, LLAMA4 = ({k: v for k, v in rope.items() if k != "rope_theta"} for rope in (YARN, LLAMA3))
OURS = {
    "Llama": {}, "Llama, head_dim": dict(head_dim=16), "Llama, biases": dict(attention_bias=True),
    "Llama, llama3": dict(rope_scaling=LLAMA4, rope_theta=5e5),
    "Llama, yarn": dict(rope_scaling=YARN4, max_seq_len=128),
    "Llama, linear": dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "Llama, dynamic": dict(rope_scaling={"rope_type": "dynamic", "factor": 4.0,
                                         "original_max_position_embeddings": 16}),
    "Mistral": dict(sliding_window=8), "Mistral, yarn, tied": dict(sliding_window=8, rope_scaling=YARN4,
                                                                   tie_embeddings=True),
    "Mistral, whose heads do not divide": dict(n_heads=6, head_dim=8),
    "Qwen2": dict(attention_bias=True, output_bias=False),
    "Qwen2, window": dict(attention_bias=True, output_bias=False, sliding_window=5, head_dim=12),
    "Qwen3": dict(qk_norm=True, head_dim=16), "Qwen3, window": dict(qk_norm=True, sliding_window=5),
    "Qwen3, biases, yarn": dict(qk_norm=True, attention_bias=True, rope_scaling=YARN4, n_kv_heads=1),
}


@pytest.mark.parametrize("name", OURS)
def test_what_we_write_opens_in_transformers_as_its_family_and_here_as_it_was(tmp_path, name):
    from transformers import AutoModelForCausalLM
    model = random_model(**OURS[name])
    save_model(model, None, tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == name.partition(",")[0] + "ForCausalLM"
    assert difference(model, theirs.eval()) < 1e-4
    again, _ = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))
    if name != "Llama, linear":  # theirs has no place for the length that it was trained at, nor needs it
        assert again.config == model.config


@pytest.mark.parametrize("name", OURS)
def test_transformers_finds_both_spellings_of_the_positions_alike(name):
    content = families.to_hugging_face(random_model(**OURS[name]).config)
    old = {key: value for key, value in content.items() if key != "rope_parameters"}
    new = {key: value for key, value in content.items() if key not in ("rope_theta", "rope_scaling")}
    assert families.from_hugging_face(old) == families.from_hugging_face(new) == \
        families.from_hugging_face(content)
    content.pop("layer_types", None)  # transformers 4 had max_window_layers alone at first
    assert families.from_hugging_face(content) == families.from_hugging_face(old)
    if "linear" in name or "dynamic" in name:
        assert set(content["rope_parameters"]) == {"rope_type", "factor", "rope_theta"}, "it knows no other"


@pytest.mark.parametrize("settings, message", [
    (dict(sliding_window=8, attention_sinks=4), "attention_sinks 4 cannot be saved"),
    (dict(qk_norm=True, attention_bias=True, output_bias=False), "no family .* output_bias False .* qk_norm"),
    (dict(sliding_window=8, attention_bias=True), "no family .* with sliding_window 8"),
    (dict(n_heads=6, head_dim=8, attention_bias=True), "no family .* 6 heads for dim 32")])
def test_what_no_family_can_say_is_refused_and_leaves_nothing(tmp_path, settings, message):
    model = random_model(**settings)
    with pytest.raises(UserError, match=message) as error:
        save_model(model, None, tmp_path)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


# Refused


LLAMA = {"architectures": ["LlamaForCausalLM"]}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2, "use_sliding_window": True}
NAN = math.nan


@pytest.mark.parametrize("content, message", [
    ({}, "names no architecture"), ({"architectures": 3, "model_type": [1]}, "names no architecture"),
    ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported; "
     "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM are"),
    ({"architectures": None, "model_type": "mamba"}, "architecture 'mamba' is not supported"),
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only silu is"),
    ({**LLAMA, "mlp_bias": True}, "mlp_bias True is not supported"),
    ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not supported"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({**LLAMA, "hidden_size": "wide"}, "hidden_size must be of type int, not 'wide'"),
    ({**LLAMA, "hidden_size": None}, "hidden_size must be of type int, not None"),
    ({**LLAMA, "hidden_size": 64.0}, "hidden_size must be of type int, not 64.0"),
    ({**LLAMA, "hidden_size": NAN}, "hidden_size must be of type int, not nan"),
    ({**LLAMA, "hidden_size": True}, "hidden_size must be of type int, not True"),
    ({**LLAMA, "hidden_size": 10 ** 40}, "hidden_size 1000.* is out of range"),
    ({**LLAMA, "num_hidden_layers": -1}, "num_hidden_layers -1 is out of range"),
    ({**LLAMA, "num_attention_heads": 2 ** 20, "head_dim": 2 ** 20}, "are wider than"),
    ({**LLAMA, "num_attention_heads": 3}, "dim 4096 is not divisible by n_heads 3"),
    ({**LLAMA, "num_key_value_heads": 5}, "n_heads 32 is not divisible by n_kv_heads 5"),
    ({**LLAMA, "rms_norm_eps": "small"}, "rms_norm_eps must be of type float"),
    ({**LLAMA, "rms_norm_eps": NAN}, "rms_norm_eps nan is out of range"),
    ({**LLAMA, "rms_norm_eps": -1e-6}, "rms_norm_eps -1e-06 is out of range"),
    ({**LLAMA, "tie_word_embeddings": 1}, "tie_word_embeddings must be of type bool"),
    ({**LLAMA, "rope_parameters": [1]}, r"rope_parameters \[1\] is not an object"),
    ({**LLAMA, "rope_theta": "a"}, "rope_theta 'a' is not a number of 0.001 to 1e15"),
    ({**LLAMA, "rope_theta": NAN}, "rope_theta nan is not a number of 0.001 to 1e15"),
    ({**LLAMA, "rope_theta": 10**400}, "is not a number of 0.001 to 1e15"),
    ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
     "rope_parameters that differ by kind of layer are not supported"),
    ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "a partial_rotary_factor is not"),
    ({**LLAMA, "rope_scaling": {"type": "longrope", "factor": 8.0}}, "type 'longrope' is not known"),
    ({**LLAMA, "rope_scaling": {"type": ["yarn"]}}, "names no rule"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": NAN}}, "factor nan"),
    ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor '2'"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window 0 is out of range"),
    ({**QWEN, "max_window_layers": 1}, "1 of 2 layers have full attention, .* mixture is not supported"),
    ({**QWEN, "layer_types": ["full_attention", "sliding_attention"]}, "1 of 2 layers have full attention"),
    ({**QWEN, "layer_types": ["full_attention"]}, "one for each of 2 layers"),
    ({**QWEN, "layer_types": "both"}, "layer_types both is not a list"),
    ({**QWEN, "layer_types": ["chunked", "chunked"]}, "is not a list of full_attention and sliding"),
    ({**QWEN, "use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, "window is None"),
    ({**LLAMA, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "window is None"),
    ({"model_type": "mistral", "num_hidden_layers": 1, "layer_types": ["full_attention"]}, "window is 4096"),
])
def test_a_config_json_that_says_what_we_cannot_do_is_one_line(content, message):
    with pytest.raises(UserError, match=message) as error:
        families.from_hugging_face(content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("changes, window", [
    (dict(use_sliding_window=False, sliding_window=8, max_window_layers=0), None),
    (dict(use_sliding_window=True, sliding_window=8, max_window_layers=2), None),
    (dict(use_sliding_window=True, sliding_window=8, max_window_layers=0), 8),
    (dict(use_sliding_window=True, sliding_window=None, max_window_layers=0), None),
    (dict(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 2), 8),
    (dict(use_sliding_window=True, sliding_window=8, layer_types=["full_attention"] * 2), None)])
def test_where_all_layers_of_a_qwen_are_alike_its_window_is_known(changes, window):
    from transformers import Qwen2Config
    assert families.from_hugging_face({**QWEN, **changes}).sliding_window == window
    kinds = set(Qwen2Config(num_hidden_layers=2, **changes).layer_types)
    assert kinds == {"full_attention" if window is None else "sliding_attention"}, "not so in transformers"


def test_a_top_level_trained_length_goes_before_the_one_inside_as_in_transformers():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding
    content = {**LLAMA, "rope_parameters": LLAMA3, "original_max_position_embeddings": 64}
    key = "original_max_position_embeddings"
    assert families.from_hugging_face(content).rope_scaling[key] == 64
    theirs = LlamaConfig(**{**content, "rope_parameters": dict(LLAMA3)})
    LlamaRotaryEmbedding(theirs)  # it is here that they look
    assert theirs.rope_parameters[key] == 64


def test_of_two_spellings_that_contradict_each_other_the_old_one_goes_first_as_in_transformers():
    from transformers import LlamaConfig
    content = {**LLAMA, "rope_theta": 3e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
               "rope_parameters": dict(LLAMA3)}
    config, theirs = families.from_hugging_face(content), LlamaConfig(**content).rope_parameters
    assert (config.rope_theta, config.rope_scaling["rope_type"]) == (3e4, "linear")
    assert (theirs["rope_theta"], theirs["rope_type"]) == (3e4, "linear")


def test_a_dynamic_rule_begins_where_max_position_embeddings_ends_as_in_transformers():
    rope = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 7}
    config = families.from_hugging_face({**LLAMA, "max_position_embeddings": 100, "rope_parameters": rope})
    assert config.rope_scaling["original_max_position_embeddings"] == 100 and config.max_seq_len == 400


def test_the_small_models_of_these_tests_are_what_a_config_says():
    assert families.from_hugging_face(families.to_hugging_face(TINY)) == TINY
    assert isinstance(TINY, ModelConfig)
