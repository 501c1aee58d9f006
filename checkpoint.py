"""Models and resumable training state on disk, and no pickle anywhere.

A pickle runs whatever code it carries when it is opened, and a flipped bit inside one loads without a word.
So:
1. tensors are safetensors files, written and read by hand: see tensor_files.py.
2. a model is a Hugging Face folder: transformers opens what we save, and its folders of the Llama, Mistral,
   Qwen2 and Qwen3 kinds open here. The parameters of model.py carry Hugging Face's names, so nothing is
   converted but config.json: see families.py.
3. the state of a run is a folder with a checksum for each file. Whenever the process is killed, it is whole
   or absent.

    >>> save_model(model, tokenizer, "my_model")
    >>> model, tokenizer = load_model("my_model")
"""
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import families
import metaspace
from bpe import END_OF_TEXT, Tokenizer, Unsupported
from config import UserError, file_checksum, open_whole, sync_folder
from model import ModelConfig, Transformer
from tensor_files import DTYPE_NAMES, Entry, mapped_tensor, mapped_tensors, read_header, write_tensors
from tokenizer_files import without_twins

# ------------------------------------------------------------------------------------------------------------
# 1. Models: a Hugging Face folder

METADATA = {"format": "pt"}  # in model.safetensors: transformers opens no file without it
INDEX = "model.safetensors.index.json"  # of a model in several files: which tensor is in which
UNUSED = "rotary_emb.inv_freq"  # old Llama folders hold these tensors; model.py computes them


def save_model(model: Transformer, tokenizer: Tokenizer | None, folder, eos_token: str | None = None,
               tensors: Mapping[str, Tensor] | None = None, chat_template: str | None = None):
    """Write config.json, model.safetensors and the tokenizer's files into a folder, as transformers does.

    eos_token: the special token at which generation ends; recorded where the tokenizer has it. chat_template:
    a Jinja template for conversations. Default for both is what the tokenizer has by these names.
    tensors: the weights, where others than the model's own are to be written (see write_tensors): those of a
    model that lies in parts, say; default model.state_dict(). Other files in the folder stay. All is written
    beside the old files first, so a full disk loses nothing; then config.json goes first and comes last, so a
    folder that has one is whole.
    """
    assert hasattr(model, "task"), f"save the Transformer, not the {type(model).__name__} around it"
    folder = Path(folder)
    staging = folder / "save_model.tmp"
    shutil.rmtree(staging, ignore_errors=True)  # left by a save that was killed
    staging.mkdir(parents=True)
    try:
        write_model(model, tokenizer, staging, eos_token, tensors, chat_template)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # a full disk has its space back
        raise
    (folder / "config.json").unlink(missing_ok=True)
    sync_folder(folder)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    sync_folder(folder)
    staging.rmdir()


def write_model(model: Transformer, tokenizer: Tokenizer | None, folder: Path, eos_token: str | None,
                tensors: Mapping[str, Tensor] | None, chat_template: str | None):
    config, tensors = model.config, dict(model.state_dict() if tensors is None else tensors)
    expected = empty_model(config, type(model)).state_dict().keys()
    if config.tie_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight, "the head has come loose"
        expected -= {"lm_head.weight"}
        tensors.pop("lm_head.weight", None)
    changed = tensors.keys() ^ expected
    assert not changed, f"the model has been changed ({some(sorted(changed))}): merge its adapters first"
    families.to_hugging_face(config, model.task)  # what no family can say is told before the work
    write_tensors(folder / "model.safetensors", tensors, metadata=METADATA)
    write_settings(model, tokenizer, folder, eos_token, chat_template)


