/* AMX: a product of int8 tiles. Bits are expanded to bytes of +1 and -1 on the way: the input once, unless it is bytes,
 * the weight once for each block of rows, which pays when the rows are many.
 *
 * A tile is 16 rows of 64 bytes. One of the input holds 64 features of 16 rows. One of the weight holds 64 features of
 * 16 columns, as the instruction wants them: row r of the tile is features 4r .. 4r + 3, the four of a column side by
 * side. A strip is the tiles of 16 rows, or of 16 columns, over all features.
 */
#include "avx512.h"

#ifdef HF_STOMPP_EMULATED_AMX
#include HF_STOMPP_EMULATED_AMX
#elif defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux lets a process use the tile registers when it has asked for them. Returns 1 if they may be used. */
static int request_tiles(void) {
    const long arch_req_xcomp_perm = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, tile_data) == 0;
}

static const char *tiles_unavailable(void) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx >> 24 & 3) != 3)
        return "the processor has no AMX (TILE, INT8)";
    /* Some virtual machines pass on the two bits above, but no shape of tiles. */
    if (!__get_cpuid_count(0x1d, 0, &eax, &ebx, &ecx, &edx) || eax < 1) return "the processor has no AMX palette";
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx >> 27 & 1))
        return "the operating system does not save extended registers";
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    if ((eax >> 17 & 3) != 3) return "the operating system does not save AMX registers";
    if (!request_tiles()) return "the operating system does not permit AMX to this process";
    return NULL;
}
#else
static int request_tiles(void) { return 0; }

static const char *tiles_unavailable(void) { return "AMX is not supported on this operating system"; }
#endif

enum {
    /* 2 x 2 tiles of sums; their rows lie side by side, so that a row of sums is a piece of a row of the output. */
    BLOCK_COLUMNS = 2 * TILE_COLUMNS,
    SUMS = 2 * TILE_ROWS * BLOCK_COLUMNS,
    /* Bytes of a thread's expanded rows and columns: together they are to stay in its L2 cache. */
    INPUT_BYTES = 512 * 1024,
    WEIGHT_BYTES = 256 * 1024,
};

static const char *find_unavailable(void) {
    const char *reason = avx512_unavailable();
    if (reason) return reason;
    if (!__builtin_cpu_supports("avx512vbmi")) return "the processor has no AVX512-VBMI";
    return tiles_unavailable();
}

static const char *unavailable(void) {
    static const char unknown[] = "";
    static const char *cached = unknown;
    const char *reason = __atomic_load_n(&cached, __ATOMIC_ACQUIRE);
    if (reason == unknown) {
        reason = find_unavailable();
        __atomic_store_n(&cached, reason, __ATOMIC_RELEASE);
    }
    return reason;
}

/* Strips that fit into `bytes`, an even number because they are multiplied in pairs; at least two. */
static int64_t strips_within(const product *p, int64_t bytes) {
    int64_t pairs = bytes / (2 * tiles_in_strip(p) * TILE_BYTES);
    return pairs < 1 ? 2 : 2 * pairs;
}

struct layout {
    int64_t strip_bytes, input_strips, weight_strips;
    size_t packed_bytes, scale_bytes;
};

static struct layout layout_of(const product *p, const struct part *part) {
    struct layout layout;
    layout.strip_bytes = tiles_in_strip(p) * TILE_BYTES;
    layout.input_strips =
        min_int64(strips_within(p, INPUT_BYTES), divide_up(part->row_end - part->row_begin, TILE_ROWS));
    layout.weight_strips =
        min_int64(strips_within(p, WEIGHT_BYTES), divide_up(part->column_end - part->column_begin, TILE_COLUMNS));
    layout.packed_bytes = p->input_dtype == HF_STOMPP_BITS ? 0 : (size_t)(TILE_ROWS * row_bytes(p->in_features));
    if (p->activation_bits == 8) layout.packed_bytes = (size_t)(TILE_ROWS * code_bytes(p->in_features));
    layout.scale_bytes = p->activation_bits == 8 ? (size_t)(layout.input_strips * TILE_ROWS * 4) : 0;
    return layout;
}

static size_t scratch_bytes(const product *p, const struct part *part) {
    struct layout layout = layout_of(p, part);
    size_t strips = (size_t)((layout.input_strips + layout.weight_strips) * layout.strip_bytes);
    return layout.packed_bytes + strips + layout.scale_bytes;
}

