"""How weights move: three optimizers, which weights each gets, and how fast they go at each step.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), for the matrices inside the blocks. A
matrix's gradient is dominated by a few directions; AdamW, which sees single numbers, leaves it so. Muon moves
all directions equally: by U Vᵀ of the momentum U S Vᵀ, found without a decomposition, by a few matrix
products (Newton-Schulz).

AdamW (torch's), for what Muon leaves: embedding, head, norms; or for everything.

Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235), for everything where memory is short. It
divides by root mean squares as Adam does, but keeps one for each row and each column of a matrix instead of
one for each number: n + m floats beside n x m weights, where AdamW holds 2 n m and Muon n m.

`parameter_groups` says which weights are whose, `learning_rate` how fast they go at each step, and
`batch_windows` on how much text a step rests. Weights may stand whole on each process, or in pieces on many
(DTensors, which FSDP and tensor parallelism make).

    python optim.py          # draws the schedules

What each buys here stands in LOG.md.
"""
import functools
import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from config import run
from plot import blocks

# ------------------------------------------------------------------------------------------------------------
# Muon

# Coefficients of p(s) = a s + b s^3 + c s^5, applied in turn to every singular value s in [0.01, 1]. Constant
# ones, tuned to raise small values fast (Jordan et al. 2024): the results end between 0.68 and 1.14, which
# serves as well as exactly 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
WHOLE_AT_ONCE = 2 ** 24  # numbers of the matrices that a process works on at a time (64 MiB); one at least


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """U Vᵀ, approximately, of each matrix U S Vᵀ of the batch (N, rows, columns).

    dtype: of the matrix products; bfloat16 serves where it is fast: the singular values are rough anyway.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices if wide else matrices.mT  # (N, n, m) with n <= m: the products below are n x n
    # the Frobenius norm bounds every singular value: all are <= 1 now
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(dtype) if x.dtype == torch.float32 else x  # (tests compute in float64)
    for _ in range(steps):
        gram = x @ x.mT  # (N, n, m) x (N, m, n) -> (N, n, n)
        x = a * x + (b * gram + c * gram @ gram) @ x  # U and V cancel in between: singular values become p(s)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups with optimizer="muon", torch's AdamW for the others.

    groups: dicts of params, optimizer, lr, weight_decay; for the AdamW groups also betas and eps. momentum:
    decay of the running mean of gradients; Nesterov's form is used. A matrix moves by lr * sqrt(max(1, rows /
    columns)) * U Vᵀ, so that a unit input changes its output by about lr whatever the shape. dtype: of the
    products that find U Vᵀ.

    Unlike torch.optim.Muon: float32 where that is not asked for, as a CPU without bfloat16 instructions is a
    hundred times slower in it; matrices of one shape are one batch; weights may be DTensors; one object
    serves all.
    """

    def __init__(self, groups: list[dict], momentum: float = 0.95, dtype: torch.dtype = torch.float32):
        super().__init__(groups, {"optimizer": "adamw", "momentum": momentum, "weight_decay": 0.0,
                                  "dtype": dtype})
        self.share_with_adamw()

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        self.share_with_adamw()  # load_state_dict and copies make new dicts

    def share_with_adamw(self):
        # the same dicts: a new lr is seen by both
        others = [group for group in self.param_groups if group["optimizer"] != "muon"]
        self.adamw = torch.optim.AdamW(others, fused=True) if others else None
        if others:
            self.adamw.state = self.state  # one for all: saving and loading need not know of the two

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "Muon takes its gradients from .grad"
        if self.adamw:
            self.adamw.step()
        for group in self.param_groups:
            if group["optimizer"] == "muon":
                for params in stackable(group["params"]):
                    self.step_batch(params, group)

    def step_batch(self, params: list[Tensor], group: dict):
        directions = []
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            grad, momentum = gradient(p), own(self.state[p]["momentum"])
            momentum.lerp_(grad, 1 - group["momentum"])
            directions.append(grad.lerp(momentum, group["momentum"]))  # Nesterov: look one step ahead
        rows, columns = params[0].shape
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        for p, update in zip(params, orthogonalize_together(directions, params[0], group["dtype"])):
            own(p).mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=lr)


