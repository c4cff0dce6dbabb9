// Texts out of lines of JSON: where in each line the value of one key stands, and that value unescaped in its place.
//
// What is an object for sure, with a text under the key, is found here; every other line is left as it is for Python,
// which reads it again and says what is wrong, or that nothing is. A C interface without Python's headers.
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int DEPTH = 200;    // brackets in brackets that are followed
constexpr int DIGITS = 200;   // characters of a number that are followed

bool is_space(uint8_t c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

bool within(uint8_t c, uint8_t low, uint8_t high) { return c >= low && c <= high; }

// Bytes of the character of more than one byte at p; 0 if that is not UTF-8.
int wide(const uint8_t* p, const uint8_t* end) {
    const uint8_t first = *p;
    if (within(first, 0xC2, 0xDF)) return end - p > 1 && within(p[1], 0x80, 0xBF) ? 2 : 0;
    if (within(first, 0xE0, 0xEF)) {
        const uint8_t low = first == 0xE0 ? 0xA0 : 0x80, high = first == 0xED ? 0x9F : 0xBF;
        return end - p > 2 && within(p[1], low, high) && within(p[2], 0x80, 0xBF) ? 3 : 0;
    }
    if (!within(first, 0xF0, 0xF4) || end - p < 4) return 0;
    const uint8_t low = first == 0xF0 ? 0x90 : 0x80, high = first == 0xF4 ? 0x8F : 0xBF;
    return within(p[1], low, high) && within(p[2], 0x80, 0xBF) && within(p[3], 0x80, 0xBF) ? 4 : 0;
}

// The number of four hexadecimal digits, -1 if they are none.
int hexadecimal(const uint8_t* p) {
    int found = 0;
    for (int i = 0; i < 4; ++i) {
        const int c = p[i] | 0x20;
        if (within(p[i], '0', '9')) found = found * 16 + p[i] - '0';
        else if (c >= 'a' && c <= 'f') found = found * 16 + c - 'a' + 10;
        else return -1;
    }
    return found;
}

// The first byte from p on that is no plain character of a text: a quote, a backslash, a control, one above ASCII.
const uint8_t* plain(const uint8_t* p, const uint8_t* end) {
#if defined(__SSE2__)
    const __m128i quote = _mm_set1_epi8('"'), slash = _mm_set1_epi8('\\'), space = _mm_set1_epi8(' ');
    for (; end - p >= 16; p += 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        // compared with their signs, bytes above ASCII are below the space, too
        const __m128i odd = _mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(x, quote), _mm_cmpeq_epi8(x, slash)),
                                         _mm_cmplt_epi8(x, space));
        if (const int mask = _mm_movemask_epi8(odd)) return p + __builtin_ctz(mask);
    }
#endif
    while (p < end && *p != '"' && *p != '\\' && within(*p, 0x20, 0x7F)) ++p;
    return p;
}

struct Text {
    uint8_t *start = nullptr, *end = nullptr;
    bool escapes = false;
};

class Line {
  public:
    Line(uint8_t* p, uint8_t* end, const uint8_t* key, int64_t size) : p_(p), end_(end), key_(key), size_(size) {}

    // Whether the line is an object whose last member of that key is a text, which `found` then is.
    bool read(Text* found) {
        if (!next('{')) return false;
        bool wanted = false;
        if (space() && *p_ == '}') return false;
        do {
            Text name;
            if (!next('"') || !text(&name) || name.escapes || !next(':') || !space()) return false;
            const bool here = name.end - name.start == size_ && !std::memcmp(name.start, key_, size_);
            if (here) wanted = *p_ == '"';
            if (here && wanted) {
                ++p_;
                *found = Text();
                if (!text(found)) return false;
            } else if (!value(0)) {
                return false;
            }
        } while (next(','));
        return next('}') && !space() && wanted;
    }

  private:
    // Whether anything but white space is left, where p_ then is.
    bool space() {
        while (p_ < end_ && is_space(*p_)) ++p_;
        return p_ < end_;
    }

    bool next(uint8_t c) {
        if (!space() || *p_ != c) return false;
        ++p_;
        return true;
    }

    // A text whose first quote was read.
    bool text(Text* found) {
        found->start = p_;
        for (;;) {
            p_ += plain(p_, end_) - p_;
            if (p_ == end_ || *p_ < 0x20) return false;
            if (*p_ == '"') {
                found->end = p_++;
                return true;
            }
            if (*p_ == '\\') {
                found->escapes = true;
                if (!escape()) return false;
            } else if (*p_ == 0x7F) {
                ++p_;
            } else {
                const int width = wide(p_, end_);
                if (!width) return false;
                p_ += width;
            }
        }
    }

