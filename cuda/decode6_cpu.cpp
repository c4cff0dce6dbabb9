// One token of every row through a whole RWKV-6 or RWKV-5.2: all layers in one call. rwkvpipe/model/rwkv6.py and rwkv5.py
// have the same in PyTorch; decode_cpu.cpp has RWKV-7.
//
// A row has the same bits whatever rows are beside it, and however many threads there are, as matvec.h has it.

#include "token.h"

namespace {

struct Decode : Given {
    int64_t mixed, low;  // ranks of what is mixed, and of decays; 0 for RWKV-5

    enum Vectors { LN1, LN1_BIAS, LN2, LN2_BIAS, X_X, X_W, X_K, X_V, X_R, X_G, DECAY, BONUS, LN_X, LN_X_BIAS, FFN_X_K,
                   FFN_X_R, VECTORS };
    enum Matrices { RECEPTANCE, KEY, VALUE, GATE, OUTPUT, FFN_KEY, FFN_VALUE, FFN_RECEPTANCE, DECAY_1, DECAY_2, MIX, MIX_W,
                    MIX_G = MIX_W + 4, MATRICES };

    Matrix matrix(int64_t layer, int which) const {
        const int64_t n = layer * MATRICES + which;
        int64_t out = D, in = D;
        if (which == FFN_KEY) out = F;
        if (which == FFN_VALUE) in = F;
        if (which == DECAY_1) out = low;
        if (which == DECAY_2) in = low;
        if (which == MIX) out = 5 * mixed;
        if (which >= MIX_W) in = mixed;
        return numbered(n, out, in);
    }
    const float *vector(int64_t layer, int which) const { return vectors[layer * VECTORS + which]; }

    // the memory of one head takes a token in; y, normalised and gated, takes the place of r
    void recall(int64_t layer, int64_t head, float *S, float *r, const float *k, const float *v, const float *w,
                const float *gate, float *room) const {
        const int64_t N = D / H, c = head * N, wide = whole(N);
        float *d = room, *key = d + wide, *read = key + wide, *y = read + wide;
        zero(room, 4 * wide);
        const float *u = vector(layer, BONUS) + c;
        Vec bonus = {};
        for (int64_t j = 0; j < N; j += WIDTH) {
            const int64_t left = N - j;
            const Vec now = load_some(k + j, left), asked = load_some(r + j, left);
            store(d + j, exponential_less_1(-exponential(load_some(w + j, left))));
            store(key + j, now), store(read + j, asked);
            bonus += asked * load_some(u + j, left) * now;
        }
        const float own = sum(bonus);
        for (int64_t i = 0; i < N; i++) {
            float *row = S + i * N;
            ask(row + N * N, N);  // of the next head
            const Vec vi = all(v[i]);
            Vec with_r = {};
            for (int64_t j = 0; j < N; j += WIDTH) {
                const Vec before = load_some(row + j, N - j);
                with_r += before * load(read + j);
                store_some(row + j, before + before * load(d + j) + vi * load(key + j), N - j);
            }
            y[i] = sum(with_r) + own * v[i];
        }
        norm(y, vector(layer, LN_X) + c, vector(layer, LN_X_BIAS) + c, r, N, 64e-5f);
        for (int64_t j = 0; j < N; j += WIDTH) {
            const Vec z = load_some(gate + j, N - j);
            store_some(r + j, load_some(r + j, N - j) * z * sigmoid(z), N - j);
        }
    }

    struct Rooms {
        Room x, normed, r, k, v, w, g, mixed, shift, low, wide;
        float *heads;
    };

    // what a matrix reads: between this token and the one before, for RWKV-6 by a share of the token's own, too
    void blend(int64_t layer, int share, const float *last, int64_t count, int threads, const Rooms &at) const {
        if (mixed) {
            const Room part = {at.low.start + (share - X_W) * mixed, at.low.step};
            times(matrix(layer, MIX_W + share - X_W), count, threads, part, at.shift);
        }
        for (int64_t i = 0; i < count; i++)
            mix(at.normed[i], last + i * D, vector(layer, share), at.mixed[i], D, mixed ? at.shift[i] : nullptr);
    }

