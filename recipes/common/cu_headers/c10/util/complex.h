// Stands for torch's header of this name in .cu files (see README.md): a complex number that GPUs load as one value.
#pragma once

#include <c10/util/Half.h>

namespace c10 {

template <typename T>
struct alignas(sizeof(T) * 2) complex {
    using value_type = T;

    T real_ = T(0);
    T imag_ = T(0);

    constexpr complex() = default;
    __host__ __device__ constexpr complex(const T &real, const T &imag = T()) : real_(real), imag_(imag) {}

    __host__ __device__ constexpr T real() const { return real_; }
    __host__ __device__ constexpr T imag() const { return imag_; }

    __host__ __device__ constexpr complex &operator+=(const complex &other) {
        real_ += other.real_;
        imag_ += other.imag_;
        return *this;
    }
    __host__ __device__ constexpr complex &operator-=(const complex &other) {
        real_ -= other.real_;
        imag_ -= other.imag_;
        return *this;
    }
    __host__ __device__ constexpr complex &operator*=(const complex &other) {
        const T real = real_, imag = imag_;
        real_ = real * other.real_ - imag * other.imag_;
        imag_ = real * other.imag_ + imag * other.real_;
        return *this;
    }
    __host__ __device__ constexpr complex &operator*=(T factor) {
        real_ *= factor;
        imag_ *= factor;
        return *this;
    }
};

template <typename T>
__host__ __device__ constexpr complex<T> operator+(complex<T> one, const complex<T> &other) {
    return one += other;
}
template <typename T>
__host__ __device__ constexpr complex<T> operator-(complex<T> one, const complex<T> &other) {
    return one -= other;
}
template <typename T>
__host__ __device__ constexpr complex<T> operator*(complex<T> one, const complex<T> &other) {
    return one *= other;
}
template <typename T>
__host__ __device__ constexpr complex<T> operator*(complex<T> one, const T &factor) {
    return one *= factor;
}
template <typename T>
__host__ __device__ constexpr complex<T> operator*(const T &factor, complex<T> one) {
    return one *= factor;
}

}  // namespace c10

namespace std {
template <typename T>
__host__ __device__ constexpr c10::complex<T> conj(const c10::complex<T> &value) {
    return {value.real_, -value.imag_};
}
}  // namespace std
