// Texts through all layers of an RWKV-7 whose matrices lie in panels, in one call: what each layer is made of is
// computed by the functions of the other files, in room that is there already. rwkvpipe/model/rwkv7.py has the same
// in PyTorch.
//
// A row has the same bits whatever rows are beside it, and however many threads there are, as each part has it.

#include "parts.h"
#include "tasks.h"
#include "token.h"

namespace {

constexpr int64_t TOKENS_AT_ONCE = 512;  // room for them is kept; more go through all layers after each other

struct Read {
    int64_t rows, T, L, D, H, F, ranks[4];
    const int64_t *lengths;  // or null: all are T
    const float *const *vectors;
    const void *const *matrices;
    const float *const *scales;
    const int64_t *lies;  // of each matrix its Kind
    float *const *att_x, *const *memory, *const *ffn_x;
    float *x;

    enum Vectors { LN1, LN1_BIAS, LN2, LN2_BIAS, X_R, X_W, X_K, X_V, X_A, X_G, W0, A0, K_K, K_A, R_K, LN_X,
                   LN_X_BIAS, FFN_X_K, V0, VECTORS };
    enum Matrices { RECEPTANCE, KEY, VALUE, OUTPUT, W1, W2, A1, A2, V1, V2, G1, G2, FFN_KEY, FFN_VALUE, MATRICES };

    const float *vector(int64_t layer, int which) const { return vectors[layer * VECTORS + which]; }

    // rows that a matrix reads, `width` numbers each: as they are, or, rounded, in the room that they would take
    struct Rows {
        float *start;
        int64_t width;
        float *by;
    };

    // rows that go together, some tokens of each, and room for what becomes of them
    struct Piece {
        int64_t begin, count, from, T, tokens;
        int threads;
        float *x, *normed, *first, *r, *k, *v, *w, *a, *g, *low, *wide, *by;
        Rows mixed[6];
    };

    static int64_t blocks_of(int64_t width) { return fixed::BESIDE_8.blocks(width); }

    void times(int64_t layer, int which, const Piece &p, const Rows &x, float *to) const {
        const int64_t n = layer * MATRICES + which, low = which >= W1 && which <= G2 ? ranks[(which - W1) / 2] : 0;
        const int64_t out = which == FFN_KEY ? F : low && (which - W1) % 2 == 0 ? low : D;
        const Asked asked = {x.start, x.width, x.by, blocks_of(x.width)};
        const Matrix matrix = {matrices[n], scales[n], out, x.width, static_cast<Kind>(lies[n])};
        products(matrix, p.tokens, p.threads, asked, to);
    }

    // MANY rows of each token as matrices read them: make(t, count, to) says what they are for a few tokens of a row of
    // the piece, `to` being where each of the MANY begins
    template <int MANY, class Make>
    void lay(const Piece &p, const Rows *rows, const Make &make) const {
        constexpr int64_t FEW = 4;
        const int64_t width = rows->width;
        over(p.tokens, p.threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
            float *room = lies[RECEPTANCE] == INT8 ? scratch(MANY * FEW * width) : nullptr, *to[MANY];
            for (int64_t t = begin, count; t < end; t += count) {
                count = std::min({FEW, end - t, p.T - t % p.T});
                for (int i = 0; i < MANY; i++) to[i] = room ? room + i * FEW * width : rows[i].start + t * width;
                make(t, count, to);
                for (int64_t n = 0; room && n < MANY * count; n++) {
                    const Rows &x = rows[n / count];
                    const int64_t c = n % count;
                    fixed::rounded(fixed::BESIDE_8, to[n / count] + c * width, width,
                                   reinterpret_cast<int16_t *>(x.start + (t + c) * width),
                                   x.by + (t + c) * blocks_of(width), 1);
                }
            }
        });
    }

