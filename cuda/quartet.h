// Four tokens of RWKV-7 at a time, forward again and back: what would be done token by token to a whole state is done
// to their vectors, and the state is read and written once for all four.
//
// Before them lies the state S, behind them G is the gradient of theirs. With s behind t, and D(t, s) the product of
// the decays of the tokens behind t up to s (each of at most 1; nothing is divided by one):
//     behind them          S D(., last) + sum u_t (b_t D(t, last))^T + v_t (k_t D(t, last))^T
//     gradient before them G D(., last) + sum du_t (a_t D(., t - 1))^T + dy_t (r_t D(., t))^T
//     du_t = G (b_t D(t, last)) + sum over s >= t of dy_s (r_s D(t, s) . b_t)
//                               + sum over s > t of du_s (a_s D(t, s - 1) . b_t), and dv_t likewise with k_t.
// The other gradients are added up over values, so they need of G and S only G^T u_t, G^T v_t, S^T dy_t, S^T du_t and
// the sums of G S over values; from there the recurrence goes on with vectors of keys (`finish`).
#pragma once

#include "tokens.h"

constexpr int FOUR = 4, PAIRS = 16;
constexpr int ROWS = 4;                    // of a state that registers hold at a time
constexpr int KEYS = WIDTH == 16 ? 2 : 1;  // vectors of keys that registers hold of each row of eight
constexpr int64_t VALUES = 2 * WIDTH;      // whose parts of both states the first cache holds beside the vectors

// where pairs of tokens t <= s stand: first those with what s ends with (r, dy), then those with t < s (a, du)
constexpr int upto(int t, int s) { return t * FOUR - t * (t - 1) / 2 + s - t; }
constexpr int past(int t, int s) { return 10 + t * 3 - t * (t - 1) / 2 + s - t - 1; }

// WIDE: wide, where it is known beforehand, so that all places are; or 0
template <int WIDE>
struct Quartet {
    // rows of every token of a chunk: d exp(w), d - 1 for decays d, and (the first token's) D(., last) - 1
    enum { W, D, E, CHUNKS };
    // Rows of the four, in room of their own. Y is the gradient of y; BT, KT: b and k as they are after the last; AT,
    // RT: a and r as they are before the first; GU, GV, SY, SU: the products above; GS: the sums of G S (the first's).
    enum { R = CHUNKS, K, V, A, B, U, Y, BT, KT, DU, AT, RT, GU, GV, SY, SU, GS, END };
    typedef float Pairs[2][PAIRS];  // for b and k, or for u and v

    struct Gradients {
        float *r, *w, *k, *v, *a, *b;
    };

    const Tokens &x;
    int64_t begin;  // the first of the four
    float *tokens, *own;
    bool streamed;  // all gradients are

    static int64_t room(const Sizes &s) { return FOUR * (END - CHUNKS) * s.wide(); }
    int64_t wide() const { return WIDE ? WIDE : x.wide; }
    float *row(int t, int which) const {
        if (which < CHUNKS) return tokens + t * (CHUNKS * wide() + WIDTH) + which * wide();
        return own + (t * (END - CHUNKS) + which - CHUNKS) * wide();
    }

    // rows of the four; behind the last token are some that change nothing
    void take(int which, const float *from) const {
        for (int t = 0; t < FOUR; t++) {
            if (begin + t < x.s.T)
                x.read(row(t, which), from + x.first + (begin + t) * x.step);
            else
                zero(row(t, which), wide());
        }
    }

    // rows of the four are asked for from the second cache, where `Soon` has put them
    void ask(std::initializer_list<const float *> from) const {
        for (const float *tensor : from)
            for (int t = 0; t < FOUR; t++) {
                const float *first = tensor + x.first + (begin + t) * x.step;
                for (int64_t j = 0; j < x.s.N; j += Soon::LINE) __builtin_prefetch(first + j, 0, 3);
            }
    }

    void put(float *to, int t, int64_t j, Vec found) const {
        if (begin + t >= x.s.T || j >= x.s.N) return;
        float *at = to + x.first + (begin + t) * x.step + j;
        streamed ? stream(at, found) : store_some(at, found, x.s.N - j);
    }

