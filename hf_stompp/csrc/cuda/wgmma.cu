/* Products of bits by wgmma.m64nNk256: compute capability 9.0 alone (sm_90a). */
#include "product.cuh"

namespace hf_stompp {
namespace {

/* One warpgroup a block. */
constexpr int ROWS = 64, THREADS = 128;

/* What is copied together of a row: four steps of 256 bits, as wide as a swizzle can be. */
constexpr int GROUP_STEPS = 4, GROUP_BYTES = GROUP_STEPS * STEP_BYTES;

/* Shared memory of a multiprocessor, of which each block takes 1 KiB more than it asks for. */
constexpr int64_t PROCESSOR_SHARED_BYTES = 228 * 1024, RESERVED_SHARED_BYTES = 1024;

#if HF_STOMPP_WGMMA
constexpr int GROUP_CHUNKS = GROUP_BYTES / 16;

/* Where 16 bytes of a tile lie: the 128-byte swizzle of wgmma. Eight neighbours, along a row or down a column, lie in
 * different banks.
 */
__device__ __forceinline__ int chunk_offset(int row, int chunk) { return row * GROUP_BYTES + (chunk ^ row % 8) * 16; }

/* Begins to copy a group of COUNT rows; zeros beyond the matrix. Neighbouring threads copy neighbours of a row. */
template <int COUNT>
__device__ __forceinline__ void copy_group(uint8_t *tile, const uint8_t *matrix, int64_t first, int64_t count,
                                           int64_t bytes, int group) {
    constexpr int ROWS_AT_ONCE = THREADS / GROUP_CHUNKS;
    static_assert(ROWS_AT_ONCE % 8 == 0, "a thread's rows are swizzled alike");
    const int chunk = threadIdx.x % GROUP_CHUNKS, row_of_thread = threadIdx.x / GROUP_CHUNKS;
    const int64_t offset = static_cast<int64_t>(group) * GROUP_BYTES + chunk * 16;
    const int64_t live = offset < bytes ? count - first - row_of_thread : 0;
    const uint8_t *const source = matrix + (first + row_of_thread) * bytes + offset;
    uint8_t *const target = tile + chunk_offset(row_of_thread, chunk);
#pragma unroll
    for (int row = 0; row < COUNT; row += ROWS_AT_ONCE)
        copy_async(target + row * GROUP_BYTES, row < live ? source + row * bytes : matrix, row < live);
}

__device__ __forceinline__ int popcount_of_chunk(const uint8_t *tile, int row, int chunk) {
    const uint4 bits = *reinterpret_cast<const uint4 *>(tile + chunk_offset(row, chunk));
    return __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
}

/* The matrix descriptor of a step of a tile. */
__device__ __forceinline__ uint64_t describe(const uint8_t *tile, int step) {
    // In units of 16 bytes: where it begins, an offset that this layout does not use, and eight rows to the next eight.
    const uint64_t address = ((shared_address(tile) + step * STEP_BYTES) & 0x3ffff) >> 4;
    const uint64_t unused = 1, eight_rows = 8 * GROUP_BYTES >> 4, swizzle_of_128_bytes = 1;
    return address | unused << 16 | eight_rows << 32 | swizzle_of_128_bytes << 62;
}
#endif

template <int COLUMNS, typename Output>
constexpr int64_t shared_bytes(int64_t groups, int stages) {
    return (groups * COLUMNS + stages * ROWS) * GROUP_BYTES + Output::SHARED_BYTES;
}

/* COLUMNS rows of the weight stay in shared memory, while tiles of ROWS rows of the input come and go: blocks along y share
 * them out. What the columns need is found out once. The next tile is copied while the results of one are written.
 */
template <int COLUMNS, int STAGES, typename Output>
__global__ void __launch_bounds__(THREADS, COLUMNS == 128 ? 4 : 6) multiply_wgmma(const hf_stompp_cuda_product product) {
#if HF_STOMPP_WGMMA
    constexpr int WEIGHT_BYTES = COLUMNS * GROUP_BYTES, INPUT_BYTES = ROWS * GROUP_BYTES;
    __shared__ typename Output::Parameters parameters;
    __shared__ int row_popcounts[ROWS];

    const int64_t bytes = row_bytes(product.in_features);
    const int groups = static_cast<int>((bytes + GROUP_BYTES - 1) / GROUP_BYTES);
    uint8_t *const weights = dynamic_shared();
    uint8_t *const inputs = weights + groups * WEIGHT_BYTES;
    uint8_t *const results = inputs + STAGES * INPUT_BYTES;
    const int64_t first_column = static_cast<int64_t>(blockIdx.x) * COLUMNS;
    const int tiles = static_cast<int>((product.rows + ROWS - 1) / ROWS);

    int next_tile = blockIdx.y, next_group = 0, next_stage = 0;
    const auto copy_next = [&] {
        if (next_tile < tiles) {
            copy_group<ROWS>(inputs + next_stage * INPUT_BYTES, product.input, static_cast<int64_t>(next_tile) * ROWS,
                             product.rows, bytes, next_group);
            next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
            if (++next_group == groups) {
                next_group = 0;
                next_tile += gridDim.y;
            }
        }
        // Also without copies: what is waited for is counted in groups.
        commit_copies();
    };

    wait_for_earlier_kernels();
    // They are waited for together with the first of the input.
    for (int group = 0; group < groups; group++)
        copy_group<COLUMNS>(weights + group * WEIGHT_BYTES, product.weight, first_column, product.out_features, bytes,
                            group);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy_next();
    parameters.load(product, first_column);
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    if (threadIdx.x < COLUMNS) {
        int popcount = 0;
        for (int group = 0; group < groups; group++)
#pragma unroll
            for (int chunk = 0; chunk < GROUP_CHUNKS; chunk++)
                popcount += popcount_of_chunk(weights + group * WEIGHT_BYTES, threadIdx.x, chunk);
        parameters.add_popcount(threadIdx.x, popcount);
    }

    int stage = 0;
    for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
        int sums[1][COLUMNS / 8][4] = {};
        // Of half a row: two threads share one.
        int popcount = 0;
        for (int group = 0; group < groups; group++) {
            wait_for_copies<STAGES - 2>();
            fence_shared_for_wgmma();
            // All have waited for this stage, and have done with the one that is filled next and with the last results.
            __syncthreads();
            copy_next();
            const uint8_t *const input = inputs + stage * INPUT_BYTES;
            begin_wgmma(sums[0]);
            // All steps: a wgmma under a condition would make the compiler serialize them. Beyond the row there are zeros.
#pragma unroll
            for (int step = 0; step < GROUP_STEPS; step++)
                multiply_tiles(sums[0], describe(input, step), describe(weights + group * WEIGHT_BYTES, step));
            commit_wgmma();
#pragma unroll
            for (int chunk = 0; chunk < GROUP_CHUNKS / 2; chunk++)
                popcount += popcount_of_chunk(input, threadIdx.x / 2, threadIdx.x % 2 * (GROUP_CHUNKS / 2) + chunk);
            wait_for_wgmma(sums[0]);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        popcount += __shfl_xor_sync(WHOLE_WARP, popcount, 1);
        if (threadIdx.x % 2 == 0) row_popcounts[threadIdx.x / 2] = popcount;
        __syncthreads();
        Output::template write<THREADS>(results, sums, static_cast<int>(threadIdx.x) / WARP * 16, 0, row_popcounts,
                                        parameters, product, static_cast<int64_t>(tile) * ROWS, first_column);
    }
#else
    // Without its instructions: an error rather than an output that nothing has written.
    __trap();
#endif
}

/* As many blocks as run at once, each with as many tiles of the input as any other, but for the last. */
template <int COLUMNS, int STAGES>
int run(const hf_stompp_cuda_product &product, int64_t groups, int64_t processors, bool overlaps) {
    return with_output<ROWS, COLUMNS>(product, [&](auto output) {
        using Output = decltype(output);
        const int64_t shared = shared_bytes<COLUMNS, Output>(groups, STAGES);
        const dim3 tiles = grid_of<ROWS, COLUMNS>(product);
        const int64_t declared = sizeof(typename Output::Parameters) + ROWS * sizeof(int);
        const int64_t of_block = shared + declared + RESERVED_SHARED_BYTES;
        const int64_t fit = PROCESSOR_SHARED_BYTES / of_block, most = COLUMNS == 128 ? 4 : 6;
        const int64_t at_once = processors * (fit < 1 ? 1 : fit < most ? fit : most);
        const int64_t share = at_once < tiles.y ? 1 : at_once / tiles.y;
        const int64_t turns = (tiles.x + share - 1) / share;
        const dim3 grid(tiles.y, static_cast<unsigned>((tiles.x + turns - 1) / turns));
        return launch(multiply_wgmma<COLUMNS, STAGES, Output>, grid, THREADS, shared, product.stream, overlaps, product);
    });
}

template <int COLUMNS>
int run(const hf_stompp_cuda_product &product, int64_t processors, bool overlaps) {
    const int64_t groups = (row_bytes(product.in_features) + GROUP_BYTES - 1) / GROUP_BYTES;
    return groups <= 1 ? run<COLUMNS, 2>(product, groups, processors, overlaps)
                       : run<COLUMNS, 3>(product, groups, processors, overlaps);
}

}  // namespace

bool takes_wgmma(int64_t in_features) {
    // What a block has at most; results take the most as floats.
    constexpr int64_t MOST = PROCESSOR_SHARED_BYTES - RESERVED_SHARED_BYTES - MOST_STATIC_SHARED_BYTES;
    const int64_t groups = (row_bytes(in_features) + GROUP_BYTES - 1) / GROUP_BYTES;
    return shared_bytes<128, FloatOutput<ROWS, 128, float>>(groups, 3) <= MOST;
}

int binary_linear_wgmma(const hf_stompp_cuda_product &product, int64_t kernel, int64_t processors,
                        bool overlaps) {
    return kernel == HF_STOMPP_CUDA_WGMMA_64x64 ? run<64>(product, processors, overlaps)
                                                : run<128>(product, processors, overlaps);
}

}  // namespace hf_stompp
