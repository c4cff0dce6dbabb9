// Products of matrices (out, in) with rows of x, few or many: to[r][o] = sum over k of matrix[o][k] x[r][k].
//
// Each number is one sum, its products added in the order of k (by lanes where the matrix lies by ROWS), so that a row
// has the same bits whatever rows are beside it, and however many threads there are. Where the matrix is of INT8, x is
// rounded to whole numbers, too (fixed.h), and the products of BLOCK of them are added exactly.
#pragma once

#include "threads.h"
#include "twelve.h"

#include <algorithm>

namespace product {

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
    if constexpr (std::is_same_v<Form, Twelve>) {
        twelve::panels<PANELS, ROWS_OF_X>(p);
    } else if constexpr (Form::EACH == 1) {
        panels<PANELS, ROWS_OF_X, Form>(p);
    } else {
        constexpr int64_t WORDS = fixed::BESIDE_8.block / Form::EACH;
        for (int64_t k = 0; k < p.count; k += WORDS) {
            auto q = p;
            q.w += k * PANEL * Form::EACH, q.x += k, q.by += k / WORDS;
            q.count = std::min(WORDS, p.count - k), q.before = k;
            if (k + WORDS < p.count) q.scale = nullptr;
            panels<PANELS, ROWS_OF_X, Form>(q);
        }
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
    if (TALL > 6)
        for (; rows >= 6; next(6)) across<AT_8, 6, Form>(p, count);
    if (TALL > 4)
        for (; rows >= 4; next(4)) across<AT_4, 4, Form>(p, count);
    if (TALL > 3)
        for (; rows >= 3; next(3)) across<AT_4, 3, Form>(p, count);
    for (; rows >= 2; next(2)) across<AT_2, 2, Form>(p, count);
    for (; rows; next(1)) across<AT_1, 1, Form>(p, count);
}

// the outputs from `begin` to `end`, both at a panel's border but for the last
template <class Form>
void part(const Matrix &m, int64_t begin, int64_t end, int64_t rows, const Asked &x, const Room &to) {
    const int64_t apart = Form::panel(m.words());
    const twelve::Lying lying(m.data, m.out, m.in);
    for (int64_t o = begin; o < end; o += TOGETHER * PANEL) {
        const auto *w = static_cast<const typename Form::Number *>(m.data) + o / PANEL * apart;
        const float *scale = m.scale ? m.scale + o : nullptr;
        const int64_t count = std::min(TOGETHER, (end - o + PANEL - 1) / PANEL);
        if (std::is_same_v<Form, Twelve>) twelve::ask(lying, o / PANEL, count);
        down<Form>({w, apart, m.words(), x.start, x.step, x.by, x.by_step, to.start + o, to.step, end - o, scale, 0},
                   count, rows);
        if (std::is_same_v<Form, Twelve>) twelve::add_others(lying, o / PANEL, count, rows, x, to);
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
