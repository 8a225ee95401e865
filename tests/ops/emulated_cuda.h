/* Stand-ins in plain C++ for the CUDA language, its runtime and the PTX of instructions.cuh, so that the kernels' own
 * text runs on a processor without a GPU.
 *
 * The threads of a block are fibers of one thread of the system and change places only at barriers and at instructions
 * of a whole warp, in an order drawn from HF_STOMPP_EMULATED_SEED; blocks run one after another. What runs
 * asynchronously on a GPU happens here as early or as late as its definition allows. What a GPU would fault on, what
 * would hang it and, as far as it can be seen, what would be a race end the program.
 *
 * Written from the PTX ISA, by its names. "CuTe" is include/cute/atom/mma_traits_sm80.hpp and mma_traits_sm90_gmma.hpp
 * of CUTLASS, which states the same layouts in another notation.
 *
 * To be compiled with hidden visibility: all files of a library share its state, which belongs to that library alone.
 */
#ifndef EMULATED_CUDA_H
#define EMULATED_CUDA_H

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
/* Portable, and slower: it calls the system at every change of fibers. */
#if !defined(__x86_64__) && !defined(EMULATED_CUDA_UCONTEXT)
#define EMULATED_CUDA_UCONTEXT
#endif
#if defined(EMULATED_CUDA_UCONTEXT)
#include <ucontext.h>
#endif

/* ---- The language ---- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
/* Blocks run one after another on one thread of the system, so that its storage is that of a block: and all that a
 * library has of it lies in one segment, whose bounds can be had.
 */
#define __shared__ static thread_local

struct uint2 {
    unsigned x, y;
} __align__(8);
struct uint3 {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
} __align__(16);
struct int2 {
    int x, y;
} __align__(8);
struct int4 {
    int x, y, z, w;
} __align__(16);
struct float2 {
    float x, y;
} __align__(8);
struct float4 {
    float x, y, z, w;
} __align__(16);

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

template <typename Left, typename Right>
constexpr std::common_type_t<Left, Right> min(Left left, Right right) {
    return right < left ? right : left;
}

template <typename Left, typename Right>
constexpr std::common_type_t<Left, Right> max(Left left, Right right) {
    return left < right ? right : left;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<unsigned>(both << (shift & 31) >> 32);
}
inline unsigned __byte_perm(unsigned first, unsigned second, unsigned selector) {
    const uint64_t both = static_cast<uint64_t>(second) << 32 | first;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned choice = selector >> 4 * i & 15;
        const unsigned byte = static_cast<unsigned>(both >> 8 * (choice & 7)) & 0xff;
        // The fourth bit of a choice replicates the sign of the byte.
        result |= (choice & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return result;
}
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }

template <typename Value>
Value __ldg(const Value *address) {
    return *address;
}

/* Rounded one by one: the files are compiled with -ffp-contract=off. */
inline float __fmul_rn(float left, float right) { return left * right; }
inline float __fadd_rn(float left, float right) { return left + right; }
inline float __fmaf_rn(float left, float right, float added) { return std::fma(left, right, added); }

/* ---- Float types: round to nearest, ties to even; every NaN becomes 0x7fff, as on the device ---- */

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

inline __half __float2half_rn(float value) {
    if (value != value) return {0x7fff};
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    // Numbers as large as this one are multiples of `step`, and so, below 2^-13, are all. It is exact in double.
    const double magnitude = std::fabs(static_cast<double>(value));
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const double step = std::ldexp(1.0, std::max(exponent, -13) - 11);
    const double rounded = std::nearbyint(magnitude / step) * step;
    if (rounded >= 65536.0) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (rounded < 0x1p-14) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(rounded * 0x1p24))};
    const double fraction = 2 * std::frexp(rounded, &exponent) - 1;
    return {static_cast<uint16_t>(sign | (exponent - 1 + 15) << 10 | static_cast<int>(fraction * 1024))};
}

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    float magnitude;
    if (exponent == 31)
        magnitude = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        magnitude = std::ldexp(static_cast<float>(fraction), -24);
    else
        magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return value.bits & 0x8000 ? -magnitude : magnitude;
}

struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct __half2 {
    __half x, y;
};

inline __nv_bfloat162 __float22bfloat162_rn(float2 values) {
    return {__float2bfloat16_rn(values.x), __float2bfloat16_rn(values.y)};
}
inline __half2 __float22half2_rn(float2 values) { return {__float2half_rn(values.x), __float2half_rn(values.y)}; }

/* ---- The runtime: two devices, of which nothing but the numbers differ ---- */

enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209
};
using cudaError_t = cudaError;
using cudaStream_t = void *;

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaFuncAttributes {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion;
};

namespace emulated_cuda {

constexpr int DEVICES = 2;
/* Few, so that small products are large enough for every tile. */
inline int multiprocessors() {
    const char *const value = getenv("HF_STOMPP_EMULATED_MULTIPROCESSORS");
    return value == nullptr ? 4 : atoi(value);
}

inline int device = 0;

/* Of a call on the host; stays until it is asked for. */
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t fail(cudaError_t error) { return last_error = error; }

inline int capability() {
    const char *const value = getenv("HF_STOMPP_EMULATED_CAPABILITY");
    int major = 9, minor = 0;
    if (value != nullptr && sscanf(value, "%d.%d", &major, &minor) != 2) abort();
    return 10 * major + minor;
}

/* Bytes that one block may have: "Technical specifications per compute capability" of the CUDA programming guide. */
inline size_t most_shared_bytes(int capability) {
    switch (capability) {
        case 80:
        case 87: return 163 * 1024;
        case 90:
        case 100:
        case 103: return 227 * 1024;
        default: return 99 * 1024;
    }
}

}  // namespace emulated_cuda

inline cudaError_t cudaGetDevice(int *device) {
    *device = emulated_cuda::device;
    return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= emulated_cuda::DEVICES) return emulated_cuda::fail(cudaErrorInvalidDevice);
    emulated_cuda::device = device;
    return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = emulated_cuda::DEVICES;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= emulated_cuda::DEVICES) return emulated_cuda::fail(cudaErrorInvalidDevice);
    const int capability = emulated_cuda::capability();
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = emulated_cuda::multiprocessors(); return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = static_cast<int>(emulated_cuda::most_shared_bytes(capability));
            return cudaSuccess;
        default: return emulated_cuda::fail(cudaErrorInvalidValue);
    }
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *function) {
    if (function == nullptr) return emulated_cuda::fail(cudaErrorInvalidValue);
    const int capability = emulated_cuda::capability();
    if (capability < 80) return emulated_cuda::fail(cudaErrorNoKernelImageForDevice);
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    attributes->binaryVersion = attributes->ptxVersion = capability;
    return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void *function, cudaFuncAttribute, int) {
    return function == nullptr ? emulated_cuda::fail(cudaErrorInvalidValue) : cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
    const cudaError_t error = emulated_cuda::last_error;
    emulated_cuda::last_error = cudaSuccess;
    return error;
}

