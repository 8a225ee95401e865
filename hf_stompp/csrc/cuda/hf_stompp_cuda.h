/* The C interface of the CUDA kernels. Loaded by ctypes (hf_stompp/ops/cuda.py); nothing here knows of torch.
 *
 * Bits are those of ../cpu/hf_stompp.h: a bit is set where a value is >= its threshold and stands for +1, a clear bit
 * for -1; NaN gives a clear bit. Eight bits to a byte, least significant first; a row of bits takes row_bytes(features)
 * bytes (a multiple of 32), zero beyond its features. All matrices are row-major and dense, in the memory of `device`;
 * rows of bits begin at multiples of 16 bytes, all else at multiples of its element's size.
 *
 * Every call only enqueues work on `stream` of `device` and leaves the current device as it was. It returns 0, a
 * cudaError (positive), or a hf_stompp_cuda_status (negative).
 */
#ifndef HF_STOMPP_CUDA_H
#define HF_STOMPP_CUDA_H

#include <stdint.h>

#define HF_STOMPP_CUDA_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum hf_stompp_cuda_dtype { HF_STOMPP_CUDA_F32 = 0, HF_STOMPP_CUDA_BF16 = 1, HF_STOMPP_CUDA_F16 = 2 };

/* Elements that stand for +1, -1 and, beyond a row's features, 0. */
enum hf_stompp_cuda_signs { HF_STOMPP_CUDA_INT8 = 0, HF_STOMPP_CUDA_FLOAT8_E4M3 = 1 };

/* Instruction and tile (rows x columns) of a product. */
enum hf_stompp_cuda_kernel {
    HF_STOMPP_CUDA_AUTO = -1,
    HF_STOMPP_CUDA_MMA_64x64 = 0,
    HF_STOMPP_CUDA_MMA_128x128 = 1,
    HF_STOMPP_CUDA_WGMMA_64x64 = 2,
    HF_STOMPP_CUDA_WGMMA_64x128 = 3,
    HF_STOMPP_CUDA_KERNELS = 4
};

enum hf_stompp_cuda_status {
    HF_STOMPP_CUDA_OK = 0,
    /* The kernel that was asked for does not run on this device. */
    HF_STOMPP_CUDA_UNAVAILABLE = -1,
    /* More rows or features than the kernel takes. */
    HF_STOMPP_CUDA_TOO_LARGE = -2
};

/* The hash of the sources, as build.py passed it to the compiler. */
HF_STOMPP_CUDA_EXPORT const char *hf_stompp_cuda_source_hash(void);

/* What a status or cudaError means. */
HF_STOMPP_CUDA_EXPORT const char *hf_stompp_cuda_message(int status);

/* 0 if the library holds code that runs on the device; else what hinders it. */
HF_STOMPP_CUDA_EXPORT int hf_stompp_cuda_check(int64_t device);

/* Whether a kernel of hf_stompp_cuda_kernel runs on the device in one-bit instructions of its own: mma on compute
 * capability 8.x and 9.0, wgmma on 9.0. Elsewhere there are none, or they are emulated.
 */
HF_STOMPP_CUDA_EXPORT int hf_stompp_cuda_has_kernel(int64_t device, int64_t kernel);

/* The kernel that a product of this size runs; -1 if none can. */
HF_STOMPP_CUDA_EXPORT int hf_stompp_cuda_chosen(int64_t device, int64_t rows, int64_t in_features,
                                                int64_t out_features);

/* Arguments are passed as records of 64-bit fields.
 *
 * bits[m] = input[m] >= threshold, popcounts[m] = number of set bits in row m.
 */
