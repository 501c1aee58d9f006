"""A reward model: of two answers to a prompt, which one would be chosen (Ouyang et al. 2022, section 3.5).

    python reward_model.py                     # runs/sft + runs/pairs -> runs/reward: the chosen answer of a
                                               # held-out pair in 88 % of the cases, 2 min on one core
    python ppo.py --train_reward_model         # the same command
    python reward_model.py --data pairs.jsonl --centre 0.01 --margin 1 --margin_from scores

It is the language model with another head: one number in place of the logits, read at an answer's last token,
which alone has seen all of it. The number has no scale of its own: what is learnt is that the difference of
two is the log-odds of being chosen (Bradley & Terry 1952),

    p(chosen is preferred) = sigmoid(r_chosen - r_rejected)

The loop, the pairs and all layouts are dpo.py's. Unlike there:
1. there is no reference: the reward is learnt as itself, and not as what a policy gains on another;
2. the last token of an answer is read, not only predicted: a window holds it too;
3. what is left is no writer. Its folder is what transformers calls a model for sequence classification with
   one label, and its config.json says beside that how rewards of held-out answers lie; ppo.py goes by
   (score - reward_mean) / reward_std.
"""
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dpo
from adapters import WEIGHTS, Adapter, add_adapter, open_model
from attention import KVCache, Mask
from batches import IGNORE, SPLITS
from bpe import END_OF_TEXT, Tokenizer
from chat import TEMPLATES
from checkpoint import load_model, read_json, save_model, write_settings
from config import UserError, open_whole, parse, refuse, require, run
from families import SCORES
from lora import adapters_of, base_of, merge_lora, remove_lora, trained_tensors
from model import Decoder, ModelConfig, Transformer
from parallel import Env
from plot import line_chart
from preferences import Pair
from rejection import check_tokenizer
from survive import in_run_folder
from tensor_files import read_tensors
from train import Loop, guarded, micro_batch, steps_of, train
from watch import read_log, write_results
from work import fingerprint

# ------------------------------------------------------------------------------------------------------------
# 1. The model


class RewardModel(nn.Module):
    """A Decoder with a scalar head: `model(ids)` is a number at each token, of the text up to there.

    A reward is the one at the last token (read_at_end); PPO's critic reads the others, too. Parameters have
    Hugging Face's names. mean, std: of the rewards of held-out answers; the head has no bias, so they stand
    beside it.
    """
    task = SCORES  # what Hugging Face's class is called, behind the name of its family

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = replace(config, tie_embeddings=False)  # to a head that is not there
        self.model = Decoder(self.config)
        self.score = nn.Linear(config.dim, 1, bias=False)
        # rewards begin near 0: detail 11 of "The N Implementation Details of RLHF with PPO"
        nn.init.normal_(self.score.weight, std=(config.dim + 1) ** -0.5, generator=generator)
        self.mean, self.std = 0.0, 1.0

    @classmethod
    def of(cls, transformer: Transformer, generator: torch.Generator | None = None) -> "RewardModel":
        """One that begins at a language model: a copy of its decoder, and a new head drawn by `generator`."""
        assert not adapters_of(transformer), "merge its adapters first: merge_lora, remove_lora"
        model, weight = cls(transformer.config, generator), transformer.model.norm.weight
        model.model.load_state_dict(transformer.model.state_dict())
        return model.to(weight.device, weight.dtype)

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Mask | Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """A number for each token, (B, T) float32, for ids (B, T); the others as of Transformer."""
        hidden = self.model(ids, positions, mask, cache)  # (B, T, C)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 makes 2.00 and 2.01 one number
            return F.linear(hidden.to(exact), self.score.weight.to(exact)).squeeze(-1)

    def own_settings(self, tokenizer: Tokenizer | None) -> dict:
        """What config.json says of a reward model alone; checkpoint.write_settings asks for it."""
        return {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},  # so that num_labels is 1
                "pad_token_id": pad_id(tokenizer), "reward_mean": self.mean, "reward_std": self.std}


