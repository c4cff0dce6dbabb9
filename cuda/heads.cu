// What surrounds RWKV's recurrences head by head on a GPU, in one pass each, with its gradient; rwkvpipe/kernel/blend.py
// and gate.py have the formulas in PyTorch. Tensors are (tokens, D) with D = H N channels, rows that all tokens share
// (D), each in fp32 or bf16; all in between is fp32. A token's numbers do not depend on the tokens beside it.
//
// A head is a power of two of threads' beside each other, four channels each, of a run of tokens; what is summed over a
// head goes from thread to thread, in one order.

#include "grid.cuh"

namespace {

constexpr int WIDTH = 256, EACH = 4, WIDEST = 128;
constexpr int RUN = 32;          // tokens for which gradients that all share are summed
constexpr float LEAST = 1e-12f;  // a norm below this counts as this

ON_GPU float log_sigmoid(float x) { return (x < 0.0f ? x : 0.0f) - log1pf(expf(-fabsf(x))); }

// `KINDS`: the tensors whose kinds Way may know
template <class Way, int64_t KINDS>
struct Heads {
    static constexpr int THREADS = WIDTH, FLOATS = 0;
    int64_t tokens, H, N, run, halves;
    int shift;  // two to this are the threads of a head

    EITHER int64_t blocks() const { return ((tokens + run - 1) / run * H + (WIDTH >> shift) - 1) / (WIDTH >> shift); }
    EITHER int lanes() const { return 1 << shift; }
    ON_GPU bool half(int tensor) const {
        return (Way::HALVES != ANY && KINDS >> tensor & 1 ? Way::HALVES : halves) >> tensor & 1;
    }

    // Where a thread is: at the first of `count` channels of a head, for `left` tokens more, in the tensors at `at`, in
    // those of one number a head at `mark`.
    struct Place {
        int64_t channel, run, at, mark;
        int count, left;
        bool first;  // of a head's threads
    };

    ON_GPU Place place(int64_t block, int thread) const {
        const int64_t number = (block * WIDTH + thread) >> shift, head = number % H, begin = number / H * run;
        const int lane = thread & (lanes() - 1), n = static_cast<int>(N) - lane * EACH;
        const int64_t channel = head * N + lane * EACH, left = tokens - begin;
        return {channel, number / H, begin * H * N + channel, begin * H + head, n < 0 ? 0 : n < EACH ? n : EACH,
                static_cast<int>(left < 0 ? 0 : left < run ? left : run), lane == 0};
    }

    ON_GPU bool there(const Place &place) const { return place.left > 0 && place.count > 0; }

    ON_GPU void on(Place &place) const { place.left--, place.at += H * N, place.mark += H; }

    ON_GPU void from(float *x, const void *tensor, int which, const Place &place, int64_t at) const {
        if constexpr (Way::WIDE == EACH) {
            fetch<EACH>(x, tensor, at, half(which));
        } else {
#pragma unroll
            for (int c = 0; c < EACH; c++) x[c] = c < place.count ? get(tensor, at + c, half(which)) : 0.0f;
        }
    }

    ON_GPU void from(float *x, const void *tensor, int which, const Place &place) const {
        from(x, tensor, which, place, place.at);
    }

    ON_GPU void row(float *x, const void *tensor, int which, const Place &place) const {
        if (place.count) from(x, tensor, which, place, place.channel);
    }

    ON_GPU void into(void *tensor, int which, const Place &place, const float *x) const {
        if constexpr (Way::WIDE == EACH) {
            lay_down<EACH>(tensor, place.at, half(which), x);
        } else {
#pragma unroll
            for (int c = 0; c < EACH; c++)
                if (c < place.count) put(tensor, place.at + c, half(which), x[c]);
        }
    }

    // (runs, COUNT, D): what a thread found for its channels' rows
    template <int COUNT>
    ON_GPU void keep(float *sums, const Place &place, const float (*found)[EACH]) const {
        if (place.run * run >= tokens) return;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
#pragma unroll
            for (int c = 0; c < EACH; c++)
                if (c < place.count) sums[(place.run * COUNT + i) * H * N + place.channel + c] = found[i][c];
    }
};

// decay, key, -kk and kk rate of RWKV-7 from keys and what low ranks say of decay and rate
enum { K, ZW, ZA, W0, A0, KK, KA, W, OUT };  // OUT: key, -kk, kk rate
constexpr int64_t PREPARED = 1 << K | 1 << ZW | 1 << ZA | 1 << W | 1 << OUT;

template <class Way>
struct Preparing : Heads<Way, PREPARED> {
    using Base = Heads<Way, PREPARED>;
    const void *k, *zw, *za, *w0, *a0, *k_k, *k_a;
    struct Rows {
        float w0[EACH], a0[EACH], k_k[EACH], k_a[EACH];
    };

