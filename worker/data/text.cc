// Text for language models: TextConfig in proto/job.proto.
//
// The text is cut into `lanes` contiguous streams of `segments` x `unroll` tokens each. Example
// segment * lanes + lane is one segment of one stream, so that consecutive batches of all lanes
// carry every stream on. What is left over at the end, fewer than lanes x unroll tokens, is not
// used.

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "worker/data/sources.h"
#include "worker/data/vocabulary.h"

namespace codistill {
namespace {

class TextDataset : public Dataset {
 public:
  TextDataset(const DatasetConfig& config, LabelLoss loss, Shape shape, uint64_t salt,
              int64_t first_token, std::vector<int32_t> tokens)
      : Dataset(config, loss, std::move(shape)),
        unroll_(config.text().unroll()),
        salt_(salt),
        first_token_(first_token),
        stream_tokens_(size() / lanes() * unroll_),
        tokens_(std::move(tokens)) {}

  static absl::StatusOr<std::unique_ptr<Dataset>> Create(const DatasetOptions& options) {
    const JobConfig& job = *options.job;
    const TextConfig& config = internal::ConfigOf(options).text();
    const std::string field = internal::FieldOf(options);
    CODISTILL_ASSIGN_OR_RETURN(
        const std::vector<std::string> files,
        internal::ResolveFiles(field + ".text.files", config.files(), options.data_dir));
    std::vector<std::string> vocabulary_files = files;
    if (config.vocabulary_files_size() > 0) {
      CODISTILL_ASSIGN_OR_RETURN(
          vocabulary_files, internal::ResolveFiles(field + ".text.vocabulary_files",
                                                   config.vocabulary_files(), options.data_dir));
    }
    CODISTILL_ASSIGN_OR_RETURN(const Vocabulary vocabulary,
                               Vocabulary::Read(vocabulary_files, config.unknown()));
    std::vector<int32_t> tokens;
    int64_t unknown_words = 0;
    for (const std::string& path : files) {
      CODISTILL_RETURN_IF_ERROR(vocabulary.Tokenize(path, &tokens, &unknown_words));
    }
    const auto total = static_cast<int64_t>(tokens.size());
    int64_t first = 0;
    if (options.training && job.data().partition() == DISJOINT) {
      const int64_t groups = job.groups_size();
      first = total * options.group / groups;
      tokens.resize(total * (options.group + 1) / groups);
      tokens.erase(tokens.begin(), tokens.begin() + first);
    }

    const int64_t unroll = config.unroll();
    const int64_t lanes =
        options.training ? job.groups(options.group).num_workers() * job.training().batch_size()
                         : job.evaluation().batch_size();
    // One token more than inputs: the label of the last.
    const int64_t usable = static_cast<int64_t>(tokens.size()) - 1;
    const int64_t segments = usable / (lanes * unroll);
    if (segments < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, ".text.files: only ", tokens.size(), " tokens",
                       options.training ? " for this group" : "", "; at least ", lanes * unroll + 1,
                       ", for ", lanes,
                       options.training ? " lanes (workers x training.batch_size) of "
                                        : " lanes (evaluation.batch_size) of ",
                       unroll, " tokens and one more, would be right"));
    }
    Shape shape;
    shape.size = segments * lanes;
    shape.num_classes = vocabulary.size();
    shape.labels_per_example = unroll;
    shape.lanes = lanes;
    shape.summary =
        absl::StrCat(tokens.size(), " of the ", total, " tokens of ", absl::StrJoin(files, ", "),
                     "; vocabulary ", vocabulary.size(), ", ", unknown_words, " unknown words; ",
                     lanes, " lanes of ", segments * unroll, " tokens, ",
                     usable - shape.size * unroll, " left over at the end");
    return std::make_unique<TextDataset>(internal::ConfigOf(options), job.model().label_loss(),
                                         std::move(shape), internal::IdSalt(options), first,
                                         std::move(tokens));
  }

  absl::Status Fill(absl::Span<const ExampleRef> refs, Batch* batch) const override {
    Allocate(static_cast<int64_t>(refs.size()), batch);
    int64_t* inputs = batch->fields[0].tensor.As<int64_t>().data();
    int64_t* labels = batch->labels.As<int64_t>().data();
    const auto ids = batch->example_ids.As<int64_t>();
    for (size_t i = 0; i < refs.size(); ++i) {
      const int64_t start = StartOf(refs[i]);
      inputs = std::copy_n(tokens_.data() + start, unroll_, inputs);
      labels = std::copy_n(tokens_.data() + start + 1, unroll_, labels);
      ids[i] = static_cast<int64_t>(Mix(salt_, first_token_ + start));
      if (refs[i].index < lanes()) batch->reset_state = true;
    }
    return absl::OkStatus();
  }

  void CountLabels(absl::Span<const ExampleRef> refs, absl::Span<int64_t> counts) const override {
    for (const ExampleRef& ref : refs) {
      const int32_t* const labels = &tokens_[StartOf(ref) + 1];
      for (int64_t i = 0; i < unroll_; ++i) ++counts[labels[i]];
    }
  }

 private:
  // First token of an example.
  int64_t StartOf(const ExampleRef& ref) const {
    return ref.index % lanes() * stream_tokens_ + ref.index / lanes() * unroll_;
  }

  const int64_t unroll_;
  const uint64_t salt_;
  const int64_t first_token_;    // of this group's part, in the whole text
  const int64_t stream_tokens_;  // of one lane
  const std::vector<int32_t> tokens_;
};

}  // namespace

namespace internal {

absl::StatusOr<std::unique_ptr<Dataset>> CreateText(const DatasetOptions& options) {
  return TextDataset::Create(options);
}

}  // namespace internal
}  // namespace codistill
