// Products of many rows. Parts of both factors are laid as registers take them: a strip of rows of the first, and
// columns of the second in panels of 16, unless they lie so already; each part is used often while it is in a cache.
//
// Each number is one sum, its products added in the order of k, as matvec.h has it, or that of its words: it has the same
// bits whatever is beside it, and however many threads there are. A word is a float, or a pair of whole numbers or bf16.
#pragma once

#include "matvec.h"

#include <array>
#include <type_traits>
#include <utility>

namespace tiles {

// rows of the first, and panels of the second, whose sums the registers have room for
#if defined(__AVX512F__)
constexpr int HIGH = 14, BROAD = 2;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int HIGH = 6, BROAD = 1;
#else
constexpr int HIGH = 3, BROAD = 1;
#endif
constexpr int LOW = (HIGH + 1) / 2;      // the least rows of a tile, but where there are fewer in all
constexpr int64_t WIDE = BROAD * PANEL;  // columns of a tile
constexpr int64_t DEEP = 384;            // words of each row that are multiplied before the next ones
constexpr int64_t LAID = 3 << 16;        // words of the second that are used by all rows before the next ones
constexpr int64_t AHEAD = 16;            // words of a panel's columns that are asked for before they are needed
constexpr int64_t TALL = 8 * HIGH;       // rows that are worth a task
constexpr int64_t TURNS = 4;             // tasks for each thread, so that none waits long for the last
constexpr int64_t FLOAT = sizeof(float), LINE = 64;

// how a strip of the first lies: its rows one after the other, or side by side for each word
enum Lie { ALONG, BESIDE };
constexpr int64_t ROW = DEEP + LINE / FLOAT;  // words from row to row: their lines go to different parts of a cache
constexpr int64_t GROUP = (HIGH + WIDTH - 1) / WIDTH * WIDTH;  // words that those side by side take
constexpr int64_t STRIP = std::max(HIGH * ROW, GROUP * DEEP);

// where a tile's numbers go: to[r * step + c] for r < rows, c < room
struct Place {
    float *to;
    int64_t step, rows, room;
    bool onward;  // whether the sums of the words before these, or what is to be added to, are there
};

// what will be read soon, in bytes: a place for each word and panel, `step` and `apart` from each other
struct Soon {
    const void *start;
    int64_t step, apart;
};

// a strip, and panels, which lie `apart`; `deep` words of each. by: what whole numbers of rows, and of columns, are times
struct Laid {
    const float *x, *w;
    int64_t apart, deep;
    const float *by, *columns_by;
    Soon soon, later;
};

// ROWS rows times BROAD panels
template <int ROWS, Lie LIE, class Form>
void whole(const Laid &from, float *to, int64_t step, bool onward) {
    constexpr int VECTORS = BROAD * SPAN;
    constexpr int64_t DOWN = LIE == ALONG ? ROW : 1, ON = LIE == ALONG ? 1 : GROUP;
    const int64_t apart = from.apart, deep = from.deep, further = from.soon.step, beside = from.soon.apart;
    const float *x = from.x, *w = from.w;
    const char *soon = static_cast<const char *>(from.soon.start), *later = static_cast<const char *>(from.later.start);
    const int64_t onwards = from.later.step;
    typename Form::Sum found[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < BROAD; i++) __builtin_prefetch(to + r * step + i * PANEL, 1);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 32
        for (int i = 0; i < VECTORS; i++) found[r][i] = Form::begun(onward ? load(to + r * step + i * WIDTH) : Vec{});
    for (int64_t k = 0; k < deep; k++) {
        for (int i = 0; i < BROAD; i++) __builtin_prefetch(soon + i * beside);
        __builtin_prefetch(later, 0, 2);
        Vec w_[VECTORS];
#pragma GCC unroll 32
        for (int i = 0; i < VECTORS; i++) w_[i] = load(w + i / SPAN * apart + i % SPAN * WIDTH);
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; r++) {
            const auto x_ = Form::spread(x + r * DOWN);
#pragma GCC unroll 32
            for (int i = 0; i < VECTORS; i++) found[r][i] = Form::added(found[r][i], w_[i], x_);
        }
        w += PANEL, x += ON, soon += further, later += onwards;
    }
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 32
        for (int i = 0; i < VECTORS; i++) {
            float *y = to + r * step + i * WIDTH;
            const Vec before = onward ? load(y) : Vec{};
            if constexpr (Form::SCALED)
                store(y, product::ended(found[r][i], before, load(from.columns_by + i * WIDTH) * from.by[r]));
            else
                store(y, product::ended(found[r][i], before, all(from.by[r])));
        }
}