    ON_GPU void rows(Rows &by, const typename Base::Place &place) const {
        this->row(by.w0, w0, W0, place), this->row(by.a0, a0, A0, place);
        this->row(by.k_k, k_k, KK, place), this->row(by.k_a, k_a, KA, place);
    }
};

template <class Way>
struct PrepareForward : Preparing<Way> {
    struct Own {
        typename Preparing<Way>::Place at;
        typename Preparing<Way>::Rows by;
        float kk[EACH], rate[EACH], square;
    };
    using Threads = Block<Own, WIDTH>;
    void *w, *key, *minus, *b;
    float *norms;  // (tokens, H), for the backward; or null

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        threads.alone([&](int thread, Own &own) {
            own.at = this->place(block, thread);
            this->rows(own.by, own.at);
        });
        for (int64_t t = 0; t < this->run; t++) {
            threads.alone([&](int, Own &own) {
                own.square = 0.0f;
                if (this->there(own.at)) begin(own);
            });
            threads.add_up(this->lanes(), 1, [](Own &own) { return &own.square; });
            threads.alone([&](int, Own &own) {
                if (this->there(own.at)) end(own);
                this->on(own.at);
            });
        }
    }

    ON_GPU void begin(Own &own) const {
        float x[EACH], fade[EACH];
        this->from(x, this->k, K, own.at);
        this->from(own.rate, this->za, ZA, own.at);
        this->from(fade, this->zw, ZW, own.at);
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            own.kk[c] = x[c] * own.by.k_k[c];
            own.square += own.kk[c] * own.kk[c];
            own.rate[c] = sigmoid(own.rate[c] + own.by.a0[c]);
            fade[c] = log_sigmoid(fade[c] + own.by.w0[c]) - 0.5f;
            x[c] += x[c] * (own.rate[c] - 1.0f) * own.by.k_a[c];
        }
        this->into(w, W, own.at, fade);
        this->into(key, OUT, own.at, x);
    }

    ON_GPU void end(Own &own) const {
        const float root = sqrtf(own.square), norm = root < LEAST ? LEAST : root, by = 1.0f / norm;
#pragma unroll
        for (int c = 0; c < EACH; c++) own.kk[c] *= -by, own.rate[c] *= -own.kk[c];
        this->into(minus, OUT, own.at, own.kk);
        this->into(b, OUT, own.at, own.rate);
        if (norms && own.at.first) norms[own.at.mark] = norm;
    }
};

template <class Way>
struct PrepareBackward : Preparing<Way> {
    enum { FADE, SLOPE, RAW, AMOUNT, COUNT };  // sums for w0, a0, k_k, k_a
    struct Own {
        typename Preparing<Way>::Place at;
        typename Preparing<Way>::Rows by;
        float x[EACH], key[EACH], kk[EACH], pull[EACH], sums[COUNT][EACH], norm, turned;
    };
    using Threads = Block<Own, WIDTH>;
    const float *norms;
    const void *dw, *dkey, *dminus, *db;
    void *dk, *dzw, *dza;
    float *sums;

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        threads.alone([&](int thread, Own &own) {
            own.at = this->place(block, thread);
            this->rows(own.by, own.at);
            memset(own.sums, 0, sizeof own.sums);
        });
        for (int64_t t = 0; t < this->run; t++) {
            threads.alone([&](int, Own &own) {
                own.turned = 0.0f;
                if (this->there(own.at)) begin(own);
            });
            threads.add_up(this->lanes(), 1, [](Own &own) { return &own.turned; });
            threads.alone([&](int, Own &own) {
                if (this->there(own.at)) end(own);
                this->on(own.at);
            });
        }
        threads.alone([&](int, Own &own) { this->template keep<COUNT>(sums, own.at, own.sums); });
    }

    ON_GPU void begin(Own &own) const {
        float rate[EACH], fade[EACH], from_w[EACH], from_b[EACH];
        own.norm = norms[own.at.mark];
        this->from(own.x, this->k, K, own.at);
        this->from(rate, this->za, ZA, own.at);
        this->from(fade, this->zw, ZW, own.at);
        this->from(from_w, dw, W, own.at);
        this->from(from_b, db, OUT, own.at);
        this->from(own.pull, dminus, OUT, own.at);
        this->from(own.key, dkey, OUT, own.at);
        const float by = 1.0f / own.norm;
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            own.kk[c] = own.x[c] * own.by.k_k[c] * by;
            rate[c] = sigmoid(rate[c] + own.by.a0[c]);
            own.pull[c] = from_b[c] * rate[c] - own.pull[c];
            own.turned += own.kk[c] * own.pull[c];
            fade[c] = from_w[c] * sigmoid(-(fade[c] + own.by.w0[c]));
            const float bent = own.key[c] * (rate[c] - 1.0f), along = own.key[c] * own.x[c] * own.by.k_a[c];
            rate[c] = (from_b[c] * own.kk[c] + along) * rate[c] * (1.0f - rate[c]);
            own.key[c] += bent * own.by.k_a[c];
            own.sums[FADE][c] += fade[c], own.sums[SLOPE][c] += rate[c], own.sums[AMOUNT][c] += bent * own.x[c];
        }
        this->into(dzw, ZW, own.at, fade);
        this->into(dza, ZA, own.at, rate);
    }

    ON_GPU void end(Own &own) const {
        // where the norm is replaced by the least there is, it does not move
        const float turned = own.norm > LEAST ? own.turned : 0.0f, by = 1.0f / own.norm;
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            const float raw = (own.pull[c] - own.kk[c] * turned) * by;
            own.key[c] += raw * own.by.k_k[c], own.sums[RAW][c] += raw * own.x[c];
        }
        this->into(dk, K, own.at, own.key);
    }
};

