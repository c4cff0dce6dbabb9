// Texts through all layers of a model whose matrices lie in panels, in one call: what is alike in all families. What
// each layer is made of is computed by the functions of the other files, in room that is there already.
//
// A row has the same bits whatever rows are beside it, and however many threads there are, as each part has it.
#pragma once

#include "parts.h"
#include "tasks.h"
#include "token.h"

namespace reading {

constexpr int64_t TOKENS_AT_ONCE = 512;  // room for them is kept; more go through all layers after each other

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

inline int64_t blocks_of(int64_t width) { return fixed::BESIDE_8.blocks(width); }

// what a call is given
struct Texts {
    int64_t rows, T, L, D, H, F;
    const int64_t *lengths;  // or null: all are T
    const float *const *vectors;
    const void *const *matrices;
    const float *const *scales;
    const int64_t *lies;  // of each matrix its Kind
    float *const *att_x, *const *memory, *const *ffn_x;
    float *x;

    enum Norms { LN1, LN1_BIAS, LN2, LN2_BIAS, NORMS };  // each family's vectors begin with these
};

// A family is Layers<Family> with VECTORS and MATRICES, how many each layer has; out(which), how many numbers that
// matrix makes; low_numbers(), of a token what goes through low ranks at once; time_mix and channel_mix, what is added
// to the stream.
template <class Family>
struct Layers : Texts {
    const Family &own() const { return static_cast<const Family &>(*this); }
    const float *vector(int64_t layer, int which) const { return vectors[layer * Family::VECTORS + which]; }

    void times(int64_t layer, int which, const Piece &p, const Rows &x, float *to) const {
        const int64_t n = layer * Family::MATRICES + which;
        const Asked asked = {x.start, x.width, x.by, blocks_of(x.width)};
        const Matrix matrix = {matrices[n], scales[n], own().out(which), x.width, static_cast<Kind>(lies[n])};
        products(matrix, p.tokens, p.threads, asked, to);
    }

    // MANY rows of each token as matrices read them: make(t, count, to) says what they are for a few tokens of a row of
    // the piece, `to` being where each of the MANY begins
    template <int MANY, class Make>
    void lay(const Piece &p, const Rows *rows, const Make &make) const {
        constexpr int64_t FEW = 4;
        const int64_t width = rows->width;
        over(p.tokens, p.threads, 0, nullptr, nullptr, [&](int64_t begin, int64_t end, float *) {
            float *room = lies[0] == INT8 ? scratch(MANY * FEW * width) : nullptr, *to[MANY];
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

    // the matrix `which`, a change, and the matrix after it
    template <class Change>
    void low_rank(int64_t layer, int which, const Piece &p, const Rows &x, float *to, const Change &how) const {
        const Rows low = {p.low, own().out(which), p.by};
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

    // MANY rows of what is normalised and what was before it: blend(t, count, x, before, to) for tokens of one row; the
    // last of it is kept for what comes
    template <int MANY, class Blend>
    void blend_rows(int64_t layer, const Piece &p, const Rows *rows, float *const *kept, const Blend &blend) const {
        float *last = kept[layer] + p.begin * D;
        lay<MANY>(p, rows, [&](int64_t t, int64_t count, float *const *to) {
            const float *x = p.normed + t * D;
            blend(t, count, x, t % p.T ? x - D : last + t / p.T * D, to);
        });
        for (int64_t i = 0; i < p.count; i++) {
            const int64_t tokens = there(p, i);
            if (tokens) copy(last + i * D, p.normed + (i * p.T + tokens - 1) * D, D);
        }
    }

    // the same by shares that all tokens have, from `share` on
    template <int MANY>
    void mix_rows(int64_t layer, int share, const Piece &p, const Rows *rows, float *const *kept) const {
        const float *const *shares = vectors + layer * Family::VECTORS + share;
        blend_rows<MANY>(layer, p, rows, kept, [&](int64_t, int64_t count, const float *x, const float *before,
                                                   float *const *to) {
            const int64_t sizes[] = {1, count, D, MANY};
            mix_forward(sizes, 1, x, before, shares, to);
        });
    }

    // the memory takes tokens in, those that there are of each row: run(row, count, tokens, S); y, which is read from
    // it, is zero for others
    template <class Run>
    void recall(int64_t layer, const Piece &p, float *y, const Run &run) const {
        const int64_t square = D * (D / H);
        float *S = memory[layer] + p.begin * square;
        if (!lengths) return run(0, p.count, p.T, S);
        zero(y, p.tokens * D);
        for (int64_t i = 0; i < p.count; i++)
            if (const int64_t tokens = there(p, i)) run(i, 1, tokens, S + i * square);
    }

    // wide rows squared, and the matrix that reads them
    void squares(int64_t layer, int which, const Piece &p, float *to) const {
        const Rows wide = {p.wide, F, p.by};
        lay<1>(p, &wide, [&](int64_t t, int64_t count, float *const *y) {
            const int64_t n = count * F;
            square_forward(&n, 1, p.wide + t * F, *y);
        });
        times(layer, which, p, wide, to);
    }

    void piece(int64_t begin, int64_t count, int64_t from, int64_t tokens, int threads) const {
        Piece p = {};
        p.begin = begin, p.count = count, p.from = from, p.T = tokens, p.tokens = count * tokens, p.threads = threads;
        const int64_t low = own().low_numbers(), size = whole(p.tokens * D);
        const int64_t by = whole(p.tokens * blocks_of(std::max({D, F, low})));
        float *next = scratch(14 * size + 7 * by + whole(p.tokens * low) + p.tokens * F, READING);
        const auto room = [&](int64_t n) { return next += n, next - n; };
        p.x = x + (begin * T + from) * D, p.normed = room(size), p.first = room(size), p.by = room(by);
        for (Rows &mixed : p.mixed) mixed = {room(size), D, room(by)};
        p.r = room(size), p.k = room(size), p.v = room(size), p.w = room(size), p.a = room(size), p.g = room(size);
        p.low = room(whole(p.tokens * low)), p.wide = next;
        const float *more = nullptr;
        for (int64_t layer = 0; layer < L; layer++) {
            normalise(layer, LN1, p, more);
            normalise(layer, LN2, p, own().time_mix(layer, p));
            more = own().channel_mix(layer, p);
        }
        for (int64_t t = 0; t < p.tokens; t++) add(p.x + t * D, more + t * D, D);
    }

    void read(int threads) const {
        const int64_t together = std::max<int64_t>(1, TOKENS_AT_ONCE / T);
        for (int64_t row = 0; row < rows; row += together)
            for (int64_t t = 0; t < T; t += TOKENS_AT_ONCE)
                piece(row, std::min(together, rows - row), t, std::min(TOKENS_AT_ONCE, T - t), threads);
    }
};

}  // namespace reading
