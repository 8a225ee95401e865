/* What each file puts at the disposal of dispatch.cu. All return 0 or a status or cudaError. `overlaps`: see launch. */
#ifndef HF_STOMPP_KERNELS_CUH
#define HF_STOMPP_KERNELS_CUH

#include "hf_stompp_cuda.h"

namespace hf_stompp {

int pack_sign(const hf_stompp_cuda_packing &packing, bool overlaps);
int unpack_signs(const hf_stompp_cuda_unpacking &unpacking);
int sign_product(const hf_stompp_cuda_vector_product &product);
int fold(const hf_stompp_cuda_folding &folding);
int layer_norm_sign(const hf_stompp_cuda_layer_norm &norm, bool overlaps);
int binary_linear_mma(const hf_stompp_cuda_product &product, int64_t kernel, bool overlaps);
int binary_linear_wgmma(const hf_stompp_cuda_product &product, int64_t kernel, int64_t processors, bool overlaps);

/* Whether rows of that many features fit its tiles. */
bool takes_wgmma(int64_t in_features);

/* An address in the code that must be there for the device. */
const void *probe_kernel();

}  // namespace hf_stompp

#endif
