// What surrounds the recurrence on a GPU, in one pass each, with its gradient; rwkvpipe/kernel/blend.py has the
// formulas in PyTorch. All tensors of a call are of one kind, fp32 or bf16; sums are fp32.

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
    bool half;
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
                    if (i < count) put(out[i], at, half, now + (was - now) * share[i]);
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
                if (i < count && end < B * T && end % T) next += get(dy[i], end * D + channel, half) * share[i];
            }
            for (int64_t token = end - 1; token >= begin; token--) {
                const float was = before(token, channel);
                const int64_t at = token * D + channel;
                float whole = 0.0f, shifted = 0.0f;
#pragma unroll
                for (int i = 0; i < MOST; i++) {
                    if (i >= count) continue;
                    const float g = get(dy[i], at, half);
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

Mixing mixing(const int64_t *z, const void *x, const void *last, const void *const *m) {
    Mixing found = {z[0], z[1], z[2], z[3], z[4] != 0, x, last, {}};
    for (int64_t i = 0; i < z[3]; i++) found.m[i] = m[i];
    return found;
}

}  // namespace

// sizes: B T D, how many mixes, and whether all is bf16. Given back are 0, the GPU's error, or -1 for too many mixes.
extern "C" {

// floats of the sums that the backward wants, and tokens that each is of
int64_t mix_sums(const int64_t *z) { return (z[0] * z[1] + RUN - 1) / RUN * z[3] * z[2]; }

int mix_forward(const int64_t *z, int64_t stream, const void *x, const void *last, const void *const *m,
                void *const *out) {
    if (z[3] > MOST) return -1;
    MixForward kernel = {mixing(z, x, last, m), {}};
    for (int64_t i = 0; i < z[3]; i++) kernel.out[i] = out[i];
    return launch(kernel, kernel.runs() * kernel.tiles(), stream);
}

int mix_backward(const int64_t *z, int64_t stream, const void *x, const void *last, const void *const *m,
                 const void *const *dy, void *dx, void *dlast, float *sums) {
    if (z[3] > MOST) return -1;
    MixBackward kernel = {mixing(z, x, last, m), {}, dx, dlast, sums};
    for (int64_t i = 0; i < z[3]; i++) kernel.dy[i] = dy[i];
    return launch(kernel, kernel.runs() * kernel.tiles(), stream);
}

// sizes: how many numbers, and whether they are bf16. dy may be null: then it is the value, else the gradient
int square(const int64_t *z, int64_t stream, const void *x, const void *dy, void *out) {
    const int64_t each = Square::EACH * WIDTH;
    return launch(Square{z[0], z[1] != 0, x, dy, out}, (z[0] + each - 1) / each, stream);
}

}  // extern "C"
