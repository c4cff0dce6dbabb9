// What surrounds the recurrences channel by channel on a GPU, in one pass each, with its gradient;
// rwkvpipe/kernel/blend.py and gate.py have the formulas in PyTorch. Tensors are in fp32 or bf16, sums in fp32.

#include "grid.cuh"

namespace {

constexpr int MOST = 6;   // mixes of one input
constexpr int RUN = 32;   // tokens that a thread goes through, of one channel
constexpr int WIDTH = 256;

struct Nothing {};

struct Mixing {
    static constexpr int THREADS = WIDTH, FLOATS = 0;
    using Threads = Block<Nothing, WIDTH>;
    int64_t B, T, D, count;
    bool half, half_out;  // of x, last and m; of what comes out, and of its gradient
    const void *x, *last, *m[MOST];

    EITHER int64_t runs() const { return (B * T + RUN - 1) / RUN; }
    EITHER int64_t tiles() const { return (D + WIDTH - 1) / WIDTH; }

    // f(first token of a run, the one after its last, channel)
    template <class F>
    ON_GPU void over(int64_t block, Threads &threads, F f) const {
        threads.each([&](int thread, Nothing &) {
            const int64_t begin = block / tiles() * RUN, channel = block % tiles() * WIDTH + thread;
            if (channel < D) f(begin, begin + RUN < B * T ? begin + RUN : B * T, channel);
        });
    }

    // of the token before, or what was before the row
    ON_GPU float before(int64_t token, int64_t channel) const {
        return token % T ? get(x, (token - 1) * D + channel, half) : get(last, token / T * D + channel, half);
    }
};

struct MixForward : Mixing {
    void *out[MOST];

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        over(block, threads, [&](int64_t begin, int64_t end, int64_t channel) {
            float share[MOST], was = before(begin, channel);
#pragma unroll
            for (int i = 0; i < MOST; i++) share[i] = i < count ? get(m[i], channel, half) : 0.0f;
            for (int64_t token = begin; token < end; token++) {
                if (token % T == 0) was = before(token, channel);
                const int64_t at = token * D + channel;
                const float now = get(x, at, half);
#pragma unroll
                for (int i = 0; i < MOST; i++)
                    if (i < count) put(out[i], at, half_out, now + (was - now) * share[i]);
                was = now;
            }
        });
    }
};

// dx_t = sum of dy_t (1 - m) + dy_{t+1} m; sums of each run for dm
struct MixBackward : Mixing {
    const void *dy[MOST];
    void *dx, *dlast;
    float *sums;  // (runs, count, D)

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        over(block, threads, [&](int64_t begin, int64_t end, int64_t channel) {
            float share[MOST], dm[MOST] = {}, next = 0.0f, now = get(x, (end - 1) * D + channel, half);
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                share[i] = i < count ? get(m[i], channel, half) : 0.0f;
                if (i < count && end < B * T && end % T) next += get(dy[i], end * D + channel, half_out) * share[i];
            }
            for (int64_t token = end - 1; token >= begin; token--) {
                const float was = before(token, channel);
                const int64_t at = token * D + channel;
                float whole = 0.0f, shifted = 0.0f;
#pragma unroll
                for (int i = 0; i < MOST; i++) {
                    if (i >= count) continue;
                    const float g = get(dy[i], at, half_out);
                    whole += g, shifted += g * share[i], dm[i] += g * (was - now);
                }
                put(dx, at, half, whole - shifted + next);
                if (token % T == 0) {
                    put(dlast, token / T * D + channel, half, shifted);
                    next = 0.0f;
                    if (token) now = get(x, at - D, half);  // the row before ends there
                } else {
                    next = shifted, now = was;
                }
            }
#pragma unroll
            for (int i = 0; i < MOST; i++)
                if (i < count) sums[(begin / RUN * count + i) * D + channel] = dm[i];
        });
    }
};

// max(x, 0)^2, or its gradient
struct Square {
    static constexpr int THREADS = WIDTH, FLOATS = 0, EACH = 8;
    using Threads = Block<Nothing, WIDTH>;
    int64_t count;
    bool half;
    const void *x, *dy;
    void *out;

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        threads.each([&](int thread, Nothing &) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int64_t at = (block * EACH + i) * WIDTH + thread;
                if (at >= count) continue;
                const float number = get(x, at, half), up = number < 0.0f ? 0.0f : number;
                put(out, at, half, dy ? 2.0f * up * get(dy, at, half) : up * up);
            }
        });
    }
};

// v, moved towards `first` by the share sigmoid(z + v0), or its gradient
struct Leaning {
    static constexpr int THREADS = WIDTH, FLOATS = 0;
    using Threads = Block<Nothing, WIDTH>;
    enum { V, FIRST, Z, V0 };
    int64_t tokens, D, halves;
    const void *v, *first, *z, *v0;

    EITHER int64_t tiles() const { return (D + WIDTH - 1) / WIDTH; }
    EITHER int64_t blocks() const { return (tokens + RUN - 1) / RUN * tiles(); }
    ON_GPU bool half(int tensor) const { return halves >> tensor & 1; }

