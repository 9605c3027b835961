// The scheduler. Every thread of a block is a fiber with a stack of its own; fibers switch only at barriers and warp
// collectives, in an order that the schedule decides, so one warp may run far ahead of another. Blocks run one after
// the other. Not modelled: weak memory order, and two blocks at the same time (ThreadSanitizer sees races between
// blocks all the same, since it is told of no order between them).
//
// Never compiled with -fsanitize=thread itself; HOST_TSAN and HOST_ASAN say what the kernels are compiled with.
#include "runtime.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef HOST_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

// Saves the callee-saved registers and the stack pointer of one fiber, takes up those of another. x86-64, System V.
asm(R"(
.text
.p2align 4
.type host_switch,@function
host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_switch, .-host_switch
)");
extern "C" void host_switch(void** save, void* load) asm("host_switch");

namespace host {
namespace {
constexpr size_t STACK = 64 << 10, GUARD = 4 << 10;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Index index{};
  int lane = 0, warp = 0;
  void* payload = nullptr;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;
};

struct Warp {
  unsigned ready = 0, arrived = 0, mask = 0, alive = 0;
  int line = 0, generation = 0;
  uint64_t priority = 0;
  char order[2] = {};  // addresses for TSan's release and acquire
};

// How fibers are chosen. FORWARD: warp 0 as far as it can, then warp 1 ...; BACKWARD: from the last; WARPS: a random
// lane of the warp of highest random priority, drawn anew at each barrier; LANES: any ready lane.
enum Schedule { FORWARD, BACKWARD, WARPS, LANES };

struct {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char*> shared;
  Fiber* current = nullptr;
  void* scheduler_stack = nullptr;
  Index block{}, block_size{}, grid_size{};
  int threads = 0, alive = 0, waiting = 0, barrier_line = 0, warp_line = 0, generation = 0;
  char order[2] = {}, finished = 0;
  uint64_t random = 1;
  int schedule = FORWARD;
  const char* kernel = "none";
  void (*entry)(void*) = nullptr;
  void* arguments = nullptr;
  const void* main_bottom = nullptr;  // ASan's
  size_t main_size = 0;
  void* main_fake = nullptr;
  void* main_tsan = nullptr;
} s;

uint64_t draw() {
  s.random ^= s.random << 13;
  s.random ^= s.random >> 7;
  s.random ^= s.random << 17;
  return s.random;
}

void unobserved(bool begin) {  // what follows is the machine's doing, no access of a thread
  (void)begin;
#ifdef HOST_TSAN
  if (begin) {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  } else {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#endif
}

void release(void* order) {
  (void)order;
#ifdef HOST_TSAN
  __tsan_release(order);
#endif
}

void acquire(void* order) {
  (void)order;
#ifdef HOST_TSAN
  __tsan_acquire(order);
#endif
}

void to_scheduler(bool for_good) {
  Fiber* me = s.current;
  (void)for_good;
#ifdef HOST_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &me->fake_stack, s.main_bottom, s.main_size);
#endif
#ifdef HOST_TSAN
  __tsan_switch_to_fiber(s.main_tsan, 1);  // 1: switching is no synchronisation
#endif
  host_switch(&me->stack_pointer, s.scheduler_stack);
#ifdef HOST_ASAN
  __sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& fiber) {
  s.current = &fiber;
#ifdef HOST_ASAN
  __sanitizer_start_switch_fiber(&s.main_fake, fiber.stack, STACK);
#endif
#ifdef HOST_TSAN
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
  host_switch(&s.scheduler_stack, fiber.stack_pointer);
#ifdef HOST_ASAN
  __sanitizer_finish_switch_fiber(s.main_fake, nullptr, nullptr);
#endif
  s.current = nullptr;
}

void first_frame() {
#ifdef HOST_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &s.main_bottom, &s.main_size);
#endif
  s.entry(s.arguments);
  release(&s.finished);
  Fiber& me = *s.current;
  Warp& warp = s.warps[me.warp];
  s.alive--;
  warp.alive &= ~(1u << me.lane);
  if (s.waiting) fail("a thread ended while others wait at __syncthreads()", s.barrier_line);
  if (warp.arrived && (warp.mask >> me.lane & 1)) fail("a lane ended while others wait for it", warp.line);
  to_scheduler(true);
  abort();
}

void wake(Fiber& fiber) { s.warps[fiber.warp].ready |= 1u << fiber.lane; }

void prepare(Fiber& fiber, int i) {
#ifdef HOST_TSAN
  // a fresh stack and a fresh TSan fiber: then races between blocks are seen too
  unobserved(true);
  free(fiber.stack);
  unobserved(false);
  fiber.stack = static_cast<char*>(malloc(STACK));
  if (fiber.tsan) __tsan_destroy_fiber(fiber.tsan);
  fiber.tsan = __tsan_create_fiber(0);
#else
  if (fiber.stack == nullptr) {  // above a page that must not be touched
    char* memory = static_cast<char*>(
        mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory, GUARD, PROT_NONE);
    fiber.stack = memory + GUARD;
  }
#endif
#ifdef HOST_ASAN
  __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack) + STACK - 64) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&first_frame);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the registers that host_switch takes up
  fiber.stack_pointer = top;
  fiber.lane = i % 32;
  fiber.warp = i / 32;
  fiber.fake_stack = nullptr;
  fiber.index = {i % s.block_size.x, i / s.block_size.x % s.block_size.y, i / (s.block_size.x * s.block_size.y)};
  s.warps[fiber.warp].alive |= 1u << fiber.lane;
  wake(fiber);
}

