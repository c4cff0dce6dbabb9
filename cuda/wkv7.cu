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
// writes down one state in NOTED; from there columns find theirs again, forward. No decay is divided by.

#include "plain.cuh"

namespace {

enum { R, W, K, V, A, B_ };  // bits of Sizes::halves

// The state by rows: the forward, and the first half of the backward.
template <class Shape>
struct Rows : Plain<Shape> {
    using Base = Plain<Shape>;
    using Base::EACH, Base::N, Base::PARTS, Base::THREADS, Base::s;
    enum { r_, d_, k_, v_, a_, b_, VECTORS };  // as tensors are given, but a is the last and has one token more
    static constexpr int FLOATS = (VECTORS * SOME + 1) * N + 4 * PARTS * N;
    const void *in[6];  // r w k v a b

    ON_GPU static float *row(float *shared, int which, int t) {
        return shared + ((which == a_ ? 5 : which == b_ ? 4 : which) * SOME + t) * N;
    }

    // tokens [t, t + SOME) of all tensors into shared memory, 0 where there are none
    template <int WIDE, class Team>
    ON_GPU void load(Team &block, float *shared, Head head, int64_t t, int64_t end) const {
        constexpr int KINDS[] = {R, W, K, V, A, B_};
        const auto lay = [&](int token, int x, bool there, const Raw<WIDE> *raw) {
#pragma unroll
            for (int n = 0; n < 6; n++) {
                float found[WIDE];
#pragma unroll
                for (int c = 0; c < WIDE; c++) {
                    found[c] = raw[n].number(c, s.half(n));
                    if (n == W) found[c] = there ? expf(-rate_of(found[c])) : 0.0f;
                }
                if (token < SOME || n == A) share<WIDE>(row(shared, n, token) + x, found);
            }
        };
        block.each([&](int thread, auto &) {
            this->template read<WIDE, 6>(thread, SOME + 1, head, t, end, in, KINDS, lay);
        });
    }

    // Tokens [begin, end) from the state in own.S on. What own.S is before each `every` of them is told to keep(own.S,
    // how many times before, x, p), y and u go where they may; own.S is then the last state.
    template <class Team, class Keep>
    ON_GPU void walk(Team &block, float *shared, Head head, int64_t begin, int64_t end, int every, void *y, float *u,
                     Keep keep) const {
        float *sums = shared + (VECTORS * SOME + 1) * N;  // [u, y][even and odd tokens][PARTS][N]
        for (int64_t first = begin; first < end; first += SOME) {
            if (this->fours)
                load<4>(block, shared, head, first, end);
            else
                load<1>(block, shared, head, first, end);
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
                block.each([&](int thread, auto &own) {
                    const int x = thread % N, p = thread / N;
                    if (token % every == 0) keep(own.S, token / every, x, p);
                    if (y && token && p == 0)
                        write(y, V, head, first + t - 1, x, total(sums + (2 + !(t & 1)) * PARTS * N, x));
                    const float u_ = step(own.S, shared, sums, t, x, p);
                    if (u && p == 0) u[token * N + x] = u_;
                });
            }
        }
        const int last = static_cast<int>((end - begin - 1) & 1);
        block.each([&](int thread, auto &) {
            if (y && thread < N)
                write(y, V, head, end - 1, thread, total(sums + (2 + last) * PARTS * N, thread));
        });
    }