inline const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
        default: return "unrecognized error code";
    }
}

namespace emulated_cuda {

constexpr int LANES = 32, GROUP_WARPS = 4, MOST_THREADS = 1024, CHUNK = 16;
constexpr unsigned ALL_LANES = 0xffffffffu;
/* Where dynamic shared memory may lie: the first KiB belongs to the system. */
constexpr uint32_t WINDOW_BEGIN = 1024, WINDOW_END = 228 * 1024;

/* Of an instruction in a kernel's text. Lanes that execute one together must be at the same place. */
struct Place {
    const char *file;
    int line;

    bool operator==(const Place &other) const { return line == other.line && strcmp(file, other.file) == 0; }
};

#define EMULATED_CUDA_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

/* ---- Random numbers ---- */

inline uint64_t random_state = 1;

/* xorshift64*. */
inline uint64_t draw() {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545f4914f6cdd1d;
}

/* At random from 0 to count - 1. */
inline unsigned draw_below(unsigned count) { return static_cast<unsigned>((draw() >> 32) * count >> 32); }

inline void seed_draws() {
    const char *const value = getenv("HF_STOMPP_EMULATED_SEED");
    const uint64_t seed = value == nullptr ? 0 : strtoull(value, nullptr, 10);
    random_state = (seed + 1) * 0x9e3779b97f4a7c15;
    for (int i = 0; i < 8; i++) draw();
}

inline void fill_with_draws(void *memory, size_t bytes) {
    uint8_t *const target = static_cast<uint8_t *>(memory);
    for (size_t i = 0; i < bytes; i += 8) {
        const uint64_t value = draw();
        memcpy(target + i, &value, std::min<size_t>(8, bytes - i));
    }
}

/* ---- Fibers ---- */

#if !defined(EMULATED_CUDA_UCONTEXT)
/* Saves what a called function must keep, and goes on where `to` was saved. */
__attribute__((naked, noinline, noipa)) inline void exchange_stacks(void ** /* from */, void * /* to */) {
    asm("pushq %rbp\n\t"
        "pushq %rbx\n\t"
        "pushq %r12\n\t"
        "pushq %r13\n\t"
        "pushq %r14\n\t"
        "pushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\t"
        "popq %r14\n\t"
        "popq %r13\n\t"
        "popq %r12\n\t"
        "popq %rbx\n\t"
        "popq %rbp\n\t"
        "ret");
}
#endif

/* A stack, and where on it to go on. */
class Fiber {
public:
    Fiber() = default;
    Fiber(const Fiber &) = delete;
    Fiber &operator=(const Fiber &) = delete;

    /* Makes a stack on which entry(), which must not return, begins at the first switch. */
    void begin(void (*entry)()) {
        // The page below ends the program when the stack is too small.
        void *const memory = mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE)) abort();
        bottom_ = static_cast<uint8_t *>(memory) + PAGE;
        size_ = STACK;
#if !defined(EMULATED_CUDA_UCONTEXT)
        // Six registers, the address to return to, and none to return to from there, on a stack as after a call.
        void **const top = reinterpret_cast<void **>(static_cast<uint8_t *>(memory) + PAGE + STACK);
        top[-1] = nullptr;
        top[-2] = reinterpret_cast<void *>(entry);
        saved_ = &top[-8];
#else
        getcontext(&saved_);
        saved_.uc_stack.ss_sp = const_cast<void *>(bottom_);
        saved_.uc_stack.ss_size = size_;
        saved_.uc_link = nullptr;
        makecontext(&saved_, entry, 0);
#endif
    }

    /* Returns when something switches back to `from`. */
    static void go(Fiber &from, Fiber &to) {
#if defined(__SANITIZE_ADDRESS__)
        void *fake_stack = nullptr;
        __sanitizer_start_switch_fiber(&fake_stack, to.bottom_, to.size_);
#endif
#if !defined(EMULATED_CUDA_UCONTEXT)
        exchange_stacks(&from.saved_, to.saved_);
#else
        swapcontext(&from.saved_, &to.saved_);
#endif
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    }

    /* First thing on a new stack; `from` is that of the system's thread, whose bounds nobody else knows. */
    static void arrive(Fiber &from) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.size_);
#else
        (void)from;
#endif
    }

private:
    static constexpr size_t PAGE = 4096, STACK = 256 * 1024;

    const void *bottom_ = nullptr;
    size_t size_ = 0;
#if !defined(EMULATED_CUDA_UCONTEXT)
    void *saved_ = nullptr;
#else
    ucontext_t saved_;
#endif
};

/* ---- A block ---- */

/* A cp.async under way. */
struct Copy {
    uint8_t *target;
    const void *source;
    bool live, done;
};

/* Registers that wgmma is adding to. */
struct Accumulator {
    int *registers;
    int count;
    int sums[128];
    /* What stands in the registers meanwhile. */
    uint32_t poison;
};

enum class State { READY, WAITING, ENDED };

struct Thread {
    Fiber fiber;
    bool has_stack = false;
    uint3 index;
    int number;
    State state;
    /* The last instruction at which it stopped. */
    const char *doing;
    Place place;

    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> copy_groups;

    std::vector<Accumulator> accumulators;
    /* Registers that wgmma may use, and what is in them, as of wgmma.fence. */
    const int *fenced_registers;
    int fenced[128];
};

/* Lanes of a warp that wait for one another. */
struct Meeting {
    unsigned mask, arrived;
    const char *what;
    Place place;
    void *arguments[LANES];
};

/* A wgmma as one warp of the four sees it, with the bits that shared memory held when it was issued. */
struct Issue {
    uint64_t a, b;
    int fragments;
    bool committed;
    Place place;
    std::vector<uint64_t> rows, columns;

    bool operator==(const Issue &other) const {
        return a == other.a && b == other.b && fragments == other.fragments && place == other.place;
    }
};

