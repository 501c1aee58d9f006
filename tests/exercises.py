"""The course's exercises: functions of the product, with the tests that grade each and what they tell.

exercise.py reads this table; tests/wrong_answers.py holds the mistakes that each must find.
"""
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Exercise:
    name: str  # what a command takes: "rotate", "dpo-loss"
    file: str
    function: str  # "apply_rope" or "Class.method"
    learns: str  # what is learned, one line
    minutes: int
    level: Literal["easy", "middle", "hard"]
    tests: dict[str, str]  # {"test_positions.py::test_name": what its failure suggests}, the most telling first
    hints: tuple[str, ...]  # of exercise.py hint: from vague to nearly the answer


EXERCISES: tuple[Exercise, ...] = (
    # ---- text to tokens
    Exercise(
        "train-bpe", "bpe.py", "train_plain", "which pair a tokenizer merges next, and what a tie is", 20, "easy", {
            "test_bpe.py::test_ties_go_to_the_greatest_pair_of_bytes":
                "Of equally frequent pairs the greatest in the order of bytes must win: is a tie left to who is "
                "seen first, does the smallest win, or are words not merged by each new pair before the next?",
            "test_bpe.py::test_overlapping_pairs_count_twice_in_both_trainers":
                "A word counts as often as it occurs, and in aaaa the pair (a, a) counts three times: do you "
                "count each word once, or each pair once a word?",
            "test_bpe.py::test_the_first_merges_by_hand":
                "The merges are not those found by hand: are the words merged by each new pair before the next "
                "is counted?"},
        ("Count the pairs of neighbours of all words, join the most frequent everywhere, and begin again.",
         "A Counter over pairwise(word) for every word counts pairs; max() takes a key.",
         "The key (count, pair) decides ties too; stop when 256 + merges + special tokens are vocab_size.")),
    Exercise(
        "merge", "bpe.py", "merge", "how byte-pair encoding replaces a pair by its new token", 10, "easy", {
            "test_bpe.py::test_merging_goes_from_left_to_right_without_overlap":
                "In a run of equal ones, a a a must become aa a: do you merge from the left, go on behind what "
                "was merged, and merge all there is?"},
        ("Walk through the word with an index, and write what you find to a new list.",
         "Where this symbol and the next are the pair, write them joined and go on two further, else one.")),
    Exercise(
        "merge-ids", "bpe.py", "merge_ids", "in which order the merges of a vocabulary are made", 25, "middle", {
            "test_bpe.py::test_encoding_makes_the_earliest_merge_first":
                "Of all merges that could be made the one of the lowest rank, learned first, comes first, and of "
                "its places the leftmost; and after it the ranks of both neighbours are looked up anew, until none "
                "is left.",
            "test_bpe.py::test_encoding_equals_replaying_the_merges_one_after_the_other":
                "The ids are not those of replaying all merges: after a merge both neighbours stand beside "
                "another id: do you look up the rank on the left and on the right anew, and go on until none "
                "is left?"},
        ("Look up the rank of every pair of neighbours, make the lowest, and look again.",
         "results[rank] is the id that takes the place of both; a pair that is not in ranks cannot be merged.")),
    Exercise(
        "decode-stream", "bpe.py", "Tokenizer.decode_stream", "why a stream waits before it shows a character",
        10, "easy", {
            "test_bpe.py::test_streamed_text_never_shows_half_a_character":
                "An id may end within a character: is half of one shown as a replacement character, instead of "
                "waiting for its rest?",
            "test_bpe.py::test_streamed_text_is_that_of_decode_even_for_bytes_that_are_no_text":
                "Bytes that are no UTF-8 become replacement characters, also where the stream ends within a "
                "character: are they ignored, or is the end forgotten?",
            "test_bpe.py::test_streamed_text_comes_with_the_id_that_completes_it":
                "The text must come as the ids do: do you wait for all of them before you yield anything?"},
        ("One id's bytes may be part of a character, so decoding id by id cannot be right.",
         "codecs.getincrementaldecoder makes a decoder that keeps what is not complete.",
         "At the end decode(b\"\", final=True) gives what is left; empty pieces are not yielded.")),
    # ---- the model
    Exercise(
        "rope-angles", "positions.py", "rope_angles", "how fast each pair of a head turns with the position", 15,
        "middle", {
            "test_positions.py::test_rope_turns_a_pair_by_its_position_in_radians":
                "Pair d turns by theta^(-2d/D) a position, the first by 1: is the exponent 2d/D, and negative?",
            "test_positions.py::test_rope_angles_are_float32_even_far_out_and_in_a_bfloat16_model":
                "Far out the angles were rounded: are positions and frequencies float32 throughout?",
            "test_positions.py::test_rope_equals_transformers_bit_for_bit_at_any_position":
                "The last bits differ from transformers', where a frequency is 1 / theta^(2d/D).",
            "test_positions.py::test_yarns_temperature_multiplies_every_score_by_one_over_t":
                "With a scaling of the type yarn, cos and sin are multiplied by the sharpness that `scaled` "
                "returns: is it forgotten?",
            "test_positions.py::test_linear_puts_position_m_where_m_over_s_was":
                "With a scaling the frequencies are those that `scaled` returns: is it forgotten?"},
        ("There is a frequency for each pair of a head, D/2 in all, and an angle for each position and pair.",
         "torch.arange(0, head_dim, 2) / head_dim are the exponents; positions[..., None] times frequencies "
         "the angles; return their cos and sin.")),
    Exercise(
        "rope", "positions.py", "rotate", "rotary positions: scores that depend on the distance alone", 15, "easy", {
            "test_positions.py::test_rope_turns_a_pair_by_its_position_in_radians":
                "(1, 0) must become (cos, sin): are the halves paired, dimension i with i + D/2 as in Hugging "
                "Face, and not neighbours (interleaved) as in the paper, and is the sign of sin the right one?",
            "test_positions.py::test_rope_scores_depend_on_the_distance_only":
                "The score of q at i and k at j must be that of i + 100 and j + 100: is each pair really turned?",
            "test_positions.py::test_rope_keeps_lengths_and_types":
                "A turned vector keeps its length and its type: bfloat16 in, bfloat16 out."},
        ("Cut x into its two halves; x1[i] and x2[i] are the coordinates of a point in the plane.",
         "A point turned by an angle is (x1 cos - x2 sin, x2 cos + x1 sin); join the halves again.")),
    Exercise(
        "attention", "attention.py", "attention", "the formula of attention, with grouped heads and masks", 25,
        "easy", {
            "test_attention.py::test_attention_by_hand":
                "The weights are not those found by hand: are the scores divided by sqrt(D), and is the softmax "
                "over the keys?",
            "test_attention.py::test_query_heads_read_their_group_of_key_value_heads":
                "Head h reads key/value head h // (H / K), so that a group stands together: do you repeat the "
                "heads as a whole, which gives h % K?",
            "test_attention.py::test_attention_equals_torchs":
                "It is not what torch computes: does the mask take out what is False, and keep what is True?",
            "test_attention.py::test_a_query_that_may_look_at_nothing_gets_zeros_and_no_nan_in_gradients":
                "A row of the mask without any True gives softmax nothing but -inf, and so NaN: put zeros there.",
            "test_attention.py::test_one_layer_sees_sinks_and_window_as_a_text_of_their_own":
                "The first `sinks` keys are met by q_sinks instead of q: are they treated as all others?"},
        ("Three lines for the formula; before it the key/value heads are repeated, after it come the rare cases.",
         "repeat_interleave gives each head of k and v to H / K heads of q; masked_fill puts -inf on scores.",
         "Where a query sees nothing, weights.masked_fill(~mask.any(-1, keepdim=True), 0) after the softmax.")),
    Exercise(
        "mask", "attention.py", "Mask.sees", "causal, window, packed documents, prefix, padding: who sees whom", 25,
        "middle", {
            "test_attention.py::test_a_prefix_is_seen_from_before_it_and_the_rest_is_causal":
                "Each token sees itself and what is before it, and a prefix widens that: `or`, not `and`.",
            "test_attention.py::test_a_window_reaches_back_by_its_width_in_each_layer":
                "A window of 4 is a token itself and 3 others: is it one too wide, or one too narrow?",
            "test_attention.py::test_a_mask_means_what_its_rules_say_pair_by_pair":
                "A pair (row, query, key) is seen against the rules. Candidates: a document is a run of equal "
                "numbers, and the same number may come again in another run (compare `begins`, not the numbers); "
                "it is the padded key that nobody sees, not the padded query; in a padded or packed row a prefix "
                "counts real tokens of the document (`place`), not columns; sinks are seen beyond the window."},
        ("Begin with k <= q, then let each rule that is given widen (prefix) or narrow (all others) it.",
         "begins[b, k] is the column in which k's document begins, place[b, k] its number within it.")),
    Exercise(
        "kv-cache", "attention.py", "LayerCache.append", "what is kept of a text, so that it is read once", 10,
        "easy", {
            "test_model.py::test_prefill_in_chunks_equals_one_pass":
                "In chunks it must be as in one pass: are new keys written behind the old ones, is the length "
                "advanced, and are all keys so far returned, not the new ones alone and not the empty rest?",
            "test_model.py::test_the_cache_holds_the_key_value_heads_not_the_query_heads":
                "The keys are not in the cache where they should be: from the old length on.",
            "test_attention.py::test_a_cache_forgets_what_came_after":
                "After truncate() the next tokens are written over what came after: do you count from length?"},
        ("self.k and self.v have room for the longest text; self.length says how much of it is taken.",
         "Write to [:, :, length:length + T], advance length, return everything up to it.")),
    Exercise(
        "sampling", "generation.py", "next_token_logps", "temperature, top-k, top-p, min-p and the penalty, in order",
        30, "middle", {
            "test_generation.py::test_temperature_top_k_and_top_p_by_hand":
                "The probabilities are not those found by hand: are logits divided by the temperature, do "
                "temperature, top_k and top_p come in this order, and is what is left made to add up to one?",
            "test_generation.py::test_of_equal_logits_top_k_keeps_k":
                "Of equal logits top_k keeps k all the same: a threshold by value lets in more.",
            "test_generation.py::test_min_p_keeps_what_has_its_share_of_the_likeliest":
                "min_p is a share of the likeliest token's probability, not a probability.",
            "test_generation.py::test_the_penalty_makes_a_seen_token_less_likely_whatever_the_sign_of_its_logit_"
            "and_comes_before_greed":
                "A negative logit is multiplied by the penalty, as dividing would make the token likelier; and "
                "greedy choice comes after it.",
            "test_generation.py::test_what_is_sampled_from_equals_transformers_warpers":
                "It differs from what transformers samples from: is it the order, or top-p's `nucleus`?",
            "test_generation.py::test_a_model_whose_logits_are_not_finite_is_refused":
                "A row without a finite maximum must raise UserError, and not be drawn from."},
        ("Work on logits until the end: what is out gets -inf, and log_softmax comes last.",
         "topk gives indices as well as values: scatter these into a tensor full of -inf.",
         "min_p: -inf where a logit is below the largest plus log(min_p), as logarithms turn shares into sums.")),
    Exercise(
        "top-p", "generation.py", "nucleus", "nucleus sampling: the fewest tokens whose mass is enough", 20, "middle", {
            "test_generation.py::test_temperature_top_k_and_top_p_by_hand":
                "The token with which the sum reaches top_p belongs to the nucleus, so that one always stays; "
                "and what is kept must be brought from the sorted order back to the tokens' own.",
            "test_generation.py::test_what_is_sampled_from_equals_transformers_warpers":
                "On 2,000 tokens it is wrong: where many are nearly equal, the likeliest 64 are not enough."},
        ("Sort the probabilities, add them up from the largest, and keep what is needed.",
         "A token stays if the mass before it (cumsum minus itself) is still below top_p.",
         "scatter a bool tensor with the order that topk returned, and masked_fill what is not kept.")),
    Exercise(
        "draw", "generation.py", "draw", "how one random number a row becomes a token", 15, "middle", {
            "test_generation.py::test_a_token_without_probability_is_never_drawn_and_the_last_one_can_be":
                "A token of probability 0 was drawn, or one that has some never is: the share must be in (0, 1], "
                "not [0, 1), the sums in float64, and each row needs a random number of its own.",
            "test_generation.py::test_tokens_are_drawn_as_often_as_their_probabilities_say":
                "Tokens do not come as often as they should: has each row a random number of its own?",
            "test_generation.py::test_verify_draws_from_p_whatever_q_is":
                "probs need not add up to one: the share is one of their sum."},
        ("Add up the probabilities of a row; a random share of the whole falls into one token's stretch.",
         "cumsum, 1 - torch.rand (so that 0 cannot come), and torch.searchsorted.")),
    Exercise(
        "verify", "generation.py", "verify", "guesses checked in one pass, and the distribution stays exact", 35, "hard", {
            "test_generation.py::test_verify_draws_from_p_whatever_q_is":
                "What comes out is not distributed as p. A guess holds with probability min(1, p / q); where it "
                "does not, the token comes from max(p - q, 0), not from p, or what q has too much of comes again.",
            "test_generation.py::test_greedy_ids_with_guesses_equal_those_without":
                "After the first guess that does not hold all later ones are void: do you count those that hold "
                "up to there, and add one token from the probabilities at that place?"},
        ("Draw a number for each guess, and find the first that does not hold.",
         "cumprod of the booleans is 1 up to the first failure: its sum is how many hold.",
         "If all hold, the token after the last comes from p[-1]; else from (p - q).clamp(min=0) there.")),
    Exercise(
        "parameters", "costs.py", "parameters_by_part", "where the parameters of a model are", 15, "easy", {
            "test_costs.py::test_llama_7b_has_6738415616_parameters":
                "LLaMA-7B's parts differ: the MLP of SwiGLU has three matrices, each block two norms, and there "
                "is one norm at the end.",
            "test_costs.py::test_parts_are_those_of_the_model":
                "It is not what the model holds: are there fewer key/value heads than query heads, is a tied "
                "head counted once, as the embedding, have biases and the norms of qk_norm been thought of?"},
        ("Go through model.py and write down the shape of each weight.",
         "q and o are C x (heads D); k and v are C x (key/value heads D).")),
    Exercise(
        "rmsnorm", "model.py", "RMSNorm.forward", "the norm of LLaMA, and why it is computed in float32", 10, "easy", {
            "test_model.py::test_rmsnorm_divides_by_the_root_of_the_mean_square":
                "x is divided by the root of the mean square: neither of the sum, nor after the mean was taken "
                "away, as LayerNorm does.",
            "test_model.py::test_rmsnorm_equals_torchs_and_eps_stands_inside_the_root":
                "For small x it is wrong: eps is added to the mean square, inside the root.",
            "test_model.py::test_rmsnorm_statistics_are_float32":
                "In half precision the squares overflow or are rounded: compute in float32, return x's type."},
        ("Square, mean over the last dimension, root, divide, multiply by the weight.",
         "torch.rsqrt(mean + eps), all in x.float(); back to x.dtype before the weight comes.")),
    Exercise(
        "self-attention", "model.py", "Attention.forward", "from the stream to heads and back, with a cache", 25,
        "middle", {
            "test_model.py::test_only_distances_between_positions_matter_to_the_model":
                "Moved as a whole, a text must give the same logits: are queries and keys both turned by rope?",
            "test_model.py::test_prefill_in_chunks_equals_one_pass":
                "In chunks it is not as in one pass: do keys go into the cache already turned, and are those "
                "that come back from it used?",
            "test_model.py::test_logits_equal_those_of_transformers":
                "The logits differ from transformers': (B, T, H D) is seen as (B, T, H, D) and then transposed "
                "to (B, H, T, D), and back before o_proj; q_norm and k_norm come before rope; values are not "
                "turned."},
        ("Project, cut into heads, norm, turn, remember, attend, join the heads, project.",
         "x.view(B, T, -1, head_dim).transpose(1, 2) makes heads; rotate(q, *rope) turns.")),
    # ---- files
    Exercise(
        "safetensors", "checkpoint.py", "write_tensors", "a file of weights that needs no pickle", 30, "middle", {
            "test_checkpoint.py::test_a_file_is_eight_bytes_of_length_a_json_header_and_raw_bytes":
                "The bytes are not those of the format: eight bytes of length, little-endian; a JSON header with "
                "data_offsets [begin, end] counted from behind it; spaces up to a multiple of 8; then the data.",
            "test_checkpoint.py::test_each_tensor_lies_at_a_multiple_of_its_width":
                "A tensor begins where its type may not: `write_order` puts the widest first, header and data.",
            "test_checkpoint.py::test_what_is_written_is_read_back_bit_for_bit":
                "Not all comes back: metadata under __metadata__, names in any language (UTF-8), empty shapes.",
            "test_checkpoint.py::test_the_safetensors_package_reads_what_we_write":
                "The safetensors package cannot read it.",
            "test_checkpoint.py::test_one_tensor_at_a_time_is_in_memory":
                "Values were asked for before their turn: the header needs .shape and .dtype alone."},
        ("First the header, for which shapes and types are enough; then the raw bytes in the same order.",
         "len(text).to_bytes(8, \"little\"); raw_bytes() gives a tensor's bytes; open_whole writes whole files.")),
    # ---- clean text
    Exercise(
        "union-find", "dedup.py", "Clusters.join", "joining what belongs together, however indirectly", 10, "easy", {
            "test_dedup.py::test_whoever_is_joined_however_indirectly_has_one_root_the_smallest_index":
                "The roots are wrong: it is the two roots that are joined, not i and j themselves, and the "
                "smaller index becomes the root of the other."},
        ("A cluster is a tree; its root stands for it, and is its own parent.",
         "find() both roots; the greater one's parent becomes the smaller one.")),
    Exercise(
        "minhash", "dedup.py", "smallest", "signatures in which equality estimates similarity", 30, "hard", {
            "test_dedup.py::test_estimates_lie_within_the_error_of_the_theory_as_datasketch_s_do":
                "The share of equal columns must estimate the Jaccard similarity: is it biased, as hashes of few "
                "bits tie, or are the columns not independent, as functions are alike?",
            "test_dedup.py::test_empty_documents_absorb_nothing":
                "A text without n-grams has 2^32 - 1 throughout, and is similar to nobody: reduceat takes a "
                "neighbour's hash for a text without any.",
            "test_dedup.py::test_signatures_are_uint32_and_a_function_of_text_and_seed_alone":
                "The signatures are not (texts, functions) of uint32, or depend on the texts beside."},
        ("For one function: hash all n-grams, and take the minimum of each text's stretch.",
         "np.minimum.reduceat(values, starts) does so, where starts are cumsum(counts) - counts.",
         "reduceat misreads empty stretches: leave texts of count 0 out, they keep 2^32 - 1.")),
    Exercise(
        "lsh-chance", "dedup.py", "candidate_chance", "what bands and rows do to who is compared", 5, "easy", {
            "test_dedup.py::test_the_curve_is_that_of_fourteen_bands_of_eight":
                "At 0.8 it must be 92.4 %: a band agrees if all its rows do, and one band that agrees is enough: "
                "are bands and rows swapped, or is it the chance that all agree, or that none does?"},
        ("r rows agree with s^r. What is the chance that no band of b does?",
         "1 - (1 - s^r)^b, with r = num_hashes // bands.")),
    Exercise(
        "find-pii", "privacy.py", "find_pii", "finds that overlap, of which one counts", 15, "easy", {
            "test_privacy.py::test_overlapping_finds_count_once":
                "Of two finds that overlap the earlier counts, or of two that begin together the longer: are "
                "both kept, or the shorter?",
            "test_privacy.py::test_masking_twice_equals_masking_once":
                "Masked text was masked again, or finds were not in order: are they sorted by their start?",
            "test_privacy.py::test_each_kind_has_its_placeholder_and_its_count":
                "Not every kind is found: ask keys, emails, numbers and ipv6, and keep what stands side by side."},
        ("Collect the finds of all four detectors, sort them, and go through them once.",
         "Sort by (start, -end); keep a find if it starts at or behind the end of the last that was kept.")),
    # ---- batches and conversations
    Exercise(
        "epoch-order", "batches.py", "Batches.order", "an order that a restart and other processes find again", 10,
        "easy", {
            "test_data.py::test_a_batch_is_a_function_of_seed_and_step_alone":
                "A batch must follow from (seed, step): has each epoch its own order, does the seed matter, and "
                "is a generator made anew, so that earlier calls change nothing?",
            "test_data.py::test_every_token_but_the_first_is_a_target_once_an_epoch":
                "Some windows come twice in an epoch and others never: permute, draw without replacement.",
            "test_data.py::test_no_epoch_of_one_seed_has_the_order_of_an_epoch_of_another":
                "Epoch 1 of seed 0 has the order of epoch 0 of seed 1: are seed and epoch added?"},
        ("Make a generator from the seed and the epoch, and let it permute the numbers of the windows.",
         "np.random.PCG64 takes a list: [seed, epoch] is a seed of its own for each pair.")),
    Exercise(
        "windows", "batches.py", "Batches.stack", "inputs, targets shifted by one, and the last window", 20, "easy", {
            "test_data.py::test_windows_of_four_from_ten_tokens_by_hand":
                "A target is the token one further on: are targets shifted by one, neither by none nor by two? "
                "The last window is filled up with end-of-text, whose targets are -100.",
            "test_data.py::test_overlapping_windows_make_every_token_a_target_once_after_enough_others":
                "With a stride windows overlap: window w begins at w * stride, and what the window before has "
                "had as a target is -100, so that each token counts once.",
            "test_data.py::test_every_token_but_the_first_is_a_target_once_an_epoch":
                "A token is lost, or counts twice: is the last window there, and one token more than T read?"},
        ("Fill inputs with end-of-text and targets with -100, then write over them what there is.",
         "Read T + 1 tokens from w * stride: all but the last are inputs, all but the first targets.",
         "In every window but number 0 the first T - stride targets are -100 again.")),
    Exercise(
        "render", "chat.py", "render", "a conversation as tokens, and which of them are learnt", 25, "middle", {
            "test_chat.py::test_a_conversation_in_chatml_by_hand":
                "Learnt are a reply and its end token, nothing else: is the prompt learnt too, is the end token "
                "left out, or the mask shifted?",
            "test_chat.py::test_what_a_reply_is_asked_for_with_is_what_it_is_trained_after":
                "What a reply is asked for with must be an exact prefix of the whole: is the header encoded "
                "together with the reply, or add_generation_prompt not passed on?",
            "test_chat.py::test_what_is_no_conversation_is_refused_in_one_line":
                "Messages that are no conversation must raise UserError: is check_messages called?",
            "test_chat.py::test_transformers_gives_the_same_ids_and_the_same_mask":
                "transformers gives other ids: pieces that are learnt alike, or not learnt, are encoded together, "
                "each on its own only where that changes."},
        ("`pieces` yields (text, tokens that it may spell, learnt); `encode` turns a run of them into ids.",
         "itertools.groupby over the pieces by whether they are learnt gives the runs.")),
    # ---- training
    Exercise(
        "next-token-loss", "objectives.py", "next_token_loss", "the loss of pretraining: a sum and a count", 20,
        "middle", {
            "test_train.py::test_the_loss_is_a_sum_over_the_targets_that_count_and_their_number":
                "A sum over the targets that are not -100, and their number: is it a mean, is -100 counted, are "
                "the targets (which are shifted already) shifted again?",
            "test_train.py::test_passing_over_tokens_without_loss_changes_neither_the_loss_nor_a_gradient":
                "sparse must change neither loss nor gradient: are hidden states and targets both filtered?",
            "test_objectives.py::test_the_loss_is_that_of_the_suffix_given_the_prefix":
                "A batch may bring a third thing, the mask of who sees whom: is it passed on?",
            "test_train.py::test_a_micro_batch_without_any_target_adds_exactly_nothing":
                "Without a single target the sum must be exactly 0, not NaN."},
        ("model.model gives hidden states; the head and the loss come from linear_cross_entropy.",
         "(*batch, None)[:3] takes two or three things apart; flatten(0, 1) joins rows and columns.")),
    Exercise(
        "cross-entropy", "objectives.py", "rows_loss", "loss and gradient of softmax, by hand", 35, "hard", {
            "test_train.py::test_the_loss_that_holds_no_logits_equals_the_plain_one_and_so_do_its_gradients":
                "It is not torch's cross-entropy. The loss of a row is log sum exp minus the target's logit, its "
                "gradient softmax - onehot; both are 0 where the target is -100, and nothing is averaged.",
            "test_train.py::test_large_logits_give_no_infinity":
                "exp of a large logit overflows: take the row's largest away first, and add it again.",
            "test_train.py::test_a_micro_batch_without_any_target_adds_exactly_nothing":
                "Rows without a target add nothing: neither loss nor gradient."},
        ("First without group: the largest logit, the target's logit, the sum of exponentials.",
         "A target of -100 cannot be gathered: clamp it into range, and multiply by `valid` afterwards.",
         "With a group the three are all_reduced: MAX for the largest, sums for the others.")),
    Exercise(
        "fim", "objectives.py", "FillInTheMiddle.rearranged", "fill in the middle: pieces cut and put in order", 35,
        "hard", {
            "test_objectives.py::test_at_rate_0_nothing_changes":
                "At rate 0 a window must stay as it is, with its end-of-text.",
            "test_objectives.py::test_what_does_not_fit_is_lost_at_the_end_of_the_text":
                "Three sentinels and end-of-text need room for 4 ids: the text must be shortened, so that the end "
                "of the middle is not cut off.",
            "test_objectives.py::test_a_window_without_room_for_a_piece_keeps_it_as_it_is":
                "Without room for a single id of text, a piece stays as it is, cut to the window's size.",
            "test_objectives.py::test_a_window_that_becomes_too_short_is_filled_up_without_targets":
                "A rearranged piece ends with one end-of-text: is it missing, or twice there, within the text?",
            "test_objectives.py::test_undone_every_piece_gives_its_text_back_byte_for_byte":
                "Put in order again, the pieces are not the text: is one lost, or more than `size` returned?",
            "test_objectives.py::test_the_shares_are_those_asked_for":
                "The share of rearranged pieces is not `rate`, that of SPM among them not spm_rate: is there a "
                "draw for each piece?"},
        ("Go through `pieces`; what is rearranged is a piece's text, without its end-of-text.",
         "parts() cuts, shortened() makes them fit, arrange() puts them in order with the sentinels.",
         "room is size - len(result) - 4; draw `generator.random() < rate` only where there is text and room.")),
    Exercise(
        "muon", "optim.py", "orthogonalize", "all singular values near one, by matrix products alone", 20, "middle", {
            "test_optim.py::test_the_size_of_the_gradient_does_not_matter":
                "The iteration converges for singular values up to 1: is the matrix divided by its norm first?",
            "test_optim.py::test_a_batch_equals_its_matrices_one_at_a_time":
                "A matrix must not feel its neighbours: has each matrix a norm of its own?",
            "test_optim.py::test_singular_values_go_through_the_polynomial_and_singular_vectors_stay":
                "Singular values must go through a s + b s^3 + c s^5, `steps` times: is gram @ gram a product of "
                "matrices, and are a, b, c in their places?",
            "test_optim.py::test_zeros_give_zeros_and_do_not_harm_their_neighbours":
                "A matrix of zeros has the norm 0: divide by a little more.",
            "test_optim.py::test_the_direction_equals_torchs":
                "It is not torch's direction: is a tall matrix transposed before and after?"},
        ("x xᵀ has the squares of the singular values; a polynomial of it times x changes them alone.",
         "gram = x @ x.mT; x = a x + (b gram + c gram gram) x; five times.")),
    Exercise(
        "learning-rate", "optim.py", "learning_rate", "warm-up and four ways down", 25, "easy", {
            "test_optim.py::test_the_rate_rises_linearly_to_the_peak_and_then_never_again":
                "The warm-up goes from peak / (warmup_steps + 1) at step 0 to the peak at step warmup_steps: is "
                "it one step off, and the first step made with rate 0?",
            "test_optim.py::test_the_step_after_the_last_would_have_the_final_rate_and_no_step_has_none":
                "Step `steps`, the first that is not made, would have final_lr x peak: does the last step have "
                "it already, and so perhaps none?",
            "test_optim.py::test_linear_is_a_line":
                "The line must end at final_lr: it is no floor under a line to zero, but where the line ends.",
            "test_optim.py::test_cosine_is_half_a_wave":
                "(1 + cos(pi done)) / 2 goes from 1 to 0: is it half a wave?",
            "test_optim.py::test_wsd_stays_level_and_falls_in_a_line_over_the_last_share":
                "wsd stays at the peak until the last decay_share of all steps.",
            "test_optim.py::test_inverse_sqrt_is_vaswanis_where_it_need_not_be_stretched":
                "inverse_sqrt counts steps from 1, and is stretched to end where the others do."},
        ("First the warm-up; then how much of the way down is done, from 0 to 1.",
         "Let each schedule give a height from 1 to 0, and return peak (final + (1 - final) height).")),
    Exercise(
        "update", "train.py", "update", "one step from many micro-batches: the mean over all targets", 40, "hard", {
            "test_train.py::test_accumulating_micro_batches_equals_one_batch_although_their_targets_differ_in_number":
                "Micro-batches must give what one batch gives: is the mean taken of each micro-batch (a mean of "
                "means), instead of once over all targets?",
            "test_train.py::test_the_gradient_norm_is_global_and_clipped_once_after_accumulation":
                "Clip once, by the global norm, after all was added up and divided: is it clipped before?",
            "test_train.py::test_a_loss_that_is_not_finite_stops_before_any_weight_is_touched":
                "A loss that is not finite must stop the step before a weight moves: is refuse_bad asked first?",
            "test_train.py::test_a_loss_scale_changes_neither_norm_nor_update":
                "The scale of fp16 must be divided out again before clipping.",
            "test_train.py::test_with_a_loss_scale_an_overflow_skips_the_step_and_lowers_the_scale":
                "An overflow skips the step, and tells the scaler.",
            "test_train.py::test_the_loop_overfits_three_batches":
                "It does not learn: are old gradients zeroed first, and each group's rate set to lr x lr_scale?"},
        ("Zero the gradients; backward for each micro-batch's sum; divide by the count; clip; step.",
         "Totals adds up what losses return; over_all() gives sum, count and figures of all processes.",
         "torch averages gradients over processes: so multiply by env.data_world_size / count (/ scale).")),
)