def write_settings(model: Transformer, tokenizer: Tokenizer | None, folder: Path,
                   eos_token: str | None = None, chat_template: str | None = None):
    """Write all of a model folder but the weights; config.json last.

    A model with a method own_settings(tokenizer) has more to say there than its family and its tokenizer do.
    """
    ids, stops = {}, []
    own = model.own_settings(tokenizer) if hasattr(model, "own_settings") else {}
    if tokenizer is not None:
        special, chat_template = tokenizer.special_tokens, chat_template or tokenizer.chat_template
        eos_token = eos_token or tokenizer.eos_token or next(filter(special.get, END_OF_TEXT), None)
        pad_token = next((token for token in special if special[token] == own.get("pad_token_id")), None)
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": eos_token, "pad_token": pad_token}
        tokens = {name: token for name, token in tokens.items() if token in special}
        ids = {f"{name}_id": special[token] for name, token in tokens.items()}
        end = [ids["eos_token_id"]] if "eos_token_id" in ids else []
        stops = list(dict.fromkeys([*end, *tokenizer.stop_ids]))  # the first one first, each once
        tokenizer.save(folder / "tokenizer.json")
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.max_seq_len,
            "clean_up_tokenization_spaces": False, **tokens,
            **({"add_bos_token": True} if "bos_token" in tokens else {}),
            **({} if chat_template is None else {"chat_template": chat_template})})  # for transformers 4
    if chat_template is not None:
        with open_whole(folder / "chat_template.jinja", "w") as file:  # for transformers 5
            file.write(chat_template)
    write_json(folder / "generation_config.json",
               ids | ({"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}))
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**families.to_hugging_face(model.config, model.task),
                                        "torch_dtype": dtype, "bos_token_id": None, "eos_token_id": None,
                                        **ids, **own})


def load_model(folder, device="cpu", dtype=torch.float32, stored_as: Callable | None = None,
               kind: type[nn.Module] = Transformer) -> tuple[Transformer, Tokenizer | None]:
    """(model in eval mode, its tokenizer or None) from a folder of ours, or of a family of families.py.

    stored_as: stored_as(model, name, tensor) may edit the model, and gives {name: tensor}, which it is then
    to hold in place of this tensor; called for one after the other (quantize.py does so). kind: of model:
    the Transformer, or another class with its `task`, and its config as the one argument (reward_model.py).

    Raises UserError where something is missing, damaged, or not what config.json says (names, shapes), and
    where the model has a feature that ours has not. A tokenizer of a kind that cannot be read here is None,
    and a line says so. In memory: the model in `dtype`, and the pages of one tensor as stored.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}")
    refuse_adapter(folder)
    config, stored = model_config(folder / "config.json", kind.task), stored_tensors(folder)
    if config.n_layers > len(stored):  # told before a model of a million layers is laid out
        raise UserError(f"{folder} has {len(stored)} tensors, too few for the {config.n_layers} layers that "
                        f"its config.json implies")
    model, head = empty_model(config, kind), stored.get("lm_head.weight")
    check_names(folder, {name: entry.shape for name, (_, entry) in stored.items()}, model)
    for name, (_, entry) in stored.items():
        if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            raise UserError(f"{folder}: {name} is of type {DTYPE_NAMES[entry.dtype]}; weights are F64, F32, "
                            f"F16 or BF16")
    tensors = {}
    for name, place in stored.items():
        if place is not head or not config.tie_embeddings:
            tensor = mapped_tensor(*place).to(device, dtype, copy=True)  # a copy: the file may be replaced
            tensors |= stored_as(model, name, tensor) if stored_as else {name: tensor}
    if config.tie_embeddings:
        embedding = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        own = mapped_tensor(*head).to(device, dtype) if head else embedding
        if not torch.equal(own.nan_to_num(), embedding.nan_to_num()):
            raise UserError(f"{folder}: config.json ties head and embedding, but those stored differ")
    model.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # assigning made two parameters of one memory
    return model.eval(), load_tokenizer(folder, config)


def empty_model(config: ModelConfig, kind: type[nn.Module] = Transformer) -> Transformer:
    """A model of the right shapes without memory behind them."""
    with torch.device("meta"):
        return kind(config)


def stored_tensors(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """{name: (file, where in it)} of a model's weights: of model.safetensors, or of its index's files."""
    if (folder / "model.safetensors").is_file():
        listed, files = {}, ["model.safetensors"]
    elif (folder / INDEX).is_file():
        listed = read_index(folder / INDEX)
        files = sorted(set(listed.values()))
    else:
        refuse_adapter(folder)
        raise no_weights(folder)
    stored = {}
    for file in files:
        for name, entry in read_header(folder / file)[0].items():
            if name in stored:
                raise UserError(f"{folder} has {name} twice, in {stored[name][0].name} and in {file}")
            if not name.endswith(UNUSED):
                stored[name] = (folder / file, entry)
    for name, file in listed.items():
        if not name.endswith(UNUSED) and stored.get(name, (folder, None))[0] != folder / file:
            raise UserError(f"{folder / INDEX} says that {file} holds {name:.100}, but it does not; download "
                            f"the folder again")
    return stored


def read_index(index: Path) -> dict[str, str]:
    """{name of a tensor: name of the file that holds it}, all of them files that are there."""
    listed = read_json(index, object_pairs_hook=without_twins).get("weight_map")
    if not (listed and isinstance(listed, dict) and all(isinstance(name, str) for name in listed.values())):
        raise UserError(f"{index} has no weight_map of tensors to files")
    names = sorted(set(listed.values()))
    for name in names:
        if not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):  # no way out of the folder
            raise UserError(f"{index} lists {name!r:.60}, which is no safetensors file of this folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index.parent} lacks {some(missing)}, which {index.name} lists; download it again")
    return listed


def refuse_adapter(folder: Path):
    """Raise UserError where a folder holds an adapter alone: one of peft's, or a run with --no-lora_merge."""
    adapter = next((place for place in (folder, folder / "adapter")
                    if (place / "adapter_config.json").is_file()), None)
    if adapter and not any((folder / name).is_file() for name in ("model.safetensors", INDEX)):
        raise UserError(f"{folder} is an adapter, no whole model; merge it with its base: python lora.py "
                        f"merge --base F --adapter {adapter.as_posix()} --out F, and name that F (sample.py "
                        f"opens it as it is)")


def no_weights(folder: Path) -> UserError:
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if not pickles:
        return UserError(f"{folder} has no model.safetensors")
    code = (f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({folder.as_posix()!r}, "
            f"dtype='auto').save_pretrained({folder.as_posix()!r})")
    return UserError(f"{folder} has its weights only as a pickle, {pickles[0].name}, which may run any code "
                     f"when it is opened; get its model.safetensors, or, if you trust it, make one where "
                     f"transformers is installed: python -c \"{code}\"")


def check_names(folder: Path, shapes: dict[str, tuple], model: Transformer):
    """UserError unless the stored tensors are those that the model has, in name and shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = {"lm_head.weight"} if model.config.tie_embeddings else set()
    missing = [name for name in wanted if name not in shapes and name not in optional]
    unknown = [name for name in shapes if name not in wanted]
    if missing:
        raise UserError(f"{folder} lacks {some(missing)}, which its config.json implies")
    if unknown:
        raise UserError(f"{folder} has {some(unknown)}, which its config.json does not imply")
    for name, shape in wanted.items():
        if shapes.get(name, shape) != shape:
            raise UserError(f"{folder}: {name} has shape {list(shapes[name])}, "
                            f"but its config.json implies {list(shape)}")


def some(names: list[str]) -> str:
    shown = [name if name.isprintable() and len(name) < 100 else f"{name!r:.100}" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = metaspace.load_tokenizer(folder / "tokenizer.json")
    except Unsupported as error:
        print(f"{error}; the model is loaded without a tokenizer")
        return None
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model knows "
                        f"{config.vocab_size}: they do not belong together")
    settings = read_json(folder / "tokenizer_config.json", {})
    eos_token = named_token(settings.get("eos_token"))
    tokenizer.eos_token = eos_token if eos_token in tokenizer.special_tokens else None
    tokenizer.bos_token = first_token(folder, settings, tokenizer)
    tokenizer.stop_ids = read_stop_ids(folder, config.vocab_size)
    tokenizer.chat_template = read_chat_template(folder)
    return tokenizer


def named_token(token) -> str | None:
    """A token's text in tokenizer_config.json, where transformers 4 put it into an object with flags."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def first_token(folder: Path, settings: dict, tokenizer: Tokenizer) -> str | None:
    """The special token that this folder's tokenizer puts before every text (Llama's BOS), or None.

    tokenizer_config.json says so with add_bos_token; where it has no word, the template in tokenizer.json.
    """
    if type(settings.get("add_bos_token")) is bool:
        token = named_token(settings.get("bos_token")) if settings["add_bos_token"] else None
    else:
        token = template_start(read_json(folder / "tokenizer.json").get("post_processor"))
    if token is not None and token not in tokenizer.special_tokens:
        raise UserError(f"{folder} puts {token!r:.60} before every text, but its tokenizer has no such "
                        f"special token; correct tokenizer_config.json")
    return token


def template_start(processor) -> str | None:
    """The token that a post-processor of Hugging Face tokenizers puts first, or None."""
    match processor:
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
            return token
        case {"type": "Sequence", "processors": [*steps]}:
            return next(filter(None, map(template_start, steps)), None)
    return None


def read_stop_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text, as generation_config.json or config.json has them: none, one or several."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path, {}).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
                raise UserError(f"{path}: eos_token_id {found!r:.60} is not of this model's ids, "
                                f"0 to {vocab_size - 1}")
            return tuple(ids)
    return ()


def model_config(path: Path, task: str = Transformer.task) -> ModelConfig:
    """ModelConfig from a config.json of ours, or of transformers 4 or 5; UserError where it cannot say it."""
    content = read_json(path)
    try:
        return families.from_hugging_face(content, task)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_chat_template(folder) -> str | None:
    """The Jinja template by which a model's conversations become text, or None: to be handed to save_model.

    transformers 5 keeps it in chat_template.jinja, 4 in tokenizer_config.json, there also as a list of
    several with names, of which this is the one called default.
    """
    folder = Path(folder)
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 at byte {error.start}") from None
    path = folder / "tokenizer_config.json"
    template = read_json(path, {}).get("chat_template")
    if isinstance(template, list):
        template = next((one.get("template") for one in template
                         if isinstance(one, dict) and one.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise UserError(f"{path}: chat_template {str(template):.60} is not a text")
    return template


def write_json(path, content):
    with open_whole(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)


def read_json(path: Path, default: dict | None = None, **options) -> dict:
    """The JSON object in a file; without a file the default, or else UserError. options: of json.loads."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), **options)
    except FileNotFoundError:
        if default is not None:
            return default
        raise UserError(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object")
    return content


# ------------------------------------------------------------------------------------------------------------
# 2. State: what a run needs to go on as if it had never stopped
#
#   state/step_00000200/       <group>.safetensors …, state.json, SHA256SUMS (for `sha256sum -c` too)
#   state/step_00000200.tmp/   being written, or being removed: not a state
#   state/step_00000200.old/   still a state: it stands in while the same step is written anew

STATE_NAME = re.compile(r"step_(\d+)(\.old)?")


def save_state(folder, step: int, tensors: Mapping[str, Mapping[str, Tensor]], extra: dict, keep: int = 2,
               also_keep: Sequence[int] = (), beside: Callable[[Path], None] | None = None):
    """Write the state after `step` steps to <folder>/step_<step>, then remove all but the last `keep` states.

    tensors: {group: {name: tensor}}, such as "model" and "optimizer", each as in write_tensors. extra: what
    JSON can hold (tuples become lists). also_keep: steps of older states that stay. beside(folder) may write
    more into the state's folder: what makes it a model folder, say. At any moment, a kill or a full disk
    leaves a state that was there before, or the new one. Later steps that lie in the folder are removed:
    whoever saves this step has gone back behind them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    final = folder / f"step_{step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    temporary.mkdir()
    try:
        for group, named in tensors.items():
            write_tensors(temporary / f"{group}.safetensors", named, METADATA)
        if beside:
            beside(temporary)
        write_json(temporary / "state.json", {"step": step, "groups": list(tensors), "extra": extra})
        sums = "".join(f"{file_checksum(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
        with open_whole(temporary / "SHA256SUMS", "w") as file:
            file.write(sums)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk has its space back
        raise
    if final.exists():
        old = final.with_name(final.name + ".old")
        remove(old)
        os.replace(final, old)
    os.replace(temporary, final)
    sync_folder(folder)
    earlier = [state for state in states(folder) if step_of(state) < step]
    for state in states(folder):
        if state != final and state not in earlier[:keep - 1] and step_of(state) not in also_keep:
            remove(state)


def load_state(folder, say=print,
               only: int | None = None) -> tuple[int, dict[str, dict[str, Tensor]], dict] | None:
    """(step, tensors, extra) of the newest state that is whole, or None where there is none at all.

    A state whose checksums do not hold is passed over for the one before it, and `say` is told, in a line.
    Raises UserError where there are states, but no whole one. The tensors are mapped, not read: copy out of
    them what you need. only: take the state of this step, which another process has verified.
    """
    damaged = []
    for state in states(Path(folder)):
        if only not in (None, step_of(state)):
            continue
        try:
            result = read_state(state, verify=only is None)
        except (UserError, OSError) as error:
            damaged.append(f"state {state} is damaged ({error})")
            continue
        for line in damaged:
            say(f"{line}; {state.name} is used instead")
        return result
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; there is no other: remove the folder to start anew")
    return None


def read_state(state: Path, verify: bool = True) -> tuple[int, dict[str, dict[str, Tensor]], dict]:
    if verify:
        check_sums(state)
    content = read_json(state / "state.json")
    tensors = {group: mapped_tensors(state / f"{group}.safetensors") for group in content["groups"]}
    return content["step"], tensors, content["extra"]


def check_sums(state: Path):
    """Raise UserError or OSError unless every file of the state is there, and as it was written."""
    try:
        lines = (state / "SHA256SUMS").read_text(encoding="utf-8").split("\n")[:-1]
        sums = dict(line.split("  ")[::-1] for line in lines)
    except ValueError:
        raise UserError("SHA256SUMS is not a list of checksums") from None
    if "state.json" not in sums:
        raise UserError("SHA256SUMS does not list state.json")
    for name, expected in sums.items():
        if file_checksum(state / name) != expected:
            raise UserError(f"{name} has changed since it was written")
    if sums.keys() != {file.name for file in state.iterdir()} - {"SHA256SUMS"}:
        raise UserError("SHA256SUMS does not list the files that are there")
    groups = read_json(state / "state.json")["groups"]
    if not {f"{group}.safetensors" for group in groups} <= sums.keys():
        raise UserError("SHA256SUMS does not list all files that state.json does")


def states(folder: Path) -> list[Path]:
    """The folders of states, the newest first."""
    found = [path for path in folder.glob("step_*") if STATE_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix != ".old"), reverse=True)


def step_of(state: Path) -> int:
    return int(STATE_NAME.fullmatch(state.name)[1])


def remove(state: Path):
    """Remove a state at one stroke: what is killed half-way bears a name that nobody reads."""
    if state.exists():
        doomed = state.with_name(state.name + ".tmp")
        os.replace(state, doomed)
        shutil.rmtree(doomed)
