"""Adapters merged into their base, or opened with it; their files, in peft's format; settings of the stages.

    python lora.py merge --base runs/base --adapter runs/lora/adapter --out runs/merged

lora.py holds the algorithm. An adapter's folder is what the peft library writes and reads; for us it also has
the tokenizer, how far the model reads (config.json), and on which weights it stands (base.json). `open_model`
reads a folder of either kind, a model or an adapter, as one plain model.
"""
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import checkpoint
from bpe import Tokenizer
from checkpoint import METADATA, model_config, read_json, stored_tensors
from config import UserError, file_checksum, require
from lora import (PARTS, active_adapter, adapters_of, add_lora, base_of, is_linear, lora_state, merge_lora,
                  remove_lora)
from model import Transformer, extend_embedding
from quantize import QUANTIZE, dequantize, load_base
from tensor_files import mapped_tensor, read_header, write_tensors

# ------------------------------------------------------------------------------------------------------------
# 1. Files: an adapter as peft keeps it

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Of peft's options those that we know, and those that are without meaning once an adapter is made: its layers
# are those in the file. All others must be off.
KNOWN = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
         "trainable_token_indices", "base_model_name_or_path", "target_modules", "exclude_modules",
         "layers_to_transform", "layers_pattern", "inference_mode", "init_lora_weights", "auto_mapping",
         "revision", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"}


def save_adapter(model: nn.Module, folder, tokenizer: Tokenizer | None = None, name: str | None = None,
                 tensors: Mapping[str, Tensor] | None = None):
    """Write an adapter as peft does, and what the base does not know: the tokenizer, and how far it reads.

    tensors: the weights, where they lie in parts (see write_tensors); default lora_state(model).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # comes last: a folder that has one is whole
    tensors = lora_state(model, name) if tensors is None else tensors
    write_tensors(folder / WEIGHTS, tensors, METADATA)
    write_adapter_settings(model, tokenizer, folder, name)


def write_adapter_settings(model: nn.Module, tokenizer: Tokenizer | None, folder: Path,
                           name: str | None = None):
    """All of an adapter's folder but the weights; base.json, which peft does not read: what it stands on."""
    base = base_of(model)
    if hasattr(model, "task"):  # a model of ours, not some module
        checkpoint.write_settings(model, tokenizer, folder)
    if base:
        checkpoint.write_json(folder / "base.json", base)
    checkpoint.write_json(folder / CONFIG, {**adapters_of(model)[name or active_adapter(model)],
                                            "base_model_name_or_path": base.get("folder")})


def fingerprint(folder) -> str:
    """The checksum of a model folder's weights."""
    digest = hashlib.sha256()
    for path in sorted({path for path, _ in stored_tensors(Path(folder)).values()}):
        digest.update(file_checksum(path).encode("ascii"))
    return digest.hexdigest()


def trained_on(folder: Path) -> dict:
    """base_of the model whose adapter lies in a folder of ours; empty for one of peft's."""
    base = read_json(folder / "base.json", {})
    if base and not (isinstance(base.get("folder"), str) and isinstance(base.get("sha256"), str)
                     and base.get("quantize") in (None, *QUANTIZE)):
        raise UserError(f"{folder / 'base.json'} is damaged: {str(base):.100}")
    return base


@torch.no_grad()
def load_adapter(model: nn.Module, folder, name: str = "default") -> nn.Module:
    """Give the model the adapter of a folder, of ours or of peft's, and put it to work.

    Raises UserError where it was made for another base, or with what is not known here.
    """
    folder = Path(folder)
    config, entries = adapter_config(folder), read_header(folder / WEIGHTS)[0]
    found: dict[str, dict[str, str]] = {}  # {layer: {our name of a part: its name in the file}}
    for key in entries:
        layer = re.fullmatch(rf"base_model\.model\.(.*?)\.?({'|'.join(map(re.escape, PARTS.values()))})", key)
        if not layer:
            raise UserError(f"{folder} holds {key:.100}, which is no part of a LoRA adapter of linear layers")
        part = next(ours for ours, theirs in PARTS.items() if theirs == layer[2])
        found.setdefault(layer[1], {})[part] = key
    ids = token_ids_of(config)
    check_base(folder, config, found, entries, model)
    grow(model, max(ids, default=-1) + 1)
    add_lora(model, config["r"], config["lora_alpha"], [layer for layer in found if "lora_A" in found[layer]],
             config.get("lora_dropout") or 0.0, bool(config.get("use_rslora")),
             use_dora=bool(config.get("use_dora")), name=name, token_ids=ids)
    for layer, parts in found.items():
        for part, key in parts.items():
            own = getattr(model.get_submodule(layer).adapters[name], part)
            own.copy_(mapped_tensor(folder / WEIGHTS, entries[key]))
    return model


