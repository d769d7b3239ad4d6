#ifndef CODISTILL_WORKER_DATA_VOCABULARY_H_
#define CODISTILL_WORKER_DATA_VOCABULARY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace codistill {

// The words of a text and their numbers: in order of first appearance from 0, then <eos>, which
// ends every line. Words are what stands between ASCII blanks. Immutable, thread-safe.
class Vocabulary {
 public:
  static constexpr absl::string_view kEndOfLine = "<eos>";

  // Reads the words of `files`. `unknown` stands for words that are not among them; it need not be
  // one itself as long as none is met.
  static absl::StatusOr<Vocabulary> Read(const std::vector<std::string>& files,
                                         absl::string_view unknown);

  int64_t size() const { return static_cast<int64_t>(index_.size()); }

  // Appends the numbers of a file's words to `tokens`, and counts those that were unknown in
  // `unknown_words`. INVALID_ARGUMENT names file, line and word where the vocabulary has neither
  // the word nor what stands for unknown ones.
  absl::Status Tokenize(const std::string& path, std::vector<int32_t>* tokens,
                        int64_t* unknown_words) const;

 private:
  Vocabulary() = default;

  absl::flat_hash_map<std::string, int32_t> index_;
  std::string unknown_;
  int32_t end_of_line_ = 0;
  int32_t unknown_index_ = -1;  // -1 = not in the vocabulary
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_VOCABULARY_H_
