"""The second half of the exercises: adapters, mixtures, and what comes after pretraining."""
from exercises import Exercise

EXERCISES_B: tuple[Exercise, ...] = (
    # ---- quantised weights, adapters
    Exercise(
        "quantize-nf4", "quantize.py", "quantize_nf4",
        "how a weight fits into four bits: blocks, their largest number, and the nearest of sixteen levels",
        45, "hard", {
            "test_lora.py::test_each_number_becomes_the_nearest_level_times_the_largest_of_its_block":
                "Numbers do not become the nearest of the sixteen levels times the largest of their block. "
                "Is there one scale for the whole tensor instead of one for each 64 numbers? Is a block "
                "divided by its standard deviation instead of its largest absolute value? Are the levels "
                "taken to be symmetric or evenly spaced (those of NF4 are neither)? Of two codes in a "
                "byte, is the first one the high one?",
            "test_lora.py::test_ragged_tails_come_back_and_an_odd_number_of_codes_fills_a_byte_by_half":
                "Numbers do not come back where their count is odd or no multiple of 64: the last block is "
                "ragged, and the last byte half empty. in_blocks fills a block up with zeros, whose codes "
                "are to be cut off again, but for one that completes the last byte.",
            "test_lora.py::test_a_block_of_zeros_stays_zeros":
                "A block of zeros does not come back as zeros: is it divided by its largest number, which "
                "is zero? 0 / 0 is nan, and nan falls behind the last border, to the level 1, which is "
                "then multiplied by whatever the scale has become.",
            "test_lora.py::test_codes_scales_and_values_equal_those_of_bitsandbytes":
                "Codes or scales are not those of bitsandbytes, which packs the first of two codes into "
                "the high four bits, and keeps a scale in float32 for each block.",
            "test_lora.py::test_bits_a_weight_and_errors_of_the_ladder":
                "With double=True a weight does not take 4.127 bits: the scales themselves are to be "
                "quantised in 8 bits, less their mean (quantize_int8 with centred=True)."},
        ("Cut the flattened weight into blocks (in_blocks gives them and the largest absolute value of "
         "each), bring each block to -1 to 1, and look for each number's place among the sixteen levels.",
         "The nearest level lies between two borders, which are the means of neighbouring levels: "
         "torch.bucketize counts how many borders a number is above. Multiply by reciprocal(scale), which "
         "is 0 for a block of zeros.",
         "Two codes make a byte, first << 4 | second. An odd number of codes gets one of the block's "
         "filling beside its last. NF4Tensor takes bytes, scales (n,), shape and block_size.")),
    Exercise(
        "lora-start", "lora.py", "LoRA.__init__",
        "why an adapter changes nothing when it begins, and yet can learn",
        15, "easy", {
            "test_lora.py::test_at_the_start_the_model_is_what_it_was_bit_for_bit":
                "A new adapter changes what the model says. B A must be zero at the start: are both A and "
                "B random? With DoRA, does the magnitude begin as the lengths of the weight's rows?",
            "test_lora.py::test_a_begins_within_one_over_root_in_and_b_at_zero_so_that_b_alone_learns_"
            "at_first":
                "A is to be uniform within 1 / sqrt(in), B zero. Are both zero, so that neither ever has a "
                "gradient? Is it A that is zero, and B random? Is A drawn without the generator, or with "
                "another spread: one that depends on the rank, or on out instead of in?",
            "test_lora.py::test_a_matrix_of_1024_x_512_at_rank_8_trains_12288_numbers_instead_of_524288":
                "The adapter of a matrix (1024, 512) at rank 8 should have 8 x 512 and 1024 x 8 numbers to "
                "learn: are both parameters (nn.Parameter), A (r, in) and B (out, r)?",
            "test_lora.py::test_outputs_and_gradients_equal_pefts":
                "With use_dora the adapter is not peft's: is lora_magnitude a parameter that begins as the "
                "lengths of the weight's rows?"},
        ("B A must be zero when training begins, but its gradient must not: so one of the two is zero, and "
         "the other one random. Which of them is which, the head of lora.py says.",
         "weight_of(linear) is the weight, (out, in), also of a quantised layer. Draw A in place, with "
         "uniform_(-bound, bound, generator=generator), where bound is in ** -0.5.",
         "Keep scale, dropout, and lora_magnitude: a parameter of self.lengths(weight), or None. Beside a "
         "weight that is_meta there are no lengths: leave them empty.")),
    Exercise(
        "lora-forward", "lora.py", "LoRA.forward",
        "what an adapter adds to a layer: y + (alpha / r) B A dropout(x)",
        10, "easy", {
            "test_lora.py::test_the_output_by_hand":
                "With A = (1, 2), B = (1, -1), x = (1, 1) and alpha / r = 3 the output should be x + 3 (3, "
                "-3). Is alpha missing (self.scale is alpha / r)? Is y itself lost, or the product of A "
                "and B taken the other way round?",
            "test_lora.py::test_dropout_is_of_what_the_adapter_reads_and_of_training_alone":
                "In training, dropout is to be applied to the x that A reads, and to nothing else: is it "
                "missing, or applied to y or behind B? Outside training (self.training) it does nothing.",
            "test_lora.py::test_at_the_start_the_model_is_what_it_was_bit_for_bit":
                "An adapter whose B is zero changes the output: what is added must be exactly zero, and "
                "with DoRA the work is self.dora's.",
            "test_lora.py::test_outputs_and_gradients_equal_pefts":
                "Output or gradient is not peft's. With lora_magnitude, the result is that of self.dora(x, "
                "dropped, A x, y, linear)."},
        ("y is what the frozen layer says already. Compute A x first, which has r numbers, then B of that: "
         "never the matrix B A.",
         "F.linear(x, A) is x A^T. Dropout: F.dropout(x, self.dropout, self.training).",
         "y + self.scale * F.linear(down, self.lora_B), and self.dora(...) where there is a magnitude.")),
    Exercise(
        "lora-merge", "lora.py", "LoRA.whole",
        "how an adapter becomes part of the weight, and comes out again",
        10, "easy", {
            "test_lora.py::test_the_output_by_hand":
                "The merged model says something else than the adapted one. Is alpha missing in the merge "
                "(the scale is the same in forward and merge), or is nothing added?",
            "test_lora.py::test_merged_equals_adapted_and_unmerged_the_base_within_two_roundings":
                "Merged and taken out again, the weight is not what it was. Is the sign left unused, or "
                "the weight changed in place? B A is (out, r) x (r, in).",
            "test_lora.py::test_a_merged_weight_in_bf16_is_the_exact_sum_rounded_once":
                "In bf16 the merged weight is off by more than one rounding: multiply and add in float32, "
                "and let merged round the sum once."},
        ("It is one formula: W + sign s B A.",
         "torch.promote_types(weight.dtype, torch.float32) is float32 for bf16 and float64 for float64: "
         "bring all three there before anything is computed, with autocast off.")),
    # ---- several corpora
    Exercise(
        "take-turns", "mixture.py", "turns",
        "how several sources share a row of windows exactly, without drawing lots",
        25, "middle", {
            "test_mixture.py::test_each_window_is_one_sources_and_every_share_is_kept_at_every_moment":
                "From n to n + 1 not exactly one source got one window more, or a count lies far from n "
                "times its weight. Are the counts rounded one by one, so that they do not sum to n? Is a "
                "weight not divided by what the later ones have left? Do they come in the order of the "
                "sources? Does a source of weight zero divide by zero?",
            "test_mixture.py::test_whose_turn_it_is_by_hand":
                "With shares of 3/10, 1/2 and 1/5 the first windows go to others than they should. The "
                "last source has floor(n / 5): is it rounded to the nearest instead? Does the division "
                "begin at the first source instead of the last one?",
            "test_mixture.py::test_phases_come_in_order_with_their_shares":
                "Over 400 windows the sources do not get their shares: of what the last source leaves, is "
                "the rest divided in the same way?"},
        ("Think of two sources first: the last has floor(n * its weight), the other one what is left.",
         "Go through the weights from the last to the first, and keep two numbers: how many windows are "
         "left, and which part of all weights is left.",
         "A source has floor(windows left * weight / weights left). Fractions keep this exact; reverse the "
         "counts at the end.")),
    # ---- supervised fine-tuning, preferences
    Exercise(
        "best-fit", "sft.py", "best_fit",
        "how conversations of any length fill windows of one length, none of them cut",
        25, "middle", {
            "test_sft.py::test_best_fit_by_hand":
                "Examples lie in other windows than best-fit decreasing puts them. Are they taken longest "
                "first (equal ones in their order)? Does each go into the fullest window that has room, "
                "and not into the first one or the last? Does an example that fits exactly fit? Are it "
                "indices that come back, not lengths?",
            "test_sft.py::test_best_fit_equals_the_plain_search_and_never_breaks_its_promises":
                "On random lengths the windows are not those of the plain search: is it the fullest window "
                "that has room? Of equally full ones the first counts.",
            "test_sft.py::test_best_fit_is_within_two_per_cent_of_what_any_packing_needs":
                "Too many windows are begun: is a new one opened though an old one has room?"},
        ("First write it plainly: for each example look at all windows, and take the one with the least "
         "room that is enough.",
         "sorted(range(n), key=lambda i: -lengths[i]) is longest first, and leaves equal ones in their "
         "order.",
         "For speed keep (room left, window) in a sorted list: bisect_left finds the least room that is "
         "enough, insort puts it back.")),
    Exercise(
        "pack-window", "sft.py", "Packed.stack",
        "which tokens carry loss: masks, shifted targets, documents that do not see each other",
        30, "middle", {
            "test_sft.py::test_what_carries_loss_is_each_reply_with_its_end_token_and_nothing_else":
                "Other tokens carry loss than those of the replies. Is the mask shifted by one (it is "
                "aligned to the ids, so that mask[1:] goes with the targets ids[1:])? Is the mask not "
                "used, and prompts are learnt? Has padding a target other than -100?",
            "test_sft.py::test_a_conversation_does_not_change_what_its_neighbours_get_by_a_single_bit":
                "A conversation sees its neighbour: documents must count 1, 2, … in a window, a number for "
                "each conversation, and 0 where nothing stands.",
            "test_sft.py::test_a_packed_window_by_hand":
                "A window laid out by hand looks otherwise. inputs are ids[:-1], targets ids[1:], -100 "
                "where there is no loss, and on padding; the next conversation begins where the last one "
                "ended; windows past the end are empty. Is the last target lost?",
            "test_sft.py::test_loss_and_gradients_of_a_packed_batch_are_those_of_the_conversations_one_"
            "by_one":
                "The loss of the packed batch is not that of its conversations one by one: is a target "
                "lost or counted twice?"},
        ("Begin with three arrays (B, T): inputs of zeros, targets of -100, documents of zeros; then copy "
         "each conversation to its place.",
         "A conversation of n + 1 ids takes n places: inputs are ids[:-1], targets ids[1:], both from "
         "`start` to `start + n`.",
         "np.where(mask[1:], ids[1:], IGNORE): the mask says of each id whether it is learnt, so it is "
         "shifted along with the ids.")),
    Exercise(
        "choose-pair", "rejection.py", "preference",
        "how a rule makes a preference out of a model's own answers",
        10, "easy", {
            "test_rejection.py::test_best_against_worst_makes_a_pair_where_they_lie_apart":
                "The pair is not best against worst. Are chosen and rejected swapped? Of equal scores, "
                "does the first count on both sides? Is the margin asked for? Does an empty answer, or one "
                "that equals the other, still make a pair? Is the author's answer taken where it should "
                "be, or left in the prompt?",
            "test_rejection.py::test_the_margin_itself_is_enough_and_the_prompt_is_all_before_the_last_"
            "message":
                "Two answers exactly `margin` apart are a pair: is it > where >= is meant? The prompt is "
                "all messages but the last: is the answer in it, or a system message lost?"},
        ("max and min with key=… take the first of equal ones; sorting gives the last at one of the ends.",
         "None in three cases: less than the margin apart, equal texts, nothing in the rejected one.")),
    Exercise(
        "dpo-loss", "dpo.py", "dpo_loss",
        "preferences as logistic regression on a difference of log-ratios; and what IPO asks for instead",
        30, "middle", {
            "test_dpo.py::test_at_the_start_the_loss_is_ln_2_and_its_gradient_is_not_zero":
                "Where the policy is the reference, the loss should be ln 2, and the gradient -beta / 2 by "
                "the chosen answer's log-probability. Are policy and reference swapped, or chosen and "
                "rejected? Is each log-ratio of one and the same answer? Is beta missing? Are the losses "
                "averaged, instead of one for each pair?",
            "test_dpo.py::test_rewards_are_beta_times_the_log_ratios_without_gradient_and_the_loss_is_"
            "of_their_difference":
                "Log-ratios of 2 and -4 at beta 0.5 give -log sigma(3). Rewards are beta times each "
                "log-ratio, without gradient (detach).",
            "test_dpo.py::test_conservative_dpo_is_the_mean_over_labels":
                "label_smoothing is not what it should be: with 0.2 the loss is 0.8 times that of the "
                "pair, and 0.2 times that of the pair the other way round.",
            "test_dpo.py::test_ipo_wants_a_difference_of_1_over_2_beta_and_charges_the_square_of_what_"
            "lies_between":
                "IPO is a square: (h - 1 / (2 beta))^2, of h itself. Is h multiplied by beta, or the "
                "target another one, or h divided by lengths (that is ipo_norm)?",
            "test_dpo.py::test_the_hinge_is_a_straight_line_up_to_a_margin_of_1_and_nothing_beyond":
                "The hinge is max(0, 1 - beta h): above a margin of 1 there is no loss, below it a "
                "straight line.",
            "test_dpo.py::test_a_pair_far_the_wrong_way_round_costs_its_distance_and_is_pulled_with_"
            "all_of_beta":
                "At a difference of -20,000 the loss is infinite or has no gradient: log(sigmoid(x)) "
                "underflows; F.logsigmoid does not."},
        ("Two log-ratios: chosen = policy_chosen - reference_chosen, and rejected likewise. All the losses "
         "are functions of h = chosen - rejected.",
         "This exercise asks for the kinds sigmoid (with label_smoothing), hinge and ipo only.",
         "-F.logsigmoid(beta * h) * (1 - eps) - F.logsigmoid(-beta * h) * eps; F.relu(1 - beta * h); (h - "
         "1 / (2 * beta)) ** 2. Return losses, and (beta * ratio).detach() of both.")),
    Exercise(
        "sequence-logps", "dpo.py", "sequence_logps",
        "the log-probability of an answer: a sum, over its own tokens, each predicted from the one before",
        20, "middle", {
            "test_dpo.py::test_padding_and_batch_mates_change_nothing":
                "Tokens behind an answer changed its log-probability. Is the mask shifted by one, or not "
                "used at all, so that the prompt and padding count? Is it the likelihood of each token at "
                "its own position, where it has been read already? Do rows mix?",
            "test_dpo.py::test_an_answers_log_probability_is_the_sum_over_its_tokens_alone":
                "It is not the sum over the answer's tokens: is it a mean? Do prompt tokens count? Is it "
                "the likelihood of each token at its own position, instead of the position before it?",
            "test_dpo.py::test_its_gradients_are_those_of_the_plain_form":
                "The gradients are not those of log-softmax, picked and summed: is anything detached, or "
                "averaged?",
            "test_dpo.py::test_packed_pairs_have_the_log_probabilities_of_their_sides_one_by_one":
                "An answer alone has another log-probability than in a packed batch: is its first token "
                "counted, and its end token?"},
        ("The logits at position t are about token t + 1: so the model reads ids[:, :-1], and the targets "
         "are ids[:, 1:].",
         "The mask is aligned to ids, so it is shifted as these are: mask[:, 1:]. DPO wants the sum, not "
         "the mean (section 1 of the file's head).",
         "Plainly: model(ids[:, :-1]).float().log_softmax(-1), gather the targets, times the mask, summed "
         "over dim 1. Without all logits: token_logps(model, ids[:, :-1], targets), with -100 where "
         "nothing counts, and `summed`.")),
    # ---- rewards
    Exercise(
        "exact-reward", "rewards.py", "exact",
        "a reward that cannot be had by cheating",
        20, "easy", {
            "test_rewards.py::test_who_gives_two_answers_has_given_none":
                "A reply with two answers, of which one is right, was rewarded. Is the first or the last "
                "<answer> part taken, or the text searched for the truth? `inside` gives None where a tag "
                "stands twice; such a reply is no bare one either.",
            "test_rewards.py::test_the_answer_is_what_stands_in_its_tags":
                "The reply's answer is not compared as it should be: as text, without the white space "
                "around it (98.0 and 098 are not 98: is it compared as a number?), and from within its "
                "tags, where the author's has tags: is a bare reply taken?",
            "test_rewards.py::test_a_bare_reply_counts_where_the_author_wrote_no_tags_and_only_if_it_ended":
                "A reply without tags is its own answer only where the author's has none, and only if it "
                "ended: one that was cut off at 98 might have become 980.",
            "test_rewards.py::test_an_empty_truth_is_met_by_nothing":
                "An empty answer was rewarded, as the truth is empty, too: a model would learn to say "
                "nothing.",
            "test_rewards.py::test_a_truth_that_is_neither_text_nor_a_whole_number_is_told":
                "question[\"answer\"] may be text or a whole number. True, 98.0 and lists are mistakes in "
                "the data: raise ValueError (bool is a kind of int)."},
        ("First find the truth: question.get(\"answer\"); else what the author has in tags; else all of "
         "the author's answer (`author`, `inside` and `tags` stand below).",
         "Then find what was said: inside(reply.text, \"answer\"). Only where that is None, the author "
         "wrote no tags, the reply has none and ended, it is the whole text.",
         "Compare found.strip() with str(truth).strip(), and give 0 for an empty one.")),
    Exercise(
        "reward-at-end", "reward_model.py", "read_at_end",
        "where a reward is read: at the last real token, wherever padding stands",
        10, "easy", {
            "test_reward_model.py::test_a_reward_is_read_at_the_last_real_token_by_hand":
                "Of three rows of three scores, the wrong ones were read. Is it the last column, padding "
                "or not? A row of n tokens ends at n - 1. With padding on the left, the number of real "
                "tokens is not where the last one stands.",
            "test_reward_model.py::test_padding_of_any_ids_at_either_side_changes_no_reward":
                "Padding changed a reward: is it read at the last column, or found by its ids (padding may "
                "have the id of the end token)?",
            "test_reward_model.py::test_a_packed_batch_has_the_rewards_of_its_answers_one_by_one_end_"
            "tokens_included":
                "By lengths, the reward is read at another token than the end token: is it off by one?"},
        ("`real` comes in two forms: a mask (B, T), or lengths (B,) of rows padded on the right. "
         "real.dtype tells them apart.",
         "For a mask: torch.where(real, torch.arange(T), -1).amax(dim=1). Then gather one score a row.")),
    Exercise(
        "reward-loss", "reward_model.py", "reward_model_loss",
        "how a number is learnt from choices: Bradley and Terry's model",
        10, "easy", {
            "test_reward_model.py::test_losses_by_hand":
                "Rewards of 0 and 0 cost ln 2, of 2 and 1 log(1 + 1/e). Are chosen and rejected swapped? "
                "Is the margin added instead of subtracted, so that it asks for less? Is centre about the "
                "difference, instead of the sum? Are the losses averaged, instead of one for each pair?",
            "test_reward_model.py::test_losses_and_gradients_are_finite_ten_thousand_apart":
                "Ten thousand apart, the loss is infinite: log(sigmoid(x)) underflows to log(0); "
                "F.logsigmoid does not.",
            "test_reward_model.py::test_the_gradient_is_the_probability_of_being_wrong":
                "The gradient by the chosen reward should be minus the probability that the model gives to "
                "the wrong order, with the margin in it.",
            "test_reward_model.py::test_only_the_difference_counts_and_centring_alone_knows_where_zero_is":
                "With 7 added to all rewards the loss has changed: without `centre` only the difference "
                "counts; and with it, it should have grown."},
        ("P(chosen is better) = sigma(r_chosen - r_rejected). The loss is minus its logarithm.",
         "The margin is subtracted from the difference: the chosen one has to be better by that much.")),
    # ---- reinforcement
    Exercise(
        "kl-estimate", "policy_gradient.py", "kl_estimate",
        "three estimates of one divergence from single draws: k1, k2, k3",
        15, "easy", {
            "test_ppo.py::test_kl_estimates_by_hand":
                "At probabilities 1/2 and 1/4, k1 is ln 2, k2 half its square, k3 1/2 - 1 + ln 2. Is the "
                "ratio inverted (k1 is logps - reference)? Has k3 a wrong sign: exp(-k1) - 1 + k1? Is the "
                "half of k2 missing? Another kind is refused with a UserError.",
            "test_ppo.py::test_k1_and_k3_are_the_divergence_on_average_and_k3_is_never_negative":
                "On average over the policy, k1 and k3 should be KL(policy | reference), and k3 never "
                "below 0: is the sign of one term wrong?",
            "test_ppo.py::test_as_losses_their_gradients_are_of_nothing_of_the_divergence_and_of_its_reverse":
                "As a loss, an estimate has another gradient than it should: is something detached, or an "
                "absolute value taken?"},
        ("All three are functions of k1 = logps - reference_logps.",
         "k3 adds to k1 what is 0 on average, exp(-k1) - 1, and so is never negative. torch.expm1 keeps "
         "small differences exact.")),
    Exercise(
        "group-advantages", "policy_gradient.py", "group_advantages",
        "GRPO and RLOO: other replies to the same prompt in place of a critic",
        20, "easy", {
            "test_ppo.py::test_groups_by_hand":
                "Groups of (1, 3) and (5, 5): less the mean (-1, 1) and (0, 0), by the unbiased standard "
                "deviation (that of n - 1) + 1e-4. Are the groups side by side, or was every other reply "
                "taken? Is the standard deviation that of n? Is the epsilon missing, so that equal rewards "
                "give nan (0 / 0)? Is it taken over the whole batch instead of each group? Is "
                "divide_by_std used? With rloo, has a reply itself a part in its mean?",
            "test_ppo.py::test_leaving_one_out_compares_with_the_mean_of_the_others":
                "rloo compares with the mean of the others: has the reply itself a part in its mean? That "
                "makes it smaller by (G - 1) / G.",
            "test_ppo.py::test_a_group_of_one_is_refused":
                "A group of one has nothing to be compared with, and should be refused with a UserError.",
            "test_ppo.py::test_the_policy_gradient_is_the_analytic_one_on_average":
                "On average over 20,000 groups, the gradient is not that of the expected reward: does a "
                "reply know another one's group, or a factor lack?"},
        ("rewards.view(-1, group_size) has a group in each row; keepdim=True keeps a mean a column.",
         "The mean of the others is (sum - r) / (G - 1), and r less that is (r - mean) G / (G - 1). "
         "torch.std is the unbiased one.")),
    Exercise(
        "gae", "policy_gradient.py", "gae",
        "how much better than expected a token was: generalised advantage estimation, from the end to the "
        "beginning",
        30, "middle", {
            "test_ppo.py::test_nothing_leaks_from_padding_into_advantages":
                "What stands in padding (here nan) changed an advantage: the value behind the last token "
                "must count as 0. nan times 0 is nan: torch.where(mask, x, 0) first, before anything is "
                "computed.",
            "test_ppo.py::test_advantages_by_hand":
                "Two tokens at gamma = lam = 1/2. delta_1 = 1 - 0.25; delta_0 = 0.5 * 0.25 - 0.5: is the "
                "next value missing (the bootstrap), or not multiplied by gamma? Behind the last token it "
                "is 0. Then A_0 = delta_0 + 0.25 delta_1: is lam missing? Is it from the end to the "
                "beginning? Returns are advantages + values.",
            "test_ppo.py::test_advantages_are_the_sum_of_the_paper_for_replies_of_any_length":
                "Replies of 6, 1 and 4 tokens do not have the sums of the paper, or not zeros behind their "
                "ends: does something of padding, or of a later row, leak in?",
            "test_ppo.py::test_with_lam_and_gamma_1_the_advantage_is_return_minus_value":
                "With lam = gamma = 1 the advantage should be all rewards to come, less the value, and the "
                "return those rewards."},
        ("Go from the last column to the first, and carry along two things: the advantage and the value of "
         "the token behind.",
         "delta = r_t + gamma * next value - V_t; A_t = delta + gamma * lam * A_{t+1}. Behind the end both "
         "are 0.",
         "Bring rewards and values to 0 outside the mask at the very beginning, with torch.where; keep the "
         "advantage at 0 there, too.")),
    Exercise(
        "whiten", "policy_gradient.py", "whiten",
        "advantages of mean 0 and variance 1, to which padding adds nothing",
        20, "middle", {
            "test_ppo.py::test_whitened_tokens_have_mean_0_and_variance_1_and_nothing_else_has_a_part_in_it":
                "The tokens have not mean 0 and (unbiased) variance 1, or what stands outside the mask has "
                "a part in it: are mean and variance those of the whole grid, padding included? Is it "
                "multiplied by the mask (nan times 0 is nan)? Is the variance divided by n instead of n - "
                "1? Does shift_mean=False leave the mean where it was?",
            "test_ppo.py::test_whitened_by_hand":
                "1 and 3 have mean 2 and unbiased variance 2: is it divided by the variance, instead of "
                "its root?",
            "test_ppo.py::test_equal_values_stay_finite":
                "Equal values, or a single one, gave nan: add 1e-8 to the variance, and never divide by 0.",
            "test_ppo.py::test_whitening_in_two_processes_is_whitening_all":
                "Two processes that add up their sums do not whiten as one: give over_all the stacked "
                "(number, total), then the sum of squares, and use what it returns."},
        ("Three sums over the tokens are all it takes: how many, of their values, of the squares of what "
         "they differ from the mean.",
         "over_all is called twice: with torch.stack([number, total]), and, once the mean is known, with "
         "the sum of squares.",
         "scale = (squares / (number - 1) + 1e-8).rsqrt(), with the divisor at least 1. Outside the mask: "
         "0.")),
    Exercise(
        "policy-loss", "policy_gradient.py", "policy_terms",
        "PPO's clipped surrogate: a minimum of two, and what each of them forbids",
        20, "middle", {
            "test_ppo.py::test_only_what_would_gain_by_going_further_stands_still":
                "A token moved, or stood still, where it should not. What went too far the wrong way must "
                "still be pulled back: is it the maximum where the minimum of both sides is meant, or the "
                "clipped side alone? Is the ratio inverted (new over old)? Is nothing clipped? Is it a "
                "loss, with a minus?",
            "test_ppo.py::test_the_policy_loss_by_hand":
                "Ratios 0.5, 1.5, 1.1 with advantages 1, 2, -1 cost -0.5, -2.4 and 1.1. clip_high is the "
                "room above 1: is it ignored, or used below?",
            "test_ppo.py::test_padding_has_no_part_in_a_loss_or_its_gradient":
                "What stands in padding changed the loss of the tokens: each term is to be of its own "
                "token alone."},
        ("ratio = exp(logps - old_logps). Gains are wanted, losses are minimised: so all has a minus "
         "before it.",
         "Clip the ratio to 1 - clip … 1 + clip_high, multiply both with the advantage, and take the "
         "smaller one: it is the more cautious promise.")),
    Exercise(
        "value-loss", "policy_gradient.py", "value_terms",
        "a critic that is held near its old values, unless that would flatter it",
        10, "easy", {
            "test_ppo.py::test_the_value_loss_by_hand":
                "Values 1, 0, -1, old ones 0, returns 1, 2, 1, clip 0.2: half of 0.64, 4, 4. Is it the "
                "larger of both squared errors (with the smaller one, or the held one alone, errors are "
                "hidden)? Is the half missing? Is the value held around the old value, and not around the "
                "return? clip None is the plain error.",
            "test_ppo.py::test_padding_has_no_part_in_a_loss_or_its_gradient":
                "What stands in padding changed the loss of the tokens: each term is to be of its own "
                "token alone."},
        ("held = old + clamp(new - old, -clip, clip): where the critic would be if it had not gone "
         "further.",
         "torch.maximum of both squared errors, over 2.")),
    # ---- distillation
    Exercise(
        "kd-loss", "divergence.py", "kd_loss",
        "a student learns its teacher's distribution: direction, temperature, what is summed and what "
        "masked",
        40, "hard", {
            "test_divergence.py::test_it_is_a_sum_over_the_tokens_that_count_and_not_over_rows_or_places":
                "It is not the sum over the tokens that count, and their number. Is it divided already, by "
                "the number of rows (batchmean) or of tokens? Does padding count? The number is of targets "
                "that are not -100.",
            "test_divergence.py::test_the_square_of_the_temperature_keeps_the_gradients_size":
                "At temperature 8 the gradient has another size than at 1: is T^2 missing, or is one of "
                "the two distributions not at the temperature? Is kd_weight on the wrong one of both "
                "terms?",
            "test_divergence.py::test_forward_and_reverse_are_torchs_kl_div_with_the_arguments_in_this_order":
                "forward should be KL(teacher | student): are teacher and student swapped? Are both at the "
                "temperature?",
            "test_divergence.py::test_weight_0_is_cross_entropy_and_1_distillation_and_what_lies_"
            "between_their_mixture":
                "kd_weight 0 should be pure cross-entropy with the targets, at temperature 1, and 1 pure "
                "distillation: is the weight on the wrong one, or the cross-entropy at the teacher's "
                "temperature?",
            "test_divergence.py::test_what_stands_at_masked_tokens_changes_nothing_be_it_nan":
                "What stands at masked tokens (nan or infinite) reached the loss or its gradient: mask "
                "before the arithmetic. nan times 0 is nan, and in the backward pass torch.where behind it "
                "does not help.",
            "test_divergence.py::test_impossible_tokens_cost_finitely_and_have_finite_gradients":
                "Logits of -inf gave an infinite loss or a gradient of nan: a token of probability 0 costs "
                "as one of e^-100 (log_probabilities sees to it, torch's log_softmax does not)."},
        ("Keep the valid tokens alone, first of all: student_logits[targets != IGNORE] is (N, V).",
         "log_probabilities(logits, temperature) and divergence(log_p, log_q, of) are there; p is the "
         "teacher's, and detached. Divergence(kind, beta, skew, temperature).check() is `of`.",
         "kd_weight * T^2 * the sum of divergences, plus (1 - kd_weight) * F.nll_loss(…, "
         "reduction=\"sum\") at temperature 1. Refuse a weight outside 0 to 1, and other vocabularies "
         "(check_same_vocabulary). A weight of 0 leaves a term out: its logits may be nan.")),
    Exercise(
        "rest-of-top-k", "divergence.py", "log_rest",
        "what a teacher's k likeliest tokens leave to all others, and why 1 - sum is no way to get it",
        15, "middle", {
            "test_divergence.py::test_where_nothing_is_left_for_others_that_counts_as_the_floor_and_"
            "what_was_given_stays":
                "Where nothing is left for the others, that is FLOOR, not -inf or nan (clamp); with (0.2, "
                "0.3, 0.5), of which the last and the first are known, it is log 0.3. Is it the mass of "
                "the known tokens, or is the tail ignored? Was the distribution that was given written "
                "over in place?",
            "test_divergence.py::test_what_is_left_for_others_is_summed_over_them_and_not_taken_from_one":
                "e^-40 + e^-41 was lost: in float32, 1 - the sum of the known ones is 0. Sum over the "
                "others instead.",
            "test_divergence.py::test_buckets_by_hand":
                "Of (0.5, 0.3, 0.15, 0.05) the two likeliest leave 0.2: is the tail ignored?",
            "test_divergence.py::test_fewer_known_tokens_show_less_and_never_more_than_there_is":
                "Knowing fewer tokens made distributions lie further apart, which cannot be: is the rest "
                "the sum of the others' probabilities?"},
        ("All tokens but k: put -inf where those stand, and what remains are the others.",
         "logps.scatter(-1, ids, -math.inf), without an underscore, then logsumexp, and no less than "
         "FLOOR.")),
    Exercise(
        "attention-match", "matching.py", "attention_match",
        "to look where the teacher looks, though it has more heads",
        25, "hard", {
            "test_matching.py::test_attention_by_hand":
                "One query, two keys, four heads of the teacher and two of the student. Is it KL(teacher | "
                "student), or are the two swapped? Are neighbouring heads averaged as probabilities (the "
                "mean of logarithms is another one)? Is it a mean over heads? Does a query without a "
                "target count?",
            "test_matching.py::test_numbers_of_heads_that_share_no_factor_are_all_averaged":
                "Three heads and four have no factor in common, so that all are averaged into one: gcd(H, "
                "H'). Over queries and batch it is a sum, not a mean.",
            "test_matching.py::test_only_queries_with_a_target_count_and_padding_changes_nothing":
                "Queries without a target, or padding, have a part in the sum: is `valid` used?",
            "test_matching.py::test_a_teacher_is_matched_by_itself_alone":
                "A teacher beside itself is at no distance."},
        ("Bring both to gcd(H, H') heads first: view(B, heads, H // heads, T, T), and average over the "
         "third.",
         "A mean of probabilities, in logarithms: logsumexp(dim=2) - log(H // heads).",
         "F.kl_div(student, teacher, reduction=\"none\", log_target=True) is KL(teacher | student) term by "
         "term: sum over keys, mean over heads, times valid, sum.")),
    Exercise(
        "layers-student", "students.py", "layers_student",
        "a student made of its teacher's blocks, at equal distances from the first to the last",
        25, "middle", {
            "test_students.py::test_6_of_12_blocks_are_those_of_distilbert":
                "Of 12 blocks 6 should be 0, 2, 4, 7, 9, 11. Are they the first six, or every second one, "
                "without the last? Is a place rounded down instead of to the nearest?",
            "test_students.py::test_the_first_and_the_last_block_stay_and_none_comes_twice":
                "For other numbers the first or the last block is missing, distances are uneven, or the "
                "student's block i has not the weights of the i-th that was chosen: are they in order, "
                "each with its new number? A single block is the first.",
            "test_students.py::test_a_student_of_layers_is_the_teacher_with_the_others_taken_out":
                "The student's logits are not those of a teacher without the other blocks: does each block "
                "get the weights of its own, in their order, and do embedding, norm and head come along?",
            "test_students.py::test_a_student_is_new_and_the_teacher_and_the_global_generator_stay_as_"
            "they_were":
                "Training the student changed its teacher: they share memory. Copy each tensor (float32, "
                "CPU)."},
        ("np.linspace(0, have - 1, n).round() gives the blocks' numbers.",
         "Go through weights_of(teacher): names are model.layers.7.…; leave out blocks that go, and give "
         "the others their new numbers, blocks.index(7).",
         "tensor.to(\"cpu\", torch.float32, copy=True), and assembled(replace(teacher.config, n_layers=n), "
         "tensors, began). at_most refuses a number that is out of range.")),
)
