// The recurrences of RWKV-6 and 5.2 and their gradients on any GPU, token by token; rwkvpipe/kernel/wkv6.py and
// wkv5.py have the references.
//
//     d_t = exp(-exp(w_t));  y_t = S_{t-1} r_t + (r_t . u . k_t) v_t;  S_t = S_{t-1} diag(d_t) + v_t k_t^T
//
// r w k v y are (B, T, H, N), u is (H, N), in fp32 or bf16; RWKV-5.2 has one w for all tokens, (H, N). States are
// (B, H, N, N), [value][key], in fp32. One block is one head of one row. Thread (x, p) holds EACH numbers of a row x
// of the state, or of a column x; sums go through shared memory in one order.
//
// With G the gradient of S_t, and o = r . u . k, m = v . dy of a token:
//     dk = G^T v + u r m, dv = G k + o dy, dd = sum over values of G S_{t-1}, dr = S_{t-1}^T dy + u k m, du += r k m,
//     dw = -dd d exp(w), and the gradient of S_{t-1} is G diag(d) + dy r^T.
// The forward keeps one state in KEEP tokens; the backward walks on from it, by columns, and writes down one in SOME.
// What has no token of its own (du, and dw of RWKV-5.2) comes out for each row, in fp32: whoever calls adds them up.

#include "grid.cuh"

namespace {

enum { R, W, K, V, U };  // bits of Sizes::halves

// what both directions take, and the tokens [t, t + SOME) in shared memory
template <class Shape>
struct Tokens : Shape {
    using Shape::EACH, Shape::N, Shape::PARTS, Shape::THREADS;
    enum { r_, rate_, d_, k_, v_, y_, VECTORS };  // y_: the gradient of y
    static constexpr int BONUS = VECTORS * SOME * N, PLACE = BONUS + N;
    Sizes s;
    bool one_w;  // for all tokens
    const void *r, *w, *k, *v, *u;

    ON_GPU static float *row(float *shared, int which, int t) { return shared + (which * SOME + t) * N; }

    ON_GPU int64_t at_w(int64_t head, int64_t t) const { return one_w ? head % s.H * s.N : s.at(head, t); }

    template <class Team>
    ON_GPU void load(Team &block, float *shared, int64_t head, int64_t first, const void *dy) const {
        block.each([&](int thread, auto &) {
            for (int i = thread; i < SOME * N; i += THREADS) {
                const int x = i % N, t = i / N;
                const bool there = x < s.N && first + t < s.T;
                const int64_t at = s.at(head, first + t) + x;
                const float rate = there ? rate_of(get(w, at_w(head, first + t) + x, s.half(W))) : 0.0f;
                row(shared, r_, t)[x] = there ? get(r, at, s.half(R)) : 0.0f;
                row(shared, rate_, t)[x] = rate;
                row(shared, d_, t)[x] = expf(-rate);
                row(shared, k_, t)[x] = there ? get(k, at, s.half(K)) : 0.0f;
                row(shared, v_, t)[x] = there ? get(v, at, s.half(V)) : 0.0f;
                if (dy) row(shared, y_, t)[x] = there ? get(dy, at, s.half(V)) : 0.0f;
                if (t == 0) shared[BONUS + x] = x < s.N ? get(u, head % s.H * s.N + x, s.half(U)) : 0.0f;
            }
        });
    }

    ON_GPU static float total(const float *parts, int x) {
        float found = parts[x];
        for (int p = 1; p < PARTS; p++) found += parts[p * N + x];
        return found;
    }

    // a row of a matrix of a head, or a column
    ON_GPU void take(float *S, const float *from, int x, int p, bool column) const {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int o = p * EACH + e;
            S[e] = x < s.N && o < s.N ? from[column ? o * s.N + x : x * s.N + o] : 0.0f;
        }
    }

    ON_GPU void give(float *to, const float *S, int x, int p, bool column) const {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int o = p * EACH + e;
            if (x < s.N && o < s.N) to[column ? o * s.N + x : x * s.N + o] = S[e];
        }
    }
};