    // products of two vectors of token t with those of the tokens behind it; `decayed` on the way there
    template <int t, bool DECAYED>
    void pairs(int first, int second, int late, int early, Vec (*found)[PAIRS]) const {
        Vec sums_[2][2 * FOUR] = {};
        for (int64_t j = 0; j < wide(); j += WIDTH) {
            Vec one = load(row(t, first) + j), two = load(row(t, second) + j);
#pragma GCC unroll 4
            for (int s = t; s < FOUR; s++) {
                if (s > t) {
                    const Vec e = load(row(s, early) + j);
                    sums_[0][FOUR + s] += one * e, sums_[1][FOUR + s] += two * e;
                    if (DECAYED) {
                        const Vec d = load(row(s, D) + j);
                        one += one * d, two += two * d;
                    }
                }
                const Vec l = load(row(s, late) + j);
                sums_[0][s] += one * l, sums_[1][s] += two * l;
            }
        }
        for (int n = 0; n < 2; n++) {
#pragma GCC unroll 4
            for (int s = t; s < FOUR; s++) {
                found[n][upto(t, s)] = sums_[n][s];
                if (s > t) found[n][past(t, s)] = sums_[n][FOUR + s];
            }
        }
    }

    template <bool DECAYED>
    void all_pairs(int first, int second, int late, int early, Pairs &to) const {
        Vec found[2][PAIRS];
        pairs<0, DECAYED>(first, second, late, early, found), pairs<1, DECAYED>(first, second, late, early, found);
        pairs<2, DECAYED>(first, second, late, early, found), pairs<3, DECAYED>(first, second, late, early, found);
        for (int n = 0; n < 2; n++)
            for (int i = 0; i < PAIRS; i += WIDTH) store(to[n] + i, sums(found[n] + i));
    }

    void decays(const float *w) const {
        take(W, w);
        const int64_t there = std::min<int64_t>(FOUR, x.s.T - begin);
        for (int64_t j = 0; j < wide(); j += WIDTH) {
            Vec rates = {};
            for (int t = 0; t < there; t++) {
                const Vec rate = exponential(load(row(t, W) + j));
                Vec less_1;
                const Vec d = exponential(-rate, less_1);
                rates += rate;
                store(row(t, W) + j, d * rate), store(row(t, D) + j, less_1);
            }
            for (int t = there; t < FOUR; t++) store(row(t, D) + j, Vec{});
            store(row(0, E) + j, exponential_less_1(-rates));
        }
    }

    // a and r as they are before the first
    void from_start() const {
        for (int64_t j = 0; j < wide(); j += WIDTH) {
            Vec since = all(1.0f);
            for (int t = 0; t < FOUR; t++) {
                store(row(t, AT) + j, load(row(t, A) + j) * since);
                since += since * load(row(t, D) + j);
                store(row(t, RT) + j, load(row(t, R) + j) * since);
            }
        }
    }

    // b and k as they are after the last
    void to_last() const {
        for (int64_t j = 0; j < wide(); j += WIDTH) {
            Vec until = all(1.0f);
            for (int t = FOUR - 1; t >= 0; t--) {
                store(row(t, BT) + j, load(row(t, B) + j) * until), store(row(t, KT) + j, load(row(t, K) + j) * until);
                until += until * load(row(t, D) + j);
            }
        }
    }

    // to = from D(., last) + the sum over tokens of a^T b + c^T d
    template <int COUNT, int a, int b, int c, int d>
    void update(float *to, const float *from, int64_t first, Soon &soon) const {
        const int64_t wide = this->wide();
        for (int64_t i = first; i < first + WIDTH; i += ROWS) {
            soon.ask();
            for (int64_t j = 0; j < wide; j += COUNT * WIDTH) {
                Vec S[ROWS][COUNT];
                for (int q = 0; q < COUNT; q++) {
                    const Vec e = load(row(0, E) + j + q * WIDTH);
                    for (int l = 0; l < ROWS; l++) {
                        const Vec before = load(from + (i + l) * wide + j + q * WIDTH);
                        S[l][q] = before + before * e;
                    }
                }
#pragma GCC unroll 4
                for (int t = 0; t < FOUR; t++) {
                    const float *left[2] = {row(t, a) + i, row(t, c) + i};
                    const float *right[2] = {row(t, b) + j, row(t, d) + j};
#pragma GCC unroll 2
                    for (int n = 0; n < 2; n++) {
                        Vec by[COUNT];
                        for (int q = 0; q < COUNT; q++) by[q] = load(right[n] + q * WIDTH);
                        for (int l = 0; l < ROWS; l++) {
                            const Vec one = all(left[n][l]);
                            for (int q = 0; q < COUNT; q++) S[l][q] += one * by[q];
                        }
                    }
                }
                for (int l = 0; l < ROWS; l++)
                    for (int q = 0; q < COUNT; q++) store(to + (i + l) * wide + j + q * WIDTH, S[l][q]);
            }
        }
    }

