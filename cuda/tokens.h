// What the recurrences share: sizes, and the tokens of one head side by side.
#pragma once

#include "vector.h"

#include <algorithm>

constexpr int CHUNK = 32;  // tokens that are worked on at a time; the forward keeps a state for each of them

struct Sizes {
    int64_t B, T, H, N;
    int64_t wide() const { return (N + WIDTH - 1) / WIDTH * WIDTH; }  // N, rounded up to whole vectors
    int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
};

// Heads of one row that lie side by side, the work of one task. Together they are read and written in long runs, which
// is what processors foresee: the rows of a head alone lie apart, and each of them would be waited for.
struct Group {
    int64_t row, first, heads;
};

struct Groups {
    Sizes s;
    int64_t size, across;

    // a kilobyte of each token, or less where threads would have no work; what is computed does not depend on it
    Groups(const Sizes &sizes, int threads) : s(sizes), size(std::max<int64_t>(1, 256 / s.N)) {
        while (size > 1 && s.B * ((s.H + size - 1) / size) < threads) size /= 2;
        across = (s.H + size - 1) / size;
    }
    int64_t count() const { return s.B * across; }
    Group operator()(int64_t task) const {
        const int64_t first = task % across * size;
        return {task / across, first, std::min(size, s.H - first)};
    }
};

// Tokens of the heads of a group, all that belongs to one token of a head side by side: rows of `wide` floats, zero
// beyond N.
struct Tokens {
    Sizes s;
    Group group;
    float *start;
    int64_t wide, rows, apart;  // apart: floats between the heads

    Tokens(const Sizes &sizes, const Group &of, float *from, int64_t rows, int64_t apart)
        : s(sizes), group(of), start(from), wide(s.wide()), rows(rows), apart(apart) {}
    static int64_t room(const Sizes &s, int64_t rows, int64_t tokens) { return tokens * (rows * s.wide() + WIDTH); }
    float *row(int64_t t, int which) const { return start + t * (rows * wide + WIDTH) + which * wide; }

    Tokens of(int64_t head) const { return {s, group, start + head * apart, rows, apart}; }
    int64_t at(int64_t t) const { return ((group.row * s.T + t) * s.H + group.first) * s.N; }
    int64_t number(int64_t head) const { return group.row * s.H + group.first + head; }  // among those of all rows

    // tokens from t on, of all heads of the group
    void read(int which, const float *from, int64_t t, int64_t count) const {
        for (int64_t i = 0; i < count; i++)
            for (int64_t h = 0; h < group.heads; h++) {
                float *to = row(i, which) + h * apart;
                copy(to, from + at(t + i) + h * s.N, s.N);
                zero(to + s.N, wide - s.N);
            }
    }
    void write(int which, float *to, int64_t t, int64_t count) const {
        for (int64_t i = 0; i < count; i++)
            for (int64_t h = 0; h < group.heads; h++) copy(to + at(t + i) + h * s.N, row(i, which) + h * apart, s.N);
    }
    // of this head
    void clear(int which, int64_t count) const {
        for (int64_t t = 0; t < count; t++) zero(row(t, which), wide);
    }
    // d - 1 = exp(-exp(w)) - 1, and exp(w) in the place of w. S + S (d - 1) is S d without the rounding of d, which
    // where d is next to 1 would be the same error each time
    void decays(int w, int d, int64_t count) const {
        for (int64_t t = 0; t < count; t++) {
            for (int64_t j = 0; j < wide; j += WIDTH) {
                const Vec rate = exponential(load(row(t, w) + j));
                store(row(t, w) + j, rate);
                store(row(t, d) + j, exponential_less_1(-rate));
            }
        }
    }
};
