#ifndef CODISTILL_TESTS_BENCHMARKS_PREDICTION_MODELS_H_
#define CODISTILL_TESTS_BENCHMARKS_PREDICTION_MODELS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "control/child_process.h"
#include "proto/job.pb.h"
#include "tests/benchmarks/known_answers_load.h"
#include "tests/benchmarks/pinned_process.h"

// What `prediction` measures: a model, libtorch's own loop over it, and prediction servers of it.
namespace codistill {

inline constexpr int kServerCore = 0;
inline constexpr int kClientCore = 1;

// A model whose archive exists, with examples and what libtorch makes of them.
class MeasuredModel {
 public:
  struct Options {
    std::string name;
    std::string module;                                        // of models/
    std::vector<std::pair<std::string, std::string>> options;  // of the module
    std::string input;
    std::vector<int64_t> shape;  // of one example
    int64_t classes = 0;
    int examples = 256;
  };
  // Exports the archive into `directory`, starts libtorch's own loop, and has it compute the
  // answers.
  static absl::StatusOr<std::unique_ptr<MeasuredModel>> Create(Options options,
                                                               const std::string& directory);

  const KnownAnswers& known() const { return known_; }

  struct Direct {
    double seconds = 0;
    std::vector<double> passes;
  };
  // Passes of libtorch's own loop over `rows` examples each, on the server's core: forward() of the
  // archive as it is, with the JIT's graph optimisation or without, or of what libtorch compiles
  // from it for inference; whichever was fastest for so many rows when it was first asked.
  absl::StatusOr<Direct> RunDirect(int64_t rows, int passes);
  // The same of the archive as it is.
  absl::StatusOr<Direct> RunForward(int64_t rows, int passes);

  // A prediction server of the archive with these settings.
  class Server {
   public:
    ~Server();
    const std::string& address() const { return address_; }
    // Of the process, all threads, since it started.
    double ProcessorSeconds() const;

   private:
    friend class MeasuredModel;
    ChildProcess process_;
    std::string address_;
  };
  // `flags` besides; on `core`.
  absl::StatusOr<std::unique_ptr<Server>> Serve(const PredictionConfig& settings,
                                                const std::vector<std::string>& flags = {},
                                                int core = kServerCore);

 private:
  MeasuredModel(Options options, std::string directory)
      : options_(std::move(options)), directory_(std::move(directory)) {}

  const Options options_;
  const std::string directory_;
  ModelConfig config_;
  std::string archive_;
  KnownAnswers known_;
  // The first time for so many rows.
  absl::Status Compare(int64_t rows);
  absl::StatusOr<Direct> Ask(int which, int64_t rows, int passes);

  static constexpr int kLoops = 3;
  std::unique_ptr<PipedProcess> direct_[kLoops];  // by direct_predictions' OPTIMIZE
  std::map<int64_t, int> fastest_, forward_;      // of them, by rows
  int servers_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_PREDICTION_MODELS_H_
