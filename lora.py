"""LoRA and QLoRA: fine-tune a model by a few numbers beside its weights, which stay as they are.

What fine-tuning adds to a matrix is nearly of low rank (Hu et al. 2021, https://arxiv.org/abs/2106.09685). So
freeze W (out, in), and learn two thin matrices beside it:

    y = W x + (alpha / r) B A dropout(x)        A (r, in) random, B (out, r) zero: at first y is W x

By hand: a W of 1,024 x 512 has 524,288 numbers; with r = 8, A has 8 x 512 and B 1,024 x 8, in all 12,288,
2.3 % of them. Only those have gradients and moments; the rest needs neither, and can be stored in 4 bits
(QLoRA: quantize.py). Afterwards W + (alpha / r) B A is a matrix again.

    python sft.py --lora_rank 8 --lora_alpha 16 --out runs/lora                  # adapters on runs/base
    python sft.py --lora_rank 8 --lora_alpha 16 --quantize nf4 --out runs/qlora  # the base at 4.127 bits
    python lora.py merge --base runs/base --adapter runs/lora/adapter --out runs/merged

Both runs leave a plain model folder (merged) and in it `adapter/`, in the format of the peft library: for the
model of the main job 329 KiB at rank 8, 49 at rank 1, where the whole has 7.3 MiB.
"""
import contextlib
import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from bpe import Tokenizer
from checkpoint import METADATA, mapped_tensor, model_config, read_header, read_json, stored_tensors
from config import UserError, file_checksum, parse, require, run
from model import Transformer, extend_embedding
# Some of these names are imported to be names of this file, too (F401)
from quantize import (NF4, QUANTIZE, Int8Tensor, NF4Tensor, QuantizedLinear, dequantize,  # noqa: F401
                      dequantize_int8, dequantize_nf4, load_base, quantize_int8, quantize_model, quantize_nf4,
                      stored_parts, weight_of)

# ------------------------------------------------------------------------------------------------------------
# 1. LoRA


