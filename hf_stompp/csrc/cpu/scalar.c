/* 64-bit popcounts in plain C: the kernel of last resort, and the one to read first. */
#include "bytes.h"
#include "kernel.h"

enum { ROWS = 4 };

static const char *unavailable(void) {
#if defined(__x86_64__)
    /* Compiled with -mpopcnt: without the instruction a popcount is a dozen others. */
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("popcnt")) return "the processor has no POPCNT";
#endif
    return NULL;
}

static inline uint64_t load_word(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

static void pack_sign(const void *input, int64_t input_dtype, const float *threshold, int64_t rows, int64_t features,
                      uint8_t *bits, int32_t *popcounts) {
    int64_t bytes = row_bytes(features);
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *out = bits + row * bytes;
        memset(out, 0, (size_t)bytes);
        int32_t popcount = sign_features(input, input_dtype, row * features, threshold, 0, features, out);
        if (popcounts) popcounts[row] = popcount;
    }
}

static size_t scratch_bytes(const product *p, const struct part *part) {
    (void)part;
    return p->input_dtype == HF_STOMPP_BITS ? 0 : (size_t)(ROWS * row_bytes(p->in_features));
}

static void multiply(const product *p, const struct part *part, void *scratch) {
    int64_t bytes = row_bytes(p->in_features);
    for (int64_t row = part->row_begin; row < part->row_end; row += ROWS) {
        int rows = (int)min_int64(ROWS, part->row_end - row);
        const uint8_t *input = bits_of_rows(p, pack_sign, row, rows, scratch);
        for (int64_t column = part->column_begin; column < part->column_end; column++) {
            const uint8_t *weight = p->weight + column * bytes;
            int32_t different[ROWS] = {0};
            if (rows == ROWS) {
                for (int64_t k = 0; k < bytes; k += 8) {
                    uint64_t word = load_word(weight + k);
                    for (int i = 0; i < ROWS; i++)
                        different[i] += __builtin_popcountll(word ^ load_word(input + i * bytes + k));
                }
            } else {
                for (int i = 0; i < rows; i++)
                    for (int64_t k = 0; k < bytes; k += 8)
                        different[i] +=
                            __builtin_popcountll(load_word(weight + k) ^ load_word(input + i * bytes + k));
            }
            for (int i = 0; i < rows; i++)
                store_sum(p, row + i, column, (int32_t)(p->in_features - 2 * different[i]), 1.0f);
        }
    }
}

/* The bits of a column of the weight as bytes of 0 and 1. */
static void flags_of_column(const product *p, int64_t column, uint8_t *flags) {
    const uint8_t *weight = p->weight + column * row_bytes(p->in_features);
    for (int64_t k = 0; k < code_bytes(p->in_features); k += BLOCK) {
        uint64_t word;
        memcpy(&word, weight + k / 8, 8);
        flags_of_bits(word, flags + k);
    }
}

/* Rows for which a column is expanded once. */
enum { BYTE_ROWS = 16 };

static size_t byte_scratch_bytes(const product *p, const struct part *part) {
    (void)part;
    return (size_t)((BYTE_ROWS + 1) * code_bytes(p->in_features));
}

static void multiply_bytes(const product *p, const struct part *part, void *scratch) {
    int64_t bytes = code_bytes(p->in_features);
    int8_t *codes = scratch;
    uint8_t *flags = (uint8_t *)scratch + BYTE_ROWS * bytes;
    for (int64_t row = part->row_begin; row < part->row_end; row += BYTE_ROWS) {
        int64_t rows = min_int64(BYTE_ROWS, part->row_end - row);
        float scales[BYTE_ROWS];
        int32_t totals[BYTE_ROWS];
        quantize_rows(p, row, rows, codes, scales, totals);
        for (int64_t column = part->column_begin; column < part->column_end; column++) {
            flags_of_column(p, column, flags);
            for (int64_t i = 0; i < rows; i++) {
                int32_t sum = 0;
                for (int64_t k = 0; k < bytes; k++) sum += codes[i * bytes + k] * (int8_t)flags[k];
                store_sum(p, row + i, column, 2 * sum - totals[i], scales[i]);
            }
        }
    }
}

const struct kernel hf_stompp_scalar_kernel = {
    .unavailable = unavailable,
    .pack_sign = pack_sign,
    .scratch_bytes = scratch_bytes,
    .multiply = multiply,
    .byte_scratch_bytes = byte_scratch_bytes,
    .multiply_bytes = multiply_bytes,
    .rows_per_thread = 64,
    MASKED_FUNCTIONS,
};
