"""Distillation: a small student learns from what a large teacher says about each next token.

    python distill.py                                    # runs/base teaches plain text to runs/student
    python distill.py --teacher runs/sft --init_from runs/student --data runs/chat --out runs/student-sft
    python distill.py --kd_weight 0 --out runs/alone     # the same student, the same steps, no teacher
    python distill.py --compare runs/student runs/alone  # held-out loss side by side; of answers, with --data

The loop is pretraining's (train.py), and so are windows, layouts and states. Unlike pretraining:
1. the loss is a divergence from the teacher's distribution, mixed with the cross-entropy (divergence.py);
2. the teacher is asked live, or once, and its k likeliest tokens are stored (teachers.py);
3. the student begins at random, as every other block of its teacher, pruned in width (students.py), or as any
   model that has the teacher's tokenizer;
4. with --on_policy some lessons are about what the student itself answers (GKD, Agarwal et al. 2023,
   https://arxiv.org/abs/2306.13649), as that is what it will have to go on from.

Without a look into the teacher, from its answers alone: answers.py, then sft.py.
"""
import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import rejection
import sft
from adapters import Adapter, add_adapter, open_model
from attention import Mask
from batches import IGNORE, Batches, Wrapped
from bpe import Tokenizer
from chat import TEMPLATES
from config import UserError, parse, refuse, require, run
from divergence import Divergence, Kind, TopK, kd_loss, linear_kd_loss  # noqa: F401: kd_loss for others
from dpo import check_length, frozen
from dpo import divergence as kl_from
from lora import base_of, effective_weight
from matching import add_projection, attention_match, hidden_match, watched
from model import Transformer
from objectives import next_token_loss
from parallel import Env, take_from_first
from quantize import load_base
from rejection import check_tokenizer, weights_of
from rollouts import drawn_now, lay_out, whole_copy
from students import check_smaller, describe_student, layers_student, random_student, width_student
from survive import check_newest, in_run_folder
from teachers import Stored, asked, check_same_tokens, open_teacher, store
from train import Loop, bigram_start, evaluate, guarded, identity_of, micro_batch, steps_of, train
from watch import spent, write_results
from work import fingerprint

# ------------------------------------------------------------------------------------------------------------
# 1. A lesson, and its loss


@dataclass
class Lesson:
    """A micro-batch: inputs and targets (B, T), and what else a loss needs to know of it."""
    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None  # as of sft.Packed; None: plain text
    top: TopK | None = None  # what the teacher said about the targets; None: it is asked now
    own: bool = False  # the targets are the student's own words: no truth to learn, only the teacher's view

    def to(self, device, non_blocking: bool = False) -> "Lesson":
        def moved(x):
            return None if x is None else x.to(device, non_blocking=non_blocking)
        return Lesson(*map(moved, (self.inputs, self.targets, self.documents, self.top)), self.own)


def lesson_loss(model: Transformer, batch: tuple[Lesson], teacher: Transformer | None,
                settings) -> tuple[Tensor, Tensor, dict]:
    """(sum in nats, how many targets, figures): see divergence.kd_loss; plus match_weight times the match."""
    lesson, = batch
    mask = None if lesson.documents is None else Mask(documents=lesson.documents)
    valid, kd_weight = lesson.targets != IGNORE, 1.0 if lesson.own else settings.kd_weight
    by_attention = settings.match == "attention"
    with watched(model if by_attention else None, mask) as ours, \
            watched(teacher if by_attention else None, mask) as theirs:
        hidden = model.model(lesson.inputs, mask=mask)[valid]  # (B, T, C) -> (N, C)
        source = lesson.top
        if source is None and teacher is not None:
            source = asked(teacher, lesson.inputs, mask, valid)
    loss, kd, ce = linear_kd_loss(hidden, effective_weight(model.lm_head), source, lesson.targets[valid],
                                  settings.divergence, kd_weight)
    n = valid.sum()
    figures = {"kd_nats_per_token": (kd, n * bool(kd_weight)),
               "ce_nats_per_token": (ce, n * (kd_weight < 1))}
    if settings.match:
        match = attention_match(ours[0], theirs[0], valid) if by_attention else \
            hidden_match(model.beside["projection"], hidden, source.hidden)
        loss = loss + settings.match_weight * match
        figures["match_per_token"] = match.detach(), n
    return loss, n, figures


