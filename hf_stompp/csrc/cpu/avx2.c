/* XOR and a table look-up. AVX2 has no popcount, but VPSHUFB looks up 32 entries of a 16-entry table at once. With
 * many rows, 64 columns lie side by side, one byte of each (a panel): the four bits of a row that meet a nibble of
 * each column choose the table, the nibbles its entries, so that XOR and popcount are one instruction. With few rows
 * the weight is read as it is stored, XORed, and its nibbles are counted.
 */
#include <immintrin.h>

#include "bytes.h"
#include "kernel.h"

enum {
    /* 3 rows x 2 vectors of byte sums, the columns' nibbles and the tables fill 16 registers. */
    ROWS = 3,
    COLUMNS = 64,
    /* Steps of two nibbles until a byte sum could overflow: 31 x 2 x 4 <= 255. */
    STEPS = 31,
    /* Rows from which laying out panels pays. */
    MANY_ROWS = 12,
    /* Sums of 16 bits hold no more. */
    MAX_FEATURES = 65535,
    PANEL_BYTES = 256 * 1024,
};

/* tables[a][b % 16] = popcount(a ^ b), twice in a row. */
static const uint8_t tables[16][32] __attribute__((aligned(32))) = {
#define ROW(a) {BIT(a, 0), BIT(a, 1), BIT(a, 2), BIT(a, 3), BIT(a, 4), BIT(a, 5), BIT(a, 6), BIT(a, 7), \
                BIT(a, 8), BIT(a, 9), BIT(a, 10), BIT(a, 11), BIT(a, 12), BIT(a, 13), BIT(a, 14), BIT(a, 15), \
                BIT(a, 0), BIT(a, 1), BIT(a, 2), BIT(a, 3), BIT(a, 4), BIT(a, 5), BIT(a, 6), BIT(a, 7), \
                BIT(a, 8), BIT(a, 9), BIT(a, 10), BIT(a, 11), BIT(a, 12), BIT(a, 13), BIT(a, 14), BIT(a, 15)}
#define BIT(a, b) ((((a) ^ (b)) & 1) + (((a) ^ (b)) >> 1 & 1) + (((a) ^ (b)) >> 2 & 1) + (((a) ^ (b)) >> 3 & 1))
    ROW(0), ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6), ROW(7),
    ROW(8), ROW(9), ROW(10), ROW(11), ROW(12), ROW(13), ROW(14), ROW(15),
#undef ROW
#undef BIT
};

static const char *unavailable(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2")) return "the processor has no AVX2";
    /* Every processor with AVX2 has these, but a virtual machine may hide them. */
    if (!__builtin_cpu_supports("popcnt")) return "the processor has no POPCNT";
    if (!__builtin_cpu_supports("f16c")) return "the processor has no F16C";
    return NULL;
}

static inline __m256 load8(const void *input, int64_t dtype, int64_t index) {
    if (dtype == HF_STOMPP_F32) return _mm256_loadu_ps((const float *)input + index);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)input + index));
    if (dtype == HF_STOMPP_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* Always inlined with a constant dtype, so that the loop holds no branch on it. */
__attribute__((always_inline)) static inline void pack_rows(const void *input, int64_t dtype, const float *threshold,
                                                            int64_t rows, int64_t features, uint8_t *bits,
                                                            int32_t *popcounts) {
    int64_t bytes = row_bytes(features);
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *out = bits + row * bytes;
        int32_t popcount = 0;
        int64_t first = row * features, k = 0;
        for (; k + 8 <= features; k += 8) {
            __m256 limit = threshold ? _mm256_loadu_ps(threshold + k) : _mm256_setzero_ps();
            int byte = _mm256_movemask_ps(_mm256_cmp_ps(load8(input, dtype, first + k), limit, _CMP_GE_OQ));
            out[k / 8] = (uint8_t)byte;
            popcount += __builtin_popcount((unsigned)byte);
        }
        memset(out + k / 8, 0, (size_t)(bytes - k / 8));
        popcount += sign_features(input, dtype, first, threshold, k, features, out);
        if (popcounts) popcounts[row] = popcount;
    }
}