class LoRA(nn.Module):
    """What one adapter adds to one linear layer. lora_A (r, in), lora_B (out, r).

    use_dora: magnitude and direction apart (DoRA, Liu et al. 2024, https://arxiv.org/abs/2402.09353, Eq. 5):
    W + scale B A is the direction, and lora_magnitude (out,) the length of each of its rows, learnt as well.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float = 0.0,
                 use_dora: bool = False, generator: torch.Generator | None = None):
        """Beside linear, whose weight is (out, in): A uniform within +-1 / sqrt(in), drawn by the generator;
        B zeros; both of the weight's kind and where that lies. scale: alpha / r, or with rsLoRA alpha /
        sqrt(r). The magnitude begins as the rows' lengths; without use_dora it is None.
        """
        super().__init__()
        weight = weight_of(linear)
        rows, columns, place = *weight.shape, {"device": place_of(weight), "dtype": weight.dtype}
        bound = columns ** -0.5  # what nn.Linear itself begins with, and peft: kaiming_uniform_(a=sqrt(5))
        self.lora_A = nn.Parameter(torch.empty(rank, columns, **place).uniform_(-bound, bound,
                                                                               generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, **place))
        self.scale, self.dropout = scale, dropout
        lengths = torch.empty(rows, **place) if weight.is_meta else self.lengths(weight).to(weight.dtype)
        self.lora_magnitude = nn.Parameter(lengths) if use_dora else None

    def forward(self, x: Tensor, y: Tensor, linear: nn.Module) -> Tensor:
        """y (..., out), which is linear(x), with the adapter's part added. x (..., in)."""
        dropped = F.dropout(x, self.dropout, self.training)
        down = F.linear(dropped, self.lora_A)  # (..., in) -> (..., r)
        if self.lora_magnitude is not None:
            return self.dora(x, dropped, down, y, linear)
        both = torch.addmm(y.flatten(0, -2), down.flatten(0, -2), self.lora_B.T, alpha=self.scale)
        return both.view(y.shape)  # product, scale and sum in one pass over y

    def dora(self, x: Tensor, dropped: Tensor, down: Tensor, y: Tensor, linear: nn.Module) -> Tensor:
        """m / |W + s B A| (W x + s B A x); the length counts as a constant (section 4.3)."""
        weight = weight_of(linear)
        ratio = (self.lora_magnitude / self.lengths(weight)).to(y.dtype)  # (out,); exactly 1 at the start
        if dropped is x:
            Wx = y if linear.bias is None else y - linear.bias
        else:
            Wx = F.linear(dropped, weight.to(dropped.dtype))  # as peft: all that changes reads what is left
        return y + (ratio - 1) * Wx + ratio * self.scale * F.linear(down, self.lora_B)

    def whole(self, weight: Tensor, sign: int = 1) -> Tensor:
        """W + s B A (out, in), in float32 or better, whatever the products of the model are made in.

        weight: W. sign: -1 for W - s B A, which takes a merged adapter out again.
        """
        exact = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight.to(exact), self.lora_B.to(exact), self.lora_A.to(exact),
                               alpha=sign * self.scale)

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> Tensor:
        """|W + s B A|, row by row: (out,)."""
        return self.whole(weight).norm(dim=1)

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the adapter in it: (out, in)."""
        whole = self.whole(weight)
        if self.lora_magnitude is not None:
            whole = whole * (self.lora_magnitude / whole.detach().norm(dim=1))[:, None]
        return whole.to(weight.dtype)

    def kept(self, weight: Tensor) -> Tensor | None:
        """What merging this weight would lose, and unmerging needs: with DoRA the rows' lengths."""
        return None if self.lora_magnitude is None else self.lengths(weight)

    def unmerged(self, weight: Tensor, kept: Tensor | None) -> Tensor:
        if kept is not None:
            weight = weight * (kept / self.lora_magnitude)[:, None]
        return self.whole(weight, sign=-1).to(weight.dtype)


class Rows(nn.Module):
    """The rows of a few tokens, learnt in place of those that the frozen embedding or head has: (n, C).

    A low-rank change of what was known cannot give new tokens a meaning: theirs is learnt whole. This is
    peft's trainable_token_indices.
    """

    def __init__(self, table: nn.Module, ids: Sequence[int], rows: nn.Parameter | None = None):
        super().__init__()
        weight = table.weight.detach()
        self.register_buffer("ids", torch.tensor(ids, device=place_of(weight)), persistent=False)
        if rows is None:
            rows = nn.Parameter(torch.empty(len(ids), weight.size(1)) if weight.is_meta else weight[self.ids])
        self.token_rows = rows

    def forward(self, x: Tensor, y: Tensor, table: nn.Module) -> Tensor:
        if isinstance(table, nn.Embedding):
            found = x.unsqueeze(-1) == self.ids  # (B, T, n)
            rows = F.embedding(found.int().argmax(-1), self.token_rows)
            return torch.where(found.any(-1, keepdim=True), rows, y)  # (B, T, C)
        return y.index_copy(-1, self.ids, F.linear(x, self.token_rows).to(y.dtype))  # logits (..., V)

    def merged(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.ids, self.token_rows.to(weight.dtype))

    def kept(self, weight: Tensor) -> Tensor:
        return weight[self.ids]

    def unmerged(self, weight: Tensor, kept: Tensor) -> Tensor:
        return weight.index_copy(0, self.ids, kept)


def place_of(weight: Tensor) -> torch.device:
    """Where an adapter of this weight lives; beside one without memory (see merge_folders), on the CPU."""
    return torch.device("cpu") if weight.is_meta else weight.device


