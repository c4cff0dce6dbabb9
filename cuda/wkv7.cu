// The recurrence of RWKV-7 and its gradient on any GPU, token by token; rwkvpipe/kernel/wkv7.py has the reference.
//
//     d_t = exp(-exp(w_t));  u_t = S_{t-1} a_t;  S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T;  y_t = S_t r_t
//
// r w k v a b y are (B, T, H, N) in fp32 or bf16, states (B, H, N, N), [value][key], in fp32. One block is one head of
// one row. Thread (x, p) holds EACH numbers of a row x of the state, or of a column x; sums over a whole row or column
// go through shared memory, part by part, in one order: the same bits every time.
//
// With G the gradient of S_t and L = G + dy_t r_t^T:
//     dk = L^T v, dv = L k, db = L^T u, du = L b, da = S_{t-1}^T du, dr = S_t^T dy, dd = sum over values of L S_{t-1},
//     dw = -dd d exp(w), and the gradient of S_{t-1} is L diag(d) + du a^T.
// The forward keeps one state in KEEP tokens. The backward walks on from it, by rows, which finds each u again, and
// writes down one state in SOME; from there columns find theirs again, forward. No decay is divided by.

#include "grid.cuh"

namespace {

enum { R, W, K, V, A, B_ };  // bits of Sizes::halves

// The state by rows: the forward, and the first half of the backward.
template <class Shape>
struct Rows : Shape {
    using Shape::EACH, Shape::N, Shape::PARTS, Shape::THREADS;
    enum { r_, d_, k_, v_, b_, a_, VECTORS };  // a of one token more
    static constexpr int FLOATS = (VECTORS * SOME + 1) * N + 4 * PARTS * N;
    Sizes s;
    const void *r, *w, *k, *v, *a, *b;

    ON_GPU static float *row(float *shared, int which, int t) { return shared + (which * SOME + t) * N; }

    // tokens [t, t + SOME) of all tensors into shared memory, 0 where there are none
    template <class Team>
    ON_GPU void load(Team &block, float *shared, int64_t head, int64_t t, int64_t end) const {
        block.each([&](int thread, auto &) {
            for (int i = thread; i < (SOME + 1) * N; i += THREADS) {
                const int x = i % N, token = i / N;
                const bool there = x < s.N && t + token < end;
                const int64_t at = s.at(head, t + token) + x;
                row(shared, a_, token)[x] = there ? get(a, at, s.half(A)) : 0.0f;
                if (token == SOME) continue;
                row(shared, r_, token)[x] = there ? get(r, at, s.half(R)) : 0.0f;
                row(shared, d_, token)[x] = there ? expf(-rate_of(get(w, at, s.half(W)))) : 0.0f;
                row(shared, k_, token)[x] = there ? get(k, at, s.half(K)) : 0.0f;
                row(shared, v_, token)[x] = there ? get(v, at, s.half(V)) : 0.0f;
                row(shared, b_, token)[x] = there ? get(b, at, s.half(B_)) : 0.0f;
            }
        });
    }

    // Tokens [begin, end) from the state in own.S on. A state before each `every` of them goes to `states`, y and u
    // where they may go; own.S is then the last state.
    template <class Team>
    ON_GPU void walk(Team &block, float *shared, int64_t head, int64_t begin, int64_t end, int every,
                     float *states, void *y, float *u) const {
        float *sums = shared + (VECTORS * SOME + 1) * N;  // [u, y][even and odd tokens][PARTS][N]
        for (int64_t first = begin; first < end; first += SOME) {
            load(block, shared, head, first, end);
            if (first == begin) {
                block.each([&](int thread, auto &own) {
                    const int x = thread % N, p = thread / N;
                    float u_ = 0.0f;
#pragma unroll
                    for (int e = 0; e < EACH; e++) u_ += own.S[e] * row(shared, a_, 0)[p * EACH + e];
                    sums[p * N + x] = u_;
                });
            }
            const int tokens = static_cast<int>(end - first < SOME ? end - first : SOME);
            for (int t = 0; t < tokens; t++) {
                const int64_t token = first + t - begin;
                const int odd = static_cast<int>(token & 1);
                block.each([&](int thread, auto &own) {
                    const int x = thread % N, p = thread / N;
                    if (states && token % every == 0) {
                        float *to = states + token / every * s.N * s.N;
#pragma unroll
                        for (int e = 0; e < EACH; e++)
                            if (x < s.N && p * EACH + e < s.N) to[x * s.N + p * EACH + e] = own.S[e];
                    }
                    if (y && token && p == 0 && x < s.N)
                        put(y, s.at(head, begin + token - 1) + x, s.half(V), total(sums + (2 + !odd) * PARTS * N, x));
                    const float u_ = total(sums + odd * PARTS * N, x), v_x = row(shared, v_, t)[x];
                    if (u && p == 0) u[token * N + x] = u_;
                    const float *r_p = row(shared, r_, t) + p * EACH, *d_p = row(shared, d_, t) + p * EACH;
                    const float *k_p = row(shared, k_, t) + p * EACH, *b_p = row(shared, b_, t) + p * EACH;
                    const float *a_p = row(shared, a_, t + 1) + p * EACH;
                    float y_ = 0.0f, next = 0.0f;
#pragma unroll
                    for (int e = 0; e < EACH; e++) {
                        own.S[e] = own.S[e] * d_p[e] + u_ * b_p[e] + v_x * k_p[e];
                        y_ += own.S[e] * r_p[e];
                        next += own.S[e] * a_p[e];
                    }
                    sums[((2 + odd) * PARTS + p) * N + x] = y_;
                    sums[(!odd * PARTS + p) * N + x] = next;
                });
            }
        }
        const int last = static_cast<int>((end - begin - 1) & 1);
        block.each([&](int thread, auto &) {
            const int x = thread % N;
            if (y && thread < N && x < s.N)
                put(y, s.at(head, end - 1) + x, s.half(V), total(sums + (2 + last) * PARTS * N, x));
        });
    }

