// Products of many rows. Parts of both factors are laid as registers take them: rows of the first side by side for each
// k, columns of the second in panels of 16, and each part is used often while it is in a cache.
//
// Each number is one sum, its products added in the order of k, as matvec.h has it: it has the same bits whatever is
// beside it, and however many threads there are. A word is a float, or for INT8 a pair of whole numbers.
#pragma once

#include "matvec.h"

namespace tiles {

// rows of the first, and panels of the second, whose sums the registers have room for
#if defined(__AVX512F__)
constexpr int HIGH = 14, BROAD = 2;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int HIGH = 6, BROAD = 1;
#else
constexpr int HIGH = 3, BROAD = 1;
#endif
constexpr int LOW = HIGH / 2;         // rows of a tile for what is left
constexpr int64_t DEEP = 384;         // words of each row that are multiplied before the next ones
constexpr int64_t LAID = 3 << 16;     // words of the second that are used by all rows before the next ones
constexpr int64_t AHEAD = 16;         // words of a panel's columns that are asked for before they are needed
constexpr int64_t TALL = 8 * HIGH;    // rows that are worth a task
constexpr int64_t TURNS = 4;          // tasks for each thread, so that none waits long for the last

// where a tile's numbers go: to[r * step + c] for r < rows, c < room
struct Place {
    float *to;
    int64_t step, rows, room;
    bool onward;  // whether the sums of the words before these, or what is to be added to, are there
};

// words of some rows side by side, and of panels, which lie `apart`; `deep` of each. by: what whole numbers are times
struct Laid {
    const float *x, *w;
    int64_t apart, deep;
    const float *by;
};

// ROWS rows times PANELS panels
template <int ROWS, int PANELS, class Form>
void whole(const Laid &from, float *to, int64_t step, bool onward) {
    constexpr int VECTORS = PANELS * SPAN;
    const int64_t apart = from.apart, deep = from.deep;
    const float *x = from.x, *w = from.w;
    typename Form::Sum found[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < PANELS; i++) __builtin_prefetch(to + r * step + i * PANEL, 1);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 32
        for (int i = 0; i < VECTORS; i++) found[r][i] = Form::begun(onward ? load(to + r * step + i * WIDTH) : Vec{});
    for (int64_t k = 0; k < deep; k++) {
        for (int i = 0; i < PANELS; i++) __builtin_prefetch(w + i * apart + AHEAD * PANEL);
        Vec w_[VECTORS];
#pragma GCC unroll 32
        for (int i = 0; i < VECTORS; i++) w_[i] = load(w + i / SPAN * apart + i % SPAN * WIDTH);
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; r++) {
            const auto x_ = Form::spread(x + r);
#pragma GCC unroll 32
            for (int i = 0; i < VECTORS; i++) found[r][i] = Form::added(found[r][i], w_[i], x_);
        }
        w += PANEL, x += ROWS;
    }
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 32
        for (int i = 0; i < VECTORS; i++) {
            float *y = to + r * step + i * WIDTH;
            store(y, product::ended(found[r][i], onward ? load(y) : Vec{}, from.by[r]));
        }
}

// the same where it may be less than a tile: then by way of a whole one
template <int ROWS, int PANELS, class Form>
void tile(const Laid &from, const Place &p) {
    constexpr int64_t WIDE = PANELS * PANEL;
    if (p.rows >= ROWS && p.room >= WIDE) return whole<ROWS, PANELS, Form>(from, p.to, p.step, p.onward);
    alignas(64) float room[ROWS * WIDE] = {};
    const int64_t rows = std::min<int64_t>(ROWS, p.rows), wide = std::min(WIDE, p.room);
    for (int64_t r = 0; r < rows && p.onward; r++) copy(room + r * WIDE, p.to + r * p.step, wide);
    whole<ROWS, PANELS, Form>(from, room, WIDE, p.onward);
    for (int64_t r = 0; r < rows; r++) copy(p.to + r * p.step, room + r * WIDE, wide);
}

// A factor in rows, or turned: in columns, each of which is a row of memory
struct Plain {
    typedef product::Wide Form;
    const float *start;
    int64_t step;
    bool turned;

    // `rows` rows from `row` on, numbers from k on, side by side for each k: ROWS floats, and up to WIDTH beyond the last
    template <int ROWS>
    void lay(int64_t row, int64_t rows, int64_t all_rows, int64_t k, int64_t deep, float *to) const {
        constexpr int GROUPS = (ROWS + WIDTH - 1) / WIDTH;
        if (turned) {
            const int64_t room = all_rows - row;
            for (int64_t l = 0; l < deep; l++)
                for (int g = 0; g < GROUPS; g++) {
                    const int64_t left = room - g * WIDTH;
                    const float *from = start + (k + l) * step + row + g * WIDTH;
                    store(to + l * ROWS + g * WIDTH, left > 0 ? load_some(from, left) : Vec{});
                }
            return;
        }
        int64_t l = 0;
        for (; l + WIDTH <= deep; l += WIDTH) {
            Vec x[GROUPS][WIDTH], y[WIDTH];
            for (int g = 0; g < GROUPS; g++) {
                for (int i = 0; i < WIDTH; i++) {
                    const int r = g * WIDTH + i;
                    x[g][i] = r < ROWS && r < rows ? load(start + (row + r) * step + k + l) : Vec{};
                }
                turn(x[g], y);
            }
            for (int i = 0; i < WIDTH; i++)  // in this order: what is beyond ROWS is written over
                for (int g = 0; g < GROUPS; g++) store(to + (l + i) * ROWS + g * WIDTH, x[g][i]);
        }
        for (; l < deep; l++)
            for (int r = 0; r < ROWS; r++) to[l * ROWS + r] = r < rows ? start[(row + r) * step + k + l] : 0;
    }

