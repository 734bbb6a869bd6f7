// Runs a kernel on the CPU, strictly: one block after another, a block's threads as fibres that switch at barriers and
// warp collectives only.
//
// - Shared memory is a fresh heap block of exactly the launch's size, full of NaN: the address sanitizer sees every byte
//   read or written beyond it. With EMULATOR_SANITIZED it is told of the fibres' stacks.
// - All threads must arrive at the same __syncthreads, and none may have returned; all lanes of a mask must arrive at
//   the same collective. Anything else fails with a message.
// - With EMULATOR_RACES every memory access of the kernel is checked: two threads that touch one byte, one of them
//   writing, must be ordered by a barrier or a warp collective; two blocks must not do so at all. The kernel's file is
//   compiled with -fsanitize=thread for that, and the functions that this makes it call are those at the end, in place
//   of the sanitizer's. The check does not depend on the order in which threads happened to run.

#include "emulator.hpp"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <unordered_map>
#include <vector>

#ifdef EMULATOR_SANITIZED
#include <sanitizer/common_interface_defs.h>
#endif

Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr std::size_t STACK = 256 * 1024;

enum State { RUNNING, AT_BARRIER, AT_WARP, DONE };

struct Fibre {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* fake_stack = nullptr;
  State state = RUNNING;
  int line = 0, predicate = 0;
  unsigned mask = 0;
  char shown[64];
  unsigned clock = 1, seen[32];  // warp collectives passed; of the other lanes, as far as this one is ordered after them
};

std::vector<Fibre> fibres;
std::vector<char> lanes;  // of the warps: 64 bytes a lane
unsigned thread_count, current, epoch;
ucontext_t scheduler;
jmp_buf scheduler_jump;
const void* scheduler_stack;
std::size_t scheduler_stack_size;
char* shared;
Launch* active;
void (*entry)(void**);
void** entry_arguments;
int or_of_predicates;
bool failed, inside;

void yield() {
  Fibre& fibre = fibres[current];
#ifdef EMULATOR_SANITIZED
  __sanitizer_start_switch_fiber(fibre.state == DONE ? nullptr : &fibre.fake_stack, scheduler_stack,
                                 scheduler_stack_size);
  swapcontext(&fibre.context, &scheduler);
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &scheduler_stack, &scheduler_stack_size);
#else
  if (_setjmp(fibre.jump) == 0) _longjmp(scheduler_jump, 1);
#endif
}

void begin_fibre() {
#ifdef EMULATOR_SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  entry(entry_arguments);
  inside = false;
  fibres[current].state = DONE;
  yield();
}

void resume(unsigned thread) {
  Fibre& fibre = fibres[thread];
  current = thread;
  threadIdx = {thread, 0, 0};
  inside = true;
#ifdef EMULATOR_SANITIZED
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fibre.stack.get(), STACK);
  swapcontext(&scheduler, &fibre.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  if (_setjmp(scheduler_jump) == 0) {
    if (fibre.started) _longjmp(fibre.jump, 1);
    fibre.started = true;
    setcontext(&fibre.context);
  }
#endif
  inside = false;
}

void prepare(Fibre& fibre) {
  fibre.state = RUNNING;
  fibre.started = false;
  fibre.clock = 1, fibre.line = 0;
  std::fill(std::begin(fibre.seen), std::end(fibre.seen), 0);
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.get();
  fibre.context.uc_stack.ss_size = STACK;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, begin_fibre, 0);
}

void report(const char* format, int a = 0, int b = 0, int c = 0, int d = 0) {
  if (failed) return;  // the first is the cause
  failed = true;
  std::snprintf(active->message, sizeof active->message, format, a, b, c, d);
}