struct Warp {
    unsigned ready;
    std::vector<Meeting> meetings;
    /* Where its lanes came to the barrier that is being waited at. */
    Place barrier_place;
    unsigned at_barrier;
    std::vector<Issue> issues;
    size_t issued, finished;
    bool waits_for_wgmma;
};

/* What is known of 16 bytes of shared memory. */
struct Chunk {
    enum { PLAIN, UNDER_WAY, COPIED, FENCED } state;
    int owner;
    /* Barriers of the block before the owner's wait and before its fence. */
    unsigned waited, fenced;
};

struct Block {
    void (*call)(void *);
    void *closure;
    int capability, thread_count, warp_count, ended, at_barrier;
    unsigned barriers;

    Thread threads[MOST_THREADS];
    Warp warps[MOST_THREADS / LANES];
    Thread *current;
    Fiber scheduler;

    /* The order of warps that the scheduler prefers, if any. */
    bool unfair;
    int preference[MOST_THREADS / LANES];

    uint8_t *shared;
    uint32_t shared_begin;
    size_t shared_bytes;
    std::vector<Chunk> chunks;
    /* Shared memory at the beginning: what is still the same was not written to. */
    std::vector<uint8_t> unwritten_shared;
    /* Shared memory as wgmma sees it: without ordinary stores that no fence came after. */
    std::vector<uint8_t> fenced_shared;
    bool fenced_since_barrier;

    /* What each warpgroup has issued: all its warps must come to the same. */
    std::vector<Issue> group_issues[MOST_THREADS / LANES / GROUP_WARPS];
};

/* Never freed: the library may be unloaded before the last static object is destroyed. */
inline Block &block = *new Block();
inline std::mutex launching;

__attribute__((noreturn)) inline void fault(const char *reason, const char *detail = "") {
    fprintf(stderr, "emulated CUDA: %s%s", reason, detail);
    if (block.current != nullptr) {
        const Thread &thread = *block.current;
        fprintf(stderr, " (thread %d of block (%u, %u, %u)", thread.number, blockIdx.x, blockIdx.y, blockIdx.z);
        fprintf(stderr, ", %s at %s:%d)", thread.doing, thread.place.file, thread.place.line);
    }
    fprintf(stderr, "\n");
    abort();
}

inline Thread &current() {
    if (block.current == nullptr) fault("an instruction outside of a kernel");
    return *block.current;
}

inline Warp &warp_of(const Thread &thread) { return block.warps[thread.number / LANES]; }

inline unsigned lane_bit(const Thread &thread) { return 1u << thread.number % LANES; }

inline void make_copy(Copy &copy) {
    if (copy.done) return;
    copy.done = true;
    if (copy.live)
        memcpy(copy.target, copy.source, CHUNK);
    else
        memset(copy.target, 0, CHUNK);
}

/* Called at every instruction: some of the thread's copies come through. */
inline Thread &at(const char *instruction, Place place) {
    Thread &thread = current();
    thread.doing = instruction;
    thread.place = place;
    for (Copy &copy : thread.copies)
        if (!copy.done && draw_below(16) == 0) make_copy(copy);
    for (std::vector<Copy> &group : thread.copy_groups)
        for (Copy &copy : group)
            if (!copy.done && draw_below(16) == 0) make_copy(copy);
    return thread;
}

inline void require(int least, const char *instruction) {
    if (block.capability < least) fault("this device does not have ", instruction);
}

inline void stop() { Fiber::go(block.current->fiber, block.scheduler); }

inline void wait() {
    Thread &thread = current();
    thread.state = State::WAITING;
    warp_of(thread).ready &= ~lane_bit(thread);
    stop();
}

inline void release(Thread &thread) {
    thread.state = State::READY;
    warp_of(thread).ready |= lane_bit(thread);
}

/* All lanes of a mask come to one instruction, which the last does for all: complete(meeting). */
template <typename Function>
void meet(Thread &thread, unsigned mask, void *argument, Function complete) {
    Warp &warp = warp_of(thread);
    const int first = thread.number / LANES * LANES;
    if (!(mask & lane_bit(thread))) fault("a lane that is not in the mask");
    for (int lane = 0; lane < LANES; lane++) {
        if (!(mask >> lane & 1)) continue;
        if (first + lane >= block.thread_count) fault("the mask names lanes that the block does not have");
        if (block.threads[first + lane].state == State::ENDED) fault("the mask names a lane that has ended");
    }
    auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                                [&](const Meeting &other) { return (other.mask & mask) != 0; });
    if (meeting == warp.meetings.end())
        meeting = warp.meetings.insert(meeting, Meeting{mask, 0, thread.doing, thread.place, {}});
    else if (meeting->mask != mask || strcmp(meeting->what, thread.doing) || !(meeting->place == thread.place))
        fault("lanes of a warp are at different instructions; another is at ", meeting->what);
    meeting->arrived |= lane_bit(thread);
    meeting->arguments[thread.number % LANES] = argument;
    if (meeting->arrived != mask) {
        wait();
        return;
    }
    const Meeting whole = *meeting;
    warp.meetings.erase(meeting);
    complete(whole);
    for (int lane = 0; lane < LANES; lane++)
        if (mask >> lane & 1 && first + lane != thread.number) release(block.threads[first + lane]);
    // Those who waited are as likely to go on first.
    stop();
}

inline void meet_warp(Thread &thread) {
    meet(thread, ALL_LANES, nullptr, [](const Meeting &) {});
}

/* Of a function in which lanes exchange one record each: the record of a lane, by its number. */
template <typename Record>
Record &record_of(const Meeting &meeting, int lane) {
    return *static_cast<Record *>(meeting.arguments[lane]);
}

inline void end_barrier() {
    block.at_barrier = 0;
    block.barriers++;
    // Whose stores were fenced is not known: the fence of one is taken for that of all.
    if (block.fenced_since_barrier) std::copy_n(block.shared, block.shared_bytes, block.fenced_shared.begin());
    block.fenced_since_barrier = false;
    for (int i = 0; i < block.warp_count; i++) block.warps[i].at_barrier = 0;
    for (int i = 0; i < block.thread_count; i++)
        if (&block.threads[i] != block.current) release(block.threads[i]);
}