static void pack_sign(const void *input, int64_t dtype, const float *threshold, int64_t rows, int64_t features,
                      uint8_t *bits, int32_t *popcounts) {
    WITH_DTYPE(dtype, pack_rows(input, DTYPE, threshold, rows, features, bits, popcounts));
}

/* store_sum for 8 columns from `column` on. */
static inline void store_sums8(const product *p, int64_t row, int64_t column, __m256i sums, float row_scale) {
    if (column + 8 > p->out_features) {
        int32_t each[8];
        _mm256_storeu_si256((__m256i *)each, sums);
        for (int64_t j = column; j < p->out_features; j++) store_sum(p, row, j, each[j - column], row_scale);
        return;
    }
    int64_t index = row * p->out_features + column;
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(row_scale));
    value = _mm256_mul_ps(value, _mm256_loadu_ps(p->scale + column));
    if (p->bias) value = _mm256_add_ps(value, _mm256_loadu_ps(p->bias + column));
    __m128i half = _mm_setzero_si128();
    if (p->output_dtype == HF_STOMPP_BF16) {
        __m256i bits = _mm256_castps_si256(value);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
        __m256i wide = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(_mm256_srli_epi32(rounded, 16)),
                                                            _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0)), nan));
        half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        value = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    } else if (p->output_dtype == HF_STOMPP_F16) {
        half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        value = _mm256_cvtph_ps(half);
    }
    if (p->output_bits) {
        __m256 limit =
            p->output_threshold ? _mm256_loadu_ps(p->output_threshold + column) : _mm256_setzero_ps();
        p->output_bits[row * row_bytes(p->out_features) + column / 8] =
            (uint8_t)_mm256_movemask_ps(_mm256_cmp_ps(value, limit, _CMP_GE_OQ));
    } else if (p->output_dtype == HF_STOMPP_F32) {
        _mm256_storeu_ps((float *)p->output + index, value);
    } else {
        _mm_storeu_si128((__m128i *)((uint16_t *)p->output + index), half);
    }
}

/* store_sum for some rows of COLUMNS columns. Out of line: unrolled into its callers it takes long to compile and is no
 * faster. multiply_block, which has fewer steps between two stores, is a few percent faster with its own. */
static __attribute__((noinline)) void store_sums(const product *p, int64_t row, int rows, int64_t column,
                                                 const int32_t *sums, const float *row_scales) {
    int64_t columns = min_int64(COLUMNS, p->out_features - column);
    for (int i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j += 8)
            store_sums8(p, row + i, column + j, _mm256_load_si256((const __m256i *)(sums + i * COLUMNS + j)),
                        row_scales[i]);
}

/* Bytes in a row that hold features. */
static inline int64_t used_bytes(const product *p) { return divide_up(p->in_features, 8); }

static inline int64_t panel_bytes(const product *p) { return divide_up(used_bytes(p), 16) * 16 * COLUMNS; }

static int64_t panels_at_a_time(const product *p) { return max_int64(1, PANEL_BYTES / panel_bytes(p)); }

/* What all panels of a part that are laid out at a time take. */
static int64_t bytes_of_panels(const product *p, const struct part *part) {
    int64_t panels = divide_up(part->column_end - part->column_begin, COLUMNS);
    return min_int64(panels_at_a_time(p), panels) * panel_bytes(p);
}

static int uses_panels(const product *p, const struct part *part) {
    return part->row_end - part->row_begin >= MANY_ROWS && p->in_features <= MAX_FEATURES;
}

static size_t scratch_bytes(const product *p, const struct part *part) {
    size_t input = (size_t)(4 * row_bytes(p->in_features));
    return uses_panels(p, part) ? input + (size_t)bytes_of_panels(p, part) : input;
}

/* 16 rows of 16 bytes to 16 columns: four rounds of interleaving row i with row i + 8. */
static inline void transpose16(__m128i r[16]) {
    __m128i t[16];
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
            t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
        }
        for (int i = 0; i < 8; i++) {
            r[2 * i] = _mm_unpacklo_epi8(t[i], t[i + 8]);
            r[2 * i + 1] = _mm_unpackhi_epi8(t[i], t[i + 8]);
        }
    }
}

