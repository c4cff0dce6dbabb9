// What the forward and the backward of RWKV-6 and 5.2 on tensor cores share; wkv6_chunks.cu has the formulas.
//
// Each thread reads and writes four neighbouring channels at a time: of r, w and k of the same channels of EACH tokens,
// of v, y and their gradients of its warp's 16 values of two tokens. What a warp alone reads and writes needs no
// barrier.

#pragma once

#include "chunks.cuh"
#include "fours.cuh"

namespace {

enum { R, W, K, V, U };       // bits of Sizes::halves
constexpr int HALVES = 4;     // halves of 1, 2, 4, 8 tokens
constexpr int FOURS = N / 4;  // threads that a token's channels take

// HALF: r, k and v, and what is like them, are bf16 and begin at multiples of 16 bytes. RAW: r and k are kept as they are
// beside the factors; if not, factors take their places.
template <int WARPS_, bool HALF, bool RAW>
struct Chunks6 : Tiles<WARPS_> {
    using Base = Tiles<WARPS_>;
    using Base::WARPS, Base::THREADS, Base::ROWS, Base::s;
    using Place = typename Base::Place;
    static constexpr int EACH = C * FOURS / THREADS;
    // floats from a row to the next, so that no two lanes served together want one bank
    static constexpr int LINE = N + 8, WIDE = ROWS + 8, SIDE = C + 8, ODD = C + 1;
    static constexpr int X = 0, RT = HALVES * C * LINE, KT = RT + C * LINE, A = KT + C * LINE, VT = A + C * SIDE;
    static constexpr int YT = VT + C * WIDE, OVER = YT + C * WIDE, OWN = OVER + N, BONUS = OWN + C, DECAY = BONUS + N;
    static constexpr int RATE = DECAY + C * N, RAW_R = RAW ? RATE + C * N : RT, RAW_K = RAW ? RAW_R + C * N : KT;
    static constexpr int STEP = RAW ? N : LINE;
    // and where r and k are kept, what else the backward needs
    static constexpr int MET = OWN, D = RAW_K + C * N, STATE = D + C * ODD, FOUND = STATE;
    static constexpr int ENDS = STATE + (WARPS > 1 ? ROWS * LINE : 2 * C * N), DU = ENDS + WARPS * N, DW = DU + N;

    int one_w;    // for all tokens
    int aligned;  // all tensors begin at multiples of 16 bytes
    const void *r, *w, *k, *v, *u;

    struct Where : Place {
        Head decays;
    };

    // what a thread has read of a chunk
    struct Read {
        Bits r[EACH], w[EACH], k[EACH], v[2], dy[2];
    };

    ON_GPU Where where(int64_t block) const {
        const Place place = this->place(block);
        return {place, one_w ? Head{place.head % s.H * N, 0} : place.tokens};
    }

    ON_GPU bool half(int tensor) const { return (HALF && tensor != W && tensor != U) || s.half(tensor); }
    ON_GPU bool narrow() const { return !HALF && !aligned; }

    ON_GPU int count(int64_t t) const { return static_cast<int>(s.T - t < C ? s.T - t : C); }

    // What lies above the diagonal stays 0.
    template <class Team>
    ON_GPU void begin(Team &team, float *shared, const Where &where) const {
        team.each([&](int thread) {
            for (int i = thread; i < C * SIDE; i += THREADS) shared[A + i] = 0.0f;
            for (int x = thread; x < N; x += THREADS)
                shared[BONUS + x] = get(u, where.head % s.H * N + x, half(U));
        });
    }

    // the token and the channel of a thread's nth four, or its value
    ON_GPU static int token(int thread, int n) { return thread / FOURS + n * (THREADS / FOURS); }
    ON_GPU static int channel(int thread) { return thread % FOURS * 4; }
    ON_GPU static int value_token(int thread, int n) {
        return (thread & 16) / 4 + (thread & 4) / 2 + (thread & 8) / 8 + n * 8;  // rows 0 and 2 share no bank
    }
    ON_GPU static int value(int thread) { return thread / 32 * 16 + thread % 4 * 4; }