    // G, of WIDTH values, times the b (or, from KIND = FOUR on, k) after the last token: found[t] of these values
    template <int KINDS, int KIND>
    void with_last(const float *G, Vec *found) const {
        constexpr int LINES = WIDTH / KINDS, TURNS = WIDTH / LINES;  // rows that are added up at once, and how often
        const int64_t wide = this->wide();
        Vec room[KINDS];
        for (int i = 0; i < TURNS; i++) {
            Vec sum_[WIDTH] = {};  // of kind n and row l: n * LINES + l
            for (int64_t j = 0; j < wide; j += WIDTH) {
                Vec g[LINES];
                for (int l = 0; l < LINES; l++) g[l] = load(G + (i + l * TURNS) * wide + j);
#pragma GCC unroll 8
                for (int n = 0; n < KINDS; n++) {
                    const Vec by = load(row((KIND + n) % FOUR, KIND + n < FOUR ? BT : KT) + j);
                    for (int l = 0; l < LINES; l++) sum_[n * LINES + l] += g[l] * by;
                }
            }
            found[i] = sums(sum_);
        }
        turn<KINDS>(found, room);
    }

    // du and dv of WIDTH values
    void solve(const float *G, int64_t first, const Pairs &with_keys, float *dv) const {
        Vec parts[2 * FOUR], y[FOUR], du[FOUR];
        if constexpr (WIDTH < 2 * FOUR) {
            with_last<FOUR, 0>(G + first * wide(), parts), with_last<FOUR, FOUR>(G + first * wide(), parts + FOUR);
        } else {
            with_last<2 * FOUR, 0>(G + first * wide(), parts);
        }
        for (int t = 0; t < FOUR; t++) y[t] = load(row(t, Y) + first);
#pragma GCC unroll 4
        for (int t = FOUR - 1; t >= 0; t--) {
            Vec one = parts[t], two = parts[FOUR + t];
#pragma GCC unroll 4
            for (int s = t; s < FOUR; s++) {
                one += y[s] * with_keys[0][upto(t, s)], two += y[s] * with_keys[1][upto(t, s)];
                if (s > t) one += du[s] * with_keys[0][past(t, s)], two += du[s] * with_keys[1][past(t, s)];
            }
            du[t] = one;
            store(row(t, DU) + first, one);
            put(dv, t, first, two);
        }
    }

    struct Span {
        int64_t first, end;
    };

    // of a span of values: c += M^T a and d += M^T b; BOTH: and GS the products with the other one
    template <bool BOTH, int COUNT, int a, int b, int c, int d>
    void gather(const float *M, const float *other, Span of) const {
        const int64_t wide = this->wide();
        const float *a0 = row(0, a), *a1 = row(1, a), *a2 = row(2, a), *a3 = row(3, a);
        const float *b0 = row(0, b), *b1 = row(1, b), *b2 = row(2, b), *b3 = row(3, b);
        for (int64_t j = 0; j < wide; j += COUNT * WIDTH) {
            Vec found[2 * FOUR][COUNT] = {}, with[COUNT] = {};
            if (of.first) {
                for (int q = 0; q < COUNT; q++) {
                    for (int n = 0; n < FOUR; n++) {
                        found[n][q] = load(row(n, c) + j + q * WIDTH);
                        found[FOUR + n][q] = load(row(n, d) + j + q * WIDTH);
                    }
                    if (BOTH) with[q] = load(row(0, GS) + j + q * WIDTH);
                }
            }
            for (int64_t i = of.first; i < of.end; i++) {
                const Vec by[2 * FOUR] = {all(a0[i]), all(a1[i]), all(a2[i]), all(a3[i]),
                                          all(b0[i]), all(b1[i]), all(b2[i]), all(b3[i])};
                for (int q = 0; q < COUNT; q++) {
                    const Vec m = load(M + i * wide + j + q * WIDTH);
                    for (int n = 0; n < 2 * FOUR; n++) found[n][q] += by[n] * m;
                    if (BOTH) with[q] += m * load(other + i * wide + j + q * WIDTH);
                }
            }
            for (int q = 0; q < COUNT; q++) {
                for (int n = 0; n < FOUR; n++) {
                    store(row(n, c) + j + q * WIDTH, found[n][q]);
                    store(row(n, d) + j + q * WIDTH, found[FOUR + n][q]);
                }
                if (BOTH) store(row(0, GS) + j + q * WIDTH, with[q]);
            }
        }
    }

