// What surrounds RWKV's recurrences head by head on a GPU, in one pass each, with its gradient; rwkvpipe/kernel/blend.py
// and gate.py have the formulas in PyTorch. Tensors are (tokens, D) with D = H N channels, rows that all tokens share
// (D), each in fp32 or bf16; all in between is fp32. A token's numbers do not depend on the tokens beside it.
//
// A block has some heads of RUN tokens, a thread a channel of them. SOME tokens at a time lie in shared memory, where
// each head is summed up in one order: SLICES sums first, then their sum.

#include "grid.cuh"

namespace {

constexpr int WIDTH = 256, RUN = 32, SLICES = 16, MOST = 16;  // MOST: heads of a block
constexpr int ROW = WIDTH + MOST + 4;  // numbers of a token in shared memory: heads lie one apart, in different banks
constexpr float LEAST = 1e-12f;        // a norm below this counts as this

ON_GPU float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
ON_GPU float log_sigmoid(float x) { return (x < 0.0f ? x : 0.0f) - log1pf(expf(-fabsf(x))); }

struct Heads {
    static constexpr int THREADS = WIDTH;
    int64_t tokens, H, N, halves;

    EITHER int64_t together() const { return WIDTH / N < MOST ? WIDTH / N : MOST; }
    EITHER int64_t tiles() const { return (H + together() - 1) / together(); }
    EITHER int64_t blocks() const { return (tokens + RUN - 1) / RUN * tiles(); }
    ON_GPU bool half(int tensor) const { return halves >> tensor & 1; }
    ON_GPU float from(const void *x, int tensor, int64_t at) const { return get(x, at, half(tensor)); }
    ON_GPU void into(void *x, int tensor, int64_t at, float found) const { put(x, at, half(tensor), found); }

    // a thread's channel of D, which may be none, its place in a token's numbers, and whether its head begins there
    struct Place {
        int64_t channel, head;
        int spot, base;
        bool there, first;
    };

    ON_GPU Place place(int64_t block, int thread) const {
        const int n = static_cast<int>(N), head = thread / n;
        const int64_t global = block % tiles() * together() + head;
        const bool there = head < together() && global < H;
        return {global * N + thread % n, global, thread + head, head * (n + 1), there, thread % n == 0};
    }

    // f(first token, how many) for SOME tokens of a block's at a time
    template <class F>
    ON_GPU void over(int64_t block, F f) const {
        const int64_t begin = block / tiles() * RUN, end = begin + RUN < tokens ? begin + RUN : tokens;
        for (int64_t t = begin; t < end; t += SOME) f(t, static_cast<int>(end - t < SOME ? end - t : SOME));
    }

    // f(what a thread keeps, t, place in the tensors) for SOME tokens of each thread's channel, from the first on
    template <class Threads, class F>
    ON_GPU void each(Threads &threads, int64_t first, F f) const {
        threads.each([&](int, auto &own) {
            if (!own.at.there) return;
#pragma unroll
            for (int t = 0; t < SOME; t++) f(own, t, (first + t) * H * N + own.at.channel);
        });
    }

