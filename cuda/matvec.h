// Products of matrices (out, in) with rows of x, few or many: to[r][o] = sum over k of matrix[o][k] x[r][k].
//
// Each number is one sum, its products added in the order of k (by lanes where the matrix lies by ROWS), so that a row
// has the same bits whatever rows are beside it, and however many threads there are. Where the matrix is of INT8, x is
// rounded to whole numbers, too (fixed.h), and the products of BLOCK of them are added exactly.
#pragma once

#include "fixed.h"
#include "threads.h"
#include "vector.h"

#include <algorithm>

// How a matrix lies: ROWS is fp32, a row after the other. The others lie in panels of 16 rows: 16 numbers for each k,
// or for INT8 16 pairs for every two, side by side, so that what is read is added as it comes. What fills up the last
// panel and the last pair is never stored.
enum Kind { ROWS, FP32, BF16, INT8 };
constexpr int PANEL = 16, SPAN = PANEL / WIDTH;

struct Matrix {
    const void *data;
    const float *scale;  // of each row, for INT8
    int64_t out, in;
    Kind kind;
    int64_t words() const { return kind == INT8 ? (in + 1) / 2 : in; }  // of a row of x
};

// rows side by side; those that are multiplied by a matrix in ROWS are filled up with zeros to whole vectors
struct Room {
    float *start;
    int64_t step;
    float *operator[](int64_t row) const { return start + row * step; }
};

// rows of x as a matrix multiplies them: numbers, or for INT8 pairs of whole ones and what each BLOCK is times
struct Asked {
    const float *start;
    int64_t step;
    const float *by;
    int64_t by_step;
};

namespace product {

constexpr int64_t LARGE = 1 << 18;  // numbers of a matrix that are worth another thread
constexpr int64_t AHEAD = 4096;     // bytes that are asked for before they are needed

// rows of x, and panels, whose sums the registers have room for
#if defined(__AVX512F__)
constexpr int TALL = 12, AT_8 = 2, AT_4 = 4, AT_2 = 8, AT_1 = 4;
#elif defined(__AVX__)
constexpr int TALL = 6, AT_8 = 1, AT_4 = 1, AT_2 = 2, AT_1 = 4;
#elif defined(__aarch64__)
constexpr int TALL = 6, AT_8 = 1, AT_4 = 1, AT_2 = 2, AT_1 = 4;
#else
constexpr int TALL = 3, AT_8 = 1, AT_4 = 1, AT_2 = 1, AT_1 = 2;
#endif
constexpr int64_t TOGETHER = 8;  // panels that all rows of x meet before the next ones

typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

// sums of products of floats, a word of x each
struct Floats {
    typedef Vec Sum;
    static constexpr int64_t EACH = 1;  // numbers of a matrix's row that meet a word of x
    static constexpr bool SCALED = false;  // whether what they are times is of blocks of its row, too
    static Vec begun(Vec before) { return before; }
    static Vec spread(const float *x) { return all(*x); }
    static Vec added(Vec sum, Vec w, Vec x) { return sum + w * x; }
};

// numbers of a matrix as vectors of words that are multiplied
struct Wide : Floats {
    typedef float Number;
    static Vec at(const float *p) { return load(p); }
};
struct Half : Floats {
    typedef uint16_t Number;
    static Vec at(const uint16_t *p) {
#if defined(__AVX512F__)
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
        return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves *>(p), Ints) << 16);
#endif
    }
};
struct Pair {
    typedef int8_t Number;
    typedef Ints Sum;
    static constexpr int64_t EACH = 2, BLOCK = fixed::BESIDE_8.block;
    static constexpr bool SCALED = false;
    static Vec at(const int8_t *p) { return (Vec)fixed::widened(p); }
    static Ints begun(Vec) { return Ints{}; }
    static Ints spread(const float *x) { return *reinterpret_cast<const fixed::Word *>(x) + Ints{}; }
    static Ints added(Ints sum, Vec w, Ints x) { return fixed::dot(sum, (fixed::Shorts)w, (fixed::Shorts)x); }
};

// of 16 bits on both sides
struct Alike : Pair {
    static constexpr int64_t BLOCK = fixed::ALIKE.block;
    static constexpr bool SCALED = true;
};

// what becomes of a sum of whole numbers, times what they are times, and of one of floats
inline Vec ended(Ints sum, Vec before, Vec by) { return fixed::joined(before, __builtin_convertvector(sum, Vec), by); }
inline Vec ended(Vec sum, Vec, Vec) { return sum; }

