/* The C interface of the CPU kernels. Loaded by ctypes (hf_stompp/ops/cpu.py); nothing here knows of torch.
 *
 * A bit is set where a value is >= its threshold and stands for +1, a clear bit for -1; NaN gives a clear bit. Eight
 * bits to a byte, least significant first; a row of bits takes row_bytes(features) bytes (a multiple of 32), zero
 * beyond its features. All matrices are row-major and dense, and have at least one feature. Pointers need no alignment
 * beyond that of their element type.
 */
#ifndef HF_STOMPP_H
#define HF_STOMPP_H

#include <stdint.h>

#define HF_STOMPP_EXPORT __attribute__((visibility("default")))

enum hf_stompp_dtype { HF_STOMPP_F32 = 0, HF_STOMPP_BF16 = 1, HF_STOMPP_F16 = 2, HF_STOMPP_BITS = 3 };

/* In the order in which they are preferred. */
enum hf_stompp_kernel {
    HF_STOMPP_AUTO = -1,
    HF_STOMPP_AMX = 0,
    HF_STOMPP_AVX512 = 1,
    HF_STOMPP_AVX2 = 2,
    HF_STOMPP_NEON = 3,
    HF_STOMPP_SCALAR = 4,
    HF_STOMPP_KERNELS = 5
};

/* Gradient of the frozen entries, see SURROGATES in hf_stompp/ops/weights.py. */
enum hf_stompp_surrogate { HF_STOMPP_NO_SURROGATE = 0, HF_STOMPP_STE = 1, HF_STOMPP_CLIPPED_STE = 2 };

enum hf_stompp_status { HF_STOMPP_OK = 0, HF_STOMPP_NO_MEMORY = 1, HF_STOMPP_UNAVAILABLE = 2 };

/* The hash of the sources, as build.py passed it to the compiler. */
HF_STOMPP_EXPORT const char *hf_stompp_source_hash(void);

/* 1 if built with OpenMP, 0 if every call runs on one thread. */
HF_STOMPP_EXPORT int hf_stompp_has_threads(void);

/* Why a kernel cannot run here; NULL if it can. */
HF_STOMPP_EXPORT const char *hf_stompp_unavailable(int kernel);

/* The kernel that a product with this many rows runs; -1 if none can. Nothing else runs on AMX: where it is asked for,
 * the best of the others does that. */
HF_STOMPP_EXPORT int hf_stompp_chosen(int kernel, int64_t rows);

/* Runs the inner instructions of a kernel `steps` times on registers alone, to measure what they could do at best.
 * Returns the pairs of bits they would have multiplied; 0 where that cannot be measured.
 */
HF_STOMPP_EXPORT int64_t hf_stompp_limit(int kernel, int64_t steps);

/* Arguments are passed as records of 64-bit fields: Python packs one in a tenth of the time in which ctypes converts
 * as many arguments.
 *
 * bits[m] = input[m] >= threshold, popcounts[m] = number of set bits in row m.
 */
struct hf_stompp_packing {
    int64_t kernel, threads;
    /* rows x features of input_dtype, not BITS. */
    const void *input;
    int64_t input_dtype;
    /* features, or NULL for 0. */
    const float *threshold;
    int64_t rows, features;
    /* rows x row_bytes(features) */
    uint8_t *bits;
    /* rows, or NULL. */
    int32_t *popcounts;
};

HF_STOMPP_EXPORT int hf_stompp_pack_sign(const struct hf_stompp_packing *);

/* y[m][n] = round(scale[n] * sum_k s[m][k] v[n][k] + bias[n]) with s, v in {-1, +1}: the sum is an exact integer (of
 * fewer than 2^24 terms), product and sum are rounded to float one after the other, then to output_dtype.
 * With 8 activation bits s is the byte that the input is rounded to, and the sum, first rounded to float, is multiplied
 * by the scale of its row before it is by scale[n].
 */
struct hf_stompp_product {
    int64_t kernel, threads;
    /* rows x in_features, signed as in a packing, or BITS; floats with 8 activation bits. */
    const void *input;
    int64_t input_dtype;
    const float *threshold;
    /* out_features rows of bits. */
    const uint8_t *weight;
    /* out_features */
    const float *scale;
    /* out_features, or NULL. */
    const float *bias;
    int64_t rows, in_features, out_features;
    /* rows x out_features of output_dtype; not used if output_bits is given. */
    void *output;
    int64_t output_dtype;
    /* NULL, or rows of bits of out_features: y >= output_threshold, NULL for 0. */
    uint8_t *output_bits;
    const float *output_threshold;
    /* 8, without a threshold and output_bits; anything else is 1. */
    int64_t activation_bits;
};

HF_STOMPP_EXPORT int hf_stompp_binary_linear(const struct hf_stompp_product *);

/* Without a gradient: output = scale * sign(weight) where the mask is set, else weight clipped to +-clip * scale.
 * With one: output = gradient where it passes, else 0; the range of a frozen weight is +-window * scale.
 */
struct hf_stompp_masked_weight {
    int64_t kernel, threads;
    /* rows x columns of weight_dtype. */
    const void *weight;
    int64_t weight_dtype;
    /* rows x columns of 0 and 1. */
    const uint8_t *mask;
    /* rows */
    const float *scale;
    double clip, window;
    int64_t rows, columns;
    /* NULL, or rows x columns of other_dtype. */
    const void *gradient;
    int64_t surrogate;
    /* rows x columns of other_dtype; of weight_dtype with a gradient. */
    void *output;
    int64_t other_dtype;
};

HF_STOMPP_EXPORT int hf_stompp_masked_weight(const struct hf_stompp_masked_weight *);

/* Without sums: output = offset +- amplitude where the mask is set, + where pre_activation >= threshold; else
 * value clipped to center +- bound. passes: whether the gradient passes to the value, whose range is center +- window
 * where the mask is set; upper: which side of the middle it is on.
 * With sums: output = gradient where it passes, else 0, and sums over the rows.
 */
struct hf_stompp_masked_activation {
    int64_t kernel, threads;
    /* rows x features of dtype. */
    const void *value, *pre_activation;
    int64_t dtype;
    /* features of 0 and 1. */
    const uint8_t *mask;
    /* features, features, 1, features, 1, 1. */
    const float *threshold, *offset, *amplitude, *center, *bound, *window;
    int64_t surrogate, rows, features;
    /* rows of bits of features. */
    uint8_t *passes, *upper;
    /* With sums: rows x features of dtype. */
    const void *gradient;
    /* rows x features of dtype. */
    void *output;
    /* NULL without a gradient; else 3 x features: the sums of what passes; of what does not or is frozen; of the upper
     * of those. */
    double *sums;
};

HF_STOMPP_EXPORT int hf_stompp_masked_activation(const struct hf_stompp_masked_activation *);

/* output = signs @ vector, or vector @ signs if transposed. */
struct hf_stompp_sign_product {
    int64_t kernel, threads;
    /* out_features rows of bits. */
    const uint8_t *weight;
    int64_t out_features, in_features, transposed;
    /* in_features, or out_features if transposed; the output the other way round. */
    const double *vector;
    double *output;
};

HF_STOMPP_EXPORT int hf_stompp_sign_product(const struct hf_stompp_sign_product *);

#endif
