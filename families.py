"""The families of models that are one architecture with a few switches: what their config.json says.

    Llama 1 to 3, SmolLM2, TinyLlama    LlamaForCausalLM      biases on q, k, v and o, or on none
    Mistral                             MistralForCausalLM    no bias; a sliding window, or none
    Qwen2, Qwen2.5                      Qwen2ForCausalLM      biases on q, k and v
    Qwen3                               Qwen3ForCausalLM      RMSNorm on queries and keys, heads of any width

A config.json leaves out what is usual in its family, and each family finds something else usual: DEFAULTS are
those of transformers 5. `from_hugging_face` reads a config.json of transformers 4 or 5, `to_hugging_face`
writes one that both read. What a model of ours cannot say, or theirs cannot, is refused by name: logits that
are nearly right would be worse. With one number as its head (reward_model.py) a family's name ends in
ForSequenceClassification instead of ForCausalLM; all else is the same.
"""
import math

from config import UserError
from model import ModelConfig
from positions import check_scaling

FIELDS = {  # of ModelConfig: what config.json calls them
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "ffn_dim": "intermediate_size", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings", "attention_bias": "attention_bias",
}
TYPES = {"rms_norm_eps": float, "tie_word_embeddings": bool, "attention_bias": bool,
         "use_sliding_window": bool}  # the others are integers
MAY_BE_NULL = {"num_key_value_heads", "head_dim", "sliding_window"}
LARGEST = 2 ** 26  # no model's integer is near it, and a product of two of them fits 64 bits

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": None, "head_dim": None, "intermediate_size": 11008,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
         "attention_bias": False}
MISTRAL = {**LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072,
           "sliding_window": 4096}
QWEN2 = {**LLAMA, "vocab_size": 151936, "num_key_value_heads": 32, "intermediate_size": 22016,
         "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
         "max_window_layers": 28}
DEFAULTS = {"LlamaForCausalLM": LLAMA, "MistralForCausalLM": MISTRAL, "Qwen2ForCausalLM": QWEN2,
            "Qwen3ForCausalLM": {**QWEN2, "head_dim": 128}}
ALWAYS = {"MistralForCausalLM": {"attention_bias": False}, "Qwen2ForCausalLM": {"attention_bias": True}}
MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
               "Qwen3ForCausalLM": "qwen3"}
SCORES = "ForSequenceClassification"
ONLY = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None, "partial_rotary_factor": 1.0}


def from_hugging_face(content: dict, task: str = "ForCausalLM") -> ModelConfig:
    """ModelConfig of a config.json's content. Raises UserError, by name, where that says something else."""
    architecture = architecture_in(content, task)
    for key, value in ONLY.items():
        if content.get(key) not in (None, value):
            raise UserError(f"{key} {content[key]!r:.60} is not supported; only {value} is")
    content = {**DEFAULTS[architecture], **content, **ALWAYS.get(architecture, {})}
    for key in DEFAULTS[architecture]:
        check_value(key, content[key])
    values = {ours: content[theirs] for ours, theirs in FIELDS.items()}
    if values["n_heads"] * (values["head_dim"] or 1) > LARGEST:
        raise UserError(f"num_attention_heads {values['n_heads']} with head_dim {values['head_dim']} are "
                        f"wider than {LARGEST} together")
    values["tie_embeddings"] &= task == "ForCausalLM"  # there is no head of the vocabulary's size to be tied
    return ModelConfig(**{**values, **rope_in(content)}, sliding_window=window_in(content, architecture),
                       qk_norm=architecture == "Qwen3ForCausalLM",
                       output_bias=architecture != "Qwen2ForCausalLM")


def architecture_in(content: dict, task: str = "ForCausalLM") -> str:
    """The family, by the name of its language model. Raises UserError where it is unknown, or not for `task`.
    """
    match content:
        case {"architectures": [str(name), *_]}:
            pass
        case {"architectures": None, "model_type": str(name)} | {"model_type": str(name)}:
            pass
        case _:
            raise UserError("it names no architecture, and no model_type either")
    name = {model_type: known for known, model_type in MODEL_TYPES.items()}.get(name, name)
    scores = name.endswith(SCORES)
    writer = name.removesuffix(SCORES) + "ForCausalLM" if scores else name
    if writer not in DEFAULTS:
        *most, last = DEFAULTS
        raise UserError(f"architecture {name!r:.60} is not supported; {', '.join(most)} and {last} are")
    if content.get("architectures") and scores != (task == SCORES):  # a model_type alone does not tell
        raise UserError(f"{name} is a reward model: it scores texts and writes none; only reward_model.py "
                        f"and ppo.py open it" if scores else
                        f"{name} is a language model, no reward model; make one of it with: python ppo.py "
                        f"--train_reward_model")
    return writer


def check_value(key: str, value):
    """UserError unless the value is of its type, and a number that a model can have."""
    kind = TYPES.get(key, int)
    if value is None and key in MAY_BE_NULL:
        return
    if type(value) is not kind:  # True is no 1 here
        raise UserError(f"{key} must be of type {kind.__name__}, not {value!r:.60}")
    least = 0 if key == "max_window_layers" else 1
    if kind is int and not least <= value <= LARGEST:
        raise UserError(f"{key} {value} is out of range; it must be {least} to {LARGEST}")
    if kind is float and not 0 <= value < 1:  # nan is not
        raise UserError(f"{key} {value} is out of range; it must be 0 or more, and below 1")


