/* XOR and CNT, which counts the bits of each byte. Both sides are read as they are stored, 128 bits of 4 rows and of
 * 4 columns at a time, so that a loaded vector meets 4 others. Sums are kept in bytes; adding neighbours at the end
 * leaves the sums of 4 columns side by side in one vector.
 */
#include <arm_neon.h>

#include "bytes.h"
#include "kernel.h"

/* SDOT came after NEON: it is compiled for the functions that have it, which run where the processor has it, too. */
#if defined(__ARM_FEATURE_DOTPROD)
#define SDOT
#elif defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 8)
#include <sys/auxv.h>
#define SDOT __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

enum {
    /* 4 x 4 vectors of byte sums, 4 of totals, the columns and a row take 25 of the 32 registers. */
    ROWS = 4,
    COLUMNS = 4,
    VECTOR_BYTES = 16,
    /* Vectors until a byte sum could overflow: 31 x 8 <= 255. */
    STEPS = 31,
};

/* NEON is part of AArch64. */
static const char *unavailable(void) { return NULL; }

static inline float32x4_t load4(const void *input, int64_t dtype, int64_t index) {
    if (dtype == HF_STOMPP_F32) return vld1q_f32((const float *)input + index);
    uint16x4_t half = vld1_u16((const uint16_t *)input + index);
    if (dtype == HF_STOMPP_F16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

/* All ones where a value is >= its threshold; a comparison with NaN is false. */
static inline uint16x4_t signs4(const void *input, int64_t dtype, int64_t index, const float *threshold, int64_t k) {
    float32x4_t limit = threshold ? vld1q_f32(threshold + k) : vdupq_n_f32(0.0f);
    return vmovn_u32(vcgeq_f32(load4(input, dtype, index), limit));
}

/* Always inlined with a constant dtype, so that the loop holds no branch on it. */
__attribute__((always_inline)) static inline void pack_rows(const void *input, int64_t dtype, const float *threshold,
                                                            int64_t rows, int64_t features, uint8_t *bits,
                                                            int32_t *popcounts) {
    const uint16x8_t places = {1, 2, 4, 8, 16, 32, 64, 128};
    int64_t bytes = row_bytes(features);
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *out = bits + row * bytes;
        int64_t first = row * features, k = 0;
        for (; k + 8 <= features; k += 8) {
            uint16x8_t signs = vcombine_u16(signs4(input, dtype, first + k, threshold, k),
                                            signs4(input, dtype, first + k + 4, threshold, k + 4));
            out[k / 8] = (uint8_t)vaddvq_u16(vandq_u16(signs, places));
        }
        memset(out + k / 8, 0, (size_t)(bytes - k / 8));
        sign_features(input, dtype, first, threshold, k, features, out);
        if (popcounts) {
            int32_t popcount = 0;
            for (int64_t byte = 0; byte < bytes; byte += VECTOR_BYTES)
                popcount += vaddvq_u8(vcntq_u8(vld1q_u8(out + byte)));
            popcounts[row] = popcount;
        }
    }
}

static void pack_sign(const void *input, int64_t dtype, const float *threshold, int64_t rows, int64_t features,
                      uint8_t *bits, int32_t *popcounts) {
    WITH_DTYPE(dtype, pack_rows(input, DTYPE, threshold, rows, features, bits, popcounts));
}

/* store_sum for 4 columns from `column` on, a multiple of 4. */
static inline void store_sums4(const product *p, int64_t row, int64_t column, int32x4_t sums, float row_scale) {
    if (column + 4 > p->out_features) {
        int32_t each[4];
        vst1q_s32(each, sums);
        for (int64_t j = column; j < p->out_features; j++) store_sum(p, row, j, each[j - column], row_scale);
        return;
    }
    int64_t index = row * p->out_features + column;
    /* Rounded after each step, as in store_sum: no vfmaq_f32. */
    float32x4_t value = vmulq_f32(vmulq_n_f32(vcvtq_f32_s32(sums), row_scale), vld1q_f32(p->scale + column));
    if (p->bias) value = vaddq_f32(value, vld1q_f32(p->bias + column));
    uint16x4_t half = vdup_n_u16(0);
    if (p->output_dtype == HF_STOMPP_BF16) {
        uint32x4_t bits = vreinterpretq_u32_f32(value);
        uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        uint32x4_t number = vceqq_f32(value, value);
        uint32x4_t wide = vbslq_u32(number, vshrq_n_u32(rounded, 16), vdupq_n_u32(0x7fc0));
        half = vmovn_u32(wide);
        value = vreinterpretq_f32_u32(vshlq_n_u32(wide, 16));
    } else if (p->output_dtype == HF_STOMPP_F16) {
        float16x4_t rounded = vcvt_f16_f32(value);
        half = vreinterpret_u16_f16(rounded);
        value = vcvt_f32_f16(rounded);
    }
    if (p->output_bits) {
        const uint32x4_t places = {1, 2, 4, 8};
        float32x4_t limit = p->output_threshold ? vld1q_f32(p->output_threshold + column) : vdupq_n_f32(0.0f);
        uint32_t nibble = vaddvq_u32(vandq_u32(vcgeq_f32(value, limit), places));
        p->output_bits[row * row_bytes(p->out_features) + column / 8] |= (uint8_t)(nibble << column % 8);
    } else if (p->output_dtype == HF_STOMPP_F32) {
        vst1q_f32((float *)p->output + index, value);
    } else {
        vst1_u16((uint16_t *)p->output + index, half);
    }
}

/* Past the last column the last one stands in: store_sums4 leaves out what it gives. */
static inline void weight_of_columns(const product *p, int64_t column, const uint8_t *weight[COLUMNS]) {
    for (int j = 0; j < COLUMNS; j++)
        weight[j] = p->weight + min_int64(column + j, p->out_features - 1) * row_bytes(p->in_features);
}

/* The sums of the bytes of 4 vectors, in two neighbours each. */
static inline uint16x8_t add_neighbours(const uint8x16_t sum[COLUMNS]) {
    uint16x8_t low = vpaddq_u16(vpaddlq_u8(sum[0]), vpaddlq_u8(sum[1]));
    uint16x8_t high = vpaddq_u16(vpaddlq_u8(sum[2]), vpaddlq_u8(sum[3]));
    return vpaddq_u16(low, high);
}

/* Always inlined with a constant number of rows, so that the sums stay in registers. */
__attribute__((always_inline)) static inline void multiply_block(const product *p, const uint8_t *input,
                                                                 int rows, int64_t row, int64_t column) {
    int64_t bytes = row_bytes(p->in_features), used = divide_up(p->in_features, 8 * VECTOR_BYTES) * VECTOR_BYTES;
    const uint8_t *weight[COLUMNS];
    weight_of_columns(p, column, weight);
    uint32x4_t different[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) different[i] = vdupq_n_u32(0);
    for (int64_t begin = 0; begin < used; begin += STEPS * VECTOR_BYTES) {
        int64_t end = min_int64(used, begin + STEPS * VECTOR_BYTES);
        uint8x16_t sum[ROWS][COLUMNS];
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++) sum[i][j] = vdupq_n_u8(0);
        for (int64_t k = begin; k < end; k += VECTOR_BYTES) {
            uint8x16_t bits[COLUMNS];
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++) bits[j] = vld1q_u8(weight[j] + k);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) {
                uint8x16_t value = vld1q_u8(input + i * bytes + k);
#pragma GCC unroll 4
                for (int j = 0; j < COLUMNS; j++)
                    sum[i][j] = vaddq_u8(sum[i][j], vcntq_u8(veorq_u8(value, bits[j])));
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) different[i] = vpadalq_u16(different[i], add_neighbours(sum[i]));
    }
    int32x4_t features = vdupq_n_s32((int32_t)p->in_features);
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        int32x4_t twice = vreinterpretq_s32_u32(vshlq_n_u32(different[i], 1));
        store_sums4(p, row + i, column, vsubq_s32(features, twice), 1.0f);
    }
}