// the same where it may be less than a tile: then by way of a whole one
template <int ROWS, Lie LIE, class Form>
void tile(const Laid &from, const Place &p) {
    if (p.rows >= ROWS && p.room >= WIDE) return whole<ROWS, LIE, Form>(from, p.to, p.step, p.onward);
    alignas(64) float room[ROWS * WIDE] = {};
    const int64_t rows = std::min<int64_t>(ROWS, p.rows), wide = std::min(WIDE, p.room);
    for (int64_t r = 0; r < rows && p.onward; r++) copy(room + r * WIDE, p.to + r * p.step, wide);
    whole<ROWS, LIE, Form>(from, room, WIDE, p.onward);
    for (int64_t r = 0; r < rows; r++) copy(p.to + r * p.step, room + r * WIDE, wide);
}

// tiles of each height from LOW to HIGH
typedef std::array<void (*)(const Laid &, const Place &), HIGH - LOW + 1> Tiles;
template <Lie LIE, class Form, int... MORE>
Tiles heights(std::integer_sequence<int, MORE...>) {
    return {tile<LOW + MORE, LIE, Form>...};
}

// A factor in rows, or turned: in columns, each of which is a row of memory
struct Plain {
    typedef product::Wide Form;
    static constexpr int64_t UNIT = 1;  // parts that are read one after the other begin at multiples of it
    const float *start;
    int64_t step;
    bool turned;

    // a strip of `rows` rows from `row` on, numbers from k on
    void lay(int64_t row, int64_t rows, int64_t all_rows, int64_t k, int64_t deep, float *to) const {
        if (!turned) {
            for (int64_t r = 0; r < rows; r++) copy(to + r * ROW, start + (row + r) * step + k, deep);
            return;
        }
        const float *from = start + k * step + row;
        for (int64_t l = 0; l < deep; l++)
            for (int64_t i = 0; i < rows; i += WIDTH)
                store(to + l * GROUP + i, load_some(from + l * step + i, all_rows - row - i));
    }

    // what `lay` reads for a strip, or the most of it
    Soon strip(int64_t row, int64_t k) const {
        if (turned) return {start + k * step + row, step * FLOAT, (HIGH - 1) * FLOAT};
        return {start + row * step + k, LINE, HIGH / 2 * step * FLOAT};
    }

    // columns from `first` to `end` of this as the second factor, numbers from k on, in panels
    const float *panels(int64_t first, int64_t end, int64_t k, int64_t deep, float *room) const {
        for (int64_t c = first; c < end; c += PANEL) {
            float *to = room + (c - first) * deep;
            for (int64_t i = 0; i < PANEL; i += WIDTH) {
                const int64_t left = end - c - i;
                if (turned) {
                    const int64_t rows = std::clamp<int64_t>(left, 0, WIDTH);
                    transpose(to + i, PANEL, start + (c + i) * step + k, step, rows, deep);
                    continue;
                }
                for (int64_t l = 0; l < deep; l++)
                    store(to + l * PANEL + i, left > 0 ? load_some(start + (k + l) * step + c + i, left) : Vec{});
            }
        }
        return room;
    }
    int64_t apart(int64_t deep) const { return deep * PANEL; }

    // what `panels` reads for a tile's columns, or the most of it
    Soon columns(int64_t first, int64_t k) const {
        if (turned) return {start + first * step + k, LINE, PANEL * step * FLOAT};
        return {start + k * step + first + PANEL - 1, step * FLOAT, PANEL * FLOAT};
    }
};

// A second factor of pairs of whole numbers
struct Pairs : Plain {
    typedef product::Alike Form;
};

// Panels as matvec.h has them, as the second factor. Those of fp32 are read where they lie.
template <class Kind>
struct Kept {
    typedef Kind Form;
    typedef typename Form::Number Number;
    static constexpr int64_t UNIT = 1;
    static constexpr bool THERE = std::is_same_v<Number, float>;
    static constexpr int64_t DENSE = PANEL * Form::EACH;  // numbers for a word
    const Number *start;
    int64_t words;  // of a row

