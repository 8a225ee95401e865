/* XOR and VPOPCNTD. With many rows, 16 columns lie side by side in a vector, 32 bits of each (a panel), so that a sum
 * needs no reduction across lanes; the weight is laid out so once per call, which costs about as much as two rows.
 * With few rows it is read as it is stored, 512 bits of one column at a time.
 */
#include "avx512.h"

enum {
    LANES = 16,
    /* 8 rows x 2 panels fill 16 of the 32 registers with sums. */
    ROWS = 8,
    PANELS = 2,
    /* Bytes of a thread's panels: they are to stay in its L2 cache. */
    PANEL_BYTES = 512 * 1024,
};

static const char *unavailable(void) {
    const char *reason = avx512_unavailable();
    if (reason) return reason;
    /* No processor has the first alone. */
    int supported = __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512vbmi");
    return supported ? NULL : "the processor has no AVX512-VPOPCNTDQ, VNNI and VBMI";
}

/* Read through a pointer, so that broadcasting it is one load: GCC 12 takes a copy through a general register. */
typedef int32_t word32 __attribute__((may_alias, aligned(1)));

/* Words of 32 bits in a row; what follows in a row is zero on both sides. */
static inline int64_t row_words(const product *p) { return divide_up(p->in_features, 32); }

static int64_t panels_at_a_time(const product *p) {
    int64_t panels = PANEL_BYTES / (row_words(p) * LANES * 4);
    return panels < PANELS ? PANELS : panels;
}

static size_t scratch_bytes(const product *p, const struct part *part) {
    size_t input = (size_t)(ROWS * row_bytes(p->in_features));
    if (part->row_end - part->row_begin < ROWS) return input;
    int64_t panels = min_int64(panels_at_a_time(p), divide_up(part->column_end - part->column_begin, LANES));
    return input + (size_t)(panels * row_words(p) * LANES * 4);
}

/* 16 rows of 16 words to 16 columns. */
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

static void lay_out_panel(const product *p, int64_t column, uint32_t *panel) {
    int64_t words = row_words(p), bytes = row_bytes(p->in_features);
    for (int64_t k = 0; k < words; k += 16) {
        __mmask16 live = first16(words - k);
        __m512i r[16];
        for (int j = 0; j < LANES; j++)
            r[j] = column + j < p->out_features
                       ? _mm512_maskz_loadu_epi32(live, p->weight + (column + j) * bytes + 4 * k)
                       : _mm512_setzero_si512();
        transpose16(r);
        for (int j = 0; j < 16 && k + j < words; j++) _mm512_store_si512(panel + (k + j) * LANES, r[j]);
    }
}

__attribute__((always_inline)) static inline void multiply_block(const product *p, const uint8_t *input,
                                                                 int rows, const uint32_t *panel, int panels,
                                                                 int64_t row, int64_t column) {
    int64_t words = row_words(p), bytes = row_bytes(p->in_features);
    __m512i different[ROWS][PANELS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < panels; j++) different[i][j] = _mm512_setzero_si512();
    for (int64_t k = 0; k < words; k++) {
        __m512i weight[PANELS];
#pragma GCC unroll 2
        for (int j = 0; j < panels; j++) weight[j] = _mm512_load_si512(panel + (j * words + k) * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512i value = _mm512_set1_epi32(*(const word32 *)(input + i * bytes + 4 * k));
#pragma GCC unroll 2
            for (int j = 0; j < panels; j++) {
                different[i][j] = _mm512_add_epi32(
                    different[i][j], _mm512_popcnt_epi32(_mm512_xor_si512(weight[j], value)));
                /* Keeps a sum in its register: GCC 12 moves and spills them otherwise. */
                __asm__("" : "+v"(different[i][j]));
            }
        }
    }
    int32_t sums[ROWS][PANELS * LANES] __attribute__((aligned(64)));
    __m512i features = _mm512_set1_epi32((int)p->in_features);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < panels; j++)
            _mm512_store_si512(sums[i] + j * LANES,
                               _mm512_sub_epi32(features, _mm512_slli_epi32(different[i][j], 1)));
    for (int j = 0; j < panels; j++)
        store_sums16(p, row, rows, column + j * LANES, sums[0] + j * LANES, PANELS * LANES, NULL);
}

