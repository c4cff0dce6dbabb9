// The next id of each row of logits, and its log-probability; rwkvpipe/infer/sampling.py has it in PyTorch.
//
// Chances are whole numbers, 2^UNIT for the likeliest id. Sums of them are exact in any order, so both forms choose the
// same ids, and neither threads, vector units nor rows beside decide anything. All that is rounded is an exponential in
// fp64, by the same operations in the same order on both sides; therefore nothing here may be fused.
// Of a large vocabulary only the ids that cuts may leave are looked at one by one, and none are sorted.

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "chance.h"
#include "threads.h"

#include <algorithm>
#include <cmath>
#include <limits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t PART = 64;         // ids whose largest value is kept
constexpr int64_t EXACT = 1024;      // numbers that are added up in fp32
constexpr int64_t SURE = 1LL << 36;  // a sum of weights that is right to a millionth
constexpr double FAR = 11;           // powers of 2 by which a weight may be above the likeliest one's
constexpr int BUCKETS = 1 << 11;     // of one level of a selection
constexpr float NOTHING = -std::numeric_limits<float>::infinity(), LOWEST = -std::numeric_limits<float>::max();

struct Cut {
    float value;
    int64_t above;  // what is larger counts
};

struct Sampler {
    int64_t V, top_k, rwkv, greedy, biased, spared, barred;
    const int64_t *listed;  // ids: biased, spared, barred
    const float *bias;
    double inverse, top_p;  // 1 / temperature
    float repetition, presence, frequency;

    // room for one row, its ids filled up by -inf to whole parts
    struct Room {
        int64_t wide, n = 0;                // n: ids that are looked at one by one
        float *z, *peaks, *values;          // peaks: of each part
        int64_t *sums, *weights, *buckets;  // sums: of each part
        int32_t *ids;
    };

    Room room() const {
        const int64_t wide = (V + PART - 1) / PART * PART, parts = (wide / PART + 15) / 16 * 16;
        float *start = scratch(5 * wide + 3 * parts + 2 * BUCKETS), *peaks = start + wide, *sums = peaks + parts;
        float *weights = sums + 2 * parts, *buckets = weights + 2 * wide, *values = buckets + 2 * BUCKETS;
        return {wide, 0, start, peaks, values, reinterpret_cast<int64_t *>(sums),
                reinterpret_cast<int64_t *>(weights), reinterpret_cast<int64_t *>(buckets),
                reinterpret_cast<int32_t *>(values + wide)};
    }

    void penalise(float *z, const float *logits, const float *counts, const uint8_t *seen) const {
        const auto spot = [&](int64_t i) {
            float x = z[i];
            if (repetition != 1.0f) x = x > 0 ? x / repetition : x * repetition;
            if (presence != 0 || frequency != 0) x = x - (counts[i] > 0 ? presence : 0.0f) - counts[i] * frequency;
            z[i] = x;
        };
        if (counts)
            for (int64_t i = 0; i < V; i += 8) {
                uint64_t any = 1;
                if (seen && V - i >= 8) std::memcpy(&any, seen + i, 8);
                for (int64_t j = i; any && j < std::min(V, i + 8); j++)
                    if (seen ? seen[j] : counts[j] > 0) spot(j);
            }
        const int64_t *at = listed + biased;
        for (int64_t i = 0; i < spared; i++) z[at[i]] = logits[at[i]];
        for (int64_t i = 0; i < biased; i++) z[listed[i]] += bias[i];
        for (int64_t i = 0; i < barred; i++) z[at[spared + i]] = NOTHING;
    }

    // the largest value of all parts, no number where there is one that is none
    static float peaks(const Room &at) {
        float top = NOTHING;
        Ints odd = {};
        for (int64_t i = 0; i < at.wide; i += PART) {
            Vec most = load(at.z + i);
            for (int64_t j = 0; j < PART; j += WIDTH) {
                const Vec x = load(at.z + i + j);
                most = x > most ? x : most;
                odd |= x != x;
            }
            float peak = most[0];
            for (int j = 1; j < WIDTH; j++) peak = std::max(peak, most[j]);
            at.peaks[i / PART] = peak, top = std::max(top, peak);
        }
        for (int j = 0; j < WIDTH; j++)
            if (odd[j]) return std::numeric_limits<float>::quiet_NaN();
        return top;
    }