def stackable(params: list[Tensor]) -> list[list[Tensor]]:
    """The matrices that have a gradient, in lists of one shape and layout.

    Each list is as long as memory for whole matrices allows: WHOLE_AT_ONCE numbers a process.
    """
    lists: dict[tuple, list[list[Tensor]]] = {}
    for p in params:
        if p.grad is not None:
            mesh, placements = (p.device_mesh, p.placements) if isinstance(p, DTensor) else (None, None)
            at_once = (1 if mesh is None else mesh.size()) * max(1, WHOLE_AT_ONCE // p.numel())
            alike = lists.setdefault((p.shape, mesh, placements), [[]])
            if len(alike[-1]) == at_once:
                alike.append([])
            alike[-1].append(p)
    return sum(lists.values(), [])


def orthogonalize_together(directions: list[Tensor], p: Tensor, dtype: torch.dtype) -> Tensor:
    """`orthogonalize` N matrices, of which each process has a piece, cut as p is: pieces again, (N, …).

    It takes whole matrices. Instead of every process gathering all, each is sent its share of them (what was
    cut along rows or columns is then cut along N), and gives back the pieces. Plain tensors, whole on each
    process that there is (DDP), each process does by itself.
    """
    if not isinstance(p, DTensor):
        return orthogonalize(torch.stack(directions), dtype=dtype)
    shape = (*p.shape, len(directions))  # N last: rows and columns are dimensions 0 and 1, as placements say
    by_process = [Shard(2)] * p.device_mesh.ndim
    batch = join(torch.stack(directions, dim=-1), p.device_mesh, p.placements, shape)
    share = batch.redistribute(placements=by_process).to_local().movedim(-1, 0)  # (0 or more, rows, columns)
    share = orthogonalize(share, dtype=dtype).movedim(0, -1).contiguous()
    done = join(share, p.device_mesh, by_process, shape)
    return done.redistribute(placements=p.placements).to_local().movedim(-1, 0)


# ------------------------------------------------------------------------------------------------------------
# Adafactor


class Adafactor(torch.optim.Optimizer):
    """Adafactor, with the rate given from outside (Shazeer & Stern 2018, Algorithms 4 and 5).

    groups: parameters, or dicts of params, lr, weight_decay. lr: bounds the root mean square of a step, as an
    Adam step is about lr: the same rates serve. momentum: decay of a running mean of updates; none, as it
    takes the memory that is saved. eps1, eps2, d: the paper's (Algorithm 6). scale_parameter: multiply lr by
    the root mean square of the weights (at least eps2), the paper's relative step; off, as matrices that
    begin at zero, here the head and what writes to the stream, would hardly leave it: by eps2 lr a step.

    State: `rows` (n,) and `columns` (m,) of an (n, m) matrix, whole and equal on all processes; `squares` of
    a vector, in pieces as it is; `step`.

    Deviations: means for the paper's sums, which gives the same V; weight decay, decoupled, by lr alone; the
    mean of momentum is taken before the rate is applied, so that a new rate holds at once.
    """

    def __init__(self, groups, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float | None = None,
                 eps1: float = 1e-30, eps2: float = 1e-3, d: float = 1.0, scale_parameter: bool = False):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eps1": eps1,
                                  "eps2": eps2, "d": d, "scale_parameter": scale_parameter})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "Adafactor takes its gradients from .grad"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_one(p, self.state[p], **group)

    def step_one(self, p, state, *, lr, weight_decay, momentum, eps1, eps2, d, scale_parameter, **_):
        if not state:
            state["step"] = torch.zeros((), device=p.device)
        state["step"] += 1
        fresh = state["step"].to(p.dtype) ** -0.8  # 1 - beta2_t: first 1, so there is no bias (Algorithm 6)
        scaled = scaled_by_factors if p.dim() == 2 else scaled_by_squares
        update = scaled(p, state, fresh, eps1)  # U_t
        update /= (rms(update, p) / d).clamp(min=1.0)  # U_t hat: less where gradients are suddenly larger
        if momentum is not None:
            update = own(state.setdefault("momentum", torch.zeros_like(p))).lerp_(update, 1 - momentum)
        alpha = lr * rms(own(p), p).clamp(min=eps2) if scale_parameter else lr  # alpha_t
        own(p).mul_(1 - lr * weight_decay).sub_(update * alpha)


