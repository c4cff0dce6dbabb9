// The recurrence of RWKV-7 and its gradient, token by token; rwkvpipe/kernel/wkv7.py has the reference.
//
//     d_t = exp(-exp(w_t));  u_t = S_{t-1} a_t;  S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T;  y_t = S_t r_t
//
// r w k v a b u y are (B, T, H, N), states (B, H, N, N), [value][key]; all of them fp32, without gaps.
// With G the gradient of S_t and L = G + dy_t r_t^T:
//     dk = L^T v, dv = L k, db = L^T u, du = L b, da = S_{t-1}^T du, dr = S_t^T dy, dd = sum over values of L S_{t-1},
//     dw = -dd d exp(w), and the gradient of S_{t-1} is L diag(d) + du a^T.
// The backward needs every S_t. The forward keeps one in CHUNK of them, and every u; the others are computed again from
// there, forward: going back by dividing by d_t would lose all digits within a few tokens.
//
// One task is a few heads of one row, each on its own, so the result does not depend on the number of threads.

#include "threads.h"
#include "tokens.h"

namespace {

struct Forward {
    enum { R, W, K, V, A, B, D, U, Y, ROWS };
    Sizes s;
    const float *r, *w, *k, *v, *a, *b, *start;
    float *y, *end, *states, *u;  // states and u, which the backward needs, may be null

    void work(const Group &group) const {
        const int64_t wide = s.wide(), square = s.N * s.N;
        const int64_t apart = s.N * wide + Tokens::room(s, ROWS, CHUNK + 1);
        float *states_ = scratch(group.heads * apart);  // of each head [key][value], and its tokens
        const Tokens all_(s, group, states_ + s.N * wide, ROWS, apart);
        all_.read(A, a, 0, 1);
        for (int64_t h = 0; h < group.heads; h++) {
            float *S = states_ + h * apart;
            transpose(S, wide, start + all_.number(h) * square, s.N, s.N, s.N);
            first_u(all_.of(h).row(0, U), S, all_.of(h).row(0, A));
        }
        for (int64_t t = 0; t < s.T; t += CHUNK) {
            const int64_t tokens = std::min<int64_t>(CHUNK, s.T - t), more = t + tokens < s.T;
            all_.read(R, r, t, tokens), all_.read(W, w, t, tokens), all_.read(K, k, t, tokens);
            all_.read(V, v, t, tokens), all_.read(B, b, t, tokens), all_.read(A, a, t, tokens + more);
            for (int64_t h = 0; h < group.heads; h++) {
                const int64_t place = (all_.number(h) * s.chunks() + t / CHUNK) * square;
                if (states) transpose(states + place, s.N, states_ + h * apart, wide, s.N, s.N);
                chunk(all_.of(h), states_ + h * apart, tokens, more);
            }
            all_.write(Y, y, t, tokens);
            if (u) all_.write(U, u, t, tokens);
            for (int64_t h = 0; h < group.heads; h++) copy(all_.of(h).row(0, U), all_.of(h).row(tokens, U), wide);
        }
        for (int64_t h = 0; h < group.heads; h++)
            transpose(end + all_.number(h) * square, s.N, states_ + h * apart, wide, s.N, s.N);
    }

    void chunk(const Tokens &x, float *S, int64_t tokens, bool more) const {
        if (!more) zero(x.row(tokens, A), x.wide);
        x.decays(W, D, tokens);
        for (int64_t i = 0; i < x.wide;) {
            const int64_t vectors = (x.wide - i) / WIDTH;
            if (vectors >= BLOCK) {
                values<BLOCK>(x, S, i, tokens), i += BLOCK * WIDTH;
            } else if (vectors >= 2) {
                values<2>(x, S, i, tokens), i += 2 * WIDTH;
            } else {
                values<1>(x, S, i, tokens), i += WIDTH;
            }
        }
    }

    void first_u(float *to, const float *S, const float *first_a) const {
        const int64_t wide = s.wide();
        zero(to, wide);
        for (int64_t j = 0; j < s.N; j++)
            for (int64_t i = 0; i < wide; i += WIDTH) store(to + i, load(to + i) + load(S + j * wide + i) * first_a[j]);
    }

