// The recurrences of RWKV-6 and RWKV-5.2 and their gradients, token by token; rwkvpipe/kernel/wkv6.py has the reference.
//
//     d_t = exp(-exp(w_t));  y_t = S_{t-1} r_t + (r_t . u . k_t) v_t;  S_t = S_{t-1} diag(d_t) + v_t k_t^T
//
// r w k v y are (B, T, H, N), u (H, N), states (B, H, N, N), [value][key]; all of them fp32, without gaps. RWKV-5.2 has
// decays that all tokens share: w (H, N).
// With G the gradient of S_t: dk = G^T v, dv = G k, dr = S_{t-1}^T dy, dd = sum over values of G S_{t-1},
//     dw = -dd d exp(w), and the gradient of S_{t-1} is G diag(d) + dy r^T; the bonus adds its share to each.
// The backward needs every S_t. The forward keeps one in CHUNK of them; the others are computed again from there.
//
// No number of a state is needed for another: a few of them stay in registers for all tokens of a chunk. One task is
// a few heads of one row, each on its own, so the result does not depend on the number of threads.

#include "threads.h"
#include "tokens.h"

namespace {

constexpr int HELD = 4;  // keys (in the backward, values) whose part of the state stays in registers

struct Inputs {
    Sizes s;
    bool shared;  // decays, by all tokens
    const float *r, *w, *k, *v, *u;

    enum { R, W, K, V, D, Y, FORWARD, DR = FORWARD, DD, DK, DV, BACKWARD };

    void read(const Tokens &x, int64_t t, int64_t tokens) const {
        for (int64_t i = 0; i < tokens; i++) {
            x.read(R, r, t + i, i), x.read(K, k, t + i, i), x.read(V, v, t + i, i);
            if (shared && i) {
                copy(x.row(i, W), x.row(0, W), x.wide), copy(x.row(i, D), x.row(0, D), x.wide);
            } else {
                shared ? x.read(x.row(i, W), w + x.number % s.H * s.N) : x.read(W, w, t + i, i);
                x.decay(W, D, i);
            }
        }
    }
    void bonus(float *row, int64_t n) const {
        copy(row, u + n % s.H * s.N, s.N);
        zero(row + s.N, s.wide() - s.N);
    }
    // the share of a token in its own output
    static float own(const Tokens &x, int64_t t, const float *bonus) {
        Vec total = {};
        for (int64_t j = 0; j < x.wide; j += WIDTH)
            total += load(x.row(t, R) + j) * load(bonus + j) * load(x.row(t, K) + j);
        return sum(total);
    }
};

struct Forward : Inputs {
    const float *start;
    float *y, *end, *states;  // states, which the backward needs, may be null

    void work(const Group &group) const {
        const int64_t wide = s.wide(), square = s.N * s.N;
        const int64_t apart = (wide + 1) * wide;
        // of each head the state, [key][value], and u; and room for a chunk of one
        float *first = scratch(group.heads * apart + Tokens::room(s, FORWARD, CHUNK));
        for (int64_t h = 0; h < group.heads; h++) {
            float *S = first + h * apart;
            zero(S + s.N * wide, (wide - s.N) * wide);
            transpose(S, wide, start + group.number(s, h) * square, s.N, s.N, s.N);
            bonus(S + wide * wide, group.number(s, h));
        }
        for (int64_t t = 0; t < s.T; t += CHUNK) {
            const int64_t tokens = std::min<int64_t>(CHUNK, s.T - t);
            for (int64_t h = 0; h < group.heads; h++) {
                Soon soon = ahead(group.after(h), t + CHUNK * group.ends(h));
                soon.over(tokens * ((s.N + HELD - 1) / HELD));
                const Tokens x(s, group.number(s, h), first + group.heads * apart, FORWARD);
                if (states) x.keep(states, t, first + h * apart);
                read(x, t, tokens);
                chunk(x, first + h * apart, tokens, soon);
                for (int64_t i = 0; i < tokens; i++) x.write(Y, y, t + i, i);
            }
        }
        for (int64_t h = 0; h < group.heads; h++)
            transpose(end + group.number(s, h) * square, s.N, first + h * apart, wide, s.N, s.N);
        settle();
    }

