"""How far a student's distribution lies from its teacher's: knowledge distillation on logits.

    loss_sum, count = kd_loss(student_logits, teacher_logits, targets, temperature=2.0, kind="forward")
    python divergence.py                         # humps.svg: what each kind makes of two humps, if it has one

The teacher says how likely each of the V tokens is, not only which one came (Hinton et al. 2015,
https://arxiv.org/abs/1503.02531). p is the teacher's distribution, q the student's:

    forward   KL(p | q)   covers: wherever the teacher puts something, the student must, too
    reverse   KL(q | p)   seeks: the student stays where the teacher is likely, and may leave out the rest
    jsd       between the two: both are compared with their mixture (Agarwal et al. 2023, GKD)
    skew_…    forward or reverse against a mixture with some of the other, so that no ratio is unbounded (Ko
              et al. 2024, DistiLLM)

`kd_loss` is the plain form. `linear_kd_loss` is the fast one, which begins at the hidden states and never
holds the logits of all tokens, neither the student's nor the teacher's. `TopK` is a teacher of whom only the
k likeliest tokens are known, and the mass of all others.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from batches import IGNORE
from config import UserError, open_whole, parse, require, run, show
from objectives import in_chunks, own_rows
from plot import line_chart

Kind = Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse"]
KINDS = get_args(Kind)
FLOOR = -100.0  # nats: less than e^-100 counts as that, so that what has probability 0 costs finitely


class Divergence(NamedTuple):
    """Which one, and at what temperature."""
    kind: Kind = "forward"
    beta: float = 0.5  # jsd: the teacher's share of the mixture; 0 and 1 are forward and reverse
    skew: float = 0.1  # skew_…: the share of the other in the mixture; 0 is none
    temperature: float = 1.0  # of both distributions

    def check(self) -> "Divergence":
        """Itself, with a kind that has no limits to take. Raises UserError where a value is out of range."""
        if self.kind not in KINDS:
            raise UserError(f"--kind {self.kind} is not one of {', '.join(KINDS)}")
        if not 0 < self.temperature < math.inf:  # nan too
            raise UserError(f"--temperature {self.temperature} is out of range; it must be above 0")
        for name in ("beta", "skew"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)} is out of range; it must be 0 to 1")
        if self.kind == "jsd" and self.beta in (0, 1):  # as GKD's authors and TRL have it: of the
            return self._replace(kind="reverse" if self.beta else "forward")  # divergence itself 0 is left
        return self


# ------------------------------------------------------------------------------------------------------------
# 1. The divergences


def divergence(log_p: Tensor, log_q: Tensor, of: Divergence) -> Tensor:
    """Of each row, in nats: (N, V), (N, V) -> (N,). log_p: of the teacher; log_q: of the student.

    By hand: p = (1/2, 1/2), q = (1/4, 3/4): forward ln 2 - ln 3 / 2 = 0.1438, reverse 3/4 ln 3 - ln 2 =
    0.1308.
    """
    p, q = log_p.exp(), log_q.exp()
    if of.kind == "forward":
        return (p * (log_p - log_q)).sum(dim=-1)
    if of.kind == "reverse":
        return (q * (log_q - log_p)).sum(dim=-1)
    if of.kind == "jsd":  # Agarwal et al. 2023, Eq. 1; its P is the teacher
        log_m = log_mixture(log_p, log_q, of.beta)
        return (of.beta * p * (log_p - log_m) + (1 - of.beta) * q * (log_q - log_m)).sum(dim=-1)
    if of.kind == "skew_forward":  # Ko et al. 2024, section 3.1, both; their alpha is `skew`
        return (p * (log_p - log_mixture(log_p, log_q, of.skew))).sum(dim=-1)
    return (q * (log_q - log_mixture(log_p, log_q, 1 - of.skew))).sum(dim=-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    if share in (0, 1):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def slopes(log_p: Tensor, log_q: Tensor, of: Divergence) -> Tensor:
    """q dD/dq of each token, (N, V), but for a multiple of q: from these follows the gradient by the logits.

    With u = logits / temperature, softmax's Jacobian makes dD/du = s - q sum(s); a multiple of q adds nothing
    to it, and is left out.
    """
    p, q = log_p.exp(), log_q.exp()
    if of.kind == "forward":
        return -p
    if of.kind == "reverse":
        return q * (log_q - log_p)
    if of.kind == "jsd":
        return (1 - of.beta) * q * (log_q - log_mixture(log_p, log_q, of.beta))
    share = of.skew if of.kind == "skew_forward" else 1 - of.skew  # of the teacher
    log_m = log_mixture(log_p, log_q, share)
    if of.kind == "skew_forward":
        return -(1 - share) * p * (log_q - log_m).exp()
    return q * (log_q - log_m) - (1 - share) * q * (log_q - log_m).exp()


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), in float32 or better, nowhere below FLOOR."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return Floored.apply((logits / temperature).log_softmax(dim=-1))


class Floored(torch.autograd.Function):
    """x, nowhere below FLOOR, with the gradient of x itself: clamp's would be 0 below it, and a student that
    has ruled out what the teacher says would never learn it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clamp(min=FLOOR)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 1.0,
            kind: Kind = "forward", beta: float = 0.5, *, kd_weight: float = 1.0,
            skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """(sum in nats over the targets that are not -100, their number): distillation mixed with cross-entropy.

    student_logits, teacher_logits: (…, V); no gradient reaches the teacher. targets (…): ids, -100 for none.
    The sum is of kd_weight T^2 D(p, q) + (1 - kd_weight) (-log q(target)): D a divergence of distributions at
    temperature T, whose gradient is 1/T^2 as large as at 1 (Hinton et al. 2015, end of section 2); the second
    at temperature 1. kd_weight 1 and 0 are pure distillation and pure cross-entropy.

    beta: of jsd, as in GKD: the teacher's share of the mixture; 0 means forward, 1 reverse. (The divergence
    itself, divided by beta, goes to forward; its value at 0 would be 0.) skew: of skew_forward and
    skew_reverse.

    Masked before anything is computed: what stands at other tokens may be infinite. A token of probability 0,
    the student's or the teacher's, costs as one of e^-100, so that all is finite. Unlike TRL's GKD, the sum
    has the factor T^2.
    """
    of = Divergence(kind, beta, skew, temperature).check()
    if not 0 <= kd_weight <= 1:  # nan too
        raise UserError(f"--kd_weight {kd_weight} is out of range; it must be 0 to 1")
    check_same_vocabulary(student_logits.size(-1), teacher_logits.size(-1))
    valid = targets != IGNORE
    student, targets = student_logits[valid], targets[valid]  # (N, V), (N,)
    loss_sum = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    if kd_weight:
        log_p = log_probabilities(teacher_logits[valid].detach(), temperature)
        log_q = log_probabilities(student, temperature)
        loss_sum = loss_sum + kd_weight * temperature ** 2 * divergence(log_p, log_q, of).sum()
    if kd_weight < 1:
        ce = F.nll_loss(log_probabilities(student), targets, reduction="sum")
        loss_sum = loss_sum + (1 - kd_weight) * ce
    return loss_sum, valid.sum()