    // COUNT vectors of values, from `first`: u of a token is there when it begins, and the next one's when it ends
    template <int COUNT>
    void values(const Tokens &x, float *S, int64_t first, int64_t tokens) const {
        const int64_t N = s.N, wide = s.wide();
        for (int64_t t = 0; t < tokens; t++) {
            const float *r = x.row(t, R), *k = x.row(t, K), *b = x.row(t, B), *d = x.row(t, D), *next = x.row(t + 1, A);
            Vec U_[COUNT], V_[COUNT], Y_[COUNT] = {}, X_[COUNT] = {};
            for (int q = 0; q < COUNT; q++) {
                U_[q] = load(x.row(t, U) + first + q * WIDTH);
                V_[q] = load(x.row(t, V) + first + q * WIDTH);
            }
            for (int64_t j = 0; j < N; j++) {
                // read before anything is stored: for all the compiler knows they could lie where S does
                const Vec dj = all(d[j]), bj = all(b[j]), kj = all(k[j]), rj = all(r[j]), aj = all(next[j]);
                for (int q = 0; q < COUNT; q++) {
                    float *at = S + j * wide + first + q * WIDTH;
                    const Vec before = load(at), now = before + before * dj + U_[q] * bj + V_[q] * kj;
                    store(at, now);
                    Y_[q] += now * rj;
                    X_[q] += now * aj;
                }
            }
            for (int q = 0; q < COUNT; q++) {
                store(x.row(t, Y) + first + q * WIDTH, Y_[q]);
                store(x.row(t + 1, U) + first + q * WIDTH, X_[q]);
            }
        }
    }
};

// one token without gradients: the state is read once, by rows
struct Step {
    enum { R, W, K, V, A, B, D, ROWS };
    Sizes s;
    const float *r, *w, *k, *v, *a, *b, *start;
    float *y, *end;

    void head(int64_t n) const {
        const int64_t N = s.N, at = n * N;
        const Tokens x(s, {n / s.H, n % s.H, 1}, scratch(Tokens::room(s, ROWS, 1)), ROWS, 0);
        x.read(R, r, 0, 1), x.read(W, w, 0, 1), x.read(K, k, 0, 1), x.read(A, a, 0, 1), x.read(B, b, 0, 1);
        x.decays(W, D, 1);
        for (int64_t i = 0; i < N; i++) {
            const float *from = start + (n * N + i) * N;
            float *to = end + (n * N + i) * N;
            Vec with_a = {}, with_r = {};
            for (int64_t j = 0; j < N; j += WIDTH) with_a += load_some(from + j, N - j) * load(x.row(0, A) + j);
            const Vec u = all(sum(with_a)), vi = all(v[at + i]);
            for (int64_t j = 0; j < N; j += WIDTH) {
                const Vec before = load_some(from + j, N - j), kept = before + before * load(x.row(0, D) + j);
                const Vec now = kept + u * load(x.row(0, B) + j) + vi * load(x.row(0, K) + j);
                store_some(to + j, now, N - j);
                with_r += now * load(x.row(0, R) + j);
            }
            y[at + i] = sum(with_r);
        }
    }
};

struct Backward {
    enum { R, W, K, V, A, B, U, Y, D, DR, DD, DK, DV, DA, DB, ROWS };  // Y: the gradient of y
    Sizes s;
    const float *r, *w, *k, *v, *a, *b, *states, *u, *dy, *dend;
    float *dr, *dw, *dk, *dv, *da, *db, *dstart;

    void work(const Group &group) const {
        const int64_t N = s.N, wide = s.wide(), square = wide * wide, history = (CHUNK + 1) * WIDTH * wide;
        const int64_t apart = square + Tokens::room(s, ROWS, CHUNK);
        float *S = scratch(history + group.heads * apart), *gradients = S + history;
        const Tokens all_(s, group, gradients + square, ROWS, apart);
        for (int64_t h = 0; h < group.heads; h++) {
            float *G = gradients + h * apart;
            zero(G, square);
            for (int64_t i = 0; i < N; i++) copy(G + i * wide, dend + (all_.number(h) * N + i) * N, N);
        }
        for (int64_t c = s.chunks() - 1; c >= 0; c--) {
            const int64_t t = c * CHUNK, tokens = std::min<int64_t>(CHUNK, s.T - t);
            all_.read(R, r, t, tokens), all_.read(W, w, t, tokens), all_.read(K, k, t, tokens);
            all_.read(V, v, t, tokens), all_.read(A, a, t, tokens), all_.read(B, b, t, tokens);
            all_.read(U, u, t, tokens), all_.read(Y, dy, t, tokens);
            for (int64_t h = 0; h < group.heads; h++)
                chunk(all_.of(h), states + (all_.number(h) * s.chunks() + c) * N * N, S, gradients + h * apart, tokens);
            all_.write(DR, dr, t, tokens), all_.write(DD, dw, t, tokens), all_.write(DK, dk, t, tokens);
            all_.write(DV, dv, t, tokens), all_.write(DA, da, t, tokens), all_.write(DB, db, t, tokens);
        }
        for (int64_t h = 0; h < group.heads; h++)
            for (int64_t i = 0; i < N; i++)
                copy(dstart + (all_.number(h) * N + i) * N, gradients + h * apart + i * wide, N);
    }