class Adapters(nn.ModuleDict):
    """The adapters of one layer by name, of which at most one is at work; in the layer, as .adapters."""

    def __init__(self):
        super().__init__()
        self.active: str | None = None  # its name
        self.off = False  # for a while: see adapter_off
        self.is_merged, self.kept = False, None  # is the active one in the weight?

    def at_work(self) -> nn.Module | None:
        idle = self.off or self.is_merged or self.active not in self
        return None if idle else self[self.active]


def adapt(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    """The forward hook by which adapters work: model.py knows nothing of them, and names stay as they are."""
    adapter = module.adapters.at_work()
    return y if adapter is None else adapter(args[0], y, module)


def effective_weight(module: nn.Module) -> Tensor:
    """The module's weight with the adapter at work in it (without its dropout), for losses that read it."""
    adapter = module.adapters.at_work() if "adapters" in module._modules else None
    return module.weight if adapter is None else adapter.merged(module.weight)


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16.0, targets: str | Sequence[str] = "all",
             dropout: float = 0.0, use_rslora: bool = False, *, use_dora: bool = False, name: str = "default",
             token_ids: Sequence[int] = (), generator: torch.Generator | None = None) -> nn.Module:
    """Freeze the model and give it an adapter, which is then at work; edits and returns the model.

    rank: r. alpha: the change is scaled by alpha / r; use_rslora: by alpha / sqrt(r), so that its size does
    not fall with the rank (Kalajdzievski 2023). targets: "all" linear layers but the head, or names: q_proj,
    layers.0.mlp.up_proj. dropout: of what A reads, in training. token_ids: tokens whose rows of embedding and
    head are learnt whole (see Rows). name: several adapters can stand on one model; see switch_adapter.

    Raises UserError where a target matches nothing, is a tied head or smaller than the rank, and where the
    name is taken.
    """
    if not name or "." in name or name in adapters_of(model):
        raise UserError(f"the adapter cannot be called {name!r}: a name is not empty, has no dot and is not "
                        f"one of this model's, {', '.join(adapters_of(model)) or 'which has none'}")
    require(SimpleNamespace(lora_alpha=alpha, lora_dropout=dropout), lora_alpha=(1e-6, 1e6),
            lora_dropout=(0, 0.99))
    chosen = targeted(model, targets, rank)
    for p in model.parameters():
        p.requires_grad = False
    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    for module in chosen.values():
        attach(module, name, LoRA(module, rank, scale, dropout, use_dora, generator))
    tables = add_rows(model, name, token_ids, chosen)
    adapters_of(model)[name] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "lora_dropout": dropout, "target_modules": list(chosen), "use_rslora": use_rslora,
        "use_dora": use_dora, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "trainable_token_indices": {table: list(token_ids) for table in tables} or None}
    switch_adapter(model, name)
    return model


def adapters_of(model: nn.Module) -> dict[str, dict]:
    """{name: what peft's adapter_config.json says of it} of the model's adapters."""
    return model.__dict__.setdefault("adapter_configs", {})


def targeted(model: nn.Module, targets: str | Sequence[str], rank: int) -> dict[str, nn.Module]:
    """{path: linear layer} that the targets name, as peft matches them: the whole path, or its end."""
    layers = {path: module for path, module in model.named_modules() if is_linear(module)}
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen = {}
    for name in names:
        found = {path: module for path, module in layers.items() if path == name or path.endswith(f".{name}")
                 or name == "all" and path not in ("lm_head", "score")}  # score: a reward model's head
        if not found:
            known = sorted({path.rpartition(".")[2] for path in layers})
            raise UserError(f"--lora_targets {name} matches no linear layer of this model; there are all, "
                            f"{', '.join(known)}")
        chosen |= found
    chosen = {path: module for path, module in layers.items() if path in chosen}  # in the model's order
    for path, module in chosen.items():
        if path == "lm_head" and is_tied(model):
            raise UserError("--lora_targets lm_head: this model's head is tied to its embedding, and a "
                            "change of one would not be one of the other; leave it out, or untie it first")
        most = min(module.in_features, module.out_features)
        if not 1 <= rank <= most:
            raise UserError(f"--lora_rank {rank} is out of range; {path} is of {module.out_features} x "
                            f"{module.in_features}, whose rank is 1 to {most}")
    return chosen


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, QuantizedLinear))


