"""Weights in 4 or 8 bits: NF4 and absmax int8 by hand, for a base that is frozen (lora.py trains beside it).

Weights scatter normally around zero. So QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) cuts
a matrix into blocks of 64 numbers, divides each by its largest, and keeps of each number which of sixteen
levels is nearest; the levels lie so that each is met about equally often.

    of normal weights       float32    int8    nf4
    bits a weight                32   8.125  4.127      a code, and its share of the block's scale
    error, standard deviations    0   0.007  0.092      root mean square

A matrix is whole only while it multiplies; the backward pass makes it anew instead of keeping it.

    python sft.py --lora_rank 8 --quantize nf4

Codes, scales and values equal those of bitsandbytes (tests/test_lora.py).
"""
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from bpe import Tokenizer
from model import Transformer

# The levels of NF4 (Dettmers et al. 2023, appendix E): quantiles of the normal distribution, at 8 steps of
# probability from 1/2 up to 0.9677 and 7 down, divided by the largest, so that each is met equally often by
# weights that scatter normally; 0 and +-1 exactly.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
       1.0)
AT_ONCE = 2 ** 22  # weights that are quantised at a time, a multiple of any block: bounds the memory


class Int8Tensor(NamedTuple):
    """mean + codes / 127 * scales, a scale for each block of the tensor's numbers in their order."""
    codes: Tensor  # (n,) int8
    scales: Tensor  # (blocks,) float32: the largest absolute value of each block
    mean: Tensor  # (1,) float32: what was subtracted before
    shape: torch.Size
    block_size: int


class NF4Tensor(NamedTuple):
    """NF4[codes] * scales, a scale for each block of the tensor's numbers in their order."""
    codes: Tensor  # (ceil(n / 2),) uint8: two codes of 4 bits a byte, the first one high
    scales: Tensor | Int8Tensor  # (blocks,) float32, or in 8 bits
    shape: torch.Size
    block_size: int


