// The warp-level instructions of matrix_units.cuh for the stand-in (tests/cuda_host): mma.sync, ldmatrix, cp.async.
// Included by cuda_host.hpp.
//
// mma: fragments laid out as the PTX ISA says; products and sums exact (double), the result rounded towards zero, as
//   the matrix units do to the sum (the hardware also drops bits of small addends: not modelled).
// ldmatrix: each lane's row address is checked for alignment and read when the whole warp has come.
// cp.async: the destination is poisoned when the copy is issued and filled only when its thread waits for its group: a
//   missing wait shows as NaN, an early overwrite of a tile still being read too.
// The end of a launch: a thread that leaves with copies it never waited for is an error, in the last block too.
// -DHOST_TRACE: every access of block 0 to shared or global memory goes to a log (accesses.py reads it).
#pragma once
#include <deque>
#include <map>
#include <vector>

#ifdef HOST_TSAN
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace host {
struct Unobserved {  // the emulation's own books, which no thread of the kernel reads
#ifdef HOST_TSAN
  Unobserved() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unobserved() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  ~Unobserved() {}
#endif
};

// ---------------------------------------------------------------- the log of accesses
enum Access { SHARED_LOAD, SHARED_STORE, GLOBAL_LOAD, GLOBAL_STORE, LDMATRIX, ASYNC_SHARED, ASYNC_GLOBAL, MMA, ATOMIC };

struct Logged {  // as LOGGED in accesses.py
  uint64_t address;
  uint32_t kind, site, bytes, thread, phase, nth;  // nth access of this site since the thread's warp last met
};

#ifdef HOST_TRACE
struct Log {
  std::vector<Logged> all;
  std::map<std::pair<uint32_t, uint32_t>, uint32_t> counts[1024];  // of a thread: (kind, site) -> accesses this phase
  uint32_t phases[1024] = {};
};

inline Log& log_of_accesses() {
  static Log log;
  return log;
}

// An access of no bytes is a lane that takes no part.
inline void trace(Access kind, const void* at, size_t bytes, int site) {
  if (block_index().x != 0) return;
  const uint32_t thread = thread_index().x;
  Log& log = log_of_accesses();
  log.all.push_back({reinterpret_cast<uint64_t>(at), uint32_t(kind), uint32_t(site), uint32_t(bytes), thread,
                     log.phases[thread], log.counts[thread][{uint32_t(kind), uint32_t(site)}]++});
}

inline void new_phase() {
  Log& log = log_of_accesses();
  log.phases[thread_index().x]++;
  log.counts[thread_index().x].clear();
}

extern "C" __attribute__((used)) inline void host_write_trace(const char* path) {
  FILE* file = fopen(path, "wb");
  Log& log = log_of_accesses();
  fwrite(log.all.data(), sizeof(Logged), log.all.size(), file);
  fclose(file);
  log = Log{};
}
#else
inline void trace(Access, const void*, size_t, int) {}
inline void new_phase() {}
#endif

// ---------------------------------------------------------------- mma.sync
enum Numbers { HALF, BFLOAT, TF32 };

struct Fragments {
  float* d;
  const unsigned *a, *b;
};

inline double half_value(unsigned bits) {
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (unsigned i = 0; i < 65536; i++) all[i] = __half2float(__half(__half_raw{static_cast<unsigned short>(i)}));
    return all;
  }();
  return table[bits & 0xffff];
}

template <Numbers KIND>
double number(const unsigned* registers, int nth) {  // nth number of a lane's registers
  if (KIND == TF32) return bits_as<float>(registers[nth] & 0xffffe000u);  // the low 13 bits are ignored
  const unsigned bits = registers[nth / 2] >> nth % 2 * 16 & 0xffff;
  if (KIND == BFLOAT) return bits_as<float>(bits << 16);
  return half_value(bits);
}

inline float towards_zero(double exact) {
  const float nearest = float(exact);
  if (!(std::abs(double(nearest)) > std::abs(exact)) || !std::isfinite(exact)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

// D = A B + D, a warp's 16 x K by K x 8. In the PTX ISA's words: group = lane / 4, t = lane % 4.
template <Numbers KIND>
void multiply_fragments(void** all) {
  constexpr int K = KIND == TF32 ? 8 : 16, PAIR = KIND == TF32 ? 1 : 2;  // numbers in a register
  double a[16][K], b[K][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto& mine = *static_cast<Fragments*>(all[lane]);
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4 * PAIR; i++) {  // register i / PAIR: row + 8 if odd, column + K/2 from the third on
      const int reg = i / PAIR;
      a[group + reg % 2 * 8][t * PAIR + i % PAIR + reg / 2 * (K / 2)] = number<KIND>(mine.a, i);
    }
    for (int i = 0; i < 2 * PAIR; i++) b[t * PAIR + i % PAIR + i / PAIR * (K / 2)][group] = number<KIND>(mine.b, i);
  }
  for (int lane = 0; lane < 32; lane++) {
    const auto& mine = *static_cast<Fragments*>(all[lane]);
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = mine.d[i];
      for (int k = 0; k < K; k++) sum += a[row][k] * b[k][column];
      mine.d[i] = towards_zero(sum);
    }
  }
}