static inline __m512i signs_of_bits(uint64_t bits) {
    return _mm512_mask_blend_epi8((__mmask64)bits, _mm512_set1_epi8(-1), _mm512_set1_epi8(1));
}

/* One strip of the input. `bits` holds `rows` rows; the others of the strip are 0, as are the features that do not
 * exist: those of the weight, which are -1, then count for nothing. */
static void expand_rows(const product *p, const uint8_t *bits, int64_t rows, int8_t *strip) {
    int64_t tiles = tiles_in_strip(p), bytes = row_bytes(p->in_features);
    uint64_t last = ~(uint64_t)0 >> (tiles * TILE_FEATURES - p->in_features);
    for (int64_t row = 0; row < TILE_ROWS; row++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            uint64_t word = 0, live = row >= rows ? 0 : tile + 1 < tiles ? ~(uint64_t)0 : last;
            if (live) memcpy(&word, bits + row * bytes + 8 * tile, 8);
            _mm512_store_si512(strip + tile * TILE_BYTES + row * TILE_FEATURES,
                               _mm512_maskz_mov_epi8((__mmask64)live, signs_of_bits(word)));
        }
}

/* Sixteen rows of bytes, as one strip; `codes` holds `rows` rows, the others are 0. */
static void spread_rows(const product *p, const int8_t *codes, int64_t rows, int8_t *strip) {
    int64_t tiles = tiles_in_strip(p), bytes = code_bytes(p->in_features);
    for (int64_t row = 0; row < TILE_ROWS; row++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int8_t *code = codes + row * bytes + tile * TILE_FEATURES;
            _mm512_store_si512(strip + tile * TILE_BYTES + row * TILE_FEATURES,
                               row < rows ? _mm512_loadu_si512(code) : _mm512_setzero_si512());
        }
}