    // u of token t, and its state in the place of the one before
    ON_GPU static float step(float *S, float *shared, float *sums, int t, int x, int p) {
        const int odd = t & 1;
        const float u_ = total(sums + odd * PARTS * N, x), v_x = row(shared, v_, t)[x];
        const float *r_p = row(shared, r_, t) + p * EACH, *d_p = row(shared, d_, t) + p * EACH;
        const float *k_p = row(shared, k_, t) + p * EACH, *b_p = row(shared, b_, t) + p * EACH;
        const float *a_p = row(shared, a_, t + 1) + p * EACH;
        float y_ = 0.0f, next = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            S[e] = S[e] * d_p[e] + u_ * b_p[e] + v_x * k_p[e];
            y_ += S[e] * r_p[e];
            next += S[e] * a_p[e];
        }
        sums[((2 + odd) * PARTS + p) * N + x] = y_;
        sums[(!odd * PARTS + p) * N + x] = next;
        return u_;
    }

    ON_GPU void write(void *to, int tensor, Head head, int64_t t, int x, float number) const {
        if (x < s.N) put(to, head.at(t) + x, s.half(tensor), number);
    }

    ON_GPU static float total(const float *parts, int x) {
        float found = parts[x];
        for (int p = 1; p < PARTS; p++) found += parts[p * N + x];
        return found;
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
        block.each([&](int thread, Own &own) {
            this->take(own.S, start + head * square, thread % N, thread / N, false);
        });
        float *states = kept ? kept + head * s.segments(KEEP) * square : nullptr;
        this->walk(block, shared, s.head(head), 0, s.T, KEEP, y, nullptr, [&](const float *S, int64_t n, int x, int p) {
            if (states) this->give(states + n * square, S, x, p, false);
        });
        block.each([&](int thread, Own &own) {
            this->give(end + head * square, own.S, thread % N, thread / N, false);
        });
    }
};

template <class Shape>
struct Backward : Rows<Shape> {
    using Base = Rows<Shape>;
    using Base::EACH, Base::N, Base::PARTS, Base::THREADS, Base::SQUARE, Base::s;
    struct Own {
        float S[Shape::EACH], rows[Shape::EACH], columns[Shape::EACH];  // the state; its gradient, twice
    };
    enum { r_, d_, k_, v_, a_, b_, y_, u_, rate_, VECTORS };  // as tensors are given; y_: the gradient of y
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
    static constexpr int64_t WANTED = KEEP / NOTED * SQUARE + KEEP * N;

    ON_GPU void work(int64_t number, Threads &block, float *shared) const {
        const int64_t square = s.N * s.N;
        const Head head = s.head(number);
        float *written = room + number * WANTED, *u = written + KEEP / NOTED * SQUARE;
        block.each([&](int thread, Own &own) {
            this->take(own.rows, dend + number * square, thread % N, thread / N, false);
            this->take(own.columns, dend + number * square, thread % N, thread / N, true);
        });
        for (int64_t segment = s.segments(KEEP) - 1; segment >= 0; segment--) {
            const int64_t begin = segment * KEEP, end = begin + KEEP < s.T ? begin + KEEP : s.T;
            const float *from = kept + (number * s.segments(KEEP) + segment) * square;
            block.each([&](int thread, Own &own) { this->take(own.S, from, thread % N, thread / N, false); });
            const auto keep = [&](const float *S, int64_t n, int x, int p) {
                this->note_turned(written + n * SQUARE, S, x, p);
            };
            this->walk(block, shared, head, begin, end, NOTED, nullptr, u, keep);
            for (int part = static_cast<int>(end - begin - 1) / SOME; part >= 0; part--) {
                const int64_t first = begin + part * SOME;
                const int tokens = static_cast<int>(end - first < SOME ? end - first : SOME);
                if (this->fours)
                    fetch<4>(block, shared, head, first, tokens, u + part * SOME * N);
                else
                    fetch<1>(block, shared, head, first, tokens, u + part * SOME * N);
                for (int t = tokens - 1; t >= 0; t--)
                    back(block, shared, head, first, t, written + (part * SOME + t) / NOTED * SQUARE);
            }
        }
        block.each([&](int thread, Own &own) {
            const int x = thread % N, p = thread / N;
            this->give(dstart + number * square, own.rows, x, p, false);
            if (p == 0) this->write(da, A, head, 0, x, sum(shared, da_, x));
        });
    }

    ON_GPU static float *row(float *shared, int which, int t) { return shared + (which * SOME + t) * N; }
    ON_GPU static float *part(float *shared, int which, int p) { return shared + PLACE + (which * PARTS + p) * N; }
    ON_GPU static float sum(float *shared, int which, int x) { return Base::total(part(shared, which, 0), x); }