__attribute__((always_inline)) static inline void multiply_rows(const product *p, const uint8_t *input,
                                                                int rows, const uint32_t *panels, int64_t row,
                                                                int64_t column_begin, int64_t column_end) {
    int64_t words = row_words(p);
    for (int64_t column = column_begin; column < column_end; column += PANELS * LANES) {
        const uint32_t *panel = panels + (column - column_begin) * words;
        if (column + LANES < column_end)
            multiply_block(p, input, rows, panel, 2, row, column);
        else
            multiply_block(p, input, rows, panel, 1, row, column);
    }
}

static void multiply_many_rows(const product *p, const struct part *part, uint8_t *packed, uint32_t *panels) {
    int64_t words = row_words(p), columns_at_a_time = panels_at_a_time(p) * LANES;
    for (int64_t begin = part->column_begin; begin < part->column_end; begin += columns_at_a_time) {
        int64_t end = min_int64(part->column_end, begin + columns_at_a_time);
        for (int64_t column = begin; column < end; column += LANES)
            lay_out_panel(p, column, panels + (column - begin) * words);
        for (int64_t row = part->row_begin; row < part->row_end;) {
            int64_t rows = min_int64(ROWS, part->row_end - row);
            const uint8_t *input = bits_of_rows(p, pack_sign_avx512, row, rows, packed);
            if (rows == ROWS) {
                multiply_rows(p, input, ROWS, panels, row, begin, end);
            } else {
                int64_t bytes = row_bytes(p->in_features), done = 0;
                for (; rows - done >= 4; done += 4)
                    multiply_rows(p, input + done * bytes, 4, panels, row + done, begin, end);
                for (; done < rows; done++)
                    multiply_rows(p, input + done * bytes, 1, panels, row + done, begin, end);
            }
            row += rows;
        }
    }
}