    // Tokens [t, t + C) as they lie in memory. END: only what the state after them needs.
    template <bool END, bool NARROW>
    ON_GPU void gather(Read &read, const Where &where, int64_t t, int thread, const void *dy) const {
        const int count = this->count(t);
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            const int o = token(thread, n);
            const int64_t at = where.tokens.at(t + o) + channel(thread), at_w = where.decays.at(t + o) + channel(thread);
            read.w[n] = bits_of<NARROW>(w, at_w, half(W), o < count);
            read.k[n] = bits_of<NARROW>(k, at, half(K), o < count);
            if (!END) read.r[n] = bits_of<NARROW>(r, at, half(R), o < count);
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int o = value_token(thread, n);
            const int64_t at = where.tokens.at(t + o) + where.part * ROWS + value(thread);
            read.v[n] = bits_of<NARROW>(v, at, half(V), o < count);
            if (RAW && !END) read.dy[n] = bits_of<NARROW>(dy, at, half(V), o < count);
        }
    }

    template <bool END>
    ON_GPU void gather(Read (&read)[LANES], const Where &where, int64_t t, int warp, const void *dy) const {
        lanes([&](int g, int i, int l) {
            const int thread = warp * 32 + g * 4 + i;
            if (narrow())
                gather<END, true>(read[l], where, t, thread, dy);
            else
                gather<END, false>(read[l], where, t, thread, dy);
        });
    }

    // Asks for what the chunk at t reads, if there is one.
    ON_GPU void ask(int thread, const Where &where, int64_t t, const void *dy) const {
        if (t < 0) return;
#pragma unroll 1
        for (int i = thread; i < 5 * C; i += THREADS) {
            const int which = i / C, tensor = which < 4 ? which : V;
            const void *from = which == R ? r : which == W ? w : which == K ? k : which == V ? v : dy;
            const int64_t token = t + i % C, at = where.tokens.at(token);
            if (token >= s.T || !from || (which == W && one_w)) continue;
            const char *line = static_cast<const char *>(from) + (half(tensor) ? at * 2 : at * 4);
            soon(line);
            if (!half(tensor)) soon(line + 128);
        }
    }