inline void barrier(Place place) {
    Thread &thread = at("__syncthreads", place);
    Warp &warp = warp_of(thread);
    if (!warp.meetings.empty())
        fault("lanes of a warp are at different instructions; another is at ", warp.meetings[0].what);
    if (warp.at_barrier && !(warp.barrier_place == place)) fault("lanes of a warp are at different barriers");
    warp.barrier_place = place;
    warp.at_barrier |= lane_bit(thread);
    if (++block.at_barrier < block.thread_count)
        wait();
    else {
        end_barrier();
        stop();
    }
}

/* ---- Shared memory ---- */

/* The offset of `bytes` at an address of the shared window, which must lie in the block's dynamic shared memory. */
inline size_t shared_offset(uint32_t address, size_t bytes) {
    if (address < block.shared_begin || address - block.shared_begin + bytes > block.shared_bytes)
        fault("an access beyond the dynamic shared memory");
    return address - block.shared_begin;
}

inline uint32_t shared_address_of(const void *pointer) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(block.shared);
    // The end is an address too, of nothing.
    if (address < begin || address > begin + block.shared_bytes) fault("an address outside of dynamic shared memory");
    return static_cast<uint32_t>(block.shared_begin + (address - begin));
}

inline size_t chunk_offset(const void *pointer) {
    const uint32_t address = shared_address_of(pointer);
    if (address % CHUNK) fault("an address in shared memory that is no multiple of 16");
    return shared_offset(address, CHUNK);
}

inline void check_is_written(size_t offset) {
    if (block.chunks[offset / CHUNK].state == Chunk::PLAIN &&
        !memcmp(block.shared + offset, &block.unwritten_shared[offset], CHUNK))
        fault("bytes are read that nothing was written to");
}

/* ---- wgmma ---- */

/* Where 16 bytes of a row lie that a matrix descriptor tells of: "Matrix Descriptor Format" and "Strides" of wgmma in
 * the PTX ISA; the canonical layouts of make_gmma_desc<Major::K> in CuTe. Rows are M or N; one bit is K-major.
 */
inline uint32_t tile_address(uint64_t descriptor, int row, int half) {
    const uint32_t start = (descriptor & 0x3fff) << 4;
    const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const unsigned base_offset = descriptor >> 49 & 7, mode = descriptor >> 62;
    constexpr uint64_t FIELDS = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
    if (descriptor & ~FIELDS) fault("a matrix descriptor with bits that have no meaning");
    if (base_offset) fault("a matrix descriptor with a base offset, which is not emulated");
    // Rows of 16 bytes; neighbours in K are `leading` apart.
    if (mode == 0) return start + row % 8 * 16 + row / 8 * stride + half * leading;
    // Rows of 128, 64 and 32 bytes: `units` of 16. Eight of them are what the pattern repeats after.
    const uint32_t units = 8 >> (mode - 1), pattern = 8 * units * 16;
    if (start % pattern >= units * 16 || stride % pattern)
        fault("a swizzled matrix that does not begin where the pattern does has a base offset");
    const uint32_t address = start + row % 8 * units * 16 + row / 8 * stride + half * 16;
    // Swizzle<1|2|3, 4, 3>: bits 4 and up are exchanged by bits 7 and up of the address.
    return address ^ (address >> 7 & (units - 1)) << 4;
}

/* Rows `first` to first + count - 1 of a tile, as four words each. */
inline void read_tile(std::vector<uint64_t> &words, uint64_t descriptor, int first, int count) {
    words.resize(4 * count);
    for (int row = 0; row < count; row++)
        for (int half = 0; half < 2; half++) {
            const size_t offset = shared_offset(tile_address(descriptor, first + row, half), CHUNK);
            memcpy(&words[4 * row + 2 * half], block.shared + offset, CHUNK);
        }
}

/* What the asynchronous proxy may not read yet: the PTX ISA's "Async proxy". */
inline void check_tile_is_fenced(uint64_t descriptor, int first, int count) {
    for (int row = 0; row < count; row++)
        for (int half = 0; half < 2; half++) {
            const size_t offset = shared_offset(tile_address(descriptor, first + row, half), CHUNK);
            const Chunk &chunk = block.chunks[offset / CHUNK];
            check_is_written(offset);
            if (chunk.state == Chunk::UNDER_WAY) fault("wgmma of bytes that a copy is under way to");
            if (chunk.state == Chunk::COPIED) fault("wgmma of bytes that were copied and not fenced");
            if (chunk.state == Chunk::FENCED && chunk.fenced == block.barriers)
                fault("wgmma of bytes that were fenced with no barrier since");
            if (memcmp(block.shared + offset, &block.fenced_shared[offset], CHUNK))
                fault("wgmma of bytes that were stored and not fenced");
        }
}

inline int group_of(int warp) { return warp / GROUP_WARPS; }

/* The columns and rows of a lane's element are those of mma.m16n8 for each of the warp's 16 rows and each 8 columns:
 * "Register Fragments" of wgmma in the PTX ISA; CLayout_64xN in CuTe.
 */
inline void finish_wgmma(int number) {
    Warp &warp = block.warps[number];
    const int first_row = 16 * (number % GROUP_WARPS);
    std::vector<uint64_t> rows, columns;
    std::vector<int> products;
    for (const Issue &issue : warp.issues) {
        const int count = 8 * issue.fragments;
        read_tile(rows, issue.a, first_row, 16);
        read_tile(columns, issue.b, 0, count);
        if (rows != issue.rows || columns != issue.columns) fault("a tile was written to while wgmma was reading it");
        products.assign(16 * count, 0);
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < count; n++)
                for (int k = 0; k < 4; k++)
                    products[m * count + n] += __builtin_popcountll(rows[4 * m + k] & columns[4 * n + k]);
        for (int lane = 0; lane < LANES; lane++) {
            Accumulator &accumulator = block.threads[number * LANES + lane].accumulators[0];
            for (int i = 0; i < 4 * issue.fragments; i++) {
                const int m = lane / 4 + 8 * (i / 2 % 2), n = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
                accumulator.sums[i] += products[m * count + n];
            }
        }
    }
    warp.issues.clear();
    warp.finished = warp.issued;
    warp.waits_for_wgmma = false;
    for (int lane = 0; lane < LANES; lane++) {
        Thread &thread = block.threads[number * LANES + lane];
        for (const Accumulator &accumulator : thread.accumulators) {
            for (int i = 0; i < accumulator.count; i++)
                if (static_cast<uint32_t>(accumulator.registers[i]) != accumulator.poison + i)
                    fault("registers were written to while wgmma was adding to them");
            std::copy_n(accumulator.sums, accumulator.count, accumulator.registers);
            std::copy_n(accumulator.sums, accumulator.count, thread.fenced);
            thread.fenced_registers = accumulator.registers;
        }
        thread.accumulators.clear();
        if (thread.state == State::WAITING && warp.meetings.empty()) release(thread);
    }
}

