// Each head of what a recurrence gives normalised, with a bonus of the token for itself, times the gate, and the
// gradient, in one pass each on a GPU; rwkvpipe/kernel/blend.py and gate.py have the formulas in PyTorch.

#include "heads.cuh"

namespace {

// without r there is no bonus, and the gate is g sigmoid(g)
enum { Y, R, K, V, G, RK, WEIGHT, BIAS };
enum { MEAN, SCALE, BONUS, FOUND };
constexpr int64_t FINISHED = 1 << Y | 1 << R | 1 << K | 1 << V | 1 << G;

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
        this->walk(*this, block, threads, [&] {
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
        });
    }

    ON_GPU void clear(Own &own) const { own.sums[0] = own.sums[1] = own.squares = 0.0f; }

    ON_GPU void begin(Own &own) const {
        float with[EACH], key[EACH];
        this->from(own.y, this->y, Y, own.at);
        this->from(own.g, this->g, G, own.at);
        if (r) {
            this->from(own.v, this->v, V, own.at);
            this->from(with, r, R, own.at);
            this->from(key, this->k, K, own.at);
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
        threads.alone([&](int, Own &own) { memset(own.sums, 0, sizeof own.sums); });
        this->walk(*this, block, threads,
                   [&] { threads.add_up(this->lanes(), 3, [](Own &own) { return own.all; }); });
        threads.alone([&](int, Own &own) { this->template keep<COUNT>(sums, own.at, own.sums); });
    }

    ON_GPU void clear(Own &own) const { own.all[0] = own.all[1] = own.all[2] = 0.0f; }

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
            this->from(own.k, this->k, K, own.at);
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
        this->into(dk, K, own.at, own.k);
    }
};

// f(the way) of what is finished; `r` may be null
template <class F>
int finished(const int64_t *z, bool all, const void *r, F f) {
    const int64_t kinds = z[3] & FINISHED, none = 1 << R | 1 << K | 1 << V;
    const int64_t alike = r ? kinds : kinds & 1 << Y ? kinds | none : kinds & ~none;
    return by_way<EACH, 0, FINISHED>(alike, z[2] % EACH == 0 && all, f);
}

}  // namespace

// sizes: tokens H N, and a bit for each tensor that is in bf16, in the order in which they are given, the gradients like
// what they are of; N is at most 128. Given back are 0, the GPU's error, or -1 for heads that are too wide.
extern "C" {

// floats of the sums of each run, for as many rows as there are after the other sizes; whoever calls adds them up
int64_t heads_sums(const int64_t *z) {
    const int64_t run = run_of(z[0], z[1] * z[2], SUMMED);
    return (z[0] + run - 1) / run * z[4] * z[1] * z[2];
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
            {heads<Way, FINISHED>(z, 1), eps, y, r, k, v, g, r_k, weight, bias}, out, found};
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
        const FinishBackward<Way> kernel = {{heads<Way, FINISHED>(z, SUMMED), eps, y, r, k, v, g, r_k, weight, bias},
                                            found, dout, dy, dr, dk, dv, dg, sums};
        return launch(kernel, kernel.blocks(), stream);
    });
}

}  // extern "C"