    // f(place in the tensors, value, how far it is to go, share) for the tokens of a block, a channel a thread
    template <class F>
    ON_GPU void over(int64_t block, int64_t channel, F f) const {
        const int64_t begin = block / tiles() * RUN, end = begin + RUN < tokens ? begin + RUN : tokens;
        const float by = get(v0, channel, half(V0));
#pragma unroll 4
        for (int64_t at = begin * D + channel; at < end * D; at += D) {
            const float value = get(v, at, half(V));
            f(at, value, get(first, at, half(FIRST)) - value, 1.0f / (1.0f + expf(-(get(z, at, half(Z)) + by))));
        }
    }
};

struct LeanForward : Leaning {
    void *out;

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        threads.each([&](int thread, Nothing &) {
            const int64_t channel = block % tiles() * WIDTH + thread;
            if (channel >= D) return;
            over(block, channel, [&](int64_t at, float value, float far, float part) {
                put(out, at, half(V), value + far * part);
            });
        });
    }
};

struct LeanBackward : Leaning {
    const void *dout;
    void *dv, *dfirst, *dz;
    float *sums;  // (runs, D)

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        threads.each([&](int thread, Nothing &) {
            const int64_t channel = block % tiles() * WIDTH + thread;
            if (channel >= D) return;
            float sum = 0.0f;
            over(block, channel, [&](int64_t at, float, float far, float part) {
                const float d = get(dout, at, half(V)), slope = d * far * part * (1.0f - part);
                put(dv, at, half(V), d - d * part);
                put(dfirst, at, half(FIRST), d * part);
                put(dz, at, half(Z), slope);
                sum += slope;
            });
            sums[block / tiles() * D + channel] = sum;
        });
    }
};

Mixing mixing(const int64_t *z, const void *x, const void *last, const void *const *m) {
    Mixing found = {z[0], z[1], z[2], z[3], z[4] != 0, z[5] != 0, x, last, {}};
    for (int64_t i = 0; i < z[3]; i++) found.m[i] = m[i];
    return found;
}

}  // namespace

// sizes: B T D, how many mixes, whether what comes in is bf16, and what comes out. Given back are 0, the GPU's error, or
// -1 for too many mixes.
extern "C" {

// floats of the sums that the backward wants, and tokens that each is of
int64_t mix_sums(const int64_t *z) { return (z[0] * z[1] + RUN - 1) / RUN * z[3] * z[2]; }

// takes B T D n /x /out: x B*T*D, last B*D, m n of D, out n of B*T*D
int mix_forward(const int64_t *z, int64_t stream, const void *x, const void *last, const void *const *m,
                void *const *out) {
    if (z[3] > MOST) return -1;
    MixForward kernel = {mixing(z, x, last, m), {}};
    for (int64_t i = 0; i < z[3]; i++) kernel.out[i] = out[i];
    return launch(kernel, kernel.runs() * kernel.tiles(), stream);
}

// takes B T D n /x /dy: x B*T*D, last B*D, m n of D, dy n of B*T*D, dx B*T*D, dlast B*D, sums any
int mix_backward(const int64_t *z, int64_t stream, const void *x, const void *last, const void *const *m,
                 const void *const *dy, void *dx, void *dlast, float *sums) {
    if (z[3] > MOST) return -1;
    MixBackward kernel = {mixing(z, x, last, m), {}, dx, dlast, sums};
    for (int64_t i = 0; i < z[3]; i++) kernel.dy[i] = dy[i];
    return launch(kernel, kernel.runs() * kernel.tiles(), stream);
}

// sizes: tokens D, and a bit for each of v first z v0 that is bf16; gradients are like what they are of, out like v
// takes tokens D /v/first/z/v0: v first z tokens*D, v0 D, out tokens*D
int lean_forward(const int64_t *s, int64_t stream, const void *v, const void *first, const void *z, const void *v0,
                 void *out) {
    const LeanForward kernel = {{s[0], s[1], s[2], v, first, z, v0}, out};
    return launch(kernel, kernel.blocks(), stream);
}

// floats of the sums for v0, which whoever calls adds up
int64_t lean_sums(const int64_t *s) { return (s[0] + RUN - 1) / RUN * s[1]; }

// takes tokens D /v/first/z/v0: v first z tokens*D, v0 D, dout dv dfirst dz tokens*D, sums any
int lean_backward(const int64_t *s, int64_t stream, const void *v, const void *first, const void *z, const void *v0,
                  const void *dout, void *dv, void *dfirst, void *dz, float *sums) {
    const LeanBackward kernel = {{s[0], s[1], s[2], v, first, z, v0}, dout, dv, dfirst, dz, sums};
    return launch(kernel, kernel.blocks(), stream);
}

// sizes: how many numbers, and whether they are bf16. dy may be null: then it is the value, else the gradient
// takes numbers /x: x dy? out numbers
int square(const int64_t *z, int64_t stream, const void *x, const void *dy, void *out) {
    const int64_t each = Square::EACH * WIDTH;
    return launch(Square{z[0], z[1] != 0, x, dy, out}, (z[0] + each - 1) / each, stream);
}

}  // extern "C"
