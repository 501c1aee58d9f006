"""Rotary positions, and how a model reads on beyond the length that it was trained at.

Each pair of numbers of a query or key is turned by an angle that grows with its position (RoPE, Su et al.
2021): pair d of a head of width D by theta^(-2d/D) a token, its frequency. It has gone round once after a
wavelength of 2 pi / frequency tokens, and that decides what happens beyond the trained length L:

* a pair whose wavelength is short against L has been seen at every angle. Beyond L it shows nothing new. It
  tells neighbours apart, and must keep its pace.
* a pair whose wavelength exceeds L has been seen on a part of its circle only. Beyond L it shows angles that
  no weight has ever met, and the model breaks. It must be slowed down.

With D 64, theta 10,000 and L 128 the fastest pair goes round 20 times within L, and 21 of the 32 not once. To
read s times as far, these rules slow the pairs down, each "frequencies -> frequencies" in a few lines:

    rule      a pair's frequency is divided by                        at the price of
    linear    s, each                                                 neighbours harder to tell apart
    ntk       1 for the fastest, up to s for the slowest              middle pairs at angles new to them
    dynamic   likewise, with an s that follows the length seen        angles that change as the text grows
    yarn      1 where it goes round often in L, s where not once;     two bounds to choose
              and the softmax is made sharper: it has more keys
    llama3    likewise, with bounds closer to each other, and the softmax as it was

All but `ntk`, which is a larger theta from the start, stand in ModelConfig.rope_scaling in Hugging Face's
spelling, and equal transformers'. What each is worth is shown by extend.py. Equations: "PI" are those of
Chen et al. 2023 (arXiv 2306.15595), "YaRN" those of Peng et al. 2023 (arXiv 2309.00071, version 2).
"""
import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config import UserError

if TYPE_CHECKING:
    from model import ModelConfig


def rope_angles(positions: Tensor, head_dim: int, theta: float,
                scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, each (..., T, D/2) in float32, of position times theta^(-2d/D) (Su et al. 2021, Eq. 15).

    positions: (..., T) integers. scaling: as `check_scaling` returns it; both results are then those of the
    slowed pairs, times YaRN's attention temperature where the rule is yarn.

    float32 throughout: in bfloat16 the positions beyond 256 would already be rounded.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    # (D/2,); theta ** -exponents would have other last bits, which show at position 30,000
    frequencies = 1.0 / theta ** exponents
    sharpness = 1.0
    if scaling is not None:
        frequencies, sharpness = scaled(frequencies, theta, positions, scaling)
    angles = positions[..., None].float() * frequencies  # (..., T, D/2)
    if sharpness == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * sharpness, angles.sin() * sharpness  # so that q·k is multiplied by its square


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) with each pair (x[i], x[i + D/2]) turned by its angle, so that q·k depends on i - j
    only.

    Halves are paired, as in Hugging Face, and not neighbours, as in the paper: the same up to a permutation
    of D, and with this choice weights pass in and out unpermuted.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------
# The rules: frequencies (D/2,), the fastest first -> frequencies


def linear(frequencies: Tensor, factor: float) -> Tensor:
    """Position interpolation: all of the longer text lies where the trained length lay."""
    return frequencies / factor  # PI Eq. 4, where it is the position m that becomes m L / L'


def ntk(frequencies: Tensor, factor: float | Tensor) -> Tensor:
    """NTK-aware: the first pair keeps its pace, the last is slowed by `factor`, the others in between.

    The same as a base theta * factor^(D / (D - 2)) (bloc97 2023; YaRN Eq. 16) without its division by zero at
    D = 2. A factor (..., 1, 1) makes the frequencies (..., 1, D/2).
    """
    share = torch.linspace(0, 1, frequencies.size(-1), device=frequencies.device)  # 2d / (D - 2)
    return frequencies / factor ** share  # YaRN Eq. 15: b'^(-2d/D)


