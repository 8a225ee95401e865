/* Rows of bits, and the float types that they are made of. */
#ifndef HF_STOMPP_BITS_CUH
#define HF_STOMPP_BITS_CUH

#include "hf_stompp_cuda.h"
#include "instructions.cuh"

namespace hf_stompp {

constexpr int WARP = 32;
constexpr unsigned WHOLE_WARP = 0xffffffffu;

__host__ __device__ __forceinline__ int64_t row_bytes(int64_t features) { return (features + 255) / 256 * 32; }

template <typename Float>
struct FloatType;

template <>
struct FloatType<float> {
    static __device__ __forceinline__ float to_float(float value) { return value; }
    static __device__ __forceinline__ float round(float value) { return value; }
    static __device__ __forceinline__ float2 round(float2 values) { return values; }
};

template <>
struct FloatType<__nv_bfloat16> {
    static __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
    static __device__ __forceinline__ __nv_bfloat16 round(float value) { return __float2bfloat16_rn(value); }
    static __device__ __forceinline__ __nv_bfloat162 round(float2 values) { return __float22bfloat162_rn(values); }
};

template <>
struct FloatType<__half> {
    static __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
    static __device__ __forceinline__ __half round(float value) { return __float2half_rn(value); }
    static __device__ __forceinline__ __half2 round(float2 values) { return __float22half2_rn(values); }
};

/* Eight elements as they lie in memory, at a multiple of 16 bytes. */
template <typename Float>
struct __align__(16) Eight {
    Float values[8];

    __device__ __forceinline__ float operator[](int i) const { return FloatType<Float>::to_float(values[i]); }
};

/* Two by two: devices convert pairs four times as fast. */
template <typename Float>
__device__ __forceinline__ Eight<Float> round_eight(const float (&values)[8]) {
    Eight<Float> eight;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const auto pair = FloatType<Float>::round(make_float2(values[i], values[i + 1]));
        eight.values[i] = pair.x;
        eight.values[i + 1] = pair.y;
    }
    return eight;
}

template <typename Float>
__device__ __forceinline__ Eight<Float> eight_at(const Float *source) {
    return *reinterpret_cast<const Eight<Float> *>(source);
}

template <typename Float>
__device__ __forceinline__ void load_eight(float (&values)[8], const Float *source) {
    const Eight<Float> eight = eight_at(source);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = eight[i];
}

/* Calls function(Float{}) with the type that a hf_stompp_cuda_dtype stands for. */
template <typename Function>
int with_dtype(int64_t dtype, Function function) {
    switch (dtype) {
        case HF_STOMPP_CUDA_F32: return function(float{});
        case HF_STOMPP_CUDA_BF16: return function(__nv_bfloat16{});
        default: return function(__half{});
    }
}

}  // namespace hf_stompp

#endif
