// A grid of CUDA threads as fibers of one CPU thread: see runtime.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

namespace host {
struct Index {
  unsigned x, y, z;
};

[[noreturn]] void fail(const char* what, int line);  // says where, and ends the process

Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

void* shared(int id, size_t bytes);  // the block's shared array number `id`, poisoned when first asked for
void sync_block(int line);
// A warp meets: when all lanes of `mask` have come with their payloads, one of them runs `exchange` on all 32 (absent
// lanes null). `orders_memory` as __syncwarp does and a shuffle does not.
void meet(unsigned mask, void* payload, int line, void (*exchange)(void**), bool orders_memory);

void run(const char* kernel, void (*entry)(void*), void* arguments, Index grid, Index block);
}  // namespace host
