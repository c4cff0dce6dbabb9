// A factor of fp32 whose numbers are rounded to bf16 as they are laid, two of those that are added up in a word.
#pragma once

#include "tiles.h"

#if defined(__AVX512BF16__)
namespace tiles {

struct Narrow : Plain {
    typedef product::Two Form;
    int64_t numbers;  // that are added up; words are counted from here on

    // 2 WIDTH numbers that lie side by side, of which there are `left`
    static Vec along(const float *from, int64_t left) {
        const Vec second = left > WIDTH ? load_some(from + WIDTH, left - WIDTH) : Vec{};
        return (Vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)load_some(from, left));
    }

    // WIDTH numbers of each of two rows
    static Vec beside(Vec one, Vec other) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)other, (__m512)one);
#define HALVES(lane) (lane | (lane + WIDTH) << 16)
        const __m512i turns = (__m512i)Ints{LANES(HALVES)};
#undef HALVES
        return (Vec)_mm512_permutexvar_epi16(turns, both);
    }

    // the word of each of `left` numbers, at most WIDTH, from `from` on, which `step` lies below
    Vec word(const float *from, int64_t k, int64_t left) const {
        const Vec other = 2 * k + 1 < numbers ? load_some(from + step, left) : Vec{};
        return beside(load_some(from, left), other);
    }

    void lay(int64_t row, int64_t rows, int64_t all_rows, int64_t k, int64_t deep, float *to) const {
        if (!turned) {
            for (int64_t r = 0; r < rows; r++) {
                const float *from = start + (row + r) * step + 2 * k;
                for (int64_t l = 0; l < deep; l += WIDTH) store(to + r * ROW + l, along(from + 2 * l, numbers - 2 * (k + l)));
            }
            return;
        }
        const float *from = start + 2 * k * step + row;
        for (int64_t l = 0; l < deep; l++)
            for (int64_t i = 0; i < rows; i += WIDTH)
                store(to + l * GROUP + i, word(from + 2 * l * step + i, k + l, all_rows - row - i));
    }

    Soon strip(int64_t row, int64_t k) const {
        if (turned) return {start + 2 * k * step + row, 2 * step * FLOAT, step * FLOAT};
        return {start + row * step + 2 * k, LINE, HIGH / 2 * step * FLOAT};
    }

    const float *panels(int64_t first, int64_t end, int64_t k, int64_t deep, float *room) const {
        for (int64_t c = first; c < end; c += PANEL) {
            float *to = room + (c - first) * deep;
            const int64_t left = end - c;
            if (!turned) {
                const float *from = start + 2 * k * step + c;
                for (int64_t l = 0; l < deep; l++) store(to + l * PANEL, word(from + 2 * l * step, k + l, left));
                continue;
            }
            for (int64_t l = 0; l < deep; l += WIDTH) {
                Vec x[WIDTH], y[WIDTH];
                for (int i = 0; i < WIDTH; i++) {
                    const float *from = start + (c + i) * step + 2 * (k + l);
                    x[i] = i < left ? along(from, numbers - 2 * (k + l)) : Vec{};
                }
                turn(x, y);
                for (int64_t i = 0; i < std::min<int64_t>(WIDTH, deep - l); i++) store(to + (l + i) * PANEL, x[i]);
            }
        }
        return room;
    }

    Soon columns(int64_t first, int64_t k) const {
        if (turned) return {start + first * step + 2 * k, LINE, PANEL * step * FLOAT};
        return {start + 2 * k * step + first, 2 * step * FLOAT, step * FLOAT};
    }
};

}  // namespace tiles
#endif