/* wgmma is the work of four warps: none of it is done before all of them have come. */
inline void finish_wgmma_of_group(int group) {
    size_t least = SIZE_MAX;
    for (int i = 0; i < GROUP_WARPS; i++) least = std::min(least, block.warps[GROUP_WARPS * group + i].issued);
    for (int i = 0; i < GROUP_WARPS; i++) {
        const Warp &warp = block.warps[GROUP_WARPS * group + i];
        if (warp.waits_for_wgmma && warp.issued <= least) finish_wgmma(GROUP_WARPS * group + i);
    }
}

struct TileArguments {
    int *sums;
    uint64_t a, b;
};

inline void issue_wgmma(const Meeting &meeting, int fragments, int number) {
    Warp &warp = block.warps[number];
    const int group = group_of(number);
    const TileArguments &arguments = record_of<TileArguments>(meeting, 0);
    Issue issue{arguments.a, arguments.b, fragments, false, meeting.place, {}, {}};
    // The other warps' rows of a are theirs to check.
    check_tile_is_fenced(issue.a, 16 * (number % GROUP_WARPS), 16);
    check_tile_is_fenced(issue.b, 0, 8 * fragments);
    std::vector<Issue> &issues = block.group_issues[group];
    if (warp.issued < issues.size()) {
        if (!(issues[warp.issued] == issue)) fault("the warps of a warpgroup are at different wgmma");
    } else {
        issues.push_back(issue);
    }
    read_tile(issue.rows, issue.a, 16 * (number % GROUP_WARPS), 16);
    read_tile(issue.columns, issue.b, 0, 8 * fragments);
    for (int lane = 0; lane < LANES; lane++) {
        Thread &thread = block.threads[number * LANES + lane];
        const TileArguments &own = record_of<TileArguments>(meeting, lane);
        if (own.a != issue.a || own.b != issue.b) fault("the lanes of a warp give different matrix descriptors");
        if (thread.accumulators.empty()) {
            const int count = 4 * fragments;
            if (thread.fenced_registers != own.sums || !std::equal(own.sums, own.sums + count, thread.fenced))
                fault("wgmma with registers that were written to since wgmma.fence");
            Accumulator accumulator{own.sums, count, {}, static_cast<uint32_t>(draw())};
            std::copy_n(own.sums, count, accumulator.sums);
            for (int i = 0; i < count; i++) own.sums[i] = static_cast<int>(accumulator.poison + i);
            thread.accumulators.push_back(accumulator);
        } else if (thread.accumulators[0].registers != own.sums || thread.accumulators[0].count != 4 * fragments) {
            fault("wgmma to other registers than those under way, which is not emulated");
        }
    }
    warp.issues.push_back(std::move(issue));
    warp.issued++;
    finish_wgmma_of_group(group);
}

inline void require_wgmma(const Thread &thread) {
    if (block.capability != 90) fault("this device does not have ", thread.doing);
    if ((thread.number / (LANES * GROUP_WARPS) + 1) * LANES * GROUP_WARPS > block.thread_count)
        fault("a warpgroup of fewer than four warps");
}

/* ---- Running ---- */

inline void end_thread() {
    Thread &thread = current();
    // Nothing waits for them any more: they may come through at any time until the block has ended.
    at("return", thread.place);
    if (!thread.accumulators.empty()) fault("a thread ends with wgmma under way");
    thread.state = State::ENDED;
    warp_of(thread).ready &= ~lane_bit(thread);
    block.ended++;
}

inline void run_threads() {
    Fiber::arrive(block.scheduler);
    for (;;) {
        block.call(block.closure);
        end_thread();
        stop();
    }
}

__attribute__((noreturn)) inline void report_hang() {
    fprintf(stderr, "emulated CUDA: the threads of block (%u, %u, %u) wait for ever\n", blockIdx.x, blockIdx.y,
            blockIdx.z);
    for (int i = 0; i < block.thread_count; i++) {
        const Thread &thread = block.threads[i];
        const char *const doing = thread.state == State::ENDED ? "ended" : thread.doing;
        const Thread &last = block.threads[std::max(i, 1) - 1];
        const bool is_alike = last.state == thread.state && !strcmp(last.doing, thread.doing);
        if (i == 0 || !is_alike || !(last.place == thread.place))
            fprintf(stderr, "  from thread %d: %s at %s:%d\n", i, doing, thread.place.file, thread.place.line);
    }
    abort();
}

/* A warp that has a lane to run: any, or, for a while, always the first in some order, so that one runs far ahead. */
inline int choose_warp() {
    if (draw_below(256) == 0) {
        block.unfair = draw_below(2);
        for (int i = block.warp_count - 1; i > 0; i--)
            std::swap(block.preference[i], block.preference[draw_below(i + 1)]);
    }
    if (block.unfair) {
        for (int i = 0; i < block.warp_count; i++)
            if (block.warps[block.preference[i]].ready) return block.preference[i];
        return -1;
    }
    const int first = draw_below(block.warp_count);
    for (int i = 0; i < block.warp_count; i++) {
        const int warp = (first + i) % block.warp_count;
        if (block.warps[warp].ready) return warp;
    }
    return -1;
}

inline int choose_lane(unsigned ready) {
    const unsigned shift = draw_below(LANES), turned = ready >> shift | ready << (LANES - shift) % LANES;
    return (__builtin_ctz(turned) + shift) % LANES;
}

/* Where `__shared__` variables lie: the segment of thread-local storage of this library. */
inline void fill_static_shared() {
    static thread_local uint8_t one_of_them;
    const auto fill = [](dl_phdr_info *info, size_t, void *within) {
        for (int i = 0; i < info->dlpi_phnum; i++) {
            const ElfW(Phdr) &segment = info->dlpi_phdr[i];
            uint8_t *const begin = static_cast<uint8_t *>(info->dlpi_tls_data);
            if (segment.p_type != PT_TLS || begin == nullptr) continue;
            if (within < begin || within >= begin + segment.p_memsz) continue;
            fill_with_draws(begin, segment.p_memsz);
            return 1;
        }
        return 0;
    };
    if (!dl_iterate_phdr(fill, &one_of_them)) fault("the storage of __shared__ variables is not found");
}

