/* The parts that products of bits have in common: what becomes of the sums, and tiles of 256 bits in shared memory.
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

/* Where 16 bytes of a tile lie: the two halves of a row change places every four rows, so that eight rows lie in different
 * banks.
 */
__device__ __forceinline__ int tile_offset(int row, int half) { return row * STEP_BYTES + ((half ^ (row / 4 & 1)) * 16); }

__device__ __forceinline__ int popcount_of_row(const uint8_t *row) {
    const uint4 *const halves = reinterpret_cast<const uint4 *>(row);
    const uint4 a = halves[0], b = halves[1];
    return __popc(a.x) + __popc(a.y) + __popc(a.z) + __popc(a.w) + __popc(b.x) + __popc(b.y) + __popc(b.z) +
           __popc(b.w);
}

/* What a block multiplies, 256 bits at a time: a tile holds ROWS rows of the input and behind them COLUMNS rows of the
 * weight. A thread copies the same 16 bytes of the same rows, and counts the bits of the same rows, in every step.
 */
template <int ROWS, int COLUMNS, int THREADS>
class Tiles {
public:
    static constexpr int BYTES = (ROWS + COLUMNS) * STEP_BYTES;

    __device__ __forceinline__ Tiles(const hf_stompp_cuda_product &product, int64_t first_row, int64_t first_column)
        : offset_(tile_offset(threadIdx.x / 2, threadIdx.x % 2)) {
        static_assert(THREADS % 16 == 0 && ROWS * 2 % THREADS == 0 && COLUMNS * 2 % THREADS == 0,
                      "a thread's rows lie as far apart in every tile");
        const int64_t bytes = row_bytes(product.in_features);
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const bool is_input = i * THREADS < ROWS * 2;
            const int row = threadIdx.x / 2 + i * THREADS / 2 - (is_input ? 0 : ROWS);
            const int64_t from = is_input ? first_row : first_column;
            const int64_t count = is_input ? product.rows : product.out_features;
            live_[i] = from + row < count;
            sources_[i] = (is_input ? product.input : product.weight) + (live_[i] ? from + row : 0) * bytes +
                          threadIdx.x % 2 * 16;
        }
    }

    /* Begins to copy; zeros beyond the matrices. */
    __device__ __forceinline__ void copy(uint8_t *tile, int step) const {
#pragma unroll
        for (int i = 0; i < COPIES; i++)
            copy_async(tile + offset_ + i * THREADS / 2 * STEP_BYTES, sources_[i] + step * STEP_BYTES, live_[i]);
    }

    __device__ __forceinline__ void count(const uint8_t *tile) {
#pragma unroll
        for (int i = 0; i < COUNTED; i++) {
            const int line = threadIdx.x + i * THREADS;
            if (line < ROWS + COLUMNS) counts_[i] += popcount_of_row(tile + row_of(line) * STEP_BYTES);
        }
    }

    /* Hands on what has been counted. */
    template <typename Parameters>
    __device__ __forceinline__ void finish(int *row_popcounts, Parameters &parameters) const {
#pragma unroll
        for (int i = 0; i < COUNTED; i++) {
            const int line = threadIdx.x + i * THREADS;
            if (line < COLUMNS) parameters.add_popcount(line, counts_[i]);
            else if (line < ROWS + COLUMNS) row_popcounts[line - COLUMNS] = counts_[i];
        }
    }

private:
    static constexpr int COPIES = (ROWS + COLUMNS) * 2 / THREADS, COUNTED = (ROWS + COLUMNS + THREADS - 1) / THREADS;

    /* Columns are counted first: by the threads that load what belongs to them. */
    static __device__ __forceinline__ int row_of(int line) { return line < COLUMNS ? ROWS + line : line - COLUMNS; }

    int offset_;
    const uint8_t *sources_[COPIES];
    bool live_[COPIES];
    int counts_[COUNTED] = {};
};

/* A result, rounded as the reference rounds it: a fused multiply-add would round once. Without a bias, -0 is added, which
 * changes nothing.
 */
__device__ __forceinline__ float scaled(int dot, float scale, float bias) {
    return __fadd_rn(__fmul_rn(static_cast<float>(dot), scale), bias);
}

