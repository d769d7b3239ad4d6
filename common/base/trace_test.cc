#include "common/base/trace.h"

#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/base/executor.h"
#include "common/base/file.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

using Json = nlohmann::json;

TraceEvent Span(const char* name, int64_t begin_us, int64_t duration_us,
                const char* track = nullptr) {
  TraceEvent event;
  event.category = "test";
  event.name = name;
  event.track = track;
  event.begin_ns = begin_us * 1000;
  event.duration_ns = duration_us * 1000;
  return event;
}

std::vector<Json> Spans(const Json& trace) {
  std::vector<Json> spans;
  for (const Json& event : trace["traceEvents"]) {
    if (event["ph"] == "X") spans.push_back(event);
  }
  return spans;
}

std::map<int64_t, std::string> ThreadNames(const Json& trace) {
  std::map<int64_t, std::string> names;
  for (const Json& event : trace["traceEvents"]) {
    if (event["name"] == "thread_name") names[event["tid"]] = event["args"]["name"];
  }
  return names;
}

TEST(TraceTest, TheFileIsAChromeTrace) {
  TraceRecorder recorder;
  recorder.Start("unnamed", "");
  recorder.SetProcess("worker \"a\"");
  TraceEvent event = Span("pull", 5, 7);
  event.duration_ns += 89;
  event.AddArg("step", 12);
  event.AddArg("bytes", int64_t{5} << 32);
  event.SetText("tensor", "fc\\1\n.weight");
  std::thread thread([&] {
    SetThreadName("reader");
    recorder.Record(event);
  });
  thread.join();
  const Json trace = Json::parse(recorder.Json());
  const std::vector<Json> spans = Spans(trace);
  ASSERT_EQ(spans.size(), 1u);
  const Json& span = spans[0];
  EXPECT_EQ(span["cat"], "test");
  EXPECT_EQ(span["name"], "pull");
  EXPECT_DOUBLE_EQ(span["dur"].get<double>(), 7.089);
  EXPECT_EQ(span["pid"], trace["traceEvents"][0]["pid"]);
  EXPECT_EQ(span["args"]["step"], 12);
  EXPECT_EQ(span["args"]["bytes"], int64_t{5} << 32);
  EXPECT_EQ(span["args"]["tensor"], "fc\\1?.weight");
  EXPECT_EQ(ThreadNames(trace)[span["tid"]], "reader");
  EXPECT_EQ(trace["traceEvents"][0]["name"], "process_name");
  EXPECT_EQ(trace["traceEvents"][0]["args"]["name"], "worker \"a\"");
  EXPECT_EQ(trace["otherData"]["spans_dropped"], 0);
}

TEST(TraceTest, WithoutSpansItIsATraceAllTheSame) {
  TraceRecorder recorder;
  recorder.Record(Span("before the start", 0, 1));
  recorder.Start("worker", "");
  EXPECT_TRUE(Spans(Json::parse(recorder.Json())).empty());
}

// Spans of one row must nest or follow one another, or viewers draw nonsense.
TEST(TraceTest, OverlappingSpansOfATrackGetRowsOfTheirOwn) {
  TraceRecorder recorder;
  recorder.Start("worker", "");
  recorder.Record(Span("b", 5, 10, "requests"));  // out of order: it ended first
  recorder.Record(Span("a", 0, 20, "requests"));
  recorder.Record(Span("c", 15, 10, "requests"));  // begins where b ends
  recorder.Record(Span("d", 16, 1, "requests"));
  recorder.Record(Span("e", 16, 1, "others"));
  const Json trace = Json::parse(recorder.Json());
  std::map<std::string, int64_t> row;
  for (const Json& span : Spans(trace)) row[span["name"]] = span["tid"];
  ASSERT_EQ(row.size(), 5u);
  EXPECT_NE(row["a"], row["b"]);
  EXPECT_EQ(row["b"], row["c"]);
  EXPECT_NE(row["d"], row["a"]);
  EXPECT_NE(row["d"], row["c"]);
  std::map<int64_t, std::string> names = ThreadNames(trace);
  EXPECT_EQ(names[row["a"]], "requests");
  EXPECT_EQ(names[row["b"]], "requests 2");
  EXPECT_EQ(names[row["d"]], "requests 3");
  EXPECT_EQ(names[row["e"]], "others");
}

TEST(TraceTest, TheNewestSpansStayAndTheRestIsCounted) {
  TraceRecorder recorder;
  recorder.Start("worker", "", 100);
  for (int i = 0; i < 250; ++i) {
    TraceEvent event = Span("span", i, 1);
    event.AddArg("i", i);
    recorder.Record(event);
  }
  EXPECT_EQ(recorder.dropped(), 150u);
  const Json trace = Json::parse(recorder.Json());
  EXPECT_EQ(trace["otherData"]["spans_dropped"], 150);
  const std::vector<Json> spans = Spans(trace);
  ASSERT_EQ(spans.size(), 100u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(spans[i]["args"]["i"], 150 + i);
}

TEST(TraceTest, ManyThreadsRecordAndAreRead) {
  TraceRecorder recorder;
  recorder.Start("worker", "", 1000);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) recorder.Record(Span("span", i, 1));
    });
  }
  for (int i = 0; i < 5; ++i) EXPECT_FALSE(Json::parse(recorder.Json()).is_discarded());
  for (std::thread& thread : threads) thread.join();
  const std::vector<Json> spans = Spans(Json::parse(recorder.Json()));
  EXPECT_EQ(spans.size() + recorder.dropped(), 2000u);
  std::set<int64_t> tids;
  for (const Json& span : spans) tids.insert(span["tid"].get<int64_t>());
  EXPECT_GE(tids.size(), 2u);
}

// The global recorder, which stays on once started: the last test.
TEST(TraceTest, SpansGoToTheFileOnceItIsStarted) {
  ASSERT_FALSE(TraceRecorder::on());
  { TraceSpan span("test", "unseen"); }
  ASSERT_TRUE(TraceRecorder::Global().Write().ok());  // nowhere, nothing
  const std::string path = JoinPath(testing::TempDir(), "trace.json");
  TraceRecorder::Global().Start("worker", path);
  {
    TraceSpan outer("test", "outer");
    TraceSpan inner("test", "inner");
    inner.Arg("step", 3).Text("tensor", std::string(100, 'x'));
    inner.End();
    inner.End();  // once is enough
    TraceSpan dropped("test", "dropped");
    dropped.Drop();
    TraceSpan moved = std::move(outer);
  }
  ASSERT_TRUE(TraceRecorder::Global().Write().ok());
  const auto text = ReadFile(path, 1 << 20);
  ASSERT_TRUE(text.ok()) << text.status();
  const std::vector<Json> spans = Spans(Json::parse(*text));
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_EQ(spans[0]["name"], "outer");
  EXPECT_EQ(spans[1]["name"], "inner");
  EXPECT_EQ(spans[1]["args"]["tensor"].get<std::string>(),
            std::string(TraceEvent::kMaxText - 1, 'x'));
  EXPECT_LE(spans[0]["ts"].get<double>(), spans[1]["ts"].get<double>());
  EXPECT_GE(spans[0]["ts"].get<double>() + spans[0]["dur"].get<double>(),
            spans[1]["ts"].get<double>() + spans[1]["dur"].get<double>());
}

TEST(TraceTest, AFileThatCannotBeWrittenIsNamed) {
  TraceRecorder recorder;
  recorder.Start("worker", JoinPath(testing::TempDir(), "no such directory/trace.json"));
  const absl::Status status = recorder.Write();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message().find("no such directory"), std::string::npos) << status;
}

}  // namespace
}  // namespace codistill
