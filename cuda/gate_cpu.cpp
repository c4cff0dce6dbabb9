// What surrounds the recurrences of RWKV-6 and RWKV-5.2, element by element, each with its gradient;
// rwkvpipe/kernel/gate.py has the formulas in PyTorch. All is fp32 without gaps, (B, T, D) or (tokens, D).

#include "norm.h"
#include "tasks.h"

namespace {

constexpr int SLOTS = 5;  // what a token's own shifts are for

// x + (before - x) (z + m), for SLOTS of z, which each token has, and m, which all have
struct Drift {
    int64_t T, D;
    const float *x, *last;
    const float *const *z, *const *m;

    const float *before(int64_t token) const {
        return token % T ? x + (token - 1) * D : last + token / T * D;
    }

    void forward(int64_t t, float *const *out) const {
        for (int64_t j = 0; j < D; j += WIDTH) {
            const int64_t left = D - j;
            const Vec now = load_some(x + t * D + j, left), d = load_some(before(t) + j, left) - now;
            for (int i = 0; i < SLOTS; i++) {
                const Vec part = load_some(z[i] + t * D + j, left) + load_some(m[i] + j, left);
                store_some(out[i] + t * D + j, now + d * part, left);
            }
        }
    }

    // dx_t = sum of dy_t (1 - z_t - m) + dy_{t+1} (z_{t+1} + m)
    void backward(int64_t begin, int64_t end, const float *const *dy, float *dx, float *dlast, float *const *dz,
                  float *sums) const {
        float *next = scratch(D + WIDTH);
        for (int64_t t = end; t >= begin; t--) {
            const bool inside = t < end, heard = inside || t % T;  // after the last token of a row nobody heard it
            for (int64_t j = 0; j < D; j += WIDTH) {
                const int64_t left = D - j;
                Vec d = {}, whole = {}, shifted = {};
                if (inside) d = load_some(before(t) + j, left) - load_some(x + t * D + j, left);
                for (int i = 0; heard && i < SLOTS; i++) {
                    const int64_t at = t * D + j;
                    const Vec g = load_some(dy[i] + at, left);
                    whole += g;
                    shifted += g * (load_some(z[i] + at, left) + load_some(m[i] + j, left));
                    if (inside) {
                        store_some(dz[i] + at, g * d, left);
                        add(sums + i * D + j, g * d, left);
                    }
                }
                if (inside) store_some(dx + t * D + j, whole - shifted + load(next + j), left);
                if (inside && t % T == 0) {
                    store_some(dlast + t / T * D + j, shifted, left);
                    shifted = Vec{};
                }
                store(next + j, shifted);
            }
        }
    }
};

// each head of y normalised, times z sigmoid(z)
struct Gate {
    int64_t H, N;
    float eps;
    const float *y, *z, *weight, *bias;

    void forward(int64_t t, float *out) const {
        for (int64_t h = 0; h < H; h++) {
            const int64_t c = h * N, at = t * H * N + c;
            const Moments of = moments(y + at, N, eps);
            for (int64_t j = 0; j < N; j += WIDTH) {
                const int64_t i = at + j, left = N - j;
                const Vec x = (load_some(y + i, left) - of.mean) * of.scale, z_ = load_some(z + i, left);
                const Vec normed = x * load_some(weight + c + j, left) + load_some(bias + c + j, left);
                store_some(out + i, normed * z_ * sigmoid(z_), left);
            }
        }
    }