def check_same_vocabulary(student: int, teacher: int):
    if student != teacher:
        raise UserError(f"the student gives {student} logits and the teacher {teacher}: these are other "
                        f"vocabularies; distil on answers instead (answers.py)")


# ------------------------------------------------------------------------------------------------------------
# 2. Teachers, a few rows at a time


class Live:
    """A teacher that was asked just now: hidden states (N, C) and the head's weight (V, C)."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.hidden, self.weight = hidden, weight

    def log_p(self, rows: slice, of: Divergence, student: Tensor) -> tuple[Tensor, None]:
        """Log-probabilities of these rows, (rows, V). V is the student's: the teacher's head may have more
        or fewer, where both know the same tokens."""
        logits = self.hidden[rows].to(self.weight.dtype) @ self.weight.T
        spare = student.size(-1) - logits.size(-1)  # rows that no token has, on either side
        return log_probabilities(F.pad(logits, (0, spare), value=-math.inf), of.temperature), None


class TopK:
    """A teacher of whom the k likeliest tokens are known: ids (N, k), and log-probabilities (N, k + 1).

    The last of those is of all other tokens together, one bucket more. The divergence between buckets is at
    most that between tokens, whatever the kind (the data-processing inequality), and equal for k = V - 1.
    """

    def __init__(self, ids: Tensor, logps: Tensor):
        self.ids, self.logps = ids, logps

    @classmethod
    def of(cls, log_p: Tensor, k: int) -> "TopK":
        """What is left of whole distributions (N, V)."""
        logps, ids = log_p.topk(k, dim=-1)
        return cls(ids, torch.cat([logps, log_rest(log_p, ids)], dim=-1))

    def to(self, device, non_blocking: bool = False) -> "TopK":
        return TopK(self.ids.to(device, non_blocking=non_blocking),
                    self.logps.to(device, non_blocking=non_blocking))

    def log_p(self, rows: slice, of: Divergence, student: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities of the buckets (rows, k + 1), the tokens of all but the last)."""
        return self.logps[rows].to(torch.promote_types(student.dtype, torch.float32)), self.ids[rows].long()


