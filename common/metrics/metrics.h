#ifndef CODISTILL_COMMON_METRICS_METRICS_H_
#define CODISTILL_COMMON_METRICS_METRICS_H_

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"

namespace codistill {

// The metrics of one process, over prometheus-cpp, whose types do not show. Names are
// "codistill_..." with base units ("_seconds", "_bytes", counters "_total"). Thread-safe; the
// returned handles live as long as the Metrics and are cheap to update.
class Metrics {
 public:
  using Labels = std::map<std::string, std::string>;

  class Counter {
   public:
    virtual ~Counter() = default;
    virtual void Add(double amount = 1) = 0;
    virtual double value() const = 0;
  };
  class Gauge {
   public:
    virtual ~Gauge() = default;
    virtual void Set(double value) = 0;
    virtual double value() const = 0;
  };
  class Histogram {
   public:
    virtual ~Histogram() = default;
    virtual void Observe(double value) = 0;
  };

  // `constant` labels go on every series: job, group, index.
  static std::unique_ptr<Metrics> Create(Labels constant);
  virtual ~Metrics() = default;

  // The same name and labels give the same handle.
  virtual Counter* counter(absl::string_view name, absl::string_view help,
                           const Labels& labels = {}) = 0;
  virtual Gauge* gauge(absl::string_view name, absl::string_view help,
                       const Labels& labels = {}) = 0;
  // Latencies: buckets from 0.1 ms to 60 s, in seconds.
  virtual Histogram* latency(absl::string_view name, absl::string_view help,
                             const Labels& labels = {}) = 0;
  // Numbers of things: buckets of the powers of two from 1 to 65,536.
  virtual Histogram* sizes(absl::string_view name, absl::string_view help,
                           const Labels& labels = {}) = 0;
  // Called before each exposition, to refresh gauges that mirror other state.
  virtual void OnCollect(std::function<void()> refresh) = 0;

  // Prometheus text exposition format 0.0.4.
  virtual std::string Text() const = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_METRICS_METRICS_H_