__attribute__((always_inline)) static inline void multiply_as_stored(const product *p, const uint8_t *input,
                                                                     int rows, int64_t row,
                                                                     const struct part *part) {
    int64_t bytes = row_bytes(p->in_features);
    for (int64_t column = part->column_begin; column < part->column_end; column += LANES) {
        int32_t sums[ROWS][LANES] __attribute__((aligned(64))) = {{0}};
        int64_t lanes = min_int64(LANES, p->out_features - column);
        for (int64_t lane = 0; lane < lanes; lane++) {
            const uint8_t *weight = p->weight + (column + lane) * bytes;
            __m512i different[ROWS];
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) different[i] = _mm512_setzero_si512();
            for (int64_t k = 0; k < bytes; k += 64) {
                __mmask8 live = k + 64 <= bytes ? 0xff : 0x0f;
                __m512i word = _mm512_maskz_loadu_epi64(live, weight + k);
#pragma GCC unroll 8
                for (int i = 0; i < rows; i++) {
                    __m512i value = _mm512_maskz_loadu_epi64(live, input + i * bytes + k);
                    different[i] =
                        _mm512_add_epi64(different[i], _mm512_popcnt_epi64(_mm512_xor_si512(word, value)));
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
                sums[i][lane] = (int32_t)(p->in_features - 2 * _mm512_reduce_add_epi64(different[i]));
        }
        store_sums16(p, row, rows, column, sums[0], LANES, NULL);
    }
}

static void multiply(const product *p, const struct part *part, void *scratch) {
    int64_t rows = part->row_end - part->row_begin, bytes = row_bytes(p->in_features);
    uint8_t *packed = scratch;
    if (rows >= ROWS) {
        multiply_many_rows(p, part, packed, (uint32_t *)(packed + ROWS * bytes));
        return;
    }
    const uint8_t *input = bits_of_rows(p, pack_sign_avx512, part->row_begin, rows, packed);
    int64_t done = 0;
    for (; rows - done >= 4; done += 4)
        multiply_as_stored(p, input + done * bytes, 4, part->row_begin + done, part);
    for (; done < rows; done++) multiply_as_stored(p, input + done * bytes, 1, part->row_begin + done, part);
}

/* --- rows of bytes: VPDPBUSD multiplies 4 codes with 4 flags of a column in each lane --- */

enum {
    /* Bytes of a thread's codes: they are to stay in its L2 cache beside two strips. */
    CODE_BYTES = 512 * 1024,
    /* Columns that are read as they are stored side by side. */
    STORED_COLUMNS = 4,
};

static int64_t byte_rows_at_a_time(const product *p, const struct part *part) {
    int64_t rows = max_int64(ROWS, CODE_BYTES / code_bytes(p->in_features) / ROWS * ROWS);
    return min_int64(rows, part->row_end - part->row_begin);
}

static size_t byte_scratch_bytes_avx512(const product *p, const struct part *part) {
    int64_t rows = byte_rows_at_a_time(p, part);
    return (size_t)(rows * code_bytes(p->in_features) + PANELS * tiles_in_strip(p) * TILE_BYTES + rows * 8);
}

/* Some rows as bytes, one behind the other, from `row` of the input on. */
struct byte_rows {
    int64_t row, rows;
    int8_t *codes;
    float *scales;
    int32_t *totals;
};

static struct byte_rows rows_from(const product *p, const struct byte_rows *all, int64_t first) {
    struct byte_rows rest = {all->row + first, all->rows - first, all->codes + first * code_bytes(p->in_features),
                             all->scales + first, all->totals + first};
    return rest;
}

/* The first `rows` of them by one strip or two. */
ALWAYS_INLINE void multiply_strips(const product *p, struct byte_rows input, int rows, const uint8_t *strips,
                                   int panels, int64_t column) {
    int64_t bytes = code_bytes(p->in_features), strip_bytes = tiles_in_strip(p) * TILE_BYTES;
    int64_t groups = divide_up(p->in_features, 4);
    __m512i sum[ROWS][PANELS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < panels; j++) sum[i][j] = _mm512_setzero_si512();
    for (int64_t group = 0; group < groups; group++) {
        __m512i flags[PANELS];
#pragma GCC unroll 2
        for (int j = 0; j < panels; j++) flags[j] = _mm512_load_si512(strips + j * strip_bytes + 64 * group);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512i code = _mm512_set1_epi32(*(const word32 *)(input.codes + i * bytes + 4 * group));
#pragma GCC unroll 2
            for (int j = 0; j < panels; j++) {
                sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], flags[j], code);
                /* Keeps a sum in its register, as above. */
                __asm__("" : "+v"(sum[i][j]));
            }
        }
    }
    int32_t sums[ROWS][PANELS * LANES] __attribute__((aligned(64)));
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < panels; j++)
            _mm512_store_si512(sums[i] + j * LANES, _mm512_sub_epi32(_mm512_slli_epi32(sum[i][j], 1),
                                                                     _mm512_set1_epi32(input.totals[i])));
    for (int j = 0; j < panels; j++)
        store_sums16(p, input.row, rows, column + j * LANES, sums[0] + j * LANES, PANELS * LANES, input.scales);
}

ALWAYS_INLINE void multiply_all_by_strips(const product *p, const struct byte_rows *all, const uint8_t *strips,
                                          int panels, int64_t column) {
    int64_t done = 0;
    for (; all->rows - done >= ROWS; done += ROWS)
        multiply_strips(p, rows_from(p, all, done), ROWS, strips, panels, column);
    for (; all->rows - done >= 4; done += 4) multiply_strips(p, rows_from(p, all, done), 4, strips, panels, column);
    for (; done < all->rows; done++) multiply_strips(p, rows_from(p, all, done), 1, strips, panels, column);
}