    // columns from `first` to `end` of this as the second factor, numbers from k on, in panels
    const float *panels(int64_t first, int64_t end, int64_t k, int64_t deep, float *room, int64_t &apart) const {
        apart = deep * PANEL;
        for (int64_t c = first; c < end; c += PANEL) {
            float *to = room + (c - first) * deep;
            for (int64_t i = 0; i < PANEL; i += WIDTH) {
                const int64_t left = end - c - i;
                if (turned) {
                    transpose(to + i, PANEL, start + (c + i) * step + k, step, std::clamp<int64_t>(left, 0, WIDTH), deep);
                    continue;
                }
                for (int64_t l = 0; l < deep; l++)
                    store(to + l * PANEL + i, left > 0 ? load_some(start + (k + l) * step + c + i, left) : Vec{});
            }
        }
        return room;
    }
};

// Panels as matvec.h has them, as the second factor
template <class Kind>
struct Kept {
    typedef Kind Form;
    const typename Form::Number *start;
    int64_t words;  // of a row

    const float *panels(int64_t first, int64_t end, int64_t k, int64_t deep, float *room, int64_t &apart) const {
        const auto *from = start + (first * words + k * PANEL) * Form::EACH;
        apart = deep * PANEL;
        for (int64_t c = first; c < end; c += PANEL, from += words * PANEL * Form::EACH)
            for (int64_t j = 0; j < deep * PANEL; j += WIDTH)
                store(room + (c - first) * deep + j, Form::at(from + j * Form::EACH));
        return room;
    }
};

struct Sizes {
    int64_t rows, columns, deep;
};

// what whole numbers of the first are times: of each row, blocks side by side
struct Times {
    const float *by;
    int64_t step;
};

// Rows of the first that fit in a tile, and their words from k on, laid side by side, times laid columns
template <class Form>
struct Strip {
    const Plain &first;
    const Sizes &s;
    Laid from;
    int64_t columns, k;
    float *room;
    Times times_;

    template <int ROWS>
    void times(int64_t row, Place p) const {
        float by[ROWS] = {};
        first.lay<ROWS>(row, p.rows, s.rows, k, from.deep, room);
        if (Form::EACH > 1)
            for (int64_t r = 0; r < std::min<int64_t>(ROWS, p.rows); r++)
                by[r] = times_.by[(row + r) * times_.step + k * Form::EACH / fixed::BLOCK];
        Laid now = {room, from.w, from.apart, from.deep, by};
        int64_t c = 0;
        for (; c + (BROAD - 1) * PANEL < columns; c += BROAD * PANEL, now.w += BROAD * now.apart) {
            tile<ROWS, BROAD, Form>(now, p);
            p.to += BROAD * PANEL, p.room -= BROAD * PANEL;
        }
        if (c < columns) tile<ROWS, 1, Form>(now, p);
    }
};

// so many parts of a length, none longer than `most`, each a multiple of `unit` but for the last
inline int64_t length(int64_t all, int64_t most, int64_t unit) {
    const int64_t parts = (all + most - 1) / most, size = (all + parts - 1) / parts;
    return (size + unit - 1) / unit * unit;
}

// to (rows, columns) becomes the product of the first (rows, deep) and the second (deep, columns), or it is added
template <class Second>
void multiply(const Plain &first, const Second &second, const Sizes &s, int threads, float *to, const float *scale, bool add,
              const Times &by = {}) {
    typedef typename Second::Form Form;
    const int64_t deep = Form::EACH > 1 ? fixed::BLOCK / Form::EACH : length(s.deep, DEEP, 1);
    const int64_t wide = length(s.columns, LAID / std::max<int64_t>(1, deep), BROAD * PANEL);
    const int64_t across = (s.columns + wide - 1) / wide, parts = threads > 1 ? (TURNS * threads + across - 1) / across : 1;
    const int64_t tall = length(s.rows, std::max(TALL, (s.rows + parts - 1) / parts), HIGH);
    share(across * ((s.rows + tall - 1) / tall), threads, [&](int64_t n) {
        const int64_t begin = n / across * tall, end = std::min(s.rows, begin + tall);
        const int64_t left = n % across * wide, right = std::min(s.columns, left + wide);
        const int64_t panels = (right - left + PANEL - 1) / PANEL;
        float *room = scratch(panels * PANEL * deep + HIGH * deep + WIDTH), *laid = room + panels * PANEL * deep;
        for (int64_t k = 0; k < s.deep; k += deep) {
            const int64_t count = std::min(deep, s.deep - k);
            int64_t apart;
            const float *w = second.panels(left, right, k, count, room, apart);
            const Strip<Form> strip = {first, s, {nullptr, w, apart, count, nullptr}, right - left, k, laid, by};
            for (int64_t row = begin; row < end; row += HIGH) {
                const int64_t rows = std::min<int64_t>(HIGH, end - row);
                const Place p = {to + row * s.columns + left, s.columns, rows, right - left, add || k > 0};
                rows > LOW ? strip.template times<HIGH>(row, p) : strip.template times<LOW>(row, p);
            }
        }
        for (int64_t row = begin; row < end && scale; row++) {
            float *y = to + row * s.columns;
            for (int64_t c = left; c < right; c += WIDTH)
                store_some(y + c, load_some(y + c, right - c) * load_some(scale + c, right - c), right - c);
        }
    });
}

}  // namespace tiles