struct hf_stompp_cuda_packing {
    int64_t device;
    void *stream;
    /* rows x features of input_dtype. */
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

HF_STOMPP_CUDA_EXPORT int hf_stompp_cuda_pack_sign(const struct hf_stompp_cuda_packing *);

/* signs[m][k] = +1 or -1 in an 8-bit type for each bit of a row, 0 beyond its features. */
struct hf_stompp_cuda_unpacking {
    int64_t device;
    void *stream;
    /* rows x row_bytes(features) */
    const uint8_t *bits;
    int64_t rows, features;
    /* rows x 8 * row_bytes(features) of signs_type, at a multiple of 8 bytes. */
    uint8_t *signs;
    int64_t signs_type;
};

HF_STOMPP_CUDA_EXPORT int hf_stompp_cuda_unpack_signs(const struct hf_stompp_cuda_unpacking *);

/* y[m][n] = round(scale[n] * sum_k s[m][k] v[n][k] + bias[n]) with s, v in {-1, +1}: the sum is an exact integer (of
 * fewer than 2^24 terms), product and sum are rounded to float one after the other, then to output_dtype.
 */
struct hf_stompp_cuda_product {
    int64_t device;
    void *stream;
    int64_t kernel;
    /* rows of bits of in_features. */
    const uint8_t *input;
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
    /* NULL, or rows of bits of out_features: y >= output_threshold, NULL for 0. Bits of an infinite scale with the
     * threshold -inf are not defined. */
    uint8_t *output_bits;
    const float *output_threshold;
};

HF_STOMPP_CUDA_EXPORT int hf_stompp_cuda_binary_linear(const struct hf_stompp_cuda_product *);

/* output[m] = LayerNorm(input[m] + residual[m]) over the features, which are a multiple of 8, at most 4096; the sum is
 * rounded to dtype, mean and variance are taken in float, the result is rounded to dtype; bits[m] = output[m] >=
 * threshold. Matrices begin at multiples of 16 bytes.
 */
struct hf_stompp_cuda_layer_norm {
    int64_t device;
    void *stream;
    /* rows x features of dtype. */
    const void *input;
    /* Likewise, or NULL. */
    const void *residual;
    int64_t dtype;
    /* features of parameter_dtype, at multiples of 16 bytes. */
    const void *weight;
    const void *bias;
    int64_t parameter_dtype;
    double epsilon;
    /* features, at a multiple of 16 bytes, or NULL for 0. */
    const float *threshold;
    int64_t rows, features;
    /* rows x features of dtype. */
    void *output;
    /* rows x row_bytes(features), or NULL. */
    uint8_t *bits;
};

HF_STOMPP_CUDA_EXPORT int hf_stompp_cuda_layer_norm_sign(const struct hf_stompp_cuda_layer_norm *);

/* output[n] = sum_k v[n][k] vector[k], or output[k] = sum_n v[n][k] vector[n] if transposed, in double. */
struct hf_stompp_cuda_vector_product {
    int64_t device;
    void *stream;
    /* out_features rows of bits of in_features. */
    const uint8_t *weight;
    int64_t out_features, in_features, transposed;
    const double *vector;
    double *output;
};

HF_STOMPP_CUDA_EXPORT int hf_stompp_cuda_sign_product(const struct hf_stompp_cuda_vector_product *);

/* Scale and bias of the integer product that equals a layer on inputs offset[k] +- amplitude and weights +-row_scale[n]:
 * scale[n] = row_scale[n] * amplitude, constant[n] = row_scale[n] * sum_k v[n][k] offset[k] + bias[n], in double,
 * rounded once.
 */
struct hf_stompp_cuda_folding {
    int64_t device;
    void *stream;
    /* out_features rows of bits of in_features. */
    const uint8_t *weight;
    int64_t out_features, in_features;
    /* out_features */
    const float *row_scale;
    /* in_features, or one if offset_stride is 0. */
    const float *offset;
    int64_t offset_stride;
    const float *amplitude;
    /* out_features, or NULL. */
    const float *bias;
    /* out_features each. */
    float *scale, *constant;
};

HF_STOMPP_CUDA_EXPORT int hf_stompp_cuda_fold(const struct hf_stompp_cuda_folding *);

#ifdef __cplusplus
}
#endif
#endif
