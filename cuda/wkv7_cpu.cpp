// The recurrence of RWKV-7, token by token, and its gradient, by fours; rwkvpipe/kernel/wkv7.py has the reference.
//
//     d_t = exp(-exp(w_t));  u_t = S_{t-1} a_t;  S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T;  y_t = S_t r_t
//
// r w k v a b u y are (B, T, H, N), states (B, H, N, N), [value][key]; all of them fp32, without gaps.
// With G the gradient of S_t and L = G + dy_t r_t^T:
//     dk = L^T v, dv = L k, db = L^T u, du = L b, da = S_{t-1}^T du, dr = S_t^T dy, dd = sum over values of L S_{t-1},
//     dw = -dd d exp(w), and the gradient of S_{t-1} is L diag(d) + du a^T.
// The backward needs every S_t. The forward keeps one in CHUNK of them, and every u; that before each four is computed
// again from there, forward: going back by dividing by d_t would lose all digits within a few tokens (quartet.h).
//
// One task is a few heads of one row, each on its own, so the result does not depend on the number of threads.

#include "quartet.h"
#include "threads.h"

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
            for (int64_t h = 0; h < group.heads; h++) {
                Soon soon = ahead(group.after(h), t + CHUNK * group.ends(h));
                soon.over(CHUNK * ((s.N + Soon::LINE - 1) / Soon::LINE));
                const Tokens x = head(h);
                float *S = first + h * apart;
                if (states) x.keep(states, t, S);
                for (int64_t i = t; i < std::min(s.T, t + CHUNK); i++) token(x, S, i, soon);
            }
        }
        for (int64_t h = 0; h < group.heads; h++)
            transpose(end + group.number(s, h) * square, s.N, first + h * apart, wide, s.N, s.N);
        settle();
    }

    Soon ahead(const Group &group, int64_t t) const {
        Soon soon;
        if (t >= s.T) return soon;
        soon.add(s, group, t, {r, w, k, v, a, b}, false);
        soon.add(s, group, t, {y, u}, true);
        if (states) soon.add(s, group, t, states, true);
        return soon;
    }

    void token(const Tokens &x, float *S, int64_t t, Soon &soon) const {
        float *u_ = S + s.N * x.wide;
        float *d = x.row(0, D), *room = x.row(0, Y), *to = x.wide == s.N ? y + x.first + t * x.step : room;
        x.decay(x.whole(W, w, t), x.row(0, W), d);
        const float *next = x.whole(NEXT, a, std::min(t + 1, s.T - 1));  // behind the last token nobody asks for u
        const Vectors now = {x.whole(R, r, t), x.whole(K, k, t), x.whole(V, v, t), x.whole(B, b, t), d, next, to,
                             to != room && in_lines(y, s.N)};
        if (u) x.write(u, t, u_);
        for (int64_t i = 0; i < x.wide;) {
            const int64_t vectors = (x.wide - i) / WIDTH;
            if (vectors >= BLOCK) {
                values<BLOCK>(now, S + i, i, x.wide, soon), i += BLOCK * WIDTH;
            } else if (vectors >= 2) {
                values<2>(now, S + i, i, x.wide, soon), i += 2 * WIDTH;
            } else {
                values<1>(now, S + i, i, x.wide, soon), i += WIDTH;
            }
        }
        if (to == room) x.write(Y, y, t, 0);
    }

    void first_u(float *to, const float *S, const float *first_a) const {
        const int64_t wide = s.wide();
        zero(to, wide);
        for (int64_t j = 0; j < s.N; j++)
            for (int64_t i = 0; i < wide; i += WIDTH) store(to + i, load(to + i) + load(S + j * wide + i) * first_a[j]);
    }

    // of a token, and `next` of the one behind it
    struct Vectors {
        const float *r, *k, *v, *b, *d, *next;
        float *y;
        bool streamed;  // y is
    };

    // COUNT vectors of values, from `first`: u of the token is there when it begins, and the next one's when it ends. By
    // itself, so that all its addresses have registers.
    template <int COUNT>
    __attribute__((noinline)) void values(const Vectors &x, float *S, int64_t first, int64_t wide, Soon &soon) const {
        const int64_t N = s.N;
        const float *r = x.r, *k = x.k, *b = x.b, *d = x.d, *next = x.next;
        float *u = S + N * wide;
        Vec U_[COUNT], V_[COUNT], Y_[COUNT] = {}, X_[COUNT] = {};
        for (int q = 0; q < COUNT; q++) U_[q] = load(u + q * WIDTH), V_[q] = load(x.v + first + q * WIDTH);
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
        for (int q = 0; q < COUNT; q++) {
            float *y = x.y + first + q * WIDTH;
            x.streamed ? stream(y, Y_[q]) : store(y, Y_[q]);
            store(u + q * WIDTH, X_[q]);
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
    typedef Quartet<0> Q;
    Sizes s;
    const float *r, *w, *k, *v, *a, *b, *states, *u, *dy, *dend;
    float *dr, *dw, *dk, *dv, *da, *db, *dstart;

    void work(const Group &group) const {
        const int64_t N = s.N, wide = s.wide(), square = wide * wide, history = CHUNK / FOUR * square;
        float *S = scratch(history + group.heads * square + Q::room(s) + Tokens::room(s, Q::CHUNKS, CHUNK));
        float *gradients = S + history, *own = gradients + group.heads * square;
        zero(gradients, group.heads * square);
        for (int64_t h = 0; h < group.heads; h++)
            for (int64_t i = 0; i < N; i++)
                copy(gradients + h * square + i * wide, dend + (group.number(s, h) * N + i) * N, N);
        for (int64_t c = s.chunks() - 1; c >= 0; c--) {
            const int64_t fours = (std::min<int64_t>(CHUNK, s.T - c * CHUNK) + FOUR - 1) / FOUR;
            for (int64_t h = 0; h < group.heads; h++) {
                Soon soon = ahead(group.after(h), (c - group.ends(h)) * CHUNK);
                const int64_t asked = wide / ROWS + wide / WIDTH + 2 * ((wide + VALUES - 1) / VALUES);  // by `back`
                soon.over((fours - 1) * (wide / ROWS) + fours * asked);
                const Tokens x(s, group.number(s, h), own + Q::room(s), Q::CHUNKS);
                chunk({x, c * CHUNK, fours, S, gradients + h * square, own, soon});
            }
        }
        for (int64_t h = 0; h < group.heads; h++)
            for (int64_t i = 0; i < N; i++)
                copy(dstart + (group.number(s, h) * N + i) * N, gradients + h * square + i * wide, N);
        settle();
    }

    Soon ahead(const Group &group, int64_t t) const {
        Soon soon;
        if (t < 0) return soon;
        soon.add(s, group, t, {r, w, k, v, a, b, u, dy}, false);
        soon.add(s, group, t, {dr, dw, dk, dv, da, db}, true);
        soon.add(s, group, t, states, false);
        return soon;
    }

    // a chunk of tokens of one head: S is room for their states, G the gradient of the last one
    struct Chunk {
        const Tokens &x;
        int64_t t, fours;
        float *S, *G, *own;
        Soon &soon;
    };

    void chunk(const Chunk &c) const {
        switch (c.x.wide) {  // sizes that models have
            case 16: return chunk<1, 16>(c);
            case 32: return chunk<2, 32>(c);
            case 64: return chunk<BLOCK, 64>(c);
            case 128: return chunk<BLOCK, 128>(c);
        }
        c.x.wide % (BLOCK * WIDTH) ? chunk<1, 0>(c) : chunk<BLOCK, 0>(c);
    }

    // forward by fours, whose states are kept, and back
    template <int COUNT, int WIDE>
    void chunk(const Chunk &c) const {
        typedef Quartet<WIDE> Four;
        const Tokens &x = c.x;
        const int64_t wide = x.wide, square = wide * wide;
        bool streamed = true;
        for (const float *to : {dr, dw, dk, dv, da, db}) streamed = streamed && in_lines(to, s.N);
        const auto four = [&](int64_t m) -> Four {
            return {x, c.t + m * FOUR, x.row(m * FOUR, 0), c.own, streamed};
        };
        if (s.N < wide) zero(c.S, square);
        for (int64_t i = 0; i < s.N; i++) copy(c.S + i * wide, states + s.kept(x.number, c.t) + i * s.N, s.N);
        for (int64_t m = 0; m < c.fours; m++) {
            const Four now = four(m);
            now.decays(w);
            if (m + 1 == c.fours) break;
            now.take(Q::K, k), now.take(Q::B, b), now.take(Q::V, v), now.take(Q::U, u);
            now.to_last();
            four(m + 1).ask({w, k, b, v, u});
            float *S = c.S + m * square;
            for (int64_t i = 0; i < wide; i += WIDTH)
                now.template update<COUNT, Q::U, Q::BT, Q::V, Q::KT>(S + square, S, i, c.soon);
        }
        for (int64_t m = c.fours - 1; m >= 0; m--) {
            const Four now = four(m);
            now.take(Q::R, r), now.take(Q::K, k), now.take(Q::V, v), now.take(Q::A, a), now.take(Q::B, b);
            now.take(Q::U, u), now.take(Q::Y, dy);
            if (m) four(m - 1).ask({r, k, v, a, b, u, dy});
            now.template back<COUNT>(c.S + m * square, c.G, {dr, dw, dk, dv, da, db}, c.soon);
        }
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
