#pragma once
// A graphics card that computes nothing, for machines that have none.
//
// Loaded in front of an unmodified torch for CUDA 13 (run.py does it), this library answers in the place of CUDA's
// runtime, its driver and cuBLAS. All of torch above them is the real one: its operators, its choice of kernels, its
// caching allocator, its CUDA graphs, its compiler and Triton.
//
//   memory     An allocation is a range of addresses that nothing may touch, so a card of any size fits anywhere. What
//              is read back from the card is zeros. NO_CARD_ZEROS=0: the host's memory, copies are made.
//   launches   A kernel or product is not run. Its sizes are checked, and its name is written to the log.
//   captures   CUDA graphs follow the rules in CUDA's documentation: what may not be called meanwhile, by which thread,
//              how other streams join, and that they have to be joined again. Every breach is told on stderr.
//   log        One line each, "kind stream text", kinds: kernel, copy, wait, graph, capture, broken, stray, malloc,
//              free, nccl, missing. summary.py counts them.
//
// It cannot show numbers (everything is zero), the time that anything takes on a card, races between streams, what a
// kernel itself would refuse, memory that CUDA needs outside torch's allocator, or cuDNN: torch is told that its version
// is too old, so attention takes the next kernel. Several cards need a process each; see nccl.cpp.
//
// NO_CARD_CAPABILITY=9.0  NO_CARD_GIB=139  NO_CARD_CARDS=1  NO_CARD_LOG=file (appended to)  NO_CARD_ZEROS=1
//
// Parts: captures.cpp (with streams and events), memory.cpp, device.cpp (with kernels), libraries.cpp (cuBLAS, driver),
// nccl.cpp.
// What torch needs and is not here comes from NVIDIA's own libraries, which say that there is no driver. To see what
// torch needs: nm -D --undefined-only libtorch_cuda.so libc10_cuda.so
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#define API extern "C" __attribute__((visibility("default")))
// Functions that only say that all went well, whatever their arguments are; and those that always give one answer in
// their first argument. The names in `asm` are those of the library, whose headers declare them in other ways.
#define STUB(name)                  \
  API int stub_##name() asm(#name); \
  API int stub_##name() { return 0; }
#define ANSWER(name, type, value)                  \
  API int answer_##name(type* answer) asm(#name); \
  API int answer_##name(type* answer) { return *answer = (type)(value), 0; }

// What lives until the end is never destroyed: torch's threads still call while the process ends.
inline auto& lock = *new std::recursive_mutex;
using Guard = std::lock_guard<std::recursive_mutex>;
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t fail(cudaError_t error) { return last_error = error; }

inline const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value && *value ? value : otherwise;
}

inline const int cards = atoi(setting("NO_CARD_CARDS", "1"));
inline const bool zeros = *setting("NO_CARD_ZEROS", "1") != '0';
inline const size_t total = size_t(atof(setting("NO_CARD_GIB", "139")) * (1 << 30));

struct Function {
  std::string name;
  int dynamic_shared = 48 << 10;  // bytes that a launch may ask for
};

// Writes a line of the log.
void note(const char* kind, const void* stream, const char* text, ...) __attribute__((format(printf, 3, 4)));

// Puts work into a stream: an error where that is forbidden; a node of the graph where the stream is captured.
cudaError_t enqueue(cudaStream_t stream, const char* what, bool node = true);
bool captured(cudaStream_t stream);
// Whether this thread may call what waits or has side effects, although a stream may be captured.
cudaError_t unsafe(const char* what);
// Waits for a stream, or asks how far it is.
cudaError_t look_at(cudaStream_t stream, const char* what);

enum class Place { host, pinned, card };
Place place_of(const void* address);

cudaError_t launch(Function& function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream);
cudaError_t allow_shared(Function& function, int bytes);
