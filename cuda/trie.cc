// Longest match over bytes: at each place of a text the longest entry of a vocabulary that fits there.
//
//     while the text goes on: id of the longest entry that it begins with; go on behind that entry
//
// The reference is TrieTokenizer._part in rwkvpipe/tokenizer/trie.py. A C interface without Python's or torch's headers.
//
// The first two bytes of an entry are looked up in a table. From there on a node is a number, `base`, and the cell of
// its child for byte c is cells[base ^ c]. No two nodes have the same base, so a cell that bears byte c is the child of
// no other node. Cells below 256 stay free: base 0 is a node without children.
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr uint32_t FREE = 256;  // in place of a byte: a cell that is nobody's

struct Cell {
    uint32_t base = 0;
    uint32_t info = FREE;  // id << 9 | byte; id 0: no entry ends here
};

struct Start {
    uint32_t base = 0;
    uint32_t found = 0;  // id << 2 | length of the longest entry of at most two bytes; 0: there is none
};

struct Words {  // entries in the order of their bytes
    const uint8_t* bytes;
    const int64_t* offsets;
    const uint32_t* ids;
    int64_t count;
    int64_t length(int64_t entry) const { return offsets[entry + 1] - offsets[entry]; }
    uint8_t at(int64_t entry, int64_t place) const { return bytes[offsets[entry] + place]; }
};

class Trie {
  public:
    explicit Trie(const Words& words) : starts_(1 << 16), words_(words) {
        grow();
        int64_t entry = 0;
        for (uint32_t first = 0; first < 256; ++first) {
            single_[first] = 0;
            if (entry < words.count && words.at(entry, 0) == first && words.length(entry) == 1)
                single_[first] = words.ids[entry++] << 2 | 1;
            for (uint32_t second = 0; second < 256; ++second) starts_[first << 8 | second].found = single_[first];
            while (entry < words.count && words.at(entry, 0) == first) {
                const uint8_t second = words.at(entry, 1);
                Start& start = starts_[first << 8 | second];
                if (words.length(entry) == 2) start.found = words.ids[entry] << 2 | 2;
                int64_t end = entry;
                while (end < words.count && words.at(end, 0) == first && words.at(end, 1) == second) ++end;
                start.base = hang(entry, end, 2);
                entry = end;
            }
        }
        for (entry = 0; entry < words.count; ++entry)
            if (words.length(entry) > longest_) longest_ = words.length(entry);
        next_.clear(), previous_.clear(), used_.clear();
        next_.shrink_to_fit(), previous_.shrink_to_fit(), used_.shrink_to_fit();
    }

    // Ids of the entries that begin before `stop`, from *place on, which moves to where the next one begins: before
    // `stop` if none fits there.
    template <class T>
    int64_t encode(const uint8_t* text, int64_t size, int64_t* place, int64_t stop, T* out) const {
        const T* const begin = out;
        const uint8_t *p = text + *place, *const end = text + size;
        // where no entry can reach the end of the text, nothing looks for it
        const int64_t safe = size - longest_ - 2;
        for (const uint8_t* const last = text + (stop < safe ? stop : safe); p < last;) {
            const Start start = starts_[p[0] << 8 | p[1]];
            uint32_t id = start.found >> 2;
            const uint8_t *match = p + (start.found & 3), *q = p + 2;
            for (Cell cell = cells_[start.base ^ *q]; (cell.info & 511) == *q; cell = cells_[cell.base ^ *q]) {
                ++q;
                const uint32_t here = cell.info >> 9;
                id = here ? here : id;
                match = here ? q : match;
            }
            if (match == p) return *place = p - text, out - begin;
            *out++ = static_cast<T>(id);
            p = match;
        }
        for (const uint8_t* const last = text + stop; p < last;) {
            const bool two = p + 1 < end;
            const uint32_t found = two ? starts_[p[0] << 8 | p[1]].found : single_[p[0]];
            uint32_t id = found >> 2, base = two ? starts_[p[0] << 8 | p[1]].base : 0;
            const uint8_t *match = p + (found & 3), *q = p + 2;
            while (q < end && (cells_[base ^ *q].info & 511) == *q) {
                const Cell cell = cells_[base ^ *q++];
                base = cell.base;
                if (cell.info >> 9) id = cell.info >> 9, match = q;
            }
            if (match == p) break;
            *out++ = static_cast<T>(id);
            p = match;
        }
        *place = p - text;
        return out - begin;
    }

