#include "common/metrics/metrics.h"

#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(MetricsTest, ExactText) {
  auto metrics = Metrics::Create({{"job", "mnist"}, {"group", "north"}});
  metrics->counter("codistill_pushes_total", "Pushes decided.", {{"outcome", "applied"}})->Add(3);
  metrics->counter("codistill_pushes_total", "Pushes decided.", {{"outcome", "late"}})->Add();
  Metrics::Gauge* step = metrics->gauge("codistill_step", "Newest committed step.");
  metrics->OnCollect([step] { step->Set(step->value() + 41.5); });
  EXPECT_EQ(metrics->Text(),
            "# HELP codistill_pushes_total Pushes decided.\n"
            "# TYPE codistill_pushes_total counter\n"
            "codistill_pushes_total{group=\"north\",job=\"mnist\",outcome=\"applied\"} 3\n"
            "codistill_pushes_total{group=\"north\",job=\"mnist\",outcome=\"late\"} 1\n"
            "# HELP codistill_step Newest committed step.\n"
            "# TYPE codistill_step gauge\n"
            "codistill_step{group=\"north\",job=\"mnist\"} 41.5\n");
  EXPECT_NE(metrics->Text().find("codistill_step{group=\"north\",job=\"mnist\"} 83\n"),
            std::string::npos);
}

TEST(MetricsTest, LatencyBuckets) {
  auto metrics = Metrics::Create({});
  Metrics::Histogram* latency = metrics->latency("codistill_commit_seconds", "Commits.");
  latency->Observe(0.00005);
  latency->Observe(0.02);
  latency->Observe(1000);
  EXPECT_EQ(metrics->Text(),
            "# HELP codistill_commit_seconds Commits.\n"
            "# TYPE codistill_commit_seconds histogram\n"
            "codistill_commit_seconds_count 3\n"
            "codistill_commit_seconds_sum 1000.02005\n"
            "codistill_commit_seconds_bucket{le=\"0.0001\"} 1\n"
            "codistill_commit_seconds_bucket{le=\"0.00025\"} 1\n"
            "codistill_commit_seconds_bucket{le=\"0.0005\"} 1\n"
            "codistill_commit_seconds_bucket{le=\"0.001\"} 1\n"
            "codistill_commit_seconds_bucket{le=\"0.0025\"} 1\n"
            "codistill_commit_seconds_bucket{le=\"0.005\"} 1\n"
            "codistill_commit_seconds_bucket{le=\"0.01\"} 1\n"
            "codistill_commit_seconds_bucket{le=\"0.025\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"0.05\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"0.1\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"0.25\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"0.5\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"1\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"2.5\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"5\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"10\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"25\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"60\"} 2\n"
            "codistill_commit_seconds_bucket{le=\"+Inf\"} 3\n");
}

TEST(MetricsTest, SameNameAndLabelsAreTheSameHandleFromAnyThread) {
  auto metrics = Metrics::Create({});
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) {
        metrics->counter("codistill_calls_total", "Calls.", {{"method", "Push"}})->Add();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(metrics->counter("codistill_calls_total", "Calls.", {{"method", "Push"}})->value(),
            4000);
  EXPECT_NE(metrics->counter("codistill_calls_total", "Calls.", {{"method", "Pull"}}),
            metrics->counter("codistill_calls_total", "Calls.", {{"method", "Push"}}));
}

TEST(MetricsDeathTest, BadNameIsOurBug) {
  auto metrics = Metrics::Create({});
  EXPECT_DEATH(metrics->gauge("steps per second", ""), "bad metric name");
}

}  // namespace
}  // namespace codistill