def scaled_by_squares(p: Tensor, state: dict, fresh: Tensor, eps1: float) -> Tensor:
    """Algorithm 5, a vector: G / sqrt(V), with V a running mean of G^2. Advances V, state["squares"]."""
    grad = gradient(p)
    squares = own(state.setdefault("squares", torch.zeros_like(p)))
    squares.lerp_(grad.square() + eps1, fresh)  # V_t hat
    return grad * squares.rsqrt()


def scaled_by_factors(p: Tensor, state: dict, fresh: Tensor, eps1: float) -> Tensor:
    """Algorithm 4, a matrix: G / sqrt(V), with V = R C / mean(R), of rank one, never written out.

    R (n,) and C (m,) are running means of G^2 over each row and each column. Advances both.
    """
    grad, factors = gradient(p), []
    squares = grad.square()
    for name, dim in (("rows", 0), ("columns", 1)):
        means = total(squares, p, keep=dim).flatten() / p.size(1 - dim)
        mean = state.setdefault(name, torch.zeros_like(means)).lerp_(means + eps1, fresh)  # R_t, C_t
        factor = (mean / mean.mean().sqrt()).rsqrt()  # each by itself: R C may underflow; mean(C) is mean(R)
        factors.append(part_of(factor.unsqueeze(1 - dim), p, keep=dim))
    return grad * factors[0] * factors[1]  # (n, m) x (n, 1) x (1, m)


def rms(piece: Tensor, p: Tensor) -> Tensor:
    """The root mean square of the tensor that each process has a piece of, cut as p is: (1, 1), or (1,)."""
    return (total(piece.square(), p) / p.numel()).sqrt()


# ------------------------------------------------------------------------------------------------------------
# Weights in pieces: what a DTensor needs, and a plain tensor passes through
#
# A DTensor's placements say for each dimension of the mesh of processes which of the tensor's is cut there:
# .dim of Shard and _StridedShard; Replicate, not cut, has none. Each process computes on its own piece, a
# plain tensor; DTensors only send pieces about.


def own(x: Tensor) -> Tensor:
    """The piece of x that this process holds, in x's memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def gradient(p: Tensor) -> Tensor:
    """The own piece of p's gradient, which tensor parallelism may have left as a sum still to be taken."""
    return p.grad.redistribute(placements=p.placements).to_local() if isinstance(p, DTensor) else p.grad


def join(piece: Tensor, mesh, placements, shape) -> DTensor:
    """The DTensor of this shape that the processes have pieces of. Nothing is sent."""
    whole = torch.empty(shape, device="meta")  # uneven pieces do not tell its shape
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=whole.shape,
                              stride=whole.stride())


def cuts(p: DTensor, keep: int | None, other) -> list:
    """p's placements, with `other` for its cuts along other dimensions than `keep`."""
    return [cut if getattr(cut, "dim", None) in (None, keep) else other for cut in p.placements]


