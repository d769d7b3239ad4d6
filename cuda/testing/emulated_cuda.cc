#include "cuda/testing/emulated_cuda.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "cuda/testing/fibre.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace codistill::emulated {
namespace {

constexpr size_t kDefaultSharedBytes = 48 << 10;
constexpr unsigned kPortableCluster = 8;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Block;
struct Thread {
  Fibre fibre;
  Block* block = nullptr;
  uint3 index = {};
  int lane = 0, warp = 0;
  bool ready = true, done = false;
  // Where it waits, if it is neither.
  const char* waits_for = "";
  Place place = {};
  uint64_t result = 0;
  uint64_t cluster_phase = 0;
  std::vector<std::vector<Copy>> copies;  // by group, the oldest first; the last is open
};

// A call of a warp function that some lanes have reached.
struct WarpCall {
  unsigned mask, arrived;
  Place place;
  uint64_t values[32];
  int from[32];
  Thread* threads[32];
};

struct Memory {
  explicit Memory(size_t bytes, int fill) : bytes(bytes) {
    if (posix_memalign(&data, 1024, bytes) != 0) abort();
    memset(data, fill, bytes);
  }
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  void* data = nullptr;
  size_t bytes;
};

struct Block {
  uint3 index = {};
  unsigned rank = 0;
  std::vector<Thread> threads;
  std::vector<std::vector<WarpCall>> calls;  // by warp
  size_t finished = 0;
  size_t arrived = 0;  // at the barrier
  int with_value = 0, last_with_value = 0;
  Place barrier = {};
  std::unique_ptr<Memory> dynamic;
  std::map<const void*, std::unique_ptr<Memory>> statics;