def dynamic(frequencies: Tensor, factor: float, trained: int, positions: Tensor) -> Tensor:
    """`ntk` by as much as the length seen so far demands; up to the trained length nothing changes.

    positions: (..., T); the length seen is the largest of a row, plus one. Returns (..., 1, D/2).

    As in transformers, which has the formula from a forum's post (emozilla 2023; YaRN section 3.3 describes
    the idea), keys in a cache keep the angles of the length at which they were read. So what is generated
    depends on where a text was cut into passes, and prefill in chunks differs from one pass. Unlike there, a
    row's length is its own and not the batch's longest, and no longer text of an earlier call is remembered:
    what stands beside or before a text changes nothing.
    """
    growth = (positions.amax(dim=-1, keepdim=True)[..., None] + 1).clamp(min=trained) / trained  # (..., 1, 1)
    return ntk(frequencies, 1 + factor * (growth - 1))


def turns(frequencies: Tensor, trained: int) -> Tensor:
    """How often each pair goes round within the trained length."""
    return trained / (2 * math.pi / frequencies)  # YaRN Eq. 17: L / wavelength


def by_parts(frequencies: Tensor, factor: float, kept: Tensor) -> Tensor:
    """Each pair at its old pace by the share `kept` of it, 0 to 1, and interpolated by the rest."""
    return (1 - kept) * frequencies / factor + kept * frequencies  # YaRN Eq. 20


