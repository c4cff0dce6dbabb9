// What the recurrences share: sizes, and the tokens of one head side by side.
#pragma once

#include "vector.h"

#include <algorithm>
#include <initializer_list>

constexpr int CHUNK = 32;  // tokens that are worked on at a time; the forward keeps a state for each of them

struct Sizes {
    int64_t B, T, H, N;
    int64_t wide() const { return (N + WIDTH - 1) / WIDTH * WIDTH; }  // N, rounded up to whole vectors
    int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
    // among the states that are kept, that of a head before the chunk that begins with token t
    int64_t kept(int64_t head, int64_t t) const { return (head * chunks() + t / CHUNK) * N * N; }
};

// Heads of one row that lie side by side, the work of one task: a chunk of each in turn. What they read and write lies
// in long runs, which are asked for as such, and a page of memory is looked up once for all of them.
struct Group {
    int64_t row, first, heads;
    int64_t number(const Sizes &s, int64_t h) const { return row * s.H + first + h; }  // among the heads of all rows
    // the head whose turn is after that of head h, and whether it has come to the next chunk by then
    Group after(int64_t h) const { return {row, first + (h + 1) % heads, 1}; }
    bool ends(int64_t h) const { return h + 1 == heads; }
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

// Tokens of one head, all that belongs to a token side by side: rows of `wide` floats, zero beyond N.
struct Tokens {
    Sizes s;
    int64_t number, rows;  // number: of the head, among those of all rows
    float *start;
    int64_t wide, first, step;  // where the head's first token lies in a tensor, and how far it is to the next one

    Tokens(const Sizes &sizes, int64_t number, float *from, int64_t rows)
        : s(sizes), number(number), rows(rows), start(from), wide(s.wide()),
          first((number / s.H * s.T * s.H + number % s.H) * s.N), step(s.H * s.N) {}
    static int64_t room(const Sizes &s, int64_t rows, int64_t tokens) { return tokens * (rows * s.wide() + WIDTH); }
    float *row(int64_t place, int which) const { return start + place * (rows * wide + WIDTH) + which * wide; }

    // a token of a tensor into a row of ours
    void read(float *to, const float *from) const {
        copy(to, from, s.N);
        zero(to + s.N, wide - s.N);
    }
    // token t of a tensor, and back
    void read(int which, const float *from, int64_t t, int64_t place) const {
        read(row(place, which), from + first + t * step);
    }
    // where a token of a tensor lies in whole vectors: there, or in a row of ours
    const float *whole(int which, const float *from, int64_t t) const {
        if (wide == s.N) return from + first + t * step;
        read(which, from, t, 0);
        return row(0, which);
    }
    void write(int which, float *to, int64_t t, int64_t place) const { write(to, t, row(place, which)); }
    void write(float *to, int64_t t, const float *from) const {
        float *at = to + first + t * step;
        if (!in_lines(to, s.N)) return copy(at, from, s.N);
        for (int64_t j = 0; j < s.N; j += WIDTH) stream(at + j, load(from + j));
    }
    // the state before the chunk that begins with token t, from [key][value]
    void keep(float *states, int64_t t, const float *S) const {
        float *to = states + s.kept(number, t);
        if (in_lines(states, s.N))
            transpose<true>(to, s.N, S, wide, s.N, s.N);
        else
            transpose(to, s.N, S, wide, s.N, s.N);
    }
    // exp(w), which may take the place of w, and d - 1 = exp(-exp(w)) - 1. S + S (d - 1) is S d without the rounding of
    // d, which where d is next to 1 would be the same error each time
    void decay(const float *w, float *rate, float *d) const {
        for (int64_t j = 0; j < wide; j += WIDTH) {
            const Vec found = exponential(load(w + j));
            store(rate + j, found);
            store(d + j, exponential_less_1(-found));
        }
    }
    void decay(int w, int d, int64_t place) const { decay(row(place, w), row(place, w), row(place, d)); }
};

// What of several tensors will be read or written soon, asked for a few cache lines at a time while something else is
// computed: a chunk of one head, while that before it is worked on. As much of all heads of a group would be more than
// the second cache holds. A store that waits for its line holds up all later ones, so what is written is asked for, too,
// unless it is streamed.
struct Soon {
    struct Rows {
        const float *from;
        int64_t floats, count, step;
        bool written;
    };
    enum { MOST = 16, LINE = 16 };  // tensors, and floats of a line
    Rows each[MOST];
    int count = 0, at = 0;
    int64_t row = 0, column = 0, lines = 0, share = 0;

    void add(const Rows &x) {
        each[count++] = x;
        lines += x.count * ((x.floats + LINE - 1) / LINE);
    }
    // a chunk of tokens from t on, of the heads of a group
    void add(const Sizes &s, const Group &group, int64_t t, std::initializer_list<const float *> from, bool written) {
        const int64_t place = ((group.row * s.T + t) * s.H + group.first) * s.N;
        for (const float *x : from)
            if (x && !(written && in_lines(x, s.N)))
                add({x + place, group.heads * s.N, std::min<int64_t>(CHUNK, s.T - t), s.H * s.N, written});
    }
    // the states before the chunk that begins with token t
    void add(const Sizes &s, const Group &group, int64_t t, const float *states, bool written) {
        if (!(written && in_lines(states, s.N)))
            add({states + s.kept(group.number(s, 0), t), s.N * s.N, group.heads, s.chunks() * s.N * s.N, written});
    }
    // how often `ask` will be called
    void over(int64_t times) { share = (lines + times - 1) / times; }

    __attribute__((always_inline)) void ask() {
        int64_t more = share;
        while (more > 0 && at < count) {
            const Rows &x = each[at];
            const float *from = x.from + row * x.step + column;
            const int64_t now = std::min(more, (x.floats - column + LINE - 1) / LINE);
            if (x.written)
                for (int64_t i = 0; i < now; i++) __builtin_prefetch(from + i * LINE, 1, 2);
            else
                for (int64_t i = 0; i < now; i++) __builtin_prefetch(from + i * LINE, 0, 2);
            more -= now, column += now * LINE;
            if (column >= x.floats) column = 0, row++;
            if (row == x.count) row = 0, at++;
        }
    }
};