    // Each head of `rows` times SOME rows becomes its sum, at its first place. With `spread` the first SOME rows become
    // means, and the SOME after them sums of squares of what is beside the means.
    template <class Threads>
    ON_GPU void add_up(Threads &threads, float *shared, int rows, bool spread) const {
        const int n = static_cast<int>(N), heads = static_cast<int>(together());
        const int slices = n < SLICES ? n : SLICES, each = heads * slices, apart = WIDTH / each;
        threads.each([&](int thread, auto &) {
            if (thread / each >= apart) return;
            const int slice = thread % slices;
            for (int row = thread / each; row < rows * SOME; row += apart) {
                if (spread && row >= SOME && row < 2 * SOME) continue;
                float *x = shared + row * ROW + thread % each / slices * (n + 1);
                float sum = 0.0f, count = 0.0f, squares = 0.0f;
                for (int i = slice; i < n; i += slices) sum += x[i], count += 1.0f;
                if (spread && row < SOME) {
                    sum /= count;
                    for (int i = slice; i < n; i += slices) squares += (x[i] - sum) * (x[i] - sum);
                    x[SOME * ROW + slice] = squares;
                }
                x[slice] = sum;  // which no other slice reads
            }
        });
        threads.each([&](int thread, auto &) {
            for (int i = thread; i < rows * SOME * heads; i += WIDTH) {
                const int row = i / heads;
                if (spread && row >= SOME && row < 2 * SOME) continue;
                float *x = shared + row * ROW + i % heads * (n + 1), *z = x + SOME * ROW, sum = 0.0f, squares = 0.0f;
                if (spread && row < SOME) {
                    for (int k = 0; k < slices; k++) sum += x[k] * static_cast<float>((n - k + slices - 1) / slices);
                    sum /= static_cast<float>(n);
                    for (int k = 0; k < slices; k++) {
                        const float by = x[k] - sum;
                        squares += z[k] + static_cast<float>((n - k + slices - 1) / slices) * by * by;
                    }
                    z[0] = squares;
                } else {
                    for (int k = 0; k < slices; k++) sum += x[k];
                }
                x[0] = sum;
            }
        });
    }

    // (runs, COUNT, D): what a thread found for its channel's rows
    template <int COUNT>
    ON_GPU void keep(float *sums, int64_t block, Place at, const float *found) const {
        if (!at.there) return;
#pragma unroll
        for (int i = 0; i < COUNT; i++) sums[(block / tiles() * COUNT + i) * H * N + at.channel] = found[i];
    }
};

// decay, key, -kk and kk rate of RWKV-7 from keys and what low ranks say of decay and rate
struct Preparing : Heads {
    enum { K, ZW, ZA, W0, A0, KK, KA, W, OUT };  // OUT: key, -kk, kk rate
    const void *k, *zw, *za, *w0, *a0, *k_k, *k_a;
    struct Rows {
        float w0, a0, k_k, k_a;
    };

    ON_GPU Rows rows(Place at) const {
        if (!at.there) return {};
        return {from(w0, W0, at.channel), from(a0, A0, at.channel), from(k_k, KK, at.channel), from(k_a, KA, at.channel)};
    }
};

struct PrepareForward : Preparing {
    struct Own {
        Place at;
        Rows by;
        float kk[SOME], rate[SOME];
    };
    using Threads = Block<Own, WIDTH>;
    static constexpr int FLOATS = SOME * ROW;
    void *w, *key, *minus, *b;
    float *norms;  // (tokens, H), for the backward; or null

    ON_GPU void work(int64_t block, Threads &threads, float *shared) const {
        threads.each([&](int thread, Own &own) { own.at = place(block, thread), own.by = rows(own.at); });
        over(block, [&](int64_t first, int count) {
            each(threads, first, [&](Own &own, int t, int64_t i) {
                const float x = t < count ? from(k, K, i) : 0.0f;
                own.kk[t] = x * own.by.k_k;
                shared[t * ROW + own.at.spot] = own.kk[t] * own.kk[t];
                if (t >= count) return;
                own.rate[t] = sigmoid(from(za, ZA, i) + own.by.a0);
                into(w, W, i, log_sigmoid(from(zw, ZW, i) + own.by.w0) - 0.5f);
                into(key, OUT, i, x + x * (own.rate[t] - 1.0f) * own.by.k_a);
            });
            add_up(threads, shared, 1, false);
            each(threads, first, [&](Own &own, int t, int64_t i) {
                if (t >= count) return;
                const float root = sqrtf(shared[t * ROW + own.at.base]), norm = root < LEAST ? LEAST : root;
                const float kk = own.kk[t] / norm;
                into(minus, OUT, i, -kk);
                into(b, OUT, i, kk * own.rate[t]);
                if (norms && own.at.first) norms[(first + t) * H + own.at.head] = norm;
            });
        });
    }
};

struct PrepareBackward : Preparing {
    enum { FADE, SLOPE, RAW, AMOUNT, COUNT };  // sums for w0, a0, k_k, k_a
    struct Own {
        Place at;
        Rows by;
        float x[SOME], rate[SOME], kk[SOME], pull[SOME], sums[COUNT];
    };
    using Threads = Block<Own, WIDTH>;
    static constexpr int FLOATS = SOME * ROW;
    const float *norms;
    const void *dw, *dkey, *dminus, *db;
    void *dk, *dzw, *dza;
    float *sums;