def pad_id(tokenizer: Tokenizer | None) -> int | None:
    """A special token that ends no reply, to fill up rows with; None where there is none.

    transformers reads the last token that is not this one: were it the end token of replies, each of them
    would be read one token too early.
    """
    if tokenizer is None:
        return None
    special = tokenizer.special_tokens
    ends = {tokenizer.eos_token, *(template.end for template in TEMPLATES.values())}
    able = [token for token, id in special.items() if token not in ends and id not in tokenizer.stop_ids]
    able.sort(key=lambda token: ("pad" not in token.lower(), token not in END_OF_TEXT))
    return special[able[0]] if able else None


def read_at_end(scores: Tensor, real: Tensor) -> Tensor:
    """The score at each row's last real token, (B,), of scores (B, T), whatever stands behind that.

    real: (B, T) bool, False on padding at either side; or (B,) the lengths of rows padded on the right.
    """
    if real.dtype == torch.bool:
        last = torch.where(real, torch.arange(real.size(1), device=real.device), -1).amax(dim=1)
    else:
        last = real - 1
    return scores.gather(1, last[:, None]).squeeze(1)


@torch.no_grad()
def scores_of(model: RewardModel, texts: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
    """The rewards (N,) of texts, each the ids of a prompt and its reply; as the model gives them."""
    device, order = model.score.weight.device, sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.zeros(len(texts), device=device)
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="score", unit="batch", leave=False, disable=None):
        numbers = order[start:start + batch_size]
        lengths = torch.tensor([len(texts[i]) for i in numbers])
        ids = torch.zeros(len(numbers), int(lengths.max()), dtype=torch.long)
        for row, i in enumerate(numbers):
            ids[row, :len(texts[i])] = torch.tensor(texts[i])
        # padding stands behind all that is read, where no token looks
        found[numbers] = read_at_end(model(ids.to(device)), lengths.to(device)).to(found.dtype)
    return found


# ------------------------------------------------------------------------------------------------------------
# 2. The loss