    // the gradients that are sums over values
    void finish(const Pairs &values, const Gradients &to) const {
        for (int64_t j = 0; j < wide(); j += WIDTH) {
            Vec r[FOUR], k[FOUR], a[FOUR], b[FOUR], d[FOUR], with_y[FOUR], with_u[FOUR];  // S^T dy and S^T du
            for (int t = 0; t < FOUR; t++) {
                r[t] = load(row(t, R) + j), k[t] = load(row(t, K) + j), a[t] = load(row(t, A) + j);
                b[t] = load(row(t, B) + j), d[t] = load(row(t, D) + j);
                with_y[t] = load(row(t, SY) + j), with_u[t] = load(row(t, SU) + j);
            }
            Vec both_ = load(row(0, GS) + j);  // the sum over values of G and the state before token t
#pragma GCC unroll 4
            for (int t = 0; t < FOUR; t++) {
                const Vec gu = load(row(t, GU) + j), gv = load(row(t, GV) + j);
                Vec h = both_, in_b = gu, in_k = gv;
#pragma GCC unroll 4
                for (int s = FOUR - 1; s >= t; s--) {
                    h += r[s] * with_y[s];
                    in_b += r[s] * values[0][upto(t, s)], in_k += r[s] * values[1][upto(t, s)];
                    if (s > t) {
                        h += h * d[s] + a[s] * with_u[s];
                        in_b += in_b * d[s] + a[s] * values[0][past(t, s)];
                        in_k += in_k * d[s] + a[s] * values[1][past(t, s)];
                    }
                }
                put(to.w, t, j, -h * load(row(t, W) + j));
                put(to.b, t, j, in_b), put(to.k, t, j, in_k), put(to.a, t, j, with_u[t]);
                both_ += both_ * d[t] + gu * b[t] + gv * k[t];
#pragma GCC unroll 4
                for (int s = t; s < FOUR; s++) {
                    with_y[s] += with_y[s] * d[t] + b[t] * values[0][upto(t, s)] + k[t] * values[1][upto(t, s)];
                    if (s > t)
                        with_u[s] += with_u[s] * d[t] + b[t] * values[0][past(t, s)] + k[t] * values[1][past(t, s)];
                }
                put(to.r, t, j, with_y[t]);
            }
        }
    }

    // G becomes the gradient before the four; all vectors but DU were taken
    template <int COUNT>
    void back(const float *S, float *G, const Gradients &to, Soon &soon) const {
        constexpr int keys = COUNT > KEYS ? KEYS : COUNT;
        Pairs with_keys, with_values;
        from_start();
        to_last();
        all_pairs<true>(B, K, R, A, with_keys);
        for (int64_t i = 0; i < wide(); i += VALUES) {
            const int64_t end = std::min(i + VALUES, wide());
            for (int64_t l = i; l < end; l += WIDTH) {
                soon.ask();
                solve(G, l, with_keys, to.v);
            }
            soon.ask();
            gather<false, keys, U, V, GU, GV>(G, S, {i, end});
            soon.ask();
            gather<true, keys, Y, DU, SY, SU>(S, G, {i, end});
            for (int64_t l = i; l < end; l += WIDTH) update<COUNT, DU, AT, Y, RT>(G, G, l, soon);
        }
        all_pairs<false>(U, V, Y, DU, with_values);
        finish(with_values, to);
    }
};