    // how much more the plain logits weigh; whether few differ, and none of these by much
    static bool differ(const Room &at, const float *plain, int64_t V, const Weight &weight, int64_t &more) {
        int64_t few = 512;
        more = 0;
        for (int64_t i = 0; i < V; i += PART) {
            const int64_t end = std::min(V, i + PART);
            if (!std::memcmp(at.z + i, plain + i, sizeof(float) * (end - i))) continue;
            for (int64_t j = i; j < end; j++) {
                if (at.z[j] == plain[j]) continue;
                const double x = (plain[j] - weight.top) * weight.scale;
                if (!(x <= FAR) || --few < 0) return false;
                more += weight.of(Doubles{} + x)[0] - weight.of(Doubles{} + (at.z[j] - weight.top) * weight.scale)[0];
            }
        }
        return true;
    }

    static int64_t first_of(const Room &at, float value) {
        const int64_t part = std::find(at.peaks, at.peaks + at.wide / PART, value) - at.peaks;
        return std::find(at.z + part * PART, at.z + at.wide, value) - at.z;
    }

    static int64_t total(const Room &at, const Weight &weight) {
        int64_t found = 0;
        for (int64_t i = 0; i < at.wide; i += PART) {
            Longs part = {};
            if (!weight.none(at.peaks[i / PART]))
                for (int64_t j = i; j < i + PART; j += LANES) part += weight(at.z + j);
            found += at.sums[i / PART] = added(part);
        }
        return found;
    }

    // ids of this value or a larger one, rising, with their values
    static void collect(Room &at, float least) {
        at.n = 0;
#if defined(__AVX512F__)
        const __m512i rising = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
        for (int64_t i = 0; i < at.wide; i += PART) {
            if (!(at.peaks[i / PART] >= least)) continue;
#if defined(__AVX512F__)
            for (int64_t j = i; j < i + PART; j += WIDTH) {
                const __mmask16 kept = _mm512_cmp_ps_mask(load(at.z + j), all(least), _CMP_GE_OQ);
                const __m512i ids = _mm512_add_epi32(rising, _mm512_set1_epi32(static_cast<int>(j)));
                _mm512_storeu_si512(at.ids + at.n, _mm512_maskz_compress_epi32(kept, ids));
                at.n += __builtin_popcount(kept);
            }
#else
            for (int64_t j = i; j < i + PART; j++) at.ids[at.n] = static_cast<int32_t>(j), at.n += at.z[j] >= least;
#endif
        }
        for (int64_t i = 0; i < at.n; i++) at.values[i] = at.z[at.ids[i]];
        fill(at);
    }

    static void fill(Room &at) {
        for (int64_t i = at.n; i % LANES; i++) at.values[i] = NOTHING;
    }

    // keep(i) of those that were collected stay
    template <class Keep>
    static void filter(Room &at, const Keep &keep) {
        int64_t n = 0;
        for (int64_t i = 0; i < at.n; i++)
            if (keep(i)) at.ids[n] = at.ids[i], at.values[n] = at.values[i], at.weights[n++] = at.weights[i];
        at.n = n;
        fill(at);
    }

    // the value of those collected at which `measure`, from the largest on, reaches a goal of 1 or more
    template <class Measure>
    static Cut cut(const Room &at, int64_t goal, const Measure &measure) {
        uint64_t prefix = 0;
        int64_t above = 0;
        const int shifts[] = {21, 10, 0, 32};  // the last is that before the first
        for (int level = 0; level < 3; level++) {
            const int shift = shifts[level], before = shifts[(level + 3) % 4], width = before - shift;
            std::fill(at.buckets, at.buckets + (1 << width), 0);
            for (int64_t i = 0; i < at.n; i++) {
                const uint64_t key = key_of(at.values[i]);
                if ((key ^ prefix) >> before == 0) at.buckets[key >> shift & ((1 << width) - 1)] += measure(i);
            }
            int64_t j = (1 << width) - 1;
            for (; j > 0 && above + at.buckets[j] < goal; j--) above += at.buckets[j];
            prefix |= static_cast<uint64_t>(j) << shift;
        }
        return {value_of(static_cast<uint32_t>(prefix)), above};
    }

    // the k-th largest value, the lowest there is where fewer are not -inf
    Cut ranked(Room &at) const {
        float least = LOWEST;
        const int64_t parts = at.wide / PART;
        if (top_k <= parts) {  // so many parts have a peak as large as this
            std::copy(at.peaks, at.peaks + parts, at.values);
            std::nth_element(at.values, at.values + top_k - 1, at.values + parts, [](float a, float b) { return a > b; });
            least = std::max(least, at.values[top_k - 1]);
        }
        collect(at, least);
        if (at.n < top_k) return {LOWEST, at.n};
        return cut(at, top_k, [](int64_t) { return 1; });
    }