__device__ __forceinline__ float bias_of(const hf_stompp_cuda_product &product, int64_t column) {
    return product.bias == nullptr ? -0.0f : product.bias[column];
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

    struct Parameters {
        /* in_features - 2 p(v): what of a product depends on the column alone. */
        alignas(8) int constants[COLUMNS];
        alignas(8) float scale[COLUMNS];
        alignas(8) float bias[COLUMNS];

        __device__ __forceinline__ void load(const hf_stompp_cuda_product &product, int64_t first_column) {
            const int i = threadIdx.x;
            if (i >= COLUMNS) return;
            const int64_t column = first_column + i;
            const bool live = column < product.out_features;
            constants[i] = static_cast<int>(product.in_features);
            scale[i] = live ? product.scale[column] : 0.0f;
            bias[i] = live ? bias_of(product, column) : 0.0f;
        }

        __device__ __forceinline__ void add_popcount(int column, int popcount) { constants[column] -= 2 * popcount; }
    };

    template <int THREADS, int ROW_FRAGMENTS, int COLUMN_FRAGMENTS>
    static __device__ __forceinline__ void write(uint8_t *shared, const int (&sums)[ROW_FRAGMENTS][COLUMN_FRAGMENTS][4],
                                                 int warp_row, int warp_column, const int *row_popcounts,
                                                 const Parameters &parameters, const hf_stompp_cuda_product &product,
                                                 int64_t first_row, int64_t first_column) {
        Float *const tile = reinterpret_cast<Float *>(shared);
        int row_constants[ROW_FRAGMENTS][2];
#pragma unroll
        for (int i = 0; i < ROW_FRAGMENTS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                row_constants[i][half] = -2 * row_popcounts[warp_row + i * 16 + row_in_fragment(2 * half)];
        Float *const first = tile + (warp_row + row_in_fragment(0)) * PITCH + warp_column + column_in_fragment(0);
#pragma unroll
        for (int j = 0; j < COLUMN_FRAGMENTS; j++) {
            const int column = warp_column + j * 8 + column_in_fragment(0);
            const Pair<int> constants = *reinterpret_cast<const Pair<int> *>(parameters.constants + column);
            const Pair<float> scale = *reinterpret_cast<const Pair<float> *>(parameters.scale + column);
            const Pair<float> bias = *reinterpret_cast<const Pair<float> *>(parameters.bias + column);
#pragma unroll
            for (int i = 0; i < ROW_FRAGMENTS; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    Pair<Float> pair;
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int dot = 4 * sums[i][j][2 * half + e] + (row_constants[i][half] + constants.values[e]);
                        pair.values[e] = FloatType<Float>::round(scaled(dot, scale.values[e], bias.values[e]));
                    }
                    *reinterpret_cast<Pair<Float> *>(first + (i * 16 + half * 8) * PITCH + j * 8) = pair;
                }
        }
        __syncthreads();
        // A thread writes the same columns of every few rows.
        constexpr int VECTORS = COLUMNS / VECTOR, ROWS_AT_ONCE = THREADS / VECTORS;
        static_assert(THREADS % VECTORS == 0 && ROWS % ROWS_AT_ONCE == 0, "all threads write as much");
        const int column = static_cast<int>(threadIdx.x) % VECTORS * VECTOR;
        const int first_of_rows = static_cast<int>(threadIdx.x) / VECTORS;
        const int64_t row_before = first_row + first_of_rows, columns = product.out_features;
        const int64_t live = columns - (first_column + column);
        const Float *source = tile + first_of_rows * PITCH + column;
        Float *const output = static_cast<Float *>(product.output);
        Float *target = output + row_before * columns + first_column + column;
        // Rows of the result begin at multiples of 16 bytes only then.
        const bool vectors = columns % VECTOR == 0 && reinterpret_cast<uintptr_t>(output) % 16 == 0;
        if (vectors && first_row + ROWS <= product.rows && first_column + COLUMNS <= columns) {
#pragma unroll
            for (int row = 0; row < ROWS; row += ROWS_AT_ONCE) {
                *reinterpret_cast<uint4 *>(target) = *reinterpret_cast<const uint4 *>(source + row * PITCH);
                target += ROWS_AT_ONCE * columns;
            }
            return;
        }
        if (live <= 0) return;
#pragma unroll 1
        for (int row = 0; row < ROWS && row_before + row < product.rows; row += ROWS_AT_ONCE) {
            if (vectors) {
                *reinterpret_cast<uint4 *>(target) = *reinterpret_cast<const uint4 *>(source);
            } else {
#pragma unroll 1
                for (int k = 0; k < VECTOR && k < live; k++) target[k] = source[k];
            }
            source += ROWS_AT_ONCE * PITCH;
            target += ROWS_AT_ONCE * columns;
        }
    }
};

__device__ __forceinline__ float round_to(int64_t dtype, float value) {
    if (dtype == HF_STOMPP_CUDA_BF16) return __bfloat162float(__float2bfloat16_rn(value));
    if (dtype == HF_STOMPP_CUDA_F16) return __half2float(__float2half_rn(value));
    return value;
}

/* Of a column, which numbers of unequal bits give a result at or above the threshold. Rounded results are monotone in that
 * number, so they are those below a bound, or all others.
 */
struct UnequalBits {
    int bound;
    bool below;
};

__device__ __forceinline__ UnequalBits above_threshold(const hf_stompp_cuda_product &product, int64_t column) {
    const int in_features = static_cast<int>(product.in_features);
    if (column >= product.out_features) return {in_features + 1, false};
    const float scale = product.scale[column], bias = bias_of(product, column);
    const float threshold = product.output_threshold == nullptr ? 0.0f : product.output_threshold[column];
    const auto is_above = [&](int unequal) {
        return round_to(product.output_dtype, scaled(in_features - 2 * unequal, scale, bias)) >= threshold;
    };
    const bool below = is_above(0);
    if (is_above(in_features) == below) return {in_features + 1, below};
    int same = 0, other = in_features;
    while (other - same > 1) {
        const int middle = (same + other) / 2;
        (is_above(middle) == below ? same : other) = middle;
    }
    return {other, below};
}