def llama3(frequencies: Tensor, factor: float, trained: int, low_freq_factor: float,
           high_freq_factor: float) -> Tensor:
    """Llama 3.1's rule: pairs of up to `low` turns interpolated, from `high` turns on kept, a ramp between.

    The paper (Dubey et al. 2024) is silent about it; the source is `apply_scaling` in Meta's llama-models.
    It is YaRN's NTK-by-parts as the paper has it: a ramp over the turns, with (1, 4) for YaRN's (1, 32).
    """
    ramp = (turns(frequencies, trained) - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return by_parts(frequencies, factor, kept=ramp.clamp(0, 1))  # YaRN Eq. 18


def yarn(frequencies: Tensor, theta: float, factor: float, trained: int, beta_fast: float = 32,
         beta_slow: float = 1, truncate: bool = True) -> Tensor:
    """NTK-by-parts as YaRN's authors run it: kept from `beta_fast` turns on, interpolated up to `beta_slow`.

    Unlike in YaRN Eq. 18 the ramp is linear in d and not in the turns: so it is in the authors' code, in
    transformers and in the models trained with them. truncate: the ramp begins and ends at whole d.
    """
    pairs = frequencies.size(-1)
    # the d, no integer as yet, at which a pair goes round r times: YaRN Eq. 17 solved for d
    first, last = (pairs * math.log(trained / (2 * math.pi * r)) / math.log(theta)
                   for r in (beta_fast, beta_slow))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    d = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
    ramp = (d - first) / (last - first or 1)  # of no width at the ends only, where all d are whole
    return by_parts(frequencies, factor, kept=1 - ramp.clamp(0, 1))


def sharpness_of_yarn(factor: float, attention_factor: float | None = None, mscale: float | None = None,
                      mscale_all_dim: float | None = None) -> float:
    """sqrt(1/t): with t the attention's temperature, q·k / (t sqrt(D)) (YaRN Eq. 21), half of 1/t for each.

    mscale, mscale_all_dim: DeepSeek's, which splits the temperature between these angles and the softmax.
    """
    def root(mscale):
        return 0.1 * mscale * math.log(factor) + 1.0  # YaRN Eq. 22
    if attention_factor is not None:
        return attention_factor
    return root(mscale) / root(mscale_all_dim) if mscale and mscale_all_dim else root(1)


def scaled(frequencies: Tensor, theta: float, positions: Tensor, scaling: dict) -> tuple[Tensor, float]:
    """(frequencies by the rule of `scaling`, what cos and sin are multiplied by)."""
    kind, factor = scaling["rope_type"], scaling["factor"]
    trained = scaling["original_max_position_embeddings"]

    def options(*names):
        return {name: scaling[name] for name in names if name in scaling}
    if kind == "linear":
        return linear(frequencies, factor), 1.0
    if kind == "dynamic":
        return dynamic(frequencies, factor, trained, positions), 1.0
    if kind == "llama3":
        return llama3(frequencies, factor, trained, **options("low_freq_factor", "high_freq_factor")), 1.0
    assert kind == "yarn", kind
    return (yarn(frequencies, theta, factor, trained, **options("beta_fast", "beta_slow", "truncate")),
            sharpness_of_yarn(factor, **options("attention_factor", "mscale", "mscale_all_dim")))


# ------------------------------------------------------------------------------------------------------------
# Asking for one


KEYS = {  # of each rule, beside rope_type, factor and original_max_position_embeddings
    "linear": (), "dynamic": (), "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
MOST = 1e9
LEAST = {"factor": 1, "original_max_position_embeddings": 1, "mscale": 0, "mscale_all_dim": 0}


def check_scaling(scaling: dict, max_seq_len: int, theta: float = 10000.0) -> dict:
    """`scaling` with original_max_position_embeddings, the trained length, filled in; else a UserError.

    As in transformers, where it is absent the trained length is max_seq_len, and None means absent. (`linear`
    needs none.)
    """
    if not isinstance(scaling, dict) or not isinstance(scaling.get("rope_type"), str):
        raise UserError(f"rope_scaling {scaling!r:.80} names no rule; it is {{'rope_type': …, 'factor': …}}")
    kind = scaling["rope_type"]
    if kind not in KEYS:
        raise UserError(f"rope_scaling of the type {kind!r:.40} is not known; known are {', '.join(KEYS)}")
    scaling = {key: value for key, value in scaling.items() if value is not None}
    scaling.setdefault("original_max_position_embeddings", max_seq_len)
    known = ("rope_type", "factor", "original_max_position_embeddings", *KEYS[kind])
    unknown = [key for key in scaling if key not in known]
    if unknown:
        raise UserError(f"rope_scaling of {kind} has {', '.join(map(str, unknown)):.80}, which it does not "
                        f"know; it knows {', '.join(known[1:])}")
    missing = [key for key in ("factor", *KEYS["llama3"]) if key in known and key not in scaling]
    if missing:
        raise UserError(f"rope_scaling of {kind} lacks {', '.join(missing)}")
    for key in known[1:]:
        if key in scaling:
            check_value(kind, key, scaling[key])
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if scaling.get(low, 1) >= scaling.get(high, 32):
            raise UserError(f"rope_scaling of {kind} has {low} {scaling.get(low, 1)}, which must be below "
                            f"{high}, {scaling.get(high, 32)}")
    if kind == "yarn" and theta <= 1:
        raise UserError(f"rope_scaling of yarn needs a rope_theta above 1, not {theta}")
    return scaling


def check_value(kind: str, key: str, value):
    """Raise UserError unless `value` is of the type and in the range of this key of rope_scaling."""
    whole = key == "original_max_position_embeddings"
    if key == "truncate":
        right, bound = isinstance(value, bool), "true or false"
    else:
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        least = LEAST.get(key, 1e-6)  # and with MOST no angle overflows
        right = right and least <= value <= MOST
        bound = f"a {'whole ' * whole}number of {least:g} to {MOST:g}"
    if not right:
        raise UserError(f"rope_scaling of {kind} has {key} {value!r:.40}; it must be {bound}")


def extended(config: "ModelConfig", rule: str, factor: float) -> "ModelConfig":
    """The config of the same model, to read `factor` times as far by a rule, `ntk` or one of KEYS.

    ntk changes no more than rope_theta, so no config needs to know it, here or in a folder. Raises UserError
    where the model is extended already (which ntk leaves no trace of): the rules do not add up.
    """
    if config.rope_scaling is not None:
        raise UserError(f"this model is extended already, by {config.rope_scaling['rope_type']} with factor "
                        f"{config.rope_scaling['factor']}; extend the one that it was made from")
    check_value(rule, "factor", factor)
    changes = {"max_seq_len": math.floor(factor * config.max_seq_len)}
    if rule == "ntk":
        D = config.head_dim
        changes["rope_theta"] = config.rope_theta * factor ** (D / max(D - 2, 1))  # YaRN Eq. 16
    else:
        llama = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rule == "llama3" else {}  # Llama 3.1's
        changes["rope_scaling"] = {"rope_type": rule, "factor": float(factor), **llama,
                                   "original_max_position_embeddings": config.max_seq_len}
    return dataclasses.replace(config, **changes)
