// Matrices are laid in twelve bits a number (twelve.h).

#include "threads.h"
#include "twelve.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace {

using namespace product;

constexpr int EXPONENTS = 256;
constexpr uint8_t NONE = 255;

int32_t bits(float x) {
    int32_t found;
    std::memcpy(&found, &x, sizeof found);
    return found;
}
int exponent(int32_t x) { return x >> 23 & 255; }
bool in_bf16(int32_t x) { return (x & 0xffff) == 0; }

// The exponents of a panel's codes: those that most numbers have, and 0, which all have that are 0.
void choose(const int64_t *count, float *powers) {
    int order[EXPONENTS];
    std::iota(order, order + EXPONENTS, 0);
    std::partial_sort(order + 1, order + Twelve::CODES, order + EXPONENTS,
                      [count](int a, int b) { return count[a] != count[b] ? count[a] > count[b] : a < b; });
    for (int i = 0; i < Twelve::CODES; i++) {
        const int32_t power = order[i] << 23;
        std::memcpy(powers + i, &power, sizeof power);
    }
}

struct Rows {
    const float *matrix;
    int64_t out, in;
    // calls with_each(number's bits, k, row) for the rows of a panel
    template <class With>
    void each(int64_t panel, const With &with_each) const {
        for (int64_t row = 0; row < std::min<int64_t>(PANEL, out - panel * PANEL); row++)
            for (int64_t k = 0; k < in; k++) with_each(bits(matrix[(panel * PANEL + row) * in + k]), k, row);
    }
};

// the words of one row in a turn
void put(uint8_t *turn, int64_t row, int64_t j, int32_t x, int code) {
    const auto set = [&](int64_t line, uint32_t what) {
        uint32_t word;
        std::memcpy(&word, turn + line * 64 + row * 4, sizeof word);
        word |= what;
        std::memcpy(turn + line * 64 + row * 4, &word, sizeof word);
    };
    const uint32_t sign = static_cast<uint32_t>(x) >> 31, mantissa = x >> 16 & 127;
    set(j / 4, mantissa << j % 4 * 8 | sign << (j % 4 * 8 + 15) % 32);
    set(2, static_cast<uint32_t>(code) << j * 4);
}

}  // namespace

extern "C" {

// sizes: out in panels; powers: what the 16 codes of each panel are to stand for; others: how many of its numbers have
// none of these, or are not of bf16
// takes out in panels: matrix out*in, powers panels*16, others panels
void twelve_count(const int64_t *s, int threads, const float *matrix, float *powers, int64_t *others) {
    const Rows rows = {matrix, s[0], s[1]};
    share(s[2], threads, [&](int64_t n) {
        int64_t count[EXPONENTS] = {};
        rows.each(n, [&](int32_t x, int64_t, int64_t) { count[exponent(x)] += in_bf16(x); });
        choose(count, powers + n * Twelve::CODES);
        int64_t left = std::min<int64_t>(PANEL, rows.out - n * PANEL) * rows.in;
        for (int i = 0; i < Twelve::CODES; i++) left -= count[exponent(bits(powers[n * Twelve::CODES + i]))];
        others[n] = left;
    });
}

// sizes: out in panels words, of 4 bytes, of data, which are 0 but for powers and starts
// takes out in panels words: matrix out*in, data words
void twelve_pack(const int64_t *s, int threads, const float *matrix, int32_t *data) {
    const Rows rows = {matrix, s[0], s[1]};
    const twelve::Lying lying(data, s[0], s[1]);
    share(s[2], threads, [&](int64_t n) {
        uint8_t codes[EXPONENTS];
        std::fill_n(codes, EXPONENTS, NONE);
        auto *at = reinterpret_cast<uint8_t *>(data) + n * lying.apart;
        const int32_t *powers = data + n * lying.apart / sizeof(int32_t);
        for (int i = Twelve::CODES - 1; i >= 0; i--) codes[exponent(powers[i])] = i;
        at += Twelve::HEAD;
        auto *other = const_cast<twelve::Other *>(lying.others()) + lying.starts()[n];
        rows.each(n, [&](int32_t x, int64_t k, int64_t row) {
            const uint8_t code = codes[exponent(x)];
            uint8_t *turn = at + k / Twelve::TURN * Twelve::BYTES;
            if (code != NONE && in_bf16(x)) return put(turn, row, k % Twelve::TURN, x, code);
            put(turn, row, k % Twelve::TURN, 0, codes[0]);
            *other++ = {static_cast<int32_t>(k * PANEL + row), rows.matrix[(n * PANEL + row) * rows.in + k]};
        });
    });
}

}  // extern "C"