    ON_GPU static float total(const float *parts, int x) {
        float found = parts[x];
        for (int p = 1; p < PARTS; p++) found += parts[p * N + x];
        return found;
    }

    ON_GPU void take(float *S, const float *from, int x, int p) const {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int j = p * EACH + e;
            S[e] = x < s.N && j < s.N ? from[x * s.N + j] : 0.0f;
        }
    }

    ON_GPU void give(float *to, const float *S, int x, int p) const {
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (x < s.N && p * EACH + e < s.N) to[x * s.N + p * EACH + e] = S[e];
    }
};

template <class Shape>
struct Forward : Rows<Shape> {
    using Base = Rows<Shape>;
    using Base::N, Base::s;
    struct Own {
        float S[Shape::EACH];
    };
    using Threads = Block<Own, Shape::THREADS>;
    const float *start;
    void *y;
    float *end, *kept;  // kept may be null, if no backward will follow

    ON_GPU void work(int64_t head, Threads &block, float *shared) const {
        const int64_t square = s.N * s.N;
        block.each([&](int thread, Own &own) { this->take(own.S, start + head * square, thread % N, thread / N); });
        float *states = kept ? kept + head * s.segments(KEEP) * square : nullptr;
        this->walk(block, shared, head, 0, s.T, KEEP, states, y, nullptr);
        block.each([&](int thread, Own &own) { this->give(end + head * square, own.S, thread % N, thread / N); });
    }
};

template <class Shape>
struct Backward : Rows<Shape> {
    using Base = Rows<Shape>;
    using Base::EACH, Base::N, Base::PARTS, Base::THREADS, Base::s;
    struct Own {
        float S[Shape::EACH], rows[Shape::EACH], columns[Shape::EACH];  // the state; its gradient, twice
    };
    enum { r_, d_, k_, v_, b_, a_, u_, y_, rate_, VECTORS };  // y_: the gradient of y
    enum { dv_, du_, dr_, dk_, db_, dd_, da_, SUMS };
    static constexpr int PLACE = VECTORS * SOME * N, OWN = PLACE + SUMS * PARTS * N + N;
    static constexpr int FLOATS = OWN > Base::FLOATS ? OWN : Base::FLOATS;
    using Threads = Block<Own, Shape::THREADS>;
    const float *kept;
    const void *dy;
    const float *dend;
    void *dr, *dw, *dk, *dv, *da, *db;
    float *dstart, *room;

    // floats of `room` for one head: the states that are written down, then the u
    EITHER static int64_t wanted(int64_t n) { return KEEP / SOME * n * n + KEEP * N; }

