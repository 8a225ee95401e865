/* AVX-512 code that the avx512 and amx kernels share. Included by files compiled for AVX-512 only. */
#ifndef HF_STOMPP_AVX512_H
#define HF_STOMPP_AVX512_H

#include <immintrin.h>

#include "kernel.h"

/* Why the instructions that both kernels need cannot run; NULL if they can. */
static inline const char *avx512_unavailable(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return "the processor has no AVX-512 (F, BW, VL, DQ)";
    return NULL;
}

static inline __mmask16 first16(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

static inline __m512 load16(const void *input, int64_t dtype, int64_t index, __mmask16 live) {
    if (dtype == HF_STOMPP_F32) return _mm512_maskz_loadu_ps(live, (const float *)input + index);
    __m256i half = _mm256_maskz_loadu_epi16(live, (const uint16_t *)input + index);
    if (dtype == HF_STOMPP_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Always inlined with a constant dtype, so that the loop holds no branch on it. */
__attribute__((always_inline)) static inline void pack_rows(const void *input, int64_t dtype, const float *threshold,
                                                            int64_t rows, int64_t features, uint8_t *bits,
                                                            int32_t *popcounts) {
    int64_t bytes = row_bytes(features);
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *out = bits + row * bytes;
        int64_t popcount = 0, first = row * features;
        for (int64_t k = 0; k < 8 * bytes; k += 64) {
            uint64_t word = 0;
            if (k + 64 <= features) {
                for (int j = 0; j < 64; j += 16) {
                    __m512 limit = threshold ? _mm512_loadu_ps(threshold + k + j) : _mm512_setzero_ps();
                    __m512 value = load16(input, dtype, first + k + j, 0xffff);
                    word |= (uint64_t)_mm512_cmp_ps_mask(value, limit, _CMP_GE_OQ) << j;
                }
            } else {
                for (int j = 0; j < 64; j += 16) {
                    __mmask16 live = first16(features - k - j);
                    if (!live) break;
                    __m512 limit =
                        threshold ? _mm512_maskz_loadu_ps(live, threshold + k + j) : _mm512_setzero_ps();
                    __m512 value = load16(input, dtype, first + k + j, live);
                    word |= (uint64_t)_mm512_mask_cmp_ps_mask(live, value, limit, _CMP_GE_OQ) << j;
                }
            }
            memcpy(out + k / 8, &word, 8);
            popcount += __builtin_popcountll(word);
        }
        if (popcounts) popcounts[row] = (int32_t)popcount;
    }
}

static inline void pack_sign_avx512(const void *input, int64_t dtype, const float *threshold, int64_t rows,
                                    int64_t features, uint8_t *bits, int32_t *popcounts) {
    if (dtype == HF_STOMPP_F32)
        pack_rows(input, HF_STOMPP_F32, threshold, rows, features, bits, popcounts);
    else if (dtype == HF_STOMPP_BF16)
        pack_rows(input, HF_STOMPP_BF16, threshold, rows, features, bits, popcounts);
    else
        pack_rows(input, HF_STOMPP_F16, threshold, rows, features, bits, popcounts);
}

/* Round to nearest even, NaN to 0x7fc0, as bf16_of_float does. */
static inline __m512i bf16_of_float16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), nan, 0x7fc0);
}

/* store_sum for 16 columns from `column` on, of rows whose sums lie `stride` apart. */
static void store_sums16(const product *p, int64_t row, int64_t rows, int64_t column, const int32_t *sums,
                         int64_t stride) {
    const int64_t dtype = p->output_dtype, features = p->out_features, bit_bytes = row_bytes(features);
    const __mmask16 live = first16(features - column);
    const __m512 scale = _mm512_maskz_loadu_ps(live, p->scale + column);
    /* Adding -0.0 changes no number, not even -0.0. */
    const __m512 bias = p->bias ? _mm512_maskz_loadu_ps(live, p->bias + column) : _mm512_set1_ps(-0.0f);
    const __m512 limit =
        p->output_threshold ? _mm512_maskz_loadu_ps(live, p->output_threshold + column) : _mm512_setzero_ps();
    uint8_t *bits = p->output_bits ? p->output_bits + row * bit_bytes + column / 8 : NULL;
    uint8_t *output = (uint8_t *)p->output + (row * features + column) * element_bytes(dtype);
    for (int64_t i = 0; i < rows; i++) {
        __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(sums + i * stride));
        value = _mm512_add_ps(_mm512_mul_ps(value, scale), bias);
        __m256i half = _mm256_setzero_si256();
        if (dtype == HF_STOMPP_BF16) {
            __m512i wide = bf16_of_float16(value);
            half = _mm512_cvtepi32_epi16(wide);
            value = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
        } else if (dtype == HF_STOMPP_F16) {
            half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            value = _mm512_cvtph_ps(half);
        }
        if (bits) {
            uint16_t above = (uint16_t)_mm512_mask_cmp_ps_mask(live, value, limit, _CMP_GE_OQ);
            memcpy(bits + i * bit_bytes, &above, 2);
        } else if (dtype == HF_STOMPP_F32) {
            _mm512_mask_storeu_ps(output + i * features * 4, live, value);
        } else if (live == 0xffff) {
            _mm256_storeu_si256((__m256i *)(output + i * features * 2), half);
        } else {
            _mm256_mask_storeu_epi16(output + i * features * 2, live, half);
        }
    }
}

#endif
