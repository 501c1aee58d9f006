"""What the numbers in a log mean: which are drawn together, what is normal, and what a bad one tells.

A table, for report.py: what a stage writes into its log and is not here, is not drawn. The figures in the
sentences are those of the main jobs (README.md); other sizes and texts have others.
"""
from typing import NamedTuple


class Chart(NamedTuple):
    title: str
    unit: str
    lines: dict[str, str]  # {name: key of the log}; "reward_*" are all keys that begin so, but the *_std
    marks: dict[str, str]  # the same, drawn as rings: what is measured now and then, on held-out data
    why: str  # what it is, what is normal, what a bad one means
    along: str = "step"  # the key that goes from left to right


RATE = Chart("Learning rate", "of the matrices in blocks", {"learning rate": "lr"}, {},
             "How far a step goes. It rises over the warm-up, as the optimizer's running means know nothing "
             "yet, and falls to nearly 0 by the end, which is when the loss falls fastest: a run that is "
             "stopped early has not had its best part.")
NORM = Chart("Gradient norm", "length of the gradient", {"gradient norm": "grad_norm"}, {},
             "How strongly the loss would change. In pretraining it stays near 0.5 after the first steps; "
             "--clip shortens what is longer than 1. A single spike is a strange batch; spikes that grow, "
             "or a norm that climbs for hundreds of steps, mean a learning rate too high.")
PAIR_LOSS = Chart("Loss", "nats a pair", {"training": "loss_nats_per_pair"},
                  {"held out": "val_loss_nats_per_pair"},
                  "It starts at ln 2 = 0.693, which is to know nothing about a pair, and falls. Training "
                  "near 0 beside held-out pairs that stay above 0.6 is learning by heart: fewer epochs "
                  "help.")
RIGHT = Chart("Pairs in the right order", "share", {"training": "accuracy"}, {"held out": "val_accuracy"},
              "How often the chosen answer has the higher reward. 0.5 is guessing. Of pairs that people have "
              "put in order, 0.6 to 0.75 held out is usual, as they agree no better themselves; where a rule "
              "has, as in the main job, 0.8 to 0.95. 1.0 in training alone is learning by heart.")
REWARDS = Chart("Rewards of both answers", "reward",
                {"chosen": "chosen_reward", "rejected": "rejected_reward"},
                {"chosen, held out": "val_chosen_reward", "rejected, held out": "val_rejected_reward"},
                "Of DPO: beta times how much likelier than by the reference an answer has become. The "
                "chosen reward often falls, too: what counts is the margin. If both fall by tens, the model "
                "unlearns to write at all: a smaller rate, or --nll_weight, holds it.")
MARGIN = Chart("Margin", "reward", {"margin": "margin"}, {"held out": "val_margin"},
               "Chosen minus rejected: what is learnt. It begins at 0 and grows; a held-out margin that "
               "stops while that of training grows has learnt all that these pairs can teach.")

CHARTS = {
    "pretraining": [
        Chart("Loss", "bits per byte", {"training": "bits_per_byte"}, {"held out": "val_bits_per_byte"},
              "How many bits the model needs for a byte of text; lower is better, and unlike nats a token "
              "it can be compared between tokenizers and with programs that compress. The loss starts near "
              "ln V = 8.3 nats a token for V = 4,096 (3.4 bits per byte), or near 4.3 (1.8) after the "
              "bigram start, and may rise for a few dozen steps then. Held-out text lies a little above "
              "training. No fall at all: the rate is far too low or too high; a fall and then a jump: a "
              "spike, see the gradient norm."),
        Chart("Loss", "nats a token", {"training": "loss_nats_per_token"},
              {"held out": "val_loss_nats_per_token"},
              "The mean surprise at the next token: it starts near ln V, 8.3 for V = 4,096, or 4.3 after "
              "the bigram start. Divided by ln 2 and by the bytes of a token it is the bits per byte."),
        RATE, NORM],
    "fine-tuning": [
        Chart("Loss on replies", "nats a token", {"training": "loss_nats_per_token"},
              {"held out": "val_loss_nats_per_token"},
              "The surprise at the tokens of the replies alone: prompts are read, not learnt. It falls "
              "fast in the first tenth, which is the form, and then slowly, which is the content. If "
              "held-out replies get worse while training gets better, it is learning by heart: fewer "
              "epochs."),
        Chart("What is left of pretraining", "bits per byte", {},
              {"plain held-out text": "plain_val_bits_per_byte"},
              "The loss on the plain text of pretraining. A few hundredths above where pretraining ended "
              "is the price of replies; much more is forgetting, which --replay_share holds back."),
        NORM, RATE],
    "preferences": [REWARDS, MARGIN, RIGHT, PAIR_LOSS, NORM],
    "reward model": [PAIR_LOSS, RIGHT, REWARDS._replace(
        why="Only differences mean something: any number added to both changes no pair. Chosen and rejected "
            "drift apart; their common drift is harmless, and --centre holds it at 0."), MARGIN, NORM],
    "reinforcement": [
        Chart("Reward", "mean of the replies", {"reward": "reward", "": "reward_*"},
              {"held out": "val_reward"},
              "What the replies are given, in training as they are drawn. It should rise; the rewards of "
              "weight 0 are only followed, as witnesses. Reward up while KL grows and what is followed "
              "(F1, quality) falls: reward hacking. A reward that stays: groups that are all right or all "
              "wrong teach nothing."),
        Chart("Reward against KL", "held-out reward", {"reward": "val_reward", "": "val_reward_*"}, {},
              "What was gained for which distance from the start, held out (Gao et al. 2022). At first "
              "reward is cheap; where what is rewarded still grows and what is only followed falls, stop "
              "there.",
              "val_kl_nats_per_reply"),
        Chart("Distance from the start", "nats a reply", {"KL": "kl_nats_per_reply"},
              {"held out": "val_kl_nats_per_reply"},
              "How much likelier than by the first model the replies have become, all tokens of a reply "
              "together. It grows from 0; a few nats are usual here. If it runs away, --kl_coef is too "
              "small for the rate."),
        Chart("Entropy", "nats a token", {"entropy": "entropy_nats_per_token"},
              {"held out": "val_entropy_nats_per_token"},
              "How undecided the model is at a token. It falls slowly while the reward rises. A fall to "
              "near 0 in a few steps is collapse: all replies are alike, and there is nothing left to "
              "choose among."),
        Chart("Clip share", "share of tokens", {"clipped": "clip_share"}, {},
              "Tokens whose probability has moved out of the trust region within a step, and which it does "
              "not push any further. 0 to 0.1 is usual; above 0.3, the rate or --update_epochs is too "
              "high."),
        Chart("Length of replies", "tokens", {"length": "length"}, {"held out": "val_length"},
              "Replies that grow to the limit, or shrink to a word, while the reward rises are what a "
              "careless reward asks for."),
        NORM],
    "distillation": [
        Chart("Distance from the teacher", "nats a token", {"to the teacher": "kd_nats_per_token"}, {},
              "The divergence of the student's distributions from the teacher's. It falls towards what a "
              "model of this size can do, not to 0. It is of another kind for each --kind, and not to be "
              "compared between them."),
        Chart("Loss on the text", "nats a token", {"cross-entropy": "ce_nats_per_token"}, {},
              "The student's own loss at the next token, where it is learnt from: all of the loss without "
              "a teacher, a part of it where --kd_weight lies between 0 and 1."),
        Chart("Held out", "nats a token", {}, {"held out": "val_loss_nats_per_token"},
              "What counts: the loss on text that nobody was trained on, with and without a teacher."),
        NORM],
}