    // sums: of weight, bias
    void backward(int64_t t, const float *dout, float *dy, float *dz, float *sums) const {
        const int64_t D = H * N;
        for (int64_t h = 0; h < H; h++) {
            const int64_t c = h * N, at = t * D + c;
            const Moments of = moments(y + at, N, eps);
            Vec total = {}, along = {};
            for (int64_t j = 0; j < N; j += WIDTH) {
                const int64_t i = at + j, left = N - j, channel = c + j;
                const Vec d = load_some(dout + i, left), z_ = load_some(z + i, left), part = sigmoid(z_);
                const Vec in = d * z_ * part, by = load_some(weight + channel, left);
                const Vec x = only((load_some(y + i, left) - of.mean) * of.scale, left);
                const Vec normed = x * by + load_some(bias + channel, left);
                total += in * by;
                along += in * by * x;
                store_some(dz + i, d * normed * part * (1.0f + z_ * (1.0f - part)), left);
                store_some(dy + i, in * by, left);
                add(sums + channel, in * x, left);
                add(sums + D + channel, in, left);
            }
            const float mean = sum(total) / N, turned = sum(along) / N;
            for (int64_t j = 0; j < N; j += WIDTH) {
                const int64_t i = at + j, left = N - j;
                const Vec x = (load_some(y + i, left) - of.mean) * of.scale;
                store_some(dy + i, (load_some(dy + i, left) - mean - x * turned) * of.scale, left);
            }
        }
    }
};

}  // namespace

extern "C" {

// sizes: B T D
// takes B T D: x B*T*D, last B*D, z 5 of B*T*D, m 5 of D, out 5 of B*T*D
void drift_forward(const int64_t *s, int threads, const float *x, const float *last, const float *const *z,
                   const float *const *m, float *const *out) {
    const Drift it = {s[1], s[2], x, last, z, m};
    over(s[0] * s[1], threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
        for (int64_t t = begin; t < end; t++) it.forward(t, out);
    });
}

// takes B T D: x B*T*D, last B*D, z 5 of B*T*D, m 5 of D, dy 5 of B*T*D, dx B*T*D, dlast B*D, dz 5 of B*T*D, partial
// any, dm 5*D
void drift_backward(const int64_t *s, int threads, const float *x, const float *last, const float *const *z,
                    const float *const *m, const float *const *dy, float *dx, float *dlast, float *const *dz,
                    float *partial, float *dm) {
    const Drift it = {s[1], s[2], x, last, z, m};
    over(s[0] * s[1], threads, SLOTS * s[2], partial, dm,
         [&](int64_t begin, int64_t end, float *sums) { it.backward(begin, end, dy, dx, dlast, dz, sums); });
}

// sizes: tokens H N
// takes T H N: y z T*H*N, weight bias H*N, eps, out T*H*N
void gate_forward(const int64_t *s, int threads, const float *y, const float *z, const float *weight,
                  const float *bias, float eps, float *out) {
    const Gate it = {s[1], s[2], eps, y, z, weight, bias};
    over(s[0], threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
        for (int64_t t = begin; t < end; t++) it.forward(t, out);
    });
}

// takes T H N: y z T*H*N, weight bias H*N, eps, dout dy dz T*H*N, partial any, total 2*H*N
void gate_backward(const int64_t *s, int threads, const float *y, const float *z, const float *weight,
                   const float *bias, float eps, const float *dout, float *dy, float *dz, float *partial,
                   float *total) {
    const Gate it = {s[1], s[2], eps, y, z, weight, bias};
    over(s[0], threads, 2 * s[1] * s[2], partial, total, [&](int64_t begin, int64_t end, float *sums) {
        for (int64_t t = begin; t < end; t++) it.backward(t, dout, dy, dz, sums);
    });
}

// sizes: how many numbers. v sigmoid(z)
// takes n: z v out n
void sift_forward(const int64_t *s, int threads, const float *z, const float *v, float *out) {
    each(s[0], threads, [&](int64_t i, int64_t left) {
        store_some(out + i, load_some(v + i, left) * sigmoid(load_some(z + i, left)), left);
    });
}

// takes n: z v dout dz dv n
void sift_backward(const int64_t *s, int threads, const float *z, const float *v, const float *dout, float *dz,
                   float *dv) {
    each(s[0], threads, [&](int64_t i, int64_t left) {
        const Vec part = sigmoid(load_some(z + i, left)), d = load_some(dout + i, left);
        store_some(dv + i, d * part, left);
        store_some(dz + i, d * load_some(v + i, left) * part * (1.0f - part), left);
    });
}

}  // extern "C"