template <Numbers KIND>
void mma(float* d, const unsigned* a, const unsigned* b, int line) {
  new_phase();
  if (thread_index().x % 32 == 0) trace(MMA, nullptr, 0, line);
  Fragments mine{d, a, b};
  meet(0xffffffffu, &mine, line, multiply_fragments<KIND>, false);
}

// ---------------------------------------------------------------- ldmatrix
struct Rows {
  const char* row;
  unsigned* registers;
  bool transposed;
  int line;
};

// Four 8 x 8 matrices of 16-bit numbers: lanes 8i..8i+7 give the rows of matrix i. Lane l takes numbers 2(l%4) and the
// next of row l/4; transposed: of column l/4.
inline void load_matrices(void** all) {
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t tile[8][8];
    for (int row = 0; row < 8; row++) memcpy(tile[row], static_cast<Rows*>(all[matrix * 8 + row])->row, 16);
    for (int lane = 0; lane < 32; lane++) {
      auto& mine = *static_cast<Rows*>(all[lane]);
      const int r = lane / 4, c = lane % 4 * 2;
      mine.registers[matrix] = mine.transposed ? tile[c][r] | unsigned(tile[c + 1][r]) << 16
                                               : tile[r][c] | unsigned(tile[r][c + 1]) << 16;
    }
  }
}

inline void ldmatrix(unsigned* registers, const void* row, bool transposed, int line) {
  new_phase();
  check_aligned(row, 16, line);
  trace(LDMATRIX, row, 16, line);
  volatile char touched = static_cast<const char*>(row)[0] + static_cast<const char*>(row)[15];  // for the sanitizers
  (void)touched;
  Rows mine{static_cast<const char*>(row), registers, transposed, line};
  meet(0xffffffffu, &mine, line, load_matrices, false);
}

// ---------------------------------------------------------------- cp.async
struct Copy {
  void* to;
  const void* from;
};

struct Copies {
  unsigned block = ~0u;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

inline std::vector<Copies>& all_copies() {
  static std::vector<Copies> all(1024);
  return all;
}

inline Copies& copies(int line) {
  Copies& mine = all_copies()[thread_index().x];
  if (mine.block != block_index().x && !(mine.open.empty() && mine.groups.empty()))
    fail("a thread of an earlier block ended with copies it never waited for", line);
  mine.block = block_index().x;
  return mine;
}

inline void check_that_all_copies_are_done() {  // after a launch
  for (Copies& mine : all_copies())
    if (!(mine.open.empty() && mine.groups.empty()))
      fail("a thread ended with copies it never waited for (of the launch's last blocks)", 0);
}

inline void cp_async(void* to, const void* from, bool valid, int line) {
  check_aligned(to, 16, line);
  if (valid) check_aligned(from, 16, line);
  trace(ASYNC_SHARED, to, 16, line);
  if (valid) trace(ASYNC_GLOBAL, from, 16, line);
  memset(to, 0xff, 16);
  Unobserved from_here;
  copies(line).open.push_back({to, valid ? from : nullptr});
}

inline void cp_async_commit(int line) {
  Unobserved from_here;
  Copies& mine = copies(line);
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

inline void cp_async_wait(size_t left, int line) {
  std::vector<Copy>* done = nullptr;
  size_t count = 0;
  {
    Unobserved from_here;
    static std::vector<Copy> all;  // fibers do not switch in here
    all.clear();
    Copies& mine = copies(line);
    for (; mine.groups.size() > left; mine.groups.pop_front())
      all.insert(all.end(), mine.groups.front().begin(), mine.groups.front().end());
    done = &all;
    count = all.size();
  }
  for (size_t i = 0; i < count; i++) {
    Copy copy;
    {
      Unobserved from_here;
      copy = (*done)[i];
    }
    if (copy.from != nullptr)
      memcpy(copy.to, copy.from, 16);
    else
      memset(copy.to, 0, 16);
  }
}
}  // namespace host