    const float *panels(int64_t first, int64_t end, int64_t k, int64_t deep, float *room) const {
        const Number *from = start + first * words * Form::EACH + k * DENSE;
        if constexpr (THERE) {
            return from;
        } else {
            for (int64_t c = first; c < end; c += PANEL, from += words * DENSE)
                for (int64_t j = 0; j < deep * PANEL; j += WIDTH)
                    store(room + (c - first) * deep + j, Form::at(from + j * Form::EACH));
            return room;
        }
    }
    int64_t apart(int64_t deep) const { return (THERE ? words : deep) * PANEL; }

    Soon columns(int64_t first, int64_t k) const {
        constexpr int64_t BYTES = DENSE * static_cast<int64_t>(sizeof(Number));
        return {start + first * words * Form::EACH + k * DENSE, BYTES, words * BYTES};
    }
};

#if defined(__AVX512F__)
// Panels of numbers in twelve bits, but for those that stand beside; turns are opened whole.
struct Twelves {
    typedef product::Wide Form;
    static constexpr int64_t UNIT = product::Twelve::TURN;
    product::twelve::Lying lying;

    const uint8_t *turn(int64_t first, int64_t k) const {
        return lying.panel(first / PANEL) + product::Twelve::HEAD + k / UNIT * product::Twelve::BYTES;
    }
    const float *panels(int64_t first, int64_t end, int64_t k, int64_t deep, float *room) const {
        for (int64_t c = first; c < end; c += PANEL) {
            const __m512i powers = _mm512_loadu_si512(lying.panel(c / PANEL));
            const uint8_t *from = turn(c, k);
            float *to = room + (c - first) * deep;
            for (int64_t l = 0; l < deep; l += UNIT, from += product::Twelve::BYTES) {
                const auto open = [&](auto j) {
                    constexpr int J = decltype(j)::value;
                    store(to + (l + J) * PANEL, product::twelve::number<J>(from, powers));
                };
                product::twelve::turn(deep - l, open, product::twelve::Turn());
            }
        }
        return room;
    }
    int64_t apart(int64_t deep) const { return deep * PANEL; }

    Soon columns(int64_t first, int64_t k) const { return {turn(first, k), product::Twelve::BYTES / UNIT, lying.apart}; }
};
#endif

struct Sizes {
    int64_t rows, columns, deep;
    int64_t step;  // of the product, from row to row
};

// what whole numbers are times: of each row of the first, and of its blocks, so far from each other; of each column of the
// second, blocks after one another, filled up to whole tiles
struct Times {
    const float *by;
    int64_t step, apart;
    const float *columns;
    int64_t columns_apart;
};

// Rows and columns of a product that one thread computes
template <class First, class Second>
struct Task {
    typedef typename Second::Form Form;
    const First &first;
    const Second &second;
    const Sizes &s;
    const Times &times;
    const Tiles &tiles;
    int64_t begin, end, left, right;
    float *to;
    bool add;

    // rows in strips of about equal height, as few as there can be
    int64_t strips() const { return (end - begin + HIGH - 1) / HIGH; }
    int64_t strip(int64_t n) const {
        const int64_t rows = end - begin, count = strips();
        return begin + n * (rows / count) + std::min(n, rows % count);
    }

    // A part of what panels beside each other will be read from for the words after these, or for the next columns: the
    // strips after the first ask for it in turn.
    Soon later(int64_t n, int64_t c, int64_t k, int64_t deep) const {
        constexpr bool THERE = !std::is_base_of_v<Plain, Second>;
        const int64_t turns = strips() / BROAD;
        const bool onward = k + deep < s.deep;
        if (!THERE || turns == 0 || n == 0 || n > BROAD * turns || (!onward && c + right - left >= s.columns))
            return {to, 0, 0};
        const Soon all = onward ? second.columns(c, k + deep) : second.columns(c + right - left, 0);
        const int64_t step = (all.step + turns - 1) / turns;
        const int64_t from = (n - 1) / turns * all.apart + (n - 1) % turns * deep * step;
        return {static_cast<const char *>(all.start) + from, step, 0};
    }

