#ifndef CODISTILL_PREDSERVER_MODEL_DESCRIPTION_H_
#define CODISTILL_PREDSERVER_MODEL_DESCRIPTION_H_

#include "predserver/model_statistics.h"
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

// All but the name and the version.
void DescribeStatistics(const ModelStatistics& statistics, inference::ModelStatistics* description);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_MODEL_DESCRIPTION_H_
