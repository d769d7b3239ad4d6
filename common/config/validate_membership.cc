// Who takes part in a step: training.backup_workers and training.membership.

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/config/validate.h"

namespace codistill {
namespace internal {
namespace {

constexpr int64_t kMaxWorkers = 4096;

std::string Index(absl::string_view field, int i) { return absl::StrCat(field, "[", i, "]"); }

// training.weights_lag: which steps may be computed on weights that are one step older.
void CheckWeightsLag(const JobConfig& job, Mistakes* mistakes) {
  const TrainingConfig& training = job.training();
  const std::string path = "training.weights_lag";
  mistakes->Between(path, training.weights_lag(), 0, 1);
  if (training.weights_lag() == 0 || training.update_mode() != TrainingConfig::SYNC) return;
  // Shards keep the weights before the newest for a step that is still to be pushed; a group that
  // goes on without a worker would leave it behind these too.
  if (training.backup_workers() > 0) {
    mistakes->Add(path, absl::StrCat("not with backup_workers (", training.backup_workers(),
                                     "): a straggler would find its weights gone at every step; "
                                     "one of the two must be 0"));
  }
  if (training.membership() == TrainingConfig::ELASTIC) {
    mistakes->Add(path,
                  "not with ELASTIC membership in SYNC; 0, or training.membership: FIXED, would be "
                  "right");
  }
  if (job.model().embedding_tables_size() > 0) {
    mistakes->Add(path,
                  "not with embedding tables in SYNC: rows exist as of the newest step only; 0, or "
                  "training.update_mode: ASYNC, would be right");
  }
}

}  // namespace

void CheckMembership(const JobConfig& job, Mistakes* mistakes) {
  const TrainingConfig& training = job.training();
  const bool elastic = training.membership() == TrainingConfig::ELASTIC;
  const bool recurrent = job.model().states_size() > 0;
  mistakes->AtLeast("training.backup_workers", training.backup_workers(), 0);
  mistakes->Positive("training.lease_s", training.lease_s());
  CheckWeightsLag(job, mistakes);
  if (training.backup_workers() > 0) {
    if (training.update_mode() != TrainingConfig::SYNC) {
      mistakes->Add("training.backup_workers",
                    absl::StrCat("without meaning in ",
                                 TrainingConfig::UpdateMode_Name(training.update_mode()), " (",
                                 training.backup_workers(),
                                 "): nobody waits for others there; 0, or training.update_mode: "
                                 "SYNC, would be right"));
    }
    if (recurrent) {
      // The state after a step that was never computed does not exist.
      mistakes->Add("training.backup_workers",
                    absl::StrCat("not with recurrent state (", training.backup_workers(),
                                 "): a straggler skips steps and with them the state of its lanes; "
                                 "0 would be right"));
    }
  }
  if (elastic && job.data().train().has_text()) {
    // Lanes belong to positions in the list of members: all would change hands with every change.
    mistakes->Add("training.membership",
                  "ELASTIC cannot share out a text source, whose lanes are read in order by the "
                  "same worker; FIXED would be right");
  }
  for (int i = 0; i < job.groups_size(); ++i) {
    const GroupConfig& group = job.groups(i);
    const std::string path = Index("groups", i);
    if (training.backup_workers() > 0 && training.backup_workers() >= group.num_workers()) {
      mistakes->Add("training.backup_workers",
                    absl::StrCat("nobody's push would be waited for (", training.backup_workers(),
                                 "); fewer than the ", group.num_workers(), " of ", path,
                                 ".num_workers would be right"));
    }
    if (!elastic) {
      if (group.has_max_workers() || group.has_min_workers()) {
        mistakes->Add(path + (group.has_max_workers() ? ".max_workers" : ".min_workers"),
                      "without meaning under FIXED membership; leave it out, or "
                      "training.membership: ELASTIC, would be right");
      }
      continue;
    }
    if (group.max_workers() != 0) {
      mistakes->Between(path + ".max_workers", group.max_workers(), group.num_workers(),
                        kMaxWorkers);
    }
    mistakes->Between(path + ".min_workers", group.min_workers(), 1,
                      std::max(1, group.num_workers()));
  }
}

}  // namespace internal
}  // namespace codistill