// All lanes of the thread's mask wait at the same line: let them go on.
void release_warp(unsigned thread) {
  const unsigned first = thread / 32 * 32, mask = fibres[thread].mask;
  const int line = fibres[thread].line;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const unsigned other = first + lane;
    if (other >= thread_count) return report("line %d: the mask names lanes that do not exist", line);
    Fibre& fibre = fibres[other];
    if (fibre.state != AT_WARP) return;  // not there yet
    if (fibre.mask != mask || fibre.line != line) {
      return report("lanes of one warp wait at two different places, lines %d and %d", line, fibre.line);
    }
  }
  unsigned seen[32] = {};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fibre& fibre = fibres[first + lane];
    fibre.state = RUNNING;
    std::memcpy(&lanes[64 * (first + lane)], fibre.shown, 64);
    for (unsigned l = 0; l < 32; ++l) seen[l] = std::max(seen[l], fibre.seen[l]);
    seen[lane] = std::max(seen[lane], fibre.clock++);
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) std::memcpy(fibres[first + lane].seen, seen, sizeof seen);
  }
}

void release_block() {
  int line = 0, predicates = 0;
  for (Fibre& fibre : fibres) {
    if (fibre.state == DONE) return report("deadlock: a thread returned, others wait at line %d", line ? line : -1);
    if (fibre.state == AT_WARP) return report("deadlock: lanes wait for others of their warp at line %d", fibre.line);
    if (line && fibre.line != line) {
      return report("threads of one block wait at two different places, lines %d and %d", line, fibre.line);
    }
    line = fibre.line;
    predicates |= fibre.predicate;
  }
  or_of_predicates = predicates;
  for (Fibre& fibre : fibres) fibre.state = RUNNING;
  ++epoch;
}

void run_block(std::mt19937& random) {
  for (Fibre& fibre : fibres) prepare(fibre);
  ++epoch;
  std::vector<unsigned> order(thread_count);
  std::iota(order.begin(), order.end(), 0u);
  if (active->order == 1) std::reverse(order.begin(), order.end());
  while (!failed) {
    if (active->order > 1) std::shuffle(order.begin(), order.end(), random);
    bool moved = false, waiting = false;
    for (unsigned thread : order) {
      if (fibres[thread].state == RUNNING) {
        resume(thread);
        moved = true;
        if (fibres[thread].state == AT_WARP) release_warp(thread);
        if (failed) return;
      }
      waiting |= fibres[thread].state != DONE;
    }
    if (!waiting) return;
    if (!moved) release_block();
  }
}

#ifdef EMULATOR_RACES
struct Access {
  unsigned thread, epoch, clock;
};
struct Cell {
  unsigned block = 0;
  Access write{0, 0, 0};
  std::vector<Access> reads;
};
std::vector<Cell> shared_cells;
std::unordered_map<std::uintptr_t, Cell> other_cells;
unsigned block_number;

bool ordered(const Access& before) {
  const Fibre& now = fibres[current];
  if (before.epoch != epoch || before.thread == current) return true;
  return before.thread / 32 == current / 32 && now.seen[before.thread % 32] >= before.clock;
}

bool on_stack(std::uintptr_t address) { return address - (std::uintptr_t)fibres[current].stack.get() < STACK; }

void check(const void* place, std::size_t size, bool writes) {
  if (!inside || failed) return;
  // Pairs of bytes: no kernel writes less, and half the work.
  const std::uintptr_t start = (std::uintptr_t)place / 2;
  for (std::uintptr_t address = 2 * start; address < (std::uintptr_t)place + size; address += 2) {
    const std::uintptr_t offset = address - (std::uintptr_t)shared;
    const bool in_shared = offset < active->shared_bytes;
    Cell& cell = in_shared ? shared_cells[offset / 2] : other_cells[address];
    if (cell.block != block_number) {
      const bool others_wrote = cell.write.epoch, others_read = !cell.reads.empty();
      if (cell.block && (others_wrote || (writes && others_read)) && !in_shared && !on_stack(address)) {
        return report("race: blocks %d and %d touch the same global memory", cell.block - 1, block_number - 1);
      }
      cell.block = block_number;
      cell.write = {0, 0, 0};
      cell.reads.clear();
    }
    if (cell.write.epoch && !ordered(cell.write)) {
      return report("race: threads %d and %d touch what one of them wrote, shared offset %d, after the barrier of line %d",
                    cell.write.thread, current, in_shared ? int(offset) : -1, fibres[current].line);
    }
    if (writes) {
      for (const Access& read : cell.reads) {
        if (!ordered(read)) {
          return report("race: thread %d read what thread %d overwrites, shared offset %d, after the barrier of line %d",
                        read.thread, current, in_shared ? int(offset) : -1, fibres[current].line);
        }
      }
      cell.reads.clear();
      cell.write = {current, epoch, fibres[current].clock};
    } else {
      if (!cell.reads.empty() && cell.reads.back().epoch != epoch) cell.reads.clear();
      if (cell.reads.empty() || cell.reads.back().thread != current) {
        cell.reads.push_back({current, epoch, fibres[current].clock});
      }
    }
  }
}
#endif

}  // namespace