    ON_GPU void work(int64_t head, Threads &block, float *shared) const {
        const int64_t square = s.N * s.N;
        float *written = room + head * wanted(s.N), *u = written + KEEP / SOME * square;
        block.each([&](int thread, Own &own) {
            const int x = thread % N, p = thread / N;
            this->take(own.rows, dend + head * square, x, p);
            turned(own.columns, dend + head * square, x, p);
        });
        for (int64_t segment = s.segments(KEEP) - 1; segment >= 0; segment--) {
            const int64_t begin = segment * KEEP, end = begin + KEEP < s.T ? begin + KEEP : s.T;
            const float *from = kept + (head * s.segments(KEEP) + segment) * square;
            block.each([&](int thread, Own &own) { this->take(own.S, from, thread % N, thread / N); });
            this->walk(block, shared, head, begin, end, SOME, written, nullptr, u);
            for (int64_t part = (end - begin - 1) / SOME; part >= 0; part--) {
                const int64_t first = begin + part * SOME, left = end - first;
                fetch(block, shared, head, first, left < SOME ? left : SOME, u + part * SOME * N);
                for (int t = static_cast<int>(left < SOME ? left : SOME) - 1; t >= 0; t--)
                    back(block, shared, head, first, t, written + part * square);
            }
        }
        block.each([&](int thread, Own &own) {
            const int x = thread % N, p = thread / N;
            this->give(dstart + head * square, own.rows, x, p);
            if (p == 0) write(da, A, head, 0, x, sum(shared, da_, x));
        });
    }

    ON_GPU static float *row(float *shared, int which, int t) { return shared + (which * SOME + t) * N; }
    ON_GPU static float *part(float *shared, int which, int p) { return shared + PLACE + (which * PARTS + p) * N; }
    ON_GPU static float sum(float *shared, int which, int x) { return Base::total(part(shared, which, 0), x); }

    ON_GPU void write(void *to, int tensor, int64_t head, int64_t t, int x, float number) const {
        if (x < s.N) put(to, s.at(head, t) + x, s.half(tensor), number);
    }

    // a column of a state
    ON_GPU void turned(float *S, const float *from, int x, int p) const {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = p * EACH + e;
            S[e] = x < s.N && i < s.N ? from[i * s.N + x] : 0.0f;
        }
    }

    ON_GPU void fetch(Threads &block, float *shared, int64_t head, int64_t first, int64_t tokens,
                      const float *u) const {
        block.each([&](int thread, auto &) {
            for (int i = thread; i < tokens * N; i += THREADS) {
                const int x = i % N, t = i / N;
                const bool there = x < s.N;
                const int64_t at = s.at(head, first + t) + x;
                const float rate = there ? rate_of(get(this->w, at, s.half(W))) : 0.0f;
                row(shared, r_, t)[x] = there ? get(this->r, at, s.half(R)) : 0.0f;
                row(shared, rate_, t)[x] = rate;
                row(shared, d_, t)[x] = expf(-rate);
                row(shared, k_, t)[x] = there ? get(this->k, at, s.half(K)) : 0.0f;
                row(shared, v_, t)[x] = there ? get(this->v, at, s.half(V)) : 0.0f;
                row(shared, a_, t)[x] = there ? get(this->a, at, s.half(A)) : 0.0f;
                row(shared, b_, t)[x] = there ? get(this->b, at, s.half(B_)) : 0.0f;
                row(shared, y_, t)[x] = there ? get(dy, at, s.half(V)) : 0.0f;
                row(shared, u_, t)[x] = u[i];
            }
        });
    }

    // the gradients of one token; `from`: the state before the first token in shared memory
    ON_GPU void back(Threads &block, float *shared, int64_t head, int64_t first, int t, const float *from) const {
        block.each([&](int thread, Own &own) {
            const int x = thread % N, p = thread / N;
            turned(own.S, from, x, p);
            for (int q = 0; q < t; q++) after(own.S, shared, q, x, p);
            by_columns(own, shared, t, x, p);
            by_rows(own, shared, t, x, p);
        });
        float *du = shared + PLACE + SUMS * PARTS * N;
        block.each([&](int thread, auto &) {
            if (thread >= N) return;
            const int x = thread;
            const int64_t token = first + t;
            du[x] = sum(shared, du_, x);
            const float lost = row(shared, d_, t)[x] * row(shared, rate_, t)[x];
            write(dr, R, head, token, x, sum(shared, dr_, x)), write(dk, K, head, token, x, sum(shared, dk_, x));
            write(dv, V, head, token, x, sum(shared, dv_, x)), write(db, B_, head, token, x, sum(shared, db_, x));
            write(dw, W, head, token, x, -sum(shared, dd_, x) * lost);
            if (token + 1 < s.T) write(da, A, head, token + 1, x, sum(shared, da_, x));
        });
        block.each([&](int thread, Own &own) {
            const int x = thread % N, p = thread / N;
            const float *d = row(shared, d_, t), *a = row(shared, a_, t);
            float da_x = 0.0f;
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int o = p * EACH + e;
                da_x += own.S[e] * du[o];
                own.columns[e] = own.columns[e] * d[x] + du[o] * a[x];
                own.rows[e] = own.rows[e] * d[o] + du[x] * a[o];
            }
            part(shared, da_, p)[x] = da_x;
        });
    }

    // column x of the state after token t
    ON_GPU static void after(float *S, float *shared, int t, int x, int p) {
        const float d = row(shared, d_, t)[x], b = row(shared, b_, t)[x], k = row(shared, k_, t)[x];
        const float *u = row(shared, u_, t) + p * EACH, *v = row(shared, v_, t) + p * EACH;
#pragma unroll
        for (int e = 0; e < EACH; e++) S[e] = S[e] * d + u[e] * b + v[e] * k;
    }

    // the gradient of the state's column becomes L's
    ON_GPU static void by_columns(Own &own, float *shared, int t, int x, int p) {
        const float d = row(shared, d_, t)[x], b = row(shared, b_, t)[x], k = row(shared, k_, t)[x];
        const float r = row(shared, r_, t)[x];
        const float *u = row(shared, u_, t) + p * EACH, *v = row(shared, v_, t) + p * EACH;
        const float *y = row(shared, y_, t) + p * EACH;
        float dr_x = 0.0f, dk_x = 0.0f, db_x = 0.0f, dd_x = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            dr_x += (own.S[e] * d + u[e] * b + v[e] * k) * y[e];
            own.columns[e] += y[e] * r;
            dk_x += own.columns[e] * v[e];
            db_x += own.columns[e] * u[e];
            dd_x += own.columns[e] * own.S[e];
        }
        part(shared, dr_, p)[x] = dr_x, part(shared, dk_, p)[x] = dk_x;
        part(shared, db_, p)[x] = db_x, part(shared, dd_, p)[x] = dd_x;
    }

    // and its row
    ON_GPU static void by_rows(Own &own, float *shared, int t, int x, int p) {
        const float y = row(shared, y_, t)[x];
        const float *r = row(shared, r_, t) + p * EACH, *k = row(shared, k_, t) + p * EACH;
        const float *b = row(shared, b_, t) + p * EACH;
        float dv_x = 0.0f, du_x = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            own.rows[e] += y * r[e];
            dv_x += own.rows[e] * k[e];
            du_x += own.rows[e] * b[e];
        }
        part(shared, dv_, p)[x] = dv_x, part(shared, du_, p)[x] = du_x;
    }
};

}  // namespace