inline void run_block(unsigned x, unsigned y, unsigned z) {
    blockIdx = {x, y, z};
    block.ended = block.at_barrier = 0;
    block.barriers = 0;
    block.fenced_since_barrier = false;
    fill_static_shared();
    fill_with_draws(block.shared, block.shared_bytes);
    block.unwritten_shared.assign(block.shared, block.shared + block.shared_bytes);
    block.fenced_shared = block.unwritten_shared;
    block.chunks.assign((block.shared_bytes + CHUNK - 1) / CHUNK, Chunk{Chunk::PLAIN, 0, 0, 0});
    // At any multiple of 1024 where it fits.
    const uint32_t places = (WINDOW_END - WINDOW_BEGIN - static_cast<uint32_t>(block.shared_bytes)) / 1024 + 1;
    block.shared_begin = WINDOW_BEGIN + 1024 * draw_below(places);

    block.warp_count = (block.thread_count + LANES - 1) / LANES;
    block.unfair = draw_below(2);
    for (int i = 0; i < block.warp_count; i++) {
        Warp &warp = block.warps[i];
        warp.ready = warp.at_barrier = 0;
        warp.meetings.clear();
        warp.issues.clear();
        warp.issued = warp.finished = 0;
        warp.waits_for_wgmma = false;
        block.preference[i] = i;
    }
    for (auto &issues : block.group_issues) issues.clear();
    for (int i = 0; i < block.thread_count; i++) {
        Thread &thread = block.threads[i];
        if (!thread.has_stack) thread.fiber.begin(run_threads);
        thread.has_stack = true;
        thread.index = {static_cast<unsigned>(i), 0, 0};
        thread.number = i;
        thread.doing = "begin";
        thread.place = {"", 0};
        thread.copies.clear();
        thread.copy_groups.clear();
        thread.fenced_registers = nullptr;
        release(thread);
    }
    while (block.ended < block.thread_count) {
        const int warp = choose_warp();
        if (warp < 0) report_hang();
        block.current = &block.threads[warp * LANES + choose_lane(block.warps[warp].ready)];
        threadIdx = block.current->index;
        Fiber::go(block.scheduler, block.current->fiber);
        block.current = nullptr;
    }
    for (int i = 0; i + GROUP_WARPS <= block.warp_count; i++)
        if (block.warps[i].issued != block.group_issues[group_of(i)].size())
            fault("not all warps of a warpgroup came to a wgmma");
}

struct LastLaunch {
    int device, threads;
    unsigned grid[3];
    size_t shared_bytes;
    void *stream;
    int64_t count;
};

inline LastLaunch last_launch;

inline int run_grid(dim3 grid, int threads, size_t shared_bytes, void *stream, void (*call)(void *), void *closure) {
    const std::lock_guard<std::mutex> guard(launching);
    block.capability = capability();
    if (block.capability < 80) return cudaErrorNoKernelImageForDevice;
    if (threads <= 0 || threads > MOST_THREADS) return cudaErrorInvalidConfiguration;
    if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (shared_bytes > most_shared_bytes(block.capability)) return cudaErrorInvalidValue;
    seed_draws();
    last_launch = {device, threads, {grid.x, grid.y, grid.z}, shared_bytes, stream, last_launch.count + 1};

    // Pages around it end the program when it is left by more than a padding to a multiple of 1024, which is checked.
    constexpr size_t PAGE = 4096, ALIGNMENT = 1024;
    const size_t padded = (shared_bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
    const size_t pages = (padded + PAGE - 1) / PAGE * PAGE;
    void *const memory = mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    uint8_t *const begin = static_cast<uint8_t *>(memory) + PAGE;
    if (mprotect(begin, pages, PROT_READ | PROT_WRITE)) abort();
    block.shared = begin + pages - padded;
    block.shared_bytes = shared_bytes;
    std::vector<uint8_t> padding(padded - shared_bytes);
    fill_with_draws(padding.data(), padding.size());
    memcpy(block.shared + shared_bytes, padding.data(), padding.size());

    block.call = call;
    block.closure = closure;
    block.thread_count = threads;
    blockDim = dim3(threads);
    gridDim = grid;
    std::vector<uint64_t> order(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
    for (uint64_t i = 0; i < order.size(); i++) order[i] = i;
    for (uint64_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
    for (const uint64_t i : order) {
        run_block(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        if (memcmp(block.shared + shared_bytes, padding.data(), padding.size()))
            fault("stores beyond the dynamic shared memory");
    }
    munmap(memory, pages + 2 * PAGE);
    return cudaSuccess;
}

/* ---- Instructions of a warp that the language has functions for ---- */

template <typename Value>
struct Exchange {
    Value value, result;
    int source;
};

/* Every lane gets the value of the lane that it names. */
template <typename Value>
Value exchange(const char *what, unsigned mask, Value value, int source, Place place) {
    static_assert(sizeof(Value) <= 8, "what a shuffle takes");
    Exchange<Value> own{value, value, source};
    meet(at(what, place), mask, &own, [](const Meeting &meeting) {
        for (int lane = 0; lane < LANES; lane++) {
            if (!(meeting.mask >> lane & 1)) continue;
            Exchange<Value> &record = record_of<Exchange<Value>>(meeting, lane);
            if (!(meeting.mask >> record.source & 1)) fault("a shuffle from a lane that is not in the mask");
            record.result = record_of<Exchange<Value>>(meeting, record.source).value;
        }
    });
    return own.result;
}

inline int lane_of_current() { return current().number % LANES; }

/* Every lane gets combine(...) of all values of the mask. */
template <typename Value, typename Function>
Value reduce(const char *what, unsigned mask, Value value, Place place, Function combine) {
    require(80, what);
    meet(at(what, place), mask, &value, [combine](const Meeting &meeting) {
        Value whole = record_of<Value>(meeting, __builtin_ctz(meeting.mask));
        for (int lane = __builtin_ctz(meeting.mask) + 1; lane < LANES; lane++)
            if (meeting.mask >> lane & 1) whole = combine(whole, record_of<Value>(meeting, lane));
        for (int lane = 0; lane < LANES; lane++)
            if (meeting.mask >> lane & 1) record_of<Value>(meeting, lane) = whole;
    });
    return value;
}

}  // namespace emulated_cuda

inline void __syncthreads(EMULATED_CUDA_PLACE) { emulated_cuda::barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_CUDA_PLACE) {
    emulated_cuda::meet(emulated_cuda::at("__syncwarp", {file, line}), mask, nullptr,
                        [](const emulated_cuda::Meeting &) {});
}

template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32, EMULATED_CUDA_PLACE) {
    const int lane = emulated_cuda::lane_of_current();
    const int named = (lane & ~(width - 1)) | (source & (width - 1));
    return emulated_cuda::exchange("__shfl_sync", mask, value, named, {file, line});
}

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes, int width = 32, EMULATED_CUDA_PLACE) {
    const int lane = emulated_cuda::lane_of_current(), other = lane ^ lanes;
    // Beyond its part of the warp a lane keeps its value; before it, it reads.
    const int named = other > (lane | (width - 1)) ? lane : other;
    return emulated_cuda::exchange("__shfl_xor_sync", mask, value, named, {file, line});
}

template <typename Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32, EMULATED_CUDA_PLACE) {
    const int lane = emulated_cuda::lane_of_current(), other = lane + static_cast<int>(delta);
    const int named = other > (lane | (width - 1)) ? lane : other;
    return emulated_cuda::exchange("__shfl_down_sync", mask, value, named, {file, line});
}