INTRODUCTIONS = {
    "data": "Raw texts became clean, unique documents, and these became tokens.",
    "pretraining": "The model learns to guess the next token of plain text.",
    "fine-tuning": "The model learns to answer: it goes on with training, on conversations.",
    "pairs": "Answers were drawn from the model and put in order by a rule: preferences to learn from.",
    "preferences": "The model learns which of two answers to give (DPO and its relatives).",
    "reward model": "A model learns to give an answer one number, the higher the better.",
    "reinforcement": "The model answers, is rewarded, and makes what was rewarded likelier.",
    "distillation": "A small model learns from a large one; beside it, perhaps, the same without a teacher.",
    "unknown": "These folders do not say what they are."}

# Our own main jobs, `torchrun train.py` and `python sft.py`: {key: (steps a value is the mean of, values)}
REFERENCES = {
    "bits_per_byte": (20, (
        1.833, 1.907, 1.872, 1.83, 1.8, 1.775, 1.748, 1.734, 1.742, 1.73, 1.712, 1.677, 1.664, 1.677, 1.649,
        1.653, 1.643, 1.607, 1.616, 1.612, 1.598, 1.539, 1.57, 1.563, 1.542, 1.55, 1.559, 1.531, 1.529, 1.524,
        1.487, 1.491, 1.46, 1.528, 1.476, 1.477, 1.454, 1.447, 1.432, 1.428, 1.43, 1.443, 1.439, 1.43, 1.4)),
    "loss_nats_per_token": (8, (
        4.004, 3.782, 3.741, 3.752, 3.775, 3.655, 3.44, 3.545, 3.623, 3.547, 3.517, 3.361, 3.602, 3.48, 3.39,
        3.508, 3.441, 3.405, 3.435, 3.431, 3.345, 3.408, 3.298, 3.261, 3.182, 3.121, 3.095, 3.113, 3.123,
        3.064, 3.062, 3.054, 3.105, 3.024, 3.109, 3.212, 2.996, 3.049, 3.038, 2.931))}
REFERENCE = "ours"
REFERENCE_WHY = ("“ours” is the main job as it is (2 cores, seed 0, means over {steps} steps): the same "
                 "command should come within a few hundredths of it; another text, tokenizer or size has "
                 "another curve.")


def reference(kind: str, key: str) -> list[tuple[float, float]]:
    """The curve of our own run for this kind of run and key of the log; [] where there is none."""
    if (kind, key) not in (("pretraining", "bits_per_byte"), ("fine-tuning", "loss_nats_per_token")):
        return []
    steps, values = REFERENCES[key]
    return [(steps * i + (steps + 1) / 2, value) for i, value in enumerate(values)]


def lines_of(names: dict[str, str], keys) -> dict[str, str]:
    """{name: key} with each "reward_*" as the keys that there are."""
    found = {}
    for name, key in names.items():
        if key.endswith("*"):
            begin = key[:-1]
            found |= {other.removeprefix(begin): other for other in keys
                      if other.startswith(begin) and not other.endswith("_std")}
        elif key in keys:
            found[name] = key
    return found