static void lay_out_panel(const product *p, int64_t column, uint8_t *panel) {
    int64_t bytes = row_bytes(p->in_features), used = used_bytes(p);
    for (int64_t k = 0; k < used; k += 16)
        for (int first = 0; first < COLUMNS; first += 16) {
            __m128i r[16];
            for (int j = 0; j < 16; j++)
                r[j] = column + first + j < p->out_features
                           ? _mm_loadu_si128((const __m128i *)(p->weight + (column + first + j) * bytes + k))
                           : _mm_setzero_si128();
            transpose16(r);
            for (int j = 0; j < 16; j++) _mm_store_si128((__m128i *)(panel + (k + j) * COLUMNS + first), r[j]);
        }
}

/* The panels of columns `begin` to `end`, one behind the other. */
static void lay_out_panels(const product *p, int64_t begin, int64_t end, uint8_t *panels) {
    for (int64_t column = begin; column < end; column += COLUMNS, panels += panel_bytes(p))
        lay_out_panel(p, column, panels);
}

__attribute__((always_inline)) static inline void multiply_block(const product *p, const uint8_t *input,
                                                                 int rows, const uint8_t *panel, int64_t row,
                                                                 int64_t column) {
    int64_t bytes = row_bytes(p->in_features), used = used_bytes(p);
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i different[ROWS][4];
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) different[i][j] = _mm256_setzero_si256();
    for (int64_t begin = 0; begin < used; begin += STEPS) {
        int64_t end = min_int64(used, begin + STEPS);
        __m256i sum[ROWS][2];
#pragma GCC unroll 3
        for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        for (int64_t k = begin; k < end; k++) {
            __m256i low[2], high[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                __m256i weight = _mm256_load_si256((const __m256i *)(panel + k * COLUMNS + 32 * j));
                low[j] = _mm256_and_si256(weight, nibble);
                high[j] = _mm256_and_si256(_mm256_srli_epi16(weight, 4), nibble);
            }
#pragma GCC unroll 3
            for (int i = 0; i < rows; i++) {
                uint8_t byte = input[i * bytes + k];
                __m256i table_low = _mm256_load_si256((const __m256i *)tables[byte & 15]);
                __m256i table_high = _mm256_load_si256((const __m256i *)tables[byte >> 4]);
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    sum[i][j] = _mm256_add_epi8(sum[i][j], _mm256_shuffle_epi8(table_low, low[j]));
                    sum[i][j] = _mm256_add_epi8(sum[i][j], _mm256_shuffle_epi8(table_high, high[j]));
                }
            }
        }
#pragma GCC unroll 3
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m128i half = j % 2 ? _mm256_extracti128_si256(sum[i][j / 2], 1)
                                     : _mm256_castsi256_si128(sum[i][j / 2]);
                different[i][j] = _mm256_add_epi16(different[i][j], _mm256_cvtepu8_epi16(half));
            }
    }
    const __m256i features = _mm256_set1_epi32((int)p->in_features);
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            if (column + 8 * j >= p->out_features) break;
            __m128i half = j % 2 ? _mm256_extracti128_si256(different[i][j / 2], 1)
                                 : _mm256_castsi256_si128(different[i][j / 2]);
            __m256i count = _mm256_cvtepu16_epi32(half);
            __m256i sums = _mm256_sub_epi32(features, _mm256_slli_epi32(count, 1));
            store_sums8(p, row + i, column + 8 * j, sums, 1.0f);
        }
}