__attribute__((always_inline)) static inline void multiply_rows(const product *p, const uint8_t *input,
                                                                int rows, int64_t row, const struct part *part) {
    for (int64_t column = part->column_begin; column < part->column_end; column += COLUMNS)
        multiply_block(p, input, rows, row, column);
}

static size_t scratch_bytes(const product *p, const struct part *part) {
    (void)part;
    return p->input_dtype == HF_STOMPP_BITS ? 0 : (size_t)(ROWS * row_bytes(p->in_features));
}

static void multiply(const product *p, const struct part *part, void *scratch) {
    for (int64_t row = part->row_begin; row < part->row_end; row += ROWS) {
        int64_t rows = min_int64(ROWS, part->row_end - row);
        const uint8_t *input = bits_of_rows(p, pack_sign, row, rows, scratch);
        if (rows == 4)
            multiply_rows(p, input, 4, row, part);
        else if (rows == 3)
            multiply_rows(p, input, 3, row, part);
        else if (rows == 2)
            multiply_rows(p, input, 2, row, part);
        else
            multiply_rows(p, input, 1, row, part);
    }
}

/* --- rows of bytes: the sum of the codes whose bit is set --- */

/* Adds the codes where `chosen` is all ones to the four sums, four to each. */
typedef int32x4_t add_function(int32x4_t sum, int8x16_t codes, int8x16_t chosen);