/* Tiles 0 .. 3 are sums, 4 and 5 the input, 6 and 7 the weight. All are whole: what does not exist is expanded too. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_of_row[16];
    uint8_t rows[16];
} tile_shapes __attribute__((aligned(64))) = {
    .palette = 1,
    .bytes_of_row = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

/* Inlined with constant numbers of strips, so that the loop holds no branch on them. */
__attribute__((always_inline)) static inline void multiply_strips(const int8_t *input, int input_strips,
                                                                  const int8_t *weight, int weight_strips,
                                                                  int64_t strip_bytes, int32_t *sums) {
    enum { SUMS_STRIDE = BLOCK_COLUMNS * 4 };
    _tile_zero(0);
    if (weight_strips == 2) _tile_zero(1);
    if (input_strips == 2) _tile_zero(2);
    if (input_strips == 2 && weight_strips == 2) _tile_zero(3);
    const int8_t *input1 = input + strip_bytes, *weight1 = weight + strip_bytes;
    for (int64_t offset = 0; offset < strip_bytes; offset += TILE_BYTES) {
        _tile_loadd(6, weight + offset, TILE_FEATURES);
        _tile_loadd(4, input + offset, TILE_FEATURES);
        _tile_dpbssd(0, 4, 6);
        if (input_strips == 2) {
            _tile_loadd(5, input1 + offset, TILE_FEATURES);
            _tile_dpbssd(2, 5, 6);
        }
        if (weight_strips == 2) {
            _tile_loadd(7, weight1 + offset, TILE_FEATURES);
            _tile_dpbssd(1, 4, 7);
            if (input_strips == 2) _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, SUMS_STRIDE);
    if (weight_strips == 2) _tile_stored(1, sums + TILE_COLUMNS, SUMS_STRIDE);
    if (input_strips == 2) _tile_stored(2, sums + TILE_ROWS * BLOCK_COLUMNS, SUMS_STRIDE);
    if (input_strips == 2 && weight_strips == 2)
        _tile_stored(3, sums + TILE_ROWS * BLOCK_COLUMNS + TILE_COLUMNS, SUMS_STRIDE);
}

/* Expanded rows by expanded columns. Rows outside, so that the output is written in long pieces. */
static void multiply_block(const product *p, const int8_t *input, int64_t row, int64_t rows,
                           const int8_t *weight, int64_t column, int64_t columns, int64_t strip_bytes,
                           const float *scales) {
    int32_t sums[SUMS] __attribute__((aligned(64)));
    /* GCC is not told that a tile load reads memory: the stores of the expansion could be moved below it. */
    __asm__ volatile("" ::: "memory");
    for (int64_t i = 0; i < rows; i += 2 * TILE_ROWS) {
        int64_t live_rows = min_int64(2 * TILE_ROWS, rows - i);
        const int8_t *input_strip = input + i / TILE_ROWS * strip_bytes;
        for (int64_t j = 0; j < columns; j += BLOCK_COLUMNS) {
            const int8_t *weight_strip = weight + j / TILE_COLUMNS * strip_bytes;
            int two = columns - j > TILE_COLUMNS;
            if (live_rows > TILE_ROWS && two)
                multiply_strips(input_strip, 2, weight_strip, 2, strip_bytes, sums);
            else if (live_rows > TILE_ROWS)
                multiply_strips(input_strip, 2, weight_strip, 1, strip_bytes, sums);
            else if (two)
                multiply_strips(input_strip, 1, weight_strip, 2, strip_bytes, sums);
            else
                multiply_strips(input_strip, 1, weight_strip, 1, strip_bytes, sums);
            for (int64_t c = 0; c < (two ? BLOCK_COLUMNS : TILE_COLUMNS); c += TILE_COLUMNS)
                store_sums16(p, row + i, live_rows, column + j + c, sums + c, BLOCK_COLUMNS,
                             scales ? scales + i : NULL);
        }
    }
}

static void multiply(const product *p, const struct part *part, void *scratch) {
    /* Linux grants the tiles to the whole process. Asking once more is one system call for each thread; a thread that
     * lacked them would die at its first tile instruction. */
    static _Thread_local int permitted;
    if (!permitted) permitted = request_tiles();
    struct layout layout = layout_of(p, part);
    uint8_t *packed = scratch;
    int8_t *input = (int8_t *)(packed + layout.packed_bytes);
    int8_t *weight = input + layout.input_strips * layout.strip_bytes;
    float *scales = layout.scale_bytes ? (float *)(weight + layout.weight_strips * layout.strip_bytes) : NULL;
    int64_t rows_at_a_time = layout.input_strips * TILE_ROWS, columns_at_a_time = layout.weight_strips * TILE_COLUMNS;
    _tile_loadconfig(&tile_shapes);
    for (int64_t row = part->row_begin; row < part->row_end; row += rows_at_a_time) {
        int64_t rows = min_int64(rows_at_a_time, part->row_end - row);
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
            int64_t live = min_int64(TILE_ROWS, rows - i);
            int8_t *strip = input + i / TILE_ROWS * layout.strip_bytes;
            if (scales) {
                int32_t totals[TILE_ROWS];
                quantize_rows16(p, row + i, live, (int8_t *)packed, scales + i, totals);
                spread_rows(p, (int8_t *)packed, live, strip);
            } else {
                expand_rows(p, bits_of_rows(p, pack_sign_avx512, row + i, live, packed), live, strip);
            }
        }
        for (int64_t column = part->column_begin; column < part->column_end; column += columns_at_a_time) {
            int64_t columns = min_int64(columns_at_a_time, part->column_end - column);
            for (int64_t j = 0; j < columns; j += TILE_COLUMNS)
                expand_columns(p, column + j, _mm512_set1_epi8(-1),
                               (uint8_t *)weight + j / TILE_COLUMNS * layout.strip_bytes);
            multiply_block(p, input, row, rows, weight, column, columns, layout.strip_bytes, scales);
        }
    }
    _tile_release();
}

static int64_t limit(int64_t steps) {
    request_tiles();
    _tile_loadconfig(&tile_shapes);
    for (int64_t step = 0; step < steps; step++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
    return steps * 4 * TILE_ROWS * TILE_COLUMNS * TILE_FEATURES;
}

const struct kernel hf_stompp_amx_kernel = {
    .unavailable = unavailable,
    .scratch_bytes = scratch_bytes,
    .multiply = multiply,
    .byte_scratch_bytes = scratch_bytes,
    .multiply_bytes = multiply,
    .rows_per_thread = 512,
    .limit = limit,
};