template <class Shape>
struct Forward : Tokens<Shape> {
    using Base = Tokens<Shape>;
    using Base::EACH, Base::N, Base::PARTS, Base::THREADS, Base::s, Base::row;
    struct Own {
        float S[Shape::EACH];
    };
    static constexpr int FLOATS = Base::PLACE + SOME * PARTS * N;
    using Threads = Block<Own, Shape::THREADS>;
    const float *start;
    void *y;
    float *end, *kept;  // kept may be null, if no backward will follow

    ON_GPU void work(int64_t head, Threads &block, float *shared) const {
        const int64_t square = s.N * s.N;
        block.each([&](int thread, Own &own) { this->take(own.S, start + head * square, thread % N, thread / N, 0); });
        for (int64_t first = 0; first < s.T; first += SOME) {
            const int tokens = static_cast<int>(s.T - first < SOME ? s.T - first : SOME);
            float *to = kept && first % KEEP == 0 ? kept + (head * s.segments(KEEP) + first / KEEP) * square : nullptr;
            this->load(block, shared, head, first, nullptr);
            block.each([&](int thread, Own &own) {
                const int x = thread % N, p = thread / N;
                if (to) this->give(to, own.S, x, p, false);
                for (int t = 0; t < tokens; t++) shared[Base::PLACE + (t * PARTS + p) * N + x] = step(own, shared, t, x, p);
            });
            block.each([&](int thread, auto &) {
                for (int i = thread; i < tokens * N; i += THREADS) {
                    const int x = i % N, t = i / N;
                    const float found = Base::total(shared + Base::PLACE + t * PARTS * N, x);
                    if (x < s.N) put(y, s.at(head, first + t) + x, s.half(V), found);
                }
            });
        }
        block.each([&](int thread, Own &own) { this->give(end + head * square, own.S, thread % N, thread / N, 0); });
    }

    // this part of y of row x; the state of the token before becomes that of token t
    ON_GPU static float step(Own &own, float *shared, int t, int x, int p) {
        const float *r = row(shared, Base::r_, t) + p * EACH, *d = row(shared, Base::d_, t) + p * EACH;
        const float *k = row(shared, Base::k_, t) + p * EACH, *u = shared + Base::BONUS + p * EACH;
        const float v = row(shared, Base::v_, t)[x];
        float y_ = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const float written = v * k[e];
            y_ += r[e] * (own.S[e] + u[e] * written);
            own.S[e] = own.S[e] * d[e] + written;
        }
        return y_;
    }
};

template <class Shape>
struct Backward : Tokens<Shape> {
    using Base = Tokens<Shape>;
    using Base::EACH, Base::N, Base::PARTS, Base::s, Base::row;
    struct Own {
        float S[Shape::EACH], rows[Shape::EACH], columns[Shape::EACH];  // the state; its gradient, twice
        float du, dw;                                                   // of channel x, over all tokens
    };
    enum { dv_, dr_, dk_, dd_, own_, met_, SUMS };
    static constexpr int FLOATS = Base::PLACE + SUMS * PARTS * N;
    using Threads = Block<Own, Shape::THREADS>;
    const float *kept;
    const void *dy;
    const float *dend;
    void *dr, *dw, *dk, *dv;
    float *du, *dstart, *room;

    // floats of `room` for one head
    EITHER static int64_t wanted(int64_t n) { return KEEP / SOME * n * n; }

