#ifndef CODISTILL_PREDSERVER_PREDICTION_H_
#define CODISTILL_PREDSERVER_PREDICTION_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/tensor/tensor.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// How a request wants its outputs.
struct OutputFormat {
  // Of logits, probabilities and top-k values: DT_FLOAT, DT_HALF or DT_BFLOAT16; of logits also
  // DT_INT8, with a scale a row.
  DataType dtype = DT_FLOAT;
  double temperature = 1;  // of probabilities and top-k values
  int64_t top_k = 0;       // 0 = all classes
};

// What is asked of a prediction server, as it came off the wire and not yet trusted.
struct PredictionRequest {
  struct Input {
    std::string name;
    std::string datatype;  // the protocol's name: "FP32", "INT64", ...
    std::vector<int64_t> shape;
    // Row-major little-endian elements, in parts that together are the value. Kept alive by
    // `owner`.
    std::vector<absl::Span<const uint8_t>> parts;
  };
  std::string model;
  std::string version;  // "generation.step"; empty: whichever is held
  std::vector<Input> inputs;
  std::vector<std::string> outputs;  // empty: all
  OutputFormat format;
  // The client counts on a server that keeps a sequence's state between its requests.
  bool sequence = false;
  // Who asks, as far as fairness goes: requests of one client wait for each other, not for those of
  // others.
  std::string client;
  int64_t max_staleness_steps = -1;  // negative: any staleness will do
  absl::Time deadline = absl::InfiniteFuture();
  std::shared_ptr<const void> owner;
  // Whether the caller has gone; may be null. Any thread.
  std::function<bool()> cancelled;
};

struct Prediction {
  Version version;                // that computed it
  int64_t latest_step = 0;        // newest its group had committed, as last told
  int64_t staleness_steps = 0;    // the difference, at the moment of the answer
  absl::Duration age;             // since the version was loaded
  DataType precision = DT_FLOAT;  // to which the version's weights were rounded
  // What was asked for, in the order of the names below; then recurrent states, FP32 always.
  std::vector<NamedTensor> outputs;
};

// Names that a prediction server gives a meaning besides those of the job.
inline constexpr char kLogitsOutput[] = "logits";
// INT8 logits are rows of integers; a row times its scale, FP32 [rows], is what was computed.
inline constexpr char kLogitsScaleOutput[] = "logits_scale";
inline constexpr char kProbabilitiesOutput[] = "probabilities";
// The largest probabilities of each row, falling: INT32 [rows, top_k] and their values; and what
// all others have together, FP32 [rows].
inline constexpr char kTopKIndexOutput[] = "topk_index";
inline constexpr char kTopKValueOutput[] = "topk_value";
inline constexpr char kTailMassOutput[] = "tail_mass";
inline constexpr char kExampleIdInput[] = "example_id";

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_PREDICTION_H_
