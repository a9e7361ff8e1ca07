// Stands for torch's header of this name in .cu files (see README.md): what CUDA answers goes to torch's own check.
#pragma once

#include <cuda_runtime_api.h>

namespace ssm_forge {

// In the extension's C++ file, where it is compiled with torch's headers (../cuda_check.h): the function of torch's
// that it calls has had three signatures.
__attribute__((visibility("hidden"))) void cuda_check(cudaError_t, const char *file, const char *function, int line);

}  // namespace ssm_forge

#define C10_CUDA_CHECK(CALL) ssm_forge::cuda_check((CALL), __FILE__, __func__, __LINE__)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