    Soon ahead(const Group &group, int64_t t) const {
        Soon soon;
        if (t >= s.T) return soon;
        soon.add(s, group, t, {r, shared ? nullptr : w, k, v}, false);
        soon.add(s, group, t, {y}, true);
        if (states) soon.add(s, group, t, states, true);
        return soon;
    }

    void chunk(const Tokens &x, float *S, int64_t tokens, Soon &soon) const {
        for (int64_t t = 0; t < tokens; t++) {
            const Vec share = all(own(x, t, S + x.wide * x.wide));
            for (int64_t i = 0; i < x.wide; i += WIDTH) store(x.row(t, Y) + i, share * load(x.row(t, V) + i));
        }
        for (int64_t i = 0; i < x.wide;) {
            const int64_t vectors = (x.wide - i) / WIDTH;
            if (vectors >= BLOCK) {
                values<BLOCK>(x, S, i, tokens, soon), i += BLOCK * WIDTH;
            } else if (vectors >= 2) {
                values<2>(x, S, i, tokens, soon), i += 2 * WIDTH;
            } else {
                values<1>(x, S, i, tokens, soon), i += WIDTH;
            }
        }
    }

    // COUNT vectors of values, from `first`
    template <int COUNT>
    void values(const Tokens &x, float *S, int64_t first, int64_t tokens, Soon &soon) const {
        for (int64_t j = 0; j < s.N; j += HELD) {
            Vec held[HELD][COUNT];
            for (int i = 0; i < HELD; i++)
                for (int q = 0; q < COUNT; q++) held[i][q] = load(S + (j + i) * x.wide + first + q * WIDTH);
            for (int64_t t = 0; t < tokens; t++) {
                soon.ask();
                const float *r_ = x.row(t, R) + j, *k_ = x.row(t, K) + j, *d_ = x.row(t, D) + j;
                const float *value = x.row(t, V) + first;
                float *out = x.row(t, Y) + first;
                Vec y_[COUNT];
                for (int q = 0; q < COUNT; q++) y_[q] = load(out + q * WIDTH);
                for (int i = 0; i < HELD; i++) {
                    const Vec ri = all(r_[i]), ki = all(k_[i]), di = all(d_[i]);
                    for (int q = 0; q < COUNT; q++) {
                        const Vec before = held[i][q];
                        y_[q] += before * ri;
                        held[i][q] = before + before * di + load(value + q * WIDTH) * ki;
                    }
                }
                for (int q = 0; q < COUNT; q++) store(out + q * WIDTH, y_[q]);
            }
            for (int i = 0; i < HELD; i++)
                for (int q = 0; q < COUNT; q++) store(S + (j + i) * x.wide + first + q * WIDTH, held[i][q]);
        }
    }
};

// one token without gradients: the state is read once, by rows
struct Step : Inputs {
    const float *start;
    float *y, *end;

    void head(int64_t n) const {
        const int64_t N = s.N;
        float *mine = scratch(s.wide() + Tokens::room(s, FORWARD, 1));
        const Tokens x(s, n, mine + s.wide(), FORWARD);
        bonus(mine, n);
        read(x, 0, 1);
        const float share = own(x, 0, mine);
        for (int64_t i = 0; i < N; i++) {
            const float *from = start + (n * N + i) * N, value = x.row(0, V)[i];
            float *to = end + (n * N + i) * N;
            Vec with_r = {};
            for (int64_t j = 0; j < N; j += WIDTH) {
                const Vec before = load_some(from + j, N - j);
                with_r += before * load(x.row(0, R) + j);
                store_some(to + j, before + before * load(x.row(0, D) + j) + value * load(x.row(0, K) + j), N - j);
            }
            y[n * N + i] = sum(with_r) + share * value;
        }
    }
};

struct Backward : Inputs {
    const float *states, *dy, *dend;
    float *dr, *dw, *dk, *dv, *dstart, *partial;  // partial: (B H, 2, N), what each head finds for u and a shared w

