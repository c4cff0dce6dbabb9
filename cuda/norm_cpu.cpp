// The norms of a model's stream, each with its gradient; rwkvpipe/kernel/blend.py has them in PyTorch, whose gradients
// of weight and bias have other bits with another number of threads.

#include "norm.h"
#include "tasks.h"

namespace {

struct Norm {
    int64_t D;
    float eps;
    const float *x, *weight, *bias;

    // sums: of weight, bias
    void backward(int64_t t, const float *dout, float *dx, float *sums) const {
        const float *from = x + t * D, *d = dout + t * D;
        const Moments of = moments(from, D, eps);
        Vec total = {}, along = {};
        for (int64_t j = 0; j < D; j += WIDTH) {
            const int64_t left = D - j;
            const Vec in = load_some(d + j, left), scaled = in * load_some(weight + j, left);
            const Vec y = only((load_some(from + j, left) - of.mean) * of.scale, left);
            total += scaled;
            along += scaled * y;
            add(sums + j, in * y, left);
            add(sums + D + j, in, left);
        }
        const float mean = sum(total) / D, turned = sum(along) / D;
        for (int64_t j = 0; j < D; j += WIDTH) {
            const int64_t left = D - j;
            const Vec y = (load_some(from + j, left) - of.mean) * of.scale;
            const Vec scaled = load_some(d + j, left) * load_some(weight + j, left);
            store_some(dx + t * D + j, (scaled - mean - y * turned) * of.scale, left);
        }
    }
};

}  // namespace

extern "C" {

// sizes: tokens D
// takes T D: x T*D, weight bias D, eps, out T*D
void norm_forward(const int64_t *s, int threads, const float *x, const float *weight, const float *bias, float eps,
                  float *out) {
    const int64_t D = s[1];
    over(s[0], threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
        for (int64_t t = begin; t < end; t++) norm(x + t * D, weight, bias, out + t * D, D, eps);
    });
}

// takes T D: x T*D, weight bias D, eps, dout dx T*D, partial any, total 2*D
void norm_backward(const int64_t *s, int threads, const float *x, const float *weight, const float *bias, float eps,
                   const float *dout, float *dx, float *partial, float *total) {
    const Norm it = {s[1], eps, x, weight, bias};
    over(s[0], threads, 2 * s[1], partial, total, [&](int64_t begin, int64_t end, float *sums) {
        for (int64_t t = begin; t < end; t++) it.backward(t, dout, dx, sums);
    });
}

}  // extern "C"
