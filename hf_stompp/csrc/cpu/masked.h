/* Masked binarization of weights and activations, value and gradient, and products of packed signs with one vector:
 * what training does besides the binary products. Plain C; each kernel includes it and compiles it with its own
 * instructions, which is what makes it fast: written for the compiler to vectorise, in blocks of BLOCK elements.
 *
 * Everything is computed in float and rounded once to the type of the result, as in hf_stompp/ops/weights.py
 * and activations.py.
 */
#ifndef HF_STOMPP_MASKED_H
#define HF_STOMPP_MASKED_H

#include "kernel.h"

enum { BLOCK = 64 };

/* The functions below take dtypes as constants, so that no loop holds a branch on them. */
#define ALWAYS_INLINE __attribute__((always_inline)) static inline

ALWAYS_INLINE void load_block(const void *input, int64_t dtype, int64_t first, int64_t count, float *block) {
    if (count == BLOCK) {
        for (int j = 0; j < BLOCK; j++) block[j] = load_float(input, dtype, first + j);
        return;
    }
    for (int64_t j = 0; j < count; j++) block[j] = load_float(input, dtype, first + j);
    for (int64_t j = count; j < BLOCK; j++) block[j] = 0.0f;
}

ALWAYS_INLINE void store_block(const float *block, void *output, int64_t dtype, int64_t first, int64_t count) {
    if (count == BLOCK) {
        for (int j = 0; j < BLOCK; j++) store_float(output, dtype, first + j, block[j]);
        return;
    }
    for (int64_t j = 0; j < count; j++) store_float(output, dtype, first + j, block[j]);
}

/* BLOCK bytes of 0 and 1 to as many bits: the multiplication moves bit 8i to bit 56 + i. */
ALWAYS_INLINE uint64_t bits_of_flags(const uint8_t *flags) {
    uint64_t bits = 0;
    for (int i = 0; i < BLOCK / 8; i++) {
        uint64_t eight;
        memcpy(&eight, flags + 8 * i, 8);
        bits |= (eight * 0x0102040810204080 >> 56) << 8 * i;
    }
    return bits;
}

