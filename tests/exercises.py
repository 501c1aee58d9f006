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
    tests: dict[str, str]  # {"test_positions.py::test_name": what its failure suggests}, most telling first
    hints: tuple[str, ...]  # of exercise.py hint: from vague to nearly the answer


EXERCISES: tuple[Exercise, ...] = (
    # ---- settings and tokens
    Exercise(
        "train-bpe", "bpe.py", "train_plain",
        "which pair a tokenizer merges next, and what a tie is", 20, "easy", {
            "test_bpe.py::test_ties_go_to_the_greatest_pair_of_bytes":
                "Of equally frequent pairs the greatest in the order of bytes must win: is a tie left to "
                "who is seen first, does the smallest win, or are words not merged by each new pair before "
                "the next?",
            "test_bpe.py::test_overlapping_pairs_count_twice_in_both_trainers":
                "A word counts as often as it occurs, and in aaaa the pair (a, a) counts three times: do you "
                "count each word once, or each pair once a word?",
            "test_bpe.py::test_the_first_merges_by_hand":
                "The merges are not those found by hand: are the words merged by each new pair before the "
                "next is counted?"},
        ("Count the pairs of neighbours of all words, join the most frequent everywhere, and begin again.",
         "A Counter over pairwise(word) for every word counts pairs; max() takes a key.",
         "The key (count, pair) decides ties too; stop when 256 + merges + special tokens are vocab_size.")),
    Exercise(
        "merge", "bpe.py", "merge", "how byte-pair encoding replaces a pair by its new token", 10, "easy", {
            "test_bpe.py::test_merging_goes_from_left_to_right_without_overlap":
                "In a run of equal ones, a a a must become aa a: do you merge from the left, go on behind "
                "what was merged, and merge all there is?"},
        ("Walk through the word with an index, and write what you find to a new list.",
         "Where this symbol and the next are the pair, write them joined and go on two further, else one.")),
    Exercise(
        "merge-ids", "bpe.py", "merge_ids",
        "in which order the merges of a vocabulary are made", 25, "middle", {
            "test_bpe.py::test_encoding_makes_the_earliest_merge_first":
                "Of all merges that could be made the one of the lowest rank, learned first, comes first, "
                "and of its places the leftmost; and after it the ranks of both neighbours are looked up "
                "anew, until none is left.",
            "test_bpe.py::test_encoding_equals_replaying_the_merges_one_after_the_other":
                "The ids are not those of replaying all merges: after a merge both neighbours stand beside "
                "another id: do you look up the rank on the left and on the right anew, and go on until none "
                "is left?"},
        ("Look up the rank of every pair of neighbours, make the lowest, and look again.",
         "results[rank] is the id that takes the place of both; a pair that is not in ranks cannot be "
         "merged.")),
    Exercise(
        "decode-stream", "bpe.py", "Tokenizer.decode_stream",
        "why a stream waits before it shows a character",
        10, "easy", {
            "test_bpe.py::test_streamed_text_never_shows_half_a_character":
                "An id may end within a character: is half of one shown as a replacement character, instead "
                "of waiting for its rest?",
            "test_bpe.py::test_streamed_text_is_that_of_decode_even_for_bytes_that_are_no_text":
                "Bytes that are no UTF-8 become replacement characters, also where the stream ends within a "
                "character: are they ignored, or is the end forgotten?",
            "test_bpe.py::test_streamed_text_comes_with_the_id_that_completes_it":
                "The text must come as the ids do: do you wait for all of them before you yield anything?"},
        ("One id's bytes may be part of a character, so decoding id by id cannot be right.",
         "codecs.getincrementaldecoder makes a decoder that keeps what is not complete.",
         "At the end decode(b\"\", final=True) gives what is left; empty pieces are not yielded.")),
    # ---- the model, and its adapters
    Exercise(
        "rope-angles", "positions.py", "rope_angles",
        "how fast each pair of a head turns with the position", 15,
        "middle", {
            "test_positions.py::test_rope_turns_a_pair_by_its_position_in_radians":
                "Pair d turns by theta^(-2d/D) a position, the first by 1: is the exponent 2d/D, and "
                "negative?",
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
        "rope", "positions.py", "rotate",
        "rotary positions: scores that depend on the distance alone", 15, "easy", {
            "test_positions.py::test_rope_turns_a_pair_by_its_position_in_radians":
                "(1, 0) must become (cos, sin): are the halves paired, dimension i with i + D/2 as in "
                "Hugging Face, and not neighbours (interleaved) as in the paper, and is the sign of sin the "
                "right one?",
            "test_positions.py::test_rope_scores_depend_on_the_distance_only":
                "The score of q at i and k at j must be that of i + 100 and j + 100: is each pair really "
                "turned?",
            "test_positions.py::test_rope_keeps_lengths_and_types":
                "A turned vector keeps its length and its type: bfloat16 in, bfloat16 out."},
        ("Cut x into its two halves; x1[i] and x2[i] are the coordinates of a point in the plane.",
         "A point turned by an angle is (x1 cos - x2 sin, x2 cos + x1 sin); join the halves again.")),
    Exercise(
        "attention", "attention.py", "attention",
        "the formula of attention, with grouped heads and masks", 25,
        "easy", {
            "test_attention.py::test_attention_by_hand":
                "The weights are not those found by hand: are the scores divided by sqrt(D), and is the "
                "softmax over the keys?",
            "test_attention.py::test_query_heads_read_their_group_of_key_value_heads":
                "Head h reads key/value head h // (H / K), so that a group stands together: do you repeat "
                "the heads as a whole, which gives h % K?",
            "test_attention.py::test_attention_equals_torchs":
                "It is not what torch computes: does the mask take out what is False, and keep what is True?",
            "test_attention.py::test_a_query_that_may_look_at_nothing_gets_zeros_and_no_nan_in_gradients":
                "A row of the mask without any True gives softmax nothing but -inf, and so NaN: put zeros "
                "there.",
            "test_attention.py::test_one_layer_sees_sinks_and_window_as_a_text_of_their_own":
                "The first `sinks` keys are met by q_sinks instead of q: are they treated as all others?"},
        ("Three lines for the formula; before it the key/value heads are repeated, after it come the rare "
         "cases.",
         "repeat_interleave gives each head of k and v to H / K heads of q; masked_fill puts -inf on scores.",
         "Where a query sees nothing, weights.masked_fill(~mask.any(-1, keepdim=True), 0) after the "
         "softmax.")),
    Exercise(
        "mask", "attention.py", "Mask.sees",
        "causal, window, packed documents, prefix, padding: who sees whom", 25,
        "middle", {
            "test_attention.py::test_a_prefix_is_seen_from_before_it_and_the_rest_is_causal":
                "Each token sees itself and what is before it, and a prefix widens that: `or`, not `and`.",
            "test_attention.py::test_a_window_reaches_back_by_its_width_in_each_layer":
                "A window of 4 is a token itself and 3 others: is it one too wide, or one too narrow?",
            "test_attention.py::test_a_mask_means_what_its_rules_say_pair_by_pair":
                "A pair (row, query, key) is seen against the rules. Candidates: a document is a run of "
                "equal numbers, and the same number may come again in another run (compare `begins`, not "
                "the numbers); it is the padded key that nobody sees, not the padded query; in a padded or "
                "packed row a prefix counts real tokens of the document (`place`), not columns; sinks are "
                "seen beyond the window."},
        ("Begin with k <= q, then let each rule that is given widen (prefix) or narrow (all others) it.",
         "begins[b, k] is the column in which k's document begins, place[b, k] its number within it.")),
    Exercise(
        "kv-cache", "attention.py", "LayerCache.append",
        "what is kept of a text, so that it is read once", 10,
        "easy", {
            "test_model.py::test_prefill_in_chunks_equals_one_pass":
                "In chunks it must be as in one pass: are new keys written behind the old ones, is the "
                "length advanced, and are all keys so far returned, not the new ones alone and not the "
                "empty rest?",
            "test_model.py::test_the_cache_holds_the_key_value_heads_not_the_query_heads":
                "The keys are not in the cache where they should be: from the old length on.",
            "test_attention.py::test_a_cache_forgets_what_came_after":
                "After truncate() the next tokens are written over what came after: do you count from "
                "length?"},
        ("self.k and self.v have room for the longest text; self.length says how much of it is taken.",
         "Write to [:, :, length:length + T], advance length, return everything up to it.")),
    Exercise(
        "sampling", "generation.py", "next_token_logps",
        "temperature, top-k, top-p, min-p and the penalty, in order",
        30, "middle", {
            "test_generation.py::test_temperature_top_k_and_top_p_by_hand":
                "The probabilities are not those found by hand: are logits divided by the temperature, do "
                "temperature, top_k and top_p come in this order, and is what is left made to add up to one?",
            "test_generation.py::test_of_equal_logits_top_k_keeps_k":
                "Of equal logits top_k keeps k all the same: a threshold by value lets in more.",
            "test_generation.py::test_min_p_keeps_what_has_its_share_of_the_likeliest":
                "min_p is a share of the likeliest token's probability, not a probability.",
            "test_generation.py::test_the_penalty_makes_a_seen_token_less_likely_whatever_the_sign_of_its"
            "_logit_and_comes_before_greed":
                "A negative logit is multiplied by the penalty, as dividing would make the token likelier; "
                "and greedy choice comes after it.",
            "test_generation.py::test_what_is_sampled_from_equals_transformers_warpers":
                "It differs from what transformers samples from: is it the order, or top-p's `nucleus`?",
            "test_generation.py::test_a_model_whose_logits_are_not_finite_is_refused":
                "A row without a finite maximum must raise UserError, and not be drawn from."},
        ("Work on logits until the end: what is out gets -inf, and log_softmax comes last.",
         "topk gives indices as well as values: scatter these into a tensor full of -inf.",
         "min_p: -inf where a logit is below the largest plus log(min_p), as logarithms turn shares into "
         "sums.")),
    Exercise(
        "top-p", "generation.py", "nucleus",
        "nucleus sampling: the fewest tokens whose mass is enough", 20, "middle", {
            "test_generation.py::test_temperature_top_k_and_top_p_by_hand":
                "The token with which the sum reaches top_p belongs to the nucleus, so that one always "
                "stays; and what is kept must be brought from the sorted order back to the tokens' own.",
            "test_generation.py::test_what_is_sampled_from_equals_transformers_warpers":
                "On 2,000 tokens it is wrong: where many are nearly equal, the likeliest 64 are not enough."},
        ("Sort the probabilities, add them up from the largest, and keep what is needed.",
         "A token stays if the mass before it (cumsum minus itself) is still below top_p.",
         "scatter a bool tensor with the order that topk returned, and masked_fill what is not kept.")),
    Exercise(
        "draw", "generation.py", "draw", "how one random number a row becomes a token", 15, "middle", {
            "test_generation.py::test_a_token_without_probability_is_never_drawn_and_the_last_one_can_be":
                "A token of probability 0 was drawn, or one that has some never is: the share must be in "
                "(0, 1], not [0, 1), the sums in float64, and each row needs a random number of its own.",
            "test_generation.py::test_tokens_are_drawn_as_often_as_their_probabilities_say":
                "Tokens do not come as often as they should: has each row a random number of its own?",
            "test_generation.py::test_verify_draws_from_p_whatever_q_is":
                "probs need not add up to one: the share is one of their sum."},
        ("Add up the probabilities of a row; a random share of the whole falls into one token's stretch.",
         "cumsum, 1 - torch.rand (so that 0 cannot come), and torch.searchsorted.")),
    Exercise(
        "verify", "generation.py", "verify",
        "guesses checked in one pass, and the distribution stays exact", 35, "hard", {
            "test_generation.py::test_verify_draws_from_p_whatever_q_is":
                "What comes out is not distributed as p. A guess holds with probability min(1, p / q); "
                "where it does not, the token comes from max(p - q, 0), not from p, or what q has too much "
                "of comes again.",
            "test_generation.py::test_greedy_ids_with_guesses_equal_those_without":
                "After the first guess that does not hold all later ones are void: do you count those that "
                "hold up to there, and add one token from the probabilities at that place?"},
        ("Draw a number for each guess, and find the first that does not hold.",
         "cumprod of the booleans is 1 up to the first failure: its sum is how many hold.",
         "If all hold, the token after the last comes from p[-1]; else from (p - q).clamp(min=0) there.")),
    Exercise(
        "parameters", "costs.py", "parameters_by_part", "where the parameters of a model are", 15, "easy", {
            "test_costs.py::test_llama_7b_has_6738415616_parameters":
                "LLaMA-7B's parts differ: the MLP of SwiGLU has three matrices, each block two norms, and "
                "there is one norm at the end.",
            "test_costs.py::test_parts_are_those_of_the_model":
                "It is not what the model holds: are there fewer key/value heads than query heads, is a tied "
                "head counted once, as the embedding, have biases and the norms of qk_norm been thought of?"},
        ("Go through model.py and write down the shape of each weight.",
         "q and o are C x (heads D); k and v are C x (key/value heads D).")),
    Exercise(
        "rmsnorm", "model.py", "RMSNorm.forward",
        "the norm of LLaMA, and why it is computed in float32", 10, "easy", {
            "test_model.py::test_rmsnorm_divides_by_the_root_of_the_mean_square":
                "x is divided by the root of the mean square: neither of the sum, nor after the mean was "
                "taken away, as LayerNorm does.",
            "test_model.py::test_rmsnorm_equals_torchs_and_eps_stands_inside_the_root":
                "For small x it is wrong: eps is added to the mean square, inside the root.",
            "test_model.py::test_rmsnorm_statistics_are_float32":
                "In half precision the squares overflow or are rounded: compute in float32, return x's "
                "type."},
        ("Square, mean over the last dimension, root, divide, multiply by the weight.",
         "torch.rsqrt(mean + eps), all in x.float(); back to x.dtype before the weight comes.")),
    Exercise(
        "self-attention", "model.py", "Attention.forward",
        "from the stream to heads and back, with a cache", 25,
        "middle", {
            "test_model.py::test_only_distances_between_positions_matter_to_the_model":
                "Moved as a whole, a text must give the same logits: are queries and keys both turned by "
                "rope, and values not?",
            "test_model.py::test_prefill_in_chunks_equals_one_pass":
                "In chunks it is not as in one pass: do keys go into the cache already turned, and are "
                "those that come back from it used? Are heads transposed to (B, T, H, D) again, back before "
                "o_proj?",
            "test_model.py::test_logits_equal_those_of_transformers":
                "The logits differ from transformers': (B, T, H D) is seen as (B, T, H, D) and then "
                "transposed to (B, H, T, D), and back; q_norm and k_norm come before rope."},
        ("Project, cut into heads, norm, turn, remember, attend, join the heads, project.",
         "x.view(B, T, -1, head_dim).transpose(1, 2) makes heads; rotate(q, *rope) turns.")),
    Exercise(
        "safetensors", "tensor_files.py", "write_tensors",
        "a file of weights that needs no pickle", 30, "middle", {
            "test_checkpoint.py::test_a_file_is_eight_bytes_of_length_a_json_header_and_raw_bytes":
                "The bytes are not those of the format: eight bytes of length, little-endian; a JSON header "
                "with data_offsets [begin, end] counted from behind it; spaces up to a multiple of 8; then "
                "the data.",
            "test_checkpoint.py::test_each_tensor_lies_at_a_multiple_of_its_width":
                "A tensor begins where its type may not: `write_order` puts the widest first, header and "
                "data; and data_offsets are [begin, end], not begin and size.",
            "test_checkpoint.py::test_what_is_written_is_read_back_bit_for_bit":
                "Not all comes back: metadata under __metadata__, names in any language (UTF-8), empty "
                "shapes.",
            "test_checkpoint.py::test_the_safetensors_package_reads_what_we_write":
                "The safetensors package cannot read it.",
            "test_checkpoint.py::test_one_tensor_at_a_time_is_in_memory":
                "Values were asked for before their turn: the header needs .shape and .dtype alone."},
        ("First the header, for which shapes and types are enough; then the raw bytes in the same order.",
         "len(text).to_bytes(8, \"little\"); raw_bytes() gives a tensor's bytes; open_whole writes whole "
         "files.")),
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
    # ---- data and conversations
    Exercise(
        "union-find", "dedup.py", "Clusters.join",
        "joining what belongs together, however indirectly", 10, "easy", {
            "test_dedup.py::test_whoever_is_joined_however_indirectly_has_one_root_the_smallest_index":
                "The roots are wrong: it is the two roots that are joined, not i and j themselves, and the "
                "smaller index becomes the root of the other."},
        ("A cluster is a tree; its root stands for it, and is its own parent.",
         "find() both roots; the greater one's parent becomes the smaller one.")),
    Exercise(
        "minhash", "dedup.py", "smallest", "signatures in which equality estimates similarity", 30, "hard", {
            "test_dedup.py::test_signatures_are_uint32_and_a_function_of_text_and_seed_alone":
                "The signatures are not (texts, functions) of uint32, or depend on the texts beside.",
            "test_dedup.py::test_estimates_lie_within_the_error_of_the_theory_as_datasketch_s_do":
                "The share of equal columns must estimate the Jaccard similarity: is it biased, as hashes "
                "of few bits tie, or are the columns not independent, as functions are alike?",
            "test_dedup.py::test_empty_documents_absorb_nothing":
                "A text without n-grams has 2^32 - 1 throughout, and is similar to nobody: reduceat takes a "
                "neighbour's hash for a text without any."},
        ("For one function: hash all n-grams, and take the minimum of each text's stretch.",
         "np.minimum.reduceat(values, starts) does so, where starts are cumsum(counts) - counts.",
         "reduceat misreads empty stretches: leave texts of count 0 out, they keep 2^32 - 1.")),
    Exercise(
        "lsh-chance", "dedup.py", "candidate_chance",
        "what bands and rows do to who is compared", 5, "easy", {
            "test_dedup.py::test_the_curve_is_that_of_fourteen_bands_of_eight":
                "At 0.8 it must be 92.4 %: a band agrees if all its rows do, and one band that agrees is "
                "enough: are bands and rows swapped, or is it the chance that all agree, or that none does?"},
        ("r rows agree with s^r. What is the chance that no band of b does?",
         "1 - (1 - s^r)^b, with r = num_hashes // bands.")),
    Exercise(
        "find-pii", "privacy.py", "find_pii", "finds that overlap, of which one counts", 15, "easy", {
            "test_privacy.py::test_overlapping_finds_count_once":
                "Of two finds that overlap the earlier counts, or of two that begin together the longer: "
                "are both kept, or the shorter? Are finds sorted, and all of keys, emails, numbers and ipv6 "
                "asked?",
            "test_privacy.py::test_masking_twice_equals_masking_once":
                "Masked text was masked again, or finds were not in order: are they sorted by their start?",
            "test_privacy.py::test_each_kind_has_its_placeholder_and_its_count":
                "Not every kind is found: ask keys, emails, numbers and ipv6, and keep what stands side by "
                "side."},
        ("Collect the finds of all four detectors, sort them, and go through them once.",
         "Sort by (start, -end); keep a find if it starts at or behind the end of the last that was kept.")),
    Exercise(
        "epoch-order", "batches.py", "Batches.order",
        "an order that a restart and other processes find again", 10,
        "easy", {
            "test_data.py::test_a_batch_is_a_function_of_seed_and_step_alone":
                "A batch must follow from (seed, step): has each epoch its own order, does the seed matter, "
                "and is a generator made anew, so that earlier calls change nothing?",
            "test_data.py::test_every_token_but_the_first_is_a_target_once_an_epoch":
                "Some windows come twice in an epoch and others never: permute, draw without replacement.",
            "test_data.py::test_no_epoch_of_one_seed_has_the_order_of_an_epoch_of_another":
                "Epoch 1 of seed 0 has the order of epoch 0 of seed 1: are seed and epoch added?"},
        ("Make a generator from the seed and the epoch, and let it permute the numbers of the windows.",
         "np.random.PCG64 takes a list: [seed, epoch] is a seed of its own for each pair.")),
    Exercise(
        "windows", "batches.py", "Batches.stack",
        "inputs, targets shifted by one, and the last window", 20, "easy", {
            "test_data.py::test_windows_of_four_from_ten_tokens_by_hand":
                "A target is the token one further on: are targets shifted by one, neither by none nor by "
                "two? The last window is filled up with end-of-text, whose targets are -100.",
            "test_data.py::test_overlapping_windows_make_every_token_a_target_once_after_enough_others":
                "With a stride windows overlap: window w begins at w * stride, and what the window before "
                "has had as a target is -100, so that each token counts once.",
            "test_data.py::test_every_token_but_the_first_is_a_target_once_an_epoch":
                "A token is lost, or counts twice: is the last window there, and one token more than T "
                "read?"},
        ("Fill inputs with end-of-text and targets with -100, then write over them what there is.",
         "Read T + 1 tokens from w * stride: all but the last are inputs, all but the first targets.",
         "In every window but number 0 the first T - stride targets are -100 again.")),
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
    Exercise(
        "render", "chat.py", "render",
        "a conversation as tokens, and which of them are learnt", 25, "middle", {
            "test_chat.py::test_a_conversation_in_chatml_by_hand":
                "Learnt are a reply and its end token, nothing else: is the prompt learnt too, is the end "
                "token left out, or the mask shifted?",
            "test_chat.py::test_what_a_reply_is_asked_for_with_is_what_it_is_trained_after":
                "What a reply is asked for with must be an exact prefix of the whole: is the header encoded "
                "together with the reply, or add_generation_prompt not passed on?",
            "test_chat.py::test_what_is_no_conversation_is_refused_in_one_line":
                "Messages that are no conversation must raise UserError: is check_messages called?",
            "test_chat.py::test_each_template_writes_its_form_and_learns_replies_with_their_end":
                "A template's text or its replies are wrong: is the template passed on to `pieces`?"},
        ("`pieces` yields (text, tokens that it may spell, learnt); `encode` turns a run of them into ids.",
         "itertools.groupby over the pieces by whether they are learnt gives the runs.")),
    # ---- pretraining
    Exercise(
        "next-token-loss", "objectives.py", "next_token_loss",
        "the loss of pretraining: a sum and a count", 20,
        "middle", {
            "test_train.py::test_the_loss_is_a_sum_over_the_targets_that_count_and_their_number":
                "A sum over the targets that are not -100, and their number: is it a mean, is -100 counted, "
                "are the targets (which are shifted already) shifted again?",
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
                "It is not torch's cross-entropy. The loss of a row is log sum exp minus the target's "
                "logit, its gradient softmax - onehot; both are 0 where the target is -100, and nothing is "
                "averaged.",
            "test_train.py::test_large_logits_give_no_infinity":
                "exp of a large logit overflows: take the row's largest away first, and add it again.",
            "test_train.py::test_a_micro_batch_without_any_target_adds_exactly_nothing":
                "Rows without a target add nothing: neither loss nor gradient."},
        ("First without group: the largest logit, the target's logit, the sum of exponentials.",
         "A target of -100 cannot be gathered: clamp it into range, and multiply by `valid` afterwards.",
         "With a group the three are all_reduced: MAX for the largest, sums for the others.")),
    Exercise(
        "fim", "objectives.py", "FillInTheMiddle.rearranged",
        "fill in the middle: pieces cut and put in order", 35,
        "hard", {
            "test_objectives.py::test_at_rate_0_nothing_changes":
                "At rate 0 a window must stay as it is, with its end-of-text.",
            "test_objectives.py::test_what_does_not_fit_is_lost_at_the_end_of_the_text":
                "Three sentinels and end-of-text need room for 4 ids: the text must be shortened, so that "
                "the end of the middle is not cut off.",
            "test_objectives.py::test_a_window_without_room_for_a_piece_keeps_it_as_it_is":
                "Without room for a single id of text, a piece stays as it is, cut to the window's size.",
            "test_objectives.py::test_a_window_that_becomes_too_short_is_filled_up_without_targets":
                "A rearranged piece ends with one end-of-text: is it missing, or twice there, within the "
                "text?",
            "test_objectives.py::test_undone_every_piece_gives_its_text_back_byte_for_byte":
                "Put in order again, the pieces are not the text: is one lost, or more than `size` returned?",
            "test_objectives.py::test_whether_a_piece_is_rearranged_is_drawn_for_each_piece":
                "All pieces of a window are rearranged or none is: there is a draw for each piece."},
        ("Go through `pieces`; what is rearranged is a piece's text, without its end-of-text.",
         "parts() cuts, shortened() makes them fit, arrange() puts them in order with the sentinels.",
         "room is size - len(result) - 4; draw `generator.random() < rate` only where there is text and "
         "room.")),
    Exercise(
        "muon", "optim.py", "orthogonalize",
        "all singular values near one, by matrix products alone", 20, "middle", {
            "test_optim.py::test_the_size_of_the_gradient_does_not_matter":
                "The iteration converges for singular values up to 1: is the matrix divided by its norm "
                "first, is gram @ gram a product of matrices, and are a, b, c in their places?",
            "test_optim.py::test_zeros_give_zeros_and_do_not_harm_their_neighbours":
                "A matrix of zeros has the norm 0: divide by a little more.",
            "test_optim.py::test_a_batch_equals_its_matrices_one_at_a_time":
                "A matrix must not feel its neighbours: has each matrix a norm of its own?",
            "test_optim.py::test_singular_values_go_through_the_polynomial_and_singular_vectors_stay":
                "Singular values must go through a s + b s^3 + c s^5, `steps` times: is gram @ gram a "
                "product of matrices, and are a, b, c in their places?",
            "test_optim.py::test_the_direction_equals_torchs":
                "It is not torch's direction: is a tall matrix transposed before and after?"},
        ("x xᵀ has the squares of the singular values; a polynomial of it times x changes them alone.",
         "gram = x @ x.mT; x = a x + (b gram + c gram gram) x; five times.")),
    Exercise(
        "learning-rate", "optim.py", "learning_rate", "warm-up and four ways down", 25, "easy", {
            "test_optim.py::test_the_rate_rises_linearly_to_the_peak_and_then_never_again":
                "The warm-up goes from peak / (warmup_steps + 1) at step 0 to the peak at step "
                "warmup_steps: is it one step off, and the first step made with rate 0? Afterwards it never "
                "rises again, not even at step `steps`: is the last step taken for the end?",
            "test_optim.py::test_the_step_after_the_last_would_have_the_final_rate_and_no_step_has_none":
                "Step `steps`, the first that is not made, would have final_lr x peak: does the last step "
                "have it already, and so perhaps none?",
            "test_optim.py::test_linear_is_a_line":
                "The line must end at final_lr: it is no floor under a line to zero, but where the line "
                "ends.",
            "test_optim.py::test_cosine_is_half_a_wave":
                "(1 + cos(pi done)) / 2 goes from 1 to 0: is it half a wave?",
            "test_optim.py::test_wsd_stays_level_and_falls_in_a_line_over_the_last_share":
                "wsd stays at the peak until the last decay_share of all steps.",
            "test_optim.py::test_inverse_sqrt_is_vaswanis_where_it_need_not_be_stretched":
                "inverse_sqrt counts steps from 1, and is stretched to end where the others do."},
        ("First the warm-up; then how much of the way down is done, from 0 to 1.",
         "Let each schedule give a height from 1 to 0, and return peak (final + (1 - final) height).")),
    Exercise(
        "update", "train.py", "update",
        "one step from many micro-batches: the mean over all targets", 40, "hard", {
            "test_train.py::test_accumulating_micro_batches_equals_one_batch_"
            "although_their_targets_differ_in_number":
                "Micro-batches must give what one batch gives: is the mean taken of each micro-batch (a "
                "mean of means), instead of once over all targets?",
            "test_train.py::test_the_gradient_norm_is_global_and_clipped_once_after_accumulation":
                "Clip once, by the global norm, after all was added up and divided: is it clipped before?",
            "test_train.py::test_a_loss_that_is_not_finite_stops_before_any_weight_is_touched":
                "A loss that is not finite must stop the step before a weight moves: is refuse_bad asked "
                "first?",
            "test_train.py::test_a_loss_scale_changes_neither_norm_nor_update":
                "The scale of fp16 must be divided out again before clipping.",
            "test_train.py::test_with_a_loss_scale_an_overflow_skips_the_step_and_lowers_the_scale":
                "An overflow skips the step, and tells the scaler.",
            "test_train.py::test_an_update_knows_nothing_of_the_gradients_before_it":
                "A second update has another gradient than the first: are old gradients zeroed?"},
        ("Zero the gradients; backward for each micro-batch's sum; divide by the count; clip; step.",
         "Totals adds up what losses return; over_all() gives sum, count and figures of all processes.",
         "torch averages gradients over processes: so multiply by env.data_world_size / count (/ scale).")),
    # ---- answers and preferences
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
    # ---- reinforcement and distillation
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