    // What was read goes to shared memory: v and dy to eleven bits, r, k and decays as they are, and r . u . k.
    template <bool END>
    ON_GPU void spread(const Read (&read)[LANES], float *shared, int count, int warp) const {
        float own[LANES][EACH];
        lanes([&](int g, int i, int l) {
            const int thread = warp * 32 + g * 4 + i, x = channel(thread);
            const Quad bonus = quad(shared + BONUS + x);
#pragma unroll
            for (int n = 0; n < EACH; n++) {
                const int o = token(thread, n);
                const Quad k = quad(read[l].k[n], half(K)), w = quad(read[l].w[n], half(W));
                Quad rate, decay;
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    rate.x[c] = o < count ? rate_of(w.x[c]) : 0.0f;
                    decay.x[c] = expf(-rate.x[c]);
                }
                quad(shared + DECAY + o * N + x) = decay;
                quad(shared + RAW_K + o * STEP + x) = k;
                if (END) continue;
                const Quad r = quad(read[l].r[n], half(R));
                quad(shared + RAW_R + o * STEP + x) = r;
                if (RAW) quad(shared + RATE + o * N + x) = rate;
                own[l][n] = 0.0f;
#pragma unroll
                for (int c = 0; c < 4; c++) own[l][n] += r.x[c] * bonus.x[c] * k.x[c];
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const int to = value_token(thread, n) * WIDE + value(thread);
                quad(shared + VT + to) = tf32(quad(read[l].v[n], half(V)));
                if (RAW && !END) quad(shared + YT + to) = tf32(quad(read[l].dy[n], half(V)));
            }
        });
        if (END) return;
        add_sixteen(own);
        lanes([&](int g, int i, int l) {
            const int thread = warp * 32 + g * 4 + i;
            if (thread % FOURS) return;
#pragma unroll
            for (int n = 0; n < EACH; n++) shared[OWN + token(thread, n)] = tf32(own[l][n]);
        });
    }

    // f(turn, token): tokens as r goes, from the first one on, or k, from the last one back
    template <bool AFTER, class F>
    ON_GPU static void along(F f) {
#pragma unroll
        for (int o = 0; o < C; o++) f(o, AFTER ? C - 1 - o : o);
    }

    // The factors of a channel, to eleven bits: of r, or (AFTER) of k, which is the same but for the order.
    template <bool AFTER>
    ON_GPU static void factors(float *shared, int x) {
        float d[C], mine[C], passed[HALVES] = {}, through = 1.0f;
        along<AFTER>([&](int o, int token) {
            d[o] = shared[DECAY + token * N + x], mine[o] = shared[(AFTER ? RAW_K : RAW_R) + token * STEP + x];
        });
        along<AFTER>([&](int o, int token) {
            shared[(AFTER ? KT : RT) + token * LINE + x] = tf32(mine[o] * through);
            through *= d[o];
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                if (o % (1 << h) == 0) passed[h] = 1.0f;
                if (o >> h & 1) shared[X + (h * C + token) * LINE + x] = tf32(mine[o] * passed[h]);
                passed[h] *= d[o];
            }
        });
        if (AFTER) shared[OVER + x] = through;
    }

    ON_GPU static void factors(float *shared, int thread) {
        for (int i = thread; i < C; i += THREADS) shared[A + i * SIDE + i] = shared[OWN + i];
        for (int i = thread; i < 2 * N; i += THREADS) {
            if (i < N)
                factors<false>(shared, i);
            else
                factors<true>(shared, i - N);
        }
    }

    // k~ of a channel, in the first 8 tokens or the last.
    ON_GPU static void endings(float *shared, int x, int last) {
        float through = 1.0f;
#pragma unroll
        for (int o = C - 1; o >= 8; o--) through *= last ? 1.0f : shared[DECAY + o * N + x];
#pragma unroll
        for (int o = 7; o >= 0; o--) {
            const int token = last * 8 + o;
            shared[KT + token * LINE + x] = tf32(shared[RAW_K + token * STEP + x] * through);
            through *= shared[DECAY + token * N + x];
        }
        if (!last) shared[OVER + x] = through;
    }

    // Of 8 nodes' tokens, numbered through, one in the first halves of 1 << h, or its place in the second.
    ON_GPU static int first(int i, int h) { return (i >> h << (h + 1)) | (i & ((1 << h) - 1)); }

    // A at the places of halves of 1 << h: the 8 tokens of second halves times those of first ones. Of different nodes it
    // is none: lanes that have those write what is above the diagonal, so that none goes another way.
    ON_GPU static void between(float *shared, int h) {
        const float *x = shared + X + h * C * LINE;
        Sum sum[2];
        clear(sum[0]), clear(sum[1]);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            Left late;
            Right early;
            lanes([&](int g, int t, int l) {
                const float *at = x + first(g, h) * LINE + i * 8 + 2 * t;
                const Pair one = pair(at), two = pair(at + (LINE << h));
                early.x[l][0] = one.x[0], early.x[l][1] = one.x[1], late.x[l][0] = two.x[0], late.x[l][2] = two.x[1];
                late.x[l][1] = late.x[l][3] = 0.0f;
            });
            multiply(sum[i % 2], late, early);
        }
        lanes([&](int g, int t, int l) {
#pragma unroll
            for (int o = 0; o < 2; o++) {
                const int row = first(g, h) + (1 << h), to = first(2 * t + o, h);
                const bool here = g >> h == (2 * t + o) >> h;
                const int high = row > to ? row : to, low = row > to ? to : row;
                shared[A + (here ? high * SIDE + low : low * SIDE + high)] =
                    here ? tf32(sum[0].x[l][o] + sum[1].x[l][o]) : 0.0f;
            }
        });
    }

    // A warp's values of tokens [t, t + C), which lie in YT, go to memory.
    ON_GPU void write(void *to, const float *shared, int warp, const Where &where, int64_t t) const {
        const int count = this->count(t);
        lanes_meet();
        lanes([&](int g, int i, int) {
            const int thread = warp * 32 + g * 4 + i, x = value(thread);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const int o = value_token(thread, n);
                const int64_t at = where.tokens.at(t + o) + where.part * ROWS + x;
                if (o < count) put(to, at, half(V), quad(shared + YT + o * WIDE + x), narrow());
            }
        });
        lanes_meet();
    }

    // What of a state passes all of the chunk, times its gradient: sums of a warp's rows.
    ON_GPU static void ends(const Sum *S, const Sum *G, float *shared, int warp) {
        float found[LANES][N / 4];
        lanes([&](int, int, int l) {
#pragma unroll
            for (int i = 0; i < N / 4; i++) {
                const float *x = S[i / 2].x[l] + i % 2, *y = G[i / 2].x[l] + i % 2;
                found[l][i] = x[0] * y[0] + x[2] * y[2];
            }
        });
        scatter(found);
        lanes([&](int g, int t, int l) {
            float *to = shared + ENDS + warp * N + g * 8 + 2 * t;
            to[0] = found[l][0], to[1] = found[l][1];
        });
    }

    // 8 columns of dY V^T, to eleven bits, but the diagonal apart and as it is
    ON_GPU static void heard(float *shared, int n) {
        Sum sum;
        clear(sum);
#pragma unroll
        for (int i = 0; i < ROWS / 8; i++)
            multiply(sum, left(shared + YT + i * 8, WIDE), right_turned(shared + VT + n * 8 * WIDE + i * 8, WIDE));
        cells(sum, [&](int row, int column, float &found) {
            const int to = n * 8 + column;
            shared[row == to ? MET + row : D + row * ODD + to] = row == to ? found : tf32(found);
        });
    }

    // This warp's part of the keys' gradients: tokens' rows (C, ROWS) times the state in shared memory
    ON_GPU static void keys(Sum *found, const float *tokens, const float *shared, int warp) {
        constexpr int TILES = N / 8 / WARPS;
#pragma unroll
        for (int i = 0; i < TILES; i++) clear(found[i]);
#pragma unroll
        for (int o = 0; o < ROWS / 8; o++) {
            const Left x = left(tokens + o * 8, WIDE);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                Right y;
                lanes([&](int g, int t, int l) {
                    const float *at = shared + STATE + (o * 8 + 2 * t) * LINE + warp * TILES * 8 + columns_at(i, 2 * t) + g;
                    y.x[l][0] = at[0], y.x[l][1] = at[LINE];
                });
                multiply(found[i], x, y);
            }
        }
    }

    // The gradients of X_h, in their places: D, mirrored, at the places of h times X_h
    ON_GPU static void halves(float *shared, int h) {
        Left d[2];
        lanes([&](int g, int t, int l) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int row = g + i % 2 * 8, to = t + i / 2 * 4, at = row > to ? row * ODD + to : to * ODD + row;
                const bool here = (row ^ to) >> h == 1;
                const float found = shared[D + (here ? at : ODD)];  // nobody wrote the diagonal
                d[i / 4].x[l][i % 4] = here ? found : 0.0f;
            }
        });
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            float *to = shared + X + h * C * LINE + i * 8;
            Sum sum;
            clear(sum);