/* And back: a byte is copied to eight, of which each keeps one bit. */
ALWAYS_INLINE void flags_of_bits(uint64_t bits, uint8_t *flags) {
    for (int i = 0; i < BLOCK / 8; i++) {
        uint64_t eight = (bits >> 8 * i & 0xff) * 0x0101010101010101 & 0x8040201008040201;
        eight = (eight + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
        memcpy(flags + 8 * i, &eight, 8);
    }
}

/* What a surrogate says of a frozen entry: its gradient always passes, or passes within the window. */
struct rule {
    uint8_t always, inside;
};

static inline struct rule rule_of(int64_t surrogate) {
    struct rule rule = {surrogate == HF_STOMPP_STE, surrogate != HF_STOMPP_NO_SURROGATE};
    return rule;
}

/* Whether the gradient of an entry passes; that of a free one does within the clip range. */
ALWAYS_INLINE uint8_t passes(struct rule rule, uint8_t frozen, uint8_t inside) {
    return (inside & (rule.inside | (frozen ^ 1))) | (rule.always & frozen);
}

ALWAYS_INLINE void weight_rows(const struct hf_stompp_masked_weight *p, int64_t begin, int64_t end,
                               int64_t weight_dtype, int64_t output_dtype) {
    for (int64_t row = begin; row < end; row++) {
        float scale = p->scale[row], bound = (float)p->clip * scale;
        for (int64_t k = 0; k < p->columns; k += BLOCK) {
            int64_t first = row * p->columns + k, count = min_int64(BLOCK, p->columns - k);
            float w[BLOCK], value[BLOCK];
            uint8_t frozen[BLOCK] = {0};
            load_block(p->weight, weight_dtype, first, count, w);
            memcpy(frozen, p->mask + first, (size_t)count);
            for (int j = 0; j < BLOCK; j++) {
                float soft = w[j] > bound ? bound : w[j] < -bound ? -bound : w[j];
                float hard = w[j] >= 0.0f ? scale : -scale;
                value[j] = frozen[j] ? hard : soft;
            }
            store_block(value, p->output, output_dtype, first, count);
        }
    }
}

ALWAYS_INLINE void weight_gradient_rows(const struct hf_stompp_masked_weight *p, int64_t begin, int64_t end,
                                        int64_t weight_dtype, int64_t gradient_dtype) {
    struct rule rule = rule_of(p->surrogate);
    for (int64_t row = begin; row < end; row++) {
        float bound = (float)p->clip * p->scale[row], window = (float)p->window * p->scale[row];
        for (int64_t k = 0; k < p->columns; k += BLOCK) {
            int64_t first = row * p->columns + k, count = min_int64(BLOCK, p->columns - k);
            float w[BLOCK], gradient[BLOCK];
            uint8_t frozen[BLOCK] = {0};
            load_block(p->weight, weight_dtype, first, count, w);
            load_block(p->gradient, gradient_dtype, first, count, gradient);
            memcpy(frozen, p->mask + first, (size_t)count);
            for (int j = 0; j < BLOCK; j++) {
                float reach = frozen[j] ? window : bound;
                uint8_t inside = (w[j] <= reach) & (w[j] >= -reach);
                gradient[j] = passes(rule, frozen[j], inside) ? gradient[j] : 0.0f;
            }
            store_block(gradient, p->output, weight_dtype, first, count);
        }
    }
}

/* Calls function(arguments, dtype a, dtype b) with both as constants. */
#define FOR_DTYPES(function, arguments, a, b)                                                    \
    do {                                                                                         \
        if ((a) == HF_STOMPP_F32 && (b) == HF_STOMPP_F32)                                        \
            function(EXPAND arguments, HF_STOMPP_F32, HF_STOMPP_F32);                            \
        else if ((a) == HF_STOMPP_F32 && (b) == HF_STOMPP_BF16)                                  \
            function(EXPAND arguments, HF_STOMPP_F32, HF_STOMPP_BF16);                           \
        else if ((a) == HF_STOMPP_BF16 && (b) == HF_STOMPP_BF16)                                 \
            function(EXPAND arguments, HF_STOMPP_BF16, HF_STOMPP_BF16);                          \
        else                                                                                     \
            function(EXPAND arguments, a, b);                                                    \
    } while (0)
#define EXPAND(...) __VA_ARGS__

static inline void masked_weight(const struct hf_stompp_masked_weight *p, int64_t begin, int64_t end) {
    if (p->gradient)
        FOR_DTYPES(weight_gradient_rows, (p, begin, end), p->weight_dtype, p->other_dtype);
    else
        FOR_DTYPES(weight_rows, (p, begin, end), p->weight_dtype, p->other_dtype);
}

/* What a block of columns of an activation is clipped to, or its window where it is frozen, and its two levels. */
struct levels {
    float low[BLOCK], high[BLOCK], center[BLOCK], lower[BLOCK], upper[BLOCK], threshold[BLOCK];
    uint8_t frozen[BLOCK];
};

static inline void load_levels(const struct hf_stompp_masked_activation *p, int64_t k, int64_t count,
                               struct levels *levels) {
    memset(levels, 0, sizeof *levels);
    for (int64_t j = 0; j < count; j++) {
        float center = p->center[k + j], offset = p->offset[k + j];
        float reach = p->mask[k + j] ? p->window[0] : p->bound[0];
        levels->center[j] = center;
        levels->low[j] = center - reach;
        levels->high[j] = center + reach;
        levels->lower[j] = offset - p->amplitude[0];
        levels->upper[j] = offset + p->amplitude[0];
        levels->threshold[j] = p->threshold[k + j];
        levels->frozen[j] = p->mask[k + j];
    }
}

/* Columns outside, a block at a time, so that its levels stay in the first-level cache; rows in pieces, so that the
 * input does as well. */
ALWAYS_INLINE void activation_rows(const struct hf_stompp_masked_activation *p, int64_t begin, int64_t end,
                                   int64_t dtype) {
    enum { PIECE = 32 };
    struct rule rule = rule_of(p->surrogate);
    int64_t bytes = row_bytes(p->features);
    for (int64_t piece = begin; piece < end; piece += PIECE) {
        int64_t piece_end = min_int64(end, piece + PIECE);
        for (int64_t k = 0; k < p->features; k += BLOCK) {
            int64_t count = min_int64(BLOCK, p->features - k);
            struct levels levels;
            load_levels(p, k, count, &levels);
            for (int64_t row = piece; row < piece_end; row++) {
                int64_t first = row * p->features + k;
                float value[BLOCK], decides[BLOCK];
                uint8_t pass[BLOCK], up[BLOCK];
                load_block(p->value, dtype, first, count, value);
                load_block(p->pre_activation, dtype, first, count, decides);
                for (int j = 0; j < BLOCK; j++) {
                    float v = value[j], low = levels.low[j], high = levels.high[j];
                    float soft = v > high ? high : v < low ? low : v;
                    uint8_t above = decides[j] >= levels.threshold[j], inside = (v >= low) & (v <= high);
                    uint8_t frozen = levels.frozen[j], over = v > levels.center[j];
                    float hard = above ? levels.upper[j] : levels.lower[j];
                    value[j] = frozen ? hard : soft;
                    pass[j] = passes(rule, frozen, inside);
                    up[j] = (above & frozen) | (over & (frozen ^ 1));
                }
                store_block(value, p->output, dtype, first, count);
                uint64_t pass_bits = bits_of_flags(pass), up_bits = bits_of_flags(up);
                if (count < BLOCK) {
                    uint64_t live = ((uint64_t)1 << count) - 1;
                    pass_bits &= live, up_bits &= live;
                }
                memcpy(p->passes + row * bytes + k / 8, &pass_bits, 8);
                memcpy(p->upper + row * bytes + k / 8, &up_bits, 8);
            }
        }
        int64_t used = divide_up(p->features, BLOCK) * (BLOCK / 8);
        for (int64_t row = piece; row < piece_end; row++) {
            memset(p->passes + row * bytes + used, 0, (size_t)(bytes - used));
            memset(p->upper + row * bytes + used, 0, (size_t)(bytes - used));
        }
    }
}

static inline void masked_activation(const struct hf_stompp_masked_activation *p, int64_t begin, int64_t end) {
    WITH_DTYPE(p->dtype, activation_rows(p, begin, end, DTYPE));
}

/* A block of a row of the gradient, and its part of the sums. */
ALWAYS_INLINE void activation_gradient_block(const struct hf_stompp_masked_activation *p, int64_t row, int64_t k,
                                             int64_t count, int64_t dtype, const uint8_t *frozen, double *passed_sum,
                                             double *held_sum, double *upper_sum) {
    int64_t first = row * p->features + k, bytes = row_bytes(p->features);
    float gradient[BLOCK], passed[BLOCK], held[BLOCK], held_upper[BLOCK];
    uint8_t pass[BLOCK], up[BLOCK];
    uint64_t pass_bits, up_bits;
    memcpy(&pass_bits, p->passes + row * bytes + k / 8, 8);
    memcpy(&up_bits, p->upper + row * bytes + k / 8, 8);
    flags_of_bits(pass_bits, pass);
    flags_of_bits(up_bits, up);
    load_block(p->gradient, dtype, first, count, gradient);
    for (int j = 0; j < BLOCK; j++) {
        /* Masks of all ones or zeros: a compiler vectorises these sooner than choices. */
        uint32_t value = bits_of_float(gradient[j]), passing = -(uint32_t)pass[j];
        uint32_t holding = value & (~passing | -(uint32_t)frozen[j]);
        passed[j] = float_of_bits(value & passing);
        held[j] = float_of_bits(holding);
        held_upper[j] = float_of_bits(holding & -(uint32_t)up[j]);
    }
    for (int j = 0; j < BLOCK; j++) passed_sum[j] += (double)passed[j];
    for (int j = 0; j < BLOCK; j++) held_sum[j] += (double)held[j];
    for (int j = 0; j < BLOCK; j++) upper_sum[j] += (double)held_upper[j];
    store_block(passed, p->output, dtype, first, count);
}

/* Columns [begin, end) of the gradient, begin a multiple of BLOCK. A thread has columns to itself and takes their rows
 * in order: the sums do not depend on the number of threads. */
ALWAYS_INLINE void activation_gradient_columns(const struct hf_stompp_masked_activation *p, int64_t begin, int64_t end,
                                               int64_t dtype) {
    /* Columns whose sums stay in the first-level cache, and whose pieces of a row are long enough to stream. */
    enum { GROUP = 8 * BLOCK };
    for (int64_t group = begin; group < end; group += GROUP) {
        int64_t group_end = min_int64(end, group + GROUP);
        double passed_sum[GROUP] = {0}, held_sum[GROUP] = {0}, upper_sum[GROUP] = {0};
        uint8_t frozen[GROUP] = {0};
        memcpy(frozen, p->mask + group, (size_t)(group_end - group));
        for (int64_t row = 0; row < p->rows; row++)
            for (int64_t k = group; k < group_end; k += BLOCK) {
                int64_t j = k - group, count = min_int64(BLOCK, group_end - k);
                activation_gradient_block(p, row, k, count, dtype, frozen + j, passed_sum + j, held_sum + j,
                                          upper_sum + j);
            }
        for (int64_t k = group; k < group_end; k++) {
            p->sums[k] = passed_sum[k - group];
            p->sums[p->features + k] = held_sum[k - group];
            p->sums[2 * p->features + k] = upper_sum[k - group];
        }
    }
}

static inline void masked_activation_gradient(const struct hf_stompp_masked_activation *p, int64_t begin,
                                              int64_t end) {
    WITH_DTYPE(p->dtype, activation_gradient_columns(p, begin, end, DTYPE));
}

/* signs_of_byte[b][j] = +1 where bit j of b is set, -1 elsewhere. */
#define SIGN(b, j) ((b) >> (j) & 1 ? 1.0f : -1.0f)
#define SIGNS(b) {SIGN(b, 0), SIGN(b, 1), SIGN(b, 2), SIGN(b, 3), SIGN(b, 4), SIGN(b, 5), SIGN(b, 6), SIGN(b, 7)}
#define SIGNS4(b) SIGNS(b), SIGNS(b + 1), SIGNS(b + 2), SIGNS(b + 3)
#define SIGNS16(b) SIGNS4(b), SIGNS4(b + 4), SIGNS4(b + 8), SIGNS4(b + 12)
#define SIGNS64(b) SIGNS16(b), SIGNS16(b + 16), SIGNS16(b + 32), SIGNS16(b + 48)
static const float signs_of_byte[256][8] = {SIGNS64(0), SIGNS64(64), SIGNS64(128), SIGNS64(192)};

/* Rows [begin, end) of output = signs @ vector. */
static inline void sign_product_rows(const struct hf_stompp_sign_product *p, int64_t begin, int64_t end) {
    int64_t bytes = row_bytes(p->in_features), whole = p->in_features / 8;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *bits = p->weight + row * bytes;
        double sums[8] = {0}, sum = 0.0;
        for (int64_t byte = 0; byte < whole; byte++)
            for (int j = 0; j < 8; j++) sums[j] += (double)signs_of_byte[bits[byte]][j] * p->vector[8 * byte + j];
        for (int64_t k = 8 * whole; k < p->in_features; k++)
            sums[k % 8] += (double)signs_of_byte[bits[k / 8]][k % 8] * p->vector[k];
        for (int j = 0; j < 8; j++) sum += sums[j];
        p->output[row] = sum;
    }
}

/* Columns [begin, end) of output = vector @ signs, begin a multiple of BLOCK. */
static inline void sign_product_columns(const struct hf_stompp_sign_product *p, int64_t begin, int64_t end) {
    int64_t bytes = row_bytes(p->in_features);
    for (int64_t k = begin; k < end; k += BLOCK) {
        double sums[BLOCK] = {0};
        for (int64_t row = 0; row < p->out_features; row++) {
            const uint8_t *bits = p->weight + row * bytes + k / 8;
            double value = p->vector[row];
            for (int i = 0; i < BLOCK / 8; i++)
                for (int j = 0; j < 8; j++) sums[8 * i + j] += (double)signs_of_byte[bits[i]][j] * value;
        }
        memcpy(p->output + k, sums, (size_t)min_int64(BLOCK, end - k) * sizeof(double));
    }
}

#define MASKED_FUNCTIONS                                                                         \
    .masked_weight = masked_weight, .masked_activation = masked_activation,                      \
    .masked_activation_gradient = masked_activation_gradient, .sign_product_rows = sign_product_rows, \
    .sign_product_columns = sign_product_columns

#endif
