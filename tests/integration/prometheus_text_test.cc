#include "tests/integration/prometheus_text.h"

#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr char kGood[] =
    "# HELP codistill_steps_total Steps.\n"
    "# TYPE codistill_steps_total counter\n"
    "codistill_steps_total{group=\"alpha\",note=\"a \\\"b\\\" \\\\ \\n\"} 12\n"
    "codistill_steps_total{group=\"beta\"} 1.5e3 1700000000000\n"
    "# TYPE codistill_latency_seconds histogram\n"
    "codistill_latency_seconds_count 3\n"
    "codistill_latency_seconds_sum 0.25\n"
    "codistill_latency_seconds_bucket{le=\"0.1\"} 2\n"
    "codistill_latency_seconds_bucket{le=\"+Inf\"} 3\n";

TEST(PrometheusTextTest, ReadsSamples) {
  const auto samples = ParsePrometheus(kGood);
  ASSERT_TRUE(samples.ok()) << samples.status();
  ASSERT_EQ(samples->size(), 6u);
  EXPECT_EQ((*samples)[0].name, "codistill_steps_total");
  EXPECT_EQ((*samples)[0].labels.at("note"), "a \"b\" \\ \n");
  EXPECT_EQ((*samples)[0].value, 12);
  EXPECT_EQ((*samples)[1].value, 1500);
}

TEST(PrometheusTextTest, RefusesWhatThePrometheusServerWould) {
  for (const char* text : {
           "",
           "# TYPE a counter\na 1",                                           // no end of line
           "a 1\n",                                                           // no TYPE
           "# TYPE a counter\na\n",                                           // no value
           "# TYPE a counter\na one\n",                                       // no number
           "# TYPE a counter\na -1\n",                                        // counts down
           "# TYPE a thing\na 1\n",                                           // no such type
           "# TYPE a gauge\n# TYPE a gauge\na 1\n",                           // TYPE twice
           "# TYPE a gauge\na{x=1} 1\n",                                      // no quotes
           "# TYPE a gauge\na{x=\"1} 1\n",                                    // no closing quote
           "# TYPE a gauge\na{x=\"1\",x=\"2\"} 1\n",                          // label twice
           "# TYPE a gauge\na{x=\"\\t\"} 1\n",                                // bad escape
           "# TYPE a gauge\na 1\na 2\n",                                      // series twice
           "# TYPE a gauge\n# TYPE b gauge\na 1\nb 1\na{x=\"\"} 1\n",         // two pieces
           "# TYPE 1a gauge\n",                                               // bad name
           "# TYPE a histogram\na_bucket{le=\"1\"} 1\na_count 1\na_sum 1\n",  // no +Inf
           "# TYPE a histogram\na_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\na_count 1\n",
           "# TYPE a histogram\na_bucket{le=\"+Inf\"} 1\na_count 2\na_sum 1\n",
       }) {
    EXPECT_FALSE(ParsePrometheus(text).ok()) << text;
  }
}

}  // namespace
}  // namespace codistill