    ON_GPU void work(int64_t block, Threads &threads, float *shared) const {
        threads.each([&](int thread, Own &own) {
            own.at = place(block, thread), own.by = rows(own.at);
            for (int i = 0; i < COUNT; i++) own.sums[i] = 0.0f;
        });
        over(block, [&](int64_t first, int count) {
            each(threads, first, [&](Own &own, int t, int64_t i) {
                own.x[t] = own.rate[t] = own.kk[t] = own.pull[t] = 0.0f;
                if (t < count) {
                    own.x[t] = from(k, K, i);
                    own.kk[t] = own.x[t] * own.by.k_k / norms[(first + t) * H + own.at.head];
                    own.rate[t] = sigmoid(from(za, ZA, i) + own.by.a0);
                    own.pull[t] = from(db, OUT, i) * own.rate[t] - from(dminus, OUT, i);
                    const float fade = from(dw, W, i) * sigmoid(-(from(zw, ZW, i) + own.by.w0));
                    own.sums[FADE] += fade;
                    into(dzw, ZW, i, fade);
                }
                shared[t * ROW + own.at.spot] = own.kk[t] * own.pull[t];
            });
            add_up(threads, shared, 1, false);
            each(threads, first, [&](Own &own, int t, int64_t i) {
                if (t >= count) return;
                const float norm = norms[(first + t) * H + own.at.head], x = own.x[t], rate = own.rate[t];
                // where the norm is replaced by the least there is, it does not move
                const float turned = norm > LEAST ? shared[t * ROW + own.at.base] : 0.0f;
                const float raw = (own.pull[t] - own.kk[t] * turned) / norm;
                const float key = from(dkey, OUT, i), bent = key * (rate - 1.0f);
                const float slope = (from(db, OUT, i) * own.kk[t] + key * x * own.by.k_a) * rate * (1.0f - rate);
                into(dk, K, i, key + bent * own.by.k_a + raw * own.by.k_k);
                into(dza, ZA, i, slope);
                own.sums[SLOPE] += slope, own.sums[RAW] += raw * x, own.sums[AMOUNT] += bent * x;
            });
        });
        threads.each([&](int, Own &own) { keep<COUNT>(sums, block, own.at, own.sums); });
    }
};

// Each head of y normalised, with a bonus of the token for itself, times the gate; without r there is no bonus, and the
// gate is g sigmoid(g).
struct Finishing : Heads {
    enum { Y, R, K, V, G, RK, WEIGHT, BIAS };
    enum { MEAN, SCALE, BONUS, FOUND };
    float eps;
    const void *y, *r, *k, *v, *g, *r_k, *weight, *bias;
    struct Rows {
        float r_k, weight, bias;
    };

    ON_GPU Rows rows(Place at) const {
        if (!at.there) return {};
        return {r ? from(r_k, RK, at.channel) : 0.0f, from(weight, WEIGHT, at.channel), from(bias, BIAS, at.channel)};
    }

    ON_GPU float gate(float x) const { return r ? x : x * sigmoid(x); }
    ON_GPU float slope(float x) const {
        const float part = sigmoid(x);
        return r ? 1.0f : part * (1.0f + x * (1.0f - part));
    }
};

struct FinishForward : Finishing {
    struct Own {
        Place at;
        Rows by;
        float y[SOME], v[SOME], g[SOME];
    };
    using Threads = Block<Own, WIDTH>;
    static constexpr int FLOATS = 3 * SOME * ROW;  // means, squares, bonus
    void *out;
    float *found;  // (tokens, H, FOUND), for the backward; or null

