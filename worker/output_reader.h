#ifndef CODISTILL_WORKER_OUTPUT_READER_H_
#define CODISTILL_WORKER_OUTPUT_READER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/rpc/frame.h"
#include "common/tensor/tensor.h"
#include "proto/open_inference.pb.h"
#include "worker/teacher_source.h"

namespace codistill {

// An integer parameter of a response, however the server chose to write it; 0 if there is none.
int64_t IntParameter(const inference::ModelInferResponse& response, const char* name);

// Takes the outputs of a prediction server out of a response. Every tensor is copied, or converted,
// once. All errors are INVALID_ARGUMENT and name the output and what would be right.
class OutputReader {
 public:
  // Both outlive the reader.
  OutputReader(const inference::ModelInferResponse& response, const DecodedPayload& payload)
      : response_(response), payload_(payload) {}

  // Output `name` of exactly this shape as fp32; it travels as `wire`: DT_FLOAT, DT_HALF or
  // DT_BFLOAT16.
  absl::StatusOr<Tensor> Floats(const std::string& name, const std::vector<int64_t>& shape,
                                DataType wire = DT_FLOAT) const;

  // The same of a server that is not ours: FP32 or FP16, as it says.
  absl::StatusOr<Tensor> FloatsAsGiven(const std::string& name,
                                       const std::vector<int64_t>& shape) const;
  // And of the output with its predictions, as fp32 [rows, classes]. Any shape of as many values
  // that ends in `classes` will do, and a single output may leave its dimension out.
  absl::StatusOr<Tensor> PredictionsAsGiven(const std::string& name, int64_t rows,
                                            int64_t classes) const;

  // Logits of a server of ours as [rows, classes], in any such shape: as they are, DT_INT8 times
  // their scales as fp32.
  absl::StatusOr<Tensor> Logits(int64_t rows, int64_t classes, DataType wire) const;

  // The k likeliest classes of each row and the tail, all values checked: what the loss would
  // refuse is an error here.
  absl::StatusOr<TopKPrediction> TopK(int64_t rows, int64_t classes, int64_t k,
                                      DataType wire) const;

 private:
  absl::StatusOr<int> Find(const std::string& name) const;
  // That output `index` is of `wire` and has the bytes of so many elements.
  absl::Status CheckContents(int index, DataType wire, int64_t elements) const;
  absl::Status CheckShape(int index, const std::vector<int64_t>& shape) const;
  // Any shape of rows x classes values that ends in `classes`.
  absl::Status CheckFlatShape(int index, int64_t rows, int64_t classes) const;
  absl::StatusOr<Tensor> ReadAsGiven(int index, std::vector<int64_t> shape) const;
  bool typed(int index) const {
    return payload_.count() == 0 && response_.outputs(index).has_contents();
  }
  // Elements of an output whose contents were checked.
  absl::Status ReadFloats(int index, DataType wire, Tensor* to) const;

  const inference::ModelInferResponse& response_;
  const DecodedPayload& payload_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_OUTPUT_READER_H_
