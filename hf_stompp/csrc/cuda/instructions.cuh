/* Everything that is written in PTX, and the launch: what tests replace to run the kernels without a GPU. */
#ifndef HF_STOMPP_INSTRUCTIONS_CUH
#define HF_STOMPP_INSTRUCTIONS_CUH

#include <cstddef>
#include <cstdint>

namespace hf_stompp {

/* Shared memory that a kernel declares, at most. */
constexpr size_t MOST_STATIC_SHARED_BYTES = 8 * 1024;

}  // namespace hf_stompp

#if defined(HF_STOMPP_EMULATED_CUDA)
#include HF_STOMPP_EMULATED_CUDA
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

/* wgmma is there for this architecture and no other. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HF_STOMPP_WGMMA 1
#else
#define HF_STOMPP_WGMMA 0
#endif

namespace hf_stompp {

/* The shared memory whose size the launch gives, aligned for the swizzle of wgmma. */
__device__ __forceinline__ uint8_t *dynamic_shared() {
    extern __shared__ __align__(1024) uint8_t dynamic_shared_memory[];
    return dynamic_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* Begins to copy 16 bytes, or zeros if not `live`, to shared memory. Both addresses are multiples of 16. */
__device__ __forceinline__ void copy_async(void *shared, const void *global, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(live ? 16 : 0)
                 : "memory");
}

/* Makes a group of this thread's copies since the last group. */
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until no more than PENDING groups of this thread's copies are under way. */
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* ldmatrix.x4: lanes 8i..8i+7 give the addresses of the eight rows (16 bytes each) of matrix i; of each matrix, lane l
 * gets bytes 4 * (l % 4) to 4 * (l % 4) + 3 of row l / 4.
 */
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* mma.m16n8k256: sums += popcount(a & b) of 16 rows and 8 columns of 256 bits. */
__device__ __forceinline__ void multiply_fragments(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Makes shared memory that this thread wrote (or copied and waited for) visible to wgmma. */
__device__ __forceinline__ void fence_shared_for_wgmma() {
#if HF_STOMPP_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* Before the first wgmma of a group: its registers are this thread's again only after wait_for_wgmma. */
template <int FRAGMENTS>
__device__ __forceinline__ void begin_wgmma(int (&sums)[FRAGMENTS][4]) {
#if HF_STOMPP_WGMMA
#pragma unroll
    for (int j = 0; j < FRAGMENTS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) asm volatile("" : "+r"(sums[j][e])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void commit_wgmma() {
#if HF_STOMPP_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/* Waits for all wgmma of this warpgroup. */
template <int FRAGMENTS>
__device__ __forceinline__ void wait_for_wgmma(int (&sums)[FRAGMENTS][4]) {
#if HF_STOMPP_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int j = 0; j < FRAGMENTS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) asm volatile("" : "+r"(sums[j][e])::"memory");
#endif
}

#define HF_STOMPP_SUMS_4(j) "+r"(sums[j][0]), "+r"(sums[j][1]), "+r"(sums[j][2]), "+r"(sums[j][3])
#define HF_STOMPP_SUMS_16(j) \
    HF_STOMPP_SUMS_4(j), HF_STOMPP_SUMS_4(j + 1), HF_STOMPP_SUMS_4(j + 2), HF_STOMPP_SUMS_4(j + 3)
#define HF_STOMPP_SUMS_32(j) HF_STOMPP_SUMS_16(j), HF_STOMPP_SUMS_16(j + 4)
#define HF_STOMPP_OPERANDS_0_31 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HF_STOMPP_OPERANDS_32_63 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* wgmma.m64nNk256, N = 8 * FRAGMENTS: sums += popcount(a & b) of 64 rows and N columns of 256 bits in shared memory,
 * given by matrix descriptors. Warp w of the warpgroup holds rows 16 * w to 16 * w + 15; sums[j] are its 16 rows of
 * columns 8 * j to 8 * j + 7, laid out as by mma.
 */
__device__ __forceinline__ void multiply_tiles(int (&sums)[8][4], uint64_t a, uint64_t b) {
#if HF_STOMPP_WGMMA
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k256.s32.b1.b1.and.popc {" HF_STOMPP_OPERANDS_0_31
                 "}, %32, %33, 1;"
                 : HF_STOMPP_SUMS_32(0)
                 : "l"(a), "l"(b));
#endif
}

__device__ __forceinline__ void multiply_tiles(int (&sums)[16][4], uint64_t a, uint64_t b) {
#if HF_STOMPP_WGMMA
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k256.s32.b1.b1.and.popc {" HF_STOMPP_OPERANDS_0_31
                 ", " HF_STOMPP_OPERANDS_32_63 "}, %64, %65, 1;"
                 : HF_STOMPP_SUMS_32(0), HF_STOMPP_SUMS_32(8)
                 : "l"(a), "l"(b));
#endif
}

/* What a kernel that overlaps others calls before it touches memory: waits until all that was written before it is there to
 * be read, and lets the next one begin.
 */
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Enqueues a kernel; `shared_bytes` are those beside what it declares. With `overlaps`, its blocks may take their places
 * while the kernel before it in the stream still runs: it has to call wait_for_earlier_kernels, on 9.0 or later.
 *
 * Returns a cudaError.
 */
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void *stream, bool overlaps,
           Arguments... arguments) {
    cudaError_t error = cudaSuccess;
    // The size, all in all, up to which no permission is needed.
    if (shared_bytes > 48 * 1024 - MOST_STATIC_SHARED_BYTES)
        error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = overlaps ? 1 : 0;
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    // An error stays until it is asked for, and would be taken for that of a later call.
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

}  // namespace hf_stompp

#endif
#endif