/* Bits are put together in registers: eight of a lane in each of four words (32 columns each), and then the words of the
 * four lanes that hold the columns of a row.
 */
template <int ROWS, int COLUMNS>
struct BitOutput {
    static constexpr int SHARED_BYTES = 0;

    struct Parameters {
        /* p(v) less the bound: with p(s) and without twice p(s & v), negative where unequal bits are below it. */
        alignas(8) int constants[COLUMNS];
        /* Columns whose bits are set where they are not. */
        unsigned inverted[COLUMNS / 32];

        __device__ __forceinline__ void load(const hf_stompp_cuda_product &product, int64_t first_column) {
            const int i = threadIdx.x;
            if (i >= COLUMNS) return;
            const UnequalBits rule = above_threshold(product, first_column + i);
            constants[i] = -rule.bound;
            const unsigned others = __ballot_sync(WHOLE_WARP, !rule.below);
            if (i % 32 == 0) inverted[i / 32] = others;
        }

        __device__ __forceinline__ void add_popcount(int column, int popcount) { constants[column] += popcount; }
    };

    template <int THREADS, int ROW_FRAGMENTS, int COLUMN_FRAGMENTS>
    static __device__ __forceinline__ void write(uint8_t *, const int (&sums)[ROW_FRAGMENTS][COLUMN_FRAGMENTS][4],
                                                 int warp_row, int warp_column, const int *row_popcounts,
                                                 const Parameters &parameters, const hf_stompp_cuda_product &product,
                                                 int64_t first_row, int64_t first_column) {
        static_assert(COLUMN_FRAGMENTS % 4 == 0, "a word holds four fragments");
        static_assert(256 % COLUMNS == 0, "tiles end where rows of bits do");
        constexpr int WORDS = COLUMN_FRAGMENTS / 4, AT_ONCE = WORDS < 4 ? WORDS : 4;
        const int lane = threadIdx.x % 4;
        const int64_t words = row_bytes(product.out_features) / 4;
        int popcounts[ROW_FRAGMENTS][2];
#pragma unroll
        for (int i = 0; i < ROW_FRAGMENTS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                popcounts[i][half] = row_popcounts[warp_row + i * 16 + row_in_fragment(2 * half)];
#pragma unroll
        for (int first_word = 0; first_word < WORDS; first_word += AT_ONCE) {
            unsigned bits[ROW_FRAGMENTS][2] = {};
            // From the last column on: each shift moves those before it up.
#pragma unroll
            for (int j = 4 * (first_word + AT_ONCE) - 1; j >= 4 * first_word; j--) {
                const Pair<int> constants = *reinterpret_cast<const Pair<int> *>(
                    parameters.constants + warp_column + j * 8 + column_in_fragment(0));
#pragma unroll
                for (int i = 0; i < ROW_FRAGMENTS; i++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
#pragma unroll
                        for (int e = 1; e >= 0; e--) {
                            const int difference =
                                popcounts[i][half] + constants.values[e] - 2 * sums[i][j][2 * half + e];
                            bits[i][half] = __funnelshift_l(static_cast<unsigned>(difference), bits[i][half], 1);
                        }
            }
            const int word = warp_column / 32 + first_word + lane;
#pragma unroll
            for (int i = 0; i < ROW_FRAGMENTS; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // Byte k of lane l to byte l of lane k, in two exchanges; then pairs of bits likewise.
                    unsigned of_row = bits[i][half];
                    of_row = __byte_perm(of_row, __shfl_xor_sync(WHOLE_WARP, of_row, 1), lane % 2 ? 0x3715 : 0x6240);
                    of_row = __byte_perm(of_row, __shfl_xor_sync(WHOLE_WARP, of_row, 2), lane / 2 ? 0x3276 : 0x5410);
                    of_row = swap_bits<6, 0x00cc00cc>(of_row);
                    of_row = swap_bits<12, 0x0000f0f0>(of_row);
                    const int64_t row = first_row + warp_row + i * 16 + row_in_fragment(2 * half);
                    if (lane < AT_ONCE && row < product.rows)
                        reinterpret_cast<uint32_t *>(product.output_bits)[row * words + first_column / 32 + word] =
                            of_row ^ parameters.inverted[word];
                }
        }
    }

private:
    /* Exchanges the bits under MASK with those DISTANCE above them. */
    template <int DISTANCE, unsigned MASK>
    static __device__ __forceinline__ unsigned swap_bits(unsigned bits) {
        const unsigned changed = (bits >> DISTANCE ^ bits) & MASK;
        return bits ^ changed ^ changed << DISTANCE;
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
