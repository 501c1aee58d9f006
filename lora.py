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
model of the main job 329 KiB at rank 8, 49 at rank 1, where the whole has 7.3 MiB. adapters.py reads,
writes and merges such folders, and has the settings of the stages.
"""
import contextlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError, parse, require, run
from model import Transformer
# Some of these names are imported to be names of this file, too (F401)
from quantize import (NF4Tensor, QuantizedLinear, dequantize_nf4, quantize_model,  # noqa: F401
                      quantize_nf4, weight_of)

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
    """Where an adapter of this weight lives; on the CPU if that has no memory (adapters.merge_folders)."""
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


def base_of(model: nn.Module) -> dict:
    """{"folder", "sha256", "quantize"} of the base that the adapters stand on, where that is known."""
    return model.__dict__.setdefault("adapter_base", {})


# ------------------------------------------------------------------------------------------------------------
# 3. What is trained, by the names that peft gives it

# What our parameters are called there, behind base_model.model.<layer>.
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector",
         "token_rows": "token_adapter.trainable_tokens_delta"}


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


# ------------------------------------------------------------------------------------------------------------
# 4. The command: merge, which adapters.py does


def main():
    if sys.argv[1:2] != ["merge"]:
        raise UserError("lora.py merges: python lora.py merge --base F --adapter F --out F; to train "
                        "adapters pass --lora_rank 8 to sft.py")
    import adapters  # it stands on this file, and is here only to be found
    adapters.merge(parse(adapters.Merge, sys.argv[2:]))


if __name__ == "__main__":
    run(main)