// sizes: B T H N, and a bit for each of r w k v a b that is in bf16 (y is as v, a gradient as its tensor). Given back
// are 0, the GPU's error, or -1 for heads that are too wide.
extern "C" {

#ifndef __CUDACC__
void grid_order(int way) { grid_way = way; }
#endif

// floats that the forward keeps, and that the backward wants as room
int64_t wkv7_kept(const int64_t *z) {
    return z[0] * z[2] * Sizes{z[0], z[1], z[2], z[3], z[4]}.segments(KEEP) * z[3] * z[3];
}

int64_t wkv7_room(const int64_t *z) {
    return sized(z[3], [&](auto shape) { return static_cast<int>(Backward<decltype(shape)>::wanted(z[3])); }) * z[0] *
           z[2];
}

// takes B T H N /r/w/k/v/a/b parts: r w k v a b B*T*H*N, start B*H*N*N, y B*T*H*N, end B*H*N*N, kept? any
int wkv7_forward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                 const void *a, const void *b, const float *start, void *y, float *end, float *kept) {
    return sized(z[3], [&](auto shape) {
        using Shape = decltype(shape);
        return launch(Forward<Shape>{{{}, {z[0], z[1], z[2], z[3], z[4]}, r, w, k, v, a, b}, start, y, end, kept},
                      z[0] * z[2], stream);
    });
}

// takes B T H N /r/w/k/v/a/b parts: r w k v a b B*T*H*N, kept any, dy B*T*H*N, dend B*H*N*N, dr dw dk parts*B*T*H*N,
// dv B*T*H*N, da db parts*B*T*H*N, dstart B*H*N*N, room any
int wkv7_backward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                  const void *a, const void *b, const float *kept, const void *dy, const float *dend, void *dr,
                  void *dw, void *dk, void *dv, void *da, void *db, float *dstart, float *room) {
    return sized(z[3], [&](auto shape) {
        using Shape = decltype(shape);
        return launch(Backward<Shape>{{{}, {z[0], z[1], z[2], z[3], z[4]}, r, w, k, v, a, b}, kept, dy, dend, dr, dw, dk,
                                      dv, da, db, dstart, room},
                      z[0] * z[2], stream);
    });
}

}  // extern "C"
