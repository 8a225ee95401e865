/* Floats rounded to bytes, row by row, as quantize_rows in hf_stompp/ops/integers.py does it, for products with packed
 * signs. A bit b stands for 2b - 1, so the sum of signed codes is twice the sum of those whose bit is set, less the sum
 * of all.
 *
 * Plain C; each kernel includes it and compiles it with its own instructions.
 */
#ifndef HF_STOMPP_BYTES_H
#define HF_STOMPP_BYTES_H

#include "masked.h"

/* Bytes of a row of codes: zero beyond its features, so that a kernel may read whole vectors. */
static inline int64_t code_bytes(int64_t features) { return divide_up(features, BLOCK) * BLOCK; }

/* One row as bytes, and their sum; returns what a byte is multiplied by. */
ALWAYS_INLINE float quantize_row_of(const void *input, int64_t dtype, int64_t row, int64_t features, int8_t *codes,
                                    int32_t *total) {
    float block[BLOCK];
    /* As integers, magnitudes keep their order, and NaN is above infinity. */
    uint32_t bits = 0;
    for (int64_t k = 0; k < features; k += BLOCK) {
        load_block(input, dtype, row * features + k, min_int64(BLOCK, features - k), block);
        for (int j = 0; j < BLOCK; j++) {
            uint32_t magnitude = bits_of_float(block[j]) & 0x7fffffff;
            bits = magnitude > bits ? magnitude : bits;
        }
    }
    float largest = float_of_bits(bits), inverse = 127.0f / largest;
    *total = 0;
    if (!isfinite(largest) || !isfinite(inverse)) {
        for (int64_t k = 0; k < features; k += BLOCK) memset(codes + k, 0, BLOCK);
        return isfinite(largest) ? 0.0f : NAN;
    }
    /* The sum has no digits behind the point: it is rounded to even, and its last byte is the code. */
    const float shift = 12582912.0f;
    for (int64_t k = 0; k < features; k += BLOCK) {
        load_block(input, dtype, row * features + k, min_int64(BLOCK, features - k), block);
        for (int j = 0; j < BLOCK; j++) codes[k + j] = (int8_t)bits_of_float(block[j] * inverse + shift);
    }
    for (int64_t k = 0; k < code_bytes(features); k++) *total += codes[k];
    return largest / 127.0f;
}

/* Calls a function for each row, with the dtype as a constant. */
#define QUANTIZE_ROWS(function)                                                                  \
    for (int64_t i = 0; i < rows; i++) {                                                         \
        int8_t *own = codes + i * code_bytes(p->in_features);                                    \
        WITH_DTYPE(p->input_dtype,                                                               \
                   scales[i] = function(p->input, DTYPE, row + i, p->in_features, own, totals + i)); \
    }

/* The rows from `row` on as bytes, with the scale and the sum of each. */
static inline void quantize_rows(const product *p, int64_t row, int64_t rows, int8_t *codes, float *scales,
                                 int32_t *totals) {
    QUANTIZE_ROWS(quantize_row_of)
}

#endif