    int64_t goal_of(int64_t whole) const {
        const double wanted = std::ceil(top_p * static_cast<double>(whole));
        return std::max<int64_t>(1, std::min(whole, static_cast<int64_t>(wanted)));
    }

    // collects what may be among the likeliest that together reach a goal: all that is lighter does not weigh the rest
    void near(Room &at, const Weight &weight, int64_t whole, int64_t goal) const {
        const int64_t light = (whole - goal) / V;  // 0: the goal may need all that weighs anything, down to LEAST
        const double reach = (light ? UNIT + 0.01 - std::log2(static_cast<double>(light)) : -LEAST) / weight.scale;
        collect(at, std::max(LOWEST, static_cast<float>(weight.top - reach)));
        weight.all(at.values, at.n, at.weights);
    }

    // temperature, top-k, top-p: what stays is collected, with its weights; what all weighs, where that was added up
    int64_t hf(Room &at, const Weight &weight, bool by_rank) const {
        int64_t whole = 0;
        if (by_rank) {
            const float least = ranked(at).value;
            filter(at, [&](int64_t i) { return at.values[i] >= least; });
            weight.all(at.values, at.n, at.weights);
            for (int64_t i = 0; i < at.n; i++) whole += at.weights[i];
        }
        if (top_p >= 1.0) return 0;
        if (!by_rank) whole = total(at, weight);
        const int64_t goal = goal_of(whole);
        if (!by_rank) near(at, weight, whole, goal);
        const Cut found = cut(at, goal, [&](int64_t i) { return at.weights[i]; });
        int64_t left = goal - found.above;  // to be reached by equals, the first ones
        filter(at, [&](int64_t i) {
            if (at.values[i] != found.value) return at.values[i] > found.value;
            const bool stays = left > 0;
            left -= at.weights[i];
            return stays;
        });
        return by_rank ? 0 : whole;
    }

    // top-k by rank, top-p of the whole, temperature
    void demo(Room &at, const Weight &weight, bool by_rank) const {
        const Weight plain = {weight.top, LOG2E};
        Cut mass = {LOWEST, 0}, rank = {LOWEST, 0};
        int64_t goal = 0, above = 0, ties = 0;
        if (top_p < 1.0) {
            const int64_t whole = total(at, plain);
            goal = goal_of(whole);
            near(at, plain, whole, goal);
            mass = cut(at, goal, [&](int64_t i) { return at.weights[i]; });
        }
        if (by_rank) rank = ranked(at);
        collect(at, std::max(mass.value, rank.value));
        plain.all(at.values, at.n, at.weights);
        int64_t left = by_rank ? top_k - rank.above : at.n;
        filter(at, [&](int64_t i) { return at.values[i] != rank.value || left-- > 0; });
        for (int64_t i = 0; i < at.n; i++) at.values[i] == mass.value ? ties++ : above += at.weights[i];
        const bool shared = top_p < 1.0 && top_p > 0.0 && ties;
        const int64_t share = shared ? std::max<int64_t>(1, (goal - above) / ties) : 0;
        if (inverse == 1.0) {
            for (int64_t i = 0; shared && i < at.n; i++)
                if (at.values[i] == mass.value) at.weights[i] = share;
            return;
        }
        Weight last = weight;
        int64_t tie = 0;
        if (shared) {
            const double its = (log2_of(share) - UNIT) / LOG2E, more = its + weight.top;
            last.top = mass.value == weight.top ? more : std::max(weight.top, more);
            tie = last.of(Doubles{} + (more - last.top) * last.scale)[0];
        }
        last.all(at.values, at.n, at.weights);
        for (int64_t i = 0; shared && i < at.n; i++)
            if (at.values[i] == mass.value) at.weights[i] = tie;
    }

    // the first id with which weights go beyond a share of their sum
    static int64_t met(const int64_t *weights, int64_t n, int64_t goal) {
        int64_t i = 0;
        while (i < n - 1 && (goal -= weights[i]) >= 0) i++;
        return i;
    }
    static int64_t goal_at(double number, int64_t whole) {
        return std::min(static_cast<int64_t>(number * static_cast<double>(whole)), whole - 1);
    }