static void multiply_many_rows(const product *p, const struct part *part, uint8_t *packed, uint8_t *panels) {
    int64_t columns_at_a_time = panels_at_a_time(p) * COLUMNS;
    for (int64_t begin = part->column_begin; begin < part->column_end; begin += columns_at_a_time) {
        int64_t end = min_int64(part->column_end, begin + columns_at_a_time);
        lay_out_panels(p, begin, end, panels);
        for (int64_t row = part->row_begin; row < part->row_end; row += ROWS) {
            int64_t rows = min_int64(ROWS, part->row_end - row);
            const uint8_t *input = bits_of_rows(p, pack_sign, row, rows, packed);
            for (int64_t column = begin; column < end; column += COLUMNS) {
                const uint8_t *panel = panels + (column - begin) / COLUMNS * panel_bytes(p);
                if (rows == 3)
                    multiply_block(p, input, 3, panel, row, column);
                else if (rows == 2)
                    multiply_block(p, input, 2, panel, row, column);
                else
                    multiply_block(p, input, 1, panel, row, column);
            }
        }
    }
}

__attribute__((always_inline)) static inline void multiply_as_stored(const product *p, const uint8_t *input,
                                                                     int rows, int64_t row,
                                                                     const struct part *part) {
    int64_t bytes = row_bytes(p->in_features);
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const __m256i popcount = _mm256_load_si256((const __m256i *)tables[0]);
    for (int64_t column = part->column_begin; column < part->column_end; column++) {
        const uint8_t *weight = p->weight + column * bytes;
        __m256i different[4];
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) different[i] = zero;
        for (int64_t k = 0; k < bytes; k += 32) {
            __m256i word = _mm256_loadu_si256((const __m256i *)(weight + k));
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) {
                __m256i value = _mm256_loadu_si256((const __m256i *)(input + i * bytes + k));
                __m256i x = _mm256_xor_si256(word, value);
                __m256i low = _mm256_shuffle_epi8(popcount, _mm256_and_si256(x, nibble));
                __m256i high = _mm256_shuffle_epi8(popcount, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
                different[i] = _mm256_add_epi64(different[i], _mm256_sad_epu8(_mm256_add_epi8(low, high), zero));
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            __m128i half =
                _mm_add_epi64(_mm256_castsi256_si128(different[i]), _mm256_extracti128_si256(different[i], 1));
            int64_t count = _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
            store_sum(p, row + i, column, (int32_t)(p->in_features - 2 * count), 1.0f);
        }
    }
}

static void multiply(const product *p, const struct part *part, void *scratch) {
    int64_t bytes = row_bytes(p->in_features);
    uint8_t *packed = scratch;
    if (uses_panels(p, part)) {
        multiply_many_rows(p, part, packed, packed + 4 * bytes);
        return;
    }
    for (int64_t row = part->row_begin; row < part->row_end;) {
        int64_t rows = part->row_end - row >= 4 ? 4 : 1;
        const uint8_t *input = bits_of_rows(p, pack_sign, row, rows, packed);
        if (rows == 4)
            multiply_as_stored(p, input, 4, row, part);
        else
            multiply_as_stored(p, input, 1, row, part);
        row += rows;
    }
}

static int64_t limit(int64_t steps) {
    __m256i sum[ROWS][2], nibbles[2], table = _mm256_load_si256((const __m256i *)tables[5]);
    for (int j = 0; j < 2; j++) nibbles[j] = _mm256_set1_epi8((char)j);
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) sum[i][j] = _mm256_setzero_si256();
    for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 3
        for (int i = 0; i < ROWS; i++) {
            /* The compiler is to believe that the table is another one in each step. */
            __asm__ volatile("" : "+x"(table));
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++)
                sum[i][j] = _mm256_add_epi8(sum[i][j], _mm256_shuffle_epi8(table, nibbles[j]));
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) __asm__ volatile("" : : "x"(sum[i][j]));
    /* A look-up counts 4 bits in each of 32 bytes. */
    return steps * ROWS * 2 * 128;
}

/* --- rows of bytes: VPSHUFB looks up the sum of 4 codes for the 4 bits of each of 32 columns --- */

enum {
    /* Codes of a table, which has 16 sums: each of the codes whose bits are set. */
    GROUP = 4,
    /* A sum and this is below 1024. Its low and its high 5 bits are looked up apart: eight fit into a byte. */
    TABLE_OFFSET = 512,
    TABLE_BYTES = 32,
    STEP_TABLES = 8,
    /* Sums of 16 bits hold those of so many steps: 8 x 31 x 256 <= 65535. */
    TABLE_STEPS = 256,
    TABLE_ROWS = 2,
};

