#include "common/metrics/metrics.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "common/base/mutex.h"
#include "glog/logging.h"
#include "prometheus/check_names.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/metric_family.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"

namespace codistill {
namespace {

// Seconds; a factor of about 2.2 apart, so that a quantile read off them is right within that.
const prometheus::Histogram::BucketBoundaries kLatencyBuckets = {
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1,    0.25,    0.5,    1,     2.5,    5,     10,   25,    60};

const prometheus::Histogram::BucketBoundaries kSizeBuckets = {
    1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536};

class CounterHandle : public Metrics::Counter {
 public:
  explicit CounterHandle(prometheus::Counter* counter) : counter_(counter) {}
  void Add(double amount) override { counter_->Increment(amount); }
  double value() const override { return counter_->Value(); }

 private:
  prometheus::Counter* const counter_;
};

class GaugeHandle : public Metrics::Gauge {
 public:
  explicit GaugeHandle(prometheus::Gauge* gauge) : gauge_(gauge) {}
  void Set(double value) override { gauge_->Set(value); }
  double value() const override { return gauge_->Value(); }

 private:
  prometheus::Gauge* const gauge_;
};

class HistogramHandle : public Metrics::Histogram {
 public:
  explicit HistogramHandle(prometheus::Histogram* histogram) : histogram_(histogram) {}
  void Observe(double value) override { histogram_->Observe(value); }

 private:
  prometheus::Histogram* const histogram_;
};

class PrometheusMetrics : public Metrics {
 public:
  explicit PrometheusMetrics(Labels constant) : constant_(std::move(constant)) {}

  Counter* counter(absl::string_view name, absl::string_view help, const Labels& labels) override {
    return Get<CounterHandle>(prometheus::BuildCounter(), name, help, labels, &counters_);
  }
  Gauge* gauge(absl::string_view name, absl::string_view help, const Labels& labels) override {
    return Get<GaugeHandle>(prometheus::BuildGauge(), name, help, labels, &gauges_);
  }
  Histogram* latency(absl::string_view name, absl::string_view help,
                     const Labels& labels) override {
    return Get<HistogramHandle>(prometheus::BuildHistogram(), name, help, labels, &histograms_,
                                kLatencyBuckets);
  }
  Histogram* sizes(absl::string_view name, absl::string_view help, const Labels& labels) override {
    return Get<HistogramHandle>(prometheus::BuildHistogram(), name, help, labels, &histograms_,
                                kSizeBuckets);
  }

  void OnCollect(std::function<void()> refresh) override {
    MutexLock lock(&mu_);
    refresh_.push_back(std::move(refresh));
  }

  std::string Text() const override {
    std::vector<std::function<void()>> refresh;
    {
      MutexLock lock(&mu_);
      refresh = refresh_;
    }
    // Without the lock: they set gauges.
    for (const std::function<void()>& f : refresh) f();
    // The registry's order is that of a hash table; people compare two scrapes line by line.
    std::vector<prometheus::MetricFamily> families = registry_.Collect();
    std::sort(families.begin(), families.end(),
              [](const auto& a, const auto& b) { return a.name < b.name; });
    for (prometheus::MetricFamily& family : families) {
      std::sort(family.metric.begin(), family.metric.end(),
                [](const auto& a, const auto& b) { return a.label < b.label; });
    }
    return prometheus::TextSerializer().Serialize(families);
  }

 private:
  template <typename Handle>
  using Handles = std::map<std::pair<std::string, Labels>, std::unique_ptr<Handle>>;

  template <typename Handle, typename Builder, typename... More>
  Handle* Get(Builder builder, absl::string_view name, absl::string_view help, const Labels& labels,
              Handles<Handle>* handles, const More&... more) {
    CHECK(prometheus::CheckMetricName(std::string(name))) << "bad metric name " << name;
    MutexLock lock(&mu_);
    std::unique_ptr<Handle>& handle = (*handles)[{std::string(name), labels}];
    if (handle == nullptr) {
      // The registry itself gives the same family and series for the same names and labels, and
      // throws for a name that is already another kind of metric.
      auto& family = builder.Name(std::string(name))
                         .Help(std::string(help))
                         .Labels(constant_)
                         .Register(registry_);
      handle = std::make_unique<Handle>(&family.Add(labels, more...));
    }
    return handle.get();
  }

  const Labels constant_;
  prometheus::Registry registry_;  // thread-safe
  mutable Mutex mu_;
  Handles<CounterHandle> counters_ ABSL_GUARDED_BY(mu_);
  Handles<GaugeHandle> gauges_ ABSL_GUARDED_BY(mu_);
  Handles<HistogramHandle> histograms_ ABSL_GUARDED_BY(mu_);
  std::vector<std::function<void()>> refresh_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

std::unique_ptr<Metrics> Metrics::Create(Labels constant) {
  return std::make_unique<PrometheusMetrics>(std::move(constant));
}

}  // namespace codistill