    // the id that is met, and what all weighs, where that was added up
    int64_t lot(Room &at, const Weight &weight, double number, int64_t *told, int64_t &all_) const {
        const bool by_rank = top_k > 0 && top_k < V;
        if (told) std::fill(told, told + V, 0);
        if (by_rank || top_p < 1.0) {
            if (rwkv) demo(at, weight, by_rank);
            all_ = rwkv ? 0 : hf(at, weight, by_rank);
            int64_t whole = 0;
            for (int64_t i = 0; i < at.n; i++) whole += at.weights[i];
            for (int64_t i = 0; told && i < at.n; i++) told[at.ids[i]] = at.weights[i];
            return at.ids[met(at.weights, at.n, goal_at(number, whole))];
        }
        all_ = total(at, weight);
        int64_t goal = goal_at(number, all_), part = 0;
        for (int64_t i = 0; told && i < at.wide; i += PART) {
            weight.all(at.z + i, PART, at.weights);
            std::copy(at.weights, at.weights + std::min(PART, V - i), told + i);
        }
        while (goal >= at.sums[part]) goal -= at.sums[part++];
        weight.all(at.z + part * PART, PART, at.weights);
        return part * PART + met(at.weights, PART, goal);
    }

    // log of the sum of e^((x - top) inverse), and the top; no number where x has something that is none
    double normaliser(const float *x, float &top, float by) const {
        Vec most = all(NOTHING);
        int64_t j = 0;
        for (; j + WIDTH <= V; j += WIDTH) {
            const Vec y = load(x + j);
            most = y > most ? y : most;
        }
        top = NOTHING;
        for (int i = 0; i < WIDTH; i++) top = std::max(top, most[i]);
        for (; j < V; j++) top = std::max(top, x[j]);
        double whole = 0;
        for (int64_t i = 0; i < V; i += EXACT) {
            const int64_t end = std::min(V, i + EXACT);
            Vec part = {};
            for (j = i; j + WIDTH <= end; j += WIDTH) part += exponential((load(x + j) - top) * by);
            if (j < end) part += only(exponential((load_tail(x + j, end - j) - top) * by), end - j);
            whole += sum(part);
        }
        return std::log(whole);
    }

    int64_t row(const float *logits, const float *plain, const float *counts, const uint8_t *seen, double number,
                float *logprob, int64_t *told) const {
        Room at = room();
        copy(at.z, logits, V);
        std::fill(at.z + V, at.z + at.wide, NOTHING);
        penalise(at.z, logits, counts, seen);
        const float top = peaks(at), by = greedy ? 1.0f : static_cast<float>(inverse);
        const Weight weight = {top, LOG2E * inverse};
        *logprob = std::numeric_limits<float>::quiet_NaN();
        if (!std::isfinite(top)) return 0;  // no numbers: whoever counts will see
        int64_t more = 0, all_ = 0;
        float first = top;
        double whole = 0;
        const bool near = !greedy && differ(at, plain, V, weight, more);
        if (!near && !std::isfinite(whole = normaliser(plain, first, by))) return 0;
        const int64_t id = greedy ? first_of(at, top) : lot(at, weight, number, told, all_);
        if (near && all_ && all_ + more > SURE) {  // then what all weighs is known already
            whole = std::log(static_cast<double>(all_ + more)) - UNIT / LOG2E;
            *logprob = static_cast<float>((static_cast<double>(plain[id]) - top) * inverse - whole);
            return id;
        }
        if (near) whole = normaliser(plain, first, by);
        *logprob = static_cast<float>((static_cast<double>(plain[id]) - first) * by - whole);
        return id;
    }
};

}  // namespace

extern "C" {

// sizes: rows V, top_k, whether the order is rwkv's, whether the likeliest is taken, and how many ids are biased, spared
// and barred, which `listed` holds one after the other. set: 1 / temperature, top_p, repetition, presence, frequency.
// plain: logits that log-probabilities are of. counts, seen, draws and told (weights of all ids) may be null
// takes R V top_k rwkv likeliest biased spared barred: logits plain counts? seen? R*V, listed biased+spared+barred,
// bias biased, set 5, draws? ids logprobs R, told? R*V
void sample_rows(const int64_t *s, int threads, const float *logits, const float *plain, const float *counts,
                 const uint8_t *seen, const int64_t *listed, const float *bias, const double *set, const double *draws,
                 int64_t *ids, float *logprobs, int64_t *told) {
    const Sampler it = {s[1], s[2], s[3], s[4], s[5], s[6], s[7], listed, bias, set[0], set[1],
                        static_cast<float>(set[2]), static_cast<float>(set[3]), static_cast<float>(set[4])};
    share(s[0], threads, [&](int64_t n) {
        const int64_t at = n * it.V;
        ids[n] = it.row(logits + at, plain + at, counts ? counts + at : nullptr, seen ? seen + at : nullptr,
                        draws ? draws[n] : 0, logprobs + n, told ? told + at : nullptr);
    });
}

}  // extern "C"
