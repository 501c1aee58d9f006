"""Rotary positions: each pair of numbers of a query or key is turned by an angle that grows with its position.
"""
import torch
from torch import Tensor


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (..., T, D/2) in float32, of position times theta^(-2i/D) (Su et al. 2021, Eq. 15).

    float32 throughout: in bfloat16 the positions beyond 256 would already be rounded.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    # (D/2,); theta ** -exponents would have other last bits, which show at position 30,000
    frequencies = 1.0 / theta ** exponents
    angles = positions[..., None].float() * frequencies  # (..., T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) with each pair (x[i], x[i + D/2]) turned by its angle, so that q·k depends on i - j
    only.

    Halves are paired, as in Hugging Face, and not neighbours, as in the paper: the same up to a permutation
    of D, and with this choice weights pass in and out unpermuted.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