    static constexpr int SELDOM = 8;  // tokens between two requests for what comes next
    static constexpr int TURN = WIDTH / HELD;  // tokens whose products are added up over their lanes together

    void work(const Group &group) const {
        const int64_t N = s.N, wide = s.wide(), history = CHUNK * HELD * 2 * WIDTH, apart = (wide + 3) * wide;
        float *room = scratch(history + group.heads * apart + Tokens::room(s, BACKWARD, CHUNK)), *first = room + history;
        for (int64_t h = 0; h < group.heads; h++) {
            float *G = first + h * apart, *mine = G + wide * wide;  // then u, and what is found for u and w
            zero(G, apart);
            bonus(mine, group.number(s, h));
            for (int64_t i = 0; i < N; i++) copy(G + i * wide, dend + (group.number(s, h) * N + i) * N, N);
        }
        for (int64_t c = s.chunks() - 1; c >= 0; c--) {
            const int64_t t = c * CHUNK, tokens = std::min<int64_t>(CHUNK, s.T - t);
            for (int64_t h = 0; h < group.heads; h++) {
                Soon soon = ahead(group.after(h), t - CHUNK * group.ends(h));
                soon.over(((tokens + SELDOM - 1) / SELDOM) * ((N + HELD - 1) / HELD) * 2);
                const Tokens x(s, group.number(s, h), first + group.heads * apart, BACKWARD);
                read(x, t, tokens);
                for (int64_t i = 0; i < tokens; i++) x.read(Y, dy, t + i, i);
                chunk({x, tokens, states + s.kept(x.number, t), first + h * apart, room, soon});
                for (int64_t i = 0; i < tokens; i++) write(x, t + i, i);
            }
        }
        for (int64_t h = 0; h < group.heads; h++) {
            const int64_t n = group.number(s, h);
            float *G = first + h * apart, *mine = G + wide * wide;
            for (int64_t i = 0; i < N; i++) copy(dstart + (n * N + i) * N, G + i * wide, N);
            copy(partial + 2 * n * N, mine + wide, N);
            copy(partial + (2 * n + 1) * N, mine + 2 * wide, N);
        }
        settle();
    }

    Soon ahead(const Group &group, int64_t t) const {
        Soon soon;
        if (t < 0) return soon;
        soon.add(s, group, t, {r, shared ? nullptr : w, k, v, dy}, false);
        soon.add(s, group, t, {dr, shared ? nullptr : dw, dk, dv}, true);
        soon.add(s, group, t, states, false);
        return soon;
    }

    void write(const Tokens &x, int64_t t, int64_t place) const {
        x.write(DR, dr, t, place), x.write(DK, dk, t, place), x.write(DV, dv, t, place);
        if (!shared) x.write(DD, dw, t, place);
    }

    // of one head: the state before it, the gradient of the last one, and room for the states of its tokens
    struct Chunk {
        const Tokens &x;
        int64_t tokens;
        const float *kept;
        float *G, *before;
        Soon &soon;
    };

    void chunk(const Chunk &c) const {
        const Tokens &x = c.x;
        float *mine = c.G + x.wide * x.wide;
        for (int64_t t = 0; t < c.tokens; t++)
            for (int which : {DR, DD, DK, DV}) zero(x.row(t, which), x.wide);
        for (int64_t i = 0; i < s.N; i += HELD) {
            for (int64_t j = 0; j < x.wide;) {
                if (x.wide - j >= 2 * WIDTH)
                    part<2>(c, {i, j}), j += 2 * WIDTH;
                else
                    part<1>(c, {i, j}), j += WIDTH;
            }
        }
        for (int64_t t = 0; t < c.tokens; t++) finish(x, t, mine, mine + x.wide, mine + 2 * x.wide);
    }

    struct Place {
        int64_t i, j;  // the first value, the first key
    };

