/* Stand-ins in plain C for the AMX intrinsics that amx.c uses, so that its own text runs on a processor without AMX.
 * What the processor would fault on ends the program here. Tile data live in each thread, as the registers do.
 */
#ifndef EMULATED_AMX_H
#define EMULATED_AMX_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EMULATED_TILES 8
#define EMULATED_TILE_ROWS 16
#define EMULATED_TILE_ROW_BYTES 64

struct emulated_tile {
    int rows, row_bytes;
    union {
        int8_t bytes[EMULATED_TILE_ROWS][EMULATED_TILE_ROW_BYTES];
        int32_t sums[EMULATED_TILE_ROWS][EMULATED_TILE_ROW_BYTES / 4];
    } data;
};

static _Thread_local struct emulated_tile emulated_tiles[EMULATED_TILES];
static _Thread_local int emulated_permitted, emulated_configured;

__attribute__((noreturn)) static inline void emulated_fault(const char *reason) {
    fprintf(stderr, "emulated AMX: %s\n", reason);
    abort();
}

/* More severe than Linux, which grants the tiles to all threads at once. */
static inline int request_tiles(void) { return emulated_permitted = 1; }

static inline const char *tiles_unavailable(void) { return NULL; }

static inline struct emulated_tile *emulated_tile(int number) {
    if (!emulated_configured) emulated_fault("no tiles are configured");
    if (number < 0 || number >= EMULATED_TILES) emulated_fault("there is no such tile");
    if (emulated_tiles[number].rows == 0) emulated_fault("the tile is not configured");
    return &emulated_tiles[number];
}

static inline void emulated_release(void) {
    if (!emulated_permitted) emulated_fault("this thread has not asked for the tiles");
    memset(emulated_tiles, 0, sizeof emulated_tiles);
    emulated_configured = 0;
}

static inline void emulated_loadconfig(const void *configuration) {
    uint8_t bytes[64];
    memcpy(bytes, configuration, sizeof bytes);
    emulated_release();
    if (bytes[0] == 0) return;
    if (bytes[0] != 1 || bytes[1] != 0) emulated_fault("only palette 1 from start row 0 is known");
    for (int i = 2; i < 64; i++) {
        int reserved = i < 16 || (i >= 16 + 2 * EMULATED_TILES && i < 48) || i >= 48 + EMULATED_TILES;
        if (reserved && bytes[i]) emulated_fault("a reserved byte of the configuration is not zero");
    }
    for (int i = 0; i < EMULATED_TILES; i++) {
        int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
        if (rows > EMULATED_TILE_ROWS || row_bytes > EMULATED_TILE_ROW_BYTES) emulated_fault("a tile is too large");
        if (!rows != !row_bytes) emulated_fault("a tile has rows or columns alone");
        emulated_tiles[i].rows = rows;
        emulated_tiles[i].row_bytes = row_bytes;
    }
    emulated_configured = 1;
}

static inline void emulated_zero(int number) {
    struct emulated_tile *tile = emulated_tile(number);
    memset(&tile->data, 0, sizeof tile->data);
}

static inline void emulated_loadd(int number, const void *base, int64_t stride) {
    struct emulated_tile *tile = emulated_tile(number);
    memset(&tile->data, 0, sizeof tile->data);
    for (int row = 0; row < tile->rows; row++)
        memcpy(tile->data.bytes[row], (const uint8_t *)base + row * stride, (size_t)tile->row_bytes);
}

static inline void emulated_stored(int number, void *base, int64_t stride) {
    const struct emulated_tile *tile = emulated_tile(number);
    for (int row = 0; row < tile->rows; row++)
        memcpy((uint8_t *)base + row * stride, tile->data.bytes[row], (size_t)tile->row_bytes);
}

/* sums[m][n] += left[m][4k + i] * right[k][4n + i], over k and i. */
static inline void emulated_dpbssd(int sums_number, int left_number, int right_number) {
    struct emulated_tile *sums = emulated_tile(sums_number);
    const struct emulated_tile *left = emulated_tile(left_number), *right = emulated_tile(right_number);
    if (sums == left || sums == right || left == right) emulated_fault("a product needs three different tiles");
    if (sums->row_bytes % 4 || left->row_bytes % 4) emulated_fault("a row of a product is no whole number of words");
    if (sums->rows != left->rows || sums->row_bytes != right->row_bytes || left->row_bytes / 4 != right->rows)
        emulated_fault("the shapes of a product do not match");
    for (int m = 0; m < sums->rows; m++)
        for (int k = 0; k < right->rows; k++) {
            const int8_t *a = left->data.bytes[m] + 4 * k, *b = right->data.bytes[k];
            for (int n = 0; n < sums->row_bytes / 4; n++) {
                int32_t sum = 0;
                for (int i = 0; i < 4; i++) sum += a[i] * b[4 * n + i];
                sums->data.sums[m][n] = (int32_t)((uint32_t)sums->data.sums[m][n] + (uint32_t)sum);
            }
        }
}

/* immintrin.h has some of them as functions, some as macros. */
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig(configuration) emulated_loadconfig(configuration)
#define _tile_release() emulated_release()
#define _tile_zero(tile) emulated_zero(tile)
#define _tile_loadd(tile, base, stride) emulated_loadd(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_stored(tile, base, stride)
#define _tile_dpbssd(sums, left, right) emulated_dpbssd(sums, left, right)

#endif