    // Ids of texts, text k from starts[k] to ends[k], each with `last` behind it, one after the other; how many there
    // are, and of each text in `sizes`, where -1 is one in which nothing fits somewhere: its ids are left out. There
    // must be room for as many ids as there are bytes and texts.
    template <class T>
    int64_t encode_all(const uint8_t* text, const int64_t* starts, const int64_t* ends, int64_t count, T last, T* out,
                       int64_t* sizes) const {
        T* const begin = out;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t size = ends[k] - starts[k];
            int64_t place = 0;
            const int64_t found = encode(text + starts[k], size, &place, size, out);
            sizes[k] = place < size ? -1 : found + 1;
            if (place == size) out[found] = last, out += found + 1;
        }
        return out - begin;
    }

  private:
    // A block of 256 cells more, all free: two numbers below 256 apart by XOR stay in one block.
    void grow() {
        const uint32_t from = static_cast<uint32_t>(cells_.size()), to = from + 256;
        cells_.resize(to), used_.resize(to, 0), next_.resize(to), previous_.resize(to);
        for (uint32_t i = from; i < to; ++i) {  // a ring through the free ones, in which 0 is the end
            if (i == 0) continue;
            previous_[i] = previous_[0], next_[i] = 0;
            next_[previous_[0]] = i, previous_[0] = i;
        }
    }

    bool is_free(uint32_t i) const { return i > 255 && (cells_[i].info & 511) == FREE; }

    // A base that nobody has, under which the cells of all these bytes are free.
    uint32_t room(const uint8_t* children, int count) {
        if (count == 1)  // fits anywhere: fills the oldest gap
            for (uint32_t i = next_[0]; i; i = next_[i])
                if ((i ^ children[0]) > 255 && !used_[i ^ children[0]]) return i ^ children[0];
        for (;; grow()) {
            const uint32_t blocks = static_cast<uint32_t>(cells_.size()) / 256;
            for (uint32_t block = blocks; block-- > 1 && block + 6 >= blocks;)
                for (uint32_t base = block * 256; base < block * 256 + 256; ++base) {
                    int fits = used_[base] ? -1 : 0;
                    while (fits >= 0 && fits < count) fits = is_free(base ^ children[fits]) ? fits + 1 : -1;
                    if (fits == count) return base;
                }
        }
    }

    // Hang entries `low` to `high`, which share their first `depth` bytes, under a node; its base.
    uint32_t hang(int64_t low, int64_t high, int64_t depth) {
        if (low < high && words_.length(low) == depth) ++low;  // it ends at this node
        if (low == high) return 0;
        uint8_t children[256];
        int64_t from[257];
        int count = 0;
        for (int64_t entry = low; entry < high; ++entry)
            if (count == 0 || children[count - 1] != words_.at(entry, depth)) {
                from[count] = entry;
                children[count++] = words_.at(entry, depth);
            }
        from[count] = high;
        const uint32_t base = room(children, count);
        used_[base] = 1;
        for (int k = 0; k < count; ++k) {
            const uint32_t i = base ^ children[k];
            next_[previous_[i]] = next_[i], previous_[next_[i]] = previous_[i];
            const uint32_t id = words_.length(from[k]) == depth + 1 ? words_.ids[from[k]] : 0;
            cells_[i].info = id << 9 | children[k];
        }
        for (int k = 0; k < count; ++k) {
            const uint32_t below = hang(from[k], from[k + 1], depth + 1);
            cells_[base ^ children[k]].base = below;  // after the call: cells_ may have moved
        }
        return base;
    }

    std::vector<Cell> cells_;
    std::vector<Start> starts_;
    uint32_t single_[256];
    int64_t longest_ = 0;
    Words words_;  // while it is made
    std::vector<uint8_t> used_;
    std::vector<uint32_t> next_, previous_;
};

}  // namespace

extern "C" {

// Functions of Python, whose lock the caller holds.
typedef void* (*NewList)(int64_t);
typedef int (*SetItem)(void*, int64_t, void*);
typedef void (*Hold)(void*);

// `count` entries in the order of their bytes, all in `bytes`, entry k from offsets[k] to offsets[k + 1]; ids from 1 to
// 2^22 - 1; no entry is empty.
void* trie_new(const uint8_t* bytes, const int64_t* offsets, const uint32_t* ids, int64_t count) {
    return new Trie(Words{bytes, offsets, ids, count});
}

void trie_free(void* trie) { delete static_cast<Trie*>(trie); }

int64_t trie_encode16(const void* trie, const uint8_t* text, int64_t size, int64_t* place, int64_t stop, void* out) {
    return static_cast<const Trie*>(trie)->encode(text, size, place, stop, static_cast<uint16_t*>(out));
}

int64_t trie_encode32(const void* trie, const uint8_t* text, int64_t size, int64_t* place, int64_t stop, void* out) {
    return static_cast<const Trie*>(trie)->encode(text, size, place, stop, static_cast<int32_t*>(out));
}

int64_t trie_all16(const void* trie, const uint8_t* text, const int64_t* starts, const int64_t* ends, int64_t count,
                   int64_t last, void* out, int64_t* sizes) {
    return static_cast<const Trie*>(trie)->encode_all<uint16_t>(text, starts, ends, count, static_cast<uint16_t>(last),
                                                                static_cast<uint16_t*>(out), sizes);
}

int64_t trie_all32(const void* trie, const uint8_t* text, const int64_t* starts, const int64_t* ends, int64_t count,
                   int64_t last, void* out, int64_t* sizes) {
    return static_cast<const Trie*>(trie)->encode_all<int32_t>(text, starts, ends, count, static_cast<int32_t>(last),
                                                               static_cast<int32_t*>(out), sizes);
}

// A list of the numbers in `ids`, made of the objects in `numbers`; null if there is no memory.
void* trie_list(const uint16_t* ids, int64_t count, void* const* numbers, NewList make, SetItem set, Hold hold) {
    void* const list = make(count);
    for (int64_t i = 0; list && i < count; ++i) {
        if (i + 12 < count) __builtin_prefetch(numbers[ids[i + 12]], 1);  // they lie scattered over two megabytes
        void* const number = numbers[ids[i]];
        hold(number);
        set(list, i, number);
    }
    return list;
}

}  // extern "C"