    // HELD values and COUNT vectors of keys of a chunk: their states forward, their gradients back
    template <int COUNT>
    void part(const Chunk &c, Place at) const {
        const Tokens &x = c.x;
        Vec held[HELD][COUNT];
        for (int a = 0; a < HELD; a++)
            for (int q = 0; q < COUNT; q++) {
                const int64_t j = at.j + q * WIDTH;
                held[a][q] = at.i + a < s.N ? load_some(c.kept + (at.i + a) * s.N + j, s.N - j) : Vec{};
            }
        for (int64_t t = 0; t < c.tokens; t++) {
            if (t % SELDOM == 0) c.soon.ask();
            float *here = c.before + t * HELD * COUNT * WIDTH;
            const float *k_ = x.row(t, K) + at.j, *d_ = x.row(t, D) + at.j;
            const float *v_ = x.row(t, V) + at.i, *y_ = x.row(t, Y) + at.i;
            float *out = x.row(t, DR) + at.j;
            Vec dr_[COUNT];
            for (int q = 0; q < COUNT; q++) dr_[q] = load(out + q * WIDTH);
            for (int a = 0; a < HELD; a++) {
                const Vec va = all(v_[a]), ya = all(y_[a]);
                for (int q = 0; q < COUNT; q++) {
                    const Vec last = held[a][q];
                    store(here + (a * COUNT + q) * WIDTH, last);
                    dr_[q] += last * ya;
                    held[a][q] = last + last * load(d_ + q * WIDTH) + va * load(k_ + q * WIDTH);
                }
            }
            for (int q = 0; q < COUNT; q++) store(out + q * WIDTH, dr_[q]);
        }
        back<COUNT>(c, at);
    }

    template <int COUNT>
    void back(const Chunk &c, Place at) const {
        const Tokens &x = c.x;
        Vec held[HELD][COUNT], with_k[WIDTH] = {};
        for (int a = 0; a < HELD; a++)
            for (int q = 0; q < COUNT; q++) held[a][q] = load(c.G + (at.i + a) * x.wide + at.j + q * WIDTH);
        for (int64_t t = c.tokens - 1; t >= 0; t--) {
            if (t % SELDOM == 0) c.soon.ask();
            const float *here = c.before + t * HELD * COUNT * WIDTH, *v_ = x.row(t, V) + at.i, *y_ = x.row(t, Y) + at.i;
            const float *r_ = x.row(t, R) + at.j, *k_ = x.row(t, K) + at.j, *d_ = x.row(t, D) + at.j;
            float *to_k = x.row(t, DK) + at.j, *to_d = x.row(t, DD) + at.j;
            Vec dk_[COUNT], dd_[COUNT];
            for (int q = 0; q < COUNT; q++) dk_[q] = load(to_k + q * WIDTH), dd_[q] = load(to_d + q * WIDTH);
            for (int a = 0; a < HELD; a++) {
                const Vec va = all(v_[a]), ya = all(y_[a]);
                Vec along = {};
                for (int q = 0; q < COUNT; q++) {
                    const Vec g = held[a][q];
                    along += g * load(k_ + q * WIDTH);
                    dk_[q] += g * va;
                    dd_[q] += g * load(here + (a * COUNT + q) * WIDTH);
                    held[a][q] = g + g * load(d_ + q * WIDTH) + ya * load(r_ + q * WIDTH);
                }
                with_k[t % TURN * HELD + a] = along;
            }
            for (int q = 0; q < COUNT; q++) store(to_k + q * WIDTH, dk_[q]), store(to_d + q * WIDTH, dd_[q]);
            if (t % TURN == 0) {
                alignas(64) float added[WIDTH];
                Vec used[WIDTH];
                for (int l = 0; l < WIDTH; l++) used[l] = with_k[l];
                store(added, sums(used));
                for (int64_t l = 0; l < TURN && t + l < c.tokens; l++)
                    for (int a = 0; a < HELD; a++) x.row(t + l, DV)[at.i + a] += added[l * HELD + a];
            }
        }
        for (int a = 0; a < HELD; a++)
            for (int q = 0; q < COUNT; q++) store(c.G + (at.i + a) * x.wide + at.j + q * WIDTH, held[a][q]);
    }