// Each head of y normalised, with a bonus of the token for itself, times the gate; without r there is no bonus, and the
// gate is g sigmoid(g).
enum { Y, R, K_, V, G, RK, WEIGHT, BIAS };
enum { MEAN, SCALE, BONUS, FOUND };
constexpr int64_t FINISHED = 1 << Y | 1 << R | 1 << K_ | 1 << V | 1 << G;

template <class Way>
struct Finishing : Heads<Way, FINISHED> {
    using Base = Heads<Way, FINISHED>;
    float eps;
    const void *y, *r, *k, *v, *g, *r_k, *weight, *bias;
    struct Rows {
        float r_k[EACH], weight[EACH], bias[EACH];
    };

    ON_GPU void rows(Rows &by, const typename Base::Place &place) const {
        if (r) this->row(by.r_k, r_k, RK, place);
        this->row(by.weight, weight, WEIGHT, place), this->row(by.bias, bias, BIAS, place);
    }
};

template <class Way>
struct FinishForward : Finishing<Way> {
    using Base = Finishing<Way>;
    using Base::r;
    struct Own {
        typename Base::Place at;
        typename Base::Rows by;
        float y[EACH], v[EACH], g[EACH], sums[2], squares;  // sums: of y, of the bonus
    };
    using Threads = Block<Own, WIDTH>;
    void *out;
    float *found;  // (tokens, H, FOUND), for the backward; or null

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        threads.alone([&](int thread, Own &own) {
            own.at = this->place(block, thread);
            this->rows(own.by, own.at);
        });
        for (int64_t t = 0; t < this->run; t++) {
            threads.alone([&](int, Own &own) {
                own.sums[0] = own.sums[1] = own.squares = 0.0f;
                if (this->there(own.at)) begin(own);
            });
            threads.add_up(this->lanes(), 2, [](Own &own) { return own.sums; });
            threads.alone([&](int, Own &own) {
                own.sums[0] /= static_cast<float>(this->N);
                if (!this->there(own.at)) return;
#pragma unroll
                for (int c = 0; c < EACH; c++) {
                    own.y[c] -= own.sums[0];
                    if (Way::WIDE == EACH || c < own.at.count) own.squares += own.y[c] * own.y[c];
                }
            });
            threads.add_up(this->lanes(), 1, [](Own &own) { return &own.squares; });
            threads.alone([&](int, Own &own) {
                if (this->there(own.at)) end(own);
                this->on(own.at);
            });
        }
    }

    ON_GPU void begin(Own &own) const {
        float with[EACH], key[EACH];
        this->from(own.y, this->y, Y, own.at);
        this->from(own.g, this->g, G, own.at);
        if (r) {
            this->from(own.v, this->v, V, own.at);
            this->from(with, r, R, own.at);
            this->from(key, this->k, K_, own.at);
        }
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            own.sums[0] += own.y[c];
            if (r) own.sums[1] += with[c] * key[c] * own.by.r_k[c];
        }
    }

    ON_GPU void end(Own &own) const {
        const float scale = 1.0f / sqrtf(own.squares / static_cast<float>(this->N) + this->eps), bonus = own.sums[1];
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            own.y[c] = own.y[c] * scale * own.by.weight[c] + own.by.bias[c];
            own.y[c] = r ? (own.y[c] + bonus * own.v[c]) * own.g[c] : own.y[c] * (own.g[c] * sigmoid(own.g[c]));
        }
        this->into(out, G, own.at, own.y);
        if (!found || !own.at.first) return;
        float *to = found + own.at.mark * FOUND;
        to[MEAN] = own.sums[0], to[SCALE] = scale, to[BONUS] = bonus;
    }
};