    template <int WIDE>
    ON_GPU void fetch(Threads &block, float *shared, Head head, int64_t first, int tokens, const float *u) const {
        constexpr int KINDS[] = {R, W, K, V, A, B_, V};
        const void *const from[] = {this->in[R], this->in[W], this->in[K], this->in[V], this->in[A], this->in[B_], dy};
        const auto lay = [&](int t, int x, bool there, const Raw<WIDE> *raw) {
#pragma unroll
            for (int n = 0; n < 7; n++) {
                float found[WIDE];
#pragma unroll
                for (int c = 0; c < WIDE; c++) found[c] = raw[n].number(c, s.half(KINDS[n]));
                if (n == W) decays<WIDE>(found, row(shared, rate_, t) + x, there);
                share<WIDE>(row(shared, n, t) + x, found);
            }
#pragma unroll
            for (int c = 0; c < WIDE; c++) row(shared, u_, t)[x + c] = u[t * N + x + c];
        };
        block.each([&](int thread, auto &) {
            this->template read<WIDE, 7>(thread, tokens, head, first, first + tokens, from, KINDS, lay);
        });
    }

    // w becomes the decay
    template <int WIDE>
    ON_GPU static void decays(float *w, float *rates, bool there) {
        float rate[WIDE];
#pragma unroll
        for (int c = 0; c < WIDE; c++) rate[c] = there ? rate_of(w[c]) : 0.0f, w[c] = expf(-rate[c]);
        share<WIDE>(rates, rate);
    }

    // the gradients of one token; `from`: the last state before it that was written down
    ON_GPU void back(Threads &block, float *shared, Head head, int64_t first, int t, const float *from) const {
        block.each([&](int thread, Own &own) {
            const int x = thread % N, p = thread / N;
            this->recall(own.S, from, thread);
            for (int q = t / NOTED * NOTED; q < t; q++) after(own.S, shared, q, x, p);
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
            const auto write = [&](void *to, int tensor, int64_t at, float number) {
                this->write(to, tensor, head, at, x, number);
            };
            write(dr, R, token, sum(shared, dr_, x)), write(dk, K, token, sum(shared, dk_, x));
            write(dv, V, token, sum(shared, dv_, x)), write(db, B_, token, sum(shared, db_, x));
            write(dw, W, token, -sum(shared, dd_, x) * lost);
            if (token + 1 < s.T) write(da, A, token + 1, sum(shared, da_, x));
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
    return sized(z[3], [&](auto shape) { return static_cast<int>(Backward<decltype(shape)>::WANTED); }) * z[0] * z[2];
}

// takes B T H N /r/w/k/v/a/b parts: r w k v a b B*T*H*N, start B*H*N*N, y B*T*H*N, end B*H*N*N, kept? any
int wkv7_forward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                 const void *a, const void *b, const float *start, void *y, float *end, float *kept) {
    const bool fours = z[3] % 4 == 0 && wide(r, w, k, v, a, b, start, end, kept);
    return sized(z[3], [&](auto shape) {
        using Shape = decltype(shape);
        const Rows<Shape> rows = {{{}, {z[0], z[1], z[2], z[3], z[4]}, fours}, {r, w, k, v, a, b}};
        return launch(Forward<Shape>{rows, start, y, end, kept}, z[0] * z[2], stream);
    });
}

// takes B T H N /r/w/k/v/a/b parts: r w k v a b B*T*H*N, kept any, dy B*T*H*N, dend B*H*N*N, dr dw dk parts*B*T*H*N,
// dv B*T*H*N, da db parts*B*T*H*N, dstart B*H*N*N, room any
int wkv7_backward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                  const void *a, const void *b, const float *kept, const void *dy, const float *dend, void *dr,
                  void *dw, void *dk, void *dv, void *da, void *db, float *dstart, float *room) {
    const bool fours = z[3] % 4 == 0 && wide(r, w, k, v, a, b, kept, dy, dend, dstart);
    return sized(z[3], [&](auto shape) {
        using Shape = decltype(shape);
        const Rows<Shape> rows = {{{}, {z[0], z[1], z[2], z[3], z[4]}, fours}, {r, w, k, v, a, b}};
        const Backward<Shape> kernel = {rows, kept, dy, dend, dr, dw, dk, dv, da, db, dstart, room};
        return launch(kernel, z[0] * z[2], stream);
    });
}

}  // extern "C"
