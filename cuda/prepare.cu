// What RWKV-7's recurrence takes, out of keys and what low ranks say of decay and rate, and its gradient, in one pass
// each on a GPU: decay, key, -kk and kk rate. rwkvpipe/kernel/blend.py has the formulas in PyTorch.

#include "heads.cuh"

namespace {

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
        this->walk(*this, block, threads,
                   [&] { threads.add_up(this->lanes(), 1, [](Own &own) { return &own.square; }); });
    }

    ON_GPU void clear(Own &own) const { own.square = 0.0f; }

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
        threads.alone([&](int, Own &own) { memset(own.sums, 0, sizeof own.sums); });
        this->walk(*this, block, threads,
                   [&] { threads.add_up(this->lanes(), 1, [](Own &own) { return &own.turned; }); });
        threads.alone([&](int, Own &own) { this->template keep<COUNT>(sums, own.at, own.sums); });
    }

    ON_GPU void clear(Own &own) const { own.turned = 0.0f; }

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

// f(the way) of what is prepared: in fp32, in bf16 beside a decay in fp32, all in bf16
template <class F>
int prepared(const int64_t *z, bool all, F f) {
    constexpr int64_t NARROW = PREPARED & ~(1 << W);
    return by_way<EACH, 0, NARROW, PREPARED>(z[3] & PREPARED, z[2] % EACH == 0 && all, f);
}

}  // namespace

// sizes: tokens H N, and a bit for each tensor that is in bf16, in the order in which they are given, the gradients like
// what they are of; N is at most 128. Given back are 0, the GPU's error, or -1 for heads that are too wide.
extern "C" {

// takes tokens H N /k/zw/za/w0/a0/k_k/k_a/w/key: k zw za tokens*H*N, w0 a0 k_k k_a H*N, w key minus b tokens*H*N,
// norms? tokens*H
int prepare_forward(const int64_t *z, int64_t stream, const void *k, const void *zw, const void *za, const void *w0,
                    const void *a0, const void *k_k, const void *k_a, void *w, void *key, void *minus, void *b,
                    float *norms) {
    if (z[2] > WIDEST) return -1;
    return prepared(z, wide(k, zw, za, w0, a0, k_k, k_a, w, key, minus, b), [&](auto way) {
        using Way = decltype(way);
        const PrepareForward<Way> kernel = {
            {heads<Way, PREPARED>(z, 1), k, zw, za, w0, a0, k_k, k_a}, w, key, minus, b, norms};
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
        const PrepareBackward<Way> kernel = {
            {heads<Way, PREPARED>(z, SUMMED), k, zw, za, w0, a0, k_k, k_a}, norms, dw, dkey, dminus, db, dk, dzw, dza, sums};
        return launch(kernel, kernel.blocks(), stream);
    });
}

}  // extern "C"
