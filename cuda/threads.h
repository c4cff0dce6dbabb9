// Work shared by a few threads that sleep when there is none.
#pragma once

#include <cstdint>
#include <functional>

// Calls work(i) for 0 <= i < count, each once, on at most `threads` threads, the caller's among them. Whoever is free
// takes the next one, so a thread that the machine is too busy to run holds up no other. What is computed must not
// depend on who computes it.
void share(int64_t count, int threads, const std::function<void(int64_t)> &work);

// Room for n floats, at a cache line's start, that this thread keeps for its next call of the same purpose. What is in
// it is undefined. ASKED is what a product makes of its rows of x, GIVEN what it makes of a matrix, READING what
// layers make of texts.
enum Purpose { WORK, ASKED, GIVEN, READING };
float *scratch(int64_t n, Purpose what = WORK);