#pragma unroll
            for (int o = 0; o < 2; o++) multiply(sum, d[o], apart(to + o * 8 * LINE, LINE));
            lanes_meet();
            cells(sum, [&](int row, int column, float &x) { to[row * LINE + column] = x; });
        }
    }

    // The transpose of (C, ROWS) in shared memory, a warp's 16 columns: f(its half, tokens of it)
    template <class F>
    ON_GPU static void over_tokens(const float *rows, int warp, F f) {
#pragma unroll
        for (int o = 0; o < 2; o++) f(o, apart_turned(rows + o * 8 * WIDE + warp * 16, WIDE));
    }

    // A warp's rows of a state += the transpose of those of (C, ROWS) times (C, N), after all it holds decayed.
    ON_GPU static void update(Sum *S, float *shared, int warp, const float *rows, const float *factors) {
        Base::times(S, shared + OVER);
        over_tokens(rows, warp, [&](int o, const Left &x) {
#pragma unroll
            for (int i = 0; i < N / 8; i++) multiply(S[i], x, apart(factors + o * 8 * LINE + i * 8, LINE));
        });
    }

    // sum += a warp's state times the transpose of 8 tokens' rows (8, N)
    ON_GPU static void add_state(Sum &sum, const Sum *S, const float *tokens) {
#pragma unroll
        for (int i = 0; i < N / 8; i++) multiply(sum, left(S[i]), right_turned(tokens + i * 8, LINE));
    }

    // Where 8 columns of a state lie in shared memory, of rows with a set bit of 4 in the place of their neighbours'.
    ON_GPU static int columns_at(int i, int row) { return i / 2 * 16 + (row & 4 ? 8 - i % 2 * 8 : i % 2 * 8); }

    // A warp's state goes to shared memory, to eleven bits.
    ON_GPU static void lay(Sum *S, float *shared, int warp) {
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            cells(S[i], [&](int row, int column, float &x) {
                shared[STATE + (warp * 16 + row) * LINE + columns_at(i, row) + column] = tf32(x);
            });
    }
};

}  // namespace
