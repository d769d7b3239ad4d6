// What a process did when, for people and tests to look at: spans of time in the Chrome trace
// format, which chrome://tracing and ui.perfetto.dev draw.

#ifndef CODISTILL_COMMON_BASE_TRACE_H_
#define CODISTILL_COMMON_BASE_TRACE_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/base/mutex.h"

namespace codistill {

// One span: what happened on a thread, or on a named track, from `begin_ns` on. Category, name,
// track and keys are string literals: the recorder keeps the pointers.
struct TraceEvent {
  static constexpr int kMaxArgs = 4;
  static constexpr size_t kMaxText = 48;

  const char* category = "";
  const char* name = "";
  // Null: the thread that records. Otherwise spans of this track, which may overlap: the file
  // spreads them over as many rows as it takes.
  const char* track = nullptr;
  int64_t begin_ns = 0;  // TraceNow
  int64_t duration_ns = 0;
  int32_t tid = 0;
  int32_t args = 0;
  std::array<const char*, kMaxArgs> keys = {};
  std::array<int64_t, kMaxArgs> values = {};
  const char* text_key = nullptr;
  std::array<char, kMaxText> text = {};  // ends with a zero; what is longer is cut

  void AddArg(const char* key, int64_t value);  // beyond kMaxArgs: left out
  void SetText(const char* key, absl::string_view value);
};

// Nanoseconds of a clock that never goes back and is one for all processes of a machine.
int64_t TraceNow();

// Keeps the newest spans of a process, bounded, and writes them. Recording takes a lock for the
// copy of one TraceEvent; while it is off, asking costs one load. Thread-safe.
class TraceRecorder {
 public:
  static constexpr size_t kDefaultCapacity = 1 << 18;

  TraceRecorder() = default;
  TraceRecorder(const TraceRecorder&) = delete;
  TraceRecorder& operator=(const TraceRecorder&) = delete;

  // The one that TraceSpan records to. Never destroyed.
  static TraceRecorder& Global();
  static bool on() { return global_on_.load(std::memory_order_relaxed); }

  // From now on spans are kept, at most `capacity`: a newer one then takes the place of the
  // oldest. `process`: as the file calls this process.
  void Start(absl::string_view process, const std::string& path,
             size_t capacity = kDefaultCapacity);
  // Another name for the process, once it knows what it is.
  void SetProcess(absl::string_view process);
  void Record(TraceEvent event);
  // The file's content so far: an object with traceEvents, each complete (ph "X", ts and dur in
  // microseconds since the epoch), names of process and threads, and how many spans were dropped.
  std::string Json() const;
  // Writes it to the path, which then has the old content or all of the new. Does nothing before
  // Start. May be called again.
  absl::Status Write() const;

  size_t dropped() const;

 private:
  static std::atomic<bool> global_on_;

  mutable Mutex mu_;
  bool started_ ABSL_GUARDED_BY(mu_) = false;
  std::string process_ ABSL_GUARDED_BY(mu_);
  std::string path_ ABSL_GUARDED_BY(mu_);
  size_t capacity_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t epoch_ns_ ABSL_GUARDED_BY(mu_) = 0;            // wall clock - TraceNow
  std::vector<TraceEvent> events_ ABSL_GUARDED_BY(mu_);  // a ring once it is full
  size_t next_ ABSL_GUARDED_BY(mu_) = 0;                 // the oldest, then
  size_t dropped_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<int32_t, std::string> threads_ ABSL_GUARDED_BY(mu_);  // names by tid, bounded
};

// Records the time from its construction to its destruction, or End, of the global recorder; nearly
// nothing where that is off. Not thread-safe, but it may end on another thread than it began on.
class TraceSpan {
 public:
  // `track`: null for the thread on which the span ends. All are literals.
  TraceSpan(const char* category, const char* name, const char* track = nullptr) {
    if (TraceRecorder::on()) Begin(category, name, track);
  }
  ~TraceSpan() { End(); }
  TraceSpan(TraceSpan&& other) noexcept : on_(other.on_), event_(other.event_) {
    other.on_ = false;
  }
  TraceSpan& operator=(TraceSpan&&) = delete;

  TraceSpan& Arg(const char* key, int64_t value) {
    if (on_) event_.AddArg(key, value);
    return *this;
  }
  TraceSpan& Text(const char* key, absl::string_view value) {
    if (on_) event_.SetText(key, value);
    return *this;
  }
  void End() {
    if (on_) Finish();
  }
  // It was nothing worth a line.
  void Drop() { on_ = false; }

 private:
  void Begin(const char* category, const char* name, const char* track);
  void Finish();

  bool on_ = false;
  TraceEvent event_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_TRACE_H_
