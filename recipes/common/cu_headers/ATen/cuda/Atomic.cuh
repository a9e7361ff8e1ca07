// Stands for torch's header of this name in .cu files (see README.md): additions to memory that all threads share.
#pragma once

#include <c10/util/complex.h>

static inline __device__ float gpuAtomicAdd(float *address, float value) { return atomicAdd(address, value); }

template <typename T>
static inline __device__ void gpuAtomicAdd(c10::complex<T> *address, c10::complex<T> value) {
    gpuAtomicAdd(&address->real_, value.real_);
    gpuAtomicAdd(&address->imag_, value.imag_);
}