def quantize_nf4(weight: Tensor, block_size: int = 64, double: bool = False) -> NF4Tensor:
    """The weight in 4 bits a number, and 32 for each block: 4.5 bits at 64.

    double: the scales in turn in 8 bits, less their mean, in blocks of 256: 4 + 8/64 + 32/(64 256) = 4.127
    (Dettmers et al. 2023, section 3; there in an 8-bit float, here in whole numbers, as spaced evenly they
    serve a block of positive scales as well). A block of zeros stays zeros.
    """
    assert block_size % 2 == 0, "two codes make a byte"
    flat, codes, scales = weight.detach().reshape(-1), [], []
    levels = torch.tensor(NF4, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2  # the nearest level is between two borders
    for part in flat.split(AT_ONCE // block_size * block_size):
        blocks, scale = in_blocks(part, block_size)
        codes.append(torch.bucketize(blocks * reciprocal(scale), borders, out_int32=True).to(torch.uint8)
                     .flatten()[:part.numel() + part.numel() % 2])
        scales.append(scale.flatten())
    codes, scales = torch.cat(codes).view(-1, 2), torch.cat(scales)
    packed = codes[:, 0] << 4 | codes[:, 1]
    scales = quantize_int8(scales, centred=True) if double else scales
    return NF4Tensor(packed, scales, weight.shape, block_size)


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor that q stands for, of its shape."""
    scales = dequantize_int8(q.scales) if isinstance(q.scales, Int8Tensor) else q.scales
    levels = torch.tensor(NF4, device=q.codes.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # (256, 2): of each byte
    values = F.embedding(q.codes.int(), pairs).flatten()
    return scaled(values, scales, q.shape, q.block_size).to(dtype)


def quantize_int8(weight: Tensor, block_size: int = 256, centred: bool = False) -> Int8Tensor:
    """The weight in whole numbers from -127 to 127, and 32 bits for each block: 8.125 bits at 256.

    centred: less the mean of all, for numbers that do not scatter around zero.
    """
    flat, codes, scales = weight.detach().reshape(-1), [], []
    mean = flat.float().mean().view(1) if centred else torch.zeros(1, device=weight.device)
    for part in flat.split(AT_ONCE // block_size * block_size):
        blocks, scale = in_blocks(part.float() - mean, block_size)
        codes.append((blocks * reciprocal(scale) * 127).round().to(torch.int8).flatten()[:part.numel()])
        scales.append(scale.flatten())
    return Int8Tensor(torch.cat(codes), torch.cat(scales), mean, weight.shape, block_size)


def dequantize_int8(q: Int8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scaled(q.codes.float() / 127, q.scales, q.shape, q.block_size) + q.mean).to(dtype)


def in_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(blocks (n, block_size), float32, filled up with zeros; the largest absolute value of each (n, 1))."""
    blocks = F.pad(flat.float(), (0, -flat.numel() % block_size)).view(-1, block_size)
    return blocks, blocks.abs().amax(dim=1, keepdim=True)


def reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0)


def scaled(values: Tensor, scales: Tensor, shape: torch.Size, block_size: int) -> Tensor:
    blocks = F.pad(values, (0, scales.numel() * block_size - values.numel())).view(-1, block_size)
    return (blocks * scales[:, None]).flatten()[:shape.numel()].view(shape)


def dequantize(q: NF4Tensor | Int8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantize_nf4(q, dtype) if isinstance(q, NF4Tensor) else dequantize_int8(q, dtype)


QUANTIZE = {"nf4": lambda weight: quantize_nf4(weight, double=True), "int8": quantize_int8}


class QuantizedLinear(nn.Module):
    """A linear layer whose weight (out, in) is stored quantised, and is a matrix only while it multiplies.

    What it stores are parameters without gradient, so that FSDP cuts them like others. Scales are kept as the
    bits of whole numbers: nobody who casts a model to bf16 shall round them.
    """

    def __init__(self, kind: str, in_features: int, out_features: int, bias: nn.Parameter | None):
        super().__init__()
        self.kind, self.in_features, self.out_features, self.bias = kind, in_features, out_features, bias

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> "QuantizedLinear":
        new = cls(kind, linear.in_features, linear.out_features, linear.bias)
        for name, tensor in stored_parts(QUANTIZE[kind](linear.weight)).items():
            new.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return new

    def quantized(self) -> NF4Tensor | Int8Tensor:
        shape = torch.Size((self.out_features, self.in_features))
        if self.kind == "int8":
            return Int8Tensor(self.codes, self.scale_bits[1:].view(torch.float32),
                              self.scale_bits[:1].view(torch.float32), shape, 256)
        scales = Int8Tensor(self.scale_codes, self.scale_bits[1:].view(torch.float32),
                            self.scale_bits[:1].view(torch.float32), self.scale_codes.shape, 256)
        return NF4Tensor(self.codes, scales, shape, 64)

    def plain(self) -> nn.Linear:
        """A linear layer of the dequantised weight."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(dequantize(self.quantized()), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = QuantizedProduct.apply(x.to(dtype), self.quantized())
        return y if self.bias is None else y + self.bias.to(dtype)


class QuantizedProduct(torch.autograd.Function):
    """x (..., in) times the dequantised matrix (out, in). What is kept for the backward pass is the quantised
    one: there it is dequantised anew."""

    @staticmethod
    def forward(ctx, x: Tensor, q: NF4Tensor | Int8Tensor) -> Tensor:
        ctx.q = q
        return F.linear(x, dequantize(q, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return grad @ dequantize(ctx.q, grad.dtype), None


def stored_parts(q: NF4Tensor | Int8Tensor) -> dict[str, Tensor]:
    """The tensors of a QuantizedLinear by name."""
    if isinstance(q, Int8Tensor):
        return {"codes": q.codes, "scale_bits": torch.cat([q.mean, q.scales]).view(torch.int32)}
    inner = stored_parts(q.scales)
    return {"codes": q.codes, "scale_codes": inner["codes"], "scale_bits": inner["scale_bits"]}


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer, dequantised if need be."""
    return dequantize(module.quantized()) if isinstance(module, QuantizedLinear) else module.weight


def quantize_model(model: nn.Module, kind: Literal["nf4", "int8"] = "nf4") -> nn.Module:
    """Quantise all linear layers but the head, one after the other; edits and returns the model."""
    assert not any("adapters" in module._modules for module in model.modules()), "first quantise, then adapt"
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is nn.Linear and key != "lm_head":
                setattr(parent, key, QuantizedLinear.of(child, kind).train(child.training))
    return model


def load_base(folder, quantize: str | None = None, device="cpu",
              dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer | None]:
    """checkpoint.load_model, but each matrix in the blocks is quantised before the next is read."""
    def quantized(model: Transformer, name: str, tensor: Tensor) -> dict[str, Tensor]:
        path, _, kind = name.rpartition(".")
        parent, _, key = path.rpartition(".")
        module = model.get_submodule(path)
        if type(module) is not nn.Linear or kind != "weight" or key == "lm_head":
            return {name: tensor}
        module.weight = nn.Parameter(tensor)
        new = QuantizedLinear.of(module, quantize)
        setattr(model.get_submodule(parent), key, new)
        return {f"{path}.{part}": p for part, p in new.named_parameters() if part != "bias"}
    return checkpoint.load_model(folder, device, dtype, stored_as=quantized if quantize else None)
