/* What the kernels share: what one is, and the arithmetic that each of them must repeat exactly. */
#ifndef HF_STOMPP_KERNEL_H
#define HF_STOMPP_KERNEL_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "hf_stompp.h"

/* Bits are packed in bytes, and read and written as words. */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels are for little-endian processors alone"
#endif

typedef struct hf_stompp_product product;

/* A part of a product: some rows, some columns. Column bounds are multiples of COLUMN_ALIGNMENT, or the end. */
struct part {
    int64_t row_begin, row_end, column_begin, column_end;
};

enum { COLUMN_ALIGNMENT = 64, ROW_BITS = 256 };

typedef void pack_sign_function(const void *input, int64_t input_dtype, const float *threshold, int64_t rows,
                                int64_t features, uint8_t *bits, int32_t *popcounts);

struct kernel {
    /* Why it cannot run on this machine; NULL if it can. */
    const char *(*unavailable)(void);
    /* Bytes of working memory for a part, and the part itself. The memory is aligned to 64 bytes. */
    size_t (*scratch_bytes)(const product *, const struct part *);
    void (*multiply)(const product *, const struct part *, void *scratch);
    /* The same for 8 activation bits. */
    size_t (*byte_scratch_bytes)(const product *, const struct part *);
    void (*multiply_bytes)(const product *, const struct part *, void *scratch);
    /* With fewer rows a thread takes a share of the columns instead: each lays the weight out anew for itself. */
    int64_t rows_per_thread;
    /* Runs the inner instructions `steps` times on registers alone; returns the pairs of bits they would have
     * multiplied. What a product could reach at best. NULL where nobody has written it. */
    int64_t (*limit)(int64_t steps);
    /* What is no product. NULL in the kernel for AMX, which has instructions for products alone. */
    pack_sign_function *pack_sign;
    /* The functions of masked.h, on a part of the rows or of the columns. */
    void (*masked_weight)(const struct hf_stompp_masked_weight *, int64_t row_begin, int64_t row_end);
    void (*masked_activation)(const struct hf_stompp_masked_activation *, int64_t row_begin, int64_t row_end);
    void (*masked_activation_gradient)(const struct hf_stompp_masked_activation *, int64_t column_begin,
                                       int64_t column_end);
    void (*sign_product_rows)(const struct hf_stompp_sign_product *, int64_t row_begin, int64_t row_end);
    void (*sign_product_columns)(const struct hf_stompp_sign_product *, int64_t column_begin, int64_t column_end);
};

extern const struct kernel hf_stompp_scalar_kernel;
extern const struct kernel hf_stompp_avx2_kernel;
extern const struct kernel hf_stompp_avx512_kernel;
extern const struct kernel hf_stompp_amx_kernel;
extern const struct kernel hf_stompp_neon_kernel;

static inline int64_t min_int64(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t max_int64(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t row_bytes(int64_t features) { return divide_up(features, ROW_BITS) * (ROW_BITS / 8); }

static inline int64_t element_bytes(int64_t dtype) { return dtype == HF_STOMPP_F32 ? 4 : 2; }

static inline const void *input_row(const product *p, int64_t row) {
    int64_t bytes = p->input_dtype == HF_STOMPP_BITS ? row_bytes(p->in_features)
                                                     : p->in_features * element_bytes(p->input_dtype);
    return (const uint8_t *)p->input + row * bytes;
}

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of_bf16(uint16_t value) { return float_of_bits((uint32_t)value << 16); }

/* Round to nearest even. */
static inline uint16_t bf16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    if (isnan(value)) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float float_of_f16(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, exponent = (value >> 10) & 31, fraction = value & 0x3ff;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) {
        float magnitude = (float)fraction * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

/* Round to nearest even, subnormals included. */
static inline uint16_t f16_of_float(float value) {
    uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        /* Adding 0.5 leaves the multiple of 2^-24 in the last bits of the sum, rounded by the addition. */
        uint32_t rounded = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
        return (uint16_t)(sign | rounded);
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

/* A statement, in which DTYPE is the dtype of floats as a constant: no loop in what it calls holds a branch on it. */
#define WITH_DTYPE(dtype, statement)                                                             \
    do {                                                                                         \
        if ((dtype) == HF_STOMPP_F32) {                                                          \
            enum { DTYPE = HF_STOMPP_F32 };                                                      \
            statement;                                                                           \
        } else if ((dtype) == HF_STOMPP_BF16) {                                                  \
            enum { DTYPE = HF_STOMPP_BF16 };                                                     \
            statement;                                                                           \
        } else {                                                                                 \
            enum { DTYPE = HF_STOMPP_F16 };                                                      \
            statement;                                                                           \
        }                                                                                        \
    } while (0)

static inline float load_float(const void *input, int64_t dtype, int64_t index) {
    if (dtype == HF_STOMPP_F32) return ((const float *)input)[index];
    uint16_t half = ((const uint16_t *)input)[index];
    return dtype == HF_STOMPP_BF16 ? float_of_bf16(half) : float_of_f16(half);
}

static inline void store_float(void *output, int64_t dtype, int64_t index, float value) {
    if (dtype == HF_STOMPP_F32)
        ((float *)output)[index] = value;
    else
        ((uint16_t *)output)[index] = dtype == HF_STOMPP_BF16 ? bf16_of_float(value) : f16_of_float(value);
}

/* Signs the features of a row from `begin` on; `first` is the index of feature 0 in the input. Their bits in `out` must
 * be clear. Returns how many it set. */
static inline int32_t sign_features(const void *input, int64_t dtype, int64_t first, const float *threshold,
                                    int64_t begin, int64_t features, uint8_t *out) {
    int32_t popcount = 0;
    for (int64_t k = begin; k < features; k++) {
        int bit = load_float(input, dtype, first + k) >= (threshold ? threshold[k] : 0.0f);
        out[k / 8] |= (uint8_t)(bit << k % 8);
        popcount += bit;
    }
    return popcount;
}

/* The rows from `row` on as bits: their own, or signed into `scratch`. */
static inline const uint8_t *bits_of_rows(const product *p, pack_sign_function *pack_sign, int64_t row, int64_t rows,
                                          uint8_t *scratch) {
    const void *input = input_row(p, row);
    if (p->input_dtype == HF_STOMPP_BITS) return input;
    pack_sign(input, p->input_dtype, p->threshold, rows, p->in_features, scratch, NULL);
    return scratch;
}

/* Scales one sum, and stores it as a value or as a bit; bits of a row must be cleared before. The scale of a row of
 * signs is 1. */
static inline void store_sum(const product *p, int64_t row, int64_t column, int32_t sum, float row_scale) {
    float value = (float)sum * row_scale * p->scale[column];
    if (p->bias) value = value + p->bias[column];
    int64_t index = row * p->out_features + column;
    uint16_t half = 0;
    if (p->output_dtype != HF_STOMPP_F32) {
        half = p->output_dtype == HF_STOMPP_BF16 ? bf16_of_float(value) : f16_of_float(value);
        value = p->output_dtype == HF_STOMPP_BF16 ? float_of_bf16(half) : float_of_f16(half);
    }
    if (p->output_bits) {
        float threshold = p->output_threshold ? p->output_threshold[column] : 0.0f;
        uint8_t *bits = p->output_bits + row * row_bytes(p->out_features);
        if (value >= threshold) bits[column / 8] |= (uint8_t)(1 << column % 8);
    } else if (p->output_dtype == HF_STOMPP_F32) {
        ((float *)p->output)[index] = value;
    } else {
        ((uint16_t *)p->output)[index] = half;
    }
}

#endif