def is_tied(model: nn.Module) -> bool:
    return isinstance(model, Transformer) and model.lm_head.weight is model.model.embed_tokens.weight


def attach(module: nn.Module, name: str, adapter: nn.Module):
    if "adapters" not in module._modules:
        module.adapters = Adapters()
        module.register_forward_hook(adapt)
    module.adapters[name] = adapter
    module.adapters.train(module.training)


def add_rows(model: nn.Module, name: str, ids: Sequence[int], chosen: Mapping[str, nn.Module]) -> list[str]:
    """Make rows of embedding and head trainable; returns whose. A tied head shares the embedding's."""
    if not len(ids):
        return []
    embedding, tied = model.model.embed_tokens, is_tied(model)
    attach(embedding, name, Rows(embedding, ids))
    if tied:
        attach(model.lm_head, name, Rows(model.lm_head, ids, embedding.adapters[name].token_rows))
    elif "lm_head" not in chosen:
        attach(model.lm_head, name, Rows(model.lm_head, ids))
        return ["embed_tokens", "lm_head"]
    return ["embed_tokens"]


# ------------------------------------------------------------------------------------------------------------
# 2. One model, several adapters, and none


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of those that have adapters."""
    return ((path, module) for path, module in model.named_modules() if "adapters" in module._modules)


def switch_adapter(model: nn.Module, name: str | None):
    """Put this adapter to work, alone, and let it be trained; None: the base model again."""
    if name is not None and name not in adapters_of(model):
        raise UserError(f"there is no adapter {name!r}; this model has "
                        f"{', '.join(adapters_of(model)) or 'none'}")
    refuse_merged(model)
    for _, module in adapted(model):
        module.adapters.active = name
        for other, adapter in module.adapters.items():
            adapter.requires_grad_(False)
    for _, module in adapted(model):  # after all are frozen: a tied head shares its rows
        if name in module.adapters:
            module.adapters[name].requires_grad_(True)


@contextlib.contextmanager
def adapter_off(model: nn.Module):
    """Within this context the model is its base again: a reference, without a second copy in memory."""
    refuse_merged(model)
    modules = [module.adapters for _, module in adapted(model)]
    before = [adapters.off for adapters in modules]
    for adapters in modules:
        adapters.off = True
    try:
        yield model
    finally:
        for adapters, off in zip(modules, before):
            adapters.off = off


def refuse_merged(model: nn.Module):
    if any(module.adapters.is_merged for _, module in adapted(model)):
        raise UserError("the adapter is merged into the weights; unmerge_lora takes it out again")


@torch.no_grad()
def merge_lora(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Put the adapter at work into the weights: from now on it costs nothing. Edits and returns the model.

    dequantize: a quantised base becomes plain matrices again, those that the adapter was trained with;
    without this word it is refused, as they take eight times the memory. Raises UserError where it is merged.
    """
    refuse_merged(model)
    if not dequantize and any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UserError("the base is quantised, and a merged matrix is not; say dequantize=True to merge "
                        "into the dequantised base (as a command: --dequantized)")
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                plain = child.plain()
                if "adapters" in child._modules:
                    plain.adapters = child.adapters
                    plain.register_forward_hook(adapt)
                setattr(parent, key, plain)
    weights = set()
    for _, module in adapted(model):
        adapter = module.adapters.at_work()
        if adapter is not None:
            if module.weight not in weights:  # a tied one has it already
                module.adapters.kept = adapter.kept(module.weight)
                module.weight.copy_(adapter.merged(module.weight))
            weights.add(module.weight)
            module.adapters.is_merged = True
    return model


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> nn.Module:
    """Take the merged adapter out of the weights again; edits and returns the model.

    Not bitwise: that would take a second copy of W. Two roundings are left, of W + D and of that minus D (D
    the adapter's part): |W' - W| <= 2^-24 (|W + D| + |W'|) in float32, a weight in some ten changed by its
    last bit. Rows of tokens are kept, and come back bitwise. adapter_off is exact.
    """
    done = False
    for _, module in adapted(model):
        adapters = module.adapters
        if adapters.is_merged:
            if adapters.kept is not None or isinstance(adapters[adapters.active], LoRA):
                module.weight.copy_(adapters[adapters.active].unmerged(module.weight, adapters.kept))
            adapters.is_merged, adapters.kept, done = False, None, True
    if not done:
        raise UserError("no adapter is merged into the weights; merge_lora does that")
    return model