    // `deep` words from k on
    void words(int64_t k, int64_t deep, float *panels, float *laid) const {
        const int64_t apart = second.apart(deep), count = strips();
        const float *w = nullptr;
        for (int64_t n = 0; n < count; n++) {
            const int64_t row = strip(n), rows = strip(n + 1) - row;
            const Soon next = n + 1 < count ? first.strip(row + rows, k) : first.strip(begin, k + deep);
            float by[HIGH] = {};
            int64_t block = 0;
            if constexpr (Form::WHOLE) block = k * Form::EACH / Form::BLOCK;
            for (int64_t r = 0; r < rows && Form::WHOLE; r++)
                by[r] = times.by[(row + r) * times.step + block * times.apart];
            const float *columns_by = Form::SCALED ? times.columns + block * times.columns_apart : nullptr;
            first.lay(row, rows, s.rows, k, deep, laid);
            for (int64_t c = left; c < right; c += WIDE) {
                const int64_t further = std::min(c + WIDE, right);
                if (n == 0) {
                    const float *here = second.panels(c, further, k, deep, panels + (c - left) * deep);
                    if (c == left) w = here;
                }
                const float *here = w + (c - left) / PANEL * apart;
                Soon soon = {here + AHEAD * PANEL, PANEL * FLOAT, apart * FLOAT};
                if (further == right)
                    soon = next;
                else if (n == 0)
                    soon = second.columns(further, k);
                // where there is but one panel left, it is multiplied twice
                const int64_t beside = c + PANEL < right ? apart : 0;
                const float *times = Form::SCALED ? columns_by + c : nullptr;
                const Laid from = {laid, here, beside, deep, by, times, soon, later(n, c, k, deep)};
                const Place p = {to + row * s.step + c, s.step, rows, right - c, add || k > 0};
                tiles[std::max<int64_t>(LOW, rows) - LOW](from, p);
            }
        }
    }
};

// so many parts of a length, none longer than `most`, each a multiple of `unit` but for the last
inline int64_t length(int64_t all, int64_t most, int64_t unit) {
    const int64_t parts = (all + most - 1) / most, size = (all + parts - 1) / parts;
    return (size + unit - 1) / unit * unit;
}

// to (rows, columns) becomes the product of the first (rows, deep) and the second (deep, columns), or it is added
template <class First, class Second>
void multiply(const First &first, const Second &second, const Sizes &s, int threads, float *to, const float *scale,
              bool add, const Times &times = {}) {
    typedef typename Second::Form Form;
    typedef std::make_integer_sequence<int, HIGH - LOW + 1> Heights;
    typedef std::conditional_t<Form::EACH == 1, product::Floats, Form> Kernel;
    Tiles tiles = heights<ALONG, Kernel>(Heights());
    if constexpr (!Form::WHOLE || Form::SCALED)
        if (first.turned) tiles = heights<BESIDE, Kernel>(Heights());
    int64_t deep = length(s.deep, DEEP, Second::UNIT);
    if constexpr (Form::WHOLE) deep = Form::BLOCK / Form::EACH;
    const int64_t wide = length(s.columns, LAID / std::max<int64_t>(1, deep), WIDE);
    const int64_t across = (s.columns + wide - 1) / wide;
    const int64_t parts = threads > 1 ? (TURNS * threads + across - 1) / across : 1;
    const int64_t tall = length(s.rows, std::max(TALL, (s.rows + parts - 1) / parts), HIGH);
    share(across * ((s.rows + tall - 1) / tall), threads, [&](int64_t n) {
        const int64_t begin = n / across * tall, end = std::min(s.rows, begin + tall);
        const int64_t left = n % across * wide, right = std::min(s.columns, left + wide);
        const Task<First, Second> task = {first, second, s, times, tiles, begin, end, left, right, to, add};
        const int64_t room = (right - left + WIDE - 1) / WIDE * WIDE * deep;
        float *panels = scratch(room + STRIP);
        for (int64_t k = 0; k < s.deep; k += deep) task.words(k, std::min(deep, s.deep - k), panels, panels + room);
        for (int64_t row = begin; row < end && scale; row++) {
            float *y = to + row * s.step;
            for (int64_t c = left; c < right; c += WIDTH)
                store_some(y + c, load_some(y + c, right - c) * load_some(scale + c, right - c), right - c);
        }
    });
}

}  // namespace tiles