    bool escape() {
        if (end_ - p_ < 2) return false;
        if (p_[1] != 'u') {
            if (!std::memchr("\"\\/bfnrt", p_[1], 8)) return false;
            p_ += 2;
            return true;
        }
        const int code = end_ - p_ < 6 ? -1 : hexadecimal(p_ + 2);
        if (code < 0 || (code >= 0xDC00 && code < 0xE000)) return false;
        p_ += 6;
        if (code < 0xD800 || code >= 0xE000) return true;
        if (end_ - p_ < 6 || p_[0] != '\\' || p_[1] != 'u') return false;
        const int low = hexadecimal(p_ + 2);
        p_ += 6;
        return low >= 0xDC00 && low < 0xE000;
    }

    bool word(const char* wanted) {
        const int64_t size = static_cast<int64_t>(std::strlen(wanted));
        if (end_ - p_ < size || std::memcmp(p_, wanted, size)) return false;
        p_ += size;
        return true;
    }

    bool digits() {
        const uint8_t* const from = p_;
        while (p_ < end_ && within(*p_, '0', '9')) ++p_;
        return p_ > from && p_ - from < DIGITS;
    }

    bool number() {
        if (*p_ == '-') ++p_;
        if (p_ < end_ && *p_ == '0') ++p_;
        else if (!digits()) return false;
        if (p_ < end_ && *p_ == '.' && (++p_, !digits())) return false;
        if (p_ < end_ && (*p_ | 0x20) == 'e') {
            ++p_;
            if (p_ < end_ && (*p_ == '+' || *p_ == '-')) ++p_;
            return digits();
        }
        return true;
    }

    bool value(int depth) {
        Text ignored;
        if (!space() || depth == DEPTH) return false;
        switch (*p_) {
            case '"': return ++p_, text(&ignored);
            case 't': return word("true");
            case 'f': return word("false");
            case 'n': return word("null");
            case '[':
                ++p_;
                if (space() && *p_ == ']') return ++p_, true;
                do {
                    if (!value(depth + 1)) return false;
                } while (next(','));
                return next(']');
            case '{':
                ++p_;
                if (space() && *p_ == '}') return ++p_, true;
                do {
                    if (!next('"') || !text(&ignored) || !next(':') || !value(depth + 1)) return false;
                } while (next(','));
                return next('}');
            default: return number();
        }
    }

    uint8_t *p_, *const end_;
    const uint8_t* const key_;
    const int64_t size_;
};

// A text without its escapes, which are sound; in its place, which it then no longer fills: its new end.
uint8_t* unescaped(const Text& text) {
    uint8_t* out = static_cast<uint8_t*>(std::memchr(text.start, '\\', text.end - text.start));
    for (const uint8_t* p = out; p < text.end;) {
        if (*p != '\\') {
            const void* const found = std::memchr(p, '\\', text.end - p);
            const uint8_t* const stop = found ? static_cast<const uint8_t*>(found) : text.end;
            std::memmove(out, p, stop - p);
            out += stop - p, p = stop;
            continue;
        }
        const uint8_t letter = p[1];
        p += 2;
        if (letter != 'u') {
            static const char names[] = "bfnrt", meant[] = "\b\f\n\r\t";
            const void* const at = std::memchr(names, letter, 5);
            *out++ = at ? meant[static_cast<const char*>(at) - names] : letter;
            continue;
        }
        uint32_t code = hexadecimal(p);
        p += 4;
        if (code >= 0xD800 && code < 0xE000) {
            code = 0x10000 + ((code - 0xD800) << 10) + (hexadecimal(p + 2) - 0xDC00);
            p += 6;
        }
        if (code < 0x80) {
            *out++ = code;
        } else if (code < 0x800) {
            *out++ = 0xC0 | code >> 6, *out++ = 0x80 | (code & 63);
        } else if (code < 0x10000) {
            *out++ = 0xE0 | code >> 12, *out++ = 0x80 | (code >> 6 & 63), *out++ = 0x80 | (code & 63);
        } else {
            *out++ = 0xF0 | code >> 18, *out++ = 0x80 | (code >> 12 & 63);
            *out++ = 0x80 | (code >> 6 & 63), *out++ = 0x80 | (code & 63);
        }
    }
    return out;
}

}  // namespace

extern "C" {

// Rows of `text`, one for each line that is not blank: number of the line from 1, where its text starts and ends (-1
// for both if Python is to look at it), where the line starts and ends. Returns how many; there is room for one a line.
int64_t rows_scan(uint8_t* text, int64_t size, const uint8_t* key, int64_t key_size, int64_t* rows) {
    int64_t* row = rows;
    int64_t number = 0;
    for (uint8_t *p = text, *const last = text + size; p < last;) {
        void* const found = std::memchr(p, '\n', last - p);
        uint8_t* const end = found ? static_cast<uint8_t*>(found) : last;
        ++number;
        const uint8_t* q = p;
        while (q < end && is_space(*q)) ++q;
        if (q < end) {
            Text value;
            const bool sound = Line(p, end, key, key_size).read(&value);
            row[0] = number;
            row[1] = sound ? value.start - text : -1;
            row[2] = sound ? (value.escapes ? unescaped(value) : value.end) - text : -1;
            row[3] = p - text;
            row[4] = end - text;
            row += 5;
        }
        p = end + 1;
    }
    return (row - rows) / 5;
}

}  // extern "C"
