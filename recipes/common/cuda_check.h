// Included first in an extension's C++ file (see compile.sh): the one function that .cu files which are compiled without
// torch's headers call of torch, always: it also finds assertions that failed on the GPU earlier.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

namespace ssm_forge {

__attribute__((visibility("hidden"), used)) inline void cuda_check(
    cudaError_t error, const char *file, const char *function, int line) {
    c10::cuda::c10_cuda_check_implementation(static_cast<int32_t>(error), file, function, line, true);
}

}  // namespace ssm_forge
