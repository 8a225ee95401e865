/* The parts that both products of bits have in common: tiles in shared memory, and what becomes of the sums.
 *
 * Only AND is native on Hopper (XOR is several instructions), so with p(x) the number of set bits of a row of a +-1
 * matrix, s . v = 4 p(s & v) - 2 p(s) - 2 p(v) + in_features. The set bits of the rows are counted from shared memory,
 * by all threads, while the tensor cores multiply.
 */
#ifndef HF_STOMPP_PRODUCT_CUH
#define HF_STOMPP_PRODUCT_CUH

#include "bits.cuh"
#include "kernels.cuh"

namespace hf_stompp {

/* Bytes of a row in a tile: the 256 bits of one instruction. */
constexpr int STEP_BYTES = 32;

/* Where 16 bytes of a tile lie: the two halves of a row change places every four rows. Eight rows then lie in different
 * banks, and it is the 32-byte swizzle of wgmma.
 */
__device__ __forceinline__ int tile_offset(int row, int half) { return row * STEP_BYTES + ((half ^ (row / 4 & 1)) * 16); }

/* Rows of bits from the first row of a tile on. */
struct TileRows {
    const uint8_t *first;
    /* How many there are, at least: no more than an int counts. */
    int live;
    int bytes;

    __device__ __forceinline__ TileRows(const uint8_t *matrix, int64_t first_row, int64_t rows, int64_t bytes_of_row)
        : first(matrix + (first_row < rows ? first_row : 0) * bytes_of_row),
          live(static_cast<int>(first_row < rows ? rows - first_row : 0)),
          bytes(static_cast<int>(bytes_of_row)) {}
};

/* Begins to copy 256 bits of ROWS rows to a tile; zeros beyond the matrix. */
template <int ROWS, int THREADS>
__device__ __forceinline__ void copy_tile(uint8_t *tile, const TileRows &source, int step) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * 2; i += THREADS) {
        const int row = i / 2, half = i % 2;
        const bool live = row < source.live;
        const int offset = (live ? row : 0) * source.bytes + step * STEP_BYTES + half * 16;
        copy_async(tile + tile_offset(row, half), source.first + offset, live);
    }
}

__device__ __forceinline__ int popcount_of_row(const uint8_t *row) {
    const uint4 *const halves = reinterpret_cast<const uint4 *>(row);
    const uint4 a = halves[0], b = halves[1];
    return __popc(a.x) + __popc(a.y) + __popc(a.z) + __popc(a.w) + __popc(b.x) + __popc(b.y) + __popc(b.z) +
           __popc(b.w);
}

/* What every column needs for its results. */
template <int COLUMNS>
struct ColumnParameters {
    int popcounts[COLUMNS];
    float scale[COLUMNS], bias[COLUMNS], threshold[COLUMNS];
};

template <int COLUMNS, int THREADS>
__device__ __forceinline__ void load_parameters(ColumnParameters<COLUMNS> &parameters,
                                                const hf_stompp_cuda_product &product, int64_t first_column) {
    for (int i = threadIdx.x; i < COLUMNS; i += THREADS) {
        const int64_t column = first_column + i;
        const bool live = column < product.out_features;
        parameters.scale[i] = live ? product.scale[column] : 0.0f;
        parameters.bias[i] = live && product.bias != nullptr ? product.bias[column] : 0.0f;
        parameters.threshold[i] = live && product.output_threshold != nullptr ? product.output_threshold[column] : 0.0f;
    }
}

/* A result, rounded as the reference rounds it: a fused multiply-add would round once. */
template <int COLUMNS>
__device__ __forceinline__ float result(int sum, int row_popcount, const ColumnParameters<COLUMNS> &parameters,
                                        int column, int in_features, bool has_bias) {
    const int dot = 4 * sum - 2 * (row_popcount + parameters.popcounts[column]) + in_features;
    const float scaled = __fmul_rn(static_cast<float>(dot), parameters.scale[column]);
    return has_bias ? __fadd_rn(scaled, parameters.bias[column]) : scaled;
}

/* In a fragment of 16 rows and 8 columns, a lane holds two columns of two rows: element e is at row_in_fragment(e) and
 * column_in_fragment(e).
 */
__device__ __forceinline__ int row_in_fragment(int element) { return threadIdx.x % WARP / 4 + element / 2 * 8; }
__device__ __forceinline__ int column_in_fragment(int element) { return threadIdx.x % 4 * 2 + element % 2; }

/* Two neighbours of a row, written at once. */
template <typename Float>
struct alignas(2 * sizeof(Float)) Pair {
    Float values[2];
};

/* Floats go through shared memory, so that they are written 16 bytes at a time, rows in one piece. */
template <int ROWS, int COLUMNS, typename Float>
struct FloatOutput {
    static constexpr int VECTOR = 16 / sizeof(Float);
    // Rows one vector apart in the banks.
    static constexpr int PITCH = COLUMNS + VECTOR;
    static constexpr int SHARED_BYTES = ROWS * PITCH * sizeof(Float);