    void time_mix(int64_t layer, int64_t begin, int64_t count, int threads, const Rooms &at) const {
        float *last = att_x[layer] + begin * D;
        for (int64_t i = 0; i < count; i++)
            norm(at.x[i], vector(layer, LN1), vector(layer, LN1_BIAS), at.normed[i], D);
        if (mixed) {
            for (int64_t i = 0; i < count; i++)
                mix(at.normed[i], last + i * D, vector(layer, X_X), at.mixed[i], D);
            times(matrix(layer, MIX), count, threads, at.mixed, at.low);
            for (int64_t i = 0; i < count; i++) change(at.low[i], 5 * mixed, tangent);
            blend(layer, X_W, last, count, threads, at);
            times(matrix(layer, DECAY_1), count, threads, at.mixed, at.wide);
            for (int64_t i = 0; i < count; i++) change(at.wide[i], low, tangent);
            times(matrix(layer, DECAY_2), count, threads, at.wide, at.w);
            for (int64_t i = 0; i < count; i++) add(at.w[i], vector(layer, DECAY), D), zero(at.wide[i], low);
        }
        const int shares[] = {X_R, X_K, X_V, X_G};
        const Room *to[] = {&at.r, &at.k, &at.v, &at.g};
        for (int n = 0; n < 4; n++) {
            blend(layer, shares[n], last, count, threads, at);
            times(matrix(layer, RECEPTANCE + n), count, threads, at.mixed, *to[n]);
        }
        for (int64_t i = 0; i < count; i++) copy(last + i * D, at.normed[i], D);
        const int64_t N = D / H;
        for (int64_t n = 0; n < count * H; n++) {
            const int64_t i = n / H, h = n % H, c = h * N;
            float *S = memory[layer] + ((begin + i) * H + h) * N * N;
            const float *w = mixed ? at.w[i] : vector(layer, DECAY);
            recall(layer, h, S, at.r[i] + c, at.k[i] + c, at.v[i] + c, w + c, at.g[i] + c, at.heads);
        }
        times(matrix(layer, OUTPUT), count, threads, at.r, at.mixed);
        for (int64_t i = 0; i < count; i++) add(at.x[i], at.mixed[i], D);
    }

    void channel_mix(int64_t layer, int64_t begin, int64_t count, int threads, const Rooms &at) const {
        float *last = ffn_x[layer] + begin * D;
        for (int64_t i = 0; i < count; i++) {
            norm(at.x[i], vector(layer, LN2), vector(layer, LN2_BIAS), at.normed[i], D);
            mix(at.normed[i], last + i * D, vector(layer, FFN_X_R), at.mixed[i], D);
        }
        times(matrix(layer, FFN_RECEPTANCE), count, threads, at.mixed, at.r);
        for (int64_t i = 0; i < count; i++) {
            mix(at.normed[i], last + i * D, vector(layer, FFN_X_K), at.mixed[i], D);
            copy(last + i * D, at.normed[i], D);
        }
        times(matrix(layer, FFN_KEY), count, threads, at.mixed, at.wide);
        for (int64_t i = 0; i < count; i++) change(at.wide[i], F, squared);
        times(matrix(layer, FFN_VALUE), count, threads, at.wide, at.mixed);
        for (int64_t i = 0; i < count; i++) {
            change(at.r[i], D, sigmoid);
            for (int64_t j = 0; j < D; j += WIDTH) {
                const Vec y = load_some(at.mixed[i] + j, D - j) * load_some(at.r[i] + j, D - j);
                store_some(at.x[i] + j, load_some(at.x[i] + j, D - j) + y, D - j);
            }
        }
    }

    void rows_of(int64_t begin, int64_t count, int threads) const {
        const int64_t step = whole(D) + WIDTH, low_step = whole(5 * mixed) + WIDTH;
        const int64_t long_step = whole(std::max(F, low)) + WIDTH;
        const int64_t total = 9 * step + low_step + long_step;
        float *start = scratch(count * total + 4 * whole(D / H));
        zero(start, count * total);
        const auto room = [&](int64_t n) { return Room{start + n * count * step, step}; };
        float *last = start + 9 * count * step;
        const Rooms at = {room(0), room(1), room(2), room(3), room(4), room(5), room(6), room(7), room(8), {last, low_step},
                          {last + count * low_step, long_step}, start + count * total};
        embed(begin, count, at.x);
        for (int64_t layer = 0; layer < L; layer++) {
            time_mix(layer, begin, count, threads, at);
            channel_mix(layer, begin, count, threads, at);
        }
        finish(begin, count, threads, L * MATRICES, at.x, at.normed);
    }
};

}  // namespace

extern "C" {

// sizes: rows L D H F V, and the ranks of what is mixed and of decays (both 0 for RWKV-5); all else as for decode7
// takes R L D H F V mixed low: fixed 5 of any, vectors 16*L of any, matrices scales 16*L+1 of any, lies 16*L+1, att_x L of
// R*D, memory L of R*D*D//H, ffn_x L of R*D, ids R, logits R*V
void decode6(const int64_t *s, int threads, const float *const *fixed, const float *const *vectors,
             const void *const *matrices, const float *const *scales, const int64_t *lies, float *const *att_x,
             float *const *memory, float *const *ffn_x, const int64_t *ids, float *logits) {
    const Decode it = {{s[0], s[1], s[2], s[3], s[4], s[5], fixed, vectors, matrices, scales, lies, att_x, memory, ffn_x,
                        ids, logits}, s[6], s[7]};
    in_pieces(it.rows, threads, [&](int64_t begin, int64_t count, int on) { it.rows_of(begin, count, on); });
}

}  // extern "C"
