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
// The forward keeps one state in KEEP tokens; the backward walks on from it, by columns, and writes down one in NOTED.
// What has no token of its own (du, and dw of RWKV-5.2) comes out for each row, in fp32: whoever calls adds them up.

#include "plain.cuh"

namespace {

enum { R, W, K, V, U };  // bits of Sizes::halves

// what both directions take, and the tokens [t, t + SOME) in shared memory
template <class Shape>
struct Tokens : Plain<Shape> {
    using Base = Plain<Shape>;
    using Base::EACH, Base::N, Base::PARTS, Base::THREADS, Base::s;
    enum { r_, d_, k_, v_, y_, rate_, VECTORS };  // as tensors are given; y_: the gradient of y
    static constexpr int BONUS = VECTORS * SOME * N, PLACE = BONUS + N;
    bool one_w;  // for all tokens
    const void *in[4], *u;  // r w k v

    ON_GPU static float *row(float *shared, int which, int t) { return shared + (which * SOME + t) * N; }

    // once: u, and the w of all tokens, if there is one
    template <class Team>
    ON_GPU void begin(Team &block, float *shared, int64_t head) const {
        block.each([&](int thread, auto &) {
            if (thread >= N) return;
            const bool there = thread < s.N;
            const int64_t at = head % s.H * s.N + thread;
            shared[BONUS + thread] = there ? get(u, at, s.half(U)) : 0.0f;
            if (!one_w) return;
            const float rate = there ? rate_of(get(in[W], at, s.half(W))) : 0.0f, decay = expf(-rate);
            for (int t = 0; t < SOME; t++) row(shared, rate_, t)[thread] = rate, row(shared, d_, t)[thread] = decay;
        });
    }

    template <class Team>
    ON_GPU void load(Team &block, float *shared, Head head, int64_t first, const void *dy) const {
        if (this->fours)
            load_by<4>(block, shared, head, first, dy);
        else
            load_by<1>(block, shared, head, first, dy);
    }

    template <int WIDE, class Team>
    ON_GPU void load_by(Team &block, float *shared, Head head, int64_t first, const void *dy) const {
        constexpr int KINDS[] = {R, W, K, V, V};
        const void *const from[] = {in[R], one_w ? nullptr : in[W], in[K], in[V], dy};
        const auto lay = [&](int t, int x, bool there, const Raw<WIDE> *raw) {
#pragma unroll
            for (int n = 0; n < 5; n++) {
                float found[WIDE], rate[WIDE];
#pragma unroll
                for (int c = 0; c < WIDE; c++) {
                    found[c] = raw[n].number(c, s.half(KINDS[n]));
                    if (n == W) rate[c] = there ? rate_of(found[c]) : 0.0f, found[c] = expf(-rate[c]);
                }
                if (n == W && !one_w) share<WIDE>(row(shared, rate_, t) + x, rate);
                if (from[n]) share<WIDE>(row(shared, n, t) + x, found);
            }
        };
        block.each([&](int thread, auto &) {
            this->template read<WIDE, 5>(thread, SOME, head, first, s.T, from, KINDS, lay);
        });
    }

