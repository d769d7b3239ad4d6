#include "common/model/followed_tables.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/config/embedding.h"

namespace codistill {
namespace {

// Builds the next version of every table from what the shards send.
class TableBuilder final : public RowFollower::Sink {
 public:
  TableBuilder(const std::vector<std::shared_ptr<const FollowedRows>>& base, bool changes_only)
      : changes_only_(changes_only) {
    for (const auto& table : base) builders_.emplace_back(table);
  }

  absl::Status Begin(int, bool whole) override {
    // What is held of this shard's keys would have to go; all tables are then read afresh.
    if (!whole || !changes_only_) return absl::OkStatus();
    refused_ = true;
    return absl::AbortedError("the changes since the cut that is held are not known any more");
  }
  void Put(int table, absl::Span<const uint64_t> keys, absl::Span<const float> rows) override {
    const size_t dim = rows.size() / keys.size();
    for (size_t i = 0; i < keys.size(); ++i) builders_[table].Put(keys[i], rows.data() + i * dim);
  }
  void Erase(int table, absl::Span<const uint64_t> keys) override {
    for (const uint64_t key : keys) builders_[table].Erase(key);
  }

  bool refused() const { return refused_; }
  std::vector<std::shared_ptr<const FollowedRows>> Build() {
    std::vector<std::shared_ptr<const FollowedRows>> tables;
    for (FollowedRows::Builder& builder : builders_) tables.push_back(builder.Build());
    return tables;
  }

 private:
  const bool changes_only_;
  bool refused_ = false;
  std::vector<FollowedRows::Builder> builders_;
};

}  // namespace

FollowedTables::FollowedTables(const JobConfig& job, int group)
    : sync_(job.training().update_mode() == TrainingConfig::SYNC) {
  for (int t = 0; t < job.model().embedding_tables_size(); ++t) {
    const EmbeddingTableConfig& config = job.model().embedding_tables(t);
    dims_.push_back(config.dim());
    empty_.push_back(FollowedRows::Empty(
        config.dim(), RowInit{EmbeddingSeed(job, group, t), config.init_scale()}));
  }
  tables_ = empty_;
}

void FollowedTables::Connect(const GroupRef& group, uint64_t shard_map_digest,
                             const std::vector<std::string>& addresses) {
  MutexLock lock(&mu_);
  client_ = RowFollower::Create({group, shard_map_digest, addresses, dims_});
}

absl::StatusOr<FollowedTables::Result> FollowedTables::Load(uint64_t generation, int64_t cut_step,
                                                            absl::Time deadline) {
  Result result;
  if (dims_.empty()) return result;
  std::shared_ptr<RowFollower> client;
  {
    MutexLock lock(&mu_);
    client = client_;
  }
  if (client == nullptr) return absl::UnavailableError("not connected to the group's shards yet");
  const bool same = held_.generation == generation;
  if (same && held_.cut == cut_step && held_.exact) {
    result.tables = tables_;
    return result;
  }
  // Whole tables that are ahead of their cut become right with the changes up to a later one.
  int64_t since = same && held_.cut < cut_step ? held_.cut : -1;
  for (;;) {
    TableBuilder builder(since < 0 ? empty_ : tables_, since >= 0);
    const absl::StatusOr<RowFollower::Result> read =
        client->Read(generation, cut_step, since, deadline, &builder);
    if (!read.ok() && builder.refused()) {
      since = -1;
      continue;
    }
    if (!read.ok()) return Annotate(read.status(), "embedding tables");
    tables_ = builder.Build();
    held_ = {generation, cut_step, read->exact};
    result.bytes += read->bytes;
    break;
  }
  {
    MutexLock lock(&mu_);
    rows_ = 0;
    for (const auto& table : tables_) rows_ += table->size();
  }
  if (!held_.exact && sync_) {
    return absl::AbortedError(
        absl::StrCat("the group has trained on while its embedding tables were read at cut ",
                     cut_step, "; the next cut makes them whole"));
  }
  result.tables = tables_;
  return result;
}

void FollowedTables::Cancel() {
  MutexLock lock(&mu_);
  if (client_ != nullptr) client_->Cancel();
}

int64_t FollowedTables::rows() const {
  MutexLock lock(&mu_);
  return rows_;
}

}  // namespace codistill