  void* Static(const void* key, size_t bytes) {
    std::unique_ptr<Memory>& memory = statics[key];
    if (memory == nullptr) memory = std::make_unique<Memory>(bytes, 0xff);
    return memory->data;
  }
};

// A launch's blocks that are on their way: one, or those of a cluster.
struct Group {
  std::vector<std::unique_ptr<Block>> blocks;
  size_t arrived = 0;
  uint64_t phase = 0;
};

struct State {
  std::string problem;
  Order order = Order::kForward;
  uint64_t random = 1;
  Device device;
  std::vector<LaunchShape> launches;
  std::map<const void*, std::map<cudaFuncAttribute, int>> attributes;
  cudaError_t last_error = cudaSuccess;
  // Of the running launch.
  const std::function<void()>* body = nullptr;
  Group* group = nullptr;
  Thread* current = nullptr;
  bool failed = false;
};
State& TheState() {
  static State* const state = new State;
  return *state;
}

std::string Describe(const Thread& thread) {
  char text[160];
  snprintf(text, sizeof(text), "block (%u,%u,%u) thread (%u,%u,%u)", thread.block->index.x,
           thread.block->index.y, thread.block->index.z, thread.index.x, thread.index.y,
           thread.index.z);
  return text;
}

bool operator!=(Place a, Place b) {
  return a.line != b.line || (a.file != b.file && strcmp(a.file, b.file) != 0);
}

std::string Describe(Place place) {
  if (place.file == nullptr) return "?";
  return std::string(place.file) + ":" + std::to_string(place.line);
}

void Report(const std::string& problem) {
  State& state = TheState();
  if (state.problem.empty()) state.problem = problem;
  state.failed = true;
}

// Ends the launch from within a thread; does not return, so that nothing that owns memory may be on
// its stack. As printf.
__attribute__((format(printf, 1, 2))) void Fail(const char* format, ...) {
  Thread* const thread = TheState().current;
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  Report(Describe(*thread) + ": " + text);
  thread->ready = false;
  thread->waits_for = "the end";
  for (;;) thread->fibre.Leave();
}

// Another thread's turn, until this one is ready again.
void Wait(const char* what, Place place) {
  Thread* const thread = TheState().current;
  thread->ready = false;
  thread->waits_for = what;
  thread->place = place;
  thread->fibre.Leave();
}

void RunThread() {
  State& state = TheState();
  Thread* const thread = state.current;
  (*state.body)();
  if (!thread->copies.empty()) Fail("leaves the kernel with copies it has not waited for");
  thread->done = true;
  ++thread->block->finished;
}

uint64_t NextRandom() {
  uint64_t& x = TheState().random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

// The numbers below n in the order of the moment.
void Arrange(size_t n, std::vector<size_t>* order) {
  order->resize(n);
  const Order wanted = TheState().order;
  for (size_t i = 0; i < n; ++i) (*order)[i] = wanted == Order::kBackward ? n - 1 - i : i;
  if (wanted != Order::kShuffled) return;
  for (size_t i = n; i > 1; --i) std::swap((*order)[i - 1], (*order)[NextRandom() % i]);
}

std::string DescribeWaiting(const Group& group) {
  // How many wait where, and the first of each.
  std::map<std::string, std::pair<int, std::string>> places;
  size_t finished = 0;
  for (const auto& block : group.blocks) {
    for (const Thread& thread : block->threads) {
      if (thread.done) {
        ++finished;
        continue;
      }
      auto& entry = places[std::string(thread.waits_for) + " at " + Describe(thread.place)];
      if (entry.first++ == 0) entry.second = Describe(thread);
    }
  }
  std::string text = "threads wait for each other for ever: ";
  for (const auto& [place, entry] : places) {
    text += std::to_string(entry.first) + " for " + place + " (first " + entry.second + "); ";
  }
  return text + std::to_string(finished) + " have left the kernel";
}

// Stacks are kept for the next launch.
std::vector<Stack>& Stacks() {
  static auto* const stacks = new std::vector<Stack>;
  return *stacks;
}

void RunGroup(Group* group) {
  State& state = TheState();
  state.group = group;
  std::vector<Thread*> threads;
  for (const auto& block : group->blocks) {
    for (Thread& thread : block->threads) threads.push_back(&thread);
  }
  while (Stacks().size() < threads.size()) Stacks().emplace_back();
  for (size_t i = 0; i < threads.size(); ++i) threads[i]->fibre.Start(&Stacks()[i], &RunThread);

  std::vector<size_t> order;
  size_t left = threads.size();
  while (left > 0) {
    Arrange(threads.size(), &order);
    bool ran = false;
    for (size_t i : order) {
      Thread* const thread = threads[i];
      if (thread->done || !thread->ready) continue;
      ran = true;
      state.current = thread;
      threadIdx = thread->index;
      blockIdx = thread->block->index;
      thread->fibre.Enter();
      if (state.failed) return;
      if (thread->done) --left;
    }
    if (!ran) {
      Report(DescribeWaiting(*group));
      return;
    }
  }
}

std::unique_ptr<Block> MakeBlock(uint3 index, unsigned rank, dim3 shape, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->rank = rank;
  block->threads = std::vector<Thread>(size_t{shape.x} * shape.y * shape.z);
  block->calls.resize((block->threads.size() + 31) / 32);
  if (shared_bytes > 0) block->dynamic = std::make_unique<Memory>(shared_bytes, 0xff);
  for (size_t i = 0; i < block->threads.size(); ++i) {
    Thread& thread = block->threads[i];
    const unsigned n = static_cast<unsigned>(i);
    thread.block = block.get();
    thread.index = {n % shape.x, n / shape.x % shape.y, n / shape.x / shape.y};
    thread.lane = static_cast<int>(i % 32);
    thread.warp = static_cast<int>(i / 32);
  }
  return block;
}

// Of a warp function's call, once this lane has arrived; null if others are missing still.
WarpCall* Arrive(unsigned mask, uint64_t value, int from, Place place) {
  Thread* const thread = TheState().current;
  Block* const block = thread->block;
  std::vector<WarpCall>& calls = block->calls[thread->warp];
  const unsigned bit = 1u << thread->lane;
  if ((mask & bit) == 0)
    Fail("calls a warp function without itself in the mask, %s:%d", place.file, place.line);
  // Lanes beyond the block do not exist.
  const size_t lanes = std::min<size_t>(32, block->threads.size() - 32 * size_t(thread->warp));
  if (lanes < 32) mask &= (1u << lanes) - 1;
  WarpCall* call = nullptr;
  for (WarpCall& other : calls) {
    if (other.mask == mask) call = &other;
  }
  if (call == nullptr) {
    calls.push_back(WarpCall());
    call = &calls.back();
    call->mask = mask;
    call->arrived = 0;
    call->place = place;
  }
  if (call->place != place) {
    Fail("calls a warp function at %s:%d, other lanes at %s:%d", place.file, place.line,
         call->place.file, call->place.line);
  }
  call->arrived |= bit;
  call->values[thread->lane] = value;
  call->from[thread->lane] = from;
  call->threads[thread->lane] = thread;
  return call->arrived == mask ? call : nullptr;
}

// Hands the lanes their results and lets them go on.
template <typename ResultOf>
void Complete(WarpCall* call, ResultOf result_of) {
  Thread* const current = TheState().current;
  for (int i = 0; i < 32; ++i) {
    if ((call->mask >> i & 1) == 0) continue;
    call->threads[i]->result = result_of(i);
    call->threads[i]->ready = true;
  }
  std::vector<WarpCall>& calls = current->block->calls[current->warp];
  calls.erase(calls.begin() + (call - calls.data()));
}

}  // namespace

const std::string& Problem() { return TheState().problem; }
void ClearProblem() { TheState().problem.clear(); }
void SetOrder(Order order, uint64_t seed) {
  TheState().order = order;
  TheState().random = seed * 0x9e3779b97f4a7c15u | 1;
}
void SetDevice(const Device& device) { TheState().device = device; }
const std::vector<LaunchShape>& Launches() { return TheState().launches; }
void ClearLaunches() { TheState().launches.clear(); }

bool Run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
         const std::function<void()>& body) {
  State& state = TheState();
  state.failed = false;
  state.body = &body;
  state.launches.push_back({grid, block, cluster, shared_bytes});
  gridDim = grid;
  blockDim = block;
  std::vector<size_t> order;
  Arrange(size_t{grid.x} * grid.y * grid.z / cluster, &order);
  for (size_t number : order) {
    Group group;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      const size_t n = number * cluster + rank;
      const uint3 index = {static_cast<unsigned>(n % grid.x),
                           static_cast<unsigned>(n / grid.x % grid.y),
                           static_cast<unsigned>(n / grid.x / grid.y)};
      group.blocks.push_back(MakeBlock(index, rank, block, shared_bytes));
    }
    RunGroup(&group);
    if (state.failed) break;
  }
  state.group = nullptr;
  state.current = nullptr;
  return !state.failed;
}