def held_out_loss(model: Transformer, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The plain loss, nats a token, whatever is learnt from: what students and others are compared by."""
    return sft.reply_loss(model, batch) if len(batch) == 3 else next_token_loss(model, batch)


# ------------------------------------------------------------------------------------------------------------
# 2. Lessons by step


class Lessons(Wrapped):
    """Batches as lessons; with `stored`, together with what the teacher said about them.

    places: so many of the endless row have stored answers. A run that was rolled back passes over windows,
    and needs more of them in the end: it sees the first ones again.
    """

    def __init__(self, batches: Batches, stored: Stored | None = None, places: int = 0):
        super().__init__(batches)
        self.stored, self.places = stored, places

    def at(self, step: int) -> tuple[Lesson]:
        numbers = self.batches.numbers(step)
        windows = self.batches.at_places([i % self.places for i in numbers] if self.places else numbers)
        lesson = Lesson(*self.batches.stack(windows))
        lesson.top = self.stored.of(windows) if self.stored else None
        return lesson,


class OnPolicy(Wrapped):
    """Lessons, a share of which have the student's own replies in place of the author's.

    Agarwal et al. 2023, algorithm 1, whose lambda is `share`. A step is a micro-batch here. Which steps these
    are, and what is drawn, are functions of (seed, step, rank) and of the weights. The prompts are those of
    the windows that the step would show; a conversation's last reply is drawn anew.
    """

    def __init__(self, lessons: Lessons, share: float, model: Transformer, sampler: Transformer,
                 tokenizer: Tokenizer, stop_id: int, max_new_tokens: int, env: Env):
        super().__init__(lessons)
        self.share, self.model, self.sampler, self.env = share, model, sampler, env
        self.tokenizer, self.stop_id, self.max_new_tokens = tokenizer, stop_id, max_new_tokens

    def at(self, step: int) -> tuple[Lesson]:
        seed = self.batches.seed
        if np.random.default_rng([seed, step, 2]).random() >= self.share:  # the same on every process
            return self.batches.at(step)
        prompts = self.prompts(self.batches.at_places(self.batches.numbers(step)))
        if not prompts:
            return self.batches.at(step)
        generator = torch.Generator(self.env.device).manual_seed(
            ((seed * 1_000_003 + step) * 1_009 + self.env.data_rank) % 2 ** 63)
        rollout = drawn_now(self.model, self.sampler, self.env, prompts, self.tokenizer, self.stop_id, 1,
                            self.max_new_tokens, generator=generator, at_once=64)
        inputs, targets, documents, *_ = lay_out(rollout, range(len(rollout)), self.batches.seq_len)
        return Lesson(inputs, targets, documents, own=True),

    def prompts(self, windows: Iterable[int]) -> list[list[int]]:
        """The prompts of the conversations in these windows that leave room for a reply."""
        found = []
        for window in windows:
            for ids, learnt in (self.batches.examples[i] for i in self.batches.packs[window]):
                prompt = last_prompt(ids, learnt)
                if len(prompt) + self.max_new_tokens <= self.batches.seq_len + 1:
                    found.append(prompt)
        return found


def last_prompt(ids: np.ndarray, learnt: np.ndarray) -> list[int]:
    """All of a conversation before its last run of learnt tokens."""
    end = int(np.flatnonzero(learnt)[-1])
    before = np.flatnonzero(~learnt[:end])
    return ids[:int(before[-1]) + 1].tolist()


# ------------------------------------------------------------------------------------------------------------
# 3. The command


BY_DATA = {  # what the settings without a value are, by the kind of data
    "text": dict(seq_len=128, steps=300, lr=0.04, adam_lr=8e-3),
    "conversations": dict(seq_len=256, steps=None, lr=0.015, adam_lr=3e-3)}


@dataclass
class Settings(Loop, Adapter):
    teacher: str = "runs/base"  # folder of the teacher, ours or any of the Llama or Qwen kind
    data: str = "runs/data"  # what is learnt from: token shards (data.py), or conversations, as of sft.py
    out: str = "runs/student"  # run folder; an unfinished run goes on
    overwrite: bool = False  # delete what is in `out` and start anew
    compare: tuple[str, ...] | None = None  # train nothing; measure these model folders on what is held out

    init_from: str | None = None  # folder of the student; none: it is made, as the next says
    student: Literal["random", "layers", "width"] = "random"  # with random weights; as every other block of
        # the teacher; as the teacher, pruned in width
    dim: int | None = None  # the student's width; none: half of the teacher's (layers: all)
    n_layers: int | None = None  # its blocks; none: the teacher's (layers: half)
    n_heads: int | None = None  # its query heads; none: the teacher's, half as wide (width: half of them)
    ffn_dim: int | None = None  # inside its MLP; none: 8/3 of dim in steps of 64 (width: half)
    tie_embeddings: bool = True  # random: one matrix for embedding and head, which are most of a small model

    kind: Kind = "forward"  # the divergence: see divergence.py
    beta: float = 0.5  # jsd: the teacher's share of the mixture; 0 is forward, 1 reverse
    skew: float = 0.1  # skew_…: the share of the other in the mixture
    temperature: float = 1.0  # of both distributions
    kd_weight: float = 1.0  # of the divergence; the rest is the cross-entropy's; 0: no teacher at all
    top_k: int = 0  # store the teacher's so many likeliest tokens, and ask it no more; 0: ask it live
    stored: str | None = None  # where these lie; none: beside the data
    match: Literal["hidden", "attention"] | None = None  # also match the last hidden states, through a
        # learnt projection, or the last block's attention
    match_weight: float = 1.0  # of that
    on_policy: float = 0.0  # share of the steps that are about the student's own replies (GKD's lambda)
    max_new_tokens: int = 100  # of such a reply, and of sampled answers

    on_bad_line: Literal["stop", "skip"] = "stop"  # a line that is no conversation: stop, or skip and count
    val_share: float = 0.05  # of a single file of conversations, held out
    template: Literal["chatml", "llama3", "qwen", "qwen3"] = "chatml"  # how a conversation is written
    rope_scaling: Literal["linear", "ntk", "dynamic", "yarn", "llama3"] | None = "yarn"  # the rule by which a
        # student reads further than its max_seq_len, where seq_len is longer; none: it shall not
    epochs: float = 1.75  # conversations: how often each is seen
    steps: int | None = None  # updates; none: 300 of plain text, of conversations as many as epochs take
    seq_len: int | None = None  # tokens a window; none: 128 of plain text, 256 of conversations
    lr: float | None = None  # peak learning rate of the matrices in blocks; none: 0.04, 0.015
    adam_lr: float | None = None  # of embedding, head and norms; none: 8e-3, 3e-3
    bigram_steps: int | None = None  # plain text: steps that first fit a random student to the counted
                                     # bigrams; none: 50
    eval_stride: int | None = None  # plain text: tokens between evaluated windows; none: half of seq_len
    questions: int = 200  # held-out questions to answer in the end; 0: none
    repetition_penalty: float = 1.15  # of the greedy answers, as in sft.py
    samples_of_questions: int = 4  # answers at temperature 1 to each, beside the greedy one

    free = {"compare", "val_share", "on_bad_line", "questions", "repetition_penalty", "samples_of_questions",
            "stored", "teacher"}  # as train.FREE

    def __post_init__(self):
        for name, value in BY_DATA[self.kind_of_data].items():
            if getattr(self, name) is None and not (name == "lr" and self.lora_rank):  # then it is lora_lr
                setattr(self, name, value)
        unknown = self.steps is None  # conversations: until these are read
        self.steps = 1 if unknown else self.steps
        self.check_loop()
        self.steps = None if unknown else self.steps
        if self.eval_stride is None and self.kind_of_data == "text":
            self.eval_stride = max(1, self.seq_len // 2)
        require(self, kd_weight=(0, 1), top_k=(0, None), match_weight=(0, 1e6), on_policy=(0, 1),
                max_new_tokens=(1, None), val_share=(0.001, 0.5), epochs=(0.001, 1000), questions=(0, None),
                repetition_penalty=(1, 1000), samples_of_questions=(0, None), bigram_steps=(0, None),
                eval_stride=(1, self.seq_len), dim=(2, None), n_layers=(1, None), n_heads=(1, None),
                ffn_dim=(1, None))
        self.divergence.check()
        self.check_adapter()
        self.check_student()
        self.check_useless()

    @property
    def kind_of_data(self) -> str:
        """Token shards have a meta.json; all else is conversations."""
        return "text" if (Path(self.data) / "meta.json").exists() or self.data == "runs/data" else \
            "conversations"

    @property
    def divergence(self) -> Divergence:
        return Divergence(self.kind, self.beta, self.skew, self.temperature)

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0 or self.match is not None or self.on_policy > 0

    def check_student(self):
        """Raise UserError where what a student is to be like is asked of one that is there already."""
        if self.init_from:
            refuse(self, f"is for a student that is made, and --init_from {self.init_from} is one",
                   "dim", "n_layers", "n_heads", "ffn_dim", "student", "tie_embeddings")
        elif self.lora_rank:
            raise UserError(f"--lora_rank {self.lora_rank}: adapters need a student that knows something; "
                            f"name one with --init_from, or pass --lora_rank 0")
        if self.student != "random":
            refuse(self, f"is for --student random; {self.student} is tied where its teacher is",
                   "tie_embeddings")
        if self.student == "layers":
            refuse(self, "is the teacher's, with --student layers", "dim", "n_heads", "ffn_dim")
        unknowing = self.student == "random" and not self.init_from and self.kind_of_data == "text"
        if self.bigram_steps and not unknowing:
            raise UserError(f"--bigram_steps {self.bigram_steps} is for a student with random weights that "
                            f"learns plain text; leave it out")
        if self.bigram_steps is None:
            self.bigram_steps = 50 if unknowing else 0

    def check_useless(self):
        """Raise UserError where things are asked for that do not go together, or would do nothing."""
        if self.compare == ():
            raise UserError("--compare names no model folder; name one, or several to compare")
        if self.kind_of_data == "text":
            refuse(self, f"is for conversations, and {self.data} is plain text", "epochs")
        else:
            refuse(self, f"is for plain text, and {self.data} holds conversations", "eval_stride")
        self.check_val_share()
        if self.tensor_parallel > 1:
            raise UserError(f"--tensor_parallel {self.tensor_parallel}: distributions are compared whole; "
                            f"pass --data_parallel fsdp")
        if self.on_policy and self.kind_of_data == "text":
            raise UserError(f"--on_policy {self.on_policy} is about replies, and {self.data} is plain text; "
                            f"name conversations with --data")
        if self.on_policy and self.max_new_tokens >= self.seq_len:
            raise UserError(f"--on_policy {self.on_policy}: --max_new_tokens {self.max_new_tokens} leave a "
                            f"prompt no room in seq_len {self.seq_len}; pass fewer, or a longer --seq_len")
        for name, value in (("on_policy", self.on_policy), ("match", self.match)):
            if value and self.top_k:
                raise UserError(f"--{name} {value} asks the teacher live, and --top_k {self.top_k} does not; "
                                f"leave one of them out")
        if self.stored and not self.top_k:
            raise UserError(f"--stored {self.stored} is of use with --top_k 64, say")
        if not self.needs_teacher:
            refuse(self, "does nothing with --kd_weight 0: there is no teacher", "kind", "beta", "skew",
                   "temperature", "top_k")
        for name, used in (("beta", self.kind == "jsd"), ("skew", self.kind.startswith("skew")),
                           ("match_weight", self.match)):
            if not used:
                refuse(self, f"does nothing with --kind {self.kind} and --match {self.match or 'none'}", name)
        refuse(self, "is not possible here: logits of all tokens are never held", "chunked_loss")
        if self.match == "attention" and (self.compile or self.data_parallel != "ddp"):
            raise UserError("--match attention looks into a block while it runs; leave out --compile and "
                            "--data_parallel")
        if self.match == "attention" and self.compile is None:
            self.compile = False


def main():
    settings = parse(Settings)
    guarded(settings, compare if settings.compare else distil)


def distil(settings: Settings, env: Env) -> None:
    """The stage on one process: refuse what is wrong, make what is missing, train, compare."""
    teacher, teachers_tokenizer = open_teacher(settings.teacher)
    model, tokenizer, new = make_student(settings, teacher, teachers_tokenizer, env)
    check_same_tokens(teachers_tokenizer, tokenizer, settings.teacher)
    check_length(settings, teacher, settings.teacher)
    check_length(settings, model, "the student")
    rows, known = model.config.vocab_size, teacher.config.vocab_size
    if settings.on_policy and rows > known:
        raise UserError(f"--on_policy {settings.on_policy}: the student may draw one of {rows:,} ids, and "
                        f"the teacher {settings.teacher} reads {known:,} alone; leave it out")
    open_data = open_text if settings.kind_of_data == "text" else open_conversations
    batches, val, questions = open_data(settings, settings.teacher, tokenizer, env)
    settings.steps = steps_of(settings, batches.windows, env)
    env.say(add_adapter(model, settings, new))
    if settings.match == "hidden":  # last: no adapter on it, and it is learnt whatever is frozen
        add_projection(model, teacher.config.dim, settings.seed)
    with in_run_folder(settings, env):  # last of all that can refuse: --overwrite deletes here
        learn(settings, model, tokenizer, teacher, batches, val, questions, env)


def learn(settings: Settings, model: Transformer, tokenizer: Tokenizer, teacher: Transformer, batches,
          val, questions: list[dict], env: Env) -> None:
    """Store the teacher's answers, or have it stand by; train; print what has been learnt."""
    needed = settings.needs_teacher or not settings.init_from  # of a teacher a student is made, too
    identity = {"teacher_weights": weights_of(settings.teacher) if needed else None,
                "content": content_of(batches), "base": base_of(model).get("sha256"),
                "student_weights": weights_of(settings.init_from) if settings.init_from else None}
    check_newest(Path(settings.out), identity_of(settings) | identity)  # before long work for nothing
    if settings.bigram_steps:  # where a run goes on, too: "before" is what it began with
        env.first(lambda: bigram_start(model, batches.data, settings.bigram_steps), patient=True)
        take_from_first(model, env)
    model.to(env.device)
    figures, lessons, live = {}, Lessons(batches), None
    if settings.needs_teacher:
        figures["teacher"] = held_out(teacher.to(env.device), settings.teacher, val, env)
    figures["before"] = held_out(model, "the student", val, env)
    if settings.top_k:
        lessons = Lessons(batches, stored_answers(settings, teacher, tokenizer, batches, identity, env),
                          settings.steps * settings.batch_size)
        teacher.to("cpu")  # its work is done
    elif settings.needs_teacher:
        live = frozen(teacher, env)
    if settings.on_policy:
        stop_id = tokenizer.special_tokens[TEMPLATES[settings.template].end]
        lessons = OnPolicy(lessons, settings.on_policy, model, whole_copy(model, env), tokenizer, stop_id,
                           settings.max_new_tokens, env)
    loss_fn = functools.partial(lesson_loss, teacher=live, settings=settings)
    last = train(model, lessons, loss_fn, settings, env, tokenizer, val, identity, held_out_loss)
    env.first(lambda: report(settings, figures, last, questions, env), patient=True)


def make_student(settings: Settings, teacher: Transformer, tokenizer: Tokenizer,
                 env: Env) -> tuple[Transformer, Tokenizer, list[int]]:
    """The student, its tokenizer, and the tokens that are new to it: read, or made of the teacher."""
    new: list[int] = []
    if settings.init_from:
        if not Path(settings.init_from).is_dir():
            raise UserError(f"there is no folder {settings.init_from} with a student; python distill.py "
                            f"makes runs/student, or leave --init_from out")
        model, own = load_base(settings.init_from, settings.quantize)
        if own is None:
            raise UserError(f"{settings.init_from} has no tokenizer.json that can be read; copy it there")
        if settings.kind_of_data == "conversations":
            known = own.special_tokens
            model, own = sft.with_template(model, own, TEMPLATES[settings.template], env)
            new = sorted(id for token, id in own.special_tokens.items() if token not in known)
            model.config = model.model.config = sft.reading_further(model.config, settings, env)
    else:
        model, own = made_student(settings, teacher, tokenizer), tokenizer
    env.say(describe_student(model, teacher))
    warning = check_smaller(model, teacher)
    if warning:
        env.say(warning)
    return model, own, new


def made_student(settings: Settings, teacher: Transformer, tokenizer: Tokenizer) -> Transformer:
    """A student of the size that the settings ask for, or half of the teacher's."""
    was = teacher.config
    if settings.student == "layers":
        return layers_student(teacher, settings.n_layers or max(1, was.n_layers // 2))
    dim, n_layers = settings.dim or was.dim // 2, settings.n_layers or was.n_layers
    if settings.student == "random":
        n_heads = settings.n_heads or was.n_heads
        n_kv_heads = max(1, n_heads * was.n_kv_heads // was.n_heads)
        was = replace(was, vocab_size=min(was.vocab_size, tokenizer.vocab_size))  # no rows to spare
        return random_student(was, settings.seed, dim, n_layers, n_heads, n_kv_heads, settings.ffn_dim,
                              settings.tie_embeddings)
    ids = calibration(settings)
    n_heads = settings.n_heads or max(was.n_heads // was.n_kv_heads, was.n_heads // 2)
    return width_student(teacher, ids, dim, n_heads, settings.ffn_dim or was.ffn_dim // 2, n_layers)


def calibration(settings: Settings, windows: int = 64) -> Tensor:
    """(B, T) ids of training text, by which width pruning sees what is of use."""
    if settings.kind_of_data != "text":
        raise UserError(f"--student width looks at plain text, and {settings.data} is none; begin with "
                        f"--data runs/data, then pass its --out as --init_from")
    return Batches(settings.data, "train", windows, settings.seq_len, settings.seed, verify=False).at(0)[0]


# ---- data --------------------------------------------------------------------------------------------------


def open_text(settings: Settings, folder: str, tokenizer: Tokenizer,
              env: Env) -> tuple[Batches, Batches, list]:
    """(batches, held-out batches, no questions) of token shards; tokenizer: that of the model in `folder`."""
    place = {"rank": env.data_rank, "world_size": env.data_world_size, "verify": env.rank == 0}
    size = (micro_batch(settings, env), settings.seq_len)
    batches = Batches(settings.data, "train", *size, settings.seed, **place)
    if batches.meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"the shards in {settings.data} were made with another tokenizer than that of "
                        f"{folder}; make them anew: python data.py --tokenizer {folder} "
                        f"--out {settings.data} --overwrite, with the --input of then")
    return batches, Batches(settings.data, "val", *size, stride=settings.eval_stride, **place), []


def open_conversations(settings: Settings, folder: str, tokenizer: Tokenizer, env: Env) -> tuple:
    """(batches, held-out batches, questions to answer) of conversations, as sft.py has them."""
    check_tokenizer(tokenizer, folder, settings.template)
    kept, examples = {}, {}
    for split, conversations in sft.read_splits(settings, env).items():
        kept[split], examples[split] = sft.examples_of(conversations, tokenizer, TEMPLATES[settings.template],
                                                       settings.seq_len, say=env.say)
    packed = sft.pack_splits(settings, examples, env)
    return packed["train"], packed["val"], sft.spread(kept["val"], settings.questions)


def content_of(batches) -> str:
    """Stands for the tokens that are learnt from."""
    if hasattr(batches, "meta"):
        return batches.meta["train"]["sha256"]
    return fingerprint([[ids.tolist(), mask.tolist()] for ids, mask in batches.examples])


def stored_answers(settings: Settings, teacher: Transformer, tokenizer: Tokenizer, batches: Batches,
                   identity: dict, env: Env) -> Stored:
    """The folder of the teacher's answers about all windows of this run; made if missing."""
    places = min(settings.steps * settings.batch_size, batches.windows)  # an epoch has all windows
    windows = np.unique(batches.at_places(range(places)))
    known = {"teacher": identity["teacher_weights"], "data": identity["content"], "k": settings.top_k,
             "temperature": settings.temperature, "seq_len": settings.seq_len, "precision": env.precision}
    name = f"teacher-{fingerprint(known, windows.tolist())[:8]}"
    folder = Path(settings.stored or f"{Path(settings.data)}.{name}")  # not in it: data.py --overwrite would
                                                                       # refuse the folder
    if not env.any((folder / "meta.json").exists(), patient=True):
        store(teacher, batches, windows, settings.top_k, settings.temperature, folder, known, env,
              tokenizer.vocab_size)
    else:
        env.say(f"the teacher's answers: {folder}")
    env.first(lambda: Stored(folder, known, windows), patient=True)  # what is damaged is told once
    return Stored(folder, known, windows, verify=False)


# ------------------------------------------------------------------------------------------------------------
# 4. What has been learnt


def held_out(model: Transformer, name: str, val: Batches, env: Env) -> dict:
    """evaluate's figures of the held-out text; UserError, with the name, where the model is broken."""
    try:
        return evaluate(model, val, held_out_loss, env)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def report(settings: Settings, figures: dict, last: dict, questions: list[dict], env: Env):
    """Print the held-out loss of teacher and student, before and after, and what the student answers."""
    figures["after"] = {"loss": last["val_loss_nats_per_token"],
                        "bits_per_byte": last.get("val_bits_per_byte")}
    for name, found in figures.items():
        in_bits = found.get("bits_per_byte")
        print(f"{name:<12}{found['loss']:>9.4f} nats a token" +
              (f"{in_bits:>9.4f} bits per byte" if in_bits else " of replies"))
    results = {"held out": figures}
    if questions:
        results["answers"], replies = answer(settings, settings.out, questions, env)
        print_table({settings.out: results["answers"]})
        results["samples"] = [
            {"prompt": asked["messages"][-2]["content"], "after": reply,
             "author": asked["messages"][-1]["content"]}
            for asked, (reply, _) in sft.spread(list(zip(questions, replies)), 5)]
    write_results(settings.out, results)
    print(f"{'-' * 80}\n{spent(Path(settings.out), last)}\nmodel: {settings.out}")


def answer(settings: Settings, folder: str, questions: list[dict],
           env: Env) -> tuple[dict[str, float], list[tuple[str, bool]]]:
    """(what a model's answers to held-out questions are like, each figure a mean; its greedy answers).

    from the teacher: KL(student | teacher) in nats an answer, from the student's samples; none where
    --teacher has another tokenizer, or fewer rows to spare.
    """
    model, tokenizer = open_model(folder, env.device)
    found = rejection.measure(model, tokenizer, questions, settings)
    means = {name: float(np.mean(values)) for name, values in rejection.qualities(questions, found).items()}
    if found["sampled"]:
        samples = [sample for some in found["sampled"] for sample in some]
        tokens = sum(len(sample["ids"]) for sample in samples)
        means["sampled: different answers to a question"] = float(np.mean(
            [len({sample["text"] for sample in some}) / len(some) for some in found["sampled"]]))
        means["sampled: distinct pairs of words"] = distinct([sample["text"] for sample in samples])
        means["sampled: entropy, nats a token"] = -sum(sample["logp"] for sample in samples) / tokens
        means["sampled: tokens"] = tokens / len(samples)
        teacher, own = open_teacher(settings.teacher, device=env.device)
        reads_all = teacher.config.vocab_size >= model.config.vocab_size
        if own.fingerprint == tokenizer.fingerprint and reads_all:
            means["sampled: KL from the teacher, nats"] = kl_from(found["sampled"], teacher, env.device)[0]
    return means, found["greedy"]


def distinct(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all such pairs, 0 to 1. By hand: "a b a b" has 2 of 3.

    Li et al. 2016's distinct-2, but they divide by the number of words.
    """
    pairs = Counter(pair for text in texts for words in [text.split()] for pair in zip(words, words[1:]))
    return len(pairs) / max(1, pairs.total())


def print_table(by_folder: dict[str, dict[str, float]]):
    names = dict.fromkeys(name for means in by_folder.values() for name in means)
    print(f"{'':<44}" + "".join(f"{Path(folder).name[-14:]:>16}" for folder in by_folder))
    for name in names:
        print(f"{name:<44}" + "".join(f"{means.get(name, math.nan):>16.4f}" for means in by_folder.values()))


def compare(settings: Settings, env: Env):
    """python distill.py --compare A B: held-out loss, and answers to questions, side by side."""
    text, found = settings.kind_of_data == "text", {}
    asks = not text and settings.questions and settings.samples_of_questions
    for folder in [*settings.compare, *([settings.teacher] if asks else [])]:
        if not Path(folder).is_dir():  # told before the first is measured
            raise UserError(f"there is no model folder {folder}")
    for folder in settings.compare:
        model, tokenizer = open_model(folder, env.device)
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer.json that can be read")
        check_length(settings, model, folder)
        _, val, questions = (open_text if text else open_conversations)(settings, folder, tokenizer, env)
        result = held_out(model, folder, val, env)
        found[folder] = {"held out, nats a token": result["loss"]}
        if text:
            found[folder]["held out, bits per byte"] = result["bits_per_byte"]
        if questions:
            env.first(lambda: found[folder].update(answer(settings, folder, questions, env)[0]), patient=True)
    env.first(lambda: print_table(found))


if __name__ == "__main__":
    run(main)
