// Texts through all layers of an RWKV-7 whose matrices lie in panels, as read.h has it for all families.
// rwkvpipe/model/rwkv7.py has the same in PyTorch.

#include "read.h"

namespace {

using reading::Piece, reading::Rows;

struct Read : reading::Layers<Read> {
    int64_t ranks[4];

    enum Vectors { X_R = NORMS, X_W, X_K, X_V, X_A, X_G, W0, A0, K_K, K_A, R_K, LN_X, LN_X_BIAS, FFN_X_K, V0, VECTORS };
    enum Matrices { RECEPTANCE, KEY, VALUE, OUTPUT, W1, W2, A1, A2, V1, V2, G1, G2, FFN_KEY, FFN_VALUE, MATRICES };

    int64_t out(int which) const {
        const int low = which - W1;
        return which == FFN_KEY ? F : which >= W1 && which <= G2 && low % 2 == 0 ? ranks[low / 2] : D;
    }
    int64_t low_numbers() const { return *std::max_element(ranks, ranks + 4); }

    // y is what is read from the memory
    void remember(int64_t layer, const Piece &p, float *y) const {
        const float *minus = p.mixed[2].start, *b = p.mixed[3].start;
        recall(layer, p, y, [&](int64_t row, int64_t count, int64_t tokens, float *S) {
            const int64_t sizes[] = {count, tokens, H, D / H}, at = row * p.T * D;
            wkv7_forward(sizes, p.threads, p.r + at, p.w + at, p.k + at, p.v + at, minus + at, b + at, S, y + at, S,
                         nullptr, nullptr);
        });
    }

    float *time_mix(int64_t layer, const Piece &p) const {
        const auto same = [](Vec x) { return x; };
        mix_rows<6>(layer, X_R, p, p.mixed, att_x);
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
        remember(layer, p, y);
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
        mix_rows<1>(layer, FFN_X_K, p, p.mixed, ffn_x);
        times(layer, FFN_KEY, p, p.mixed[0], p.wide);
        squares(layer, FFN_VALUE, p, p.mixed[0].start);
        return p.mixed[0].start;
    }
};

}  // namespace

extern "C" {

// sizes: rows tokens L D H F, and the ranks of w a v g. The stream x and the states are overwritten by those after;
// lengths: how many tokens there are of each row, or null. vectors and matrices: of each layer; lies: the Kind of each
// matrix, INT8 of all or of none
// takes R T L D H F dw da dv dg: lengths? R, vectors 19*L of any, matrices scales 14*L of any, lies 14*L, att_x L of
// R*D, memory L of R*D*D//H, ffn_x L of R*D, x R*T*D
void read7(const int64_t *s, int threads, const int64_t *lengths, const float *const *vectors,
           const void *const *matrices, const float *const *scales, const int64_t *lies, float *const *att_x,
           float *const *memory, float *const *ffn_x, float *x) {
    const Read it = {{{s[0], s[1], s[2], s[3], s[4], s[5], lengths, vectors, matrices, scales, lies, att_x, memory,
                       ffn_x, x}}, {s[6], s[7], s[8], s[9]}};
    it.read(threads);
}

}  // extern "C"