int Lane() { return TheState().current->lane; }

int Barrier(bool value, Place place) {
  Thread* const thread = TheState().current;
  Block* const block = thread->block;
  if (block->arrived == 0) {
    block->barrier = place;
    block->with_value = 0;
  } else if (block->barrier != place) {
    Fail("is at the barrier %s:%d, others at %s:%d", place.file, place.line, block->barrier.file,
         block->barrier.line);
  }
  block->with_value += value ? 1 : 0;
  if (++block->arrived < block->threads.size()) {
    Wait("the barrier", place);
    return block->last_with_value;
  }
  block->arrived = 0;
  block->last_with_value = block->with_value;
  // All others wait here: who waited elsewhere would not have arrived.
  for (Thread& other : block->threads) other.ready = true;
  return block->last_with_value;
}

uint64_t Shuffle(unsigned mask, uint64_t value, int from, Place place) {
  Thread* const thread = TheState().current;
  WarpCall* const call = Arrive(mask, value, from, place);
  if (call == nullptr) {
    Wait("lanes of its warp", place);
    return thread->result;
  }
  for (int i = 0; i < 32; ++i) {
    if ((call->mask >> i & 1) != 0 && (call->mask >> call->from[i] & 1) == 0) {
      Fail("is in a shuffle at %s:%d in which lane %d reads lane %d, which is not in the mask",
           place.file, place.line, i, call->from[i]);
    }
  }
  Complete(call, [call](int i) { return call->values[call->from[i]]; });
  return thread->result;
}