template <class Way>
struct FinishBackward : Finishing<Way> {
    using Base = Finishing<Way>;
    using Base::r;
    enum { OF_RK, OF_WEIGHT, OF_BIAS, COUNT };
    struct Own {
        typename Base::Place at;
        typename Base::Rows by;
        float x[EACH], scaled[EACH], r[EACH], k[EACH], sums[COUNT][EACH], scale;
        float all[3];  // of what is scaled, of it along x, of the bonus
    };
    using Threads = Block<Own, WIDTH>;
    const float *found;
    const void *dout;
    void *dy, *dr, *dk, *dv, *dg;
    float *sums;

    ON_GPU void work(int64_t block, Threads &threads, float *) const {
        threads.alone([&](int thread, Own &own) {
            own.at = this->place(block, thread);
            this->rows(own.by, own.at);
            memset(own.sums, 0, sizeof own.sums);
        });
        for (int64_t t = 0; t < this->run; t++) {
            threads.alone([&](int, Own &own) {
                own.all[0] = own.all[1] = own.all[2] = 0.0f;
                if (this->there(own.at)) begin(own);
            });
            threads.add_up(this->lanes(), 3, [](Own &own) { return own.all; });
            threads.alone([&](int, Own &own) {
                if (this->there(own.at)) end(own);
                this->on(own.at);
            });
        }
        threads.alone([&](int, Own &own) { this->template keep<COUNT>(sums, own.at, own.sums); });
    }

    ON_GPU void begin(Own &own) const {
        const float *of = found + own.at.mark * FOUND, mean = of[MEAN], bonus = of[BONUS];
        float d[EACH], z[EACH], value[EACH] = {};
        own.scale = of[SCALE];
        this->from(own.x, this->y, Y, own.at);
        this->from(d, dout, G, own.at);
        this->from(z, this->g, G, own.at);
        if (r) {
            this->from(value, this->v, V, own.at);
            this->from(own.r, r, R, own.at);
            this->from(own.k, this->k, K_, own.at);
        }
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            const float part = r ? 0.0f : sigmoid(z[c]), gate = r ? z[c] : z[c] * part, in = d[c] * gate;
            own.x[c] = (own.x[c] - mean) * own.scale;
            own.scaled[c] = in * own.by.weight[c];
            own.all[0] += own.scaled[c], own.all[1] += own.scaled[c] * own.x[c], own.all[2] += in * value[c];
            z[c] = d[c] * (own.x[c] * own.by.weight[c] + own.by.bias[c] + bonus * value[c]) *
                   (r ? 1.0f : part * (1.0f + z[c] * (1.0f - part)));
            value[c] = in * bonus;
            own.sums[OF_WEIGHT][c] += in * own.x[c], own.sums[OF_BIAS][c] += in;
        }
        this->into(dg, G, own.at, z);
        if (r) this->into(dv, V, own.at, value);
    }

    ON_GPU void end(Own &own) const {
        const float by = 1.0f / static_cast<float>(this->N), mean = own.all[0] * by, turned = own.all[1] * by;
#pragma unroll
        for (int c = 0; c < EACH; c++) own.x[c] = (own.scaled[c] - mean - own.x[c] * turned) * own.scale;
        this->into(dy, Y, own.at, own.x);
        if (!r) return;
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            const float key = own.all[2] * own.k[c], with = own.all[2] * own.r[c];
            own.sums[OF_RK][c] += key * own.r[c];
            own.r[c] = key * own.by.r_k[c], own.k[c] = with * own.by.r_k[c];
        }
        this->into(dr, R, own.at, own.r);
        this->into(dk, K_, own.at, own.k);
    }
};

template <class Way, int64_t KINDS>
Heads<Way, KINDS> heads(const int64_t *z, int64_t run) {
    int shift = 0;
    while (EACH << shift < z[2]) shift++;
    return {z[0], z[1], z[2], run, z[3], shift};
}

int64_t shortest(const int64_t *z) { return run_of(z[0] * z[1] * z[2] / EACH, RUN); }

