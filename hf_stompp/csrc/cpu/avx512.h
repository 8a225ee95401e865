/* AVX-512 code that the avx512 and amx kernels share. Included by files compiled for AVX-512 only. */
#ifndef HF_STOMPP_AVX512_H
#define HF_STOMPP_AVX512_H

#include <immintrin.h>

#include "bytes.h"
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
    WITH_DTYPE(dtype, pack_rows(input, DTYPE, threshold, rows, features, bits, popcounts));
}

/* quantize_row_of in vectors. */
ALWAYS_INLINE float quantize_row16_of(const void *input, int64_t dtype, int64_t row, int64_t features, int8_t *codes,
                                      int32_t *total) {
    int64_t first = row * features;
    __m512i magnitudes = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < features; k += 16) {
        __m512 value = _mm512_abs_ps(load16(input, dtype, first + k, first16(features - k)));
        magnitudes = _mm512_max_epu32(magnitudes, _mm512_castps_si512(value));
    }
    float largest = float_of_bits(_mm512_reduce_max_epu32(magnitudes)), inverse = 127.0f / largest;
    int is_usable = isfinite(largest) && isfinite(inverse);
    for (int64_t k = 0; k < code_bytes(features); k += 16) {
        __m512i code = _mm512_setzero_si512();
        if (is_usable)
            code = _mm512_cvtps_epi32(
                _mm512_mul_ps(load16(input, dtype, first + k, first16(features - k)), _mm512_set1_ps(inverse)));
        sum = _mm512_add_epi32(sum, code);
        _mm_storeu_si128((__m128i *)(codes + k), _mm512_cvtepi32_epi8(code));
    }
    *total = _mm512_reduce_add_epi32(sum);
    return is_usable ? largest / 127.0f : isfinite(largest) ? 0.0f : NAN;
}

/* quantize_rows in vectors. */
static inline void quantize_rows16(const product *p, int64_t row, int64_t rows, int8_t *codes, float *scales,
                                   int32_t *totals) {
    QUANTIZE_ROWS(quantize_row16_of)
}

/* Round to nearest even, NaN to 0x7fc0, as bf16_of_float does. */
static inline __m512i bf16_of_float16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), nan, 0x7fc0);
}

/* store_sum for 16 columns from `column` on, of rows whose sums lie `stride` apart. No row_scales: they are 1. */
static void store_sums16(const product *p, int64_t row, int64_t rows, int64_t column, const int32_t *sums,
                         int64_t stride, const float *row_scales) {
    const int64_t dtype = p->output_dtype, features = p->out_features, bit_bytes = row_bytes(features);
    const __mmask16 live = first16(features - column);
    const __m512 scale = _mm512_maskz_loadu_ps(live, p->scale + column);
    /* Adding -0.0 changes no number, not even -0.0. */
    const __m512 bias = p->bias ? _mm512_maskz_loadu_ps(live, p->bias + column) : _mm512_set1_ps(-0.0f);
    const __m512 limit =
        p->output_threshold ? _mm512_maskz_loadu_ps(live, p->output_threshold + column) : _mm512_setzero_ps();
    uint8_t *bits = p->output_bits ? p->output_bits + row * bit_bytes + column / 8 : NULL;
    uint8_t *output = bits ? NULL : (uint8_t *)p->output + (row * features + column) * element_bytes(dtype);
    for (int64_t i = 0; i < rows; i++) {
        __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(sums + i * stride));
        if (row_scales) value = _mm512_mul_ps(value, _mm512_set1_ps(row_scales[i]));
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

/* A tile is 16 rows of 64 bytes. One of the weight holds 64 features of 16 columns: row r of the tile is features 4r ..
 * 4r + 3, the four of a column side by side. A strip is the tiles of 16 columns over all features. */
enum { TILE_ROWS = 16, TILE_COLUMNS = 16, TILE_FEATURES = 64, TILE_BYTES = TILE_ROWS * TILE_FEATURES };

static inline int64_t tiles_in_strip(const product *p) { return divide_up(p->in_features, TILE_FEATURES); }

/* Expands one strip: 1 where a bit is set, `clear` where not. Columns beyond the last are whatever no bits give: their
 * sums are not stored. */
ALWAYS_INLINE void expand_columns(const product *p, int64_t column, __m512i clear, uint8_t *strip) {
    int64_t bytes = row_bytes(p->in_features), columns = min_int64(TILE_COLUMNS, p->out_features - column);
    __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    __m512i even_offsets = _mm512_mullo_epi64(lanes, _mm512_set1_epi64(2 * bytes));
    __m512i odd_offsets = _mm512_add_epi64(even_offsets, _mm512_set1_epi64(bytes));
    __mmask8 even_live = (__mmask8)((1 << (columns + 1) / 2) - 1), odd_live = (__mmask8)((1 << columns / 2) - 1);
    /* Byte 8q + b of the result is byte q of lane b. */
    __m512i transpose = _mm512_add_epi64(_mm512_set1_epi64(0x3830282018100800),
                                         _mm512_mullo_epi64(lanes, _mm512_set1_epi64(0x0101010101010101)));
    __m512i low_nibbles = _mm512_set1_epi8(0x0f), none = _mm512_setzero_si512(), set = _mm512_set1_epi8(1);
    const uint8_t *weight = p->weight + column * bytes;
    int64_t tiles = tiles_in_strip(p);
    for (int64_t tile = 0; tile < tiles; tile++, weight += 8, strip += TILE_BYTES) {
        __m512i even = _mm512_mask_i64gather_epi64(none, even_live, even_offsets, weight, 1);
        __m512i odd = _mm512_mask_i64gather_epi64(none, odd_live, odd_offsets, weight, 1);
        even = _mm512_permutexvar_epi8(transpose, even);
        odd = _mm512_permutexvar_epi8(transpose, odd);
        /* 0xca picks its second operand where a bit of the first is set, else the third. */
        __m512i low = _mm512_ternarylogic_epi64(low_nibbles, even, _mm512_slli_epi16(odd, 4), 0xca);
        __m512i high = _mm512_ternarylogic_epi64(low_nibbles, _mm512_srli_epi16(even, 4), odd, 0xca);
        /* A row of the tile is 64 bits now. They go through memory: to load a mask is one instruction, to take a lane
         * out of a vector, as the compiler would, up to three. */
        uint64_t words[2][8] __attribute__((aligned(64)));
        _mm512_store_si512(words[0], low);
        _mm512_store_si512(words[1], high);
        __asm__("" : "+m"(words));
#pragma GCC unroll 8
        for (int q = 0; q < 8; q++) {
            _mm512_store_si512(strip + 2 * q * TILE_FEATURES, _mm512_mask_blend_epi8(words[0][q], clear, set));
            _mm512_store_si512(strip + (2 * q + 1) * TILE_FEATURES, _mm512_mask_blend_epi8(words[1][q], clear, set));
        }
    }
}

#endif