static inline int64_t tables_of_row(const product *p) { return code_bytes(p->in_features) / GROUP; }

static size_t byte_scratch_bytes_avx2(const product *p, const struct part *part) {
    int64_t row = tables_of_row(p) * TABLE_BYTES + code_bytes(p->in_features);
    return (size_t)(bytes_of_panels(p, part) + TABLE_ROWS * row);
}

static void write_tables(const int8_t *codes, int64_t tables, uint8_t *table) {
    const __m256i offset = _mm256_set1_epi16(TABLE_OFFSET), low_bits = _mm256_set1_epi16(31);
    /* The low two bits of 0 to 15, a byte each, and the high two. */
    const __m256i low_flags = _mm256_set1_epi64x(0x0101010000010000);
    const __m256i high_flags =
        _mm256_setr_epi16(0, 0, 0, 0, 1, 1, 1, 1, 0x100, 0x100, 0x100, 0x100, 0x101, 0x101, 0x101, 0x101);
    for (int64_t k = 0; k < tables; k++, codes += GROUP, table += TABLE_BYTES) {
        int16_t pairs[2];
        memcpy(pairs, codes, GROUP);
        __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(low_flags, _mm256_set1_epi16(pairs[0])),
                                        _mm256_maddubs_epi16(high_flags, _mm256_set1_epi16(pairs[1])));
        sums = _mm256_add_epi16(sums, offset);
        __m256i parts = _mm256_packus_epi16(_mm256_and_si256(sums, low_bits), _mm256_srli_epi16(sums, 5));
        _mm256_store_si256((__m256i *)table, _mm256_permute4x64_epi64(parts, 0xd8));
    }
}

ALWAYS_INLINE __m256i table_at(const uint8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)table));
}

/* Adds a vector's bytes to sums of 16 bits, those of even and of odd columns apart. */
ALWAYS_INLINE void add_bytes(__m256i bytes, __m256i words[2]) {
    words[0] = _mm256_add_epi16(words[0], _mm256_and_si256(bytes, _mm256_set1_epi16(255)));
    words[1] = _mm256_add_epi16(words[1], _mm256_srli_epi16(bytes, 8));
}

/* Twice the sums of 8 columns of a vector's 32, from the words of low and of high bytes. Columns 0 to 7 and 16 to 23
 * are the low words of its halves, the others the high ones. */
ALWAYS_INLINE __m256i twice_sums(const __m256i words[4], int eight) {
    __m256i low = _mm256_unpacklo_epi16(words[0], words[1]), high = _mm256_unpacklo_epi16(words[2], words[3]);
    if (eight % 2) {
        low = _mm256_unpackhi_epi16(words[0], words[1]);
        high = _mm256_unpackhi_epi16(words[2], words[3]);
    }
    __m128i low_words = eight < 2 ? _mm256_castsi256_si128(low) : _mm256_extracti128_si256(low, 1);
    __m128i high_words = eight < 2 ? _mm256_castsi256_si128(high) : _mm256_extracti128_si256(high, 1);
    return _mm256_add_epi32(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low_words), 1),
                            _mm256_slli_epi32(_mm256_cvtepu16_epi32(high_words), 6));
}

