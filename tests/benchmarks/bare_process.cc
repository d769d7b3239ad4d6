#include "tests/benchmarks/bare_process.h"

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "nlohmann/json.hpp"

namespace codistill {

absl::StatusOr<std::unique_ptr<BareProcess>> BareProcess::Start(const Options& options) {
  std::vector<std::string> args = {options.binary,
                                   options.job,
                                   options.data_dir,
                                   absl::StrCat(options.batches),
                                   absl::StrCat(options.chunk_rows),
                                   options.optimize_graph ? "1" : "0"};
  if (!options.device.empty()) args.push_back(options.device);
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<PipedProcess> process,
                             PipedProcess::Start(args, options.core));
  return std::unique_ptr<BareProcess>(new BareProcess(std::move(process)));
}

absl::StatusOr<BareProcess::Result> BareProcess::Run(int steps) {
  CODISTILL_ASSIGN_OR_RETURN(const nlohmann::json json, process_->Ask(absl::StrCat(steps)));
  Result result;
  result.seconds = json.value("seconds", 0.0);
  result.processor_seconds = json.value("processor_seconds", 0.0);
  result.losses = json.value("losses", std::vector<double>());
  return result;
}

}  // namespace codistill
