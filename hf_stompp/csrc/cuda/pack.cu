/* Floats to bits, bits to signs, and products of bits with one vector. */
#include "bits.cuh"
#include "kernels.cuh"

namespace hf_stompp {
namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;

/* Bytes of bits whose floats a lane asks for before it looks at the first of them. */
constexpr int AT_ONCE = 4;

/* One warp a row, neighbouring bytes of bits by neighbouring lanes. VECTORS: all eights of input and threshold begin at
 * multiples of 16 bytes.
 */
template <typename Float, bool VECTORS>
__global__ void __launch_bounds__(THREADS)
    pack_rows(const Float *__restrict__ input, const float *__restrict__ threshold, int64_t rows, int features,
              uint8_t *__restrict__ bits, int32_t *__restrict__ popcounts) {
    wait_for_earlier_kernels();
    const int lane = threadIdx.x % WARP;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    const Float *const source = input + row * features;
    const int bytes = static_cast<int>(row_bytes(features));
    int popcount = 0;
    for (int start = lane; start < bytes; start += AT_ONCE * WARP) {
        Eight<Float> eights[AT_ONCE];
        if (VECTORS) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int first = 8 * (start + i * WARP);
                if (first < features) eights[i] = eight_at(source + first);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int byte = start + i * WARP, first = 8 * byte;
            if (byte >= bytes) continue;
            unsigned value = 0;
            if (VECTORS) {
                float thresholds[8] = {};
                if (first < features && threshold != nullptr) load_eight(thresholds, threshold + first);
#pragma unroll
                for (int k = 0; k < 8; k++) value |= static_cast<unsigned>(eights[i][k] >= thresholds[k]) << k;
                if (first >= features) value = 0;
            } else {
                for (int k = 0; k < 8 && first + k < features; k++) {
                    const float element = FloatType<Float>::to_float(source[first + k]);
                    const float bound = threshold != nullptr ? threshold[first + k] : 0.0f;
                    value |= static_cast<unsigned>(element >= bound) << k;
                }
            }
            bits[row * bytes + byte] = static_cast<uint8_t>(value);
            popcount += __popc(value);
        }
    }
    if (popcounts != nullptr) {
        popcount = __reduce_add_sync(WHOLE_WARP, popcount);
        if (lane == 0) popcounts[row] = popcount;
    }
}

__device__ __forceinline__ unsigned four_signs(unsigned bits, int live, unsigned plus, unsigned minus) {
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < live) word |= (bits >> i & 1 ? plus : minus) << 8 * i;
    return word;
}

/* One byte of bits a thread. */
__global__ void __launch_bounds__(THREADS)
    unpack_rows(const uint8_t *__restrict__ bits, int64_t bytes, int features, unsigned plus, unsigned minus,
                uint2 *__restrict__ signs) {
    const int64_t byte = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (byte >= bytes) return;
    const int live = features - static_cast<int>(byte % row_bytes(features)) * 8;
    const unsigned value = bits[byte];
    signs[byte] = make_uint2(four_signs(value, live, plus, minus), four_signs(value >> 4, live - 4, plus, minus));
}

/* The sum of a row of signs times a vector, by one warp; every lane gets it. */
template <typename Vector>
__device__ __forceinline__ double multiply_row(const uint8_t *__restrict__ row, int features, Vector vector) {
    double sum = 0;
    for (int k = threadIdx.x % WARP; k < features; k += WARP) sum += row[k / 8] >> k % 8 & 1 ? vector(k) : -vector(k);
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, distance);
    return sum;
}

/* One warp a row of the weight. */
__global__ void __launch_bounds__(THREADS)
    multiply_rows(const uint8_t *__restrict__ weight, int out_features, int in_features,
                  const double *__restrict__ vector, double *__restrict__ output) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= out_features) return;
    const double sum =
        multiply_row(weight + row * row_bytes(in_features), in_features, [&](int k) { return vector[k]; });
    if (threadIdx.x % WARP == 0) output[row] = sum;
}