    ON_GPU void work(int64_t block, Threads &threads, float *shared) const {
        threads.each([&](int thread, Own &own) { own.at = place(block, thread), own.by = rows(own.at); });
        over(block, [&](int64_t first, int count) {
            each(threads, first, [&](Own &own, int t, int64_t i) {
                const bool now = t < count, more = now && r;
                own.y[t] = now ? from(y, Y, i) : 0.0f, own.g[t] = now ? from(g, G, i) : 0.0f;
                own.v[t] = more ? from(v, V, i) : 0.0f;
                shared[t * ROW + own.at.spot] = own.y[t];
                shared[(2 * SOME + t) * ROW + own.at.spot] = more ? from(r, R, i) * from(k, K, i) * own.by.r_k : 0.0f;
            });
            add_up(threads, shared, 3, true);
            each(threads, first, [&](Own &own, int t, int64_t i) {
                if (t >= count) return;
                const float mean = shared[t * ROW + own.at.base], bonus = shared[(2 * SOME + t) * ROW + own.at.base];
                const float squares = shared[(SOME + t) * ROW + own.at.base];
                const float scale = 1.0f / sqrtf(squares / static_cast<float>(N) + eps);
                const float normed = (own.y[t] - mean) * scale * own.by.weight + own.by.bias;
                into(out, G, i, (normed + bonus * own.v[t]) * gate(own.g[t]));
                if (!found || !own.at.first) return;
                float *to = found + ((first + t) * H + own.at.head) * FOUND;
                to[MEAN] = mean, to[SCALE] = scale, to[BONUS] = bonus;
            });
        });
    }
};

struct FinishBackward : Finishing {
    enum { OF_RK, OF_WEIGHT, OF_BIAS, COUNT };
    struct Own {
        Place at;
        Rows by;
        float x[SOME], scaled[SOME], sums[COUNT];
    };
    using Threads = Block<Own, WIDTH>;
    static constexpr int FLOATS = 3 * SOME * ROW;  // of what is scaled, of it along x, of the bonus
    const float *found;
    const void *dout;
    void *dy, *dr, *dk, *dv, *dg;
    float *sums;

    ON_GPU void work(int64_t block, Threads &threads, float *shared) const {
        threads.each([&](int thread, Own &own) {
            own.at = place(block, thread), own.by = rows(own.at);
            for (int i = 0; i < COUNT; i++) own.sums[i] = 0.0f;
        });
        over(block, [&](int64_t first, int count) {
            each(threads, first, [&](Own &own, int t, int64_t i) {
                float pull = 0.0f;
                own.x[t] = own.scaled[t] = 0.0f;
                if (t < count) {
                    const float *of = found + ((first + t) * H + own.at.head) * FOUND, z = from(g, G, i);
                    const float d = from(dout, G, i), in = d * gate(z), value = r ? from(v, V, i) : 0.0f;
                    own.x[t] = (from(y, Y, i) - of[MEAN]) * of[SCALE];
                    own.scaled[t] = in * own.by.weight, pull = in * value;
                    into(dg, G, i, d * (own.x[t] * own.by.weight + own.by.bias + of[BONUS] * value) * slope(z));
                    if (r) into(dv, V, i, in * of[BONUS]);
                    own.sums[OF_WEIGHT] += in * own.x[t], own.sums[OF_BIAS] += in;
                }
                shared[t * ROW + own.at.spot] = own.scaled[t];
                shared[(SOME + t) * ROW + own.at.spot] = own.scaled[t] * own.x[t];
                shared[(2 * SOME + t) * ROW + own.at.spot] = pull;
            });
            add_up(threads, shared, 3, false);
            each(threads, first, [&](Own &own, int t, int64_t i) {
                if (t >= count) return;
                const float n = static_cast<float>(N), scale = found[((first + t) * H + own.at.head) * FOUND + SCALE];
                const float mean = shared[t * ROW + own.at.base] / n, turned = shared[(SOME + t) * ROW + own.at.base] / n;
                into(dy, Y, i, (own.scaled[t] - mean - own.x[t] * turned) * scale);
                if (!r) return;
                const float bonus = shared[(2 * SOME + t) * ROW + own.at.base], r_ = from(r, R, i), k_ = from(k, K, i);
                into(dr, R, i, bonus * k_ * own.by.r_k);
                into(dk, K, i, bonus * r_ * own.by.r_k);
                own.sums[OF_RK] += bonus * r_ * k_;
            });
        });
        threads.each([&](int, Own &own) { keep<COUNT>(sums, block, own.at, own.sums); });
    }
};

Heads heads(const int64_t *z) { return {z[0], z[1], z[2], z[3]}; }

}  // namespace

