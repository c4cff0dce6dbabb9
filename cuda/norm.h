// A row of numbers normalised.
#pragma once

#include "vector.h"

#include <cmath>

struct Moments {
    float mean, scale;  // scale: 1 / the standard deviation
};

inline Moments moments(const float *x, int64_t n, float eps) {
    Vec total = {}, squares = {};
    for (int64_t j = 0; j < n; j += WIDTH) total += load_some(x + j, n - j);
    const float mean = sum(total) / n;
    for (int64_t j = 0; j < n; j += WIDTH) {
        const Vec y = only(load_some(x + j, n - j) - mean, n - j);
        squares += y * y;
    }
    return {mean, 1.0f / std::sqrt(sum(squares) / n + eps)};
}

// x normalised, times weight, plus bias
inline void norm(const float *x, const float *weight, const float *bias, float *to, int64_t n, float eps = 1e-5f) {
    const Moments of = moments(x, n, eps);
    for (int64_t j = 0; j < n; j += WIDTH) {
        const Vec y = (load_some(x + j, n - j) - of.mean) * of.scale;
        store_some(to + j, y * load_some(weight + j, n - j) + load_some(bias + j, n - j), n - j);
    }
}
