/* Chooses the kernel, splits the work over threads, and is the door from Python. */
#include <stdlib.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernel.h"

/* An output of this size is fresh memory on every call: the allocator takes it from the system and gives it back. */
enum { LARGE_OUTPUT = 16 * 1024 * 1024, HUGE_PAGE = 2 * 1024 * 1024 };

/* Asks for huge pages, so that writing a large output for the first time faults a hundred times less often. */
static void expect_first_writes(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes < LARGE_OUTPUT) return;
    uintptr_t begin = ((uintptr_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) / HUGE_PAGE * HUGE_PAGE;
    /* A wish: where it is refused, nothing else changes. */
    (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* AMX pays for expanding bits to bytes from about this many rows on. */
enum { AMX_ROWS = 96 };

/* Bit operations that take about as long as starting a thread. */
static const double WORK_PER_THREAD = 4e6;

static const struct kernel *const kernels[HF_STOMPP_KERNELS] = {
#ifdef HF_STOMPP_WITH_AMX
    [HF_STOMPP_AMX] = &hf_stompp_amx_kernel,
#endif
#ifdef HF_STOMPP_WITH_AVX512
    [HF_STOMPP_AVX512] = &hf_stompp_avx512_kernel,
#endif
#ifdef HF_STOMPP_WITH_AVX2
    [HF_STOMPP_AVX2] = &hf_stompp_avx2_kernel,
#endif
#ifdef HF_STOMPP_WITH_NEON
    [HF_STOMPP_NEON] = &hf_stompp_neon_kernel,
#endif
#ifdef HF_STOMPP_WITH_SCALAR
    [HF_STOMPP_SCALAR] = &hf_stompp_scalar_kernel,
#endif
};

const char *hf_stompp_source_hash(void) { return HF_STOMPP_SOURCE_HASH; }

int hf_stompp_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

const char *hf_stompp_unavailable(int kernel) {
    if (kernel < 0 || kernel >= HF_STOMPP_KERNELS) return "there is no such kernel";
    if (!kernels[kernel]) return "not built: another processor architecture, or a compiler that does not know it";
    return kernels[kernel]->unavailable();
}

static const struct kernel *choose(int kernel, int64_t rows) {
    if (kernel != HF_STOMPP_AUTO) return hf_stompp_unavailable(kernel) ? NULL : kernels[kernel];
    for (int candidate = 0; candidate < HF_STOMPP_KERNELS; candidate++) {
        if (candidate == HF_STOMPP_AMX && rows < AMX_ROWS) continue;
        if (!hf_stompp_unavailable(candidate)) return kernels[candidate];
    }
    return NULL;
}

/* For what is no product, which AMX does not help: the best of the others where AMX was asked for. */
static const struct kernel *choose_other(int kernel) {
    const struct kernel *chosen = choose(kernel, 0);
    return chosen && kernel == HF_STOMPP_AMX ? choose(HF_STOMPP_AUTO, 0) : chosen;
}

int hf_stompp_chosen(int kernel, int64_t rows) {
    const struct kernel *chosen = choose(kernel, rows);
    for (int candidate = 0; candidate < HF_STOMPP_KERNELS; candidate++)
        if (chosen && kernels[candidate] == chosen) return candidate;
    return -1;
}

int64_t hf_stompp_limit(int kernel, int64_t steps) {
    if (hf_stompp_unavailable(kernel) || !kernels[kernel]->limit) return 0;
    return kernels[kernel]->limit(steps);
}

/* The index-th of `parts` nearly equal pieces of [0, size), cut at multiples of `alignment`. */
static void piece(int64_t size, int64_t alignment, int64_t parts, int64_t index, int64_t *begin, int64_t *end) {
    int64_t blocks = divide_up(size, alignment);
    *begin = min_int64(size, blocks * index / parts * alignment);
    *end = min_int64(size, blocks * (index + 1) / parts * alignment);
}

/* For the loop that follows: its turns on `parts` threads. */
#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel for num_threads((int)parts) if (parts > 1)")
#else
#define PARALLEL
#endif

/* Runs call(begin, end) for pieces of [0, size), cut at multiples of `alignment`, on `parts` threads. */
#define IN_PIECES(size, alignment, parts, call)                                                  \
    PARALLEL for (int64_t index = 0; index < parts; index++) {                                   \
        int64_t begin, end;                                                                      \
        piece(size, alignment, parts, index, &begin, &end);                                      \
        call;                                                                                    \
    }

int hf_stompp_pack_sign(const struct hf_stompp_packing *p) {
    const struct kernel *chosen = choose_other((int)p->kernel);
    if (!chosen) return HF_STOMPP_UNAVAILABLE;
    int64_t parts = (int64_t)((double)p->rows * (double)p->features / WORK_PER_THREAD) + 1;
    parts = max_int64(1, min_int64(parts, p->threads));
    int64_t input_bytes = p->features * element_bytes(p->input_dtype), bytes = row_bytes(p->features);
    IN_PIECES(p->rows, 1, parts,
              chosen->pack_sign((const uint8_t *)p->input + begin * input_bytes, p->input_dtype, p->threshold,
                                end - begin, p->features, p->bits + begin * bytes,
                                p->popcounts ? p->popcounts + begin : NULL))
    return HF_STOMPP_OK;
}

int hf_stompp_binary_linear(const struct hf_stompp_product *p) {
    const struct kernel *chosen = choose((int)p->kernel, p->rows);
    if (!chosen) return HF_STOMPP_UNAVAILABLE;
    double pairs = (double)p->rows * (double)p->in_features * (double)p->out_features;
    int is_bytes = p->activation_bits == 8;
    int64_t parts = (int64_t)(pairs / (is_bytes ? 4 : 16) / WORK_PER_THREAD) + 1;
    parts = max_int64(1, min_int64(parts, p->threads));
    int64_t row_parts = min_int64(parts, max_int64(1, p->rows / chosen->rows_per_thread));
    int64_t column_blocks = divide_up(p->out_features, COLUMN_ALIGNMENT);
    int64_t column_parts = max_int64(1, min_int64(parts / row_parts, column_blocks));
    parts = row_parts * column_parts;
    int failed = 0;
    if (!p->output_bits)
        expect_first_writes(p->output, p->rows * p->out_features * element_bytes(p->output_dtype));
    /* Bits are written in pieces of up to 64 columns; what lies beyond out_features stays as it is set here. */
    if (p->output_bits) memset(p->output_bits, 0, (size_t)(p->rows * row_bytes(p->out_features)));
    PARALLEL for (int64_t index = 0; index < parts; index++) {
        struct part part;
        piece(p->rows, 1, row_parts, index / column_parts, &part.row_begin, &part.row_end);
        piece(p->out_features, COLUMN_ALIGNMENT, column_parts, index % column_parts, &part.column_begin,
              &part.column_end);
        if (part.row_begin == part.row_end || part.column_begin == part.column_end) continue;
        size_t bytes = is_bytes ? chosen->byte_scratch_bytes(p, &part) : chosen->scratch_bytes(p, &part);
        void *scratch = NULL;
        if (bytes && posix_memalign(&scratch, 64, bytes)) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
            failed = 1;
            continue;
        }
        if (is_bytes)
            chosen->multiply_bytes(p, &part, scratch);
        else
            chosen->multiply(p, &part, scratch);
        free(scratch);
    }
    return failed ? HF_STOMPP_NO_MEMORY : HF_STOMPP_OK;
}

/* Elements of masked binarization that take about as long as starting a thread. */
static const double ELEMENTS_PER_THREAD = 64e3;

static int64_t parts_of(double elements, int64_t threads) {
    return max_int64(1, min_int64((int64_t)(elements / ELEMENTS_PER_THREAD), threads));
}

int hf_stompp_masked_weight(const struct hf_stompp_masked_weight *p) {
    const struct kernel *chosen = choose_other((int)p->kernel);
    if (!chosen) return HF_STOMPP_UNAVAILABLE;
    int64_t parts = parts_of((double)p->rows * (double)p->columns, p->threads);
    IN_PIECES(p->rows, 1, parts, chosen->masked_weight(p, begin, end))
    return HF_STOMPP_OK;
}

int hf_stompp_masked_activation(const struct hf_stompp_masked_activation *p) {
    const struct kernel *chosen = choose_other((int)p->kernel);
    if (!chosen) return HF_STOMPP_UNAVAILABLE;
    int64_t parts = parts_of((double)p->rows * (double)p->features, p->threads);
    if (p->sums)
        IN_PIECES(p->features, COLUMN_ALIGNMENT, parts, chosen->masked_activation_gradient(p, begin, end))
    else
        IN_PIECES(p->rows, 1, parts, chosen->masked_activation(p, begin, end))
    return HF_STOMPP_OK;
}

int hf_stompp_sign_product(const struct hf_stompp_sign_product *p) {
    const struct kernel *chosen = choose_other((int)p->kernel);
    if (!chosen) return HF_STOMPP_UNAVAILABLE;
    int64_t parts = parts_of((double)p->out_features * (double)p->in_features, p->threads);
    if (p->transposed)
        IN_PIECES(p->in_features, COLUMN_ALIGNMENT, parts, chosen->sign_product_columns(p, begin, end))
    else
        IN_PIECES(p->out_features, 1, parts, chosen->sign_product_rows(p, begin, end))
    return HF_STOMPP_OK;
}