def adapter_config(folder: Path) -> dict:
    """The content of an adapter_config.json; UserError where it asks for what is not known here."""
    config = read_json(folder / CONFIG)
    wrong = [key for key, value in config.items() if key not in KNOWN and value and value != "none"]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        wrong.append("init_lora_weights")  # the others change the base, too
    if config.get("peft_type") != "LORA":
        wrong.insert(0, "peft_type")
    if wrong:
        wrong = ", ".join(f"{key} {config.get(key)!r:.60}" for key in wrong)
        raise UserError(f"{folder / CONFIG}: {wrong} is not supported here; known are LoRA, rsLoRA and DoRA "
                        f"of linear layers, and rows of tokens")
    number, nothing = (int, float), type(None)
    for key, types in {"r": int, "lora_alpha": number, "lora_dropout": (*number, nothing),
                       "use_rslora": (bool, nothing), "use_dora": (bool, nothing),
                       "base_model_name_or_path": (str, nothing)}.items():
        if not isinstance(config.get(key), types):
            raise UserError(f"{folder / CONFIG} is damaged: {key} is {config.get(key)!r:.60}")
    return config


def token_ids_of(config: dict) -> list[int]:
    indices = config.get("trainable_token_indices") or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    if any(ids != lists[0] for ids in lists):
        raise UserError(f"trainable_token_indices {indices!r:.100} name other tokens for the head than for "
                        f"the embedding, which is not supported here")
    ids = lists[0] if lists else []
    if not isinstance(ids, list) or not all(type(id) is int and id >= 0 for id in ids) \
            or len(set(ids)) < len(ids):
        raise UserError(f"trainable_token_indices {indices!r:.100} is damaged: ids of tokens are expected, "
                        f"each once")
    return ids


def grow(model: nn.Module, vocab_size: int):
    """More rows for embedding and head, where an adapter speaks of tokens that the base does not have."""
    if isinstance(model, Transformer):
        extend_embedding(model, vocab_size)


def check_base(folder: Path, config: dict, found: dict, entries: dict, model: nn.Module):
    """Raise UserError unless each layer of the adapter is one of the model, and of its shape."""
    modules, ids = dict(model.named_modules()), token_ids_of(config)
    if ids and isinstance(model, Transformer) and max(ids) >= model.config.vocab_size + len(ids):
        raise UserError(f"{folder} is an adapter for another base: it has a row for token {max(ids)}, "
                        f"and this model has {model.config.vocab_size} tokens")
    for layer, parts in found.items():
        module = modules.get(layer)
        if module is None or "lora_A" in parts and not is_linear(module):
            raise UserError(f"{folder} is an adapter for another base: this model has no linear layer "
                            f"{layer:.100}")
        if "lora_A" in parts or is_linear(module) and "token_rows" not in parts:
            rows, columns = module.out_features, module.in_features
            wanted = {"lora_A": (config["r"], columns), "lora_B": (rows, config["r"])}
            if config.get("use_dora"):
                wanted["lora_magnitude"] = (rows,)
        else:
            has_rows = layer in ("model.embed_tokens", "lm_head") and bool(ids)
            wanted = {"token_rows": (len(ids), module.weight.size(1))} if has_rows else {}
        shapes = {part: entries[key].shape for part, key in parts.items()}
        if shapes != wanted:
            part = next(part for part in {**wanted, **shapes} if shapes.get(part) != wanted.get(part))
            raise UserError(f"{folder} is an adapter for another base: {part} of {layer} is "
                            f"{shapes.get(part, 'missing')}, and this model needs {wanted.get(part, 'none')}")
    if not any("lora_A" in parts for parts in found.values()):
        raise UserError(f"{folder} is no LoRA adapter: it has no lora_A")


# ------------------------------------------------------------------------------------------------------------
# 2. A base and its adapter as one model