def remove_lora(model: nn.Module) -> nn.Module:
    """Take all adapters off the model: a plain one is left, with what is merged in its weights."""
    for _, module in list(adapted(model)):
        del module.adapters
        for key, hook in list(module._forward_hooks.items()):
            if hook is adapt:
                del module._forward_hooks[key]
    adapters_of(model).clear()
    return model


# ------------------------------------------------------------------------------------------------------------
# 3. Files: an adapter as peft keeps it

# What our parameters are called there, behind base_model.model.<layer>.
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector",
         "token_rows": "token_adapter.trainable_tokens_delta"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Of peft's options those that we know, and those that are without meaning once an adapter is made: its layers
# are those in the file. All others must be off.
KNOWN = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
         "trainable_token_indices", "base_model_name_or_path", "target_modules", "exclude_modules",
         "layers_to_transform", "layers_pattern", "inference_mode", "init_lora_weights", "auto_mapping",
         "revision", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"}


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """{peft's name in a file: parameter} of all that is trained, be it an adapter or a layer of the model."""
    return {peft_name(name) or f"base_model.model.{name}": p for name, p in model.named_parameters()
            if p.requires_grad}


def peft_name(name: str) -> str | None:
    """<layer>.adapters.<adapter>.lora_A is base_model.model.<layer>.lora_A.weight in peft's files."""
    found = re.fullmatch(r"(.*?)\.?adapters\.[^.]+\.(\w+)", name)
    return found and f"base_model.model.{found[1]}.{PARTS[found[2]]}"


def lora_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter, by peft's names. name: default the one at work."""
    name = name or active_adapter(model)
    return {peft_name(path): p.detach() for path, p in model.named_parameters()
            if peft_name(path) and f"adapters.{name}." in path}


def active_adapter(model: nn.Module) -> str | None:
    return next((module.adapters.active for _, module in adapted(model)), None)


def save_adapter(model: nn.Module, folder, tokenizer: Tokenizer | None = None, name: str | None = None,
                 tensors: Mapping[str, Tensor] | None = None):
    """Write an adapter as peft does, and what the base does not know: the tokenizer, and how far it reads.

    tensors: the weights, where they lie in parts (see checkpoint.write_tensors); default lora_state(model).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # comes last: a folder that has one is whole
    tensors = lora_state(model, name) if tensors is None else tensors
    checkpoint.write_tensors(folder / WEIGHTS, tensors, METADATA)
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


def base_of(model: nn.Module) -> dict:
    """{"folder", "sha256", "quantize"} of the base that the adapters stand on, where that is known."""
    return model.__dict__.setdefault("adapter_base", {})


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


# ------------------------------------------------------------------------------------------------------------
# 4. Settings of the stages, and the command


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


def main():
    if sys.argv[1:2] != ["merge"]:
        raise UserError("lora.py merges: python lora.py merge --base F --adapter F --out F; to train "
                        "adapters pass --lora_rank 8 to sft.py")
    merge(parse(Merge, sys.argv[2:]))


if __name__ == "__main__":
    run(main)
