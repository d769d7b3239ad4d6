#ifndef CODISTILL_COMMON_MODEL_MODEL_COMPILER_H_
#define CODISTILL_COMMON_MODEL_MODEL_COMPILER_H_

#include <memory>
#include <string>

#include "common/model/model.h"
#include "proto/job.pb.h"

namespace codistill {

// Compiles the versions of one model for inference (Model::Compile) if that makes its passes
// faster, which is found out with the first version: models with convolutions gain much, those of
// large matrices nothing but a second copy of them. For the thread that loads.
class ModelCompiler {
 public:
  // `forward`: as forward() sees it. `name`: of the model, for the log.
  ModelCompiler(ModelConfig forward, std::string name);

  // A model that stands for `model`, warmed up, or `model` itself if it is not to be compiled. The
  // weights may not change as long as the result lives. What a compiled model says is compared with
  // what the model says; one that cannot be compiled, or says something else, stays as it is.
  std::shared_ptr<const Model> Compile(std::shared_ptr<const Model> model);

 private:
  enum class Choice { kOpen, kCompile, kLeave };

  // Empty if `compiled` says what `model` says for `rows` examples.
  std::string Difference(const Model& model, const Model& compiled, int64_t rows) const;
  bool IsFaster(const Model& model, const Model& compiled) const;

  const ModelConfig forward_;
  const std::string name_;
  Choice choice_ = Choice::kOpen;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_MODEL_COMPILER_H_