def reward_model_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None,
                      centre: float = 0.0) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) + centre (r_chosen + r_rejected)^2, in nats, (B,).

    margin: by so much the chosen one shall be better, (B,) or one for all (Llama 2, Eq. 2). centre: what
    keeps rewards around 0, which the first term does not care about (Eisenstein et al. 2023, Eq. 2; they take
    0.01). By hand: at the start, where both are 0, the loss is ln 2. As TRL's RewardTrainer, before its mean.
    """
    losses = -F.logsigmoid(chosen - rejected - (0.0 if margin is None else margin))  # Ouyang 2022, Eq. 1
    return losses + centre * (chosen + rejected) ** 2 if centre else losses


class Answers(dpo.Pairs):
    """dpo.Pairs whose windows hold answers with their last tokens: `at` gives (inputs, targets, documents,
    sides, margins).

    targets: other than -100 at the last token of each document alone, where its reward is read. margins (P,).
    """

    def __init__(self, pairs: Sequence[Pair], margins: Sequence[float], *args, **kwargs):
        """pairs: of at most seq_len tokens a side; the others as of Pairs."""
        super().__init__(pairs, *args, **kwargs)
        self.reference = torch.tensor(margins, dtype=torch.float32)  # goes where its pair goes

    def sides(self, i: int) -> tuple:
        """As of Pairs, with one more token, which is nothing but the target of the last one."""
        pair = self.pairs[i]
        texts = (pair.prompt + pair.chosen, pair.prompt + pair.rejected)
        return tuple((np.array([*ids, 0]), np.arange(len(ids) + 1) == len(ids)) for ids in texts)

    @property
    def fingerprint(self) -> str:
        return fingerprint([super().fingerprint, self.reference.tolist()])


def pair_rewards(model: RewardModel, inputs: Tensor, targets: Tensor, documents: Tensor,
                 sides: Tensor) -> Tensor:
    """(P, 2): the rewards of the chosen and the rejected answer of each pair of a batch."""
    rewards = model(inputs, mask=Mask(documents=documents))[targets != IGNORE]  # (R, T) -> (2 P,)
    return rewards[sides.argsort()].view(-1, 2)  # documents lie as they were packed


def ranking_loss(model: RewardModel, batch: tuple[Tensor, ...], centre: float) -> tuple[Tensor, Tensor, dict]:
    """(sum of the pairs' losses, how many they are, figures for the log); batch: of Answers."""
    *packed, margins = batch
    rewards = pair_rewards(model, *packed)  # (P, 2)
    chosen, rejected = rewards.unbind(1)
    losses, pairs = reward_model_loss(chosen, rejected, margins, centre), torch.tensor(len(rewards))
    chosen, rejected = chosen.detach(), rejected.detach()
    values = {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected,
              "accuracy": (chosen > rejected).float()}
    return losses.sum(), pairs, {name: (value.sum(), pairs) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------------
# 3. What has been learnt


def calibration(probabilities: Tensor, came_true: Tensor, bins: int = 10) -> tuple[list[dict], float]:
    """(a row for each bin that is not empty, expected calibration error): do 80 of 100 come true at 0.8?

    probabilities (N,) of 0 to 1, came_true (N,) bool. A row: from, to, how many, their mean probability, the
    share that came true. The error is the mean distance of the last two, weighted by how many (Naeini et al.
    2015; Guo et al. 2017, Eq. 3). By hand: of 0.8, 0.8 and 0.6 the first alone true: 2/3 * 0.3 + 1/3 * 0.6.
    """
    place = (probabilities.double() * bins).long().clamp(max=bins - 1)
    rows = []
    for i in range(bins):
        here = place == i
        if n := int(here.sum()):
            rows.append({"from": i / bins, "to": (i + 1) / bins, "pairs": n,
                         "predicted": probabilities[here].double().mean().item(),
                         "came_true": came_true[here].double().mean().item()})
    error = sum(row["pairs"] * abs(row["predicted"] - row["came_true"]) for row in rows)
    return rows, error / max(len(probabilities), 1)


def histogram(rewards: Tensor, bins: int = 16) -> dict:
    """{"edges" (bins + 1), "chosen", "rejected": how many of (N, 2) rewards lie between two edges}."""
    edges = torch.linspace(rewards.min().item(), rewards.max().item(), bins + 1, dtype=torch.float64)
    width = float(edges[-1] - edges[0]) or 1.0
    place = ((rewards.double() - edges[0]) / width * bins).long().clamp(max=bins - 1)
    chosen, rejected = (torch.bincount(side, minlength=bins).tolist() for side in place.unbind(1))
    return {"edges": edges.tolist(), "chosen": chosen, "rejected": rejected}


def judge(rewards: Tensor, tasks: Sequence[str]) -> dict:
    """What rewards (N, 2) of held-out pairs are worth: accuracy, calibration, where they lie.

    A pair's probability is that of the answer with the higher reward, 0.5 or more; it comes true where that
    one is the chosen one. tasks: what each pair is about, for the accuracy by task.
    """
    rewards = rewards.double()
    right, apart = rewards[:, 0] > rewards[:, 1], (rewards[:, 0] - rewards[:, 1])
    rows, error = calibration(torch.sigmoid(apart.abs()), right)
    by_task = {task: right[[one == task for one in tasks]].double().mean().item()
               for task in sorted(set(tasks))}
    places = {name: {"mean": values.mean().item(), "std": values.std(correction=0).item()} for name, values in
              {"all": rewards, "chosen": rewards[:, 0], "rejected": rewards[:, 1]}.items()}
    return {"pairs": len(rewards), "accuracy": right.double().mean().item(),
            "loss_nats_per_pair": -F.logsigmoid(apart).mean().item(), "expected_calibration_error": error,
            "accuracy_by_task": by_task, "calibration": rows, "rewards": places,
            "histogram": histogram(rewards)}


def in_words(results: dict) -> str:
    """The results as a table, bars for the histogram."""
    n, share = results["pairs"], results["accuracy"]
    lines = [f"held out: {n:,} pairs, the chosen answer's reward is higher in {share:.1%} "
             f"+- {math.sqrt(share * (1 - share) / n):.1%}; loss {results['loss_nats_per_pair']:.4f} nats"]
    if len(results["accuracy_by_task"]) > 1:
        lines.append("by task: " + ", ".join(f"{task} {share:.1%}" for task, share in
                                             results["accuracy_by_task"].items()))
    lines.append(f"{'predicted':<12}{'pairs':>8}{'mean':>10}{'came true':>12}    expected calibration error "
                 f"{results['expected_calibration_error']:.3f}")
    lines += [f"{row['from']:.1f} to {row['to']:.1f}{row['pairs']:>9}{row['predicted']:>10.3f}"
              f"{row['came_true']:>12.3f}" for row in results["calibration"]]
    places, bars = results["rewards"], results["histogram"]
    lines.append(f"{'reward':<12}" + "".join(
        f"{f'''{side}: {places[side]['mean']:+.2f}, std {places[side]['std']:.2f}''':<34}"
        for side in ("chosen", "rejected")).rstrip())
    most = max(*bars["chosen"], *bars["rejected"], 1)
    for edge, *counts in zip(bars["edges"], bars["chosen"], bars["rejected"]):
        drawn = "".join(f"{'#' * round(32 * count / most):<34}" for count in counts)
        lines.append(f"{edge:>+8.2f}    {drawn}".rstrip())
    return "\n".join(lines)


def picture(bars: dict) -> str:
    """The histogram as SVG: outlines of the bars, both sides over each other."""
    def outline(counts: list[int]) -> list[tuple[float, float]]:
        tops = [(x, n) for i, n in enumerate(counts) for x in bars["edges"][i:i + 2]]
        return [(bars["edges"][0], 0), *tops, (bars["edges"][-1], 0)]
    return line_chart("Rewards of held-out answers", "reward", "answers",
                      {side: outline(bars[side]) for side in ("chosen", "rejected")})


# ------------------------------------------------------------------------------------------------------------
# 4. Files


def save_reward_model(model: RewardModel, tokenizer: Tokenizer | None, folder):
    """checkpoint.save_model: a folder for transformers' AutoModelForSequenceClassification, and tokenizers.

    There rows are padded with pad_token_id, which is never the end token, and a reply is read where it ends:
    give no template's line break behind it (apply_chat_template writes one).
    """
    save_model(model, tokenizer, folder)


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def load_reward_model(folder, device="cpu",
                      dtype: torch.dtype = torch.float32) -> tuple[RewardModel, Tokenizer | None]:
    """(model in eval mode, its tokenizer or None) from a folder of ours or of transformers.

    Raises UserError as checkpoint.load_model does, and where it is no reward model, or has several labels.
    """
    content = read_json(Path(folder) / "config.json", {})  # what is missing, load_model tells
    labels = content.get("id2label")
    number = len(labels) if isinstance(labels, dict | list) else content.get("num_labels", 1)
    architectures = content.get("architectures")
    if number != 1 and SCORES in str(architectures):
        raise UserError(f"{folder} sorts texts into {number} labels; a reward model has one")
    model, tokenizer = load_model(folder, device, dtype, kind=RewardModel)
    model.mean, model.std = content.get("reward_mean", 0.0), content.get("reward_std", 1.0)
    if not is_number(model.mean) or not is_number(model.std) or model.std <= 0:
        raise UserError(f"{folder}/config.json is damaged: reward_mean {model.mean!r:.60}, reward_std "
                        f"{model.std!r:.60}")
    return model, tokenizer


# ------------------------------------------------------------------------------------------------------------
# 5. The command


@dataclass
class Settings(Loop, Adapter):
    init_from: str = "runs/sft"  # model folder to begin with, which knows conversations: sft.py makes such
    data: str = "runs/pairs"  # preferences: a file, or a folder with train.jsonl and val.jsonl; the default
                              # folder is made if missing
    out: str = "runs/reward"  # run folder; an unfinished run goes on
    overwrite: bool = False  # delete what is in `out` and start anew
    on_bad_line: Literal["stop", "skip"] = "stop"  # a line that is no pair: stop, or skip and count
    val_share: float = 0.05  # of a single file of pairs, held out
    template: Literal["chatml", "llama3", "qwen", "qwen3"] = "chatml"  # how a conversation is written

    margin: float = 0.0  # by so much the chosen answer's reward shall be higher
    margin_from: Literal["constant", "margin", "scores"] = "constant"  # the same for all pairs; or so many
        # times what a pair has as "margin" (TRL's key), or the difference of its two "scores"
    centre: float = 0.0  # weight of (r_chosen + r_rejected)^2, which keeps rewards around 0; 0.01 is usual

    epochs: float = 2.0  # how often each pair is seen; more, and the rewards know the pairs by heart
    steps: int | None = None  # updates; none: as many as the epochs take
    seq_len: int = 256  # tokens of a window; a longer prompt loses its beginning
    batch_size: int = 32  # pairs a step
    lr: float = 4e-3  # peak learning rate of the matrices in blocks; small, the weights are already good
    adam_lr: float = 4e-4  # of embedding, head and norms
    lora_lr: float = 3e-3  # adapters' peak learning rate, in place of --lr

    free = {"val_share", "on_bad_line"}  # as train.FREE

    def __post_init__(self):
        require(self, epochs=(0.001, 1000), margin=(0, 1e6), centre=(0, 1e6), val_share=(0.001, 0.5))
        self.check_loop()
        self.check_adapter()
        self.check_val_share()
        refuse(self, "is about logits, and a reward model has none", "chunked_loss")
        if self.quantize or not self.lora_merge:
            flag = f"--quantize {self.quantize}" if self.quantize else "--no-lora_merge"
            raise UserError(f"{flag} is not for reward models, whose adapters are merged into a plain base; "
                            f"leave it out")
        if self.margin_from != "constant" and not self.margin:
            raise UserError(f"--margin_from {self.margin_from} is weighted by --margin, which is 0; pass "
                            f"--margin 1")
        if self.tensor_parallel > 1:
            raise UserError(f"--tensor_parallel {self.tensor_parallel} does not know a reward model's head, "
                            f"which has one row; pass --data_parallel fsdp")


def main(argv: Sequence[str] | None = None):
    """argv: default sys.argv[1:]; ppo.py hands on its own, without the word that leads here."""
    guarded(parse(Settings, argv), train_reward_model)


def train_reward_model(settings: Settings, env: Env) -> None:
    """The stage on one process: refuse what is wrong, make what is missing, train, judge."""
    dpo.require_model(settings)
    if settings.data == Settings.data and not Path(settings.data, "made.json").exists():
        dpo.make_only(dpo.Settings(init_from=settings.init_from, template=settings.template), env)
    dpo.require_weights(settings)
    base, tokenizer = open_model(settings.init_from)
    check_tokenizer(tokenizer, settings.init_from, settings.template)
    dpo.check_length(settings, base, settings.init_from)
    # the last token of an answer needs a place too, so a side has no more than seq_len
    pairs = dpo.read_splits(settings, tokenizer, env, settings.seq_len - 1)
    splits = pack(settings, pairs, env)
    settings.steps = steps_of(settings, splits["train"].windows, env)
    model, line = begin(base, settings)
    env.say(line)
    with in_run_folder(settings, env):  # last of all that can refuse: --overwrite deletes here
        loss_fn = functools.partial(ranking_loss, centre=settings.centre)
        train(model, splits["train"], loss_fn, settings, env, tokenizer, splits["val"],
              dpo.identity(settings, splits) | {"base": base_of(model).get("sha256")})
        if settings.lora_rank:
            env.first(lambda: merge(settings, base, tokenizer), patient=True)
        env.first(lambda: report(settings, pairs["val"], env), patient=True)


def begin(base: Transformer, settings: Settings) -> tuple[RewardModel, str]:
    """(the model before its first step, a line that says what of it is trained)."""
    model = RewardModel.of(base, torch.Generator().manual_seed(settings.seed))
    line = add_adapter(model, settings)
    if not settings.lora_rank:
        return model, line
    base_of(model)["merge"] = False  # not as a language model's
    adapters_of(model)["default"] |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}  # peft's words
    model.score.requires_grad_()
    return model, f"{line}; and the head"


def merge(settings: Settings, base: Transformer, tokenizer: Tokenizer):
    """Write the whole model into the run's folder: the base with what the run has learnt beside it."""
    model, _ = begin(base.cpu(), settings)
    tensors = read_tensors(Path(settings.out, "adapter", WEIGHTS))
    with torch.no_grad():
        for name, p in trained_tensors(model).items():
            p.copy_(tensors[name])
    save_reward_model(remove_lora(merge_lora(model)), tokenizer, settings.out)


def pack(settings: Settings, pairs: dict[str, list[tuple[dict, Pair]]], env: Env) -> dict[str, Answers]:
    place, splits = {"rank": env.data_rank, "world_size": env.data_world_size}, {}
    for split in SPLITS:
        records, ids = zip(*pairs[split])
        splits[split] = Answers(ids, [margin_of(settings, record) for record in records],
                                micro_batch(settings, env), settings.seq_len, settings.seed, **place)
        env.say(f"{split}: {splits[split].windows:,} pairs of {splits[split].window_tokens:.0f} tokens")
    return splits


def margin_of(settings: Settings, record: dict) -> float:
    """By how much the chosen answer's reward shall be higher. UserError where the pair does not say."""
    if settings.margin_from == "constant":
        return settings.margin
    found = record.get(settings.margin_from)
    numbers = found if settings.margin_from == "scores" else [found, 0.0]
    if not isinstance(numbers, list) or len(numbers) != 2 or not all(map(is_number, numbers)):
        wanted = 'two numbers, of chosen and rejected' if settings.margin_from == "scores" else "a number"
        raise UserError(f'{record["where"]}: "{settings.margin_from}" is {found!r:.60}, and --margin_from '
                        f'{settings.margin_from} needs {wanted}; pass --margin_from constant')
    return settings.margin * (numbers[0] - numbers[1])


def report(settings: Settings, held_out: Sequence[tuple[dict, Pair]], env: Env):
    """Print and write what the rewards of held-out pairs are worth, and where they lie."""
    out = Path(settings.out)
    model, tokenizer = load_reward_model(out, env.device)
    texts = [pair.prompt + side for _, pair in held_out for side in (pair.chosen, pair.rejected)]
    rewards = scores_of(model, texts).view(-1, 2).cpu()
    results = judge(rewards, [str(record.get("task", "all")) for record, _ in held_out])
    model.mean, model.std = results["rewards"]["all"]["mean"], results["rewards"]["all"]["std"] or 1.0
    write_settings(model, tokenizer, out)
    write_results(out, results)
    with open_whole(out / "rewards.svg", "w") as file:
        file.write(picture(results["histogram"]))
    print(f"{in_words(results)}\n{sum(line['seconds'] for line in read_log(out)):.0f} s in steps\n"
          f"model: {out}; picture: {out / 'rewards.svg'}")


if __name__ == "__main__":
    run(main)