def window_in(content: dict, architecture: str) -> int | None:
    """The sliding window of all layers, None where all see everything; a mixture is refused.

    Llama has none, and Mistral has it in every layer. Qwen switches it on and spares the first
    max_window_layers; or, in newer files, layer_types says of each layer what it is.
    """
    usual, layers = DEFAULTS[architecture], content["num_hidden_layers"]
    qwen = "use_sliding_window" in usual
    window = content["sliding_window"] if "sliding_window" in usual else None
    if qwen and not content["use_sliding_window"]:
        window = None
    full = layers if window is None else min(content["max_window_layers"], layers) if qwen else 0
    if (kinds := content.get("layer_types")) is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or \
                not all(kind in ("full_attention", "sliding_attention") for kind in kinds):
            raise UserError(f"layer_types {str(kinds):.60} is not a list of full_attention and "
                            f"sliding_attention, one for each of {layers} layers")
        if qwen:
            full = kinds.count("full_attention")
        if full != kinds.count("full_attention") or window is None and full == 0:
            raise UserError(f"layer_types begins with {kinds[0]}, but the sliding window is {window}")
    if 0 < full < layers:
        raise UserError(f"{full} of {layers} layers have full attention, the others a sliding window; such a "
                        f"mixture is not supported")
    return None if full else window


def rope_in(content: dict) -> dict:
    """rope_theta, rope_scaling and max_seq_len of ModelConfig.

    transformers 4 has rope_theta and rope_scaling, 5 has both in rope_parameters; where a file has all of
    them, rope_scaling goes first, as in 5. max_position_embeddings is the length that a model reads, but of
    a `dynamic` one the length that it was trained at.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(content.get(key) or {}, dict):
            raise UserError(f"{key} {content[key]!r:.60} is not an object")
    scaling = dict(content.get("rope_scaling") or content.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UserError("rope_parameters that differ by kind of layer are not supported")
    theta = scaling.pop("rope_theta", content.get("rope_theta", 10000.0))
    length = content["max_position_embeddings"]
    if type(theta) not in (int, float) or not 1e-3 <= theta <= 1e15:
        raise UserError(f"rope_theta {theta!r:.60} is not a number of 0.001 to 1e15")
    old = scaling.pop("type", "default")  # its name before transformers 4.43
    scaling = {"rope_type": old, **scaling}
    if scaling.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UserError("a partial_rotary_factor is not supported; only 1.0 is")
    if scaling["rope_type"] == "default":
        return {"rope_theta": float(theta), "rope_scaling": None, "max_seq_len": length}
    trained = length if scaling["rope_type"] == "dynamic" else content.get("original_max_position_embeddings")
    if trained is not None:  # beside the rule, it goes before the one inside
        scaling["original_max_position_embeddings"] = trained
    scaling = check_scaling(scaling, length, float(theta))
    if scaling["rope_type"] == "dynamic":
        length = math.floor(min(length * scaling["factor"], LARGEST))
    return {"rope_theta": float(theta), "rope_scaling": scaling, "max_seq_len": length}


def to_hugging_face(config: ModelConfig, task: str = "ForCausalLM") -> dict:
    """config.json of a model, without what belongs to its tokenizer. UserError where no family fits."""
    architecture, length = family_of(config), config.max_seq_len
    scaling = dict(config.rope_scaling or {})
    if scaling.get("rope_type") in ("linear", "dynamic"):  # to these rules of theirs the key is unknown
        trained = scaling.pop("original_max_position_embeddings")
        length = trained if scaling["rope_type"] == "dynamic" else length
    content = {
        "architectures": [architecture.replace("ForCausalLM", task)], "model_type": MODEL_TYPES[architecture],
        # the first to spell all of this so; without it the tokenizer beside a Mistral is suspected of a fault
        "transformers_version": "5.0.0",
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "max_position_embeddings": length,
        "rope_theta": config.rope_theta, "rope_scaling": scaling or None,  # for transformers 4; and for 5:
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
    }
    if architecture != "LlamaForCausalLM":
        content["sliding_window"] = config.sliding_window  # null too: a Mistral that is silent has 4096
    if "use_sliding_window" in DEFAULTS[architecture]:
        content["use_sliding_window"] = config.sliding_window is not None
    if content.get("use_sliding_window"):
        content |= {"max_window_layers": 0, "layer_types": ["sliding_attention"] * config.n_layers}
    return content


def family_of(config: ModelConfig) -> str:
    """The architecture of transformers that computes what this model does; UserError where there is none."""
    window, bias = config.sliding_window, config.attention_bias
    if config.attention_sinks:
        raise UserError(f"attention_sinks {config.attention_sinks} cannot be saved, as no family of "
                        f"transformers has them; save with 0, and set them when the model is opened")
    if config.qk_norm and (config.output_bias or not bias):
        return "Qwen3ForCausalLM"
    if bias and not config.output_bias and not config.qk_norm:
        return "Qwen2ForCausalLM"
    if window is None and not config.qk_norm and config.dim % config.n_heads == 0:
        return "LlamaForCausalLM"
    if not bias and not config.qk_norm:  # a Llama with a window, or with heads that do not divide its width
        return "MistralForCausalLM"
    raise UserError(f"no family of transformers has attention_bias {bias} and output_bias "
                    f"{config.output_bias} with sliding_window {window}, qk_norm {config.qk_norm} and "
                    f"{config.n_heads} heads for dim {config.dim}; leave out the biases")