def total(piece: Tensor, p: Tensor, keep: int | None = None) -> Tensor:
    """Of a tensor that each process has a piece of, cut as p is, the sum over all dimensions but `keep`.

    Whole and equal on all processes: (n, 1), (1, m) or, where no dimension is kept, (1, 1).
    """
    part = piece.sum(dim=[dim for dim in range(p.dim()) if dim != keep], keepdim=True)
    if not isinstance(p, DTensor):
        return part
    shape = [size if dim == keep else 1 for dim, size in enumerate(p.shape)]
    return join(part, p.device_mesh, cuts(p, keep, Partial()), shape).full_tensor()


def part_of(factor: Tensor, p: Tensor, keep: int) -> Tensor:
    """Of a factor (n, 1) or (1, m), whole on all processes, what stands beside the own piece of p."""
    if not isinstance(p, DTensor):
        return factor
    equal = join(factor, p.device_mesh, [Replicate()] * p.device_mesh.ndim, factor.shape)
    return equal.redistribute(placements=cuts(p, keep, Replicate())).to_local()


# ------------------------------------------------------------------------------------------------------------
# Which weights are whose


def parameter_groups(model: nn.Module, settings) -> list[dict]:
    """Each trained parameter in one group, by rule: [{rule, params, optimizer, lr, lr_scale, weight_decay}].

    Vectors (norms, biases) have no weight decay: it would pull gains to zero, and they are too few to
    overfit. lr is the peak; lr_scale its share of settings.lr, as the schedule is one for all.
    """
    rest = "adafactor" if settings.optimizer == "adafactor" else "adamw"
    rules = {"matrices in blocks": (settings.optimizer, settings.lr, settings.weight_decay),
             "embedding and head": (rest, settings.adam_lr, settings.weight_decay),
             "vectors": (rest, settings.adam_lr, 0.0),
             "adapters": (rest, settings.lr, 0.0),
             "adapters' B": (rest, settings.lr * getattr(settings, "lora_plus", 1.0), 0.0),
             "rows of new tokens": (rest, settings.adam_lr, 0.0)}
    params: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            params.setdefault(rule_of(name, p), []).append(p)
    return [{"rule": rule, "params": params[rule], "optimizer": optimizer, "weight_decay": weight_decay,
             "lr": lr, "lr_scale": lr / settings.lr, "betas": settings.betas, "eps": settings.eps}
            for rule, (optimizer, lr, weight_decay) in rules.items() if rule in params]


def rule_of(name: str, p: Tensor) -> str:
    """The rule for a parameter. Adapters (lora.py) are AdamW's, as is usual, and have no weight decay, which
    would pull the model back to its base."""
    if ".adapters." in name:
        own_rules = {"lora_B": "adapters' B", "token_rows": "rows of new tokens"}
        return own_rules.get(name.rpartition(".")[2], "adapters")
    matrix = "matrices in blocks" if ".layers." in name else "embedding and head"
    return "vectors" if p.dim() < 2 else matrix


def describe_groups(groups: list[dict]) -> str:
    """One line: each rule, its tensors and parameters, optimizer, peak rate, weight decay."""
    return "weights: " + "; ".join(
        f"{group['rule']} ({len(group['params'])} tensors, {sum(p.numel() for p in group['params']):,} "
        f"parameters): {group['optimizer']}, peak lr {group['lr']:g}, weight decay {group['weight_decay']:g}"
        for group in groups)