    ON_GPU void work(int64_t head, Threads &block, float *shared) const {
        const int64_t square = s.N * s.N;
        float *written = room + head * wanted(s.N);
        block.each([&](int thread, Own &own) {
            this->take(own.rows, dend + head * square, thread % N, thread / N, false);
            this->take(own.columns, dend + head * square, thread % N, thread / N, true);
            own.du = own.dw = 0.0f;
        });
        for (int64_t segment = s.segments(KEEP) - 1; segment >= 0; segment--) {
            const int64_t begin = segment * KEEP, end = begin + KEEP < s.T ? begin + KEEP : s.T;
            const float *from = kept + (head * s.segments(KEEP) + segment) * square;
            block.each([&](int thread, Own &own) { this->take(own.S, from, thread % N, thread / N, true); });
            for (int64_t first = begin; first < end; first += SOME) {
                this->load(block, shared, head, first, nullptr);
                block.each([&](int thread, Own &own) {
                    const int x = thread % N, p = thread / N;
                    this->give(written + (first - begin) / SOME * square, own.S, x, p, true);
                    for (int t = 0; t < SOME; t++) after(own.S, shared, t, x, p);
                });
            }
            for (int64_t part = (end - begin - 1) / SOME; part >= 0; part--) {
                const int64_t first = begin + part * SOME, left = end - first;
                this->load(block, shared, head, first, dy);
                for (int t = static_cast<int>(left < SOME ? left : SOME) - 1; t >= 0; t--)
                    back(block, shared, head, first, t, written + part * square);
            }
        }
        block.each([&](int thread, Own &own) {
            const int x = thread % N;
            this->give(dstart + head * square, own.rows, x, thread / N, false);
            if (thread >= N || x >= s.N) return;
            du[head * s.N + x] = own.du;
            if (this->one_w) static_cast<float *>(dw)[head * s.N + x] = own.dw;
        });
    }

    ON_GPU static float *part(float *shared, int which, int p) { return shared + Base::PLACE + (which * PARTS + p) * N; }
    ON_GPU static float sum(float *shared, int which, int x) { return Base::total(part(shared, which, 0), x); }

    ON_GPU static float sum_of_all(float *shared, int which) {
        float found = 0.0f;
        for (int x = 0; x < N; x++) found += part(shared, which, 0)[x];
        return found;
    }

    // the gradients of one token; `from`: the state before the first token in shared memory
    ON_GPU void back(Threads &block, float *shared, int64_t head, int64_t first, int t, const float *from) const {
        block.each([&](int thread, Own &own) {
            const int x = thread % N, p = thread / N;
            this->take(own.S, from, x, p, true);
            for (int q = 0; q < t; q++) after(own.S, shared, q, x, p);
            by_columns(own, shared, t, x, p);
            by_rows(own, shared, t, x, p);
            if (p) return;
            const float u = shared[Base::BONUS + x];
            part(shared, own_, 0)[x] = row(shared, Base::r_, t)[x] * u * row(shared, Base::k_, t)[x];
            part(shared, met_, 0)[x] = row(shared, Base::v_, t)[x] * row(shared, Base::y_, t)[x];
        });
        block.each([&](int thread, Own &own) {
            if (thread >= N) return;
            const int x = thread;
            const float o = sum_of_all(shared, own_), m = sum_of_all(shared, met_), u = shared[Base::BONUS + x];
            const float r = row(shared, Base::r_, t)[x], k = row(shared, Base::k_, t)[x];
            const float lost = row(shared, Base::d_, t)[x] * row(shared, Base::rate_, t)[x];
            const float dw_x = -sum(shared, dd_, x) * lost;
            own.du += r * k * m;
            own.dw += dw_x;
            if (x >= s.N) return;
            const int64_t at = s.at(head, first + t) + x;
            put(dr, at, s.half(R), sum(shared, dr_, x) + u * k * m);
            put(dk, at, s.half(K), sum(shared, dk_, x) + u * r * m);
            put(dv, at, s.half(V), sum(shared, dv_, x) + o * row(shared, Base::y_, t)[x]);
            if (!this->one_w) put(dw, at, s.half(W), dw_x);
        });
    }