/* One warp a row of the weight. */
__global__ void __launch_bounds__(THREADS) fold_rows(const hf_stompp_cuda_folding folding) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= folding.out_features) return;
    const int features = static_cast<int>(folding.in_features);
    const double sum = multiply_row(folding.weight + row * row_bytes(features), features, [&](int k) {
        return static_cast<double>(folding.offset[k * folding.offset_stride]);
    });
    if (threadIdx.x % WARP != 0) return;
    const double row_scale = folding.row_scale[row];
    const double constant = row_scale * sum;
    folding.scale[row] = static_cast<float>(row_scale * static_cast<double>(*folding.amplitude));
    folding.constant[row] = static_cast<float>(
        folding.bias == nullptr ? constant : constant + static_cast<double>(folding.bias[row]));
}

/* Warps that share the rows of the weight: a column is a chain of dependent sums, so many short ones. */
constexpr int COLUMN_WARPS = 32;

/* One lane a column of the weight. */
__global__ void __launch_bounds__(COLUMN_WARPS *WARP)
    multiply_columns(const uint8_t *__restrict__ weight, int out_features, int in_features,
                     const double *__restrict__ vector, double *__restrict__ output) {
    __shared__ double sums[COLUMN_WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    const int64_t bytes = row_bytes(in_features);
    double sum = 0;
    if (column < in_features) {
        for (int row = warp; row < out_features; row += COLUMN_WARPS)
            sum += weight[row * bytes + column / 8] >> column % 8 & 1 ? vector[row] : -vector[row];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < in_features) {
        for (int other = 1; other < COLUMN_WARPS; other++) sum += sums[other][lane];
        output[column] = sum;
    }
}

bool is_aligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

unsigned blocks(int64_t count, int64_t per_block) { return static_cast<unsigned>((count + per_block - 1) / per_block); }

}  // namespace

const void *probe_kernel() { return reinterpret_cast<const void *>(&unpack_rows); }

int pack_sign(const hf_stompp_cuda_packing &packing, bool overlaps) {
    return with_dtype(packing.input_dtype, [&](auto zero) {
        using Float = decltype(zero);
        const Float *const input = static_cast<const Float *>(packing.input);
        const bool vectors = packing.features % 8 == 0 && is_aligned(input) && is_aligned(packing.threshold);
        const auto kernel = vectors ? pack_rows<Float, true> : pack_rows<Float, false>;
        return launch(kernel, dim3(blocks(packing.rows, WARPS)), THREADS, 0, packing.stream, overlaps, input, packing.threshold,
                      packing.rows, static_cast<int>(packing.features), packing.bits, packing.popcounts);
    });
}

int unpack_signs(const hf_stompp_cuda_unpacking &unpacking) {
    // +1 and -1 as int8, and in sign, four bits of exponent with bias 7, three of mantissa.
    const bool is_integer = unpacking.signs_type == HF_STOMPP_CUDA_INT8;
    const unsigned plus = is_integer ? 0x01 : 0x38, minus = is_integer ? 0xff : 0xb8;
    const int64_t bytes = unpacking.rows * row_bytes(unpacking.features);
    return launch(unpack_rows, dim3(blocks(bytes, THREADS)), THREADS, 0, unpacking.stream, false, unpacking.bits, bytes,
                  static_cast<int>(unpacking.features), plus, minus, reinterpret_cast<uint2 *>(unpacking.signs));
}

int sign_product(const hf_stompp_cuda_vector_product &product) {
    const int rows = static_cast<int>(product.out_features), columns = static_cast<int>(product.in_features);
    if (product.transposed)
        return launch(multiply_columns, dim3(blocks(columns, WARP)), COLUMN_WARPS * WARP, 0, product.stream, false,
                      product.weight, rows, columns, product.vector, product.output);
    return launch(multiply_rows, dim3(blocks(rows, WARPS)), THREADS, 0, product.stream, false, product.weight, rows,
                  columns, product.vector, product.output);
}

int fold(const hf_stompp_cuda_folding &folding) {
    return launch(fold_rows, dim3(blocks(folding.out_features, WARPS)), THREADS, 0, folding.stream, false, folding);
}

}  // namespace hf_stompp
