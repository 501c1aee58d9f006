"""Classic wrong answers to the exercises, and right ones that are written differently.

tests/test_exercise.py (slow) shows that every wrong one is rejected by a hint that names the mistake.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Wrong:
    mistake: str  # what is wrong, in a few words
    says: str  # a word or phrase that the hint must contain, in lower case
    change: dict[str, str] | None = None  # {a piece of the original, there once: what stands there}
    body: str | None = None  # or a whole other body, dedented, without signature and docstring


WRONG: dict[str, tuple[Wrong, ...]] = {
    # ---- settings and tokens
    "train-bpe": (
        Wrong("of a tie the first seen wins", "tie", {"(counts[pair], pair)": "counts[pair]"}),
        Wrong("of a tie the smallest wins", "smallest", {
            "max(counts, key=lambda pair: (counts[pair], pair))":
            "min(counts, key=lambda pair: (-counts[pair], pair))"}),
        Wrong("each word is counted once", "word once", {".elements()": ""}),
        Wrong("each pair is counted once a word", "once a word", {"pairwise(word))": "set(pairwise(word)))"}),
        Wrong("words are never merged", "merged by each new pair", {
            "words = [merge(word, best) for word in words]": "pass"}),
    ),
    "merge": (
        Wrong("overlapping pairs are all merged", "left", {"i += width": "i += 1"}),
        Wrong("the word comes back unchanged", "merge all there is", body="return list(word)"),
        Wrong("merged from the right", "from the left", body="""
            merged, i = [], len(word)
            while i > 0:
                width = 2 if tuple(word[max(i - 2, 0):i]) == pair else 1
                merged.insert(0, b"".join(word[i - width:i]))
                i -= width
            return merged"""),
        Wrong("only the first place is merged", "merge all there is", body="""
            for i in range(len(word) - 1):
                if tuple(word[i:i + 2]) == pair:
                    return [*word[:i], b"".join(pair), *word[i + 2:]]
            return list(word)"""),
    ),
    "merge-ids": (
        Wrong("the first merge from the left", "lowest", {
            "(rank := min(here))": "(rank := next((r for r in here if r < never), never))"}),
        Wrong("of equal ranks the rightmost", "leftmost", {
            "i = here.index(rank)": "i = len(here) - 1 - here[::-1].index(rank)"}),
        Wrong("the pair on the left keeps its old rank", "neighbours", {
            "here[i - 1] = ranks.get((ids[i - 1], ids[i]), never)": "pass"}),
        Wrong("one merge and no more", "until none is left", {"while here and": "if here and"}),
    ),
    "decode-stream": (
        Wrong("id by id", "half", body="""
            for id in ids:
                yield self.decode_bytes([int(id)]).decode("utf-8", errors="replace")"""),
        Wrong("the end is forgotten", "end forgotten", {
            'if text := decoder.decode(b"", final=True):\n            yield text': "return"}),
        Wrong("what is no UTF-8 is ignored", "ignored", {'errors="replace"': 'errors="ignore"'}),
        Wrong("all at the end", "wait for all", body="yield from filter(None, [self.decode(list(ids))])"),
    ),
    # ---- the model, and its adapters
    "rope-angles": (
        Wrong("the exponent is d / D, half as large", "exponent", {"/ head_dim\n": "/ (2 * head_dim)\n"}),
        Wrong("frequencies grow", "negative", {"1.0 / theta ** exponents": "theta ** exponents"}),
        Wrong("positions in bfloat16", "float32", {
            "positions[..., None].float()": "positions[..., None].bfloat16()"}),
        Wrong("theta ** -exponents", "last bits", {"1.0 / theta ** exponents": "theta ** -exponents"}),
        Wrong("yarn's temperature is forgotten", "sharpness", {
            "angles.cos() * sharpness, angles.sin() * sharpness": "angles.cos(), angles.sin()"}),
    ),
    "rope": (
        Wrong("neighbours are paired, as in the paper", "interleaved", body="""
            x1, x2 = x.float()[..., ::2], x.float()[..., 1::2]
            turned = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
            return turned.flatten(-2).to(x.dtype)"""),
        Wrong("turned backwards", "sign", {"x1 * cos - x2 * sin": "x1 * cos + x2 * sin",
                                           "x2 * cos + x1 * sin": "x2 * cos - x1 * sin"}),
        Wrong("float32 comes out whatever went in", "type", {".to(x.dtype)": ""}),
        Wrong("both halves are the first", "sign", {"x2 * cos + x1 * sin": "x1 * cos + x2 * sin"}),
    ),
    "attention": (
        Wrong("scores are not divided", "sqrt(d)", {"scores = scores / math.sqrt(q.size(-1))": "pass"}),
        Wrong("divided by D", "sqrt(d)", {"math.sqrt(q.size(-1))": "q.size(-1)"}),
        Wrong("softmax over the queries", "over the keys", {
            "scores.softmax(dim=-1)": "scores.softmax(dim=-2)"}),
        Wrong("head h reads h % K", "h % k", {
            "x.repeat_interleave(groups, dim=1)": "x.repeat(1, groups, 1, 1)"}),
        Wrong("the mask is upside down", "true", {"scores.masked_fill(~mask, -math.inf)":
                                                  "scores.masked_fill(mask, -math.inf)"}),
        Wrong("a query without keys gives NaN", "nan", {
            "weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)": "pass"}),
        Wrong("sinks are met as all other keys", "q_sinks", {
            "k[..., sinks:]": "k", "if sinks:": "if False:"}),
    ),
    "mask": (
        Wrong("nobody sees itself", "itself", {"seen = k <= q": "seen = k < q"}),
        Wrong("a prefix narrows", "widens", {"seen = seen | (": "seen = seen & ("}),
        Wrong("the window is one too wide", "too wide", {"< self.window)": "<= self.window)"}),
        Wrong("documents by their number", "run", {
            "self.begins[b, q] == self.begins[b, k]": "self.documents[b, q] == self.documents[b, k]"}),
        Wrong("a padded query sees nothing", "padded query", {"self.real[b, k]": "self.real[b, q]"}),
        Wrong("a prefix counts columns", "columns", {"(k if self.place is None else self.place[b, k])": "k"}),
    ),
    "kv-cache": (
        Wrong("the whole buffer comes back", "empty rest", {
            "return self.k[:, :, :end], self.v[:, :, :end]": "return self.k, self.v"}),
        Wrong("written over what was there", "behind", {
            "self.k[:, :, self.length:end], self.v[:, :, self.length:end]":
            "self.k[:, :, :k.size(2)], self.v[:, :, :k.size(2)]"}),
        Wrong("the length stays", "advanced", {"self.length = end": "pass"}),
        Wrong("only the new ones come back", "new ones alone", {
            "return self.k[:, :, :end], self.v[:, :, :end]": "return k, v"}),
    ),
    "sampling": (
        Wrong("a threshold by value", "threshold", {
            "logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)":
            "logits = logits.masked_fill(logits < best.values[..., -1:], -math.inf)"}),
        Wrong("the temperature comes last", "order", {
            "    logits = logits / temperature\n": "", "return logits.log_softmax(dim=-1)":
            "return (logits / temperature).log_softmax(dim=-1)"}),
        Wrong("multiplied by the temperature", "divided", {"logits / temperature": "logits * temperature"}),
        Wrong("what is left is not made to add up", "add up", {
            "return logits.log_softmax(dim=-1)": "return logits"}),
        Wrong("the penalty divides negative logits too", "negative", {
            "torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)":
            "logits / repetition_penalty"}),
        Wrong("min_p is a probability", "share", {
            "logits.amax(dim=-1, keepdim=True) + math.log(min_p)":
            "logits.logsumexp(dim=-1, keepdim=True) + math.log(min_p)"}),
    ),
    "top-p": (
        Wrong("the token that crosses the bound goes, and with it perhaps the first", "one always stays", {
            "best.cumsum(dim=-1) - best < top_p": "best.cumsum(dim=-1) <= top_p"}),
        Wrong("kept in the sorted order", "sorted order", {
            ".scatter(-1, order, inside)": ".index_copy(-1, torch.arange(order.size(-1)), inside)"}),
        Wrong("only the first 64 are looked at", "64", {
            "for count in (64, 1024, V):": "for count in (64,):"}),
        Wrong("nothing is sorted", "sorted", {
            "best, order = probs.topk(min(count, V), dim=-1)":
            "best, order = probs, torch.arange(V).expand_as(probs)"}),
    ),
    "draw": (
        Wrong("always the likeliest", "probability 0", body="return probs.argmax(dim=-1)"),
        Wrong("a share of 0 can come", "(0, 1]", {"1 - torch.rand(": "torch.rand("}),
        Wrong("sums in float32", "float64", {"else torch.float64": "else torch.float32"}),
        Wrong("one number for all rows", "random number of its own", {
            "torch.rand(len(probs), 1, dtype=wide, device=probs.device, generator=generator)":
            "torch.rand(1, 1, dtype=wide, device=probs.device, generator=generator).expand(len(probs), 1)"}),
        Wrong("a share of one", "add up", {
            "share * sums[:, -1:])": "share * torch.ones_like(sums[:, -1:]))"}),
    ),
    "verify": (
        Wrong("the rest comes from p", "max(p - q, 0)", {
            "(p[number] - q[number]).clamp(min=0)": "p[number]"}),
        Wrong("a guess holds where p is larger", "min(1, p / q)", {"share * q.gather": "q.gather"}),
        Wrong("p and q are swapped", "min(1, p / q)", {
            "share * q.gather(1, guesses[:, None])[:, 0] < p[:-1].gather(1, guesses[:, None])[:, 0]":
            "share * p[:-1].gather(1, guesses[:, None])[:, 0] < q.gather(1, guesses[:, None])[:, 0]"}),
        Wrong("all that hold are counted, whatever failed before", "void", {".cumprod(dim=0)": ""}),
    ),
    "parameters": (
        Wrong("a tied head is counted twice", "tied", {"0 if config.tie_embeddings else table": "table"}),
        Wrong("keys have as many heads as queries", "fewer", {"C * q + 2 * C * k + q * C": "4 * C * q"}),
        Wrong("an MLP of two matrices", "three matrices", {"L * 3 * C": "L * 2 * C"}),
        Wrong("the last norm is forgotten", "one norm at the end", {"(2 * L + 1) * C +": "2 * L * C +"}),
    ),
    "rmsnorm": (
        Wrong("in x's type", "float32", {"x32 = x.float()": "x32 = x"}),
        Wrong("eps outside the root", "eps", body="""
            x32 = x.float()
            root = x32.square().mean(-1, keepdim=True).sqrt()
            return self.weight * (x32 / (root + self.eps)).to(x.dtype)"""),
        Wrong("the mean is taken away", "layernorm", {
            "x32 = x.float()": "x32 = x.float() - x.float().mean(-1, keepdim=True)"}),
        Wrong("the norm instead of the root mean square", "sum", {".mean(-1": ".sum(-1"}),
    ),
    "self-attention": (
        Wrong("keys are not turned", "both turned", {"rotate(k, *rope)": "k"}),
        Wrong("keys are turned after the cache", "already turned", {
            "q, k = rotate(q, *rope), rotate(k, *rope)": "q = rotate(q, *rope)",
            "k, v = cache.append(k, v)": "k, v = cache.append(k, v); rope = [x[..., :1, :] for x in rope]",
            "out = attend(q, k, v, prepared)": "out = attend(q, rotate(k, *rope), v, prepared)"}),
        Wrong("the cache is filled and not read", "come back", {
            "k, v = cache.append(k, v)": "cache.append(k, v)"}),
        Wrong("heads are not transposed back", "back before o_proj", {
            "out.transpose(1, 2).reshape(B, T, -1)": "out.reshape(B, T, -1)"}),
        Wrong("values are turned too", "values", {
            "rotate(k, *rope)\n": "rotate(k, *rope)\n        v = rotate(v, *rope)\n"}),
        Wrong("normed after rope", "come before rope", body="""
            B, T, _ = x.shape
            q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                       for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = self.q_norm(rotate(q, *rope)), self.k_norm(rotate(k, *rope))
            if cache is not None:
                k, v = cache.append(k, v)
            return self.o_proj(attend(q, k, v, prepared).transpose(1, 2).reshape(B, T, -1))"""),
    ),
    "safetensors": (
        Wrong("the length is big-endian", "little-endian", {'"little"': '"big"'}),
        Wrong("the header is not filled up", "multiple of 8", {'text += b" " * (-len(text) % 8)': "pass"}),
        Wrong("offsets are begin and size", "[begin, end]", {
            "[position, end]}": "[position, end - position]}"}),
        Wrong("in the order they came", "write_order", {
            "names = write_order(tensors)": "names = list(tensors)"}),
        Wrong("metadata stands beside the tensors", "__metadata__", {
            '{"__metadata__": dict(metadata)}': "dict(metadata)"}),
    ),
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
    # ---- data and conversations
    "union-find": (
        Wrong("i and j are joined, not their roots", "two roots", body="self.parents[max(i, j)] = min(i, j)"),
        Wrong("the greater becomes the root", "smaller index", {
            "self.parents[second] = first": "self.parents[first] = second"}),
        Wrong("nothing is joined", "joined", body="pass"),
        Wrong("only j moves, not its cluster", "two roots", {
            "self.parents[second] = first": "self.parents[j] = first"}),
    ),
    "minhash": (
        Wrong("hashes of few bits", "biased", {
            "np.add(values, offset, out=values)":
            "np.add(values, offset, out=values); values &= np.uint32(127)"}),
        Wrong("all functions are one", "independent", {
            "zip(signatures, factors, offsets)":
            "zip(signatures, [factors[0]] * len(factors), [offsets[0]] * len(factors))"}),
        Wrong("an empty text takes its neighbour's", "reduceat", {
            "row[filled] = np.minimum.reduceat(values, starts)":
            "row[:] = np.minimum.reduceat(values, np.minimum(np.cumsum(counts) - counts, len(values) - 1))"}),
        Wrong("the first hash, not the smallest", "estimate", {
            "np.minimum.reduceat(values, starts)": "values[starts]"}),
        Wrong("functions by texts", "(texts, functions)", {"return signatures.T": "return signatures"}),
    ),
    "lsh-chance": (
        Wrong("bands and rows are swapped", "swapped", body="""
            return 1 - (1 - np.asarray(similarity, float) ** bands) ** (num_hashes // bands)"""),
        Wrong("all bands must agree", "all agree", body="""
            return np.asarray(similarity, float) ** num_hashes"""),
        Wrong("the chance that none agrees", "none", {"return 1 - (1": "return (1"}),
    ),
    "find-pii": (
        Wrong("finds that overlap are all kept", "both kept", {"if start >= reached:": "if True:"}),
        Wrong("of two that begin together the shorter", "longer", {
            "(start, -end, kind) for detect": "(start, end, kind) for detect",
            "(start, -end, kind))": "(start, end, kind))",
            "reached = -end": "reached = end"}),
        Wrong("not sorted", "sorted", {"found = sorted((": "found = list(("}),
        Wrong("addresses of the sixth version are forgotten", "ipv6", {", numbers, ipv6)": ", numbers)"}),
    ),
    "epoch-order": (
        Wrong("each epoch the same", "its own order", {"[self.seed, epoch]": "self.seed"}),
        Wrong("the seed does nothing", "does the seed matter", {"[self.seed, epoch]": "epoch"}),
        Wrong("with replacement", "without replacement", {
            "generator.permutation(self.windows)": "generator.integers(self.windows, size=self.windows)"}),
        Wrong("seed and epoch are added", "added", {"[self.seed, epoch]": "self.seed + epoch"}),
        Wrong("a generator that goes on from call to call", "made anew", {
            "generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))":
            "generator = self.__dict__.setdefault('generator', np.random.default_rng(self.seed))"}),
    ),
    "windows": (
        Wrong("targets are the inputs", "shifted by one", {"= tokens[1:]": "= tokens[:-1]"}),
        Wrong("shifted by two", "nor by two", {
            "self.data[start:start + self.seq_len + 1]": "self.data[start:start + self.seq_len + 2]",
            "length = max(len(tokens) - 1, 0)": "length = max(len(tokens) - 2, 0)",
            "= tokens[1:]": "= tokens[2:]"}),
        Wrong("what fills up the last window is learnt", "-100", {
            "np.full_like(inputs, IGNORE)": "inputs.copy()"}),
        Wrong("the stride is taken for T", "w * stride", {"* self.stride\n": "* self.seq_len\n"}),
        Wrong("what overlaps counts twice", "counts once", {"if window > 0:": "if False:"}),
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
    "render": (
        Wrong("the prompt is learnt too", "prompt learnt", {"[learnt] * len(new)": "[True] * len(new)"}),
        Wrong("the mask is shifted", "shifted", {"return ids, mask": "return ids, [*mask[1:], False]"}),
        Wrong("no header for the reply to come", "add_generation_prompt", {
            "groupby(pieces(messages, add_generation_prompt, template)":
            "groupby(pieces(messages, False, template)"}),
        Wrong("anything is a conversation", "check_messages", {
            "check_messages(messages, reply_follows=add_generation_prompt)": "pass"}),
        Wrong("header and reply are encoded together", "together with the reply", body="""
            check_messages(messages, reply_follows=add_generation_prompt)
            check_tokens(tokenizer, template)
            some = list(pieces(messages, add_generation_prompt, template))
            ids, mask = encode(some, tokenizer), []
            for n in range(1, len(some) + 1):
                now = len(encode(some[:n], tokenizer)) if n < len(some) else len(ids)
                mask += [some[n - 1][2]] * (now - len(mask))
            return ids, mask[:len(ids)]"""),
    ),
    # ---- pretraining
    "next-token-loss": (
        Wrong("a mean", "a mean", {
            "return loss_sum, valid.sum()": "return loss_sum / valid.sum(), valid.sum()"}),
        Wrong("all targets are counted", "-100 counted", {
            "return loss_sum, valid.sum()":
            "return loss_sum, valid.new_tensor(valid.numel(), dtype=torch.long)"}),
        Wrong("shifted once more", "shifted again", {
            "hidden, targets = model.model(inputs, mask=mask).flatten(0, 1), targets.flatten()":
            "hidden, targets = model.model(inputs, mask=mask)[:, :-1].flatten(0, 1), "
            "targets[:, 1:].flatten()"}),
        Wrong("the mask is left out", "passed on", {"model.model(inputs, mask=mask)": "model.model(inputs)"}),
        Wrong("a mean of the mean", "a mean", {
            'reduction="sum")': 'reduction="mean")', "if chunked:": "if False:"}),
    ),
    "cross-entropy": (
        Wrong("the largest is not taken away", "overflow", {
            "logits.sub_(top).exp_()": "logits.exp_()",
            "(top + total.log() - of_target)": "(total.log() - of_target)"}),
        Wrong("rows without a target have a loss", "-100", {"* valid)[:, 0]": "* 1)[:, 0]"}),
        Wrong("rows without a target have a gradient", "-100", {
            "torch.where(valid, 1 / total, 0.0)": "1 / total"}),
        Wrong("the gradient lacks the target", "onehot", {
            ".scatter_add_(1, target, -here.to(logits.dtype))": ""}),
        Wrong("an average", "averaged", {
            "losses = ((top + total.log() - of_target) * valid)[:, 0]":
            "losses = ((top + total.log() - of_target) * valid)[:, 0] / max(1, int(valid.sum()))"}),
    ),
    "fim": (
        Wrong("no end-of-text behind a middle", "end-of-text", {
            "self.tokenizer), self.end]": "self.tokenizer)]"}),
        Wrong("end-of-text within the text", "within the text", {
            "text = piece[:-1] if piece[-1] == self.end else piece": "text = piece"}),
        Wrong("no room for sentinels", "end of the middle is not cut", {
            "- len(result) - 4": "- len(result)"}),
        Wrong("more than the window holds", "size", {"return result[:size]": "return result"}),
        Wrong("one draw for the window", "draw for each piece", {
            "result = []": "result, chosen = [], generator.random() < self.rate",
            "generator.random() < self.rate:": "chosen:"}),
        Wrong("rate and its opposite", "rate 0", {"room > 0 and generator.random() < self.rate":
                                                 "room > 0 and generator.random() >= self.rate"}),
    ),
    "muon": (
        Wrong("not divided by the norm", "divided by its norm", {
            "x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)": "pass"}),
        Wrong("one norm for the batch", "norm of its own", {
            "x.norm(dim=(-2, -1), keepdim=True)": "x.norm()"}),
        Wrong("gram is squared number by number", "product of matrices", {"gram @ gram": "gram * gram"}),
        Wrong("zero divided by zero", "a little more", {" + 1e-7)": ")"}),
        Wrong("b and c are swapped", "in their places", {
            "a, b, c = NEWTON_SCHULZ": "a, c, b = NEWTON_SCHULZ"}),
    ),
    "learning-rate": (
        Wrong("the first step is made with rate 0", "rate 0", {
            "(step + 1) / (warm + 1)": "step / max(1, warm)"}),
        Wrong("the last step has the final rate", "last step", {
            "(step - warm) / (steps - warm)": "(step - warm) / max(1, steps - 1 - warm)"}),
        Wrong("final_lr is a floor", "floor", {"(final + (1 - final) * above)": "max(final, above)"}),
        Wrong("a quarter of a wave", "half a wave", {
            "(1 + math.cos(math.pi * done)) / 2": "math.cos(math.pi * done / 2)"}),
        Wrong("wsd falls at once", "last decay_share", {
            "decay = min(settings.decay_share * steps, steps - warm)": "decay = steps - warm"}),
    ),
    "update": (
        Wrong("a mean of means", "mean of means", {
            "(loss_sum * scaler.scale if scaler else loss_sum).backward()":
            "(loss_sum / rest[0].clamp(min=1) * (scaler.scale if scaler else 1)).backward()",
            "max(count, 1) / (scaler": "len(micro_batches) / (scaler"}),
        Wrong("clipped before the division", "clip once", {
            "    torch._foreach_mul_(gradients, mean)\n    norm = clip(gradients, settings.clip)\n":
            "    norm = clip(gradients, settings.clip)\n    torch._foreach_mul_(gradients, mean)\n"}),
        Wrong("steps though the loss is not finite", "refuse_bad", {
            "refuse_bad(loss, norm, limit, lr)": "pass"}),
        Wrong("gradients are never zeroed", "zeroed", {"optimizer.zero_grad()": "pass"}),
        Wrong("clipped before unscaling", "divided out", {
            "/ (scaler.scale if scaler else 1)": "", "    if not overflow:\n":
            "    if scaler:\n        torch._foreach_mul_(gradients, 1 / scaler.scale)\n"
            "    if not overflow:\n"}),
        Wrong("an overflow is stepped over unsaid", "tells the scaler", {
            "    if scaler:\n        scaler.update(overflow)\n": ""}),
    ),
    # ---- answers and preferences
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
    # ---- reinforcement and distillation
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

RIGHT: dict[str, tuple[str, ...]] = {
    # ---- settings and tokens
    "train-bpe": ("""
        words = Counter()
        for piece, count in count_pieces((pattern, special_tokens), texts).items():
            words[tuple(BYTES[value] for value in piece.encode())] += count
        merges = []
        for _ in range(vocab_size - 256 - len(special_tokens)):
            pairs = Counter()
            for word, count in words.items():
                for pair in zip(word, word[1:]):
                    pairs[pair] += count
            if not pairs:
                raise too_large(vocab_size, merges, special_tokens)
            most = max(pairs.values())
            merges.append(max(pair for pair in pairs if pairs[pair] == most))
            joined = Counter()
            for word, count in words.items():
                joined[tuple(merge(word, merges[-1]))] += count
            words = joined
        return merges""",),
    "merge": ("""
        merged = []
        for symbol in word:
            if merged and not merged[-1][1] and (merged[-1][0], symbol) == pair:
                merged[-1] = (b"".join(pair), True)
            else:
                merged.append((symbol, False))
        return [symbol for symbol, _ in merged]""",),
    "merge-ids": ("""
        while True:
            found = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
            if not found:
                return ids
            rank, i = min(found)
            ids = [*ids[:i], results[rank], *ids[i + 2:]]""",),
    "decode-stream": ("""
        waiting = b""
        for id in ids:
            waiting += self.decode_bytes([int(id)])
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            text = decoder.decode(waiting)
            waiting = decoder.getstate()[0]
            if text:
                yield text
        if waiting:
            yield waiting.decode("utf-8", "replace")""",),
    # ---- the model, and its adapters
    "rope": ("""
        half = x.size(-1) // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1).float()  # rotate_half of transformers
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        return (x.float() * cos + turned * sin).to(x.dtype)""", """
        z = torch.complex(*x.float().chunk(2, dim=-1)) * torch.complex(cos, sin)
        return torch.cat((z.real, z.imag), dim=-1).to(x.dtype)"""),
    "attention": ("""
        B, H, T, D = q.shape
        K = k.size(1)
        k, v = (x[:, torch.arange(H) // (H // K)].float() for x in (k, v))
        scores = torch.einsum("bhtd,bhsd->bhts", q.float(), k)
        if sinks:
            scores[..., :sinks] = torch.einsum("bhtd,bhsd->bhts", q_sinks.float(), k[:, :, :sinks])
        scores = scores * D ** -0.5
        if mask is None:
            return torch.einsum("bhts,bhsd->bhtd", scores.softmax(-1), v).to(q.dtype)
        mask = mask.expand_as(scores)
        scores = torch.where(mask, scores, -1e30)
        weights = torch.where(mask, scores.softmax(-1), 0.0)
        return torch.einsum("bhts,bhsd->bhtd", weights, v).to(q.dtype)""",),
    "mask": ("""
        if self.allowed is not None:
            B, T, S = self.allowed.shape
            return self.allowed[b, q - S + T, k]
        place = k if self.place is None else self.place[b, k]
        ahead = k > q
        seen = ~ahead if self.prefix is None else ~ahead | (place < self.prefix[b])
        if self.window is not None:
            seen = seen & ~(((q - k).abs() >= self.window) & (k >= self.sinks))
        for rule in (None if self.documents is None else self.begins[b, q] == self.begins[b, k],
                     None if self.real is None else self.real[b, k]):
            seen = seen if rule is None else seen & rule
        return seen""",),
    "top-p": ("""
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        enough = probs.cumsum(dim=-1) - probs >= top_p
        return logits.masked_fill(enough.gather(-1, order.argsort(dim=-1)), -math.inf)""",),
    "draw": ("""
        sums = probs.double().cumsum(dim=-1)
        share = 1 - torch.rand(len(probs), 1, dtype=torch.float64, generator=generator)
        return (sums < share * sums[:, -1:]).sum(dim=-1)""",),
    "parameters": ("""
        C, D, L, F = config.dim, config.head_dim, config.n_layers, config.ffn_dim
        heads, kv = config.n_heads * D, config.n_kv_heads * D
        weights = [C * heads, C * kv, C * kv, heads * C]
        if config.attention_bias:
            weights += [heads, kv, kv, C if config.output_bias else 0]
        norms = C + L * (C + C + (D + D if config.qk_norm else 0))
        table = config.vocab_size * C
        return {"embedding": table, "attention": L * sum(weights), "mlp": L * (C * F + C * F + F * C),
                "norms": norms, "head": table * (not config.tie_embeddings)}""",),
    "rmsnorm": ("""
        wide = x.to(torch.float32)
        rms = (wide.pow(2).sum(-1, keepdim=True) / x.size(-1) + self.eps) ** 0.5
        return (wide / rms).type_as(x) * self.weight""",),
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
    # ---- data and conversations
    "union-find": ("""
        while self.parents[i] != i:
            i = self.parents[i]
        while self.parents[j] != j:
            j = self.parents[j]
        self.parents[max(i, j)] = min(i, j)""",),
    "minhash": ("""
        signatures = np.full((len(counts), len(factors)), 2 ** 32 - 1, np.uint32)
        x, end = hashes >> np.uint64(32), 0
        for i, count in enumerate(counts.tolist()):
            some, end = x[end:end + count], end + count
            if count:
                values = some[:, None] * factors.astype(np.uint64) + offsets.astype(np.uint64)
                signatures[i] = (values & np.uint64(2 ** 32 - 1)).min(axis=0)
        return signatures""",),
    "lsh-chance": ("""
        rows = num_hashes // bands
        miss = 1 - np.power(np.asarray(similarity, float), rows)
        return 1 - np.prod([miss] * bands, axis=0)""",),
    "find-pii": ("""
        found = [find for detect in (keys, emails, numbers, ipv6) for find in detect(text, reserved)]
        kept = []
        for find in sorted(found, key=lambda find: (find[0], -find[1])):
            if not kept or find[0] >= kept[-1][1]:
                kept.append(find)
        return kept""",),
    "epoch-order": ("""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,))).permutation(
            self.windows)""",),
    "windows": ("""
        rows = []
        for window in windows:
            start = int(window) * self.stride
            tokens = self.data[start:start + self.seq_len + 1].astype(np.int64).tolist()
            inputs, targets = tokens[:-1], tokens[1:]
            fill = self.seq_len - len(inputs)
            targets += [IGNORE] * fill
            if window:
                targets[:self.seq_len - self.stride] = [IGNORE] * (self.seq_len - self.stride)
            rows.append((inputs + [self.meta["end_of_text"]] * fill, targets))
        return tuple(self._from_numpy(np.array(part, np.int64)) for part in zip(*rows))""",),
    "take-turns": ("""
        counts = [0] * len(weights)
        for i in range(len(weights) - 1, -1, -1):
            left = sum(weights[:i + 1])
            if weights[i]:
                counts[i] = n * weights[i] // left
            n -= counts[i]
        return counts
        """,),
    # ---- pretraining
    "next-token-loss": ("""
        inputs, targets, *mask = batch
        hidden = model.model(inputs, mask=mask[0] if mask else None)
        valid = targets != IGNORE
        losses = -F.log_softmax((hidden @ model.lm_head.weight.T).float(), dim=-1)
        return losses[valid].gather(-1, targets[valid][:, None]).sum(), valid.sum()""",),
    "muon": ("""
        a, b, c = NEWTON_SCHULZ
        x = matrices / (matrices.square().sum(dim=(-2, -1), keepdim=True).sqrt() + 1e-7)
        x = x.to(dtype) if x.dtype == torch.float32 else x
        tall = x.size(-2) > x.size(-1)
        for _ in range(steps):
            gram = x.mT @ x if tall else x @ x.mT
            polynomial = b * gram + c * (gram @ gram)
            x = a * x + (x @ polynomial if tall else polynomial @ x)
        return x.to(matrices.dtype)""",),
    "learning-rate": ("""
        warm, steps, low = settings.warmup_steps, settings.steps, settings.final_lr
        if step < warm or warm >= steps:
            return settings.lr * min(step + 1, warm + 1) / (warm + 1)
        left = (steps - step) / (steps - warm)
        if settings.schedule == "linear":
            height = left
        elif settings.schedule == "cosine":
            height = math.sin(math.pi / 2 * left) ** 2
        elif settings.schedule == "inverse_sqrt":
            end = math.sqrt((warm + 1) / (steps + 1))
            height = (math.sqrt((warm + 1) / (step + 1)) - end) / (1 - end)
        elif settings.schedule == "wsd":
            decay = min(settings.decay_share * steps, steps - warm)
            height = 1.0 if steps - step >= decay else (steps - step) / decay
        else:
            raise ValueError(f"schedule {settings.schedule!r} is none of {', '.join(SCHEDULES)}")
        return settings.lr * (low + height - low * height)""",),
    # ---- answers and preferences
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
    # ---- reinforcement and distillation
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
