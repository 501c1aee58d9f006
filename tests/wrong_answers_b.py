"""Classic wrong answers to the exercises of exercises_b.py, and right ones that are written differently."""
from wrong_answers import Wrong

WRONG_B: dict[str, tuple[Wrong, ...]] = {
    "quantize-nf4": (
        Wrong("one scale for the whole tensor", "whole tensor",
              {"blocks, scale = in_blocks(part, block_size)":
               "blocks, scale = in_blocks(part, block_size); scale = scale.max().expand_as(scale)"}),
        Wrong("levels at equal distances", "evenly",
              {"levels = torch.tensor(NF4, device=weight.device)": "levels = torch.linspace(-1, 1, 16)"}),
        Wrong("levels that are symmetric", "symmetric",
              {"levels = torch.tensor(NF4, device=weight.device)":
               "levels = torch.tensor(NF4); levels = (levels - levels.flip(0)) / 2"}),
        Wrong("a block divided by its standard deviation", "standard deviation",
              {"blocks, scale = in_blocks(part, block_size)":
               "blocks, scale = in_blocks(part, block_size); scale = blocks.std(dim=1, keepdim=True)"}),
        Wrong("the first code in the low bits", "high",
              {"codes[:, 0] << 4 | codes[:, 1]": "codes[:, 1] << 4 | codes[:, 0]"}),
        Wrong("a block of zeros is divided by zero", "zero", {
            "blocks * reciprocal(scale)": "blocks / scale"}),
        Wrong("the filling of the last block stays among the codes", "cut off",
              {".flatten()[:part.numel() + part.numel() % 2])": ".flatten())"}),
        Wrong("double is not used", "double",
              {"scales = quantize_int8(scales, centred=True) if double else scales": "pass"}),
        Wrong("scales quantised without their mean taken away", "mean",
              {"quantize_int8(scales, centred=True)": "quantize_int8(scales)"}),
    ),
    "lora-start": (
        Wrong("A and B both random", "both",
              {"torch.zeros(rows, rank, **place)": "torch.randn(rows, rank, generator=generator)"}),
        Wrong("A and B both zero", "both zero",
              {"torch.empty(rank, columns, **place).uniform_(-bound, bound,":
               "torch.zeros(rank, columns, **place",
               "generator=generator))\n        self.lora_B": "))\n        self.lora_B"}),
        Wrong("B random and A zero", "a that is zero", body="""
            super().__init__()
            weight = weight_of(linear)
            rows, columns = weight.shape
            self.lora_A = nn.Parameter(torch.zeros(rank, columns, dtype=weight.dtype))
            self.lora_B = nn.Parameter(torch.empty(rows, rank, dtype=weight.dtype).uniform_(
                -columns ** -0.5, columns ** -0.5, generator=generator))
            self.scale, self.dropout = scale, dropout
            self.lora_magnitude = nn.Parameter(self.lengths(weight).to(weight.dtype)) if use_dora else None
            """),
        Wrong("A drawn without the generator", "generator", {"generator=generator))": "))"}),
        Wrong("A's spread by the rank", "rank", {"columns ** -0.5": "rank ** -0.5"}),
        Wrong("the magnitude begins at one", "magnitude",
              {"self.lengths(weight).to(weight.dtype)": "torch.ones(rows)"}),
    ),
    "lora-forward": (
        Wrong("alpha is missing", "alpha", {"alpha=self.scale": "alpha=1"}),
        Wrong("what the layer says is lost", "y itself", {"alpha=self.scale": "beta=0, alpha=self.scale"}),
        Wrong("no dropout", "dropout", {"F.dropout(x, self.dropout, self.training)": "x"}),
        Wrong("dropout when not training, too", "training",
              {"F.dropout(x, self.dropout, self.training)": "F.dropout(x, self.dropout)"}),
        Wrong("dropout behind A", "dropout",
              {"dropped = F.dropout(x, self.dropout, self.training)": "dropped = x",
               "down = F.linear(dropped, self.lora_A)":
               "down = F.dropout(F.linear(dropped, self.lora_A), self.dropout, self.training)"}),
        Wrong("DoRA forgotten", "dora", body="""
            dropped = F.dropout(x, self.dropout, self.training)
            return y + self.scale * F.linear(F.linear(dropped, self.lora_A), self.lora_B)
            """),
        Wrong("y as it was", "lost", body="return y"),
    ),
    "lora-merge": (
        Wrong("alpha is missing in the merge", "alpha", {"alpha=sign * self.scale": "alpha=sign"}),
        Wrong("the sign is left unused", "sign", {"alpha=sign * self.scale": "alpha=self.scale"}),
        Wrong("the product in bf16, the sum in float32", "bf16", body="""
            return weight.float() + sign * self.scale * (self.lora_B @ self.lora_A).float()
            """),
        Wrong("nothing is added", "nothing", body="return weight"),
    ),
    "take-turns": (
        Wrong("each count rounded by itself", "sum to n", body="""
            return [math.floor(n * weight) for weight in weights]
            """),
        Wrong("to the nearest instead of down", "nearest", body="""
            counts, rest = [], Fraction(1)
            for weight in reversed(weights):
                own = min(n, round(n * weight / rest)) if weight else 0
                counts.append(own)
                n, rest = n - own, rest - weight
            return counts[::-1]
            """),
        Wrong("shares of what is left, but not by the weights that are left", "left",
              {"n * weight / rest": "n * weight"}),
        Wrong("in the order from the last to the first", "order", {"counts[::-1]": "counts"}),
        Wrong("from the first source on", "first",
              {"reversed(weights)": "weights", "counts[::-1]": "counts"}),
        Wrong("sources without a share divide by zero", "zero",
              {"math.floor(n * weight / rest) if weight else 0": "math.floor(n * weight / rest)"}),
    ),
    "best-fit": (
        Wrong("first fit", "first one", body="""
            windows = []
            for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
                for window in windows:
                    if sum(lengths[j] for j in window) + lengths[i] <= room:
                        window.append(i)
                        break
                else:
                    windows.append([i])
            return windows
            """),
        Wrong("next fit: only the last window is looked at", "the last", body="""
            windows, left = [], 0
            for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
                if lengths[i] > left:
                    windows.append([])
                    left = room
                windows[-1].append(i)
                left -= lengths[i]
            return windows
            """),
        Wrong("in the order in which they come", "longest first",
              {"sorted(range(len(lengths)), key=lambda i: -lengths[i])": "range(len(lengths))"}),
        Wrong("shortest first", "longest first", {"-lengths[i])": "lengths[i])"}),
        Wrong("what fits exactly does not fit", "exactly",
              {"bisect_left(rooms, (lengths[example],))": "bisect_left(rooms, (lengths[example] + 1,))"}),
        Wrong("into the emptiest window", "fullest", {"rooms.pop(at)": "rooms.pop()"}),
        Wrong("lengths instead of places", "indices", {"append(example)": "append(lengths[example])"}),
    ),
    "pack-window": (
        Wrong("the mask is shifted by one", "shifted by one",
              {"np.where(mask[1:], ids[1:], IGNORE)": "np.where(mask[:-1], ids[1:], IGNORE)"}),
        Wrong("prompts are learnt", "prompts",
              {"np.where(mask[1:], ids[1:], IGNORE)": "ids[1:]"}),
        Wrong("targets are the inputs", "ids[1:]",
              {"np.where(mask[1:], ids[1:], IGNORE)": "np.where(mask[:-1], ids[:-1], IGNORE)"}),
        Wrong("one document for a whole window", "neighbour",
              {"documents[row, start:end] = number": "documents[row, start:end] = 1"}),
        Wrong("padding has targets", "padding",
              {"np.full_like(inputs, IGNORE)": "np.zeros_like(inputs)"}),
        Wrong("past the end it fails", "past the end",
              {"self.packs[window] if window < self.windows else ()": "self.packs[window]"}),
        Wrong("the last target is lost", "target lost",
              {"start = end": "targets[row, end - 1] = IGNORE; start = end"}),
    ),
    "choose-pair": (
        Wrong("chosen and rejected swapped", "swapped",
              {'"chosen": best["text"], "rejected": worst["text"]':
               '"chosen": worst["text"], "rejected": best["text"]'}),
        Wrong("of equal scores the last", "first", body="""
            ranked = sorted(samples, key=lambda sample: sample["score"])
            worst, best = ranked[0], ranked[-1]
            if chosen == "author":
                best = {"text": conversation["messages"][-1]["content"], "score": 1.0}
            if best["score"] - worst["score"] < margin or best["text"] == worst["text"] \\
                    or not worst["text"].strip():
                return None
            *prompt, _ = conversation["messages"]
            return {"prompt": prompt, "chosen": best["text"], "rejected": worst["text"],
                    "scores": [best["score"], worst["score"]]}
            """),
        Wrong("more than the margin is asked for", ">=", {"< margin": "<= margin"}),
        Wrong("no margin is asked for", "margin", {'best["score"] - worst["score"] < margin or ': ""}),
        Wrong("an empty answer is rejected", "empty", {' or not worst["text"].strip()': ""}),
        Wrong("equal texts make a pair", "equals", {' or best["text"] == worst["text"]': ""}),
        Wrong("the author's answer stands in the prompt", "in the prompt",
              {'*prompt, _ = conversation["messages"]': 'prompt = conversation["messages"]'}),
        Wrong("only the last question is the prompt", "system message",
              {'*prompt, _ = conversation["messages"]': 'prompt = conversation["messages"][-2:-1]'}),
    ),
    "dpo-loss": (
        Wrong("reference and policy swapped", "policy and reference swapped",
              {"chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected":
               "chosen, rejected = reference_chosen - policy_chosen, reference_rejected - policy_rejected"}),
        Wrong("chosen and rejected swapped", "chosen and rejected", {"h, eps = chosen - rejected":
                                                                     "h, eps = rejected - chosen"}),
        Wrong("the references of the other answer", "same answer",
              {"policy_chosen - reference_chosen, policy_rejected - reference_rejected":
               "policy_chosen - reference_rejected, policy_rejected - reference_chosen"}),
        Wrong("beta is missing", "beta",
              {"losses = -F.logsigmoid(beta * h) * (1 - eps) - F.logsigmoid(-beta * h) * eps":
               "losses = -F.logsigmoid(h) * (1 - eps) - F.logsigmoid(-h) * eps"}),
        Wrong("a mean over the pairs", "averaged",
              {"return losses, (beta": "return losses.mean(), (beta"}),
        Wrong("rewards with gradient", "detach",
              {"(beta * chosen).detach()": "(beta * chosen)"}),
        Wrong("rewards without beta", "rewards",
              {"(beta * chosen).detach(), (beta * rejected).detach()":
               "chosen.detach(), rejected.detach()"}),
        Wrong("smoothing takes away and gives nothing back", "label_smoothing",
              {"losses = -F.logsigmoid(beta * h) * (1 - eps) - F.logsigmoid(-beta * h) * eps":
               "losses = -F.logsigmoid(beta * h) * (1 - eps)"}),
        Wrong("IPO of beta times h", "beta",
              {"(h - 1 / (2 * beta)) ** 2": "(beta * h - 1 / 2) ** 2"}),
        Wrong("IPO's target is 1 / beta", "target", {"(h - 1 / (2 * beta)) ** 2": "(h - 1 / beta) ** 2"}),
        Wrong("the logarithm of a sigmoid", "underflows",
              {"losses = -F.logsigmoid(beta * h) * (1 - eps) - F.logsigmoid(-beta * h) * eps":
               "losses = -torch.sigmoid(beta * h).log() * (1 - eps) - torch.sigmoid(-beta * h).log() * eps"}),
        Wrong("the hinge without a margin", "margin", {"F.relu(1 - beta * h)": "F.relu(-beta * h)"}),
    ),
    "sequence-logps": (
        Wrong("a mean instead of a sum", "mean",
              {"return summed(logps, rows, len(ids), ids.size(1))[0]":
               "total, n = summed(logps, rows, len(ids), ids.size(1)); return total / n"}),
        Wrong("prompt and padding count", "prompt", {"torch.where(mask, ids, IGNORE)[:, 1:]": "ids[:, 1:]"}),
        Wrong("the mask is shifted by one", "shifted by one",
              {"torch.where(mask, ids, IGNORE)[:, 1:]": "torch.where(mask[:, :-1], ids[:, 1:], IGNORE)"}),
        Wrong("each token at its own position", "own position",
              {"torch.where(mask, ids, IGNORE)[:, 1:]": "torch.where(mask, ids, IGNORE)[:, :-1]"}),
        Wrong("no gradient", "detached", {"rows = (targets": "logps = logps.detach(); rows = (targets"}),
        Wrong("zeros", "sum", body="return torch.zeros(len(ids), requires_grad=True)"),
    ),
    "exact-reward": (
        Wrong("the truth stands somewhere in the reply", "searched", body="""
            truth = question.get("answer")
            if truth is None:
                said = author(question)
                truth = inside(said, "answer") or said
            return float(str(truth) in reply.text)
            """),
        Wrong("the first of two answers", "two answers",
              {'found = inside(reply.text, "answer")':
               'found = reply.text.partition("<answer>")[2].partition("</answer>")[0] or None'}),
        Wrong("the last of two answers", "two answers",
              {'found = inside(reply.text, "answer")':
               'found = reply.text.rpartition("<answer>")[2].partition("</answer>")[0]'
               ' if "</answer>" in reply.text.rpartition("<answer>")[2] else None'}),
        Wrong("compared as numbers", "number",
              {"float(found is not None and found.strip() == str(truth).strip() != \"\")":
               "float(found is not None and found.replace('.', '').replace(' ', '').strip().isdigit()"
               " and float(found.replace(' ', '')) == float(truth))"}),
        Wrong("white space is not taken away", "white space", {"found.strip() == str(truth).strip()":
                                                               "found == str(truth)"}),
        Wrong("a bare reply counts everywhere", "bare", {"found is None and tagged is None and":
                                                         "found is None and"}),
        Wrong("a reply that was cut off counts", "cut off", {"and reply.ended ": ""}),
        Wrong("a text with tags is read as a bare reply", "bare",
              {'and not tags(reply.text, "answer")': ""}),
        Wrong("an empty truth is met by an empty answer", "empty", {'.strip() != "")': ".strip())"}),
        Wrong("True counts as a whole number", "bool", {"isinstance(truth, bool) or ": ""}),
    ),
    "reward-at-end": (
        Wrong("the last column", "last column", body="return scores[:, -1]"),
        Wrong("the number of real tokens is taken for a place", "left", {
            "torch.where(real, torch.arange(real.size(1), device=real.device), -1).amax(dim=1)":
            "real.sum(dim=1) - 1"}),
        Wrong("the first real token", "read", {
            "torch.where(real, torch.arange(real.size(1), device=real.device), -1).amax(dim=1)":
            "real.int().argmax(dim=1)"}),
        Wrong("one token too far", "n - 1", {"last = real - 1": "last = real.clamp(max=scores.size(1) - 1)"}),
        Wrong("a mean over the tokens", "read", body="""
            if real.dtype != torch.bool:
                real = torch.arange(scores.size(1)) < real[:, None]
            return (scores * real).sum(dim=1) / real.sum(dim=1)
            """),
    ),
    "reward-loss": (
        Wrong("chosen and rejected swapped", "swapped", {"F.logsigmoid(chosen - rejected -":
                                                         "F.logsigmoid(rejected - chosen -"}),
        Wrong("the margin is added", "margin", {"F.logsigmoid(chosen - rejected - (":
                                                "F.logsigmoid(chosen - rejected + ("}),
        Wrong("the logarithm of a sigmoid", "underflows", {
            "-F.logsigmoid(chosen - rejected - (0.0 if margin is None else margin))":
            "-torch.sigmoid(chosen - rejected - (0.0 if margin is None else margin)).log()"}),
        Wrong("the difference is centred", "centre", {
            "(chosen + rejected) ** 2": "(chosen - rejected) ** 2"}),
        Wrong("a mean over the pairs", "averaged", {
            "return losses + centre": "losses = losses.mean(); return losses + centre"}),
        Wrong("the difference itself", "log(1 + 1/e)", body="return rejected - chosen"),
    ),
    "kl-estimate": (
        Wrong("the ratio inverted", "inverted", {
            "k1 = logps - reference_logps": "k1 = reference_logps - logps"}),
        Wrong("k3 with the sign of its first term wrong", "sign", {"torch.expm1(-k1) + k1":
                                                                   "torch.expm1(k1) + k1"}),
        Wrong("k3 that takes k1 away", "sign", {"torch.expm1(-k1) + k1": "torch.expm1(-k1) - k1"}),
        Wrong("k3 of KL(reference | policy)", "k3", {"torch.expm1(-k1) + k1": "torch.expm1(k1) - k1"}),
        Wrong("k2 without the half", "half", {"k1.square() / 2": "k1.square()"}),
        Wrong("k1 made positive", "k1", {"return k1\n": "return k1.abs()\n"}),
        Wrong("the policy detached", "detached",
              {"k1 = logps - reference_logps": "k1 = logps.detach() - reference_logps + 0 * logps"}),
        Wrong("an unknown kind is taken for k1", "kind",
              {'raise UserError(f"kl kind {kind!r} is none of k1, k2, k3")': "return k1"}),
    ),
    "group-advantages": (
        Wrong("groups of every so-many-th reply", "side by side",
              {"rewards.view(-1, group_size)": "rewards.view(group_size, -1).T"}),
        Wrong("the standard deviation of n", "that of n",
              {"groups.std(dim=1, keepdim=True)": "groups.std(dim=1, keepdim=True, correction=0)"}),
        Wrong("no epsilon", "epsilon", {" + 1e-4)": ")"}),
        Wrong("another epsilon", "1e-4", {" + 1e-4)": " + 1e-2)"}),
        Wrong("the standard deviation of the whole batch", "whole batch",
              {"groups.std(dim=1, keepdim=True)": "groups.std()"}),
        Wrong("always divided", "divide_by_std", {"elif divide_by_std:": "else:"}),
        Wrong("one's own reward in the mean", "itself",
              {"centred = centred * group_size / (group_size - 1)": "pass"}),
        Wrong("the whole batch's mean", "group",
              {"groups.mean(dim=1, keepdim=True)": "groups.mean()"}),
        Wrong("rewards as they are", "mean", body="return rewards"),
    ),
    "gae": (
        Wrong("multiplied by the mask: nan leaks over padding", "padding",
              {"torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)":
               "rewards * mask, values * mask"}),
        Wrong("the value of padding is the next one", "padding", body="""
            advantages, later = torch.zeros_like(values), 0.0
            for t in reversed(range(values.size(1))):
                next_value = values[:, t + 1] if t + 1 < values.size(1) else 0.0
                delta = rewards[:, t] + gamma * next_value - values[:, t]
                later = delta + gamma * lam * later
                advantages[:, t] = later
            advantages = torch.where(mask, advantages, 0.0)
            return advantages, torch.where(mask, advantages + values, 0.0)
            """),
        Wrong("no bootstrap: the next value is missing", "bootstrap",
              {"+ gamma * next_value - values": "- values"}),
        Wrong("the next value without gamma", "gamma", {"gamma * next_value": "next_value"}),
        Wrong("lam is missing", "lam", {"gamma * lam * later": "gamma * later"}),
        Wrong("gamma is missing where lam stands", "0.25", {"gamma * lam * later": "lam * later"}),
        Wrong("from the beginning to the end", "from the end", {"reversed(range(values.size(1)))":
                                                                "range(values.size(1))"}),
        Wrong("returns without the values", "returns",
              {"advantages + values, 0.0": "advantages, 0.0"}),
        Wrong("the last token is followed by the first", "behind the last token", body="""
            rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
            advantages, later, following = torch.zeros_like(values), 0.0, values.roll(-1, dims=1)
            for t in reversed(range(values.size(1))):
                delta = rewards[:, t] + gamma * following[:, t] - values[:, t]
                later = torch.where(mask[:, t], delta + gamma * lam * later, 0.0)
                advantages[:, t] = later
            return advantages, torch.where(mask, advantages + values, 0.0)
            """),
    ),
    "whiten": (
        Wrong("mean and variance of the whole grid", "padding included", body="""
            mean, variance = values.mean(), values.var()
            return torch.where(mask, (values - mean) * (variance + 1e-8).rsqrt()
                               + (0.0 if shift_mean else mean), 0.0)
            """),
        Wrong("multiplied by the mask", "nan times 0", body="""
            number, total = over_all(torch.stack([mask.sum().to(values.dtype), (values * mask).sum()]))
            mean = total / number.clamp(min=1)
            squares = over_all(((values - mean) * mask).square().sum())
            scale = (squares / (number - 1).clamp(min=1) + 1e-8).rsqrt()
            return ((values - mean) * scale + (0.0 if shift_mean else mean)) * mask
            """),
        Wrong("variance by n", "n - 1", {"squares / (number - 1)": "squares / number"}),
        Wrong("shift_mean is not used", "shift_mean", {"(0.0 if shift_mean else mean)": "0.0"}),
        Wrong("divided by the variance", "variance", {"1e-8).rsqrt()": "1e-8).reciprocal()"}),
        Wrong("no epsilon", "1e-8", {" + 1e-8)": ")"}),
        Wrong("a single value divides by zero", "single", {"(number - 1).clamp(min=1)": "(number - 1)"}),
        Wrong("the mean of one's own process", "processes",
              {"number, total = over_all(torch.stack([mask.sum().to(values.dtype), kept.sum()]))":
               "number, total = torch.stack([mask.sum().to(values.dtype), kept.sum()])"}),
        Wrong("what stands outside the mask is kept", "outside", {
            "return torch.where(mask, (values - mean) * scale + (0.0 if shift_mean else mean), 0.0)":
            "return (values - mean) * scale + (0.0 if shift_mean else mean)"}),
    ),
    "policy-loss": (
        Wrong("the maximum of both sides", "maximum", {"-torch.minimum": "-torch.maximum"}),
        Wrong("the clipped side alone", "alone", {"torch.minimum(ratio * advantages, clipped * advantages)":
                                                  "(clipped * advantages)"}),
        Wrong("nothing is clipped", "nothing clipped", {
            "torch.minimum(ratio * advantages, clipped * advantages)":
            "(ratio * advantages)"}),
        Wrong("the ratio inverted", "inverted", {"(logps - old_logps)": "(old_logps - logps)"}),
        Wrong("a gain instead of a loss", "minus", {"return -torch": "return torch"}),
        Wrong("clip_high is ignored", "clip_high", {"(clip if clip_high is None else clip_high)": "clip"}),
        Wrong("clip_high is used below, too", "below", {"ratio.clamp(1 - clip,":
                                                        "ratio.clamp(1 - (clip if clip_high is None else "
                                                        "clip_high),"}),
        Wrong("below, the room is as wide as a ratio's inverse", "stood still", {
            "ratio.clamp(1 - clip,": "ratio.clamp(1 / (1 + 3 * clip),"}),
    ),
    "value-loss": (
        Wrong("the held error alone", "alone", {"torch.maximum(errors, (held - returns).square())":
                                                "(held - returns).square()"}),
        Wrong("the smaller of both", "larger", {"torch.maximum": "torch.minimum"}),
        Wrong("the half is missing", "half", {"return errors / 2": "return errors"}),
        Wrong("held around the return", "around the return",
              {"old_values + (values - old_values).clamp(-clip, clip)":
               "returns + (values - returns).clamp(-clip, clip)"}),
        Wrong("clip None clips at 0.2", "clip none",
              {"if clip is not None:": "clip = clip or 0.2\n    if clip is not None:"}),
        Wrong("zeros", "errors", body="return 0 * values"),
    ),
    "kd-loss": (
        Wrong("T^2 is missing", "t^2", {"kd_weight * temperature ** 2 * divergence":
                                        "kd_weight * divergence"}),
        Wrong("teacher and student swapped", "swapped", {"divergence(log_p, log_q, of)":
                                                         "divergence(log_q, log_p, of)"}),
        Wrong("divided by the rows, as batchmean", "batchmean",
              {"return loss_sum, valid.sum()":
               "return loss_sum / (len(valid) if valid.dim() else 1), valid.sum()"}),
        Wrong("a mean over the tokens", "of tokens",
              {"return loss_sum, valid.sum()": "return loss_sum / valid.sum().clamp(min=1), valid.sum()"}),
        Wrong("padding counts", "padding",
              {"return loss_sum, valid.sum()": "return loss_sum, torch.tensor(valid.numel())"}),
        Wrong("the student at temperature 1", "not at the temperature",
              {"log_q = log_probabilities(student, temperature)": "log_q = log_probabilities(student)"}),
        Wrong("the cross-entropy at the temperature, too", "cross-entropy",
              {"F.nll_loss(log_probabilities(student),":
               "F.nll_loss(log_probabilities(student, temperature),"}),
        Wrong("the weight on the wrong one", "wrong one", {
            "loss_sum = loss_sum + kd_weight * temperature":
            "loss_sum = loss_sum + (1 - kd_weight) * temperature",
            "loss_sum = loss_sum + (1 - kd_weight) * ce": "loss_sum = loss_sum + kd_weight * ce"}),
        Wrong("masked after the arithmetic", "mask before", body="""
            of = Divergence(kind, beta, skew, temperature).check()
            check_same_vocabulary(student_logits.size(-1), teacher_logits.size(-1))
            valid = targets != IGNORE
            log_p = log_probabilities(teacher_logits.detach(), temperature)
            log_q = log_probabilities(student_logits, temperature)
            kd = torch.where(valid, divergence(log_p, log_q, of), 0.0).sum()
            V = student_logits.size(-1)
            ce = F.cross_entropy(student_logits.reshape(-1, V), targets.reshape(-1), reduction="sum")
            total = 0 * student_logits[valid].sum()
            if kd_weight:
                total = total + kd_weight * temperature ** 2 * kd
            if kd_weight < 1:
                total = total + (1 - kd_weight) * ce
            return total, valid.sum()
            """),
        Wrong("-inf gives nan", "-inf", {
            "log_p = log_probabilities(teacher_logits[valid].detach(), temperature)":
            "log_p = (teacher_logits[valid].detach() / temperature).log_softmax(-1)",
            "log_q = log_probabilities(student, temperature)":
            "log_q = (student / temperature).log_softmax(-1)"}),
    ),
    "rest-of-top-k": (
        Wrong("one minus the sum of the known", "1 - the sum", body="""
            known = logps.gather(-1, ids).exp().sum(dim=-1, keepdim=True)
            return (1 - known).log().clamp(min=FLOOR)
            """),
        Wrong("the tail is ignored", "the tail ignored",
              body="return torch.full_like(logps[..., :1], FLOOR)"),
        Wrong("the mass of the known tokens", "known tokens", body="""
            return logps.gather(-1, ids).logsumexp(dim=-1, keepdim=True).clamp(min=FLOOR)
            """),
        Wrong("-inf where nothing is left", "-inf", {".clamp(min=FLOOR)": ""}),
        Wrong("the distribution is written over", "written over", {"logps.scatter(": "logps.scatter_("}),
        Wrong("a sum of logarithms", "the sum", body="""
            return logps.scatter(-1, ids, 0.0).sum(dim=-1, keepdim=True).clamp(min=FLOOR)
            """),
    ),
    "attention-match": (
        Wrong("student and teacher swapped", "swapped",
              {"F.kl_div(fewer(student), fewer(teacher),": "F.kl_div(fewer(teacher), fewer(student),"}),
        Wrong("the mean of logarithms", "mean of logarithms",
              {"logsumexp(dim=2) - math.log(H // heads)": "mean(dim=2).log_softmax(-1)"}),
        Wrong("a sum of heads, not a mean", "averaged", {" - math.log(H // heads)": ""}),
        Wrong("a sum over heads", "mean over heads", {"kl.mean(dim=1)": "kl.sum(dim=1)"}),
        Wrong("every query counts", "without a target", {
            "(kl.mean(dim=1) * valid).sum()": "kl.mean(dim=1).sum()"}),
        Wrong("a mean over the queries", "not a mean",
              {"(kl.mean(dim=1) * valid).sum()": "(kl.mean(dim=1) * valid).sum() / valid.numel()"}),
        Wrong("the smaller number of heads in place of the common factor", "gcd",
              {"math.gcd(student.size(1), teacher.size(1))": "min(student.size(1), teacher.size(1))"}),
    ),
    "layers-student": (
        Wrong("the first blocks", "first six",
              {"np.linspace(0, have - 1, n_layers).round().astype(int).tolist()": "list(range(n_layers))"}),
        Wrong("every second block, without the last", "without the last",
              {"np.linspace(0, have - 1, n_layers).round().astype(int).tolist()":
               "[i * have // n_layers for i in range(n_layers)]"}),
        Wrong("rounded down", "rounded down", {"n_layers).round()": "n_layers)"}),
        Wrong("a block gets another number", "new number", {
            "parts[2] = str(blocks.index(int(parts[2])))": "parts[2] = str(int(parts[2]) % n_layers)"}),
        Wrong("the blocks in the opposite order", "order", {
            "blocks.index(int(parts[2]))": "n_layers - 1 - blocks.index(int(parts[2]))"}),
        Wrong("memory shared with the teacher", "share memory",
              {', copy=True)': ")"}),
    ),
}