def open_model(folder, device="cpu",
               dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer | None]:
    """checkpoint.load_model, for adapters' folders too: their base is read, and they are merged into it."""
    whole = Path(folder)
    folder = next((place for place in (whole, whole / "adapter") if (place / CONFIG).is_file()), None)
    if folder is None or (whole / "model.safetensors").is_file():  # a merged model needs its base no more
        return checkpoint.load_model(whole, device, dtype)
    base = adapter_config(folder).get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise UserError(f"{folder} is an adapter for {base}, and there is no such folder here; merge it with "
                        f"the one you have: python lora.py merge --base F --adapter {folder} --out F")
    known = trained_on(folder)
    if known and known["sha256"] != fingerprint(base):
        raise UserError(f"{folder} was trained on other weights than those that lie in {base} now; find "
                        f"them, or merge it all the same: python lora.py merge --other_base")
    model, tokenizer = load_base(base, known.get("quantize"), device, dtype)
    reads_as(model, folder)
    remove_lora(merge_lora(load_adapter(model, folder), dequantize=True))
    return model.eval(), checkpoint.load_tokenizer(folder, model.config) or tokenizer


def reads_as(model: Transformer, folder: Path):
    """Give the model the config that an adapter's folder has, if any: how far it reads, and more tokens."""
    if (folder / "config.json").is_file():
        config = model_config(folder / "config.json")
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "head_dim", "tie_embeddings",
                     "qk_norm"):
            if getattr(config, name) != getattr(model.config, name):
                raise UserError(f"{folder} is an adapter for another base: of {name} "
                                f"{getattr(config, name)}, not {getattr(model.config, name)}")
        grow(model, config.vocab_size)
        model.config = model.model.config = config


class Later(NamedTuple):
    """A tensor that is made when write_tensors asks for it."""
    shape: tuple
    dtype: torch.dtype
    whole: Callable[[], Tensor]


def merge_folders(base, adapter, out, quantize: str | None = None):
    """Write the model folder of a base with an adapter merged into it, with one tensor in memory at a time.

    quantize: merge into the base as it is once quantised and dequantised. Numbers stay of the base's type.
    """
    base, adapter = Path(base), Path(adapter)
    checkpoint.refuse_adapter(base)
    config, stored = model_config(base / "config.json"), stored_tensors(base)
    model, tokenizer = checkpoint.empty_model(config), checkpoint.load_tokenizer(base, config)
    checkpoint.check_names(base, {name: entry.shape for name, (_, entry) in stored.items()}, model)
    reads_as(model, adapter)
    load_adapter(model, adapter)
    tensors = {}
    for name, place in stored.items():
        module, tensor = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        if name != "lm_head.weight" or not config.tie_embeddings:
            make = merged_later(name, module, place, quantize)
            tensors[name] = Later(tuple(tensor.shape), place[1].dtype, make)
    dtype = next(iter(tensors.values())).dtype
    bare = checkpoint.empty_model(model.config).to(dtype)
    tokenizer = checkpoint.load_tokenizer(adapter, model.config) or tokenizer
    checkpoint.save_model(bare, tokenizer, out, tensors=tensors)


def merged_later(name: str, module: nn.Module, place: tuple, quantize: str | None) -> Callable[[], Tensor]:
    @torch.no_grad()
    def merged() -> Tensor:
        tensor = mapped_tensor(*place)
        weight = tensor.float()
        if quantize and type(module) is nn.Linear and name.endswith(".weight") and "lm_head" not in name:
            weight = dequantize(QUANTIZE[quantize](weight))
        if isinstance(module, (nn.Embedding, nn.Linear)) and name.endswith(".weight"):
            new = module.weight.size(0) - weight.size(0)
            mean = weight.mean(dim=0, keepdim=True)  # as extend_embedding
            weight = torch.cat([weight, mean.expand(new, -1)])
            adapter = module.adapters.at_work() if "adapters" in module._modules else None
            weight = weight if adapter is None else adapter.merged(weight)
        return weight.to(tensor.dtype)
    return merged


@dataclass
class Merge:
    base: str  # model folder
    adapter: str  # folder of an adapter for it, ours or peft's
    out: str  # folder to write: a plain model
    dequantized: bool | None = None  # of an adapter that was trained on a quantised base: merge into what it
        # saw, the base quantised and dequantised, or (--no-dequantized) into the base
    other_base: bool = False  # `base` has other weights than those that the adapter was trained on; merge all
                              # the same
    overwrite: bool = False  # replace the model in `out`