uint64_t Combine(unsigned mask, uint64_t value, uint64_t (*combine)(const uint64_t*, unsigned),
                 Place place) {
  Thread* const thread = TheState().current;
  WarpCall* const call = Arrive(mask, value, 0, place);
  if (call == nullptr) {
    Wait("lanes of its warp", place);
    return thread->result;
  }
  const uint64_t result = combine(call->values, call->mask);
  Complete(call, [result](int) { return result; });
  return result;
}

void* StaticShared(const void* key, size_t bytes) {
  return TheState().current->block->Static(key, bytes);
}

unsigned char* DynamicShared() {
  Block* const block = TheState().current->block;
  if (block->dynamic == nullptr) Fail("uses dynamic shared memory; the launch gave none");
  return static_cast<unsigned char*>(block->dynamic->data);
}

unsigned ClusterRank() { return TheState().current->block->rank; }
unsigned ClusterSize() { return static_cast<unsigned>(TheState().group->blocks.size()); }

void ClusterArrive() {
  State& state = TheState();
  Group* const group = state.group;
  state.current->cluster_phase = group->phase + 1;
  size_t all = 0;
  for (const auto& block : group->blocks) all += block->threads.size();
  if (++group->arrived < all) return;
  group->arrived = 0;
  ++group->phase;
  for (const auto& block : group->blocks) {
    for (Thread& thread : block->threads) {
      if (strcmp(thread.waits_for, "the cluster") == 0) thread.ready = true;
    }
  }
}

void ClusterWait(Place place) {
  Thread* const thread = TheState().current;
  if (thread->cluster_phase == 0) Fail("waits for its cluster without having arrived");
  if (TheState().group->phase < thread->cluster_phase) Wait("the cluster", place);
  thread->waits_for = "";
}

void* MapShared(void* local, unsigned rank) {
  State& state = TheState();
  Block* const own = state.current->block;
  if (rank >= state.group->blocks.size()) Fail("maps shared memory of a block not in the cluster");
  Block* const other = state.group->blocks[rank].get();
  if (other->finished > 0) Fail("maps shared memory of a block whose threads are leaving");
  auto* const at = static_cast<unsigned char*>(local);
  auto offset_in = [at](const Memory& memory) {
    const auto* const begin = static_cast<unsigned char*>(memory.data);
    return at >= begin && at < begin + memory.bytes ? at - begin : -1;
  };
  if (own->dynamic != nullptr && offset_in(*own->dynamic) >= 0) {
    return static_cast<unsigned char*>(other->dynamic->data) + offset_in(*own->dynamic);
  }
  for (const auto& [key, memory] : own->statics) {
    if (offset_in(*memory) < 0) continue;
    return static_cast<unsigned char*>(other->Static(key, memory->bytes)) + offset_in(*memory);
  }
  Fail("maps what is not in shared memory");
  return nullptr;
}

void AsyncCopy(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    Fail("copies asynchronously from or to a misaligned address");
  }
  auto& copies = TheState().current->copies;
  if (copies.empty()) copies.emplace_back();
  copies.back().push_back({to, from, bytes});
}

void AsyncCommit() {
  auto& copies = TheState().current->copies;
  copies.emplace_back();
}

