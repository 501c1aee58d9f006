"""Classic wrong answers to the exercises, and right ones that are written differently.

tests/test_exercise.py (slow) shows that every wrong one is rejected by a hint that names the mistake.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Wrong:
    mistake: str  # what is wrong, in a few words
    says: str  # a word or phrase that the hint must contain, in lower case
    change: dict[str, str] | None = None  # {a piece of the original's source, there exactly once: in its place}
    body: str | None = None  # or a whole other body, dedented, without signature and docstring


WRONG: dict[str, tuple[Wrong, ...]] = {
    # ---- text to tokens
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
    # ---- the model
    "rope-angles": (
        Wrong("the exponent is d / D, half as large", "exponent", {"/ head_dim\n": "/ (2 * head_dim)\n"}),
        Wrong("frequencies grow", "negative", {"1.0 / theta ** exponents": "theta ** exponents"}),
        Wrong("positions in bfloat16", "float32", {"positions[..., None].float()": "positions[..., None].bfloat16()"}),
        Wrong("theta ** -exponents", "last bits", {"1.0 / theta ** exponents": "theta ** -exponents"}),
        Wrong("yarn's temperature is forgotten", "sharpness", {
            "angles.cos() * sharpness, angles.sin() * sharpness": "angles.cos(), angles.sin()"}),
    ),
    "rope": (
        Wrong("neighbours are paired, as in the paper", "interleaved", body="""
            x1, x2 = x.float()[..., ::2], x.float()[..., 1::2]
            return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2).to(x.dtype)"""),
        Wrong("turned backwards", "sign", {"x1 * cos - x2 * sin": "x1 * cos + x2 * sin",
                                           "x2 * cos + x1 * sin": "x2 * cos - x1 * sin"}),
        Wrong("float32 comes out whatever went in", "type", {".to(x.dtype)": ""}),
        Wrong("both halves are the first", "sign", {"x2 * cos + x1 * sin": "x1 * cos + x2 * sin"}),
    ),
    "attention": (
        Wrong("scores are not divided", "sqrt(d)", {"scores = scores / math.sqrt(q.size(-1))": "pass"}),
        Wrong("divided by D", "sqrt(d)", {"math.sqrt(q.size(-1))": "q.size(-1)"}),
        Wrong("softmax over the queries", "over the keys", {"scores.softmax(dim=-1)": "scores.softmax(dim=-2)"}),
        Wrong("head h reads h % K", "h % k", {"x.repeat_interleave(groups, dim=1)": "x.repeat(1, groups, 1, 1)"}),
        Wrong("the mask is upside down", "true", {"scores.masked_fill(~mask, -math.inf)":
                                                  "scores.masked_fill(mask, -math.inf)"}),
        Wrong("a query without keys gives NaN", "nan", {
            "weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)": "pass"}),
        Wrong("sinks are met as all other keys", "q_sinks", {"k[..., sinks:]": "k", "if sinks:": "if False:"}),
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
        Wrong("only the first 64 are looked at", "64", {"for count in (64, 1024, V):": "for count in (64,):"}),
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
        Wrong("a share of one", "add up", {"share * sums[:, -1:])": "share * torch.ones_like(sums[:, -1:]))"}),
    ),
    "verify": (
        Wrong("the rest comes from p", "max(p - q, 0)", {"(p[number] - q[number]).clamp(min=0)": "p[number]"}),
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
            return self.weight * (x32 / (x32.square().mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)"""),
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
        Wrong("values are turned too", "values", {"rotate(k, *rope)\n": "rotate(k, *rope)\n        v = rotate(v, *rope)\n"}),
        Wrong("normed after rope", "come before rope", body="""
            B, T, _ = x.shape
            q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                       for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = self.q_norm(rotate(q, *rope)), self.k_norm(rotate(k, *rope))
            if cache is not None:
                k, v = cache.append(k, v)
            return self.o_proj(attend(q, k, v, prepared).transpose(1, 2).reshape(B, T, -1))"""),
    ),
    # ---- files
    "safetensors": (
        Wrong("the length is big-endian", "little-endian", {'"little"': '"big"'}),
        Wrong("the header is not filled up", "multiple of 8", {'text += b" " * (-len(text) % 8)': "pass"}),
        Wrong("offsets are begin and size", "[begin, end]", {"[position, end]}": "[position, end - position]}"}),
        Wrong("in the order they came", "write_order", {"names = write_order(tensors)": "names = list(tensors)"}),
        Wrong("metadata stands beside the tensors", "__metadata__", {
            '{"__metadata__": dict(metadata)}': "dict(metadata)"}),
        Wrong("all values at once", "before their turn", {
            "names = write_order(tensors)":
            "tensors = {name: raw_bytes(x) and x for name, x in tensors.items()}; names = write_order(tensors)"}),
    ),
    # ---- clean text
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
            "np.add(values, offset, out=values)": "np.add(values, offset, out=values); values &= np.uint32(127)"}),
        Wrong("functions that only add", "independent", {"np.multiply(x, factor, out=values)": "values[:] = x"}),
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
            "(start, -end, kind) for detect": "(start, end, kind) for detect", "(start, -end, kind))": "(start, end, kind))",
            "reached = -end": "reached = end"}),
        Wrong("not sorted", "sorted", {"found = sorted((": "found = list(("}),
        Wrong("addresses of the sixth version are forgotten", "ipv6", {", numbers, ipv6)": ", numbers)"}),
    ),
    # ---- batches and conversations
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
    "render": (
        Wrong("the prompt is learnt too", "prompt is learnt", {"[learnt] * len(new)": "[True] * len(new)"}),
        Wrong("the mask is shifted", "shifted", {"return ids, mask": "return ids, [*mask[1:], False]"}),
        Wrong("no header for the reply to come", "add_generation_prompt", {
            "groupby(pieces(messages, add_generation_prompt, template)": "groupby(pieces(messages, False, template)"}),
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
    # ---- training
    "next-token-loss": (
        Wrong("a mean", "a mean", {"return loss_sum, valid.sum()": "return loss_sum / valid.sum(), valid.sum()"}),
        Wrong("all targets are counted", "-100 counted", {
            "return loss_sum, valid.sum()": "return loss_sum, valid.new_tensor(valid.numel(), dtype=torch.long)"}),
        Wrong("shifted once more", "shifted again", {
            "hidden, targets = model.model(inputs, mask=mask).flatten(0, 1), targets.flatten()":
            "hidden, targets = model.model(inputs, mask=mask)[:, :-1].flatten(0, 1), targets[:, 1:].flatten()"}),
        Wrong("the mask is left out", "passed on", {"model.model(inputs, mask=mask)": "model.model(inputs)"}),
        Wrong("a mean of the mean", "a mean", {'reduction="sum")': 'reduction="mean")', "if chunked:": "if False:"}),
    ),
    "cross-entropy": (
        Wrong("the largest is not taken away", "overflow", {
            "logits.sub_(top).exp_()": "logits.exp_()", "(top + total.log() - of_target)": "(total.log() - of_target)"}),
        Wrong("rows without a target have a loss", "-100", {"* valid)[:, 0]": "* 1)[:, 0]"}),
        Wrong("rows without a target have a gradient", "-100", {
            "torch.where(valid, 1 / total, 0.0)": "1 / total"}),
        Wrong("the gradient lacks the target", "onehot", {".scatter_add_(1, target, -here.to(logits.dtype))": ""}),
        Wrong("an average", "averaged", {
            "losses = ((top + total.log() - of_target) * valid)[:, 0]":
            "losses = ((top + total.log() - of_target) * valid)[:, 0] / max(1, int(valid.sum()))"}),
    ),
    "fim": (
        Wrong("no end-of-text behind a middle", "end-of-text", {
            "self.tokenizer), self.end]": "self.tokenizer)]"}),
        Wrong("end-of-text within the text", "within the text", {
            "text = piece[:-1] if piece[-1] == self.end else piece": "text = piece"}),
        Wrong("no room for sentinels", "end of the middle is not cut", {"- len(result) - 4": "- len(result)"}),
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
        Wrong("one norm for the batch", "norm of its own", {"x.norm(dim=(-2, -1), keepdim=True)": "x.norm()"}),
        Wrong("gram is squared number by number", "product of matrices", {"gram @ gram": "gram * gram"}),
        Wrong("zero divided by zero", "a little more", {" + 1e-7)": ")"}),
        Wrong("b and c are swapped", "in their places", {"a, b, c = NEWTON_SCHULZ": "a, c, b = NEWTON_SCHULZ"}),
    ),
    "learning-rate": (
        Wrong("the first step is made with rate 0", "rate 0", {"(step + 1) / (warm + 1)": "step / max(1, warm)"}),
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
        Wrong("steps though the loss is not finite", "refuse_bad", {"refuse_bad(loss, norm, limit, lr)": "pass"}),
        Wrong("gradients are never zeroed", "zeroed", {"optimizer.zero_grad()": "pass"}),
        Wrong("clipped before unscaling", "divided out", {
            "/ (scaler.scale if scaler else 1)": "", "    if not overflow:\n":
            "    if scaler:\n        torch._foreach_mul_(gradients, 1 / scaler.scale)\n    if not overflow:\n"}),
        Wrong("an overflow is stepped over unsaid", "tells the scaler", {
            "    if scaler:\n        scaler.update(overflow)\n": ""}),
    ),
}
RIGHT: dict[str, tuple[str, ...]] = {
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
    "rope": ("""
        half = x.size(-1) // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1).float()  # rotate_half of transformers
        return (x.float() * torch.cat((cos, cos), -1) + turned * torch.cat((sin, sin), -1)).to(x.dtype)""", """
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
}
