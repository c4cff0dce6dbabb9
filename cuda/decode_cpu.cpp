// One token of every row through a whole RWKV-7: all layers in one call. rwkvpipe/model/rwkv7.py has the same in PyTorch.
//
// A row has the same bits whatever rows are beside it, and however many threads there are, as matvec.h has it.

#include "token.h"

namespace {

constexpr float LEAST = 1e-12f, HALF_ROOT = 0.60653066f;  // e^{-1/2}

struct Decode : Given {
    int64_t ranks[4];

    enum Vectors { LN1, LN1_BIAS, LN2, LN2_BIAS, X_R, X_W, X_K, X_V, X_A, X_G, W0, A0, V0, K_K, K_A, R_K, LN_X, LN_X_BIAS,
                   FFN_X_K, VECTORS };
    enum Matrices { RECEPTANCE, KEY, VALUE, OUTPUT, W1, W2, A1, A2, V1, V2, G1, G2, FFN_KEY, FFN_VALUE, MATRICES };

    Matrix matrix(int64_t layer, int which) const {
        const int64_t low = which >= W1 && which <= G2 ? ranks[(which - W1) / 2] : 0;
        const int64_t n = layer * MATRICES + which;
        int64_t out = D, in = D;
        if (low) (which - W1) % 2 ? in = low : out = low;
        if (which == FFN_KEY) out = F;
        if (which == FFN_VALUE) in = F;
        return numbered(n, out, in);
    }
    const float *vector(int64_t layer, int which) const { return vectors[layer * VECTORS + which]; }

    // the memory of one head takes a token in; y, normalised, with its bonus and gate, takes the place of r
    void recall(int64_t layer, int64_t head, float *S, float *r, float *k, const float *v, const float *zw,
                const float *za, const float *gate, float *room) const {
        const int64_t N = D / H, c = head * N, wide = whole(N);
        float *minus = room, *b = minus + wide, *d = b + wide, *key = d + wide, *read = key + wide, *y = read + wide;
        zero(room, 6 * wide);
        const float *k_k = vector(layer, K_K) + c, *k_a = vector(layer, K_A) + c, *r_k = vector(layer, R_K) + c;
        Vec squares = {}, bonus = {};
        for (int64_t j = 0; j < N; j += WIDTH) {
            const Vec x = load_some(k + j, N - j) * load_some(k_k + j, N - j);
            squares += x * x;
        }
        const float scale = 1.0f / std::max(std::sqrt(sum(squares)), LEAST);
        for (int64_t j = 0; j < N; j += WIDTH) {
            const int64_t left = N - j;
            const Vec x = load_some(k + j, left), kk = x * load_some(k_k + j, left) * scale;
            const Vec rate = sigmoid(load_some(za + j, left) + load_some(vector(layer, A0) + c + j, left));
            const Vec now = x + x * (rate - 1.0f) * load_some(k_a + j, left);
            const Vec speed = sigmoid(load_some(zw + j, left) + load_some(vector(layer, W0) + c + j, left)) * HALF_ROOT;
            store(minus + j, -kk), store(b + j, kk * rate), store(key + j, now);
            store(d + j, exponential_less_1(-speed)), store(read + j, load_some(r + j, left));
            bonus += load_some(r + j, left) * now * load_some(r_k + j, left);
        }
        Vec total = {};
        for (int64_t i = 0; i < N; i++) {
            float *row = S + i * N;
            ask(row + N * N, N);  // of the next head
            Vec with_a = {}, with_r = {};
            for (int64_t j = 0; j < N; j += WIDTH) with_a += load_some(row + j, N - j) * load(minus + j);
            const Vec u = all(sum(with_a)), vi = all(v[i]);
            for (int64_t j = 0; j < N; j += WIDTH) {
                const Vec before = load_some(row + j, N - j), kept = before + before * load(d + j);
                const Vec now = kept + u * load(b + j) + vi * load(key + j);
                store_some(row + j, now, N - j);
                with_r += now * load(read + j);
            }
            y[i] = sum(with_r);
        }
        for (int64_t j = 0; j < N; j += WIDTH) total += load(y + j);
        const float mean = sum(total) / N, own = sum(bonus);
        squares = Vec{};
        for (int64_t j = 0; j < N; j += WIDTH) {
            const Vec x = only(load(y + j) - mean, N - j);
            squares += x * x;
        }
        const float by = 1.0f / std::sqrt(sum(squares) / N + 64e-5f);
        const float *weight = vector(layer, LN_X) + c, *bias = vector(layer, LN_X_BIAS) + c;
        for (int64_t j = 0; j < N; j += WIDTH) {
            const int64_t left = N - j;
            const Vec x = (load(y + j) - mean) * by * load_some(weight + j, left) + load_some(bias + j, left);
            store_some(r + j, (x + own * load_some(v + j, left)) * load_some(gate + j, left), left);
        }
    }

    struct Rooms {
        Room x, normed, r, k, v, w, a, g, first, mixed, low, wide;
        float *heads;
    };

    void low_rank(int64_t layer, int which, int share, int64_t begin, int64_t count, int threads, const Rooms &at,
                  const Room &to) const {
        const int64_t rank = ranks[(which - W1) / 2];
        for (int64_t i = 0; i < count; i++)
            mix(at.normed[i], att_x[layer] + (begin + i) * D, vector(layer, share), at.mixed[i], D);
        times(matrix(layer, which), count, threads, at.mixed, at.low);
        for (int64_t i = 0; i < count; i++) {
            if (which == W1) change(at.low[i], rank, tangent);
            if (which == G1) change(at.low[i], rank, sigmoid);
        }
        times(matrix(layer, which + 1), count, threads, at.low, to);
    }