    // column x of the state after token t
    ON_GPU static void after(float *S, float *shared, int t, int x, int p) {
        const float d = row(shared, Base::d_, t)[x], k = row(shared, Base::k_, t)[x];
        const float *v = row(shared, Base::v_, t) + p * EACH;
#pragma unroll
        for (int e = 0; e < EACH; e++) S[e] = S[e] * d + v[e] * k;
    }

    ON_GPU static void by_columns(Own &own, float *shared, int t, int x, int p) {
        const float d = row(shared, Base::d_, t)[x], r = row(shared, Base::r_, t)[x];
        const float *v = row(shared, Base::v_, t) + p * EACH, *y = row(shared, Base::y_, t) + p * EACH;
        float dr_x = 0.0f, dk_x = 0.0f, dd_x = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            dr_x += own.S[e] * y[e];
            dk_x += own.columns[e] * v[e];
            dd_x += own.columns[e] * own.S[e];
            own.columns[e] = own.columns[e] * d + y[e] * r;
        }
        part(shared, dr_, p)[x] = dr_x, part(shared, dk_, p)[x] = dk_x, part(shared, dd_, p)[x] = dd_x;
    }

    ON_GPU static void by_rows(Own &own, float *shared, int t, int x, int p) {
        const float y = row(shared, Base::y_, t)[x];
        const float *r = row(shared, Base::r_, t) + p * EACH, *d = row(shared, Base::d_, t) + p * EACH;
        const float *k = row(shared, Base::k_, t) + p * EACH;
        float dv_x = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            dv_x += own.rows[e] * k[e];
            own.rows[e] = own.rows[e] * d[e] + y * r[e];
        }
        part(shared, dv_, p)[x] = dv_x;
    }
};

}  // namespace

// sizes: B T H N, a bit for each of r w k v u that is in bf16 (y is as v, a gradient as its tensor), and whether there
// is one w for all tokens. Given back are 0, the GPU's error, or -1 for heads that are too wide.
extern "C" {

// floats that the forward keeps, and that the backward wants as room
int64_t wkv6_kept(const int64_t *z) {
    return z[0] * z[2] * Sizes{z[0], z[1], z[2], z[3], z[4]}.segments(KEEP) * z[3] * z[3];
}

int64_t wkv6_room(const int64_t *z) { return KEEP / SOME * z[3] * z[3] * z[0] * z[2]; }

// takes B T H N /r/w/k/v/u one_w parts: r B*T*H*N, w H*N if one_w else B*T*H*N, k v B*T*H*N, u H*N, start B*H*N*N, y
// B*T*H*N, end B*H*N*N, kept? any
int wkv6_forward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                 const void *u, const float *start, void *y, float *end, float *kept) {
    return sized(z[3], [&](auto shape) {
        using Shape = decltype(shape);
        return launch(Forward<Shape>{{{}, {z[0], z[1], z[2], z[3], z[4]}, z[5] != 0, r, w, k, v, u}, start, y, end, kept},
                      z[0] * z[2], stream);
    });
}

// du is (B, H, N) in fp32, as is dw where there is one w for all tokens
// takes B T H N /r/w/k/v/u one_w parts: r B*T*H*N, w H*N if one_w else B*T*H*N, k v B*T*H*N, u H*N, kept any, dy
// B*T*H*N, dend B*H*N*N, dr parts*B*T*H*N, dw parts*B*H*N if one_w else parts*B*T*H*N, dk parts*B*T*H*N, dv B*T*H*N,
// du parts*B*H*N, dstart B*H*N*N, room any
int wkv6_backward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                  const void *u, const float *kept, const void *dy, const float *dend, void *dr, void *dw, void *dk,
                  void *dv, float *du, float *dstart, float *room) {
    return sized(z[3], [&](auto shape) {
        using Shape = decltype(shape);
        return launch(Backward<Shape>{{{}, {z[0], z[1], z[2], z[3], z[4]}, z[5] != 0, r, w, k, v, u}, kept, dy, dend, dr,
                                      dw, dk, dv, du, dstart, room},
                      z[0] * z[2], stream);
    });
}

}  // extern "C"