// sizes: tokens H N, and a bit for each tensor that is in bf16, in the order in which they are given, the gradients like
// what they are of; N is at most 128. Given back are 0, the GPU's error, or -1 for heads that are too wide.
extern "C" {

// floats of the sums of each RUN tokens, for as many rows as there are after the other sizes; whoever calls adds them up
int64_t heads_sums(const int64_t *z) { return (z[0] + RUN - 1) / RUN * z[4] * z[1] * z[2]; }

// takes tokens H N /k/zw/za/w0/a0/k_k/k_a/w/key: k zw za tokens*H*N, w0 a0 k_k k_a H*N, w key minus b tokens*H*N,
// norms? tokens*H
int prepare_forward(const int64_t *z, int64_t stream, const void *k, const void *zw, const void *za, const void *w0,
                    const void *a0, const void *k_k, const void *k_a, void *w, void *key, void *minus, void *b,
                    float *norms) {
    if (z[2] > WIDTH / 2) return -1;
    const PrepareForward kernel = {{heads(z), k, zw, za, w0, a0, k_k, k_a}, w, key, minus, b, norms};
    return launch(kernel, kernel.blocks(), stream);
}

// takes tokens H N /k/zw/za/w0/a0/k_k/k_a/dw/dkey: k zw za tokens*H*N, w0 a0 k_k k_a H*N, norms tokens*H, dw dkey
// dminus db dk dzw dza tokens*H*N, sums any
int prepare_backward(const int64_t *z, int64_t stream, const void *k, const void *zw, const void *za, const void *w0,
                     const void *a0, const void *k_k, const void *k_a, const float *norms, const void *dw,
                     const void *dkey, const void *dminus, const void *db, void *dk, void *dzw, void *dza,
                     float *sums) {
    if (z[2] > WIDTH / 2) return -1;
    const PrepareBackward kernel = {
        {heads(z), k, zw, za, w0, a0, k_k, k_a}, norms, dw, dkey, dminus, db, dk, dzw, dza, sums};
    return launch(kernel, kernel.blocks(), stream);
}

// r, k, v and r_k may be null: then there is no bonus, and the gate is g sigmoid(g)
// takes tokens H N /y/r/k/v/g/r_k/weight/bias: y r? k? v? g tokens*H*N, r_k? weight bias H*N, eps, out tokens*H*N,
// found? 3*tokens*H
int finish_forward(const int64_t *z, int64_t stream, const void *y, const void *r, const void *k, const void *v,
                   const void *g, const void *r_k, const void *weight, const void *bias, float eps, void *out,
                   float *found) {
    if (z[2] > WIDTH / 2) return -1;
    const FinishForward kernel = {{heads(z), eps, y, r, k, v, g, r_k, weight, bias}, out, found};
    return launch(kernel, kernel.blocks(), stream);
}

// takes tokens H N /y/r/k/v/g/r_k/weight/bias: y r? k? v? g tokens*H*N, r_k? weight bias H*N, eps, found 3*tokens*H,
// dout dy dr? dk? dv? dg tokens*H*N, sums any
int finish_backward(const int64_t *z, int64_t stream, const void *y, const void *r, const void *k, const void *v,
                    const void *g, const void *r_k, const void *weight, const void *bias, float eps,
                    const float *found, const void *dout, void *dy, void *dr, void *dk, void *dv, void *dg,
                    float *sums) {
    if (z[2] > WIDTH / 2) return -1;
    const FinishBackward kernel = {
        {heads(z), eps, y, r, k, v, g, r_k, weight, bias}, found, dout, dy, dr, dk, dv, dg, sums};
    return launch(kernel, kernel.blocks(), stream);
}

}  // extern "C"