RIGHT_B: dict[str, tuple[str, ...]] = {
    "quantize-nf4": ("""
        flat = weight.detach().flatten().float()
        blocks = torch.cat([flat, flat.new_zeros(-len(flat) % block_size)]).view(-1, block_size)
        scales = blocks.abs().amax(dim=1)
        bounded = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0.0).flatten()
        codes = torch.empty(len(bounded), dtype=torch.uint8)
        for i, part in enumerate(bounded.split(4096)):
            codes[4096 * i:4096 * i + len(part)] = (part[:, None] - torch.tensor(NF4)).abs().argmin(dim=1)
        codes = codes[:len(flat) + len(flat) % 2]
        if double:
            scales = quantize_int8(scales, centred=True)
        return NF4Tensor(codes[::2] * 16 + codes[1::2], scales, weight.shape, block_size)
        """,),
    "lora-start": ("""
        nn.Module.__init__(self)
        weight = weight_of(linear)
        rows, columns = weight.shape
        place = dict(device=place_of(weight), dtype=weight.dtype)
        self.register_parameter("lora_A", nn.Parameter(torch.empty(rank, columns, **place)))
        self.register_parameter("lora_B", nn.Parameter(torch.empty(rows, rank, **place)))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B)
        self.scale = scale
        self.dropout = dropout
        self.lora_magnitude = None
        if use_dora:
            self.lora_magnitude = nn.Parameter(
                torch.empty(rows, **place) if weight.is_meta else weight.detach().norm(dim=1))
        """,),
    "lora-forward": ("""
        read = F.dropout(x, p=self.dropout, training=self.training)
        if self.lora_magnitude is not None:
            return self.dora(x, read, F.linear(read, self.lora_A), y, linear)
        return y + self.scale * (read @ self.lora_A.T @ self.lora_B.T)
        """,),
    "lora-merge": ("""
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        with torch.autocast(weight.device.type, enabled=False):
            return weight.to(kind) + sign * self.scale * (self.lora_B.to(kind) @ self.lora_A.to(kind))
        """,),
    "take-turns": ("""
        counts = [0] * len(weights)
        for i in range(len(weights) - 1, -1, -1):
            left = sum(weights[:i + 1])
            if weights[i]:
                counts[i] = n * weights[i] // left
            n -= counts[i]
        return counts
        """,),
    "best-fit": ("""
        windows, lefts = [], []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
            able = [w for w, left in enumerate(lefts) if left >= lengths[i]]
            if not able:
                able = [len(windows)]
                windows.append([])
                lefts.append(room)
            w = min(able, key=lambda w: lefts[w])
            windows[w].append(i)
            lefts[w] -= lengths[i]
        return windows
        """,),
    "pack-window": ("""
        rows = []
        for window in windows:
            inputs, targets, documents = [], [], []
            if window < len(self.packs):
                for number, example in enumerate(self.packs[window]):
                    ids, mask = (list(map(int, x)) for x in self.examples[example])
                    inputs += ids[:-1]
                    targets += [id if learnt else -100 for id, learnt in zip(ids[1:], mask[1:])]
                    documents += [number + 1] * (len(ids) - 1)
            left = self.seq_len - len(inputs)
            rows.append((inputs + [0] * left, targets + [-100] * left, documents + [0] * left))
        return tuple(torch.tensor(column) for column in zip(*rows))
        """,),
    "choose-pair": ("""
        scores = [sample["score"] for sample in samples]
        low = samples[scores.index(min(scores))]
        top, text = max(scores), samples[scores.index(max(scores))]["text"]
        if chosen == "author":
            top, text = 1.0, conversation["messages"][-1]["content"]
        if top - low["score"] >= margin and text != low["text"] and low["text"].strip():
            return {"prompt": conversation["messages"][:-1], "chosen": text, "rejected": low["text"],
                    "scores": [top, low["score"]]}
        return None
        """,),
    "dpo-loss": ("""
        c, r = policy_chosen - reference_chosen, policy_rejected - reference_rejected
        x = beta * (c - r)
        if kind == "sigmoid":
            losses = F.softplus(-x) + label_smoothing * x  # softplus(x) = softplus(-x) + x
        elif kind == "hinge":
            losses = (1 - x).clamp(min=0)
        elif kind == "ipo":
            losses = (c - r - 0.5 / beta).square()
        else:
            raise NotImplementedError(kind)
        return losses, beta * c.detach(), beta * r.detach()
        """,),
    "sequence-logps": ("""
        logps = model(ids[:, :-1]).float().log_softmax(-1)
        return (logps.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(dim=1)
        """,),
    "exact-reward": ("""
        said = author(question)
        in_tags = inside(said, "answer")
        truth = question["answer"] if question.get("answer") is not None else in_tags
        truth = said if truth is None else truth
        if type(truth) not in (str, int):
            raise ValueError("text or a whole number is expected")
        answers = reply.text.split("<answer>")
        ends = reply.text.count("</answer>")
        if len(answers) == 1 and not ends:
            if in_tags is not None or not reply.ended:
                return 0.0
            found = reply.text
        elif len(answers) == 2 and ends == 1 and "</answer>" in answers[1]:
            found = answers[1].split("</answer>")[0]
        else:
            return 0.0
        return 1.0 if found.strip() and found.strip() == str(truth).strip() else 0.0
        """,),
    "reward-at-end": ("""
        if real.dtype != torch.bool:
            return scores[torch.arange(len(scores)), real - 1]
        back = real.flip(1).int().argmax(dim=1)
        return scores[torch.arange(len(scores)), scores.size(1) - 1 - back]
        """,),
    "reward-loss": ("""
        apart = chosen - rejected
        if margin is not None:
            apart = apart - margin
        return F.softplus(-apart) + centre * (chosen + rejected).square()
        """,),
    "kl-estimate": ("""
        difference = reference_logps - logps
        estimates = {"k1": -difference, "k2": 0.5 * difference ** 2, "k3": difference.exp() - 1 - difference}
        if kind not in estimates:
            raise UserError(f"{kind} is not a kind")
        return estimates[kind]
        """,),
    "group-advantages": ("""
        if group_size == 1:
            raise UserError("a reply alone has no group; pass --samples 8")
        found = []
        for group in rewards.split(group_size):
            if kind == "rloo":
                found.append(group - (group.sum() - group) / (group_size - 1))
            else:
                found.append((group - group.mean()) / (group.std() + 1e-4 if divide_by_std else 1))
        return torch.cat(found)
        """,),
    "gae": ("""
        advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
        for row, n in enumerate(mask.sum(dim=1).tolist()):
            later = next_value = 0.0
            for t in range(n - 1, -1, -1):
                later = rewards[row, t] + gamma * next_value - values[row, t] + gamma * lam * later
                next_value = values[row, t]
                advantages[row, t], returns[row, t] = later, later + values[row, t]
        return advantages, returns
        """,),
    "whiten": ("""
        inside = values[mask]
        number, total = over_all(torch.stack([torch.tensor(float(len(inside))), inside.sum()]))
        mean = total / max(number, 1)
        variance = over_all((inside - mean).square().sum()) / max(number - 1, 1)
        result = torch.zeros_like(values)
        result[mask] = (inside - mean) / (variance + 1e-8).sqrt() + (0 if shift_mean else mean)
        return result
        """,),
    "policy-loss": ("""
        high = clip if clip_high is None else clip_high
        ratio = torch.exp(logps) / torch.exp(old_logps)
        held = torch.clamp(ratio, min=1 - clip, max=1 + high)
        return torch.max(-advantages * ratio, -advantages * held)
        """,),
    "value-loss": ("""
        plain = 0.5 * (returns - values) ** 2
        if clip is None:
            return plain
        held = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        return torch.maximum(plain, 0.5 * (returns - held) ** 2)
        """,),
    "kd-loss": ("""
        of = Divergence(kind, beta, skew, temperature).check()
        if not 0 <= kd_weight <= 1:
            raise UserError(f"{kd_weight} is no weight")
        check_same_vocabulary(student_logits.size(-1), teacher_logits.size(-1))
        keep = (targets != IGNORE).flatten().nonzero()[:, 0]
        student = student_logits.reshape(-1, student_logits.size(-1))[keep]
        teacher = teacher_logits.reshape(-1, teacher_logits.size(-1))[keep]
        targets = targets.flatten()[keep]
        terms = student[:0].sum()
        if kd_weight > 0:
            with torch.no_grad():
                log_p = log_probabilities(teacher, temperature)
            distances = divergence(log_p, log_probabilities(student, temperature), of)
            terms = terms + kd_weight * temperature * temperature * distances.sum()
        if kd_weight < 1:
            logps = log_probabilities(student).gather(1, targets[:, None])
            terms = terms - (1 - kd_weight) * logps.sum()
        return terms, torch.tensor(len(keep))
        """,),
    "rest-of-top-k": ("""
        known = torch.zeros_like(logps, dtype=torch.bool).scatter(-1, ids, True)
        others = logps.masked_fill(known, -math.inf)
        return torch.logsumexp(others, -1, True).clamp(min=FLOOR)
        """,),
    "attention-match": ("""
        heads = math.gcd(student.shape[1], teacher.shape[1])
        p, q = (logps.exp().unflatten(1, (heads, -1)).mean(dim=2) for logps in (teacher, student))
        kl = (p * (p.clamp(min=1e-44).log() - q.clamp(min=1e-44).log())).sum(dim=-1).mean(dim=1)
        return kl[valid].sum()
        """,),
    "layers-student": ("""
        have = teacher.config.n_layers
        at_most("n_layers", n_layers, have)
        blocks = [int(np.round(i * (have - 1) / max(1, n_layers - 1))) for i in range(n_layers)]
        tensors = {}
        old = {name: tensor.detach().cpu().float().clone() for name, tensor in weights_of(teacher).items()}
        for name, tensor in old.items():
            if ".layers." not in name:
                tensors[name] = tensor
        for new, block in enumerate(blocks):
            for name, tensor in old.items():
                if name.startswith(f"model.layers.{block}."):
                    tensors[name.replace(f".{block}.", f".{new}.", 1)] = tensor
        return assembled(replace(teacher.config, n_layers=n_layers), tensors,
                         f"blocks {blocks} of the teacher's {have}")
        """,),
}