// what a kernel multiplies: `count` words of each of ROWS rows of x with some panels, `apart` numbers from each other
template <class Number>
struct Piece {
    const Number *w;
    int64_t apart, count;
    const float *x;
    int64_t x_step;
    const float *by;
    int64_t by_step;
    float *to;
    int64_t to_step, room;  // outputs that there are from here on
    const float *scale;     // or null: to be multiplied later, or never
    int64_t before;         // words before these, of which `to` has the sums
};

template <int PANELS, int ROWS_OF_X, class Form>
void panels(const Piece<typename Form::Number> &p) {
    typedef typename Form::Number Number;
    constexpr int64_t DENSE = PANEL * Form::EACH;  // numbers for a word of x
    constexpr int64_t LINE = 64 / (DENSE * sizeof(Number)), FAR = AHEAD / sizeof(Number);
    constexpr int VECTORS = PANELS * SPAN;
    typename Form::Sum found[ROWS_OF_X][VECTORS];
    const auto before = [&p](int r, int i) {
        return p.before ? load_some(p.to + r * p.to_step + i * WIDTH, p.room - i * WIDTH) : Vec{};
    };
#pragma GCC unroll 32
    for (int r = 0; r < ROWS_OF_X; r++)
#pragma GCC unroll 32
        for (int i = 0; i < VECTORS; i++) found[r][i] = typename Form::Sum{};
    const Number *w = p.w;
    const float *x = p.x;
    const auto add = [&](int64_t k) {
        Vec w_[VECTORS];
#pragma GCC unroll 32
        for (int i = 0; i < VECTORS; i++)
            w_[i] = Form::at(w + i / SPAN * p.apart + k * DENSE + i % SPAN * WIDTH * Form::EACH);
#pragma GCC unroll 32
        for (int r = 0; r < ROWS_OF_X; r++) {
            const auto x_ = Form::spread(x + r * p.x_step + k);
#pragma GCC unroll 32
            for (int i = 0; i < VECTORS; i++) found[r][i] = Form::added(found[r][i], w_[i], x_);
        }
    };
    int64_t k = 0;
    for (; k + LINE <= p.count; k += LINE) {
        if (ROWS_OF_X < TALL) {
            // beyond its end a panel goes on where the one that takes its place begins
            const int64_t far = (p.before + k) * DENSE + FAR;
            const Number *soon = w + k * DENSE + FAR + (far < p.apart ? 0 : (PANELS - 1) * p.apart);
            for (int i = 0; i < PANELS; i++) __builtin_prefetch(soon + i * p.apart);
        }
#pragma GCC unroll 4
        for (int l = 0; l < LINE; l++) add(k + l);
    }
    for (; k < p.count; k++) add(k);
    for (int r = 0; r < ROWS_OF_X; r++) {
        for (int i = 0; i < VECTORS; i++) {
            const int64_t left = p.room - i * WIDTH;
            if (left <= 0) break;
            const Vec x = ended(found[r][i], before(r, i), all(p.by ? p.by[r * p.by_step] : 0));
            const Vec y = p.scale ? x * load_some(p.scale + i * WIDTH, left) : x;
            store_some(p.to + r * p.to_step + i * WIDTH, y, left);
        }
    }
}

// all words of x: floats at once, whole numbers by blocks
template <int PANELS, int ROWS_OF_X, class Form>
void along(const Piece<typename Form::Number> &p) {
    if constexpr (Form::EACH == 1) return panels<PANELS, ROWS_OF_X, Form>(p);
    constexpr int64_t WORDS = fixed::BESIDE_8.block / Form::EACH;
    for (int64_t k = 0; k < p.count; k += WORDS) {
        auto q = p;
        q.w += k * PANEL * Form::EACH, q.x += k, q.by += k / WORDS;
        q.count = std::min(WORDS, p.count - k), q.before = k;
        if (k + WORDS < p.count) q.scale = nullptr;
        panels<PANELS, ROWS_OF_X, Form>(q);
    }
}

template <int PANELS, int ROWS_OF_X, class Form>
void across(Piece<typename Form::Number> p, int64_t count) {
    const auto next = [&p](int64_t n) {
        p.w += n * p.apart, p.to += n * PANEL, p.room -= n * PANEL;
        if (p.scale) p.scale += n * PANEL;
    };
    for (; count >= PANELS; count -= PANELS, next(PANELS)) along<PANELS, ROWS_OF_X, Form>(p);
    if (PANELS > 1 && count) across<(PANELS + 1) / 2, ROWS_OF_X, Form>(p, count);
}