int run(Launch& launch, void (*kernel)(void**), void** arguments) {
  active = &launch, entry = kernel, entry_arguments = arguments;
  failed = inside = false;
  launch.message[0] = 0;
  thread_count = launch.threads;
  if (fibres.size() != thread_count) fibres = std::vector<Fibre>(thread_count);
  lanes.assign(64 * ((thread_count + 31) / 32 * 32), 0);
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.threads, 1, 1};
  std::mt19937 random(launch.order);
#ifdef EMULATOR_RACES
  other_cells.clear();
  shared_cells.assign((launch.shared_bytes + 1) / 2, Cell{});
  block_number = 0;
#endif
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x && !failed; ++x) {
        blockIdx = {x, y, z};
#ifdef EMULATOR_RACES
        ++block_number;
#endif
        shared = static_cast<char*>(std::malloc(std::max(launch.shared_bytes, 1u)));
        std::memset(shared, 0xff, launch.shared_bytes);
        run_block(random);
        std::free(shared);
      }
    }
  }
  return failed;
}

void* shared_memory() { return shared; }

void fail(const char* message) {
  inside = false;
  if (!failed) std::snprintf(active->message, sizeof active->message, "%s", message);
  failed = true;
  yield();  // never resumed
}

int barrier_or(int line, int predicate) {
  if (line == active->skipped_line) return predicate;
  inside = false;
  Fibre& fibre = fibres[current];
  fibre.state = AT_BARRIER, fibre.line = line, fibre.predicate = predicate != 0;
  yield();
  inside = true;
  return or_of_predicates;
}

void barrier(int line) { barrier_or(line, 0); }

const char* show(int line, unsigned mask, const void* value, unsigned size) {
  inside = false;
  Fibre& fibre = fibres[current];
  if (!(mask >> current % 32 & 1)) fail("a lane calls a warp collective whose mask leaves it out");
  fibre.state = AT_WARP, fibre.line = line, fibre.mask = mask;
  if (value) std::memcpy(fibre.shown, value, size);
  yield();
  inside = true;
  return &lanes[64 * (current / 32 * 32)];
}

void warp_barrier(int line, unsigned mask) {
  if (line != active->skipped_line) show(line, mask, nullptr, 0);
}

}  // namespace emulator

#ifdef EMULATOR_RACES
#define CHECKED(size)                                                                             \
  void __tsan_read##size(void* place) { emulator::check(place, size, false); }                    \
  void __tsan_write##size(void* place) { emulator::check(place, size, true); }                    \
  void __tsan_unaligned_read##size(void* place) { emulator::check(place, size, false); }          \
  void __tsan_unaligned_write##size(void* place) { emulator::check(place, size, true); }
extern "C" {
CHECKED(1) CHECKED(2) CHECKED(4) CHECKED(8) CHECKED(16)
void __tsan_read_range(void* place, std::size_t size) { emulator::check(place, size, false); }
void __tsan_write_range(void* place, std::size_t size) { emulator::check(place, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#endif
