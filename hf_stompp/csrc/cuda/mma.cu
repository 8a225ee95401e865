/* Products of bits by mma.m16n8k256: compute capability 8.0 and up, in emulation from 10.0 on. */
#include "product.cuh"

namespace hf_stompp {
namespace {

/* Tiles under way at once. */
constexpr int STAGES = 4;

/* A tile of ROWS x COLUMNS, one warp to each WARP_ROWS x WARP_COLUMNS of it. */
template <int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, typename Output>
__global__ void __launch_bounds__(ROWS / WARP_ROWS *(COLUMNS / WARP_COLUMNS) * WARP)
    multiply_mma(const hf_stompp_cuda_product product) {
    constexpr int THREADS = ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * WARP;
    constexpr int ROW_FRAGMENTS = WARP_ROWS / 16, COLUMN_FRAGMENTS = WARP_COLUMNS / 8;
    using Tiles = hf_stompp::Tiles<ROWS, COLUMNS, THREADS>;
    __shared__ typename Output::Parameters parameters;
    __shared__ int row_popcounts[ROWS];
    uint8_t *const shared = dynamic_shared();

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int warp_row = warp / (COLUMNS / WARP_COLUMNS) * WARP_ROWS;
    const int warp_column = warp % (COLUMNS / WARP_COLUMNS) * WARP_COLUMNS;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * ROWS;
    const int64_t first_column = static_cast<int64_t>(blockIdx.y) * COLUMNS;
    const int steps = static_cast<int>(row_bytes(product.in_features) / STEP_BYTES);
    Tiles tiles(product, first_row, first_column);

    const auto copy_step = [&](int step) {
        if (step < steps) tiles.copy(shared + step % STAGES * Tiles::BYTES, step);
        // Also without copies: what is waited for is counted in groups.
        commit_copies();
    };

    wait_for_earlier_kernels();
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) copy_step(step);
    parameters.load(product, first_column);
    int sums[ROW_FRAGMENTS][COLUMN_FRAGMENTS][4] = {};
    for (int step = 0; step < steps; step++) {
        wait_for_copies<STAGES - 2>();
        // All have waited for this stage, and have done with the one that is filled next.
        __syncthreads();
        copy_step(step + STAGES - 1);
        const uint8_t *const inputs = shared + step % STAGES * Tiles::BYTES;
        const uint8_t *const weights = inputs + ROWS * STEP_BYTES;
        uint32_t a[ROW_FRAGMENTS][4];
#pragma unroll
        for (int i = 0; i < ROW_FRAGMENTS; i++)
            load_matrices(a[i], inputs + tile_offset(warp_row + i * 16 + lane % 16, lane / 16));
#pragma unroll
        for (int j = 0; j < COLUMN_FRAGMENTS; j += 2) {
            uint32_t b[4];
            load_matrices(b, weights + tile_offset(warp_column + j * 8 + lane % 8 + lane / 16 * 8, lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < ROW_FRAGMENTS; i++) {
                multiply_fragments(sums[i][j], a[i], b[0], b[1]);
                multiply_fragments(sums[i][j + 1], a[i], b[2], b[3]);
            }
        }
        tiles.count(inputs);
    }
    tiles.finish(row_popcounts, parameters);
    // All have done with the stages, which may be overwritten by results. No copy is under way.
    __syncthreads();
    Output::template write<THREADS>(shared, sums, warp_row, warp_column, row_popcounts, parameters, product, first_row,
                                    first_column);
}

template <int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS>
int run(const hf_stompp_cuda_product &product, bool overlaps) {
    return with_output<ROWS, COLUMNS>(product, [&](auto output) {
        using Output = decltype(output);
        constexpr int THREADS = ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * WARP;
        constexpr int STAGES_BYTES = STAGES * Tiles<ROWS, COLUMNS, THREADS>::BYTES;
        constexpr int SHARED_BYTES = STAGES_BYTES > Output::SHARED_BYTES ? STAGES_BYTES : Output::SHARED_BYTES;
        return launch(multiply_mma<ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, Output>, grid_of<ROWS, COLUMNS>(product),
                      THREADS, SHARED_BYTES, product.stream, overlaps, product);
    });
}

}  // namespace

int binary_linear_mma(const hf_stompp_cuda_product &product, int64_t kernel, bool overlaps) {
    return kernel == HF_STOMPP_CUDA_MMA_64x64 ? run<64, 64, 32, 32>(product, overlaps)
                                              : run<128, 128, 64, 32>(product, overlaps);
}

}  // namespace hf_stompp