def make_optimizer(model: nn.Module, settings, say=None,
                   dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """The optimizer that settings.optimizer names, for the model's `parameter_groups`; `say` is told these.

    dtype: of Muon's matrix products.

    To be called once the model is in pieces, as an optimizer holds on to the tensors it is given.
    """
    groups = parameter_groups(model, settings)
    if say:
        say(describe_groups(groups))
    if settings.optimizer == "muon":
        return Muon(groups, dtype=dtype)
    return Adafactor(groups) if settings.optimizer == "adafactor" else torch.optim.AdamW(groups, fused=True)


# ------------------------------------------------------------------------------------------------------------
# How fast, when

SCHEDULES = ("linear", "cosine", "inverse_sqrt", "wsd")


def learning_rate(step: int, settings) -> float:
    """Rate of the matrices in blocks at a step in 0 … steps-1: a warm-up, then the fall that is asked for.

    It rises linearly over warmup_steps to the peak, settings.lr, which step `warmup_steps` has. From there it
    falls to final_lr x peak, which step `steps` would have, the first that is not made: so the last step is a
    little above, and no step has rate 0. Where warmup_steps >= steps it only rises.

    linear: a straight line. cosine: Loshchilov & Hutter 2017, Eq. 5. wsd (warm-up, stable, decay; Hu et al.
    2024; Hägele et al. 2024): level, then a straight line down over the last decay_share of the steps (at
    most what the warm-up leaves; with a share of 0 it stays level). inverse_sqrt: Vaswani et al. 2017, Eq. 3,
    stretched to end where the others do; with final_lr = sqrt((warmup_steps + 1) / (steps + 1)) it is theirs.
    """
    peak, final, warm, steps = settings.lr, settings.final_lr, settings.warmup_steps, settings.steps
    if step < warm or warm >= steps:
        return peak * min(1.0, (step + 1) / (warm + 1))
    done = (step - warm) / (steps - warm)  # 0 at the peak, 1 after the last step
    match settings.schedule:  # how far the rate is above its end: 1 at the peak, 0 after the last step
        case "linear":
            above = 1 - done
        case "cosine":
            above = (1 + math.cos(math.pi * done)) / 2  # Eq. 5
        case "inverse_sqrt":
            now, end = (((warm + 1) / (i + 1)) ** 0.5 for i in (step, steps))  # Eq. 3, as a share of its peak
            above = (now - end) / (1 - end)
        case "wsd":
            decay = min(settings.decay_share * steps, steps - warm)
            above = min(1.0, (steps - step) / decay) if decay else 1.0
        case other:
            raise ValueError(f"schedule {other!r} is none of {', '.join(SCHEDULES)}")
    return peak * (final + (1 - final) * above)


def batch_windows(step: int, settings) -> int:
    """Windows in the batch of a step: batch_size, or on the way there from batch_start.

    While batches are small their gradients are noisy, but early on even noisy ones point the same way: GPT-3
    (Brown et al. 2020, appendix B) begins with a hundredth of its batch and grows it linearly with the tokens
    seen. Here in steps of batch_start.
    """
    return windows_before(step + 1, settings) - windows_before(step, settings)


def windows_before(step: int, settings) -> int:
    """Windows in the batches of all steps before this one."""
    start, whole = getattr(settings, "batch_start", settings.batch_size), settings.batch_size
    if start == whole:
        return step * whole
    seen = windows_in_ramp(start, whole, settings.ramp_tokens / settings.seq_len, settings.steps)
    beyond = max(0, step - len(seen) + 1)
    return seen[step - beyond] + beyond * whole


@functools.cache
def windows_in_ramp(start: int, whole: int, over_windows: float, steps: int) -> list[int]:
    """The windows before each step until the batch is whole, or `steps` are made."""
    seen = [0]
    while len(seen) <= steps:
        size = int(start + (whole - start) * seen[-1] / over_windows) // start * start
        if size >= whole:
            break
        seen.append(seen[-1] + size)
    return seen


def picture(settings, columns: int = 60, rows: int = 5) -> str:
    """The rate from the first step to the last, from 0 to its peak, drawn with block characters."""
    rates = [learning_rate(i * settings.steps // columns, settings) / settings.lr for i in range(columns)]
    return "\n".join(blocks(rates, rows))


def main():
    example = dict(lr=1.0, steps=600, warmup_steps=60, final_lr=0.1, decay_share=0.2)
    print("warm-up over a tenth of the steps, final_lr 0.1; wsd: decay_share 0.2")
    for schedule in SCHEDULES:
        print(f"\n{schedule}\n{picture(SimpleNamespace(schedule=schedule, **example))}")


if __name__ == "__main__":
    run(main)