    ON_GPU static float total(const float *parts, int x) {
        float found = parts[x];
        for (int p = 1; p < PARTS; p++) found += parts[p * N + x];
        return found;
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

    ON_GPU void work(int64_t number, Threads &block, float *shared) const {
        const int64_t square = s.N * s.N;
        const Head head = s.head(number);
        this->begin(block, shared, number);
        block.each([&](int thread, Own &own) {
            this->take(own.S, start + number * square, thread % N, thread / N, false);
        });
        for (int64_t first = 0; first < s.T; first += SOME) {
            const int tokens = static_cast<int>(s.T - first < SOME ? s.T - first : SOME);
            const int64_t states = (number * s.segments(KEEP) + first / KEEP) * square;
            float *to = kept && first % KEEP == 0 ? kept + states : nullptr;
            this->load(block, shared, head, first, nullptr);
            block.each([&](int thread, Own &own) {
                const int x = thread % N, p = thread / N;
                if (to) this->give(to, own.S, x, p, false);
                float *parts = shared + Base::PLACE + p * N + x;
                for (int t = 0; t < tokens; t++) parts[t * PARTS * N] = step(own, shared, t, x, p);
            });
            block.each([&](int thread, auto &) {
                for (int i = thread; i < tokens * N; i += THREADS) {
                    const int x = i % N, t = i / N;
                    const float found = Base::total(shared + Base::PLACE + t * PARTS * N, x);
                    if (x < s.N) put(y, head.at(first + t) + x, s.half(V), found);
                }
            });
        }
        block.each([&](int thread, Own &own) {
            this->give(end + number * square, own.S, thread % N, thread / N, false);
        });
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
    using Base::EACH, Base::N, Base::PARTS, Base::SQUARE, Base::s, Base::row;
    struct Own {
        float S[Shape::EACH], rows[Shape::EACH], columns[Shape::EACH];  // the state; its gradient, twice
        float du, dw;                                                   // of channel x, over all tokens
    };
    enum { dv_, dr_, dk_, dd_, SUMS };
    static constexpr int FOURTHS = 4;  // ALONE: each token's o and m, a sum of so many
    static constexpr int ALONE = Base::PLACE + SUMS * PARTS * N, FLOATS = ALONE + 2 * SOME * FOURTHS;
    using Threads = Block<Own, Shape::THREADS>;
    const float *kept;
    const void *dy;
    const float *dend;
    void *dr, *dw, *dk, *dv;
    float *du, *dstart, *room;

    // floats of `room` for one head
    static constexpr int64_t WANTED = KEEP / NOTED * SQUARE;

    ON_GPU void work(int64_t number, Threads &block, float *shared) const {
        const int64_t square = s.N * s.N;
        const Head head = s.head(number);
        float *written = room + number * WANTED;
        this->begin(block, shared, number);
        block.each([&](int thread, Own &own) {
            this->take(own.rows, dend + number * square, thread % N, thread / N, false);
            this->take(own.columns, dend + number * square, thread % N, thread / N, true);
            own.du = own.dw = 0.0f;
        });
        for (int64_t segment = s.segments(KEEP) - 1; segment >= 0; segment--) {
            const int64_t begin = segment * KEEP, end = begin + KEEP < s.T ? begin + KEEP : s.T;
            const float *from = kept + (number * s.segments(KEEP) + segment) * square;
            const int parts = static_cast<int>(end - begin + SOME - 1) / SOME;
            block.each([&](int thread, Own &own) { this->take(own.S, from, thread % N, thread / N, true); });
            for (int part = 0; part < parts; part++) {
                this->load(block, shared, head, begin + part * SOME, nullptr);
                block.each([&](int thread, Own &own) {
                    const int x = thread % N, p = thread / N;
                    for (int t = 0; t < SOME; t++) {
                        if (t % NOTED == 0) this->note(written + (part * SOME + t) / NOTED * SQUARE, own.S, thread);
                        after(own.S, shared, t, x, p);
                    }
                });
            }
            for (int part = parts - 1; part >= 0; part--) {
                const int64_t first = begin + part * SOME, left = end - first;
                this->load(block, shared, head, first, dy);
                alone(block, shared);
                for (int t = static_cast<int>(left < SOME ? left : SOME) - 1; t >= 0; t--)
                    back(block, shared, head, first, t, written + (part * SOME + t) / NOTED * SQUARE);
            }
        }
        block.each([&](int thread, Own &own) {
            const int x = thread % N;
            this->give(dstart + number * square, own.rows, x, thread / N, false);
            if (thread >= N || x >= s.N) return;
            du[number * s.N + x] = own.du;
            if (this->one_w) static_cast<float *>(dw)[number * s.N + x] = own.dw;
        });
    }

    ON_GPU static float *part(float *shared, int which, int p) {
        return shared + Base::PLACE + (which * PARTS + p) * N;
    }

    ON_GPU static float sum(float *shared, int which, int x) { return Base::total(part(shared, which, 0), x); }

    // what a token says to itself (o), and what its value meets (m)
    ON_GPU static void alone(Threads &block, float *shared) {
        block.each([&](int thread, Own &) {
            for (int i = thread; i < 2 * SOME * FOURTHS; i += Shape::THREADS) {
                const int t = i / (2 * FOURTHS), x = i % FOURTHS * (N / FOURTHS), odd = i / FOURTHS % 2;
                const float *a = row(shared, odd ? Base::v_ : Base::r_, t) + x, *u = shared + Base::BONUS + x;
                const float *b = row(shared, odd ? Base::y_ : Base::k_, t) + x;
                float found = 0.0f;
#pragma unroll
                for (int n = 0; n < N / FOURTHS; n++) found += odd ? a[n] * b[n] : a[n] * u[n] * b[n];
                shared[ALONE + i] = found;
            }
        });
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
        block.each([&](int thread, Own &own) {
            if (thread >= N) return;
            const int x = thread;
            const float *said = shared + ALONE + 2 * FOURTHS * t, *met = said + FOURTHS;
            const float o = said[0] + said[1] + said[2] + said[3], m = met[0] + met[1] + met[2] + met[3];
            const float u = shared[Base::BONUS + x];
            const float r = row(shared, Base::r_, t)[x], k = row(shared, Base::k_, t)[x];
            const float lost = row(shared, Base::d_, t)[x] * row(shared, Base::rate_, t)[x];
            const float dw_x = -sum(shared, dd_, x) * lost;
            own.du += r * k * m;
            own.dw += dw_x;
            if (x >= s.N) return;
            const int64_t at = head.at(first + t) + x;
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

int64_t wkv6_room(const int64_t *z) {
    return sized(z[3], [&](auto shape) { return static_cast<int>(Backward<decltype(shape)>::WANTED); }) * z[0] * z[2];
}

// takes B T H N /r/w/k/v/u one_w parts: r B*T*H*N, w H*N if one_w else B*T*H*N, k v B*T*H*N, u H*N, start B*H*N*N, y
// B*T*H*N, end B*H*N*N, kept? any
int wkv6_forward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                 const void *u, const float *start, void *y, float *end, float *kept) {
    const bool fours = z[3] % 4 == 0 && wide(r, w, k, v, start, end, kept);
    return sized(z[3], [&](auto shape) {
        using Shape = decltype(shape);
        const Tokens<Shape> tokens = {{{}, {z[0], z[1], z[2], z[3], z[4]}, fours}, z[5] != 0, {r, w, k, v}, u};
        return launch(Forward<Shape>{tokens, start, y, end, kept}, z[0] * z[2], stream);
    });
}

// du is (B, H, N) in fp32, as is dw where there is one w for all tokens
// takes B T H N /r/w/k/v/u one_w parts: r B*T*H*N, w H*N if one_w else B*T*H*N, k v B*T*H*N, u H*N, kept any, dy
// B*T*H*N, dend B*H*N*N, dr parts*B*T*H*N, dw parts*B*H*N if one_w else parts*B*T*H*N, dk parts*B*T*H*N, dv B*T*H*N,
// du parts*B*H*N, dstart B*H*N*N, room any
int wkv6_backward(const int64_t *z, int64_t stream, const void *r, const void *w, const void *k, const void *v,
                  const void *u, const float *kept, const void *dy, const float *dend, void *dr, void *dw, void *dk,
                  void *dv, float *du, float *dstart, float *room) {
    const bool fours = z[3] % 4 == 0 && wide(r, w, k, v, kept, dy, dend, dstart);
    return sized(z[3], [&](auto shape) {
        using Shape = decltype(shape);
        const Tokens<Shape> tokens = {{{}, {z[0], z[1], z[2], z[3], z[4]}, fours}, z[5] != 0, {r, w, k, v}, u};
        const Backward<Shape> kernel = {tokens, kept, dy, dend, dr, dw, dk, dv, du, dstart, room};
        return launch(kernel, z[0] * z[2], stream);
    });
}

}  // extern "C"
