#ifndef CODISTILL_PREDSERVER_MODEL_DESCRIPTION_H_
#define CODISTILL_PREDSERVER_MODEL_DESCRIPTION_H_

#include "proto/control.pb.h"
#include "proto/job.pb.h"
#include "proto/open_inference.pb.h"

// What the Open Inference Protocol tells of a model besides its predictions.
namespace codistill {

// Platform and backend of all our models.
inline constexpr char kModelPlatform[] = "codistill_torchscript";
inline constexpr char kModelBackend[] = "codistill";

// Inputs and outputs, and `platform`.
void DescribeModel(const ModelConfig& model, inference::ModelMetadataResponse* response);

// The configuration as Triton would have it. Models without recurrent state have their batch
// dimension first and leave it out of `dims`; others have max_batch_size 0 and whole shapes, as the
// batch may be anywhere.
void DescribeConfig(const ModelConfig& model, const PredictionConfig& prediction,
                    inference::ModelConfig* config);

// Statistics as far as a server's status has them.
void DescribeStatistics(const ServedModelStatus& status, inference::ModelStatistics* statistics);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_MODEL_DESCRIPTION_H_