    void time_mix(int64_t layer, int64_t begin, int64_t count, int threads, const Rooms &at) const {
        const Room *to[] = {&at.r, &at.k, &at.v};
        const int shares[] = {X_R, X_K, X_V};
        for (int64_t i = 0; i < count; i++)
            norm(at.x[i], vector(layer, LN1), vector(layer, LN1_BIAS), at.normed[i], D);
        for (int n = 0; n < 3; n++) {
            for (int64_t i = 0; i < count; i++)
                mix(at.normed[i], att_x[layer] + (begin + i) * D, vector(layer, shares[n]), at.mixed[i], D);
            times(matrix(layer, RECEPTANCE + n), count, threads, at.mixed, *to[n]);
        }
        low_rank(layer, W1, X_W, begin, count, threads, at, at.w);
        low_rank(layer, A1, X_A, begin, count, threads, at, at.a);
        low_rank(layer, G1, X_G, begin, count, threads, at, at.g);
        if (layer) low_rank(layer, V1, X_V, begin, count, threads, at, at.mixed);
        for (int64_t i = 0; i < count; i++) {
            for (int64_t j = 0; j < D; j += WIDTH) {
                const int64_t left = D - j;
                const Vec v = load_some(at.v[i] + j, left);
                if (!layer) {
                    store_some(at.first[i] + j, v, left);
                    continue;
                }
                const Vec part = sigmoid(load_some(at.mixed[i] + j, left) + load_some(vector(layer, V0) + j, left));
                store_some(at.v[i] + j, v + (load_some(at.first[i] + j, left) - v) * part, left);
            }
            copy(att_x[layer] + (begin + i) * D, at.normed[i], D);
        }
        const int64_t N = D / H;
        for (int64_t n = 0; n < count * H; n++) {
            const int64_t i = n / H, h = n % H, c = h * N;
            float *S = memory[layer] + ((begin + i) * H + h) * N * N;
            recall(layer, h, S, at.r[i] + c, at.k[i] + c, at.v[i] + c, at.w[i] + c, at.a[i] + c, at.g[i] + c, at.heads);
        }
        times(matrix(layer, OUTPUT), count, threads, at.r, at.mixed);
    }

    void rows_of(int64_t begin, int64_t count, int threads) const {
        const int64_t widest = std::max({D, ranks[0], ranks[1], ranks[2], ranks[3]});
        const int64_t step = whole(widest) + WIDTH, long_step = whole(F) + WIDTH, total = 11 * step + long_step;
        float *start = scratch(count * total + 6 * whole(D / H));
        zero(start, count * total);
        const auto room = [&](int64_t n) { return Room{start + n * count * step, step}; };
        const Rooms at = {room(0), room(1), room(2), room(3), room(4), room(5), room(6), room(7), room(8), room(9),
                          room(10), {start + 11 * count * step, long_step}, start + count * total};
        embed(begin, count, at.x);
        for (int64_t layer = 0; layer < L; layer++) {
            time_mix(layer, begin, count, threads, at);
            for (int64_t i = 0; i < count; i++) {
                add(at.x[i], at.mixed[i], D);
                norm(at.x[i], vector(layer, LN2), vector(layer, LN2_BIAS), at.normed[i], D);
                mix(at.normed[i], ffn_x[layer] + (begin + i) * D, vector(layer, FFN_X_K), at.mixed[i], D);
                copy(ffn_x[layer] + (begin + i) * D, at.normed[i], D);
            }
            times(matrix(layer, FFN_KEY), count, threads, at.mixed, at.wide);
            for (int64_t i = 0; i < count; i++) change(at.wide[i], F, squared);
            times(matrix(layer, FFN_VALUE), count, threads, at.wide, at.mixed);
            for (int64_t i = 0; i < count; i++) add(at.x[i], at.mixed[i], D);
        }
        finish(begin, count, threads, L * MATRICES, at.x, at.normed);
    }
};

}  // namespace

extern "C" {

// sizes: rows L D H F V, and the ranks of w a v g. States are overwritten by those after.
// fixed: embedding, the first norm (or null), the last; vectors and matrices: of each layer, and the head; lies: the
// Kind of each matrix
// takes R L D H F V dw da dv dg: fixed 5 of any, vectors 19*L of any, matrices scales 14*L+1 of any, lies 14*L+1, att_x
// L of R*D, memory L of R*D*D//H, ffn_x L of R*D, ids R, logits R*V
void decode7(const int64_t *s, int threads, const float *const *fixed, const float *const *vectors,
             const void *const *matrices, const float *const *scales, const int64_t *lies, float *const *att_x,
             float *const *memory, float *const *ffn_x, const int64_t *ids, float *logits) {
    const Decode it = {{s[0], s[1], s[2], s[3], s[4], s[5], fixed, vectors, matrices, scales, lies, att_x, memory, ffn_x,
                        ids, logits}, {s[6], s[7], s[8], s[9]}};
    in_pieces(it.rows, threads, [&](int64_t begin, int64_t count, int on) { it.rows_of(begin, count, on); });
}

}  // extern "C"