def merge(settings: Merge):
    out, adapter = Path(settings.out), Path(settings.adapter)
    if out.exists() and not settings.overwrite:
        raise UserError(f"{out} exists; choose another --out, or pass --overwrite")
    for other in (settings.base, settings.adapter):
        if out.resolve() == Path(other).resolve():
            raise UserError(f"--out {out} is what is to be read; choose another")
    known = trained_on(adapter)
    if known.get("quantize") and settings.dequantized is None:
        raise UserError(f"{adapter} was trained on a base quantised to {known['quantize']}; pass "
                        f"--dequantized to merge it into that base, dequantised, or --no-dequantized to "
                        f"merge it into the full one")
    if settings.dequantized and not known.get("quantize"):
        raise UserError(f"--dequantized: {adapter} does not say that its base was quantised; leave it out")
    if known and known["sha256"] != fingerprint(settings.base) and not settings.other_base:
        raise UserError(f"{adapter} was trained on other weights than those of {settings.base} (on "
                        f"{known['folder']}, as it then was; or is it merged already?); pass --other_base to "
                        f"merge it all the same")
    merge_folders(settings.base, adapter, out, known.get("quantize") if settings.dequantized else None)
    print(f"model: {out}")


# ------------------------------------------------------------------------------------------------------------
# 3. Adapters in the stages


@dataclass
class Adapter:
    """Adapters: settings that SFT, DPO, PPO and distillation inherit."""
    lora_rank: int = 0  # train adapters of this rank, and leave the weights as they are; 0: train the weights
    lora_alpha: float = 16.0  # what they add is scaled by alpha / rank
    lora_targets: tuple[str, ...] = ("all",)  # layers that get one: all linear ones but the head, or such
                                              # names as q_proj v_proj
    lora_dropout: float = 0.0  # of what they read
    lora_lr: float = 0.01  # their peak learning rate (AdamW), in place of --lr
    lora_plus: float = 1.0  # so many times that rate for B (LoRA+; Hayou et al. 2024)
    use_rslora: bool = False  # scaled by alpha / sqrt(rank), which suits high ranks
    use_dora: bool = False  # learn the length of each row apart (DoRA)
    quantize: Literal["nf4", "int8"] | None = None  # store the base in 4.127 or 8.125 bits a weight (QLoRA)
    lora_merge: bool = True  # write the merged model, too; --no-lora_merge: the adapter alone

    def check_adapter(self):
        """Raise UserError where one of these is out of range, or they do not go together."""
        require(self, lora_rank=(0, None), lora_alpha=(1e-6, 1e6), lora_dropout=(0, 0.99),
                lora_lr=(1e-12, 10), lora_plus=(1e-3, 1e3))
        if self.lora_rank == 0:
            for name in Adapter.__dataclass_fields__:
                value = getattr(self, name)
                if value != self.__dataclass_fields__[name].default:  # a stage may have another one
                    raise UserError(f"--{name} {value} is for adapters, and there are none; pass "
                                    f"--lora_rank 8")
            return
        if self.tensor_parallel > 1:
            raise UserError(f"--tensor_parallel {self.tensor_parallel} does not know adapters; pass "
                            f"--data_parallel fsdp, or --lora_rank 0")
        if self.lora_dropout and "lm_head" in self.lora_targets:
            raise UserError(f"--lora_dropout {self.lora_dropout} cannot reach lm_head, whose weight the loss "
                            f"reads whole; leave one of them out")
        if self.lr not in (type(self).lr, self.lora_lr):
            raise UserError(f"--lr {self.lr} is the rate of weights, which adapters leave as they are; pass "
                            f"--lora_lr")
        self.lr = self.lora_lr  # what the schedule falls from, and the log shows


def add_adapter(model: Transformer, settings, token_ids: Sequence[int] = ()) -> str:
    """Give the base of settings.init_from the adapter that the settings describe, if any.

    token_ids: tokens that the base does not know. Returns a line about what is trained.
    """
    if not settings.lora_rank:
        return f"trained: all of {sum(p.numel() for p in model.parameters()):,} parameters"
    generator = torch.Generator().manual_seed(settings.seed)
    add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.lora_dropout,
             settings.use_rslora, use_dora=settings.use_dora, token_ids=token_ids, generator=generator)
    base_of(model).update(folder=Path(settings.init_from).as_posix(), sha256=fingerprint(settings.init_from),
                          quantize=settings.quantize, merge=settings.lora_merge)
    trained = [p for p in model.parameters() if p.requires_grad]
    stored = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    rows = f", in them {len(token_ids)} new tokens' rows in embedding and head" if len(token_ids) else ""
    kind = f", its blocks in {settings.quantize}" if settings.quantize else ""
    return (f"trained: adapters of rank {settings.lora_rank} on "
            f"{len(adapters_of(model)['default']['target_modules'])} layers, "
            f"{sum(p.numel() for p in trained):,} parameters{rows}; frozen: the base{kind}, "
            f"{stored / 2 ** 20:,.1f} MiB")
