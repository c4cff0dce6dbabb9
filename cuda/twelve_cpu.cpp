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

// `count` numbers of a row, 8 at most, as its words of a turn; `other` is called for those that have no code
template <class Other>
void put(uint8_t *turn, int64_t row, const float *x, int64_t count, const uint8_t *codes, const Other &other) {
    uint32_t sizes[2] = {}, all_codes = 0;
    for (int64_t j = 0; j < count; j++) {
        const int32_t number = bits(x[j]);
        const uint8_t code = codes[exponent(number)];
        if (code == NONE || !in_bf16(number)) {
            other(j);
            continue;
        }
        const uint32_t sign = static_cast<uint32_t>(number) >> 31, mantissa = number >> 16 & 127;
        sizes[j / 4] |= mantissa << j % 4 * 8 | sign << (j % 4 * 8 + 15) % 32;
        all_codes |= static_cast<uint32_t>(code) << j * 4;
    }
    const uint32_t words[] = {sizes[0], sizes[1], all_codes};
    for (int64_t line = 0; line < 3; line++) std::memcpy(turn + line * 64 + row * 4, words + line, sizeof *words);
}

}  // namespace

extern "C" {

// whether products with such matrices are compiled for this processor
int twelve_there() {
#if defined(__AVX512F__)
    return 1;
#else
    return 0;
#endif
}

// sizes: out in panels; powers: what the 16 codes of each panel are to stand for; others: how many of its numbers have
// none of these, or are not of bf16
// takes out in panels: matrix out*in, powers panels*16, others panels
void twelve_count(const int64_t *s, int threads, const float *matrix, float *powers, int64_t *others) {
    const int64_t out = s[0], in = s[1];
    share(s[2], threads, [&](int64_t n) {
        int64_t count[EXPONENTS] = {}, size = std::min<int64_t>(PANEL, out - n * PANEL) * in;
        for (int64_t i = 0; i < size; i++) {
            const int32_t x = bits(matrix[n * PANEL * in + i]);
            count[exponent(x)] += in_bf16(x);
        }
        choose(count, powers + n * Twelve::CODES);
        for (int i = 0; i < Twelve::CODES; i++) size -= count[exponent(bits(powers[n * Twelve::CODES + i]))];
        others[n] = size;
    });
}

// sizes: out in panels words, of 4 bytes, of data, which are 0 but for powers and starts
// takes out in panels words: matrix out*in, data words
void twelve_pack(const int64_t *s, int threads, const float *matrix, int32_t *data) {
    const int64_t out = s[0], in = s[1];
    const twelve::Lying lying(data, out, in);
    share(s[2], threads, [&](int64_t n) {
        auto *panel = reinterpret_cast<uint8_t *>(data) + n * lying.apart;
        auto *other = const_cast<twelve::Other *>(lying.others()) + lying.starts()[n];
        uint8_t codes[EXPONENTS];
        std::fill_n(codes, EXPONENTS, NONE);
        for (int i = Twelve::CODES - 1; i >= 0; i--) codes[exponent(data[n * lying.apart / 4 + i])] = i;
        for (int64_t row = 0; row < std::min<int64_t>(PANEL, out - n * PANEL); row++)
            for (int64_t k = 0; k < in; k += Twelve::TURN) {
                const float *x = matrix + (n * PANEL + row) * in + k;
                uint8_t *turn = panel + Twelve::HEAD + k / Twelve::TURN * Twelve::BYTES;
                put(turn, row, x, std::min(Twelve::TURN, in - k), codes, [&](int64_t j) {
                    *other++ = {static_cast<int32_t>((k + j) * PANEL + row), x[j]};
                });
            }
    });
}

}  // extern "C"