    template <class Change>
    void low_rank(int64_t layer, int which, const Piece &p, const Rows &x, float *to, const Change &how) const {
        const Rows low = {p.low, ranks[(which - W1) / 2], p.by};
        times(layer, which, p, x, p.low);
        lay<1>(p, &low, [&](int64_t t, int64_t count, float *const *y) {
            const float *from = p.low + t * low.width;
            const int64_t n = count * low.width;
            for (int64_t j = 0; j < n; j += WIDTH) store_some(*y + j, how(load_some(from + j, n - j)), n - j);
        });
        times(layer, which + 1, p, low, to);
    }

    // what is to be added to the stream is; then it is normalised
    void normalise(int64_t layer, int which, const Piece &p, const float *more) const {
        over(p.tokens, p.threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
            for (int64_t t = begin; t < end; t++) {
                if (more) add(p.x + t * D, more + t * D, D);
                norm(p.x + t * D, vector(layer, which), vector(layer, which + 1), p.normed + t * D, D);
            }
        });
    }

    // tokens of a row of a piece that there are
    int64_t there(const Piece &p, int64_t row) const {
        return lengths ? std::clamp<int64_t>(lengths[p.begin + row] - p.from, 0, p.T) : p.T;
    }

    // mixes of what is normalised with what was before it; the last of it is kept for what comes
    template <int MANY>
    void mix_rows(int64_t layer, int share, const Piece &p, float *const *kept) const {
        float *last = kept[layer] + p.begin * D;
        lay<MANY>(p, p.mixed, [&](int64_t t, int64_t count, float *const *to) {
            const int64_t sizes[] = {1, count, D, MANY};
            const float *x = p.normed + t * D, *before = t % p.T ? x - D : last + t / p.T * D;
            mix_forward(sizes, 1, x, before, vectors + layer * VECTORS + share, to);
        });
        for (int64_t i = 0; i < p.count; i++) {
            const int64_t tokens = there(p, i);
            if (tokens) copy(last + i * D, p.normed + (i * p.T + tokens - 1) * D, D);
        }
    }

    // the memory takes tokens in, those that there are of each row; y is what is read from it
    void recall(int64_t layer, const Piece &p, const float *v, float *y) const {
        const int64_t N = D / H, square = D * N;
        float *w = p.w, *key = p.k, *minus = p.mixed[2].start, *b = p.mixed[3].start;
        float *S = memory[layer] + p.begin * square;
        const auto run = [&](int64_t row, int64_t count, int64_t tokens) {
            const int64_t sizes[] = {count, tokens, H, N}, at = row * p.T * D;
            float *own = S + row * square;
            wkv7_forward(sizes, p.threads, p.r + at, w + at, key + at, v + at, minus + at, b + at, own, y + at, own,
                         nullptr, nullptr);
        };
        if (!lengths) return run(0, p.count, p.T);
        zero(y, p.tokens * D);
        for (int64_t i = 0; i < p.count; i++)
            if (const int64_t tokens = there(p, i)) run(i, 1, tokens);
    }

    // what is to be added to the stream
    float *time_mix(int64_t layer, const Piece &p) const {
        const auto same = [](Vec x) { return x; };
        mix_rows<6>(layer, X_R, p, att_x);
        float *minus = p.mixed[2].start, *b = p.mixed[3].start, *y = p.mixed[5].start, *found = p.mixed[0].start;
        times(layer, RECEPTANCE, p, p.mixed[0], p.r);
        times(layer, KEY, p, p.mixed[2], p.k);
        times(layer, VALUE, p, p.mixed[3], p.v);
        low_rank(layer, W1, p, p.mixed[1], p.w, tangent);
        low_rank(layer, A1, p, p.mixed[4], p.a, same);
        low_rank(layer, G1, p, p.mixed[5], p.g, sigmoid);
        if (layer) {
            low_rank(layer, V1, p, p.mixed[3], found, same);
            const int64_t sizes[] = {p.tokens, D};
            lean_forward(sizes, p.threads, p.v, p.first, found, vector(layer, V0), p.v);
        } else {
            copy(p.first, p.v, p.tokens * D);
        }
        const int64_t sizes[] = {p.tokens, H, D / H};
        prepare_forward(sizes, p.threads, p.k, p.w, p.a, vector(layer, W0), vector(layer, A0), vector(layer, K_K),
                        vector(layer, K_A), p.w, p.k, minus, b);
        recall(layer, p, p.v, y);
        const Rows heard = {p.a, D, p.by};
        lay<1>(p, &heard, [&](int64_t t, int64_t count, float *const *to) {
            const int64_t few[] = {count, H, D / H}, at = t * D;
            finish_forward(few, 1, y + at, p.r + at, p.k + at, p.v + at, p.g + at, vector(layer, R_K),
                           vector(layer, LN_X), vector(layer, LN_X_BIAS), 64e-5f, *to);
        });
        times(layer, OUTPUT, p, heard, found);
        return found;
    }

    float *channel_mix(int64_t layer, const Piece &p) const {
        mix_rows<1>(layer, FFN_X_K, p, ffn_x);
        const Rows wide = {p.wide, F, p.by};
        times(layer, FFN_KEY, p, p.mixed[0], p.wide);
        lay<1>(p, &wide, [&](int64_t t, int64_t count, float *const *to) {
            const int64_t n = count * F;
            square_forward(&n, 1, p.wide + t * F, *to);
        });
        times(layer, FFN_VALUE, p, wide, p.mixed[0].start);
        return p.mixed[0].start;
    }

    void piece(int64_t begin, int64_t count, int64_t from, int64_t tokens, int threads) const {
        Piece p = {};
        p.begin = begin, p.count = count, p.from = from, p.T = tokens, p.tokens = count * tokens, p.threads = threads;
        const int64_t size = whole(p.tokens * D), most = *std::max_element(ranks, ranks + 4);
        const int64_t by = whole(p.tokens * blocks_of(std::max({D, F, most})));
        float *next = scratch(14 * size + 7 * by + whole(p.tokens * most) + p.tokens * F, READING);
        const auto room = [&](int64_t n) { return next += n, next - n; };
        p.x = x + (begin * T + from) * D, p.normed = room(size), p.first = room(size), p.by = room(by);
        for (Rows &mixed : p.mixed) mixed = {room(size), D, room(by)};
        p.r = room(size), p.k = room(size), p.v = room(size), p.w = room(size), p.a = room(size), p.g = room(size);
        p.low = room(whole(p.tokens * most)), p.wide = next;
        const float *more = nullptr;
        for (int64_t layer = 0; layer < L; layer++) {
            normalise(layer, LN1, p, more);
            normalise(layer, LN2, p, time_mix(layer, p));
            more = channel_mix(layer, p);
        }
        for (int64_t t = 0; t < p.tokens; t++) add(p.x + t * D, more + t * D, D);
    }
};

}  // namespace

