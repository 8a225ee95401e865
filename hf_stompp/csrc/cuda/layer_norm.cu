/* Residual add, LayerNorm, and the sign bits of what comes out, in one pass over memory. */
#include "bits.cuh"
#include "kernels.cuh"

namespace hf_stompp {
namespace {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(WHOLE_WARP, value, distance);
    return value;
}

/* Eights of features that a lane asks for before it looks at the first of them. */
constexpr int AT_ONCE = 4;

/* One warp a row, which stays in registers: EIGHTS eights of features a lane; up to so many unless WHOLE. With a bound of one
 * block, no compiler keeps registers for others and spills.
 */
template <typename Float, typename Parameter, int EIGHTS, bool WHOLE>
__global__ void __launch_bounds__(THREADS, 1) normalize_rows(const hf_stompp_cuda_layer_norm norm) {
    wait_for_earlier_kernels();
    const int lane = threadIdx.x % WARP;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= norm.rows) return;
    const int features = WHOLE ? EIGHTS * 8 * WARP : static_cast<int>(norm.features);
    const Float *const input = static_cast<const Float *>(norm.input) + row * features;
    const bool has_residual = norm.residual != nullptr;
    const Float *const residual = has_residual ? static_cast<const Float *>(norm.residual) + row * features : nullptr;
    const auto is_live = [&](int i) { return WHOLE || 8 * (lane + i * WARP) < features; };

    float values[EIGHTS][8] = {};
    float sum = 0;
#pragma unroll
    for (int start = 0; start < EIGHTS; start += AT_ONCE) {
        Eight<Float> inputs[AT_ONCE], residuals[AT_ONCE];
#pragma unroll
        for (int i = start; i < EIGHTS && i < start + AT_ONCE; i++) {
            if (!is_live(i)) continue;
            inputs[i - start] = eight_at(input + 8 * (lane + i * WARP));
            if (has_residual) residuals[i - start] = eight_at(residual + 8 * (lane + i * WARP));
        }
#pragma unroll
        for (int i = start; i < EIGHTS && i < start + AT_ONCE; i++) {
            if (!is_live(i)) continue;
#pragma unroll
            for (int k = 0; k < 8; k++) values[i][k] = inputs[i - start][k];
            if (has_residual) {
#pragma unroll
                for (int k = 0; k < 8; k++) values[i][k] += residuals[i - start][k];
                const Eight<Float> rounded = round_eight<Float>(values[i]);
#pragma unroll
                for (int k = 0; k < 8; k++) values[i][k] = rounded[k];
            }
#pragma unroll
            for (int k = 0; k < 8; k++) sum += values[i][k];
        }
    }
    const float mean = sum_of_warp(sum) / static_cast<float>(features);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        if (!is_live(i)) continue;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            values[i][k] -= mean;
            squares = __fmaf_rn(values[i][k], values[i][k], squares);
        }
    }
    const float variance = sum_of_warp(squares) / static_cast<float>(features);
    const float inverse = 1.0f / sqrtf(variance + static_cast<float>(norm.epsilon));

    Float *const output = static_cast<Float *>(norm.output) + row * features;
    const int bytes = static_cast<int>(row_bytes(features));
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        const int byte = lane + i * WARP, first = 8 * byte;
        if (!WHOLE && byte >= bytes) continue;
        unsigned bits = 0;
        if (is_live(i)) {
            float weight[8], bias[8], thresholds[8] = {};
            load_eight(weight, static_cast<const Parameter *>(norm.weight) + first);
            load_eight(bias, static_cast<const Parameter *>(norm.bias) + first);
            if (norm.threshold != nullptr) load_eight(thresholds, norm.threshold + first);
#pragma unroll
            for (int k = 0; k < 8; k++) values[i][k] = __fmaf_rn(values[i][k] * inverse, weight[k], bias[k]);
            const Eight<Float> eight = round_eight<Float>(values[i]);
#pragma unroll
            for (int k = 0; k < 8; k++) bits |= static_cast<unsigned>(eight[k] >= thresholds[k]) << k;
            *reinterpret_cast<Eight<Float> *>(output + first) = eight;
        }
        if (norm.bits != nullptr) norm.bits[row * bytes + byte] = static_cast<uint8_t>(bits);
    }
}

template <typename Float, typename Parameter>
int run(const hf_stompp_cuda_layer_norm &norm, bool overlaps) {
    const dim3 grid(static_cast<unsigned>((norm.rows + WARPS - 1) / WARPS));
    const auto run_kernel = [&](void (*kernel)(hf_stompp_cuda_layer_norm)) {
        return launch(kernel, grid, THREADS, 0, norm.stream, overlaps, norm);
    };
    switch (norm.features) {
        case 512: return run_kernel(normalize_rows<Float, Parameter, 2, true>);
        case 768: return run_kernel(normalize_rows<Float, Parameter, 3, true>);
        case 1024: return run_kernel(normalize_rows<Float, Parameter, 4, true>);
        default:
            return run_kernel(norm.features < 1024 ? normalize_rows<Float, Parameter, 4, false>
                                                   : normalize_rows<Float, Parameter, 16, false>);
    }
}

}  // namespace

int layer_norm_sign(const hf_stompp_cuda_layer_norm &norm, bool overlaps) {
    if (norm.features > 4096 || norm.features % 8 != 0) return HF_STOMPP_CUDA_TOO_LARGE;
    return with_dtype(norm.dtype, [&](auto zero) {
        using Float = decltype(zero);
        return norm.parameter_dtype == HF_STOMPP_CUDA_F32 ? run<Float, float>(norm, overlaps) : run<Float, Float>(norm, overlaps);
    });
}

}  // namespace hf_stompp
