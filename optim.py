"""Muon: each weight matrix is moved by an orthogonal matrix, its momentum with all singular values set to
(about) one.

A matrix's gradient is dominated by a few directions; AdamW, which sees single numbers, leaves it so. Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves all directions equally: U Vᵀ of the
momentum U S Vᵀ. The product is found without a decomposition, by a few matrix products (Newton-Schulz).
Only matrices inside the blocks profit; `Muon` leaves embeddings, head and norms to AdamW.

What it buys here stands in LOG.md. Unlike torch.optim.Muon: float32 instead of bfloat16, in which a CPU
without bfloat16 instructions is a hundred times slower; matrices of one shape are treated as one batch; one
object serves all parameters.
"""
import torch
from torch import Tensor, nn

# Coefficients of p(s) = a s + b s^3 + c s^5, applied in turn to every singular value s in [0.01, 1]. Constant
# ones, tuned to raise small values fast (Jordan et al. 2024): the results end between 0.68 and 1.14, which
# serves as well as exactly 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """U Vᵀ, approximately, of each matrix U S Vᵀ of the batch (N, rows, columns)."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices if wide else matrices.mT  # (N, n, m) with n <= m: the products below are n x n
    # the Frobenius norm bounds every singular value: all are <= 1 now
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (N, n, m) x (N, m, n) -> (N, n, n)
        x = a * x + (b * gram + c * gram @ gram) @ x  # U and V cancel in between: singular values become p(s)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups with `muon=True`, torch's AdamW for the others.

    groups: dicts of params, muon (bool), lr, weight_decay; for the AdamW groups also betas and eps. momentum:
    decay of the running mean of gradients; Nesterov's form is used. A matrix moves by lr * sqrt(max(1, rows /
    columns)) * U Vᵀ, so that a unit input changes its output by about lr whatever the shape.
    """

    def __init__(self, groups: list[dict], momentum: float = 0.95):
        super().__init__(groups, {"muon": False, "momentum": momentum, "weight_decay": 0.0})
        self.share_with_adamw()

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        self.share_with_adamw()  # load_state_dict and copies make new dicts

    def share_with_adamw(self):
        # the same dicts: a new lr is seen by both
        others = [group for group in self.param_groups if not group["muon"]]
        self.adamw = torch.optim.AdamW(others, fused=True) if others else None
        if others:
            self.adamw.state = self.state  # one for all: saving and loading need not know of the two

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "Muon takes its gradients from .grad"
        if self.adamw:
            self.adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self.step_matrices(group)

    def step_matrices(self, group: dict):
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        for (rows, columns), params in by_shape.items():
            directions = []
            for p in params:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                directions.append(p.grad.lerp(momentum, group["momentum"]))  # Nesterov: look one step ahead
            lr = group["lr"] * max(1.0, rows / columns) ** 0.5
            for p, update in zip(params, orthogonalize(torch.stack(directions))):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=lr)


def make_optimizer(model: nn.Module, settings) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices inside the blocks. No weight decay on one-dimensional parameters.

    Each group holds its peak rate as a share of settings.lr, `lr_scale`: the schedule is one for all.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.dim() >= 2 and ".layers." in name]
    tables = [p for name, p in named if p.dim() >= 2 and ".layers." not in name]  # embedding and head
    vectors = [p for name, p in named if p.dim() < 2]
    adam = {"betas": settings.betas, "eps": settings.eps}
    muon = settings.optimizer == "muon"
    groups = [{"params": matrices, "muon": muon, "lr_scale": 1.0,
               "weight_decay": settings.weight_decay, **adam},
              {"params": tables, "lr_scale": settings.adam_lr / settings.lr,
               "weight_decay": settings.weight_decay, **adam},
              {"params": vectors, "lr_scale": settings.adam_lr / settings.lr, "weight_decay": 0.0, **adam}]
    groups = [{"lr": settings.lr * group["lr_scale"], **group} for group in groups if group["params"]]
    return Muon(groups) if muon else torch.optim.AdamW(groups, fused=True)


def learning_rate(step: int, settings) -> float:
    """Rate of the matrices at a step in 0 … steps-1: linear warm-up, level, linear decay to zero.

    The decay takes the last decay_share of the steps.
    """
    warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    decay_steps = settings.decay_share * settings.steps
    cool = min(1.0, (settings.steps - step) / decay_steps) if decay_steps else 1.0
    return settings.lr * min(warm, cool)