// `count` panels times `rows` rows of x
template <class Form>
void down(Piece<typename Form::Number> p, int64_t count, int64_t rows) {
    const auto next = [&](int64_t n) { p.x += n * p.x_step, p.by += n * p.by_step, p.to += n * p.to_step, rows -= n; };
    for (; rows >= TALL; next(TALL)) across<AT_8, TALL, Form>(p, count);
    if (TALL > 8)
        for (; rows >= 8; next(8)) across<AT_8, 8, Form>(p, count);
    if (TALL > 4)
        for (; rows >= 4; next(4)) across<AT_4, 4, Form>(p, count);
    for (; rows >= 2; next(2)) across<AT_2, 2, Form>(p, count);
    for (; rows; next(1)) across<AT_1, 1, Form>(p, count);
}

// the outputs from `begin` to `end`, both at a panel's border but for the last
template <class Form>
void part(const Matrix &m, int64_t begin, int64_t end, int64_t rows, const Asked &x, const Room &to) {
    const int64_t apart = m.words() * PANEL * Form::EACH;
    for (int64_t o = begin; o < end; o += TOGETHER * PANEL) {
        const auto *w = static_cast<const typename Form::Number *>(m.data) + o / PANEL * apart;
        const float *scale = m.scale ? m.scale + o : nullptr;
        const int64_t count = std::min(TOGETHER, (end - o + PANEL - 1) / PANEL);
        down<Form>({w, apart, m.words(), x.start, x.step, x.by, x.by_step, to.start + o, to.step, end - o, scale, 0},
                   count, rows);
    }
}

// OUTS rows of a matrix in ROWS times COUNT rows of x; the rows behind them are asked for meanwhile
template <int OUTS, int COUNT>
void block(const Matrix &m, int64_t first, const float *x, int64_t x_step, float *to, int64_t to_step) {
    constexpr int64_t LINE = 64 / sizeof(float);
    const int64_t in = m.in;
    const float *w = static_cast<const float *>(m.data) + first * in;
    Vec found[WIDTH];
    for (int i = 0; i < WIDTH; i++) found[i] = Vec{};
    int64_t k = 0;
    const auto add = [&](const float *at) {
        Vec x_[COUNT];
        for (int r = 0; r < COUNT; r++) x_[r] = load(x + r * x_step + k);
#pragma GCC unroll 16
        for (int i = 0; i < OUTS; i++) {
            const Vec w_ = load(at + i * in);
            for (int r = 0; r < COUNT; r++) found[i * COUNT + r] += w_ * x_[r];
        }
    };
    while (k + LINE <= in) {
        for (int i = 0; i < OUTS; i++) __builtin_prefetch(w + k + (OUTS + i) * in);
        for (int part = 0; part < LINE / WIDTH; part++, k += WIDTH) add(w + k);
    }
    for (; k + WIDTH <= in; k += WIDTH) add(w + k);
    if (k < in) {
        for (int i = 0; i < OUTS; i++) {
            const Vec w_ = load_tail(w + i * in + k, in - k);
            for (int r = 0; r < COUNT; r++) found[i * COUNT + r] += w_ * load(x + r * x_step + k);
        }
    }
    const Vec added = sums(found);
    if (COUNT == 1) return store_some(to + first, added, OUTS);
    for (int i = 0; i < OUTS; i++)
        for (int r = 0; r < COUNT; r++) to[r * to_step + first + i] = added[i * COUNT + r];
}

// from `begin` to `end`, OUTS at a time
template <int OUTS, int COUNT>
void blocks(const Matrix &m, int64_t begin, int64_t end, int64_t row, const Room &x, const Room &to) {
    int64_t o = begin;
    for (; o + OUTS <= end; o += OUTS) block<OUTS, COUNT>(m, o, x[row], x.step, to[row], to.step);
    for (; o < end; o++) block<1, COUNT>(m, o, x[row], x.step, to[row], to.step);
}

inline void by_rows(const Matrix &m, int64_t begin, int64_t end, int64_t count, const Room &x, const Room &to) {
    for (int64_t o = begin; o < end; o += WIDTH) {
        const int64_t stop = std::min(end, o + WIDTH);
        int64_t r = 0;
        for (; r + 4 <= count; r += 4) blocks<WIDTH / 4, 4>(m, o, stop, r, x, to);
        for (; r + 2 <= count; r += 2) blocks<WIDTH / 2, 2>(m, o, stop, r, x, to);
        for (; r < count; r++) blocks<WIDTH, 1>(m, o, stop, r, x, to);
    }
}

}  // namespace product

// the matrix times `rows` rows of x, on at most `threads` threads; in product_cpu.cpp, once for all
void times(const Matrix &m, int64_t rows, int threads, const Room &x, const Room &to);