int choose_warp() {
  const int count = int(s.warps.size()), first = s.schedule == LANES ? int(draw() % count) : 0;
  int chosen = -1;
  for (int i = 0; i < count; i++) {
    const int warp = s.schedule == BACKWARD ? count - 1 - i : (first + i) % count;
    if (!s.warps[warp].ready) continue;
    if (chosen < 0 || (s.schedule == WARPS && s.warps[warp].priority > s.warps[chosen].priority)) chosen = warp;
  }
  return chosen;
}

int choose_lane(unsigned ready) {
  if (s.schedule == FORWARD) return __builtin_ctz(ready);
  if (s.schedule == BACKWARD) return 31 - __builtin_clz(ready);
  for (int skip = int(draw() % __builtin_popcount(ready)); skip > 0; skip--) ready &= ready - 1;
  return __builtin_ctz(ready);
}

void run_block() {
  s.alive = s.threads;
  s.waiting = 0;
  s.warps.assign((s.threads + 31) / 32, Warp{});
  if (int(s.fibers.size()) < s.threads) s.fibers.resize(s.threads);
  for (int i = 0; i < s.threads; i++) prepare(s.fibers[i], i);
  for (Warp& warp : s.warps) warp.priority = draw();
  while (s.alive) {
    const int warp = choose_warp();
    if (warp < 0) fail("not all threads reach a barrier or warp collective", s.waiting ? s.barrier_line : s.warp_line);
    const int lane = choose_lane(s.warps[warp].ready);
    s.warps[warp].ready &= ~(1u << lane);
    to_fiber(s.fibers[warp * 32 + lane]);
  }
}
}  // namespace

void fail(const char* what, int line) {
  fprintf(stderr, "HOST ERROR: %s (kernel %s, line %d, block %u", what, s.kernel, line, s.block.x);
  if (s.current) fprintf(stderr, ", thread %u", s.current->index.x);
  fprintf(stderr, ")\n");
  fflush(stderr);
  abort();
}

Index thread_index() { return s.current->index; }
Index block_index() { return s.block; }
Index block_size() { return s.block_size; }
Index grid_size() { return s.grid_size; }

void* shared(int id, size_t bytes) {
  if (int(s.shared.size()) <= id) s.shared.resize(id + 1);
  char*& memory = s.shared[id];
  if (memory == nullptr) {
    unobserved(true);
    const size_t room = (bytes + 127) / 128 * 128;
    memory = static_cast<char*>(aligned_alloc(128, room));
    memset(memory, 0xff, room);  // not a number, in every type
#ifdef HOST_ASAN
    __asan_poison_memory_region(memory + bytes, room - bytes);
#endif
    unobserved(false);
  }
  return memory;
}

void sync_block(int line) {
  if (s.alive != s.threads) fail("__syncthreads() after threads of the block ended", line);
  if (s.waiting && s.barrier_line != line) fail("threads wait at different __syncthreads()", line);
  s.barrier_line = line;
  char* order = &s.order[s.generation & 1];
  release(order);
  if (++s.waiting == s.threads) {
    s.waiting = 0;
    s.generation++;
    for (int i = 0; i < s.threads; i++) wake(s.fibers[i]);
    for (Warp& warp : s.warps) warp.priority = draw();
  }
  to_scheduler(false);
  acquire(order);
}

void meet(unsigned mask, void* payload, int line, void (*exchange)(void**), bool orders_memory) {
  Fiber& me = *s.current;
  Warp& warp = s.warps[me.warp];
  if (!(mask >> me.lane & 1)) fail("the calling lane is not in the mask", line);
  if (mask & ~warp.alive) fail("the mask names lanes that ended or do not exist", line);
  if (warp.arrived && (warp.line != line || warp.mask != mask)) fail("lanes meet in different collectives", line);
  s.warp_line = warp.line = line;
  warp.mask = mask;
  warp.arrived |= 1u << me.lane;
  me.payload = payload;
  char* order = &warp.order[warp.generation & 1];
  if (orders_memory) release(order);
  if (warp.arrived == mask) {
    void* payloads[32] = {};
    for (int lane = 0; lane < 32; lane++)
      if (mask >> lane & 1) payloads[lane] = s.fibers[me.warp * 32 + lane].payload;
    unobserved(true);
    exchange(payloads);
    unobserved(false);
    warp.arrived = 0;
    warp.generation++;
    for (int lane = 0; lane < 32; lane++)
      if (mask >> lane & 1) wake(s.fibers[me.warp * 32 + lane]);
  }
  to_scheduler(false);
  if (orders_memory) acquire(order);
}

void run(const char* kernel, void (*entry)(void*), void* arguments, Index grid, Index block) {
  s.kernel = kernel;
  s.grid_size = grid;
  s.block_size = block;
  s.threads = int(block.x * block.y * block.z);
  s.entry = entry;
  s.arguments = arguments;
  if (s.threads < 1 || s.threads > 1024 || grid.x < 1 || grid.y != 1 || grid.z != 1) fail("a bad launch", 0);
#ifdef HOST_TSAN
  s.main_tsan = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> order(grid.x);
  for (unsigned i = 0; i < grid.x; i++) order[i] = s.schedule == BACKWARD ? grid.x - 1 - i : i;
  if (s.schedule >= WARPS)
    for (unsigned i = grid.x; i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
  for (unsigned i : order) {
    s.block = {i, 0, 0};
    run_block();
    unobserved(true);
    for (char*& memory : s.shared) {
      free(memory);
      memory = nullptr;
    }
    unobserved(false);
  }
  acquire(&s.finished);
}

extern "C" void host_set_schedule(int schedule, uint64_t seed) {
  s.schedule = schedule;
  s.random = 88172645463325252ull ^ (seed + 1) * 0x9e3779b97f4a7c15ull;
  if (s.random == 0) s.random = 1;
}
}  // namespace host