extern "C" {

// sizes: rows tokens L D H F, and the ranks of w a v g. The stream x and the states are overwritten by those after;
// lengths: how many tokens there are of each row, or null. vectors and matrices: of each layer; lies: the Kind of each
// matrix, INT8 of all or of none
// takes R T L D H F dw da dv dg: lengths? R, vectors 19*L of any, matrices scales 14*L of any, lies 14*L, att_x L of R*D,
// memory L of R*D*D//H, ffn_x L of R*D, x R*T*D
void read7(const int64_t *s, int threads, const int64_t *lengths, const float *const *vectors,
           const void *const *matrices, const float *const *scales, const int64_t *lies, float *const *att_x,
           float *const *memory, float *const *ffn_x, float *x) {
    const Read it = {s[0], s[1], s[2], s[3], s[4], s[5], {s[6], s[7], s[8], s[9]}, lengths, vectors, matrices,
                     scales, lies, att_x, memory, ffn_x, x};
    const int64_t together = std::max<int64_t>(1, TOKENS_AT_ONCE / it.T);
    for (int64_t row = 0; row < it.rows; row += together)
        for (int64_t t = 0; t < it.T; t += TOKENS_AT_ONCE)
            it.piece(row, std::min(together, it.rows - row), t, std::min(TOKENS_AT_ONCE, it.T - t), threads);
}

}  // extern "C"
