/* Products of bits by wgmma.m64nNk256: compute capability 9.0 alone (sm_90a). */
#include "product.cuh"

namespace hf_stompp {
namespace {

constexpr int ROWS = 128;

/* Two warpgroups, 64 rows each. */
constexpr int THREADS = ROWS / 64 * 128;

#if HF_STOMPP_WGMMA
/* The matrix descriptor of a tile whose rows of 32 bytes lie in the order of tile_offset. */
__device__ __forceinline__ uint64_t describe(const uint8_t *tile) {
    // In units of 16 bytes: where it begins, an offset that this layout does not use, and eight rows to the next eight.
    const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4, unused = 1, eight_rows = 8 * STEP_BYTES >> 4;
    const uint64_t swizzle_of_32_bytes = 3;
    return address | unused << 16 | eight_rows << 32 | swizzle_of_32_bytes << 62;
}
#endif

/* A tile of 128 x COLUMNS. A stage holds STEPS steps of 256 bits; all steps of a product are a multiple of STEPS, since
 * a wgmma under a condition would make the compiler serialize them all. Two blocks of 128 columns share a processor: one
 * multiplies while the other writes.
 */
template <int COLUMNS, int STEPS, int STAGES, typename Output>
__global__ void __launch_bounds__(THREADS, COLUMNS == 128 ? 2 : 1)
    multiply_wgmma(const hf_stompp_cuda_product product) {
#if HF_STOMPP_WGMMA
    using Tiles = hf_stompp::Tiles<ROWS, COLUMNS, THREADS>;
    constexpr int COLUMN_FRAGMENTS = COLUMNS / 8;
    __shared__ typename Output::Parameters parameters;
    __shared__ int row_popcounts[ROWS];
    uint8_t *const shared = dynamic_shared();

    const int warp = threadIdx.x / WARP, warpgroup = threadIdx.x / 128;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * ROWS;
    const int64_t first_column = static_cast<int64_t>(blockIdx.y) * COLUMNS;
    const int groups = static_cast<int>(row_bytes(product.in_features) / STEP_BYTES) / STEPS;
    Tiles tiles(product, first_row, first_column);

    const auto copy_group = [&](int group) {
        if (group < groups) {
            uint8_t *const stage = shared + group % STAGES * STEPS * Tiles::BYTES;
#pragma unroll
            for (int step = 0; step < STEPS; step++) tiles.copy(stage + step * Tiles::BYTES, group * STEPS + step);
        }
        commit_copies();
    };

#pragma unroll
    for (int group = 0; group < STAGES - 1; group++) copy_group(group);
    parameters.template load<Tiles>(product, first_column);
    int sums[1][COLUMN_FRAGMENTS][4] = {};
    for (int group = 0; group < groups; group++) {
        wait_for_copies<STAGES - 2>();
        fence_shared_for_wgmma();
        // All have waited for this stage, and have done with the one that is filled next.
        __syncthreads();
        copy_group(group + STAGES - 1);
        const uint8_t *const stage = shared + group % STAGES * STEPS * Tiles::BYTES;
        begin_wgmma(sums[0]);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            multiply_tiles(sums[0], describe(stage + step * Tiles::BYTES + warpgroup * 64 * STEP_BYTES),
                           describe(stage + step * Tiles::BYTES + ROWS * STEP_BYTES));
        commit_wgmma();
#pragma unroll
        for (int step = 0; step < STEPS; step++) tiles.count(stage + step * Tiles::BYTES);
        wait_for_wgmma(sums[0]);
    }
    tiles.finish(row_popcounts, parameters);
    // All have done with the stages, which may be overwritten by results. No copy is under way.
    __syncthreads();
    Output::template write<THREADS>(sums, warp * 16, 0, row_popcounts, parameters, product, first_row, first_column);
#endif
}

template <int COLUMNS, int STEPS, int STAGES>
int run_steps(const hf_stompp_cuda_product &product) {
    return with_output<ROWS, COLUMNS>(product, [&](auto output) {
        using Output = decltype(output);
        constexpr int STAGES_BYTES = STAGES * STEPS * Tiles<ROWS, COLUMNS, THREADS>::BYTES;
        constexpr int SHARED_BYTES = STAGES_BYTES > Output::SHARED_BYTES ? STAGES_BYTES : Output::SHARED_BYTES;
        return launch(multiply_wgmma<COLUMNS, STEPS, STAGES, Output>, grid_of<ROWS, COLUMNS>(product), THREADS,
                      SHARED_BYTES, product.stream, product);
    });
}

template <int COLUMNS>
int run(const hf_stompp_cuda_product &product) {
    const int64_t steps = row_bytes(product.in_features) / STEP_BYTES;
    if (steps % 4 == 0) return run_steps<COLUMNS, 4, 2>(product);
    if (steps % 3 == 0) return run_steps<COLUMNS, 3, 2>(product);
    return run_steps<COLUMNS, 1, 4>(product);
}

}  // namespace

int binary_linear_wgmma(const hf_stompp_cuda_product &product, int64_t kernel) {
    return kernel == HF_STOMPP_CUDA_WGMMA_128x128 ? run<128>(product) : run<256>(product);
}

}  // namespace hf_stompp