inline int __reduce_add_sync(unsigned mask, int value, EMULATED_CUDA_PLACE) {
    return emulated_cuda::reduce("__reduce_add_sync", mask, value, {file, line}, [](int left, int right) {
        return static_cast<int>(static_cast<unsigned>(left) + static_cast<unsigned>(right));
    });
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, EMULATED_CUDA_PLACE) {
    return emulated_cuda::reduce("__reduce_add_sync", mask, value, {file, line},
                                 [](unsigned left, unsigned right) { return left + right; });
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, EMULATED_CUDA_PLACE) {
    return emulated_cuda::reduce("__reduce_or_sync", mask, value, {file, line},
                                 [](unsigned left, unsigned right) { return left | right; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_CUDA_PLACE) {
    const unsigned own = predicate ? 1u << emulated_cuda::lane_of_current() : 0;
    return emulated_cuda::reduce("__ballot_sync", mask, own, {file, line},
                                 [](unsigned left, unsigned right) { return left | right; });
}

/* ---- instructions.cuh ---- */

/* Host and device code are one here, and all of it is there for every architecture. */
#define HF_STOMPP_WGMMA 1

namespace hf_stompp {

inline uint8_t *dynamic_shared(EMULATED_CUDA_PLACE) {
    emulated_cuda::at("dynamic shared memory", {file, line});
    if (emulated_cuda::block.shared_bytes == 0) emulated_cuda::fault("the launch gave no dynamic shared memory");
    return emulated_cuda::block.shared;
}

inline uint32_t shared_address(const void *pointer, EMULATED_CUDA_PLACE) {
    emulated_cuda::at("an address in shared memory", {file, line});
    return emulated_cuda::shared_address_of(pointer);
}

/* cp.async: done at once, at any later instruction, or when it is waited for. Until then nothing can be said of what
 * its target holds, whatever that was before.
 */
inline void copy_async(void *shared, const void *global, bool live, EMULATED_CUDA_PLACE) {
    using namespace emulated_cuda;
    Thread &thread = at("cp.async", {file, line});
    require(80, "cp.async");
    const size_t offset = chunk_offset(shared);
    if (reinterpret_cast<uintptr_t>(global) % CHUNK) fault("an address in global memory that is no multiple of 16");
    Chunk &chunk = block.chunks[offset / CHUNK];
    if (chunk.state == Chunk::UNDER_WAY) fault("two copies to the same bytes at the same time");
    chunk = {Chunk::UNDER_WAY, thread.number, 0, 0};
    thread.copies.push_back({block.shared + offset, global, live, false});
    fill_with_draws(block.shared + offset, CHUNK);
    if (draw_below(2)) make_copy(thread.copies.back());
}

inline void commit_copies(EMULATED_CUDA_PLACE) {
    using namespace emulated_cuda;
    Thread &thread = at("cp.async.commit_group", {file, line});
    thread.copy_groups.push_back(std::move(thread.copies));
    thread.copies.clear();
}

template <int PENDING>
void wait_for_copies(EMULATED_CUDA_PLACE) {
    using namespace emulated_cuda;
    Thread &thread = at("cp.async.wait_group", {file, line});
    while (thread.copy_groups.size() > PENDING) {
        for (Copy &copy : thread.copy_groups.front()) {
            make_copy(copy);
            Chunk &chunk = block.chunks[chunk_offset(copy.target) / CHUNK];
            chunk.state = Chunk::COPIED;
            chunk.waited = block.barriers;
        }
        thread.copy_groups.pop_front();
    }
}

/* "ldmatrix" in the PTX ISA: lane l gets of every matrix the 4 bytes at l % 4 of row l / 4. */
inline void load_matrices(uint32_t (&matrices)[4], const void *row, EMULATED_CUDA_PLACE) {
    using namespace emulated_cuda;
    struct Rows {
        uint32_t *matrices;
        size_t offset;
    };
    Thread &thread = at("ldmatrix", {file, line});
    Rows own{matrices, chunk_offset(row)};
    const int number = thread.number / LANES;
    meet(thread, ALL_LANES, &own, [number](const Meeting &meeting) {
        for (int lane = 0; lane < LANES; lane++) {
            const size_t offset = record_of<Rows>(meeting, lane).offset;
            const Chunk &chunk = block.chunks[offset / CHUNK];
            check_is_written(offset);
            if (chunk.state == Chunk::UNDER_WAY) fault("ldmatrix of bytes that a copy is under way to");
            const bool is_copied = chunk.state == Chunk::COPIED || chunk.state == Chunk::FENCED;
            if (is_copied && chunk.owner / LANES != number && chunk.waited == block.barriers)
                fault("ldmatrix of bytes that another warp copied, with no barrier since");
        }
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < 4; i++) {
                const size_t offset = record_of<Rows>(meeting, 8 * i + lane / 4).offset;
                memcpy(&record_of<Rows>(meeting, lane).matrices[i], block.shared + offset + 4 * (lane % 4), 4);
            }
    });
}

/* "Matrix Fragments for mma.m16n8k256" in the PTX ISA; SM80_16x8x256_S32U1U1S32_TN in CuTe. With group = lane / 4 and
 * member = lane % 4, a register holds 32 bits in k from 32 * member: a0 and a1 of rows group and group + 8, a2 and a3
 * of the same from k = 128 on; b0 and b1 of column group, b1 from k = 128 on. c0 and c1 are in row group, c2 and c3 in
 * group + 8, in columns 2 * member and the next.
 */
inline void multiply_fragments(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATED_CUDA_PLACE) {
    using namespace emulated_cuda;
    struct Fragments {
        int *sums;
        const uint32_t *a;
        uint32_t b[2];
    };
    Fragments own{sums, a, {b0, b1}};
    Thread &thread = at("mma", {file, line});
    require(80, "mma with .and.popc");
    meet(thread, ALL_LANES, &own, [](const Meeting &meeting) {
        uint32_t rows[16][8], columns[8][8];
        for (int lane = 0; lane < LANES; lane++) {
            const Fragments &fragments = record_of<Fragments>(meeting, lane);
            const int group = lane / 4, member = lane % 4;
            rows[group][member] = fragments.a[0];
            rows[group + 8][member] = fragments.a[1];
            rows[group][member + 4] = fragments.a[2];
            rows[group + 8][member + 4] = fragments.a[3];
            columns[group][member] = fragments.b[0];
            columns[group][member + 4] = fragments.b[1];
        }
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < 4; i++) {
                const uint32_t *const row = rows[lane / 4 + 8 * (i / 2)];
                const uint32_t *const column = columns[2 * (lane % 4) + i % 2];
                for (int k = 0; k < 8; k++)
                    record_of<Fragments>(meeting, lane).sums[i] += __builtin_popcount(row[k] & column[k]);
            }
    });
}

inline void fence_shared_for_wgmma(EMULATED_CUDA_PLACE) {
    using namespace emulated_cuda;
    Thread &thread = at("fence.proxy.async", {file, line});
    require(90, "fence.proxy.async");
    block.fenced_since_barrier = true;
    for (Chunk &chunk : block.chunks)
        if (chunk.state == Chunk::COPIED && chunk.owner == thread.number) {
            chunk.state = Chunk::FENCED;
            chunk.fenced = block.barriers;
        }
}

template <int FRAGMENTS>
void begin_wgmma(int (&sums)[FRAGMENTS][4], EMULATED_CUDA_PLACE) {
    using namespace emulated_cuda;
    Thread &thread = at("wgmma.fence", {file, line});
    require_wgmma(thread);
    meet_warp(thread);
    if (!thread.accumulators.empty()) return;
    thread.fenced_registers = &sums[0][0];
    std::copy_n(&sums[0][0], 4 * FRAGMENTS, thread.fenced);
}

inline void commit_wgmma(EMULATED_CUDA_PLACE) {
    using namespace emulated_cuda;
    Thread &thread = at("wgmma.commit_group", {file, line});
    require_wgmma(thread);
    meet_warp(thread);
    for (Issue &issue : warp_of(thread).issues) issue.committed = true;
}

/* wgmma reads and adds here, when nothing of it can be put off any longer; that its tiles are as they were at its
 * beginning, when it may have read them too, is checked.
 */
template <int FRAGMENTS>
void wait_for_wgmma(int (&sums)[FRAGMENTS][4], EMULATED_CUDA_PLACE) {
    using namespace emulated_cuda;
    Thread &thread = at("wgmma.wait_group", {file, line});
    require_wgmma(thread);
    if (!thread.accumulators.empty() && thread.accumulators[0].registers != &sums[0][0])
        fault("a wait for wgmma to other registers");
    Warp &warp = warp_of(thread);
    const int number = thread.number / LANES;
    meet(thread, ALL_LANES, nullptr, [&warp, number](const Meeting &) {
        for (const Issue &issue : warp.issues)
            if (!issue.committed) fault("a wait for wgmma that no group was made of");
        warp.waits_for_wgmma = true;
        finish_wgmma_of_group(group_of(number));
    });
    if (warp.waits_for_wgmma) wait();
}

namespace emulated {

template <int FRAGMENTS>
void multiply_tiles(int (&sums)[FRAGMENTS][4], uint64_t a, uint64_t b, emulated_cuda::Place place) {
    using namespace emulated_cuda;
    TileArguments own{&sums[0][0], a, b};
    Thread &thread = at("wgmma.mma_async", place);
    require_wgmma(thread);
    const int number = thread.number / LANES;
    meet(thread, ALL_LANES, &own, [number](const Meeting &meeting) { issue_wgmma(meeting, FRAGMENTS, number); });
}

}  // namespace emulated

inline void multiply_tiles(int (&sums)[16][4], uint64_t a, uint64_t b, EMULATED_CUDA_PLACE) {
    emulated::multiply_tiles(sums, a, b, {file, line});
}

inline void multiply_tiles(int (&sums)[8][4], uint64_t a, uint64_t b, EMULATED_CUDA_PLACE) {
    emulated::multiply_tiles(sums, a, b, {file, line});
}

/* Kernels run one after the other. */
inline void wait_for_earlier_kernels() {}

/* Runs the kernel to its end. */
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void *stream, bool,
           Arguments... arguments) {
    auto call = [&] { kernel(arguments...); };
    const auto run = [](void *closure) { (*static_cast<decltype(call) *>(closure))(); };
    return emulated_cuda::run_grid(grid, threads, shared_bytes, stream, run, &call);
}

}  // namespace hf_stompp

/* For tests: the current device, the last error, and what was launched last. */
extern "C" {

__attribute__((visibility("default"), used)) inline int emulated_cuda_device() { return emulated_cuda::device; }

__attribute__((visibility("default"), used)) inline int emulated_cuda_last_error() {
    return emulated_cuda::last_error;
}

__attribute__((visibility("default"), used)) inline int64_t emulated_cuda_launches() {
    return emulated_cuda::last_launch.count;
}

__attribute__((visibility("default"), used)) inline int emulated_cuda_launch_device() {
    return emulated_cuda::last_launch.device;
}

__attribute__((visibility("default"), used)) inline void *emulated_cuda_launch_stream() {
    return emulated_cuda::last_launch.stream;
}

__attribute__((visibility("default"), used)) inline int emulated_cuda_launch_threads() {
    return emulated_cuda::last_launch.threads;
}

__attribute__((visibility("default"), used)) inline int64_t emulated_cuda_launch_shared_bytes() {
    return static_cast<int64_t>(emulated_cuda::last_launch.shared_bytes);
}
}

#endif