void AsyncWait(int groups_left) {
  auto& copies = TheState().current->copies;
  if (copies.empty()) return;
  if (!copies.back().empty()) Fail("waits for copies that it has not committed");
  while (static_cast<int>(copies.size()) - 1 > groups_left) {
    for (const Copy& copy : copies.front()) memcpy(copy.to, copy.from, copy.bytes);
    copies.erase(copies.begin());
  }
  if (copies.size() == 1) copies.clear();
}

cudaError_t SetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  State& state = TheState();
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize &&
      value > state.device.shared_per_block) {
    return state.last_error = cudaErrorInvalidValue;
  }
  state.attributes[kernel][attribute] = value;
  return cudaSuccess;
}

cudaError_t ActiveBlocks(int* blocks, int threads, size_t shared_bytes) {
  // As for kernels of 64 registers; a block's shared memory takes 1 KiB more.
  const Device& device = TheState().device;
  const auto by_shared =
      device.shared_per_multiprocessor / static_cast<int64_t>(shared_bytes + 1024);
  *blocks = static_cast<int>(std::min<int64_t>({by_shared, 1024 / std::max(threads, 1), 32}));
  return cudaSuccess;
}

cudaError_t Launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& body) {
  State& state = TheState();
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = config.attrs[i].val.clusterDim.x;
    }
  }
  std::map<cudaFuncAttribute, int>& attributes = state.attributes[kernel];
  const size_t threads = size_t{config.blockDim.x} * config.blockDim.y * config.blockDim.z;
  const bool blocks = config.gridDim.x > 0 && config.gridDim.y > 0 && config.gridDim.z > 0 &&
                      config.gridDim.y <= 65535 && config.gridDim.z <= 65535;
  const size_t shared = std::max<size_t>(
      kDefaultSharedBytes,
      static_cast<size_t>(attributes[cudaFuncAttributeMaxDynamicSharedMemorySize]));
  if (!blocks || threads < 1 || threads > 1024 || config.dynamicSmemBytes > shared || cluster < 1 ||
      config.gridDim.x % cluster != 0) {
    return state.last_error = cudaErrorInvalidConfiguration;
  }
  if (cluster > 1 && state.device.major < 9) return state.last_error = cudaErrorInvalidValue;
  if (cluster > kPortableCluster &&
      attributes[cudaFuncAttributeNonPortableClusterSizeAllowed] == 0) {
    return state.last_error = cudaErrorInvalidValue;
  }
  if (Run(config.gridDim, config.blockDim, cluster, config.dynamicSmemBytes, body)) {
    return cudaSuccess;
  }
  fprintf(stderr, "emulated CUDA: %s\n", state.problem.c_str());
  return state.last_error = cudaErrorLaunchFailure;
}

}  // namespace codistill::emulated

using codistill::emulated::TheState;

float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                          : exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return (x.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

__half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < std::ldexp(1.0f, -14)) {
    return {
        static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(magnitude, 24))))};
  }
  const uint32_t bits = __float_as_uint(magnitude);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? codistill::emulated::Problem().c_str()
                                         : "error of the emulated device";
}
cudaError_t cudaGetLastError() { return std::exchange(TheState().last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return TheState().last_error; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : TheState().last_error = cudaErrorInvalidValue;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return TheState().last_error = cudaErrorInvalidValue;
  const codistill::emulated::Device& properties = TheState().device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = properties.shared_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = properties.shared_per_multiprocessor;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrL2CacheSize:
      *value = properties.l2_bytes;
      break;
  }
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  // 256 bytes are what cudaMalloc aligns to; the exact size is what AddressSanitizer guards.
  if (posix_memalign(pointer, 256, std::max<size_t>(bytes, 1)) != 0) {
    return TheState().last_error = cudaErrorMemoryAllocation;
  }
  memset(*pointer, 0xff, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (bytes > 0) memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(to, value, bytes);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
