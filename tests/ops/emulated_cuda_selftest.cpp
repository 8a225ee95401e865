/* Small kernels that use emulated_cuda.h, rightly and wrongly, for its own tests. */
#include "emulated_cuda.h"

#define EXPORT __attribute__((visibility("default")))

using namespace hf_stompp;

constexpr int A_BYTES = 64 * 32, B_BYTES = 128 * 32;

static void copy_tiles(const uint8_t *data) {
    for (int i = threadIdx.x; i < (A_BYTES + B_BYTES) / 16; i += blockDim.x)
        copy_async(dynamic_shared() + 16 * i, data + 16 * i, true);
    commit_copies();
    wait_for_copies<0>();
}

static uint64_t describe(const uint8_t *tile, uint64_t leading, uint64_t stride, uint64_t mode) {
    return shared_address(tile) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62;
}

#define A describe(shared, 0, 256, 3)
#define B describe(shared + A_BYTES, 0, 256, 3)

extern "C" {

/* data: 32 lanes of four registers of a, two of b, four sums. */
static void mma(uint32_t *data) {
    uint32_t *const own = data + 10 * threadIdx.x, a[4] = {own[0], own[1], own[2], own[3]};
    int sums[4];
    for (int i = 0; i < 4; i++) sums[i] = own[6 + i];
    multiply_fragments(sums, a, own[4], own[5]);
    for (int i = 0; i < 4; i++) own[6 + i] = sums[i];
}
EXPORT int run_mma(uint32_t *data) {
    return launch(mma, dim3(1), 32, 0, nullptr, false, data);
}

/* data: 512 bytes of four matrices, then 32 lanes of four registers. */
static void ldmatrix(uint8_t *data) {
    const int lane = threadIdx.x;
    copy_async(dynamic_shared() + 16 * lane, data + 16 * lane, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    uint32_t registers[4];
    load_matrices(registers, dynamic_shared() + 16 * lane);
    memcpy(data + 512 + 16 * lane, registers, 16);
}
EXPORT int run_ldmatrix(uint8_t *data) {
    return launch(ldmatrix, dim3(1), 32, 512, nullptr, false, data);
}

struct Tiles {
    int64_t shared_bytes, b_offset, k_offset, leading, stride, mode;
    const uint8_t *image;
    int32_t *sums;
};
/* sums: 128 threads of 64 each, added to. */
static void wgmma(const Tiles tiles) {
    uint8_t *const shared = dynamic_shared();
    for (int64_t i = threadIdx.x; i < tiles.shared_bytes / 16; i += blockDim.x)
        copy_async(shared + 16 * i, tiles.image + 16 * i, true);
    commit_copies();
    wait_for_copies<0>();
    fence_shared_for_wgmma();
    __syncthreads();
    int sums[16][4];
    for (int i = 0; i < 64; i++) sums[i / 4][i % 4] = tiles.sums[64 * threadIdx.x + i];
    begin_wgmma(sums);
    const uint8_t *const a = shared + tiles.k_offset, *const b = shared + tiles.b_offset + tiles.k_offset;
    const auto describe_as_told = [&](const uint8_t *tile) {
        return describe(tile, tiles.leading, tiles.stride, tiles.mode);
    };
    for (int i = 0; i < 2; i++) multiply_tiles(sums, describe_as_told(a), describe_as_told(b));
    commit_wgmma();
    wait_for_wgmma(sums);
    for (int i = 0; i < 64; i++) tiles.sums[64 * threadIdx.x + i] = sums[i / 4][i % 4];
}
EXPORT int run_wgmma(const Tiles *tiles) {
    return launch(wgmma, dim3(1), 128, tiles->shared_bytes, nullptr, false, *tiles);
}

/* Every thread writes what another reads. */
static void reverse(int32_t *data, bool synchronized) {
    __shared__ int32_t values[256];
    values[threadIdx.x] = data[threadIdx.x];
    if (synchronized) __syncthreads();
    data[threadIdx.x] = values[255 - threadIdx.x];
}
EXPORT int run_reverse(int32_t *data, int synchronized) {
    return launch(reverse, dim3(1), 256, 0, nullptr, false, data, synchronized != 0);
}

/* data: 64 values that come to lie in shared memory, 64 that are read there. */
static void copy(int32_t *data, bool awaited) {
    int32_t *const shared = reinterpret_cast<int32_t *>(dynamic_shared());
    if (threadIdx.x < 16) copy_async(shared + 4 * threadIdx.x, data + 4 * threadIdx.x, true);
    commit_copies();
    if (awaited) wait_for_copies<0>();
    __syncthreads();
    data[64 + threadIdx.x] = shared[threadIdx.x];
}
EXPORT int run_copy(int32_t *data, int awaited) {
    return launch(copy, dim3(1), 64, 256, nullptr, false, data, awaited != 0);
}

/* data: for each of 32 lanes a value; then what it gets from six instructions. */
static void exchange(int32_t *data) {
    const int lane = threadIdx.x, value = data[lane];
    data[32 + lane] = __shfl_sync(0xffffffff, value, 5 * lane);
    data[64 + lane] = __shfl_xor_sync(0xffffffff, value, 9);
    data[96 + lane] = __shfl_down_sync(0xffffffff, value, 3, 8);
    data[128 + lane] = __reduce_add_sync(0xffffffff, value);
    data[160 + lane] = static_cast<int>(__ballot_sync(0xffffffff, value % 2));
    if (lane >= 16) data[192 + lane] = __reduce_add_sync(0xffff0000, value);
}
EXPORT int run_exchange(int32_t *data) {
    return launch(exchange, dim3(1), 32, 0, nullptr, false, data);
}

EXPORT void round_floats(const float *source, uint16_t *bf16, uint16_t *f16, int count) {
    for (int i = 0; i < count; i++) {
        bf16[i] = __float2bfloat16_rn(source[i]).bits;
        f16[i] = __float2half_rn(source[i]).bits;
    }
}
EXPORT void widen_floats(float *bf16, float *f16) {
    for (int i = 0; i < 65536; i++) {
        bf16[i] = __bfloat162float({static_cast<uint16_t>(i)});
        f16[i] = __half2float({static_cast<uint16_t>(i)});
    }
}

EXPORT int launch_nothing(int64_t x, int64_t y, int64_t threads, int64_t shared_bytes) {
    void (*const kernel)() = [] {};
    return launch(kernel, dim3(x, y), threads, shared_bytes, nullptr, false);
}

/* STATEMENTS: a file with kernels as the tests write them, and their names. */
#include STATEMENTS

EXPORT int run_statements(int number, int threads, uint8_t *data) {
    static void (*const kernels[])(uint8_t *) = {KERNELS};
    return launch(kernels[number], dim3(1), threads, A_BYTES + B_BYTES, nullptr, false, data);
}

}