    void chunk(const Tokens &x, const float *kept, float *S, float *G, int64_t tokens) const {
        const int64_t N = s.N, wide = x.wide;
        x.decays(W, D, tokens);
        for (int which : {DR, DD, DK, DA, DB}) x.clear(which, tokens);
        for (int64_t i = 0; i < wide; i += WIDTH) {
            zero(S, WIDTH * wide);
            for (int64_t l = 0; l < WIDTH && i + l < N; l++) copy(S + l * wide, kept + (i + l) * N, N);
            if (wide % (2 * WIDTH) == 0)
                values<2>(x, S, G + i * wide, i, tokens);
            else
                values<1>(x, S, G + i * wide, i, tokens);
        }
        for (int64_t l = 0; l < tokens; l++)
            for (int64_t j = 0; j < wide; j += WIDTH) {
                const Vec rate = load(x.row(l, W) + j);  // and d anew: d - 1 has lost the digits of a small d
                store(x.row(l, DD) + j, -load(x.row(l, DD) + j) * exponential(-rate) * rate);
            }
    }

    // WIDTH values, from `first`, of a chunk: their states forward, their gradients back
    template <int COUNT>
    void values(const Tokens &x, float *S, float *G, int64_t first, int64_t tokens) const {
        const int64_t square = WIDTH * x.wide;
        for (int64_t t = 0; t < tokens; t++) rebuild<COUNT>(x, t, first, S + t * square);
        for (int64_t t = tokens - 1; t >= 0; t--) back<COUNT>(x, t, first, S + t * square, G);
    }

    // S_t behind S_{t-1}, and its share of dr
    template <int COUNT>
    void rebuild(const Tokens &x, int64_t t, int64_t first, float *before) const {
        const int64_t wide = x.wide;
        const float *u = x.row(t, U) + first, *v = x.row(t, V) + first, *y = x.row(t, Y) + first;
        for (int64_t j = 0; j < wide; j += COUNT * WIDTH) {
            Vec k_[COUNT], b_[COUNT], d_[COUNT], dr_[COUNT];
            for (int q = 0; q < COUNT; q++) {
                const int64_t at = j + q * WIDTH;
                k_[q] = load(x.row(t, K) + at), b_[q] = load(x.row(t, B) + at);
                d_[q] = load(x.row(t, D) + at), dr_[q] = load(x.row(t, DR) + at);
            }
            for (int i = 0; i < WIDTH; i++) {
                const Vec ui = all(u[i]), vi = all(v[i]), yi = all(y[i]);
                for (int q = 0; q < COUNT; q++) {
                    float *at = before + i * wide + j + q * WIDTH;
                    const Vec last = load(at), now = last + last * d_[q] + ui * b_[q] + vi * k_[q];
                    store(at + WIDTH * wide, now);
                    dr_[q] += yi * now;
                }
            }
            for (int q = 0; q < COUNT; q++) store(x.row(t, DR) + j + q * WIDTH, dr_[q]);
        }
    }

    template <int COUNT>
    void back(const Tokens &x, int64_t t, int64_t first, const float *before, float *G) const {
        Vec with_k[WIDTH], with_b[WIDTH];
        lead<COUNT, true>(x, t, first, 0, before, G, with_k, with_b);
        for (int64_t j = COUNT * WIDTH; j < x.wide; j += COUNT * WIDTH)
            lead<COUNT, false>(x, t, first, j, before, G, with_k, with_b);
        store(x.row(t, DV) + first, sums(with_k));
        alignas(64) float du[WIDTH];
        store(du, sums(with_b));
        for (int64_t j = 0; j < x.wide; j += COUNT * WIDTH) follow<COUNT>(x, t, j, before, G, du);
    }