    // the bonus, and the decay's gradient as that of w
    void finish(const Tokens &x, int64_t t, const float *bonus, float *du_, float *dw_) const {
        Vec along = {};
        for (int64_t j = 0; j < x.wide; j += WIDTH) along += load(x.row(t, V) + j) * load(x.row(t, Y) + j);
        const Vec vy = all(sum(along)), share = all(own(x, t, bonus));
        for (int64_t j = 0; j < x.wide; j += WIDTH) {
            const Vec r_ = load(x.row(t, R) + j), k_ = load(x.row(t, K) + j), u_ = load(bonus + j) * vy;
            store(x.row(t, DR) + j, load(x.row(t, DR) + j) + u_ * k_);
            store(x.row(t, DK) + j, load(x.row(t, DK) + j) + u_ * r_);
            store(x.row(t, DV) + j, load(x.row(t, DV) + j) + share * load(x.row(t, Y) + j));
            store(du_ + j, load(du_ + j) + r_ * k_ * vy);
            const Vec rate = load(x.row(t, W) + j);  // and d anew: d - 1 has lost the digits of a small d
            const Vec slope = -load(x.row(t, DD) + j) * exponential(-rate) * rate;
            store(x.row(t, DD) + j, slope);
            store(dw_ + j, load(dw_ + j) + slope);
        }
    }
};

// the heads' shares of all rows, one after the other
void gather(const Sizes &s, const float *partial, float *to) {
    zero(to, s.H * s.N);
    for (int64_t n = 0; n < s.B * s.H; n++)
        for (int64_t j = 0; j < s.N; j++) to[n % s.H * s.N + j] += partial[2 * n * s.N + j];
}

}  // namespace

extern "C" {

// floats that the forward keeps for the backward as states
int64_t wkv6_kept(int64_t B, int64_t T, int64_t H, int64_t N) {
    const Sizes s = {B, T, H, N};
    return s.kept(B * H, 0);
}

// sizes: B T H N, and 1 where all tokens share their decays. states may be null, if no backward will follow
// takes B T H N shared: r B*T*H*N, w H*N if shared else B*T*H*N, k v B*T*H*N, u H*N, start B*H*N*N, y B*T*H*N, end
// B*H*N*N, states? any
void wkv6_forward(const int64_t *sizes, int threads, const float *r, const float *w, const float *k, const float *v,
                  const float *u, const float *start, float *y, float *end, float *states) {
    const Sizes s = {sizes[0], sizes[1], sizes[2], sizes[3]};
    const Inputs inputs = {s, sizes[4] != 0, r, w, k, v, u};
    if (s.T == 1 && !states) {
        const Step step = {inputs, start, y, end};
        share(s.B * s.H, threads, [&](int64_t n) { step.head(n); });
    } else {
        const Forward forward = {inputs, start, y, end, states};
        const Groups groups(s, threads);
        share(groups.count(), threads, [&](int64_t n) { forward.work(groups(n)); });
    }
}

// partial: 2 B H N floats of room
// takes B T H N shared: r B*T*H*N, w H*N if shared else B*T*H*N, k v B*T*H*N, u H*N, states any, dy B*T*H*N, dend
// B*H*N*N, dr B*T*H*N, dw H*N if shared else B*T*H*N, dk dv B*T*H*N, du H*N, dstart B*H*N*N, partial 2*B*H*N
void wkv6_backward(const int64_t *sizes, int threads, const float *r, const float *w, const float *k, const float *v,
                   const float *u, const float *states, const float *dy, const float *dend, float *dr, float *dw,
                   float *dk, float *dv, float *du, float *dstart, float *partial) {
    const Sizes s = {sizes[0], sizes[1], sizes[2], sizes[3]};
    const Inputs inputs = {s, sizes[4] != 0, r, w, k, v, u};
    const Backward backward = {inputs, states, dy, dend, dr, dw, dk, dv, dstart, partial};
    const Groups groups(s, threads);
    share(groups.count(), threads, [&](int64_t n) { backward.work(groups(n)); });
    gather(s, partial, du);
    if (inputs.shared) gather(s, partial + s.N, dw);
}

}  // extern "C"
