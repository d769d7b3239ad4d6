#include "common/base/trace.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr size_t kMaxThreadNames = 4096;
// Rows of tracks are numbered from here on: no thread has such a number (pid_max is 2^22).
constexpr int64_t kFirstTrack = int64_t{1} << 24;

int64_t NowOf(clockid_t clock) {
  timespec time = {};
  clock_gettime(clock, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

int32_t ThreadId() {
  thread_local const int32_t tid = static_cast<int32_t>(syscall(SYS_gettid));
  return tid;
}

std::string ThreadName() {
  char name[16] = {};
  pthread_getname_np(pthread_self(), name, sizeof(name));
  return name;
}

// A JSON string. Names of tensors are ASCII nearly always; other bytes may have been cut in two.
std::string Quoted(absl::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else {
      out += c >= 0x20 && c < 0x7f ? c : '?';
    }
  }
  out += '"';
  return out;
}

void AppendMicroseconds(int64_t nanoseconds, std::string* out) {
  absl::StrAppendFormat(out, "%d.%03d", nanoseconds / 1000, nanoseconds % 1000);
}

void AppendName(const char* what, int64_t pid, int64_t tid, absl::string_view name,
                std::string* out) {
  absl::StrAppend(out, "{\"ph\":\"M\",\"name\":\"", what, "\",\"pid\":", pid, ",\"tid\":", tid,
                  ",\"args\":{\"name\":", Quoted(name), "}},\n");
}

void AppendEvent(const TraceEvent& event, int64_t epoch_ns, int64_t pid, int64_t tid,
                 std::string* out) {
  absl::StrAppend(out, "{\"ph\":\"X\",\"cat\":", Quoted(event.category),
                  ",\"name\":", Quoted(event.name), ",\"pid\":", pid, ",\"tid\":", tid, ",\"ts\":");
  AppendMicroseconds(epoch_ns + event.begin_ns, out);
  absl::StrAppend(out, ",\"dur\":");
  AppendMicroseconds(event.duration_ns, out);
  absl::StrAppend(out, ",\"args\":{");
  const char* separator = "";
  for (int i = 0; i < event.args; ++i) {
    absl::StrAppend(out, separator, Quoted(event.keys[i]), ":", event.values[i]);
    separator = ",";
  }
  if (event.text_key != nullptr) {
    absl::StrAppend(out, separator, Quoted(event.text_key), ":", Quoted(event.text.data()));
  }
  absl::StrAppend(out, "}},\n");
}

}  // namespace

std::atomic<bool> TraceRecorder::global_on_{false};

int64_t TraceNow() { return NowOf(CLOCK_MONOTONIC); }

void TraceEvent::AddArg(const char* key, int64_t value) {
  if (args >= kMaxArgs) return;
  keys[args] = key;
  values[args] = value;
  ++args;
}

void TraceEvent::SetText(const char* key, absl::string_view value) {
  text_key = key;
  const size_t length = std::min(value.size(), kMaxText - 1);
  std::memcpy(text.data(), value.data(), length);
  text[length] = '\0';
}

TraceRecorder& TraceRecorder::Global() {
  static TraceRecorder* const recorder = new TraceRecorder();
  return *recorder;
}

void TraceRecorder::Start(absl::string_view process, const std::string& path, size_t capacity) {
  {
    MutexLock lock(&mu_);
    started_ = true;
    process_ = std::string(process);
    path_ = path;
    capacity_ = std::max<size_t>(capacity, 1);
    epoch_ns_ = NowOf(CLOCK_REALTIME) - TraceNow();
    events_.clear();
    next_ = 0;
    dropped_ = 0;
  }
  if (this == &Global()) global_on_.store(true, std::memory_order_relaxed);
}

void TraceRecorder::SetProcess(absl::string_view process) {
  MutexLock lock(&mu_);
  process_ = std::string(process);
}

void TraceRecorder::Record(TraceEvent event) {
  if (event.track == nullptr) event.tid = ThreadId();
  MutexLock lock(&mu_);
  if (!started_) return;
  // When its first span ends: by then it has its name.
  if (event.track == nullptr && threads_.size() < kMaxThreadNames &&
      threads_.find(event.tid) == threads_.end()) {
    threads_[event.tid] = ThreadName();
  }
  if (events_.size() < capacity_) {
    events_.push_back(event);
    return;
  }
  events_[next_] = event;
  next_ = (next_ + 1) % capacity_;
  ++dropped_;
}

size_t TraceRecorder::dropped() const {
  MutexLock lock(&mu_);
  return dropped_;
}

std::string TraceRecorder::Json() const {
  std::vector<TraceEvent> events;
  std::map<int32_t, std::string> threads;
  std::string process;
  int64_t epoch_ns = 0;
  size_t dropped = 0;
  {
    MutexLock lock(&mu_);
    events = events_;
    threads = threads_;
    process = process_;
    epoch_ns = epoch_ns_;
    dropped = dropped_;
  }
  std::stable_sort(events.begin(), events.end(), [](const TraceEvent& a, const TraceEvent& b) {
    return a.begin_ns < b.begin_ns;
  });

  const int64_t pid = getpid();
  std::string out = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
  AppendName("process_name", pid, pid, process, &out);
  for (const auto& thread : threads) {
    AppendName("thread_name", pid, thread.first, thread.second, &out);
  }
  // Of each track, when the newest span of each of its rows ends, and the number of the row.
  struct Row {
    int64_t end_ns = 0;
    int64_t tid = 0;
  };
  std::map<std::string, std::vector<Row>> tracks;
  int64_t next_tid = kFirstTrack;
  for (const TraceEvent& event : events) {
    int64_t tid = event.tid;
    if (event.track != nullptr) {
      std::vector<Row>& rows = tracks[event.track];
      auto row = std::find_if(rows.begin(), rows.end(),
                              [&](const Row& r) { return r.end_ns <= event.begin_ns; });
      if (row == rows.end()) {
        rows.push_back({0, next_tid++});
        row = rows.end() - 1;
        AppendName("thread_name", pid, row->tid,
                   rows.size() == 1 ? std::string(event.track)
                                    : absl::StrCat(event.track, " ", rows.size()),
                   &out);
      }
      row->end_ns = event.begin_ns + event.duration_ns;
      tid = row->tid;
    }
    AppendEvent(event, epoch_ns, pid, tid, &out);
  }
  // After the last comma, a line that says what is not there.
  absl::StrAppend(&out, "{\"ph\":\"M\",\"name\":\"spans_dropped\",\"pid\":", pid, ",\"tid\":", pid,
                  ",\"args\":{\"count\":", dropped,
                  "}}\n],\"otherData\":{\"spans_dropped\":", dropped, "}}\n");
  return out;
}

absl::Status TraceRecorder::Write() const {
  std::string path;
  {
    MutexLock lock(&mu_);
    if (!started_) return absl::OkStatus();
    path = path_;
  }
  return Annotate(WriteFileAtomically(path, Json()), "--trace");
}

void TraceSpan::Begin(const char* category, const char* name, const char* track) {
  on_ = true;
  event_.category = category;
  event_.name = name;
  event_.track = track;
  event_.begin_ns = TraceNow();
}

void TraceSpan::Finish() {
  on_ = false;
  event_.duration_ns = TraceNow() - event_.begin_ns;
  TraceRecorder::Global().Record(event_);
}

}  // namespace codistill
