#include "worker/external_answer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/inputs.h"
#include "common/rpc/frame.h"
#include "proto/open_inference.pb.h"
#include "worker/output_reader.h"

namespace codistill {
namespace {

constexpr int kRawOutputField = 6;  // ModelInferResponse.raw_output_contents
constexpr float kLeastProbability = 1e-10f;
// Rounding, of sums over classes in half precision above all, may lead a little over 1.
constexpr float kMostProbability = 1.01f;

using inference::ModelInferResponse;

absl::Status CheckAnswerer(const ModelInferResponse& response, const TeacherDialect& dialect) {
  if (!response.model_name().empty() && response.model_name() != dialect.model) {
    return absl::InvalidArgumentError(absl::StrCat("answered by model \"", response.model_name(),
                                                   "\"; \"", dialect.model, "\" was asked"));
  }
  if (!dialect.version.empty() && !response.model_version().empty() &&
      response.model_version() != dialect.version) {
    return absl::InvalidArgumentError(
        absl::StrCat("model \"", dialect.model, "\" answered with version \"",
                     response.model_version(), "\"; \"", dialect.version, "\" was asked for"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status LogitsOfProbabilities(LabelLoss label_loss, absl::Span<float> values) {
  for (size_t i = 0; i < values.size(); ++i) {
    // Also false for what is not a number.
    if (!(values[i] >= 0 && values[i] <= kMostProbability)) {
      return absl::InvalidArgumentError(
          absl::StrCat("value ", i, " is ", values[i], ", which is no probability"));
    }
  }
  if (label_loss == SIGMOID_CROSS_ENTROPY) {
    // In double: 1 - 1e-10 is no float.
    for (float& p : values) {
      const double q = std::min(std::max<double>(p, kLeastProbability), 1.0 - kLeastProbability);
      p = static_cast<float>(std::log(q / (1 - q)));
    }
  } else {
    for (float& p : values) p = std::log(std::max(p, kLeastProbability));
  }
  return absl::OkStatus();
}

absl::StatusOr<InferenceAnswer> DecodeExternalAnswer(grpc::ByteBuffer* buffer,
                                                     const InferenceQuestion& question) {
  const TeacherDialect& dialect = *question.dialect;
  const ModelConfig& config = *question.config;
  ModelInferResponse response;
  DecodedPayload payload;
  CODISTILL_RETURN_IF_ERROR(DecodedPayload::Decode(buffer, kRawOutputField, &response, &payload));
  CODISTILL_RETURN_IF_ERROR(CheckAnswerer(response, dialect));
  const OutputReader reader(response, payload);
  InferenceAnswer answer;
  CODISTILL_ASSIGN_OR_RETURN(
      answer.logits,
      reader.PredictionsAsGiven(dialect.output, question.batch->rows, config.num_outputs()));
  if (dialect.probabilities) {
    CODISTILL_RETURN_IF_ERROR(
        Annotate(LogitsOfProbabilities(config.label_loss(), answer.logits.As<float>()),
                 absl::StrCat("output \"", dialect.output, "\"")));
  }
  for (const RecurrentState& state : config.states()) {
    CODISTILL_ASSIGN_OR_RETURN(
        Tensor value,
        reader.FloatsAsGiven(state.name(), StateShape(state, question.batch->examples)));
    answer.states.push_back(std::move(value));
  }
  if (dialect.codistill_server) {
    answer.generation = static_cast<uint64_t>(IntParameter(response, "generation"));
    answer.step = IntParameter(response, "step");
    answer.latest_step = IntParameter(response, "latest_step");
  }
  return answer;
}

}  // namespace codistill