/* The first `rows` of them by a part of the columns. */
ALWAYS_INLINE void multiply_bytes_as_stored(const product *p, struct byte_rows input, int rows,
                                            const struct part *part) {
    int64_t bytes = code_bytes(p->in_features), weight_bytes = row_bytes(p->in_features);
    const __m512i one = _mm512_set1_epi8(1);
    for (int64_t column = part->column_begin; column < part->column_end; column += LANES) {
        int32_t sums[ROWS][LANES] __attribute__((aligned(64))) = {{0}};
        for (int64_t lane = 0; lane < LANES; lane += STORED_COLUMNS) {
            const uint8_t *weight[STORED_COLUMNS];
            /* What columns beyond the last give is not stored. */
            for (int j = 0; j < STORED_COLUMNS; j++)
                weight[j] = p->weight + min_int64(column + lane + j, p->out_features - 1) * weight_bytes;
            __m512i sum[ROWS][STORED_COLUMNS];
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
                for (int j = 0; j < STORED_COLUMNS; j++) sum[i][j] = _mm512_setzero_si512();
            for (int64_t k = 0; k < bytes; k += 64)
#pragma GCC unroll 4
                for (int j = 0; j < STORED_COLUMNS; j++) {
                    uint64_t word;
                    memcpy(&word, weight[j] + k / 8, 8);
                    __m512i flags = _mm512_maskz_mov_epi8(word, one);
#pragma GCC unroll 8
                    for (int i = 0; i < rows; i++)
                        sum[i][j] =
                            _mm512_dpbusd_epi32(sum[i][j], flags, _mm512_loadu_si512(input.codes + i * bytes + k));
                }
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
                for (int j = 0; j < STORED_COLUMNS; j++)
                    sums[i][lane + j] = 2 * _mm512_reduce_add_epi32(sum[i][j]) - input.totals[i];
        }
        store_sums16(p, input.row, rows, column, sums[0], LANES, input.scales);
    }
}

static void multiply_few_bytes(const product *p, const struct byte_rows *all, const struct part *part) {
    int64_t done = 0;
    for (; all->rows - done >= 4; done += 4) multiply_bytes_as_stored(p, rows_from(p, all, done), 4, part);
    for (; done < all->rows; done++) multiply_bytes_as_stored(p, rows_from(p, all, done), 1, part);
}

static void multiply_many_bytes(const product *p, const struct byte_rows *all, const struct part *part,
                                uint8_t *strips) {
    for (int64_t column = part->column_begin; column < part->column_end; column += PANELS * LANES) {
        expand_columns(p, column, _mm512_setzero_si512(), strips);
        if (column + LANES < part->column_end) {
            expand_columns(p, column + LANES, _mm512_setzero_si512(), strips + tiles_in_strip(p) * TILE_BYTES);
            multiply_all_by_strips(p, all, strips, 2, column);
        } else {
            multiply_all_by_strips(p, all, strips, 1, column);
        }
    }
}

static void multiply_bytes_avx512(const product *p, const struct part *part, void *scratch) {
    int64_t rows_at_a_time = byte_rows_at_a_time(p, part);
    uint8_t *strips = scratch;
    struct byte_rows input = {.codes = (int8_t *)strips + PANELS * tiles_in_strip(p) * TILE_BYTES};
    input.scales = (float *)(input.codes + rows_at_a_time * code_bytes(p->in_features));
    input.totals = (int32_t *)(input.scales + rows_at_a_time);
    for (input.row = part->row_begin; input.row < part->row_end; input.row += rows_at_a_time) {
        input.rows = min_int64(rows_at_a_time, part->row_end - input.row);
        quantize_rows16(p, input.row, input.rows, input.codes, input.scales, input.totals);
        if (input.rows < ROWS)
            multiply_few_bytes(p, &input, part);
        else
            multiply_many_bytes(p, &input, part, strips);
    }
}

static int64_t limit(int64_t steps) {
    __m512i different[ROWS][PANELS], weight[PANELS], value = _mm512_set1_epi32(0x5a5a5a5a);
    for (int j = 0; j < PANELS; j++) weight[j] = _mm512_set1_epi32(j);
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < PANELS; j++) different[i][j] = _mm512_setzero_si512();
    for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            /* The compiler is to believe that the value is another one in each step. */
            __asm__ volatile("" : "+v"(value));
#pragma GCC unroll 2
            for (int j = 0; j < PANELS; j++)
                different[i][j] = _mm512_add_epi32(
                    different[i][j], _mm512_popcnt_epi32(_mm512_xor_si512(weight[j], value)));
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < PANELS; j++) __asm__ volatile("" : : "v"(different[i][j]));
    return steps * ROWS * PANELS * 512;
}

const struct kernel hf_stompp_avx512_kernel = {
    .unavailable = unavailable,
    .pack_sign = pack_sign_avx512,
    .scratch_bytes = scratch_bytes,
    .multiply = multiply,
    .byte_scratch_bytes = byte_scratch_bytes_avx512,
    .multiply_bytes = multiply_bytes_avx512,
    .rows_per_thread = 64,
    .limit = limit,
    MASKED_FUNCTIONS,
};