// f(the way) of what is prepared: in fp32, in bf16 beside a decay in fp32, all in bf16
template <class F>
int prepared(const int64_t *z, bool all, F f) {
    constexpr int64_t NARROW = PREPARED & ~(1 << W);
    return by_way<EACH, 0, NARROW, PREPARED>(z[3] & PREPARED, z[2] % EACH == 0 && all, f);
}

// f(the way) of what is finished; `r` may be null
template <class F>
int finished(const int64_t *z, bool all, const void *r, F f) {
    const int64_t kinds = z[3] & FINISHED, none = 1 << R | 1 << K_ | 1 << V;
    const int64_t alike = r ? kinds : kinds & 1 << Y ? kinds | none : kinds & ~none;
    return by_way<EACH, 0, FINISHED>(alike, z[2] % EACH == 0 && all, f);
}

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
    if (z[2] > WIDEST) return -1;
    return prepared(z, wide(k, zw, za, w0, a0, k_k, k_a, w, key, minus, b), [&](auto way) {
        using Way = decltype(way);
        const PrepareForward<Way> kernel = {
            {heads<Way, PREPARED>(z, shortest(z)), k, zw, za, w0, a0, k_k, k_a}, w, key, minus, b, norms};
        return launch(kernel, kernel.blocks(), stream);
    });
}

// takes tokens H N /k/zw/za/w0/a0/k_k/k_a/dw/dkey: k zw za tokens*H*N, w0 a0 k_k k_a H*N, norms tokens*H, dw dkey
// dminus db dk dzw dza tokens*H*N, sums any
int prepare_backward(const int64_t *z, int64_t stream, const void *k, const void *zw, const void *za, const void *w0,
                     const void *a0, const void *k_k, const void *k_a, const float *norms, const void *dw,
                     const void *dkey, const void *dminus, const void *db, void *dk, void *dzw, void *dza,
                     float *sums) {
    if (z[2] > WIDEST) return -1;
    const bool all = wide(k, zw, za, w0, a0, k_k, k_a, dw, dkey, dminus, db, dk, dzw, dza);
    return prepared(z, all, [&](auto way) {
        using Way = decltype(way);
        const PrepareBackward<Way> kernel = {{heads<Way, PREPARED>(z, RUN), k, zw, za, w0, a0, k_k, k_a}, norms, dw,
                                             dkey, dminus, db, dk, dzw, dza, sums};
        return launch(kernel, kernel.blocks(), stream);
    });
}

// r, k, v and r_k may be null: then there is no bonus, and the gate is g sigmoid(g)
// takes tokens H N /y/r/k/v/g/r_k/weight/bias: y r? k? v? g tokens*H*N, r_k? weight bias H*N, eps, out tokens*H*N,
// found? 3*tokens*H
int finish_forward(const int64_t *z, int64_t stream, const void *y, const void *r, const void *k, const void *v,
                   const void *g, const void *r_k, const void *weight, const void *bias, float eps, void *out,
                   float *found) {
    if (z[2] > WIDEST) return -1;
    return finished(z, wide(y, r, k, v, g, r_k, weight, bias, out), r, [&](auto way) {
        using Way = decltype(way);
        const FinishForward<Way> kernel = {
            {heads<Way, FINISHED>(z, shortest(z)), eps, y, r, k, v, g, r_k, weight, bias}, out, found};
        return launch(kernel, kernel.blocks(), stream);
    });
}

// takes tokens H N /y/r/k/v/g/r_k/weight/bias: y r? k? v? g tokens*H*N, r_k? weight bias H*N, eps, found 3*tokens*H,
// dout dy dr? dk? dv? dg tokens*H*N, sums any
int finish_backward(const int64_t *z, int64_t stream, const void *y, const void *r, const void *k, const void *v,
                    const void *g, const void *r_k, const void *weight, const void *bias, float eps,
                    const float *found, const void *dout, void *dy, void *dr, void *dk, void *dv, void *dg,
                    float *sums) {
    if (z[2] > WIDEST) return -1;
    return finished(z, wide(y, r, k, v, g, r_k, weight, bias, dout, dy, dr, dk, dv, dg), r, [&](auto way) {
        using Way = decltype(way);
        const FinishBackward<Way> kernel = {{heads<Way, FINISHED>(z, RUN), eps, y, r, k, v, g, r_k, weight, bias},
                                            found, dout, dy, dr, dk, dv, dg, sums};
        return launch(kernel, kernel.blocks(), stream);
    });
}

}  // extern "C"