def log_rest(logps: Tensor, ids: Tensor) -> Tensor:
    """log of what all tokens but these have together, nowhere below FLOOR: (N, V), (N, k) -> (N, 1).

    logps: of all V tokens, and left as they are; ids: of the k that are known. Summed over the others, as 1 -
    the sum of these would lose what is small.
    """
    return logps.scatter(-1, ids, -math.inf).logsumexp(dim=-1, keepdim=True).clamp(min=FLOOR)


# ------------------------------------------------------------------------------------------------------------
# 3. From hidden states: never the logits of all tokens


def linear_kd_loss(hidden: Tensor, weight: Tensor, teacher: Live | TopK | None, targets: Tensor,
                   of: Divergence = Divergence(), kd_weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(kd_loss's sum, the divergences' sum, cross-entropies' sum) of logits hidden @ weight.T; nats.

    hidden (N, C) and weight (V, C): the student's. targets (N,), none -100. teacher: None for kd_weight 0.
    The second is at temperature T, without T^2; both it and the third are for the log, without gradient; of
    what has no weight 0.
    """
    weight, group, _ = own_rows(weight)
    assert group is None, "a vocabulary cut by tensor parallelism has no whole distributions"
    return LinearKD.apply(hidden, weight, teacher, targets, of.check(), kd_weight, torch.is_grad_enabled())


class LinearKD(torch.autograd.Function):
    """The work of linear_kd_loss, as objectives.LinearCrossEntropy's: while a few rows' logits lie in the
    cache, they are turned into their loss and gradient. What is kept is the gradient of the inputs."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher, targets, of: Divergence, kd_weight: float, with_gradient: bool):
        def of_rows(logits: Tensor, some: slice) -> tuple[Tensor, Tensor | None]:
            return rows_kd(logits, teacher, some, targets[some], of, kd_weight, with_gradient)
        sums, hidden_grad, weight_grad = in_chunks(hidden, weight, of_rows, with_gradient,
                                                   ctx.needs_input_grad[1], shape=(2,))
        ctx.save_for_backward(hidden_grad, weight_grad)
        kd, ce = sums
        ctx.mark_non_differentiable(kd, ce)
        return kd_weight * of.temperature ** 2 * kd + (1 - kd_weight) * ce, kd, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor, *nothing):
        hidden_grad, weight_grad = ctx.saved_tensors
        weight_grad = None if weight_grad is None else weight_grad * scale
        return hidden_grad * scale, weight_grad, None, None, None, None, None


def rows_kd(logits: Tensor, teacher: Live | TopK | None, rows: slice, targets: Tensor, of: Divergence,
            kd_weight: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """((divergences, cross-entropies) summed (2,), the loss's gradient by the logits (rows, V)) of some rows.
    """
    sums, grad = torch.zeros(2, dtype=torch.promote_types(logits.dtype, torch.float32),
                             device=logits.device), None
    log_q = None
    if kd_weight:
        log_q = log_probabilities(logits, of.temperature)
        log_p, ids = teacher.log_p(rows, of, log_q)
        buckets = log_q if ids is None else torch.cat([log_q.gather(1, ids), log_rest(log_q, ids)], dim=1)
        sums[0] = divergence(log_p, buckets, of).sum()
        if with_gradient:
            s = slopes(log_p, buckets, of)
            grad = gradient(s, log_q, buckets, ids).mul_(kd_weight * of.temperature)  # T^2 / T
    if kd_weight < 1:
        if log_q is None or of.temperature != 1:
            log_q = log_probabilities(logits)
        sums[1] = -log_q.gather(1, targets[:, None]).sum()
        if with_gradient:  # softmax - onehot
            plain = log_q.exp_()
            plain.scatter_add_(1, targets[:, None], -torch.ones_like(targets[:, None], dtype=plain.dtype))
            grad = plain.mul_(1 - kd_weight) if grad is None else grad.add_(plain, alpha=1 - kd_weight)
    return sums, grad


def gradient(s: Tensor, log_q: Tensor, buckets: Tensor, ids: Tensor | None) -> Tensor:
    """dD/du (rows, V), u = logits / temperature, of the slopes of tokens, or of buckets.

    A token that shares the last bucket with others gets its part of that one's slope: q_j / q_rest.
    """
    total = s.sum(dim=1, keepdim=True)
    if ids is None:
        return s.sub_(log_q.exp().mul_(total))
    grad = (log_q - buckets[:, -1:]).exp_().mul_(s[:, -1:]) - log_q.exp() * total
    return grad.scatter_(1, ids, s[:, :-1] - buckets[:, :-1].exp() * total)


# ------------------------------------------------------------------------------------------------------------
# 4. What covering and seeking mean, in a picture


@dataclass
class Settings:
    out: str = "humps.svg"  # the picture
    overwrite: bool = False  # replace it
    distance: float = 6.0  # of the teacher's two humps, whose standard deviation is 1
    share: float = 0.6  # the first hump's part

    def __post_init__(self):
        require(self, distance=(0, 20), share=(0, 1))


def humps(x: Tensor, distance: float, share: float) -> Tensor:
    """log-probabilities on the points x of two humps of width 1: share at -distance / 2, the rest at +."""
    left, right = (-(x - sign * distance / 2) ** 2 / 2 for sign in (-1, 1))
    return log_mixture(left, right, share).log_softmax(dim=0)


def fit(log_p: Tensor, x: Tensor, of: Divergence, starts: int = 5, steps: int = 200) -> tuple[Tensor, float]:
    """(the log-probabilities on x of the one hump that is nearest to log_p, how far it lies away).

    A student whose logits are -(x - mean)^2 / (2 width^2); Adam from several means, of which the best counts.
    """
    best = (math.inf, log_p)
    for start in torch.linspace(float(x[0]) / 2, float(x[-1]) / 2, starts):
        mean, log_width = start.clone().requires_grad_(), torch.zeros((), requires_grad=True)
        optimizer = torch.optim.Adam([mean, log_width], lr=0.3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / steps)
            log_q = log_probabilities(-((x - mean) / log_width.exp()) ** 2 / 2)
            value = divergence(log_p[None], log_q[None], of).sum()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        best = min(best, (value.item(), log_q.detach()), key=lambda found: found[0])
    return best[1], best[0]


def main():
    settings = parse(Settings)
    if Path(settings.out).exists() and not settings.overwrite:
        raise UserError(f"--out {settings.out} exists; pass --overwrite to replace it, or another --out")
    show(settings)
    reach = settings.distance / 2 + 7  # seven standard deviations beyond both humps
    x = torch.linspace(-reach, reach, 401)
    log_p = humps(x, settings.distance, settings.share)
    lines = {"teacher": log_p}
    for kind in ("forward", "reverse", "jsd"):
        lines[kind], value = fit(log_p, x, Divergence(kind))
        q = lines[kind].exp()
        mean = float(q @ x)
        width = float(q @ (x - mean) ** 2) ** 0.5
        print(f"{kind:<10}{value:>8.4f} nats; a hump at {mean:+.2f}, of width {width:.2f}")
    step = float(x[1] - x[0])
    points = {name: list(zip(x.tolist(), (line.exp() / step).tolist())) for name, line in lines.items()}
    with open_whole(settings.out, "w") as file:
        file.write(line_chart("One hump in place of two", "x", "density", points))
    print(f"picture: {settings.out}")


if __name__ == "__main__":
    run(main)