static inline int32x4_t add_codes(int32x4_t sum, int8x16_t codes, int8x16_t chosen) {
    return vpadalq_s16(sum, vpaddlq_s8(vandq_s8(codes, chosen)));
}

#ifdef SDOT
/* All ones are -1. */
SDOT static inline int32x4_t add_codes_sdot(int32x4_t sum, int8x16_t codes, int8x16_t chosen) {
    return vdotq_s32(sum, codes, vnegq_s8(chosen));
}
#endif

/* Inlined with a constant number of rows and a constant function, as multiply_block is. */
ALWAYS_INLINE void multiply_codes_block(const product *p, const int8_t *codes, int rows, int64_t row, int64_t column,
                                        const float *scales, const int32_t *totals, add_function *add) {
    const uint8_t places[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t place = vcombine_u8(vld1_u8(places), vld1_u8(places));
    int64_t bytes = code_bytes(p->in_features);
    const uint8_t *weight[COLUMNS];
    weight_of_columns(p, column, weight);
    int32x4_t sum[ROWS][COLUMNS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) sum[i][j] = vdupq_n_s32(0);
    for (int64_t k = 0; k < bytes; k += VECTOR_BYTES) {
        int8x16_t chosen[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) {
            uint8x16_t bits = vcombine_u8(vld1_dup_u8(weight[j] + k / 8), vld1_dup_u8(weight[j] + k / 8 + 1));
            chosen[j] = vreinterpretq_s8_u8(vtstq_u8(bits, place));
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            int8x16_t value = vld1q_s8(codes + i * bytes + k);
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++) sum[i][j] = add(sum[i][j], value, chosen[j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        int32x4_t added = vpaddq_s32(vpaddq_s32(sum[i][0], sum[i][1]), vpaddq_s32(sum[i][2], sum[i][3]));
        int32x4_t sums = vsubq_s32(vshlq_n_s32(added, 1), vdupq_n_s32(totals[i]));
        store_sums4(p, row + i, column, sums, scales[i]);
    }
}

ALWAYS_INLINE void multiply_codes(const product *p, const struct part *part, int8_t *codes, add_function *add) {
    for (int64_t row = part->row_begin; row < part->row_end; row += ROWS) {
        int64_t rows = min_int64(ROWS, part->row_end - row);
        float scales[ROWS];
        int32_t totals[ROWS];
        quantize_rows(p, row, rows, codes, scales, totals);
        for (int64_t column = part->column_begin; column < part->column_end; column += COLUMNS) {
            if (rows == 4)
                multiply_codes_block(p, codes, 4, row, column, scales, totals, add);
            else if (rows == 3)
                multiply_codes_block(p, codes, 3, row, column, scales, totals, add);
            else if (rows == 2)
                multiply_codes_block(p, codes, 2, row, column, scales, totals, add);
            else
                multiply_codes_block(p, codes, 1, row, column, scales, totals, add);
        }
    }
}

#ifdef SDOT
SDOT static void multiply_codes_sdot(const product *p, const struct part *part, int8_t *codes) {
    multiply_codes(p, part, codes, add_codes_sdot);
}

static int has_sdot(void) {
#ifdef __ARM_FEATURE_DOTPROD
    return 1;
#else
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
}
#endif

static size_t byte_scratch_bytes_neon(const product *p, const struct part *part) {
    (void)part;
    return (size_t)(ROWS * code_bytes(p->in_features));
}

static void multiply_bytes_neon(const product *p, const struct part *part, void *scratch) {
#ifdef SDOT
    if (has_sdot()) {
        multiply_codes_sdot(p, part, scratch);
        return;
    }
#endif
    multiply_codes(p, part, scratch, add_codes);
}

const struct kernel hf_stompp_neon_kernel = {
    .unavailable = unavailable,
    .pack_sign = pack_sign,
    .scratch_bytes = scratch_bytes,
    .multiply = multiply,
    .byte_scratch_bytes = byte_scratch_bytes_neon,
    .multiply_bytes = multiply_bytes_neon,
    .rows_per_thread = 64,
    MASKED_FUNCTIONS,
};
