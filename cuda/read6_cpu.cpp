// Texts through all layers of an RWKV-6 or RWKV-5.2 whose matrices lie in panels, as read.h has it for all families.
// rwkvpipe/model/rwkv6.py and rwkv5.py have the same in PyTorch.

#include "read.h"

namespace {

using reading::Piece, reading::Rows;

constexpr int SLOTS = 5;  // what a token's own shifts are for: w k v r g

struct Read : reading::Layers<Read> {
    int64_t mixed, low;  // ranks of what is mixed, and of decays; 0 for RWKV-5

    // MIX (D, SLOTS * mixed) and MIX_2 (SLOTS, mixed, D) lie as parameters do
    enum Vectors { X_X = NORMS, X_W, X_K, X_V, X_R, X_G, DECAY, BONUS, LN_X, LN_X_BIAS, FFN_X_K, FFN_X_R, MIX, MIX_2,
                   VECTORS };
    enum Matrices { RECEPTANCE, KEY, VALUE, GATE, OUTPUT, FFN_KEY, FFN_VALUE, FFN_RECEPTANCE, DECAY_1, DECAY_2,
                    MATRICES };

    int64_t out(int which) const { return which == FFN_KEY ? F : which == DECAY_1 ? low : D; }
    int64_t low_numbers() const { return std::max(2 * SLOTS * mixed, low); }

    // how far each token goes to the one before it, for each slot, where that slot's rows will lie
    void shift(int64_t layer, const Piece &p) const {
        const int64_t rows[] = {p.count, p.T, D, 1}, wide = SLOTS * mixed, slot = p.tokens * mixed;
        float *before = p.low, *parts = p.low + p.tokens * wide, *own = p.a;
        const float *share = vector(layer, X_X);
        mix_forward(rows, p.threads, p.normed, att_x[layer] + p.begin * D, &share, &own);
        const int64_t first[] = {p.tokens, D, wide, 0, 0, 0, 0}, second[] = {p.tokens, mixed, D, 0, 0, 0, 0};
        multiply(first, p.threads, own, vector(layer, MIX), before);
        over(p.tokens, p.threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
            for (int64_t t = begin; t < end; t++)
                for (int n = 0; n < SLOTS; n++) {
                    float *to = parts + n * slot + t * mixed;
                    copy(to, before + t * wide + n * mixed, mixed);
                    change(to, mixed, tangent);
                }
        });
        for (int n = 0; n < SLOTS; n++)
            multiply(second, p.threads, parts + n * slot, vector(layer, MIX_2) + n * mixed * D, p.mixed[n].start);
    }

    // what matrices read of tokens that say themselves how far they go, and their decays
    void drift_rows(int64_t layer, const Piece &p) const {
        shift(layer, p);
        const float *const *shares = vectors + layer * VECTORS + X_W;
        blend_rows<SLOTS>(layer, p, p.mixed, att_x, [&](int64_t t, int64_t count, const float *x, const float *before,
                                                        float *const *to) {
            const int64_t sizes[] = {1, count, D};
            const float *shifts[SLOTS];
            for (int n = 0; n < SLOTS; n++) shifts[n] = p.mixed[n].start + t * D;
            drift_forward(sizes, 1, x, before, shifts, shares, to);
        });
        low_rank(layer, DECAY_1, p, p.mixed[0], p.w, tangent);
        over(p.tokens, p.threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
            for (int64_t t = begin; t < end; t++) add(p.w + t * D, vector(layer, DECAY), D);
        });
    }

    float *time_mix(int64_t layer, const Piece &p) const {
        mixed ? drift_rows(layer, p) : mix_rows<4>(layer, X_K, p, p.mixed + 1, att_x);
        times(layer, KEY, p, p.mixed[1], p.k);
        times(layer, VALUE, p, p.mixed[2], p.v);
        times(layer, RECEPTANCE, p, p.mixed[3], p.r);
        times(layer, GATE, p, p.mixed[4], p.g);
        float *y = p.mixed[0].start, *found = p.mixed[1].start;
        recall(layer, p, y, [&](int64_t row, int64_t count, int64_t tokens, float *S) {
            const int64_t sizes[] = {count, tokens, H, D / H, !mixed}, at = row * p.T * D;
            wkv6_forward(sizes, p.threads, p.r + at, mixed ? p.w + at : vector(layer, DECAY), p.k + at, p.v + at,
                         vector(layer, BONUS), S, y + at, S, nullptr);
        });
        const Rows heard = {p.a, D, p.by};
        lay<1>(p, &heard, [&](int64_t t, int64_t count, float *const *to) {
            const int64_t few[] = {count, H, D / H}, at = t * D;
            gate_forward(few, 1, y + at, p.g + at, vector(layer, LN_X), vector(layer, LN_X_BIAS), 64e-5f, *to);
        });
        times(layer, OUTPUT, p, heard, found);
        return found;
    }

    float *channel_mix(int64_t layer, const Piece &p) const {
        mix_rows<2>(layer, FFN_X_K, p, p.mixed, ffn_x);
        times(layer, FFN_KEY, p, p.mixed[0], p.wide);
        times(layer, FFN_RECEPTANCE, p, p.mixed[1], p.r);
        squares(layer, FFN_VALUE, p, p.v);
        const int64_t n = p.tokens * D;
        sift_forward(&n, p.threads, p.r, p.v, p.v);
        return p.v;
    }
};

}  // namespace

extern "C" {

// sizes: rows tokens L D H F, and the ranks of what is mixed and of decays (both 0 for RWKV-5); all else as for read7
// takes R T L D H F mixed low: lengths? R, vectors 18*L of any, matrices scales 10*L of any, lies 10*L, att_x L of R*D,
// memory L of R*D*D//H, ffn_x L of R*D, x R*T*D
void read6(const int64_t *s, int threads, const int64_t *lengths, const float *const *vectors,
           const void *const *matrices, const float *const *scales, const int64_t *lies, float *const *att_x,
           float *const *memory, float *const *ffn_x, float *x) {
    const Read it = {{{s[0], s[1], s[2], s[3], s[4], s[5], lengths, vectors, matrices, scales, lies, att_x, memory,
                       ffn_x, x}}, s[6], s[7]};
    it.read(threads);
}

}  // extern "C"
