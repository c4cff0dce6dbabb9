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
    enum { R, W, K, V, B, D, NEXT, Y, ROWS };  // NEXT: a of the next token
    Sizes s;
    const float *r, *w, *k, *v, *a, *b, *start;
    float *y, *end, *states, *u;  // states and u, which the backward needs, may be null

    void work(const Group &group) const {
        const int64_t wide = s.wide(), square = s.N * s.N, apart = (s.N + 1) * wide;
        float *first = scratch(group.heads * apart + Tokens::room(s, ROWS, 1));  // of each head the state and u
        const auto head = [&](int64_t h) { return Tokens(s, group.number(s, h), first + group.heads * apart, ROWS); };
        for (int64_t h = 0; h < group.heads; h++) {
            float *S = first + h * apart;  // [key][value]
            const Tokens x = head(h);
            transpose(S, wide, start + x.number * square, s.N, s.N, s.N);
            x.read(NEXT, a, 0, 0);
            first_u(S + s.N * wide, S, x.row(0, NEXT));
        }
        for (int64_t t = 0; t < s.T; t += CHUNK) {
            Soon soon = t + CHUNK < s.T ? after(group, t + CHUNK) : Soon();
            soon.over(group.heads * CHUNK * ((s.N + Soon::LINE - 1) / Soon::LINE));
            for (int64_t h = 0; h < group.heads; h++) {
                const Tokens x = head(h);
                float *S = first + h * apart;
                if (states) transpose(states + s.kept(x.number, t), s.N, S, wide, s.N, s.N);
                for (int64_t i = t; i < std::min(s.T, t + CHUNK); i++) token(x, S, i, soon);
            }
        }
        for (int64_t h = 0; h < group.heads; h++)
            transpose(end + group.number(s, h) * square, s.N, first + h * apart, wide, s.N, s.N);
    }

    Soon after(const Group &group, int64_t t) const {
        Soon soon;
        soon.add(s, group, t, {r, w, k, v, a, b}, false);
        soon.add(s, group, t, {y, u}, true);
        if (states) soon.add(s, group, t, states, true);
        return soon;
    }

    void token(const Tokens &x, float *S, int64_t t, Soon &soon) const {
        float *u_ = S + s.N * x.wide;
        x.read(R, r, t, 0), x.read(W, w, t, 0), x.read(K, k, t, 0), x.read(V, v, t, 0), x.read(B, b, t, 0);
        x.read(NEXT, a, std::min(t + 1, s.T - 1), 0);  // behind the last token nobody asks for u
        x.decay(W, D, 0);
        if (u) copy(u + x.first + t * x.step, u_, s.N);
        for (int64_t i = 0; i < x.wide;) {
            const int64_t vectors = (x.wide - i) / WIDTH;
            if (vectors >= BLOCK) {
                values<BLOCK>(x, S + i, i, soon), i += BLOCK * WIDTH;
            } else if (vectors >= 2) {
                values<2>(x, S + i, i, soon), i += 2 * WIDTH;
            } else {
                values<1>(x, S + i, i, soon), i += WIDTH;
            }
        }
        x.write(Y, y, t, 0);
    }

    void first_u(float *to, const float *S, const float *first_a) const {
        const int64_t wide = s.wide();
        zero(to, wide);
        for (int64_t j = 0; j < s.N; j++)
            for (int64_t i = 0; i < wide; i += WIDTH) store(to + i, load(to + i) + load(S + j * wide + i) * first_a[j]);
    }

    // COUNT vectors of values, from `first`: u of the token is there when it begins, and the next one's when it ends
    template <int COUNT>
    void values(const Tokens &x, float *S, int64_t first, Soon &soon) const {
        const int64_t N = s.N, wide = x.wide;
        const float *r = x.row(0, R), *k = x.row(0, K), *b = x.row(0, B), *d = x.row(0, D), *next = x.row(0, NEXT);
        float *u = S + N * wide;
        Vec U_[COUNT], V_[COUNT], Y_[COUNT] = {}, X_[COUNT] = {};
        for (int q = 0; q < COUNT; q++) U_[q] = load(u + q * WIDTH), V_[q] = load(x.row(0, V) + first + q * WIDTH);
        for (int64_t from = 0; from < N; from += Soon::LINE) {
            soon.ask();
            for (int64_t j = from; j < std::min<int64_t>(N, from + Soon::LINE); j++) {
                // read before anything is stored: for all the compiler knows they could lie where S does
                const Vec dj = all(d[j]), bj = all(b[j]), kj = all(k[j]), rj = all(r[j]), aj = all(next[j]);
                for (int q = 0; q < COUNT; q++) {
                    float *at = S + j * wide + q * WIDTH;
                    const Vec before = load(at), now = before + before * dj + U_[q] * bj + V_[q] * kj;
                    store(at, now);
                    Y_[q] += now * rj;
                    X_[q] += now * aj;
                }
            }
        }
        for (int q = 0; q < COUNT; q++) store(x.row(0, Y) + first + q * WIDTH, Y_[q]), store(u + q * WIDTH, X_[q]);
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
        const Tokens x(s, n, scratch(Tokens::room(s, ROWS, 1)), ROWS);
        x.read(R, r, 0, 0), x.read(W, w, 0, 0), x.read(K, k, 0, 0), x.read(A, a, 0, 0), x.read(B, b, 0, 0);
        x.decay(W, D, 0);
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
        float *S = scratch(history + group.heads * square + Tokens::room(s, ROWS, CHUNK)), *gradients = S + history;
        zero(gradients, group.heads * square);
        for (int64_t h = 0; h < group.heads; h++)
            for (int64_t i = 0; i < N; i++)
                copy(gradients + h * square + i * wide, dend + (group.number(s, h) * N + i) * N, N);
        for (int64_t c = s.chunks() - 1; c >= 0; c--) {
            Soon soon = c ? before(group, (c - 1) * CHUNK) : Soon();
            soon.over(group.heads * std::min<int64_t>(CHUNK, s.T - c * CHUNK) * 2 * wide / WIDTH);
            for (int64_t h = 0; h < group.heads; h++) {
                const Tokens x(s, group.number(s, h), gradients + group.heads * square, ROWS);
                chunk({x, c * CHUNK, S, gradients + h * square, soon});
            }
        }
        for (int64_t h = 0; h < group.heads; h++)
            for (int64_t i = 0; i < N; i++)
                copy(dstart + (group.number(s, h) * N + i) * N, gradients + h * square + i * wide, N);
    }

    Soon before(const Group &group, int64_t t) const {
        Soon soon;
        soon.add(s, group, t, {r, w, k, v, a, b, u, dy}, false);
        soon.add(s, group, t, {dr, dw, dk, dv, da, db}, true);
        soon.add(s, group, t, states, false);
        return soon;
    }

    // a chunk of tokens of one head: S is room for their states, G the gradient of the last one
    struct Chunk {
        const Tokens &x;
        int64_t t;
        float *S, *G;
        Soon &soon;
    };

    void chunk(const Chunk &c) const {
        const int64_t wide = c.x.wide;
        for (int64_t i = 0; i < std::min<int64_t>(CHUNK, s.T - c.t); i++) read(c.x, c.t + i, i);
        for (int64_t i = 0; i < wide; i += WIDTH) {
            if (wide % (BLOCK * WIDTH) == 0)
                values<BLOCK>(c, i);
            else if (wide % (2 * WIDTH) == 0)
                values<2>(c, i);
            else
                values<1>(c, i);
        }
    }

    // WIDTH values, from `first`: their states forward, their gradients back; a token is written when the last values
    // have added their share
    template <int COUNT>
    void values(const Chunk &c, int64_t first) const {
        const Tokens &x = c.x;
        const int64_t N = s.N, wide = x.wide, square = WIDTH * wide, tokens = std::min<int64_t>(CHUNK, s.T - c.t);
        zero(c.S, square);
        const float *from = states + s.kept(x.number, c.t) + first * N;
        for (int64_t l = 0; l < WIDTH && first + l < N; l++) copy(c.S + l * wide, from + l * N, N);
        for (int64_t i = 0; i < tokens; i++) {
            c.soon.ask();
            rebuild<COUNT>(x, i, first, c.S + i * square);
        }
        for (int64_t i = tokens - 1; i >= 0; i--) {
            c.soon.ask();
            back<COUNT>(x, i, first, c.S + i * square, c.G + first * wide);
            if (first + WIDTH == wide) write(x, c.t + i, i);
        }
    }

    void read(const Tokens &x, int64_t t, int64_t place) const {
        x.read(R, r, t, place), x.read(W, w, t, place), x.read(K, k, t, place), x.read(V, v, t, place);
        x.read(A, a, t, place), x.read(B, b, t, place), x.read(U, u, t, place), x.read(Y, dy, t, place);
        x.decay(W, D, place);
        for (int which : {DR, DD, DK, DA, DB}) zero(x.row(place, which), x.wide);
    }

    void write(const Tokens &x, int64_t t, int64_t place) const {
        for (int64_t j = 0; j < x.wide; j += WIDTH) {
            const Vec rate = load(x.row(place, W) + j);  // and d anew: d - 1 has lost the digits of a small d
            store(x.row(place, DD) + j, -load(x.row(place, DD) + j) * exponential(-rate) * rate);
        }
        x.write(DR, dr, t, place), x.write(DD, dw, t, place), x.write(DK, dk, t, place);
        x.write(DV, dv, t, place), x.write(DA, da, t, place), x.write(DB, db, t, place);
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
                    __builtin_prefetch(at + 2 * WIDTH * wide, 1);  // a store waits for its line
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
    return s.kept(B * H, 0);
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
