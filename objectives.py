"""What is learnt: the losses of pretraining."""
import contextlib

import torch
from torch import Tensor, nn

from data import IGNORE
from model import Transformer


def next_token_loss(model: Transformer, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of -log p(target | all before it) in nats over the targets that are not -100, and their number.

    batch: inputs (B, T) and targets (B, T), the inputs shifted by one.
    """
    inputs, targets = batch
    assert type(model.lm_head) is nn.Linear, "this loss reads the head's weight, not what wraps it"
    hidden = model.model(inputs).flatten(0, 1)  # (B, T, C) -> (B T, C)
    loss_sum = LinearCrossEntropy.apply(hidden, model.lm_head.weight, targets.flatten(),
                                        torch.is_grad_enabled())
    return loss_sum, (targets != IGNORE).sum()


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(hidden @ weight.T, targets, reduction="sum") without ever holding all logits.

    At V = 4,096 the logits of a batch are far larger than all else, and writing and reading them back takes
    longer than computing them. Here a few rows' logits are turned into their loss and their gradient, which
    is softmax - onehot, while they lie in the cache; what is kept for the backward pass is the gradient of
    the inputs. Equal to the plain form but for rounding.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
        """hidden (N, C), weight (V, C), targets (N,), -100 for none -> the losses' sum in nats, float32."""
        # 2^21 float32 are 8 MB: about what a CPU's cache holds
        rows = max(1, (2 ** 27 if hidden.is_cuda else 2 ** 21) // len(weight))
        half = (torch.is_autocast_enabled(hidden.device.type)
                and torch.get_autocast_dtype(hidden.device.type) == torch.float16)
        loss_sum = torch.zeros((), device=hidden.device,
                               dtype=torch.promote_types(hidden.dtype, torch.float32))
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for part, part_grad, target in zip(hidden.split(rows), hidden_grad.split(rows), targets.split(rows)):
            logits = part @ weight.T  # (rows, C) x (C, V) -> (rows, V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            valid, target = (target != IGNORE)[:, None], target.clamp(min=0)[:, None]  # (rows, 1)
            top = logits.amax(dim=1, keepdim=True)
            of_target = logits.gather(1, target)
            total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
            loss_sum += ((top + total.log() - of_target) * valid).sum()
            if with_gradient:
                scale = torch.where(valid, 1 / total, 0.0)
                # softmax - onehot, and 0 where no target is
                grad = logits.mul_(scale).scatter_add_(1, target, -valid.to(logits.dtype))
                # fp16 would lose small probabilities here: the loss scale comes with the backward pass only
                with torch.autocast(hidden.device.type, enabled=False) if half else contextlib.nullcontext():
                    grad = grad.to(weight.dtype)
                    part_grad.copy_(grad @ weight)
                    weight_grad += grad.T @ part
        if with_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad)
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * scale, weight_grad * scale, None, None