    template <int THREADS, int ROW_FRAGMENTS, int COLUMN_FRAGMENTS>
    static __device__ __forceinline__ void write(const int (&sums)[ROW_FRAGMENTS][COLUMN_FRAGMENTS][4], int warp_row,
                                                 int warp_column, const int *row_popcounts,
                                                 const ColumnParameters<COLUMNS> &parameters,
                                                 const hf_stompp_cuda_product &product, int64_t first_row,
                                                 int64_t first_column) {
        Float *const tile = reinterpret_cast<Float *>(dynamic_shared());
        const int in_features = static_cast<int>(product.in_features);
        const bool has_bias = product.bias != nullptr;
        // Columns outside: their parameters take registers, of which the sums leave few.
#pragma unroll
        for (int j = 0; j < COLUMN_FRAGMENTS; j++)
#pragma unroll
            for (int i = 0; i < ROW_FRAGMENTS; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = warp_row + i * 16 + row_in_fragment(2 * half);
                    const int column = warp_column + j * 8 + column_in_fragment(0);
                    Pair<Float> pair;
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        pair.values[e] = FloatType<Float>::round(result(sums[i][j][2 * half + e], row_popcounts[row],
                                                                        parameters, column + e, in_features, has_bias));
                    *reinterpret_cast<Pair<Float> *>(tile + row * PITCH + column) = pair;
                }
        __syncthreads();
        Float *const output = static_cast<Float *>(product.output);
        // Rows of the result begin at multiples of 16 bytes only then.
        const bool vectors = product.out_features % VECTOR == 0 && reinterpret_cast<uintptr_t>(output) % 16 == 0;
        for (int i = threadIdx.x; i < ROWS * (COLUMNS / VECTOR); i += THREADS) {
            const int row = i / (COLUMNS / VECTOR), column = i % (COLUMNS / VECTOR) * VECTOR;
            const int64_t live = product.out_features - (first_column + column);
            if (first_row + row >= product.rows || live <= 0) continue;
            const Float *const source = tile + row * PITCH + column;
            Float *const target = output + (first_row + row) * product.out_features + first_column + column;
            if (vectors) {
                *reinterpret_cast<uint4 *>(target) = *reinterpret_cast<const uint4 *>(source);
            } else {
                for (int k = 0; k < VECTOR && k < live; k++) target[k] = source[k];
            }
        }
    }
};

__device__ __forceinline__ float round_to(int64_t dtype, float value) {
    if (dtype == HF_STOMPP_CUDA_BF16) return __bfloat162float(__float2bfloat16_rn(value));
    if (dtype == HF_STOMPP_CUDA_F16) return __half2float(__float2half_rn(value));
    return value;
}

/* Bits are put together in registers, four fragments (32 columns) to a word. */
template <int ROWS, int COLUMNS>
struct BitOutput {
    static constexpr int SHARED_BYTES = 0;

    template <int THREADS, int ROW_FRAGMENTS, int COLUMN_FRAGMENTS>
    static __device__ __forceinline__ void write(const int (&sums)[ROW_FRAGMENTS][COLUMN_FRAGMENTS][4], int warp_row,
                                                 int warp_column, const int *row_popcounts,
                                                 const ColumnParameters<COLUMNS> &parameters,
                                                 const hf_stompp_cuda_product &product, int64_t first_row,
                                                 int64_t first_column) {
        static_assert(COLUMN_FRAGMENTS % 4 == 0, "a word holds four fragments");
        static_assert(256 % COLUMNS == 0, "tiles end where rows of bits do");
        const int in_features = static_cast<int>(product.in_features);
        const bool has_bias = product.bias != nullptr;
        const int64_t words = row_bytes(product.out_features) / 4;
#pragma unroll
        for (int i = 0; i < ROW_FRAGMENTS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = warp_row + i * 16 + row_in_fragment(2 * half);
                const int row_popcount = row_popcounts[row];
#pragma unroll
                for (int word = 0; word < COLUMN_FRAGMENTS / 4; word++) {
                    unsigned bits = 0;
#pragma unroll
                    for (int j = 0; j < 4; j++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const int column = warp_column + (4 * word + j) * 8 + column_in_fragment(e);
                            const float value = round_to(product.output_dtype,
                                                         result(sums[i][4 * word + j][2 * half + e], row_popcount,
                                                                parameters, column, in_features, has_bias));
                            const bool is_set = first_column + column < product.out_features &&
                                                value >= parameters.threshold[column];
                            bits |= static_cast<unsigned>(is_set) << (8 * j + column_in_fragment(e));
                        }
                    // The four lanes that hold the columns of one row.
                    bits |= __shfl_xor_sync(WHOLE_WARP, bits, 1);
                    bits |= __shfl_xor_sync(WHOLE_WARP, bits, 2);
                    const int64_t target = (first_column + warp_column) / 32 + word;
                    if (threadIdx.x % 4 == 0 && first_row + row < product.rows)
                        reinterpret_cast<uint32_t *>(product.output_bits)[(first_row + row) * words + target] = bits;
                }
            }
    }
};

/* Calls function(Output{}) with what a product puts out. */
template <int ROWS, int COLUMNS, typename Function>
int with_output(const hf_stompp_cuda_product &product, Function function) {
    if (product.output_bits != nullptr) return function(BitOutput<ROWS, COLUMNS>{});
    return with_dtype(product.output_dtype,
                      [&](auto zero) { return function(FloatOutput<ROWS, COLUMNS, decltype(zero)>{}); });
}

/* One block a tile; along y the columns, of which bits need whole rows. */
template <int ROWS, int COLUMNS>
dim3 grid_of(const hf_stompp_cuda_product &product) {
    const int64_t columns = product.output_bits == nullptr ? product.out_features : 8 * row_bytes(product.out_features);
    return dim3(static_cast<unsigned>((product.rows + ROWS - 1) / ROWS),
                static_cast<unsigned>((columns + COLUMNS - 1) / COLUMNS));
}

}  // namespace hf_stompp

#endif
