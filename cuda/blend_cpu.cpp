// What surrounds the recurrence, element by element, each with its gradient; rwkvpipe/kernel/blend.py has the formulas
// in PyTorch. All is fp32 without gaps, (B, T, D) or (tokens, D), with D = H N channels.

#include "norm.h"
#include "tasks.h"

#include <cmath>

namespace {

constexpr int MOST = 6;  // mixes of one input

struct Mix {
    int64_t T, D;
    const float *x, *last;
    const float *const *m;

    const float *before(int64_t token) const {
        return token % T ? x + (token - 1) * D : last + token / T * D;
    }

    template <int COUNT>
    void forward(int64_t begin, int64_t end, float *const *out) const {
        for (int64_t t = begin; t < end; t++) {
            for (int64_t j = 0; j < D; j += WIDTH) {
                const int64_t left = D - j;
                const Vec now = load_some(x + t * D + j, left), d = load_some(before(t) + j, left) - now;
                for (int i = 0; i < COUNT; i++)
                    store_some(out[i] + t * D + j, now + d * load_some(m[i] + j, left), left);
            }
        }
    }

    // dx_t = sum of dy_t (1 - m) + dy_{t+1} m
    template <int COUNT>
    void backward(int64_t begin, int64_t end, const float *const *dy, float *dx, float *dlast, float *sums) const {
        float *next = scratch(D + WIDTH);
        for (int64_t t = end; t >= begin; t--) {
            const bool inside = t < end, heard = inside || t % T;  // after the last token of a row nobody heard it
            for (int64_t j = 0; j < D; j += WIDTH) {
                const int64_t left = D - j;
                Vec d = {}, whole = {}, shifted = {};
                if (inside) d = load_some(before(t) + j, left) - load_some(x + t * D + j, left);
                for (int i = 0; heard && i < COUNT; i++) {
                    const Vec g = load_some(dy[i] + t * D + j, left);
                    whole += g;
                    shifted += g * load_some(m[i] + j, left);
                    if (inside) add(sums + i * D + j, g * d, left);
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

template <int COUNT>
void mix_forward_of(const int64_t *s, int threads, const Mix &mix, float *const *out) {
    over(s[0] * s[1], threads, 0, nullptr, nullptr,
         [&](int64_t begin, int64_t end, float *) { mix.forward<COUNT>(begin, end, out); });
}

template <int COUNT>
void mix_backward_of(const int64_t *s, int threads, const Mix &mix, const float *const *dy, float *dx, float *dlast,
                     float *partial, float *dm) {
    over(s[0] * s[1], threads, COUNT * s[2], partial, dm, [&](int64_t begin, int64_t end, float *sums) {
        mix.backward<COUNT>(begin, end, dy, dx, dlast, sums);
    });
}

constexpr float LEAST = 1e-12f;  // a norm below this counts as this

struct Prepare {
    int64_t H, N;
    const float *k, *zw, *za, *w0, *a0, *k_k, *k_a;

    float norm(int64_t at, int64_t channel) const {
        Vec squares = {};
        for (int64_t j = 0; j < N; j += WIDTH) {
            const Vec x = load_some(k + at + j, N - j) * load_some(k_k + channel + j, N - j);
            squares += x * x;
        }
        return std::max(std::sqrt(sum(squares)), LEAST);
    }

    void forward(int64_t t, float *w, float *key, float *minus, float *b) const {
        for (int64_t h = 0; h < H; h++) {
            const int64_t c = h * N, at = t * H * N + c;
            const float scale = 1.0f / norm(at, c);
            for (int64_t j = 0; j < N; j += WIDTH) {
                const int64_t i = at + j, left = N - j;
                const Vec x = load_some(k + i, left), kk = x * load_some(k_k + c + j, left) * scale;
                const Vec rate = sigmoid(load_some(za + i, left) + load_some(a0 + c + j, left));
                store_some(w + i, log_sigmoid(load_some(zw + i, left) + load_some(w0 + c + j, left)) - 0.5f, left);
                store_some(key + i, x + x * (rate - 1.0f) * load_some(k_a + c + j, left), left);
                store_some(minus + i, -kk, left);
                store_some(b + i, kk * rate, left);
            }
        }
    }

    // sums: of w0 a0 k_k k_a
    void backward(int64_t t, const float *dw, const float *dkey, const float *dminus, const float *db, float *dk,
                  float *dzw, float *dza, float *sums) const {
        const int64_t D = H * N;
        for (int64_t h = 0; h < H; h++) {
            const int64_t c = h * N, at = t * D + c;
            const float size = norm(at, c), scale = 1.0f / size;
            Vec along = {};
            for (int64_t j = 0; j < N; j += WIDTH) {
                const int64_t i = at + j, left = N - j;
                const Vec x = load_some(k + i, left), k_ = load_some(k_k + c + j, left), kk = x * k_ * scale;
                const Vec rate = sigmoid(load_some(za + i, left) + load_some(a0 + c + j, left));
                along += kk * (load_some(db + i, left) * rate - load_some(dminus + i, left));
            }
            // where the norm is replaced by the least there is, it does not move
            const float turned = size > LEAST ? sum(along) : 0.0f;
            for (int64_t j = 0; j < N; j += WIDTH) {
                const int64_t i = at + j, left = N - j, channel = c + j;
                const Vec x = load_some(k + i, left), k_ = load_some(k_k + channel, left), kk = x * k_ * scale;
                const Vec rate = sigmoid(load_some(za + i, left) + load_some(a0 + channel, left));
                const Vec ka = load_some(k_a + channel, left);
                const Vec b_ = load_some(db + i, left), key_ = load_some(dkey + i, left);
                const Vec raw = (b_ * rate - load_some(dminus + i, left) - kk * turned) * scale;
                const Vec slope = (b_ * kk + key_ * x * ka) * rate * (1.0f - rate);
                const Vec fade = load_some(dw + i, left) *
                                 sigmoid(-(load_some(zw + i, left) + load_some(w0 + channel, left)));
                store_some(dk + i, key_ + key_ * (rate - 1.0f) * ka + raw * k_, left);
                store_some(dza + i, slope, left);
                store_some(dzw + i, fade, left);
                add(sums + channel, fade, left);
                add(sums + D + channel, slope, left);
                add(sums + 2 * D + channel, raw * x, left);
                add(sums + 3 * D + channel, key_ * x * (rate - 1.0f), left);
            }
        }
    }
};

struct Finish {
    int64_t H, N;
    float eps;
    const float *y, *r, *k, *v, *g, *r_k, *weight, *bias;

    // r k r_k of a head
    float bonus(int64_t at, int64_t c) const {
        Vec total = {};
        for (int64_t j = 0; j < N; j += WIDTH) {
            const int64_t i = at + j, left = N - j;
            total += load_some(r + i, left) * load_some(k + i, left) * load_some(r_k + c + j, left);
        }
        return sum(total);
    }

    void forward(int64_t t, float *out) const {
        for (int64_t h = 0; h < H; h++) {
            const int64_t c = h * N, at = t * H * N + c;
            const Moments of = moments(y + at, N, eps);
            const float bonus_ = bonus(at, c);
            for (int64_t j = 0; j < N; j += WIDTH) {
                const int64_t i = at + j, left = N - j;
                const Vec x = (load_some(y + i, left) - of.mean) * of.scale;
                const Vec normed = x * load_some(weight + c + j, left) + load_some(bias + c + j, left);
                store_some(out + i, (normed + bonus_ * load_some(v + i, left)) * load_some(g + i, left), left);
            }
        }
    }

    struct Gradients {
        float *dy, *dr, *dk, *dv, *dg;
    };

    // sums: of r_k, weight, bias
    void backward(int64_t t, const float *dout, const Gradients &to, float *sums) const {
        const int64_t D = H * N;
        for (int64_t h = 0; h < H; h++) {
            const int64_t c = h * N, at = t * D + c;
            const Moments of = moments(y + at, N, eps);
            const float bonus_ = bonus(at, c);
            Vec total = {}, along = {}, pull = {};
            for (int64_t j = 0; j < N; j += WIDTH) {
                const int64_t i = at + j, left = N - j, channel = c + j;
                const Vec d = load_some(dout + i, left), in = d * load_some(g + i, left);
                const Vec x = only((load_some(y + i, left) - of.mean) * of.scale, left), v_ = load_some(v + i, left);
                const Vec scaled = in * load_some(weight + channel, left);
                const Vec normed = x * load_some(weight + channel, left) + load_some(bias + channel, left);
                total += scaled;
                along += scaled * x;
                pull += in * v_;
                store_some(to.dg + i, d * (normed + bonus_ * v_), left);
                store_some(to.dv + i, in * bonus_, left);
                add(sums + D + channel, in * x, left);
                add(sums + 2 * D + channel, in, left);
            }
            const float mean = sum(total) / N, turned = sum(along) / N, pulled = sum(pull);
            for (int64_t j = 0; j < N; j += WIDTH) {
                const int64_t i = at + j, left = N - j, channel = c + j;
                const Vec x = (load_some(y + i, left) - of.mean) * of.scale;
                const Vec scaled = load_some(dout + i, left) * load_some(g + i, left) * load_some(weight + channel, left);
                const Vec r_ = load_some(r + i, left), k_ = load_some(k + i, left), by = load_some(r_k + channel, left);
                store_some(to.dy + i, (scaled - mean - x * turned) * of.scale, left);
                store_some(to.dr + i, pulled * k_ * by, left);
                store_some(to.dk + i, pulled * r_ * by, left);
                add(sums + channel, pulled * r_ * k_, left);
            }
        }
    }
};

}  // namespace

extern "C" {

// rows of sums that a backward needs for its tasks
int64_t blend_tasks(int64_t tokens) { return blocks(tokens); }

// sizes: B T D and how many mixes
// takes B T D n: x B*T*D, last B*D, m n of D, out n of B*T*D
void mix_forward(const int64_t *s, int threads, const float *x, const float *last, const float *const *m,
                 float *const *out) {
    const Mix mix = {s[1], s[2], x, last, m};
    switch (s[3]) {
        case 1: return mix_forward_of<1>(s, threads, mix, out);
        case 2: return mix_forward_of<2>(s, threads, mix, out);
        case 4: return mix_forward_of<4>(s, threads, mix, out);
        case 5: return mix_forward_of<5>(s, threads, mix, out);
        case MOST: return mix_forward_of<MOST>(s, threads, mix, out);
    }
}

// takes B T D n: x B*T*D, last B*D, m n of D, dy n of B*T*D, dx B*T*D, dlast B*D, partial any, dm n*D
void mix_backward(const int64_t *s, int threads, const float *x, const float *last, const float *const *m,
                  const float *const *dy, float *dx, float *dlast, float *partial, float *dm) {
    const Mix mix = {s[1], s[2], x, last, m};
    switch (s[3]) {
        case 1: return mix_backward_of<1>(s, threads, mix, dy, dx, dlast, partial, dm);
        case 2: return mix_backward_of<2>(s, threads, mix, dy, dx, dlast, partial, dm);
        case 4: return mix_backward_of<4>(s, threads, mix, dy, dx, dlast, partial, dm);
        case 5: return mix_backward_of<5>(s, threads, mix, dy, dx, dlast, partial, dm);
        case MOST: return mix_backward_of<MOST>(s, threads, mix, dy, dx, dlast, partial, dm);
    }
}

// sizes: tokens H N
// takes T H N: k zw za T*H*N, w0 a0 k_k k_a H*N, w key minus b T*H*N
void prepare_forward(const int64_t *s, int threads, const float *k, const float *zw, const float *za, const float *w0,
                     const float *a0, const float *k_k, const float *k_a, float *w, float *key, float *minus,
                     float *b) {
    const Prepare it = {s[1], s[2], k, zw, za, w0, a0, k_k, k_a};
    over(s[0], threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
        for (int64_t t = begin; t < end; t++) it.forward(t, w, key, minus, b);
    });
}

// takes T H N: k zw za T*H*N, w0 a0 k_k k_a H*N, dw dkey dminus db dk dzw dza T*H*N, partial any, total 4*H*N
void prepare_backward(const int64_t *s, int threads, const float *k, const float *zw, const float *za, const float *w0,
                      const float *a0, const float *k_k, const float *k_a, const float *dw, const float *dkey,
                      const float *dminus, const float *db, float *dk, float *dzw, float *dza, float *partial,
                      float *total) {
    const Prepare it = {s[1], s[2], k, zw, za, w0, a0, k_k, k_a};
    over(s[0], threads, 4 * s[1] * s[2], partial, total, [&](int64_t begin, int64_t end, float *sums) {
        for (int64_t t = begin; t < end; t++) it.backward(t, dw, dkey, dminus, db, dk, dzw, dza, sums);
    });
}

// sizes: tokens D
// takes T D: v first z T*D, v0 D, out T*D
void lean_forward(const int64_t *s, int threads, const float *v, const float *first, const float *z, const float *v0,
                  float *out) {
    over(s[0], threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
        for (int64_t t = begin; t < end; t++) {
            for (int64_t j = 0; j < s[1]; j += WIDTH) {
                const int64_t i = t * s[1] + j, left = s[1] - j;
                const Vec x = load_some(v + i, left), to = load_some(first + i, left);
                store_some(out + i, x + (to - x) * sigmoid(load_some(z + i, left) + load_some(v0 + j, left)), left);
            }
        }
    });
}

// takes T D: v first z T*D, v0 D, dout dv dfirst dz T*D, partial any, dv0 D
void lean_backward(const int64_t *s, int threads, const float *v, const float *first, const float *z, const float *v0,
                   const float *dout, float *dv, float *dfirst, float *dz, float *partial, float *dv0) {
    over(s[0], threads, s[1], partial, dv0, [&](int64_t begin, int64_t end, float *sums) {
        for (int64_t t = begin; t < end; t++) {
            for (int64_t j = 0; j < s[1]; j += WIDTH) {
                const int64_t i = t * s[1] + j, left = s[1] - j;
                const Vec d = load_some(dout + i, left), far = load_some(first + i, left) - load_some(v + i, left);
                const Vec part = sigmoid(load_some(z + i, left) + load_some(v0 + j, left));
                const Vec slope = d * far * part * (1.0f - part);
                store_some(dv + i, d - d * part, left);
                store_some(dfirst + i, d * part, left);
                store_some(dz + i, slope, left);
                add(sums + j, slope, left);
            }
        }
    });
}

// sizes: tokens H N
// takes T H N: y r k v g T*H*N, r_k weight bias H*N, eps, out T*H*N
void finish_forward(const int64_t *s, int threads, const float *y, const float *r, const float *k, const float *v,
                    const float *g, const float *r_k, const float *weight, const float *bias, float eps, float *out) {
    const Finish it = {s[1], s[2], eps, y, r, k, v, g, r_k, weight, bias};
    over(s[0], threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
        for (int64_t t = begin; t < end; t++) it.forward(t, out);
    });
}

// takes T H N: y r k v g T*H*N, r_k weight bias H*N, eps, dout dy dr dk dv dg T*H*N, partial any, total 3*H*N
void finish_backward(const int64_t *s, int threads, const float *y, const float *r, const float *k, const float *v,
                     const float *g, const float *r_k, const float *weight, const float *bias, float eps,
                     const float *dout, float *dy, float *dr, float *dk, float *dv, float *dg, float *partial,
                     float *total) {
    const Finish it = {s[1], s[2], eps, y, r, k, v, g, r_k, weight, bias};
    over(s[0], threads, 3 * s[1] * s[2], partial, total, [&](int64_t begin, int64_t end, float *sums) {
        for (int64_t t = begin; t < end; t++) it.backward(t, dout, {dy, dr, dk, dv, dg}, sums);
    });
}

// sizes: how many numbers. max(x, 0)^2
// takes n: x out n
void square_forward(const int64_t *s, int threads, const float *x, float *out) {
    each(s[0], threads, [&](int64_t i, int64_t left) {
        const Vec now = load_some(x + i, left), up = now < 0.0f ? Vec{} : now;
        store_some(out + i, up * up, left);
    });
}

// takes n: x dout dx n
void square_backward(const int64_t *s, int threads, const float *x, const float *dout, float *dx) {
    each(s[0], threads, [&](int64_t i, int64_t left) {
        const Vec now = load_some(x + i, left), up = now < 0.0f ? Vec{} : now;
        store_some(dx + i, (up + up) * load_some(dout + i, left), left);
    });
}

}  // extern "C"
