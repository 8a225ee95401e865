/* The C interface: checks, the choice of a kernel, and the current device. */
#include "bits.cuh"
#include "kernels.cuh"

namespace {

/* Asks for an error, which would stay otherwise, and be taken for that of a later call. */
cudaError_t forget(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

/* Makes a device current, and the one that was so again at the end. */
class DeviceGuard {
public:
    explicit DeviceGuard(int64_t device) {
        status_ = forget(cudaGetDevice(&previous_));
        if (status_ == cudaSuccess && previous_ != device) {
            status_ = forget(cudaSetDevice(static_cast<int>(device)));
            changed_ = status_ == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed_) forget(cudaSetDevice(previous_));
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

    int status() const { return status_; }

private:
    int previous_ = 0;
    bool changed_ = false;
    cudaError_t status_ = cudaSuccess;
};

int attribute(int64_t device, cudaDeviceAttr what) {
    int value = 0;
    return forget(cudaDeviceGetAttribute(&value, what, static_cast<int>(device))) == cudaSuccess ? value : 0;
}

/* Whether kernels can begin before the one ahead of them has ended. */
bool overlaps(int64_t device) { return attribute(device, cudaDevAttrComputeCapabilityMajor) >= 9; }

/* Rows and columns of the tile of a kernel. */
constexpr int64_t TILES[HF_STOMPP_CUDA_KERNELS][2] = {{64, 64}, {128, 128}, {64, 64}, {64, 128}};

int64_t tile_count(int64_t kernel, int64_t rows, int64_t columns) {
    const int64_t *const tile = TILES[kernel];
    return (rows + tile[0] - 1) / tile[0] * ((columns + tile[1] - 1) / tile[1]);
}

/* Most rows: they lie along x, in tiles. Most features: sums are exact in float below 2^24, and columns lie along y, up to
 * a multiple of 256 of them.
 */
constexpr int64_t MOST_ROWS = INT32_MAX, MOST_FEATURES = 65532 * 64;

bool is_wgmma(int64_t kernel) {
    return kernel == HF_STOMPP_CUDA_WGMMA_64x64 || kernel == HF_STOMPP_CUDA_WGMMA_64x128;
}

bool fits(int64_t rows, int64_t features) { return rows <= MOST_ROWS && features <= MOST_FEATURES; }

}  // namespace

extern "C" {

const char *hf_stompp_cuda_source_hash(void) { return HF_STOMPP_SOURCE_HASH; }

const char *hf_stompp_cuda_message(int status) {
    switch (status) {
        case HF_STOMPP_CUDA_UNAVAILABLE: return "the kernel does not run on this device";
        case HF_STOMPP_CUDA_TOO_LARGE: return "more rows or features than the kernel takes";
        default: return cudaGetErrorString(static_cast<cudaError_t>(status));
    }
}

int hf_stompp_cuda_check(int64_t device) {
    const DeviceGuard guard(device);
    if (guard.status()) return guard.status();
    cudaFuncAttributes attributes;
    return forget(cudaFuncGetAttributes(&attributes, hf_stompp::probe_kernel()));
}

int hf_stompp_cuda_has_kernel(int64_t device, int64_t kernel) {
    const int major = attribute(device, cudaDevAttrComputeCapabilityMajor);
    const int minor = attribute(device, cudaDevAttrComputeCapabilityMinor);
    if (is_wgmma(kernel)) return major == 9 && minor == 0;
    return (kernel == HF_STOMPP_CUDA_MMA_64x64 || kernel == HF_STOMPP_CUDA_MMA_128x128) && (major == 8 || major == 9);
}

int hf_stompp_cuda_chosen(int64_t device, int64_t rows, int64_t in_features, int64_t out_features) {
    const int64_t processors = attribute(device, cudaDevAttrMultiProcessorCount);
    const auto tiles = [&](int64_t kernel) { return tile_count(kernel, rows, out_features); };
    if (hf_stompp_cuda_has_kernel(device, HF_STOMPP_CUDA_WGMMA_64x128) && hf_stompp::takes_wgmma(in_features)) {
        // As measured on an H100 (benchmarks/results/cuda_nvidia_h100_80gb_hbm3.json): one row of the input is read in
        // pieces of 1024 bits, and a warpgroup gains on single warps where there is more than one, or many tiles.
        const int64_t pieces = (in_features + 1023) / 1024;
        if (tiles(HF_STOMPP_CUDA_WGMMA_64x128) * pieces >= 10 * processors) return HF_STOMPP_CUDA_WGMMA_64x128;
        if (pieces > 1 || 2 * tiles(HF_STOMPP_CUDA_WGMMA_64x64) >= 7 * processors) return HF_STOMPP_CUDA_WGMMA_64x64;
        return HF_STOMPP_CUDA_MMA_64x64;
    }
    if (!hf_stompp_cuda_has_kernel(device, HF_STOMPP_CUDA_MMA_64x64)) return -1;
    // The larger tile if there are enough for every processor.
    return tiles(HF_STOMPP_CUDA_MMA_128x128) >= processors ? HF_STOMPP_CUDA_MMA_128x128 : HF_STOMPP_CUDA_MMA_64x64;
}

int hf_stompp_cuda_pack_sign(const hf_stompp_cuda_packing *packing) {
    if (packing->rows == 0) return HF_STOMPP_CUDA_OK;
    if (!fits(packing->rows, packing->features)) return HF_STOMPP_CUDA_TOO_LARGE;
    const DeviceGuard guard(packing->device);
    return guard.status() ? guard.status() : hf_stompp::pack_sign(*packing, overlaps(packing->device));
}

int hf_stompp_cuda_unpack_signs(const hf_stompp_cuda_unpacking *unpacking) {
    if (unpacking->rows == 0 || unpacking->features == 0) return HF_STOMPP_CUDA_OK;
    if (!fits(unpacking->rows, unpacking->features)) return HF_STOMPP_CUDA_TOO_LARGE;
    const DeviceGuard guard(unpacking->device);
    return guard.status() ? guard.status() : hf_stompp::unpack_signs(*unpacking);
}

int hf_stompp_cuda_binary_linear(const hf_stompp_cuda_product *product) {
    if (product->rows == 0 || product->out_features == 0) return HF_STOMPP_CUDA_OK;
    if (!fits(product->rows, product->in_features) || !fits(product->rows, product->out_features))
        return HF_STOMPP_CUDA_TOO_LARGE;
    int64_t kernel = product->kernel;
    if (kernel == HF_STOMPP_CUDA_AUTO)
        kernel = hf_stompp_cuda_chosen(product->device, product->rows, product->in_features, product->out_features);
    if (!hf_stompp_cuda_has_kernel(product->device, kernel)) return HF_STOMPP_CUDA_UNAVAILABLE;
    const DeviceGuard guard(product->device);
    if (guard.status()) return guard.status();
    if (!is_wgmma(kernel)) return hf_stompp::binary_linear_mma(*product, kernel, overlaps(product->device));
    if (!hf_stompp::takes_wgmma(product->in_features)) return HF_STOMPP_CUDA_TOO_LARGE;
    return hf_stompp::binary_linear_wgmma(*product, kernel,
                                          attribute(product->device, cudaDevAttrMultiProcessorCount),
                                          overlaps(product->device));
}

int hf_stompp_cuda_layer_norm_sign(const hf_stompp_cuda_layer_norm *norm) {
    if (norm->rows == 0) return HF_STOMPP_CUDA_OK;
    if (!fits(norm->rows, norm->features)) return HF_STOMPP_CUDA_TOO_LARGE;
    const DeviceGuard guard(norm->device);
    return guard.status() ? guard.status() : hf_stompp::layer_norm_sign(*norm, overlaps(norm->device));
}

int hf_stompp_cuda_sign_product(const hf_stompp_cuda_vector_product *product) {
    if ((product->transposed ? product->in_features : product->out_features) == 0) return HF_STOMPP_CUDA_OK;
    if (!fits(product->out_features, product->in_features)) return HF_STOMPP_CUDA_TOO_LARGE;
    const DeviceGuard guard(product->device);
    return guard.status() ? guard.status() : hf_stompp::sign_product(*product);
}

int hf_stompp_cuda_fold(const hf_stompp_cuda_folding *folding) {
    if (folding->out_features == 0) return HF_STOMPP_CUDA_OK;
    if (!fits(folding->out_features, folding->in_features)) return HF_STOMPP_CUDA_TOO_LARGE;
    const DeviceGuard guard(folding->device);
    return guard.status() ? guard.status() : hf_stompp::fold(*folding);
}

}  // extern "C"