/* `rows` rows of tables by 64 columns. */
ALWAYS_INLINE void multiply_tables(const product *p, const uint8_t *tables, int rows, const uint8_t *panel,
                                   int64_t row, int64_t column, const float *scales, const int32_t *totals) {
    const __m256i nibble = _mm256_set1_epi8(15);
    int64_t row_bytes = tables_of_row(p) * TABLE_BYTES, steps = tables_of_row(p) / STEP_TABLES;
    __m256i sums[TABLE_ROWS][8];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 8; j++)
            sums[i][j] = _mm256_set1_epi32((int)(-2 * TABLE_OFFSET * STEP_TABLES * steps - totals[i]));
    for (int64_t begin = 0; begin < steps; begin += TABLE_STEPS) {
        int64_t end = min_int64(steps, begin + TABLE_STEPS);
        __m256i words[TABLE_ROWS][2][4] = {{{{0}}}};
        for (int64_t step = begin; step < end; step++) {
            __m256i small[TABLE_ROWS][2], large[TABLE_ROWS][2];
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) {
                __m256i even[2], odd[2];
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    const uint8_t *bytes = panel + (4 * step + q) * COLUMNS + 32 * j;
                    __m256i bits = _mm256_load_si256((const __m256i *)bytes);
                    even[j] = _mm256_and_si256(bits, nibble);
                    odd[j] = _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble);
                }
#pragma GCC unroll 2
                for (int i = 0; i < rows; i++) {
                    const uint8_t *table = tables + i * row_bytes + (STEP_TABLES * step + 2 * q) * TABLE_BYTES;
                    const __m256i *index[2] = {even, odd};
#pragma GCC unroll 2
                    for (int half = 0; half < 2; half++) {
                        __m256i low = table_at(table + half * TABLE_BYTES);
                        __m256i high = table_at(table + half * TABLE_BYTES + 16);
#pragma GCC unroll 2
                        for (int j = 0; j < 2; j++) {
                            __m256i low_found = _mm256_shuffle_epi8(low, index[half][j]);
                            __m256i high_found = _mm256_shuffle_epi8(high, index[half][j]);
                            small[i][j] = q + half ? _mm256_add_epi8(small[i][j], low_found) : low_found;
                            large[i][j] = q + half ? _mm256_add_epi8(large[i][j], high_found) : high_found;
                        }
                    }
                }
            }
#pragma GCC unroll 2
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    add_bytes(small[i][j], words[i][j]);
                    add_bytes(large[i][j], words[i][j] + 2);
                }
        }
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < 8; j++) {
                sums[i][j] = _mm256_add_epi32(sums[i][j], twice_sums(words[i][j / 4], j % 4));
            }
    }
    store_sums(p, row, rows, column, (const int32_t *)sums, scales);
}

static void multiply_bytes_avx2(const product *p, const struct part *part, void *scratch) {
    int64_t columns_at_a_time = panels_at_a_time(p) * COLUMNS, row_tables = tables_of_row(p);
    for (int64_t begin = part->column_begin; begin < part->column_end; begin += columns_at_a_time) {
        int64_t end = min_int64(part->column_end, begin + columns_at_a_time);
        uint8_t *panels = scratch, *tables = panels + divide_up(end - begin, COLUMNS) * panel_bytes(p);
        int8_t *codes = (int8_t *)tables + TABLE_ROWS * row_tables * TABLE_BYTES;
        lay_out_panels(p, begin, end, panels);
        for (int64_t row = part->row_begin; row < part->row_end; row += TABLE_ROWS) {
            int64_t rows = min_int64(TABLE_ROWS, part->row_end - row);
            float scales[TABLE_ROWS];
            int32_t totals[TABLE_ROWS];
            quantize_rows(p, row, rows, codes, scales, totals);
            write_tables(codes, rows * row_tables, tables);
            for (int64_t column = begin; column < end; column += COLUMNS) {
                const uint8_t *panel = panels + (column - begin) / COLUMNS * panel_bytes(p);
                if (rows == TABLE_ROWS)
                    multiply_tables(p, tables, TABLE_ROWS, panel, row, column, scales, totals);
                else
                    multiply_tables(p, tables, 1, panel, row, column, scales, totals);
            }
        }
    }
}

const struct kernel hf_stompp_avx2_kernel = {
    .unavailable = unavailable,
    .pack_sign = pack_sign,
    .scratch_bytes = scratch_bytes,
    .multiply = multiply,
    .byte_scratch_bytes = byte_scratch_bytes_avx2,
    .multiply_bytes = multiply_bytes_avx2,
    .rows_per_thread = 64,
    .limit = limit,
    MASKED_FUNCTIONS,
};