    // G becomes L; its products with k and b, not yet added up, and its share of dk, db and dd
    template <int COUNT, bool FIRST>
    void lead(const Tokens &x, int64_t t, int64_t first, int64_t j, const float *before, float *G, Vec *with_k,
              Vec *with_b) const {
        const int64_t wide = x.wide;
        const float *u = x.row(t, U) + first, *v = x.row(t, V) + first, *y = x.row(t, Y) + first;
        Vec r_[COUNT], k_[COUNT], b_[COUNT], dk_[COUNT], db_[COUNT], dd_[COUNT];
        for (int q = 0; q < COUNT; q++) {
            const int64_t at = j + q * WIDTH;
            r_[q] = load(x.row(t, R) + at), k_[q] = load(x.row(t, K) + at), b_[q] = load(x.row(t, B) + at);
            dk_[q] = load(x.row(t, DK) + at), db_[q] = load(x.row(t, DB) + at), dd_[q] = load(x.row(t, DD) + at);
        }
        for (int i = 0; i < WIDTH; i++) {
            const Vec ui = all(u[i]), vi = all(v[i]), yi = all(y[i]);
            Vec in_k = FIRST ? Vec{} : with_k[i], in_b = FIRST ? Vec{} : with_b[i];
            for (int q = 0; q < COUNT; q++) {
                const int64_t at = i * wide + j + q * WIDTH;
                const Vec L = load(G + at) + yi * r_[q];
                store(G + at, L);
                in_k += L * k_[q];
                in_b += L * b_[q];
                dk_[q] += vi * L;
                db_[q] += ui * L;
                dd_[q] += L * load(before + at);
            }
            with_k[i] = in_k, with_b[i] = in_b;
        }
        for (int q = 0; q < COUNT; q++) {
            const int64_t at = j + q * WIDTH;
            store(x.row(t, DK) + at, dk_[q]), store(x.row(t, DB) + at, db_[q]), store(x.row(t, DD) + at, dd_[q]);
        }
    }

    // L becomes the gradient of the state before, with its share of da
    template <int COUNT>
    void follow(const Tokens &x, int64_t t, int64_t j, const float *before, float *G, const float *du) const {
        Vec a_[COUNT], d_[COUNT], da_[COUNT];
        for (int q = 0; q < COUNT; q++) {
            const int64_t at = j + q * WIDTH;
            a_[q] = load(x.row(t, A) + at), d_[q] = load(x.row(t, D) + at), da_[q] = load(x.row(t, DA) + at);
        }
        for (int i = 0; i < WIDTH; i++) {
            const Vec ui = all(du[i]);
            for (int q = 0; q < COUNT; q++) {
                const int64_t at = i * x.wide + j + q * WIDTH;
                da_[q] += ui * load(before + at);
                const Vec L = load(G + at);
                store(G + at, L + L * d_[q] + ui * a_[q]);
            }
        }
        for (int q = 0; q < COUNT; q++) store(x.row(t, DA) + j + q * WIDTH, da_[q]);
    }
};

}  // namespace

extern "C" {

// floats that the forward keeps for the backward as states
int64_t wkv7_kept(int64_t B, int64_t T, int64_t H, int64_t N) {
    const Sizes s = {B, T, H, N};
    return B * H * s.chunks() * N * N;
}

// sizes: B T H N. states and u may be null, if no backward will follow
// takes B T H N: r w k v a b B*T*H*N, start B*H*N*N, y B*T*H*N, end B*H*N*N, states? any, u? B*T*H*N
void wkv7_forward(const int64_t *sizes, int threads, const float *r, const float *w, const float *k, const float *v,
                  const float *a, const float *b, const float *start, float *y, float *end, float *states, float *u) {
    const Sizes s = {sizes[0], sizes[1], sizes[2], sizes[3]};
    if (s.T == 1 && !states) {
        const Step step = {s, r, w, k, v, a, b, start, y, end};
        share(s.B * s.H, threads, [&](int64_t n) { step.head(n); });
    } else {
        const Forward forward = {s, r, w, k, v, a, b, start, y, end, states, u};
        const Groups groups(s, threads);
        share(groups.count(), threads, [&](int64_t n) { forward.work(groups(n)); });
    }
}

// takes B T H N: r w k v a b B*T*H*N, states any, u dy B*T*H*N, dend B*H*N*N, dr dw dk dv da db B*T*H*N, dstart B*H*N*N
void wkv7_backward(const int64_t *sizes, int threads, const float *r, const float *w, const float *k, const float *v,
                   const float *a, const float *b, const float *states, const float *u, const float *dy,
                   const float *dend, float *dr, float *dw, float *dk, float *dv, float *da, float *db,
                   float *dstart) {
    const Sizes s = {sizes[0], sizes[1], sizes[2], sizes[3]};
    const Backward backward = {s, r, w, k, v, a, b, states, u, dy, dend, dr, dw, dk, dv, da, db, dstart};
    const Groups groups(s, threads);
    share(groups.count(), threads, [&](int64_t n) { backward.work(groups(n)); });
}

}  // extern "C"
